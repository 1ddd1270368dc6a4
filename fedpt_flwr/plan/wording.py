"""A plan for people: a table, sentences, and what was planned beside what a run measured."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

from fedpt_flwr.memory import UNTOLD_BASE_BYTES
from fedpt_flwr.plan.counting import Column
from fedpt_flwr.plan.planning import Plan

_PURPOSES: Mapping[str, Sequence[str]] = {
    "to score": ("validation", "test", "examples"),
    "to choose alpha and mask": ("shift",),
    "to draw the curve of alphas": ("curve",),
    "to distil": ("distillation", "device"),
}


def plan_table(plan: Plan) -> list[list[str]]:
    """The plan as cells of text, the head first; what a column does not have is ``-``."""
    columns = plan.columns
    table = [["", *(column.title for column in columns)]]

    def add(label: str, value: Callable[[Column], str]) -> None:
        table.append([label, *(value(column) for column in columns)])

    add("weights on a device", lambda column: _scaled(column.parameters))
    add("weights that it tunes", lambda column: _scaled(column.trainable))
    add("bytes down to it, a round", lambda column: _bytes(column.bytes_down))
    add("bytes up from it", lambda column: _bytes(column.bytes_up))
    add("all bytes of the run", lambda column: _bytes(column.bytes_in_all))
    add("device memory, counted", lambda column: _bytes(column.memory.state()))
    add("  with activations (a GPU's)", lambda column: _bytes(column.memory.total()))
    add("  of a process on a CPU", lambda column: _bytes(UNTOLD_BASE_BYTES + column.memory.total()))
    add("device operations a round", lambda column: _flop(column.flops))
    add("device time a round", lambda column: _seconds(column.seconds))
    add("server memory, counted", lambda column: _bytes(column.server_memory["peak"]))
    add("server operations", lambda column: _flop(column.server_flops))
    add("server time", lambda column: _seconds(column.server_seconds))
    add("tokens through the large LM", lambda column: _spent(column, list(column.large_tokens)))
    for what, phases in _PURPOSES.items():
        if set(phases) & set(columns[0].large_tokens):
            add(f"  {what}", functools.partial(_spent, phases=phases))
    if plan.rates.price is not None:
        add("price of these tokens", lambda column: "-" if column.money is None else f"{column.money:,.2f}")
    add("operations of a written token", _written)
    return table


def plan_notes(plan: Plan) -> list[str]:
    """What the table rests on, and what it comes to: sentences."""
    ours, *others = plan.columns
    rates, config = plan.rates, plan.config
    notes = [
        f"{plan.num_sampled} of {plan.num_devices} devices train in each of {config.num_server_rounds} rounds; "
        f"distillation: {config.distillation.mode}; wire: {config.wire.dtype}.",
        f"Times are operations at {rates.device_flops:.3g} a second on a device and {rates.server_flops:.3g} on the "
        "server (--device-flops, --server-flops); a server that writes token by token is slower than that.",
    ]
    notes += [
        f"Beside '{other.title}' a device needs {_percent(ours.bytes_up, other.bytes_up)} of the bytes, "
        f"{_percent(ours.memory.state(), other.memory.state())} of the counted memory and "
        f"{_percent(ours.flops, other.flops)} of the operations."
        for other in others
    ]
    if config.model.large_url:
        notes.append(
            f"The large LM is behind {config.model.large_url} and was not asked: what it does there is not counted, "
            "and devices cannot tune it. Its tokens are counted once; a service reads a text again with every request, "
            "so that written answers cost more there (remote.token-budget is a limit; docs/remote.md)."
        )
    if plan.assumed:
        notes.append("Assumed: " + "; ".join(plan.assumed) + ".")
    return notes


def beside_run(plan: Plan, costs: Mapping[str, float]) -> list[list[str]]:
    """What was planned beside what a run measured, as cells of text, the head first.

    Args:
        plan: Of the run's config.
        costs: Of the run's ``results.json``.
    """
    planned = plan.columns[0].to_json()
    table = [["", "planned", "measured", "planned / measured"]]
    for name, (label, write) in _MEASURED.items():
        if name in costs and name in planned:
            ratio = f"{planned[name] / costs[name]:.3f}" if costs[name] else "-"
            table.append([label, write(planned[name]), write(costs[name]), ratio])
    if costs.get("device_seconds_per_round"):
        assumed = plan.rates.device_flops
        found = costs["device_flops_per_round"] / costs["device_seconds_per_round"]
        table.append(["operations a second of a device", _flop(assumed), _flop(found), f"{assumed / found:.3f}"])
    return table


def _bytes(number: float) -> str:
    return _scaled(number, "B")


def _flop(number: float) -> str:
    return _scaled(number, "FLOP")


def _count(number: float) -> str:
    return f"{round(number):,}"


def _scaled(number: float, unit: str = "") -> str:
    """Three digits and a prefix of a thousand's power."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if number < 999.5:
            return f"{number:.3g} {prefix}{unit}".strip()
        number /= 1000
    return f"{number:.3g} E{unit}"


def _seconds(number: float) -> str:
    for size, unit in ((86400.0, "d"), (3600.0, "h"), (60.0, "min")):
        if number >= 2 * size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g} s"


def _percent(part: float, whole: float) -> str:
    percent = 100 * part / whole
    return f"{_count(percent) if percent >= 999.5 else f'{percent:.3g}'} %"


def _written(column: Column) -> str:
    return "-" if column.decoding is None else f"{column.decoding:.3g} x large"


def _spent(column: Column, phases: Sequence[str]) -> str:
    """Tokens through the large model in these phases."""
    found = [column.large_tokens[phase] for phase in phases if phase in column.large_tokens]
    return _count(sum(found)) if found else "-"


_MEASURED: Mapping[str, tuple[str, Callable[[float], str]]] = {
    "bytes_down_per_device_and_round": ("bytes to a device, a round", _bytes),
    "bytes_up_per_device_and_round": ("bytes from it", _bytes),
    "device_state_bytes": ("its weights, gradients and moments", _bytes),
    "device_memory_growth_bytes": ("growth of its memory over the task", _bytes),
    "device_peak_memory_bytes": ("memory of its process", _bytes),
    "device_tokens_per_round": ("tokens it trains on, a round", _count),
    "device_flops_per_round": ("operations of that", _flop),
    "server_large_tokens": ("tokens through the large LM", _count),
    "server_large_tokens_validation": ("  to score rounds", _count),
    "server_large_tokens_shift": ("  to choose alpha and mask", _count),
    "server_large_tokens_distillation": ("  to distil after rounds", _count),
    "server_large_tokens_test": ("  to score the end", _count),
    "server_large_tokens_examples": ("  to show answers", _count),
    "server_large_tokens_curve": ("  to draw the curve of alphas", _count),
    "server_large_tokens_device": ("  to distil for the devices", _count),
}
"""What both a plan and ``results.json`` have."""
