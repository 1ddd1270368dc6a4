"""One cell: a federation in this process with the app's real code, its scores, and its JSON file."""

from __future__ import annotations

import importlib
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedpt_flwr.compare.plan import FEDPT, Cell, Result
from fedpt_flwr.config import RunConfig, Scalar, parse_run_config, settings
from fedpt_flwr.errors import ConfigError
from fedpt_flwr.evaluation import Evaluator
from fedpt_flwr.grid import run_locally
from fedpt_flwr.models import cpu_threads, load_tokenizer
from fedpt_flwr.proxy import ProxyModel
from fedpt_flwr.records import code_hash
from fedpt_flwr.runs import find_run, read_json, write_json
from fedpt_flwr.scoring import make_row
from fedpt_flwr.sources import held_out_items

_VALIDATED = ("large", "tuned", "proxy")  # not untuned, which the mode `paired` changes
_APP_FILES = ("client_app.py", "server_app.py")


@dataclass(frozen=True, slots=True, kw_only=True)
class App:
    """The Flower app: its ServerApp and ClientApp, and the hash of all the code that makes a result."""

    server: Any
    client: Any
    code_hash: str


def app_hash(folder: Path) -> str:
    """Hash of the package and of both apps: what a result depends on besides its config.

    Args:
        folder: Of the app.

    Raises:
        ConfigError: There is no such app.
    """
    try:
        return code_hash(*(folder / name for name in _APP_FILES))
    except OSError as error:
        raise ConfigError(
            f"cannot be read ({error.strerror})", place=str(error.filename), remedy="name the app's folder with --app"
        ) from error


def load_app(folder: Path) -> App:
    """Import the app of a folder into this process, for good.

    Raises:
        ConfigError: There is no such app, or this process has imported another one.
    """
    found = app_hash(folder)  # before the import: code that is edited in between is then noticed, not missed
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    modules = [importlib.import_module(Path(name).stem) for name in _APP_FILES]
    for module in modules:
        if Path(str(module.__file__)).resolve().parent != folder.resolve():
            raise ConfigError("another module of this name was imported", value=module.__file__, place=str(folder))
    client, server = modules
    return App(server=server.app, client=client.app, code_hash=found)


def run_cell(
    cell: Cell, run_config: Mapping[str, Scalar], app: App, *, num_devices: int, folder: Path, keep_run: bool
) -> Result:
    """Run one cell's federation, score its validation items, and write its result.

    Args:
        cell: What it is.
        run_config: What its run is told.
        app: The Flower app.
        num_devices: Devices.
        folder: Of the comparison.
        keep_run: Whether its run folder is kept.

    Returns:
        What was written.

    Raises:
        FedPTError: The run failed, and says why.
    """
    started = time.perf_counter()
    config = parse_run_config(run_config)
    with (
        tempfile.TemporaryDirectory(dir=made(folder / "work"), prefix=f"{cell.name}.") as scratch,
        cpu_threads(config.threads.server),
    ):
        told = {key: setting.default for key, setting in settings().items()} | dict(run_config)
        run_locally(app.server, app.client, told | {"output-dir": scratch}, num_devices=num_devices)
        run = find_run(root=Path(scratch))
        results, validation = read_json(run / "results.json"), _validation_rows(cell, config, run)
        found = read_json(run / "config.json")
        result = {
            "name": cell.name,
            **asdict(cell),
            "code_hash": app.code_hash,
            "seconds": round(time.perf_counter() - started, 2),
            **_own_results(cell, results),
            "validation_rows": validation,
            **{key: found[key] for key in ("fingerprints", "data_hashes", "versions") if key in found},
            "run_config": dict(run_config),
        }
        if keep_run:
            kept = made(folder / "runs") / cell.name
            shutil.rmtree(kept, ignore_errors=True)
            run.rename(kept)
    write_json(result_path(folder, cell), result)  # last: it is what makes the cell finished
    return result


def _own_results(cell: Cell, results: Mapping[str, Any]) -> dict[str, Any]:
    """What a run wrote, in the terms of the comparison: the model that a direct kind tunes is not the small one."""
    if cell.kind == FEDPT:
        return dict(results)
    kept = {key: value for key, value in results.items() if key in ("rounds", "devices", "costs")}
    return {"rows": {cell.kind: results["rows"]["tuned"]}, **kept}


def _validation_rows(cell: Cell, config: RunConfig, run: Path) -> dict[str, Any]:
    """The rows on all validation items, of the model as it is at the run's end."""
    proxy = ProxyModel.from_pretrained(run)
    tokenizer = load_tokenizer(str((run / "proxy").resolve()))
    items = held_out_items(config.data, "validation", seed=config.seed)
    evaluator = Evaluator(items, tokenizer, config, proxy, place="data.validation")
    if cell.kind == FEDPT:
        rows = dict(evaluator.score(proxy, rows=_VALIDATED).rows)
    else:
        measurement = evaluator.measure(proxy.tuned)
        rows = {cell.kind: make_row(measurement, n=len(items.examples), seed=config.seed)}
    return {name: row.to_json() for name, row in rows.items()}


def result_path(folder: Path, cell: Cell) -> Path:
    """Where a cell's result lies once it is finished."""
    return folder / "cells" / f"{cell.name}.json"


def made(folder: Path) -> Path:
    """A folder, after making it."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder
