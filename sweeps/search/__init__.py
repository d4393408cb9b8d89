"""Which trial runs next, and when a cell is done: Optuna, pruning, retries."""

from sweeps.search.cell_state import CellState, PlannedTrial, Records
from sweeps.search.optuna_search import best_point
from sweeps.search.pruning import failed
from sweeps.search.retry_policy import FailurePolicy, Loss
from sweeps.search.schedule import RecordBook, Schedule
from sweeps.search.study_mirror import StudyExporter

__all__ = [
    "CellState", "FailurePolicy", "Loss", "PlannedTrial", "RecordBook", "Records", "Schedule", "StudyExporter", "best_point", "failed",
]  # fmt: skip
