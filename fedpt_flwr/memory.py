"""How much memory a device's round will take, told before any of it is taken.

Weights, gradients and AdamW's moments are counted from the model's shapes. Activations are what torch's autograd keeps
for the backward pass of the largest batch: the forward pass is done once on the ``meta`` device, where tensors have
shapes and no memory, and every tensor that is kept is counted. docs/deployment.md has the formula and how it compares
with what processes really took.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedpt_flwr.config import ModelConfig, RunConfig, TrainConfig, TuningConfig
from fedpt_flwr.errors import DeviceError
from fedpt_flwr.free_memory import trim
from fedpt_flwr.models import make_tunable, model_without_weights, pick_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fedpt_flwr.data import TokenizedExample

LIBRARY_BYTES = 80_000_000
"""What a first round takes besides, as measured: modules that are imported late, the tokenizer, texts, allocators."""

UNTOLD_BASE_BYTES = 600_000_000
"""Taken for what a process has before its first round where the system does not tell."""

_MEGABYTE = 1e6
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_FLOAT_BYTES = 4
_is_given_back = threading.Event()  # by this process, since give_freed_memory_back
BYTES_OF = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Of one weight, by type."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MemoryNeed:
    """Bytes that a round takes on top of the process as it is.

    Attributes:
        weights: The small model.
        tuned: What is tuned, as float32: the size of its gradients, of each of AdamW's two moments, of a message.
        copies: Further copies of ``tuned`` or parts of it: FedProx's, and those of a shorter type.
        activations: What the backward pass of the largest batch needs.
        clipping: What it takes to clip a change that is private, on the device.
    """

    weights: int
    tuned: int
    copies: int
    activations: int
    clipping: int = 0

    def state(self) -> int:
        """Weights, gradients and moments: what a device reports as ``state-bytes``, but for 4 bytes an array."""
        return self.weights + 3 * self.tuned

    def total(self) -> int:
        """The largest of the peaks, of unpacking the message, training and clipping, and what libraries take."""
        unpacking = 2 * self.weights + 3 * self.tuned
        training = self.state() + self.copies + self.activations
        return LIBRARY_BYTES + max(unpacking, training, self.weights + self.clipping)


def training_memory(
    model: ModelConfig,
    tuning: TuningConfig,
    train: TrainConfig,
    examples: Sequence[TokenizedExample],
    *,
    dtype: str,
    batch_size: int,
    with_fedprox: bool,
    with_clipping: bool = False,
) -> MemoryNeed:
    """What a round will take on this device.

    Args:
        model: Names the small model; its config is read, its weights are not.
        tuning: What is tuned.
        train: Precision and checkpointing.
        examples: The shard: the longest make the largest batch.
        dtype: Type in which frozen weights are held.
        batch_size: Examples per forward pass.
        with_fedprox: Whether the weights that a round begins with are kept.
        with_clipping: Whether the device clips its change.

    Raises:
        DeviceError: It cannot be told for this model.
        ModelError: There is no such model.
    """
    shape = _shape(model, tuning)
    return memory_of(
        shape,
        train,
        examples,
        dtype=dtype,
        batch_size=batch_size,
        with_fedprox=with_fedprox,
        with_clipping=with_clipping,
        ref=model.small,
    )


def memory_of(
    shape: Any,
    train: TrainConfig,
    examples: Sequence[TokenizedExample],
    *,
    dtype: str,
    batch_size: int,
    with_fedprox: bool,
    with_clipping: bool = False,
    ref: str,
) -> MemoryNeed:
    """What a round takes with a model on torch's ``meta`` device; the arguments are those of :func:`training_memory`.

    Args:
        shape: What :func:`tunable_shape` made.
        train: Precision and checkpointing.
        examples: The shard.
        dtype: Type in which frozen weights are held.
        batch_size: Examples per forward pass.
        with_fedprox: Whether the weights that a round begins with are kept.
        with_clipping: Whether the device clips its change.
        ref: What the user called the model.

    Raises:
        DeviceError: It cannot be told for this model.
    """
    rows = min(batch_size, len(examples))
    longest = max(len(example.prompt_ids) + len(example.answer_ids) for example in examples)
    # Of a batch with the longest example and the shortest prompt: packed or not, its scores begin where that one ends.
    scored = longest - min(len(example.prompt_ids) for example in examples) + 1
    answers = sum(sorted(len(example.answer_ids) for example in examples)[-rows:])
    frozen, tuned = (
        sum(weight.numel() for weight in shape.parameters() if weight.requires_grad == is_tuned)
        for is_tuned in (False, True)
    )
    tuned_bytes = _FLOAT_BYTES * tuned
    shortened = 2 * tuned if train.mixed_precision != "no" else 0  # autocast keeps a short copy during a pass
    kept = _kept_for_backward(shape, rows, longest, ref)
    if train.gradient_checkpointing:
        text = shape.config.get_text_config()
        layers = int(text.num_hidden_layers)
        kept = math.ceil(kept / layers) + layers * rows * longest * int(text.hidden_size) * _FLOAT_BYTES
    # Scores from the first answer on and their gradients; of answers also as float32, normalised, and their gradients.
    scores = shape.get_output_embeddings().weight.shape[0] * (2 * rows * scored + 3 * answers) * _FLOAT_BYTES
    return MemoryNeed(
        weights=BYTES_OF[dtype] * frozen + tuned_bytes,
        tuned=tuned_bytes,
        copies=shortened + (tuned_bytes if with_fedprox else 0),
        activations=kept + scores,
        # The change, what it is clipped from and to, and Flower's copies of them, most in float64: as measured.
        clipping=10 * tuned_bytes if with_clipping else 0,
    )


@functools.lru_cache(maxsize=1)
def _shape(model: ModelConfig, tuning: TuningConfig) -> Any:
    return tunable_shape(model_without_weights(model.small), tuning)


def tunable_shape(bare: PreTrainedModel, tuning: TuningConfig) -> Any:
    """A model without weights, ready to be tuned as if it had some; it is changed in place."""
    with torch.device("meta"):
        return make_tunable(bare, tuning, seed=0).train()


def _kept_for_backward(model: Any, rows: int, length: int, ref: str) -> int:
    """Bytes that autograd keeps of a forward pass, each storage once, weights not counted.

    Raises:
        DeviceError: The model's forward pass looks at values, which there are none of.
    """
    kept: dict[int, tuple[int, Any]] = {weight.untyped_storage()._cdata: (0, None) for weight in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept.setdefault(storage._cdata, (storage.nbytes(), storage))  # held, so that no other gets its address
        return tensor

    ids = torch.zeros((rows, length), dtype=torch.int64, device="meta")
    # A mask per pair of positions is taken as it is; some families want none instead, and make their own.
    masks = (torch.ones((rows, 1, length, length), dtype=torch.bool, device="meta"), None)
    for mask in masks:
        try:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                model(input_ids=ids, attention_mask=mask, use_cache=False)
        except (RuntimeError, NotImplementedError, ValueError) as error:
            failure = error
        else:
            return sum(size for size, _ in kept.values())
    raise DeviceError(
        f"the memory of this model's training cannot be told beforehand ({type(failure).__name__})",
        value=ref,
        place="memory-limit-mb",
        remedy="leave memory-limit-mb out of this device's node config, and limit its process instead",
    ) from failure


def check_fits(
    config: RunConfig,
    examples: Sequence[TokenizedExample],
    *,
    dtype: str,
    batch_size: int,
    with_fedprox: bool,
    base_bytes: int,
    limit_mb: float,
    place: str,
) -> int:
    """Decline a round that this device's memory would not hold.

    Args:
        config: Of the run, with this device's limits applied.
        examples: The shard.
        dtype: Type in which frozen weights are held.
        batch_size: Examples per forward pass.
        with_fedprox: Whether the weights that a round begins with are kept.
        base_bytes: What the process takes already; on a GPU that does not count.
        limit_mb: What it may take, in MB.
        place: Which device and round.

    Returns:
        The bytes by which the process will grow.

    Raises:
        DeviceError: It would not fit; says what it consists of, and which batch would fit.
    """

    def need(batch_size: int) -> MemoryNeed:
        return training_memory(
            config.model, config.tuning, config.train, examples,
            dtype=dtype, batch_size=batch_size, with_fedprox=with_fedprox,
            with_clipping=config.privacy.clips_on_devices,
        )  # fmt: skip

    base = 0 if pick_device(config.model.device).type == "cuda" else base_bytes
    wanted = need(batch_size)
    if base + wanted.total() <= limit_mb * _MEGABYTE:
        return wanted.total()
    smaller = [batch_size // 2**halvings for halvings in range(1, batch_size.bit_length())]
    fitting = next((size for size in smaller if base + need(size).total() <= limit_mb * _MEGABYTE), None)
    remedy = f"set max-batch-size={fitting}" if fitting else "shorten train.max-length, tune an adapter"
    raise DeviceError(
        f"training would take about {(base + wanted.total()) / _MEGABYTE:.0f} MB ({base / _MEGABYTE:.0f} are taken "
        f"already, weights {wanted.weights / _MEGABYTE:.0f}, gradients and moments {3 * wanted.tuned / _MEGABYTE:.0f}, "
        f"activations {wanted.activations / _MEGABYTE:.0f}, the rest for libraries and copies), more than this "
        "device's memory-limit-mb",
        value=limit_mb,
        place=place,
        remedy=f"{remedy}, or raise memory-limit-mb in its node config",
    )


def give_freed_memory_back() -> None:
    """Let large blocks go back to the system as soon as they are freed, with glibc; elsewhere this does nothing.

    By itself glibc keeps blocks of up to 32 MB for reuse, with holes between them: a device then takes up to twice what
    its tensors take, and a server, to which a model comes and goes in pieces with every reply, as much as several. The
    price: every large tensor begins with pages that the system has to clear, and training took half as long again.
    """
    _tell_glibc(keep_up_to=1 << 18)
    _is_given_back.set()


@contextmanager
def keeping_freed_memory() -> Iterator[None]:
    """Let glibc keep freed blocks while a model computes, as it does by itself, and give them back at the end.

    Does something only after :func:`give_freed_memory_back`.
    """
    if not _is_given_back.is_set():
        yield
        return
    _tell_glibc(keep_up_to=1 << 25)
    try:
        yield
    finally:
        _tell_glibc(keep_up_to=1 << 18)
        trim()


def _tell_glibc(*, keep_up_to: int) -> None:
    """Blocks of at least so many bytes are the system's own, and twice as much may lie free at the heap's end."""
    with suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, keep_up_to)
        mallopt(_M_TRIM_THRESHOLD, 2 * keep_up_to)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had, from Python, NumPy or torch."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and ("can't allocate memory" in str(error) or "bad_alloc" in str(error))
