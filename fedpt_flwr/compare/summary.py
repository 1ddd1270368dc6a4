"""What comes of a comparison: means over seeds with their intervals, for a report and as text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedpt_flwr.compare.kinds import CENTRAL, FEDPT, KINDS, LARGE, LARGE_LORA, UNTOUCHED
from fedpt_flwr.compare.plan import Cell, Plan, Result
from fedpt_flwr.compare.statistics import (
    ITEM_MEASURES,
    gap_over_items,
    holm,
    mean_over_seeds,
    merged_bins,
    paired_difference,
)
from fedpt_flwr.compare.views import (
    cost_to_target,
    curves,
    mean_costs,
    no_gap,
    of_seed,
    quality_under_budget,
    ratios,
    robustness,
)
from fedpt_flwr.uncertainty import T_INTERVALS, gap_closed
from fedpt_flwr.verdict import render_table

RIVALS = ("tuned", LARGE, LARGE_LORA)
"""The rows that the proxy is compared with, item by item."""

_SCORES = ("exact_match", "rouge_l", "loss", "invalid_rate", "contains_value", "right_field")


def summarise(plan: Plan, settled: Mapping[str, Result | None]) -> dict[str, Any]:
    """Everything that a report needs, from the cells that are there.

    Args:
        plan: What was compared.
        settled: Results by cell; None for a cell that failed.

    Returns:
        ``rows``: for each world, mode and row its test scores over the seeds that are there; only ``fedpt`` has a mode.
        ``differences``: the proxy against each of :data:`RIVALS`, item by item, with p values that Holm's procedure has
        raised for the whole list. ``gap_closed``: the share of the way from ``large`` to ``large_federated`` that the
        proxy goes, by exact match on the test items and by ROUGE-L where that was measured, each seed against the same
        seed; of the world ``all`` each value is a world's mean, since the seeds of one world are no independent draws
        of it. ``learning_rates``: what was tried, on the validation items. ``costs``: means over the seeds, and
        ``cost_ratios``, the proxy's over the large rows'. ``curves``, ``quality_under_budget``, ``cost_to_target``,
        ``robustness``, ``calibration``: see ``views.py``. ``ablations``: rows of the cells in which one key was varied.
        ``meanings``: what the rows are. ``counted``: the cells that any of this but ``learning_rates`` is about.

        A mean has its values beside it, in the order of the seeds, and a 95 % interval over the seeds. A value that is
        not defined (a loss that is not finite, a gap where tuning the large model gained nothing) is None, and then so
        are mean and interval: leaving out what went wrong would flatter; ``why`` says so of a gap.
    """
    groups = _groups(plan, settled)
    rows = [row for group, cells in groups.items() for row in _rows(*group, cells)]
    costs = [mean_costs(*group, cells) for group, cells in groups.items() if KINDS[group[1]].is_tuned]
    named = dict.fromkeys(row["row"] for row in rows)
    meanings = {row: meaning for kind in KINDS.values() for row, meaning in kind.meanings.items() if row in named}
    return {
        "devices": plan.num_devices,
        "seeds": list(plan.seeds),
        "meanings": meanings,
        "rows": rows,
        "differences": _differences(plan, groups),
        "gap_closed": _gaps_closed(plan, groups),
        "learning_rates": _learning_rates(plan, settled),
        "costs": costs,
        "cost_ratios": ratios(costs),
        "curves": curves(groups),
        "quality_under_budget": quality_under_budget(groups),
        "cost_to_target": cost_to_target(groups),
        "robustness": robustness(groups),
        "calibration": _calibration(groups),
        "ablations": _ablations(plan, settled),
        "counted": _counted(plan, settled),
    }


Group = tuple[str, str, str | None]
"""World, kind and mode."""


def _groups(plan: Plan, settled: Mapping[str, Result | None]) -> dict[Group, list[Result]]:
    """The results that belong together, in the order of the seeds; groups without any are left out."""
    cells: dict[Group, list[Cell]] = {}
    for world in plan.worlds:
        for kind in plan.kinds_of(world):
            for cell in plan.chosen(world, kind, settled):
                cells.setdefault((world, kind, cell.mode), []).append(cell)
    found = {group: [result for cell in part if (result := settled.get(cell.name))] for group, part in cells.items()}
    return {group: results for group, results in found.items() if results}


def _counted(plan: Plan, settled: Mapping[str, Result | None]) -> list[str]:
    """Names of the cells that are there with the chosen learning rates, ablations among them."""
    cells = [
        cell for world in plan.worlds for kind in plan.kinds_of(world) for cell in plan.chosen(world, kind, settled)
    ]
    return sorted({cell.name for cell in [*cells, *plan.ablation_cells(settled)] if settled.get(cell.name)})


def _rows(world: str, kind: str, mode: str | None, cells: Sequence[Result]) -> list[dict[str, Any]]:
    names = dict.fromkeys(name for cell in cells for name in cell["rows"])
    found = []
    for name in names:
        having = [cell for cell in cells if name in cell["rows"]]
        scores = [cell["rows"][name] for cell in having]
        found.append(
            {
                "world": world,
                "mode": mode,
                "row": name,
                "kind": kind,
                "n_seeds": len(having),
                "seeds": [cell["seed"] for cell in having],
                "items": scores[0].get("n"),
                **{
                    measure: mean_over_seeds([score.get(measure) for score in scores])
                    for measure in _SCORES
                    if measure in ("exact_match", "loss") or any(measure in score for score in scores)
                },
            }
        )
    return found


def _differences(plan: Plan, groups: Mapping[Group, Sequence[Result]]) -> list[dict[str, Any]]:
    """Families of comparisons, one for each measure: the proxy against its rivals, in every world and mode."""
    found = [row for measure in ITEM_MEASURES for row in _compared(plan, groups, measure)]
    for measure in ITEM_MEASURES:
        family = [row for row in found if row["measure"] == measure]
        for row, raised in zip(family, holm([row["p"] for row in family]), strict=True):
            row["p_holm"], row["family"] = raised, len(family)
    return found


def _compared(plan: Plan, groups: Mapping[Group, Sequence[Result]], measure: str) -> Iterator[dict[str, Any]]:
    for world in plan.worlds:
        for mode in plan.modes:
            cells = groups.get((world, FEDPT, mode), ())
            for rival in RIVALS:
                others = cells if rival == "tuned" else groups.get((world, rival, None), ())
                pairs = [(cell, other) for cell in cells if (other := of_seed(others, cell["seed"]))]
                columns = [((cell.get("items", {}), "proxy"), (other.get("items", {}), rival)) for cell, other in pairs]
                difference = paired_difference(columns, measure) if columns else None
                if difference is not None:
                    seeds = [cell["seed"] for cell, _ in pairs]
                    head = {"world": world, "mode": mode, "row": "proxy", "against": rival, "measure": measure}
                    yield {**head, "seeds": seeds, **difference}


def _gaps_closed(plan: Plan, groups: Mapping[Group, Sequence[Result]]) -> list[dict[str, Any]]:
    scores = [row for cells in groups.values() for cell in cells for row in cell["rows"].values()]
    measures = [name for name in ("exact_match", "rouge_l") if any(name in row for row in scores)]
    return [
        row
        for measure in measures
        for reference in (LARGE, LARGE_LORA)
        for row in _gaps_to(reference, measure, plan, groups)
    ]


def _gaps_to(
    reference: str, measure: str, plan: Plan, groups: Mapping[Group, Sequence[Result]]
) -> list[dict[str, Any]]:
    found, means = [], dict[str, list[float | None]]()
    for world in plan.worlds:
        references = {cell["seed"]: cell for cell in groups.get((world, reference, None), ())}
        untouched = groups.get((world, UNTOUCHED, None), ())
        proxies = [(mode, groups.get((world, FEDPT, mode), ())) for mode in plan.modes]
        for name, mode, cells in [
            *(("proxy", mode, cells) for mode, cells in proxies),
            ("proxy_central", None, groups.get((world, CENTRAL, None), ())),
        ]:
            chosen = [cell for cell in cells if cell["seed"] in references]
            if not chosen:
                continue
            larges = [of_seed(untouched, cell["seed"]) or cell for cell in chosen]
            compared: list[list[tuple[Mapping[str, Any], str]]] = [
                [(cell, name) for cell in chosen],
                [(cell, "large") for cell in larges],
                [(references[cell["seed"]], reference) for cell in chosen],
            ]
            columns = [[_score(cell, row, measure) for cell, row in column] for column in compared]
            scores = list(zip(*columns, strict=True))
            seeds = [cell["seed"] for cell in chosen]
            mean = mean_over_seeds([gap_closed(*part) for part in scores])
            items = [[(cell.get("items", {}), row) for cell, row in same] for same in zip(*compared, strict=True)]
            why = [_why_no_share(reference, seed, *part) for seed, part in zip(seeds, scores, strict=True)]
            if name == "proxy":
                means.setdefault(str(mode), []).append(mean["mean"])
            place = {"world": world, "mode": mode, "row": name, "reference": reference, "measure": measure}
            over_items = gap_over_items(items, measure)
            found.append({**place, "seeds": seeds, **mean, "ci95_items": over_items, **_undefined(mean, why)})
    for mode, values in means.items():
        mean = mean_over_seeds(values)
        why = [
            f"in world {row['world']} there is none" for row in found if (row["row"], row["mode"]) == ("proxy", mode)
        ]
        place = {"world": "all", "mode": mode, "row": "proxy", "reference": reference, "measure": measure}
        found.append({**place, **mean, **_undefined(mean, why)})
    return found


def _score(cell: Mapping[str, Any], row: str, measure: str) -> float | None:
    value: float | None = cell["rows"].get(row, {}).get(measure)
    return value


def _why_no_share(name: str, seed: int, proxy: float | None, large: float | None, reference: float | None) -> str:
    if proxy is None or large is None or reference is None:
        return f"with seed {seed} a model was not measured"
    return no_gap(name, seed, large, reference)


def _undefined(mean: Mapping[str, Any], why: Sequence[str]) -> dict[str, Any]:
    """The sentence that says why a mean is not there, if it is not."""
    said = [reason for value, reason in zip(mean["values"], why, strict=True) if value is None]
    return {"why": "no share: " + ", ".join(said)} if said else {}


def _learning_rates(plan: Plan, settled: Mapping[str, Result | None]) -> list[dict[str, Any]]:
    found = []
    for world in plan.worlds:
        for kind in plan.kinds_of(world):
            candidates = plan.candidates(world, kind)
            if not KINDS[kind].judged or candidates[0].learning_rate is None:
                continue
            chosen = {cell.learning_rate for cell in plan.chosen(world, kind, settled) if settled.get(cell.name)}
            for cell in candidates:
                row = (settled.get(cell.name) or {}).get("validation_rows", {}).get(KINDS[kind].main_row, {})
                found.append(
                    {
                        "world": world,
                        "row": KINDS[kind].main_row,
                        "seed": cell.seed,
                        "learning_rate": cell.learning_rate,
                        "exact_match": row.get("exact_match"),
                        "loss": row.get("loss"),
                        "chosen": cell.learning_rate in chosen,  # where nothing ran, nothing is
                    }
                )
    return found


def _calibration(groups: Mapping[Group, Sequence[Result]]) -> list[dict[str, Any]]:
    """Calibration of each row on the validation items: the error over the seeds, and the bins of all seeds together."""
    found = []
    for (world, _, mode), cells in groups.items():
        for name in dict.fromkeys(name for cell in cells for name in cell.get("calibration", {})):
            parts = [cell["calibration"][name] for cell in cells if name in cell.get("calibration", {})]
            error = mean_over_seeds([part["ece"] for part in parts])
            found.append({"world": world, "mode": mode, "row": name, "ece": error, "bins": merged_bins(parts)})
    return found


def _ablations(plan: Plan, settled: Mapping[str, Result | None]) -> list[dict[str, Any]]:
    """The rows of every value of every ablation, and what a device spends there."""
    found = []
    for ablation, (world, kind, value), planned in plan.ablated(settled):
        cells = [result for cell in planned if (result := settled.get(cell.name))]
        if not cells:
            continue
        scores = [
            {"row": row["row"], **{key: row[key] for key in ("n_seeds", "seeds", "exact_match", "loss")}}
            for row in _rows(world, kind, planned[0].mode, cells)
        ]
        spent = mean_costs(world, kind, planned[0].mode, cells)
        found.append(
            {
                "world": world,
                "kind": kind,
                "key": ablation.key,
                "value": value,
                "with": {key: part for key, part in ablation.changes(value).items() if key != ablation.key},
                "is_base": not planned[0].changes,
                **_epsilon(cells),
                "rows": scores,
                "costs": {key: part for key, part in spent.items() if isinstance(part, float)},
            }
        )
    return found


def _epsilon(cells: Sequence[Result]) -> dict[str, float]:
    """The largest epsilon of some cells, if all of them are private."""
    if not all("privacy" in cell for cell in cells):
        return {}
    return {"epsilon": max(cell["privacy"]["epsilon"] for cell in cells)}


# --- as text ---------------------------------------------------------------------------------------------------------


COLUMNS = {
    "trained_parameters": ("trained", 1.0),
    "bytes_up_per_device_and_round": ("MB up", 1e-6),
    "bytes_down_per_device_and_round": ("MB down", 1e-6),
    "device_seconds_per_round": ("seconds", 1.0),
    "device_flops_per_round": ("GFLOP", 1e-9),
    "device_state_bytes": ("MB of state", 1e-6),
    "device_memory_growth_bytes": ("MB grown", 1e-6),
    "server_large_tokens_needed": ("large tokens", 1.0),
}
"""Costs that are shown: heading, and what a number is multiplied by."""


def summary_text(summary: Mapping[str, Any]) -> str:
    """The summary as tables of plain text.

    Args:
        summary: What :func:`summarise` returned, or more.
    """
    tables = {
        "Test items, mean over the seeds [95 % interval over the seeds]": _scores_table(summary),
        "The proxy against others, item by item [95 % interval over the items]": _differences_table(summary),
        "Share of the gap from large that the proxy closes [over the seeds] (over the items)": (_gaps_table(summary)),
        "Learning rates, by validation items with the first seed": _rates_table(summary),
        "Costs of a device in a round": _costs_table(summary),
        "The proxy's costs in per cent of the large model's": _ratios_table(summary),
        "Ablations: exact match on the test items, %": _ablations_table(summary),
    }
    parts = [f"{title}\n\n{render_table(table)}" for title, table in tables.items() if len(table) > 1]
    notes = [T_INTERVALS] if any(row["exact_match"]["ci95"] for row in summary["rows"]) else []
    whys = [f"Gap closed, {', '.join(_place(row))}: {row['why']}" for row in summary["gap_closed"] if "why" in row]
    return "\n\n".join([*parts, *notes, *whys])


def _scores_table(summary: Mapping[str, Any]) -> list[list[str]]:
    has_rouge = any("rouge_l" in row for row in summary["rows"])
    rouge_l = ["ROUGE-L %"] if has_rouge else []
    return [
        ["world", "mode", "row", "seeds", "exact match %", "invalid %", *rouge_l, "loss"],
        *(
            [
                *_place(row),
                row["row"],
                str(row["n_seeds"]),
                _with_interval(row["exact_match"], 100),
                _number(row.get("invalid_rate", {}).get("mean"), 100),
                *([_with_interval(row["rouge_l"], 100) if "rouge_l" in row else "-"] if has_rouge else []),
                _with_interval(row["loss"]),
            ]
            for row in summary["rows"]
        ),
    ]


def _differences_table(summary: Mapping[str, Any]) -> list[list[str]]:
    head = ["world", "mode", "against", "measure", "difference", "p (Holm)"]
    return [
        head,
        *(
            [
                *_place(row),
                row["against"],
                row["measure"],
                _with_interval({"mean": row["value"], "ci95": row["ci95"]}, 100 if row["measure"] != "loss" else 1),
                f"{row['p_holm']:.2g}",
            ]
            for row in summary["differences"]
        ),
    ]


def _gaps_table(summary: Mapping[str, Any]) -> list[list[str]]:
    head = ["world", "mode", "row", "to", "by", "gap closed %"]
    return [
        head,
        *(
            [
                *_place(row),
                row["row"],
                row["reference"],
                row["measure"],
                _with_interval(row, 100)
                + (f" ({', '.join(_number(end, 100) for end in row['ci95_items'])})" if row.get("ci95_items") else ""),
            ]
            for row in summary["gap_closed"]
        ),
    ]


def _rates_table(summary: Mapping[str, Any]) -> list[list[str]]:
    return [
        ["world", "row", "learning rate", "exact match %", "loss", ""],
        *(
            [
                row["world"],
                row["row"],
                f"{row['learning_rate']:g}",
                _number(row["exact_match"], 100),
                _number(row["loss"]),
                "chosen" if row["chosen"] else "",
            ]
            for row in summary["learning_rates"]
        ),
    ]


def _costs_table(summary: Mapping[str, Any]) -> list[list[str]]:
    columns = {name: column for name, column in COLUMNS.items() if any(name in row for row in summary["costs"])}
    return [
        ["world", "mode", "row", *(title for title, _ in columns.values())],
        *(
            [*_place(row), row["row"], *(_number(row.get(name), unit) for name, (_, unit) in columns.items())]
            for row in summary["costs"]
        ),
    ]


def _ratios_table(summary: Mapping[str, Any]) -> list[list[str]]:
    names = [name for name in COLUMNS if any(name in row for row in summary["cost_ratios"])]
    return [
        ["world", "mode", "against", *(COLUMNS[name][0] for name in names)],
        *(
            [*_place(row), row["against"], *(_number(row.get(name), 100) for name in names)]
            for row in summary["cost_ratios"]
        ),
    ]


def _ablations_table(summary: Mapping[str, Any]) -> list[list[str]]:
    has_epsilon = any("epsilon" in part for part in summary["ablations"])
    return [
        ["world", "varied", "value", "row", "seeds", *(["epsilon"] if has_epsilon else []), "exact match %"],
        *(
            [
                part["world"],
                part["key"],
                f"{part['value']}{' (as it is)' if part['is_base'] else ''}",
                row["row"],
                str(row["n_seeds"]),
                *([_number(part.get("epsilon"))] if has_epsilon else []),
                _with_interval(row["exact_match"], 100),
            ]
            for part in summary["ablations"]
            for row in part["rows"]
        ),
    ]


def _place(row: Mapping[str, Any]) -> list[str]:
    return [row["world"], row["mode"] or "-"]


def _with_interval(mean: Mapping[str, Any], unit: float = 1.0) -> str:
    ends = f" [{', '.join(_number(end, unit) for end in mean['ci95'])}]" if mean["ci95"] else ""
    return _number(mean["mean"], unit) + ends


def _number(value: float | None, unit: float = 1.0) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if unit == 1.0 and value >= 1e4 else f"{unit * value:.4g}"
