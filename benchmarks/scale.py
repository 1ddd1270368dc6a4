"""How a deployment's memory, time and bytes grow with the model and with the number of devices.

    python benchmarks/scale.py --megabytes 100 200 --devices 4 64 --out scale.json

A real SuperLink with its database, its executor and the app's own ServerApp, each a process; the devices are scripted:
threads of one process that speak Flower's own protocol to the SuperLink, and answer a train message with the model
plus a little noise, of one of a few kinds (the SuperLink keeps equal pieces once), some at a time, because devices do
not end their training in the same second. One device fetches all that it is sent, and its bytes are counted; the
others fetch what they need to answer. Where the SuperLink's answer is a server
error (its database was locked for five seconds), a SuperNode ends and is started again by its supervisor; a scripted
device asks again, and the errors are counted. A message that was lost with such an answer is never replied to: the
round goes on without that device after its timeout, and the replies that it had are counted.

The first federation is of a model of a few hundred kB. Peaks are the largest resident memory that Linux saw (VmHWM);
they are a multiple of the model and a constant, in which a batch's activations are: two sizes tell the multiple.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_head_values_from_object_content,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError, inflate_object_from_contents, pull_objects
from flwr.supernode.fleet_http_connection import http_request_response
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from fedpt_flwr.models import load_causal_lm, load_tokenizer, resolve_model, tunable_arrays
from fedpt_flwr.records import ARRAYS, METRICS, DeviceCard, code_hash, to_reply, to_tensors, to_wire

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
APP_FILES = ("pyproject.toml", "README.md", "LICENSE", "client_app.py", "server_app.py", "fedpt_flwr")
MB = 1_000_000
_POLL_S = 3.0  # how often a SuperNode asks for messages


def make_model(folder: Path, megabytes: float) -> Path:
    """A model of the demo's family, with its vocabulary and random weights, of about this size in float32."""
    config = AutoConfig.from_pretrained(resolve_model("demo:small"))
    config.hidden_size, config.intermediate_size, config.num_attention_heads = 768, 2048, 12
    config.num_key_value_heads, config.head_dim = 12, 64
    layer = 4 * config.hidden_size**2 + 3 * config.hidden_size * config.intermediate_size
    rest = config.vocab_size * config.hidden_size
    config.num_hidden_layers = max(1, round((megabytes * MB / 4 - rest) / layer))
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[0]] * config.num_hidden_layers
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    load_tokenizer("demo:small").save_pretrained(folder)
    return folder


class Kinds:
    """What devices answer: the arrays that they were sent in round 1, plus noise; one record for each kind.

    Args:
        model: Reference of the model.
        number: How many kinds there are.
        dtype: Type on the wire.
    """

    def __init__(self, model: str, number: int, dtype: str) -> None:
        arrays = tunable_arrays(load_causal_lm(model).requires_grad_(True))
        self.own_bytes = sum(values.numel() for values in arrays.values()) * (4 if dtype == "float32" else 2)
        server = ArrayRecord({name: Array(values.numpy()) for name, values in arrays.items()})
        received = to_wire(server, dtype, place="device")
        base = to_tensors(received, dtype)
        self.records: list[ArrayRecord] = []
        for kind in range(number):
            noise = torch.Generator().manual_seed(kind)
            tuned = {name: values + 1e-3 * torch.randn(values.shape, generator=noise) for name, values in base.items()}
            record = to_reply(tuned, received, dtype, place="device")
            record.object_id  # noqa: B018  hashes once what all devices of a kind send
            self.records.append(record)


class Devices:
    """Scripted devices, each a thread with a connection of its own.

    Attributes:
        down, up: Bytes of the objects that device 0 fetched and sent, of train messages.
        errors: What went wrong.
        num_server_errors: How often the SuperLink could not answer.
    """

    def __init__(self, address: str, number: int, kinds: Kinds, at_once: int) -> None:
        self.down = self.up = self.rounds = self.num_server_errors = 0
        self.errors: list[str] = []
        self._address, self._kinds = address, kinds
        self._code = code_hash(ROOT / "client_app.py")
        self._stop, self._turns = threading.Event(), threading.Semaphore(at_once)
        self._threads = [threading.Thread(target=self._live, args=(device,), daemon=True) for device in range(number)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Let all devices go."""
        self._stop.set()
        for thread in self._threads:
            thread.join(30)

    def _live(self, device: int) -> None:
        try:
            with http_request_response(self._address, insecure=True) as connection:
                receive = connection[1]
                while not self._stop.is_set():
                    received = self._patiently(receive)
                    if received is None:
                        self._stop.wait(_POLL_S)
                    else:
                        self._answer(device, connection, *received)
        except Exception as error:
            self.errors.append(f"device {device}: {type(error).__name__}: {error}")

    def _patiently(self, ask: Callable[..., Any], *told: Any) -> Any:
        while True:
            try:
                return ask(*told)
            except httpx.HTTPStatusError as error:
                if not error.response.is_server_error or self._stop.is_set():
                    raise
                self.num_server_errors += 1
                self._stop.wait(1)

    def _answer(self, device: int, connection: Any, message: Message, tree: Any) -> None:
        _, _, send, _, _, pull, push, confirm = connection
        run_id, is_train = message.metadata.run_id, message.metadata.message_type == "train"
        wanted = [part.object_id for part in iterate_object_tree(tree) if device == 0 or _is_small(part, tree)]
        contents = pull_objects(wanted, lambda object_id: self._patiently(pull, run_id, object_id), initial_backoff=0.2)
        down = sum(map(len, contents.values()))
        self._patiently(confirm, run_id, tree.object_id)
        config = next(
            inflate_object_from_contents(object_id, contents, keep_object_contents=True)
            for object_id, content in contents.items()
            if get_object_head_values_from_object_content(content)[0] == "ConfigRecord"
        )
        content = self._content(device, config, is_train=is_train)
        with self._turns if is_train else contextlib.nullcontext():
            while (up := self._send(device, Message(content, reply_to=message), send, push)) is None:
                self.num_server_errors += 1
        if device == 0 and is_train:
            self.down, self.up, self.rounds = down, up, self.rounds + 1

    def _send(self, device: int, reply: Message, send: Any, push: Any) -> int | None:
        """Bytes of a reply, or None if the SuperLink lost a piece of it."""
        num_bytes = 0
        with no_object_id_recompute():
            reply.metadata.__dict__["_message_id"] = reply.object_id
            missing, session = self._patiently(send, reply, get_object_tree(reply), 1.0)
            for object_id, part in get_all_nested_objects(reply).items():
                content = part.deflate() if device == 0 or object_id in missing else b""
                num_bytes += len(content)
                if object_id in missing:
                    try:
                        self._patiently(push, reply.metadata.run_id, session, object_id, content)
                    except ObjectPushError:
                        return None
        return num_bytes

    def _content(self, device: int, config: Any, *, is_train: bool) -> RecordDict:
        if not is_train:
            return DeviceCard(device=device, num_examples=10 + device, groups={}, code_hash=self._code).to_content()
        metrics: dict[str, int | float] = {
            "device": device,
            "server-round": int(config["server-round"]),
            "num-examples": 10 + device,
            "train-loss": 1.0,
        }
        records = self._kinds.records
        return RecordDict({ARRAYS: records[device % len(records)], METRICS: MetricRecord(dict(metrics))})


def _is_small(part: Any, tree: Any) -> bool:
    """Message, its records, and all of a record that has no arrays: not arrays and their pieces."""
    records = [record for content in tree.children for record in content.children]
    return part.object_id in {tree.object_id, *(c.object_id for c in tree.children), *(r.object_id for r in records)}


class Watcher:
    """Peaks of resident memory of all processes below one, by what they are."""

    KINDS = ("flwr-serverapp", "flower-superlink", "flower-superexec")

    def __init__(self, sessions: Callable[[], list[int]]) -> None:
        self.peaks: dict[str, int] = {}
        self.anonymous: dict[str, int] = {}
        self._sessions, self._ended = sessions, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._ended.wait(0.1):
            for pid, words in _processes(self._sessions()):
                kind = next((kind for kind in self.KINDS if kind in words), None)
                with contextlib.suppress(OSError):
                    status = dict(
                        line.split(":", 1)
                        for line in Path(f"/proc/{pid}/status").read_text().splitlines()
                        if ":" in line
                    )
                    if kind and "VmHWM" in status:
                        peak, now = (1024 * int(status[key].split()[0]) for key in ("VmHWM", "RssAnon"))
                        self.peaks[kind] = max(self.peaks.get(kind, 0), peak)
                        self.anonymous[kind] = max(self.anonymous.get(kind, 0), now)

    def stop(self) -> None:
        """No more."""
        self._ended.set()
        self._thread.join()


def _processes(sessions: list[int]) -> Iterator[tuple[int, str]]:
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            session = int((entry / "stat").read_text().rpartition(")")[2].split()[3])
            words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if session in sessions:
            yield int(entry.name), words


class Federation:
    """A SuperLink with a database and its executor, on the loopback without TLS."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        self.env = os.environ | {
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "FLWR_HOME": str(folder / "flwr"),
            "FEDPT_HOME": str(folder / "fedpt"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_OFFLINE": "1",
        }
        (folder / "flwr").mkdir(parents=True)
        (folder / "flwr" / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "{self.address}"\ninsecure = true\n'
        )
        self.app = folder / "app"
        self.app.mkdir()
        for part in APP_FILES:
            if (ROOT / part).is_dir():
                shutil.copytree(ROOT / part, self.app / part, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / part, self.app / part)
        port = self.address.rpartition(":")[2]
        self._services = [
            self._start(
                "superlink", "flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", port,
                "--database", str(folder / "superlink.db"), "--isolation", "process",
            )
        ]  # fmt: skip
        self._wait_for_port(int(port))
        self._services.append(
            self._start("executor", "flower-superexec", "--insecure", "--runtime-api-address", self.address)
        )

    def _start(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("wb") as log:
            return subprocess.Popen(
                command, cwd=self.folder, env=self.env, stdout=log, stderr=log, start_new_session=True
            )

    @staticmethod
    def _wait_for_port(port: int) -> None:
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return
            time.sleep(0.1)
        raise SystemExit("the SuperLink does not answer")

    def sessions(self) -> list[int]:
        """Ids of the sessions of the services, and of all that they started."""
        return [service.pid for service in self._services]

    def flwr(self, *arguments: str) -> Any:
        """What `flwr` says, as JSON."""
        result = subprocess.run(
            [str(BIN / "flwr"), *arguments, "--format", "json"],
            cwd=self.app, env=self.env, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if result.returncode:
            raise SystemExit(result.stdout + result.stderr)
        return json.loads(result.stdout)

    def run(self, config: dict[str, Any]) -> dict[str, Any]:
        """Run to the end; Flower's entry of the run."""
        pairs = " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())
        run_id = str(self.flwr("run", ".", "here", "-c", pairs)["run-id"])
        asked = time.monotonic()
        while True:
            time.sleep(1)
            # Asking is a process of its own, which takes a second of a core: seldom, until there are results.
            if list(self.folder.glob("fedpt/runs/*/results.json")) or time.monotonic() - asked > 30:
                asked = time.monotonic()
                found = self.flwr("list", "here", "--run-id", run_id).get("runs")  # none where it was too busy
                if found and found[0]["status"].startswith("finished"):
                    return dict(found[0])

    def stop(self) -> None:
        """End every process that was started."""
        for service in reversed(self._services):
            service.terminate()
        for service in self._services:
            with contextlib.suppress(subprocess.TimeoutExpired):
                service.wait(10)
        for pid, _ in _processes(self.sessions()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)


def measure(model: Path | str, num_devices: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """One federation: its peaks, seconds and bytes."""
    folder = Path(tempfile.mkdtemp(prefix="scale-", dir=arguments.folder))
    kinds = Kinds(str(model), min(arguments.kinds, num_devices), arguments.dtype)
    federation = Federation(folder)
    watcher = Watcher(federation.sessions)
    devices = Devices(federation.address, num_devices, kinds, arguments.at_once)
    try:
        entry = federation.run(
            {
                "num-server-rounds": arguments.rounds,
                "min-devices": num_devices,
                "min-replies": 1,
                "wait-timeout-s": 300.0,
                "round-timeout-s": arguments.timeout_s,
                "model.small": str(model),
                "wire.dtype": arguments.dtype,
                "strategy.name": arguments.strategy,
                "distillation.mode": "off",
                "scoring.rows": "tuned,proxy",
                "scoring.num-items": 2,
                "scoring.round-items": 2,
                "scoring.max-new-tokens": 2,
                "scoring.few-shot": 0,
                "keep-rounds": 1,
            }
        )
        lines = [
            json.loads(line)
            for path in (folder / "fedpt" / "runs").glob("*/metrics.jsonl")
            for line in path.read_text().splitlines()
        ]
        rounds = [line for line in lines if line["phase"] == "train"]
    finally:
        devices.stop()
        watcher.stop()
        federation.stop()
        database = sum(path.stat().st_size for path in folder.glob("superlink.db*"))
        log = (folder / "superlink.log").read_text(errors="replace") + (folder / "executor.log").read_text(
            errors="replace"
        )
        shutil.rmtree(folder)
    if entry["status"] != "finished:completed" or devices.errors:
        raise SystemExit("\n".join([str(entry), *devices.errors, log[-4000:]]))
    return {
        "devices": num_devices,
        "arrays_bytes": kinds.own_bytes,
        "serverapp_peak_bytes": watcher.peaks["flwr-serverapp"],
        "serverapp_anonymous_bytes": watcher.anonymous["flwr-serverapp"],
        "superlink_peak_bytes": watcher.peaks["flower-superlink"],
        "database_bytes": database,
        "seconds_per_round": float(np.median([line["seconds"] for line in rounds])),
        "replies": [line["replies"] for line in rounds],
        "server_errors": devices.num_server_errors,
        "bytes_down": devices.down,
        "bytes_up": devices.up,
    }


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--megabytes", type=float, nargs="+", default=[100, 200], help="sizes of the model that all devices send"
    )
    parser.add_argument("--devices", type=int, nargs="+", default=[4, 64])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--kinds", type=int, default=4, help="different answers")
    parser.add_argument("--at-once", type=int, default=4, help="devices that send their reply at the same time")
    parser.add_argument("--timeout-s", type=float, default=900.0, help="how long a round waits for lost replies")
    parser.add_argument("--dtype", default="float32", help="wire.dtype")
    parser.add_argument("--strategy", default="FedAvg")
    parser.add_argument("--folder", help="where temporary files go")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    arguments = parser.parse_args()
    transformers_logging.disable_progress_bar()
    smallest = measure("demo:small", min(4, *arguments.devices), arguments)
    rows = [smallest | {"model_bytes": smallest["arrays_bytes"]}]
    for megabytes in arguments.megabytes:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            model = make_model(Path(folder) / "model", megabytes)
            size = sum(values.nbytes for values in load_file(model / "model.safetensors").values())
            for number in arguments.devices:
                rows.append(measure(model, number, arguments) | {"model_bytes": size})
                print(json.dumps(rows[-1]), flush=True)
    slopes = {number: slope(rows, number) for number in arguments.devices if len(arguments.megabytes) > 1}
    settings = {"rounds": arguments.rounds, "kinds": arguments.kinds, "at_once": arguments.at_once}
    settings["dtype"] = arguments.dtype
    result = {**settings, "strategy": arguments.strategy, "rows": rows, "serverapp_bytes_per_model_byte": slopes}
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(
        "| model MB | devices | replies | ServerApp MB | above the smallest model's | SuperLink MB | database MB | "
        "s a round | down | up | server errors |"
    )
    print("| --- " * 11 + "|")
    for row in rows:
        above = (row["serverapp_peak_bytes"] - smallest["serverapp_peak_bytes"]) / row["model_bytes"]
        sizes = [row[key] / MB for key in ("serverapp_peak_bytes", "superlink_peak_bytes", "database_bytes")]
        ratios = [row[key] / row["arrays_bytes"] for key in ("bytes_down", "bytes_up")]
        print(
            f"| {row['model_bytes'] / MB:.1f} | {row['devices']} | {row['replies']} | {sizes[0]:.0f} | "
            f"{above:.2f} models | {sizes[1]:.0f} | {sizes[2]:.0f} | {row['seconds_per_round']:.1f} | "
            f"{ratios[0]:.4f} | {ratios[1]:.4f} | "
            f"{row['server_errors']} |"
        )
    for number, value in slopes.items():
        print(f"{number} devices: each MB more of the model takes {value:.2f} MB more of the ServerApp")


def slope(rows: list[dict[str, Any]], num_devices: int) -> float:
    """What a byte more of the model takes in the ServerApp, between the two largest models."""
    low, high = sorted((row for row in rows if row["devices"] == num_devices), key=lambda row: row["model_bytes"])[-2:]
    more = high["serverapp_peak_bytes"] - low["serverapp_peak_bytes"]
    return float(more / (high["model_bytes"] - low["model_bytes"]))


if __name__ == "__main__":
    main()
