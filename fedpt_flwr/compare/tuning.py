"""Learning rates chosen once, on validation items alone, and kept in a file that later comparisons read.

``fedpt compare --tune`` tries as many learning rates for every kind of cell, with one seed, and writes ``tuning.json``:
what was chosen, everything that was tried, and the command. A comparison that reads it chooses nothing, so that all its
cells count.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from fedpt_flwr.compare.kinds import KINDS
from fedpt_flwr.compare.plan import Plan, Result
from fedpt_flwr.config import Scalar, settings
from fedpt_flwr.errors import ConfigError, RunError
from fedpt_flwr.runs import read_json

FILE = "tuning.json"
_DEMO_PACKAGE = "fedpt_demo_world"
# Of these, and of what is measured, no learning rate depends by much; all else must be as it was.
_FREE = (
    *("seed", "output-dir", "resume", "keep-rounds", "round-timeout-s", "wait-timeout-s"),
    *("train.learning-rate", "train.packing"),
)
_FREE_SECTIONS = ("distillation.", "proxy.", "scoring.", "stop.", "threads.")


def tuning_of(plan: Plan, settled: Mapping[str, Result | None], *, command: str, code_hash: str) -> dict[str, Any]:
    """What ``tuning.json`` holds.

    Args:
        plan: With several learning rates for each kind.
        settled: Results by cell; None for a cell that failed.
        command: That made it.
        code_hash: Of the code that made it.
    """
    worlds = {
        world: {"rates": _rates(plan, world, settled), "run_config": _bound(plan.worlds[world])}
        for world in plan.worlds
    }
    head = {"command": command, "code_hash": code_hash, "seed": plan.seeds[0], "devices": plan.num_devices}
    return {**head, "chosen_by": "exact match on the validation items, then loss", "worlds": worlds}


def _rates(plan: Plan, world: str, settled: Mapping[str, Result | None]) -> dict[str, Any]:
    found = {}
    for kind in plan.kinds_of(world):
        if not KINDS[kind].judged:
            continue
        candidates = plan.candidates(world, kind)
        rate, is_known = plan.rate(world, kind, settled)
        if not is_known or rate is None or not any(settled.get(cell.name) for cell in candidates):
            continue
        tried = []
        for cell in candidates:
            rows = (settled.get(cell.name) or {}).get("validation_rows", {})
            scores = {
                row: {measure: scored[measure] for measure in ("exact_match", "loss") if measure in scored}
                for row, scored in rows.items()
            }
            tried.append({"learning_rate": cell.learning_rate, "validation": scores})
        ends = (min(plan.learning_rates[kind]), max(plan.learning_rates[kind]))
        found[kind] = {
            "learning_rate": rate,
            "judged_by": KINDS[kind].main_row,
            "at_the_edge": rate in ends,  # then a rate beyond it might be better
            "tried": tried,
        }
    return found


def _bound(flat: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """The keys of a world on which its learning rates depend."""
    whole = {key: setting.default for key, setting in settings().items()} | dict(flat)
    return {key: value for key, value in whole.items() if key not in _FREE and not key.startswith(_FREE_SECTIONS)}


def packaged_tuning() -> Path | None:
    """The tuning of the demo world, which the project carries; None where it is not installed."""
    try:
        path = Path(str(resources.files(_DEMO_PACKAGE) / FILE))
    except ModuleNotFoundError:
        return None
    return path if path.is_file() else None


def read_tuning(
    path: Path, worlds: Mapping[str, Mapping[str, Scalar]], *, num_devices: int, is_asked_for: bool = True
) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Learning rates by world and kind, as far as a file has them for these worlds.

    Args:
        path: The file.
        worlds: Flat run configs by label.
        num_devices: Devices of every federation.
        is_asked_for: Whether a user named the file: then it must be about one of these worlds.

    Returns:
        The rates, and a sentence for each world that is not as it was when they were chosen.

    Raises:
        ConfigError: It is no such file, or about none of these worlds.
        RunError: It cannot be read.
    """
    place, remedy = f"--tuning, {path}" if is_asked_for else str(path), "name a tuning.json that `--tune` wrote"
    try:
        held = read_json(path)
    except RunError as error:
        error.place, error.remedy = place, remedy
        raise
    known = held.get("worlds") if isinstance(held, dict) else None
    if not isinstance(known, dict):
        raise ConfigError("must be a file that `fedpt compare --tune` wrote", place=place, remedy=remedy)
    if is_asked_for and not known.keys() & worlds.keys():
        raise ConfigError(
            f"must be about one of the worlds {', '.join(worlds)}",
            value=sorted(known),
            place=place,
            remedy="give --world a file in a folder of such a name, or choose learning rates with --tune",
        )
    tuned, notes = {}, []
    for label in [label for label in worlds if label in known]:
        try:
            rates = {kind: float(part["learning_rate"]) for kind, part in known[label]["rates"].items()}
            was = _bound(dict(known[label]["run_config"]))  # a file of before a key was there had its default
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError("must be a file that `fedpt compare --tune` wrote", place=place, remedy=remedy) from error
        now = _bound(worlds[label])
        differing = sorted(key for key in {*was, *now} if was.get(key) != now.get(key))
        if held.get("devices") != num_devices:
            differing.append("devices")
        tuned[label] = {kind: rate for kind, rate in rates.items() if kind in KINDS}
        if differing:
            notes.append(
                f"World {label}: the learning rates were chosen with other settings ({', '.join(differing)}) and are "
                "used all the same; --tune chooses them anew"
            )
    return tuned, notes
