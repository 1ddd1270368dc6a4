"""What a page is made of, and its HTML.

A section is a list of blocks; ``templates/report.html`` writes each kind, with everything escaped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from jinja2 import Environment, PackageLoader, StrictUndefined

from fedpt_flwr.report.plots import DARK, LIGHT, Plot
from fedpt_flwr.report.wording import percent

LONG_TABLE = 12
"""Rows; a longer table is folded where something else says the gist."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A table's cell that is more than its text.

    Attributes:
        text: As a person reads it.
        extra: Something less important behind it, such as an interval.
        raw: What programs read instead, by what is added to the column's name: a number and the ends of its interval.
    """

    text: str
    extra: str = ""
    raw: Mapping[str, float | str | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prose:
    """A paragraph; ``absent`` if it stands in the place of something that is not there."""

    kind: ClassVar[str] = "prose"
    text: str
    absent: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Code:
    """Something that was typed."""

    kind: ClassVar[str] = "code"
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """Names and what they mean."""

    kind: ClassVar[str] = "terms"
    terms: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdicts:
    """The sentences of the verdict: what is said, and by which numbers."""

    kind: ClassVar[str] = "verdicts"
    sentences: Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table.

    Attributes:
        name: Of its files; a comparison's tables of one name are one file. Empty: it has none.
        world: The world that all of it is about, for the files; empty: it says so itself.
        caption: What it shows.
        head: Names of the columns, with units.
        rows: Its cells; the first of each row names the row.
        foot: A last row that sums up, or nothing.
        texts: Number of columns, from the left, that hold texts; the others hold numbers.
        folded: Whether one has to open it.
    """

    kind: ClassVar[str] = "table"
    name: str = ""
    world: str = ""
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    foot: Sequence[str | Cell] = ()
    texts: int = 1
    folded: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Plots:
    """Some plots side by side, where there is room."""

    kind: ClassVar[str] = "plots"
    plots: Sequence[Plot]


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """A token of the proxy's answer, fit to be seen.

    Attributes:
        before: White space in front of it.
        text: The rest.
        instead: What the large model alone would have written there; None if just this.
    """

    before: str
    text: str
    instead: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What one model made of an item; ``right`` is None where that is not known."""

    model: str
    text: str
    right: bool | None = None
    tokens: Sequence[Token] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A test item with its answers."""

    prompt: str
    reference: str
    answers: Sequence[Answer]


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """Some test items."""

    kind: ClassVar[str] = "examples"
    examples: Sequence[Example]


Block = Prose | Code | Terms | Verdicts | Table | Plots | Examples


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A part of the page with a heading."""

    id: str
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Everything that is on the page.

    Attributes:
        kicker: What kind of page it is.
        title: Its name.
        facts: Short ones, for a line below the title.
        notes: Sentences about what is damaged or unfinished.
        sections: The rest.
    """

    kicker: str
    title: str
    facts: Sequence[str]
    notes: Sequence[str]
    sections: Sequence[Section]

    def plots(self) -> Iterator[Plot]:
        """All plots."""
        for section in self.sections:
            for block in section.blocks:
                if isinstance(block, Plots):
                    yield from block.plots


def render(page: Page) -> str:
    """The page as HTML."""
    environment = Environment(
        loader=PackageLoader("fedpt_flwr.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html").render(page=page, light=LIGHT, dark=DARK)


def absent(text: str) -> Prose:
    """A sentence in the place of something that is not there."""
    return Prose(text=text, absent=True)


def estimate(value: float | None, interval: tuple[float, float] | None, write: Callable[[float], str]) -> str | Cell:
    """A value with its interval as a cell; what is written in per cent is so for programs, too."""
    if value is None:
        return "-"
    scale = 100 if write is percent else 1
    raw: dict[str, float | str | None] = {"": scale * value}
    if interval is None:
        return Cell(write(value), raw=raw)
    low, high = interval
    return Cell(write(value), f"[{write(low)}, {write(high)}]", raw | {"_low": scale * low, "_high": scale * high})


def listed(values: Sequence[float | None], write: Callable[[float], str]) -> str | Cell:
    """Several values in a cell; for programs each in a column of its own, counted from 1."""
    cells = [estimate(value, None, write) for value in values]
    text = ", ".join(cell if isinstance(cell, str) else cell.text for cell in cells)
    raw = {f"_{n}": None if isinstance(cell, str) else cell.raw[""] for n, cell in enumerate(cells, 1)}
    return Cell(text, raw=raw) if cells else "-"
