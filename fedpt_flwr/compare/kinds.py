"""The kinds of cells: what the run of each is told, which devices there are, and which rows of the table it gives.

Every kind is the app's own run under another config; none has code of its own. A kind that is missing is added by an
entry in :data:`KINDS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fedpt_flwr.config import SECURE_SUM_DEVICES, Scalar
from fedpt_flwr.errors import ConfigError
from fedpt_flwr.strategy import num_sampled

FEDPT, LARGE, LARGE_LORA = "fedpt", "large_federated", "large_federated_lora"
UNTOUCHED, FEW_SHOT_SMALL, LOCAL = "untouched", "untuned_few_shot", "tuned_local"
CENTRAL, LARGE_CENTRAL, DISTILLED = "central", "large_central", "tuned_kd"

ALL, POOLED, ALONE = "all", "pooled", "alone"
"""Who trains: all devices together; one device that has all their data; each device by itself, one after the other."""

Told = Callable[[Mapping[str, Scalar], int], dict[str, Scalar]]
"""From every key of a world's run config and the number of devices to the keys that a kind's run has otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A kind of cell.

    Attributes:
        told: What its runs are told.
        rows: The rows that it gives: their names in the comparison by their names in a run.
        meanings: What each of these rows is, by its name in the comparison.
        who: :data:`ALL`, :data:`POOLED` or :data:`ALONE`.
        judged: The run's row by which its learning rate is chosen; empty: nothing is chosen.
        rates: Learning rates that ``--tune`` tries: as many for every kind.
        rate_of: The kind whose learning rate it takes; empty: its own.
        needs_rate: Whether the config's learning rate, which is meant for the small model, says nothing about it.
        in_modes: Whether there is one for each distillation mode.
        is_tuned: Whether anything is tuned, so that seeds differ.
    """

    told: Told
    rows: Mapping[str, str]
    meanings: Mapping[str, str]
    who: str = ALL
    judged: str = ""
    rates: tuple[float, ...] = ()
    rate_of: str = ""
    needs_rate: bool = False
    in_modes: bool = False
    is_tuned: bool = True

    @property
    def main_row(self) -> str:
        """The row by which its learning rate is chosen, by its name in the comparison."""
        return self.rows[self.judged]


_UNSTOPPED: Mapping[str, Scalar] = {"stop.metric": "", "stop.target": 0.0, "stop.patience": 0}
_PLAIN: Mapping[str, Scalar] = {
    **_UNSTOPPED,
    "proxy.alpha": 1.0,
    "proxy.plausibility": 0.0,
    "distillation.mode": "off",
    "scoring.rows": "tuned",
    "scoring.few-shot": 0,
}
"""Of a run of which one plain model counts: nothing is chosen, stopped, distilled or scored by its proxy."""

_ALONE: Mapping[str, Scalar] = {
    "min-devices": 1,
    "min-replies": 1,
    "fraction-train": 1.0,
    "privacy.dp": "off",  # it hides a device among others, and here is one
    "privacy.secure-sum": False,  # there is nobody to be hidden among
}


def _fedpt(_flat: Mapping[str, Scalar], _num_devices: int) -> dict[str, Scalar]:
    return {"scoring.rows": "tuned,proxy", "scoring.few-shot": 0}


def _untouched(flat: Mapping[str, Scalar], _num_devices: int) -> dict[str, Scalar]:
    """One step of training, since there is no run without a round; what it changes is not scored.

    That round's items are scored for ``large``: from there other kinds' courses close a gap.
    """
    few_shot = {"scoring.few-shot": flat["scoring.few-shot"]}
    once: dict[str, Scalar] = {"num-server-rounds": 1, "train.max-steps": 1, "train.epochs": 0}
    return {**_PLAIN, **_ALONE, "data.partitioner": "iid", **once, "scoring.rows": "large,untuned", **few_shot}


def _small_as_large(flat: Mapping[str, Scalar], num_devices: int) -> dict[str, Scalar]:
    small: dict[str, Scalar] = {"model.large": flat["model.small"], "model.large-dtype": flat["model.small-dtype"]}
    small |= {key: "" for key in flat if key.startswith("model.large-") and key != "model.large-dtype"}
    return {**_untouched(flat, num_devices), **small, "scoring.rows": "large", "scoring.round-items": 0}


def _direct(tuning: str) -> Told:
    """Devices tune the large model: it takes the small one's place; rounds, steps, data and strategy stay."""

    def told(flat: Mapping[str, Scalar], _num_devices: int) -> dict[str, Scalar]:
        if flat["model.large-url"]:
            raise ConfigError(
                "devices cannot tune a large model that is behind an API",
                value=flat["model.large-url"],
                place="model.large-url",
                remedy="leave out the kinds that tune the large model",
            )
        # All weights are tuned in float32 alone; below an adapter the large model may be as short as it is elsewhere.
        dtype = "float32" if tuning == "full" else flat["model.large-dtype"]
        return {**_PLAIN, "model.small": flat["model.large"], "model.small-dtype": dtype, "tuning.mode": tuning}

    return told


def _pooled(flat: Mapping[str, Scalar], num_devices: int) -> dict[str, Scalar]:
    """One device with all the data makes as many steps as all that train in a round together.

    An epoch of all the data is as many as one of each device; where only some of them train, no number of epochs is.
    """
    needed = max(int(flat["min-replies"]), SECURE_SUM_DEVICES if flat["privacy.secure-sum"] else 1)
    per_round = num_sampled(num_devices, float(flat["fraction-train"]), needed)
    if per_round < num_devices and not int(flat["train.max-steps"]):
        raise ConfigError(
            f"what is tuned in one place must make as many steps as the {per_round} of {num_devices} devices that "
            "train in a round, which epochs alone do not tell",
            value=flat["train.max-steps"],
            place="train.max-steps",
            remedy="bound the steps of a round, or leave out the kinds that tune in one place",
        )
    steps = int(flat["train.max-steps"]) * per_round
    return {**_ALONE, "data.partitioner": "iid", "train.max-steps": steps}


def _central(flat: Mapping[str, Scalar], num_devices: int) -> dict[str, Scalar]:
    return {**_fedpt(flat, num_devices), "distillation.mode": "off", **_pooled(flat, num_devices)}


def _large_central(flat: Mapping[str, Scalar], num_devices: int) -> dict[str, Scalar]:
    return {**_direct("full")(flat, num_devices), **_pooled(flat, num_devices)}


def _local(_flat: Mapping[str, Scalar], _num_devices: int) -> dict[str, Scalar]:
    return {**_PLAIN, **_ALONE, "scoring.round-items": 0}


def _distilled(_flat: Mapping[str, Scalar], _num_devices: int) -> dict[str, Scalar]:
    # At alpha 0 the proxy is the large model, bit for bit: the same lesson with the large model as its teacher.
    return {**_PLAIN, "proxy.alpha": 0.0, "distillation.mode": "final", "scoring.round-items": 0}


_SMALL_RATES, _LARGE_RATES, _ADAPTER_RATES = (1e-3, 3e-3, 1e-2), (2e-4, 4e-4, 1e-3), (1e-3, 3e-3, 1e-2)

KINDS: Mapping[str, Kind] = {
    UNTOUCHED: Kind(
        told=_untouched,
        rows={"large": "large", "large_few_shot": "large_few_shot", "untuned": "untuned"},
        meanings={
            "large": "the large model as it is",
            "large_few_shot": "the large model with public examples in its prompt",
            "untuned": "the small model as it is",
        },
        who=POOLED,
        is_tuned=False,
    ),
    FEW_SHOT_SMALL: Kind(
        told=_small_as_large,
        rows={"large_few_shot": "untuned_few_shot"},
        meanings={"untuned_few_shot": "the small model with public examples in its prompt"},
        who=POOLED,
        is_tuned=False,
    ),
    LOCAL: Kind(
        told=_local,
        rows={"tuned": "tuned_local"},
        meanings={"tuned_local": "the small model tuned on one device's data alone: mean over the devices"},
        who=ALONE,
        judged="tuned",
        rates=_SMALL_RATES,
    ),
    FEDPT: Kind(
        told=_fedpt,
        rows={name: name for name in ("tuned", "proxy", "device", "device_covered", "device_not_covered")},
        meanings={
            "tuned": "the small model that the devices tuned together",
            "proxy": "the large model, shifted by what tuning changed in the small one",
            "device": "the tuned small model after it learnt from the proxy on public prompts",
            "device_covered": "the same, on the items that the public prompts are about",
            "device_not_covered": "the same, on the other items",
        },
        judged="proxy",
        rates=_SMALL_RATES,
        in_modes=True,
    ),
    DISTILLED: Kind(
        told=_distilled,
        rows={"device": "tuned_kd", "device_covered": "tuned_kd_covered", "device_not_covered": "tuned_kd_not_covered"},
        meanings={
            "tuned_kd": "the tuned small model after it learnt from the large model itself on the same public prompts",
            "tuned_kd_covered": "the same, on the items that the public prompts are about",
            "tuned_kd_not_covered": "the same, on the other items",
        },
        rate_of=FEDPT,
    ),
    CENTRAL: Kind(
        told=_central,
        rows={"tuned": "tuned_central", "proxy": "proxy_central"},
        meanings={
            "tuned_central": "the small model tuned in one place on all the data, with as many steps as all devices",
            "proxy_central": "the large model, shifted by what that changed",
        },
        who=POOLED,
        judged="proxy",
        rates=_SMALL_RATES,
    ),
    LARGE: Kind(
        told=_direct("full"),
        rows={"tuned": LARGE},
        meanings={LARGE: "the large model itself, all its weights, tuned by the devices"},
        judged="tuned",
        rates=_LARGE_RATES,
        needs_rate=True,
    ),
    LARGE_LORA: Kind(
        told=_direct("lora"),
        rows={"tuned": LARGE_LORA},
        meanings={LARGE_LORA: "the large model with an adapter, tuned by the devices"},
        judged="tuned",
        rates=_ADAPTER_RATES,
        needs_rate=True,
    ),
    LARGE_CENTRAL: Kind(
        told=_large_central,
        rows={"tuned": LARGE_CENTRAL},
        meanings={LARGE_CENTRAL: "the large model tuned in one place on all the data, with as many steps"},
        who=POOLED,
        judged="tuned",
        rates=_LARGE_RATES,
        needs_rate=True,
    ),
}
"""All kinds by name, in the order of the table."""
