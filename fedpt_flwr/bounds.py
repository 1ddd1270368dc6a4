"""How long a device's change is, and the same change made shorter.

Pure array maths. Norms are L2 over all arrays together, summed in float64, so that no finite change is too long to be
measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = Iterable[tuple[str, NDArray[Any]]]
"""Names and values, one after the other; they need not all be in memory."""


def norm(arrays: Arrays) -> float:
    """The L2 norm of all arrays together."""
    total = 0.0
    for _, values in arrays:
        flat = np.asarray(values, np.float64).ravel()
        total += float(flat @ flat)
    return math.sqrt(total)


def update_norm(tuned: Arrays, sent: Mapping[str, NDArray[np.float32]]) -> float:
    """``||tuned - sent||``, over all arrays.

    Args:
        tuned: What a device sent back.
        sent: What it was sent, with the same names and shapes.
    """
    return norm((name, np.subtract(values, sent[name], dtype=np.float64)) for name, values in tuned)


def shortened(
    tuned: Arrays, sent: Mapping[str, NDArray[np.float32]], factor: float
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """``sent + factor * (tuned - sent)``, array by array, rounded to float32.

    Args:
        tuned: What a device sent back.
        sent: What it was sent.
        factor: What the change is multiplied by.

    Yields:
        Names and values.
    """
    for name, values in tuned:
        change = np.subtract(values, sent[name], dtype=np.float64)
        yield name, np.asarray(sent[name] + factor * change, np.float32)
