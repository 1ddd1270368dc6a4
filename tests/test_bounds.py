import numpy as np
import pytest

from fedpt_flwr.bounds import norm, shortened, update_norm

SENT = {"weight": np.float32([[1, 2], [3, 4]]), "scale": np.float32([5])}
TUNED = {"weight": np.float32([[1, 2], [6, 4]]), "scale": np.float32([9])}


def test_the_norm_is_over_all_arrays_together():
    # 1 + 4 + 9 + 16 + 25 = 55
    assert norm(SENT.items()) == pytest.approx(np.sqrt(55))
    # the change is 3 in one weight and 4 in another: 9 + 16 = 25
    assert update_norm(TUNED.items(), SENT) == 5.0


def test_a_shortened_change_has_the_direction_of_the_change():
    # two fifths of 3 and 4 are 1.2 and 1.6, whose norm is 2
    short = dict(shortened(TUNED.items(), SENT, 2 / 5))
    np.testing.assert_allclose(short["weight"], [[1, 2], [4.2, 4]], rtol=1e-7)
    np.testing.assert_allclose(short["scale"], [6.6], rtol=1e-7)
    assert all(values.dtype == np.float32 for values in short.values())
    assert update_norm(short.items(), SENT) == pytest.approx(2.0, rel=1e-6)


def test_nothing_is_written_to_and_the_largest_numbers_are_measured():
    largest = {"weight": np.full(4, 3e38, np.float32)}
    opposite = {"weight": np.full(4, -3e38, np.float32)}
    for values in (*largest.values(), *opposite.values()):
        values.setflags(write=False)
    # each of four weights changes by 6e38, which float32 cannot hold: the norm is twice that
    assert update_norm(largest.items(), opposite) == pytest.approx(12e38)
    (_, short) = next(shortened(largest.items(), opposite, 0.5))
    np.testing.assert_array_equal(short, np.zeros(4, np.float32))
