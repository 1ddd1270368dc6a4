"""Arrays in 8 bits a value: blocks of whole numbers from -127 to 127, each block with a scale of its own.

An array is laid out row by row and cut into blocks of :data:`BLOCK` values, the last one shorter. The scale of a
block is its largest magnitude over 127, a float32; a value is its nearest multiple of the scale, so it is wrong by
half a scale at most. All scales (4 bytes each, little-endian) come first, then all values, in one array of bytes: for
each block of 256 values 4 bytes more.

What a rounding loses can be added to what is rounded next (error feedback, Seide et al. 2014; Karimireddy et al.
2019, arXiv:1901.09847): :func:`quantised_with_feedback`. Then the sum of all that was sent is the sum of all that was
meant, but for the last loss. Pure array maths.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]

BLOCK = 256
"""Values with one scale."""

LARGEST = 127
_SCALE_BYTES = 4


def packed_size(num_values: int) -> int:
    """Bytes that so many values take, with their scales."""
    return num_values + _SCALE_BYTES * math.ceil(num_values / BLOCK)


def quantised(values: Float32) -> NDArray[np.int8]:
    """Values in 8 bits.

    Args:
        values: Of any shape. Where a value is not finite, neither is the scale of its block.

    Returns:
        (:func:`packed_size` of their number,)
    """
    flat = np.ascontiguousarray(values, np.float32).reshape(-1)
    blocks = np.zeros((math.ceil(flat.size / BLOCK), BLOCK), np.float32)
    blocks.reshape(-1)[: flat.size] = flat
    scales = np.abs(blocks).max(axis=1, initial=0.0) / np.float32(LARGEST)
    # A scale below the normal numbers would have lost its precision; such values are zeros.
    scales[scales < np.finfo(np.float32).tiny] = 0.0
    usable = np.isfinite(scales) & (scales > 0)
    whole = np.zeros(blocks.shape, np.int8)
    whole[usable] = np.clip(np.rint(blocks[usable] / scales[usable, None]), -LARGEST, LARGEST)
    return np.concatenate([scales.astype("<f4").view(np.int8), whole.reshape(-1)[: flat.size]])


def restored(packed: NDArray[Any], shape: tuple[int, ...]) -> Float32:
    """The values that :func:`quantised` wrote, rounded.

    Args:
        packed: int8, of :func:`packed_size` of the number of values.
        shape: Of the values.
    """
    scales, whole = _parts(packed, math.prod(shape))
    with np.errstate(over="ignore"):  # scales that were made up are found by check_packed
        return np.asarray(whole.astype(np.float32) * np.repeat(scales, BLOCK)[: whole.size]).reshape(shape)


def check_packed(packed: NDArray[Any], num_values: int) -> str:
    """What is wrong with bytes that came from elsewhere, or nothing.

    Args:
        packed: int8, of :func:`packed_size` of ``num_values``.
        num_values: How many values there are.
    """
    scales, whole = _parts(packed, num_values)
    with np.errstate(over="ignore", invalid="ignore"):
        # The largest value that a scale allows must be a number too.
        wrong = ~np.isfinite(scales * np.float32(LARGEST)) | (scales < 0)
    if wrong.any():
        return "some of its scales are not finite numbers of at least 0"
    if (whole < -LARGEST).any():
        return f"its values must be from -{LARGEST} to {LARGEST}"
    return ""


def quantised_with_feedback(values: Float32, residual: Float32 | None) -> tuple[NDArray[np.int8], Float32]:
    """Values and what earlier ones lost, in 8 bits; and what is lost now.

    Args:
        values: Finite, of any shape.
        residual: What was lost before, of the same shape; None: nothing.

    Returns:
        What is sent, and the next residual.
    """
    wanted = values if residual is None else np.asarray(values + residual)
    packed = quantised(wanted)
    return packed, np.asarray(wanted - restored(packed, wanted.shape))


def _parts(packed: NDArray[Any], num_values: int) -> tuple[Float32, NDArray[np.int8]]:
    begin = packed_size(num_values) - num_values
    scales = np.ascontiguousarray(packed[:begin]).view("<f4").astype(np.float32, copy=False)
    return scales, packed[begin:]
