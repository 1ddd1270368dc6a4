"""Weights prepared once for decoding, in place and layer by layer.

Decoding multiplies a few rows by every weight of a model, and torch takes two to three times as long for four rows as
for one. Two things help, and :func:`_product` says which for what: plain weights and loops that are compiled for few
rows (``few_rows.py``: float32 and bfloat16 with AVX2 or AVX512; needs the package numba), in large pages
(``huge_pages.py``); or oneDNN's own layout, in which a few rows cost little more than one, but one row of float32 costs
more than in plain weights.
:func:`prepare` exchanges the linear layers of a model for :class:`PackedLinear`, under which transformers' own
forward passes go on as ever; :func:`restore` brings the very layers back, bit for bit. There is one copy of a weight
at any time, packed or not; also where the plain one was a file, seen as memory.

What is packed: ``nn.Linear`` and transformers' ``Conv1D`` on a CPU that has a kernel for the weight's dtype.
Everything else stays as it is, and a model on CUDA as a whole, but for what :func:`join` does. So does a head that is
tied to the embedding where the layout is oneDNN's: lookups need the plain one, and a packed copy beside it would be
memory that the model did not take.

(``train.packing`` is another thing: short examples in one row, ``training.py``.)

Nothing here knows proxies; a frozen model and its weights are all there is.
"""

from __future__ import annotations

import copy
import ctypes
import mmap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedpt_flwr.errors import ModelError
from fedpt_flwr.free_memory import trim
from fedpt_flwr.huge_pages import Room, lies_in_room, rounded_up

# Builds of torch without oneDNN have neither.
_pack: Any = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
_multiply: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
_WITH_LOOPS = ("AVX2", "AVX512")

_TRIM_BYTES = 1 << 28
"""Weights that are given up until the system gets what glibc has kept of them."""
"""Processors, as torch calls them, for which there are loops for few rows."""
_PLAIN_DTYPES = (torch.float32, torch.bfloat16)
"""What they multiply with."""
_ROWS = 8
"""For how many rows oneDNN is to lay weights out; laid out for 1, more rows take longer."""


class _OneDnn:
    """Weights in a layout that only oneDNN can read."""

    keeps_plain = False

    def pack(self, rows: Tensor) -> Tensor:
        """A weight ``(out_features, in_features)``, laid out."""
        packed: Tensor = _pack(rows.contiguous(), _ROWS)
        return packed

    def multiply(self, x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
        """``(..., in_features)`` to ``(..., out_features)``."""
        product: Tensor = _multiply(x, packed, bias, "none", [], "")
        return product

    def unpack(self, packed: Tensor) -> Tensor:
        """The weight again."""
        dense: Tensor = packed.to_dense()
        return dense


class _FewRows:
    """Weights as they are, and a compiled loop for few rows."""

    keeps_plain = True

    def __init__(self) -> None:
        from fedpt_flwr import few_rows  # which needs a package that need not be there

        self.multiply = few_rows.multiply

    def pack(self, rows: Tensor) -> Tensor:
        """The weight, in the order of its outputs; a copy only if it lies otherwise."""
        return rows.contiguous()

    def unpack(self, packed: Tensor) -> Tensor:
        """The same tensor."""
        return packed


@cache
def _product(dtype: torch.dtype, for_loops: bool = False) -> _OneDnn | _FewRows | None:
    """How packed weights lie and are multiplied on this machine; None where nothing is known that is faster.

    Told by the instruction set and not timed, so that the bits of a model's scores do not depend on how busy the
    machine was.

    Args:
        dtype: Of the weights.
        for_loops: See :func:`prepare`.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    # oneDNN multiplies bfloat16 as fast as it is read, if the processor has instructions for it.
    gains = capability == "AVX2" or (capability.startswith("AVX512") and (for_loops or dtype == torch.float32))
    if gains and dtype in _PLAIN_DTYPES:
        with suppress(ImportError):
            return _FewRows()
    has_onednn = _pack is not None and _multiply is not None and torch.backends.mkldnn.is_available()
    return _OneDnn() if has_onednn else None


class _WithoutValues(nn.Parameter):
    """Stands for a weight that is packed: it has that one's shape, dtype and device, and no memory.

    torch multiplies by a tensor of its device ``meta``, which this one is, as if there were something to read, and
    what comes out is whatever lay in memory. So everything that is not a question about the weight itself is refused.
    """

    _ANSWERED: ClassVar = {
        "shape", "dtype", "layout", "ndim", "is_leaf", "requires_grad", "grad", "grad_fn", "nbytes", "itemsize",
        "is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized", "is_nested", "_backward_hooks",
        "retains_grad", "size", "numel", "dim", "element_size", "stride", "storage_offset", "is_contiguous",
        "is_floating_point", "is_complex", "data_ptr", "requires_grad_", "__len__",
    }  # fmt: skip

    _device: torch.device

    def __new__(cls, like: Tensor, requires_grad: bool) -> _WithoutValues:
        nothing = torch.empty_like(like, device="meta")
        made: _WithoutValues = torch.Tensor._make_subclass(cls, nothing, requires_grad)
        made._device = like.device
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where the packed weight is, and an adapter's weights should be."""
        return self._device

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func.__name__
        asked = func.__self__.__name__ if name in ("__get__", "__set__") else name
        if asked not in cls._ANSWERED:
            raise ModelError(
                "the weights of a model that is prepared for decoding can be neither read nor written",
                value=asked,
                remedy="undo that with restore() of the proxy, or packing.restore(model)",
            )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"weight of shape {tuple(self.shape)}, {self.dtype}, which is packed"

    def __deepcopy__(self, memo: dict[int, Any]) -> _WithoutValues:
        twin = memo[id(self)] = _restored_without_values(tuple(self.shape), self.dtype, self.device, self.requires_grad)
        return twin

    def __reduce_ex__(self, _: Any) -> Any:
        return _restored_without_values, (tuple(self.shape), self.dtype, self.device, self.requires_grad)


def _restored_without_values(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, requires_grad: bool
) -> _WithoutValues:
    made = _WithoutValues(torch.empty(shape, dtype=dtype, device="meta"), requires_grad)
    made._device = device
    return made


class PackedLinear(nn.Module):
    """A linear layer whose weight is laid out for decoding and can only be multiplied with.

    Its parameter ``weight`` keeps the name, shape and dtype of the plain layer's, so that who asks for these is
    answered, but has no values: whatever would read or write them fails instead of being wrong. ``state_dict()`` is
    right, for it unpacks.

    Args:
        layer: The layer that this one stands for. **Its weight is given up**, unless it is an embedding's as well: it
            gets the one without values.
        product: The layout.
        room: Where a weight that stays plain is to lie; one that is shared lies there already.
        is_shared: Whether something else needs the weight; only in a layout that keeps it plain.
    """

    prepared_for_decoding = True
    """What ``models.check_plain`` looks for."""

    num_exchanged: ClassVar[int] = 0
    """How often models of this process were prepared or restored: cheaper to ask than a model for all its parts."""

    def __init__(
        self, layer: nn.Linear | Conv1D, product: _OneDnn | _FewRows, room: Room, *, is_shared: bool = False
    ) -> None:
        super().__init__()
        self._product = product
        self._is_shared = is_shared
        weight = layer.weight
        self._is_transposed = isinstance(layer, Conv1D)
        dense = weight.detach()
        rows = dense.t() if self._is_transposed else dense
        self.out_features: int = rows.shape[0]
        self.in_features: int = rows.shape[1]
        self._packed: Tensor = product.pack(room.moved(rows) if product.keeps_plain and not is_shared else rows)
        if not is_shared:
            layer.weight = _WithoutValues(dense, weight.requires_grad)
        self.weight = layer.weight
        self.bias = layer.bias
        self._plain = (layer,)  # in a tuple, which hides it from the module's children
        self.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in_features)`` to ``(..., out_features)``, both in the weight's dtype."""
        product: Tensor
        if x.requires_grad and torch.is_grad_enabled():
            product = _Untrainable.apply(x, self)  # type: ignore[no-untyped-call]
        else:
            product = self._product.multiply(x, self._packed, self.bias)
        return product

    def write(self, x: Tensor, out: Tensor) -> Tensor:
        """What :meth:`forward` gives, in memory that is there; only where :attr:`is_plain`."""
        product: Tensor = self._product.multiply(x, self._packed, self.bias, out)  # type: ignore[call-arg]
        return product

    def dense_weight(self) -> Tensor:
        """The weight as the plain layer has it; a copy where it lies otherwise."""
        dense = self._product.unpack(self._packed)
        return dense.t().contiguous() if self._is_transposed else dense

    @property
    def is_plain(self) -> bool:
        """Whether the weight lies as rows of numbers, output by output; then :meth:`plain_weight` shows it."""
        return self._product.keeps_plain

    def plain_weight(self) -> Tensor:
        """The weight itself, ``(out_features, in_features)``, and no copy of it."""
        return self._packed

    def shows(self, weight: Tensor) -> bool:
        """Whether this layer multiplies with the very memory of a plain weight."""
        return self._product.keeps_plain and self._packed.data_ptr() == weight.data_ptr()

    def unpack(self) -> nn.Linear | Conv1D:
        """Give the plain layer its weight back. This layer is not usable any more."""
        (layer,) = self._plain
        if not self._is_shared:
            dense = self.dense_weight()
            if dense.is_inference():  # of a model that was made in that mode: it could never be trained
                dense = dense.clone()
            layer.weight = nn.Parameter(dense, requires_grad=self.weight.requires_grad)
        del self._packed
        layer.train(self.training)
        return layer

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedLinear:
        memo[id(self._product)] = self._product
        if not self._product.keeps_plain:  # nobody can write to such a weight, so copies share it
            memo[id(self._packed)] = self._packed
        twin = PackedLinear.__new__(PackedLinear)
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        if self._is_shared:  # with the embedding, which is copied, too
            twin._packed = twin.weight.detach()
        return twin

    def _apply(self, fn: Any, recurse: bool = True) -> PackedLinear:  # noqa: ARG002
        # .to(), .half(), .cuda(): all of a module's tensors go through here.
        probe = self._packed.new_empty(0, device="cpu", layout=torch.strided)
        changed = fn(probe)
        if changed.dtype != probe.dtype or changed.device != probe.device:
            raise ModelError(
                "a model that is prepared for decoding can be neither moved nor converted",
                value=f"{changed.dtype} on {changed.device}",
                remedy="load it again, since the layers before this one are converted now, and prepare it last",
            )
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.dense_weight()
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
        if not {prefix + "weight", prefix + "bias"} & state_dict.keys():  # an adapter's file has others only
            return
        raise ModelError(
            "weights cannot be loaded into a model that is prepared for decoding",
            value=prefix + "weight",
            remedy="undo that with packing.restore(model)",
        )


class _Untrainable(torch.autograd.Function):
    """A product through which no gradient goes: oneDNN's would be dropped with a warning."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: PackedLinear) -> Tensor:  # noqa: ARG004
        return layer.forward(x.detach())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # noqa: ARG004
        raise ModelError(
            "a model that is prepared for decoding cannot be trained", remedy="undo that with packing.restore(model)"
        )


@torch.inference_mode(False)  # or the weights that come out could never be trained again
@torch.no_grad()
def prepare(model: nn.Module, *, for_loops: bool = False) -> int:
    """Pack the weights of a model, in place; those that are packed already stay so.

    The model can then be asked as before, with the same results up to the rounding of sums. Its weights can be neither
    changed, trained, moved nor converted until :func:`restore`.

    Args:
        model: Any model, plain or with an adapter. An adapter's own weights stay as they are; the base's are packed,
            but for those under an adapter that does not just add to their product.
        for_loops: Whether whole layers go through compiled loops (``few_tokens.py``), which want weights that are plain
            and gain more than oneDNN's layout does for bfloat16.

    Returns:
        How many layers were packed; 0 where this machine has no kernel for them.
    """
    uses = Counter(_memory_of(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    shown_by = Counter(_memory_of(weight) for weight in model.parameters())
    chosen = []
    for parent, name, layer in _layers(model, (nn.Linear, Conv1D)):
        if _reads_base_weight(parent, name):
            continue
        product = _product(layer.weight.dtype, for_loops)
        is_shared = uses[_memory_of(layer.weight)] > 1
        if product is None or not _can_pack(layer, product):
            continue
        if is_shared and not (product.keeps_plain and isinstance(layer, nn.Linear) and layer.weight.is_contiguous()):
            continue
        chosen.append((parent, name, layer, product, is_shared))

    files = _mapped_files()
    room = _room(chosen, files)
    for weight in {id(layer.weight): layer.weight for _, _, layer, _, is_shared in chosen if is_shared}.values():
        # One of inference mode would not be one any more, and be refused wherever it is used; and of several parameters
        # that show one memory, each would show one of its own.
        if not weight.is_inference() and shown_by[_memory_of(weight)] == 1:
            _move(weight, room, files)
    num_bytes = 0  # that were given up and not given back
    for parent, name, layer, product, is_shared in chosen:
        weight = layer.weight
        packed = PackedLinear(layer, product, room, is_shared=is_shared)
        setattr(parent, name, packed)
        if not packed.shows(weight):
            num_bytes += weight.nbytes
            _let_go(weight, files)
            del weight
            if num_bytes >= _TRIM_BYTES:
                trim()
                num_bytes = 0
    trim()
    PackedLinear.num_exchanged += 1
    return len(chosen)


def _memory_of(weight: nn.Parameter) -> int:
    """What tells weights apart that do not share their memory."""
    return id(weight) if isinstance(weight, _WithoutValues) else weight.data_ptr() or id(weight)


def _move(weight: nn.Parameter, room: Room, files: Sequence[range]) -> None:
    """Have a weight lie in some room, for all that use it."""
    lay_there = weight.detach()
    weight.data = room.moved(lay_there)
    if weight.data_ptr() != lay_there.data_ptr():
        _let_go(lay_there, files)


def _room(chosen: Sequence[tuple[Any, str, Any, _OneDnn | _FewRows, bool]], files: Sequence[range]) -> Room:
    """Room for the weights that stay plain. They are moved one by one, and but for files make room for each other."""
    plain = {id(layer.weight): layer.weight for _, _, layer, product, _ in chosen if product.keeps_plain}.values()
    weights = [weight for weight in plain if not lies_in_room(weight)]
    sizes = [rounded_up(weight.nbytes) for weight in weights]
    from_files = (size for weight, size in zip(weights, sizes, strict=True) if _shows_file(weight, files))
    return Room(sum(sizes), sum(from_files) + max(sizes, default=0))


@torch.inference_mode(False)
@torch.no_grad()
def join(model: nn.Module) -> int:
    """Lay weights that multiply the same input one after the other, in place, so that one product can do for all.

    That is queries, keys and values, and a gate and what it lets through, of layers that have no adapter. The modules'
    weights become views of that, with the same numbers, so there is no second copy; but what lies in one memory cannot
    be saved, so the model counts as prepared, until :func:`restore`.

    Args:
        model: One of Llama's build, on any device.

    Returns:
        How many products there are less.
    """
    num_saved = 0
    for parent, parts in _shared_inputs(model):
        kinds = {(type(part), part.bias is None, part.weight.dtype, part.weight.device) for part in parts}
        if len(kinds) > 1 or type(parts[0]) is not nn.Linear or joined_weights(parts) is not None:
            continue
        if any(tensor.is_inference() for part in parts for tensor in part.parameters()):  # as in prepare()
            continue
        for tensors in zip(*(part.parameters() for part in parts), strict=True):  # the weights, and the biases
            pieces = torch.cat([tensor.data for tensor in tensors]).split([len(tensor) for tensor in tensors])
            for tensor, piece in zip(tensors, pieces, strict=True):
                tensor.data = piece
        parent.__dict__["prepared_for_decoding"] = True
        num_saved += len(parts) - 1
    return num_saved


def joined_weights(parts: Sequence[Any]) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of several plain layers as one.

    Args:
        parts: Layers that take the same input.

    Returns:
        ``(sum of out_features, in_features)`` and ``(sum of out_features,)`` or None; or None for both where they do
        not lie one after the other, as after :func:`join`.
    """
    if any(type(part) is not nn.Linear for part in parts):
        return None
    weight = _side_by_side([part.weight for part in parts])
    biases = [part.bias for part in parts if part.bias is not None]
    bias = _side_by_side(biases) if len(biases) == len(parts) else None
    return None if weight is None or (biases and bias is None) else (weight, bias)


def _side_by_side(tensors: Sequence[Tensor]) -> Tensor | None:
    """One view of several tensors that lie one after the other in one memory; None where they do not."""
    first = tensors[0]
    memory, end = first.untyped_storage().data_ptr(), first.storage_offset()
    for tensor in tensors:
        lies_there = tensor.untyped_storage().data_ptr() == memory and tensor.storage_offset() == end
        if not (lies_there and tensor.is_contiguous() and tensor.dtype == first.dtype):
            return None
        end += tensor.numel()
    return first.as_strided((sum(map(len, tensors)), *first.shape[1:]), first.stride())


def _shared_inputs(model: nn.Module) -> Iterator[tuple[nn.Module, tuple[Any, ...]]]:
    """The layers that multiply the same input, with the module that they are in."""
    for parent in model.modules():
        for names in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            if set(names) <= parent._modules.keys():
                yield parent, tuple(parent._modules[name] for name in names)


@torch.inference_mode(False)
@torch.no_grad()
def restore(model: nn.Module) -> None:
    """Undo :func:`prepare` and :func:`join`, in place: the layers and the bits of their weights are what they were."""
    for parent, name, layer in _layers(model, (PackedLinear,)):
        setattr(parent, name, layer.unpack())
    PackedLinear.num_exchanged += 1
    for parent, parts in _shared_inputs(model):
        if parent.__dict__.pop("prepared_for_decoding", False):
            for parameter in (parameter for part in parts for parameter in part.parameters()):
                parameter.data = parameter.data.clone()


def suits_single_rows(dtype: torch.dtype, *, for_loops: bool = False) -> bool:
    """Whether packed weights of this dtype are no slower than plain ones for a single row.

    oneDNN's layout is slower for float32 (by a fifth, with AVX2 and with AVX512), and faster for bfloat16.
    """
    product = _product(dtype, for_loops)
    return product is not None and (product.keeps_plain or dtype != torch.float32)


def advice() -> str:
    """What would make decoding faster on this machine; empty if there is nothing to install."""
    product = _product(torch.float32)
    if not torch.backends.cpu.get_cpu_capability().startswith(_WITH_LOOPS) or (product and product.keeps_plain):
        return ""
    return "this processor decodes faster with numba: pip install 'fedpt-flwr[fast]'"


def is_prepared(model: nn.Module) -> bool:
    """Whether some weight of the model is packed."""
    return any(isinstance(part, PackedLinear) for part in model.modules())


def _layers(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> Iterator[tuple[nn.Module, str, Any]]:
    """The layers of exactly these kinds, each with its parent and its name there; not those inside of adapters."""
    for parent in list(model.modules()):
        # peft keeps the layer that it adapts as base_layer, and its own small matrices in containers beside it.
        for name, layer in list(parent.named_children()):
            if type(layer) in kinds and not isinstance(parent, nn.ModuleDict):
                yield parent, name, layer


def _reads_base_weight(parent: nn.Module, name: str) -> bool:
    """Whether a layer is under an adapter that may look at its weight, as DoRA does for its norm."""
    if name != "base_layer":
        return False
    from peft.tuners.lora.layer import Linear

    return type(parent) is not Linear or bool(parent.lora_variant)


def _can_pack(layer: nn.Linear | Conv1D, product: _OneDnn | _FewRows) -> bool:
    weight = layer.weight
    hooked = layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__
    return bool(weight.device.type == "cpu" and weight.numel() and not hooked and _has_kernel(weight.dtype, product))


@cache
def _has_kernel(dtype: torch.dtype, product: _OneDnn | _FewRows) -> bool:
    """Whether such weights are multiplied on this machine; oneDNN says so only when it is asked to."""
    if product.keeps_plain:
        return dtype in _PLAIN_DTYPES
    try:
        weight = torch.eye(16, dtype=dtype)
        return torch.equal(product.multiply(weight, product.pack(weight), None), weight)
    except RuntimeError:
        return False


def _mapped_files() -> list[range]:
    """The addresses at which this process sees files, such as a checkpoint; none where the system does not say."""
    maps = Path("/proc/self/maps")
    ranges = []
    for line in maps.read_text().splitlines() if maps.is_file() else ():
        fields = line.split(maxsplit=5)
        if fields[-1].startswith("/"):
            begin, end = (int(address, 16) for address in fields[0].split("-"))
            ranges.append(range(begin, end))
    return ranges


def _shows_file(weight: Tensor, files: Sequence[range]) -> bool:
    return any(weight.data_ptr() in file for file in files)


def _let_go(weight: Tensor, files: Sequence[range]) -> None:
    """Have the system take back the memory of a weight that is not needed, if it shows a file.

    That would stay as long as any weight of the file is in use, and the packed ones would come on top of it. The pages
    are not lost: whoever looks at them gets them from the file again.
    """
    begin = -(-weight.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (weight.data_ptr() + weight.nbytes - begin) // mmap.PAGESIZE * mmap.PAGESIZE
    if size > 0 and _shows_file(weight, files):
        page_out = 21  # Linux' MADV_PAGEOUT
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), page_out)
