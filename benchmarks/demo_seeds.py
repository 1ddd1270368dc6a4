"""The demo's claim over seeds and worlds: does the proxy beat the tuned small and the large model?

For every world and seed it makes one real `flwr run` of eight simulated devices and takes the test scores that the run
itself wrote (alpha 1, no mask). Then it chooses alpha and mask for that run by exact match on its validation items
(ties go to the larger alpha, then to the smaller mask) and scores the test items once with the choice.

    python benchmarks/demo_seeds.py --seeds 0 1 2 3 4 --out demo-seeds.json
    python benchmarks/demo_seeds.py --seeds 0 1 2 3 4 --world /absolute/demo-world-1 --out world-1.json

A world other than the packaged one is a folder that `fedpt demo-world --seed N --out DIR` made. Results are written
after every seed, and seeds that are in the file already are not run again.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from transformers.utils import logging as transformers_logging

from fedpt_flwr.config import parse_run_config
from fedpt_flwr.evaluation import Evaluator
from fedpt_flwr.models import load_tokenizer
from fedpt_flwr.proxy import ProxyModel
from fedpt_flwr.runs import find_run, read_json, write_json
from fedpt_flwr.sources import held_out_items

APP = Path(__file__).resolve().parents[1]
CHOICES = [(alpha, mask) for alpha in (1.0, 0.75, 0.5, 0.25) for mask in (0.001, 0.01)]


def main() -> None:
    """Run what is missing, then print the table."""
    arguments = _arguments()
    transformers_logging.disable_progress_bar()
    found = read_json(arguments.out) if arguments.out.exists() else {}
    port = _free_port()
    with tempfile.TemporaryDirectory() as home:
        try:
            for seed in arguments.seeds:
                if str(seed) not in found:
                    run = _flwr_run(Path(home), port, seed, arguments.world)
                    found[str(seed)] = _row(run)
                    write_json(arguments.out.absolute(), found)
                print(_line(seed, found[str(seed)]), flush=True)
        finally:
            _stop_superlink(port)


def _flwr_run(home: Path, port: int, seed: int, world: Path | None) -> Path:
    environment = os.environ | {
        "FLWR_HOME": str(home / "flwr"),
        "FEDPT_HOME": str(home / "fedpt"),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(port),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }
    config = f"seed = {seed}\n" + ("" if world is None else (world / "run-config.toml").read_text(encoding="utf-8"))
    (home / "config.toml").write_text(config, encoding="utf-8")
    command = [
        str(Path(sys.executable).with_name("flwr")), "run", str(APP), "--stream",
        "--federation-config", "num-supernodes=8 client-resources-num-cpus=1",
        "--run-config", str(home / "config.toml"),
    ]  # fmt: skip
    log = subprocess.run(command, env=environment, cwd=APP, capture_output=True, text=True, check=True).stdout
    if "FEDPT-RUN-FAILED" in log:
        raise SystemExit(log)
    return find_run(root=home / "fedpt" / "runs")


def _row(run: Path) -> dict[str, object]:
    """What the run wrote, and the test score of the mask that its validation items choose."""
    results = read_json(run / "results.json")
    config = parse_run_config(read_json(run / "config.json")["run_config"])
    proxy = ProxyModel.from_pretrained(run)
    tokenizer = load_tokenizer(str((run / "proxy").resolve()))

    def score(which: str, alpha: float, mask: float) -> dict[str, object]:
        proxy.alpha, proxy.plausibility = alpha, mask
        items = held_out_items(config.data, which, seed=config.seed)
        evaluator = Evaluator(items, tokenizer, config, proxy, place=f"data.{which}")
        return evaluator.score(proxy, rows=("tuned", "proxy")).to_json()

    curve = {choice: score("validation", *choice)["rows"]["proxy"]["exact_match"] for choice in CHOICES}
    chosen = max(CHOICES, key=lambda choice: (curve[choice], choice[0], -choice[1]))
    masked = score("test", *chosen)
    return {
        "rows": results["rows"],
        "proxy_minus_tuned": results["proxy_minus_tuned"],
        "proxy_minus_large": results["proxy_minus_large"],
        "seconds": results["costs"]["seconds"],
        "masked": {
            "alpha": chosen[0],
            "plausibility": chosen[1],
            "exact_match": masked["rows"]["proxy"]["exact_match"],
            "proxy_minus_tuned": masked["proxy_minus_tuned"],
        },
    }


def _line(seed: int, row: dict) -> str:
    rows, masked = row["rows"], row["masked"]
    low, high = row["proxy_minus_tuned"]["ci95"]
    masked_low, masked_high = masked["proxy_minus_tuned"]["ci95"]
    exact = " ".join(f"{name} {rows[name]['exact_match']:.3f}" for name in ("large", "untuned", "tuned", "proxy"))
    loss = " ".join(f"{name} {rows[name]['loss']:.3f}" for name in ("large", "tuned", "proxy"))
    return (
        f"seed {seed} | exact match: {exact} | proxy - tuned 95 %: {low:+.3f} to {high:+.3f} | loss: {loss} | "
        f"masked (alpha {masked['alpha']}, {masked['plausibility']}): {masked['exact_match']:.3f}, "
        f"{masked_low:+.3f} to {masked_high:+.3f} | {row['seconds']:.0f} s"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--world", type=Path, help="folder of another world; the packaged one by default")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the results")
    return parser.parse_args()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _stop_superlink(port: int) -> None:
    """End the SuperLink that `flwr run` left behind, by its process id."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if str(port) in words and any("flower-superlink" in word for word in words):
            os.kill(int(process.name), signal.SIGTERM)


if __name__ == "__main__":
    main()
