"""Processes that run federations, and that end with the process that started them, however that ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import connection as connections
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from fedpt_flwr.compare.cell import App, load_app, made
from fedpt_flwr.errors import FedPTError


class Named(Protocol):
    """Whatever a worker can be asked to do; it travels to another process."""

    @property
    def name(self) -> str:
        """Fit for files: that of its log."""


Work = TypeVar("Work", bound=Named)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings(Generic[Work]):
    """What all workers are told.

    Attributes:
        run: A function of a module, which does one task and writes what came of it: ``(task, app, settings)``.
        folder: Where that is written, and the logs.
        app: Folder of the Flower app.
        keep_runs: Whether run folders are kept.
    """

    run: Callable[[Work, App, WorkerSettings[Work]], object]
    folder: Path
    app: Path
    keep_runs: bool = False


def run_all(
    told: WorkerSettings[Work],
    *,
    jobs: int,
    take: Callable[[], Work | None],
    ended: Callable[[Work, str, float], None],
) -> None:
    """Let workers do task after task until there are none left and all have ended.

    Args:
        told: What the workers are told.
        jobs: How many there are at most.
        take: Gives the next task, or None if there is none now: a task that ends may let others begin.
        ended: Called with a task that has ended, what went wrong, or an empty text, and the seconds that it took.
    """
    idle: list[Worker[Work]] = []
    busy: dict[Any, tuple[Worker[Work], Work, float]] = {}
    try:
        while True:
            while len(busy) < jobs and (task := take()) is not None:
                worker = idle.pop() if idle else Worker(told)
                busy[worker.connection] = worker, task, time.perf_counter()
                worker.begin(task)
            if not busy:
                return
            for ready in connections.wait(list(busy)):
                worker, task, begun = busy.pop(ready)
                said, is_alive = worker.outcome()
                idle += [worker] if is_alive else []
                ended(task, said, time.perf_counter() - begun)
    finally:
        for worker in [*idle, *(worker for worker, _, _ in busy.values())]:
            worker.end()


class Worker(Generic[Work]):
    """A process that does one task after the other; importing Flower and torch takes it some seconds, once."""

    def __init__(self, told: WorkerSettings[Work]) -> None:
        # Not forked: torch's threads and locks do not survive that.
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, told), daemon=True)
        with _without_interrupts():
            self._process.start()
        theirs.close()  # so that the end of the process is the end of the connection

    def begin(self, task: Work) -> None:
        """Start a task; ``connection`` can be read when it has ended."""
        with suppress(OSError):  # where the process is gone, outcome() says so
            self.connection.send(task)

    def outcome(self) -> tuple[str, bool]:
        """What went wrong, or an empty text, and whether the process is still there."""
        try:
            return str(self.connection.recv()), True
        except (EOFError, OSError):
            self._process.join()
            return f"the worker process ended {_cause(self._process.exitcode or 0)}", False

    def end(self) -> None:
        """End the process, whatever it is doing: what it has not finished is done again by the next one."""
        self.connection.close()
        self._process.kill()
        self._process.join()


def _cause(code: int) -> str:
    """How a process ended, by its exit code as multiprocessing gives it."""
    if code == -signal.SIGKILL:
        return "by SIGKILL; is there enough memory for so many jobs?"
    return f"by {signal.Signals(-code).name}" if code < 0 else f"with status {code}"


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Let processes that are started here never hear of Ctrl-C, which reaches all at a terminal: the parent decides."""
    if threading.current_thread() is not threading.main_thread():  # others cannot set this
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _work(connection: Connection, told: WorkerSettings[Any]) -> None:
    """The body of a worker: receives tasks, answers with what went wrong."""
    _end_with_parent()
    app: App | None = None
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        said = ""
        try:
            _write_output_to(made(told.folder / "logs") / f"{task.name}.log")
            app = app or load_app(told.app)
            told.run(task, app, told)
        except Exception as error:
            traceback.print_exc()
            said = str(error) if isinstance(error, FedPTError) else f"{type(error).__name__}: {error}"
        connection.send(said)


def _end_with_parent() -> None:
    """End this process as soon as its parent has ended, in whatever way: kill -9 tells nobody."""
    parent = multiprocessing.parent_process()
    if parent is None:  # a worker always has one
        return

    def watch(sentinel: int) -> None:
        connections.wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, args=(parent.sentinel,), daemon=True).start()


def _write_output_to(path: Path) -> None:
    """Send everything that this process and its libraries write from now on to a file, which begins anew."""
    sys.stdout.flush()
    sys.stderr.flush()
    with path.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
