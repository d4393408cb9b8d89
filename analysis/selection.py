"""Which checkpoint of a trial counts: one rule for the whole table."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

from llmft.errors import unknown_name
from llmft.spec import Selection

if TYPE_CHECKING:
    import pandas as pd

RULES: tuple[str, ...] = tuple(rule for rule in get_args(Selection) if rule != "none")


def select(frame: pd.DataFrame, rule: str = "best_dev") -> pd.DataFrame:
    """The report trials, one row each: under `rule` where a checkpoint was selected, as they are where there was none to select.

    So rows of untrained methods, of failed trials and of unreadable records (`selection` 'none') stay under every rule. A trial
    that finished without a checkpoint under this rule has no row; `analysis.compare` counts those.

    Args:
        frame: from `analysis.load`.
        rule: one of `RULES`; the oracles look at the reported sets, and their rows keep `is_oracle`.

    Returns:
        The rows, with the column `rule` added.

    Raises:
        UserError: there is no such rule.
    """
    if rule not in RULES:
        raise unknown_name("selection rule", rule, RULES)
    chosen = frame[(frame["stage"] == "report") & frame["selection"].isin([rule, "none"])]
    return chosen.assign(rule=rule)
