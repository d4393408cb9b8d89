"""Run a sweep on Ray; the only room that imports it."""

from sweeps.ray_backend.driver import run_on_ray
from sweeps.ray_backend.session import check_answers

__all__ = ["check_answers", "run_on_ray"]
