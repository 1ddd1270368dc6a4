"""The wire format between server and devices: what a message holds, and the checks before any of it is used.

A train message carries the arrays that tuning changes and a small config; the reply carries the same arrays, tuned,
and the device's measurements. Arrays are in NumPy's own format, written and read without pickle, in the type that
``wire.dtype`` names. Whatever arrives is compared with what was sent: the same names, the same shapes, values of that
type, all of them finite.

With a type of half the bytes, the server sends its arrays rounded to it and a device sends back what it changed,
rounded to it: a change is small beside the array it is a change of, and so is its error. The server adds changes to
the arrays that it did not round, in float32, so that no error is carried from round to round.

With ``int8`` a change is sent in 8 bits a value (:mod:`fedpt_flwr.quantise`), and what that loses can be added to the
device's next change. The server's arrays themselves have no such slack: they go out as float16.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray
from torch import Tensor

from fedpt_flwr.errors import ChangeError, DeviceError, ReplyError, RunError, WireError
from fedpt_flwr.quantise import check_packed, packed_size, quantised_with_feedback, restored

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
    "mask-seconds",
)
"""Metrics that a train reply may have, for the ledger; no other is accepted."""

PRIVATE_METRICS = ("device", "server-round", "num-examples")
"""Metrics that the train reply of a private run has, none of which depends on the device's data; no other is accepted
but what the clipping itself needs. The number of examples is 1, which is what every device then counts."""

# NumPy has no bfloat16: its bits.
_STORED_AS = {"float32": "float32", "float16": "float16", "bfloat16": "uint16", "int8": "int8"}
_LARGEST = {"float16": 65504.0, "bfloat16": 3.39e38}
_LARGEST_METRIC = 1e30  # their sums over devices and rounds stay finite, and no round takes so many operations
_MAX_GROUPS = 1000


def sent_as(wire_dtype: str) -> str:
    """Type of what the server sends where ``wire.dtype`` is this: the same, but for ``int8``."""
    return "float16" if wire_dtype == "int8" else wire_dtype


def to_array_record(arrays: Mapping[str, Tensor], dtype: str = "float32", *, place: str = "") -> ArrayRecord:
    """Tensors of any float type as an ArrayRecord.

    Args:
        arrays: The tensors.
        dtype: Type on the wire: ``float32``, ``float16`` or ``bfloat16``.
        place: Who and when, for the error.

    Raises:
        WireError: A value is finite, and too large for ``dtype``.
    """
    return ArrayRecord(
        {name: _packed(name, tensor.detach().to("cpu", torch.float32), dtype, place) for name, tensor in arrays.items()}
    )


def to_wire(record: ArrayRecord, dtype: str, *, place: str) -> ArrayRecord:
    """What the server sends of its float32 arrays: themselves, or rounded to ``dtype``.

    Raises:
        WireError: A value is too large for ``dtype``.
    """
    if dtype == "float32":
        return ArrayRecord(dict(record))  # another record of the same bytes
    return ArrayRecord(
        {name: _packed(name, torch.from_numpy(array.numpy()), dtype, place) for name, array in record.items()}
    )


def to_reply(arrays: Mapping[str, Tensor], received: ArrayRecord, dtype: str, *, place: str) -> ArrayRecord:
    """What a device sends back: its arrays in float32, or, in a shorter type, what it changed.

    Args:
        arrays: The tuned arrays, by name.
        received: What it was sent, checked.
        dtype: Type on the wire, not ``int8``: see :func:`to_int8_reply`.
        place: Who and when, for the error.

    Raises:
        WireError: A change is too large for ``dtype``.
    """
    if dtype == "float32":
        return to_array_record(arrays)
    return ArrayRecord(
        {
            name: _packed(name, tensor - torch.from_numpy(_widened(received[name], dtype)), dtype, place)
            for name, tensor in arrays.items()
        }
    )


def changes_of(
    arrays: Mapping[str, Tensor], received: ArrayRecord, dtype: str
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """What a device changed, before anything is made of it for the wire.

    Args:
        arrays: The tuned arrays, by name.
        received: What it was sent, checked.
        dtype: Type on the wire.

    Yields:
        Names, in their order, and float32 changes.
    """
    for name in sorted(arrays):
        tuned = arrays[name].detach().to("cpu", torch.float32).numpy()
        yield name, np.asarray(tuned - _widened(received[name], dtype))


def to_int8_reply(
    arrays: Mapping[str, Tensor], received: ArrayRecord, residual: Mapping[str, NDArray[np.float32]]
) -> tuple[ArrayRecord, dict[str, NDArray[np.float32]]]:
    """What a device sends back with ``int8``: what it changed and what earlier rounds lost of that, in 8 bits a value.

    Args:
        arrays: The tuned arrays, by name.
        received: What it was sent, checked.
        residual: What earlier rounds lost, by name; empty: nothing.

    Returns:
        What is sent, and what is lost now.
    """
    sent: dict[str, Array] = {}
    lost: dict[str, NDArray[np.float32]] = {}
    for name, tensor in arrays.items():
        change = np.asarray(tensor.numpy() - _widened(received[name], sent_as("int8")))
        packed, lost[name] = quantised_with_feedback(change, residual.get(name))
        sent[name] = Array(packed)
    return ArrayRecord(sent), lost


def from_reply(record: ArrayRecord, sent: ArrayRecord, dtype: str) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """A device's arrays, out of a reply that has been checked, one after the other.

    Args:
        record: The reply's arrays.
        sent: The server's own arrays of this round, float32, not rounded.
        dtype: Type on the wire.

    Yields:
        Names and float32 values, perhaps read-only views of the reply.
    """
    for name, array in record.items():
        own = _view(sent[name])
        values = restored(_view(array), own.shape) if dtype == "int8" else _widened(array, dtype)
        yield name, values if dtype == "float32" else np.asarray(own + values)


def in_type(record: ArrayRecord, dtype: str) -> ArrayRecord:
    """The same arrays in another type of NumPy's, ``float32`` or ``float64``."""
    return ArrayRecord({name: Array(np.asarray(array.numpy(), dtype)) for name, array in record.items()})


def to_tensors(record: ArrayRecord, dtype: str = "float32") -> dict[str, Tensor]:
    """An ArrayRecord that has been checked, as float32 tensors of their own memory."""
    return {name: torch.from_numpy(_widened(array, dtype).copy()) for name, array in record.items()}


def as_tensors(record: ArrayRecord) -> dict[str, Tensor]:
    """A record of float32 as tensors that share its memory: they must never be written to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
        return {name: torch.from_numpy(_view(array)) for name, array in record.items()}


def _packed(name: str, tensor: Tensor, dtype: str, place: str) -> Array:
    if dtype == "float32":
        return Array(tensor.numpy())
    short = tensor.to(getattr(torch, dtype))
    # A number that is not finite is left as it is: that is found where it arrives, and said of the device's training.
    too_large = torch.isinf(short) & torch.isfinite(tensor)
    if too_large.any():
        raise WireError(
            f"{dtype} holds numbers up to {_LARGEST[dtype]:g}, which {int(too_large.sum())} of {tensor.numel()} exceed",
            value=float(tensor[too_large].abs().max()),
            place=f"{place}: array {name}",
            remedy="set wire.dtype='float32'" + (" or 'bfloat16'" if dtype == "float16" else ""),
        )
    return Array((short.view(torch.uint16) if dtype == "bfloat16" else short).numpy())


def _widened(array: Array, dtype: str) -> NDArray[np.float32]:
    """An array that has been checked, not of ``int8``, as float32: where it is that already, a read-only view."""
    values = _view(array)
    if dtype == "bfloat16":
        return np.asarray(values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32, copy=False)


def _view(array: Array) -> NDArray[Any]:
    """What ``Array.numpy`` gives, without a copy, read-only; of NumPy's format 1.0 alone, which is what arrives.

    Raises:
        Exception: Of any type: the header is made up.
    """
    if array.stype != "numpy.ndarray":
        raise ValueError(f"unknown serialization {array.stype}")
    file = io.BytesIO(array.data)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("unknown version of NumPy's format")
    shape, columns_first, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.hasobject:
        raise ValueError("objects are not read")
    values = np.frombuffer(array.data, dtype, count=math.prod(shape), offset=file.tell())
    return values.reshape(shape, order="F" if columns_first else "C")


def message_bytes(content: RecordDict) -> int:
    """Bytes of a message's records as serialised: array data with their headers, names, metrics and config."""
    arrays = sum(record.count_bytes() for record in content.array_records.values())
    others = [*content.metric_records.values(), *content.config_records.values()]
    return arrays + sum(len(record.deflate()) for record in others)


def array_bytes(shapes: Mapping[str, Sequence[int]], dtype: str) -> int:
    """Bytes that arrays of these shapes take in a message, as :func:`message_bytes` counts them; none is made.

    Args:
        shapes: By name.
        dtype: Type on the wire.
    """
    stored = np.dtype(_STORED_AS[dtype])
    total = 0
    for name, shape in shapes.items():
        header = io.BytesIO()
        lies_as = _stored_shape(tuple(shape), dtype)
        described = {"descr": np.lib.format.dtype_to_descr(stored), "fortran_order": False, "shape": lies_as}
        np.lib.format.write_array_header_1_0(header, described)
        total += len(name) + header.tell() + stored.itemsize * math.prod(lies_as)
    return total


def _stored_shape(shape: tuple[int, ...], dtype: str) -> tuple[int, ...]:
    """How an array of this shape lies on the wire."""
    return (packed_size(math.prod(shape)),) if dtype == "int8" else shape


def check_arrays(record: ArrayRecord, sent: ArrayRecord, *, place: str, dtype: str = "float32") -> ArrayRecord:
    """Check arrays that came over the wire against those that were sent out.

    Args:
        record: What arrived.
        sent: What the device was given: the names and shapes that must come back.
        place: Who and when, for the error.
        dtype: Type on the wire.

    Returns:
        The arrays that arrived, in the order of ``sent``; nothing is copied.

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
    for name in sent:
        _check_array(name, record[name], tuple(sent[name].shape), place, dtype)
    return ArrayRecord({name: record[name] for name in sent})


def _check_array(name: str, array: Array, shape: tuple[int, ...], place: str, dtype: str) -> None:
    where = f"{place}: array {name}"
    stored, num_values = np.dtype(_STORED_AS[dtype]), math.prod(shape)
    shape = _stored_shape(shape, dtype)
    # The record's own claims first: decoding must not be asked to build an array of another size.
    if tuple(array.shape) != shape:
        raise ReplyError(
            f"must have shape {shape}",
            value=tuple(array.shape),
            place=where,
            remedy="was the device started with another lora-rank or model.small?",
        )
    if array.dtype != stored.name:
        what = dtype if dtype == stored.name else f"{dtype}, carried as {stored.name}"
        raise ReplyError(f"must be {what}, as wire.dtype says", value=array.dtype, place=where)
    if len(array.data) > stored.itemsize * math.prod(shape) + 4096:
        raise ReplyError("holds more bytes than its shape needs", value=len(array.data), place=where)
    if not array.data.startswith(np.lib.format.MAGIC_PREFIX):  # numpy would open an archive, too
        raise ReplyError("must be in NumPy's format", value=array.data[:8], place=where)
    try:
        values = _view(array)
    except Exception as error:  # a made-up header fails in any way: TokenError, IndexError, OverflowError
        raise ReplyError(f"cannot be decoded ({error})", place=where) from error
    if values.shape != shape or values.dtype != stored:
        raise ReplyError(
            f"must hold {stored.name} of shape {shape}", value=(str(values.dtype), values.shape), place=where
        )
    if dtype == "int8":
        wrong = check_packed(values, num_values)
        if wrong:
            raise ChangeError(
                wrong, place=where, remedy="lower train.learning-rate on this device, or look at its data"
            )
        return
    finite = np.isfinite(_widened(array, dtype))
    if not finite.all():
        raise ChangeError(
            "some of its values are not finite numbers",
            place=where,
            remedy="lower train.learning-rate on this device, or look at its data",
        )


def check_words(
    record: ArrayRecord, sizes: Mapping[str, int], dtypes: Mapping[str, np.dtype[Any]], *, place: str
) -> dict[str, NDArray[Any]]:
    """Check arrays of whole numbers that came over the wire.

    Args:
        record: What arrived.
        sizes: How many numbers each array must have, in one dimension.
        dtypes: Of which type they must be.
        place: Who and when, for the error.

    Returns:
        Read-only views of what arrived.

    Raises:
        ReplyError: Names, sizes or types differ, or an array cannot be decoded.
    """
    if record.keys() != sizes.keys():
        raise ReplyError(f"a reply must hold the arrays {', '.join(sizes)}", value=sorted(record)[:5], place=place)
    found = {}
    for name, size in sizes.items():
        where, array, stored = f"{place}: array {name}", record[name], dtypes[name]
        if tuple(array.shape) != (size,) or array.dtype != stored.name:
            claimed = (array.dtype, tuple(array.shape))
            raise ReplyError(f"must be {size} numbers of type {stored.name}", value=claimed, place=where)
        if len(array.data) > stored.itemsize * size + 4096:
            raise ReplyError("holds more bytes than its shape needs", value=len(array.data), place=where)
        try:
            words = _view(array)
        except Exception as error:  # a made-up header fails in any way
            raise ReplyError(f"cannot be decoded ({error})", place=where) from error
        if words.shape != (size,) or words.dtype != stored:
            raise ReplyError(
                f"must hold {size} numbers of type {stored.name}", value=(str(words.dtype), words.shape), place=where
            )
        found[name] = words
    return found


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DeviceCard:
    """What a device says of itself before the first round.

    Attributes:
        device: Its stable number: ``partition-id`` of its node config, else ``device-id``.
        num_examples: Size of its shard; 0 means it is left out.
        groups: Examples per group, empty where the data is the device's own.
        code_hash: Hash of the code that it runs.
        lora_rank: Rank of its adapter where that is not the run's; else 0.
    """

    device: int
    num_examples: int
    groups: Mapping[str, int]
    code_hash: str
    lora_rank: int = 0

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
                        "lora-rank": self.lora_rank,
                    }
                )
            }
        )

    def shard(self) -> dict[str, Any]:
        """Who holds how much of what: an entry of a run's ``shards.json``."""
        shard = {"device": self.device, "num_examples": self.num_examples, "groups": dict(self.groups)}
        return shard | ({"lora_rank": self.lora_rank} if self.lora_rank else {})

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
            found.get("lora_rank", 0),
            *(groups.values() if isinstance(groups, dict) else []),
        ]
        if not isinstance(groups, dict) or not all(map(_is_count, counts)):
            raise RunError("must say device, num_examples and groups of every device", value=shard, place=place)
        return cls(
            device=found["device"],
            num_examples=found["num_examples"],
            groups=groups,
            code_hash="",
            lora_rank=found.get("lora_rank", 0),
        )

    @classmethod
    def from_content(cls, content: RecordDict, *, place: str) -> DeviceCard:
        """Read and check a card.

        Raises:
            ReplyError: Something is missing or has another type.
        """
        config = content.config_records.get(CONFIG, ConfigRecord())
        device, num_examples, rank = config.get("device"), config.get("num-examples"), config.get("lora-rank", 0)
        if not _is_count(device) or not _is_count(num_examples) or not _is_count(rank):
            raise ReplyError("a device must say its number and its number of examples", value=dict(config), place=place)
        try:
            groups = json.loads(str(config.get("groups", "{}")))
            groups = {str(name): int(count) for name, count in list(groups.items())[:_MAX_GROUPS]}
            "".join(groups).encode()  # half of a surrogate pair cannot be written to a file
        except (ValueError, AttributeError, TypeError, OverflowError, RecursionError):
            groups = {}
        if not all(map(_is_count, groups.values())):  # shards.json could not be read again
            groups = {}
        code = str(config.get("code-hash", ""))
        return cls(device=device, num_examples=num_examples, groups=groups, code_hash=code, lora_rank=rank)


def check_metrics(
    content: RecordDict,
    *,
    server_round: int,
    card: DeviceCard,
    place: str,
    required: Sequence[str] = REQUIRED_METRICS,
    optional: Sequence[str] = COST_METRICS,
) -> dict[str, float]:
    """The numbers of a train reply, after checks.

    Args:
        content: The reply.
        server_round: The round that it must be of.
        card: What the device said of itself before: it cannot be another device, or have more examples.
        place: Who and when, for the error.
        required: Metrics that must be there.
        optional: Metrics that may be there.

    Raises:
        ReplyError: There is not one record of numbers, one is unknown, negative or too large, or they contradict the
            round or the card.
    """
    if len(content.metric_records) != 1 or METRICS not in content.metric_records:
        raise ReplyError("a reply must hold one record of metrics", value=sorted(content.metric_records), place=place)
    metrics: dict[str, float] = {}
    for name, value in content.metric_records[METRICS].items():
        if name not in (*required, *optional):
            raise ReplyError("unknown metric", value=name, place=place)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= _LARGEST_METRIC:
            rule = f"the metric {name} must be a number from 0 to {_LARGEST_METRIC:g}"
            raise ReplyError(rule, value=value, place=place)
        metrics[name] = value
    missing = [name for name in required if name not in metrics]
    if missing:
        raise ReplyError(f"the metric {missing[0]} must be there", value=sorted(metrics), place=place)
    if metrics["server-round"] != server_round:
        raise ReplyError(f"the reply must be of round {server_round}", value=metrics["server-round"], place=place)
    if metrics["device"] != card.device:
        raise ReplyError(f"the reply must be of device {card.device}", value=metrics["device"], place=place)
    if "num-examples" not in metrics:
        return metrics
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
