"""Bytes of a device and round, and what is learnt after equal rounds, by way of tuning and type on the wire.

    python benchmarks/wire.py --out /tmp/wire --rounds 8 --seeds 0,1,2

Every line of the table is the mean over the seeds of whole federations on the demo world: the real ServerApp and
ClientApp in one process, eight devices, every message written to bytes. Learning rates are chosen with the first
seed, among ``RATES``, by what the proxy gets right of the validation questions at alpha 1 (of equal ones by the lower
loss); a line with a shorter type on the wire takes the rate of its float32 line. Each run leaves one file in
``--out``; a second call goes on where the first one ended, and refuses what was made with another config.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from flwr.app import Context, RecordDict

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import client_app  # noqa: E402
import server_app  # noqa: E402
from benchmarks.common import check_cells  # noqa: E402
from fedpt_flwr.config import flat_values, parse_run_config  # noqa: E402
from fedpt_flwr.errors import FedPTError  # noqa: E402
from fedpt_flwr.grid import LocalGrid  # noqa: E402
from fedpt_flwr.runs import RunFolder, find_run, read_json, write_json  # noqa: E402

DEVICES = 8
RATES = {"full": (0.003,), "average": (0.003, 0.01, 0.03), "exact": (0.003, 0.01, 0.03), "frozen-a": (0.01, 0.03)}
"""First learning rates that are tried; for all weights the default, which was chosen in the same way."""
RANKS = (2, 4, 8)
"""Of devices 0, 1, 2, 3, … in the line with ranks of their own."""


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Attributes:
        title: What it is called.
        tuning: ``full``, or the aggregation of adapters.
        dtype: ``wire.dtype``.
        with_ranks: Whether devices have the ranks of :data:`RANKS`.
    """

    title: str
    tuning: str
    dtype: str = "float32"
    with_ranks: bool = False


LINES = (
    Line("all weights", "full"),
    Line("all weights, float16", "full", "float16"),
    Line("all weights, int8", "full", "int8"),
    Line("LoRA, average", "average"),
    Line("LoRA, average, int8", "average", "int8"),
    Line("LoRA, exact", "exact"),
    Line("LoRA, exact, int8", "exact", "int8"),
    Line("LoRA, exact, ranks 2, 4, 8", "exact", with_ranks=True),
    Line("LoRA, frozen A", "frozen-a"),
    Line("LoRA, frozen A, int8", "frozen-a", "int8"),
)


def config_of(rounds: int, line: Line, rate: float, seed: int) -> dict[str, Any]:
    """The run config of a federation, but for where its files go."""
    tuning: dict[str, Any] = {"tuning.mode": "full"}
    if line.tuning != "full":
        tuning = {"tuning.mode": "lora", "tuning.lora-aggregation": line.tuning}
    flat = flat_values(parse_run_config({})) | tuning | {
        "seed": seed, "num-server-rounds": rounds, "wire.dtype": line.dtype, "train.learning-rate": rate,
        "distillation.mode": "off", "scoring.rows": "tuned,proxy", "scoring.round-items": 0, "scoring.few-shot": 0,
    }  # fmt: skip
    return {key: value for key, value in flat.items() if key != "output-dir"}


def run(out: Path, rounds: int, line: Line, rate: float, seed: int) -> dict[str, Any]:
    """One federation; what was measured is read from its files, and from ``out`` if it was made before.

    Raises:
        ConfigError: It was made before with another config, such as other defaults.
    """
    path = out / f"{line.title.replace(', ', '-').replace(' ', '_')}-{rounds}-{rate:g}-{seed}.json"
    flat = config_of(rounds, line, rate, seed)
    ranks = list(RANKS) if line.with_ranks else []
    config = flat | {"devices": DEVICES, "ranks": ranks}
    if path.is_file():
        made = dict(read_json(path))
        check_cells({path.name: {"config": made.get("config", {})}}, {path.name: config}, place=str(out))
        return made
    logging.getLogger("flwr").setLevel(logging.ERROR)

    def node_config(device: int) -> dict[str, Any]:
        told: dict[str, Any] = {"partition-id": device, "num-partitions": DEVICES}
        return told | ({"lora-rank": ranks[device % len(ranks)]} if ranks else {})

    with tempfile.TemporaryDirectory() as folder:
        os.environ["FEDPT_HOME"] = folder
        flat["output-dir"] = str(Path(folder) / "runs")
        grid = LocalGrid(client_app.app, DEVICES, flat, node_config=node_config)
        server_app.app(grid, Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=flat))
        found = find_run(root=Path(folder) / "runs")
        results, files = read_json(found / "results.json"), RunFolder(found)
        costs, metrics = files.read_lines("costs.jsonl"), files.read_lines("metrics.jsonl")
    trained = [row for row in costs if "bytes_up" in row]
    chosen = next(point for point in results["shift"]["curve"] if point["alpha"] == 1 and point["plausibility"] == 0)
    measured = {
        "config": config,
        "down": statistics.mean(row["bytes_down"] for row in trained),
        "up": statistics.mean(row["bytes_up"] for row in trained),
        "refused": sum(bool(row.get("refused")) for row in trained),
        "tuned_loss": results["rows"]["tuned"]["loss"],
        "proxy_loss": results["rows"]["proxy"]["loss"],
        "tuned_match": results["rows"]["tuned"]["exact_match"],
        "proxy_match": results["rows"]["proxy"]["exact_match"],
        "validation_match": chosen["exact_match"],
        "validation_loss": chosen["loss"],
        "left_out": [row["lora_left_out"] for row in metrics if "lora_left_out" in row],
    }
    write_json(path, measured)  # whole or not there, since a second call takes it as it is
    return measured


def main(words: Sequence[str] | None = None) -> None:
    """Run what is not there yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the measurements")
    parser.add_argument("--seeds", default="0", help="seeds of the federations, separated by commas")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--jobs", type=int, default=1, help="federations at once")
    arguments = parser.parse_args(words)
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    arguments.out.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        try:
            table(pool, arguments.out, arguments.rounds, seeds)
        except FedPTError as error:
            pool.shutdown(cancel_futures=True)
            sys.exit(str(error))


def table(pool: Executor, out: Path, rounds: int, seeds: Sequence[int]) -> None:
    """Run what is not there yet, choose the learning rates, and print everything."""
    plain = {line.tuning: line for line in LINES if line.dtype == "float32" and not line.with_ranks}
    tried = {
        (tuning, rate): pool.submit(run, out, rounds, plain[tuning], rate, seeds[0])
        for tuning, rates in RATES.items()
        for rate in rates
    }
    best = {}
    for tuning, rates in RATES.items():
        found = {rate: tried[tuning, rate].result() for rate in rates}
        best[tuning] = max(rates, key=lambda r: (found[r]["validation_match"], -found[r]["validation_loss"]))
        for rate, row in found.items():
            print(
                f"{tuning}: {rate:g}: validation {row['validation_match']:.3f}, {row['validation_loss']:.4f}",
                flush=True,
            )
    runs = {
        (line, seed): pool.submit(run, out, rounds, line, best[line.tuning], seed) for seed in seeds for line in LINES
    }
    print("| line | rate | bytes down | bytes up | tuned: loss | proxy: loss | tuned: right | proxy: right |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for line in LINES:
        rows = [runs[line, seed].result() for seed in seeds]

        def mean(key: str, rows: list[dict[str, Any]] = rows) -> float:
            return float(statistics.mean(row[key] for row in rows))

        losses = " | ".join(f"{mean(key):.4f}" for key in ("tuned_loss", "proxy_loss"))
        right = " | ".join(f"{mean(key):.3f}" for key in ("tuned_match", "proxy_match"))
        size = f"{mean('down'):,.0f} | {mean('up'):,.0f}"
        print(f"| {line.title} | {best[line.tuning]:g} | {size} | {losses} | {right} |")


if __name__ == "__main__":
    main()
