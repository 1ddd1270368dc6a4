"""Numbers as integers modulo a power of two, so that masks can hide them and a sum of them is exact.

A device's number ``x`` in ``[-limit, limit]``, with its share ``p`` of the whole weight, becomes the integer nearest to
``p x / step``. Shares add up to at most 1, so the sum of all devices' integers fits between the two halves of the ring,
and is the same in whatever order they are added. What rounding loses is at most half a step for each device:
:meth:`Ring.error`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

Words = NDArray[Any]
"""Little-endian unsigned integers of 16 or 32 bits, which wrap round."""


@dataclasses.dataclass(frozen=True, slots=True)
class Ring:
    """The integers modulo ``2 ** bits``, read as numbers.

    Attributes:
        bits: Of :data:`~fedpt_flwr.config.SECURE_SUM_WIDTHS`.
        limit: Largest magnitude of a number, above 0; larger ones are cut to it.
        num_devices: How many integers a sum may have, below ``2 ** (bits - 2)``.
    """

    bits: int
    limit: float
    num_devices: int

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the words."""
        return np.dtype(f"<u{self.bits // 8}")

    @property
    def step(self) -> float:
        """The number that the integer 1 stands for."""
        # Each of num_devices integers may be rounded away from 0 by a half.
        largest: int = 2 ** (self.bits - 1) - 1 - (self.num_devices + 1) // 2
        return self.limit / largest

    def encode(self, values: NDArray[np.float32], share: float) -> tuple[Words, int]:
        """A device's numbers as integers.

        Args:
            values: Finite, of any shape.
            share: The device's share of the whole weight, above 0 and at most 1.

        Returns:
            Words of the same shape, and how many of the values were cut to the limit.
        """
        cut = int(np.count_nonzero(np.abs(values) > self.limit))
        numbers = np.clip(values.astype(np.float64), -self.limit, self.limit)
        numbers *= share / self.step
        return np.rint(numbers, out=numbers).astype(np.int64).astype(self.dtype), cut

    def decode(self, total: Words, share: float) -> NDArray[np.float64]:
        """The mean that a sum stands for.

        Args:
            total: Sum of the words of some devices.
            share: Sum of their shares.
        """
        return total.astype(f"<i{self.bits // 8}").astype(np.float64) * (self.step / share)

    def error(self, num_summed: int, share: float) -> float:
        """How far a decoded mean can be from the mean of numbers that were not cut: half a step for each device.

        Args:
            num_summed: How many devices' words were summed.
            share: Sum of their shares.
        """
        return num_summed * self.step / 2 / share
