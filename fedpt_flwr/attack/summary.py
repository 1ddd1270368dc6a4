"""From finished federations to what an attacker learns: tables for ``attack.json``, a report, and a terminal."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedpt_flwr.attack.exposure import exposure
from fedpt_flwr.attack.membership import (
    CALIBRATED,
    FALSE_POSITIVE_RATES,
    LIKELIHOOD_RATIO,
    LOSS,
    FloatArray,
    Guess,
    Shadow,
    bound,
    calibrated_scores,
    likelihood_ratio_scores,
    loss_scores,
    success,
)
from fedpt_flwr.attack.plan import CONTROLS, DEVICE_TARGETS, TARGETS, Federation, Plan
from fedpt_flwr.compare.kinds import FEDPT
from fedpt_flwr.verdict import render_table

ATTACK = "attack.json"

Result = dict[str, Any]


def summarise(plan: Plan, done: Mapping[str, Result]) -> dict[str, Any]:
    """All tables.

    Args:
        plan: What is attacked.
        done: Results by the federation's name.

    Returns:
        ``membership``: a row for each setting, target and attack; ``exposure``: for each setting, target and number of
        copies; ``utility``: for each setting what the models are worth; ``absent``: why a target could not be
        attacked; and what all of this is of.
    """
    membership, exposed, utility = [], [], []
    absent: dict[str, str] = {}
    for kind in plan.kinds():
        for setting in dict.fromkeys(part.setting for part in plan.federations() if part.kind == kind):
            parts = [part for part in plan.federations() if (part.kind, part.setting) == (kind, setting)]
            attacked = [done[part.name] for part in parts if part.name in done and not part.is_shadow]
            shadows = [done[part.name] for part in parts if part.name in done and part.is_shadow]
            if not attacked:
                continue
            head = {"setting": setting, "changes": dict(parts[0].changes), **_privacy(attacked)}
            for found in (*attacked, *shadows):
                absent |= {f"{setting}, {name}": why for name, why in found["absent"].items()}
            rows = _membership(attacked, shadows, _is_complete(parts, done))
            # It is the server that adds noise, and a device's reply is tapped before.
            unbounded = {"allowed_at_1_percent": None}
            membership += [head | row | (unbounded if row["target"] in DEVICE_TARGETS else {}) for row in rows]
            exposed += [head | row for row in _exposure([*attacked, *shadows])]
            if kind == FEDPT:
                utility.append(head | _utility(attacked))
    one: Result = next(iter(done.values()), {})
    pool = one.get("pool", {})
    return {
        "seeds": list(plan.seeds),
        "shadows": plan.shadows,
        "devices": pool.get("devices", plan.num_devices),
        "pool": {**pool, "records": len(one.get("members", []))},
        "canaries": {"number": plan.canaries, "copies": list(plan.copies), "candidates": 10**plan.digits},
        "meanings": {name: TARGETS[name] for name in dict.fromkeys(row["target"] for row in membership)},
        "membership": membership,
        "exposure": exposed,
        "utility": utility,
        "absent": absent,
    }


def _is_complete(parts: Sequence[Federation], done: Mapping[str, Result]) -> bool:
    """Whether all shadows of a setting are there: only then is every record in half of them."""
    return all(part.name in done for part in parts if part.is_shadow)


def _privacy(results: Sequence[Result]) -> dict[str, Any]:
    """Epsilon and delta that the runs report, and what their noise allows an attack; None: they promise nothing."""
    told = [result.get("privacy") or {} for result in results]
    if not all(isinstance(part.get("epsilon"), int | float) for part in told):
        return {"epsilon": None, "delta": None, "allowed_at_1_percent": None}
    epsilon, delta = (max(float(part[name]) for part in told) for name in ("epsilon", "delta"))
    allowed = max(bound(float(part["noise_multiplier"]), int(part["releases"]), 0.01) for part in told)
    return {"epsilon": epsilon, "delta": delta, "allowed_at_1_percent": allowed}


# --- membership ------------------------------------------------------------------------------------------------------


def _membership(attacked: Sequence[Result], shadows: Sequence[Result], has_shadows: bool) -> list[dict[str, Any]]:
    rows = []
    for target in [name for name in TARGETS if all(name in result["nats"] for result in attacked)]:
        guesses = {LOSS: [_guess(loss_scores(_nats(part, target), _tokens(part)), part) for part in attacked]}
        control = CONTROLS.get(target)
        if control is not None and all(control in part["nats"] for part in attacked):
            guesses[CALIBRATED] = [
                _guess(calibrated_scores(_nats(part, target), _nats(part, control)), part) for part in attacked
            ]
        if control is not None and shadows and has_shadows and all(target in part["nats"] for part in shadows):
            known = [Shadow(_nats(part, target), _members(part)) for part in shadows]
            guesses[LIKELIHOOD_RATIO] = [
                _guess(likelihood_ratio_scores(_nats(part, target), known), part) for part in attacked
            ]
        rows += [{"target": target, "attack": attack, **success(each)} for attack, each in guesses.items()]
    return rows


def _nats(result: Result, target: str) -> FloatArray:
    return np.asarray([np.nan if value is None else value for value in result["nats"][target]], dtype=np.float64)


def _tokens(result: Result) -> FloatArray:
    return np.maximum(np.asarray(result["tokens"], dtype=np.float64), 1.0)


def _members(result: Result) -> Any:
    return np.asarray(result["members"], dtype=np.bool_)


def _guess(scores: FloatArray, result: Result) -> Guess:
    return Guess(scores, _members(result))


# --- canaries and utility --------------------------------------------------------------------------------------------


def _exposure(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Every federation hides secrets of its own, so those of shadows count as well."""
    rows = []
    copies = dict.fromkeys(canary["copies"] for result in results for canary in result["canaries"])
    for target in [name for name in TARGETS if any(name in result["ranks"] for result in results)]:
        for number in copies:
            ranks = [
                rank
                for result in results
                for canary, rank in zip(result["canaries"], result["ranks"].get(target, []), strict=False)
                if canary["copies"] == number and rank is not None
            ]
            if ranks:
                rows.append({"target": target, "copies": number, **exposure(ranks, results[0]["candidates"])})
    return rows


def _utility(results: Sequence[Result]) -> dict[str, Any]:
    """What the models of the same runs are worth on the test items: means over the seeds, and each of them."""
    found: dict[str, Any] = {}
    for model in ("tuned", "proxy"):
        rows = [result.get("rows", {}).get(model, {}) for result in results]
        for measure in ("exact_match", "loss"):
            values = [row.get(measure) for row in rows]
            if all(isinstance(value, int | float) for value in values):
                found[f"{model}_{measure}"] = statistics.fmean(values)
                found[f"{model}_{measure}_by_seed"] = values
    for key in ("alpha", "plausibility"):
        found[key] = [result.get(key) for result in results]
    return found


# --- for a terminal --------------------------------------------------------------------------------------------------


def summary_text(summary: Mapping[str, Any]) -> str:
    """The tables as text."""
    head = ["setting", "epsilon", "target", "attack", "AUC", "TPR at 1 %", "TPR at 0.1 %", "allowed at 1 %"]
    lines = [
        [
            row["setting"],
            epsilon_text(row["epsilon"]),
            row["target"],
            row["attack"],
            *(_rate(row[name], "{:.3f}") for name in ("auc", *FALSE_POSITIVE_RATES)),
            "1" if row["allowed_at_1_percent"] is None else f"{row['allowed_at_1_percent']:.3f}",
        ]
        for row in summary["membership"]
    ]
    parts = [render_table([head, *lines])] if lines else []
    head = ["setting", "epsilon", "target", "copies", "bits exposed", "of", "first of all", "canaries"]
    lines = [
        [
            row["setting"],
            epsilon_text(row["epsilon"]),
            row["target"],
            str(row["copies"]),
            _rate(row, "{:.2f}"),
            f"{row['most']:.2f}",
            f"{100 * row['first']:.0f} %",
            str(row["canaries"]),
        ]
        for row in summary["exposure"]
    ]
    parts += [render_table([head, *lines])] if lines else []
    head = ["setting", "epsilon", "tuned right", "proxy right"]
    lines = [
        [
            row["setting"],
            epsilon_text(row["epsilon"]),
            *(_share(row.get(f"{model}_exact_match_by_seed")) for model in ("tuned", "proxy")),
        ]
        for row in summary["utility"]
    ]
    parts += [render_table([head, *lines])] if lines else []
    return "\n\n".join(parts)


def epsilon_text(value: float | None) -> str:
    """Epsilon, for a table."""
    return "infinite" if value is None else f"{value:.3g}"


def _rate(found: Mapping[str, Any] | None, write: str) -> str:
    if found is None:
        return "-"
    low, high = found["ci95"]
    return f"{write.format(found['value'])} [{write.format(low)}, {write.format(high)}]"


def _share(values: Sequence[float] | None) -> str:
    """Mean, lowest and highest."""
    if not values:
        return "-"
    return f"{100 * statistics.fmean(values):.1f} % ({100 * min(values):.1f} to {100 * max(values):.1f})"
