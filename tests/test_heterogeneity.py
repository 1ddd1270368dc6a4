import pytest

from fedpt_flwr.heterogeneity import measure_shards


def test_distances_by_hand():
    # All together: 3 of 4 are a, 1 of 4 is b. The first has a alone: |1 - .75| + |0 - .25| = .5, halved .25.
    # The second has one of each: |.5 - .75| + |.5 - .25| = .5, halved .25.
    found = measure_shards([2, 2, 0], [{"a": 2}, {"a": 1, "b": 1}, {}])
    assert found.distances == (0.25, 0.25, None)
    assert (found.mean_distance, found.num_devices, found.num_groups) == (0.25, 2, 2)


def test_shards_of_one_mixture_do_not_differ_however_large_they_are():
    found = measure_shards([4, 400], [{"a": 3, "b": 1}, {"a": 300, "b": 100}])
    assert found.distances == (0.0, 0.0)
    assert (found.smallest, found.largest, found.largest_share) == (4, 400, 400 / 404)


def test_many_devices_with_a_group_of_their_own_come_near_1():
    found = measure_shards([1] * 100, [{str(device): 1} for device in range(100)])
    assert found.distances == pytest.approx([0.99] * 100)


@pytest.mark.parametrize(
    ("sizes", "groups", "said"),
    [
        (
            [30, 10],
            [{"a": 30}, {"b": 10}],
            [
                "shards of 10 to 30 examples; the largest is 75.0% of all (50.0% if all",
                "2 groups; a device's mixture differs from that of all by 0.50 on average, 0.75 at most",
            ],
        ),
        ([30, 10], [{}, {}], ["shards of 10 to 30", "the devices do not say which groups their examples are of"]),
        ([0], [{}], ["no device has examples"]),
        ([], [], ["no device has examples"]),
        ([5], [{"a": 0}], ["shards of 5 to 5", "do not say"]),
    ],
)
def test_what_is_said_of_shards(sizes, groups, said):
    sentences = measure_shards(sizes, groups).sentences()
    assert len(sentences) == len(said)
    assert all(part in sentence for part, sentence in zip(said, sentences, strict=True))
