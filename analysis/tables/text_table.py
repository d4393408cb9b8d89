"""Tables of texts, and how they look in a terminal and in Markdown."""

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


def trim_columns(sheet: TextTable, *names: str) -> TextTable:
    """The sheet without those of the columns `names` that say the same in every row (where there are several rows)."""
    columns = list(zip(*sheet.rows, strict=True))
    if len(sheet.rows) < 2:
        return sheet
    kept = [i for i, header in enumerate(sheet.headers) if header.lower() not in names or len(set(columns[i])) > 1]
    numeric = tuple(place for place, i in enumerate(kept) if i in sheet.numeric)
    return TextTable([sheet.headers[i] for i in kept], [[row[i] for i in kept] for row in sheet.rows], numeric)


def table_to_terminal(sheet: TextTable, title: str = "") -> RenderableType:
    """The sheet for `rich.print`."""
    from rich import box
    from rich.table import Table
    from rich.text import Text  # everything from a record is Text: rich must not read markup in a name

    table = Table(title=Text(title, style="bold") if title else None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, header in enumerate(sheet.headers):
        table.add_column(Text(header), justify="right" if i in sheet.numeric else "left", overflow="fold")
    for row in sheet.rows:
        table.add_row(*map(Text, row))
    return table


def table_to_markdown(sheet: TextTable) -> str:
    """The sheet as a pipe table."""
    lines = ["| " + " | ".join(map(plain, sheet.headers)) + " |"]
    lines.append("|" + "|".join("--:" if i in sheet.numeric else ":--" for i in range(len(sheet.headers))) + "|")
    return "\n".join([*lines, *("| " + " | ".join(map(plain, row)) + " |" for row in sheet.rows)]) + "\n"
