"""What the terminal shows: progress, tables and lists."""

from sweeps.display.catalogue import (
    METHOD_COLUMNS,
    TASK_COLUMNS,
    markdown_table,
    method_page,
    method_rows,
    task_page,
    task_rows,
    terminal_table,
)
from sweeps.display.progress import Progress
from sweeps.display.tables import changes_table, count_by_stage, plan_table, preview_view, record_summary

__all__ = [
    "METHOD_COLUMNS", "Progress", "TASK_COLUMNS", "changes_table", "count_by_stage", "markdown_table", "method_page", "method_rows",
    "plan_table", "preview_view", "record_summary", "task_page", "task_rows", "terminal_table",
]  # fmt: skip
