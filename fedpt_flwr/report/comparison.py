"""The sections of a comparison: rows of several worlds, modes and seeds, and what they cost."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpt_flwr.errors import RunError
from fedpt_flwr.report.attack import attack_inside
from fedpt_flwr.report.page import (
    LONG_TABLE,
    Answer,
    Block,
    Cell,
    Code,
    Example,
    Examples,
    Page,
    Plots,
    Prose,
    Section,
    Table,
    Terms,
    absent,
    estimate,
    listed,
)
from fedpt_flwr.report.plots import (
    MEASURES,
    MOST_GROUPS,
    Curve,
    Plot,
    Point,
    Spot,
    plot_curves,
    plot_points,
    plot_spots,
    scaled,
)
from fedpt_flwr.report.reading import (
    Reader,
    as_interval,
    as_mapping,
    as_mappings,
    as_number,
    as_numbers,
    as_text,
    as_whole,
)
from fedpt_flwr.report.run import ROWS as ROWS_OF_A_RUN
from fedpt_flwr.report.run import Run, shards_section
from fedpt_flwr.report.wording import GIGA, MEGA, count_of, in_unit, nats, percent, short
from fedpt_flwr.runs import read_json
from fedpt_flwr.uncertainty import T_INTERVALS

SUMMARY = "summary.json"
_MOST_EXAMPLES = 8

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

    def by_seed(self, write: Callable[[float], str]) -> str | Cell:
        """The seeds' values."""
        return listed(self.values, write)


def comparison_page(folder: Path) -> Page:
    """The page of a comparison.

    Raises:
        RunError: ``summary.json`` cannot be read, or holds no tables.
    """
    summary = read_json(folder / SUMMARY)
    if not isinstance(summary, dict) or "rows" not in summary:
        raise RunError(
            "must hold a comparison's tables", place=str(folder / SUMMARY), remedy="make the comparison again"
        )
    reader = Reader(folder)
    files = sorted((folder / "cells").glob("*.json"))
    counted = summary.get("counted")
    if isinstance(counted, list):  # others are of learning rates that were not chosen, or of other code
        files = [path for path in files if path.stem in counted]
    cells = [reader.mapping(f"cells/{path.name}") for path in files]
    ended = as_mapping(summary.get("cells"))
    rows = as_mappings(summary.get("rows"))
    worlds = list(dict.fromkeys(as_text(row.get("world")) for row in rows))
    meanings = ROWS | {name: as_text(meaning) for name, meaning in as_mapping(summary.get("meanings")).items()}
    sections = [
        _world(number, world, [row for row in rows if as_text(row.get("world")) == world], meanings)
        for number, world in enumerate(worlds, 1)
    ]
    if not sections:
        sections = [Section(id="results", title="Results", blocks=[absent("The comparison has no rows yet.")])]
    seeds = max((as_whole(row.get("n_seeds")) or 0 for row in rows), default=0)
    counts = {
        "world": len(worlds),
        "seed": seeds,
        "device": as_whole(summary.get("devices")),
        "cell": as_whole(ended.get("done")) or len(cells),
    }
    errors = as_mapping(summary.get("errors"))
    missing = [
        f"{count_of(number, 'cell')} of {planned} {'is' if number == 1 else 'are'} missing: the comparison is not "
        "complete. The command that made it goes on with the same --out."
        for done, planned in [map(as_whole, map(ended.get, ("done", "all")))]
        if done is not None and planned is not None and (number := planned - done) > 0
    ]
    return Page(
        kicker="Federated proxy-tuning · comparison",
        title=as_text(summary.get("title")) or folder.name,
        facts=[count_of(number, what) for what, number in counts.items() if number],
        notes=[
            *missing,
            *(f"The cell {name} failed: {as_text(error)}" for name, error in errors.items()),
            *(note for note in summary.get("notes") or [] if isinstance(note, str)),
            *reader.notes,
        ],
        sections=[
            *sections,
            _differences(as_mappings(summary.get("differences"))),
            _gap_closed(as_mappings(summary.get("gap_closed"))),
            _compared_costs(summary, worlds),
            _courses(as_mappings(summary.get("curves")), worlds),
            _views(summary),
            _ablations(as_mappings(summary.get("ablations"))),
            _calibration(as_mappings(summary.get("calibration")), worlds),
            _heterogeneity(cells),
            _examples(cells),
            _learning_rates(as_mappings(summary.get("learning_rates"))),
            _config(as_mapping(reader.mapping("grid.json").get("worlds"))),
            _cells(cells, as_text(summary.get("command"))),
            *attack_inside(folder, reader),
        ],
    )


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:30] or "x"


def _named(row: Mapping[str, Any]) -> str:
    """A row with its mode, if it has one."""
    mode = as_text(row.get("mode"))
    return as_text(row.get("row")) + (f" ({mode})" if mode else "")


def _world(number: int, world: str, rows: Sequence[Mapping[str, Any]], meanings: Mapping[str, str]) -> Section:
    slug = _slug(world) if _slug(world) != "x" else "world"
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
    rouges = [Estimated.of(row.get("rouge_l")) for row in rows]
    has_rouge = any(rouge.mean is not None for rouge in rouges)
    losses = [Estimated.of(row.get("loss")) for row in rows]
    seeds = [as_text(row.get("n_seeds")) or "-" for row in rows]
    invalid = [as_number(as_mapping(row.get("invalid_rate")).get("mean")) for row in rows]
    has_invalid = any(share is not None for share in invalid)
    means = Table(
        name="scores",
        world=world,
        caption="Means over the seeds; 95 % intervals over the seeds in brackets, where there are enough of them"
        + (". Answers from which nothing could be extracted are invalid, and wrong." if has_invalid else ""),
        head=[
            *("row", "mode", "seeds", "exact match %"),
            *(["ROUGE-L %"] if has_rouge else []),
            *("loss", *(["invalid %"] if has_invalid else [])),
        ],
        rows=[
            [
                *name,
                of,
                share.cell(percent),
                *([rouge.cell(percent)] if has_rouge else []),
                loss.cell(nats),
                *([estimate(wrong, None, percent)] if has_invalid else []),
            ]
            for name, of, share, rouge, loss, wrong in zip(names, seeds, exact, rouges, losses, invalid, strict=True)
        ],
        texts=2,
    )
    values = Table(
        name="scores-by-seed",
        world=world,
        caption="The values of every seed",
        head=["row", "mode", "exact match %", "loss"],
        rows=[
            [*name, share.by_seed(percent), loss.by_seed(nats)]
            for name, share, loss in zip(names, exact, losses, strict=True)
        ],
        texts=4,
        folded=True,
    )
    known = {name: meanings[name] for name, _ in names if name in meanings}
    blocks: list[Block] = [Plots(plots=plots)] if plots else [absent("Neither exact match nor loss was written.")]
    blocks += [means, *_said_of([*exact, *rouges]), values, *([Terms(terms=known)] if known else [])]
    return Section(id=f"world-{number}", title=_world_title(world), blocks=blocks)


def _said_of(shares: Sequence[Estimated]) -> list[Prose]:
    """What to say below a table of shares with intervals over the seeds."""
    return [Prose(text=T_INTERVALS)] if any(share.ci95 for share in shares) else []


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
                name="gap-closed",
                caption="How much of the way from large to the large model tuned by the devices a row goes, on the "
                "test items; 95 % intervals over the seeds in brackets. Of the world all, each value is a world's "
                "mean.",
                head=["world", "mode", "row", "to", "by", "gap closed %", "over the items %", "by seed %"],
                rows=[
                    [
                        as_text(row.get("world")),
                        as_text(row.get("mode")) or "-",
                        as_text(row.get("row")) or "proxy",
                        as_text(row.get("reference")) or "large_federated",
                        _measure(row),
                        Estimated.of(row).cell(percent),
                        _ends(as_interval(row.get("ci95_items")), percent),
                        Estimated.of(row).by_seed(percent),
                    ]
                    for row in rows
                ],
                texts=5,
            ),
            *whys,
        ],
    )


_MEASURES = {"exact_match": "exact match", "rouge_l": "ROUGE-L", "loss": "loss"}


def _measure(row: Mapping[str, Any]) -> str:
    """What a line is about, as people write it."""
    name = as_text(row.get("measure")) or "exact_match"
    return _MEASURES.get(name, name)


def _ends(interval: tuple[float, float] | None, write: Callable[[float], str]) -> str | Cell:
    cell = estimate(None if interval is None else interval[0], interval, write)
    return cell if isinstance(cell, str) else Cell(cell.extra, raw={end: cell.raw[end] for end in ("_low", "_high")})


def _differences(rows: Sequence[Mapping[str, Any]]) -> Section:
    title = "The proxy against others, item by item"
    if not rows:
        return Section(id="differences", title=title, blocks=[absent("Not computed in this comparison.")])
    lines = []
    for row in rows:
        write = nats if row.get("measure") == "loss" else percent
        value = as_number(row.get("value"))
        lines.append(
            [
                as_text(row.get("world")),
                as_text(row.get("mode")) or "-",
                as_text(row.get("against")),
                _measure(row),
                estimate(value, as_interval(row.get("ci95")), write),
                Estimated.of(row.get("by_seed")).cell(write),
                estimate(as_number(row.get("p_holm")), None, "{:.2g}".format),
            ]
        )
    table = Table(
        name="differences",
        caption="Proxy minus the other, shares in points and loss in nats per answer token. First by the paired "
        "bootstrap over the test items, what all seeds made of an item drawn together; then the mean over the seeds "
        "with its interval over the seeds. The p value is raised by Holm's procedure for all lines with this measure.",
        head=["world", "mode", "against", "measure", "difference, items", "difference, seeds", "p"],
        rows=lines,
        texts=4,
    )
    return Section(id="differences", title=title, blocks=[table])


COSTS: Mapping[str, tuple[str, float]] = {
    "trained_parameters": ("trained", 1.0),
    "bytes_up_per_device_and_round": ("MB up", MEGA),
    "bytes_down_per_device_and_round": ("MB down", MEGA),
    "device_seconds_per_round": ("seconds", 1.0),
    "device_flops_per_round": ("GFLOP", GIGA),
    "device_state_bytes": ("MB of state", MEGA),
    "device_memory_growth_bytes": ("MB grown", MEGA),
    "device_process_bytes": ("MB of the process", MEGA),
    "server_large_tokens_needed": ("large tokens", 1.0),
    "server_large_flops": ("server GFLOP", GIGA),
    "tokens_per_second": ("tokens/s", 1.0),
    "cell_seconds": ("cell seconds", 1.0),
    "cell_processor_seconds": ("processor seconds", 1.0),
}
"""Costs that are shown: heading, as `fedpt compare` and the docs have it, and unit."""

_PLOTTED_COSTS: tuple[tuple[str, str, tuple[str, ...], float], ...] = (
    ("bytes", "MB up and down per round", ("bytes_up_per_device_and_round", "bytes_down_per_device_and_round"), MEGA),
    ("memory", "MB of weights, gradients, optimizer", ("device_state_bytes",), MEGA),
    ("flops", "GFLOP per round", ("device_flops_per_round",), GIGA),
)
"""Costs that quality is plotted against: name, axis, what is added up, and its unit."""


def _cost_plots(summary: Mapping[str, Any], number: int, world: str) -> Iterator[Plot]:
    """Exact match of everything that is tuned against what it costs a device."""
    costs = {
        (as_text(row.get("kind")), as_text(row.get("mode"))): row
        for row in as_mappings(summary.get("costs"))
        if as_text(row.get("world")) == world
    }
    for name, label, keys, unit in _PLOTTED_COSTS:
        spots = list[Spot]()
        for row in as_mappings(summary.get("rows")):
            spent = costs.get((as_text(row.get("kind")), as_text(row.get("mode"))), {})
            values = [value for key in keys if (value := as_number(spent.get(key)))]
            quality = Estimated.of(row.get("exact_match")).mean
            is_part = as_text(row.get("row")).endswith("_covered")
            if as_text(row.get("world")) == world and len(values) == len(keys) and quality is not None and not is_part:
                colour = f"series-{len(spots) % (2 * MOST_GROUPS)}"
                spots.append(Spot(_named(row), colour, sum(values) / unit, 100 * quality))
        if spots:
            title = f"Exact match against {name}, {world}"
            yield plot_spots(
                f"plot-{number}-{_slug(world)}-by-{name}",
                title,
                spots,
                unit="% of the test items",
                x_label=f"{label}, each device",
            )


def _compared_costs(summary: Mapping[str, Any], worlds: Sequence[str]) -> Section:
    title = "Costs"
    # Each row's own speed: a cell has that of all its rows.
    rows = [
        row | {"tokens_per_second": row.get(f"tokens_per_second_{as_text(row.get('row'))}")}
        for row in as_mappings(summary.get("costs"))
    ]
    names = ("world", "mode", "row")
    columns = {key: part for key, part in COSTS.items() if any(as_number(row.get(key)) is not None for row in rows)}
    if not columns:
        return Section(id="costs", title=title, blocks=[absent("Not written in this comparison.")])
    table = Table(
        name="costs",
        caption=f"Costs of a device in a round, of the server, and of whole cells; {SUMMARY} has the rest",
        head=[*names, *(head for head, _ in columns.values())],
        rows=[
            [
                *(as_text(row.get(name)) or "-" for name in names),
                *(_amount(row, key, unit) for key, (_, unit) in columns.items()),
            ]
            for row in rows
        ],
        texts=3,
        folded=len(rows) > LONG_TABLE,
    )
    blocks: list[Block] = [table]
    plots = [plot for number, world in enumerate(worlds, 1) for plot in _cost_plots(summary, number, world)]
    if plots:
        blocks.append(Plots(plots=plots))
    shares = as_mappings(summary.get("cost_ratios"))
    keys = [key for key in COSTS if any(as_number(row.get(key)) is not None for row in shares)]
    if keys:
        lines = [
            [
                *(as_text(row.get(name)) or "-" for name in ("world", "mode", "against")),
                *(estimate(as_number(row.get(key)), None, percent) for key in keys),
            ]
            for row in shares
        ]
        head = ["world", "mode", "against", *(f"{COSTS[key][0]} %" for key in keys)]
        caption = "What the proxy costs a device, in per cent of the large model tuned by the devices"
        blocks.append(Table(name="cost-ratios", caption=caption, head=head, rows=lines, texts=3))
    return Section(id="costs", title=title, blocks=blocks)


def _amount(row: Mapping[str, Any], key: str, unit: float) -> str | Cell:
    value = as_number(row.get(key))
    return estimate(None if value is None else in_unit(unit, value), None, short)


def _courses(rows: Sequence[Mapping[str, Any]], worlds: Sequence[str]) -> Section:
    title, plots = "Round by round", []
    for number, world in enumerate(worlds, 1):
        curves = list[Curve]()
        for row in rows:
            points = [
                (at, 100 * value)
                for point in as_mappings(row.get("points"))
                if (at := as_number(point.get("round"))) and (value := as_number(point.get("exact_match"))) is not None
            ]
            if as_text(row.get("world")) == world and points:
                x, y = zip(*points, strict=True)
                curves.append(Curve(_named(row), f"series-{len(curves) % (2 * MOST_GROUPS)}", x, y))
        if curves:
            name, title_of = f"plot-{number}-{_slug(world)}-rounds", f"Exact match by round, {world}"
            caption = "Means over the seeds, on the validation items that score rounds."
            plots.append(
                plot_curves(name, title_of, curves, unit="% of the items", write=short, share=True, caption=caption)
            )
    sentence = "No scores of rounds were written in this comparison."
    return Section(id="rounds", title=title, blocks=[Plots(plots=plots)] if plots else [absent(sentence)])


def _views(summary: Mapping[str, Any]) -> Section:
    blocks: list[Block] = []
    budgets = as_mappings(summary.get("quality_under_budget"))
    for place in dict.fromkeys((as_text(row.get("world")), as_text(row.get("cost"))) for row in budgets):
        world, cost = place
        same = [row for row in budgets if (as_text(row.get("world")), as_text(row.get("cost"))) == place]
        unit, name = (MEGA, "MB") if cost == "bytes" else (GIGA, "GFLOP")
        budgets_here = as_numbers(same[0].get("budgets"))
        reached = {
            _named(row): list(map(as_number, values))
            for row in same
            if isinstance(values := row.get("exact_match"), list) and len(values) == len(budgets_here)
        }
        blocks.append(
            Table(
                name=f"quality-by-{name.lower()}",
                world=world,
                caption=f"Quality under a budget, {world}: the best exact match on validation items that each row has "
                f"reached when each device has spent so many {name}",
                head=[name, *(f"{row} %" for row in reached)],
                rows=[
                    [
                        estimate(budget / unit, None, short),
                        *(estimate(part[place], None, percent) for part in reached.values()),
                    ]
                    for place, budget in enumerate(budgets_here)
                ],
                texts=0,
                folded=len(budgets_here) > LONG_TABLE,
            )
        )
    targets = [row for row in as_mappings(summary.get("cost_to_target")) if as_number(row.get("share")) is not None]
    if targets:
        whys = [(as_text(row.get("world")), as_text(row["why"])) for row in targets if row.get("why")]
        blocks.append(_targets(targets))
        blocks += [Prose(text=f"Cost to reach a target, world {world}: {why}.") for world, why in dict.fromkeys(whys)]
    spread = as_mappings(summary.get("robustness"))
    if spread:
        keys = ("worst_seed", "best_seed", "worst_device", "best_device")
        rows = [
            [
                as_text(row.get("world")),
                _named(row),
                *(estimate(as_number(row.get(key)), None, percent) for key in keys),
            ]
            for row in spread
        ]
        caption = (
            "Robustness: the worst and the best seed and, of those tuned alone, device; exact match % on test items"
        )
        heads = ["world", "row", *(f"{key.replace('_', ' ')} %" for key in keys)]
        blocks.append(
            Table(name="robustness", caption=caption, head=heads, rows=rows, texts=2, folded=len(rows) > LONG_TABLE)
        )
    sentence = "Not computed in this comparison."
    return Section(id="views", title="Quality beside cost", blocks=blocks or [absent(sentence)])


def _targets(rows: Sequence[Mapping[str, Any]]) -> Table:
    return Table(
        name="cost-to-target",
        caption="Cost to reach a target: what each device has spent when a row first closes so much of the gap from "
        "large to large_federated, on the validation items that score rounds; - where not every seed gets there",
        head=["world", "row", "gap closed %", "seeds", "seeds there", "rounds", "MB", "GFLOP", "seconds"],
        rows=[
            [
                as_text(row.get("world")),
                _named(row),
                f"{100 * (as_number(row.get('share')) or 0):.0f}",
                as_text(row.get("seeds")),
                as_text(row.get("seeds_reached")),
                *(
                    _amount(row, key, unit)
                    for key, unit in (("round", 1.0), ("bytes", MEGA), ("flops", GIGA), ("seconds", 1.0))
                ),
            ]
            for row in rows
        ],
        texts=2,
        folded=len(rows) > LONG_TABLE,
    )


def _ablations(rows: Sequence[Mapping[str, Any]]) -> Section:
    title = "Ablations"
    lines, shares = [], list[Estimated]()
    has_epsilon = any(as_number(part.get("epsilon")) is not None for part in rows)  # some cells are private
    for part in rows:
        fixed = ", ".join(f"{key} = {as_text(value)}" for key, value in as_mapping(part.get("with")).items())
        value = as_text(part.get("value"))
        shown = Cell(value, "(as it is)", {"": value, "_as_it_is": "yes"}) if part.get("is_base") is True else value
        for row in as_mappings(part.get("rows")):
            place = [as_text(part.get("world")), as_text(part.get("key")), shown, fixed or "-", as_text(row.get("row"))]
            exact, loss = Estimated.of(row.get("exact_match")), Estimated.of(row.get("loss"))
            spent = [estimate(as_number(part.get("epsilon")), None, nats)] if has_epsilon else []
            shares.append(exact)
            lines.append([*place, as_text(row.get("n_seeds")), *spent, exact.cell(percent), loss.cell(nats)])
    if not lines:
        return Section(id="ablations", title=title, blocks=[absent("None: no key was varied (--ablate).")])
    table = Table(
        name="ablations",
        caption="One key varied, all else as it is; test items, 95 % intervals over the seeds",
        head=[
            *("world", "varied", "value", "with", "row", "seeds"),
            *(["epsilon"] if has_epsilon else []),
            *("exact match %", "loss"),
        ],
        rows=lines,
        texts=5,
    )
    return Section(id="ablations", title=title, blocks=[table, *_said_of(shares)])


def _calibration(rows: Sequence[Mapping[str, Any]], worlds: Sequence[str]) -> Section:
    title, plots = "Calibration", []
    if not rows:
        return Section(id="calibration", title=title, blocks=[absent("Not measured in this comparison.")])
    for number, world in enumerate(worlds, 1):
        curves = list[Curve]()
        for row in (row for row in rows if as_text(row.get("world")) == world):
            bins = row.get("bins") if isinstance(row.get("bins"), list) else []
            full = [part for part in map(as_numbers, bins or []) if len(part) == 3 and part[0] > 0]
            if full:
                x, y = zip(*((100 * total / count, 100 * right / count) for count, total, right in full), strict=True)
                curves.append(Curve(_named(row), f"series-{len(curves) % (2 * MOST_GROUPS)}", x, y))
        if curves:
            plots.append(
                plot_curves(
                    f"plot-{number}-{_slug(world)}-calibration",
                    f"Right answers by probability, {world}",
                    curves,
                    unit="% right",
                    x_label="probability of the answer, %",
                    write=short,
                    share=True,
                    caption="Where a model is well calibrated, both are equal.",
                )
            )
    errors = [Estimated.of(row.get("ece")) for row in rows]
    table = Table(
        name="calibration",
        caption="Expected calibration error in points, on the validation items: how far the probability that a model "
        "gives to the answer it writes (or to its choice, among all choices) is from the share of those answers that "
        "are right, in ten bins",
        head=["world", "row", "calibration error %"],
        rows=[
            [as_text(row.get("world")), _named(row), error.cell(percent)]
            for row, error in zip(rows, errors, strict=True)
        ],
        texts=2,
    )
    blocks: list[Block] = [*([Plots(plots=plots)] if plots else []), table, *_said_of(errors)]
    return Section(id="calibration", title=title, blocks=blocks)


def _plain_cells(cells: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The cells of no ablation, with the first seed that each kind has."""
    first: dict[tuple[str, ...], Mapping[str, Any]] = {}
    for cell in cells:
        place = tuple(as_text(cell.get(key)) for key in ("world", "kind", "mode"))
        if not as_mapping(cell.get("changes")) and (
            place not in first or (as_number(cell.get("seed")) or 0) < (as_number(first[place].get("seed")) or 0)
        ):
            first[place] = cell
    return list(first.values())


def _heterogeneity(cells: Sequence[Mapping[str, Any]]) -> Section:
    for cell in _plain_cells(cells):
        if cell.get("kind") == "fedpt" and as_mappings(cell.get("shards")):
            return shards_section(Run(name="", shards=as_mappings(cell.get("shards"))))
    sentence = "Not known: no federation has written how its examples are spread over the devices."
    return Section(id="shards", title="Who holds what", blocks=[absent(sentence)])


def _examples(cells: Sequence[Mapping[str, Any]]) -> Section:
    """What every row made of some items."""
    found: dict[tuple[str, str], dict[str, Answer]] = {}
    for cell in _plain_cells(cells):
        mode = as_text(cell.get("mode"))
        for record in as_mappings(cell.get("examples")):
            answers = found.setdefault((as_text(record.get("prompt")), as_text(record.get("reference"))), {})
            for name, seen in as_mapping(record.get("answers")).items():
                label = name + (f" ({mode})" if mode else "")
                right = as_whole(as_mapping(seen).get("exact_match"))
                text = as_text(as_mapping(seen).get("answer"))
                answers.setdefault(label, Answer(model=label, text=text, right=None if right is None else bool(right)))
    if not found:
        sentence = "None: no cell has written any."
        return Section(id="examples", title="Example answers", blocks=[absent(sentence)])
    items = [
        Example(prompt=prompt, reference=reference, answers=list(answers.values()))
        for (prompt, reference), answers in list(found.items())[:_MOST_EXAMPLES]
    ]
    return Section(id="examples", title="Example answers", blocks=[Examples(examples=items)])


def _config(worlds: Mapping[str, Any]) -> Section:
    tables = [
        Table(
            name="config",
            world=name,
            caption=f"World {name}: the whole run config, but for what a kind of cell sets itself",
            head=["key", "value"],
            rows=[[key, as_text(value)] for key, value in as_mapping(flat).items()],
            texts=2,
            folded=True,
        )
        for name, flat in worlds.items()
        if as_mapping(flat)
    ]
    sentence = "Not known: grid.json does not hold it."
    return Section(id="config", title="Config", blocks=tables or [absent(sentence)])


def _learning_rates(rows: Sequence[Mapping[str, Any]]) -> Section:
    title = "Learning rates tried"
    if not rows:
        return Section(id="learning-rates", title=title, blocks=[absent("None: every row used the one of the config.")])
    table = Table(
        name="learning-rates",
        caption="What each learning rate gave on the validation items; the one that was chosen is marked",
        head=["world", "row", "chosen", "learning rate", "exact match %", "loss"],
        rows=[
            [
                as_text(row.get("world")),
                as_text(row.get("row")),
                "yes" if row.get("chosen") is True else "-",
                estimate(as_number(row.get("learning_rate")), None, "{:g}".format),
                estimate(as_number(row.get("exact_match")), None, percent),
                estimate(as_number(row.get("loss")), None, nats),
            ]
            for row in rows
        ],
        texts=3,
        folded=len(rows) > LONG_TABLE,
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
            name="cells",
            caption=f"The {count_of(len(found), 'cell')} that count; learning rates that were not chosen have others",
            head=[*names, "rows", "seconds"],
            rows=[
                [
                    *(as_text(cell.get(name)) or "-" for name in names),
                    ", ".join(_cell_rows(cell.get("rows"))) or "-",
                    _amount(cell, "seconds", 1.0),
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
