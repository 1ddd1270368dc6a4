"""Whether a record was trained on, told by what a model makes of it: three attacks, and how well they do.

    loss              members are the records that the model finds likely: minus its nats per answer token (Yeom et al.
                      2018, arXiv:1709.01604)
    calibrated        what tuning changed: the nats that the model before tuning needs minus those that the attacked one
                      needs. The cheap likelihood ratio, with the public model as its reference
    likelihood_ratio  what tuning on this record changed: a likelihood ratio of two Gaussians, one of shadow federations
                      that trained on the record and one of those that did not (Carlini et al. 2022, arXiv:2112.03570),
                      with one variance for all records, since there are few shadows

An attack gives every record a score. It is judged by the area under its ROC curve, and by how many members it finds
where it may take few others for members: at a false positive rate of 1 % and 0.1 %.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from fedpt_flwr.compare.statistics import mean_over_seeds

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

LOSS, CALIBRATED, LIKELIHOOD_RATIO = "loss", "calibrated", "likelihood_ratio"

FALSE_POSITIVE_RATES: Mapping[str, float] = {"tpr_at_1_percent": 0.01, "tpr_at_0.1_percent": 0.001}
"""Measures of an attack besides ``auc``: the true positive rate at each of these false positive rates."""

LEAST_SHADOWS = 4
"""With fewer, nothing tells how much a record's loss differs between federations that agree on it."""

_RESAMPLES = 1000
_WEIGHTS_AT_ONCE = 2**21
_SEED = 20_241_001  # of the bootstrap: the same results give the same intervals
_LEAST_NATS = 1e-9  # an answer that is certain has no logarithm of its odds


# --- scores ----------------------------------------------------------------------------------------------------------


def loss_scores(nats: FloatArray, tokens: FloatArray) -> FloatArray:
    """Scores of the attack by loss.

    Args:
        nats: What each record's answer costs the attacked model, ``(records,)``.
        tokens: Tokens of each answer.
    """
    return -nats / tokens


def calibrated_scores(nats: FloatArray, reference: FloatArray) -> FloatArray:
    """Scores of the attack by the change of the loss.

    Args:
        nats: What each record's answer costs the attacked model, ``(records,)``.
        reference: What it costs the model before tuning.
    """
    return reference - nats


@dataclass(frozen=True, slots=True)
class Shadow:
    """What a shadow federation made of the records.

    Attributes:
        nats: What each record's answer costs its model, ``(records,)``.
        is_member: Which records it was trained on.
    """

    nats: FloatArray
    is_member: BoolArray


def likelihood_ratio_scores(nats: FloatArray, shadows: Sequence[Shadow]) -> FloatArray:
    """Scores of the attack by likelihood ratio: ``log p(x | in) - log p(x | out)``.

    ``x`` is the logarithm of the odds of the record's answer. For each record the shadows give a mean with it and one
    without it; the variance around these means is one for all. So few shadows leave the difference of a record's two
    means uncertain, and it is pulled towards that of all records, as far as the variance says (empirical Bayes).

    Args:
        nats: What each record's answer costs the attacked model, ``(records,)``.
        shadows: At least :data:`LEAST_SHADOWS`; each record must be in two of them and out of two.

    Returns:
        ``(records,)``; NaN for a record that some model was not asked about.
    """
    known = np.isfinite(nats) & np.isfinite(np.stack([shadow.nats for shadow in shadows])).all(0)
    scores = np.full(len(nats), np.nan)
    values = np.stack([log_odds(shadow.nats[known]) for shadow in shadows])  # (shadows, records)
    inside = np.stack([shadow.is_member[known] for shadow in shadows])
    num_in, num_out = inside.sum(0), (~inside).sum(0)
    mean_in = np.where(inside, values, 0.0).sum(0) / num_in
    mean_out = np.where(inside, 0.0, values).sum(0) / num_out
    around = values - np.where(inside, mean_in, mean_out)
    variance = float((around**2).sum() / (num_in + num_out - 2).sum())
    gap = mean_in - mean_out
    error = variance * (1 / num_in + 1 / num_out)  # of a gap
    spread = max(0.0, float(gap.var() - error.mean()))  # of the true gaps
    trust = spread / (spread + error) if spread else np.zeros_like(error)
    gap = gap.mean() + trust * (gap - gap.mean())
    middle = (mean_in + mean_out) / 2
    scores[known] = gap * (log_odds(nats[known]) - middle) / max(variance, np.finfo(float).tiny)
    return scores


def log_odds(nats: FloatArray) -> FloatArray:
    """``log(p / (1 - p))`` for ``p = exp(-nats)``: near to normally distributed where probabilities are not."""
    nats = np.maximum(nats, _LEAST_NATS)
    odds: FloatArray = -nats - np.log(-np.expm1(-nats))
    return odds


# --- how well they do ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Guess:
    """An attack on one federation.

    Attributes:
        scores: One for each record, larger where it looks more like a member; NaN: there is none.
        is_member: What is true.
    """

    scores: FloatArray
    is_member: BoolArray


def success(guesses: Sequence[Guess]) -> dict[str, Any]:
    """How well an attack does, over federations with one pool.

    Args:
        guesses: One for each federation (seed), on the same records.

    Returns:
        For ``auc`` and each of :data:`FALSE_POSITIVE_RATES`: ``value``, the mean over the federations; ``ci95``, by
        the bootstrap over records (a record is drawn with what all federations made of it); ``by_seed``, with the
        interval over federations. A rate that so few non-members cannot resolve is None. And the numbers of
        ``members`` and ``non_members`` of a federation.
    """
    blocks = [[_measures(guess, block) for guess in guesses] for block in resampled(len(guesses[0].scores))]
    fewest = min(int((~guess.is_member & np.isfinite(guess.scores)).sum()) for guess in guesses)
    found: dict[str, Any] = {
        "members": int(np.mean([(guess.is_member & np.isfinite(guess.scores)).sum() for guess in guesses])),
        "non_members": fewest,
    }
    for name in ("auc", *FALSE_POSITIVE_RATES):
        if fewest * FALSE_POSITIVE_RATES.get(name, 1.0) < 1:
            found[name] = None
            continue
        # One line for each federation, its first value without resampling.
        each = np.concatenate([np.stack([part[name] for part in block]) for block in blocks], axis=1)
        low, high = np.nanpercentile(each[:, 1:].mean(0), [2.5, 97.5])
        found[name] = {
            "value": float(each[:, 0].mean()),
            "ci95": [float(low), float(high)],
            "by_seed": mean_over_seeds([float(value) for value in each[:, 0]]),
        }
    return found


def resampled(records: int) -> Iterator[npt.NDArray[np.float32]]:
    """How often each record counts: once in the very first row, and then as often as it is drawn with replacement.

    Args:
        records: How many there are.

    Yields:
        Some rows at a time, ``(rows, records)``, so that many records need no more memory.
    """
    generator = np.random.default_rng(_SEED)
    yield np.ones((1, records), dtype=np.float32)
    at_once = max(1, _WEIGHTS_AT_ONCE // records)
    for first in range(0, _RESAMPLES, at_once):
        block = np.empty((min(at_once, _RESAMPLES - first), records), dtype=np.float32)
        for row in block:
            row[:] = np.bincount(generator.integers(0, records, records), minlength=records)
        yield block


def _measures(guess: Guess, weights: npt.NDArray[np.float32]) -> dict[str, FloatArray]:
    known = np.isfinite(guess.scores)
    return roc_measures(guess.scores[known], guess.is_member[known], weights[:, known])


def roc_measures(scores: FloatArray, is_member: BoolArray, weights: npt.NDArray[np.float32]) -> dict[str, FloatArray]:
    """Area under the ROC curve, and the true positive rates at :data:`FALSE_POSITIVE_RATES`.

    A threshold takes all records of one score or none of them.

    Args:
        scores: ``(records,)``.
        is_member: ``(records,)``.
        weights: How often each record counts, ``(resamples, records)``.

    Returns:
        Each measure, ``(resamples,)``.
    """
    order = np.argsort(-scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=np.inf))  # of records with equal scores
    weights = weights[:, order]
    inside = is_member[order]
    hits = np.add.reduceat(weights * inside, starts, axis=1)
    alarms = np.add.reduceat(weights * ~inside, starts, axis=1)
    caught, alarmed = np.cumsum(hits, axis=1), np.cumsum(alarms, axis=1)
    with np.errstate(invalid="ignore"):  # a resample may have no member at all
        true_rate = caught / caught[:, -1:]
        false_rate = alarmed / alarmed[:, -1:]
        # Above each step of false positives lie the members that come before it, and a half of those beside it.
        area = (alarms * (caught - hits / 2)).sum(1) / (caught[:, -1] * alarmed[:, -1])
    found: dict[str, FloatArray] = {"auc": area.astype(np.float64)}
    for name, allowed in FALSE_POSITIVE_RATES.items():
        steps = (false_rate <= allowed * (1 + 1e-6)).sum(1)  # thresholds that may be used
        best = true_rate[np.arange(len(steps)), np.maximum(steps - 1, 0)]
        found[name] = np.where(steps > 0, best, 0.0).astype(np.float64)
    return found


def bound(noise_multiplier: float, releases: int, false_positive_rate: float) -> float:
    """The largest true positive rate that the noise of a private run allows an attack on a record.

    The attacked device takes part with the record or without it, so that a change of the largest norm may turn around:
    rounds of Gaussian noise are then one with ``mu = 2 * sqrt(releases) / noise_multiplier``, and no attack does better
    than the likelihood ratio of two Gaussians so far apart (Dong, Roth and Su 2022, arXiv:1905.02383).

    Args:
        noise_multiplier: Standard deviation of the noise on the sum, as a multiple of the norm.
        releases: Noisy means that were given out.
        false_positive_rate: Above 0 and below 1.
    """
    normal = NormalDist()
    return normal.cdf(normal.inv_cdf(false_positive_rate) + 2 * math.sqrt(releases) / noise_multiplier)
