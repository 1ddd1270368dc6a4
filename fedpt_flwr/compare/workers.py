"""Processes that run cells, and that end with the process that started them, however that ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import connection as connections
from multiprocessing.connection import Connection
from pathlib import Path

from fedpt_flwr.compare.cell import App, Task, load_app, made, run_cell
from fedpt_flwr.errors import FedPTError


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """What all workers of a comparison are told.

    Attributes:
        folder: Of the comparison.
        app: Folder of the Flower app.
        keep_runs: Whether run folders are kept.
    """

    folder: Path
    app: Path
    keep_runs: bool


class Worker:
    """A process that runs one cell after the other; importing Flower and torch takes it some seconds, once."""

    def __init__(self, told: WorkerSettings) -> None:
        # Not forked: torch's threads and locks do not survive that.
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, told), daemon=True)
        with _without_interrupts():
            self._process.start()
        theirs.close()  # so that the end of the process is the end of the connection

    def begin(self, task: Task) -> None:
        """Start to run a cell; ``connection`` can be read when it has ended."""
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


def _work(connection: Connection, told: WorkerSettings) -> None:
    """The body of a worker: receives cells, answers with what went wrong."""
    _end_with_parent()
    app: App | None = None
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        said = ""
        try:
            _write_output_to(made(told.folder / "logs") / f"{task.cell.name}.log")
            app = app or load_app(told.app)
            run_cell(task, app, folder=told.folder, keep_run=told.keep_runs)
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
