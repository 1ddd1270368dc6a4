"""A few tokens through all layers of a model, in one call of what numba compiles.

A decoding step reads every weight once, and between two weights there is next to nothing to compute. torch takes some
twenty calls for that in each layer, which find their code and their data swept out of the caches by the weights; so
would Python. Here a table says once where the arrays of all layers lie, and a loop goes through it.

Only on a processor where weights stay plain (``packing.py``), and only models of a build that is known (``builds.py``).
Which tokens and which rows is decided in ``lean.py``. A model of bfloat16 has its weights, keys and values in that
type; what is computed of them is float32, and rounded where it is stored, and on some processors before it is
multiplied with a weight.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numba
import numpy as np
import torch
from numba import carray, types
from numba.extending import intrinsic
from torch import Tensor, nn

from fedpt_flwr.builds import Block, is_plain_lora
from fedpt_flwr.few_queries import attention_for, exponential
from fedpt_flwr.few_rows import (
    MANY_ROWS,
    MOST_ROWS,
    Array,
    address_of,
    as_stored,
    call,
    compiled,
    is_in_threads,
    loop_for,
    part_of_loops,
    scratch,
)
from fedpt_flwr.huge_pages import Room, rounded_up
from fedpt_flwr.packing import PackedLinear
from fedpt_flwr.ragged import RaggedCache

# What there is not has the address 0, and no size.
_PRODUCT = np.dtype(
    [
        ("weight", np.int64),  # address of (num_out, num_in), float32 or bfloat16
        ("num_out", np.int64),
        ("num_in", np.int64),
        ("bias", np.int64),  # address of (num_out,)
        ("down", np.int64),  # an adapter: address of (rank, num_in)
        ("rank", np.int64),
        ("up", np.int64),  # address of (num_out, rank)
        ("scaling", np.float32),
    ],
    align=True,
)
_NORM = np.dtype([("weight", np.int64), ("bias", np.int64), ("eps", np.float32)], align=True)
"""Addresses. Without a bias: root mean square, without a mean."""

_LAYER = np.dtype(
    [
        ("attention_norm", _NORM),
        ("is_by_head", np.int64),
        ("query_norm", np.int64),
        ("key_norm", np.int64),
        ("head_eps", np.float32),
        ("scaling", np.float32),
        ("num_key_heads", np.int64),
        ("head_dim", np.int64),
        ("window", np.int64),
        ("attention", np.int64),  # address of the loop
        ("keys", np.int64),  # address of (rows, key heads, columns, head_dim), and so of the values
        ("values", np.int64),
        ("num_columns", np.int64),
        ("is_parallel", np.int64),
        ("mlp_norm", _NORM),
        ("activation", np.int64),
    ],
    align=True,
)
_QUERIES, _KEYS, _VALUES, _OUT, _GATE, _UP, _DOWN = range(7)
"""Places of a layer's products. Without keys and values: queries, keys and values are one product."""

_HEAD = -1, 0
"""Its place in the table of products, behind all layers."""

_SILU, _GELU, _GELU_BY_TANH, _RELU = range(4)
_ACTIVATIONS = {
    "silu": _SILU,
    "gelu": _GELU,
    "gelu_new": _GELU_BY_TANH,
    "gelu_fast": _GELU_BY_TANH,
    "gelu_pytorch_tanh": _GELU_BY_TANH,
    "relu": _RELU,
}

_ZERO, _HALF, _ONE = np.float32(0.0), np.float32(0.5), np.float32(1.0)
_TWICE_ROOT_2_OF_PI, _OF_CUBE = np.float32(2 * math.sqrt(2 / math.pi)), np.float32(0.044715)
_ROOT_HALF = np.float32(math.sqrt(0.5))
_ERROR_FUNCTION = tuple(map(np.float32, (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)))
_ERROR_FUNCTION_SCALE = np.float32(0.3275911)
"""Abramowitz and Stegun, 7.1.26: right to 1.5e-7."""


class Layers:
    """All layers of a model, ready to be run. They show the model's own weights, but for norms and biases of bfloat16.

    Args:
        blocks: The model's layers, of a kind that the loops know.
        norm: The last one.
        head: What gives scores; None if the loops do not know it.
        is_rough: Weights are copied and rounded to bfloat16; what comes out is nearly the same.

    Attributes:
        head: This one.
        most_tokens: Of all rows together, that can be taken at once.
    """

    def __init__(self, blocks: Sequence[Block], norm: Any, head: Any, *, is_rough: bool = False) -> None:
        self.head = head
        self._dtype = torch.bfloat16 if is_rough else _dtype(blocks[0].down)
        self._blocks = blocks
        self._held: list[Any] = []  # so that there is something at the addresses
        self._layers = np.zeros(len(blocks), _LAYER)
        self._products = np.zeros((len(blocks) + 1, 7), _PRODUCT)
        self._last_norm = np.zeros(1, _NORM)
        self._adapted: list[tuple[tuple[int, int], Any, tuple[int, ...]]] = []
        room = _room(blocks, head) if is_rough else None
        for number, block in enumerate(blocks):
            self._enter_layer(number, block)
            for place, part in _placed(block):
                self._enter_product((number, place), part, room)
        self._last_norm[0] = self._norm(norm)
        if head is not None:
            self._enter_product(_HEAD, head, room)
        sizes = [(int(product["num_in"]), int(product["num_out"])) for product in self._products[:-1].flat]
        self._widest = max(sizes, key=sum)
        are_even = not any(num_in % 2 for num_in, _ in sizes)
        most = MOST_ROWS[self._dtype]
        self.most_tokens = most if are_even or self._dtype == torch.float32 else min(most, MANY_ROWS - 1)

    def run(
        self, cache: RaggedCache, x: Tensor, rotary: Any, starts: Sequence[int], *, is_only_read: bool = False
    ) -> Array:
        """Put tokens through all layers.

        Args:
            cache: Begun for these tokens; gets their keys and values.
            x: The tokens' embeddings, ``(rows, new, hidden)``, float32 or bfloat16 on the CPU; at most
                :attr:`most_tokens`. They may be written over.
            rotary: The model's module that has the angles; None where nothing is turned.
            starts: Tokens that each row had before.
            is_only_read: Whether nobody looks at what comes out: keys and values of the last layer are the end then.

        Returns:
            What comes out of the last layer, ``(rows, new, hidden)``.

        Raises:
            ValueError: There are not as many rows as in the cache.
        """
        if x.shape[0] != len(starts):
            raise ValueError(f"{x.shape[0]} rows of tokens are given for a cache of {len(starts)}")
        stream: Array = x.float().contiguous().numpy()  # which nobody else has
        num_tokens = x.shape[0] * x.shape[1]
        multiply = loop_for(self._dtype, num_tokens)
        layers = self._layers.copy()  # other threads may be here
        self._enter_cache(layers, cache, x, is_in_threads(multiply))
        products, _held = self._with_adapters(of_head=False)
        frequencies, scaling = np.empty(0, np.float32), _ONE
        if rotary is not None:
            frequencies, scaling = _array(rotary.inv_freq), np.float32(rotary.attention_scaling)
        stored = cache.layers[0].keys.dtype
        _through(self._dtype, stored)(
            address_of(multiply),
            layers,
            products,
            stream.reshape(num_tokens, -1),
            frequencies,
            scaling,
            x.dtype == torch.bfloat16,
            np.array(starts, dtype=np.int64),
            x.shape[1],
            is_only_read,
            scratch(num_tokens, *self._widest),
            _LIKE[self._dtype],
            _LIKE[stored],
        )
        return stream

    def normed(self, stream: Array) -> Array:
        """What :meth:`run` gave, ``(…, hidden)``, through the last norm."""
        rows = np.ascontiguousarray(stream).reshape(-1, stream.shape[-1])
        states = np.empty_like(rows)
        _of_norm()(rows, self._last_norm, states)
        return states.reshape(stream.shape)

    def scores(self, stream: Array) -> Array:
        """What the head, which must be known, says of that: ``(…, hidden)`` to ``(…, vocab)``."""
        rows = np.ascontiguousarray(stream).reshape(-1, stream.shape[-1])
        products, _held = self._with_adapters(of_head=True)
        found = np.empty((len(rows), products[-1, 0]["num_out"]), np.float32)
        if len(rows):
            multiply = address_of(loop_for(self._dtype, len(rows)))
            room = scratch(len(rows), rows.shape[1], found.shape[1])
            _of_head(self._dtype)(multiply, rows, self._last_norm, products[-1], found, room, _LIKE[self._dtype])
        return found.reshape(*stream.shape[:-1], found.shape[1])

    def _enter_layer(self, number: int, block: Block) -> None:
        layer = self._layers[number]
        layer["attention_norm"], layer["mlp_norm"] = self._norm(block.attention_norm), self._norm(block.mlp_norm)
        if block.query_norm is not None:
            layer["query_norm"], _, layer["head_eps"] = self._norm(block.query_norm)
            layer["key_norm"], _, _ = self._norm(block.key_norm)
        layer["activation"], layer["scaling"] = _ACTIVATIONS[block.activation_name], block.scaling
        for name in ("is_by_head", "num_key_heads", "head_dim", "is_parallel"):
            layer[name] = getattr(block, name)

    def _norm(self, norm: Any) -> tuple[int, int, float]:
        if type(norm) is nn.LayerNorm:
            return self._address(_array(norm.weight)), self._address(_array(norm.bias)), norm.eps
        return self._address(_array(norm.weight)), 0, norm.variance_epsilon

    def _enter_product(self, at: tuple[int, int], part: Any, room: Room | None) -> None:
        base = _without_adapter(part)
        weight = base.plain_weight()
        if room is not None:
            weight = room.moved(weight.bfloat16())
        self._held.append(weight)
        product = self._products[at]
        product["weight"], (product["num_out"], product["num_in"]) = weight.data_ptr(), weight.shape
        if base.bias is not None:
            product["bias"] = self._address(_array(base.bias))
        if part is not base:
            self._adapted.append((at, part, tuple(map(int, product.tolist()[:4]))))

    def _address(self, array: Array) -> int:
        self._held.append(array)
        return array.ctypes.data

    def _enter_cache(self, layers: Any, cache: RaggedCache, like: Tensor, in_threads: bool) -> None:
        for block, stored in zip(self._blocks, cache.layers, strict=True):
            stored.hold(block.num_key_heads, block.head_dim, like)
        layers["keys"] = [stored.keys.data_ptr() for stored in cache.layers]
        layers["values"] = [stored.values.data_ptr() for stored in cache.layers]
        layers["num_columns"] = [stored.keys.shape[2] for stored in cache.layers]
        layers["window"] = [window or 2**62 for window in cache.windows]
        dtype = cache.layers[0].keys.dtype
        loops = [attention_for(dtype, block.head_dim, in_threads) for block in self._blocks]
        layers["attention"] = list(map(address_of, loops))

    def _with_adapters(self, *, of_head: bool) -> tuple[Any, list[Any]]:
        """All products with what adapters are now, which may be switched, exchanged or changed at any time.

        Args:
            of_head: Whether the head's are wanted, and else all others.

        Returns:
            The table, and what must be kept while it is used.
        """
        adapted = [held for held in self._adapted if (held[0] == _HEAD) == of_head]
        if not adapted:
            return self._products, []
        products = self._products.copy()
        held: list[Any] = []
        for at, part, (weight, num_out, num_in, own_bias) in adapted:
            if (adapter := _adapter(part)) is not None:
                down, up, scaling, bias = adapter
                held.append(adapter)
                added = own_bias if bias is None else bias.data_ptr()
                products[at] = weight, num_out, num_in, added, down.data_ptr(), len(down), up.data_ptr(), scaling
        return products, held


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
        if block.activation_name not in _ACTIVATIONS:
            return False
        norms = (block.attention_norm, block.mlp_norm, block.query_norm, block.key_norm)
        if not all(norm is None or _is_known_norm(norm) for norm in norms):
            return False
    return len(dtypes) == 1 and dtypes <= {torch.float32, torch.bfloat16}


def _placed(block: Block) -> Iterator[tuple[int, Any]]:
    """The linear layers of one of the model's, and their places in the table."""
    yield from enumerate(block.projections)
    rest = ((_OUT, block.attention_out), (_GATE, block.gate), (_UP, block.up), (_DOWN, block.down))
    yield from ((place, part) for place, part in rest if part is not None)


def _products(block: Block) -> list[Any]:
    return [part for _, part in _placed(block)]


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


def _adapter(part: Any) -> tuple[Tensor, Tensor, float, Tensor | None] | None:
    """What an adapted layer adds now: ``(rank, in)``, ``(out, rank)``, the scaling, and the bias if it changes that.

    Several adapters are one of all their ranks.
    """
    if part._disable_adapters:
        return None
    all_down, all_up = part._modules["lora_A"]._modules, part._modules["lora_B"]._modules  # torch's way takes longer
    names = [name for name in part.active_adapters if name in all_down]
    if not names:
        return None
    downs, ups = ([_plain(held[name]._parameters["weight"]) for name in names] for held in (all_down, all_up))
    scalings = [part.scaling[name] for name in names]
    added = [
        _plain(bias) * scaling
        for name, scaling in zip(names, scalings, strict=True)
        if (bias := all_up[name]._parameters["bias"]) is not None
    ]
    bias = None
    if added:
        bias = sum(added) if part.base_layer.bias is None else sum(added, _plain(part.base_layer.bias))
    if len(names) == 1:
        return downs[0], ups[0], scalings[0], bias
    scaled = [up * scaling for up, scaling in zip(ups, scalings, strict=True)]
    return torch.cat(downs), torch.cat(scaled, 1), 1.0, bias


def _plain(weight: Tensor) -> Tensor:
    """A weight as float32, one row behind the other: itself, if it is so."""
    if weight.dtype == torch.float32 and weight.is_contiguous():
        return weight
    return weight.detach().float().contiguous()


def _dtype(part: Any) -> torch.dtype:
    dtype: torch.dtype = _without_adapter(part).weight.dtype
    return dtype


def _array(weight: Tensor) -> Array:
    return weight.detach().float().contiguous().numpy()


# --- the loops -------------------------------------------------------------------------------------------------------


@intrinsic  # type: ignore[untyped-decorator]
def _pointer(_context: Any, address: Any, like: Any) -> Any:
    """An address as one of numbers like those of an array."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(like.dtype)(address, like), emit


@part_of_loops
def _added_product(multiply: Any, given: Any, part: Any, found: Any, room: Any, like: Any) -> None:
    """A linear layer, ``(tokens, in_features)`` to ``(tokens, out_features)``, by the loop at an address."""
    call(multiply, (carray(_pointer(part.weight, like), (part.num_out, part.num_in)), given, found, room))
    num_rows, rank = given.shape[0], part.rank
    if part.bias:
        bias = carray(_pointer(part.bias, given), (part.num_out,))
        for row in range(num_rows):
            for k in range(part.num_out):
                found[row, k] += bias[k]
    if not rank:
        return
    down, up = (
        carray(_pointer(part.down, given), (rank, part.num_in)),
        carray(_pointer(part.up, given), (part.num_out, rank)),
    )
    inner = np.empty(rank, np.float32)
    for row in range(num_rows):
        for place in range(rank):
            total = _ZERO
            for k in range(part.num_in):
                total += given[row, k] * down[place, k]
            inner[place] = total * part.scaling
        for k in range(part.num_out):
            total = _ZERO
            for place in range(rank):
                total += inner[place] * up[k, place]
            found[row, k] += total


@part_of_loops
def _normed(x: Any, norm: Any, out: Any) -> None:
    """Every row over its root mean square; or less its mean, over its deviation, if there is a bias."""
    num_rows, size = x.shape
    weight, bias = carray(_pointer(norm.weight, x), (size,)), carray(_pointer(norm.bias, x), (size,))
    for row in range(num_rows):
        mean = _ZERO
        if norm.bias:
            for k in range(size):
                mean += x[row, k]
            mean /= np.float32(size)
        total = _ZERO
        for k in range(size):
            total += (x[row, k] - mean) * (x[row, k] - mean)
        factor = _ONE / np.float32(math.sqrt(total / np.float32(size) + norm.eps))
        for k in range(size):
            out[row, k] = (x[row, k] - mean) * factor * weight[k]
        if norm.bias:
            for k in range(size):
                out[row, k] += bias[k]


@part_of_loops
def _activated(kind: int, x: Any) -> None:
    """An activation, in place."""
    num_rows, size = x.shape
    for row in range(num_rows):
        if kind == _SILU:
            for k in range(size):
                x[row, k] /= _ONE + exponential(-x[row, k])
        elif kind == _GELU_BY_TANH:  # (1 + tanh(y)) / 2 is 1 / (1 + exp(-2 y))
            for k in range(size):
                value = x[row, k]
                x[row, k] /= _ONE + exponential(-_TWICE_ROOT_2_OF_PI * (value + _OF_CUBE * value * value * value))
        elif kind == _GELU:
            for k in range(size):
                value = x[row, k]
                place = abs(value) * _ROOT_HALF
                t = _ONE / (_ONE + _ERROR_FUNCTION_SCALE * place)
                series = _ERROR_FUNCTION[4]
                series = series * t + _ERROR_FUNCTION[3]
                series = series * t + _ERROR_FUNCTION[2]
                series = series * t + _ERROR_FUNCTION[1]
                series = series * t + _ERROR_FUNCTION[0]
                beyond = _HALF * series * t * exponential(-place * place)
                x[row, k] = value * (_ONE - beyond if value > _ZERO else beyond)
        else:
            for k in range(size):
                x[row, k] = _ZERO if x[row, k] < _ZERO else x[row, k]


@part_of_loops
def _parted(together: Any, is_by_head: Any, size: int, queries: Any, keys: Any, values: Any) -> None:
    """Queries, keys and values of one product: one after the other, or so for each head of a size."""
    width = size if is_by_head else queries.shape[1]
    for token in range(together.shape[0]):
        for k in range(queries.shape[1]):
            begin = k // width * 3 * width + k % width
            queries[token, k] = together[token, begin]
            keys[token, k] = together[token, begin + width]
            values[token, k] = together[token, begin + 2 * width]


@part_of_loops
def _rounded(number: Any, is_narrow: bool) -> Any:
    if not is_narrow:
        return number
    bits = np.int32(as_stored(np.float32(number), np.int16(0)))
    return np.int32(bits << np.int32(16)).view(np.float32)


@part_of_loops
def _turns(starts: Any, num_new: int, frequencies: Any, scaling: Any, is_narrow: bool, cos: Any, sin: Any) -> None:
    """Cosines and sines of the angles at each place, ``(tokens, angles)``; rounded to bfloat16, if models do."""
    for token in range(cos.shape[0]):
        position = np.float32(starts[token // num_new] + token % num_new)
        for k in range(cos.shape[1]):
            angle = position * frequencies[k]
            cos[token, k] = _rounded(np.float32(math.cos(angle)) * scaling, is_narrow)
            sin[token, k] = _rounded(np.float32(math.sin(angle)) * scaling, is_narrow)


def _through_all(
    multiply: int,
    layers: Any,
    products: Any,
    stream: Any,
    frequencies: Any,
    scaling: Any,
    is_narrow: bool,
    starts: Any,
    num_new: int,
    is_only_read: bool,
    room: Any,
    like_weights: Any,
    like_stored: Any,
) -> None:
    """All layers, one after the other; what comes out takes the place of the tokens' embeddings."""
    num_tokens = stream.shape[0]
    states, change = np.empty_like(stream), np.empty_like(stream)
    cos, sin = (
        np.empty((num_tokens, len(frequencies)), np.float32),
        np.empty((num_tokens, len(frequencies)), np.float32),
    )
    _turns(starts, num_new, frequencies, scaling, is_narrow, cos, sin)
    for number in range(len(layers)):
        layer = layers[number]
        head_dim, num_key_heads = layer.head_dim, layer.num_key_heads
        queries = np.empty((num_tokens, products[number, _OUT].num_in), np.float32)
        keys = np.empty((num_tokens, num_key_heads * head_dim), np.float32)
        values = np.empty_like(keys)
        _normed(stream, layer.attention_norm, states)
        if products[number, _KEYS].num_out:
            _added_product(multiply, states, products[number, _QUERIES], queries, room, like_weights)
            _added_product(multiply, states, products[number, _KEYS], keys, room, like_weights)
            _added_product(multiply, states, products[number, _VALUES], values, room, like_weights)
        else:
            together = np.empty((num_tokens, products[number, _QUERIES].num_out), np.float32)
            _added_product(multiply, states, products[number, _QUERIES], together, room, like_weights)
            _parted(together, layer.is_by_head, head_dim, queries, keys, values)
        query_norm = carray(_pointer(layer.query_norm, stream), (head_dim if layer.query_norm else 0,))
        key_norm = carray(_pointer(layer.key_norm, stream), (head_dim if layer.key_norm else 0,))
        shape = (len(starts), num_key_heads, layer.num_columns, head_dim)
        all_keys = carray(_pointer(layer.keys, like_stored), shape)
        all_values = carray(_pointer(layer.values, like_stored), shape)
        new = (queries, keys, values, query_norm, key_norm, layer.head_eps, cos, sin)
        call(layer.attention, (*new, all_keys, all_values, starts, num_new, layer.window, layer.scaling))
        if is_only_read and number == len(layers) - 1:
            return
        _added_product(multiply, queries, products[number, _OUT], change, room, like_weights)
        if layer.is_parallel:
            _normed(stream, layer.mlp_norm, states)
        stream += change
        if not layer.is_parallel:
            _normed(stream, layer.mlp_norm, states)
        inner = np.empty((num_tokens, products[number, _UP].num_out), np.float32)
        _added_product(multiply, states, products[number, _UP], inner, room, like_weights)
        if products[number, _GATE].num_out:
            gate = np.empty_like(inner)
            _added_product(multiply, states, products[number, _GATE], gate, room, like_weights)
            _activated(layer.activation, gate)
            inner *= gate
        else:
            _activated(layer.activation, inner)
        _added_product(multiply, inner, products[number, _DOWN], change, room, like_weights)
        stream += change


def _scored(multiply: int, x: Any, norms: Any, products: Any, found: Any, room: Any, like: Any) -> None:
    states = np.empty_like(x)
    _normed(x, norms[0], states)
    _added_product(multiply, states, products[0], found, room, like)


def _of_last_norm(x: Any, norms: Any, out: Any) -> None:
    _normed(x, norms[0], out)


_LIKE = {torch.float32: np.empty(0, np.float32), torch.bfloat16: np.empty(0, np.int16)}
"""Arrays of what numba is to take numbers for."""

_number, _whole, _truth = types.float32, types.int64, types.boolean
_rows, _scratch = types.float32[:, ::1], types.float32[::1]
_read, _two = (types.Array(types.float32, ndim, "C", readonly=True) for ndim in (1, 2))
_layer_type, _product_type, _norm_type = map(numba.from_dtype, (_LAYER, _PRODUCT, _NORM))


def _kind(dtype: torch.dtype) -> Any:
    return numba.typeof(_LIKE[dtype])


@functools.cache
def _through(dtype: torch.dtype, stored: torch.dtype) -> Any:
    """The compiled layers, by what weights, and keys and values are stored in."""
    signature = types.void(
        *(_whole, _layer_type[::1], _product_type[:, ::1], _rows, _read, _number, _truth),
        *(_whole[::1], _whole, _truth, _scratch, _kind(dtype), _kind(stored)),
    )
    return compiled(_through_all, signature, variant=f"_{_kind(dtype).dtype}_{_kind(stored).dtype}")


@functools.cache
def _of_head(dtype: torch.dtype) -> Any:
    """The compiled last norm and head, by what its weight is stored in."""
    signature = types.void(_whole, _two, _norm_type[::1], _product_type[::1], _rows, _scratch, _kind(dtype))
    return compiled(_scored, signature, variant=f"_{_kind(dtype).dtype}")


@functools.cache
def _of_norm() -> Any:
    """The compiled last norm."""
    return compiled(_of_last_norm, types.void(_two, _norm_type[::1], _rows))
