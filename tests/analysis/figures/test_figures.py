from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import numpy as np
import pandas as pd
import pytest

import analysis
from analysis.figures import results as figures
from analysis.figures.style import COLORS, Look
from analysis.figures.training import _carried_on
from analysis.frames.loading import load_curves
from analysis.report.build import FIGURES, draw_figures
from analysis.tables.comparison import compare_groups

SVG = "{http://www.w3.org/2000/svg}"


def texts(svg: str) -> set[str]:
    return {"".join(node.itertext()).strip() for node in ElementTree.fromstring(svg).iter(f"{SVG}text")}


@pytest.fixture(scope="module")
def own() -> pd.DataFrame:
    """Two methods, two models that tell their sizes, three numbers of shots, a search."""
    random = np.random.default_rng(0)
    rows = [
        {
            "model": model, "task": "rte", "method": method, "n_shots": n, "data_seed": seed, "pattern": "minimal",
            "in_domain_score": 0.6 + 0.05 * i + random.normal(0, 0.02), "out_of_domain_score": 0.5 + random.normal(0, 0.02),
            "in_domain_set": "rte", "out_of_domain_set": "hans", "in_domain_majority": 0.527, "out_of_domain_majority": 0.5,
            "tokens_per_query": 40.0 * (1 + n * (method == "in_context")), "wall_s": 10.0, "metric": "accuracy",
        }
        for model in ("opt-125m", "opt-1.3b")
        for method in ("in_context", "lora")
        for i, n in enumerate((2, 16, 128))
        for seed in range(4)
    ]  # fmt: skip
    search = [
        {"model": "opt-125m", "task": "rte", "method": "lora", "n_shots": 16, "pattern": "minimal", "stage": "search", "data_seed": seed,
         "learning_rate": rate, "train": str(rate), "settings": "{}", "dev_score": 0.5 + random.random() / 4, "in_domain_score": np.nan}
        for rate in (1e-5, 1e-4, 1e-3)
        for seed in (100, 101)
    ]  # fmt: skip
    return analysis.from_dataframe(pd.DataFrame([*rows, *search]))


@pytest.fixture(scope="module")
def drawn(own) -> dict[str, str]:
    trained = own[(own["method"] == "lora") & (own["stage"] == "report")]
    curves = pd.DataFrame([(d, e, 0.5 + 0.01 * e) for d in trained["digest"] for e in (1, 2, 3)], columns=["digest", "epoch", "dev_score"])
    return draw_figures(own, curves)


def test_a_training_that_ended_early_counts_to_the_end_with_its_last_score():
    looks = {"whole": [0.5, 0.6, 0.7, 0.8], "early": [0.4, 0.6], "dead": [0.3]}
    points = pd.DataFrame(
        [
            {"digest": name, "status": "failed" if name == "dead" else "finished", "epochs": 40, "epoch": 10 * n, "dev_score": score}
            for name, scores in looks.items()
            for n, score in enumerate(scores, 1)
        ]
    )
    carried = _carried_on(points)
    assert carried.groupby("epoch")["dev_score"].apply(sorted).to_dict() == {
        10: [0.3, 0.4, 0.5],
        20: [0.6, 0.6],
        30: [0.6, 0.7],
        40: [0.6, 0.8],
    }
    shorter = pd.DataFrame([{"digest": "short", "status": "finished", "epochs": 20, "epoch": n, "dev_score": 0.9} for n in (10, 20)])
    both = _carried_on(pd.concat([points, shorter], ignore_index=True)).query("digest == 'short'")
    assert both["epoch"].tolist() == [10, 20]  # it has no later epochs to stay for


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "scatter",
            {"in domain: rte, accuracy in %", "out of domain: hans, accuracy in %", "opt-125m on rte", "16 shots", "majority class"},
        ),
        ("shots", {"opt-125m on rte: in domain", "opt-1.3b on rte: out of domain", "2", "16", "128", "shots", "lora"}),
        ("sizes", {"125M", "1.3B", "rte, 128 shots: in domain", "parameters of the model"}),
        ("cost", {"tokens per query", "lora", "in_context", "opt-125m on rte"}),
        ("curves", {"epoch", "dev score × 100", "opt-125m on rte, 16 shots", "lora"}),
        ("rates", {"learning rate", "opt-125m on rte, 16 shots"}),
        ("budget", {"settings tried", "expected best dev score × 100"}),
        ("sets", {"No out-of-domain set says how each label did."}),
    ],
)
def test_a_figure_names_its_parts(drawn, name, expected):
    assert expected <= texts(drawn[name])
    assert "mathdefault" not in drawn[name]  # numbers on a logarithmic axis are plain


def test_every_figure_is_deterministic_and_takes_the_colour_of_the_page(own, drawn):
    assert set(drawn) == set(FIGURES)
    assert figures.shots_figure(own, analysis.compare(own)) == drawn["shots"]
    for svg in drawn.values():
        assert "currentColor" in svg and "#000000" not in svg and "aria-label" in svg and "date" not in svg.lower()


def test_a_method_has_the_same_colour_in_every_figure(own, drawn):
    look = Look(own)
    for name in ("shots", "sizes", "curves", "rates", "budget"):
        assert look.color("lora").lower() in drawn[name].lower(), name
    assert look.color("in_context").lower() not in drawn["curves"].lower()


def test_patterns_of_one_method_and_many_methods_stay_distinct():
    names = [f"method{i}" for i in range(15)]
    frame = pd.DataFrame({"method": [*names, "method0"], "pattern": [*["a"] * 15, "b"]})
    look = Look(frame)
    assert {"method0 (a)", "method0 (b)", "method1"} <= set(look.names)
    styles = {(look.color(name), look.line(name), look.marker(name), look.face(name)) for name in look.names}
    assert len(styles) == 16 > len(COLORS)


def test_panels_stand_by_the_size_of_the_model(drawn):
    for name in ("scatter", "shots", "cost", "curves"):
        assert 0 < drawn[name].index("opt-125m on rte") < drawn[name].index("opt-1.3b on rte"), name


def test_the_labels_of_a_set_are_drawn(full_store):
    frame = analysis.load(full_store.root)
    svg = figures.sets_figure(frame, compare_groups(frame))
    assert {"hans: entailment", "hans: not entailment", "accuracy in %"} <= texts(svg)


def test_nothing_to_draw_is_a_sentence(store):
    store.add(out_accuracy=None)
    frame = analysis.load(store.root)
    for name, svg in draw_figures(frame, load_curves(store.root, frame)).items():
        assert svg.startswith("<svg") and len(texts(svg)) == 1 and "." in texts(svg).pop(), name
