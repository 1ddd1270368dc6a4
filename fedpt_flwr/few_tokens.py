"""A few tokens through the layers of a model, in loops that numba compiles.

A decoding step reads every weight once, and between two weights there is next to nothing to compute. torch takes some
twenty calls for that in each layer, which find their code and their data swept out of the caches by the weights. Here
they are four loops beside the products, and one more behind those that have an adapter.

Only on a processor where weights stay plain (``packing.py``), and only models of a build that is known (``builds.py``).
Which tokens and which rows, and what comes before and after the layers, is decided in ``lean.py``. A model of bfloat16
has its weights, keys and values in that type; what is computed of them is float32, and rounded where it is stored.
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
from torch import Tensor, nn

from fedpt_flwr.builds import Block, is_plain_lora
from fedpt_flwr.few_queries import attention_for, exponential
from fedpt_flwr.few_rows import Array, bits_of, compiled, loop_for
from fedpt_flwr.huge_pages import Room, rounded_up
from fedpt_flwr.packing import PackedLinear
from fedpt_flwr.ragged import RaggedCache

MOST_TOKENS = 8
"""Tokens, of all rows together, that can be taken at once."""

_MOST_PAIRS = 1600
"""Tokens times columns that they may look at: beyond that, torch's attention makes up for its calls."""

_NONE = np.empty(0, np.float32)
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


class _Norm(NamedTuple):
    weight: Array
    bias: Array | None
    """None: root mean square, without a mean."""
    eps: np.float32

    def __call__(self, x: Array, out: Array) -> None:
        if self.bias is None:
            _normed(x, self.weight, self.eps, out)
        else:
            _centred(x, self.weight, self.bias, self.eps, out)


class _Product(NamedTuple):
    weight: Any
    bias: Array | None
    num_out: int
    adapted: Any
    """peft's layer, whose adapters may be switched, exchanged or changed at any time; None if there is none."""


class _Layer(NamedTuple):
    """What :class:`~fedpt_flwr.builds.Block` names, as arrays."""

    block: Block
    attention_norm: _Norm
    projections: tuple[_Product, ...]
    query_norm: Array
    key_norm: Array
    head_eps: np.float32
    attention_out: _Product
    mlp_norm: _Norm
    gate: _Product | None
    up: _Product
    down: _Product
    scaling: np.float32


class Layers:
    """All layers of a model, ready to be run. They show the model's own weights, but for norms and biases of bfloat16.

    Args:
        blocks: The model's layers, of a kind that the loops know.
        head: What gives scores. With it, weights are copied and rounded to bfloat16; what comes out is nearly the same.

    Attributes:
        blocks: These.
    """

    def __init__(self, blocks: Sequence[Block], head: Any = None) -> None:
        self.blocks = blocks
        self._dtype = torch.bfloat16 if head is not None else _dtype(blocks[0].down)
        room = None if head is None else _room(blocks, head)
        self._layers = [_layer(block, room) for block in blocks]
        self._head = None if head is None else _product(head, room)

    def takes(self, num_tokens: int, width: int) -> bool:
        """Whether it pays to put tokens through the loops.

        Args:
            num_tokens: Tokens of all rows together.
            width: Columns of the cache, the tokens' own among them.
        """
        return num_tokens <= MOST_TOKENS and num_tokens * width <= _MOST_PAIRS

    def run(
        self, cache: RaggedCache, x: Tensor, rotation: tuple[Tensor, Tensor] | None, starts: Sequence[int]
    ) -> Tensor:
        """Put tokens through all layers.

        Args:
            cache: Begun for these tokens; gets their keys and values.
            x: The tokens' embeddings, ``(rows * new, hidden)``, float32 or bfloat16 on the CPU.
            rotation: Cosines and sines of their positions, ``(rows * new, angles)``; None where nothing is turned.
            starts: Tokens that each row had before.

        Returns:
            What comes out of the last layer, ``(rows * new, hidden)``, of the dtype of ``x``.
        """
        num_tokens = len(x)
        product = functools.partial(_multiplied, loop_for(self._dtype, num_tokens))
        first = np.asarray(starts, dtype=np.int64)
        num_new = num_tokens // len(starts)
        if rotation is None:
            cos = sin = np.empty((num_tokens, 0), np.float32)
        else:
            cos, sin = (part.float().contiguous().numpy() for part in rotation)
        stream = x.float().numpy().copy()
        states, change = np.empty_like(stream), np.empty_like(stream)

        for number, layer in enumerate(self._layers):
            block = layer.block
            layer.attention_norm(stream, states)
            queries, keys, values = _split(block, [product(part, states) for part in layer.projections])
            stored = cache.layers[number]
            stored.hold(block.num_key_heads, block.head_dim, x)
            attend = attention_for(stored.keys.dtype, block.head_dim)
            attend(
                queries,
                keys,
                values,
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
            )
            product(layer.attention_out, queries, change)
            if block.is_parallel:
                layer.mlp_norm(stream, states)
                stream += change
            else:
                stream += change
                layer.mlp_norm(stream, states)
            inner = product(layer.up, states)
            if layer.gate is None:
                inner = _ACTIVATIONS[block.activation_name](torch.from_numpy(inner)).numpy()
            else:
                gate = product(layer.gate, states)
                _gated(gate, inner)
                inner = gate
            product(layer.down, inner, change)
            stream += change
        return torch.from_numpy(stream).to(x.dtype)

    def scores(self, x: Tensor) -> Tensor:
        """What the head, which must have been given, says of normed states: ``(tokens, hidden)`` to ``(…, vocab)``."""
        states = x.float().contiguous().numpy()
        return torch.from_numpy(_multiplied(loop_for(self._dtype, len(x)), self._head, states)).to(x.dtype)


def layers_of(blocks: Sequence[Block], head: Any = None) -> Layers | None:
    """A model's layers, ready to be run; None if they are not prepared, or are of a kind that the loops do not know.

    Args:
        blocks: The layers.
        head: See :class:`Layers`; None comes out, too, where nothing is to be rounded.
    """
    if not _are_known(blocks):
        return None
    if head is not None:
        # A model that is two, with its adapter and without, is there to save memory.
        has_adapter = any(is_plain_lora(part) for block in blocks for part in (*_products(block), head))
        if has_adapter or not _is_known(head) or not _dtype(head) == _dtype(blocks[0].down) == torch.float32:
            return None
    return Layers(blocks, head)


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
    head_norm = block.query_norm
    return _Layer(
        block=block,
        attention_norm=_norm(block.attention_norm),
        projections=tuple(_product(part, room) for part in block.projections),
        query_norm=_NONE if head_norm is None else _norm(head_norm).weight,
        key_norm=_NONE if block.key_norm is None else _norm(block.key_norm).weight,
        head_eps=_ZERO if head_norm is None else _norm(head_norm).eps,
        attention_out=_product(block.attention_out, room),
        mlp_norm=_norm(block.mlp_norm),
        gate=None if block.gate is None else _product(block.gate, room),
        up=_product(block.up, room),
        down=_product(block.down, room),
        scaling=np.float32(block.scaling),
    )


def _norm(norm: Any) -> _Norm:
    if type(norm) is nn.LayerNorm:
        return _Norm(_array(norm.weight), _array(norm.bias), np.float32(norm.eps))
    return _Norm(_array(norm.weight), None, np.float32(norm.variance_epsilon))


def _product(part: Any, room: Room | None) -> _Product:
    """What a layer multiplies with; a rounded copy of it, in some room, if there is one."""
    base = _without_adapter(part)
    weight = base.plain_weight()
    bits = bits_of(weight if room is None else room.moved(weight.bfloat16()))
    bias = None if base.bias is None else _array(base.bias)
    return _Product(bits, bias, base.out_features, None if part is base else part)


def _multiplied(loop: Callable[..., None], part: Any, given: Array, out: Array | None = None) -> Array:
    """A linear layer, ``(tokens, in_features)`` to ``(tokens, out_features)``; into ``out`` if there is one."""
    found = np.empty((len(given), part.num_out), np.float32) if out is None else out
    loop(part.weight, given, found)
    if part.bias is not None:
        found += part.bias
    if part.adapted is not None:
        _adapt(part.adapted, given, found)
    return found


def _adapt(layer: Any, given: Array, product: Array) -> None:
    """Add to a layer's product what its adapters, as they are now, make of what it was given."""
    if layer.disable_adapters:
        return
    all_down, all_up = layer._modules["lora_A"]._modules, layer._modules["lora_B"]._modules  # torch's way takes longer
    for name in layer.active_adapters:
        if name in all_down:
            down, up, scaling = all_down[name], all_up[name]._parameters, np.float32(layer.scaling[name])
            _adapted(given, _as_table(down._parameters["weight"]), _as_table(up["weight"]), scaling, product)
            if up["bias"] is not None:
                product += scaling * _array(up["bias"])


def _as_table(weight: Tensor) -> Array:
    table: Array = weight.detach().float().contiguous().numpy()
    return table


def _dtype(part: Any) -> torch.dtype:
    dtype: torch.dtype = _without_adapter(part).weight.dtype
    return dtype


def _array(weight: Tensor) -> Array:
    return weight.detach().float().numpy()


def _split(block: Block, products: Sequence[Array]) -> Sequence[Array]:
    """Queries, keys and values, each with all heads side by side."""
    if len(products) == 3:
        return products
    (together,) = products
    num_tokens = len(together)
    if not block.is_by_head:
        return [np.ascontiguousarray(part) for part in np.split(together, 3, axis=1)]
    by_head = together.reshape(num_tokens, -1, 3, block.head_dim)
    return [np.ascontiguousarray(by_head[:, :, place]).reshape(num_tokens, -1) for place in range(3)]


# --- the loops -------------------------------------------------------------------------------------------------------

_read = numba.types.Array(numba.float32, 1, "C", readonly=True)
_table = numba.types.Array(numba.float32, 2, "C", readonly=True)
_rows = numba.float32[:, ::1]


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


def _centred(x: Any, weight: Any, bias: Any, eps: Any, out: Any) -> None:
    """Layer norm of every row: less its mean, over its deviation."""
    num_rows, size = x.shape
    for row in range(num_rows):
        total = _ZERO
        for k in range(size):
            total += x[row, k]
        mean = total / np.float32(size)
        total = _ZERO
        for k in range(size):
            total += (x[row, k] - mean) * (x[row, k] - mean)
        factor = _ONE / np.float32(math.sqrt(total / np.float32(size) + eps))
        for k in range(size):
            out[row, k] = (x[row, k] - mean) * factor * weight[k] + bias[k]


def _gated(gate: Any, up: Any) -> None:
    """The gate's SiLU times what it lets through, in place."""
    num_rows, size = gate.shape
    for row in range(num_rows):
        for k in range(size):
            value = gate[row, k]
            gate[row, k] = value / (_ONE + exponential(-value)) * up[row, k]


def _adapted(x: Any, down: Any, up: Any, scaling: Any, product: Any) -> None:
    """Adds what an adapter makes of ``x``: ``down`` is ``(rank, in)``, ``up`` ``(out, rank)``."""
    num_rows, size = x.shape
    rank = down.shape[0]
    inner = np.empty(rank, np.float32)
    for row in range(num_rows):
        for place in range(rank):
            total = _ZERO
            for k in range(size):
                total += x[row, k] * down[place, k]
            inner[place] = total * scaling
        for k in range(up.shape[0]):
            total = _ZERO
            for place in range(rank):
                total += inner[place] * up[k, place]
            product[row, k] += total


_normed = compiled(_normed, numba.void(_rows, _read, numba.float32, _rows))
_centred = compiled(_centred, numba.void(_rows, _read, _read, numba.float32, _rows))
_gated = compiled(_gated, numba.void(_rows, _rows))
_adapted = compiled(_adapted, numba.void(_rows, _table, _table, numba.float32, _rows))
