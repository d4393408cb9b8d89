"""What is said of results that are thin, or still to come."""

from __future__ import annotations

import json
import re

import analysis
from analysis.report.verdict import verdict_lines, write_verdicts
from analysis.stats.comparisons import build_families
from analysis.tables.ranking import build_ranking, difference_table
from analysis.tables.render import to_markdown
from llmft.errors import Cause
from llmft.records.manifest import Manifest, PlannedCell, read_manifest


def cell(method, n_report, records=(), model="opt-125m", task="rte", n_shots=16):
    name = {"model": model, "task": task, "method": method, "n_shots": n_shots, "pattern": "minimal"}
    return PlannedCell(cell=name, n_report=n_report, report=tuple(record.digest for record in records))


def interrupted(store):
    """in_context is done, fine_tuning begun, of lora the search has not ended, that of bitfit failed."""
    done = [store.add(seed, "in_context", 0.8 + 0.001 * seed, 0.7) for seed in range(6)]
    begun = [store.add(seed, "fine_tuning", 0.6 + 0.002 * seed, 0.5) for seed in range(3)]
    cells = (
        cell("in_context", 6, done),
        cell("fine_tuning", 6, begun).model_copy(update={"report": (*(each.digest for each in begun), "x", "y", "z")}),
        *(cell("lora", 6, n_shots=n_shots) for n_shots in (16, 128)),
        cell("bitfit", 0),
    )
    return Manifest(cells=cells, report=tuple(digest for each in cells for digest in each.report))


def test_an_interrupted_sweep_claims_nothing(store):
    manifest = interrupted(store)
    (store.root / "sweep.json").write_text(manifest.model_dump_json())
    frame = analysis.load(store.root)
    (only,) = write_verdicts(frame, manifest=manifest)
    assert only.unfinished == (
        "Not finished: 2 of 5 cells have no reported trials yet (none at all of lora), 1 only some of theirs; what follows may change."
    )
    assert not only.in_domain_sure and "in_context is best" in only.in_domain
    assert write_verdicts(frame)[0].in_domain_sure
    assert next(verdict_lines([only])) == only.unfinished
    page = analysis.write_report(store.root).read_text()
    assert only.unfinished in page and page.index(only.unfinished) < page.index("In domain (rte), in_context is best")
    assert '<span class="badge sure">clear</span>' not in page and page.count('<span class="badge unsure">open</span>') == 2


def test_the_findings_count_what_the_plan_reports(store):
    manifest = interrupted(store)
    findings = {each.code: each for each in analysis.cross_findings(analysis.load(store.root), manifest=manifest)}
    assert manifest.n_report == 24 and findings["missing_trials"].message.startswith("15 of 24 report trials left no record")
    assert "bitfit, 16 shots" in findings["failed_search"].message


def test_a_finished_sweep_is_not_called_unfinished(store):
    done = [store.add(seed, failed=Cause.DIVERGED if seed else None) for seed in range(3)]
    manifest = Manifest(cells=(cell("fine_tuning", 3, done), cell("lora", 0)), report=tuple(each.digest for each in done))
    (only,) = write_verdicts(analysis.load(store.root), manifest=manifest)
    assert only.unfinished == ""
    codes = {each.code for each in analysis.cross_findings(analysis.load(store.root), manifest=manifest)}
    assert "missing_trials" not in codes and "failed_trials" in codes


def test_a_model_without_any_result_has_its_answer_too(store):
    done = [store.add(seed) for seed in range(3)]
    manifest = Manifest(cells=(cell("fine_tuning", 3, done), cell("fine_tuning", 3, model="opt-13b")))
    here, other = write_verdicts(analysis.load(store.root), manifest=manifest)
    assert (here.model, here.unfinished, other.model) == ("opt-125m", "", "opt-13b")
    lines = list(verdict_lines([here, other]))
    assert lines[0].startswith("opt-125m on rte: in domain (rte), no method is shown")
    assert (
        lines[2].startswith("opt-13b on rte: not finished: 1 of 1 cells") and lines[3] == "opt-13b on rte: in domain, there is no result."
    )


def numbers_of(store, *scores):
    for method, values in scores:
        for seed, value in enumerate(values):
            store.add(seed, method, value, None)
    frame = analysis.load(store.root)
    (only,), comparison = write_verdicts(frame), to_markdown(analysis.compare(frame))
    return frame, only, comparison


def test_two_seeds_allow_no_interval_and_no_answer(store):
    frame, only, comparison = numbers_of(store, ("lora", (0.9, 0.902)), ("fine_tuning", (0.7, 0.7021)))
    assert analysis.contrast_table(frame).query("b == 'fine_tuning'")["p"].item() < 0.001  # exact, but not believed
    assert not only.in_domain_sure and "2 seeds are too few to tell" in only.in_domain and "(90" not in only.in_domain
    assert "would be missed" not in only.in_domain and "±" not in re.sub(r"\(± 95 % interval\)", "", comparison)
    family = build_families(frame)[0]
    assert [row[3:5] for row in build_ranking(family).table.rows] == [["–", "–"], ["20.0", "–"], ["37.4", "–"]]
    assert not any("to" in text.split() for row in difference_table([family]).rows for text in row)


def test_equal_scores_have_no_interval(store):
    frame, only, comparison = numbers_of(store, ("lora", [0.8] * 9), ("fine_tuning", [0.6] * 9))
    assert only.in_domain.startswith(
        "In domain (rte), lora is best at 16 shots: 80.0 % in each of 9 trials, ahead of fine_tuning by 20.0 points "
        "(the same with every seed"
    )
    assert "| 80.0 |" in comparison.replace("*", "") and "± 0.0" not in comparison


def test_the_manifest_of_a_sweep_is_read(store):
    (store.root / "sweep.json").parent.mkdir(parents=True, exist_ok=True)
    content = {
        "plan_name": "p",
        "cells": [{"cell": {"model": "m", "settings": {"r": 8}}, "n_report": 6, "report": []}],
        "report": [],
    }
    (store.root / "sweep.json").write_text(json.dumps(content))
    assert read_manifest(store.root).n_report == 6
