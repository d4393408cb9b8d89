"""Early stopping, against the same training without it."""

from __future__ import annotations

import dataclasses

import pytest
from pydantic import ValidationError
from support.small_models import CPU

from llmft.errors import Cause
from llmft.trial.run import run_trial


def wavering(spec_of, seed: int, **changed):
    """A training whose dev accuracy goes up and down."""
    fields = {"epochs": 9, "learning_rate": 1e-2, "n_dev": 10, "n_test": 24, "schedule": "linear"} | changed
    return spec_of("pattern", **fields).with_seed(seed)


def finished(spec, runtime=CPU):
    record = run_trial(spec, runtime).record
    assert record.finished, record.message
    return record


def n_looks(curve, patience: int) -> int:
    """After how many looks the training ends: `patience` looks in a row are no better than the best before them."""
    for n in range(patience + 1, len(curve) + 1):
        before, recent = curve[: n - patience], curve[n - patience : n]
        best = max((point.dev_score, -point.dev_loss) for point in before)
        if all((point.dev_score, -point.dev_loss) <= best for point in recent):
            return n
    return len(curve)


def test_it_ends_where_the_whole_curve_says(spec_of):
    early = kept = 0
    for seed, changed in ((0, {"learning_rate": 3e-2}), (4, {}), (1, {"eval_every_epochs": 2})):
        whole = finished(wavering(spec_of, seed, **changed))
        for patience in (1, 2, 3):
            record = finished(wavering(spec_of, seed, **changed, patience=patience))
            n = n_looks(whole.curve, patience)
            assert record.curve == whole.curve[:n]  # the learning rates too: the schedule is that of all epochs
            last = record.curve[-1]
            assert (record.cost.n_steps, record.selected_step["last"], record.dev_score["last"]) == (last.step, last.step, last.dev_score)
            assert record.cost.tokens_trained * whole.cost.n_steps == whole.cost.tokens_trained * record.cost.n_steps
            early += n < len(whole.curve)
            if whole.selected_step["best_dev"] <= last.step:
                kept += n < len(whole.curve)
                assert record.metrics["best_dev"] == whole.metrics["best_dev"]
                assert record.selected_step["best_dev"] == whole.selected_step["best_dev"]
            else:
                assert record.dev_score["best_dev"] == max(point.dev_score for point in record.curve)
    assert early > kept > 0, "patience must have ended some trainings, before their best state and behind it"


def test_the_states_are_those_of_a_training_that_was_told_to_stop_there(spec_of):
    """Whatever is selected, the best on dev or not."""
    for selections in (("last",), ("last", "best_dev", "best_in_domain", "best_out_of_domain")):
        spec = wavering(spec_of, 0, selections=selections)
        with_patience = finished(spec.model_copy(update={"train": spec.train.model_copy(update={"patience": 2})}))
        seen, n = [], len(with_patience.curve)
        assert n < spec.train.epochs
        told = finished(spec, dataclasses.replace(CPU, report=seen.append, should_stop=lambda seen=seen, n=n: len(seen) == n - 1))
        assert (with_patience.metrics, with_patience.curve) == (told.metrics, told.curve)
        assert (with_patience.selected_step, with_patience.weight_distance) == (told.selected_step, told.weight_distance)


def test_a_floor_counts_as_long_as_the_training_goes_on(spec_of):
    spec = wavering(spec_of, 0, patience=2)
    last = finished(spec).curve[-1].epoch
    at_the_end = run_trial(spec, dataclasses.replace(CPU, stop_below={last: 1.01})).record
    assert (at_the_end.cause, at_the_end.curve[-1].epoch) == (Cause.PRUNED, last)
    assert finished(spec, dataclasses.replace(CPU, stop_below={last + 1: 1.01})).curve[-1].epoch == last


def test_it_needs_a_dev_set(spec_of):
    with pytest.raises(ValidationError, match=r"train.patience needs dev examples: set n_dev above 0, or patience to null"):
        spec_of("pattern", patience=2, n_dev=0, selections=("last",))
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        spec_of("pattern", patience=0)
