"""Tables of texts, and their rendering in a terminal and in Markdown."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from analysis.tables.render import plain

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class TextTable:
    """A table of texts; columns whose index is in `numeric` are set flush right."""

    headers: list[str]
    rows: list[list[str]] = field(default_factory=list)
    numeric: tuple[int, ...] = ()


def trim_columns(table: TextTable, *names: str) -> TextTable:
    """Drop those of the columns `names` that hold the same text in every row (where there are several rows)."""
    columns = list(zip(*table.rows, strict=True))
    if len(table.rows) < 2:
        return table
    kept = [i for i, header in enumerate(table.headers) if header.lower() not in names or len(set(columns[i])) > 1]
    numeric = tuple(position for position, i in enumerate(kept) if i in table.numeric)
    return TextTable([table.headers[i] for i in kept], [[row[i] for i in kept] for row in table.rows], numeric)


def table_to_terminal(table: TextTable, title: str = "") -> RenderableType:
    """Render a table for `rich.print`."""
    from rich import box
    from rich.table import Table
    from rich.text import Text  # everything from a record is Text: rich must not read markup in a name

    rendered = Table(title=Text(title, style="bold") if title else None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, header in enumerate(table.headers):
        rendered.add_column(Text(header), justify="right" if i in table.numeric else "left", overflow="fold")
    for row in table.rows:
        rendered.add_row(*map(Text, row))
    return rendered


def table_to_markdown(table: TextTable) -> str:
    """Render a table as a Markdown pipe table."""
    lines = ["| " + " | ".join(map(plain, table.headers)) + " |"]
    lines.append("|" + "|".join("--:" if i in table.numeric else ":--" for i in range(len(table.headers))) + "|")
    return "\n".join([*lines, *("| " + " | ".join(map(plain, row)) + " |" for row in table.rows)]) + "\n"
