"""Aggregation of adapters, compared with the weighted mean of the dense matrices that they stand for."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import products

from fedpt_flwr.aggregate import WeightedMean
from fedpt_flwr.lora import (
    ROW_NORM,
    ProductMean,
    completed,
    dense_size,
    leading,
    leading_shape,
    product_svd,
)

A, B = "model.q_proj.lora_A.default.weight", "model.q_proj.lora_B.default.weight"
EXAMPLES = settings(max_examples=60, deadline=None, derandomize=True)


def adapter(rng, num_out, num_in, rank):
    return {
        A: rng.normal(size=(rank, num_in)).astype(np.float32),
        B: rng.normal(size=(num_out, rank)).astype(np.float32),
    }


def dense(arrays):
    (product,) = products(arrays).values()
    return product


def mean_of(parts, rank, expected=None):
    mean = ProductMean(sum(weight for _, weight in parts) if expected is None else expected, rank)
    for arrays, weight in parts:
        mean.add(arrays.items(), weight)
    return dict(mean.take()), mean


def dense_mean(parts):
    return sum(weight * dense(arrays) for arrays, weight in parts) / sum(weight for _, weight in parts)


def norm(matrix):
    return float(np.linalg.norm(matrix))


cases = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 10**6),
        "num_out": st.integers(1, 40),
        "num_in": st.integers(1, 40),
        "ranks": st.lists(st.integers(1, 6), min_size=1, max_size=6),
        "rank": st.integers(1, 8),
        "weights": st.lists(st.integers(1, 100), min_size=6, max_size=6),
    }
)


@EXAMPLES
@given(cases)
def test_the_mean_is_the_dense_mean_as_near_as_its_rank_can_come(case):
    rng = np.random.default_rng(case["seed"])
    parts = [
        (adapter(rng, case["num_out"], case["num_in"], rank), weight)
        for rank, weight in zip(case["ranks"], case["weights"], strict=False)
    ]
    got, mean = mean_of(parts, case["rank"])
    wanted = dense_mean(parts)
    # Eckart and Young: nothing of this rank is nearer than what the smaller singular values leave.
    tail = np.linalg.svd(wanted, compute_uv=False)[case["rank"] :]
    assert norm(dense(got) - wanted) == pytest.approx(norm(tail), abs=1e-5 * norm(wanted) + 1e-6)
    assert mean.left_out == pytest.approx(norm(tail) / norm(wanted), abs=1e-5)
    assert got[A].shape == (case["rank"], case["num_in"])
    assert got[B].shape == (case["num_out"], case["rank"])
    assert {values.dtype for values in got.values()} == {np.dtype(np.float32)}


@EXAMPLES
@given(cases)
def test_with_rank_enough_nothing_is_left_out(case):
    rng = np.random.default_rng(case["seed"])
    parts = [
        (adapter(rng, case["num_out"], case["num_in"], rank), weight)
        for rank, weight in zip(case["ranks"], case["weights"], strict=False)
    ]
    got, mean = mean_of(parts, sum(case["ranks"]))
    np.testing.assert_allclose(dense(got), dense_mean(parts), atol=1e-5 * norm(dense_mean(parts)) + 1e-6)
    assert mean.left_out < 1e-6


@EXAMPLES
@given(cases)
def test_devices_of_lower_rank_change_only_the_directions_that_they_hold(case):
    rng = np.random.default_rng(case["seed"])
    whole = adapter(rng, case["num_out"], case["num_in"], 8)
    parts, changes = [], 0.0
    for rank, weight in zip(case["ranks"], case["weights"], strict=False):
        held = {name: leading(name, values, rank) for name, values in whole.items()}
        assert all(values.shape == leading_shape(name, whole[name].shape, rank) for name, values in held.items())
        tuned = {name: values + rng.normal(size=values.shape).astype(np.float32) for name, values in held.items()}
        parts.append(({name: completed(name, values, whole[name]) for name, values in tuned.items()}, weight))
        changes = changes + weight * (dense(tuned) - dense(held))
    wanted = dense(whole) + changes / sum(weight for _, weight in parts)
    got, _ = mean_of(parts, 64)
    np.testing.assert_allclose(dense(got), wanted, atol=1e-5 * norm(wanted) + 1e-5)


@EXAMPLES
@given(cases)
def test_with_one_frozen_a_the_mean_of_b_is_the_dense_mean(case):
    rng = np.random.default_rng(case["seed"])
    frozen = adapter(rng, case["num_out"], case["num_in"], 4)[A]
    parts = [({A: frozen, B: adapter(rng, case["num_out"], 1, 4)[B]}, weight) for weight in case["weights"]]
    mean = WeightedMean(sum(case["weights"]))
    for arrays, weight in parts:
        mean.add([(B, arrays[B])], weight)
    wanted = dense_mean(parts)
    np.testing.assert_allclose(dense({A: frozen, **dict(mean.take())}), wanted, atol=1e-5 * norm(wanted) + 1e-6)


def test_averaging_the_factors_apart_is_not_the_dense_mean():
    # B A is 1 * 1 on one device and (-1) * (-1) on the other: the mean is 1, of the factors' means it is 0.
    parts = [({A: np.float32([[sign]]), B: np.float32([[sign]])}, 1) for sign in (1, -1)]
    apart = WeightedMean(2)
    for arrays, weight in parts:
        apart.add(arrays.items(), weight)
    assert dense(dict(apart.take())) == 0
    assert dense(mean_of(parts, 1)[0]) == pytest.approx(1)


@EXAMPLES
@given(cases)
def test_the_decomposition_of_a_product_is_that_of_the_matrix(case):
    rng = np.random.default_rng(case["seed"])
    arrays = adapter(rng, case["num_out"], case["num_in"], case["rank"])
    left, sizes, right = product_svd(arrays[B], arrays[A])
    np.testing.assert_allclose(left * sizes @ right, dense(arrays), atol=1e-9)
    np.testing.assert_allclose(left.T @ left, np.eye(len(sizes)), atol=1e-9)
    np.testing.assert_allclose(right @ right.T, np.eye(len(sizes)), atol=1e-9)
    expected = np.linalg.svd(dense(arrays), compute_uv=False)[: len(sizes)]
    np.testing.assert_allclose(sizes, expected, atol=1e-9)


def test_directions_are_sorted_and_a_has_rows_as_peft_draws_them():
    rng = np.random.default_rng(1)
    got, _ = mean_of([(adapter(rng, 30, 50, 4), 3), (adapter(rng, 30, 50, 4), 5)], 4)
    np.testing.assert_allclose(got[A] @ got[A].T, ROW_NORM**2 * np.eye(4), atol=1e-6)
    sizes = np.linalg.norm(got[B], axis=0)
    assert (np.diff(sizes) < 0).all()


@pytest.mark.parametrize("rank", [1, 4])
def test_weight_that_was_expected_and_did_not_come_changes_no_more_than_rounding(rank):
    rng = np.random.default_rng(2)
    parts = [(adapter(rng, 6, 9, 2), 3), (adapter(rng, 6, 9, 2), 5)]
    some, all_of_it = mean_of(parts, rank, expected=20)[0], mean_of(parts, rank)[0]
    np.testing.assert_allclose(dense(some), dense(all_of_it), atol=1e-5)


def test_many_adapters_take_no_more_memory_than_the_matrix():
    mean, rng = ProductMean(100, 2), np.random.default_rng(3)
    parts = [(adapter(rng, 12, 10, 2), 1) for _ in range(100)]
    held = []
    for arrays, weight in parts:
        mean.add(arrays.items(), weight)
        (sums,) = mean._sums.values()
        held.append(sum(part.size for part in [*sums._lefts, *sums._rights]) + (0 if sums._dense is None else 120))
    assert max(held) <= 12 * 10
    np.testing.assert_allclose(dense(mean_of(parts, 10)[0]), dense_mean(parts), atol=1e-5)


def test_the_matrices_of_an_adapter_are_counted_from_its_factors():
    shapes = {A: (2, 9), B: (14, 2), A.replace("q_proj", "up"): (2, 5), B.replace("q_proj", "up"): (7, 2)}
    assert dense_size(shapes) == 14 * 9 + 7 * 5


def test_a_mean_of_nothing_but_zeros_is_zero_and_can_still_be_tuned():
    zero = {A: np.ones((2, 5), np.float32), B: np.zeros((4, 2), np.float32)}
    got, mean = mean_of([(zero, 1)], 2)
    assert not got[B].any()
    assert np.linalg.norm(got[A], axis=1) == pytest.approx([ROW_NORM] * 2)  # B gets a gradient
    assert mean.left_out == 0


def test_what_is_added_is_neither_kept_nor_written_to():
    arrays = adapter(np.random.default_rng(4), 20, 20, 1)
    before = {name: values.copy() for name, values in arrays.items()}
    mean = ProductMean(1, 1)
    mean.add(arrays.items(), 1)
    for name, values in arrays.items():
        np.testing.assert_array_equal(values, before[name])
        values[:] = 0
    np.testing.assert_allclose(dense(dict(mean.take())), dense(before), atol=1e-5)
    assert dict(mean.take()) == {}


@pytest.mark.parametrize("names", [[A], [B], [A, A], [B, B]])
def test_half_an_adapter_is_refused(names):
    with pytest.raises(ValueError, match=r"model\.q_proj\.lora\.default\.weight must have one lora_A and one lora_B"):
        ProductMean(1, 1).add([(name, np.ones((1, 1), np.float32)) for name in names], 1)


def test_numbers_that_are_not_finite_do_not_go_unnoticed():
    big = np.full((1, 1), 3e38, np.float32)
    mean = ProductMean(1, 1)
    mean.add([(A, big), (B, big)], 1)
    with np.errstate(over="ignore"):
        assert any(not np.isfinite(values).all() for _, values in mean.take())
    mean.add([(A, np.full((1, 1), np.nan, np.float32)), (B, big)], 1)
    with pytest.raises(ValueError, match="converge"):
        list(mean.take())
