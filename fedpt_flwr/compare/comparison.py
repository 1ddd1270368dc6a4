"""The whole comparison: its folder, which cell's turn it is, and what to do when one ends."""

from __future__ import annotations

import datetime
import functools
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpt_flwr.compare.cell import App, Task, app_hash, made, result_path, run_cell
from fedpt_flwr.compare.inputs import digest_of_path, input_digests
from fedpt_flwr.compare.kinds import KINDS
from fedpt_flwr.compare.plan import Cell, Plan, Result
from fedpt_flwr.compare.summary import summarise
from fedpt_flwr.compare.tuning import tuning_of
from fedpt_flwr.compare.workers import WorkerSettings, run_all
from fedpt_flwr.config import Scalar
from fedpt_flwr.errors import ConfigError, RunError, naming
from fedpt_flwr.runs import read_json, runs_root, write_json

try:
    import fcntl
except ImportError:  # Windows; there nothing keeps a second writer out
    fcntl = None  # type: ignore[assignment]


_WORKER_BYTES = 800_000_000  # of a worker with Flower and torch, beside whatever models it loads


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """A cell has ended.

    Attributes:
        name: The cell's.
        error: Why it failed, or empty.
        done: Cells that have ended, failed ones counted.
        total: Cells in all.
        seconds: Since the cell began.
    """

    name: str
    error: str
    done: int
    total: int
    seconds: float


def run_in_worker(task: Task, app: App, told: WorkerSettings[Task]) -> None:
    """What a worker does with a cell."""
    run_cell(task, app, folder=told.folder, keep_run=told.keep_runs)


class Comparison:
    """A comparison and its folder. It has one writer at a time, until :meth:`close` or the end of the process.

    Args:
        plan: What is compared.
        folder: A new or empty one, or that of a comparison with the same plan, which then goes on.
        app: Folder of the Flower app.

    Attributes:
        settled: Results by cell, None for a cell that failed.
        num_found: Cells that were finished before.
        num_outdated: Cells that were finished before by other code, with another config, or with other contents of a
            file or folder that it names, and are run again: they do not belong into one table with the others. Their
            files stay until they are replaced.
        damaged: Files of cells that cannot be read; these cells are run again.

    Raises:
        ConfigError: The folder holds another comparison (says which keys differ), there is no such app, or a file
            that the run config names cannot be read.
        RunError: The folder holds something else, another process writes to it, or it cannot be written.
    """

    def __init__(self, plan: Plan, folder: Path, *, app: Path) -> None:
        self.plan, self.folder, self._app = plan, folder.absolute(), app.absolute()
        self._code_hash = app_hash(self._app)
        self._digest_of = functools.cache(digest_of_path)  # as the files are now, for all cells
        for cell in plan.cells({}):
            self._inputs(cell)
        grid = self.folder / "grid.json"
        refuse_other_plan(plan.to_json(), grid, what="comparison")
        self._lock = lock(self.folder, what="comparison")
        write_json(grid, plan.to_json())
        shutil.rmtree(self.folder / "work", ignore_errors=True)
        for unfinished in self.folder.glob(".*.json.*"):  # what a process was writing when it was killed
            unfinished.unlink(missing_ok=True)
        self.settled: dict[str, Result | None] = {}
        self.num_outdated = 0
        self.damaged: list[Path] = []
        self._open: list[Cell] = []
        self._known: set[str] = set()
        self._look_for_cells()
        self.num_found = len(self.settled)

    def close(self) -> None:
        """Let others write to the folder."""
        os.close(self._lock)

    def run(
        self,
        *,
        jobs: int,
        keep_runs: bool = False,
        apart: bool = False,
        on_begin: Callable[[str], None] | None = None,
        on_cell: Callable[[Progress], None] | None = None,
    ) -> None:
        """Run what is missing.

        A cell that fails leaves a file in ``errors/``; the others go on.

        Args:
            jobs: Worker processes at most.
            keep_runs: Whether run folders are kept.
            apart: Whether one cell of each kind measures a device's memory in a process of its own, and how fast its
                models write. What a cell computes is the same.
            on_begin: Called with the name of a cell that begins.
            on_cell: Called whenever a cell has ended.
        """
        told = WorkerSettings(run=run_in_worker, folder=self.folder, app=self._app, keep_runs=keep_runs)

        def take() -> Task | None:
            if not self._open:
                return None
            task = self._task(self._open.pop(0), apart=apart)
            if on_begin is not None:
                on_begin(task.name)
            return task

        def ended(task: Task, said: str, seconds: float) -> None:
            error = self._settle(task.cell, said)
            if on_cell is not None:
                on_cell(self._progress(task.cell, error, seconds))

        try:
            run_all(told, jobs=jobs, take=take, ended=ended)
        finally:
            shutil.rmtree(self.folder / "work", ignore_errors=True)

    def _task(self, cell: Cell, *, apart: bool) -> Task:
        # With the last seed: cells of the first may be of learning rates that are not chosen.
        is_last = cell.seed == self.plan.seeds_of(cell.world, cell.kind)[-1] and not cell.changes
        return Task(
            cell=cell,
            run_config=self.plan.run_config(cell),
            num_devices=self.plan.devices_of(cell),
            inputs=self._inputs(cell),
            apart=apart and is_last,
        )

    def _inputs(self, cell: Cell) -> dict[str, str]:
        return input_digests(self.plan.run_config(cell), self._digest_of)

    def _progress(self, cell: Cell, error: str, seconds: float) -> Progress:
        total = self.plan.num_cells
        return Progress(name=cell.name, error=error, done=len(self.settled), total=total, seconds=seconds)

    def errors(self) -> dict[str, str]:
        """What went wrong, by cell; also of the kinds for which no learning rate is left."""
        failed = {name: self._error_path(name) for name, result in self.settled.items() if result is None}
        found = {name: str(read_json(path)["error"]) for name, path in failed.items()}
        for world in self.plan.worlds:
            for kind in self.plan.kinds_of(world):
                candidates = self.plan.candidates(world, KINDS[kind].rate_of or kind)
                if len(candidates) < 2 or any(cell.name not in self.settled for cell in candidates):
                    continue
                if not self.plan.chosen(world, kind, self.settled):
                    found[f"{world}, {kind}"] = "no learning rate could be chosen, so the other seeds were not run"
        return found

    def _settle(self, cell: Cell, error: str) -> str:
        """Take up how a cell ended; the error that counts."""
        result = None if error else self._finished(cell)
        if result is None and not error:
            error = "the app's code was changed while the comparison ran; start it again"
        self.settled[cell.name] = result
        path = self._error_path(cell.name)
        if error:
            log = str(self.folder / "logs" / f"{cell.name}.log")
            write_json(path, {"name": cell.name, "error": error, "log": log})
        else:
            path.unlink(missing_ok=True)
        self._look_for_cells()
        return error

    def _look_for_cells(self) -> None:
        """Settle cells that are finished, queue the others; either may let new cells begin."""
        while new := [cell for cell in self.plan.cells(self.settled) if cell.name not in self._known]:
            for cell in new:
                self._known.add(cell.name)
                result = self._finished(cell)
                if result is None:
                    path = result_path(self.folder, cell)
                    self.num_outdated += path.exists() and path not in self.damaged
                    self._open.append(cell)
                else:
                    self.settled[cell.name] = result
        order = {name: place for place, name in enumerate(cell.name for cell in self.plan.cells(self.settled))}
        self._open.sort(key=lambda cell: order[cell.name])  # the long ones first, or workers idle at the end

    def _finished(self, cell: Cell) -> Result | None:
        """The cell's result, if it is there and was made with this config, these files and this code."""
        path = result_path(self.folder, cell)
        if not path.exists():
            return None
        try:
            result: Result = read_json(path)
        except RunError:
            result = {}
        if not _is_whole(result):
            self.damaged.append(path)
            return None
        now = {"run_config": self.plan.run_config(cell), "inputs": self._inputs(cell), "code_hash": self._code_hash}
        is_same = all(result.get(name) == value for name, value in now.items())
        return result if is_same else None

    def _error_path(self, name: str) -> Path:
        return self.folder / "errors" / f"{name}.json"

    def summary(self, *, title: str, command: str) -> dict[str, Any]:
        """What ``summary.json`` holds, also before all cells have ended; see :func:`summarise`.

        Args:
            title: Of a report.
            command: The command that made the comparison.
        """
        head = {"title": title, "command": command, "code_hash": self._code_hash}
        cells = {"done": sum(result is not None for result in self.settled.values()), "all": self.plan.num_cells}
        return {**head, "cells": cells, **summarise(self.plan, self.settled), "errors": self.errors()}

    def tuning(self, *, command: str) -> dict[str, Any]:
        """What ``tuning.json`` holds; see :func:`tuning_of`."""
        return tuning_of(self.plan, self.settled, command=command, code_hash=self._code_hash)


def _is_whole(result: Any) -> bool:
    """Whether a cell's file holds what a summary needs of it."""
    tables = ("rows", "validation_rows", "costs")
    if not isinstance(result, dict) or not all(isinstance(result.get(table), dict) for table in tables):
        return False
    rows = [*result["rows"].values(), *result["validation_rows"].values()]
    return (
        bool(result["rows"])
        and isinstance(result.get("seconds"), int | float)
        and all(isinstance(row, dict) for row in rows)
    )


def refuse_other_plan(plan: Mapping[str, Any], path: Path, *, what: str) -> None:
    """Make sure that a folder is new, empty, or of the same plan.

    Args:
        plan: As JSON.
        path: Of the file in the folder that holds its plan.
        what: What the folder is of, such as ``comparison``.

    Raises:
        ConfigError: It is of another plan; says which settings differ.
        RunError: It holds something else.
    """
    folder = path.parent
    if not path.exists():
        if folder.exists() and (not folder.is_dir() or any(entry.name != ".lock" for entry in folder.iterdir())):
            raise RunError(f"must be a new folder or that of {_a(what)}", place=str(folder))
        return
    try:
        was, now = _flat(read_json(path)), _flat(dict(plan))
    except RunError as error:
        error.remedy = f"give another --out: what this {what} was about is no longer known"
        raise
    differing = sorted(key for key in was.keys() | now.keys() if was.get(key) != now.get(key))
    if differing:
        shown = [f"{key} (was {was.get(key, 'absent')!r}, is {now.get(key, 'absent')!r})" for key in differing]
        raise ConfigError(
            f"holds another {what}; {len(differing)} of its settings differ",
            place=str(folder),
            remedy="give another --out, or the settings that it has",
            problems=shown,
        )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested objects as one, with dotted keys."""
    if not isinstance(value, dict):
        return {prefix.removesuffix("."): value}
    parts = (_flat(part, f"{prefix}{key}.") for key, part in value.items())
    return {key: part for found in parts for key, part in found.items()}


def _a(what: str) -> str:
    return f"an {what}" if what[:1] in "aeiou" else f"a {what}"


def lock(folder: Path, *, what: str) -> int:
    """Keep other processes out of a folder, which is made; until the file handle that is given is closed.

    Raises:
        RunError: Another process has it, or it cannot be written.
    """
    with naming(str(folder)):
        try:
            handle = os.open(made(folder) / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise RunError(f"cannot be written ({error.strerror})", remedy="give another --out") from error
        if fcntl is not None:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(handle)
                raise RunError(f"another process works on this {what}", remedy="wait until it has ended") from None
            except OSError:  # some network file systems have no locks; a comparison there is better than none
                pass
    return handle


def new_folder(what: str = "comparisons") -> Path:
    """Where a comparison, or something like it, lies that is given no folder."""
    now = datetime.datetime.now(datetime.UTC)
    return runs_root().parent / what / f"{now:%Y%m%dT%H%M%SZ}"


def default_jobs(configs: Iterable[Mapping[str, Scalar]]) -> int:
    """As many workers as there is memory for, and as their threads leave room for on the CPUs that may be used."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = [flat.get(f"threads.{part}", 1) for flat in configs for part in ("device", "server")]
    workers = cpus // max(int(number) for number in threads)
    free = _free_memory_bytes()
    return max(1, workers if free is None else min(workers, free // _WORKER_BYTES))


def _free_memory_bytes() -> int | None:
    """Memory that new processes may take; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)
