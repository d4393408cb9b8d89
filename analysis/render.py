"""The comparison as something to read: for a terminal, as Markdown, as CSV."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from analysis.layout import LETTERS, lay_out

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import RenderableType

    from llmft.record import Finding

_RAISED = str.maketrans(LETTERS, "ᵃᵇᶜᵈᵉᶠᵍʰⁱʲᵏˡᵐⁿᵒᵖʳˢᵗᵘᵛʷˣʸᶻ")


def to_terminal(comparison: pd.DataFrame, findings: Iterable[Finding] = ()) -> RenderableType:
    """The comparison for a terminal: print it with `rich.print` or a `rich.console.Console`.

    Args:
        comparison: from `analysis.compare`.
        findings: from `analysis.cross_findings`, listed below the tables.
    """
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text  # everything from a record is Text: rich must not read markup in a name

    blocks, footnotes = lay_out(comparison)
    parts: list[RenderableType] = [] if blocks else [Text("No report trials to compare yet.")]
    for block in blocks:
        title = Text(f"{block.model} on {block.task}, accuracy in % (± 95 % interval)", style="bold")
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for header in block.headers:
            textual = header in ("Method", "Pattern")
            table.add_column(Text(header), justify="left" if textual else "right", overflow="fold")
        widths = [max(len(row[column].marks) for row in block.rows) for column in range(len(block.headers))]
        for row in block.rows:  # a numeric column keeps its digits below each other, marked or not
            marks = [
                entry.marks.translate(_RAISED).ljust(width if entry.numeric else 0)
                for entry, width in zip(row, widths, strict=True)
            ]
            table.add_row(*(Text(entry.text + mark) for entry, mark in zip(row, marks, strict=True)))
        parts.append(table)
    parts += [Text(f"{letter.translate(_RAISED)} {text}", style="dim") for letter, text in footnotes.items()]
    parts += [Text(f"{found.severity}: {found.message} [{found.code}]") for found in findings]
    return Group(*parts)


def to_markdown(comparison: pd.DataFrame, findings: Iterable[Finding] = ()) -> str:
    """The comparison as Markdown: a pipe table for each model and task, the footnotes, the findings as a list."""
    blocks, footnotes = lay_out(comparison)
    lines = [] if blocks else ["No report trials to compare yet.", ""]
    for block in blocks:
        lines += [f"### {_plain(block.model)} on {_plain(block.task)}", "", "Accuracy in % (± 95 % interval).", ""]
        lines.append("| " + " | ".join(_plain(header) for header in block.headers) + " |")
        lines.append("|" + "|".join(":--" if header in ("Method", "Pattern") else "--:" for header in block.headers) + "|")
        for row in block.rows:
            lines.append("| " + " | ".join(_plain(entry.text) + entry.marks.translate(_RAISED) for entry in row) + " |")
        lines.append("")
    lines += [f"{letter.translate(_RAISED)} {_plain(text)}  " for letter, text in footnotes.items()]
    listed = [f"- **{found.severity}** {_plain(found.message)} (`{found.code}`)" for found in findings]
    return "\n".join([*lines, *([""] if footnotes and listed else []), *listed]).rstrip() + "\n"


def to_csv(comparison: pd.DataFrame) -> str:
    """The comparison as CSV: raw numbers, accuracies in [0, 1], nothing where there is no number."""
    return comparison.to_csv(index=False)


def _plain(text: str) -> str:
    """`text` so that Markdown shows it as it is, in one table cell."""
    escaped = re.sub(r"([\\`*_|\[\]~#])", r"\\\1", text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return " ".join(escaped.split())
