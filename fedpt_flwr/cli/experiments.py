"""``fedpt compare`` and ``fedpt attack``: many federations, and what they say together."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedpt_flwr.cli.ahead import config_problems
from fedpt_flwr.cli.configs import app_config, given_config
from fedpt_flwr.cli.console import note, say
from fedpt_flwr.cli.options import App, Jobs, NumDevices, Overrides, listed, numbers
from fedpt_flwr.cli.progress import cell_progress
from fedpt_flwr.errors import ConfigError, FedPTError, RunError

if TYPE_CHECKING:
    from fedpt_flwr.compare import Plan

_SUMMARY_EVERY_S = 60.0  # while a comparison runs
_NOT_LOOKED_AT = ("proxy.", "scoring.", "stop.", "threads.", "train.")
"""Sections of the run config in which nothing depends on models, data or devices; but for :data:`_LOOKED_AT`."""
_LOOKED_AT = ("scoring.num-items", "train.max-length")


def compare(
    world: Annotated[
        list[str] | None,
        typer.Option(help="A world's run-config.toml, or `demo`; once for each. By default what the config says."),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("-c", "--run-config", help='For all worlds, as for `flwr run`: "key=value key2=value2".'),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds of the federation; learning rates are chosen with the first.")] = (
        "0,1,2"
    ),
    kinds: Annotated[
        str | None, typer.Option(help="Kinds of cells, by default all: see docs/comparison.md.", show_default=False)
    ] = None,
    modes: Annotated[
        str | None,
        typer.Option(
            help="Distillation modes of `fedpt`; ablations are of the first. By default the config's if it says one, "
            "else final,carry.",
            show_default=False,
        ),
    ] = None,
    ablate: Annotated[
        list[str] | None,
        typer.Option(
            help='A key with the values to vary it over, "proxy.alpha=0.5,1,2"; what follows goes with it. Repeat it.'
        ),
    ] = None,
    ablate_kinds: Annotated[
        str | None, typer.Option(help="Kinds that are run with each of those values, by default fedpt.")
    ] = None,
    ablation_seeds: Annotated[str | None, typer.Option(help="Seeds of the ablations, by default all.")] = None,
    tune: Annotated[
        bool, typer.Option("--tune", help="Only choose the learning rates, with the first seed; writes tuning.json.")
    ] = False,
    tuning: Annotated[
        Path | None,
        typer.Option(help="A tuning.json to take learning rates from; by default the demo world's for `demo`."),
    ] = None,
    learning_rates: Annotated[
        list[str] | None,
        typer.Option(help="Learning rates of a kind to choose from: `central=1e-3,3e-3`. Repeat it."),
    ] = None,
    large_learning_rates: Annotated[str | None, typer.Option(help="The same for `large_federated`.")] = None,
    large_lora_learning_rates: Annotated[str | None, typer.Option(help="The same for `large_federated_lora`.")] = None,
    num_devices: NumDevices = 8,
    jobs: Jobs = 0,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the comparison; one that exists goes on. Else $FEDPT_HOME/comparisons/TIME."),
    ] = None,
    keep_runs: Annotated[bool, typer.Option("--keep-runs", help="Keep the run folders, under OUT/runs.")] = False,
    app_dir: App = Path(),
) -> None:
    """Compare proxy-tuning with whatever else one could do, over seeds and worlds, with costs and intervals.

    Every federation runs in one process, without a network, and leaves one file when it has ended; ended in whatever
    way, the same command with the same --out goes on. Lists are separated by commas. alpha and mask are chosen on
    validation items, unless the config says otherwise.
    """
    if tune:
        _refuse(
            {"--tuning": tuning, "--ablate": ablate or None},
            "says nothing beside --tune, which only chooses learning rates",
            "leave one of both out",
        )
    if not ablate:
        needing = {"--ablate-kinds": ablate_kinds, "--ablation-seeds": ablation_seeds}
        _refuse(needing, "says nothing without --ablate", "say what is varied with --ablate, or leave this out")
    if ablation_seeds is not None and not listed(ablation_seeds):
        raise ConfigError("must name at least one", place="--ablation-seeds", remedy="for example 0,1")
    app_dir = app_dir.resolve()
    defaults, given = app_config(app_dir), given_config(overrides)
    from fedpt_flwr import compare as comparing
    from fedpt_flwr.config import AUTO
    from fedpt_flwr.runs import write_json

    own = {label: flat | given for label, flat in _worlds(world or ["demo"]).items()}
    own = {label: flat if "proxy.plausibility" in flat else {"proxy.alpha": AUTO} | flat for label, flat in own.items()}
    worlds = {label: defaults | flat for label, flat in own.items()}
    chosen_kinds = tuple(comparing.KINDS if kinds is None else listed(kinds))
    rates = _rates_of_kinds(
        learning_rates or [],
        {comparing.LARGE: large_learning_rates, comparing.LARGE_LORA: large_lora_learning_rates},
        chosen_kinds,
    )
    is_given = any("train.learning-rate" in flat for flat in own.values())
    rated = {*rates, *(name for name, kind in comparing.KINDS.items() if is_given and not kind.needs_rate)}
    tuned, notes = _tuned_before(tuning, worlds, num_devices, rated) if not tune else ({}, [])
    listed_seeds = tuple(numbers(seeds, int, "--seeds"))
    own_modes = dict.fromkeys(str(flat["distillation.mode"]) for flat in own.values() if "distillation.mode" in flat)
    listed_modes = tuple((own_modes or comparing.MODES) if modes is None else listed(modes))
    tried = {name: kind.rates for name, kind in comparing.KINDS.items() if kind.rates and (tune or kind.needs_rate)}
    if tune and chosen_kinds and all(kind in comparing.KINDS.keys() - tried.keys() for kind in chosen_kinds):
        rule, remedy = "none of these has a learning rate to choose", f"name some of {', '.join(tried)}"
        raise ConfigError(rule, value=list(chosen_kinds), place="--kinds", remedy=remedy)
    plan = comparing.Plan(
        worlds=worlds,
        kinds=tuple(kind for kind in chosen_kinds if not tune or kind in tried or kind not in comparing.KINDS),
        modes=listed_modes[:1] if tune else listed_modes,
        seeds=listed_seeds[:1] if tune else listed_seeds,
        num_devices=num_devices,
        learning_rates={kind: part for kind, part in (tried | rates).items() if part},
        tuned=tuned,
        ablations=() if tune else tuple(comparing.Ablation.parse(text) for text in ablate or ()),
        ablated_kinds=(comparing.FEDPT,) if ablate_kinds is None else tuple(listed(ablate_kinds)),
        ablation_seeds=() if ablation_seeds is None else tuple(numbers(ablation_seeds, int, "--ablation-seeds")),
    )
    _refuse_what_cannot_run(plan)
    for sentence in notes:
        note(f"fedpt: {sentence}", style="yellow")
    folder = (out or comparing.new_folder()).absolute()
    comparison = comparing.Comparison(plan, folder, app=app_dir)
    note(f"Comparison: {folder}")
    note(f"{_count(plan.num_cells, 'federation')}, {comparison.num_found} of them done before")
    if comparison.num_outdated:
        note(f"{comparison.num_outdated} were made by other code or of other files and are run again")
    command = shlex.join(["fedpt", *sys.argv[1:]])
    damaged = iter(comparison.damaged)  # more may turn up when learning rates have been chosen
    title = f"Proxy-tuning beside what else one could do: {', '.join(worlds)}"

    def summarise() -> dict[str, Any]:
        """Write summary.json, so that there is a report to be made at any time; say which cells were damaged."""
        for path in damaged:
            note(f"{path} is damaged, so the cell is run again")
        summary = comparison.summary(title=title, command=command) | {"notes": notes}
        write_json(folder / "summary.json", summary)
        if tune:
            write_json(folder / "tuning.json", comparison.tuning(command=command))
        return summary

    summary, written = summarise(), time.monotonic()
    try:
        with cell_progress(comparison.num_found, plan.num_cells) as (begin, end):

            def on_cell(cell: comparing.Progress) -> None:
                nonlocal written
                end(cell)
                if time.monotonic() - written > _SUMMARY_EVERY_S:  # it resamples all items, which takes a while
                    summarise()
                    written = time.monotonic()

            comparison.run(
                jobs=jobs or comparing.default_jobs(worlds.values()),
                keep_runs=keep_runs,
                apart=not tune,
                on_begin=begin,
                on_cell=on_cell,
            )
    except KeyboardInterrupt:
        note(f"Ended; the same command with --out {folder} goes on")
        raise typer.Exit(130) from None
    summary = summarise()
    say(comparing.summary_text(summary))
    note(f"Summary: {folder / 'summary.json'}")
    if tune:
        note(f"Tuning: {folder / 'tuning.json'}")
    if summary["errors"]:
        problems = [f"{name}: {error}" for name, error in summary["errors"].items()]
        raise RunError(
            f"{_count(len(problems), 'part')} of the comparison failed",
            place=str(folder),
            remedy="the same command with the same --out tries them again; logs/ says more",
            problems=problems,
        )


def attack(
    overrides: Overrides = None,
    targets: Annotated[
        str, typer.Option(help="What is attacked, by default everything: see docs/privacy.md.", show_default=False)
    ] = "",
    seeds: Annotated[str, typer.Option(help="Seeds of the federations that are attacked.")] = "0,1,2",
    shadows: Annotated[
        int, typer.Option(min=0, help="Federations that the attacker makes to learn from; 0: no likelihood ratio.")
    ] = 4,
    ablate: Annotated[
        list[str] | None,
        typer.Option(help="A key with the values to attack it at, as for `fedpt compare`. Repeat it."),
    ] = None,
    ablate_large: Annotated[
        bool, typer.Option("--ablate-large", help="Run large_federated at each of those values, too.")
    ] = False,
    large_learning_rate: Annotated[float, typer.Option(help="Of large_federated, in its first round.")] = 4e-4,
    canaries: Annotated[int, typer.Option(min=0, help="Secrets for each number of copies.")] = 8,
    copies: Annotated[str, typer.Option(help="How often a secret stands in its device's data.")] = "1,4,16",
    digits: Annotated[int, typer.Option(min=1, max=6, help="Digits of a secret.")] = 3,
    num_devices: NumDevices = 8,
    jobs: Jobs = 0,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the attack; one that exists goes on. Else $FEDPT_HOME/attacks/TIME."),
    ] = None,
    app_dir: App = Path(),
) -> None:
    """Measure what an attacker learns of devices' records and secrets from models and updates.

    Devices train on a random half of the records and on hidden secrets; membership inference and exposure then say
    what is left of them in each target, with intervals. Ended in whatever way, the same command with the same --out
    goes on. alpha and mask are chosen on validation items, unless the config says otherwise.
    """
    app_dir = app_dir.resolve()
    defaults, given = app_config(app_dir), given_config(overrides)
    from fedpt_flwr import attack as attacking
    from fedpt_flwr import compare as comparing
    from fedpt_flwr.config import AUTO

    by_validation = {} if "proxy.plausibility" in given else {"proxy.alpha": AUTO}
    plan = attacking.Plan(
        run_config={key: value for key, value in defaults.items() if key not in attacking.OWN_KEYS}
        | by_validation
        | given,
        targets=tuple(listed(targets) or attacking.TARGETS),
        seeds=tuple(numbers(seeds, int, "--seeds")),
        shadows=shadows,
        num_devices=num_devices,
        settings=tuple(comparing.Ablation.parse(text) for text in ablate or ()),
        varies_large=ablate_large,
        large_learning_rate=large_learning_rate,
        canaries=canaries,
        copies=tuple(numbers(copies, int, "--copies")),
        digits=digits,
    )
    folder = (out or comparing.new_folder("attacks")).absolute()
    bench = attacking.Bench(plan, folder, app=app_dir)
    note(f"Attack: {folder}")
    note(f"{_count(len(bench.federations), 'federation')}, {bench.num_found} of them done before")
    if bench.num_outdated:
        note(f"{bench.num_outdated} are damaged, or of other code or files, and are run again")
    command = shlex.join(["fedpt", *sys.argv[1:]])
    try:
        with cell_progress(bench.num_found, len(bench.federations)) as (_, end):

            def on_cell(cell: comparing.Progress) -> None:
                end(cell)
                bench.write_summary(command=command)  # so that there is a report to be made at any time

            bench.run(jobs=jobs or comparing.default_jobs([plan.run_config]), on_cell=on_cell)
    except KeyboardInterrupt:
        note(f"Ended; the same command with --out {folder} goes on")
        raise typer.Exit(130) from None
    summary = bench.write_summary(command=command)
    say(attacking.summary_text(summary))
    note(f"Tables: {folder / attacking.ATTACK}")
    if bench.failed:
        raise RunError(
            f"{_count(len(bench.failed), 'federation')} of the attack failed",
            place=str(folder),
            remedy="the same command with the same --out tries them again; logs/ says more",
            problems=[f"{name}: {error}" for name, error in bench.failed.items()],
        )


def _worlds(names: list[str]) -> dict[str, dict[str, Any]]:
    """What each world's file says, by its label: the name of the folder that it lies in."""
    files: dict[str, str | None] = {}
    for name in names:
        is_file = name.endswith(".toml")
        if not is_file and name != "demo":
            raise ConfigError("must be a TOML file of a run config, or demo", value=name, place="--world")
        label = Path(name).absolute().parent.name if is_file else name
        if label in files:
            raise ConfigError("two worlds must lie in folders of different names", value=label, place="--world")
        files[label] = name if is_file else None
    return {label: given_config([file], place="--world") if file else {} for label, file in files.items()}


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _refuse(options: Mapping[str, Path | str | list[str] | None], rule: str, remedy: str) -> None:
    """Refuse options that would be passed over, if they were given."""
    for place, value in options.items():
        if value is not None:
            shown = str(value) if isinstance(value, Path) else value
            raise ConfigError(rule, value=shown, place=place, remedy=remedy)


def _rates_of_kinds(
    options: Sequence[str], own: Mapping[str, str | None], kinds: Sequence[str]
) -> dict[str, tuple[float, ...]]:
    """What ``--learning-rates``, and the options that some kinds have of their ``own``, say by kind."""
    from fedpt_flwr.compare import KINDS, RATES_OPTIONS

    said: list[tuple[str, str, str]] = []
    for option in options:
        kind, sign, text = option.partition("=")
        if kind not in KINDS or not KINDS[kind].rates or not sign:
            known = ", ".join(name for name, part in KINDS.items() if part.rates)
            raise ConfigError(f"must begin with one of {known} and =", value=option, place="--learning-rates")
        said.append(("--learning-rates", kind, text))
    said += [(RATES_OPTIONS[kind], kind, text) for kind, text in own.items() if text is not None]
    found: dict[str, tuple[float, ...]] = {}
    for place, kind, text in said:
        rule = remedy = ""
        if kind in found:
            rule, remedy = "must give the learning rates of a kind once", "put them into one list"
        elif kind not in kinds:
            rule, remedy = "must be of a kind that is compared", "add it to --kinds, or leave this out"
        elif not (rates := tuple(numbers(text, float, place))):
            rule, remedy = "must name at least one", "for example 1e-3,3e-3"
        if rule:
            raise ConfigError(rule, value=f"{kind}={text}", place=place, remedy=remedy)
        found[kind] = rates
    return found


def _refuse_what_cannot_run(plan: Plan) -> None:
    """Look at each config of the grid as ``fedpt check-config`` does: no cell shall fail by what is known before.

    Raises:
        ConfigError: Some cannot be run; says all that is wrong, with the world and the ablation.
    """
    from fedpt_flwr.compare.kinds import KINDS, POOLED

    problems: dict[tuple[str, str], FedPTError] = {}  # a world's mistake shows in each of its cells
    looked_at = set[str]()
    for cell in plan.unlike_cells():
        num_devices = 1 if KINDS[cell.kind].who == POOLED else plan.devices_of(cell)
        config = plan.run_config(cell)
        seen = {key: value for key, value in config.items() if not key.startswith(_NOT_LOOKED_AT) or key in _LOOKED_AT}
        if (told := repr((cell.world, num_devices, seen))) in looked_at:
            continue
        looked_at.add(told)
        place = [f"world {cell.world}"] if len(plan.worlds) > 1 else []
        if cell.changes:
            place.append(f"--ablate {' '.join(f'{key}={value}' for key, value in cell.changes)}")
        for problem in config_problems(config, num_devices):
            if (cell.world, str(problem)) not in problems:
                problems[cell.world, str(problem)] = problem
                problem.place = ", ".join([*place, *([problem.place] if problem.place else [])]) or None
    if problems:
        raise ConfigError.of(list(problems.values()))


def _tuned_before(
    tuning: Path | None, worlds: Mapping[str, Mapping[str, Any]], num_devices: int, rated: set[str]
) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Learning rates by world and kind that were chosen before, but for ``rated`` kinds; and what to say of them."""
    from fedpt_flwr.compare import packaged_tuning, read_tuning

    path = tuning or packaged_tuning()
    if path is None:
        return {}, []
    asked = tuning is not None
    about = worlds if asked else {label: flat for label, flat in worlds.items() if label == "demo"}
    tuned, notes = read_tuning(path, about, num_devices=num_devices, is_asked_for=asked)
    return {
        label: {kind: rate for kind, rate in part.items() if kind not in rated} for label, part in tuned.items()
    }, notes
