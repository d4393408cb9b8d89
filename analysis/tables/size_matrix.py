"""Render size matrices: how much better the column's model is, and whether that is significant.

▲ marks cells where the column is better, ◀ where the row is; blue and orange, which the color-blind can tell apart, say the same.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from analysis.stats import size_name
from analysis.tables.render import tex
from analysis.tables.text_table import TextTable, table_to_markdown

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import RenderableType


MARKS = {"column": "▲", "row": "◀", "": ""}
_TERMINAL = {"column": "bold blue", "row": "bold dark_orange", "": ""}
_LATEX = {"column": r"\cellcolor{blue!20}", "row": r"\cellcolor{orange!30}", "": ""}


class MatrixCell(NamedTuple):
    """`text` is the difference with two decimals, as the paper prints it; `better` is 'column', 'row' or ''."""

    text: str
    better: str
    detail: str


def matrix_cells(matrix: pd.DataFrame) -> tuple[list[str], list[tuple[str, list[MatrixCell]]]]:
    """Return the column names, and each row's name and cells, from `analysis.size_matrix`."""
    columns = list(dict.fromkeys(matrix["column_model"]))
    rows = []
    for row_model, cells in matrix.groupby("row_model", sort=False):
        by_column = {cell["column_model"]: cell for cell in cells.to_dict("records")}
        rows.append((size_name(str(row_model)), [_matrix_cell(by_column[column]) for column in columns]))
    return [size_name(column) for column in columns], rows


def _matrix_cell(cell: Mapping[Hashable, Any]) -> MatrixCell:
    means = f"{cell['column_mean']:.3f} (n {cell['n_column']}) against {cell['row_mean']:.3f} (n {cell['n_row']})"
    p = f"p column better {cell['p_column']:.2g}, row better {cell['p_row']:.2g}"
    return MatrixCell(f"{round(cell['difference'], 2) + 0.0:.2f}".replace("-", "−"), cell["better"], f"{means}; {p}")


def matrix_to_markdown(matrix: pd.DataFrame, row_name: str = "row", column_name: str = "column") -> str:
    """Render the matrix as a Markdown pipe table with marks."""
    return table_to_markdown(_text_table(matrix, row_name, column_name)) + "\n" + _legend(row_name, column_name) + "\n"


def matrix_to_terminal(matrix: pd.DataFrame, row_name: str = "row", column_name: str = "column") -> RenderableType:
    """Render the matrix for `rich.print`, with marks and colors."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    columns, rows = matrix_cells(matrix)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(Text(_corner(row_name, column_name)))
    for column in columns:
        table.add_column(Text(column), justify="right")
    for name, cells in rows:
        table.add_row(Text(name), *(Text(cell.text + (MARKS[cell.better] or " "), _TERMINAL[cell.better]) for cell in cells))
    return Group(table, Text(_legend(row_name, column_name), style="dim"))


def matrix_to_latex(matrix: pd.DataFrame, row_name: str = "row", column_name: str = "column") -> str:
    """Render the matrix as a LaTeX tabular with colored cells; needs booktabs, and xcolor with its option `table`."""
    columns, rows = matrix_cells(matrix)
    lines = [
        "% needs \\usepackage{booktabs} and \\usepackage[table]{xcolor}",
        f"\\begin{{tabular}}{{l{'r' * len(columns)}}}",
        "\\toprule",
    ]
    lines += [" & ".join(map(tex, [_corner(row_name, column_name), *columns])) + " \\\\", "\\midrule"]
    lines += [" & ".join([tex(name), *(_LATEX[cell.better] + tex(cell.text) for cell in cells)]) + " \\\\" for name, cells in rows]
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", f"% blue: {column_name} is better; orange: {row_name} is"]) + "\n"


def _text_table(matrix: pd.DataFrame, row_name: str, column_name: str) -> TextTable:
    columns, rows = matrix_cells(matrix)
    texts = [[name, *(cell.text + MARKS[cell.better] for cell in cells)] for name, cells in rows]
    return TextTable([_corner(row_name, column_name), *columns], texts, numeric=tuple(range(1, len(columns) + 1)))


def _corner(row_name: str, column_name: str) -> str:
    return f"{row_name} \\ {column_name}"


def _legend(row_name: str, column_name: str) -> str:
    return f"Column minus row. ▲ {column_name} is better, ◀ {row_name} is better: Welch's t-test, one-sided each way, p < .05."
