from __future__ import annotations

import io
import json
import re

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from rich.console import Console
from support.synthetic import set_metrics

import analysis
from analysis.tables.comparison import compare_groups
from analysis.tables.formatting import build_blocks
from analysis.tables.render import to_csv, to_latex, to_markdown
from llmft.errors import Cause, UserError
from llmft.records.record import Finding


def show(renderable, width: int = 200) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(renderable)
    return console.file.getvalue()


@pytest.mark.parametrize(("rule", "shift"), [("best_dev", 0.0), ("last", -0.02)])
def test_numbers_agree_with_scipy(store, rule, shift):
    inside, outside = np.random.default_rng(0).uniform(0.4, 0.8, (2, 7))
    for seed in range(7):
        store.add(seed, accuracy=inside[seed], out_accuracy=outside[seed])
    table = analysis.compare(analysis.load(store.root), rule)
    row = table[table["method"] == "fine_tuning"].iloc[0]
    for prefix, raw in (("in_domain", inside), ("out_of_domain", outside)):
        values = raw + shift
        low, high = scipy.stats.t.interval(0.95, 6, loc=values.mean(), scale=scipy.stats.sem(values))
        assert row[f"{prefix}_mean"] == pytest.approx(values.mean())
        assert row[f"{prefix}_sd"] == pytest.approx(np.std(values, ddof=1))
        assert row[f"{prefix}_max"] == pytest.approx(values.max())
        assert row[f"{prefix}_half_width"] == pytest.approx((high - low) / 2)
    assert row["gap_mean"] == pytest.approx((inside - outside).mean())
    assert row["n"] == 7 and row["n_failed"] == 0


def test_one_trial_has_no_spread(store):
    store.add()
    row = analysis.compare(analysis.load(store.root)).iloc[-1]
    assert row["n"] == 1 and row["in_domain_mean"] == 0.6
    assert np.isnan([row["in_domain_sd"], row["in_domain_half_width"]]).all()


def test_failures_are_counted_and_an_all_failed_cell_keeps_its_row(store):
    store.add(0), store.add(1, failed=Cause.DIVERGED)
    store.add(0, "lora", failed=Cause.LOST)
    table = analysis.compare(analysis.load(store.root)).set_index("method")
    assert table.loc["fine_tuning", ["n", "n_failed"]].tolist() == [1, 1]
    assert table.loc["lora", ["n", "n_failed"]].tolist() == [0, 1]
    assert np.isnan(table.loc["lora", "in_domain_mean"])


def test_a_trial_without_the_selected_checkpoint_is_counted(store):
    store.add(0), store.add(1, selections=("last",))
    frame = analysis.load(store.root)
    row = analysis.compare(frame).iloc[-1]
    assert row[["n", "n_unselected"]].tolist() == [1, 1]
    assert "1 (+1)" in show(analysis.to_terminal(analysis.compare(frame)))


def test_the_majority_row_comes_from_the_records(full_store):
    table = analysis.compare(analysis.load(full_store.root))
    first = table.iloc[0]
    assert first["method"] == "majority_class" and first["in_domain_mean"] == pytest.approx(0.527)
    assert first["out_of_domain_mean"] == pytest.approx(0.5)
    assert table.iloc[1]["method"] == "zero_shot" and table.iloc[1]["n"] == 1
    assert table["n_shots"].is_monotonic_increasing


def test_only_report_trials_are_compared(store):
    report, search = store.add(0, accuracy=0.6), store.add(1, accuracy=0.9)
    (store.root / "sweep.json").write_text(json.dumps({"report": [report.digest], "search": [search.digest]}))
    assert analysis.compare(analysis.load(store.root)).iloc[-1]["in_domain_mean"] == 0.6


def test_select_keeps_what_no_rule_can_select(store):
    store.add(0), store.add(0, "in_context"), store.add(0, "lora", failed=Cause.LOST)
    store.add(0, "bitfit", selections=("last", "best_in_domain"))
    frame = analysis.load(store.root)
    assert set(analysis.select(frame, "best_dev")["method"]) == {"fine_tuning", "in_context", "lora"}
    oracle = analysis.select(frame, "best_in_domain").set_index("method")
    assert oracle["is_oracle"].to_dict() == {"bitfit": True, "in_context": False, "lora": False}
    assert (oracle["rule"] == "best_in_domain").all()


def test_an_unknown_rule_names_the_nearest(store):
    store.add()
    with pytest.raises(UserError, match="'best_dv'. Did you mean 'best_dev'"):
        analysis.compare(analysis.load(store.root), "best_dv")


def test_groups_are_compared_by_their_own_numbers(full_store):
    groups = compare_groups(analysis.load(full_store.root))
    table = analysis.compare(analysis.load(full_store.root)).set_index(["method", "n_shots"])
    row = groups.query("method == 'lora' and n_shots == 16 and value == 'lexical_overlap'").iloc[0]
    assert (row["set"], row["group"], row["domain"], row["n"]) == ("hans", "heuristic", "out", 6)
    assert row["mean"] == pytest.approx(table.loc[("lora", 16), "out_of_domain_mean"] - 0.1)


def test_findings_mark_the_number_they_concern(full_store):
    comparison = analysis.compare(analysis.load(full_store.root))
    row = comparison.query("method == 'bitfit' and n_shots == 16").iloc[0]
    assert row["findings"] == "constant_prediction@hans 3/6"
    text = show(analysis.to_terminal(comparison))
    line = next(line for line in text.splitlines() if "bitfit" in line and " 16 " in line)
    assert line.index("ᵃ") > line.index(f"{100 * row['out_of_domain_mean']:.1f}")
    assert "ᵃ constant prediction on hans in 5 of 11 trials of the 2 marked rows" in text
    assert "demonstrations dropped" not in text  # a note is no warning


def test_footnotes_are_lettered_as_they_are_read(store):
    findings = [
        Finding(code=code, severity="warning", message="m", set=name)
        for code, name in (("a_code", "toy_hans"), ("b_code", "rte"), ("c_code", None))
    ]
    store.add(findings=findings, sets={"rte": set_metrics(0.6), "toy_hans": set_metrics(0.5, "out")})
    comparison = analysis.compare(analysis.load(store.root))
    (block,), footnotes = build_blocks(comparison)
    assert [entry.marks for entry in block.rows[-1] if entry.marks] == ["a", "b", "c"] and "".join(footnotes) == "abc"
    assert list(footnotes.values()) == [f"{text} in 1 of 1 trials" for text in ("c code", "b code on rte", "a code on toy_hans")]


def test_a_finding_is_counted_once_a_trial(store):
    finding = Finding(code="truncated", severity="warning", message="m")
    store.add(0, findings=[finding, finding]), store.add(1)
    assert analysis.compare(analysis.load(store.root)).iloc[-1]["findings"] == "truncated 1/2"


def test_renderings_agree(full_store):
    comparison = analysis.compare(analysis.load(full_store.root))
    terminal, markdown = show(analysis.to_terminal(comparison)), to_markdown(comparison)
    csv = pd.read_csv(io.StringIO(to_csv(comparison)))
    assert np.allclose(csv["in_domain_mean"], comparison["in_domain_mean"]) and len(csv) == len(comparison)
    for mean, half in zip(csv["in_domain_mean"], csv["in_domain_half_width"], strict=True):
        text = f"{100 * mean:.1f}" + (f" ± {100 * half:.1f}" if half == half else "")
        assert text in terminal and text in markdown
    widths = {line.count("|") for line in markdown.splitlines() if line.startswith("|")}
    assert len(widths) == 1


def latex_rows(latex: str) -> list[list[list[str]]]:
    """The cells of each table, by row, as they are read: without marks, bold and escapes."""
    tables = []
    for body in re.findall(r"\\toprule\n(.*?)\\bottomrule", latex, re.S):
        text = re.sub(r"\\textsuperscript\{.*?\}|\\midrule\n", "", body)
        text = re.sub(r"\\textbf\{(.*?)\}", r"\1", text).replace("\\_", "_").replace("$\\pm$", "±").replace("$-$", "−").replace("--", "–")
        tables.append([line.removesuffix(" \\\\").split(" & ") for line in text.strip().split("\n")])
    return tables


def test_latex_holds_the_table_and_its_narrow_form_a_part_of_it(full_store):
    comparison = analysis.compare(analysis.load(full_store.root))
    blocks, _ = build_blocks(comparison)
    wide, narrow = to_latex(comparison), to_latex(comparison, narrow=True)
    assert latex_rows(wide) == [[block.headers, *([entry.text for entry in row] for row in block.rows)] for block in blocks]
    failed = [any(row[4].text not in ("0", "–") for row in block.rows) for block in blocks]
    patterns = [len({row[2].text for row in block.rows} - {"–"}) > 1 for block in blocks]
    assert any(failed)
    for whole, part, has_failed, has_patterns in zip(latex_rows(wide), latex_rows(narrow), failed, patterns, strict=True):
        left = [0, 1, *[2] * has_patterns, 3, *[4] * has_failed, 5, 8, 11]
        assert part == [[row[i] for i in left] for row in whole]
        assert part[0][-1] == "Gap"
    for latex in (wide, narrow):
        assert latex.count("\\begin{table}") == latex.count("\\label{tab:") == len(blocks) == len(set(re.findall(r"\\label\{.*?\}", latex)))
        assert re.sub(r"\\[{}]", "", latex).count("{") == re.sub(r"\\[{}]", "", latex).count("}")


def test_the_narrow_form_leaves_out_what_says_nothing(store):
    store.add(0), store.add(1), store.add(2)
    (table,) = latex_rows(to_latex(analysis.compare(analysis.load(store.root)), narrow=True))
    assert table[0] == ["Method", "Shots", "n", "In domain: rte", "Out of domain: hans", "Gap"]


def test_oracles_are_labelled(store):
    store.add(selections=("best_in_domain",))
    comparison = analysis.compare(analysis.load(store.root), "best_in_domain")
    assert "In domain: rte (oracle)" in to_markdown(comparison)
    assert "(oracle)" in show(analysis.to_terminal(comparison))


def test_names_are_not_read_as_markup(store):
    store.add(model="[red]a|b<i>[/red]", method="in_context", pattern="gpt_3*")
    comparison = analysis.compare(analysis.load(store.root))
    assert "[red]a|b<i>[/red]" in show(analysis.to_terminal(comparison))
    markdown = to_markdown(comparison)
    assert "a\\|b&lt;i&gt;" in markdown and "gpt\\_3\\*" in markdown


def test_nothing_to_compare_is_a_sentence(store):
    search = store.add()
    (store.root / "sweep.json").write_text(json.dumps({"search": [search.digest]}))
    comparison = analysis.compare(analysis.load(store.root))
    assert comparison.empty
    assert "No report trials" in show(analysis.to_terminal(comparison)) and "No report trials" in to_markdown(comparison)
