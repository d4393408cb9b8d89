"""Draw the results: each function turns a frame into an SVG element, which says so where there is nothing to draw."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from analysis.figures.style import INK, MARKERS, Look, draw, draw_line, handle, log_axis, notice
from analysis.frames import DOMAINS, LABEL, common_shots, group_by, select
from analysis.stats import COSTS, MAJORITY, by_model, costs, model_size, size_name
from analysis.tables import TITLES, axis_name

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D


def scatter(frame: pd.DataFrame, rule: str = "best_dev") -> str:
    """Draw in-domain (x) against out-of-domain (y) score, one point for each report trial, one panel for each model and task.

    Color tells the method, the marker the number of shots; dashed lines are the majority class, the thin diagonal is where both
    scores are the same (Mosbach et al. 2023, Figures 2 to 16).

    Raises:
        UserError: there is no such rule.
    """
    points = select(frame, rule).dropna(subset=["in_domain_score", "out_of_domain_score"])
    if points.empty:
        return notice("No trial has both an in-domain and an out-of-domain score.")
    look = Look(frame)
    points = look.name(points)
    markers = {n: MARKERS[i % len(MARKERS)] for i, n in enumerate(sorted(points["n_shots"].unique()))}

    def paint(axes: Axes, trials: pd.DataFrame) -> None:
        values = 100 * trials[["in_domain_score", "out_of_domain_score", "in_domain_majority", "out_of_domain_majority"]]
        low, high = max(0.0, values.min().min() - 4), min(100.0, values.max().max() + 4)
        axes.plot([low, high], [low, high], color=INK, alpha=0.25, linewidth=0.8, zorder=0)
        for across, domain in ((axes.axvline, "in_domain"), (axes.axhline, "out_of_domain")):
            if values[f"{domain}_majority"].notna().any():
                across(values[f"{domain}_majority"].mean(), color=INK, alpha=0.45, linewidth=1, linestyle="--", zorder=0)
        for (name, n_shots), cell in group_by(trials, ["name", "n_shots"]):
            x, y = 100 * cell["in_domain_score"], 100 * cell["out_of_domain_score"]
            face = look.face(name)
            axes.scatter(x, y, s=42, facecolor=face, edgecolor=look.color(name), marker=markers[n_shots], alpha=0.75,
                         linewidths=1.2 if face == "none" else 0, clip_on=False)  # fmt: skip
        axes.set(xlim=(low, high), ylim=(low, high), aspect="equal")
        axes.set_xlabel(axis_name(trials, "in_domain"))
        axes.set_ylabel(axis_name(trials, "out_of_domain"))

    def handles() -> list[Line2D]:
        shots = [handle(f"{n} shots", INK, marker, fillstyle="none", markersize=7) for n, marker in markers.items()]
        known = points[["in_domain_majority", "out_of_domain_majority"]].notna().any().any()
        return [*look.handles(points, lines=False, markers=False), *shots, *([_majority_handle()] if known else [])]

    panels = [(f"{model} on {task}", trials) for (model, task), trials in by_model(points, "task")]
    return draw(panels, paint, handles, "In-domain against out-of-domain score, one point for each trial", (4.2, 4.2))


def shots_figure(frame: pd.DataFrame, table: pd.DataFrame) -> str:
    """Draw the mean score against the number of shots, with 95 % intervals, in and out of domain, for each model and task.

    Args:
        frame: from `analysis.load`; it gives the methods their colors, the same in every figure.
        table: from `analysis.compare`.
    """
    rows = table[table["n"].fillna(0) > 0]
    if rows[rows["n_shots"] > 0].groupby(["model", "task"])["n_shots"].nunique().max() in (0, 1) or rows.empty:
        return notice("There is one number of shots: nothing to draw against it.")
    look, ticks = Look(frame), sorted(set(rows["n_shots"]) - {0})
    rows = look.name(rows)

    def paint(axes: Axes, content: tuple[str, pd.DataFrame]) -> None:
        domain, cells = content
        _draw_majority(axes, table, cells, domain)
        for (name,), line in group_by(cells, ["name"]):
            line = line.sort_values("n_shots")
            if line["n_shots"].max() == 0:
                axes.axhline(100 * line[f"{domain}_mean"].iloc[0], color=look.color(name), linewidth=1.2, linestyle=":")
                continue
            draw_line(axes, look, name, line["n_shots"].astype(float), line[f"{domain}_mean"], line[f"{domain}_half_width"])
        log_axis(axes, ticks, [str(n) for n in ticks])
        axes.set(xlabel="shots", ylabel=axis_name(cells, domain))

    panels = _domain_panels(rows)
    return draw(panels, paint, lambda: [*look.handles(rows), _majority_handle()], "Score against the number of shots")


def sizes_figure(frame: pd.DataFrame, table: pd.DataFrame) -> str:
    """Draw the mean score against the size of the model (from its name), with 95 % intervals, at the number of shots most methods have.

    Args:
        frame: from `analysis.load`, for the colors.
        table: from `analysis.compare`.
    """
    rows = table[(table["n"].fillna(0) > 0) & (table["model"].map(model_size) < math.inf)]
    if rows["model"].nunique() < 2:
        return notice("There are fewer than two models whose names tell a size: nothing to draw against it.")
    look = Look(frame)
    rows = look.name(rows).assign(size=[model_size(name) for name in rows["model"]])

    def paint(axes: Axes, content: tuple[str, pd.DataFrame]) -> None:
        domain, cells = content
        _draw_majority(axes, table, cells, domain)
        for (name,), line in group_by(cells, ["name"]):
            line = line.sort_values("size")
            draw_line(axes, look, name, line["size"], line[f"{domain}_mean"], line[f"{domain}_half_width"])
        ticks = cells.drop_duplicates("size").sort_values("size")
        log_axis(axes, ticks["size"].tolist(), [size_name(name) for name in ticks["model"]], rotation=45 if len(ticks) > 5 else 0)
        axes.set(xlabel="parameters of the model", ylabel=axis_name(cells, domain))

    panels = []
    for task, of_task in rows.groupby("task"):
        shots = common_shots(of_task)
        cells = of_task[of_task["n_shots"].isin([0, shots])]
        panels += [(f"{task}, {shots} shots: {TITLES[domain].lower()}", (domain, cells)) for domain in DOMAINS]
    return draw(panels, paint, lambda: [*look.handles(rows), _majority_handle()], "Score against model size", columns=2)


def cost_figure(frame: pd.DataFrame, rule: str = "best_dev", cost: str = "tokens_per_query") -> str:
    """Draw the out-of-domain score against a cost, a point for each cell; the line joins those that none beats on both.

    Args:
        cost: one of `analysis.stats.COSTS`.
    """
    score = "out_of_domain" if frame["out_of_domain_score"].notna().any() else "in_domain"
    table = costs(frame, rule, f"{score}_score").dropna(subset=[cost])
    table = table[table[cost] > 0]
    if len(table) < 2:
        return notice("Fewer than two cells say what they cost.")
    look, trials = Look(frame), select(frame, rule)
    table = look.name(table)

    def paint(axes: Axes, cells: pd.DataFrame) -> None:
        front = cells[cells[f"front_{cost}"]].sort_values(cost)
        axes.step(front[cost], 100 * front["score"], where="post", color=INK, alpha=0.35, linewidth=1)
        for row in cells.to_dict("records"):
            x, y, name = row[cost], 100 * row["score"], row["name"]
            axes.scatter(x, y, s=46, facecolor=look.face(name), edgecolor=look.color(name), marker=look.marker(name))
            axes.annotate(str(row["n_shots"]), (x, y), xytext=(5, 3), textcoords="offset points", fontsize=8, color=INK)
        log_axis(axes)
        axes.set(xlabel=COSTS[cost], ylabel=axis_name(_of(trials, cells), score))

    panels = [(f"{model} on {task}", cells) for (model, task), cells in by_model(table, "task")]
    return draw(panels, paint, lambda: look.handles(table, lines=False), f"Score against {COSTS[cost]}")


def sets_figure(frame: pd.DataFrame, groups: pd.DataFrame) -> str:
    """Draw the accuracy on each label of each out-of-domain set: a shortcut is right on one label and wrong on the other.

    For HANS a row is a heuristic and a label (McCoy et al. 2019, Figure 1). At the number of shots that most methods have.

    Args:
        frame: from `analysis.load`, for the colors.
        groups: from `analysis.tables.compare_groups`.
    """
    rows = groups[(groups["group"] == LABEL) & (groups["domain"] == "out")]
    if rows.empty:
        return notice("No out-of-domain set says how each label did.")
    look = Look(frame)
    rows = look.name(rows)

    def paint(axes: Axes, cells: pd.DataFrame) -> None:
        names = list(dict.fromkeys(zip(cells["set"], cells["value"], strict=True)))
        positions = {name: i for i, name in enumerate(reversed(names))}
        methods = list(dict.fromkeys(cells["name"]))
        axes.axvline(50, color=INK, alpha=0.3, linewidth=0.8, linestyle="--")
        for i, method in enumerate(methods):
            of = cells[cells["name"] == method]
            y = [positions[name] + 0.6 * (0.5 - (i + 0.5) / len(methods)) for name in zip(of["set"], of["value"], strict=True)]
            axes.errorbar(100 * of["mean"], y, xerr=100 * of["half_width"].fillna(0), fmt=look.marker(method), markersize=5,
                          color=look.color(method), markerfacecolor=look.face(method), elinewidth=1.2)  # fmt: skip
        axes.set_yticks(list(positions.values()), [f"{name}: {value.replace('_', ' ')}" for name, value in positions])
        axes.set(xlim=(-3, 103), xlabel="accuracy in %")

    panels, most = [], 1
    for (model, task), cells in by_model(rows, "task"):
        shots = common_shots(cells)
        panels.append((f"{model} on {task}, {shots} shots", cells[cells["n_shots"].isin([0, shots])]))
        most = max(most, cells[["set", "value"]].drop_duplicates().shape[0])
    return draw(panels, paint, lambda: look.handles(rows, lines=False), "Accuracy by set and label", (5.6, 1.4 + 0.55 * most), columns=2)


def _of(trials: pd.DataFrame, cells: pd.DataFrame) -> pd.DataFrame:
    """The trials of the models and tasks in `cells`."""
    return trials[trials["model"].isin(cells["model"]) & trials["task"].isin(cells["task"])]


def _majority_handle() -> Line2D:
    return handle("majority class", INK, line="--", linewidth=1, alpha=0.6)


def _draw_majority(axes: Axes, table: pd.DataFrame, cells: pd.DataFrame, domain: str) -> None:
    majority = _majority(table, cells, domain)
    if not math.isnan(majority):
        axes.axhline(100 * majority, color=INK, alpha=0.45, linewidth=1, linestyle="--", zorder=0)


def _majority(table: pd.DataFrame, cells: pd.DataFrame, domain: str) -> float:
    rows = table[(table["method"] == MAJORITY) & table["task"].isin(cells["task"]) & table["model"].isin(cells["model"])]
    return float(rows[f"{domain}_mean"].mean())


def _domain_panels(rows: pd.DataFrame) -> list:
    return [
        (f"{model} on {task}: {TITLES[domain].lower()}", (domain, cells))
        for (model, task), cells in by_model(rows, "task")
        for domain in DOMAINS
        if cells[f"{domain}_mean"].notna().any()
    ]
