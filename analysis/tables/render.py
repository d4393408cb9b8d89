"""Render the comparison: for a terminal, as Markdown, as LaTeX, as CSV."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from analysis.tables.formatting import LETTERS, STRONG, Block, build_blocks

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.table import Table
    from rich.text import Text

    from llmft.records import Finding


_RAISED = str.maketrans(LETTERS, "ᵃᵇᶜᵈᵉᶠᵍʰⁱʲᵏˡᵐⁿᵒᵖʳˢᵗᵘᵛʷˣʸᶻ")


def to_terminal(comparison: pd.DataFrame, findings: Iterable[Finding] = ()) -> RenderableType:
    """Render the comparison for a terminal: print it with `rich.print` or a `rich.console.Console`.

    Args:
        comparison: from `analysis.compare`.
        findings: from `analysis.cross_findings`, listed below the tables.
    """
    from rich.console import Group
    from rich.text import Text  # everything from a record is Text: rich must not read markup in a name

    blocks, footnotes = build_blocks(comparison)
    parts: list[RenderableType] = [] if blocks else [Text("No report trials to compare yet.")]
    for block in blocks:
        title = Text(f"{block.model} on {block.task}, {block.metric} (± 95 % interval)", style="bold")
        parts.append(_Fitted(block, title))
    if _any_strong(blocks):
        parts.append(_Bold())
    parts += [Text(f"{letter.translate(_RAISED)} {text}", style="dim") for letter, text in footnotes.items()]
    parts += [Text(f"{finding.severity}: {finding.message} [{finding.code}]") for finding in findings]
    return Group(*parts)


class _Bold:
    """The line that explains bold numbers, where bold can be seen."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from rich.text import Text

        if console.is_terminal:
            yield Text(STRONG, style="dim")


class _Fitted:
    """A block as a table that leaves out what a narrow terminal has no room for: first what says nothing, then sd and maximum."""

    def __init__(self, block: Block, title: Text):
        self.block, self.title = block, title

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        dropped: set[int]
        for dropped in (set(), self.block.idle, self.block.idle | self.block.spread):
            table = self._table(dropped)
            if table.__rich_measure__(console, options.update(max_width=10_000)).maximum <= options.max_width:
                break
        yield table

    def _table(self, dropped: set[int]) -> Table:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(title=self.title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        columns = [i for i in range(len(self.block.headers)) if i not in dropped]
        for i in columns:
            textual = self.block.headers[i] in ("Method", "Pattern")
            table.add_column(Text(self.block.headers[i]), justify="left" if textual else "right", overflow="fold")
        widths = {i: max(len(row[i].marks) for row in self.block.rows) for i in columns}
        for row in self.block.rows:  # a numeric column keeps its digits below each other, marked or not
            cells = []
            for i in columns:
                mark = row[i].marks.translate(_RAISED).ljust(widths[i] if row[i].numeric else 0)
                cells.append(Text(row[i].text, "bold" if row[i].strong else "").append(mark, "not bold"))
            table.add_row(*cells)
        return table


def to_markdown(comparison: pd.DataFrame, findings: Iterable[Finding] = ()) -> str:
    """Render the comparison as Markdown: a pipe table for each model and task, the footnotes, the findings as a list."""
    blocks, footnotes = build_blocks(comparison)
    lines = [] if blocks else ["No report trials to compare yet.", ""]
    for block in blocks:
        lines += [
            f"### {plain(block.model)} on {plain(block.task)}",
            "",
            f"{plain(block.metric[0].upper() + block.metric[1:])} (± 95 % interval).",
            "",
        ]
        lines.append("| " + " | ".join(plain(header) for header in block.headers) + " |")
        lines.append("|" + "|".join(":--" if header in ("Method", "Pattern") else "--:" for header in block.headers) + "|")
        for row in block.rows:
            texts = (f"**{plain(entry.text)}**" if entry.strong else plain(entry.text) for entry in row)
            marked = (text + entry.marks.translate(_RAISED) for text, entry in zip(texts, row, strict=True))
            lines.append("| " + " | ".join(marked) + " |")
        lines.append("")
    if _any_strong(blocks):
        lines += [STRONG + ".", ""]
    lines += [f"{letter.translate(_RAISED)} {plain(text)}  " for letter, text in footnotes.items()]
    listed = [f"- **{finding.severity}** {plain(finding.message)} (`{finding.code}`)" for finding in findings]
    return "\n".join([*lines, *([""] if footnotes and listed else []), *listed]).rstrip() + "\n"


def to_latex(comparison: pd.DataFrame, findings: Iterable[Finding] = (), narrow: bool = False) -> str:
    """Render the comparison as LaTeX: a `table` for each model and task, set with booktabs, the footnotes below it.

    Needs `\\usepackage{booktabs}`; the findings come as comments, to be written up by the author.

    Args:
        narrow: for one column of a paper: without standard deviations and maxima, and without what says nothing.
    """
    blocks, footnotes = build_blocks(comparison)
    lines = ["% needs \\usepackage{booktabs}"] if blocks else ["% No report trials to compare yet."]
    for block in blocks:
        dropped = block.idle | block.spread if narrow else set()
        columns = [i for i in range(len(block.headers)) if i not in dropped]
        aligned = "".join("l" if block.headers[i] in ("Method", "Pattern") else "r" for i in columns)
        letters = dict.fromkeys(mark for row in block.rows for entry in row for mark in entry.marks.split(",") if mark)
        caption = f"{tex(block.model)} on {tex(block.task)}: {tex(block.metric)}, mean $\\pm$ 95\\,\\% interval."
        caption += f" {tex(STRONG)}." if _any_strong([block]) else ""
        caption += "".join(f" \\textsuperscript{{{letter}}}\\,{tex(footnotes[letter])}." for letter in letters)
        label = re.sub(r"[^A-Za-z0-9.-]+", "-", f"{block.model} {block.task}")
        lines += ["\\begin{table}", "\\centering\\small", f"\\begin{{tabular}}{{{aligned}}}", "\\toprule"]
        lines += [" & ".join(tex(block.headers[i]) for i in columns) + " \\\\", "\\midrule"]
        for row in block.rows:
            texts = (f"\\textbf{{{tex(row[i].text)}}}" if row[i].strong else tex(row[i].text) for i in columns)
            marks = (f"\\textsuperscript{{{row[i].marks}}}" if row[i].marks else "" for i in columns)
            lines.append(" & ".join(text + mark for text, mark in zip(texts, marks, strict=True)) + " \\\\")
        lines += ["\\bottomrule", "\\end{tabular}", f"\\caption{{{caption}}}", f"\\label{{tab:{label}}}", "\\end{table}", ""]
    lines += [f"% {finding.severity}: {' '.join(finding.message.split())} ({finding.code})" for finding in findings]
    return "\n".join(lines).rstrip() + "\n"


def to_csv(comparison: pd.DataFrame) -> str:
    """Render the comparison as CSV: raw numbers, accuracies in [0, 1], empty where there is no number."""
    return comparison.to_csv(index=False)


def _any_strong(blocks: list[Block]) -> bool:
    return any(entry.strong for block in blocks for row in block.rows for entry in row)


_TEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_TEX |= {"−": "$-$", "±": r"$\pm$", "–": "--", "<": "$<$", ">": "$>$"} | {char: "\\" + char for char in "&%$#_{}"}


def tex(text: str) -> str:
    """Escape `text` for LaTeX."""
    return "".join(_TEX.get(char, char) for char in " ".join(text.split()))


def plain(text: str) -> str:
    """Escape `text` for one cell of a Markdown table."""
    escaped = re.sub(r"([\\`*_|\[\]~#])", r"\\\1", text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return " ".join(escaped.split())
