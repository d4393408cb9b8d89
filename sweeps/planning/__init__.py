"""A plan in YAML becomes a `Plan`, and a plan becomes cells."""

from sweeps.planning.cells import Cell
from sweeps.planning.expand import build_cells
from sweeps.planning.loader import load_plan, parse_plan
from sweeps.planning.schema import ForgettingPlan, MethodEntry, ModelEntry, ModelName, Plan, PrunePlan, ReportPlan, SearchPlan
from sweeps.planning.search_space import Params, Space, decode, distribution, encode
from sweeps.planning.yaml_file import read_value, read_yaml

__all__ = [
    "Cell", "ForgettingPlan", "MethodEntry", "ModelEntry", "ModelName", "Params", "Plan", "PrunePlan", "ReportPlan", "SearchPlan",
    "Space", "build_cells", "decode", "distribution", "encode", "load_plan", "parse_plan", "read_value", "read_yaml",
]  # fmt: skip
