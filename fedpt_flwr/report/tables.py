"""A page's tables as files: CSV for programs, LaTeX for papers."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence

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


def tables_of(page: Page) -> dict[str, list[Table]]:
    """The tables that have a name, by it."""
    found: dict[str, list[Table]] = {}
    for section in page.sections:
        for block in section.blocks:
            if isinstance(block, Table) and block.name:
                found.setdefault(block.name, []).append(block)
    return found


def as_csv(tables: Sequence[Table]) -> str:
    """Tables as one in CSV: numbers as they are, an interval's ends in columns of their own, nothing for a dash."""
    records: list[dict[str, str]] = []
    heads: dict[str, None] = {}
    for table in tables:
        heads |= dict.fromkeys(["world"] if table.world else [])
        for place, head in enumerate(table.head):
            heads |= dict.fromkeys(f"{head}{added}" for added in _added([row[place] for row in table.rows]))
        for row in table.rows:
            record = {"world": _written(table.world)} if table.world else {}
            for head, cell in zip(table.head, row, strict=True):
                raw = cell.raw if isinstance(cell, Cell) else {"": "" if cell == "-" else cell}
                record |= {f"{head}{added}": _written(value) for added, value in raw.items()}
            records.append({name: value for name, value in record.items() if name in heads})
    written = io.StringIO()
    writer = csv.DictWriter(written, list(heads), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return written.getvalue()


def _added(cells: Sequence[str | Cell]) -> Iterable[str]:
    """What the columns of these cells add to its name: one column, or those of the numbers in them."""
    return dict.fromkeys(added for cell in cells if isinstance(cell, Cell) for added in cell.raw) or ("",)


def _written(value: float | str | None) -> str:
    """A number as programs read it; a text that a spreadsheet takes for a formula with a quote in front."""
    if isinstance(value, str):
        return f"'{value}" if value[:1] in ("=", "+", "-", "@", "\t") else value
    return "" if value is None else f"{value:.15g}"


def as_latex(tables: Sequence[Table]) -> str:
    r"""Tables as LaTeX, for ``\input`` into a document that uses the package booktabs."""
    return "".join(map(_tabular, tables))


def _tabular(table: Table) -> str:
    columns = "l" * table.texts + "r" * (len(table.head) - table.texts)
    lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", _line(table.head), r"\midrule"]
    lines += [_line(row) for row in table.rows]
    caption = f"World {table.world}. {table.caption}" if table.world else table.caption
    return "\n".join([f"% {_escaped(caption)}", *lines, r"\bottomrule", r"\end{tabular}", ""])


def _line(cells: Sequence[str | Cell]) -> str:
    texts = [f"{cell.text} {cell.extra}".rstrip() if isinstance(cell, Cell) else cell for cell in cells]
    line = " & ".join(_escaped(text) for text in texts)
    # A bracket at the beginning of a line would be taken for an argument of the \\ before it.
    return (f"{{}}{line}" if line.startswith("[") else line) + r" \\"


def _escaped(text: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in text)
