"""A simulated federation of many devices: does it finish, how long does it take, how much memory in all?

    python benchmarks/simulation.py --devices 1000

A small adapter on the demo world, dealt out `iid`. The run is `flwr run` with a home of its own; the memory of every
process of it is added up five times a second, pages that several share counted once (PSS). The SuperLink that Flower
leaves behind is ended.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
MB = 1_000_000


def processes(home: Path) -> Iterator[int]:
    """Ids of the processes whose FLWR_HOME this is."""
    mark = f"FLWR_HOME={home}".encode()
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (entry / "environ").read_bytes().split(b"\0"):
                yield int(entry.name)


def memory(home: Path) -> int:
    """Bytes of all these processes."""
    total = 0
    for pid in processes(home):
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            total += 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total


def main() -> None:
    """Run it and print what was seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--fraction", type=float, default=1.0, help="fraction-train")
    parser.add_argument("--partitioner", default="iid")
    parser.add_argument("--dtype", default="float32", help="wire.dtype")
    parser.add_argument("--folder", help="where temporary files go")
    arguments = parser.parse_args()
    config = {
        "num-server-rounds": arguments.rounds,
        "fraction-train": arguments.fraction,
        "data.partitioner": arguments.partitioner,
        "tuning.mode": "lora",
        "train.max-steps": 1,
        "wire.dtype": arguments.dtype,
        "wait-timeout-s": 3600.0,
        "distillation.mode": "off",
        "scoring.few-shot": 0,
    }
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder, socket.socket() as probe:
        home = Path(folder) / "flwr"
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        env = os.environ | {
            "FLWR_HOME": str(home),
            "FEDPT_HOME": str(Path(folder) / "fedpt"),
            "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(port),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_OFFLINE": "1",
        }
        peak, ended = 0, threading.Event()

        def watch() -> None:
            nonlocal peak
            while not ended.wait(0.2):
                peak = max(peak, memory(home))

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        begun = time.monotonic()
        federation = f"num-supernodes={arguments.devices} client-resources-num-cpus=1"
        pairs = " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())
        flwr = Path(sys.executable).with_name("flwr")
        command = [str(flwr), "run", str(ROOT), "--stream", "--federation-config", federation, "-c", pairs]
        subprocess.run(command, cwd=ROOT, env=env, check=True)
        seconds = time.monotonic() - begun
        ended.set()
        watcher.join()
        for pid in processes(home):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        finished = list(Path(folder).glob("fedpt/runs/*/results.json"))
        if not finished:
            raise SystemExit("the run has no results; its log says why")
        costs = [json.loads(line) for line in finished[0].with_name("costs.jsonl").read_text().splitlines()]
        trained = [row for row in costs if "bytes_up" in row]
        used = sum(not row.get("refused") for row in trained)
        print(f"{arguments.devices} devices, {arguments.rounds} rounds: finished in {seconds:.0f} s; {used} of "
              f"{len(trained)} replies used; at most {peak / MB:.0f} MB in all processes; "
              f"{sum(row['bytes_up'] for row in trained) / MB:.1f} MB up")  # fmt: skip


if __name__ == "__main__":
    main()
