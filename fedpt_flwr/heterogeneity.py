"""How unlike the devices' shards are, from what the devices say of them: sizes, and how many examples of which group.

Pure functions over counts. No text is seen here, and nothing that a device has not said.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Heterogeneity:
    """How the examples of a run are spread over its devices.

    Attributes:
        num_devices: Devices that have examples.
        num_examples: Of all devices.
        smallest: Examples of the device that has the fewest, of those that have any.
        largest: Examples of the device that has the most.
        largest_share: Share of all examples that the largest shard is, which is its weight in a mean; 1 / devices where
            all are alike.
        num_groups: Different groups; 0 where no device says them.
        distances: Of each device in the order given: the share of its examples that would have to be of other groups
            for its mixture to be that of all devices together (total variation distance), 0 for alike, near 1 for a
            mixture of its own. None where the device has no examples or does not say their groups.
    """

    num_devices: int
    num_examples: int
    smallest: int
    largest: int
    largest_share: float
    num_groups: int
    distances: tuple[float | None, ...]

    @property
    def mean_distance(self) -> float | None:
        """The mean of the distances that are known; None where none is."""
        known = [distance for distance in self.distances if distance is not None]
        return sum(known) / len(known) if known else None

    def sentences(self) -> list[str]:
        """What there is to say, for a log or a report."""
        if not self.num_devices:
            return ["no device has examples"]
        said = [
            f"shards of {self.smallest:,} to {self.largest:,} examples; the largest is {self.largest_share:.1%} of all "
            f"({1 / self.num_devices:.1%} if all were alike)"
        ]
        known = [distance for distance in self.distances if distance is not None]
        if self.mean_distance is not None:
            said.append(
                f"{self.num_groups:,} {'group' if self.num_groups == 1 else 'groups'}; a device's mixture differs from "
                f"that of all by {self.mean_distance:.2f} on average, {max(known):.2f} at most (0: alike, 1: nothing "
                "in common)"
            )
        else:
            said.append("the devices do not say which groups their examples are of")
        return said


def measure_shards(sizes: Sequence[int], groups: Sequence[Mapping[str, int]]) -> Heterogeneity:
    """Measure how unlike shards are.

    Args:
        sizes: Examples of each device.
        groups: Examples per group of each device; empty where it does not say.
    """
    total = sum(sizes)
    having = [size for size in sizes if size]
    pooled = Counter[str]()
    for shard in groups:
        pooled.update({name: count for name, count in shard.items() if count > 0})
    return Heterogeneity(
        num_devices=len(having),
        num_examples=total,
        smallest=min(having, default=0),
        largest=max(having, default=0),
        largest_share=max(having, default=0) / total if total else 0.0,
        num_groups=len(pooled),
        distances=tuple(_distance(shard, pooled) for shard in groups),
    )


def _distance(shard: Mapping[str, int], pooled: Mapping[str, int]) -> float | None:
    own, all_together = sum(shard.values()), sum(pooled.values())
    if own <= 0:
        return None
    return sum(abs(shard.get(name, 0) / own - count / all_together) for name, count in pooled.items()) / 2
