from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from analysis.report.build import write_report
from analysis.tables.details import forgetting_text_table
from analysis.tables.forgetting import forgetting_table, load_forgetting, mean_relative_drop
from llmft.config.spec import ModelRef, TrialSpec
from llmft.errors import UserError
from llmft.records.record import Change, Evaluation, Measure, TrialRecord
from llmft.records.record_files import EVALUATION_FILE, write_record


def change(name: str, before: float | None, after: float, **fields) -> Change:
    number = Measure(**{"source": "llmft", "name": name, "metric": "accuracy", "value": after, "n": 100} | fields)
    return Change(before=None if before is None else number.model_copy(update={"value": before}), after=number)


def perplexity(before: float, after: float) -> Change:
    return change("wiki.txt", before, after, source="text", metric="word_perplexity", larger_is_better=False)


@pytest.fixture
def add(tmp_path):
    def write(method: str, seed: int, *changes: Change, distance: float = 0.0, later: tuple[Change, ...] = ()) -> str:
        spec = TrialSpec(model=ModelRef(name="m"), task="rte", method=method, n_shots=16).with_seed(seed)
        record = TrialRecord(
            digest=spec.digest,
            spec=spec,
            status="finished",
            forgetting=list(changes),
            weight_distance={"last": 9.0, "best_dev": distance},
        )
        write_record(tmp_path / "trials" / spec.digest, record)
        if later:
            file = tmp_path / "trials" / spec.digest / EVALUATION_FILE
            file.write_text(Evaluation(digest=spec.digest, changes=list(later)).model_dump_json())
        return spec.digest

    return write


def test_a_drop_is_positive_where_the_model_got_worse(add, tmp_path):
    digest = add("lora", 0, change("cola", 0.8, 0.6), perplexity(20.0, 30.0), later=(change("boolq", None, 0.7, source="harness"),))
    frame = load_forgetting(tmp_path)
    assert set(frame["digest"]) == {digest} and list(frame["measured"]) == ["trial", "trial", "later"]
    by_name = frame.set_index("name")
    assert by_name.loc["cola", "drop"] == pytest.approx(0.2) and by_name.loc["cola", "relative_drop"] == pytest.approx(0.25)
    assert by_name.loc["wiki.txt", "drop"] == 10 and by_name.loc["wiki.txt", "relative_drop"] == 0.5
    assert math.isnan(by_name.loc["boolq", "drop"]) and by_name.loc["boolq", "after"] == 0.7


def test_the_table_gives_the_mean_drop_and_students_interval(add, tmp_path):
    afters = [0.6, 0.7, 0.5, 0.55]
    for seed, after in enumerate(afters):
        add("lora", seed, change("cola", 0.8, after), distance=float(seed))
    add("pattern", 0, change("cola", 0.8, 0.4))
    table = forgetting_table(load_forgetting(tmp_path))
    row = table.loc[("m", "rte", "lora", 16, "minimal", "llmft", "cola", "accuracy")]
    drops = 0.8 - np.array(afters)
    low, high = stats.t.interval(0.95, 3, loc=drops.mean(), scale=stats.sem(drops))
    assert [row["n_trials"], row["drop"], row["drop_low"], row["drop_high"]] == pytest.approx([4, drops.mean(), low, high])
    assert row["weight_distance"] == 1.5 and row["drop_sd"] == pytest.approx(drops.std(ddof=1))
    alone = table.loc[("m", "rte", "pattern", 16, "minimal", "llmft", "cola", "accuracy")]
    assert alone["n_trials"] == 1 and alone["drop"] == pytest.approx(0.4) and math.isnan(alone["drop_low"])


def test_a_number_from_the_sweep_and_from_later_counts_once(add, tmp_path):
    again = (change("cola", 0.8, 0.1, n=5), change("boolq", 0.5, 0.4))
    add("lora", 0, change("cola", 0.8, 0.6), later=again)
    add("lora", 1, change("cola", 0.8, 0.4))
    table = forgetting_table(load_forgetting(tmp_path)).reset_index().set_index("name")
    assert table.loc["cola", "n_trials"] == 2 and table.loc["cola", "drop"] == pytest.approx(0.3)
    assert table.loc["boolq", "n_trials"] == 1


def test_relative_forgetting_is_the_mean_over_tasks_then_trials(add, tmp_path):
    add("lora", 0, change("a", 0.8, 0.4), change("b", 0.5, 0.5), perplexity(20, 200))
    add("lora", 1, change("a", 0.8, 0.8), change("a", 0.5, 0.1, metric="f1"), change("b", 0.5, 0.25))
    (found,) = mean_relative_drop(load_forgetting(tmp_path))
    assert found == pytest.approx(((0.5 + 0) / 2 + (0 + 0.5) / 2) / 2)


def test_where_nothing_was_measured_the_frame_is_empty_and_whole(add, tmp_path):
    add("lora", 0)
    frame = load_forgetting(tmp_path)
    assert len(frame) == 0 and {"digest", "method", "before", "after", "drop"} <= set(frame.columns)
    assert len(forgetting_table(frame)) == 0


def test_a_damaged_evaluation_is_one_line(add, tmp_path):
    digest = add("lora", 0, later=(change("a", 0.5, 0.5),))
    (tmp_path / "trials" / digest / EVALUATION_FILE).write_text('{"changes": 3')
    with pytest.raises(UserError, match=EVALUATION_FILE):
        load_forgetting(tmp_path)


def test_a_perplexity_beyond_measure_is_said_to_be_that(add, tmp_path):
    for seed in range(3):
        add("lora", seed, perplexity(20.0, 5.693e43), change("cola", 0.8, 0.6))
    rows = {row[-7]: row[-4:] for row in forgetting_text_table(load_forgetting(tmp_path)).rows}
    assert rows["wiki.txt"] == ["20.000", "> 1e9", "> 1e9", "> 1e9"]
    assert rows["cola"][:2] == ["0.800", "0.600"]


def test_the_report_shows_what_was_lost(add, tmp_path):
    for seed, after in enumerate((0.6, 0.7, 0.65)):
        add("lora", seed, change("cola", 0.8, after))
    page = write_report(tmp_path).read_text()
    assert "What else the model can do" in page and "0.150 (0.026 to 0.274)" in page and "18.8%" in page
