"""Warnings that a careful reviewer would raise, each beside the number that it concerns."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np

from llmft.data import Example, TaskData, TestSet
from llmft.prompting import EncodedTrial, LabelWords
from llmft.records import CurvePoint, Finding, SetMetrics, Teacher

CODES = {
    "constant_prediction": "every query got the same label",
    "near_constant_prediction": "almost every query got the same label",
    "equals_class_share": "the accuracy is exactly the share of one label, as a constant predictor's would be",
    "chance_level": "the accuracy cannot be told from always giving the most frequent label",
    "mostly_other_words": "in most queries the best of all words is no label word",
    "dropped_demonstrations": "demonstrations did not fit into the prompt and were left out",
    "no_demonstrations": "no demonstration fitted: the trial is zero-shot",
    "label_words_share_first_token": "two label words begin with the same token",
    "label_word_prefixes_another": "one label word is the beginning of another, which favours it",
    "known_training_task": "the model is known to have been trained on the task's data set before",
    "train_test_overlap": "drawn examples also stand in a test set",
    "own_task_in_mixture": "texts of the trial's own task stand in the mixture as another task's",
    "loss_did_not_fall": "the training loss ended no lower than it began",
    "never_better_on_dev": "patience ended the training, and no look at dev was better than the first",
    "skipped_steps": "optimiser steps were skipped because fp16 gradients overflowed",
    "empty_outputs": "generated texts are empty",
    "cut_outputs": "generated texts did not end within the most tokens allowed",
    "same_output": "(almost) every query got the same text",
    "copied_prompt": "generated texts copy a demonstration or a long part of the query",
    "marker_not_reached": "rationales did not come to the marker by themselves; it was put behind them",
    "label_bias": "one label word is almost certain for queries without content; calibration divides by these probabilities",
    "weak_teacher": "the teacher's accuracy on dev cannot be told from chance",
    "teacher_no_better_than_zero_shot": "on dev the teacher is no better than without what its prompt holds",
    "teacher_got_worse": "in a later round the teacher, which is the student by then, is worse on dev than the first was",
    "few_trusted": "fewer than half of the teacher's answers were trained towards",
    "poor_responses": "answers of the teacher have no text or no end",
    "few_rows": "fewer rows than the task's full test set were scored",
}
"""Every code that a trial can raise, with its meaning. (The analysis adds those that concern several trials.)"""

LONG_COPY = 20  # words; a summary or an answer may well quote fewer
SOME, MANY = 0.05, 0.5  # shares of outputs from which a finding is raised, and a warning
NEAR_CONSTANT = 0.95
BIASED = 0.9
MOSTLY_OTHER = 0.5


def set_findings(metrics: SetMetrics, name: str, selection: str) -> list[Finding]:
    """What is suspicious about one set's numbers."""

    def finding(code: str, severity: str, message: str, value: float) -> Finding:
        return Finding(code=code, severity=severity, message=message, set=name, selection=selection, value=value)

    found = []
    top, share = max(metrics.predicted_shares.items(), key=lambda item: item[1])
    if share == 1.0:
        found.append(finding("constant_prediction", "warning", f"all {metrics.n} queries of {name} got the label {top}", share))
    elif share >= NEAR_CONSTANT:
        found.append(finding("near_constant_prediction", "warning", f"{share:.1%} of the queries of {name} got the label {top}", share))
    shares = [value for value in metrics.label_shares.values() if value < 1]
    if share < 1.0 and any(math.isclose(metrics.accuracy, value, abs_tol=0.5 / metrics.n / 10) for value in shares):
        found.append(
            finding(
                "equals_class_share",
                "note",
                f"the accuracy on {name}, {metrics.accuracy:.2%}, is exactly a label's share",
                metrics.accuracy,
            )
        )
    low, high = accuracy_interval(metrics.accuracy, metrics.n)
    if low <= metrics.majority_share:
        message = f"accuracy on {name} {metrics.accuracy:.1%} (95 % interval {low:.1%} to {high:.1%}) "
        message += f"does not exceed the majority class, {metrics.majority_share:.1%}"
        found.append(finding("chance_level", "note", message, low))
    if metrics.non_label_share is not None and metrics.non_label_share > MOSTLY_OTHER:
        message = f"in {metrics.non_label_share:.1%} of the queries of {name} the best of all words is no label word"
        found.append(finding("mostly_other_words", "note", message, metrics.non_label_share))
    return found


def text_findings(
    metrics: SetMetrics,
    texts: Sequence[str],
    demonstrations: Sequence[Example],
    examples: Sequence[Example],
    name: str,
    selection: str,
) -> list[Finding]:
    """What is suspicious about the texts that one set's queries got."""
    shown = {reference.strip() for example in demonstrations for reference in example.references}
    n_copied = sum(_is_copy(text, example, shown) for text, example in zip(texts, examples, strict=True))
    top, n_top = Counter(texts).most_common(1)[0]
    found = []
    for code, share, note_from, warn_from, what in (
        ("empty_outputs", metrics.empty_share, SOME, SOME, "are empty"),
        ("cut_outputs", metrics.cut_share, SOME, MANY, "were cut at generation.max_new_tokens"),
        ("copied_prompt", n_copied / len(texts), SOME, MANY, f"repeat a demonstration, or the query ({LONG_COPY} words or more)"),
        ("same_output", n_top / len(texts), NEAR_CONSTANT, NEAR_CONSTANT, f"are the same: {top[:60]!r}"),
    ):
        if share >= note_from:
            severity, message = "warning" if share >= warn_from else "note", f"{share:.1%} of the outputs for {name} {what}"
            found.append(Finding(code=code, severity=severity, message=message, set=name, selection=selection, value=share))
    return found


def rationale_findings(reached: np.ndarray | None, name: str, selection: str) -> list[Finding]:
    """Rationales of one set that did not come to the marker; None where none were said."""
    if reached is None or reached.all():
        return []
    share = float(1 - reached.mean())
    severity, message = "warning" if share >= MANY else "note", f"{share:.1%} of the rationales for {name} did not come to the marker"
    return [Finding(code="marker_not_reached", severity=severity, message=message, set=name, selection=selection, value=share)]


def _is_copy(text: str, example: Example, shown: Collection[str]) -> bool:
    """Whether a text is a demonstration's reference and not the query's own, or long and a verbatim part of the query."""
    if text in shown:
        return text not in example.references
    return len(text.split()) >= LONG_COPY and any(text in part for part in example.fields.values())


def accuracy_interval(accuracy: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """The Wilson interval of a share `accuracy` seen in `n` rows (scipy's `binomtest`)."""
    from scipy.stats import binomtest

    interval = binomtest(round(accuracy * n), n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def word_findings(words: LabelWords) -> list[Finding]:
    """What is suspicious about the label words."""
    found = []
    for i, first in enumerate(words.ids):
        for j, second in enumerate(words.ids):
            if i != j and first == second[: len(first)]:
                message = f"the label word {words.texts[i]!r} is the beginning of {words.texts[j]!r}, which can never be more probable"
                found.append(Finding(code="label_word_prefixes_another", severity="warning", message=message))
            elif i < j and first[0] == second[0]:
                message = f"the label words {words.texts[i]!r} and {words.texts[j]!r} begin with the same token; "
                message += "they are told apart by the later ones"
                found.append(Finding(code="label_words_share_first_token", severity="note", message=message))
    return found


def prompt_findings(encoded: EncodedTrial, n_wanted: int) -> list[Finding]:
    """Demonstrations that did not fit."""
    if not encoded.n_dropped:
        return []
    left = len(encoded.demonstrations)
    message = f"{encoded.n_dropped} of {n_wanted} demonstrations did not fit into the prompt; {left} are left"
    return [
        Finding(
            code="dropped_demonstrations" if left else "no_demonstrations",
            severity="warning",
            message=message,
            value=encoded.n_dropped,
        )
    ]


def overlap_findings(drawn: Sequence[Example], data: TaskData) -> list[Finding]:
    """Drawn examples whose text is also in a test set."""
    texts = {tuple(sorted(example.fields.items())) for example in drawn}
    found = []
    for test in data.tests:
        n = sum(tuple(sorted(example.fields.items())) in texts for example in test.examples)
        if n:
            message = f"{n} rows of {test.name} have the same text as a drawn example"
            found.append(Finding(code="train_test_overlap", severity="warning", message=message, set=test.name, value=n))
    return found


def mixture_findings(task: str, examples: Sequence[Example], data: TaskData) -> list[Finding]:
    """Examples of another `task` in a mixture whose texts are the trial's own, whatever the fields are called."""

    def texts(rows: Iterable[Example]) -> Counter[tuple[str, ...]]:
        return Counter(tuple(sorted(example.fields.values())) for example in rows)

    mixed, found = texts(examples), []
    for test in data.tests:
        if n := sum(count for text, count in texts(test.examples).items() if text in mixed):
            message = f"{n} rows of {test.name} have the same text as an example of {task} in the mixture"
            found.append(Finding(code="train_test_overlap", severity="warning", message=message, set=test.name, value=n))
    pool = texts(data.pool)
    if n := sum(count for text, count in mixed.items() if text in pool):
        message = f"{n} of {len(examples)} examples of {task} in the mixture have a text of the trial's own training pool"
        found.append(Finding(code="own_task_in_mixture", severity="warning", message=message, value=n))
    return found


def coverage_findings(tests: Sequence[TestSet], data: TaskData) -> list[Finding]:
    """Test sets of which only a part was scored."""
    whole = {test.name: len(test.examples) for test in data.tests}
    return [
        Finding(
            code="few_rows",
            severity="note",
            message=f"{n} of {whole[test.name]} rows of {test.name} were scored",
            set=test.name,
            value=n,
        )
        for test in tests
        if (n := len(test.examples)) < whole[test.name]
    ]


def bias_findings(content_free: Mapping[str, float]) -> list[Finding]:
    """A label that queries without content get with near certainty.

    Args:
        content_free: label -> mean probability of its word for such queries; empty where scores are not calibrated.
    """
    label, share = max(content_free.items(), key=lambda item: item[1], default=("", 0.0))
    if share <= BIASED:
        return []
    message = f"queries without content get the label {label} with a mean probability of {share:.1%}; the calibration takes this away"
    return [Finding(code="label_bias", severity="note", message=message, value=share)]


def training_findings(first_loss: float, last_loss: float, n_steps: int, n_skipped: int) -> list[Finding]:
    """What is suspicious about the course of training."""
    found = []
    if n_steps > 1 and last_loss >= first_loss:  # of a single step the two are one
        message = f"the training loss went from {first_loss:.4f} to {last_loss:.4f}"
        found.append(Finding(code="loss_did_not_fall", severity="warning", message=message, value=last_loss))
    if n_skipped:
        message = f"{n_skipped} of {n_steps} optimiser steps were skipped because fp16 gradients overflowed"
        severity = "warning" if n_skipped > 0.1 * n_steps else "note"
        found.append(Finding(code="skipped_steps", severity=severity, message=message, value=n_skipped))
    return found


def patience_findings(curve: Sequence[CurvePoint], patience: int | None) -> list[Finding]:
    """A training that went on after its first look at dev for as long as its patience, and for nothing."""

    def rank(point: CurvePoint) -> tuple[float, float]:
        return point.dev_score, -(point.dev_loss or 0.0)

    if patience is None or len(curve) != patience + 1 or max(curve, key=rank) is not curve[0]:
        return []
    message = (
        f"patience ended the training after {curve[-1].epoch} epochs, and dev was best at its first look, after {curve[0].epoch}: "
        "is the learning rate too high, or the warm-up longer than the patience?"
    )
    return [Finding(code="never_better_on_dev", severity="note", message=message, value=curve[-1].epoch)]


def teacher_findings(teacher: Teacher, n_labels: int, n_dev: int) -> list[Finding]:
    """What is suspicious about a teacher; dev is balanced over the labels, so that chance is one in so many (none for texts)."""
    found, score = [], teacher.dev_score
    if teacher.n_demonstrations_dropped:
        message = f"{teacher.n_demonstrations_dropped} demonstrations did not fit into the teacher's prompt"
        found.append(Finding(code="dropped_demonstrations", severity="note", message=message, value=teacher.n_demonstrations_dropped))
    if teacher.n_unfinished + teacher.n_empty > SOME * teacher.n_asked:
        message = f"of the teacher's {teacher.n_asked} answers {teacher.n_empty} have no text and {teacher.n_unfinished} no end"
        severity = "warning" if teacher.n_responses < MANY * teacher.n_asked else "note"
        found.append(Finding(code="poor_responses", severity=severity, message=message, value=teacher.n_responses / teacher.n_asked))
    for number, each in enumerate(teacher.rounds, 1):
        if each.n_trusted < MANY * each.n_asked:
            message = f"in round {number} {each.n_trusted} of the teacher's {each.n_asked} answers were trained towards"
            found.append(Finding(code="few_trusted", severity="note", message=message, value=each.n_trusted / each.n_asked))
    if score is None:
        return found
    for number, each in enumerate(teacher.rounds, 1):
        if each.dev_score < score:
            message = f"the teacher's score on dev was {score:.1%} at first, and {each.dev_score:.1%} in round {number}"
            found.append(Finding(code="teacher_got_worse", severity="note", message=message, value=each.dev_score))
    low, high = accuracy_interval(score, n_dev)
    if n_labels and low <= 1 / n_labels:
        message = f"the teacher's accuracy on dev, {score:.1%} (95 % interval {low:.1%} to {high:.1%}), may be chance"
        found.append(Finding(code="weak_teacher", severity="warning", message=message, value=score))
    if teacher.zero_shot_dev_score is not None and score <= teacher.zero_shot_dev_score:
        message = f"the teacher's score on dev, {score:.1%}, is no better than {teacher.zero_shot_dev_score:.1%} from the query alone"
        found.append(Finding(code="teacher_no_better_than_zero_shot", severity="warning", message=message, value=score))
    return found


def worst(findings: Iterable[Finding]) -> str:
    """The highest severity among `findings` ("note" where there is none)."""
    order = ("note", "warning", "error")
    return max((finding.severity for finding in findings), key=order.index, default="note")
