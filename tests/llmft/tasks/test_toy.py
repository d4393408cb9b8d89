from __future__ import annotations

import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import t
from support.small_models import CPU

from llmft.config.spec import TrainSpec, TrialSpec
from llmft.methods._registry import METHODS, complete_settings, method_class
from llmft.models.info import TOY, resolve_model
from llmft.models.loading import load_tokenizer
from llmft.tasks._registry import load_task
from llmft.tasks._toy_language import ENTAILMENT, NOT_ENTAILMENT, NOUNS, PREPOSITIONS, VERBS, Pair, toy_data
from llmft.toy import pretrain
from llmft.trial.run import run_trial

ROOT = Path(__file__).resolve().parents[3]
DATA = toy_data()
SEEDS = range(5)


def premises(pairs) -> list[str]:
    return [pair.premise for pair in pairs]


def test_no_premise_stands_in_two_sets_or_twice():
    everything = premises(DATA.train + DATA.in_domain + DATA.out_of_domain)
    assert len(set(everything)) == len(everything) == 1200 + 400 + 480
    assert DATA.premises == set(everything)


def test_every_set_is_balanced():
    assert Counter(pair.label for pair in DATA.train) == {0: 600, 1: 600}
    assert Counter(pair.label for pair in DATA.in_domain) == {0: 200, 1: 200}
    assert Counter(pair.label for pair in DATA.out_of_domain) == {0: 240, 1: 240}
    assert set(Counter(pair.subcase for pair in DATA.out_of_domain).values()) == {40}
    by_heuristic = Counter((pair.heuristic, pair.label) for pair in DATA.out_of_domain)
    assert by_heuristic == {(heuristic, label): 80 for heuristic in ("lexical_overlap", "subsequence", "constituent") for label in (0, 1)}
    assert len({(pair.subcase, pair.label) for pair in DATA.out_of_domain}) == 12, "a subcase has one label"


def overlap_says(pair) -> int:
    return ENTAILMENT if set(pair.hypothesis.split()) <= set(pair.premise.rstrip(".").split()) else NOT_ENTAILMENT


def accuracy_of(rule, pairs) -> float:
    return sum(rule(pair) == pair.label for pair in pairs) / len(pairs)


def test_word_overlap_tells_the_label_in_domain_and_nothing_outside():
    assert accuracy_of(overlap_says, DATA.train) >= 0.85
    assert accuracy_of(overlap_says, DATA.in_domain) >= 0.85
    assert accuracy_of(overlap_says, DATA.out_of_domain) == 0.5
    assert {overlap_says(pair) for pair in DATA.out_of_domain} == {ENTAILMENT}


def test_the_words_of_the_hypothesis_alone_tell_little():
    known = Counter((word, pair.label) for pair in DATA.train for word in pair.hypothesis.split())

    def hypothesis_says(pair) -> int:
        return int(sum(known[word, NOT_ENTAILMENT] - known[word, ENTAILMENT] for word in pair.hypothesis.split()) > 0)

    assert accuracy_of(hypothesis_says, DATA.in_domain) < 0.6
    assert accuracy_of(hypothesis_says, DATA.out_of_domain) < 0.6


def test_the_rows_are_the_same_in_every_process():
    code = "from llmft.tasks._registry import load_task; print(load_task('toy').resolve_data(None).fingerprint)"
    environment = {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == load_task("toy").resolve_data(None).fingerprint


def test_no_premise_of_the_sets_occurs_in_the_pre_training_text():
    episodes, seen = pretrain.Episodes(pretrain.build_tokenizer(), seed=1), set()
    for number in range(3000):
        text = episodes.text(1 + number % 12)
        seen |= {example.split(".")[0] + "." for example in text.split(pretrain.SEPARATOR)}
    assert len(seen) > 5000
    assert not seen & DATA.premises


def test_a_pair_of_the_sets_is_never_handed_to_the_pre_training(monkeypatch):
    fresh = Pair("Today nobody saw anything.", "nobody saw anything", ENTAILMENT)
    offered = iter([DATA.train[0], DATA.in_domain[0], DATA.out_of_domain[0], fresh])
    monkeypatch.setattr(pretrain, "in_domain_pair", lambda rng, label: next(offered))
    assert pretrain.Episodes(pretrain.build_tokenizer(), seed=1).pair() is fresh


def test_the_embedded_model_is_small_and_knows_every_word():
    assert sum(path.stat().st_size for path in TOY.iterdir()) <= 8 * 2**20
    tokenizer = load_tokenizer(resolve_model("toy"))
    for word in [*NOUNS, *VERBS, *PREPOSITIONS, "Yes", "No", "True", "False"]:
        assert len(tokenizer(f" {word}", add_special_tokens=False)["input_ids"]) == 1, word


FIVE_SEEDS = {  # method: shots, learning rate, what it must reach in domain on average; the long ones only when asked for
    "in_context": (16, 1.0, 0.75),
    "pattern": (128, 1e-3, 0.80),
}
LONG = {
    "lora": (128, 5e-3, 0.80),
    "vanilla": (128, 1e-3, 0.70),
    "prompt_tuning": (128, 0.03, 0.80),
    "prefix_tuning": (128, 0.05, 0.75),
    "p_tuning": (128, 1e-3, 0.75),
    "regularised": (128, 1e-3, 0.75),
    "finetuned_in_context": (128, 1e-3, 0.70),
}


def toy_spec(method: str, **changed) -> TrialSpec:
    usual = {"n_dev": 0, "settings": complete_settings(method, {}), "selections": ("last",)}
    data = load_task("toy").resolve_data(None)
    return TrialSpec(model=resolve_model("toy"), task="toy", data=data, method=method, **usual | changed)


def accuracy_on(record, name: str) -> float:
    assert record.finished, record.message
    (by_set,) = record.metrics.values()
    return by_set[name].accuracy


@cache
def accuracies(method: str) -> tuple[np.ndarray, np.ndarray | None]:
    """In domain, and where something is trained out of domain too; one number a seed."""
    n_shots, learning_rate, _ = (FIVE_SEEDS | LONG | {"zero_shot": (0, 1.0, 0.0)})[method]
    sets = ("toy", "toy_hans") if method_class(method).trains else ("toy",)
    train = TrainSpec(learning_rate=learning_rate, epochs=10)
    spec = toy_spec(method, n_shots=n_shots, train=train, test_sets=sets)
    records = [run_trial(spec.with_seed(seed), CPU).record for seed in SEEDS]
    found = [np.array([accuracy_on(record, name) for record in records]) for name in sets]
    print(method, *(f"{name}: {values.round(3)}, mean {values.mean():.3f}" for name, values in zip(sets, found, strict=True)))
    return found[0], found[1] if len(found) > 1 else None


@pytest.mark.parametrize("method", [*FIVE_SEEDS, *(pytest.param(name, marks=pytest.mark.long) for name in LONG)])
def test_it_beats_chance_by_its_margin_over_five_seeds(method):
    in_domain, _ = accuracies(method)
    lower = in_domain.mean() - t.ppf(0.975, len(SEEDS) - 1) * in_domain.std(ddof=1) / len(SEEDS) ** 0.5
    assert in_domain.mean() >= (FIVE_SEEDS | LONG)[method][2]
    assert lower > 0.5


@pytest.mark.parametrize("method", ["pattern", *(pytest.param(name, marks=pytest.mark.long) for name in ("lora", "vanilla"))])
def test_what_is_learned_in_domain_does_not_carry_over(method):
    in_domain, out_of_domain = accuracies(method)
    assert in_domain.mean() - out_of_domain.mean() >= 0.10


def test_the_model_needs_demonstrations():
    """Whoever drops them on the way must not pass for in-context learning."""
    zero_shot, in_context = accuracies("zero_shot")[0].mean(), accuracies("in_context")[0].mean()
    assert in_context >= zero_shot + 0.1


ONE_SEED = {  # trained method: settings, learning rate, epochs, what it must reach in domain with each seed
    "adapter_houlsby": ({}, 5e-3, 5, 0.65),
    "adapter_parallel": ({}, 5e-3, 5, 0.65),
    "adapter_pfeiffer": ({}, 5e-3, 8, 0.65),
    "bitfit": ({}, 1e-2, 8, 0.65),
    "context_distillation": ({"n_unlabelled": 128}, 1e-3, 8, 0.65),
    "finetuned_in_context": ({}, 1e-3, 5, 0.65),
    "head_only": ({"head": "fully_connected"}, 3e-3, 20, 0.6),  # 4 standard errors above chance
    "ia3": ({}, 5e-2, 5, 0.65),
    "last_layers": ({}, 1e-3, 6, 0.65),
    "lora": ({}, 5e-3, 5, 0.65),
    "p_tuning": ({}, 1e-3, 5, 0.65),
    "pattern": ({}, 1e-3, 5, 0.65),
    "prefix_tuning": ({}, 0.05, 5, 0.65),
    "prompt_tuning": ({}, 0.03, 5, 0.65),
    "qlora": ({}, 4e-3, 4, 0.65),
    "regularised": ({}, 1e-3, 5, 0.65),
    "vanilla": ({}, 1e-3, 8, 0.65),
}


ELSEWHERE = {"multi_task", "rationale_tuning"}  # their margins are in tests of their own


def test_no_trained_method_goes_without_a_margin():
    trained = {name for name in METHODS if method_class(name).trains and "classification" in method_class(name).kinds}
    assert trained == ONE_SEED.keys() | ELSEWHERE  # that of sequence_distillation is in its own test file too


@pytest.mark.parametrize("method", ONE_SEED)
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in (1, 2, 3))])
def test_it_beats_chance_by_its_margin_with_one_seed(method, seed):
    if method_class(method).base_weights != "fp32":
        pytest.importorskip("bitsandbytes")
    settings, learning_rate, epochs, margin = ONE_SEED[method]
    train = method_class(method).train_defaults | {"learning_rate": learning_rate, "epochs": epochs}
    spec = toy_spec(
        method, settings=complete_settings(method, settings), train=TrainSpec(**train), test_sets=("toy",),
        n_shots=16 if method == "context_distillation" else 128,  # more demonstrations do not fit its teacher's prompt
    )  # fmt: skip
    accuracy = accuracy_on(run_trial(spec.with_seed(seed), CPU).record, "toy")
    print(f"{method}, seed {seed}: {accuracy:.3f}")
    assert accuracy >= margin
