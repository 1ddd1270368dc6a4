"""What a run writes about itself: the ledger of costs, ``results.json``, and the table at the end of the log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedpt_flwr.config import RunConfig
from fedpt_flwr.scoring import Scores, render_table, results_table, verdict

_MEGABYTE = 1e6


def device_cost_row(
    server_round: int, device: int, *, bytes_down: int, bytes_up: int, metrics: Mapping[str, float], refused: str
) -> dict[str, Any]:
    """One device's line of ``costs.jsonl``: what it reported, and what the server measured itself.

    Args:
        server_round: From 1.
        device: Its number.
        bytes_down: Bytes of the train message as serialised.
        bytes_up: Bytes of its reply as serialised.
        metrics: What it reported.
        refused: Why its reply was not used, or empty.
    """
    row: dict[str, Any] = {"round": server_round, "device": device, "bytes_down": bytes_down, "bytes_up": bytes_up}
    if refused:
        return row | {"refused": refused}
    reported = {name.replace("-", "_"): value for name, value in metrics.items() if name != "server-round"}
    return reported | row


def server_cost_row(server_round: int, phase: str, *, large_tokens: int, seconds: float) -> dict[str, Any]:
    """The server's line of ``costs.jsonl``: tokens that went through the large model, and the time it took."""
    return {
        "round": server_round,
        "device": "server",
        "phase": phase,
        "large_tokens": large_tokens,
        "seconds": round(seconds, 3),
    }


def run_results(
    scores: Scores, config: RunConfig, cost_rows: Sequence[Mapping[str, Any]], *, num_devices: int, seconds: float
) -> dict[str, Any]:
    """The contents of ``results.json``.

    Args:
        scores: Of the test items.
        config: Of the run.
        cost_rows: The lines of ``costs.jsonl``.
        num_devices: Devices that have examples.
        seconds: Time of the whole run.
    """
    return scores.to_json() | {
        "seed": config.seed,
        "rounds": config.num_server_rounds,
        "devices": num_devices,
        "costs": {"seconds": round(seconds, 2), **_summed_costs(cost_rows)},
    }


def _summed_costs(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means over devices and rounds, maxima of memory, and the server's sum."""
    server = [row for row in rows if row["device"] == "server"]
    devices = [row for row in rows if row["device"] != "server" and "refused" not in row]
    costs: dict[str, float] = {"server_large_tokens": sum(row["large_tokens"] for row in server)}
    means = {
        "bytes_up": "bytes_up_per_device_and_round",
        "bytes_down": "bytes_down_per_device_and_round",
        "seconds": "device_seconds_per_round",
        "flops": "device_flops_per_round",
        "num_tokens": "device_tokens_per_round",
    }
    maxima = {"state_bytes": "device_state_bytes", "peak_memory_bytes": "device_peak_memory_bytes"}
    for names, summed in ((means, lambda values: sum(values) / len(values)), (maxima, max)):
        for name, label in names.items():
            values = [row[name] for row in devices if name in row]
            if values:
                costs[label] = summed(values)
    return costs


def summary_lines(results: Mapping[str, Any], folder: Path) -> list[str]:
    """The end of the log: table, verdict, costs, and where everything lies."""
    costs = results["costs"]
    parts = [
        ("bytes_down_per_device_and_round", _MEGABYTE, "{:.2f} MB down"),
        ("bytes_up_per_device_and_round", _MEGABYTE, "{:.2f} MB up"),
        ("device_seconds_per_round", 1.0, "{:.2f} s of training"),
        ("device_state_bytes", _MEGABYTE, "{:.2f} MB of weights, gradients and optimizer state"),
    ]
    spent = ", ".join(text.format(costs[name] / unit) for name, unit, text in parts if name in costs)
    lines = ["", *render_table(results_table(results)).splitlines(), "", verdict(results), ""]
    if spent:
        lines.append(f"A device and round: {spent}")
    if "device_peak_memory_bytes" in costs:
        lines.append(f"Peak memory of a device's process: {costs['device_peak_memory_bytes'] / _MEGABYTE:.0f} MB")
    lines.append(f"Tokens through the large model, all of them for scoring: {costs['server_large_tokens']:,}")
    return [*lines, f"The run took {costs['seconds']:.0f} s; its folder is {folder}"]
