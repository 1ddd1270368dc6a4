"""How sure one can be of a number that was measured on some items: intervals, by counting and by resampling.

Intervals are of 95 %: Wilson's for shares (Wilson 1927), the percentile bootstrap over items for losses; two models are
compared by the paired bootstrap, which resamples the items that both answered (Koehn 2004).
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Interval = tuple[float, float]

T_INTERVALS = (
    "Intervals over the seeds are Student's t intervals: with few seeds they are wide and may go beyond 0 and 100 %, "
    "and of two seeds they say little."
)
"""What to say below a table of such intervals."""

_RESAMPLES = 10_000
_RESAMPLED_AT_ONCE = 2**17  # item counts; larger blocks leave the processor's cache and are slower
_Z_95 = 1.959963984540054  # 97.5 % quantile of the standard normal distribution


def wilson_interval(successes: int, n: int) -> Interval:
    """95 % interval of a share (Wilson 1927), good for small n and for shares near 0 and 1.

    Args:
        successes: Items that count, 0 to ``n``.
        n: Items, at least 1.
    """
    share, z2 = successes / n, _Z_95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z_95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    # At both ends the formula gives 0 and 1 exactly, but for rounding.
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == n else centre + half)


def bootstrap_sums(columns: FloatArray, *, seed: int, resamples: int = _RESAMPLES) -> FloatArray:
    """Sums over items drawn with replacement, as often as there are items.

    Args:
        columns: ``(items, quantities)``. All quantities of an item are drawn together, so ratios and differences of
            the sums are paired.
        seed: The same seed and number of items give the same draws.
        resamples: Repetitions.

    Returns:
        ``(resamples, quantities)``, float64.
    """
    generator = np.random.default_rng(seed)
    items = len(columns)
    at_once = max(1, _RESAMPLED_AT_ONCE // items)
    sums = []
    for first in range(0, resamples, at_once):
        count = min(at_once, resamples - first)
        drawn = generator.integers(0, items, (count, items), dtype=np.int32)
        drawn += np.arange(count, dtype=np.int32)[:, None] * items
        times_drawn = np.bincount(drawn.ravel(), minlength=count * items).reshape(count, items)
        sums.append(times_drawn.astype(np.float64) @ columns)
    return np.concatenate(sums)


def bootstrap_ratio(numerators: FloatArray, denominators: FloatArray, *, seed: int) -> Interval:
    """95 % percentile interval of ``sum(numerators) / sum(denominators)`` over items.

    Args:
        numerators: ``(items,)``, finite.
        denominators: ``(items,)``; items where it is 0 are left out, and at least one is not.
        seed: Of the draws.
    """
    present = denominators > 0
    sums = bootstrap_sums(np.stack([numerators[present], denominators[present]], axis=1), seed=seed)
    low, high = np.percentile(sums[:, 0] / sums[:, 1], [2.5, 97.5])
    return float(low), float(high)


def paired_bootstrap(
    first: npt.ArrayLike, second: npt.ArrayLike, seed: int, *, tokens: npt.ArrayLike | None = None
) -> tuple[float, float, float]:
    """How much more the first model has than the second, per item or per token, on the same items.

    Args:
        first: One number per item of the first model: 0 or 1 for right answers, or the item's nats.
        second: The same of the second model.
        seed: Of the draws.
        tokens: Answer tokens per item, for a difference per token; None: per item.

    Returns:
        The difference ``first - second`` and its 95 % percentile interval.
    """
    difference = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    weights = np.ones_like(difference) if tokens is None else np.asarray(tokens, dtype=np.float64)
    low, high = bootstrap_ratio(difference, weights, seed=seed)
    return float(difference.sum() / weights.sum()), low, high


def gap_closed(proxy: float | None, large: float | None, reference: float | None) -> float | None:
    """Share of the way from the large model to a reference that the proxy goes: 1 is all of it, 0 none.

    Args:
        proxy: A metric of the proxy of which more is better.
        large: The same metric of the untuned large model.
        reference: The same metric of the reference, such as the large model tuned by the devices themselves.

    Returns:
        The share, or None where it has no meaning: a number is missing, or the reference is no better than the large.
    """
    if proxy is None or large is None or reference is None or not all(map(math.isfinite, (proxy, large, reference))):
        return None
    return (proxy - large) / (reference - large) if reference > large else None
