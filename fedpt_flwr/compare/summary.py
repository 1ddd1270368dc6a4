"""What comes of a comparison: means over seeds with their intervals, for a report and as text."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from fedpt_flwr.compare.plan import FEDPT, LARGE, Cell, Plan, Result
from fedpt_flwr.scoring import gap_closed, render_table

_COSTS = {
    "bytes_down_per_device_and_round": "bytes_down_per_device_and_round",
    "bytes_up_per_device_and_round": "bytes_up_per_device_and_round",
    "device_tokens_per_round": "device_tokens_per_round",
    "device_seconds_per_round": "device_seconds_per_round",
    "device_flops_per_round": "device_flops_per_round",
    "device_state_bytes": "device_state_bytes",
    # Of the worker, where the server and all devices live: nothing that one device would need.
    "device_peak_memory_bytes": "worker_peak_memory_bytes",
}


def summarise(plan: Plan, settled: Mapping[str, Result | None]) -> dict[str, Any]:
    """Everything that a report needs, from the cells that are there.

    Args:
        plan: What was compared.
        settled: Results by cell; None for a cell that failed.

    Returns:
        ``rows``: for each world, mode and row its test scores over the seeds that are there; the mode of a direct kind
        is None. ``gap_closed``: the share of the way from ``large`` to ``large_federated`` that the proxy goes, by
        exact match on the test items, each seed against the same seed; of the world ``all`` each value is a world's
        mean, since the seeds of one world are no independent draws of it. ``learning_rates``: what was tried, on the
        validation items. ``costs``: means over the seeds.

        A mean has its values beside it, in the order of the seeds, and a 95 % interval (see :func:`t_interval`). A
        value that is not defined (a loss that is not finite, a gap where tuning the large model gained nothing) is
        None, and then so are mean and interval: leaving out what went wrong would flatter; ``why`` says so of a gap.
    """
    groups = _groups(plan, settled)
    closed = _gaps_closed(plan, groups)
    return {
        "devices": plan.num_devices,
        "rows": [row for (world, kind, mode), cells in groups.items() for row in _rows(world, kind, mode, cells)],
        "gap_closed": closed,
        "learning_rates": _learning_rates(plan, settled),
        "costs": [_mean_costs(*group, cells) for group, cells in groups.items()],
    }


_Group = tuple[str, str, str | None]
"""World, kind and mode."""


def _groups(plan: Plan, settled: Mapping[str, Result | None]) -> dict[_Group, list[Result]]:
    """The results that belong together, in the order of the seeds; groups without any are left out."""
    cells: dict[_Group, list[Cell]] = {}
    for world in plan.worlds:
        for cell in plan.fedpt_cells():
            if cell.world == world:
                cells.setdefault((world, cell.kind, cell.mode), []).append(cell)
        for kind in plan.kinds:
            if kind != FEDPT:
                cells[world, kind, None] = plan.chosen(world, kind, settled)
    found = {group: [result for cell in part if (result := settled.get(cell.name))] for group, part in cells.items()}
    return {group: results for group, results in found.items() if results}


def _rows(world: str, kind: str, mode: str | None, cells: Sequence[Result]) -> list[dict[str, Any]]:
    names = dict.fromkeys(name for cell in cells for name in cell["rows"])
    found = []
    for name in names:
        having = [cell for cell in cells if name in cell["rows"]]
        found.append(
            {
                "world": world,
                "mode": mode,
                "row": name,
                "kind": kind,
                "n_seeds": len(having),
                "seeds": [cell["seed"] for cell in having],
                "exact_match": _mean([cell["rows"][name].get("exact_match") for cell in having]),
                "loss": _mean([cell["rows"][name].get("loss") for cell in having]),
            }
        )
    return found


def _gaps_closed(plan: Plan, groups: Mapping[_Group, Sequence[Result]]) -> list[dict[str, Any]]:
    found, means = [], {mode: list[float | None]() for mode in plan.modes}
    for world in plan.worlds:
        references = {cell["seed"]: cell["rows"][LARGE] for cell in groups.get((world, LARGE, None), ())}
        for mode in plan.modes:
            cells = [cell for cell in groups.get((world, FEDPT, mode), ()) if cell["seed"] in references]
            if not cells:
                continue
            scores = [
                (
                    cell["rows"].get("proxy", {}).get("exact_match"),
                    cell["rows"].get("large", {}).get("exact_match"),
                    references[cell["seed"]].get("exact_match"),
                )
                for cell in cells
            ]
            seeds = [cell["seed"] for cell in cells]
            mean = _mean([gap_closed(*part) for part in scores])
            means[mode].append(mean["mean"])
            why = [f"with seed {seed} {_no_gap(*part)}" for seed, part in zip(seeds, scores, strict=True)]
            found.append({"world": world, "mode": mode, "seeds": seeds, **mean, **_undefined(mean, why)})
    for mode, values in means.items():
        if values:
            mean = _mean(values)
            why = [f"in world {row['world']} there is none" for row in found if row["mode"] == mode]
            found.append({"world": "all", "mode": mode, **mean, **_undefined(mean, why)})
    return found


def _no_gap(proxy: float | None, large: float | None, reference: float | None) -> str:
    """Why there is no share of a gap to be closed."""
    if proxy is None or large is None or reference is None:
        return "a model has no exact match"
    return f"{LARGE} gains nothing over large ({100 * large:.1f} % before, {100 * reference:.1f} % after)"


def _undefined(mean: Mapping[str, Any], why: Sequence[str]) -> dict[str, Any]:
    """The sentence that says why a mean is not there, if it is not."""
    said = [reason for value, reason in zip(mean["values"], why, strict=True) if value is None]
    return {"why": "no share: " + ", ".join(said)} if said else {}


def _learning_rates(plan: Plan, settled: Mapping[str, Result | None]) -> list[dict[str, Any]]:
    found = []
    for world in plan.worlds:
        for kind in plan.kinds:
            if kind == FEDPT:
                continue
            chosen = {cell.name for cell in plan.chosen(world, kind, settled)}
            for cell in plan.candidates(world, kind):
                row = (settled.get(cell.name) or {}).get("validation_rows", {}).get(kind, {})
                found.append(
                    {
                        "world": world,
                        "row": kind,
                        "seed": cell.seed,
                        "learning_rate": cell.learning_rate,
                        "exact_match": row.get("exact_match"),
                        "loss": row.get("loss"),
                        "chosen": cell.name in chosen,
                    }
                )
    return found


def _mean_costs(world: str, kind: str, mode: str | None, cells: Sequence[Result]) -> dict[str, Any]:
    """Mean costs of some cells; of a direct kind without the tokens of a large model beside the tuned one."""
    costs = [cell["costs"] for cell in cells]
    names = {name: label for name, label in _COSTS.items() if all(name in part for part in costs)}
    if kind == FEDPT:
        names |= {name: name for name in costs[0] if name.startswith("server_large_tokens")}
    means = {label: statistics.fmean(part.get(name, 0) for part in costs) for name, label in names.items()}
    row = "proxy" if kind == FEDPT else kind
    return {
        "world": world,
        "mode": mode,
        "row": row,
        **means,
        "cell_seconds": statistics.fmean(cell["seconds"] for cell in cells),
    }


def _mean(values: Sequence[float | None]) -> dict[str, Any]:
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return {"mean": None, "ci95": None, "values": list(values)}
    interval = t_interval(known)
    return {
        "mean": statistics.fmean(known),
        "ci95": None if interval is None else list(interval),
        "values": list(values),
    }


def t_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % interval of a mean by Student's t: how far another draw of seeds could move it.

    It may reach beyond what a share can be. Other test items are not in it; the intervals in each cell are of those.

    Args:
        values: One for each seed.

    Returns:
        Both ends, or None for a single value.
    """
    if len(values) < 2:
        return None
    mean = statistics.fmean(values)
    half = t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half


def t_quantile(freedom: int) -> float:
    """97.5 % quantile of Student's t distribution, found by halving an interval that holds it.

    SciPy has this function, but is no dependency of the project.

    Args:
        freedom: Degrees of freedom, at least 1.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(100):
        angle = (low + high) / 2
        low, high = (angle, high) if _central_t(angle, freedom) < 0.95 else (low, angle)
    return math.sqrt(freedom) * math.tan(low)


def _central_t(angle: float, freedom: int) -> float:
    """Probability that ``|t| < sqrt(freedom) * tan(angle)`` (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4)."""
    is_odd = freedom % 2
    total = 0.0
    term = math.cos(angle) if is_odd else 1.0
    for power in range(3 if is_odd else 2, freedom + 1, 2):
        total += term
        term *= (power - 1) / power * math.cos(angle) ** 2
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if is_odd else total


# --- as text ---------------------------------------------------------------------------------------------------------


_COLUMNS = {
    "bytes_up_per_device_and_round": ("MB up", 1e-6),
    "bytes_down_per_device_and_round": ("MB down", 1e-6),
    "device_seconds_per_round": ("seconds", 1.0),
    "device_flops_per_round": ("GFLOP", 1e-9),
    "device_state_bytes": ("MB of state", 1e-6),
}
"""Costs that are shown: heading, and what a number is multiplied by."""


def summary_text(summary: Mapping[str, Any]) -> str:
    """The summary as tables of plain text.

    Args:
        summary: What :func:`summarise` returned, or more.
    """
    scores = [["world", "mode", "row", "seeds", "exact match %", "loss"]]
    scores += [
        [
            *_place(row),
            row["row"],
            str(row["n_seeds"]),
            _with_interval(row["exact_match"], 100),
            _with_interval(row["loss"]),
        ]
        for row in summary["rows"]
    ]
    gaps = [["world", "mode", "gap closed %"]]
    gaps += [[*_place(row), _with_interval(row, 100)] for row in summary["gap_closed"]]
    rates = [["world", "row", "learning rate", "exact match %", "loss", ""]]
    rates += [
        [
            row["world"],
            row["row"],
            f"{row['learning_rate']:g}",
            _number(row["exact_match"], 100),
            _number(row["loss"]),
            "chosen" if row["chosen"] else "",
        ]
        for row in summary["learning_rates"]
    ]
    costs = [["world", "mode", "row", *(title for title, _ in _COLUMNS.values())]]
    costs += [
        [*_place(row), row["row"], *(_number(row.get(name), unit) for name, (_, unit) in _COLUMNS.items())]
        for row in summary["costs"]
    ]
    tables = {
        "Test items, mean over the seeds [95 % interval over the seeds]": scores,
        "Share of the gap from large to large_federated that the proxy closes, by exact match": gaps,
        "Learning rates, by validation items with the first seed": rates,
        "Costs of a device in a round": costs,
    }
    parts = [f"{title}\n\n{render_table(table)}" for title, table in tables.items() if len(table) > 1]
    whys = [f"Gap closed, {', '.join(_place(row))}: {row['why']}" for row in summary["gap_closed"] if "why" in row]
    return "\n\n".join([*parts, *whys])


def _place(row: Mapping[str, Any]) -> list[str]:
    return [row["world"], row["mode"] or "-"]


def _with_interval(mean: Mapping[str, Any], unit: float = 1.0) -> str:
    ends = f" [{', '.join(_number(end, unit) for end in mean['ci95'])}]" if mean["ci95"] else ""
    return _number(mean["mean"], unit) + ends


def _number(value: float | None, unit: float = 1.0) -> str:
    return "-" if value is None else f"{unit * value:.4g}"
