"""What the terminal shows: progress, tables, and pages about methods and tasks."""

from sweeps.display.catalogue import METHOD_COLUMNS, TASK_COLUMNS, markdown_table, method_rows, task_rows, terminal_table
from sweeps.display.pages import method_page, task_page
from sweeps.display.plan_preview import count_by_stage, preview_page
from sweeps.display.progress import Progress
from sweeps.display.record_page import changes_table, record_summary

__all__ = [
    "METHOD_COLUMNS", "Progress", "TASK_COLUMNS", "changes_table", "count_by_stage", "markdown_table", "method_page", "method_rows",
    "preview_page", "record_summary", "task_page", "task_rows", "terminal_table",
]  # fmt: skip
