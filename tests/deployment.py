"""A federation as on real machines: SuperLink, executor and SuperNodes are processes of their own, with TLS and keys.

Everything is on loopback; each process has its own FLWR_HOME, as if on its own machine, and a log file. Processes are
ended by their ids.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from federation import QUICK
from relay import Relay

from fedpt_flwr.certs import make_certs

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
APP_FILES = ("pyproject.toml", "README.md", "LICENSE", "client_app.py", "server_app.py", "fedpt_flwr")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until(condition: Callable[[], object], timeout_s: float, what: str) -> object:
    """Wait for something to be true, and return it."""
    deadline = time.monotonic() + timeout_s
    while not (result := condition()):
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.1)
    return result


def processes(session: int) -> dict[int, str]:
    """The processes of a session, by id, the oldest first: their command lines."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append((int(fields[19]), int(entry.name), words))
    return {pid: words for _, pid, words in sorted(found)}


class Service:
    """A process that a supervisor keeps running, as systemd with Restart=always would.

    Args:
        name: Of its log file.
        command: What to run.
        folder: Its working folder, its FLWR_HOME, and where the log lies.
        env: Put on top of the environment.
        restart_s: Seconds until it is started again after it ended; None: it is not.
    """

    def __init__(
        self, name: str, command: Sequence[object], folder: Path, env: dict[str, str], restart_s: float | None = None
    ) -> None:
        self.name, self.restart_s = name, restart_s
        self.command = [str(word) for word in command]
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.env = folder, env | {"FLWR_HOME": str(folder / "flwr")}
        self.log_path = folder / f"{name}.log"
        self.exit_codes: list[int] = []
        self._sessions: list[int] = []
        self._ended = threading.Event()
        self._start()
        self._supervisor = threading.Thread(target=self._supervise, daemon=True)
        self._supervisor.start()

    def _start(self) -> None:
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, cwd=self.folder, env=self.env, stdout=log, stderr=log, start_new_session=True
            )
        self._sessions.append(self.process.pid)

    def _supervise(self) -> None:
        while True:
            self.exit_codes.append(self.process.wait())
            if self.restart_s is None or self._ended.wait(self.restart_s):
                return
            self._start()

    def count(self, text: str) -> int:
        """How often the log says something."""
        return self.log.count(text)

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def children(self, word: str) -> list[int]:
        """Ids of the processes that this one started, directly or not, whose command line has a word."""
        return [pid for session in self._sessions for pid, words in processes(session).items() if word in words]

    def kill(self) -> None:
        """End it as a power cut would, with all that it started."""
        for session in self._sessions:
            for pid in processes(session):
                _signal(pid, signal.SIGKILL)

    def stop(self) -> None:
        """Ask it to end, and see to it."""
        self._ended.set()
        _signal(self.process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(8)
        self.kill()
        self._supervisor.join(5)


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


class Deployment:
    """A federation; the last of its devices, or the last few, may be told to misbehave.

    Each device reaches the SuperLink through a :class:`relay.Relay`, and has a part of the demo world's data as well as
    a file of its own. ``node_settings`` are keyword arguments of :meth:`start_node` by device. What ``num_tampered``
    devices are told is in a file for each: :meth:`tamper_file_of`.
    """

    def __init__(
        self,
        folder: Path,
        data_files: Sequence[Path],
        node_settings: Mapping[int, dict[str, Any]] | None = None,
        num_tampered: int = 1,
    ) -> None:
        self.folder, self.port, self.num_tampered = folder, free_port(), num_tampered
        self.certs = make_certs(folder / "certs", num_nodes=len(data_files) + 1).folder
        self.env = os.environ | {
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "FEDPT_HOME": str(folder / "fedpt"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        # Where coverage or pytest point Python at the checkout, that would be what runs.
        self.env.pop("PYTHONPATH", None)
        self.services: list[Service] = []
        self.relays: list[Relay] = []
        self.nodes: list[Service] = []
        self.app = self._copy_app()
        self.cli_home = self.connection("cli", self.certs / "ca.crt")
        self.tamper_file = self.tamper_file_of(len(data_files) - 1)
        try:
            self._start_all(data_files, node_settings or {})
        except BaseException:  # nobody has it yet who could stop it
            self.stop()
            raise

    def _start_all(self, data_files: Sequence[Path], node_settings: Mapping[int, dict[str, Any]]) -> None:
        self.superlink = self.start_superlink()
        self.executor = self.start_executor()
        for number, data_file in enumerate(data_files):
            self.register(number)
            self.relays.append(Relay(self.certs, self.port))
            settings = node_settings.get(number, {})
            self.nodes.append(
                self.start_node(number, data_file, port=self.relays[-1].port, num_nodes=len(data_files), **settings)
            )
        wait_until(lambda: self.online() == len(data_files), 90, "all nodes are online")

    def _copy_app(self) -> Path:
        target = self.folder / "app"
        target.mkdir()
        for part in APP_FILES:
            if (ROOT / part).is_dir():
                shutil.copytree(ROOT / part, target / part, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / part, target / part)
        return target

    def tamper_file_of(self, number: int) -> Path:
        return self.folder / f"tamper-{number}"

    # --- the processes --------------------------------------------------------------------------------------------

    def start(self, name: str, command: Sequence[object], restart_s: float | None = 2.0, **env: str) -> Service:
        service = Service(name, command, self.folder / name, self.env | env, restart_s)
        self.services.append(service)
        return service

    def start_superlink(self) -> Service:
        command = [
            "flower-superlink", "--host", "127.0.0.1", "--port", self.port,
            "--ssl-ca-certfile", self.certs / "ca.crt",
            "--ssl-certfile", self.certs / "server.pem",
            "--ssl-keyfile", self.certs / "server.key",
            "--enable-supernode-auth", "--database", self.folder / "superlink.db", "--isolation", "process",
            "--superexec-auth-secret-file", self.certs / "executor.secret",
        ]  # fmt: skip
        superlink = self.start("superlink", command)

        def answers() -> bool:
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", self.port)) == 0

        wait_until(answers, 60, "the SuperLink answers")
        return superlink

    def start_executor(self) -> Service:
        command = [
            "flower-superexec", "--root-certificates", self.certs / "ca.crt",
            "--runtime-api-address", f"127.0.0.1:{self.port}",
            "--superexec-auth-secret-file", self.certs / "executor.secret",
        ]  # fmt: skip
        return self.start("executor", command)

    def start_node(
        self,
        number: int,
        data_file: Path,
        *,
        port: int,
        num_nodes: int,
        name: str = "",
        key: Path | str | None = None,
        tls: Sequence[object] | None = None,
        restart_s: float | None = 2.0,
        limits: str = "",
        max_data_mb: int = 0,
    ) -> Service:
        """A SuperNode that starts its ClientApps itself. The last ones of the federation may be told to misbehave.

        ``limits`` goes into its node config; ``max_data_mb`` is what the system lets each of its processes allocate.
        """
        config = f'partition-id={number} num-partitions={num_nodes} data-path="{data_file}" {limits}'
        command = [
            *(("prlimit", f"--data={max_data_mb * 10**6}") if max_data_mb else ()),
            "flower-supernode", "--superlink", f"localhost:{port}", "--port", free_port(), "--node-config", config,
            *(() if key == "" else ("--auth-supernode-private-key", key or self.key(number))),
            *(("--root-certificates", self.certs / "ca.crt") if tls is None else tls),
        ]  # fmt: skip
        env = {}
        if num_nodes - self.num_tampered <= number < num_nodes:
            env = {"PYTHONPATH": str(ROOT / "tests/tampered"), "TAMPER_FILE": str(self.tamper_file_of(number))}
        return self.start(name or f"node-{number}", command, restart_s, **env)

    def stop(self) -> None:
        for service in reversed(self.services):
            service.stop()
        for relay in self.relays:
            relay.stop()

    # --- flwr -----------------------------------------------------------------------------------------------------

    def key(self, number: int) -> Path:
        return self.certs / "nodes" / f"node-{number + 1}"

    def connection(self, name: str, ca: Path | None) -> Path:
        """A FLWR_HOME whose config.toml knows this SuperLink."""
        home = self.folder / name
        home.mkdir()
        trust = "insecure = true" if ca is None else f'root-certificates = "{ca}"'
        text = f'[superlink]\ndefault = "prod"\n\n[superlink.prod]\naddress = "127.0.0.1:{self.port}"\n{trust}\n'
        (home / "config.toml").write_text(text)
        return home

    def try_flwr(self, *arguments: object, home: Path | None = None) -> subprocess.CompletedProcess[str]:
        command = [BIN / "flwr", *map(str, arguments)]
        env = self.env | {"FLWR_HOME": str(home or self.cli_home)}
        return subprocess.run(command, cwd=self.app, env=env, capture_output=True, text=True, timeout=120, check=False)

    def flwr(self, *arguments: object) -> str:
        result = self.try_flwr(*arguments)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    def register(self, number: int) -> None:
        self.flwr("supernode", "register", f"{self.key(number)}.pub", "prod", "--name", f"node-{number}")

    def online(self) -> int:
        nodes = json.loads(self.flwr("supernode", "list", "prod", "--format", "json"))["nodes"]
        return sum(node["status"] == "online" for node in nodes)

    def submit(self, run_config: dict) -> str:
        overrides = " ".join(f"{key}={json.dumps(value)}" for key, value in (QUICK | run_config).items())
        return str(json.loads(self.flwr("run", ".", "prod", "--format", "json", "-c", overrides))["run-id"])

    def entry(self, run_id: str) -> dict:
        return json.loads(self.flwr("list", "prod", "--run-id", run_id, "--format", "json"))["runs"][0]

    def log(self, run_id: str) -> str:
        return self.flwr("log", run_id, "prod", "--show")

    def is_finished(self, run_id: str) -> bool:
        """Looked up in the SuperLink's database: each `flwr list` is a process that imports half a second long."""
        signed = int(run_id) - (2**64 if int(run_id) >= 2**63 else 0)
        with contextlib.closing(sqlite3.connect(f"file:{self.folder / 'superlink.db'}?mode=ro", uri=True)) as database:
            rows = database.execute("SELECT finished_at FROM task WHERE run_id = ?", (signed,)).fetchall()
        return bool(rows) and all(finished is not None for (finished,) in rows)

    def wait(self, run_id: str, timeout_s: float = 240) -> dict:
        """Wait for a run's end; Flower's entry of it."""
        wait_until(lambda: self.is_finished(run_id), timeout_s, f"run {run_id} ends")
        return self.entry(run_id)

    def complete(self, run_id: str, timeout_s: float = 240) -> Path:
        """Wait for a run's good end; the run's folder."""
        entry = self.wait(run_id, timeout_s)
        assert entry["status"] == "finished:completed", self.log(run_id)
        return self.run_folder(run_id)

    def run(self, run_config: dict) -> Path:
        return self.complete(self.submit(run_config))

    def run_folder(self, run_id: str) -> Path:
        found = wait_until(
            lambda: list((self.folder / "fedpt" / "runs").glob(f"*-{run_id}")), 60, f"run {run_id} has a folder"
        )
        return found[0]

    def training(self, node: Service, number: int = 1, timeout_s: float = 90) -> int:
        """Wait until a node trains for the ``number``-th time in its log; its ClientApp's process id."""
        line = "Receiving: train message"
        wait_until(lambda: node.count(line) >= number, timeout_s, f"{node.name} gets {number} train messages")

        def clients() -> list[int]:
            # Each message has a process of its own, and the one before may still be ending.
            begun = node.count("Start `flwr-clientapp` process") >= node.count("Receiving: ")
            return node.children("flwr-clientapp") if begun else []

        return wait_until(clients, 60, f"{node.name} runs its ClientApp")[-1]
