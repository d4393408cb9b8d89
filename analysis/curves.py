"""Learning curves: what the dev set said during training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from analysis.frame import record_paths
from llmft.files import Place, read_many
from llmft.record_files import RecordError, read_record

if TYPE_CHECKING:
    import pandas as pd

_COLUMNS = {"digest": "str", "step": "Int64", "epoch": "Int64", "train_loss": "float64", "learning_rate": "float64"}
_COLUMNS |= {"dev_score": "float64", "dev_loss": "float64"}


def load_curves(root: str | Place, frame: pd.DataFrame) -> pd.DataFrame:
    """Every look at the dev set of the trials in `frame`, one row each: `digest`, `step`, `epoch`, `train_loss`, `learning_rate`,
    `dev_score`, `dev_loss`. A record that cannot be read has none (`analysis.load` says so)."""
    import pandas as pd

    wanted = set(frame["digest"])
    places = [path.parent for path in record_paths(root) if path.parent.name in wanted]

    def read(folder: Place) -> list[dict]:
        try:
            record = read_record(folder)
        except (RecordError, OSError):
            return []
        return [{"digest": record.digest, **point.model_dump()} for point in record.curve]

    rows = [row for of_trial in read_many(read, places) for row in of_trial]
    return pd.DataFrame({name: pd.Series([row[name] for row in rows], dtype=dtype) for name, dtype in _COLUMNS.items()})
