"""The two consoles that commands write to, and how text gets there unchanged."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

OUT = Console(emoji=False)  # `demo:train:` is no tram
ERR = Console(stderr=True, emoji=False)


def say(line: str) -> None:
    """Write a result as it is, however long it is."""
    OUT.print(line, markup=False, highlight=False, soft_wrap=True)


def note(line: str, *, style: str | None = None) -> None:
    """Write something about what is done to the other stream, in the same way."""
    ERR.print(line, style=style, markup=False, highlight=False, soft_wrap=True)


def plain(text: str) -> Text:
    """Text in which brackets are brackets."""
    return Text(text)


def text_table(cells: Sequence[Sequence[str]]) -> Table:
    """Cells of text, the head first; all columns but the first are numbers."""
    head, *rows = cells
    table = Table()
    for index, title in enumerate(head):
        table.add_column(plain(title), justify="right" if index else "left", no_wrap=not index)
    for row in rows:
        table.add_row(*map(plain, row))
    return table
