"""A few tokens through the layers of a model, in loops that numba compiles.

A decoding step reads every weight once, and between two weights there is next to nothing to compute. torch takes some
twenty calls for that in each layer, which find their code and their data swept out of the caches by the weights. Here
each layer is two calls, with the activation between them if nothing is gated by it.

Only on a processor where weights stay plain (``packing.py``), and only models of a build that is known (``builds.py``).
Which tokens and which rows is decided in ``lean.py``. A model of bfloat16 has its weights, keys and values in that
type; what is computed of them is float32, and rounded where it is stored, and on some processors before it is
multiplied with a weight.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
import torch.nn.functional as F
from numba import types
from torch import Tensor, nn

from fedpt_flwr.builds import Block, is_plain_lora
from fedpt_flwr.few_queries import attention_for, exponential
from fedpt_flwr.few_rows import Array, address_of, bits_of, call, compiled, loop_for
from fedpt_flwr.huge_pages import Room, rounded_up
from fedpt_flwr.packing import PackedLinear
from fedpt_flwr.ragged import RaggedCache

_Norm = tuple[Array, Array, np.float32]
"""Weight, bias and epsilon. Without a bias: root mean square, without a mean."""

_Product = tuple[Any, Array, Array, Array, np.float32]
"""A linear layer, ``(out_features, in_features)`` in float32 or the bits of bfloat16, and its bias; an adapter that is
added to it, ``(rank, in_features)`` and ``(out_features, rank)``, and its scaling. What there is not is empty."""

_NONE, _NO_TABLE = np.empty(0, np.float32), np.empty((0, 0), np.float32)
_ZERO, _ONE = np.float32(0.0), np.float32(1.0)

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_fast": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}
"""Where nothing is gated: one call each, which is short enough."""


class _Layer(NamedTuple):
    """What :class:`~fedpt_flwr.builds.Block` names, as arrays."""

    block: Block
    attention_norm: _Norm
    projections: tuple[_Product, _Product, _Product]
    """To queries, keys and values; or one for all, and two that are empty."""
    query_norm: Array
    key_norm: Array
    head_eps: np.float32
    attention_out: _Product
    mlp_norm: _Norm
    gate: _Product
    up: _Product
    down: _Product
    scaling: np.float32


class Layers:
    """All layers of a model, ready to be run. They show the model's own weights, but for norms and biases of bfloat16.

    Args:
        blocks: The model's layers, of a kind that the loops know.
        norm: The last one.
        head: What gives scores; None if the loops do not know it.
        is_rough: Weights are copied and rounded to bfloat16; what comes out is nearly the same.

    Attributes:
        head: This one.
    """

    def __init__(self, blocks: Sequence[Block], norm: Any, head: Any, *, is_rough: bool = False) -> None:
        self.head = head
        self._dtype = torch.bfloat16 if is_rough else _dtype(blocks[0].down)
        room = _room(blocks, head) if is_rough else None
        self._layers = [_layer(block, room) for block in blocks]
        self._adapted = [number for number, block in enumerate(blocks) if any(map(is_plain_lora, _products(block)))]
        self._norm = _norm(norm)
        self._scoring = _product(head, self._dtype, room)

    def run(self, cache: RaggedCache, x: Tensor, rotary: Any, starts: Sequence[int]) -> Array:
        """Put tokens through all layers.

        Args:
            cache: Begun for these tokens; gets their keys and values.
            x: The tokens' embeddings, ``(rows, new, hidden)``, float32 or bfloat16 on the CPU.
            rotary: The model's module that has the angles; None where nothing is turned.
            starts: Tokens that each row had before.

        Returns:
            What comes out of the last layer, ``(rows, new, hidden)``.
        """
        num_rows, num_new, hidden = x.shape
        first = np.array(starts)
        cos, sin = _rotation(rotary, first, num_new, x.dtype)
        stream = np.array(x.float().numpy()).reshape(num_rows * num_new, hidden)
        multiply = address_of(loop_for(self._dtype, len(stream)))
        layers = self._layers.copy()
        for number in self._adapted:
            layers[number] = _as_it_is_now(layers[number])
        for number, layer in enumerate(layers):
            block, stored = layer.block, cache.layers[number]
            stored.hold(block.num_key_heads, block.head_dim, x)
            to_inner, from_inner = _halves(self._dtype, stored.keys.dtype)
            inner = np.empty((len(stream), len(layer.up[0])), np.float32)
            to_inner(
                multiply,
                address_of(attention_for(stored.keys.dtype, block.head_dim)),
                stream,
                inner,
                layer.attention_norm,
                *layer.projections,
                block.is_by_head,
                layer.query_norm,
                layer.key_norm,
                layer.head_eps,
                cos,
                sin,
                bits_of(stored.keys),
                bits_of(stored.values),
                first,
                num_new,
                cache.windows[number] or 2**62,
                layer.scaling,
                layer.attention_out,
                block.is_parallel,
                layer.mlp_norm,
                layer.gate,
                layer.up,
            )
            if block.gate is None:
                inner = _ACTIVATIONS[block.activation_name](torch.from_numpy(inner)).numpy()
            from_inner(multiply, inner, layer.down, stream)
        return stream.reshape(x.shape)

    def normed(self, stream: Array) -> Array:
        """What :meth:`run` gave, ``(…, hidden)``, through the last norm."""
        rows = np.ascontiguousarray(stream).reshape(-1, stream.shape[-1])
        states = np.empty_like(rows)
        _of_norm()(rows, self._norm, states)
        return states.reshape(stream.shape)

    def scores(self, states: Array) -> Array:
        """What the head, which must be known, says of normed states: ``(…, hidden)`` to ``(…, vocab)``."""
        rows = states.reshape(-1, states.shape[-1])
        part = _with_adapters(self.head, self._scoring)
        found = np.empty((len(rows), len(part[0])), np.float32)
        if len(rows):
            _of_product(self._dtype)(address_of(loop_for(self._dtype, len(rows))), rows, part, found)
        return found.reshape(*states.shape[:-1], len(part[0]))


def layers_of(blocks: Sequence[Block], norm: Any, head: Any, *, is_rough: bool = False) -> Layers | None:
    """A model's layers, ready to be run; None if they are not prepared, or are of a kind that the loops do not know.

    Args:
        blocks: The layers.
        norm: See :class:`Layers`.
        head: What gives scores.
        is_rough: See :class:`Layers`; None comes out, too, where nothing is to be rounded.
    """
    if not _are_known(blocks) or not _is_known_norm(norm):
        return None
    dtype = _dtype(blocks[0].down)
    head = head if _is_known(head) and _dtype(head) == dtype else None
    if is_rough:
        # A model that is two, with its adapter and without, is there to save memory.
        has_adapter = any(is_plain_lora(part) for block in blocks for part in (*_products(block), head))
        if has_adapter or head is None or dtype != torch.float32:
            return None
    return Layers(blocks, norm, head, is_rough=is_rough)


def _without_adapter(part: Any) -> Any:
    return part.base_layer if is_plain_lora(part) else part


def _is_known(part: Any) -> bool:
    base = _without_adapter(part)
    return type(base) is PackedLinear and base.is_plain  # else it is not prepared


def _are_known(blocks: Sequence[Block]) -> bool:
    dtypes = set()
    for block in blocks:
        for part in _products(block):
            if not _is_known(part):
                return False
            dtypes.add(_dtype(part))
        if block.activation_name not in (("silu",) if block.gate is not None else _ACTIVATIONS):
            return False
        norms = (block.attention_norm, block.mlp_norm, block.query_norm, block.key_norm)
        if not all(norm is None or _is_known_norm(norm) for norm in norms):
            return False
    return len(dtypes) == 1 and dtypes <= {torch.float32, torch.bfloat16}


def _products(block: Block) -> list[Any]:
    """The linear layers of one of the model's."""
    parts = (*block.projections, block.attention_out, block.gate, block.up, block.down)
    return [part for part in parts if part is not None]


def _room(blocks: Sequence[Block], head: Any) -> Room:
    """Room for the weights of all linear layers, rounded to bfloat16."""
    parts = [*(part for block in blocks for part in _products(block)), head]
    num_bytes = sum(rounded_up(part.weight.numel() * torch.bfloat16.itemsize) for part in parts)
    return Room(num_bytes, num_bytes)


def _is_known_norm(norm: nn.Module) -> bool:
    weights = [
        weight for weight in (norm._parameters.get("weight"), norm._parameters.get("bias")) if weight is not None
    ]
    needed = 2 if type(norm) is nn.LayerNorm else 1
    return len(weights) == needed and all(weight.dtype in (torch.float32, torch.bfloat16) for weight in weights)


def _layer(block: Block, room: Room | None) -> _Layer:
    product = functools.partial(_product, dtype=_dtype(block.down), room=room)
    query_weight, _, head_eps = (_NONE, _NONE, _ZERO) if block.query_norm is None else _norm(block.query_norm)
    first, *others = map(product, block.projections)
    keys, values = others or (product(None), product(None))
    return _Layer(
        block=block,
        attention_norm=_norm(block.attention_norm),
        projections=(first, keys, values),
        query_norm=query_weight,
        key_norm=_NONE if block.key_norm is None else _norm(block.key_norm)[0],
        head_eps=head_eps,
        attention_out=product(block.attention_out),
        mlp_norm=_norm(block.mlp_norm),
        gate=product(block.gate),
        up=product(block.up),
        down=product(block.down),
        scaling=np.float32(block.scaling),
    )


def _norm(norm: Any) -> _Norm:
    if type(norm) is nn.LayerNorm:
        return _array(norm.weight), _array(norm.bias), np.float32(norm.eps)
    return _array(norm.weight), _NONE, np.float32(norm.variance_epsilon)


def _product(part: Any, dtype: torch.dtype, room: Room | None) -> _Product:
    """What a layer multiplies with, or a rounded copy of it, in some room, if there is one; without its adapter."""
    if part is None:
        nothing = torch.empty((0, 0), dtype=dtype if room is None else torch.bfloat16, device="cpu")
        return bits_of(nothing), _NONE, _NO_TABLE, _NO_TABLE, _ZERO
    base = _without_adapter(part)
    weight = base.plain_weight()
    bits = bits_of(weight if room is None else room.moved(weight.bfloat16()))
    return bits, _NONE if base.bias is None else _array(base.bias), _NO_TABLE, _NO_TABLE, _ZERO


def _as_it_is_now(layer: _Layer) -> _Layer:
    """A layer with what its adapters are now: they may be switched, exchanged or changed at any time."""
    block = layer.block
    to_queries, to_keys, to_values = layer.projections
    first, *others = block.projections
    keys, values = others or (None, None)
    return layer._replace(
        projections=(
            _with_adapters(first, to_queries),
            _with_adapters(keys, to_keys),
            _with_adapters(values, to_values),
        ),
        attention_out=_with_adapters(block.attention_out, layer.attention_out),
        gate=_with_adapters(block.gate, layer.gate),
        up=_with_adapters(block.up, layer.up),
        down=_with_adapters(block.down, layer.down),
    )


def _with_adapters(part: Any, product: _Product) -> _Product:
    if part is None or type(part) is PackedLinear or part.disable_adapters:
        return product
    all_down, all_up = part._modules["lora_A"]._modules, part._modules["lora_B"]._modules  # torch's way takes longer
    names = [name for name in part.active_adapters if name in all_down]
    if not names:
        return product
    weight, bias, *_ = product
    downs = [_table(all_down[name]) for name in names]
    ups = [_table(all_up[name]) for name in names]
    scalings = [np.float32(part.scaling[name]) for name in names]
    for name, scaling in zip(names, scalings, strict=True):
        added = all_up[name]._parameters["bias"]
        if added is not None:
            bias = (bias if len(bias) else _ZERO) + scaling * _array(added)
    if len(names) == 1:
        return weight, bias, downs[0], ups[0], scalings[0]
    scaled = [up * scaling for up, scaling in zip(ups, scalings, strict=True)]
    return weight, bias, np.concatenate(downs), np.ascontiguousarray(np.concatenate(scaled, 1)), _ONE


def _table(layer: Any) -> Array:
    table: Array = layer._parameters["weight"].detach().float().contiguous().numpy()
    return table


def _dtype(part: Any) -> torch.dtype:
    dtype: torch.dtype = _without_adapter(part).weight.dtype
    return dtype


def _array(weight: Tensor) -> Array:
    return weight.detach().float().numpy()


def _rotation(rotary: Any, starts: Any, num_new: int, dtype: torch.dtype) -> tuple[Array, Array]:
    """Cosines and sines of the angles at the positions of new tokens, ``(rows * new, angles)``."""
    num_tokens = len(starts) * num_new
    frequencies = _NONE if rotary is None else _array(rotary.inv_freq)
    cos, sin = (np.empty((num_tokens, len(frequencies)), np.float32) for _ in range(2))
    if rotary is not None:
        scaling = np.float32(rotary.attention_scaling)
        _of_angles()(starts, num_new, frequencies, scaling, dtype == torch.bfloat16, cos, sin)
    return cos, sin


# --- the loops -------------------------------------------------------------------------------------------------------


def _added_product(multiply: Any, given: Any, part: Any, found: Any) -> None:
    """A linear layer, ``(tokens, in_features)`` to ``(tokens, out_features)``, by the loop at an address."""
    weight, bias, down, up, scaling = part
    call(multiply, (weight, given, found))
    num_rows, size = given.shape
    rank = down.shape[0]
    if bias.shape[0]:
        for row in range(num_rows):
            for k in range(found.shape[1]):
                found[row, k] += bias[k]
    if not rank:
        return
    inner = np.empty(rank, np.float32)
    for row in range(num_rows):
        for place in range(rank):
            total = _ZERO
            for k in range(size):
                total += given[row, k] * down[place, k]
            inner[place] = total * scaling
        for k in range(found.shape[1]):
            total = _ZERO
            for place in range(rank):
                total += inner[place] * up[k, place]
            found[row, k] += total


def _normed(x: Any, norm: Any, out: Any) -> None:
    """Every row over its root mean square; or less its mean, over its deviation, if there is a bias."""
    weight, bias, eps = norm
    num_rows, size = x.shape
    for row in range(num_rows):
        mean = _ZERO
        if bias.shape[0]:
            for k in range(size):
                mean += x[row, k]
            mean /= np.float32(size)
        total = _ZERO
        for k in range(size):
            total += (x[row, k] - mean) * (x[row, k] - mean)
        factor = _ONE / np.float32(math.sqrt(total / np.float32(size) + eps))
        for k in range(size):
            out[row, k] = (x[row, k] - mean) * factor * weight[k]
        if bias.shape[0]:
            for k in range(size):
                out[row, k] += bias[k]


def _gated(gate: Any, up: Any) -> None:
    """What goes up times the gate's SiLU, in place."""
    num_rows, size = gate.shape
    for row in range(num_rows):
        for k in range(size):
            value = gate[row, k]
            up[row, k] *= value / (_ONE + exponential(-value))


def _angles(starts: Any, num_new: int, frequencies: Any, scaling: Any, is_narrow: bool, cos: Any, sin: Any) -> None:
    """Cosines and sines of the angles at each place, ``(tokens, angles)``; rounded to bfloat16, if models do."""
    for token in range(cos.shape[0]):
        position = np.float32(starts[token // num_new] + token % num_new)
        for k in range(cos.shape[1]):
            angle = position * frequencies[k]
            cos[token, k] = _rounded(np.float32(math.cos(angle)) * scaling, is_narrow)
            sin[token, k] = _rounded(np.float32(math.sin(angle)) * scaling, is_narrow)


@numba.njit  # type: ignore[untyped-decorator]
def _rounded(number: Any, is_narrow: bool) -> Any:
    if not is_narrow:
        return number
    bits = np.float32(number).view(np.int32)
    bits += np.int32(0x7FFF) + ((bits >> np.int32(16)) & np.int32(1))
    return np.int32(bits & np.int32(-0x10000)).view(np.float32)


def _parted(together: Any, is_by_head: bool, size: int, queries: Any, keys: Any, values: Any) -> None:
    """Queries, keys and values of one product: one after the other, or so for each head of a size."""
    width = size if is_by_head else queries.shape[1]
    for token in range(together.shape[0]):
        for k in range(queries.shape[1]):
            begin = k // width * 3 * width + k % width
            queries[token, k] = together[token, begin]
            keys[token, k] = together[token, begin + width]
            values[token, k] = together[token, begin + 2 * width]


def _to_inner(
    multiply: int,
    attend: int,
    stream: Any,
    inner: Any,
    attention_norm: Any,
    to_queries: Any,
    to_keys: Any,
    to_values: Any,
    is_by_head: bool,
    query_norm: Any,
    key_norm: Any,
    head_eps: Any,
    cos: Any,
    sin: Any,
    all_keys: Any,
    all_values: Any,
    starts: Any,
    num_new: int,
    window: int,
    scale: Any,
    attention_out: Any,
    is_parallel: bool,
    mlp_norm: Any,
    to_gate: Any,
    to_up: Any,
) -> None:
    """A layer up to its activation, or with that, if there is a gate: adds to the stream, and writes what is inside."""
    num_tokens = stream.shape[0]
    states, change = np.empty_like(stream), np.empty_like(stream)
    normed(stream, attention_norm, states)
    queries = np.empty((num_tokens, attention_out[0].shape[1]), np.float32)
    width = all_keys.shape[1] * all_keys.shape[3]
    keys, values = np.empty((num_tokens, width), np.float32), np.empty((num_tokens, width), np.float32)
    if to_keys[0].shape[0]:
        added_product(multiply, states, to_queries, queries)
        added_product(multiply, states, to_keys, keys)
        added_product(multiply, states, to_values, values)
    else:
        together = np.empty((num_tokens, to_queries[0].shape[0]), np.float32)
        added_product(multiply, states, to_queries, together)
        parted(together, is_by_head, all_keys.shape[3], queries, keys, values)
    arguments = (queries, keys, values, query_norm, key_norm, head_eps, cos, sin, all_keys, all_values)
    call(attend, (*arguments, starts, num_new, window, scale))
    added_product(multiply, queries, attention_out, change)
    if is_parallel:
        normed(stream, mlp_norm, states)
    stream += change
    if not is_parallel:
        normed(stream, mlp_norm, states)
    added_product(multiply, states, to_up, inner)
    if to_gate[0].shape[0]:
        gate = np.empty_like(inner)
        added_product(multiply, states, to_gate, gate)
        gated(gate, inner)


def _from_inner(multiply: int, inner: Any, down: Any, stream: Any) -> None:
    """The rest of a layer."""
    change = np.empty_like(stream)
    added_product(multiply, inner, down, change)
    stream += change


added_product, normed, gated, parted = map(compiled, (_added_product, _normed, _gated, _parted))

_number, _whole, _truth = types.float32, types.int64, types.boolean
_rows = types.float32[:, ::1]
_read, _table_type = (types.Array(types.float32, ndim, "C", readonly=True) for ndim in (1, 2))
_norm_type = types.Tuple((_read, _read, _number))
_kinds = {torch.float32: types.float32, torch.bfloat16: types.int16}


def _product_type(dtype: torch.dtype) -> Any:
    weight = types.Array(_kinds[dtype], 2, "C", readonly=True)
    return types.Tuple((weight, _read, _table_type, _table_type, _number))


@functools.cache
def _halves(dtype: torch.dtype, stored: torch.dtype) -> tuple[Any, Any]:
    """The compiled halves of a layer, by the types of weights and of keys and values."""
    product, cache = _product_type(dtype), _kinds[stored][:, :, :, ::1]
    to_inner = types.void(
        *(_whole, _whole, _rows, _rows, _norm_type, product, product, product, _truth, _read, _read, _number),
        *(_table_type, _table_type, cache, cache, _whole[::1], _whole, _whole, _number, product, _truth, _norm_type),
        *(product, product),
    )
    from_inner = types.void(_whole, _rows, product, _rows)
    name = str(_kinds[dtype])
    return (
        compiled(_to_inner, to_inner, variant=f"_{name}_{_kinds[stored]}"),
        compiled(_from_inner, from_inner, variant=f"_{name}"),
    )


@functools.cache
def _of_product(dtype: torch.dtype) -> Any:
    """The compiled linear layer, by the type of its weight."""
    signature = types.void(_whole, _table_type, _product_type(dtype), _rows)
    return compiled(_added_product, signature, variant=f"_{_kinds[dtype]}")


@functools.cache
def _of_norm() -> Any:
    """The compiled norm."""
    return compiled(_normed, types.void(_table_type, _norm_type, _rows), variant="_alone")


@functools.cache
def _of_angles() -> Any:
    """The compiled angles."""
    return compiled(_angles, types.void(_whole[::1], _whole, _read, _number, _truth, _rows, _rows))
