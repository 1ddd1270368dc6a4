"""How sure a comparison is: over seeds, over test items, and over all that is compared at once.

Two questions, two intervals, and neither answers the other:

- another draw of seeds: Student's t interval of the mean over the seeds;
- another draw of test items: the paired bootstrap over items (Koehn 2004). What all seeds made of an item is drawn
  together, since it is one item and no independent draws of it. The seeds stay as they are.

Each difference has a two-sided p value from the bootstrap, ``2 min(P(d* <= 0), P(d* >= 0))``, counted with one more
resample on either side so that it is never 0 (Davison and Hinkley 1997, section 4.2.5). Of several differences that are
looked at together, Holm's procedure (Holm 1979) raises the p values so that the chance of one false claim among all of
them stays below the level.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fedpt_flwr.uncertainty import bootstrap_sums

FloatArray = npt.NDArray[np.float64]

_SEED = 20_241_001  # of the bootstrap: the same cells give the same intervals

ITEM_MEASURES = ("exact_match", "rouge_l", "loss")
"""What is kept of every test item and compared item by item; of an item, what was not measured is None."""

Items = Mapping[str, Any]
"""What a cell holds of its test items: ``keys``, ``tokens``, and ``rows`` with marks and losses by row."""


# --- over seeds ------------------------------------------------------------------------------------------------------


def mean_over_seeds(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean, t interval and values; no mean where a value is missing, since leaving out what went wrong flatters."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return {"mean": None, "ci95": None, "values": list(values)}
    interval = t_interval(known)
    return {
        "mean": statistics.fmean(known),
        "ci95": None if interval is None else list(interval),
        "values": list(values),
    }


def t_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % interval of a mean by Student's t: how far another draw of seeds could move it.

    It may reach beyond what a share can be.

    Args:
        values: One for each seed.

    Returns:
        Both ends, or None for a single value.
    """
    if len(values) < 2:
        return None
    mean = statistics.fmean(values)
    half = t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half


def t_quantile(freedom: int) -> float:
    """97.5 % quantile of Student's t distribution, found by halving an interval that holds it.

    SciPy has this function, but is no dependency of the project.

    Args:
        freedom: Degrees of freedom, at least 1.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(100):
        angle = (low + high) / 2
        low, high = (angle, high) if _central_t(angle, freedom) < 0.95 else (low, angle)
    return math.sqrt(freedom) * math.tan(low)


def _central_t(angle: float, freedom: int) -> float:
    """Probability that ``|t| < sqrt(freedom) * tan(angle)`` (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4)."""
    is_odd = freedom % 2
    total = 0.0
    term = math.cos(angle) if is_odd else 1.0
    for power in range(3 if is_odd else 2, freedom + 1, 2):
        total += term
        term *= (power - 1) / power * math.cos(angle) ** 2
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if is_odd else total


def merged_bins(parts: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """The ``bins`` of several calibrations added up: answers, probabilities and right answers of each."""
    return [
        [sum(column) for column in zip(*same, strict=True)]
        for same in zip(*(part["bins"] for part in parts), strict=True)
    ]


# --- over items ------------------------------------------------------------------------------------------------------


def item_sums(columns: Sequence[Sequence[tuple[Items, str]]], measure: str) -> FloatArray | None:
    """For each item what several rows made of it, summed over the seeds; items are those that all rows have.

    Args:
        columns: For each seed the rows to look at: the cell's items and the row's name.
        measure: One of :data:`ITEM_MEASURES`; a loss is weighted by the tokens of its answer.

    Returns:
        ``(items, rows + 1)``, the last column the number of values (or tokens) in each sum; None where a row lacks the
        measure of an item, or there is nothing.
    """
    found: dict[str, FloatArray] = {}
    for rows in columns:
        values = []
        for items, name in rows:
            column = items.get("rows", {}).get(name, {}).get(measure)
            if not column or any(value is None for value in column):
                return None
            values.append(dict(zip(items["keys"], column, strict=True)))
        weights = dict(zip(rows[0][0]["keys"], rows[0][0]["tokens"], strict=True)) if measure == "loss" else {}
        for key in values[0]:
            if all(key in column for column in values):
                weight = float(weights.get(key, 1))
                line = np.asarray([*(weight * float(column[key]) for column in values), weight])
                found[key] = found[key] + line if key in found else line
    return np.stack(list(found.values())) if found else None


def paired_difference(
    columns: Sequence[tuple[tuple[Items, str], tuple[Items, str]]], measure: str
) -> dict[str, Any] | None:
    """How much more the first row has than the second, by the paired bootstrap over items.

    Args:
        columns: For each seed the two rows.
        measure: One of :data:`ITEM_MEASURES`.

    Returns:
        ``value``, ``ci95``, ``p``, ``items``, and ``by_seed`` with the mean over the seeds and its t interval; None
        where a row was not measured.
    """
    sums = item_sums(columns, measure)
    if sums is None:
        return None
    resampled = bootstrap_sums(sums, seed=_SEED)
    drawn = (resampled[:, 0] - resampled[:, 1]) / resampled[:, 2]
    low, high = np.percentile(drawn, [2.5, 97.5])
    total = sums.sum(0)
    each = [item_sums([pair], measure) for pair in columns]
    by_seed = [float((part[:, 0] - part[:, 1]).sum() / part[:, 2].sum()) for part in each if part is not None]
    return {
        "value": float((total[0] - total[1]) / total[2]),
        "ci95": [float(low), float(high)],
        "p": bootstrap_p(drawn),
        "items": len(sums),
        "by_seed": mean_over_seeds(by_seed),
    }


def bootstrap_p(drawn: FloatArray) -> float:
    """Two-sided p value of a difference of 0, from resampled differences."""
    below, above = int((drawn <= 0).sum()), int((drawn >= 0).sum())
    return min(1.0, 2 * (min(below, above) + 1) / (len(drawn) + 1))


def gap_over_items(columns: Sequence[Sequence[tuple[Items, str]]], measure: str = "exact_match") -> list[float] | None:
    """95 % interval over items of the share of a gap that is closed.

    Args:
        columns: For each seed proxy, large and reference.
        measure: What the gap is of.

    Returns:
        Both ends; None where a row was not measured, or the reference is no better than the large model in more than
        one resample of a hundred, so that there is no gap to speak of.
    """
    sums = item_sums(columns, measure)
    if sums is None:
        return None
    proxy, large, reference, _ = bootstrap_sums(sums, seed=_SEED).T
    is_gap = reference > large
    if is_gap.mean() < 0.99:
        return None
    low, high = np.percentile((proxy - large)[is_gap] / (reference - large)[is_gap], [2.5, 97.5])
    return [float(low), float(high)]


def holm(p_values: Sequence[float]) -> list[float]:
    """P values raised for having looked at all of them (Holm 1979).

    Args:
        p_values: One for each comparison of the family.

    Returns:
        In the same order: the smallest times their number, the next times one less, and so on; never smaller than the
        one before it, and 1 at most.
    """
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    raised = [0.0] * len(p_values)
    largest = 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        raised[index] = largest
    return raised
