from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpt_flwr.errors import ConfigError, DataError
from fedpt_flwr.partition import partition, partition_dirichlet, partition_iid, partition_natural

GROUPS = [name for name, size in (("cdc", 40), ("nih", 30), ("ghr", 20), ("niddk", 10)) for _ in range(size)]

# Each example makes small Arrow tables; the default deadline of 0.2 s is for idle machines.
few = settings(max_examples=15, deadline=None)
group_lists = st.lists(st.sampled_from(["", "a", "a\0", "b", "ü", "7"]), min_size=1, max_size=40)
seeds = st.integers(0, 2**32)


def assert_disjoint_complete_sorted(shards, num_examples, num_devices):
    assert len(shards) == num_devices
    assert sorted(itertools.chain(*shards)) == list(range(num_examples))
    assert all(shard == sorted(shard) for shard in shards)
    assert all(type(index) is int for shard in shards for index in shard)  # JSON takes no numpy integers


@few
@given(st.integers(1, 40), st.data(), seeds)
def test_iid_shards_are_disjoint_complete_and_of_equal_size(num_examples, data, seed):
    num_devices = data.draw(st.integers(1, num_examples))
    shards = partition_iid(num_examples, num_devices, seed)
    assert_disjoint_complete_sorted(shards, num_examples, num_devices)
    assert max(map(len, shards)) - min(map(len, shards)) <= 1
    assert shards == partition_iid(num_examples, num_devices, seed)


@few
@given(group_lists, st.data(), st.floats(1e-3, 1e3), seeds)
def test_dirichlet_shards_are_disjoint_and_complete(groups, data, alpha, seed):
    num_devices = data.draw(st.integers(1, len(groups)))
    shards = partition_dirichlet(groups, num_devices, alpha, seed)
    assert_disjoint_complete_sorted(shards, len(groups), num_devices)
    assert shards == partition_dirichlet(groups, num_devices, alpha, seed)


@few
@given(group_lists, st.data())
def test_natural_shards_are_disjoint_complete_not_empty_and_keep_groups_whole(groups, data):
    num_devices = data.draw(st.integers(1, len(set(groups))))
    shards = partition_natural(groups, num_devices)
    assert_disjoint_complete_sorted(shards, len(groups), num_devices)
    assert all(shards)
    names = [{groups[index] for index in shard} for shard in shards]
    assert sum(map(len, names)) == len(set(groups))


@pytest.mark.parametrize("kind", ["iid", "dirichlet"])
def test_another_seed_gives_another_partition(kind):
    first, again, other = (partition(kind, GROUPS, 5, dirichlet_alpha=0.5, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_iid_shards_are_not_runs_of_the_file():
    # Files are often sorted by group: a partition into runs would be as far from IID as can be.
    assert all({GROUPS[index] for index in shard} == set(GROUPS) for shard in partition_iid(len(GROUPS), 4, seed=0))


def test_a_device_gets_examples_from_all_over_a_group():
    # Groups may be sorted too (by topic, by date): a device's share of one must not be a run of the file.
    for shard in partition_dirichlet(["a"] * 100, 4, 1000.0, seed=0):
        assert shard[-1] - shard[0] > 80


def test_a_small_concentration_leaves_most_of_a_group_on_one_device():
    def largest_share(alpha):
        shards = partition_dirichlet(GROUPS, 4, alpha, seed=0)
        return max(sum(GROUPS[index] == "cdc" for index in shard) for shard in shards) / GROUPS.count("cdc")

    assert largest_share(0.01) > 0.9
    assert largest_share(1000.0) < 0.35


def test_a_dirichlet_partition_may_leave_a_device_empty():
    shards = partition_dirichlet(["a"] * 10, 5, 0.01, seed=0)
    assert [] in shards
    assert sum(map(len, shards)) == 10


def test_natural_gives_one_group_each_in_the_order_of_names():
    assert partition_natural(["b", "a", "c", "a"], 3) == [[1, 3], [0], [2]]


def test_natural_deals_the_largest_groups_first_to_the_lightest_device():
    # cdc 40 -> 0, nih 30 -> 1, ghr 20 -> 1 (30 < 40), niddk 10 -> 0 (40 < 50)
    shards = partition_natural(GROUPS, 2)
    held = [Counter(GROUPS[index] for index in shard) for shard in shards]
    assert held == [{"cdc": 40, "niddk": 10}, {"ghr": 20, "nih": 30}]


def test_natural_ties_go_to_the_first_name_and_the_first_device():
    # a, b, c of one size: a -> 0, b -> 1, then both hold one and c goes to 0
    assert partition_natural(["c", "b", "a"], 2) == [[0, 2], [1]]


def test_more_devices_than_groups_names_both_numbers_and_the_way_out():
    with pytest.raises(DataError, match="there are 8 devices and only 4 groups; use the partition dirichlet"):
        partition_natural(GROUPS, 8)
    with pytest.raises(DataError, match=r"there are 2 devices and only 1 group;.*check the group field"):
        partition_natural(["", ""], 2)


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "natural"])
def test_more_devices_than_examples_names_both_numbers(kind):
    with pytest.raises(DataError, match="there are 3 devices and 2 examples; use fewer devices or more data"):
        partition(kind, ["a", "b"], 3, dirichlet_alpha=1.0, seed=0)
    with pytest.raises(DataError, match="there are 1 devices and 0 examples"):
        partition(kind, [], 1, dirichlet_alpha=1.0, seed=0)


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "natural"])
def test_no_devices_are_refused(kind):
    with pytest.raises(ConfigError, match="number of devices must be at least 1, got 0"):
        partition(kind, GROUPS, 0, dirichlet_alpha=1.0, seed=0)


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_a_concentration_that_is_no_positive_number_is_refused(alpha):
    with pytest.raises(ConfigError, match="Dirichlet concentration must be a finite number above 0, got"):
        partition_dirichlet(GROUPS, 2, alpha, seed=0)


def test_an_unknown_kind_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="must be one of iid, dirichlet, natural, got 'random'"):
        partition("random", GROUPS, 2, dirichlet_alpha=1.0, seed=0)


def test_the_dispatcher_gives_what_the_functions_give():
    assert partition("iid", GROUPS, 3, dirichlet_alpha=0.5, seed=4) == partition_iid(len(GROUPS), 3, 4)
    assert partition("dirichlet", GROUPS, 3, dirichlet_alpha=0.5, seed=4) == partition_dirichlet(GROUPS, 3, 0.5, 4)
    assert partition("natural", GROUPS, 3, dirichlet_alpha=0.5, seed=4) == partition_natural(GROUPS, 3)
