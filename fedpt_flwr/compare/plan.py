"""What is compared: the cells, what each one's run is told, and which learning rate is chosen."""

from __future__ import annotations

import math
import re
import tomllib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fedpt_flwr.compare.kinds import FEDPT, FEW_SHOT_SMALL, KINDS, LARGE, LARGE_LORA
from fedpt_flwr.config import DISTILLATION_MODES, Scalar, examine_run_config, flat_values, parse_run_config, settings
from fedpt_flwr.errors import ConfigError, FedPTError

RATES_OPTIONS: Mapping[str, str] = {LARGE: "--large-learning-rates", LARGE_LORA: "--large-lora-learning-rates"}
"""Options that give the learning rates of a kind; of the others they are given by ``--learning-rates``."""

MODES = ("final", "carry")
"""Distillation modes where none are given: without distillation in the rounds, and with it."""

DEVICES = "devices"
"""What ``--ablate`` calls the number of devices, which is no key of the run config."""

IMPLIED: Mapping[str, Mapping[str, Scalar]] = {
    DEVICES: {"data.partitioner": "iid"},  # groups that stay whole are too few for more devices
    "data.dirichlet-alpha": {"data.partitioner": "dirichlet"},
    "tuning.lora-rank": {"tuning.mode": "lora"},
    "tuning.lora-aggregation": {"tuning.mode": "lora"},
    "privacy.noise-multiplier": {"privacy.dp": "server-fixed"},
    "privacy.clipping-norm": {"privacy.dp": "server-fixed"},
    "privacy.clipped-share": {"privacy.dp": "server-adaptive"},
    "proxy.alpha": {"proxy.plausibility": 0.0},
    "proxy.plausibility": {"proxy.alpha": 1.0},
}
"""What else is set where a key is varied, unless it is given too."""

Result = dict[str, Any]
"""What a finished cell's JSON file holds."""

_OWN_KEYS = ("seed", "output-dir", "resume")  # of the run config: a comparison gives them to each cell itself
_UNRECORDED = ("output-dir", "resume")  # where a cell runs says nothing about what it is
_MODE, _RATE = "distillation.mode", "train.learning-rate"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One federation, or with :data:`ALONE` one of each device.

    Attributes:
        world: Label of its world.
        kind: One of :data:`KINDS`.
        seed: Of the run.
        mode: Distillation mode of a ``fedpt`` cell; None for the others.
        learning_rate: Of the first round; None: what the config says.
        changes: What an ablation sets, key by key; with :data:`DEVICES` the number of devices.
    """

    world: str
    kind: str
    seed: int
    mode: str | None = None
    learning_rate: float | None = None
    changes: tuple[tuple[str, Scalar], ...] = ()

    @property
    def name(self) -> str:
        """The cell's name, fit for files."""
        rate = "" if self.learning_rate is None else f"lr{self.learning_rate:g}"
        parts = [_slug(self.world), self.kind, self.mode or "", rate, name_of_changes(self.changes)]
        return "-".join([*filter(None, parts), f"seed{self.seed}"])


def name_of_changes(changes: Sequence[tuple[str, Scalar]]) -> str:
    """Keys and values as a part of a file's name, at most some 90 characters; other values have another name."""
    name = "_".join(f"{key}_{_slug(str(value))}" for key, value in changes)
    return name if len(name) <= _LONGEST_CHANGES else _with_checksum(name[:_LONGEST_CHANGES], of=name)


_LONGEST_CHANGES = 80  # characters


def _slug(text: str) -> str:
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", text)
    return name if name == text else _with_checksum(name, of=text)


def _with_checksum(name: str, *, of: str) -> str:
    return f"{name}.{zlib.crc32(of.encode()):08x}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ablation:
    """One key with the values that it takes, everything else being as it is.

    Attributes:
        key: Of the run config, or :data:`DEVICES`.
        values: What it is set to.
        fixed: What else is set with all of them.
    """

    key: str
    values: tuple[Scalar, ...]
    fixed: Mapping[str, Scalar] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Ablation:
        """From ``key=value,value,... key2=value``: the first key is varied, the others are set with all its values.

        Raises:
            ConfigError: It is nothing of that kind.
        """
        first, *others = pairs = _pairs(text)
        key, listed = first
        parts = re.split(r",(?=(?:[^']*'[^']*')*[^']*$)", listed)
        values = tuple(_value(part) for part in parts)
        for rule, is_broken in (
            ("must name each key once", len({name for name, _ in pairs}) < len(pairs)),
            ("must have a value before and after each comma", not all(map(str.strip, parts))),
            ("must not name a value twice", len(set(map(str, values))) < len(values)),
        ):
            if is_broken:
                raise ConfigError(rule, value=text, place="--ablate", remedy=_ABLATE_EXAMPLE)
        return cls(key=key, values=values, fixed={name: _value(value) for name, value in others})

    def to_json(self) -> dict[str, Any]:
        """For ``grid.json``."""
        return {"key": self.key, "values": list(self.values), "fixed": dict(self.fixed)}

    def changes(self, value: Scalar) -> dict[str, Scalar]:
        """Everything that one value sets."""
        return {**IMPLIED.get(self.key, {}), **self.fixed, self.key: value}


_ABLATE_EXAMPLE = "for example 'proxy.alpha=0.25,0.5,1' or 'devices=4,16'"


def _pairs(text: str) -> list[tuple[str, str]]:
    found = re.findall(r"([\w.-]+)\s*=\s*((?:'[^']*'|[^\s'])+)", text)
    rest = re.sub(r"([\w.-]+)\s*=\s*((?:'[^']*'|[^\s'])+)", "", text)
    if not found or rest.strip():
        rule = "must be a key with its values, perhaps followed by others that go with it"
        raise ConfigError(rule, value=text, place="--ablate", remedy=_ABLATE_EXAMPLE)
    return found


def _value(text: str) -> Scalar:
    """A value as TOML has it; a word without quotes is a text."""
    try:
        value: Scalar = tomllib.loads(f"value = {text.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        return text.strip()
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is compared.

    Attributes:
        worlds: Flat run configs by label: everything that a cell's run is told, but for what the cell decides.
        kinds: Some of :data:`KINDS`.
        modes: Distillation modes of ``fedpt`` cells; ablations are of the first.
        seeds: Seeds; learning rates are chosen with the first.
        num_devices: Devices that the training data is dealt out to.
        learning_rates: To choose from, by kind. Of a kind that is not here the config's is used.
        tuned: Learning rates that were chosen before, by world and kind; they go before the others.
        ablations: Keys to vary.
        ablated_kinds: The kinds whose cells are run with each of those values.
        ablation_seeds: Their seeds; empty: all.

    Raises:
        ConfigError: Something is missing, twice there or unknown, or a cell's run config is wrong; says everything.
    """

    worlds: Mapping[str, Mapping[str, Scalar]]
    kinds: tuple[str, ...] = tuple(KINDS)
    modes: tuple[str, ...] = ("final",)
    seeds: tuple[int, ...] = (0, 1, 2)
    num_devices: int = 8
    learning_rates: Mapping[str, tuple[float, ...]]
    tuned: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    ablations: tuple[Ablation, ...] = ()
    ablated_kinds: tuple[str, ...] = (FEDPT,)
    ablation_seeds: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        problems: list[FedPTError] = [
            *_list_problems("--world", list(self.worlds)),
            *_list_problems("--kinds", self.kinds, tuple(KINDS)),
            *_list_problems("--seeds", self.seeds),
            *_list_problems("--modes", self.modes, DISTILLATION_MODES),
        ]
        if self.ablations:
            problems += _list_problems("--ablate-kinds", self.ablated_kinds, self.kinds)
            if self.ablation_seeds:
                problems += _list_problems("--ablation-seeds", self.ablation_seeds)
            varied = [
                " ".join(f"{key}={value}" for key, value in {ablation.key: value, **ablation.fixed}.items())
                for ablation in self.ablations
                for value in ablation.values
            ]
            problems += _list_problems("--ablate", varied)
        for kind in self.kinds:
            if kind not in KINDS:
                continue
            rates, place = self.learning_rates.get(kind, ()), RATES_OPTIONS.get(kind, f"--learning-rates, {kind}")
            is_known = all(kind in self.tuned.get(world, {}) for world in self.worlds)
            if rates or (KINDS[kind].needs_rate and not is_known):
                problems += _rate_problems(place, rates)
        if len(problems) > 1:
            raise ConfigError(f"{len(problems)} options are wrong", problems=problems)
        if problems := problems or self._config_problems():
            raise ConfigError.of(problems)

    def _config_problems(self) -> list[FedPTError]:
        found: dict[tuple[str, str], FedPTError] = {}  # a world's mistake shows in each of its cells

        def add(world: str, problem: FedPTError) -> None:
            found.setdefault((world, str(problem)), problem)

        known = settings()
        for world, flat in self.worlds.items():
            for key in _OWN_KEYS:
                if flat.get(key, known[key].default) != known[key].default:
                    add(world, ConfigError("a comparison sets this key itself", value=flat[key], place=key))
            wanted = flat.get("min-devices", known["min-devices"].default)
            if isinstance(wanted, int) and wanted > self.num_devices:
                rule = f"must not exceed the {self.num_devices} devices of a federation (--devices)"
                remedy = f"give --devices {wanted}, or -c 'min-devices={self.num_devices}'"
                add(world, ConfigError(rule, value=wanted, place="min-devices", remedy=remedy))
            if flat.get("data.partitioner") == "node-local":
                rule = "a comparison deals out data.train itself; its devices have no data of their own"
                add(world, ConfigError(rule, value="node-local", place="data.partitioner"))
            for problem in examine_run_config(self._flat(world))[1]:
                add(world, problem)
        for key in [key for ablation in self.ablations for key in ablation.changes(ablation.values[0])]:
            if key in _OWN_KEYS:
                add("", ConfigError("a comparison sets this key itself", value=key, place="--ablate"))
        if found:
            return self._named(found)
        cells = self.cells({})
        names = [cell.name for cell in cells]
        ends = (min(self.seeds), max(self.seeds))
        # The first seed alone may have cells yet.
        others = [
            Cell(world=cell.world, kind=cell.kind, seed=seed, mode=cell.mode, changes=cell.changes)
            for cell in [*cells, *self.ablation_cells({})]
            for seed in ends
        ]
        for cell in dict.fromkeys([*cells, *others]):
            for problem in self._problems_of(cell):
                if problem.place == "seed":  # the world's own is refused above
                    problem.place = "--seeds" if cell.seed in self.seeds else "--ablation-seeds"
                elif cell.changes:
                    problem.place = f"--ablate, {problem.place}"
                add(cell.world, problem)
        if len(set(names)) < len(names):
            add("", ConfigError("the names of worlds and learning rates must differ", value=sorted(names)))
        return self._named(found)

    def _problems_of(self, cell: Cell) -> list[FedPTError]:
        devices = self.devices_of(cell)
        if isinstance(devices, bool) or not isinstance(devices, int) or devices < 1:
            return [ConfigError("must be a whole number of at least 1", value=devices, place=DEVICES)]
        return examine_run_config(self._told(cell))[1]

    def _named(self, found: Mapping[tuple[str, str], FedPTError]) -> list[FedPTError]:
        for (world, _), problem in found.items():
            if world and len(self.worlds) > 1 and problem.place not in ("--seeds", "--ablation-seeds"):
                problem.place = f"world {world}, {problem.place}"
        return list(found.values())

    def to_json(self) -> dict[str, Any]:
        """The plan as it is recorded in ``grid.json``."""
        rates = {kind: list(rates) for kind, rates in self.learning_rates.items() if kind in self.kinds and rates}
        lists = {"kinds": list(self.kinds), "modes": list(self.modes), "seeds": list(self.seeds)}
        worlds = {label: dict(flat) for label, flat in self.worlds.items()}
        plan = {**lists, "devices": self.num_devices, "learning_rates": rates, "worlds": worlds}
        if self.tuned:
            plan["tuned"] = {world: dict(rates) for world, rates in self.tuned.items()}
        if self.ablations:
            plan["ablations"] = [ablation.to_json() for ablation in self.ablations]
            plan["ablated_kinds"] = list(self.ablated_kinds)
            plan["ablation_seeds"] = list(self.ablation_seeds)
        return plan

    # --- cells ---

    def kinds_of(self, world: str) -> list[str]:
        """The kinds that a world has, in the order of the table; without public examples nothing has few of them."""
        flat = self._flat(world)
        has_shots = bool(flat["scoring.few-shot"] and flat["data.public"])
        return [kind for kind in KINDS if kind in self.kinds and (has_shots or kind != FEW_SHOT_SMALL)]

    def seeds_of(self, world: str, kind: str) -> tuple[int, ...]:
        """The seeds of a kind: one where nothing is tuned and the items are the same for all seeds."""
        flat = self._flat(world)
        items_differ = not (flat["data.test"] and flat["data.validation"])
        return self.seeds if KINDS[kind].is_tuned or items_differ else self.seeds[:1]

    def _modes_of(self, kind: str) -> Sequence[str | None]:
        return self.modes if KINDS[kind].in_modes else (None,)

    def candidates(self, world: str, kind: str) -> list[Cell]:
        """The cells that a learning rate is chosen by: one for each, with the first seed and mode."""
        known = self.tuned.get(world, {}).get(kind)
        rates: Sequence[float | None] = self.learning_rates.get(kind, ()) if known is None else (known,)
        mode = self._modes_of(kind)[0]
        return [
            Cell(world=world, kind=kind, seed=self.seeds[0], mode=mode, learning_rate=rate) for rate in rates or (None,)
        ]

    def rate(self, world: str, kind: str, settled: Mapping[str, Result | None]) -> tuple[float | None, bool]:
        """The learning rate of a kind, None for the config's, and whether it can be told by now.

        Args:
            world: Its label.
            kind: Its name.
            settled: Results of cells by name; None for one that failed.
        """
        owner = KINDS[kind].rate_of or kind
        if owner not in self.kinds:
            return self.tuned.get(world, {}).get(owner), True
        candidates = self.candidates(world, owner)
        if len(candidates) > 1 and not all(cell.name in settled for cell in candidates):
            return None, False
        best = choose_cell(candidates, settled) if len(candidates) > 1 else candidates[0]
        return (None, False) if best is None else (best.learning_rate, True)

    def chosen(self, world: str, kind: str, settled: Mapping[str, Result | None]) -> list[Cell]:
        """One kind's cells with the chosen learning rate, all modes and seeds; none while that cannot be chosen.

        Args:
            world: Its label.
            kind: Its name.
            settled: Results of cells by name; None for one that failed.
        """
        rate, is_known = self.rate(world, kind, settled)
        if not is_known:
            return []
        return [
            Cell(world=world, kind=kind, seed=seed, mode=mode, learning_rate=rate)
            for mode in self._modes_of(kind)
            for seed in self.seeds_of(world, kind)
        ]

    def cells(self, settled: Mapping[str, Result | None]) -> list[Cell]:
        """All cells that may run with what is known by now, whether they have run or not; long ones first."""
        found = [
            cell
            for world in self.worlds
            for kind in self.kinds_of(world)
            for cell in [
                *([] if KINDS[kind].rate_of else self.candidates(world, kind)),
                *self.chosen(world, kind, settled),
            ]
        ]
        kinds = list(KINDS)
        ordered = sorted([*found, *self.ablation_cells(settled)], key=lambda cell: -kinds.index(cell.kind))
        return list(dict.fromkeys(ordered))

    def unlike_cells(self) -> list[Cell]:
        """One cell for each world, kind, mode and value of an ablation, whatever its seed and learning rate."""
        cells = [
            *(
                Cell(world=world, kind=kind, seed=self.seeds[0], mode=mode)
                for world in self.worlds
                for kind in self.kinds_of(world)
                for mode in self._modes_of(kind)
            ),
            *self.ablation_cells({}, any_rate=True),
        ]
        return list(dict.fromkeys(replace(cell, seed=self.seeds[0], learning_rate=None) for cell in cells))

    @property
    def num_cells(self) -> int:
        """How many cells there are to be run in all."""
        number = 0
        for world in self.worlds:
            for kind in self.kinds_of(world):
                number += len(self._modes_of(kind)) * len(self.seeds_of(world, kind))
                number += 0 if KINDS[kind].rate_of else len(self.candidates(world, kind)) - 1
        return number + len({cell for cell in self.ablation_cells({}, any_rate=True) if cell.changes})

    def ablation_cells(self, settled: Mapping[str, Result | None], *, any_rate: bool = False) -> list[Cell]:
        """The cells of all ablations that may run by now; where a value changes nothing, the cell without it.

        Args:
            settled: Results of cells by name; None for one that failed.
            any_rate: Also those whose learning rate cannot be told yet.
        """
        return [cell for _, _, cells in self.ablated(settled, any_rate=any_rate) for cell in cells]

    def ablated(
        self, settled: Mapping[str, Result | None], *, any_rate: bool = False
    ) -> Iterator[tuple[Ablation, tuple[str, str, Scalar], list[Cell]]]:
        """For each ablation, world, kind and value the cells of all its seeds."""
        for ablation in self.ablations:
            for world in self.worlds:
                for kind in [kind for kind in self.kinds_of(world) if kind in self.ablated_kinds]:
                    rate, is_known = self.rate(world, kind, settled)
                    if not (is_known or any_rate):
                        continue
                    for value in ablation.values:
                        cells = [
                            self._ablation_cell(ablation, value, world=world, kind=kind, seed=seed, rate=rate)
                            for seed in self.ablation_seeds or self.seeds_of(world, kind)
                        ]
                        yield ablation, (world, kind, value), cells

    def _ablation_cell(
        self, ablation: Ablation, value: Scalar, *, world: str, kind: str, seed: int, rate: float | None
    ) -> Cell:
        mode = self._modes_of(kind)[0]
        changes = ablation.changes(value)
        if mode is not None and _MODE in changes:
            mode = str(changes[_MODE])
        cell = Cell(
            world=world,
            kind=kind,
            seed=seed,
            mode=mode,
            learning_rate=None if _RATE in changes else rate,
            changes=tuple(changes.items()),
        )
        for other in self._modes_of(kind) if seed in self.seeds else ():
            same = Cell(world=world, kind=kind, seed=seed, mode=other, learning_rate=rate)
            if self._told(cell) == self._told(same) and self.devices_of(cell) == self.num_devices:
                return same
        return cell

    # --- what a cell's run is told ---

    def devices_of(self, cell: Cell) -> int:
        """The devices that a cell's training data is dealt out to, unless one has all of it."""
        return dict(cell.changes).get(DEVICES, self.num_devices)  # type: ignore[return-value]

    def run_config(self, cell: Cell) -> dict[str, Scalar]:
        """What the cell's run is told: every key but those that say where it runs."""
        flat = flat_values(parse_run_config(self._told(cell)))
        return {key: value for key, value in flat.items() if key not in _UNRECORDED}

    def _flat(self, world: str) -> dict[str, Scalar]:
        return {key: setting.default for key, setting in settings().items()} | dict(self.worlds[world])

    def _told(self, cell: Cell) -> dict[str, Scalar]:
        changes = {key: value for key, value in cell.changes if key != DEVICES}
        flat = self._flat(cell.world) | changes
        own = KINDS[cell.kind].told(flat, self.devices_of(cell)) | {"seed": cell.seed}
        if cell.mode is not None:
            own[_MODE] = cell.mode
        if cell.learning_rate is not None:
            own[_RATE] = cell.learning_rate
        return flat | own


def choose_cell(candidates: Sequence[Cell], settled: Mapping[str, Result | None]) -> Cell | None:
    """The cell with the best exact match on the validation items; of equal ones that with the lowest loss.

    Args:
        candidates: Cells of one kind that differ in their learning rate alone.
        settled: Results by name; None for a cell that failed.

    Returns:
        The best one, or None if all failed.
    """

    def merit(cell: Cell) -> tuple[float, float]:
        row = (settled[cell.name] or {})["validation_rows"][KINDS[cell.kind].main_row]
        return row["exact_match"], -row.get("loss", math.inf)  # a loss that is not finite is not there

    return max((cell for cell in candidates if settled.get(cell.name)), key=merit, default=None)


def _rate_problems(place: str, rates: Sequence[float]) -> list[FedPTError]:
    if not all(0 < rate < math.inf for rate in rates):
        return [ConfigError("must be finite numbers greater than 0", value=list(rates), place=place)]
    return _list_problems(place, rates)


def _list_problems(place: str, values: Sequence[Any], known: Sequence[str] = ()) -> list[FedPTError]:
    if not values:
        return [ConfigError("must name at least one", place=place)]
    found: list[FedPTError] = []
    if len(set(values)) < len(values):
        found.append(ConfigError("must not name anything twice", value=list(values), place=place))
    if known and not set(values) <= set(known):
        found.append(ConfigError(f"must be some of {', '.join(known)}", value=list(values), place=place))
    return found
