"""A page's tables as files: CSV for programs, LaTeX for papers."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence

from fedpt_flwr.report.page import Cell, Page, Table

_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\n": " ",
}


def tables_of(page: Page) -> Iterator[tuple[str, Table]]:
    """Every table with a name that is fit for a file: its section's, and a number where that has several."""
    for section in page.sections:
        tables = [block for block in section.blocks if isinstance(block, Table)]
        for number, table in enumerate(tables, 1):
            yield section.id + (f"-{number}" if len(tables) > 1 else ""), table


def as_csv(table: Table) -> str:
    """A table as CSV; what stands behind a value, such as its interval, is a column of its own."""
    has_extra = [
        any(isinstance(row[place], Cell) for row in table.rows if place < len(row)) for place in range(len(table.head))
    ]
    written = io.StringIO()
    writer = csv.writer(written, lineterminator="\n")
    heads = [
        name
        for head, extra in zip(table.head, has_extra, strict=True)
        for name in ((head, f"{head}, interval") if extra else (head,))
    ]
    writer.writerow(heads)
    for row in table.rows:
        cells: list[str] = []
        for cell, extra in zip(row, has_extra, strict=False):
            text, behind = (cell.text, cell.extra) if isinstance(cell, Cell) else (cell, "")
            cells += [_inert(text), behind] if extra else [_inert(text)]
        writer.writerow(cells)
    return written.getvalue()


def _inert(text: str) -> str:
    """A text that a spreadsheet takes for a formula gets a quote in front; numbers stay."""
    if text[:1] not in ("=", "+", "-", "@", "\t") or text == "-":
        return text
    try:
        float(text.replace(",", ""))
    except ValueError:
        return f"'{text}"
    return text


def as_latex(table: Table) -> str:
    r"""A table as LaTeX, for ``\input`` into a document that uses the package booktabs."""
    columns = "l" * table.texts + "r" * (len(table.head) - table.texts)
    lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", _line(table.head), r"\midrule"]
    lines += [_line(row) for row in table.rows]
    return "\n".join([f"% {_escaped(table.caption)}", *lines, r"\bottomrule", r"\end{tabular}", ""])


def _line(cells: Sequence[str | Cell]) -> str:
    texts = [f"{cell.text} {cell.extra}" if isinstance(cell, Cell) else cell for cell in cells]
    line = " & ".join(_escaped(text) for text in texts)
    # A bracket at the beginning of a line would be taken for an argument of the \\ before it.
    return (f"{{}}{line}" if line.startswith("[") else line) + r" \\"


def _escaped(text: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in text)
