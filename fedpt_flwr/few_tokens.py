"""A few tokens through the layers of a Llama-type model, in loops that numba compiles.

A decoding step reads every weight once, and between two weights there is next to nothing to compute. torch takes some
twenty calls for that in each layer, which find their code and their data swept out of the caches by the weights. Here
they are four loops beside the products.

Only on a processor where weights stay plain (``packing.py``), and only models that ``lean.py`` takes. Which tokens and
which rows, and what comes before and after the layers, is decided there. A model of bfloat16 has its weights, keys and
values in that type; what is computed of them is float32, and rounded where it is stored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.extending import intrinsic
from torch import Tensor, nn

from fedpt_flwr.few_rows import Array, bits_of, compiled, into, widened
from fedpt_flwr.packing import PackedLinear
from fedpt_flwr.ragged import RaggedCache

MOST_TOKENS = 8
"""Tokens, of all rows together, that can be taken at once."""

_MOST_PAIRS = 1600
"""Tokens times columns that they may look at: beyond that, torch's attention makes up for its calls."""

_NONE = np.empty(0, np.float32)
_ZERO, _ONE = np.float32(0.0), np.float32(1.0)


def takes(body: Any, num_tokens: int, width: int) -> bool:
    """Whether tokens are to go through the loops.

    Args:
        body: The layers of a model of Llama's build; all weights must lie as the loops want them.
        num_tokens: Tokens of all rows together.
        width: Columns of the cache, the tokens' own among them.
    """
    return (
        num_tokens <= MOST_TOKENS
        and num_tokens * width <= _MOST_PAIRS
        and body.config.hidden_act == "silu"
        and all(
            _is_plain(part)
            for layer in body.layers
            for half in (layer, layer.self_attn, layer.mlp)
            for part in half._modules.values()
        )
    )


def _is_plain(part: nn.Module) -> bool:
    if type(part) is PackedLinear:
        return part.is_plain
    if type(part) is nn.Linear or "base_layer" in part._modules:  # not prepared, or with an adapter
        return False
    weight = part._parameters.get("weight")  # a norm's
    return weight is None or weight.dtype in (torch.float32, torch.bfloat16)


def run(body: Any, cache: RaggedCache, x: Tensor, rotation: tuple[Tensor, Tensor], starts: Sequence[int]) -> Tensor:
    """Put the tokens through all layers.

    Args:
        body: As in :func:`takes`, which said yes.
        cache: Begun for these tokens; gets their keys and values.
        x: The tokens' embeddings, ``(rows * new, hidden)``, float32 or bfloat16 on the CPU.
        rotation: Cosines and sines of their positions, ``(rows, new, head_dim)``.
        starts: Tokens that each row had before.

    Returns:
        What comes out of the last layer, ``(rows * new, hidden)``, of the dtype of ``x``.
    """
    num_tokens = len(x)
    first = np.asarray(starts, dtype=np.int64)
    cos, sin = (part.reshape(num_tokens, -1).float().contiguous().numpy() for part in rotation)
    stream = np.array(x.float().numpy())
    states, change = np.empty_like(stream), np.empty_like(stream)
    num_key_heads, eps = body.config.num_key_value_heads, np.float32(body.config.rms_norm_eps)
    for number, layer in enumerate(body.layers):
        attention, mlp = layer.self_attn, layer.mlp
        _normed(stream, _array(layer.input_layernorm.weight), eps, states)
        queries, keys, values = (
            _product(part, states) for part in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        stored = cache.layers[number]
        stored.hold(num_key_heads, attention.head_dim, x)
        has_norms = "q_norm" in attention._modules
        _attended(
            queries,
            keys,
            values,
            _array(attention.q_norm.weight) if has_norms else _NONE,
            _array(attention.k_norm.weight) if has_norms else _NONE,
            eps,
            cos,
            sin,
            bits_of(stored.keys),
            bits_of(stored.values),
            first,
            num_tokens // len(starts),
            cache.windows[number] or 2**62,
            np.float32(attention.scaling),
        )
        _into(attention.o_proj, queries, change)
        stream += change
        _normed(stream, _array(layer.post_attention_layernorm.weight), eps, states)
        gate = _product(mlp.gate_proj, states)
        _gated(gate, _product(mlp.up_proj, states))
        _into(mlp.down_proj, gate, change)
        stream += change
    return torch.from_numpy(stream).to(x.dtype)


def _array(weight: Tensor) -> Array:
    return weight.detach().float().numpy()


def _product(layer: PackedLinear, x: Array) -> Array:
    product = np.empty((len(x), layer.out_features), np.float32)
    _into(layer, x, product)
    return product


def _into(layer: PackedLinear, x: Array, product: Array) -> None:
    into(product, x, bits_of(layer.plain_weight()), None if layer.bias is None else _array(layer.bias))


# --- the loops -------------------------------------------------------------------------------------------------------

_read = numba.types.Array(numba.float32, 1, "C", readonly=True)
_table = numba.types.Array(numba.float32, 2, "C", readonly=True)
_rows = numba.float32[:, ::1]
_stored = (numba.float32[:, :, :, ::1], numba.int16[:, :, :, ::1])


@intrinsic  # type: ignore[untyped-decorator]
def _read_number(_context: Any, held: Any) -> Any:
    """A number as float32: that it is, or that the bits of bfloat16 mean."""

    def emit(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return arguments[0] if held == numba.float32 else widened(builder, arguments[0])

    return numba.float32(held), emit


@intrinsic  # type: ignore[untyped-decorator]
def _as_stored(_context: Any, number: Any, like: Any) -> Any:
    """A float32 as it is stored beside another number: as it is, or rounded to the nearest bfloat16, ties to even."""

    def emit(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        value, whole = arguments[0], ir.IntType(32)
        if like == numba.float32:
            return value
        bits = builder.bitcast(value, whole)
        is_odd = builder.and_(builder.lshr(bits, whole(16)), whole(1))
        rounded = builder.lshr(builder.add(builder.add(bits, whole(0x7FFF)), is_odd), whole(16))
        is_nan = builder.fcmp_unordered("uno", value, value)  # rounding could make it infinite, or 0
        return builder.trunc(builder.select(is_nan, whole(0x7FC0), rounded), ir.IntType(16))

    return like(number, like), emit


def _normed(x: Any, weight: Any, eps: Any, out: Any) -> None:
    """Root mean square norm of every row."""
    num_rows, size = x.shape
    for row in range(num_rows):
        total = _ZERO
        for k in range(size):
            total += x[row, k] * x[row, k]
        factor = _ONE / np.float32(math.sqrt(total / np.float32(size) + eps))
        for k in range(size):
            out[row, k] = x[row, k] * factor * weight[k]


def _gated(gate: Any, up: Any) -> None:
    """The gate's SiLU times what it lets through, in place."""
    num_rows, size = gate.shape
    for row in range(num_rows):
        for k in range(size):
            value = gate[row, k]
            gate[row, k] = value / (_ONE + math.exp(-value)) * up[row, k]


def _turned(x: Any, token: int, head: int, size: int, weight: Any, eps: Any, cos: Any, sin: Any) -> None:
    """One head of one token normed, if there is a weight for that, and rotated, in place."""
    begin, half = head * size, size // 2
    if weight.shape[0]:
        total = _ZERO
        for k in range(size):
            total += x[token, begin + k] * x[token, begin + k]
        factor = _ONE / np.float32(math.sqrt(total / np.float32(size) + eps))
        for k in range(size):
            x[token, begin + k] *= factor * weight[k]
    for k in range(half):
        low, high = x[token, begin + k], x[token, begin + half + k]
        x[token, begin + k] = low * cos[token, k] - high * sin[token, k]
        x[token, begin + half + k] = high * cos[token, half + k] + low * sin[token, half + k]


def _attended(
    queries: Any,
    keys: Any,
    values: Any,
    query_norm: Any,
    key_norm: Any,
    eps: Any,
    cos: Any,
    sin: Any,
    all_keys: Any,
    all_values: Any,
    starts: Any,
    num_new: int,
    window: int,
    scale: Any,
) -> None:
    """Attention of new tokens over those before them and themselves; the outcome takes the place of the queries.

    Keys and values of the new tokens are written to ``all_keys`` and ``all_values``,
    ``(rows, key heads, columns, head_dim)``, first. Heads that share keys read each of them together.
    """
    num_key_heads, size = all_keys.shape[1], all_keys.shape[3]
    num_heads = queries.shape[1] // size
    shared = num_heads // num_key_heads
    num_tokens = starts.shape[0] * num_new
    for token in range(num_tokens):
        row, column = token // num_new, starts[token // num_new] + token % num_new
        for head in range(num_heads):
            _turned(queries, token, head, size, query_norm, eps, cos, sin)
        for head in range(num_key_heads):
            _turned(keys, token, head, size, key_norm, eps, cos, sin)
            for k in range(size):
                key, value = keys[token, head * size + k], values[token, head * size + k]
                all_keys[row, head, column, k] = _as_stored(key, all_keys[row, head, column, k])
                all_values[row, head, column, k] = _as_stored(value, all_values[row, head, column, k])
    for row in range(starts.shape[0]):
        start = starts[row]
        end = start + num_new
        begin = max(0, start - window + 1)
        weights = np.empty((shared * num_new, end - begin), np.float32)
        mixed = np.empty((shared * num_new, size), np.float32)
        for key_head in range(num_key_heads):
            for column in range(begin, end):
                for head in range(shared):
                    at = (key_head * shared + head) * size
                    for new in range(num_new):
                        total = _ZERO
                        for k in range(size):
                            key = _read_number(all_keys[row, key_head, column, k])
                            total += queries[row * num_new + new, at + k] * key
                        weights[head * num_new + new, column - begin] = total * scale
            for place in range(shared * num_new):
                last = start + place % num_new
                oldest = max(begin, last - window + 1)
                largest = weights[place, oldest - begin]
                for column in range(oldest, last + 1):
                    largest = max(largest, weights[place, column - begin])
                total = _ZERO
                for column in range(begin, end):
                    if oldest <= column <= last:
                        weights[place, column - begin] = math.exp(weights[place, column - begin] - largest)
                        total += weights[place, column - begin]
                    else:
                        weights[place, column - begin] = _ZERO
                for column in range(begin, end):
                    weights[place, column - begin] /= total
            mixed[:] = _ZERO
            for column in range(begin, end):
                for place in range(shared * num_new):
                    weight = weights[place, column - begin]
                    for k in range(size):
                        mixed[place, k] += weight * _read_number(all_values[row, key_head, column, k])
            for place in range(shared * num_new):
                token, at = row * num_new + place % num_new, (key_head * shared + place // num_new) * size
                for k in range(size):
                    queries[token, at + k] = mixed[place, k]


_turned = compiled(_turned)
_normed = compiled(_normed, [numba.void(_rows, _read, numba.float32, _rows)])
_gated = compiled(_gated, [numba.void(_rows, _rows)])
_attended = compiled(
    _attended,
    [
        numba.void(
            *(_rows, _rows, _rows, _read, _read, numba.float32, _table, _table, stored, stored),
            *(numba.int64[::1], numba.int64, numba.int64, numba.float32),
        )
        for stored in _stored
    ],
)
