"""The weighted mean of many arrays of which only one is in memory at a time.

Pure array maths in float32. Nothing is known of devices or messages; the order in which things are added is the
caller's, and sums depend on it in their last bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray


class WeightedMean:
    """``sum_n w_n x_n / sum_n w_n``, one ``x_n`` after the other.

    Each is multiplied by ``w_n / W`` and added, with ``W`` the weight that is expected in all: that is what Flower's
    ``aggregate_arrayrecords`` does, so that the bits are the same where ``W`` is what came. Where less came, the sum is
    multiplied by ``W / sum_n w_n`` in the end, which rounds once more.

    Args:
        expected_weight: ``W``, above 0.
    """

    def __init__(self, expected_weight: float) -> None:
        self._expected = expected_weight
        self._sums: dict[str, NDArray[np.float32]] = {}
        self.weight = 0.0
        """``sum_n w_n`` so far."""

    def add(self, arrays: Iterable[tuple[str, NDArray[np.float32]]], weight: float) -> None:
        """Add one ``x_n``; the arrays are read one by one and not kept.

        Args:
            arrays: Names and values, each time the same names and shapes, float32.
            weight: ``w_n``, above 0.
        """
        factor = weight / self._expected
        with np.errstate(all="ignore"):  # what is not finite is the caller's to find
            for name, values in arrays:
                part = np.asarray(values * factor)
                if name in self._sums:
                    self._sums[name] += part
                else:
                    self._sums[name] = part
        self.weight += weight

    def take(self) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """Names and means, each given away as it is asked for: afterwards nothing is left."""
        scale = self._expected / self.weight if self.weight else 1.0
        for name in list(self._sums):
            values = self._sums.pop(name)
            if scale != 1.0:
                with np.errstate(all="ignore"):
                    values *= scale
            yield name, values
