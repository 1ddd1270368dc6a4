"""What privacy costs in quality: utility against epsilon.

    python benchmarks/privacy.py --out privacy.json
    python benchmarks/privacy.py --out privacy.json --table
    python benchmarks/privacy.py --out privacy.json --ratios --weights 104688 1984

Federations of the demo world in this process, with the app's real code, each a whole run with ``privacy.dp`` set; the
noise multiplier is the smallest with which all rounds stay within epsilon. ``inf`` is the same run without noise, its
changes clipped to the same norm, so that what clipping costs and what noise costs are told apart. The noise is the
operating system's: two runs with one seed differ. A cell that is in the file already is not run again; one that was
made with another config is refused.

``--ratios`` trains nothing: how long the noise on the mean is, beside the longest that the mean can be, is
``noise multiplier * sqrt(number of weights) / devices``. Above one there is more noise than signal in a round.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import client_app  # noqa: E402
import server_app  # noqa: E402
from benchmarks.common import check_cells  # noqa: E402
from fedpt_flwr.accounting import noise_for  # noqa: E402
from fedpt_flwr.config import Scalar, flat_values, parse_run_config  # noqa: E402
from fedpt_flwr.errors import FedPTError  # noqa: E402
from fedpt_flwr.grid import run_locally  # noqa: E402
from fedpt_flwr.runs import find_run, read_json, write_json  # noqa: E402


def told(base: dict[str, Scalar], epsilon: float, clip: float, mode: str) -> dict[str, Scalar]:
    """The run config of a cell."""
    if math.isinf(epsilon):
        return base | {"strategy.max-update-norm": clip, "strategy.above-norm": "clip"}
    delta = float(base["privacy.delta"])
    noise = noise_for(epsilon, int(base["num-server-rounds"]), delta=delta)
    budget: dict[str, Scalar] = {"privacy.max-epsilon": epsilon, "privacy.noise-multiplier": noise}
    return base | budget | {"privacy.dp": mode, "privacy.clipping-norm": clip}


def run_one(flat: dict[str, Scalar], num_devices: int) -> dict[str, Any]:
    """One federation: its scores, and what was spent."""
    with tempfile.TemporaryDirectory() as scratch:
        whole = flat_values(parse_run_config(flat | {"output-dir": scratch}))
        run_locally(server_app.app, client_app.app, whole, num_devices=num_devices)
        results = read_json(find_run(root=Path(scratch)) / "results.json")
    names = ("large", "untuned", "tuned", "proxy")
    rows = {name: row for name, row in results["rows"].items() if name in names}
    return {
        "exact_match": {name: row["exact_match"] for name, row in rows.items()},
        "loss": {name: row["loss"] for name, row in rows.items()},
        "shift": {key: results["shift"][key] for key in ("alpha", "plausibility")},
        "privacy": results.get("privacy"),
    }


def render(results: dict[str, Any]) -> str:
    """Epsilon, noise, and the mean exact match over the seeds with the lowest and highest."""
    grouped: dict[tuple[int, float], list[dict[str, Any]]] = {}
    for result in results.values():
        grouped.setdefault((result["devices"], float(result["epsilon"])), []).append(result)
    lines = ["| devices | epsilon | spent | noise multiplier | seeds | tuned % | proxy % | proxy loss |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for (devices, epsilon), parts in sorted(grouped.items(), key=lambda item: (item[0][0], -item[0][1])):
        privacy = parts[0]["privacy"] or {"epsilon": math.inf, "noise_multiplier": 0.0}
        matches = [_spread([100 * part["exact_match"][row] for part in parts]) for row in ("tuned", "proxy")]
        loss = float(np.mean([part["loss"]["proxy"] for part in parts]))
        spent = f"{privacy['epsilon']:.3f} | {privacy['noise_multiplier']:g}"
        lines.append(f"| {devices} | {epsilon:g} | {spent} | {len(parts)} | {' | '.join(matches)} | {loss:.3f} |")
    return "\n".join(lines)


def ratios(weights: Sequence[int], devices: Sequence[int], epsilons: Sequence[float], rounds: int) -> str:
    """Length of the noise over the clipping norm, by number of weights, devices and epsilon."""
    lines = [f"| weights | epsilon | noise multiplier | {' | '.join(f'{number} devices' for number in devices)} |"]
    lines.append("| --- " * (3 + len(devices)) + "|")
    for count in weights:
        for epsilon in epsilons:
            noise = noise_for(epsilon, rounds, delta=1e-5)
            values = [_two_digits(noise * math.sqrt(count) / number) for number in devices]
            lines.append(f"| {count:,} | {epsilon:g} | {noise:g} | {' | '.join(values)} |")
    return "\n".join(lines)


def _two_digits(value: float) -> str:
    return f"{float(f'{value:.2g}'):g}"  # `.2g` alone writes 130 as 1.3e+02


def _spread(values: Sequence[float]) -> str:
    return f"{np.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def main(words: Sequence[str] | None = None) -> None:
    """Run the cells that are missing, and write each as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--devices", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--epsilons", type=float, nargs="+", default=[math.inf, 8, 4, 2, 1])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--clip", type=float, default=0.5, help="privacy.clipping-norm")
    parser.add_argument("--mode", default="server-fixed", help="privacy.dp")
    parser.add_argument("--items", type=int, default=112)
    parser.add_argument("-c", "--config", action="append", default=[], help="key=value of the run config, in JSON")
    parser.add_argument("--table", action="store_true", help="print the table and run nothing")
    parser.add_argument("--ratios", action="store_true", help="print the noise beside the norm and run nothing")
    parser.add_argument("--weights", type=int, nargs="+", default=[104_688], help="for --ratios")
    arguments = parser.parse_args(words)
    results: dict[str, Any] = read_json(arguments.out) if arguments.out.is_file() else {}
    if arguments.table:
        print(render(results))
        return
    if arguments.ratios:
        epsilons = [epsilon for epsilon in arguments.epsilons if math.isfinite(epsilon)]
        print(ratios(arguments.weights, arguments.devices, epsilons, arguments.rounds))
        return
    logging.getLogger("flwr").setLevel(logging.ERROR)
    base: dict[str, Scalar] = {
        "num-server-rounds": arguments.rounds,
        "privacy.delta": 1e-5,
        "data.partitioner": "iid",
        "distillation.mode": "off",
        "scoring.few-shot": 0,
        "scoring.round-items": 0,
        "scoring.num-items": arguments.items,
        **{key: json.loads(value) for key, _, value in (part.partition("=") for part in arguments.config)},
    }
    cells = {
        f"{devices}/{epsilon:g}/{seed}": (devices, epsilon, seed)
        for seed in arguments.seeds
        for devices in arguments.devices
        for epsilon in arguments.epsilons
    }
    configs = {
        key: told(base | {"seed": seed}, epsilon, arguments.clip, arguments.mode)
        for key, (_, epsilon, seed) in cells.items()
    }
    try:
        check_cells(results, configs, place=str(arguments.out))
    except FedPTError as error:
        sys.exit(str(error))
    for key, (devices, epsilon, seed) in cells.items():
        if key in results:
            continue
        begun, spent = time.perf_counter(), time.process_time()
        found = run_one(configs[key], devices)
        seconds = {
            "seconds": round(time.perf_counter() - begun, 1),
            "processor_seconds": round(time.process_time() - spent, 1),
        }
        head = {"devices": devices, "epsilon": str(epsilon), "seed": seed, "config": configs[key]}
        results[key] = head | found | seconds
        write_json(arguments.out, results)
        print(key, found["exact_match"], found["privacy"], seconds, flush=True)


if __name__ == "__main__":
    main()
