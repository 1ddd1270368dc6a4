"""Progress: bars on a terminal, lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

from fedpt_flwr.cli.console import ERR, note

_LINE_EVERY_S = 30.0  # of a training, where there is no terminal


@contextmanager
def stage_progress() -> Iterator[Any]:
    """A callback ``(what, done, total)``: a bar on a terminal, a line when something begins elsewhere."""
    if ERR.is_terminal:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=ERR, transient=True) as bars:
            tasks: dict[str, Any] = {}

            def show(what: str, done: int, total: int) -> None:
                if what not in tasks:
                    tasks[what] = bars.add_task(what, total=total)
                bars.update(tasks[what], completed=done, total=total)

            yield show
        return
    begun: set[str] = set()

    def say(what: str, done: int, total: int) -> None:  # noqa: ARG001
        if what not in begun:
            begun.add(what)
            note(f"{what} ({total})")

    yield say


@contextmanager
def training_progress() -> Iterator[Any]:
    """A callback ``(what, done, total, loss)``: a bar on a terminal, a line every so often elsewhere."""
    if ERR.is_terminal:
        counts = TextColumn("{task.completed:,.0f}/{task.total:,.0f}{task.fields[loss]}")
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            counts,
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=ERR) as bars:
            tasks: dict[str, Any] = {}

            def draw(what: str, done: int, total: int, loss: float | None) -> None:
                said = "" if loss is None else f", loss {loss:.3f}"
                if what not in tasks:
                    tasks[what] = bars.add_task(what, total=total, loss=said)
                bars.update(tasks[what], completed=done, loss=said)

            yield draw
        return
    begun: dict[str, tuple[float, int]] = {}
    said: dict[str, float] = {}

    def say(what: str, done: int, total: int, loss: float | None) -> None:
        now = time.monotonic()
        start, before = begun.setdefault(what, (now, done))
        if done < total and now - said.get(what, -_LINE_EVERY_S) < _LINE_EVERY_S:
            return
        said[what] = now
        rest = f", loss {loss:.3f}" if loss is not None else ""
        if before < done < total:
            rest += f", {(now - start) / (done - before) * (total - done) / 60:.0f} min left"
        note(f"{what}: {done:,}/{total:,}{rest}")

    yield say


@contextmanager
def cell_progress(done: int, total: int) -> Iterator[tuple[Callable[[str], None], Callable[[Any], None]]]:
    """Two callbacks, for a cell that begins, by its name, and for one that has ended.

    On a terminal there is a bar, with what runs now, and a line above it for each failure; elsewhere there are lines.
    """

    def say(cell: Any) -> None:
        outcome = f"failed: {cell.error.splitlines()[0]}" if cell.error else f"{cell.seconds:.0f} s"
        note(f"[{cell.done}/{cell.total}] {cell.name}: {outcome}")

    if not ERR.is_terminal:
        yield lambda name: note(f"{name} begins"), say
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[running]}", markup=False, table_column=Column(overflow="fold")),
    )
    with Progress(*columns, console=ERR) as bars:
        task = bars.add_task("federations", completed=done, total=total, running="")
        running: dict[str, None] = {}

        def begin(name: str) -> None:
            running[name] = None
            bars.update(task, running="\n".join(running), refresh=True)

        def end(cell: Any) -> None:
            running.pop(cell.name, None)
            bars.update(task, running="\n".join(running), completed=cell.done)
            if cell.error:
                say(cell)

        yield begin, end
