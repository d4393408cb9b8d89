from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from support.small_models import CPU

from llmft.config.spec import TrialSpec
from llmft.errors import UserError
from llmft.evaluation import lm_eval as harness
from llmft.evaluation.evaluator import Evaluator
from llmft.evaluation.lm_eval import check_lm_eval, measures, run_lm_eval
from llmft.evaluation.perplexity import text_likelihood
from llmft.methods._registry import build_method
from llmft.models.adapted import AdaptedModel
from llmft.models.loading import borrow_model, load_tokenizer
from llmft.tasks._toy_language import toy_data
from llmft.trial.preparation import encode_prompts, prepare_trial

lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'llmft[harness]'")

PAGES = [" \n".join(pair.premise for pair in toy_data().train[start : start + 30]) for start in (0, 30)]


@pytest.fixture(scope="session")
def tasks_folder(tmp_path_factory) -> Path:
    """Tasks of three kinds over local files, a group, and a task whose data is on the hub."""
    folder = tmp_path_factory.mktemp("harness")
    pairs = [{"premise": pair.premise, "hypothesis": pair.hypothesis, "label": pair.label} for pair in toy_data().in_domain[:12]]
    (folder / "nli.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    (folder / "pages.jsonl").write_text("\n".join(json.dumps({"page": page}) for page in PAGES))
    own = {
        "toy_nli": {
            "output_type": "multiple_choice", "doc_to_text": "{{premise}} {{hypothesis}} ?", "doc_to_target": "label",
            "doc_to_choice": ["Yes", "No"], "metric_list": [{"metric": "acc"}],
        },
        "toy_pages": {
            "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{page}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}],
        },
        "toy_words": {
            "output_type": "generate_until", "doc_to_text": "{{premise}}", "doc_to_target": "{{hypothesis}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4}, "metric_list": [{"metric": "exact_match"}],
        },
    }  # fmt: skip
    group = {"group": "toy_group", "task": ["toy_nli", "toy_more"], "aggregate_metric_list": [{"metric": "acc"}]}
    (folder / "group.yaml").write_text(yaml.safe_dump(group))
    on_hub = {"task": "toy_far", "dataset_path": "nobody/nothing", "output_type": "multiple_choice", "test_split": "test"}
    (folder / "far.yaml").write_text(yaml.safe_dump(on_hub))
    own["toy_more"] = own["toy_nli"] | {"doc_to_text": "{{hypothesis}} {{premise}} ?"}
    for name, content in own.items():
        file = folder / ("pages.jsonl" if name == "toy_pages" else "nli.jsonl")
        local = {
            "task": name,
            "dataset_path": "json",
            "test_split": "test",
            "dataset_kwargs": {"data_files": {"test": str(file)}},
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(local | content))
    return folder


@pytest.fixture(scope="session")
def with_rte(tasks_folder, data_dir) -> None:
    """Adds the harness's own RTE, its rows read from local files."""
    file = Path(lm_eval.__file__).parent / "tasks" / "glue" / "rte" / "default.yaml"
    splits = {split: f"{data_dir}/rte_{split}.parquet" for split in ("train", "validation")}
    local = {"dataset_path": "parquet", "dataset_name": None, "dataset_kwargs": {"data_files": splits}}
    (tasks_folder / "rte.yaml").write_text(yaml.safe_dump({"include": str(file), "task": "rte_here", **local}))


@pytest.fixture
def folder(request, tasks_folder, monkeypatch) -> str:
    """The folder, and an index of nothing else: reading that of the harness's own 14,000 tasks takes many seconds."""
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
    harness._manager.cache_clear()
    yield str(tasks_folder)
    harness._manager.cache_clear()


@pytest.fixture
def base(small_opt):
    with borrow_model(small_opt, "fp32", torch.device("cpu")) as model:
        yield AdaptedModel(build_method("zero_shot", {}), model)


def test_zero_shot_rte_is_the_harness_own_example_by_example(with_rte, folder, rte, rte_opt):
    spec = TrialSpec(
        model=rte_opt, task="rte", data=rte, method="zero_shot", pattern="eval-harness", test_sets=("rte",), n_dev=0,
        selections=("none",),
    )  # fmt: skip
    setting, tokenizer = prepare_trial(spec), load_tokenizer(rte_opt)
    with borrow_model(rte_opt, "fp32", torch.device("cpu"), copied=False) as model:
        adapted = AdaptedModel(build_method("zero_shot", {}), model)
        ours = Evaluator(adapted, encode_prompts(spec, setting), setting.words, CPU).predict("rte")
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        plain = HFLM(pretrained=model.network, tokenizer=tokenizer, batch_size=16)  # nothing of ours between it and the model
        theirs = simple_evaluate(plain, tasks=["rte_here"], task_manager=harness._manager(folder), bootstrap_iters=0)
        bridged = run_lm_eval(adapted, tokenizer, ["rte_here"], folder=folder, length=2048, limit=60, log_samples=True)
    samples = sorted(theirs["samples"]["rte_here"], key=lambda sample: sample["doc_id"])
    (test,) = setting.tests
    pattern = setting.task.patterns["eval-harness"]
    assert len(samples) == len(test.examples) == 277
    for sample, example in zip(samples, test.examples, strict=True):
        prompt = pattern.render(example.fields)
        assert [tuple(arguments) for arguments in sample["arguments"]] == [(prompt, " True"), (prompt, " False")]
        assert sample["target"] == example.label
    likelihoods = np.array([[response[0][0] for response in sample["resps"]] for sample in samples])
    restricted = likelihoods - np.logaddexp.reduce(likelihoods, axis=1, keepdims=True)
    np.testing.assert_allclose(ours.log_probabilities, restricted, atol=2e-4)
    assert np.ptp(likelihoods) > 1 and 0 < ours.score < 1
    assert ours.score == pytest.approx(theirs["results"]["rte_here"]["acc,none"])
    again = sorted(bridged["samples"]["rte_here"], key=lambda sample: sample["doc_id"])
    np.testing.assert_allclose([[r[0][0] for r in sample["resps"]] for sample in again], likelihoods[:60], atol=2e-4)
    (accuracy,) = measures(bridged)
    right = ours.predicted == ours.labels
    assert (accuracy.metric, accuracy.value, accuracy.n) == ("acc", pytest.approx(right[:60].mean()), 60)


def test_scores_before_the_restriction_are_the_harness_log_likelihoods(folder, base, small_opt):
    from llmft.models.batches import make_batch

    spec = TrialSpec(model=small_opt, task="toy", method="zero_shot", test_sets=("toy",), n_dev=0, selections=("none",))
    setting = prepare_trial(spec)
    encoded = encode_prompts(spec, setting)
    batch = make_batch(encoded.sets["toy"], range(12), setting.words, base.model, prefix_ids=encoded.prefix)
    with torch.no_grad():
        ours = base(base.method.scores, batch).labels
    results = run_lm_eval(base, load_tokenizer(small_opt), ["toy_nli"], folder=folder, length=512, log_samples=True)
    theirs = {sample["doc_id"]: [r[0][0] for r in sample["resps"]] for sample in results["samples"]["toy_nli"]}
    np.testing.assert_allclose(ours, [theirs[i] for i in range(12)], atol=1e-4)


def test_the_perplexity_of_a_text_is_the_harness_own(folder, base, small_opt):
    tokenizer = load_tokenizer(small_opt)
    found = {measure.metric: measure for measure in measures(run_lm_eval(base, tokenizer, ["toy_pages"], folder=folder, length=40))}
    ours = [text_likelihood(base, tokenizer, page, 40) for page in PAGES]
    total = -sum(page.log_likelihood for page in ours)
    assert np.log(found["word_perplexity"].value) == pytest.approx(total / sum(page.n_words for page in ours), rel=1e-5)
    assert np.log(found["byte_perplexity"].value) == pytest.approx(total / sum(page.n_bytes for page in ours), rel=1e-5)
    assert not found["word_perplexity"].larger_is_better and found["word_perplexity"].n == 2


def test_an_adapted_model_is_asked_with_its_adapters(folder, small_opt):
    """Against peft: the adapters merged into plain weights, and the harness alone."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    tokenizer = load_tokenizer(small_opt)
    method = build_method("lora", {"targets": ["q_proj", "fc1"]})
    with borrow_model(small_opt, "fp32", torch.device("cpu")) as model:
        method.prepare(model, 2, torch.Generator().manual_seed(0))
        with torch.no_grad():
            for parameter in model.network.parameters():
                if parameter.requires_grad:
                    parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
        found = run_lm_eval(AdaptedModel(method, model), tokenizer, ["toy_nli", "toy_words"], folder=folder, length=512, log_samples=True)
        merged = copy.deepcopy(model.network)
    for module in merged.modules():
        if hasattr(module, "merge") and hasattr(module, "base_layer"):
            module.merge()
    plain = HFLM(pretrained=merged, tokenizer=tokenizer, batch_size=4)
    expected = simple_evaluate(plain, tasks=["toy_nli", "toy_words"], task_manager=harness._manager(folder), bootstrap_iters=0)
    for name in ("toy_nli", "toy_words"):
        ours, theirs = ({s["doc_id"]: s["resps"] for s in each["samples"][name]} for each in (found, expected))
        for doc, responses in theirs.items():
            for mine, other in zip(ours[doc], responses, strict=True):
                assert mine[0] == other[0] if name == "toy_words" else mine[0][0] == pytest.approx(other[0][0], abs=1e-4)


def test_a_group_is_one_number_beside_its_tasks_and_limit_counts_examples(folder, base, small_opt):
    found = measures(run_lm_eval(base, load_tokenizer(small_opt), ["toy_group"], folder=folder, limit=5, length=512))
    by_name = {measure.name: measure for measure in found}
    assert by_name.keys() == {"toy_nli", "toy_more", "toy_group"} and len(found) == 3
    assert by_name["toy_nli"].n == 5 and by_name["toy_nli"].stderr > 0 and by_name["toy_nli"].larger_is_better
    assert by_name["toy_group"].value == pytest.approx((by_name["toy_nli"].value + by_name["toy_more"].value) / 2)


def test_generation_with_virtual_tokens_reads_the_logits_and_agrees_with_the_networks_own(folder, base, small_opt, monkeypatch):
    """A method that takes places and puts nothing there: the texts must be those of `generate`."""
    tokenizer, texts = load_tokenizer(small_opt), []
    for n_virtual in (0, 3):
        monkeypatch.setattr(AdaptedModel, "n_virtual_tokens", n_virtual)
        results = run_lm_eval(base, tokenizer, ["toy_words"], folder=folder, limit=6, length=100, log_samples=True)
        texts.append([sample["resps"] for sample in sorted(results["samples"]["toy_words"], key=lambda s: s["doc_id"])])
    assert texts[0] == texts[1] and len({str(text) for text in texts[0]}) > 1


def test_mistakes_are_one_line(folder, base, small_opt, monkeypatch, tmp_path):
    tokenizer = load_tokenizer(small_opt)
    with pytest.raises(UserError, match=r"harness: unknown task 'toy_nle' .* Nearest: toy_nli"):
        check_lm_eval(["toy_nle"], folder)
    with pytest.raises(UserError, match="harness: cannot load toy_far .*from the hub: run it once with a network"):
        run_lm_eval(base, tokenizer, ["toy_far"], folder=folder)
    with pytest.raises(UserError, match="harness_dir: there is no folder"):
        check_lm_eval(["toy_nli"], str(tmp_path / "none"))
    vanilla = AdaptedModel(build_method("vanilla", {}), base.model)
    with pytest.raises(UserError, match="'Vanilla' answers with a head of its own"):
        run_lm_eval(vanilla, tokenizer, ["toy_nli"], folder=folder)
    harness._manager.cache_clear()
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"not installed\. pip install 'llmft\[harness\]'"):
        check_lm_eval(["toy_nli"])


@pytest.mark.long
def test_the_harness_own_tasks_are_known():
    check_lm_eval(["mmlu", "bbh", "super-glue-lm-eval-v1", "glue", "tydiqa_goldp", "mgsm_direct", "lambada_openai", "wikitext", "rte"])
    with pytest.raises(UserError, match="unknown task 'mmlo' .* Nearest: mmlu"):
        check_lm_eval(["mmlo"])
