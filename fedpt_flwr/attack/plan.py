"""What is attacked: the federations, what each one's run is told, and what of them is looked at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedpt_flwr.attack.membership import LEAST_SHADOWS
from fedpt_flwr.compare.kinds import FEDPT, KINDS, LARGE
from fedpt_flwr.compare.plan import Ablation, name_of_changes
from fedpt_flwr.config import Scalar, examine_run_config, flat_values, parse_run_config, settings
from fedpt_flwr.distiller import IN_ROUNDS
from fedpt_flwr.errors import ConfigError

TARGETS: Mapping[str, str] = {
    "tuned": "the small model that the devices tuned together, as it is after the last round",
    "proxy": "what the service answers with: the large model, shifted, with the run's alpha and mask",
    "proxy_without_mask": "the same without the mask",
    "device_first": "a single device's first reply, read by whoever sees it; a record by the model of its own device",
    "device_last": "a single device's last reply",
    "aggregate_first": "the mean of the first round, as every device gets it with the second",
    LARGE: "the large model itself, all its weights, tuned by the devices: what FedPT does without",
    "untuned": "the small model before tuning, which knows no record: the attack's own control",
    "large": "the large model, which knows no record: the control of the proxy",
}
"""Everything that can be attacked, and what it is."""

DEVICE_TARGETS = ("device_first", "device_last")
"""Targets that only the server and its wire see, before anything is added up."""

CONTROLS: Mapping[str, str] = {
    "tuned": "untuned",
    "device_first": "untuned",
    "device_last": "untuned",
    "aggregate_first": "untuned",
    "proxy": "large",
    "proxy_without_mask": "large",
    LARGE: "large",
}
"""The model before tuning, for each target: what is public of it."""

AS_IT_IS = "as configured"
"""The setting without changes."""

OWN_KEYS = ("seed", "output-dir", "resume")
"""Keys of the run config that an attack gives to each run itself."""

_MOST_CANARIES = 1000
"""For each number of copies: what they are told apart by grows with their number."""

_SHADOWS = 1_000_000  # seeds and halves from here on are those of shadows
_UNRECORDED = ("output-dir", "resume")
_PLAIN: Mapping[str, Scalar] = {
    "stop.metric": "",
    "stop.target": 0.0,
    "stop.patience": 0,
    "scoring.few-shot": 0,
    "scoring.round-items": 0,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Federation:
    """One federation, with a random half of the pool on its devices.

    Attributes:
        kind: ``fedpt`` or ``large_federated``.
        changes: What its setting sets, key by key.
        seed: Of the run.
        half: Which half of the pool it trains on; see :func:`~fedpt_flwr.attack.pool.members`.
        is_shadow: Whether the attacker made it, to learn from.
    """

    kind: str
    changes: tuple[tuple[str, Scalar], ...]
    seed: int
    half: int
    is_shadow: bool = False

    @property
    def setting(self) -> str:
        """Its setting, for a reader."""
        return " ".join(f"{key}={value}" for key, value in self.changes) or AS_IT_IS

    @property
    def name(self) -> str:
        """Fit for files."""
        changed = name_of_changes(self.changes) or AS_IT_IS.replace(" ", "_")
        number = f"shadow{self.half - _SHADOWS}" if self.is_shadow else f"seed{self.seed}"
        return f"{self.kind}-{changed}-{number}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything that an attack is asked for.

    Attributes:
        run_config: What all runs are told, where it is not the default.
        targets: Names of :data:`TARGETS`.
        seeds: Of the federations that are attacked.
        shadows: Federations that the attacker makes for each setting and kind; 0: no likelihood ratio.
        num_devices: Devices of every federation.
        settings: Keys with their values; each value is a setting beside the config as it is.
        varies_large: Whether ``large_federated`` is run in every setting, not only as configured.
        large_learning_rate: Of the first round of ``large_federated``.
        canaries: For each number of copies.
        copies: How often a canary stands in its device's data.
        digits: Of a canary's secret.

    Raises:
        ConfigError: It cannot be run; says what is wrong.
    """

    run_config: Mapping[str, Scalar]
    targets: tuple[str, ...]
    seeds: tuple[int, ...]
    shadows: int
    num_devices: int
    settings: tuple[Ablation, ...] = ()
    varies_large: bool = False
    large_learning_rate: float = 4e-4
    canaries: int = 8
    copies: tuple[int, ...] = (1, 4, 16)
    digits: int = 3

    def __post_init__(self) -> None:
        known = [name for name in self.targets if name in TARGETS]
        checks = [
            (known == list(self.targets) and known, f"must be some of {', '.join(TARGETS)}", self.targets, "--targets"),
            (len(set(self.targets)) == len(self.targets), "must name each target once", self.targets, "--targets"),
            (
                self.seeds and all(0 <= seed < _SHADOWS // 2 for seed in self.seeds),
                f"must be whole numbers from 0 to {_SHADOWS // 2 - 1}, at least one",
                self.seeds,
                "--seeds",
            ),
            (len(set(self.seeds)) == len(self.seeds), "must name each seed once", self.seeds, "--seeds"),
            (
                self.shadows == 0 or (self.shadows >= LEAST_SHADOWS and self.shadows % 2 == 0),
                f"must be 0 or an even number of at least {LEAST_SHADOWS}, so that every record is in half of them",
                self.shadows,
                "--shadows",
            ),
            (0 <= self.canaries <= _MOST_CANARIES, f"must be from 0 to {_MOST_CANARIES}", self.canaries, "--canaries"),
            (self.copies and min(self.copies) >= 1, "must be whole numbers of at least 1", self.copies, "--copies"),
            (len(set(self.copies)) == len(self.copies), "must name each number once", self.copies, "--copies"),
            (1 <= self.digits <= 6, "must be from 1 to 6", self.digits, "--digits"),
        ]
        for holds, rule, value, place in checks:
            if not holds:
                raise ConfigError(rule, value=value, place=place)
        own = [key for part in self.settings for key in part.changes(part.values[0]) if key in OWN_KEYS]
        own += [key for key in self.run_config if key in OWN_KEYS]
        if own:
            raise ConfigError("an attack gives these keys itself", value=own, remedy="seeds are given by --seeds")
        problems = [problem for part in self.federations() for problem in examine_run_config(self.told(part))[1]]
        if problems:
            raise ConfigError.of(list({str(problem): problem for problem in problems}.values()))

    def to_json(self) -> dict[str, Any]:
        """What a folder of the attack is recognised by."""
        return {
            "run_config": dict(self.run_config),
            "targets": list(self.targets),
            "seeds": list(self.seeds),
            "shadows": self.shadows,
            "devices": self.num_devices,
            "settings": [part.to_json() for part in self.settings],
            "varies_large": self.varies_large,
            "large_learning_rate": self.large_learning_rate,
            "canaries": self.canaries,
            "copies": list(self.copies),
            "digits": self.digits,
        }

    def kinds(self) -> list[str]:
        """Kinds of federations that the targets are of."""
        of_fedpt = [name for name in self.targets if name != LARGE]
        return [*([FEDPT] if of_fedpt else []), *([LARGE] if LARGE in self.targets else [])]

    def changes(self) -> list[tuple[tuple[str, Scalar], ...]]:
        """The settings, first of all the config as it is."""
        varied = [tuple(part.changes(value).items()) for part in self.settings for value in part.values]
        return list(dict.fromkeys([(), *varied]))

    def federations(self) -> list[Federation]:
        """All federations; those that are attacked first."""
        found = []
        for kind in self.kinds():
            for changes in self.changes() if kind == FEDPT or self.varies_large else [()]:
                found += [Federation(kind=kind, changes=changes, seed=seed, half=2 * seed) for seed in self.seeds]
                shadows = range(_SHADOWS, _SHADOWS + self.shadows)
                found += [
                    Federation(kind=kind, changes=changes, seed=number, half=number, is_shadow=True)
                    for number in shadows
                ]
        return sorted(found, key=lambda part: part.is_shadow)

    def told(self, federation: Federation) -> dict[str, Scalar]:
        """What a federation's run is told, but for its data."""
        flat = {key: setting.default for key, setting in settings().items()} | dict(self.run_config)
        flat |= {**dict(federation.changes), **_PLAIN, "seed": federation.seed}
        if federation.kind == LARGE:
            flat |= KINDS[LARGE].told(flat, self.num_devices) | {"train.learning-rate": self.large_learning_rate}
        elif flat["distillation.mode"] not in IN_ROUNDS:  # else only a copy is added at the end
            flat["distillation.mode"] = "off"
        is_scored = federation.kind == FEDPT and not federation.is_shadow
        flat["scoring.rows"] = "tuned,proxy" if is_scored else "tuned"
        if federation.is_shadow:
            flat["scoring.num-items"] = 1  # a run ends with scores, and nobody reads these
        return flat

    def recorded(self, federation: Federation) -> dict[str, Scalar]:
        """The same as it is kept: without where things lie."""
        flat = flat_values(parse_run_config(self.told(federation)))
        return {key: value for key, value in flat.items() if key not in _UNRECORDED}
