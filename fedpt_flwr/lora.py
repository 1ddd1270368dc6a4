"""Aggregation of low-rank adapters: what the server makes of many pairs of factors, and which part a device gets.

A LoRA adapter adds ``s B A`` to a frozen matrix of shape (out, in), with ``A`` of shape (r, in), ``B`` of shape (out,
r) and one scale ``s`` for all devices (Hu et al. 2021, arXiv:2106.09685). Averaging ``A`` and ``B`` apart is not
averaging what they do: ``mean(B) mean(A)`` differs from ``mean(B A)`` by the covariance of the two over the devices.
:class:`ProductMean` averages the products and writes the mean as factors of rank r again: the best there are in the
Frobenius norm, by a singular value decomposition. What they leave out is measured. Where all devices hold one ``A``
that no one tunes, the mean of ``B`` is exact by itself (Sun et al. 2024, arXiv:2403.12313).

A device may hold fewer directions than the server: the leading ones (:func:`leading`). In what it sends back the
directions that it never had stand as they were (:func:`completed`), as all weights do that a device does not tune.

Pure array maths; nothing is known of devices or messages.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]

_A, _B = ".lora_A.", ".lora_B."  # what peft calls them, within the name of a weight
ROW_NORM = 1 / math.sqrt(3)
"""Norm of each row of ``A`` after re-factorisation: about that of the rows that peft draws, each value from -1/sqrt(in)
to 1/sqrt(in). So ``A`` and ``B`` are to the optimizer what they are in a new adapter; the size of the product is in
``B``."""


def is_right(name: str) -> bool:
    """Whether this is the name of an ``A``."""
    return _A in name


def is_left(name: str) -> bool:
    """Whether this is the name of a ``B``."""
    return _B in name


def leading_shape(name: str, shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """Shape of a factor of which only the first directions are held.

    Args:
        name: Of the weight.
        shape: Of the whole factor.
        rank: Directions that are held, at most as many as there are.
    """
    return (rank, shape[1]) if is_right(name) else (shape[0], rank)


def leading(name: str, values: NDArray[Any], rank: int) -> NDArray[Any]:
    """The first ``rank`` directions of a factor: rows of an ``A``, columns of a ``B``; a view."""
    return values[:rank] if is_right(name) else values[:, :rank]


def completed(name: str, values: Float32, whole: Float32) -> Float32:
    """A factor with the directions that its device does not hold, as they were before the round.

    Args:
        name: Of the weight.
        values: (rank, in) or (out, rank): what the device made of the directions that it holds.
        whole: The server's own factor.

    Returns:
        Values of the shape of ``whole``; where nothing is missing, ``values`` themselves.
    """
    if values.shape == whole.shape:
        return values
    if is_right(name):
        return np.concatenate([values, whole[len(values) :]])
    return np.concatenate([values, whole[:, values.shape[1] :]], axis=1)


class _ProductSum:
    """``sum_n f_n B_n A_n``: the factors beside each other, or the matrix itself as soon as that takes less memory."""

    def __init__(self) -> None:
        self._lefts: list[Float32] = []
        self._rights: list[Float32] = []
        self._dense: Float32 | None = None

    def add(self, left: Float32, right: Float32, factor: float) -> None:
        left = np.asarray(left * np.float32(factor))
        if self._dense is not None:
            self._dense += left @ right
            return
        self._lefts.append(left)
        self._rights.append(right.copy())  # not a view of a message
        num_out, num_in = left.shape[0], right.shape[1]
        if sum(part.shape[1] for part in self._lefts) * (num_out + num_in) > num_out * num_in:
            self._dense = np.concatenate(self._lefts, axis=1) @ np.concatenate(self._rights)
            self._lefts, self._rights = [], []

    def decomposed(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Its singular value decomposition: (out, k), (k,) from large to small, (k, in)."""
        if self._dense is not None:
            left, sizes, right = np.linalg.svd(self._dense.astype(np.float64), full_matrices=False)
            return left, sizes, right
        return product_svd(np.concatenate(self._lefts, axis=1), np.concatenate(self._rights))


def product_svd(
    left: NDArray[Any], right: NDArray[Any]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Singular value decomposition of ``left @ right``, which is not formed.

    Both are made orthogonal by QR; what is decomposed is the small matrix between them.

    Args:
        left: (out, k).
        right: (k, in).

    Returns:
        (out, n), (n,) from large to small and (n, in), with n the smallest of out, in and k; float64.
    """
    of_left, left_rest = np.linalg.qr(left.astype(np.float64))
    of_right, right_rest = np.linalg.qr(right.astype(np.float64).T)
    inner_left, sizes, inner_right = np.linalg.svd(left_rest @ right_rest.T, full_matrices=False)
    return of_left @ inner_left, sizes, inner_right @ of_right.T


class ProductMean:
    """The weighted mean of products ``B A``, one adapter after the other, as factors of one rank.

    It is used like :class:`fedpt_flwr.aggregate.WeightedMean`. Memory grows by an adapter with every one that is added,
    until the matrices themselves would take no more; then it stays.

    Args:
        expected_weight: The weight that will come in all, above 0.
        rank: Of the result.
    """

    def __init__(self, expected_weight: float, rank: int) -> None:
        self._expected = expected_weight
        self._rank = rank
        self._sums: dict[str, _ProductSum] = {}
        self._names: dict[str, tuple[str, str]] = {}
        self.weight = 0.0
        """What came so far."""
        self.left_out = 0.0
        """Of all matrices taken so far by :meth:`take`: norm of what their factors leave out, over the norm of the
        means; 0 for means of that rank."""

    def add(self, arrays: Iterable[tuple[str, Float32]], weight: float) -> None:
        """Add one adapter.

        Args:
            arrays: Names as peft gives them, and values, float32; an ``A`` and a ``B`` of each module, of the same
                rank, whatever it is.
            weight: Of this adapter, above 0.

        Raises:
            ValueError: One of them is missing.
        """
        waiting: dict[str, tuple[str, Float32]] = {}
        with np.errstate(all="ignore"):  # what is not finite is the caller's to find
            for name, values in arrays:
                module = _module_of(name)
                if module not in waiting:
                    waiting[module] = (name, values)
                    continue
                pair = dict([waiting.pop(module), (name, values)])
                right_name, left_name = min(pair), max(pair)  # "A" is before "B"
                if not is_right(right_name) or not is_left(left_name):
                    raise ValueError(f"{module} must have one lora_A and one lora_B")
                self._names[module] = (right_name, left_name)
                sums = self._sums.setdefault(module, _ProductSum())
                sums.add(pair[left_name], pair[right_name], weight / self._expected)
        if waiting:
            raise ValueError(f"{sorted(waiting)[0]} must have one lora_A and one lora_B")
        self.weight += weight

    def take(self) -> Iterator[tuple[str, Float32]]:
        """Names and factors of the means, directions sorted by size, each given away as it is asked for.

        Raises:
            ValueError: A mean cannot be decomposed, because it is not finite.
        """
        scale = self._expected / self.weight if self.weight else 1.0
        lost = whole = 0.0
        for module in list(self._sums):
            with np.errstate(all="ignore"):
                left, sizes, right = self._sums.pop(module).decomposed()
                sizes = sizes * scale
                lost += float(np.sum(sizes[self._rank :] ** 2))
                whole += float(np.sum(sizes**2))
                self.left_out = math.sqrt(lost / whole) if whole > 0 else 0.0
                a, b = _factors(left, sizes, right, self._rank)
            right_name, left_name = self._names[module]
            yield right_name, a
            yield left_name, b


def _factors(
    left: NDArray[np.float64], sizes: NDArray[np.float64], right: NDArray[np.float64], rank: int
) -> tuple[Float32, Float32]:
    """``A`` (rank, in) and ``B`` (out, rank), float32; a matrix with fewer directions than that leaves zeros."""
    kept = min(rank, len(sizes))
    a = np.zeros((rank, right.shape[1]), np.float32)
    b = np.zeros((left.shape[0], rank), np.float32)
    a[:kept] = ROW_NORM * right[:kept]
    b[:, :kept] = left[:, :kept] * (sizes[:kept] / ROW_NORM)
    return a, b


def _module_of(name: str) -> str:
    """The name without what tells an ``A`` from a ``B``."""
    return name.replace(_A, ".lora.").replace(_B, ".lora.")


def dense_size(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Values of all matrices to which adapters of these shapes are added.

    Args:
        shapes: Of the factors, by name.
    """
    rows = {_module_of(name): shape[0] for name, shape in shapes.items() if is_left(name)}
    return sum(rows[_module_of(name)] * shape[1] for name, shape in shapes.items() if is_right(name))
