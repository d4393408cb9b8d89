"""The published runs, and the paper's tables from them, through the public functions."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from rich.console import Console

import analysis
from analysis.frames.columns import COLUMNS
from analysis.stats.agreement import rule_agreement
from analysis.stats.model_sizes import model_size, size_name
from analysis.tables.size_matrix import matrix_to_latex, matrix_to_markdown, matrix_to_terminal
from llmft.errors import UserError

SIZES = ("125M", "350M", "1.3B", "2.7B", "6.7B", "13B", "30B")

# Mosbach et al. 2023, Table 1: rows in-context, columns fine-tuned; F and I tell which is significantly better.
TABLE_1 = {
    "rte": """
        0.00 0.01F 0.02F 0.03F 0.12F 0.14F 0.09F
        0.00 0.01F 0.02F 0.03F 0.12F 0.14F 0.09F
        0.00 0.01F 0.02F 0.03F 0.12F 0.14F 0.09F
        0.00 0.01F 0.02F 0.03F 0.12F 0.14F 0.09F
        0.00 0.01F 0.02F 0.03F 0.12F 0.14F 0.09F
        -0.04I -0.02I -0.01 0.00 0.09F 0.11F 0.05
        -0.11I -0.09I -0.08I -0.08I 0.02 0.03 -0.02""",
    "mnli": """
        0.00 0.00 0.02F 0.01 0.10F 0.11F 0.07F
        0.00 0.00 0.02F 0.01 0.10F 0.11F 0.07F
        -0.01 0.00 0.01F 0.01 0.10F 0.11F 0.07F
        -0.01 0.00 0.01 0.01 0.09F 0.10F 0.07F
        -0.01I -0.01 0.01 0.00 0.09F 0.10F 0.06F
        -0.03I -0.03I -0.02 -0.02 0.07F 0.08F 0.04
        -0.07I -0.07I -0.05 -0.06I 0.03 0.04 0.00""",
}


@pytest.fixture(scope="module")
def published():
    return analysis.load_published()


def matrix(frame, task="rte", **changes):
    where = {"model": "facebook/opt-*", "task": task, "n_shots": 16, "rule": "best_in_domain"}
    return analysis.size_matrix(frame, {"method": "in_context", "pattern": "gpt-3"}, {"method": "pattern"}, **where | changes)


@pytest.mark.parametrize("task", TABLE_1)
def test_table_1_of_the_paper(published, task):
    found = matrix(published, task)
    assert [size_name(name) for name in found["column_model"].unique()] == list(SIZES)
    texts = [f"{round(cell.difference, 2) + 0.0:.2f}" + {"column": "F", "row": "I", "": ""}[cell.better] for cell in found.itertuples()]
    assert texts == TABLE_1[task].split()


def test_other_matrices_are_the_same_call(published):
    pythia = matrix(published, model="EleutherAI/pythia-*")
    assert len(pythia) == 25
    inside = matrix(published, score="in_domain_score", rule="best_out_of_domain")
    cell = inside[(inside["row_size"] == 125e6) & (inside["column_size"] == 30e9)].iloc[0]
    runs = published[published["n_shots"] == 16].query("task == 'rte'")
    a = runs.query("method == 'in_context' and pattern == 'gpt-3' and model == 'facebook/opt-125m'")["in_domain_score"]
    b = runs.query("method == 'pattern' and selection == 'best_out_of_domain' and model == 'facebook/opt-30b'")["in_domain_score"]
    assert cell["difference"] == pytest.approx(b.mean() - a.mean()) and (cell["n_row"], cell["n_column"]) == (10, 10)


def test_correction_only_takes_marks_away(published):
    plain, corrected = matrix(published), matrix(published, correction="holm")
    assert (corrected["better"] != "").sum() < (plain["better"] != "").sum()
    assert ((corrected["better"] == plain["better"]) | (corrected["better"] == "")).all()


def test_renderings_of_a_matrix_agree(published):
    found = matrix(published)
    markdown = matrix_to_markdown(found, "in-context", "fine-tuned")
    assert "| 30B | −0.11◀ | −0.09◀ | −0.08◀ | −0.08◀ | 0.02 | 0.03 | −0.02 |" in markdown
    assert "| 125M | 0.00 | 0.01▲ | 0.02▲ |" in markdown and "◀ in-context is better" in markdown
    console = Console(width=120, file=io.StringIO())
    console.print(matrix_to_terminal(found, "in-context", "fine-tuned"))
    assert "−0.11◀" in console.file.getvalue()
    latex = matrix_to_latex(found, "in-context", "fine-tuned")
    assert latex.count(r"\cellcolor{blue") == (found["better"] == "column").sum()
    assert r"30B & \cellcolor{orange!30}$-$0.11 &" in latex


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "rtee"}, "no trial has row"),
        ({"n_shots": 3}, "no trial has"),
        ({"task": "*"}, "mixes task"),
        ({"score": "accuracy"}, "unknown score"),
        ({"colour": "red"}, "unknown column 'colour'"),
        ({"correction": "bonferroni"}, "unknown correction"),
    ],
)
def test_a_matrix_of_nothing_or_of_a_mixture_is_refused(published, changes, message):
    with pytest.raises(UserError, match=message):
        matrix(published, **changes)


@pytest.mark.parametrize(
    ("name", "size", "text"),
    [("facebook/opt-1.3b", 1.3e9, "1.3B"), ("EleutherAI/pythia-410m", 410e6, "410M"), ("toy", np.inf, "toy"), ("gpt2-7B-chat", 7e9, "7B"),
     ("Llama-3.1-70b-4bit", 70e9, "70B"), ("bert4b4", np.inf, "bert4b4")],
)  # fmt: skip
def test_sizes_are_read_from_names(name, size, text):
    assert (model_size(name), size_name(name)) == (size, text)


def test_the_frame_is_like_that_of_our_own_trials(published):
    names = [column.name for column in COLUMNS]
    assert list(published.columns[: len(names)]) == names
    assert {column.name: str(published[column.name].dtype) for column in COLUMNS} == {column.name: column.dtype for column in COLUMNS}
    runs = published[published["method"] == "in_context"]
    assert not runs["digest"].duplicated().any()
    assert not published.duplicated(["digest", "selection"]).any()
    assert published["data_seed"].isna().all()  # a run's number is no seed
    oracle = published["selection"].isin(["best_in_domain", "best_out_of_domain"])
    assert (published["is_oracle"] == oracle).all()


@pytest.mark.parametrize(
    ("task", "inside", "outside"),
    [("mnli", (71.4, 74.9), (56.7, 72.3)), ("rte", (61.7, 66.8), (60.5, 65.4))],
)
def test_values_in_the_papers_text(published, task, inside, outside):
    table = analysis.compare(published[published["model"] == "facebook/opt-30b"], "last")
    row = table.query(f"task == '{task}' and method == 'in_context' and pattern == 'gpt-3' and n_shots == 16").iloc[0]
    assert 100 * row["in_domain_mean"] == pytest.approx(inside[0], abs=0.1) and 100 * row["in_domain_max"] == pytest.approx(
        inside[1], abs=0.1
    )
    assert 100 * row["out_of_domain_mean"] == pytest.approx(outside[0], abs=0.1) and 100 * row["out_of_domain_max"] == pytest.approx(
        outside[1], abs=0.1
    )


def test_known_slips_travel_with_the_numbers(published):
    marked = published[published["n_warnings"] > 0]
    details = {json.loads(text)[0]["message"][:20] for text in marked["finding_details"]}
    assert len(details) == 2 and set(marked["method"]) == {"in_context"}
    assert set(marked["task"]) == {"mnli", "qqp"}


def test_an_unknown_collection_names_those_there_are():
    with pytest.raises(UserError, match="Allowed: mosbach2023"):
        analysis.load_published("mosbach2024")


def test_rules_of_the_paper_agree_as_cells(published):
    found = rule_agreement(published, "best_in_domain", "last")
    assert found["n_cells"] > 100 and 0.8 < found["pearson"] <= 1 and 0.8 < found["spearman"] <= 1
    assert rule_agreement(published, "last", "last")["difference"] == 0
