"""The wire format between server and devices: what a message holds, and the checks before any of it is used.

A train message carries the arrays that tuning changes and a small config; the reply carries the same arrays, tuned,
and the device's measurements. Arrays are float32 in NumPy's own format, written and read without pickle. Whatever
arrives is compared with what was sent: the same names, the same shapes, float values, all of them finite.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray
from torch import Tensor

from fedpt_flwr.errors import DeviceError, ReplyError, RunError

ARRAYS, CONFIG, METRICS, REFUSAL, LIMITS = "arrays", "config", "metrics", "refusal", "limits"
"""Names of the records in a message."""

REQUIRED_METRICS = ("device", "server-round", "num-examples", "train-loss")
"""Metrics that every train reply has."""

COST_METRICS = (
    "train-loss-last",
    "num-steps",
    "batch-size",
    "num-examples-seen",
    "num-tokens",
    "num-answer-tokens",
    "seconds",
    "flops",
    "state-bytes",
    "peak-memory-bytes",
    "memory-growth-bytes",
    "memory-estimate-bytes",
)
"""Metrics that a train reply may have, for the ledger; no other is accepted."""

_FLOAT_DTYPES = ("float16", "float32", "float64")
_MAX_GROUPS = 1000


def to_array_record(arrays: Mapping[str, Tensor]) -> ArrayRecord:
    """Tensors of any float type as an ArrayRecord of float32."""
    return ArrayRecord(
        {name: Array(tensor.detach().to("cpu", torch.float32).numpy()) for name, tensor in arrays.items()}
    )


def to_tensors(record: ArrayRecord) -> dict[str, Tensor]:
    """An ArrayRecord that has been checked, as float32 tensors of their own memory."""
    return {name: torch.from_numpy(array.numpy().astype(np.float32, copy=True)) for name, array in record.items()}


def message_bytes(content: RecordDict) -> int:
    """Bytes of a message's records as serialised: array data with their headers, names, metrics and config."""
    arrays = sum(record.count_bytes() for record in content.array_records.values())
    others = [*content.metric_records.values(), *content.config_records.values()]
    return arrays + sum(len(record.deflate()) for record in others)


def check_arrays(record: ArrayRecord, sent: ArrayRecord, *, place: str) -> ArrayRecord:
    """Check arrays that came over the wire against those that were sent out.

    Args:
        record: What arrived.
        sent: What the device was given: the names and shapes that must come back.
        place: Who and when, for the error.

    Returns:
        The arrays as float32, in the order of ``sent``.

    Raises:
        ReplyError: Names, shapes or types differ, an array cannot be decoded, or a value is not finite.
    """
    if record.keys() != sent.keys():
        missing, extra = sorted(sent.keys() - record.keys()), sorted(record.keys() - sent.keys())
        raise ReplyError(
            f"a reply must hold the {len(sent)} arrays that were sent",
            value=f"{len(missing)} missing {missing[:1]}, {len(extra)} unknown {extra[:1]}",
            place=place,
            remedy="was the device started with other tuning settings or another model.small?",
        )
    return ArrayRecord({name: Array(_checked(name, record[name], sent[name], place)) for name in sent})


def _checked(name: str, array: Array, sent: Array, place: str) -> NDArray[np.float32]:
    where = f"{place}: array {name}"
    shape = tuple(sent.shape)
    # The record's own claims first: decoding must not be asked to build an array of another size.
    if tuple(array.shape) != shape:
        raise ReplyError(
            f"must have shape {shape}",
            value=tuple(array.shape),
            place=where,
            remedy="was the device started with another lora-rank or model.small?",
        )
    if array.dtype not in _FLOAT_DTYPES:
        raise ReplyError("must be of a float type", value=array.dtype, place=where)
    if len(array.data) > 8 * math.prod(shape) + 4096:
        raise ReplyError("holds more bytes than its shape needs", value=len(array.data), place=where)
    if not array.data.startswith(np.lib.format.MAGIC_PREFIX):  # numpy would open an archive, too
        raise ReplyError("must be in NumPy's format", value=array.data[:8], place=where)
    try:
        values = array.numpy()
    except Exception as error:  # a made-up header fails in any way: TokenError, IndexError, OverflowError
        raise ReplyError(f"cannot be decoded ({error})", place=where) from error
    if values.shape != shape or str(values.dtype) not in _FLOAT_DTYPES:
        raise ReplyError(f"must hold floats of shape {shape}", value=(str(values.dtype), values.shape), place=where)
    with np.errstate(over="ignore"):
        values = values.astype(np.float32, copy=False)
    if not np.isfinite(values).all():
        raise ReplyError(
            f"{int((~np.isfinite(values)).sum())} of its {values.size} values are not finite numbers",
            place=where,
            remedy="lower train.learning-rate on this device, or look at its data",
        )
    return values


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DeviceCard:
    """What a device says of itself before the first round.

    Attributes:
        device: Its stable number: ``partition-id`` of its node config, else ``device-id``.
        num_examples: Size of its shard; 0 means it is left out.
        groups: Examples per group, empty where the data is the device's own.
        code_hash: Hash of the code that it runs.
    """

    device: int
    num_examples: int
    groups: Mapping[str, int]
    code_hash: str

    def to_content(self) -> RecordDict:
        """As the content of a reply."""
        return RecordDict(
            {
                CONFIG: ConfigRecord(
                    {
                        "device": self.device,
                        "num-examples": self.num_examples,
                        "groups": json.dumps(dict(self.groups)),
                        "code-hash": self.code_hash,
                    }
                )
            }
        )

    def shard(self) -> dict[str, Any]:
        """Who holds how much of what: an entry of a run's ``shards.json``."""
        return {"device": self.device, "num_examples": self.num_examples, "groups": dict(self.groups)}

    @classmethod
    def from_shard(cls, shard: Any, *, place: str) -> DeviceCard:
        """The inverse of :meth:`shard`; which code the device ran is not known.

        Raises:
            RunError: Something is missing or has another type.
        """
        found = shard if isinstance(shard, dict) else {}
        groups = found.get("groups")
        counts = [
            found.get("device"),
            found.get("num_examples"),
            *(groups.values() if isinstance(groups, dict) else []),
        ]
        if not isinstance(groups, dict) or not all(map(_is_count, counts)):
            raise RunError("must say device, num_examples and groups of every device", value=shard, place=place)
        return cls(device=found["device"], num_examples=found["num_examples"], groups=groups, code_hash="")

    @classmethod
    def from_content(cls, content: RecordDict, *, place: str) -> DeviceCard:
        """Read and check a card.

        Raises:
            ReplyError: Something is missing or has another type.
        """
        config = content.config_records.get(CONFIG, ConfigRecord())
        device, num_examples = config.get("device"), config.get("num-examples")
        if not _is_count(device) or not _is_count(num_examples):
            raise ReplyError("a device must say its number and its number of examples", value=dict(config), place=place)
        try:
            groups = json.loads(str(config.get("groups", "{}")))
            groups = {str(name): int(count) for name, count in list(groups.items())[:_MAX_GROUPS]}
        except (ValueError, AttributeError, TypeError, OverflowError, RecursionError):
            groups = {}
        return cls(device=device, num_examples=num_examples, groups=groups, code_hash=str(config.get("code-hash", "")))


def check_metrics(content: RecordDict, *, server_round: int, card: DeviceCard, place: str) -> dict[str, float]:
    """The numbers of a train reply, after checks.

    Args:
        content: The reply.
        server_round: The round that it must be of.
        card: What the device said of itself before: it cannot be another device, or have more examples.
        place: Who and when, for the error.

    Raises:
        ReplyError: There is not one record of numbers, one is unknown, negative or not finite, or they contradict the
            round or the card.
    """
    if len(content.metric_records) != 1 or METRICS not in content.metric_records:
        raise ReplyError("a reply must hold one record of metrics", value=sorted(content.metric_records), place=place)
    metrics: dict[str, float] = {}
    for name, value in content.metric_records[METRICS].items():
        if name not in REQUIRED_METRICS + COST_METRICS:
            raise ReplyError("unknown metric", value=name, place=place)
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value < 0:
            raise ReplyError(f"the metric {name} must be a finite number of at least 0", value=value, place=place)
        metrics[name] = value
    missing = [name for name in REQUIRED_METRICS if name not in metrics]
    if missing:
        raise ReplyError(f"the metric {missing[0]} must be there", value=sorted(metrics), place=place)
    if metrics["server-round"] != server_round:
        raise ReplyError(f"the reply must be of round {server_round}", value=metrics["server-round"], place=place)
    if metrics["device"] != card.device:
        raise ReplyError(f"the reply must be of device {card.device}", value=metrics["device"], place=place)
    if not _is_count(metrics["num-examples"]) or not 1 <= metrics["num-examples"] <= card.num_examples:
        raise ReplyError(
            f"num-examples must be a whole number from 1 to the {card.num_examples} that the device said it has",
            value=metrics["num-examples"],
            place=place,
        )
    return metrics


def refusal(reason: str) -> RecordDict:
    """The content of a reply by which a device declines, with the sentence that says why."""
    return RecordDict({REFUSAL: ConfigRecord({"reason": reason})})


def refusal_reason(content: RecordDict) -> str | None:
    """Why a device declined, or None if it did not."""
    record = content.config_records.get(REFUSAL)
    return None if record is None else str(record.get("reason", "no reason given"))[:2000]


def code_hash(*files: Path) -> str:
    """A hash of this package's modules and of the files given: what must be the same on server and devices."""
    package = Path(__file__).parent
    digest = hashlib.sha256()
    for path in [*sorted(package.rglob("*.py")), *files]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def check_code(expected: str, found: str) -> None:
    """Refuse to work together with other code.

    Raises:
        DeviceError: The hashes differ.
    """
    if expected != found:
        raise DeviceError(
            f"server and device must run the same code; the server has {expected}, this device {found}",
            place=str(Path(__file__).parent),
            remedy="install the same version on both; in simulation end the background flower-superlink process and "
            "run again (devices may import the package from the folder in which that process was started)",
        )


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
