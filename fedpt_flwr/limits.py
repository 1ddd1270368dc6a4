"""What a device can bear, as its own node config says: keys beside ``data-path`` that its operator sets.

The server's run config says what a round should be; these say how much of it this device does, and how. They are
checked like the keys of a run config, and travel with the device's reply into the ledger of costs.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping
from typing import Any

from fedpt_flwr.config import TrainConfig, TuningConfig
from fedpt_flwr.errors import DeviceError

OTHER_KEYS = ("partition-id", "num-partitions", "device-id", "data-path", "disclose")
"""Keys of a node config that say who a device is and where its data lies, and what it may say of them."""

_PRECISIONS = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}


def _limit(default: Any, doc: str, rule: str, holds: Callable[[Any], bool]) -> Any:
    return dataclasses.field(default=default, metadata={"doc": doc, "rule": rule, "holds": holds})


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_megabytes(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DeviceLimits:
    """Limits of one device; None where its node config sets none."""

    max_batch_size: int | None = _limit(
        None,
        "Examples per forward pass. A larger `train.batch-size` is passed in pieces whose gradients are added: the "
        "step learns from the same examples, and takes longer.",
        "must be a whole number of at least 1",
        _is_whole,
    )
    max_steps: int | None = _limit(
        None,
        "Optimizer steps per round, if the run asks for more. The device's weight in the mean stays its number of "
        "examples.",
        "must be a whole number of at least 1",
        _is_whole,
    )
    memory_limit_mb: float | None = _limit(
        None,
        "Memory of the ClientApp's process in MB (10^6 bytes); on a GPU, of the GPU. A round that would need more by "
        "the estimate below is declined before the model is loaded.",
        "must be a number greater than 0",
        _is_megabytes,
    )
    dtype: str | None = _limit(
        None,
        "Type in which this device computes, whatever `train.mixed-precision` says; with `tuning.mode='lora'` also "
        "that of the frozen weights in memory. What is tuned, and what travels, is float32.",
        "must be one of float32, bfloat16, float16",
        lambda value: isinstance(value, str) and value in _PRECISIONS,
    )
    lora_rank: int | None = _limit(
        None,
        "Rank of this device's adapter, at most `tuning.lora-rank`: it gets and sends the leading directions only, and "
        "the others stay for it as they are. With `tuning.lora-aggregation` `exact` or `frozen-a`.",
        "must be a whole number of at least 1",
        _is_whole,
    )
    threads: int | None = _limit(
        None,
        "CPU threads, in place of `threads.device`.",
        "must be a whole number from 1 to 1024",
        lambda value: _is_whole(value) and value <= 1024,
    )

    def apply(self, train: TrainConfig) -> TrainConfig:
        """A run's training as this device does it; its batches stay, see ``max_batch_size`` of ``train_locally``."""
        changes: dict[str, Any] = {}
        if self.max_steps is not None:
            changes["max_steps"] = min(self.max_steps, train.max_steps or self.max_steps)
        if self.dtype is not None:
            changes["mixed_precision"] = _PRECISIONS[self.dtype]
        return dataclasses.replace(train, **changes)

    def rank_of(self, tuning: TuningConfig, *, place: str) -> int:
        """Rank of this device's adapter where that is not the run's; else 0.

        Args:
            tuning: Of the run.
            place: Which device's, for the error.

        Raises:
            DeviceError: The run cannot have devices of other ranks, or not of this one.
        """
        if self.lora_rank is None or (tuning.mode == "lora" and self.lora_rank == tuning.lora_rank):
            return 0
        rule, remedy = other_rank(
            self.lora_rank, tuning.lora_rank if tuning.mode == "lora" else 0, tuning.lora_aggregation
        )
        if rule:
            raise DeviceError(rule, value=self.lora_rank, place=f"{place}, node config, lora-rank", remedy=remedy)
        return self.lora_rank

    def to_flat(self) -> dict[str, int | float | str]:
        """What is set, by the keys of the node config."""
        values = {_key(field.name): getattr(self, field.name) for field in dataclasses.fields(self)}
        return {key: value for key, value in values.items() if value is not None}


def other_rank(rank: int, run_rank: int, aggregation: str) -> tuple[str, str]:
    """Why a device's adapter cannot have this rank, and what to do; nothing if it can.

    Args:
        rank: Of the device's adapter, not ``run_rank``.
        run_rank: Of the server's; 0 if the run tunes no adapter.
        aggregation: The run's ``tuning.lora-aggregation``.
    """
    if not run_rank:
        return "this run tunes no adapter (tuning.mode='full')", "leave lora-rank out"
    if rank > run_rank:
        return f"must be at most the run's tuning.lora-rank of {run_rank}", "lower it, or leave it out"
    if aggregation == "average":
        return (
            "with tuning.lora-aggregation='average' all adapters must have one rank: the error of averaging their "
            "matrices apart grows with how differently the devices moved the directions that they share",
            "leave lora-rank out, or set tuning.lora-aggregation='exact' or 'frozen-a'",
        )
    return "", ""


def parse_limits(node_config: Mapping[str, Any], *, place: str) -> DeviceLimits:
    """The limits in a node config; its other keys are other apps' business, unless they look like one of ours.

    Args:
        node_config: Flat keys and values.
        place: Which device's, for the error.

    Raises:
        DeviceError: Names every value that is none, and every key that seems to be mistyped.
    """
    values: dict[str, Any] = {}
    problems: list[DeviceError] = []
    fields = {_key(field.name): field for field in dataclasses.fields(DeviceLimits)}
    for key, value in node_config.items():
        where = f"{place}, node config, {key}"
        if key in fields:
            values[fields[key].name] = value
            if not fields[key].metadata["holds"](value):
                remedy = f"restart its SuperNode with another {key} in --node-config, or without"
                problems.append(DeviceError(fields[key].metadata["rule"], value=value, place=where, remedy=remedy))
        elif key not in OTHER_KEYS and (close := difflib.get_close_matches(key, fields, n=1, cutoff=0.8)):
            remedy = f"did you mean {close[0]}? Restart its SuperNode with that in --node-config"
            problems.append(DeviceError("is not a key of this app", place=where, remedy=remedy))
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise DeviceError(f"{len(problems)} limits are wrong", place=place, problems=problems)
    return DeviceLimits(**values)


def limits_markdown() -> str:
    """The table of limits in ``docs/deployment.md``."""
    lines = ["| key | meaning | rule |", "| --- | --- | --- |"]
    for field in dataclasses.fields(DeviceLimits):
        lines.append(f"| `{_key(field.name)}` | {field.metadata['doc']} | {field.metadata['rule']} |")
    return "\n".join(lines) + "\n"


def _key(name: str) -> str:
    return name.replace("_", "-")
