"""A few rows times a plain weight, for processors on which no library of torch is fast at that.

Judging drafts multiplies two to eight rows by weights that are far larger than any cache, which need not cost more
than to read the weights once. On processors with AVX2 and no AVX512, both of torch's libraries take two to four times
as long for four rows as for one, and with small weights for one row, too, longer than it takes to read them
(``benchmarks/products.py``). The loops below read each weight once for all rows of the input; numba compiles them,
once for a machine. :func:`multiply` is for tensors, whoever asks; :func:`into` is for arrays that are laid out as the
loops want them, which ``few_tokens.py`` has.

Every sum is added up in an order that depends on nothing but its length and the number of rows, so results do not
depend on the number of threads.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from numba import prange
from torch import Tensor

Array = npt.NDArray[np.float32]

MOST_ROWS = 8
"""More rows are left to torch, whose libraries are made for that."""

_LONG, _VERY_LONG = 768, 2048  # weights in a row
_ZERO = np.float32(0.0)
_FLAGS = {"reassoc", "contract", "nsz"}  # sums may be vectorised; NaN and infinities stay what they are


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What ``torch.nn.functional.linear`` gives, up to the rounding of sums.

    Args:
        x: ``(..., in_features)`` float32 on the CPU.
        weight: ``(out_features, in_features)``, the same, with rows one behind the other in memory.
        bias: ``(out_features,)`` or None.

    Returns:
        ``(..., out_features)`` float32.

    Raises:
        RuntimeError: Dtypes or sizes do not fit, as torch says it.
    """
    num_out, num_in = weight.shape
    num_rows = x.numel() // num_in if num_in else 0
    if not 1 <= num_rows <= MOST_ROWS or x.shape[-1] != num_in or x.dtype != torch.float32:
        return F.linear(x, weight, bias)
    padded = padded_rows(num_rows)
    rows = x.reshape(num_rows, num_in).contiguous()
    if padded > num_rows:
        rows = F.pad(rows, (0, 0, 0, padded - num_rows))
    product = torch.empty(padded, num_out, dtype=torch.float32, device=x.device)
    _kernel(padded, torch.get_num_threads() > 1)(weight.numpy(), rows.numpy(), product.numpy())
    product = product[:num_rows]
    if bias is not None:
        product += bias
    return product.view(*x.shape[:-1], num_out)


def padded_rows(num_rows: int) -> int:
    """For how many rows there is a loop that takes so many: 1, 4 or 8."""
    return 1 if num_rows == 1 else 4 if num_rows <= 4 else 8


def into(product: Array, x: Array, weight: Array, bias: Array | None) -> None:
    """Write a product where it belongs.

    Args:
        product: ``(rows, out_features)``; 1, 4 or 8 rows.
        x: ``(rows, in_features)``.
        weight: ``(out_features, in_features)``.
        bias: ``(out_features,)`` or None.
    """
    _kernel(len(x), torch.get_num_threads() > 1)(weight, x, product)
    if bias is not None:
        product += bias


def compiled(loop: Any, signatures: Any = None, **options: Any) -> Any:
    """A loop for machine code, kept on disk for the next process if there is a place where it may be written."""
    options |= {"fastmath": _FLAGS, "nogil": True}
    try:
        return numba.njit(signatures, cache=True, **options)(loop)
    except RuntimeError:  # neither beside this file nor in the user's cache
        return numba.njit(signatures, **options)(loop)


@cache
def _kernel(num_rows: int, in_threads: bool) -> Any:
    """The compiled loop for so many rows; in threads, for as many as torch uses."""
    matrix = numba.types.Array(numba.float32, 2, "C", readonly=True)
    signature = numba.void(matrix, matrix, numba.float32[:, ::1])
    kernel = compiled(_LOOPS[num_rows], [signature], parallel=in_threads)
    if not in_threads:
        return kernel

    def with_threads(weight: Any, x: Any, product: Any) -> None:
        numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
        kernel(weight, x, product)

    numba.config.THREADING_LAYER = "threadsafe"  # the one that is left otherwise ends the process if two threads ask
    try:
        one = np.zeros((num_rows, 1), np.float32)
        with_threads(np.zeros((1, 1), np.float32), one, one.copy())
    except ValueError:  # there is none here
        return _kernel(num_rows, in_threads=False)
    return with_threads


# Blocks of weights' rows share what they read of x, but the sums over registers at the end of each row take their time:
# where rows are short, one after the other is faster.


def _one(weight: Any, x: Any, product: Any) -> None:
    num_out, num_in = weight.shape
    num_blocks = num_out // 4 if num_in >= _LONG else 0
    for block in prange(num_blocks):
        i = 4 * block
        a = b = c = d = _ZERO
        for k in range(num_in):
            a += weight[i, k] * x[0, k]
            b += weight[i + 1, k] * x[0, k]
            c += weight[i + 2, k] * x[0, k]
            d += weight[i + 3, k] * x[0, k]
        product[0, i], product[0, i + 1], product[0, i + 2], product[0, i + 3] = a, b, c, d
    for i in prange(4 * num_blocks, num_out):
        total = _ZERO
        for k in range(num_in):
            total += weight[i, k] * x[0, k]
        product[0, i] = total


def _four(weight: Any, x: Any, product: Any) -> None:
    num_out, num_in = weight.shape
    num_blocks = num_out // 4 if num_in >= _VERY_LONG else 0
    for block in prange(num_blocks):
        i = 4 * block
        a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = _ZERO
        c0 = c1 = c2 = c3 = d0 = d1 = d2 = d3 = _ZERO
        for k in range(num_in):
            a, b, c, d = weight[i, k], weight[i + 1, k], weight[i + 2, k], weight[i + 3, k]
            x0, x1, x2, x3 = x[0, k], x[1, k], x[2, k], x[3, k]
            a0 += a * x0
            a1 += a * x1
            a2 += a * x2
            a3 += a * x3
            b0 += b * x0
            b1 += b * x1
            b2 += b * x2
            b3 += b * x3
            c0 += c * x0
            c1 += c * x1
            c2 += c * x2
            c3 += c * x3
            d0 += d * x0
            d1 += d * x1
            d2 += d * x2
            d3 += d * x3
        product[0, i], product[1, i], product[2, i], product[3, i] = a0, a1, a2, a3
        product[0, i + 1], product[1, i + 1], product[2, i + 1], product[3, i + 1] = b0, b1, b2, b3
        product[0, i + 2], product[1, i + 2], product[2, i + 2], product[3, i + 2] = c0, c1, c2, c3
        product[0, i + 3], product[1, i + 3], product[2, i + 3], product[3, i + 3] = d0, d1, d2, d3
    for i in prange(4 * num_blocks, num_out):
        a0 = a1 = a2 = a3 = _ZERO
        for k in range(num_in):
            a = weight[i, k]
            a0 += a * x[0, k]
            a1 += a * x[1, k]
            a2 += a * x[2, k]
            a3 += a * x[3, k]
        product[0, i], product[1, i], product[2, i], product[3, i] = a0, a1, a2, a3


def _eight(weight: Any, x: Any, product: Any) -> None:
    num_out, num_in = weight.shape
    num_blocks = num_out // 2 if num_in >= _VERY_LONG else 0
    for block in prange(num_blocks):
        i = 2 * block
        a0 = a1 = a2 = a3 = a4 = a5 = a6 = a7 = _ZERO
        b0 = b1 = b2 = b3 = b4 = b5 = b6 = b7 = _ZERO
        for k in range(num_in):
            a, b = weight[i, k], weight[i + 1, k]
            x0, x1, x2, x3 = x[0, k], x[1, k], x[2, k], x[3, k]
            x4, x5, x6, x7 = x[4, k], x[5, k], x[6, k], x[7, k]
            a0 += a * x0
            a1 += a * x1
            a2 += a * x2
            a3 += a * x3
            a4 += a * x4
            a5 += a * x5
            a6 += a * x6
            a7 += a * x7
            b0 += b * x0
            b1 += b * x1
            b2 += b * x2
            b3 += b * x3
            b4 += b * x4
            b5 += b * x5
            b6 += b * x6
            b7 += b * x7
        product[0, i], product[1, i], product[2, i], product[3, i] = a0, a1, a2, a3
        product[4, i], product[5, i], product[6, i], product[7, i] = a4, a5, a6, a7
        product[0, i + 1], product[1, i + 1], product[2, i + 1], product[3, i + 1] = b0, b1, b2, b3
        product[4, i + 1], product[5, i + 1], product[6, i + 1], product[7, i + 1] = b4, b5, b6, b7
    for i in prange(2 * num_blocks, num_out):
        a0 = a1 = a2 = a3 = a4 = a5 = a6 = a7 = _ZERO
        for k in range(num_in):
            a = weight[i, k]
            a0 += a * x[0, k]
            a1 += a * x[1, k]
            a2 += a * x[2, k]
            a3 += a * x[3, k]
            a4 += a * x[4, k]
            a5 += a * x[5, k]
            a6 += a * x[6, k]
            a7 += a * x[7, k]
        product[0, i], product[1, i], product[2, i], product[3, i] = a0, a1, a2, a3
        product[4, i], product[5, i], product[6, i], product[7, i] = a4, a5, a6, a7


_LOOPS = {1: _one, 4: _four, 8: _eight}
