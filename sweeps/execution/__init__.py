"""The running sweep's state, and what runs beside it: prefetching and experiment trackers."""

from sweeps.execution.prefetch import Needs, moved_models
from sweeps.execution.sweep_state import SweepState
from sweeps.execution.trackers import check_trackers, tracking

__all__ = ["Needs", "SweepState", "check_trackers", "moved_models", "tracking"]
