"""Puts a plan together: the run, and beside it devices that tune the large model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from fedpt_flwr.architectures import check_sizes, find_architecture
from fedpt_flwr.config import RunConfig
from fedpt_flwr.errors import ConfigError, naming
from fedpt_flwr.models import check_context
from fedpt_flwr.plan.counting import FEDPT, LARGE, LARGE_LORA, Column, Counting, Rates
from fedpt_flwr.plan.texts import MOST, Told, find_texts
from fedpt_flwr.strategy import num_sampled


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run would cost, beside devices that tune the large model.

    Attributes:
        config: Of the run.
        num_devices: Devices that there are.
        num_sampled: Of them, those that train in a round.
        rates: What was told or assumed of machines and prices.
        columns: :data:`FEDPT` first.
        assumed: Sentences on what nobody told, and how to tell it.
    """

    config: RunConfig
    num_devices: int
    num_sampled: int
    rates: Rates
    columns: Sequence[Column]
    assumed: Sequence[str]

    def to_json(self) -> dict[str, Any]:
        """Everything, as numbers."""
        model = self.config.model
        return {
            "models": {"small": model.small, "large": model.large_url or model.large},
            "devices": self.num_devices,
            "devices_per_round": self.num_sampled,
            "rounds": self.config.num_server_rounds,
            "rates": dataclasses.asdict(self.rates),
            "columns": {column.name: column.to_json() for column in self.columns},
            "assumed": list(self.assumed),
        }


def make_plan(config: RunConfig, num_devices: int, *, told: Told | None = None, rates: Rates | None = None) -> Plan:
    """Plan a run, and beside it the same run with devices that tune the large model, in full and with an adapter.

    A large model behind an API (``model.large-url``) is never asked, and has no such columns: nobody can tune it.

    Args:
        config: Of the run. Its models may also be what :func:`fedpt_flwr.architectures.find_architecture` finds.
        num_devices: Devices that there are.
        told: What the user says of the texts.
        rates: What the user says of machines and prices.

    Raises:
        FedPTError: A model or a text that the config names cannot be used; says why.
    """
    rates = Rates() if rates is None else rates
    if config.min_devices > num_devices:
        raise ConfigError(
            f"a run would wait in vain for more than the {num_devices} devices that there are",
            value=config.min_devices,
            place="min-devices",
            remedy="plan with more (--devices), or lower min-devices",
        )
    if num_devices > MOST:
        raise ConfigError(
            f"a plan counts up to {MOST:,} of them", value=num_devices, place="--devices", remedy="plan fewer"
        )
    is_remote = bool(config.model.large_url)
    with naming("model.small"):
        small = find_architecture(config.model.small)
    if not is_remote:
        with naming("model.large"):
            check_sizes(find_architecture(config.model.large), small)
    check_context(small, config.train.max_length)
    texts = find_texts(config, num_devices, Told() if told is None else told)
    columns = [Counting(config, FEDPT, texts, rates).column()]
    if not is_remote:
        columns += [Counting(_direct(config, kind), kind, texts, rates).column() for kind in (LARGE, LARGE_LORA)]
    return Plan(
        config=config,
        num_devices=num_devices,
        num_sampled=num_sampled(len(texts.shards), config.fraction_train, config.replies_needed),
        rates=rates,
        columns=columns,
        assumed=texts.assumed,
    )


def _direct(config: RunConfig, kind: str) -> RunConfig:
    """The run in which devices tune the large model: it takes the small one's place, as in ``fedpt compare``."""
    full = kind == LARGE
    model = dataclasses.replace(
        config.model,
        small=config.model.large,
        # All weights are tuned in float32 alone; below an adapter the large model may be as short as it is elsewhere.
        small_dtype="float32" if full else config.model.large_dtype,
    )
    return dataclasses.replace(
        config,
        model=model,
        tuning=dataclasses.replace(config.tuning, mode="full" if full else "lora"),
        distillation=dataclasses.replace(config.distillation, mode="off"),
    )
