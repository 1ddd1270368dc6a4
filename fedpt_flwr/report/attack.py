"""What an attacker learns: the page of an attack, and the same sections for a run or a comparison that it lies in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
    Section,
    Table,
    Terms,
    absent,
    estimate,
    listed,
)
from fedpt_flwr.report.plots import Plot, Point, plot_points
from fedpt_flwr.report.reading import Reader, as_interval, as_mapping, as_mappings, as_number, as_text, as_whole
from fedpt_flwr.report.wording import count_of, percent
from fedpt_flwr.runs import read_json

ATTACK = "attack.json"
_INSIDE = "attack"  # folder of an attack within that of a run or of a comparison
_COLOURS = {"tuned": "tuned", "untuned": "untuned", "proxy": "proxy", "proxy_without_mask": "proxy"}
_OTHERS = "large"


def attack_page(folder: Path) -> Page:
    """The page of an attack.

    Raises:
        RunError: ``attack.json`` cannot be read.
    """
    found = read_json(folder / ATTACK)
    if not isinstance(found, dict):
        raise RunError("must hold an object", place=str(folder / ATTACK), remedy="make the attack again")
    cells, pool = as_mapping(found.get("cells")), as_mapping(found.get("pool"))
    done, planned = as_whole(cells.get("done")), as_whole(cells.get("all"))
    seeds = found.get("seeds")
    counts = {
        "device": as_whole(found.get("devices")),
        "seed": len(seeds) if isinstance(seeds, list) else None,
        "shadow federation": as_whole(found.get("shadows")),
        "record": as_whole(pool.get("records")),
    }
    missing = []
    if done is not None and planned is not None and done < planned:
        missing.append(
            f"{count_of(planned - done, 'federation')} of {planned} missing: the command that made this goes on with "
            "the same --out."
        )
    return Page(
        kicker="Federated proxy-tuning · attack",
        title=as_text(found.get("title")) or folder.name,
        facts=[count_of(number, what) for what, number in counts.items() if number],
        notes=[
            *missing,
            *(f"{name} failed: {as_text(error)}" for name, error in as_mapping(found.get("errors")).items()),
        ],
        sections=attack_sections(found),
    )


def attack_inside(folder: Path, reader: Reader) -> list[Section]:
    """The sections of the attack that lies in the folder ``attack`` of a run or a comparison; none if there is none."""
    name = f"{_INSIDE}/{ATTACK}"
    return attack_sections(reader.mapping(name)) if (folder / name).is_file() else []


def attack_sections(found: Mapping[str, Any]) -> list[Section]:
    """Membership, exposure, and what was attacked, of what ``attack.json`` holds."""
    found, common = _shortened(found)
    return [_membership(found), _exposure(found), _about(found, common)]


def _shortened(found: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The same, its settings without what all that change something change alike; and what that is."""
    tables = {name: _rows(found, name) for name in ("membership", "exposure", "utility")}
    changes = {
        as_text(row.get("setting")): [f"{key}={value}" for key, value in as_mapping(row.get("changes")).items()]
        for rows in tables.values()
        for row in rows
        if as_mapping(row.get("changes"))
    }
    if len(changes) < 2:
        return dict(found), ""
    common = set.intersection(*map(set, changes.values()))
    short = {
        setting: " ".join(part for part in parts if part not in common) or setting for setting, parts in changes.items()
    }

    def shorten(row: Mapping[str, Any]) -> dict[str, Any]:
        setting = as_text(row.get("setting"))
        return {**row, "setting": short.get(setting, setting)}

    shortened = {name: [shorten(row) for row in rows] for name, rows in tables.items()}
    return {**found, **shortened}, " ".join(part for part in next(iter(changes.values())) if part in common)


def _epsilon(row: Mapping[str, Any]) -> Cell:
    value = as_number(row.get("epsilon"))
    return Cell("infinite", raw={"": "inf"}) if value is None else Cell(f"{value:.3g}", raw={"": value})


def _place(row: Mapping[str, Any]) -> str:
    """What a setting promises, and the setting."""
    return f"epsilon {_epsilon(row).text}, {as_text(row.get('setting'))}"


def _measured(value: Any, write: Callable[[float], str]) -> str | Cell:
    part = as_mapping(value)
    return estimate(as_number(part.get("value")), as_interval(part.get("ci95")), write)


def _rows(found: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    return as_mappings(found.get(name))


# --- membership ------------------------------------------------------------------------------------------------------


def _membership(found: Mapping[str, Any]) -> Section:
    title, rows = "Membership inference", _rows(found, "membership")
    if not rows:
        return Section(id="membership", title=title, blocks=[absent("No federation was attacked yet.")])
    table = Table(
        name="membership",
        caption="How well an attacker tells records that devices trained on from others of the same kind. Guessing "
        "gives an AUC of 0.5 and a true positive rate as large as the false positive rate: 1 % and 0.1 % here. "
        "In brackets 95 % intervals over records; a dash: there are too few records for that rate. The last column is "
        "the largest true positive rate at 1 % that the run's noise allows any attack on a record.",
        head=["setting", "epsilon", "target", "attack", "AUC", "% at 1 %", "% at 0.1 %", "allowed at 1 %"],
        rows=[
            [
                as_text(row.get("setting")),
                _epsilon(row),
                as_text(row.get("target")),
                as_text(row.get("attack")).replace("_", " "),
                _measured(row.get("auc"), "{:.3f}".format),
                *(_measured(row.get(f"tpr_at_{rate}_percent"), percent) for rate in ("1", "0.1")),
                estimate(1.0 if (most := as_number(row.get("allowed_at_1_percent"))) is None else most, None, percent),
            ]
            for row in rows
        ],
        texts=4,
    )
    by_seed = Table(
        name="membership-by-seed",
        caption="The same seed by seed: AUC",
        head=["setting", "target", "attack", "AUC of each seed"],
        rows=[
            [
                as_text(row.get("setting")),
                as_text(row.get("target")),
                as_text(row.get("attack")).replace("_", " "),
                listed(_seeds(row), "{:.3f}".format),
            ]
            for row in rows
        ],
        texts=4,
        folded=len(rows) > LONG_TABLE,
    )
    blocks: list[Block] = [*_plot("plot-membership", "The strongest attack on each target", _auc_points(rows), "AUC")]
    return Section(id="membership", title=title, blocks=[*blocks, table, by_seed])


def _seeds(row: Mapping[str, Any]) -> list[float]:
    return _numbers(as_mapping(as_mapping(row.get("auc")).get("by_seed")).get("values"))


def _numbers(values: Any) -> list[float]:
    return [
        number for value in (values if isinstance(values, list) else []) if (number := as_number(value)) is not None
    ]


def _auc_points(rows: Sequence[Mapping[str, Any]]) -> list[Point]:
    """For each setting and target the attack with the largest AUC."""
    best: dict[tuple[str, str], Point] = {}
    for row in rows:
        place, target, measured = _place(row), as_text(row.get("target")), as_mapping(row.get("auc"))
        value = as_number(measured.get("value"))
        if value is not None and ((place, target) not in best or value > best[place, target].value):
            colour, interval = _COLOURS.get(target, _OTHERS), as_interval(measured.get("ci95"))
            best[place, target] = Point(target, colour, value, interval, tuple(_seeds(row)), place)
    return list(best.values())


def _plot(name: str, title: str, points: Sequence[Point], unit: str, write: str = "{:.3f}") -> list[Plots]:
    if not points:
        return []
    plot: Plot = plot_points(name, title, points, unit=unit, write=write.format)
    return [Plots(plots=[plot])]


# --- exposure --------------------------------------------------------------------------------------------------------


def _exposure(found: Mapping[str, Any]) -> Section:
    title, rows = "Canary exposure", _rows(found, "exposure")
    if not rows:
        return Section(
            id="exposure", title=title, blocks=[absent("No secrets were hidden, or none was looked for yet.")]
        )
    table = Table(
        name="exposure",
        caption="How many bits of a secret the target gives away, by how often it stood in one device's data; 1.44 "
        "bits are what guessing gives. In brackets 95 % intervals over canaries. Found at once: the share of secrets "
        "that are the likeliest of all candidates.",
        head=["setting", "epsilon", "target", "copies", "bits", "of", "found at once %", "canaries"],
        rows=[
            [
                as_text(row.get("setting")),
                _epsilon(row),
                as_text(row.get("target")),
                as_text(row.get("copies")),
                _measured(row, "{:.2f}".format),
                estimate(as_number(row.get("most")), None, "{:.2f}".format),
                estimate(as_number(row.get("first")), None, percent),
                as_text(row.get("canaries")),
            ]
            for row in rows
        ],
        texts=3,
    )
    most = max((as_whole(row.get("copies")) or 0 for row in rows), default=0)
    points = [
        Point(
            as_text(row.get("target")),
            _COLOURS.get(as_text(row.get("target")), _OTHERS),
            value,
            as_interval(row.get("ci95")),
            (),
            f"{_place(row)}, {count_of(most, 'copy') if most == 1 else f'{most} copies'}",
        )
        for row in rows
        if row.get("copies") == most and (value := as_number(row.get("value"))) is not None
    ]
    return Section(
        id="exposure", title=title, blocks=[*_plot("plot-exposure", "Secrets given away", points, "bits"), table]
    )


# --- what was attacked -----------------------------------------------------------------------------------------------


def _about(found: Mapping[str, Any], common: str) -> Section:
    pool, canaries = as_mapping(found.get("pool")), as_mapping(found.get("canaries"))
    utility = _rows(found, "utility")
    worth = Table(
        name="utility",
        caption="What the attacked models are worth: test questions right and loss, means over the seeds; in brackets "
        "the lowest and the highest",
        head=["setting", "epsilon", "tuned right %", "proxy right %", "tuned loss", "proxy loss"],
        rows=[
            [
                as_text(row.get("setting")),
                _epsilon(row),
                *(_spread(row, f"{name}_exact_match", percent) for name in ("tuned", "proxy")),
                *(_spread(row, f"{name}_loss", "{:.4g}".format) for name in ("tuned", "proxy")),
            ]
            for row in utility
        ],
        texts=2,
    )
    points = [
        Point(name, _COLOURS[name], 100 * value, None, tuple(100 * seed for seed in seeds), _place(row))
        for row in utility
        for name in ("tuned", "proxy")
        if (value := as_number(row.get(f"{name}_exact_match"))) is not None
        for seeds in [_numbers(row.get(f"{name}_exact_match_by_seed"))]
    ]
    terms = {name: as_text(meaning) for name, meaning in as_mapping(found.get("meanings")).items()}
    if common:
        terms["every setting that changes something"] = f"also changes {common}"
    terms |= {
        "records": f"{as_text(pool.get('records'))} of {as_text(pool.get('source'))}, of which each federation trains "
        "on a random half",
        "canaries": f"{as_text(canaries.get('number'))} for each of {as_text(canaries.get('copies'))} copies, each one "
        f"of {as_text(canaries.get('candidates'))} numbers, in every federation",
    }
    terms |= {name: f"not attacked: {as_text(why)}" for name, why in as_mapping(found.get("absent")).items()}
    plots = _plot("plot-utility", "Test questions right", points, "%", "{:.1f}")
    blocks: list[Block] = [*plots, *([worth] if utility else []), Terms(terms=terms)]
    command = as_text(found.get("command"))
    return Section(
        id="attacked", title="What was attacked", blocks=[*blocks, *([Code(text=command)] if command else [])]
    )


def _spread(row: Mapping[str, Any], name: str, write: Callable[[float], str]) -> str | Cell:
    """The mean of a measure, and the least and the most of any seed."""
    seeds = _numbers(row.get(f"{name}_by_seed"))
    ends = (min(seeds), max(seeds)) if len(seeds) > 1 else None
    return estimate(as_number(row.get(name)), ends, write)
