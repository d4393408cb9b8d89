"""The rows and columns of the live table, against the records."""

import io
from dataclasses import replace
from statistics import fmean

import pytest
from rich.console import Console
from support.fakes import fake_record
from support.records import full_record

from llmft.errors import Cause
from sweeps.display.live_table import CellRow, cell_row, cells_table, duration, in_order
from sweeps.search.schedule import Schedule


def with_accuracies(spec, in_domain, out_of_domain, **changes):
    record = full_record(spec).model_copy(deep=True, update=changes)
    for sets in record.metrics.values():
        sets["toy"].score, sets["toy_hans"].score = in_domain, out_of_domain
    return record


def rows_of(schedule, records):
    return [cell_row(state, records) for state in schedule.states(records)]


def test_a_row_counts_what_is_known(small_cells):
    zero_shot, in_context, lora, _ = small_cells()[1]
    schedule = Schedule([zero_shot, in_context, lora])
    reported = [in_context.report_spec({}, seed) for seed in (0, 1, 2)]
    records = {
        reported[0].digest: with_accuracies(reported[0], 0.8, 0.5, findings=[]),
        reported[1].digest: with_accuracies(reported[1], 0.6, 0.4),
        reported[2].digest: fake_record(reported[2], Cause.CRASHED),
    }
    for trial in schedule.ready(records):
        if trial.cell.entry == "lora":
            records[trial.digest] = fake_record(trial.spec)
            break
    rows = rows_of(schedule, records)
    assert [row.stage for row in rows] == ["waiting", "done", "under way"]
    assert (rows[0].n_done, rows[0].n_search, rows[0].n_report, rows[0].dev) == (0, 0, 1, None)
    assert (rows[1].n_reported, rows[1].n_failed, rows[1].n_flagged) == (3, 1, 1)
    assert (rows[1].in_domain, rows[1].out_of_domain) == (pytest.approx(0.7), pytest.approx(0.45))
    assert (rows[2].n_searched, rows[2].n_search, rows[2].n_report) == (1, 8, 3)
    assert rows[2].dev is None  # the point's other seed has not ended


def test_the_best_so_far_becomes_the_choice(underway):
    schedule, records = underway(None)
    searched = [state for state in schedule.states(records) if state.cell.search]
    assert len(searched) == 2
    for state in searched:
        assert cell_row(replace(state, choice=None), records).dev == pytest.approx(state.choice.dev_score)
    half = {trial.digest: records[trial.digest] for state in searched for trial in state.rounds[0]}
    for state in schedule.states(half):
        if state.cell.search:
            points = {}
            for trial in state.rounds[0]:
                points.setdefault(trial.spec.with_seed(0).digest, []).append(half[trial.digest].dev_score["best_dev"])
            assert cell_row(state, half).dev == pytest.approx(max(fmean(values) for values in points.values()))


def test_what_changes_now_comes_first(small_cells):
    cell = small_cells()[1][0]
    rows = {
        "waits": CellRow(cell, 0, 2, 0, 3),
        "done": CellRow(cell, 2, 2, 3, 3),
        "begun": CellRow(cell, 1, 2, 0, 3),
        "runs last": CellRow(cell, 2, 2, 2, 3, n_running=1),
        "begun too": CellRow(cell, 2, 2, 0, 3),
    }
    names = {id(row): name for name, row in rows.items()}
    assert [names[id(row)] for row in in_order(list(rows.values()))] == ["runs last", "begun", "begun too", "done", "waits"]


def test_columns_that_tell_nothing_are_left_out(underway):
    schedule, records = underway(9)

    def titles(records):
        page = io.StringIO()
        Console(file=page, width=120).print(cells_table(rows_of(schedule, records), 120, 30)[0])
        return page.getvalue().strip().splitlines()[0].split()

    assert titles(records) == "method shots search report dev % in % out %".split()
    digest = next(iter(records))
    failed = fake_record(records[digest].spec, Cause.CRASHED)
    assert "failed" in titles({**records, digest: failed})
    assert "flagged" in titles({**records, digest: full_record(records[digest].spec)})


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")])
def test_durations(seconds, text):
    assert duration(seconds) == text
