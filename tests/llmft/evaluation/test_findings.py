from __future__ import annotations

import dataclasses
import functools
import re
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import norm
from support.predictions import of_predictions
from support.small_models import CPU, byte_level_tokenizer, toy_text

from llmft.data.task import Example, TaskData
from llmft.data.task import TestSet as ReportedSet
from llmft.evaluation import findings
from llmft.evaluation.contamination import contamination_findings
from llmft.evaluation.evaluator import Evaluator
from llmft.evaluation.findings import (
    CODES,
    accuracy_interval,
    set_findings,
    text_findings,
    training_findings,
    word_findings,
    worst,
)
from llmft.evaluation.metrics import text_metrics
from llmft.evaluation.predictions import Generated, Predictions
from llmft.prompting.encoding import PromptEncoder
from llmft.prompting.label_words import LabelWords, resolve_label_words
from llmft.records.record import CurvePoint, Finding, Teacher, TeacherRound
from llmft.tasks._registry import load_task
from llmft.trial.run import run_trial


def codes(found) -> set[str]:
    assert all(finding.code in CODES and finding.message for finding in found)
    return {finding.code for finding in found}


def set_codes(gold, said, free=None) -> set[str]:
    return codes(set_findings(of_predictions(gold, said, free), "rte", "last"))


BALANCED = np.arange(200) % 2


def but(n_wrong: int, gold=BALANCED) -> np.ndarray:
    """Predictions with the first `n_wrong` of `gold` wrong."""
    return np.where(np.arange(len(gold)) < n_wrong, 1 - gold, gold)


def test_the_number_that_nobody_noticed(rte):
    """A scorer that always said 'not_entailment' gave 47.29 % on RTE, and the model was blamed."""
    examples = next(test for test in load_task("rte").load(rte).tests if test.name == "rte").examples
    gold = np.array([example.label for example in examples])
    metrics = of_predictions(gold, np.ones(277, dtype=int))
    assert metrics.accuracy == 131 / 277 and f"{metrics.accuracy:.2%}" == "47.29%"
    found = set_findings(metrics, "rte", "last")
    assert {"constant_prediction", "chance_level"} <= codes(found)
    (constant,) = [finding for finding in found if finding.code == "constant_prediction"]
    assert constant.severity == "warning" and (constant.set, constant.selection) == ("rte", "last")
    assert "277" in constant.message and "not_entailment" in constant.message


def test_a_whole_trial_with_a_broken_scorer_carries_the_finding(rte, rte_opt, spec_of, monkeypatch):
    real = Evaluator.predict

    def always_no(self, name):
        predictions = real(self, name)
        return Predictions(predictions.labels, np.tile(np.log([[0.1, 0.9]]), (len(predictions.labels), 1)), predictions.free)

    monkeypatch.setattr(Evaluator, "predict", always_no)
    record = run_trial(spec_of("in_context", model=rte_opt, task="rte", data=rte, n_shots=2, test_sets=("rte",), n_test=None), CPU).record
    assert record.metrics["none"]["rte"].accuracy == 131 / 277
    assert "constant_prediction" in codes(record.findings)


def test_a_good_set_of_numbers_raises_nothing():
    assert set_codes(BALANCED, but(30), free=BALANCED) == set()


def test_constant_prediction():
    assert "constant_prediction" in set_codes(BALANCED, np.zeros(200, dtype=int))
    assert "constant_prediction" not in set_codes(BALANCED, np.array([1] + [0] * 199))


@pytest.mark.parametrize(("n_others", "raised"), [(1, True), (10, True), (11, False)])
def test_near_constant_prediction_from_95_percent(n_others, raised):
    said = np.array([1] * n_others + [0] * (200 - n_others))
    assert ("near_constant_prediction" in set_codes(BALANCED, said)) == raised


def test_equals_class_share():
    gold = np.array([0, 1, 0, 1, 0] * 40)  # 120 and 80
    for n_right, raised in ((80, True), (120, True), (79, False), (81, False), (121, False)):
        assert ("equals_class_share" in set_codes(gold, but(200 - n_right, gold))) == raised
    assert "equals_class_share" not in set_codes(gold, np.zeros(200, dtype=int))  # told by constant_prediction already


def wilson_low(n_right: int, n: int) -> float:
    z, p = norm.ppf(0.975), n_right / n
    return (p + z**2 / 2 / n - z * np.sqrt(p * (1 - p) / n + z**2 / 4 / n**2)) / (1 + z**2 / n)


@pytest.mark.parametrize("n_right", range(100, 130, 3))
def test_chance_level_by_wilsons_interval(n_right):
    low, high = accuracy_interval(n_right / 200, 200)
    assert low == pytest.approx(wilson_low(n_right, 200)) and low < n_right / 200 < high
    assert ("chance_level" in set_codes(BALANCED, but(200 - n_right))) == (wilson_low(n_right, 200) <= 0.5)


@pytest.mark.parametrize(("n_others", "raised"), [(0, False), (100, False), (101, True), (200, True)])
def test_mostly_other_words_above_one_half(n_others, raised):
    free = np.where(np.arange(200) < n_others, -1, BALANCED)
    assert ("mostly_other_words" in set_codes(BALANCED, but(30), free)) == raised


@pytest.mark.parametrize(
    ("ids", "expected"),
    [(((5,), (6,)), set()), (((5, 6), (6, 5)), set()), (((5, 6), (5, 7)), {"label_words_share_first_token"}),
     (((5,), (5, 7)), {"label_word_prefixes_another"}), (((5, 7), (5,)), {"label_word_prefixes_another"}),
     (((1,), (5, 6, 7), (5, 6)), {"label_word_prefixes_another"})],
)  # fmt: skip
def test_label_words_in_each_others_way(ids, expected):
    assert codes(word_findings(LabelWords(tuple("abc")[: len(ids)], ids))) >= expected
    if not expected:
        assert word_findings(LabelWords(("a", "b"), ids)) == []
    if expected == {"label_words_share_first_token"}:
        assert "label_word_prefixes_another" not in codes(word_findings(LabelWords(("a", "b"), ids)))


@functools.cache
def small_tokenizer():
    return byte_level_tokenizer(toy_text())


@pytest.mark.parametrize(("max_length", "expected"), [(400, set()), (120, {"dropped_demonstrations"}), (40, {"no_demonstrations"})])
def test_demonstrations_that_did_not_fit(spec_of, max_length, expected):
    found = run_trial(spec_of("in_context", n_shots=8, max_length=max_length), CPU).record
    assert found.finished, found.message
    assert codes(found.findings) & {"dropped_demonstrations", "no_demonstrations"} == expected
    assert (found.draws.n_demonstrations_dropped > 0) == bool(expected)
    assert len(found.draws.demonstrations) + found.draws.n_demonstrations_dropped == 8


def squeezed(max_length: int):
    """Eight demonstrations under a limit."""
    tokenizer, pattern = small_tokenizer(), load_task("toy").patterns["minimal"]
    shown = [Example(str(i), {"premise": "Today doctors saw lawyers.", "hypothesis": "x"}, i % 2) for i in range(8)]
    words = resolve_label_words(tokenizer, pattern, ("Yes", "No"), shown[0].fields)
    return PromptEncoder(tokenizer, pattern, words, "\n\n", max_length).encode(shown, {"t": shown[:1]})


def test_prompt_findings_say_how_many():
    encoded = squeezed(50)
    (finding,) = findings.prompt_findings(encoded, 8)
    assert 0 < encoded.n_dropped < 8 and finding.value == encoded.n_dropped
    assert finding.message == f"{encoded.n_dropped} of 8 demonstrations did not fit into the prompt; {8 - encoded.n_dropped} are left"


ROWS = [Example(str(i), {"premise": f"p{i}", "hypothesis": "h"}, 0) for i in range(6)]
DATA = TaskData((), (ReportedSet("t", "in", tuple(ROWS[:4])), ReportedSet("o", "out", tuple(ROWS[4:]))))


def test_drawn_examples_that_also_stand_in_a_test_set():
    (finding,) = findings.overlap_findings([ROWS[0], ROWS[3]], DATA)
    assert codes([finding]) == {"train_test_overlap"} and (finding.set, finding.value) == ("t", 2)
    assert findings.overlap_findings([Example("9", {"premise": "p0", "hypothesis": "other"}, 0)], DATA) == []


def test_loss_did_not_fall():
    assert codes(training_findings(1.0, 1.0, 10, 0)) == {"loss_did_not_fall"}
    assert training_findings(1.0, 0.99, 10, 0) == training_findings(1.0, 1.0, 1, 0) == []


def points(*scores_and_losses: tuple[float, float | None]) -> list[CurvePoint]:
    return [
        CurvePoint(step=2 * n, epoch=2 * n, train_loss=1.0, learning_rate=1e-3, dev_score=score, dev_loss=loss)
        for n, (score, loss) in enumerate(scores_and_losses, 1)
    ]


def test_patience_for_nothing():
    (finding,) = findings.patience_findings(points((0.5, 0.6), (0.5, 0.7), (0.4, 0.1)), 2)
    assert (finding.code, finding.severity, finding.value) == ("never_better_on_dev", "note", 6)
    assert "after 6 epochs" in finding.message and "first look, after 2" in finding.message
    (finding,) = findings.patience_findings(points((0.5, None), (0.5, None)), 1)  # texts have no loss
    fine = [
        (points((0.5, 0.6), (0.5, 0.7), (0.4, 0.1)), None),  # which ran to its end
        (points((0.5, 0.6), (0.5, 0.7)), 2),  # as did this one, before patience was over
        (points((0.5, 0.6), (0.5, 0.5), (0.4, 0.1)), 2),
        (points((0.5, 0.6), (0.6, 0.9), (0.4, 0.1), (0.4, 0.1)), 2),
    ]
    assert all(findings.patience_findings(*each) == [] for each in fine)


def test_patience_for_nothing_is_told_by_a_whole_trial(spec_of):
    spec = spec_of("pattern", learning_rate=3e-2, epochs=6, patience=2, warmup_ratio=0.0, n_dev=16)
    record = run_trial(spec, CPU).record
    assert len(record.curve) == 3 and "never_better_on_dev" in codes(record.findings)


@pytest.mark.parametrize(("n_skipped", "severity"), [(1, "note"), (10, "note"), (11, "warning")])
def test_skipped_steps(n_skipped, severity):
    (finding,) = training_findings(1.0, 0.5, 100, n_skipped)
    assert codes([finding]) == {"skipped_steps"} and finding.severity == severity


def test_few_rows(spec_of):
    whole = {test.name: len(test.examples) for test in load_task("toy").load(load_task("toy").resolve_data(None)).tests}
    few = [finding for finding in run_trial(spec_of(), CPU).record.findings if finding.code == "few_rows"]
    assert codes(few) and {finding.set: finding.value for finding in few} == dict.fromkeys(whole, 16)
    assert "few_rows" not in codes(run_trial(spec_of(n_test=max(whole.values()))).record.findings)


def test_a_tiny_learning_rate_is_told_by_a_whole_trial(spec_of):
    record = run_trial(spec_of("pattern", learning_rate=1e-30, epochs=2, n_shots=16, batch_size=16), CPU).record
    assert "loss_did_not_fall" in codes(record.findings)
    record = run_trial(spec_of("pattern", learning_rate=1e-3, epochs=3), CPU).record
    assert "loss_did_not_fall" not in codes(record.findings)


def test_the_worst_of_several():
    some = [Finding(code="x", severity=severity, message="") for severity in ("note", "error", "warning")]
    assert [worst(some), worst(some[::2]), worst(some[:1]), worst([])] == ["error", "warning", "note", "note"]


SHOWN = Example("shown", {"text": "another text"}, None, references=("what was shown",))


def text_codes(texts, finished=True, fields="a short query", references=("right",)) -> set[str]:
    examples = [Example(str(i), {"text": fields}, None, references=references) for i in range(len(texts))]
    answers = Generated(tuple(texts), (references,) * len(texts), np.full(len(texts), finished), "rougeL")
    return codes(text_findings(text_metrics(answers, "in"), texts, (SHOWN,), examples, "t", "last"))


VARIED = [f"an answer, number {i}" for i in range(40)]
LONG = " ".join(f"word{i}" for i in range(30))


def test_ordinary_texts_raise_nothing():
    assert text_codes(VARIED) == text_codes([*VARIED[:39], ""]) == set()  # one in forty may be empty
    assert text_codes(VARIED, fields=VARIED[0]) == set()  # an answer is quoted from its text
    assert text_codes(["what was shown", *VARIED[:4]], references=("what was shown",)) == set()  # and right


def test_a_text_that_repeats_is_told_from_one_that_quotes():
    assert text_codes([LONG, *VARIED[:5]], fields=f"before {LONG} after") == {"copied_prompt"}
    assert text_codes([" ".join(LONG.split()[:19]), *VARIED[:5]], fields=LONG) == set()


def test_the_share_of_texts_decides_between_a_note_and_a_warning():
    def severities(n_empty: int) -> dict[str, str]:
        texts = [""] * n_empty + VARIED[n_empty:]
        answers = Generated(tuple(texts), (("right",),) * 40, np.arange(40) >= n_empty, "rougeL")
        examples = [Example(str(i), {}, None, references=("right",)) for i in range(40)]
        found = text_findings(text_metrics(answers, "in"), texts, (), examples, "t", "last")
        return {finding.code: finding.severity for finding in found}

    assert severities(2) == {"empty_outputs": "warning", "cut_outputs": "note"}
    assert severities(20) == {"empty_outputs": "warning", "cut_outputs": "warning"}


def test_a_good_teacher_raises_nothing():
    good = Teacher(model="m", dev_score=0.8, zero_shot_dev_score=0.5)
    assert findings.teacher_findings(good, 2, 64) == []
    assert codes(findings.teacher_findings(good, 2, 4)) == {"weak_teacher"}  # of so few examples one cannot tell
    assert findings.teacher_findings(Teacher(model="m"), 2, 0) == []


def taught_in_rounds(second: TeacherRound) -> list[Finding]:
    rounds = [TeacherRound(dev_score=0.8, n_asked=10, n_trusted=5), second]
    return findings.teacher_findings(Teacher(model="m", dev_score=0.8, zero_shot_dev_score=0.5, rounds=rounds), 2, 64)


def test_rounds_in_which_the_teacher_stays_good_and_is_trusted_raise_nothing():
    assert taught_in_rounds(TeacherRound(dev_score=0.8, n_asked=10, n_trusted=5)) == []
    assert "in round 2 4 of the teacher's 10 answers" in taught_in_rounds(TeacherRound(dev_score=0.8, n_asked=10, n_trusted=4))[0].message
    without_dev = Teacher(model="m", rounds=[TeacherRound(n_asked=10, n_trusted=10)] * 2)
    assert findings.teacher_findings(without_dev, 2, 0) == []


PLANTED = {  # the simplest fault that must raise each code
    "constant_prediction": lambda: set_findings(of_predictions(BALANCED, np.zeros(200, dtype=int)), "t", "last"),
    "near_constant_prediction": lambda: set_findings(of_predictions(BALANCED, np.array([1] * 5 + [0] * 195)), "t", "last"),
    "equals_class_share": lambda: set_findings(of_predictions(BALANCED, but(100)), "t", "last"),
    "chance_level": lambda: set_findings(of_predictions(BALANCED, but(95)), "t", "last"),
    "mostly_other_words": lambda: set_findings(of_predictions(BALANCED, but(30), np.full(200, -1)), "t", "last"),
    "dropped_demonstrations": lambda: findings.prompt_findings(squeezed(50), 8),
    "no_demonstrations": lambda: findings.prompt_findings(squeezed(20), 8),
    "label_words_share_first_token": lambda: word_findings(LabelWords(("a", "b"), ((5, 6), (5, 7)))),
    "label_word_prefixes_another": lambda: word_findings(LabelWords(("a", "b"), ((5,), (5, 7)))),
    "known_training_task": lambda: contamination_findings(["google/flan-t5-small"], ["rte"]),
    "train_test_overlap": lambda: findings.overlap_findings(ROWS, DATA),
    "own_task_in_mixture": lambda: findings.mixture_findings("other", ROWS, dataclasses.replace(DATA, pool=tuple(ROWS))),
    "marker_not_reached": lambda: findings.rationale_findings(np.array([True, False]), "t", "none"),
    "label_bias": lambda: findings.bias_findings({"yes": 0.91, "no": 0.09}),
    "loss_did_not_fall": lambda: training_findings(0.5, 0.6, 10, 0),
    "weak_teacher": lambda: findings.teacher_findings(Teacher(model="m", dev_score=0.6, zero_shot_dev_score=0.5), 2, 64),
    "teacher_no_better_than_zero_shot": lambda: findings.teacher_findings(
        Teacher(model="m", dev_score=0.8, zero_shot_dev_score=0.8), 2, 64
    ),
    "teacher_got_worse": lambda: taught_in_rounds(TeacherRound(dev_score=0.7, n_asked=10, n_trusted=10)),
    "few_trusted": lambda: taught_in_rounds(TeacherRound(dev_score=0.8, n_asked=10, n_trusted=4)),
    "poor_responses": lambda: findings.teacher_findings(Teacher(model="m", n_asked=10, n_empty=2, n_responses=8), 0, 64),
    "never_better_on_dev": lambda: findings.patience_findings(points((0.5, 0.6), (0.5, 0.7)), 1),
    "skipped_steps": lambda: training_findings(0.5, 0.4, 10, 1),
    "empty_outputs": lambda: text_codes(["", *VARIED[:9]]),
    "cut_outputs": lambda: text_codes(VARIED, finished=False),
    "same_output": lambda: text_codes(["yes"] * 39 + ["no"]),
    "copied_prompt": lambda: text_codes(["what was shown", *VARIED[:9]]),
}


@pytest.mark.parametrize("code", sorted(CODES.keys() - {"few_rows"}))  # that one is a whole trial's: test_few_rows
def test_every_code_has_a_fault_that_raises_it(code):
    found = PLANTED[code]()
    assert code in (found if isinstance(found, set) else codes(found))


def test_no_code_is_raised_that_is_not_listed():
    source = "".join(path.read_text() for path in Path(findings.__file__).parent.glob("*.py"))
    written = {one or other for one, other in re.findall(r'code="(\w+)"|\bfinding\(\s*"(\w+)"', source)}
    assert len(written) > 8 and written <= set(CODES)
