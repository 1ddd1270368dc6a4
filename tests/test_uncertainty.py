"""Intervals, differences and the gap that is closed."""

import math

import numpy as np
import pytest

from fedpt_flwr.losses import AnswerLosses
from fedpt_flwr.scoring import Measurement, make_row
from fedpt_flwr.uncertainty import bootstrap_sums, gap_closed, paired_bootstrap, wilson_interval


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        # (k + z²/2 ± z sqrt(k(n-k)/n + z²/4)) / (n + z²) with z = 1.959964, z² = 3.841459
        (0, 20, 0.0, 0.161),  # 2 * 1.9207 / 23.8415
        (20, 20, 0.839, 1.0),
        (10, 20, 0.299, 0.701),  # (11.9207 ± 1.96 sqrt(5.9604)) / 23.8415
        (1, 1, 0.207, 1.0),
    ],
)
def test_wilson_intervals_are_the_known_ones(successes, n, low, high):
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-4)
    assert 0 <= wilson_interval(successes, n)[0] <= successes / n <= wilson_interval(successes, n)[1] <= 1


def random_losses(items, seed=3):
    generator = np.random.default_rng(seed)
    tokens = generator.integers(1, 12, items)
    return AnswerLosses(generator.exponential(1.0, items) * tokens, tokens)


def test_the_bootstrap_draws_each_item_as_often_as_chance_says():
    sums = bootstrap_sums(np.stack([np.ones(50), np.arange(50.0)], axis=1), seed=0)
    assert (sums[:, 0] == 50).all(), "a resample has as many items as the sample"
    # mean of a sum of 50 draws from 0..49: 50 * 24.5; variance 50 * (50² - 1) / 12
    assert sums[:, 1].mean() == pytest.approx(1225, abs=5)
    assert sums[:, 1].var() == pytest.approx(50 * 2499 / 12, rel=0.05)


def test_intervals_of_losses_hold_the_loss_shrink_with_items_and_repeat_with_the_seed():
    widths = {}
    for items in (30, 300, 3000):
        row = make_row(Measurement(losses=random_losses(items)), n=items, seed=1)
        low, high = row.ci95["loss"]
        assert low < row.loss < high
        assert row.perplexity == math.exp(row.loss)
        assert row.ci95["perplexity"] == (math.exp(low), math.exp(high))
        assert row == make_row(Measurement(losses=random_losses(items)), n=items, seed=1)
        assert row != make_row(Measurement(losses=random_losses(items)), n=items, seed=2)
        widths[items] = high - low
    # ten times the items: about sqrt(10) = 3.2 times narrower
    assert 2 < widths[30] / widths[300] < 5
    assert 2 < widths[300] / widths[3000] < 5


def test_the_interval_of_a_mean_loss_is_the_normal_one_where_items_are_many():
    values = np.random.default_rng(0).normal(2.0, 1.0, 1000)
    low, high = make_row(Measurement(losses=AnswerLosses(values, np.ones(1000, dtype=int))), n=1000, seed=0).ci95[
        "loss"
    ]
    half = 1.96 * values.std() / math.sqrt(1000)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.005)


def test_items_without_answer_tokens_do_not_count_in_a_loss():
    row = make_row(Measurement(losses=AnswerLosses(np.array([2.0, 0.0]), np.array([1, 0]))), n=2, seed=0)
    assert (row.loss, row.ci95["loss"]) == (2.0, (2.0, 2.0))


def test_a_difference_from_oneself_is_nothing_without_any_doubt():
    marks, losses = [0, 1, 1, 0, 1], random_losses(5)
    assert paired_bootstrap(marks, marks, 0) == (0, 0, 0)
    assert paired_bootstrap(losses.nats, losses.nats, 0, tokens=losses.tokens) == (0, 0, 0)


def test_paired_differences_are_surer_than_unpaired_ones():
    # The first model is right wherever the second is, and on 5 items more: 0.55 and 0.50 of 100.
    second = np.repeat([1, 0], [50, 50])
    first = np.repeat([1, 0], [55, 45])
    difference, low, high = paired_bootstrap(first, second, 0)
    assert difference == pytest.approx(0.05)
    # 5 of 100 items differ: 0.05 ± 1.96 sqrt(0.05 * 0.95 / 100) = 0.05 ± 0.043; unpaired it would be ± 0.138
    assert (low, high) == pytest.approx((0.007, 0.093), abs=0.0101)
    assert paired_bootstrap(first, second, 0) == (difference, low, high)
    assert paired_bootstrap(second, first, 0)[0] == -difference


def test_a_paired_difference_of_losses_is_per_token():
    difference, low, high = paired_bootstrap([3.0, 8.0], [1.0, 2.0], 0, tokens=[1, 3])
    # (2 + 6) nats over 4 tokens; each item alone has 2 nats per token more
    assert (difference, low, high) == (2.0, 2.0, 2.0)


@pytest.mark.parametrize(
    ("proxy", "large", "reference", "closed"),
    [
        (0.6, 0.2, 1.0, 0.5),
        (0.1, 0.2, 1.0, -0.125),
        (0.6, 0.5, 0.5, None),
        (0.6, 0.5, 0.4, None),  # a reference that is worse than the large model leaves no gap
        (None, 0.2, 1.0, None),
        (0.6, math.nan, 1.0, None),
    ],
)
def test_the_gap_closed_is_a_share_of_the_way_or_nothing(proxy, large, reference, closed):
    found = gap_closed(proxy, large, reference)
    assert found is None if closed is None else found == pytest.approx(closed)
