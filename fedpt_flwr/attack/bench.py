"""The whole bench: its folder, which federations are missing, and what became of them."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedpt_flwr.attack.federation import Task, result_path, run_in_worker
from fedpt_flwr.attack.plan import Federation, Plan
from fedpt_flwr.attack.pool import make_pool
from fedpt_flwr.attack.summary import ATTACK, Result, summarise
from fedpt_flwr.compare.cell import app_hash
from fedpt_flwr.compare.comparison import Progress, lock, refuse_other_plan
from fedpt_flwr.compare.inputs import digest_of_path, input_digests
from fedpt_flwr.compare.workers import WorkerSettings, run_all
from fedpt_flwr.config import parse_run_config
from fedpt_flwr.errors import RunError
from fedpt_flwr.runs import read_json, write_json

PLAN = "attack-plan.json"


class Bench:
    """An attack and its folder. It has one writer at a time, until :meth:`close` or the end of the process.

    A finished federation is one file in ``cells/``, whole or not there, so an attack that was ended in whatever way
    goes on where it was.

    Args:
        plan: What is attacked.
        folder: A new or empty one, or that of an attack with the same plan, which then goes on.
        app: Folder of the Flower app.

    Attributes:
        done: Results by name.
        failed: Why federations failed, by name.
        num_found: Federations that were finished before.
        num_outdated: Those that were finished by other code, with another config or of other files, and are run again.

    Raises:
        ConfigError: The folder holds another attack, the data cannot be attacked, or there is no such app.
        DataError: The data cannot be read or dealt out.
        RunError: The folder holds something else, another process writes to it, or it cannot be written.
    """

    def __init__(self, plan: Plan, folder: Path, *, app: Path) -> None:
        self.plan, self.folder, self._app = plan, folder.absolute(), app.absolute()
        self._code_hash = app_hash(self._app)
        self.federations = plan.federations()
        self._digest_of = functools.cache(digest_of_path)  # as the files are now, for all federations
        # What is wrong with the data is said before a folder is made; settings may change what it is.
        self._digests = {
            data: make_pool(data, num_devices=plan.num_devices, seed=plan.seeds[0]).digest
            for data in {parse_run_config(plan.told(part)).data for part in self.federations}
        }
        refuse_other_plan(plan.to_json(), self.folder / PLAN, what="attack")
        self._lock = lock(self.folder, what="attack")
        write_json(self.folder / PLAN, plan.to_json())
        shutil.rmtree(self.folder / "work", ignore_errors=True)
        self.done: dict[str, Result] = {}
        self.failed: dict[str, str] = {}
        self.num_outdated = 0
        self._open: list[Federation] = []
        for federation in self.federations:
            result = self._finished(federation)
            if result is None:
                self.num_outdated += result_path(self.folder, federation).exists()
                self._open.append(federation)
            else:
                self.done[federation.name] = result
        self.num_found = len(self.done)

    def close(self) -> None:
        """Let others write to the folder."""
        os.close(self._lock)

    def run(self, *, jobs: int, on_cell: Callable[[Progress], None] | None = None) -> None:
        """Run what is missing; a federation that fails is noted, and the others go on.

        Args:
            jobs: Worker processes at most.
            on_cell: Called whenever a federation has ended.
        """
        told = WorkerSettings(run=run_in_worker, folder=self.folder, app=self._app)

        def take() -> Task | None:
            return self._task(self._open.pop(0)) if self._open else None

        def ended(task: Task, said: str, seconds: float) -> None:
            result = None if said else self._finished(task.federation)
            if result is not None:
                self.done[task.name] = result
            else:
                said = said or "the app's code was changed while the attack ran; start it again"
                self.failed[task.name] = f"{said} (see {self.folder / 'logs' / f'{task.name}.log'})"
            if on_cell is not None:
                done, total = len(self.done) + len(self.failed), len(self.federations)
                on_cell(Progress(name=task.name, error=said, done=done, total=total, seconds=seconds))

        try:
            run_all(told, jobs=jobs, take=take, ended=ended)
        finally:
            shutil.rmtree(self.folder / "work", ignore_errors=True)

    def _task(self, federation: Federation) -> Task:
        return Task(federation=federation, plan=self.plan, inputs=self._inputs(federation))

    def _inputs(self, federation: Federation) -> dict[str, str]:
        return input_digests(self.plan.told(federation), self._digest_of)

    def write_summary(self, *, command: str) -> dict[str, Any]:
        """Write ``attack.json``, also before all federations have ended.

        Args:
            command: The command that made the attack.

        Returns:
            What was written.
        """
        cells = {"done": len(self.done), "all": len(self.federations)}
        head = {"title": "What an attacker learns", "command": command, "code_hash": self._code_hash, "cells": cells}
        summary = head | summarise(self.plan, self.done) | {"errors": self.failed}
        write_json(self.folder / ATTACK, summary)
        return summary

    def _finished(self, federation: Federation) -> Result | None:
        """The federation's result, if it is there, whole, and of this config, these files, records and this code."""
        path = result_path(self.folder, federation)
        if not path.exists():
            return None
        try:
            result: Result = read_json(path)
        except RunError:
            return None
        if not isinstance(result, dict) or not all(isinstance(result.get(part), dict) for part in ("nats", "pool")):
            return None
        is_same = (
            result.get("run_config") == self.plan.recorded(federation)
            and result.get("inputs") == self._inputs(federation)
            and result.get("code_hash") == self._code_hash
            and result["pool"].get("digest") == self._digests[parse_run_config(self.plan.told(federation)).data]
        )
        return result if is_same else None
