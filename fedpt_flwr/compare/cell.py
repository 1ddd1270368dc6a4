"""One cell: a federation in this process with the app's real code, its scores, and its JSON file."""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from fedpt_flwr.compare.footprint import first_task_apart
from fedpt_flwr.compare.kinds import ALONE, KINDS, POOLED, Kind
from fedpt_flwr.compare.plan import Cell, Result
from fedpt_flwr.compare.statistics import ITEM_MEASURES, merged_bins
from fedpt_flwr.config import RunConfig, Scalar, parse_run_config, settings
from fedpt_flwr.errors import ConfigError
from fedpt_flwr.evaluation import Evaluator
from fedpt_flwr.grid import run_locally
from fedpt_flwr.models import cpu_threads, load_tokenizer
from fedpt_flwr.proxy import ProxyModel
from fedpt_flwr.records import code_hash
from fedpt_flwr.remote import remote_large
from fedpt_flwr.runs import RunFolder, find_run, read_json, write_json
from fedpt_flwr.sources import device_shard, held_out_items, needs_tokenizer
from fedpt_flwr.training import count_flops

_CALIBRATION_BINS = 10
_KEPT_EXAMPLES = 8
_TIMED_ITEMS = 6
_APP_FILES = ("client_app.py", "server_app.py")
_LARGEST_OF = ("device_state_bytes", "device_peak_memory_bytes", "device_memory_growth_bytes")
_SCORED_AGAIN = ("large", "untuned", "tuned", "proxy")  # rows that the validation items are scored for


@dataclass(frozen=True, slots=True, kw_only=True)
class App:
    """The Flower app: its ServerApp and ClientApp, where it lies, and the hash of all the code that makes a result."""

    server: Any
    client: Any
    folder: Path
    code_hash: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a worker is asked to do.

    Attributes:
        cell: The cell.
        run_config: What its run is told.
        num_devices: Devices that the training data is dealt out to.
        inputs: Digests of the files that the run reads, see :func:`input_digests`.
        apart: Whether to measure what it would take a device alone, and how fast the models write.
    """

    cell: Cell
    run_config: Mapping[str, Scalar]
    num_devices: int
    inputs: Mapping[str, str]
    apart: bool = False

    @property
    def name(self) -> str:
        """The cell's."""
        return self.cell.name


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
    return App(server=server.app, client=client.app, folder=folder, code_hash=found)


def run_cell(task: Task, app: App, *, folder: Path, keep_run: bool) -> Result:
    """Run one cell's federation, score its validation items, and write its result.

    Args:
        task: What it is.
        app: The Flower app.
        folder: Of the comparison.
        keep_run: Whether its run folder is kept.

    Returns:
        What was written.

    Raises:
        FedPTError: The run failed, and says why.
    """
    started, begun = time.perf_counter(), _processor_seconds()
    cell, kind, config = task.cell, KINDS[task.cell.kind], parse_run_config(task.run_config)
    told = {key: setting.default for key, setting in settings().items()} | dict(task.run_config)
    num_devices = 1 if kind.who == POOLED else task.num_devices
    alone = _with_examples(config, num_devices) if kind.who == ALONE else [None]
    handle = first_task_apart(app.client, app.folder) if task.apart and kind.is_tuned else app.client
    parts: list[Result] = []
    with (
        tempfile.TemporaryDirectory(dir=made(folder / "work"), prefix=f"{cell.name}.") as scratch,
        cpu_threads(config.threads.server),
    ):
        for device in alone:
            root = Path(scratch) / ("all" if device is None else str(device))
            run_locally(
                app.server, handle, told | {"output-dir": str(root)}, num_devices=num_devices, only_device=device
            )
            run = find_run(root=root)
            parts.append(_read_run(kind, config, run, is_timed=task.apart and not parts))
        result = {
            "name": cell.name,
            **asdict(cell),
            "changes": dict(cell.changes),
            "code_hash": app.code_hash,
            "seconds": round(time.perf_counter() - started, 2),
            "processor_seconds": round(_processor_seconds() - begun, 2),
            **(parts[0] if kind.who != ALONE else _mean_of(parts)),
            "run_config": dict(task.run_config),
            "inputs": dict(task.inputs),
        }
        if keep_run:
            kept = made(folder / "runs") / cell.name
            shutil.rmtree(kept, ignore_errors=True)
            run.rename(kept)
    write_json(result_path(folder, cell), result)  # last: it is what makes the cell finished
    return result


def _processor_seconds() -> float:
    """Of this process and those that it waited for: unlike seconds, the same on a machine that others use too."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def _with_examples(config: RunConfig, num_devices: int) -> list[int | None]:
    """The devices that have anything to train on."""
    tokenizer = load_tokenizer(config.model.small) if needs_tokenizer(config.data) else None
    return [
        device
        for device in range(num_devices)
        if device_shard(config.data, device=device, num_devices=num_devices, seed=config.seed, tokenizer=tokenizer)
    ]


# --- what a run left ---


def _read_run(kind: Kind, config: RunConfig, run: Path, *, is_timed: bool) -> Result:
    """What a run wrote, in the terms of the comparison."""
    folder = RunFolder(run)
    results, found = read_json(run / "results.json"), read_json(run / "config.json")
    lines = {name: folder.read_lines(f"{name}.jsonl") for name in ("metrics", "costs", "answers")}
    names = {own: row for own, row in kind.rows.items() if own in results["rows"]}
    keys = ["rounds", "devices", "costs", "privacy"]
    if "proxy" in names:
        keys += ["alpha", "plausibility", "shift", *(key for key in results if key.startswith("proxy_minus_"))]
    return {
        "rows": {row: results["rows"][own] for own, row in names.items()},
        **{key: results[key] for key in keys if key in results},
        **_scored_again(kind, config, run, is_timed=is_timed),
        "trained_parameters": _num_trained(run) if kind.is_tuned else 0,
        "curve": _curve(kind, lines["metrics"], lines["costs"]),
        "device_alone": _device_alone(lines["costs"]),
        "shards": read_json(run / "shards.json"),
        "items": _items(kind, lines["answers"]),
        "examples": _examples(kind, lines["answers"]),
        **{key: found[key] for key in ("fingerprints", "data_hashes", "versions") if key in found},
    }


def _scored_again(kind: Kind, config: RunConfig, run: Path, *, is_timed: bool) -> Result:
    """The rows on all validation items, of the models at the run's end, and how well calibrated they are."""
    wanted = [name for name in _SCORED_AGAIN if name in kind.rows]
    tokenizer = load_tokenizer(str((run / "proxy").resolve()))
    proxy = ProxyModel.from_pretrained(run, large=remote_large(config, tokenizer, named_by_folder=False))
    large_flops = (
        count_flops(proxy.large.requires_grad_(False), 1) / 2
    )  # of a token forward; the other half is backward
    if not wanted:
        return {"validation_rows": {}, "large_flops_per_token": large_flops}
    items = held_out_items(config.data, "validation", seed=config.seed, tokenizer=tokenizer)
    evaluator = Evaluator(items, tokenizer, config, proxy, place="data.validation")
    scores = evaluator.score(proxy, rows=wanted)
    models = {"large": proxy.large, "untuned": proxy.untuned, "tuned": proxy.tuned, "proxy": proxy}
    calibration, speed = {}, {}
    for name in wanted:
        model, measured = models[name], scores.measurements[name]
        sure = None if measured.confidence is None else measured.confidence.tolist()
        if sure is None:
            if model is None:  # the tuned model with its adapter switched off
                continue
            sure = evaluator.answer_probabilities(model, measured)
        calibration[kind.rows[name]] = reliability(sure, measured.judged["exact_match"].tolist())
        if is_timed and measured.written is not None:
            speed[kind.rows[name]] = round(evaluator.tokens_per_second(model, number=_TIMED_ITEMS), 2)
    return {
        "validation_rows": {kind.rows[name]: row.to_json() for name, row in scores.rows.items() if name in kind.rows},
        "calibration": calibration,
        "tokens_per_second": speed,
        "large_flops_per_token": large_flops,
    }


def reliability(probabilities: Sequence[float], right: Sequence[int]) -> dict[str, Any]:
    """Whether answers that a model finds likely are right as often (Guo et al. 2017, arXiv:1706.04599).

    Args:
        probabilities: That it gave to each answer that it wrote, or chose among all that might be chosen.
        right: 1 where that answer is right, else 0.

    Returns:
        ``bins``: for each of ten equal parts of 0 to 1 the number of answers, the sum of their probabilities and the
        number of right ones; ``ece``: the expected calibration error, the mean distance of probability and share of
        right answers over the bins, weighted by their answers.
    """
    bins = [[0, 0.0, 0] for _ in range(_CALIBRATION_BINS)]
    for probability, is_right in zip(probabilities, right, strict=True):
        part = bins[min(_CALIBRATION_BINS - 1, int(probability * _CALIBRATION_BINS))]
        part[0] += 1
        part[1] += probability
        part[2] += is_right
    return {"bins": bins, "ece": sum(abs(total - hits) for _, total, hits in bins) / len(probabilities)}


def _num_trained(run: Path) -> int:
    """Weights that the devices tune and send."""
    folder = RunFolder(run)
    with safe_open(folder.round_path(max(folder.rounds())) / "arrays.safetensors", "numpy") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 (no mapping)


_DEVICE_COSTS = ("bytes_up", "bytes_down", "flops", "seconds", "num_tokens")


def _curve(kind: Kind, metrics: Sequence[Mapping[str, Any]], costs: Sequence[Mapping[str, Any]]) -> list[Result]:
    """Round by round the validation scores, and what a device spent on average."""
    found: dict[int, Result] = {}
    for line in metrics:
        point = found.setdefault(line["round"], {"round": line["round"]})
        if line["phase"] == "train":
            point |= {"train_loss": line["train_loss"]} if "train_loss" in line else {}
        elif line["phase"] == "validation":
            rows = {kind.rows[name]: row for name, row in line["rows"].items() if name in kind.rows}
            point["rows"] = {
                name: {measure: row[measure] for measure in ("exact_match", "loss") if measure in row}
                for name, row in rows.items()
            }
    for server_round, point in found.items():
        spent = [row for row in costs if row["round"] == server_round and row["device"] != "server"]
        used = [row for row in spent if "refused" not in row]
        for name in _DEVICE_COSTS:
            if used and all(name in row for row in used):
                point[name] = statistics.fmean(row[name] for row in used)
        if used:
            point["devices"] = len(used)
    return [found[server_round] for server_round in sorted(found)]


def _device_alone(costs: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """What the memory of a process was that did one device's task and nothing else."""
    names = {"peak_memory_bytes": "process_bytes", "memory_growth_bytes": "growth_bytes"}
    return {
        label: row[name]
        for row in costs
        if "memory_growth_bytes" in row
        for name, label in names.items()
        if name in row
    }


def _items(kind: Kind, answers: Sequence[Mapping[str, Any]]) -> Result:
    """Every test item's marks and losses; the items by a hash, since seeds may have others."""
    seen: Counter[str] = Counter()
    keys, rows = [], dict[str, dict[str, list[Any]]]()
    for line in answers:
        digest = hashlib.sha256(json.dumps([line["prompt"], line["reference"]]).encode()).hexdigest()[:12]
        keys.append(f"{digest}.{seen[digest]}")
        seen[digest] += 1
        for own, row in kind.rows.items():
            made_of_it = line["models"].get(own)
            if made_of_it is not None:
                columns = rows.setdefault(row, {measure: [] for measure in ITEM_MEASURES})
                for measure, column in columns.items():
                    column.append(made_of_it.get(measure))
    return {"keys": keys, "tokens": [line.get("answer_tokens", 1) for line in answers], "rows": rows}


def _examples(kind: Kind, answers: Sequence[Mapping[str, Any]]) -> list[Result]:
    """Some items, taken at equal distances, with what the models wrote."""
    places = sorted({round(place * len(answers) / _KEPT_EXAMPLES) for place in range(_KEPT_EXAMPLES)})
    return [
        {
            "prompt": line["prompt"],
            "reference": line["reference"],
            "answers": {
                row: {key: line["models"][own][key] for key in ("answer", "exact_match") if key in line["models"][own]}
                for own, row in kind.rows.items()
                if own in line["models"]
            },
        }
        for line in (answers[place] for place in places if place < len(answers))
    ]


# --- the mean over devices that were tuned alone ---


def _mean_of(parts: Sequence[Result]) -> Result:
    """One result of several runs: means of everything that is a number, the largest of memory."""
    first = parts[0]
    costs = [part["costs"] for part in parts]
    return first | {
        "rows": _mean_rows([part["rows"] for part in parts]),
        "validation_rows": _mean_rows([part["validation_rows"] for part in parts]),
        "by_device": {name: [part["rows"][name].get("exact_match") for part in parts] for name in first["rows"]},
        "calibration": {name: _pooled([part["calibration"][name] for part in parts]) for name in first["calibration"]},
        "devices": len(parts),
        "costs": {
            name: (max if name in _LARGEST_OF else statistics.fmean)(part[name] for part in costs)
            for name in costs[0]
            if all(name in part for part in costs)
        },
        "shards": [shard for part in parts for shard in part["shards"]],
        "items": first["items"] | {"rows": _mean_items([part["items"]["rows"] for part in parts])},
    }


def _mean_rows(parts: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Rows without intervals: those of single devices are of their items alone."""
    return {
        name: {
            key: statistics.fmean(part[name][key] for part in parts)
            for key in parts[0][name]
            if key not in ("ci95", "perplexity", "n") and all(key in part[name] for part in parts)
        }
        | {"n": parts[0][name]["n"]}
        for name in parts[0]
    }


def _mean_items(parts: Sequence[Mapping[str, Mapping[str, Sequence[Any]]]]) -> dict[str, Any]:
    return {
        name: {
            measure: [
                None if None in values else statistics.fmean(values)
                for values in zip(*(part[name][measure] for part in parts), strict=True)
            ]
            for measure in parts[0][name]
        }
        for name in parts[0]
    }


def _pooled(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The calibration of all devices' answers together; the error is the mean of theirs."""
    return {"bins": merged_bins(parts), "ece": statistics.fmean(part["ece"] for part in parts)}


def result_path(folder: Path, cell: Cell) -> Path:
    """Where a cell's result lies once it is finished."""
    return folder / "cells" / f"{cell.name}.json"


def made(folder: Path) -> Path:
    """A folder, after making it."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder
