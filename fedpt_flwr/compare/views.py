"""Costs beside quality: what a device and the server spend, and three ways to look at it.

The views are named after Quality-under-Budget, Cost-to-Target and Robustness of EdgeFlowerTune (arXiv:2605.08636). Both
first ones are read off the course over the rounds, which is scored on validation items.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from fedpt_flwr.compare.kinds import ALL, FEDPT, KINDS, LARGE, LARGE_LORA, UNTOUCHED
from fedpt_flwr.compare.statistics import mean_over_seeds

Result = Mapping[str, Any]
Groups = Mapping[tuple[str, str, str | None], Sequence[Any]]
"""Cells by world, kind and mode."""

Course = Sequence[Mapping[str, float]]
Courses = Sequence[tuple[int, Course]]
"""Of every seed what a row gets right, round by round, and what a device has spent by then."""

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
_ALONE = {"process_bytes": "device_process_bytes", "growth_bytes": "device_memory_growth_bytes"}
_NEEDED_PHASES = ("distillation", "device", "shift")
"""What the server puts through the large model because the method needs it; the rest is spent to measure."""

BUDGETS = {"bytes": "bytes of a device", "flops": "FLOPs of a device"}
"""What is added up over the rounds, by its key in a course."""

TARGETS = (0.5, 0.8, 0.9, 0.95)
"""Shares of the gap from large to large_federated to be reached."""

_RATIOS = (
    "bytes_up_per_device_and_round",
    "bytes_down_per_device_and_round",
    "device_flops_per_round",
    "device_seconds_per_round",
    "device_state_bytes",
    "device_memory_growth_bytes",
    "device_process_bytes",
    "trained_parameters",
)


def mean_costs(world: str, kind: str, mode: str | None, cells: Sequence[Result]) -> dict[str, Any]:
    """Mean costs of some cells; of a plain kind without the tokens of a large model that has no part in it.

    Args:
        world: Label.
        kind: Of the cells.
        mode: Of the cells.
        cells: Results.
    """
    costs = [cell["costs"] for cell in cells]
    names = {name: label for name, label in _COSTS.items() if all(name in part for part in costs)}
    if KINDS[kind].who != ALL:  # it trains where the data is, so nothing is sent
        names = {name: label for name, label in names.items() if not name.startswith("bytes_")}
    rows = list(KINDS[kind].rows.values())
    uses_large = bool({"proxy", "device"} & KINDS[kind].rows.keys())
    if uses_large:
        names |= {name: name for name in costs[0] if name.startswith("server_large_tokens")}
    means = {label: statistics.fmean(part.get(name, 0) for part in costs) for name, label in names.items()}
    if uses_large and all("large_flops_per_token" in cell for cell in cells):
        needed = [sum(part.get(f"server_large_tokens_{phase}", 0) for phase in _NEEDED_PHASES) for part in costs]
        means["server_large_tokens_needed"] = statistics.fmean(needed)
        means["server_large_flops"] = statistics.fmean(
            tokens * cell["large_flops_per_token"] for tokens, cell in zip(needed, cells, strict=True)
        )
    for name, label in _ALONE.items():
        values = [cell["device_alone"][name] for cell in cells if name in cell.get("device_alone", {})]
        means |= {label: statistics.fmean(values)} if values else {}
    if all("trained_parameters" in cell for cell in cells):
        means["trained_parameters"] = float(cells[0]["trained_parameters"])
    row = "proxy" if "proxy" in rows else rows[0]
    for name in rows:
        speeds = [speed for cell in cells if (speed := cell.get("tokens_per_second", {}).get(name))]
        means |= {f"tokens_per_second_{name}": statistics.fmean(speeds)} if speeds else {}
    seconds = {
        f"cell_{name}": statistics.fmean(cell[name] for cell in cells)
        for name in ("seconds", "processor_seconds")
        if all(name in cell for cell in cells)
    }
    return {"world": world, "mode": mode, "row": row, "kind": kind, **means, **seconds}


def ratios(costs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The proxy's costs as shares of those of the large model tuned by the devices."""
    found = []
    for row in (row for row in costs if row["row"] == "proxy"):
        for other in costs:
            if other["row"] in (LARGE, LARGE_LORA) and other["world"] == row["world"]:
                shares = {name: row[name] / other[name] for name in _RATIOS if row.get(name) and other.get(name)}
                found.append({"world": row["world"], "mode": row["mode"], "against": other["row"], **shares})
    return found


# --- over the rounds -------------------------------------------------------------------------------------------------


def _course(cell: Result, row: str, *, is_sent: bool) -> Course:
    """Round by round a row's exact match and loss, and what a device has spent by then."""
    found, spent = [], dict.fromkeys((*BUDGETS, "seconds"), 0.0)
    for point in cell.get("curve", ()):
        spent["bytes"] += point.get("bytes_up", 0) + point.get("bytes_down", 0) if is_sent else 0
        spent["flops"] += point.get("flops", 0)
        spent["seconds"] += point.get("seconds", 0)
        scores = point.get("rows", {}).get(row, {})
        if "exact_match" in scores:
            found.append({"round": point["round"], **spent, **scores})
    return found


def _courses(groups: Groups) -> list[tuple[str, str | None, str, Courses]]:
    """World, mode and row with every seed's course, of all rows that are tuned and have one."""
    found: list[tuple[str, str | None, str, Courses]] = []
    for (world, kind, mode), cells in groups.items():
        if not KINDS[kind].is_tuned:
            continue
        for row in dict.fromkeys(KINDS[kind].rows.values()):
            is_sent = KINDS[kind].who == ALL
            courses = [(cell["seed"], course) for cell in cells if (course := _course(cell, row, is_sent=is_sent))]
            if courses:
                found.append((world, mode, row, courses))
    return found


def curves(groups: Groups) -> list[dict[str, Any]]:
    """Every row's course, mean over the seeds, as far as all seeds have a round."""
    found = []
    for world, mode, row, courses in _courses(groups):
        rounds = set.intersection(*({int(point["round"]) for point in course} for _, course in courses))
        points = []
        for number in sorted(rounds):
            same = [next(point for point in course if point["round"] == number) for _, course in courses]
            keys = [key for key in (*BUDGETS, "seconds", "exact_match", "loss") if all(key in point for point in same)]
            points.append({"round": number, **{key: statistics.fmean(point[key] for point in same) for key in keys}})
        found.append({"world": world, "mode": mode, "row": row, "points": points})
    return found


def quality_under_budget(groups: Groups) -> list[dict[str, Any]]:
    """The best exact match on validation items that a row has reached when a device has spent so much.

    The budgets of a world are what the proxy's device spends in a quarter, a half and all of its rounds, and what each
    of the others spends in all of them; each with the seed that spends most, so that a budget is enough with all seeds.
    """
    found, courses = [], _courses(groups)
    for world in dict.fromkeys(world for world, *_ in courses):
        here = [(mode, row, part) for label, mode, row, part in courses if label == world]
        for what in BUDGETS:
            totals = {(mode, row): _spent(part, what, 1.0) for mode, row, part in here}
            own = [_spent(part, what, share) for _, row, part in here if row == "proxy" for share in (0.25, 0.5)][:2]
            budgets = sorted({*own, *totals.values()} - {0.0})
            for mode, row, part in [part for part in here if totals[part[0], part[1]]]:  # what costs nothing is no row
                best = [
                    mean_over_seeds([_best_within(course, what, budget) for _, course in part])["mean"]
                    for budget in budgets
                ]
                place = {"world": world, "mode": mode, "row": row, "cost": what}
                found.append({**place, "budgets": budgets, "exact_match": best})
    return found


def _spent(courses: Courses, what: str, share: float) -> float:
    """What a device has spent after this share of the rounds, with the seed that spends most."""
    return max(course[math.ceil(share * len(course)) - 1][what] for _, course in courses)


def _best_within(course: Course, what: str, budget: float) -> float | None:
    within = [point["exact_match"] for point in course if point[what] <= budget]
    return max(within, default=None)


def cost_to_target(groups: Groups) -> list[dict[str, Any]]:
    """What a device has spent when a row first reaches a share of the gap, on the validation items that score rounds.

    The gap is from ``large`` to what ``large_federated`` has in its last round, each seed for itself. A row that some
    seed does not bring there has no cost; nor has any where there is no gap with some seed, and ``why`` says so.
    """
    found, courses = [], _courses(groups)
    for world in dict.fromkeys(world for world, *_ in courses):
        gaps = _gaps(world, groups)
        for mode, row, part in [(mode, row, part) for label, mode, row, part in courses if label == world]:
            chosen = [(seed, course) for seed, course in part if seed in gaps]
            none = [no_gap(LARGE, seed, *gaps[seed]) for seed, _ in chosen if gaps[seed][1] <= gaps[seed][0]]
            why = {"why": "no costs: " + ", ".join(none)} if none else {}
            for share in TARGETS if chosen else ():
                firsts = [_first_at(course, share, *gaps[seed]) for seed, course in chosen]
                reached = [point for point in firsts if point is not None]
                costs = {
                    what: statistics.fmean(point[what] for point in reached)
                    for what in ("round", *BUDGETS, "seconds")
                    if len(reached) == len(firsts)
                }
                head = {"world": world, "mode": mode, "row": row, "share": share}
                found.append({**head, "seeds": len(firsts), "seeds_reached": len(reached), **costs, **why})
    return found


def _gaps(world: str, groups: Groups) -> dict[int, tuple[float, float]]:
    """By seed the shares of right answers of ``large`` and of ``large_federated`` after its last round."""
    untouched, found = groups.get((world, UNTOUCHED, None), ()), {}
    for cell in groups.get((world, LARGE, None), ()):
        before = _course(of_seed(untouched, cell["seed"]) or {}, "large", is_sent=False)
        after = _course(cell, LARGE, is_sent=True)
        if before and after:
            found[cell["seed"]] = (before[-1]["exact_match"], after[-1]["exact_match"])
    return found


def _first_at(course: Course, share: float, floor: float, end: float) -> Mapping[str, float] | None:
    if end <= floor:  # any first round would do
        return None
    return next((point for point in course if point["exact_match"] >= floor + share * (end - floor)), None)


def of_seed(cells: Sequence[Result], seed: int) -> Result | None:
    """A group's cell of this seed, or its only one where nothing depends on the seed."""
    same = [cell for cell in cells if cell["seed"] == seed]
    if same:
        return same[0]
    return cells[0] if len(cells) == 1 and not KINDS.get(cells[0].get("kind", ""), KINDS[FEDPT]).is_tuned else None


def no_gap(reference: str, seed: int, before: float, after: float) -> str:
    """Why there is nothing to be closed with a seed."""
    shares = f"({100 * before:.1f} % before, {100 * after:.1f} % after)"
    return f"with seed {seed} {reference} gains nothing over large {shares}"


def robustness(groups: Groups) -> list[dict[str, Any]]:
    """How far a row's exact match on the test items spreads: over the seeds, and over devices that are alone."""
    found = []
    for (world, kind, mode), cells in groups.items():
        if not KINDS[kind].is_tuned:
            continue
        for row in dict.fromkeys(name for cell in cells for name in cell["rows"]):
            values = [value for cell in cells if (value := cell["rows"].get(row, {}).get("exact_match")) is not None]
            devices = [value for cell in cells for value in cell.get("by_device", {}).get(row, ()) if value is not None]
            if values:
                spread = {"worst_seed": min(values), "best_seed": max(values)}
                spread |= {"worst_device": min(devices), "best_device": max(devices)} if devices else {}
                found.append({"world": world, "mode": mode, "row": row, **spread})
    return found
