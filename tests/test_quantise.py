import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from fedpt_flwr.quantise import BLOCK, check_packed, packed_size, quantised, quantised_with_feedback, restored

FLOATS = st.floats(-(2.0**100), 2.0**100, width=32)
VALUES = arrays(np.float32, array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=40), elements=FLOATS)
EXAMPLES = settings(max_examples=60, deadline=None, derandomize=True)


@EXAMPLES
@given(VALUES)
def test_a_value_is_wrong_by_half_a_scale_of_its_block_at_most(values):
    packed = quantised(values)
    assert (packed.dtype, packed.shape) == (np.int8, (packed_size(values.size),))
    got = restored(packed, values.shape)
    assert (got.dtype, got.shape) == (np.float32, values.shape)
    flat, back = values.reshape(-1).astype(np.float64), got.reshape(-1)
    for begin in range(0, flat.size, BLOCK):
        block = slice(begin, begin + BLOCK)
        largest = np.abs(flat[block]).max()
        assert np.abs(back[block] - flat[block]).max() <= max(0.5 * largest / 127 * (1 + 1e-5), 127 * 1.2e-38)
    assert check_packed(packed, values.size) == ""


def test_four_bytes_more_for_each_block():
    assert [packed_size(number) for number in (0, 1, 256, 257, 1000)] == [0, 5, 260, 265, 1016]


def test_largest_values_and_zeros_come_back_as_they_are():
    values = np.float32([0, 127, -127, 1, -64])
    np.testing.assert_array_equal(restored(quantised(values), (5,)), values)


def test_a_large_value_costs_its_own_block_its_precision_and_no_other():
    values = np.ones(2 * BLOCK, np.float32)
    values[0] = 1000
    got = restored(quantised(values), values.shape)
    assert not got[1:BLOCK].any()
    np.testing.assert_allclose(got[BLOCK:], 1, rtol=1e-6)


@EXAMPLES
@given(st.integers(0, 10**6), st.integers(1, 600), st.integers(1, 12))
def test_all_that_was_sent_is_all_that_was_meant_but_for_the_last_loss(seed, size, rounds):
    rng, residual = np.random.default_rng(seed), None
    meant = sent = np.zeros(size)
    for _ in range(rounds):
        change = rng.normal(size=size).astype(np.float32) * np.float32(rng.uniform(0.01, 1))
        packed, residual = quantised_with_feedback(change, residual)
        meant, sent = meant + change, sent + restored(packed, (size,))
    np.testing.assert_allclose(sent + residual, meant, atol=1e-5)


def test_what_is_too_small_to_be_sent_arrives_in_time_and_never_without_feedback():
    # A step of 0.003 beside one of 1 is below half a scale, 1 / 254.
    change, residual, fed, bare = np.float32([1, 0.003]), None, 0.0, 0.0
    for _ in range(100):
        packed, residual = quantised_with_feedback(change, residual)
        fed += restored(packed, (2,))[1]
        bare += restored(quantised(change), (2,))[1]
    assert bare == 0
    assert fed == pytest.approx(0.3, abs=1 / 127)


def test_a_number_that_is_not_finite_is_found():
    for bad in (np.nan, np.inf, -np.inf):
        values = np.ones(BLOCK + 1, np.float32)
        values[3] = bad
        assert check_packed(quantised(values), values.size) == (
            "some of its scales are not finite numbers of at least 0"
        )


@pytest.mark.parametrize("scale", [np.nan, np.inf, -1.0, 3e38])
def test_scales_that_are_made_up_are_found(scale):
    packed = np.concatenate([np.float32([scale]).view(np.int8), np.int8([1, 2])])
    assert "some of its scales are not finite" in check_packed(packed, 2)


def test_a_value_that_is_never_written_is_found():
    packed = np.concatenate([np.float32([1]).view(np.int8), np.int8([1, -128])])
    assert check_packed(packed, 2) == "its values must be from -127 to 127"
