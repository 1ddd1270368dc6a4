"""A run, a comparison of runs, or an attack, on one page: ``report.html``, and its plots as PNG files.

Of a comparison all tables are written too, as CSV and LaTeX under ``tables/``.

The page needs nothing but itself: plots are SVG inside it, it has no script, and it forbids the browser to load
anything. All texts of a run (prompts, answers, config values, names of groups) are untrusted and are escaped.

A folder's files are read leniently. A run that was killed leaves a line cut short, an older one lacks files, one that
is still running has no results yet: what is not there is left out, with a sentence in its place. Nothing here knows
models, data sources or Flower.

    reading      files and values as far as they are what they should be
    wording      numbers as a person reads them
    plots        points, curves and bars
    page         what a page is made of, and its HTML
    run          the sections of a run
    comparison   the sections of a comparison
    attack       the sections of an attack
    tables       tables as CSV and LaTeX
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from fedpt_flwr.errors import RunError
from fedpt_flwr.paths import expanded
from fedpt_flwr.report.attack import ATTACK, attack_page
from fedpt_flwr.report.comparison import SUMMARY, comparison_page
from fedpt_flwr.report.page import render
from fedpt_flwr.report.run import run_page
from fedpt_flwr.report.tables import as_csv, as_latex, tables_of
from fedpt_flwr.runs import find_run, write_file

PAGE, GRID, TABLES = "report.html", "grid.json", "tables"


def find_folder(name: str) -> Path:
    """The folder of a comparison or an attack, if ``name`` is the path of one, or of a run.

    A run is found as by :func:`~fedpt_flwr.runs.find_run`.

    Raises:
        RunError: There is neither.
    """
    path = expanded(name)
    with suppress(OSError):  # a name that the system refuses, as one too long
        if name and any((path / file).is_file() for file in (SUMMARY, GRID, ATTACK)):
            return path.resolve()
    return find_run(name)


def make_report(folder: Path, out: Path | None = None) -> Path:
    """Write the page and its plots.

    Args:
        folder: Of a run, of a comparison (it holds ``summary.json``), or of an attack (it holds ``attack.json``).
        out: Folder for the files, made if it is not there; None: ``folder``.

    Returns:
        The path of the page.

    Raises:
        RunError: The folder holds none of them, its run has no complete round, or a file cannot be written.
    """
    if (folder / GRID).is_file() and not (folder / SUMMARY).is_file():
        raise RunError(
            f"this comparison has no {SUMMARY} yet",
            place=str(folder),
            remedy=f"the command that began it writes it: `fedpt compare … --out {folder}` goes on",
        )
    if out is not None and out.exists() and not out.is_dir():
        raise RunError("must be a folder, and is a file", value=str(out), place="--out", remedy="name a folder")
    is_comparison = (folder / SUMMARY).is_file()
    is_attack = not is_comparison and (folder / ATTACK).is_file()
    page = (comparison_page if is_comparison else attack_page if is_attack else run_page)(folder)
    html = render(page).encode("utf-8", "replace")  # JSON may hold half a surrogate pair
    out = out or folder
    try:
        for plot in page.plots():
            write_file(out / f"{plot.name}.png", plot.png())
        for name, tables in tables_of(page).items() if is_comparison or is_attack else ():
            write_file(out / TABLES / f"{name}.csv", as_csv(tables).encode("utf-8", "replace"))
            write_file(out / TABLES / f"{name}.tex", as_latex(tables).encode("utf-8", "replace"))
        write_file(out / PAGE, html)
    except RunError as error:
        error.remedy = "free some space, or give a folder that can be written with --out"
        raise
    return out / PAGE
