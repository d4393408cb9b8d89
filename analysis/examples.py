"""Statistics on single answers: is a difference more than the luck of seeds and of test examples, taken together?"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from analysis.columns import DOMAINS
from analysis.contrasts import pairing_seed
from analysis.frame import read_predictions, record_paths
from analysis.selection import select
from analysis.stats import ALPHA, FEWEST, bootstrap_difference, holm, mcnemar
from analysis.tables import common_shots
from llmft.files import Place, read_many
from llmft.record_files import RecordError

if TYPE_CHECKING:
    import pandas as pd

_COLUMNS = (
    *("model", "task", "n_shots", "domain", "set", "a", "a_pattern", "b", "b_pattern", "n_seeds", "n_examples"),
    *("difference", "low", "high", "only_a", "only_b", "n_mcnemar"),
)


def example_scores(root: str | Place, trials: pd.DataFrame, set_name: str) -> tuple[pd.DataFrame, list[str]]:
    """How each trial did on each example of a set: 1 for a right answer and 0 for a wrong one, or the score of a generated text.

    Args:
        root: the results that `trials` come from.
        trials: rows of the frame, one for each trial; `selection` tells which answers.
        set_name: name of the test set.

    Returns:
        The scores  # [trials, examples], by digest and id; trials that left no answers for this set are absent. And what could not
        be read, a line each.
    """
    import pandas as pd

    places = {path.parent.name: path.parent for path in record_paths(root)}
    wanted = [each for each in trials[["digest", "selection", "metric"]].itertuples(index=False) if each.digest in places]

    def read(trial) -> pd.Series | str | None:
        try:
            content = read_predictions(places[trial.digest])
        except (RecordError, OSError) as error:
            return str(error)
        return None if content is None else _scores(content, trial.selection, set_name, trial.metric)

    found = dict(zip((each.digest for each in wanted), read_many(read, wanted), strict=True))
    rows = {digest: scores for digest, scores in found.items() if isinstance(scores, pd.Series) and len(scores)}
    table = pd.DataFrame(list(rows.values()), index=list(rows)).dropna(axis="columns")  # examples that every trial answered
    return table, [text for text in found.values() if isinstance(text, str)]


def shared_examples(tables: Iterable[pd.DataFrame]) -> list[str]:
    """Ids of the examples that every trial of every table answered, sorted; tables without trials do not count."""
    ids = [set(table.columns) for table in tables if len(table)]
    return sorted(set.intersection(*ids)) if ids else []


def example_contrasts(root: str | Place, frame: pd.DataFrame, rule: str = "best_dev") -> tuple[pd.DataFrame, list[str]]:
    """The method with the best mean against each other one, answer by answer, at the number of shots that the answer speaks of.

    Returns:
        One row for each model, task, number of shots, domain and other method: `a` the best, `b` the other; `n_seeds` (pairs; a
        method without seeds stands in each), `n_examples`; `difference` of the mean scores with its two-level bootstrap interval
        `low`, `high` (`analysis.stats.bootstrap_difference`: other seeds and other examples; NaN for fewer than three pairs); for right and wrong answers how many
        examples only `a` and only `b` has right (means over the seeds), and `n_mcnemar`, the seeds whose McNemar test is
        significant (p < .05, Holm over the seeds). And what could not be read, a line each.

    Raises:
        UserError: there is no such rule.
    """
    import pandas as pd

    chosen = select(frame, rule)
    done = chosen[(chosen["status"] == "finished") & chosen["data_seed"].notna()]
    rows, problems = [], {}
    for domain in DOMAINS:
        scored = done[done[f"{domain}_score"].notna()]
        for (model, task, set_name), trials in scored.groupby(["model", "task", f"{domain}_set"]):
            n_shots = common_shots(trials)
            trials = trials[trials["n_shots"].isin([0, n_shots])]
            by_cell = ["method", "pattern", "n_shots"]
            if len(trials.drop_duplicates(by_cell)) < 2:
                continue  # nothing to stand beside, so its answers need not be read
            scores, unread = example_scores(root, trials, set_name)
            problems |= dict.fromkeys(unread)
            cells, seed = {}, pairing_seed(trials)
            for key, cell in trials[trials["digest"].isin(scores.index)].groupby(by_cell):
                by_seed = cell.drop_duplicates(seed).set_index(seed)["digest"]
                cells[key] = scores.loc[by_seed.to_numpy()].set_index(by_seed.index.astype(int))
            where = dict(zip(_COLUMNS, (model, task, n_shots, domain, set_name), strict=False))
            rows += [where | row for row in _against_best(cells)]
    return pd.DataFrame(rows, columns=list(_COLUMNS)).assign(rule=rule), list(problems)


def _scores(content: bytes, selection: str, set_name: str, metric: str) -> pd.Series:
    import pyarrow.compute as pc
    import pyarrow.parquet as parquet

    file = io.BytesIO(content)
    names = parquet.read_schema(file).names
    values = [metric] if metric in names else ["label", "prediction"]
    here = (pc.field("set") == set_name) & (pc.field("selection") == selection)
    table = parquet.read_table(file, columns=["id", *values], filters=here).to_pandas().set_index("id")
    if metric in names:
        return table[metric].astype("float32")
    return (table["label"] == table["prediction"]).astype("float32")


def _against_best(cells: dict[tuple, pd.DataFrame]):
    if len(cells) < 2:
        return
    means = {key: float(scores.to_numpy().mean()) for key, scores in cells.items()}
    best = max(means, key=means.get)
    for other in sorted(cells, key=lambda key: -means[key]):
        if other == best:
            continue
        a, b = _paired(best, cells[best], other, cells[other])
        if not len(a):
            continue
        low, high = bootstrap_difference(a - b) if len(a) >= FEWEST else (math.nan, math.nan)
        row = {"a": best[0], "a_pattern": best[1], "b": other[0], "b_pattern": other[1], "n_seeds": len(a)}
        row |= {"n_examples": a.shape[1], "difference": float((a - b).mean()), "low": low, "high": high}
        if set(np.unique(np.concatenate([a, b]))) <= {0.0, 1.0}:
            tests = [mcnemar(of_a, of_b) for of_a, of_b in zip(a, b, strict=True)]
            only_a, only_b, p = zip(*tests, strict=True)
            row |= {"only_a": np.mean(only_a), "only_b": np.mean(only_b), "n_mcnemar": int((holm(p) < ALPHA).sum())}
        yield row


def _paired(a_key: tuple, a: pd.DataFrame, b_key: tuple, b: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Both methods' scores  # [seeds, examples], of the same seeds; one without seeds (no shots) stands beside each of the other's."""
    if a_key[2] == 0 and len(a) == 1:
        return np.repeat(a.to_numpy(), len(b), 0), b.to_numpy()
    if b_key[2] == 0 and len(b) == 1:
        return a.to_numpy(), np.repeat(b.to_numpy(), len(a), 0)
    shared = a.index.intersection(b.index)
    return a.loc[shared].to_numpy(), b.loc[shared].to_numpy()
