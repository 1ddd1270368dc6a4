"""Which examples each device holds.

Pure functions from the examples' groups (or their number) and a seed to a list of example indices per device. In every
partition each example is on exactly one device, each device's indices ascend, and the same arguments give the same
partition on every machine. No texts are seen here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from fedpt_flwr.errors import ConfigError, DataError


def partition(
    kind: str, groups: Sequence[str], num_devices: int, *, dirichlet_alpha: float, seed: int
) -> list[list[int]]:
    """Deal examples out in one of the three ways.

    Args:
        kind: ``iid``, ``dirichlet`` or ``natural``.
        groups: The group of each example; ``iid`` uses their number alone.
        num_devices: Number of devices.
        dirichlet_alpha: Concentration, for ``dirichlet`` alone.
        seed: Seed, for ``iid`` and ``dirichlet``.

    Returns:
        Example indices, one ascending list per device.

    Raises:
        ConfigError: ``kind`` is none of these, or a number is out of range.
        DataError: There are too few examples or groups for so many devices.
    """
    if kind == "iid":
        return partition_iid(len(groups), num_devices, seed)
    if kind == "dirichlet":
        return partition_dirichlet(groups, num_devices, dirichlet_alpha, seed)
    if kind == "natural":
        return partition_natural(groups, num_devices)
    raise ConfigError("the partition must be one of iid, dirichlet, natural", value=kind)


def partition_iid(num_examples: int, num_devices: int, seed: int) -> list[list[int]]:
    """Deal examples out at random; the devices' numbers of examples differ by one at most.

    Args:
        num_examples: Number of examples.
        num_devices: Number of devices, at most ``num_examples``.
        seed: Decides which device gets which examples.

    Returns:
        Example indices, one ascending list per device.

    Raises:
        ConfigError: ``num_devices`` is below 1.
        DataError: There are more devices than examples.
    """
    # Imported by those who deal out alone: flwr_datasets brings matplotlib and seaborn, 2.5 s together with datasets.
    from datasets import Dataset
    from flwr_datasets.partitioner import IidPartitioner

    _check_counts(num_examples, num_devices)
    # IidPartitioner cuts the rows as they lie into runs of equal length: the shuffling is the caller's.
    shuffled = np.random.default_rng(seed).permutation(num_examples)
    partitioner = IidPartitioner(num_devices)
    partitioner.dataset = Dataset.from_dict({"index": shuffled})
    return [sorted(partitioner.load_partition(device)["index"][:]) for device in range(num_devices)]


def partition_dirichlet(groups: Sequence[str], num_devices: int, alpha: float, seed: int) -> list[list[int]]:
    """Spread every group over the devices in proportions drawn from a Dirichlet distribution.

    The usual simulation of devices whose data differ in kind and amount (Yurochkin et al. 2019, arXiv:1905.12022).

    A device may stay without examples: that happens with a small ``alpha`` or few groups, and drawing again until no
    device is empty would favour even partitions over the ones asked for.

    Args:
        groups: The group of each example.
        num_devices: Number of devices, at most the number of examples.
        alpha: Concentration, above 0: small values leave most of a group on one device, large ones spread it evenly.
        seed: Seed of the proportions.

    Returns:
        Example indices, one ascending list per device, perhaps empty.

    Raises:
        ConfigError: ``num_devices`` or ``alpha`` is out of range.
        DataError: There are more devices than examples.
    """
    from datasets import Dataset
    from flwr_datasets.partitioner import DirichletPartitioner

    _check_counts(len(groups), num_devices)
    if not (alpha > 0 and math.isfinite(alpha)):
        raise ConfigError("the Dirichlet concentration must be a finite number above 0", value=alpha)
    # DirichletPartitioner deals out each group's rows in runs, as they lie: the shuffling is the caller's.
    shuffled = np.random.default_rng(seed).permutation(len(groups)).tolist()
    # Numbers in place of names, because DirichletPartitioner puts the labels into a numpy array of fixed-width strings,
    # which drops NUL characters at the end of a name.
    number_of = {name: number for number, name in enumerate(sorted(set(groups)))}
    rows = Dataset.from_dict({"index": shuffled, "group": [number_of[groups[index]] for index in shuffled]})
    partitioner = DirichletPartitioner(
        num_partitions=num_devices,
        partition_by="group",
        alpha=float(alpha),
        min_partition_size=0,
        self_balancing=False,
        shuffle=False,
        seed=int(np.random.SeedSequence([seed, 0]).generate_state(1)[0]),  # other draws than the shuffling's
    )
    partitioner.dataset = rows
    return [sorted(partitioner.load_partition(device)["index"][:]) for device in range(num_devices)]


def partition_natural(groups: Sequence[str], num_devices: int) -> list[list[int]]:
    """Keep every group whole, on one device.

    With as many devices as groups, each device gets one, in the order of the groups' names. With fewer devices, the
    groups are dealt out from the largest to the smallest, each to the device that has the fewest examples so far (of
    several, the first).

    Args:
        groups: The group of each example.
        num_devices: Number of devices, at most the number of groups.

    Returns:
        Example indices, one ascending list per device, none empty.

    Raises:
        ConfigError: ``num_devices`` is below 1.
        DataError: There are more devices than groups.
    """
    _check_counts(len(groups), num_devices)
    members: dict[str, list[int]] = {name: [] for name in sorted(set(groups))}
    for index, name in enumerate(groups):
        members[name].append(index)
    if num_devices > len(members):
        raise DataError(
            f"the partition natural keeps every group on one device, but there are {num_devices} devices and only "
            f"{len(members)} {'group' if len(members) == 1 else 'groups'}",
            remedy="use the partition dirichlet, which spreads groups over devices, or fewer devices, or check the "
            "group field",
        )
    if num_devices == len(members):
        return list(members.values())
    shards: list[list[int]] = [[] for _ in range(num_devices)]
    for indices in sorted(members.values(), key=len, reverse=True):  # stable: equal sizes stay in the order of names
        min(shards, key=len).extend(indices)
    return [sorted(shard) for shard in shards]


def _check_counts(num_examples: int, num_devices: int) -> None:
    if num_devices < 1:
        raise ConfigError("the number of devices must be at least 1", value=num_devices)
    if num_devices > num_examples:
        raise DataError(
            f"there must be at least one example per device, but there are {num_devices} devices and {num_examples} "
            f"{'example' if num_examples == 1 else 'examples'}",
            remedy="use fewer devices or more data",
        )
