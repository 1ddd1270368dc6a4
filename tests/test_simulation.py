"""`flwr run` for real: a background SuperLink, Ray, devices in other processes."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from federation import QUICK, federate, final_arrays

from fedpt_flwr.runs import find_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[1]
APP_FILES = ("pyproject.toml", "README.md", "LICENSE", "client_app.py", "server_app.py", "fedpt_flwr")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Flower:
    """`flwr` with a home, a SuperLink and a copy of the app of its own."""

    def __init__(self, home: Path) -> None:
        self.home, self.port = home, free_port()
        self.app = self.copy_app("app")
        self.env = os.environ | {
            "FLWR_HOME": str(home / "flwr"),
            "FEDPT_HOME": str(home / "fedpt"),
            "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(self.port),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_OFFLINE": "1",
        }
        # Where coverage or pytest point Python at the checkout, the copies would not be what runs.
        self.env.pop("PYTHONPATH", None)

    def copy_app(self, name: str) -> Path:
        folder = self.home / name
        for part in APP_FILES:
            source = ROOT / part
            ignore = shutil.ignore_patterns("__pycache__")
            if source.is_dir():
                shutil.copytree(source, folder / part, ignore=ignore)
            else:
                folder.mkdir(exist_ok=True)
                shutil.copy(source, folder / part)
        return folder

    def flwr(self, *arguments: str, app: Path | None = None) -> str:
        command = [str(Path(sys.executable).with_name("flwr")), *arguments]
        result = subprocess.run(
            command, cwd=app or self.app, env=self.env, capture_output=True, text=True, timeout=400, check=False
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout + result.stderr

    def run(self, num_devices: int, run_config: dict, *, app: Path | None = None) -> tuple[str, dict]:
        """Run to the end; the log and Flower's entry of the run."""
        overrides = " ".join(f"{key}={json.dumps(value)}" for key, value in (QUICK | run_config).items())
        federation = f"num-supernodes={num_devices} client-resources-num-cpus=1"
        log = self.flwr("run", ".", "--stream", "--federation-config", federation, "-c", overrides, app=app)
        run_id = re.search(r"Successfully started run (\d+)", log).group(1)
        return log, json.loads(self.flwr("list", "--run-id", run_id, "--format", "json"))["runs"][0]

    def stop(self) -> None:
        """End this SuperLink, and nobody else's, by its process id."""
        for process in Path("/proc").glob("[0-9]*"):
            try:
                words = (process / "cmdline").read_bytes().decode().split("\0")
            except OSError:
                continue
            if any("flower-superlink" in word for word in words) and str(self.port) in words:
                os.kill(int(process.name), signal.SIGTERM)
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)):
                    return
            time.sleep(0.2)


@pytest.fixture(scope="module")
def flower(tmp_path_factory):
    flower = Flower(tmp_path_factory.mktemp("flower"))
    yield flower
    flower.stop()


def test_a_simulation_completes_and_equals_the_same_run_in_one_process(flower, tmp_path):
    log, entry = flower.run(3, {})
    assert entry["status"] == "finished:completed"
    run = find_run(root=flower.home / "fedpt" / "runs")
    assert log.index(f"Run folder: {run}") < log.index("Shards: 3 devices") < log.index("Round 1: devices 0, 1, 2")
    assert "The proxy" in log
    assert json.loads((run / "results.json").read_text())["devices"] == 3
    alone = federate(tmp_path, 3)
    expected, got = final_arrays(alone), final_arrays(run)
    assert expected.keys() == got.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(values, got[name], err_msg=name)


def test_a_simulation_with_a_secure_sum_equals_the_same_run_in_one_process(flower, tmp_path):
    """Ray's workers answer four questions a round; what a device keeps between them is Flower's to bring."""
    settings = {"privacy.secure-sum": True, "min-devices": 4}
    log, entry = flower.run(4, settings)
    assert entry["status"] == "finished:completed"
    assert "Round 2: the sum of 4 of 4 devices is open; its means are exact to" in log
    expected = final_arrays(federate(tmp_path, 4, settings))
    got = final_arrays(find_run(root=flower.home / "fedpt" / "runs"))
    assert expected.keys() == got.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(values, got[name], err_msg=name)


def test_a_failing_run_says_why_is_marked_and_counts_as_failed(flower):
    log, entry = flower.run(2, {"data.train": "/no/such/file.jsonl"})
    assert entry["status"] == "finished:failed"
    assert "/no/such/file.jsonl" in log
    assert "FEDPT-RUN-FAILED: no device can take part: " in log


def test_devices_that_import_other_code_refuse_with_the_remedy(flower):
    other = flower.copy_app("other")
    with (other / "fedpt_flwr" / "training.py").open("a") as file:
        file.write("\n# changed\n")
    log, entry = flower.run(2, {}, app=other)
    assert entry["status"] == "finished:failed"
    assert "server and device must run the same code" in log
    assert "end the background flower-superlink process" in log
