"""Attention of a few tokens over the keys and values of a text, in loops that numba compiles.

For the queries that share keys, one after the other: scores of as many columns at once as a register has lanes, then
the softmax, then the values, each times its weight. Long texts are taken in parts that stay in a cache until all these
queries have seen them. As in ``few_rows.py`` what is done with some columns is written as instructions of LLVM.

Scores, sums and means are of float32; keys and values may be stored as bfloat16. What comes out for a query depends
neither on how many others there are nor on what they are.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from fedpt_flwr.few_rows import LANES, as_stored, compiled, exchanged, in_all_lanes, part_of_loops, widened

_ZERO, _ONE = np.float32(0.0), np.float32(1.0)

_LOG2_E, _LN_2 = np.float32(math.log2(math.e)), np.float32(math.log(2))

_IN_CACHE = 32768
"""Numbers of a head's keys, or values, that stay in the second cache, 128 KB, while one query after the other comes."""

_LEAST, _MOST = np.float32(-87.0), np.float32(88.0)
"""Powers of e beyond these have no normal float32."""


@functools.partial(part_of_loops, inline="always")
def exponential(x: Any) -> Any:
    """Euler's number to the power of a float32, in arithmetic of which a compiler can do a vector at once.

    Two to a whole number times a series for what is left, within 5 units of the last digit. Powers beyond those that
    are normal numbers are taken for the nearest of these; NaN stays.
    """
    x = min(max(x, _LEAST), _MOST)
    whole = np.float32(math.floor(x * _LOG2_E + np.float32(0.5)))
    rest = x - whole * _LN_2
    series = np.float32(1 / 5040)
    series = series * rest + np.float32(1 / 720)
    series = series * rest + np.float32(1 / 120)
    series = series * rest + np.float32(1 / 24)
    series = series * rest + np.float32(1 / 6)
    series = series * rest + np.float32(1 / 2)
    series = series * rest * rest + rest + _ONE
    exponent = (np.int32(whole) + np.int32(127)) << np.int32(23)
    return series * np.int32(exponent).view(np.float32)


@functools.cache
def attention_for(dtype: torch.dtype, head_dim: int, in_threads: bool) -> Callable[..., None]:
    """The compiled loop for keys and values of a dtype and heads of a size; see :func:`_loop`.

    Args:
        dtype: How keys and values are stored.
        head_dim: The size.
        in_threads: Whether heads are for several threads, as many as numba was told to take.
    """
    stored = {torch.float32: types.float32, torch.bfloat16: types.int16}[dtype]
    rows, cache = types.float32[:, ::1], stored[:, :, :, ::1]
    read, table = (types.Array(types.float32, ndim, "C", readonly=True) for ndim in (1, 2))
    whole = types.int64
    signature = types.void(
        *(rows, rows, rows, read, read, types.float32, table, table, cache, cache),
        *(whole[::1], whole, whole, types.float32),
    )
    variant = f"_{head_dim}_{stored}_{LANES}{'_in_threads' if in_threads else ''}"
    loop: Callable[..., None] = compiled(_loop(head_dim), signature, variant=variant, parallel=in_threads)
    return loop


def _loop(head_dim: int) -> Any:
    """The loop for heads of a size, which is its own, so that a compiler knows it."""
    size, lanes, at_once = head_dim, math.gcd(head_dim, LANES), max(LANES, _IN_CACHE // head_dim)

    def loop(
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
        ``(rows, key heads, columns, head_dim)``, first.
        """
        num_key_heads = all_keys.shape[1]
        num_heads = queries.shape[1] // size
        shared = num_heads // num_key_heads
        for token in range(starts.shape[0] * num_new):
            row, column = token // num_new, starts[token // num_new] + token % num_new
            for head in range(num_heads):
                _rotated(queries, token, head, size, query_norm, eps, cos, sin)
            for head in range(num_key_heads):
                _rotated(keys, token, head, size, key_norm, eps, cos, sin)
                for k in range(size):
                    key, value = keys[token, head * size + k], values[token, head * size + k]
                    all_keys[row, head, column, k] = as_stored(key, all_keys[row, head, column, k])
                    all_values[row, head, column, k] = as_stored(value, all_values[row, head, column, k])
        for place in prange(len(starts) * num_key_heads):
            row, key_head = place // num_key_heads, place % num_key_heads
            start, end = starts[row], starts[row] + num_new
            oldest = max(0, start + 1 - window)
            weights = np.empty((num_new * shared, end - oldest), np.float32)
            largest = np.full(num_new * shared, -np.inf, np.float32)
            blocks = range(oldest // at_once * at_once, end, at_once)
            for block in blocks:
                for new in range(num_new):
                    begin, stop = max(0, start + new + 1 - window, block), min(start + new + 1, block + at_once)
                    for head in range(shared if begin < stop else 0):
                        token, at, query = row * num_new + new, (key_head * shared + head) * size, new * shared + head
                        out = weights[query, begin - oldest :]
                        found = _scores(
                            queries, token, at, all_keys, row, key_head, begin, stop, scale, out, size, lanes
                        )
                        largest[query] = max(largest[query], found)
            for query in range(num_new * shared):
                stop = start + query // shared + 1
                seen = weights[query, max(0, stop - window) - oldest : stop - oldest]
                total = _ZERO
                for column in range(len(seen)):
                    weight = exponential(seen[column] - largest[query])
                    seen[column] = weight
                    total += weight
                largest[query] = total
                token, at = row * num_new + query // shared, (key_head * shared + query % shared) * size
                for k in range(at, at + size):
                    queries[token, k] = _ZERO
            for block in blocks:
                for new in range(num_new):
                    begin, stop = max(0, start + new + 1 - window, block), min(start + new + 1, block + at_once)
                    for head in range(shared if begin < stop else 0):
                        token, at, query = row * num_new + new, (key_head * shared + head) * size, new * shared + head
                        given = weights[query, begin - oldest :]
                        _add_values(given, all_values, row, key_head, begin, stop, queries, token, at, size, lanes)
            for query in range(num_new * shared):
                token, at = row * num_new + query // shared, (key_head * shared + query % shared) * size
                for k in range(at, at + size):
                    queries[token, k] /= largest[query]

    return loop


@part_of_loops
def _rotated(x: Any, token: int, head: int, size: int, weight: Any, eps: Any, cos: Any, sin: Any) -> None:
    """One head of one token normed, if there is a weight, and rotated as far as there are angles, in place."""
    begin, half = head * size, cos.shape[1]
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
        x[token, begin + half + k] = high * cos[token, k] + low * sin[token, k]


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def _scores(
    _context: Any,
    queries: Any,
    token: Any,
    at: Any,
    keys: Any,
    row: Any,
    head: Any,
    begin: Any,
    end: Any,
    scale: Any,
    scores: Any,
    size: Any,
    lanes: Any,
) -> Any:
    """Machine code that writes a query's scores of some columns, and gives the largest of them."""
    taken = (queries, token, at, keys, row, head, begin, end, scale, scores, size, lanes)
    return types.float32(*taken), functools.partial(_emit_scores, size=size.literal_value, lanes=lanes.literal_value)


def _emit_scores(context: Any, builder: Any, signature: Any, arguments: Any, *, size: int, lanes: int) -> Any:
    """The instructions of :func:`_scores`: dot products of as many columns as there are lanes.

    There are as many sums as columns, each in the lanes of a register, and in the end one register with a sum in each
    lane: two of them are added after every other lane, or pair of lanes, and so on, was exchanged.

    The last columns are taken once more with those before them; fewer than there are lanes are taken one by one.
    """
    queries, keys, scores = (
        context.make_array(signature.args[place])(context, builder, arguments[place]) for place in (0, 3, 9)
    )
    token, at, row, head, begin, end = _wholes(context, builder, signature, arguments, (1, 2, 4, 5, 6, 7))
    scale, whole, vector = arguments[8], ir.IntType(64), ir.VectorType(ir.FloatType(), lanes)
    asked = builder.gep(queries.data, [builder.add(builder.mul(token, _last(builder, queries)), at)])
    first_key = _of_head(builder, keys, row, head, size)
    query = [_load(builder, asked, whole(place), lanes) for place in range(0, size, lanes)]

    def dots(column: Any) -> Any:
        key = builder.gep(first_key, [builder.mul(column, whole(size))])
        total = ir.Constant(vector, None)
        for number, part in enumerate(query):
            total = _fma(builder, _load(builder, key, whole(number * lanes), lanes), part, total)
        return total

    def summed(column: Any, count: int) -> Any:
        if count == 1:
            return dots(column)
        digit = count // 2
        pair = summed(column, digit), summed(builder.add(column, whole(digit)), digit)
        return builder.fadd(*exchanged(builder, *pair, digit))

    least = ir.Constant(ir.FloatType(), float("-inf"))
    largest = cgutils.alloca_once_value(builder, least)
    are_few = builder.icmp_signed("<", builder.sub(end, begin), whole(lanes))
    with builder.if_else(are_few) as (few, many):
        with few, cgutils.for_range_slice(builder, begin, end, whole(1), whole) as (column, _):
            score = builder.fmul(_added_up(builder, dots(column)), scale)
            builder.store(score, builder.gep(scores.data, [builder.sub(column, begin)]))
            builder.store(_larger(builder, score, builder.load(largest)), largest)
        with many:
            largest_in_lanes = cgutils.alloca_once_value(builder, ir.Constant(vector, [least] * lanes))
            latest = builder.sub(end, whole(lanes))
            with cgutils.for_range_slice(builder, begin, end, whole(lanes), whole) as (column, _):
                first = builder.select(builder.icmp_signed("<", column, latest), column, latest)
                found = builder.fmul(summed(first, lanes), in_all_lanes(builder, scale, lanes))
                address = builder.gep(scores.data, [builder.sub(first, begin)])
                builder.store(found, builder.bitcast(address, vector.as_pointer()), align=4)
                builder.store(_larger(builder, found, builder.load(largest_in_lanes)), largest_in_lanes)
            for lane in range(lanes):
                one = builder.extract_element(builder.load(largest_in_lanes), ir.IntType(32)(lane))
                builder.store(_larger(builder, one, builder.load(largest)), largest)
    return builder.load(largest)


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def _add_values(
    _context: Any,
    weights: Any,
    values: Any,
    row: Any,
    head: Any,
    begin: Any,
    end: Any,
    out: Any,
    token: Any,
    at: Any,
    size: Any,
    lanes: Any,
) -> Any:
    """Machine code that adds the values of some columns, each times its weight, to what is there."""
    taken = (weights, values, row, head, begin, end, out, token, at, size, lanes)
    return types.void(*taken), functools.partial(_emit_add_values, size=size.literal_value, lanes=lanes.literal_value)


def _emit_add_values(context: Any, builder: Any, signature: Any, arguments: Any, *, size: int, lanes: int) -> Any:
    """The instructions of :func:`_add_values`: a weight in all lanes times a value's numbers in each."""
    weights, values, out = (
        context.make_array(signature.args[place])(context, builder, arguments[place]) for place in (0, 1, 6)
    )
    row, head, begin, end, token, at = _wholes(context, builder, signature, arguments, (2, 3, 4, 5, 7, 8))
    whole, vector = ir.IntType(64), ir.VectorType(ir.FloatType(), lanes)
    first_value = _of_head(builder, values, row, head, size)
    written = builder.gep(out.data, [builder.add(builder.mul(token, _last(builder, out)), at)])
    before = [_load(builder, written, whole(place), lanes) for place in range(0, size, lanes)]
    sums = [cgutils.alloca_once_value(builder, part) for part in before]
    with cgutils.for_range_slice(builder, begin, end, whole(1), whole) as (column, _):
        alone = builder.load(builder.gep(weights.data, [builder.sub(column, begin)]))
        weight = in_all_lanes(builder, alone, lanes)
        value = builder.gep(first_value, [builder.mul(column, whole(size))])
        for number, total in enumerate(sums):
            part = _load(builder, value, whole(number * lanes), lanes)
            builder.store(_fma(builder, part, weight, builder.load(total)), total)
    for number, total in enumerate(sums):
        address = builder.gep(written, [whole(number * lanes)])
        builder.store(builder.load(total), builder.bitcast(address, vector.as_pointer()), align=4)
    return context.get_dummy_value()


def _wholes(context: Any, builder: Any, signature: Any, arguments: Any, places: tuple[int, ...]) -> list[Any]:
    return [context.cast(builder, arguments[place], signature.args[place], types.int64) for place in places]


def _last(builder: Any, array: Any) -> Any:
    """How long an array's last axis is."""
    return cgutils.unpack_tuple(builder, array.shape)[-1]


def _of_head(builder: Any, cache: Any, row: Any, head: Any, size: int) -> Any:
    """Where a row's keys or values of a head begin."""
    _, num_heads, num_columns, _ = cgutils.unpack_tuple(builder, cache.shape)
    number = builder.mul(builder.add(builder.mul(row, num_heads), head), num_columns)
    return builder.gep(cache.data, [builder.mul(number, number.type(size))])


def _load(builder: Any, begin: Any, place: Any, lanes: int) -> Any:
    """Some numbers as float32, which may be stored as bfloat16."""
    kind = begin.type.pointee
    address = builder.bitcast(builder.gep(begin, [place]), ir.VectorType(kind, lanes).as_pointer())
    is_narrow = isinstance(kind, ir.IntType)
    loaded = builder.load(address, align=2 if is_narrow else 4)
    return widened(builder, loaded) if is_narrow else loaded


def _fma(builder: Any, one: Any, other: Any, added: Any) -> Any:
    kind = ir.FunctionType(added.type, [added.type] * 3)
    fma = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{added.type.count}f32")
    return builder.call(fma, [one, other, added])


def _larger(builder: Any, one: Any, other: Any) -> Any:
    """The larger one of two numbers or of each two lanes; what is no number is left to who sees it later."""
    return builder.select(builder.fcmp_ordered(">", one, other), one, other)


def _added_up(builder: Any, lanes: Any) -> Any:
    number = ir.FloatType()
    kind, name = ir.FunctionType(number, [number, lanes.type]), f"llvm.vector.reduce.fadd.v{lanes.type.count}f32"
    add_up = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(add_up, [ir.Constant(number, 0.0), lanes], fastmath=("reassoc",))
