"""The sections of a comparison: rows of several worlds, modes and seeds."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpt_flwr.errors import RunError
from fedpt_flwr.report.page import (
    LONG_TABLE,
    Block,
    Cell,
    Code,
    Page,
    Plots,
    Prose,
    Section,
    Table,
    Terms,
    absent,
    estimate,
)
from fedpt_flwr.report.plots import MEASURES, Point, plot_points, scaled
from fedpt_flwr.report.reading import (
    Reader,
    as_interval,
    as_mapping,
    as_mappings,
    as_number,
    as_text,
    as_whole,
)
from fedpt_flwr.report.run import ROWS as ROWS_OF_A_RUN
from fedpt_flwr.report.wording import GIGA, MEGA, count_of, in_unit, nats, percent, short
from fedpt_flwr.runs import read_json

SUMMARY = "summary.json"

ROWS = ROWS_OF_A_RUN | {
    "large_federated": "the large model itself, tuned by the devices",
    "large_federated_lora": "the large model with an adapter, tuned by the devices",
}
"""What the rows are."""


@dataclass(frozen=True, slots=True)
class Estimated:
    """A mean over seeds.

    Attributes:
        mean: The mean, or None.
        ci95: Its 95 % interval over the seeds, or None, as where there is one seed.
        values: One for each seed; None where it has no meaning.
    """

    mean: float | None
    ci95: tuple[float, float] | None
    values: tuple[float | None, ...]

    @classmethod
    def of(cls, value: Any) -> Estimated:
        """From what ``summary.json`` holds."""
        found = as_mapping(value)
        values = found.get("values")
        seeds = tuple(map(as_number, values)) if isinstance(values, list) else ()
        return cls(as_number(found.get("mean")), as_interval(found.get("ci95")), seeds)

    def cell(self, write: Callable[[float], str]) -> str | Cell:
        """The mean with its interval."""
        return estimate(self.mean, self.ci95, write)

    def by_seed(self, write: Callable[[float], str]) -> str:
        """The seeds' values."""
        return ", ".join("-" if value is None else write(value) for value in self.values) or "-"


def comparison_page(folder: Path) -> Page:
    """The page of a comparison.

    Raises:
        RunError: ``summary.json`` cannot be read.
    """
    summary = read_json(folder / SUMMARY)
    if not isinstance(summary, dict):
        raise RunError("must hold an object", place=str(folder / SUMMARY), remedy="make the comparison again")
    reader = Reader(folder)
    cells = [reader.mapping(f"cells/{path.name}") for path in sorted((folder / "cells").glob("*.json"))]
    rows = as_mappings(summary.get("rows"))
    worlds = list(dict.fromkeys(as_text(row.get("world")) for row in rows))
    sections = [
        _world(number, world, [row for row in rows if as_text(row.get("world")) == world])
        for number, world in enumerate(worlds, 1)
    ]
    if not sections:
        sections = [Section(id="results", title="Results", blocks=[absent("The comparison has no rows yet.")])]
    seeds = max((as_whole(row.get("n_seeds")) or 0 for row in rows), default=0)
    counts = {"world": len(worlds), "seed": seeds, "device": as_whole(summary.get("devices")), "cell": len(cells)}
    errors = as_mapping(summary.get("errors"))
    missing = [
        f"{count_of(number, 'cell')} of {planned} {'is' if number == 1 else 'are'} missing: the comparison is not "
        "complete. The command that made it goes on with the same --out."
        for done, planned in [map(as_whole, map(as_mapping(summary.get("cells")).get, ("done", "all")))]
        if done is not None and planned is not None and (number := planned - done) > 0
    ]
    return Page(
        kicker="Federated proxy-tuning · comparison",
        title=as_text(summary.get("title")) or folder.name,
        facts=[count_of(number, what) for what, number in counts.items() if number],
        notes=[
            *missing,
            *(f"The cell {name} failed: {as_text(error)}" for name, error in errors.items()),
            *reader.notes,
        ],
        sections=[
            *sections,
            _gap_closed(as_mappings(summary.get("gap_closed"))),
            _compared_costs(as_mappings(summary.get("costs"))),
            _learning_rates(as_mappings(summary.get("learning_rates"))),
            _cells(cells, as_text(summary.get("command"))),
        ],
    )


def _world(number: int, world: str, rows: Sequence[Mapping[str, Any]]) -> Section:
    slug = re.sub(r"[^a-z0-9]+", "-", world.lower()).strip("-")[:30] or "world"
    plots = [
        plot_points(
            f"plot-{number}-{slug}-{measure.replace('_', '-')}",
            name,
            points,
            unit=unit,
            write=write,
            caption="A dot for each seed; the mark is their mean.",
        )
        for measure, name, unit, scale, write in MEASURES
        if (points := _row_points(rows, measure, scale))
    ]
    names = [[as_text(row.get("row")), as_text(row.get("mode")) or "-"] for row in rows]
    exact = [Estimated.of(row.get("exact_match")) for row in rows]
    losses = [Estimated.of(row.get("loss")) for row in rows]
    seeds = [as_text(row.get("n_seeds")) or "-" for row in rows]
    means = Table(
        caption="Means over the seeds; 95 % intervals over the seeds in brackets, where there are enough of them",
        head=["row", "mode", "seeds", "exact match %", "loss"],
        rows=[
            [*name, of, share.cell(percent), loss.cell(nats)]
            for name, of, share, loss in zip(names, seeds, exact, losses, strict=True)
        ],
        texts=2,
    )
    values = Table(
        caption="The values of every seed",
        head=["row", "mode", "exact match %", "loss"],
        rows=[
            [*name, share.by_seed(percent), loss.by_seed(nats)]
            for name, share, loss in zip(names, exact, losses, strict=True)
        ],
        texts=4,
        folded=True,
    )
    known = {name: ROWS[name] for name, _ in names if name in ROWS}
    blocks: list[Block] = [Plots(plots=plots)] if plots else [absent("Neither exact match nor loss was written.")]
    blocks += [means, values, *([Terms(terms=known)] if known else [])]
    return Section(id=f"world-{number}", title=_world_title(world), blocks=blocks)


def _world_title(world: str) -> str:
    if not world:
        return "Results"
    return world[0].upper() + world[1:] if world.lower().startswith("world") else f"World {world}"


def _row_points(rows: Sequence[Mapping[str, Any]], measure: str, scale: float) -> list[Point]:
    """The rows that have this measure; under headings if there are several modes."""
    modes = list(dict.fromkeys(as_text(row.get("mode")) for row in rows))
    points = []
    for mode, row in itertools.product(modes, rows):
        found = Estimated.of(row.get(measure))
        if as_text(row.get("mode")) != mode or found.mean is None:
            continue
        name = as_text(row.get("row"))
        dots = tuple(scale * value for value in found.values if value is not None)
        group = (f"mode {mode}" if mode else "without a mode") if len(modes) > 1 else ""
        points.append(Point(name, name, scale * found.mean, scaled(found.ci95, scale), dots, group))
    return points


def _gap_closed(rows: Sequence[Mapping[str, Any]]) -> Section:
    title = "Gap closed"
    if not rows:
        return Section(id="gap", title=title, blocks=[absent("Not computed in this comparison.")])
    whys = [
        Prose(text=f"World {as_text(row.get('world'))}, mode {as_text(row.get('mode')) or '-'}: {as_text(row['why'])}.")
        for row in rows
        if row.get("why")
    ]
    return Section(
        id="gap",
        title=title,
        blocks=[
            Table(
                caption="How much of the way from large to large_federated the proxy goes, by exact match on the test "
                "items; 95 % intervals over the seeds in brackets. Of the world all, each value is a world's mean.",
                head=["world", "mode", "gap closed %", "by seed"],
                rows=[
                    [
                        as_text(row.get("world")),
                        as_text(row.get("mode")) or "-",
                        Estimated.of(row).cell(percent),
                        Estimated.of(row).by_seed(percent),
                    ]
                    for row in rows
                ],
                texts=2,
            ),
            *whys,
        ],
    )


def _compared_costs(rows: Sequence[Mapping[str, Any]]) -> Section:
    title = "Costs"
    names = ("world", "mode", "row")
    columns = [
        key
        for key in dict.fromkeys(itertools.chain.from_iterable(rows))
        if key not in names and any(as_number(row.get(key)) is not None for row in rows)
    ]
    if not columns:
        return Section(id="costs", title=title, blocks=[absent("Not written in this comparison.")])
    units = [_unit(column) for column in columns]
    table = Table(
        caption="Costs as the cells wrote them",
        head=[*names, *(head for head, _ in units)],
        rows=[
            [
                *(as_text(row.get(name)) or "-" for name in names),
                *(
                    "-" if (value := as_number(row.get(key))) is None else short(in_unit(unit, value))
                    for key, (_, unit) in zip(columns, units, strict=True)
                ),
            ]
            for row in rows
        ],
        texts=3,
        folded=len(rows) > LONG_TABLE,
    )
    return Section(id="costs", title=title, blocks=[table])


def _unit(key: str) -> tuple[str, float]:
    """The heading of a cost, and the unit to divide it by, from its name."""
    words = key.replace("_", " ").replace("-", " ")
    if "bytes" in key:
        return re.sub(r"\bbytes\b", "MB", words), MEGA
    if "flops" in key:
        return re.sub(r"\bflops\b", "GFLOP", words), GIGA
    return words, 1.0


def _learning_rates(rows: Sequence[Mapping[str, Any]]) -> Section:
    title = "Learning rates tried"
    if not rows:
        return Section(id="learning-rates", title=title, blocks=[absent("None: every row used the one of the config.")])
    lines: list[list[str | Cell]] = []
    for row in rows:
        rate = as_number(row.get("learning_rate"))
        written = "-" if rate is None else f"{rate:g}"
        lines.append(
            [
                as_text(row.get("world")),
                as_text(row.get("row")),
                Cell(written, "chosen") if row.get("chosen") is True else written,
                estimate(as_number(row.get("exact_match")), None, percent),
                estimate(as_number(row.get("loss")), None, nats),
            ]
        )
    table = Table(
        caption="What each learning rate gave on the validation items; the one that was chosen is marked",
        head=["world", "row", "learning rate", "exact match %", "loss"],
        rows=lines,
        texts=2,
        folded=len(lines) > LONG_TABLE,
    )
    return Section(id="learning-rates", title=title, blocks=[table])


def _cells(cells: Sequence[Mapping[str, Any]], command: str) -> Section:
    blocks: list[Block] = []
    if command:
        blocks += [Prose(text="Made by"), Code(text=command)]
    found = [cell for cell in cells if cell]
    if found:
        names = ("name", "kind", "world", "mode", "seed")
        table = Table(
            caption=f"The {count_of(len(found), 'cell')} of the comparison",
            head=[*names, "rows", "seconds"],
            rows=[
                [
                    *(as_text(cell.get(name)) or "-" for name in names),
                    ", ".join(_cell_rows(cell.get("rows"))) or "-",
                    "-" if (seconds := as_number(cell.get("seconds"))) is None else short(seconds),
                ]
                for cell in found
            ],
            texts=6,
            folded=len(found) > LONG_TABLE,
        )
        blocks.append(table)
    else:
        blocks.append(absent("No cells: the folder cells is empty."))
    return Section(id="cells", title="Cells", blocks=blocks)


def _cell_rows(rows: Any) -> Iterator[str]:
    """The rows of a cell with their exact match."""
    for name, row in as_mapping(rows).items():
        value = as_number(as_mapping(row).get("exact_match"))
        yield name if value is None else f"{name} {percent(value)}"
