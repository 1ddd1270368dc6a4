"""What a run writes about itself: the ledger of costs, ``results.json``, and the table at the end of the log."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedpt_flwr.config import RunConfig, StopConfig
from fedpt_flwr.errors import ConfigError, RunError
from fedpt_flwr.verdict import render_table, results_table, verdict

_log = logging.getLogger(__name__)

_MEGABYTE = 1e6

_FREE_KEYS = frozenset(
    {"resume", "output-dir", "remote.timeout-s", "remote.retries", "remote.concurrency", "remote.token-budget"}
    | {"remote.price-sent", "remote.price-received", "remote.cache", "remote.cache-mb", "keep-rounds"}
    | {"min-devices", "wait-timeout-s", "round-timeout-s", "max-failed-rounds"}
)
"""Keys that may change when a run goes on: its results do not depend on them, but for which devices answer in time."""


def device_cost_row(
    server_round: int,
    device: int,
    *,
    bytes_down: int,
    bytes_up: int,
    metrics: Mapping[str, float],
    refused: str,
    limits: Mapping[str, int | float | str] | None = None,
    update_norm: float | None = None,
) -> dict[str, Any]:
    """One device's line of ``costs.jsonl``: what it reported, and what the server measured itself.

    Args:
        server_round: From 1.
        device: Its number.
        bytes_down: Bytes of the train message as serialised.
        bytes_up: Bytes of its reply as serialised.
        metrics: What it reported.
        refused: Why its reply was not used, or empty.
        limits: What its node config limits, by key.
        update_norm: Norm of its change as it came; None where nobody looked.
    """
    row: dict[str, Any] = {"round": server_round, "device": device, "bytes_down": bytes_down, "bytes_up": bytes_up}
    if update_norm is not None:
        row["update_norm"] = update_norm
    if limits:
        row["limits"] = dict(limits)
    if refused:
        return row | {"refused": refused}
    reported = {name.replace("-", "_"): value for name, value in metrics.items() if name != "server-round"}
    return reported | row


def server_cost_row(
    server_round: int, phase: str, *, large_tokens: int, seconds: float, remote: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The server's line of ``costs.jsonl``: tokens that went through the large model, and the time it took.

    Args:
        server_round: From 1.
        phase: What was done.
        large_tokens: Tokens that would have gone through a large model that is here.
        seconds: How long it took.
        remote: What a remote large model has cost.
    """
    return {
        "round": server_round,
        "device": "server",
        "phase": phase,
        "large_tokens": large_tokens,
        "seconds": round(seconds, 3),
        **(remote or {}),
    }


def run_results(
    config: RunConfig,
    cost_rows: Sequence[Mapping[str, Any]],
    *,
    rounds: int,
    num_devices: int,
    seconds: float,
    resumed_after: int = 0,
) -> dict[str, Any]:
    """What ``results.json`` holds besides scores.

    Args:
        config: Of the run.
        cost_rows: The lines of ``costs.jsonl``.
        rounds: The last round.
        num_devices: Devices that have examples.
        seconds: Time of the whole run, or of its last part if it was resumed.
        resumed_after: The round after which that part began; 0: it is the whole run.
    """
    time = {"seconds": round(seconds, 2)} | ({"seconds_after_round": resumed_after} if resumed_after else {})
    return {
        "seed": config.seed,
        "rounds": rounds,
        "devices": num_devices,
        "costs": {**time, **_summed_costs(cost_rows)},
    }


def is_good_enough(course: Sequence[float], stop: StopConfig) -> bool:
    """Whether a run may end early.

    Args:
        course: The proxy's ``stop.metric`` on the validation items, round by round; NaN where there was none.
        stop: The rule.
    """
    if not stop.metric or not course:
        return False
    sign = -1.0 if stop.metric == "loss" else 1.0
    values = [sign * value if math.isfinite(value) else -math.inf for value in course]
    if stop.target and values[-1] >= sign * stop.target:
        return True
    return 0 < stop.patience <= len(values) - 1 - values.index(max(values))


def check_same_run(before: Mapping[str, Any], now: Mapping[str, Any], *, place: str) -> None:
    """Make sure that a resumed run is the same run.

    Args:
        before: Its ``config.json``.
        now: What ``config.json`` would be if the run began now.
        place: Its folder.

    Raises:
        ConfigError: A key of the run config differs, or a model or the held-out data is not what it was; says which.
        RunError: ``config.json`` is damaged.
    """
    for part, what in (("run_config", "keys"), ("fingerprints", "models"), ("data_hashes", "data sets")):
        was, new = before.get(part, {}), now[part]
        if not isinstance(was, dict):
            remedy = "put back the file as the run wrote it"
            raise RunError(f"its config.json must hold an object {part}", value=was, place=place, remedy=remedy)
        differing = sorted(name for name in {*was, *new} - _FREE_KEYS if was.get(name) != new.get(name))
        if differing:
            shown = ", ".join(f"{name} (was {was.get(name)!r}, is {new.get(name)!r})" for name in differing[:10])
            raise ConfigError(
                f"a resumed run must be the same run; of {len(new)} {what} {len(differing)} differ: {shown}",
                place=place,
                remedy="give what config.json there says, or start a new run without resume",
            )
    if before.get("code_hash") != now["code_hash"]:
        _log.warning("The code has changed since this run began: it may not end as it would have")


def _summed_costs(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means over devices and rounds, maxima of memory, and the server's sum."""
    server = [row for row in rows if row["device"] == "server"]
    devices = [row for row in rows if row["device"] != "server" and "refused" not in row]
    costs: dict[str, float] = {"server_large_tokens": sum(row["large_tokens"] for row in server)}
    for phase in dict.fromkeys(row["phase"] for row in server):
        costs[f"server_large_tokens_{phase}"] = sum(row["large_tokens"] for row in server if row["phase"] == phase)
    for name in dict.fromkeys(name for row in server for name in row if name.startswith("remote_")):
        costs[name] = sum(row.get(name, 0) for row in server)
    means = {
        "bytes_up": "bytes_up_per_device_and_round",
        "bytes_down": "bytes_down_per_device_and_round",
        "seconds": "device_seconds_per_round",
        "flops": "device_flops_per_round",
        "num_tokens": "device_tokens_per_round",
    }
    maxima = {
        "state_bytes": "device_state_bytes",
        "peak_memory_bytes": "device_peak_memory_bytes",
        "memory_growth_bytes": "device_memory_growth_bytes",
    }
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
    if "privacy" in results:
        lines += [privacy_line(results["privacy"]), ""]
    if spent:
        lines.append(f"A device and round: {spent}")
    if "device_peak_memory_bytes" in costs:
        lines.append(f"Peak memory of a device's process: {costs['device_peak_memory_bytes'] / _MEGABYTE:.0f} MB")
    if "device_memory_growth_bytes" in costs:
        growth = costs["device_memory_growth_bytes"] / _MEGABYTE
        lines.append(f"Growth of a device's memory over a task, in a fresh process: {growth:.0f} MB")
    taught = sum(costs.get(f"server_large_tokens_{phase}", 0) for phase in ("distillation", "device"))
    lines.append(
        f"Tokens through the large model: {costs['server_large_tokens']:,}, of which {taught:,} to distil and the rest "
        "to score"
    )
    if "remote_requests" in costs:
        price = f", at a price of {costs['remote_price']:.4f}" if "remote_price" in costs else ""
        lines.append(
            f"The remote large model: {costs['remote_requests']:,} requests, {costs['remote_retries']:,} repeated, "
            f"{costs['remote_tokens_sent']:,} tokens sent and {costs['remote_tokens_received']:,} received{price}; "
            f"{costs['remote_recalled']:,} answers were known already"
        )
    after = costs.get("seconds_after_round")
    part = f"After round {after}, where it was resumed, the run" if after else "The run"
    return [*lines, f"{part} took {costs['seconds']:.0f} s; its folder is {folder}"]


def privacy_line(privacy: Mapping[str, Any]) -> str:
    """What a private run has spent, in a sentence.

    Args:
        privacy: What ``results.json`` holds about it.
    """
    return (
        f"Privacy of each device: epsilon {privacy['epsilon']:.4g} at delta {privacy['delta']:g} after "
        f"{privacy['releases']} noisy means ({privacy['dp']}, noise multiplier {privacy['noise_multiplier']:g}, "
        f"{privacy['devices_per_round']} of {privacy['devices']} devices a round)"
    )
