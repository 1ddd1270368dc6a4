"""What is compared: the cells, what each one's run is told, and which learning rate is chosen."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedpt_flwr.config import DISTILLATION_MODES, Scalar, examine_run_config, flat_values, parse_run_config, settings
from fedpt_flwr.errors import ConfigError, FedPTError

FEDPT, LARGE, LARGE_LORA = "fedpt", "large_federated", "large_federated_lora"
KINDS = (FEDPT, LARGE, LARGE_LORA)
"""What a cell can be."""

LEARNING_RATES: Mapping[str, tuple[float, ...]] = {LARGE: (2e-4, 4e-4, 1e-3), LARGE_LORA: (1e-3, 3e-3, 1e-2)}
"""Learning rates that are tried where none are given, by kind."""

RATES_OPTIONS: Mapping[str, str] = {LARGE: "--large-learning-rates", LARGE_LORA: "--large-lora-learning-rates"}
"""The options that give them."""

Result = dict[str, Any]
"""What a finished cell's JSON file holds."""

_OWN_KEYS = ("seed", "output-dir", "resume")  # of the run config: a comparison gives them to each cell itself
_UNRECORDED = ("output-dir", "resume")  # where a cell runs says nothing about what it is


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One federation.

    Attributes:
        world: Label of its world.
        kind: One of :data:`KINDS`.
        seed: Of the run.
        mode: Distillation mode of a ``fedpt`` cell; None for the others, which do not distil.
        learning_rate: Of the first round; None: what the config says.
    """

    world: str
    kind: str
    seed: int
    mode: str | None = None
    learning_rate: float | None = None

    @property
    def name(self) -> str:
        """The cell's name, fit for files."""
        world = re.sub(r"[^A-Za-z0-9._]+", "_", self.world)
        variant = self.mode if self.learning_rate is None else f"lr{self.learning_rate:g}"
        return f"{world}-{self.kind}-{variant}-seed{self.seed}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is compared.

    Attributes:
        worlds: Flat run configs by label: everything that a cell's run is told, but for what the cell decides.
        kinds: Some of :data:`KINDS`.
        modes: Distillation modes of ``fedpt`` cells.
        seeds: Seeds; learning rates are chosen with the first.
        num_devices: Devices that the training data is dealt out to.
        learning_rates: To choose from, for every kind but ``fedpt``.

    Raises:
        ConfigError: Something is missing, twice there or unknown, or a cell's run config is wrong; says everything.
    """

    worlds: Mapping[str, Mapping[str, Scalar]]
    kinds: tuple[str, ...] = KINDS
    modes: tuple[str, ...] = ("final",)
    seeds: tuple[int, ...] = (0, 1, 2)
    num_devices: int = 8
    learning_rates: Mapping[str, tuple[float, ...]]

    def __post_init__(self) -> None:
        problems: list[FedPTError] = [
            *_list_problems("--world", list(self.worlds)),
            *_list_problems("--kinds", self.kinds, KINDS),
            *_list_problems("--seeds", self.seeds),
            *_list_problems("--modes", self.modes, DISTILLATION_MODES),
        ]
        for kind, option in RATES_OPTIONS.items():
            if kind in self.kinds:
                problems += _rate_problems(option, self.learning_rates.get(kind, ()))
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
        cells = self.cells({})
        ends = (min(self.seeds), max(self.seeds))
        others = [Cell(world=cell.world, kind=cell.kind, seed=seed, mode=cell.mode) for cell in cells for seed in ends]
        for cell in [*cells, *others]:  # the first seed alone may have cells yet
            for problem in examine_run_config(self._told(cell))[1]:
                if problem.place == "seed":  # the world's own is refused above
                    problem.place = "--seeds"
                add(cell.world, problem)
        if len({cell.name for cell in cells}) < len(cells):
            names = sorted(cell.name for cell in cells)
            add("", ConfigError("the names of worlds and learning rates must differ", value=names))
        for (world, _), problem in found.items():
            if world and len(self.worlds) > 1 and problem.place != "--seeds":
                problem.place = f"world {world}, {problem.place}"
        return list(found.values())

    def _direct_kinds(self) -> list[str]:
        return [kind for kind in self.kinds if kind != FEDPT]

    def to_json(self) -> dict[str, Any]:
        """The plan as it is recorded in ``grid.json``."""
        rates = {kind: list(self.learning_rates[kind]) for kind in self._direct_kinds()}
        lists = {"kinds": list(self.kinds), "modes": list(self.modes), "seeds": list(self.seeds)}
        worlds = {label: dict(flat) for label, flat in self.worlds.items()}
        return {**lists, "devices": self.num_devices, "learning_rates": rates, "worlds": worlds}

    @property
    def num_cells(self) -> int:
        """How many cells there are to be run in all."""
        direct = sum(len(self.learning_rates[kind]) + len(self.seeds) - 1 for kind in self._direct_kinds())
        return len(self.worlds) * (direct + (len(self.modes) * len(self.seeds) if FEDPT in self.kinds else 0))

    def candidates(self, world: str, kind: str) -> list[Cell]:
        """The cells that a learning rate is chosen by: one for each, with the first seed."""
        return [
            Cell(world=world, kind=kind, seed=self.seeds[0], learning_rate=rate) for rate in self.learning_rates[kind]
        ]

    def chosen(self, world: str, kind: str, settled: Mapping[str, Result | None]) -> list[Cell]:
        """One direct kind's cells with the chosen learning rate, all seeds; none while that cannot be chosen.

        Args:
            world: Its label.
            kind: ``large_federated`` or ``large_federated_lora``.
            settled: Results of cells by name; None for one that failed.
        """
        candidates = self.candidates(world, kind)
        if len(candidates) > 1 and not all(cell.name in settled for cell in candidates):
            return []
        best = choose_cell(candidates, settled) if len(candidates) > 1 else candidates[0]
        if best is None:
            return []
        rate = best.learning_rate
        return [Cell(world=world, kind=kind, seed=seed, learning_rate=rate) for seed in self.seeds]

    def cells(self, settled: Mapping[str, Result | None]) -> list[Cell]:
        """All cells that may run with what is known by now, whether they have run or not; long ones first."""
        direct = [
            cell
            for world in self.worlds
            for kind in self._direct_kinds()
            for cell in dict.fromkeys([*self.candidates(world, kind), *self.chosen(world, kind, settled)])
        ]
        return [*direct, *self.fedpt_cells()]

    def fedpt_cells(self) -> list[Cell]:
        """The cells of the kind ``fedpt``."""
        if FEDPT not in self.kinds:
            return []
        return [
            Cell(world=world, kind=FEDPT, seed=seed, mode=mode)
            for world in self.worlds
            for mode in self.modes
            for seed in self.seeds
        ]

    def run_config(self, cell: Cell) -> dict[str, Scalar]:
        """What the cell's run is told: every key but those that say where it runs."""
        flat = flat_values(parse_run_config(self._told(cell)))
        return {key: value for key, value in flat.items() if key not in _UNRECORDED}

    def _told(self, cell: Cell) -> dict[str, Scalar]:
        flat = {key: setting.default for key, setting in settings().items()} | dict(self.worlds[cell.world])
        own: dict[str, Scalar] = {"seed": cell.seed}
        if cell.kind == FEDPT:
            own["distillation.mode"] = str(cell.mode)
        else:
            own |= direct_overrides(cell.kind, flat)
        if cell.learning_rate is not None:
            own["train.learning-rate"] = cell.learning_rate
        return flat | own


def direct_overrides(kind: str, flat: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """The keys that make a run's devices tune the large model: it takes the small one's place.

    Rounds, steps, batches, data and strategy stay as they are. The "proxy" of such a run means nothing, so nothing is
    chosen, stopped or scored by it.

    Args:
        kind: ``large_federated`` or ``large_federated_lora``.
        flat: Every key of the run with the small model.
    """
    full = kind == LARGE
    return {
        "model.small": flat["model.large"],
        # All weights are tuned in float32 alone; below an adapter the large model may be as short as it is elsewhere.
        "model.small-dtype": "float32" if full else flat["model.large-dtype"],
        "tuning.mode": "full" if full else "lora",
        "proxy.alpha": 1.0,
        "proxy.plausibility": 0.0,
        "distillation.mode": "off",
        "stop.metric": "",
        "stop.target": 0.0,
        "stop.patience": 0,
        "scoring.rows": "tuned",
        "scoring.round-items": 0,
        "scoring.few-shot": 0,
    }


def choose_cell(candidates: Sequence[Cell], settled: Mapping[str, Result | None]) -> Cell | None:
    """The cell with the best exact match on the validation items; of equal ones that with the lowest loss.

    Args:
        candidates: Cells that differ in their learning rate alone.
        settled: Results by name; None for a cell that failed.

    Returns:
        The best one, or None if all failed.
    """

    def merit(cell: Cell) -> tuple[float, float]:
        row = (settled[cell.name] or {})["validation_rows"][cell.kind]
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
