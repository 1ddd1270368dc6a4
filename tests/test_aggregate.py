import numpy as np
import pytest

from fedpt_flwr.aggregate import WeightedMean


def mean_of(parts, expected):
    mean = WeightedMean(expected)
    for values, weight in parts:
        mean.add([("w", np.float32(values))], weight)
    return dict(mean.take())["w"]


def test_weights_decide_how_much_each_counts():
    # (1 * 10 + 4 * 20) / 30 = 3, (2 * 10 + 5 * 20) / 30 = 4
    np.testing.assert_allclose(mean_of([([1, 2], 10), ([4, 5], 20)], 30), [3, 4], rtol=1e-7)


@pytest.mark.parametrize("expected", [30, 100, 12345])
def test_weight_that_was_expected_and_did_not_come_changes_no_more_than_rounding(expected):
    np.testing.assert_allclose(mean_of([([1, 2], 10), ([4, 5], 20)], expected), [3, 4], rtol=3e-7)


def test_the_mean_of_one_is_itself_to_the_last_bit():
    values = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    np.testing.assert_array_equal(mean_of([(values, 7)], 7), values)


def test_the_mean_of_equal_arrays_is_that_array():
    values = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    np.testing.assert_allclose(mean_of([(values, weight) for weight in range(1, 65)], 64 * 65 / 2), values, rtol=1e-5)


def test_what_is_added_is_not_written_to_and_may_be_read_only():
    values = np.ones(3, np.float32)
    values.flags.writeable = False
    np.testing.assert_allclose(mean_of([(values, 1), (values, 1)], 2), 1)
    np.testing.assert_array_equal(values, 1)


def test_arrays_without_dimensions_are_added_too():
    mean = WeightedMean(2)
    for value in (1.0, 3.0):
        mean.add([("s", np.array(value, np.float32))], 1)
    ((name, values),) = mean.take()
    assert (name, values.shape, values.dtype, float(values)) == ("s", (), np.float32, 2.0)


def test_means_are_given_away_and_nothing_is_left():
    mean = WeightedMean(1)
    mean.add([("a", np.ones(2, np.float32)), ("b", np.ones(2, np.float32))], 1)
    assert [name for name, _ in mean.take()] == ["a", "b"]
    assert list(mean.take()) == []
