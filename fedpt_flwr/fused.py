"""A few tokens through the layers of a Llama-type model on a GPU, with Triton's kernels between the products.

A pass over a few tokens is short kernels, each of which costs more to begin than to run. torch takes some fourteen of
them between the products of a layer; here they are five. How long the rows are is read on the GPU, from the positions
of their new tokens, so that a recorded pass (``graphs.py``) reads no more of the cache than a row has: there is no
mask, and columns beyond a row's last token are never looked at.

Sums are of float32. Everything is rounded where torch's calls in ``lean.py`` round it, so that the two ways differ by
no more than the order of sums. Which tokens, and what comes before and after the layers, is decided there.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fedpt_flwr.builds import Block
from fedpt_flwr.packing import joined_weights
from fedpt_flwr.ragged import RaggedCache

_log = logging.getLogger(__name__)

MOST_NEW = 8
"""New tokens per row that can be taken at once."""

MOST_TOKENS = 256
"""Tokens of all rows together: more keep a GPU busy by themselves."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_WIDEST_HEAD = 256
"""Numbers of a head: the sums of a block of queries are kept in registers."""

_WIDEST = 32768
"""Numbers of a token's state: all are kept in registers."""

_BLOCK_BYTES = 16384
"""Keys that a program reads at once, and queries that share them, at most: the queries and two blocks of keys and of
values then fit into the registers and the shared memory of any GPU since Ampere."""

_COLUMNS_PER_SPLIT = 256
"""Columns that one program reads at least, where there are too few rows and heads to keep a GPU busy."""

_MOST_PROGRAMS = 512
"""Programs beyond which the columns are not split: there are 132 multiprocessors in an H100."""

_MOST_SPLITS = 16

_EVERYTHING = 1 << 30
"""A window that no text outgrows."""


@functools.cache
def is_available() -> bool:
    """Whether Triton works here: it compiles for this GPU, with the C compiler that it needs, and computes right."""
    try:
        if torch.cuda.get_device_capability() < (8, 0):  # before Ampere shared memory was half as large
            return False
        gate, up = torch.linspace(-3, 3, 34, device="cuda").view(2, 17).unbind()
        states = torch.linspace(-1, 1, 96, device="cuda").view(2, 1, 3, 16)
        queries, positions = states[:, 0, 2:].contiguous(), torch.full((2, 1), 2, device="cuda")
        expected = F.scaled_dot_product_attention(queries[:, None], states, states, scale=1.0)
        mixed = attend(queries.view(2, 16), states, states, positions, None, 1.0)
        gated = silu_and_mul(gate[None], up[None])
        return torch.allclose(gated, F.silu(gate) * up, atol=1e-5) and torch.allclose(
            mixed, expected.view(2, 16), atol=1e-3
        )
    except Exception as error:  # a compiler's, a linker's, a driver's: whatever it is, there is another way
        _log.info("decoding without Triton's kernels: %s", str(error).partition("\n")[0])
        return False


def takes(blocks: Sequence[Block], num_new: int, x: Tensor) -> bool:
    """Whether tokens are to go through the kernels.

    Args:
        blocks: The layers of a model of Llama's build.
        num_new: Tokens per row.
        x: Their embeddings, ``(rows * new, hidden)``.
    """
    block = blocks[0]
    num_queries = _block(num_new * (block.num_heads // block.num_key_heads))
    return (
        num_new <= MOST_NEW
        and len(x) <= MOST_TOKENS
        and x.dtype in _DTYPES
        and x.shape[1] <= _WIDEST
        and block.activation_name == "silu"
        and block.head_dim <= _WIDEST_HEAD
        and num_queries * _block(block.head_dim) * x.element_size() <= _BLOCK_BYTES
    )


def run(
    blocks: Sequence[Block],
    cache: RaggedCache,
    x: Tensor,
    angles: tuple[Tensor, Tensor],
    positions: Tensor,
    linear: Callable[[Any, Tensor], Tensor],
) -> Tensor:
    """Put the tokens through all layers.

    Args:
        blocks: As in :func:`takes`, which said yes.
        cache: Begun for these tokens; gets their keys and values.
        x: The tokens' embeddings, ``(rows * new, hidden)``.
        angles: Cosines and sines of their positions, ``(rows * new, head_dim / 2)``.
        positions: What the cache's ``begin`` returned.
        linear: Multiplies by a layer, whatever kind it is of.

    Returns:
        What comes out of the last layer, ``(rows * new, hidden)``.
    """
    positions = positions.contiguous()
    cos, sin = (torch.cat((part, part), -1) for part in angles)
    change = None
    with torch.cuda.device_of(x):  # kernels are launched on the current device, wherever their tensors lie
        for number, block in enumerate(blocks):
            x, states = add_rms_norm(x, change, block.attention_norm)
            queries, keys, values = _products(block.projections, states, linear)
            stored = cache.layers[number]
            stored.hold(block.num_key_heads, block.head_dim, keys)
            all_keys, all_values = stored.in_use()
            norms = None if block.query_norm is None else (block.query_norm, block.key_norm)
            queries = rotate_and_store(queries, keys, values, all_keys, all_values, positions, (cos, sin), norms)
            mixed = attend(queries, all_keys, all_values, positions, cache.windows[number], block.scaling)
            x, states = add_rms_norm(x, linear(block.attention_out, mixed), block.mlp_norm)
            gate, up = _products((block.gate, block.up), states, linear)
            change = linear(block.down, silu_and_mul(gate, up))
    return x if change is None else x + change


def _products(parts: tuple[Any, ...], x: Tensor, linear: Callable[[Any, Tensor], Tensor]) -> list[Tensor]:
    """What several layers make of an input, by one product where their weights lie so."""
    joined = joined_weights(parts)
    if joined is None:
        return [linear(part, x) for part in parts]
    return list(F.linear(x, *joined).split([part.out_features for part in parts], 1))


def add_rms_norm(x: Tensor, change: Tensor | None, norm: Any) -> tuple[Tensor, Tensor]:
    """A sum, and its root mean square norm.

    Args:
        x: ``(tokens, hidden)``.
        change: What is added, if anything, of the same shape.
        norm: The norm's module.

    Returns:
        The sum, and the sum normed.
    """
    x = x.contiguous()
    num_tokens, size = x.shape
    total, normed = x if change is None else torch.empty_like(x), torch.empty_like(x)
    block = triton.next_power_of_2(size)
    _add_rms_norm[(num_tokens,)](
        x,
        x if change is None else change.contiguous(),
        norm.weight,
        total,
        normed,
        norm.variance_epsilon,
        size,
        block=block,
        adds=change is not None,
        num_warps=min(16, max(1, block // 512)),
    )
    return total, normed


def rotate_and_store(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    all_keys: Tensor,
    all_values: Tensor,
    positions: Tensor,
    rotation: tuple[Tensor, Tensor],
    norms: tuple[Any, Any] | None = None,
) -> Tensor:
    """Turn queries and keys by their positions, and write keys and values into a cache.

    Args:
        queries: ``(tokens, heads * head_dim)``; their rows may be parts of longer ones, as those of the next two.
        keys: ``(tokens, key heads * head_dim)``.
        values: Like the keys.
        all_keys: Keys of the cache, ``(rows, key heads, columns, head_dim)``; written to in place.
        all_values: Its values, laid out like its keys.
        positions: Where in its row each token goes, ``(rows, new)``, int64.
        rotation: Cosines and sines, ``(tokens, head_dim)``.
        norms: Modules with which each head of the queries and of the keys is normed before.

    Returns:
        The queries, ``(tokens, heads * head_dim)``.
    """
    num_tokens, width = queries.shape
    num_key_heads, size = all_keys.shape[1], all_keys.shape[3]
    num_heads = width // size
    turned = queries.new_empty((num_tokens, width))
    cos, sin = rotation
    query_norm, key_norm = norms or (None, None)
    _rotate_and_store[(num_tokens, num_heads + num_key_heads)](
        queries,
        keys,
        values,
        turned,
        all_keys,
        all_values,
        positions,
        cos,
        sin,
        cos if query_norm is None else query_norm.weight,
        cos if key_norm is None else key_norm.weight,
        0.0 if query_norm is None else query_norm.variance_epsilon,
        positions.shape[1],
        queries.stride(0),
        keys.stride(0),
        values.stride(0),
        *all_keys.stride()[:3],
        num_heads=num_heads,
        size=size,
        block=triton.next_power_of_2(size),
        has_norms=norms is not None,
        num_warps=1,
    )
    return turned


def attend(
    queries: Tensor, all_keys: Tensor, all_values: Tensor, positions: Tensor, window: int | None, scale: float
) -> Tensor:
    """Attention of new tokens over their rows of a cache, in which they are already.

    Args:
        queries: ``(rows * new, heads * head_dim)``.
        all_keys: ``(rows, key heads, columns, head_dim)``; of a row's columns those up to its last token are read.
        all_values: Laid out like the keys.
        positions: Where in its row each token is, ``(rows, new)``, int64, one after the other.
        window: How far back a token looks, None for everything.
        scale: Of the scores.

    Returns:
        ``(rows * new, heads * head_dim)``.
    """
    queries = queries.contiguous()
    num_tokens, num_new = len(queries), positions.shape[1]
    num_rows, num_key_heads, num_columns, size = all_keys.shape
    num_heads = queries.shape[1] // size
    groups = num_heads // num_key_heads
    splits = _num_splits(num_columns if window is None else min(num_columns, window), num_rows * num_key_heads)
    mixed = torch.empty_like(queries)
    parts = tops = mixed
    if splits > 1:
        parts = queries.new_empty((splits, num_tokens, num_heads, size), dtype=torch.float32)
        tops = queries.new_empty((2, splits, num_tokens, num_heads), dtype=torch.float32)
    block = _block(size)
    _attend[(num_rows, num_key_heads, splits)](
        queries,
        all_keys,
        all_values,
        mixed,
        parts,
        tops,
        positions,
        scale,
        _EVERYTHING if window is None else window,
        num_new,
        num_tokens,
        *all_keys.stride()[:3],
        groups=groups,
        num_heads=num_heads,
        size=size,
        splits=splits,
        block_queries=_block(groups * num_new),
        block_columns=max(16, min(64, _BLOCK_BYTES // (block * all_keys.element_size()))),
        block=block,
        num_warps=4,
        num_stages=2,
    )
    if splits > 1:
        _join[(num_tokens, num_heads)](
            parts, tops, mixed, num_tokens, num_heads=num_heads, size=size, splits=splits, block=block, num_warps=1
        )
    return mixed


def _block(number: int) -> int:
    """The side of a matrix that holds so many: tensor cores take no less than 16."""
    return int(max(16, triton.next_power_of_2(number)))


def _num_splits(num_columns: int, num_programs: int) -> int:
    """In how many parts columns are read: they are added up by another kernel, so only where there are many."""
    if num_columns <= 2 * _COLUMNS_PER_SPLIT:
        return 1
    wanted = triton.next_power_of_2(triton.cdiv(num_columns, _COLUMNS_PER_SPLIT))
    while wanted > 1 and wanted * num_programs > _MOST_PROGRAMS:
        wanted //= 2
    return int(min(wanted, _MOST_SPLITS))


def silu_and_mul(gate: Tensor, up: Tensor) -> Tensor:
    """The gate's SiLU times what it lets through, both ``(tokens, size)``; rows may be parts of longer ones."""
    num_tokens, size = gate.shape
    product = gate.new_empty((num_tokens, size))
    block = min(1024, triton.next_power_of_2(size))
    _silu_and_mul[(num_tokens, triton.cdiv(size, block))](
        gate, up, product, gate.stride(0), up.stride(0), size, block=block, num_warps=4
    )
    return product


# --- the kernels -----------------------------------------------------------------------------------------------------
#
# What changes from pass to pass is not compiled in, or each number would be waited for once.


@triton.jit  # type: ignore[untyped-decorator]
def _add_rms_norm(
    x: tl.tensor,
    change: tl.tensor,
    weight: tl.tensor,
    total: tl.tensor,
    normed: tl.tensor,
    eps: tl.tensor,
    size: tl.tensor,
    block: tl.constexpr,
    adds: tl.constexpr,
) -> None:
    """One token."""
    k = tl.arange(0, block)
    there = k < size
    at = tl.program_id(0) * size + k
    numbers = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
    if adds:
        numbers += tl.load(change + at, mask=there, other=0.0).to(tl.float32)
        numbers = numbers.to(total.dtype.element_ty).to(tl.float32)
        tl.store(total + at, numbers, mask=there)
    factor = 1.0 / tl.sqrt(tl.sum(numbers * numbers, 0) / size + eps)
    by = tl.load(weight + k, mask=there, other=0.0).to(tl.float32)
    tl.store(normed + at, numbers * factor * by, mask=there)


@triton.jit  # type: ignore[untyped-decorator]
def _turned(
    x: tl.tensor,
    norm: tl.tensor,
    eps: tl.tensor,
    cosine: tl.tensor,
    sine: tl.tensor,
    size: tl.constexpr,
    block: tl.constexpr,
    has_norm: tl.constexpr,
) -> tl.tensor:
    """One head of one token normed, if it has a norm, and rotated."""
    k = tl.arange(0, block)
    there = k < size
    other = tl.where(k < size // 2, k + size // 2, k - size // 2)
    here = tl.load(x + k, mask=there, other=0.0).to(tl.float32)
    across = tl.load(x + other, mask=there, other=0.0).to(tl.float32)
    if has_norm:
        factor = 1.0 / tl.sqrt(tl.sum(here * here, 0) / size + eps)
        here = here * factor * tl.load(norm + k, mask=there, other=0.0).to(tl.float32)
        across = across * factor * tl.load(norm + other, mask=there, other=0.0).to(tl.float32)
        here = here.to(x.dtype.element_ty).to(tl.float32)
        across = across.to(x.dtype.element_ty).to(tl.float32)
    straight = (here * cosine).to(x.dtype.element_ty).to(tl.float32)
    return straight + tl.where(k < size // 2, -across, across) * sine


@triton.jit(do_not_specialize=["num_new"])  # type: ignore[untyped-decorator]
def _rotate_and_store(
    queries: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    turned: tl.tensor,
    all_keys: tl.tensor,
    all_values: tl.tensor,
    positions: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    query_norm: tl.tensor,
    key_norm: tl.tensor,
    eps: tl.tensor,
    num_new: tl.tensor,
    query_stride: tl.tensor,
    key_stride: tl.tensor,
    value_stride: tl.tensor,
    row_stride: tl.tensor,
    head_stride: tl.tensor,
    column_stride: tl.tensor,
    num_heads: tl.constexpr,
    size: tl.constexpr,
    block: tl.constexpr,
    has_norms: tl.constexpr,
) -> None:
    """One head of one token: of the queries, or of keys and values."""
    token = tl.program_id(0)
    head = tl.program_id(1)
    k = tl.arange(0, block)
    there = k < size
    cosine = tl.load(cos + token * size + k, mask=there, other=0.0).to(tl.float32)
    sine = tl.load(sin + token * size + k, mask=there, other=0.0).to(tl.float32)
    if head < num_heads:
        source = queries + token * query_stride + head * size
        query = _turned(source, query_norm, eps, cosine, sine, size, block, has_norms)
        tl.store(turned + (token * num_heads + head) * size + k, query, mask=there)
    else:
        key_head = head - num_heads
        source = keys + token * key_stride + key_head * size
        key = _turned(source, key_norm, eps, cosine, sine, size, block, has_norms)
        value = tl.load(values + token * value_stride + key_head * size + k, mask=there, other=0.0)
        row = (token // num_new).to(tl.int64)  # a cache may have more numbers than int32 counts
        at = row * row_stride + key_head * head_stride + tl.load(positions + token) * column_stride + k
        tl.store(all_keys + at, key, mask=there)
        tl.store(all_values + at, value, mask=there)


@triton.jit(do_not_specialize=["window", "num_new", "num_tokens"])  # type: ignore[untyped-decorator]
def _attend(
    queries: tl.tensor,
    all_keys: tl.tensor,
    all_values: tl.tensor,
    mixed: tl.tensor,
    parts: tl.tensor,
    tops: tl.tensor,
    positions: tl.tensor,
    scale: tl.tensor,
    window: tl.tensor,
    num_new: tl.tensor,
    num_tokens: tl.tensor,
    row_stride: tl.tensor,
    head_stride: tl.tensor,
    column_stride: tl.tensor,
    groups: tl.constexpr,
    num_heads: tl.constexpr,
    size: tl.constexpr,
    splits: tl.constexpr,
    block_queries: tl.constexpr,
    block_columns: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """All queries of one row that share keys, over all columns or one part of them."""
    row = tl.program_id(0)
    key_head = tl.program_id(1)
    start = tl.load(positions + row * num_new).to(tl.int32)
    end = start + num_new
    begin = tl.maximum(start - window + 1, 0) // block_columns * block_columns
    if splits > 1:
        share = tl.cdiv(tl.cdiv(end - begin, splits), block_columns) * block_columns
        begin += tl.program_id(2) * share
        end = tl.minimum(end, begin + share)
    query = tl.arange(0, block_queries)
    new = query // groups
    last = start + new
    k = tl.arange(0, block)
    is_number = k < size
    is_query = new < num_new
    place = (row * num_new + new) * num_heads + key_head * groups + query % groups
    q = tl.load(queries + place[:, None] * size + k[None, :], mask=is_query[:, None] & is_number[None, :], other=0.0)
    head_at = row.to(tl.int64) * row_stride + key_head * head_stride
    # Finite, since a block may have nothing in it that a query sees, and a difference of infinities is none.
    top = tl.full([block_queries], -1e30, tl.float32)
    total = tl.zeros([block_queries], tl.float32)
    out = tl.zeros([block_queries, block], tl.float32)
    for first in range(begin, end, block_columns):
        column = first + tl.arange(0, block_columns)
        is_column = column < end
        at = head_at + column.to(tl.int64) * column_stride
        key = tl.load(all_keys + at[None, :] + k[:, None], mask=is_column[None, :] & is_number[:, None], other=0.0)
        scores = tl.dot(q, key, input_precision="ieee") * scale
        sees = is_column[None, :] & (column[None, :] <= last[:, None]) & (column[None, :] > last[:, None] - window)
        scores = tl.where(sees, scores, -1e30)
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.where(sees, tl.exp(scores - new_top[:, None]), 0.0)
        kept = tl.exp(top - new_top)
        total = total * kept + tl.sum(weights, 1)
        value = tl.load(all_values + at[:, None] + k[None, :], mask=is_column[:, None] & is_number[None, :], other=0.0)
        out = out * kept[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        top = new_top
    is_wanted = is_query[:, None] & is_number[None, :]
    if splits > 1:
        place += tl.program_id(2) * num_tokens * num_heads
        tl.store(tops + place, top, mask=is_query)
        tl.store(tops + splits * num_tokens * num_heads + place, total, mask=is_query)
        tl.store(parts + place[:, None] * size + k[None, :], out, mask=is_wanted)
    else:
        out = out / tl.where(is_query, total, 1.0)[:, None]
        tl.store(mixed + place[:, None] * size + k[None, :], out, mask=is_wanted)


@triton.jit(do_not_specialize=["num_tokens"])  # type: ignore[untyped-decorator]
def _join(
    parts: tl.tensor,
    tops: tl.tensor,
    mixed: tl.tensor,
    num_tokens: tl.tensor,
    num_heads: tl.constexpr,
    size: tl.constexpr,
    splits: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """One head of one token, from what was found in each part of the columns."""
    place = tl.program_id(0) * num_heads + tl.program_id(1)
    step = num_tokens * num_heads
    part = place + tl.arange(0, splits) * step
    top = tl.load(tops + part)
    kept = tl.exp(top - tl.max(top, 0))
    total = tl.sum(tl.load(tops + splits * step + part) * kept, 0)
    k = tl.arange(0, block)
    there = k < size
    numbers = tl.load(parts + part[:, None] * size + k[None, :], mask=there[None, :], other=0.0)
    tl.store(mixed + place * size + k, tl.sum(numbers * kept[:, None], 0) / total, mask=there)


@triton.jit  # type: ignore[untyped-decorator]
def _silu_and_mul(
    gate: tl.tensor,
    up: tl.tensor,
    product: tl.tensor,
    gate_stride: tl.tensor,
    up_stride: tl.tensor,
    size: tl.tensor,
    block: tl.constexpr,
) -> None:
    """A part of one token."""
    token = tl.program_id(0)
    k = tl.program_id(1) * block + tl.arange(0, block)
    there = k < size
    x = tl.load(gate + token * gate_stride + k, mask=there, other=0.0).to(tl.float32)
    x = (x / (1.0 + tl.exp(-x))).to(product.dtype.element_ty).to(tl.float32)
    by = tl.load(up + token * up_stride + k, mask=there, other=0.0).to(tl.float32)
    tl.store(product + token * size + k, x * by, mask=there)
