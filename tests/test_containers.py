"""The compose project for real: built, brought up, asked, disturbed, taken down. Needs a container engine.

Where builds need the host's network: ``BUILD_NETWORK=host pytest -m containers``.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import time
from pathlib import Path

import httpx
import openai
import pytest

pytestmark = [pytest.mark.containers, pytest.mark.timeout(2400)]

ROOT = Path(__file__).parents[1]
NUM_ROUNDS = 4
QUICK = (
    "round-timeout-s=240.0 "  # in place of the compose file's
    "train.max-steps=2 train.batch-size=4 scoring.num-items=8 scoring.round-items=2 scoring.max-new-tokens=6 "
    "scoring.few-shot=2 distillation.final-steps=3 distillation.final-num-prompts=6"
)
ROLES = ["superlink", "serverapp", "submit", "serve"]
ROLES += [f"{half}-{n}" for half in ("supernode", "clientapp") for n in (1, 2, 3)]
PROMPT = "> can you check the glow for me?\n[Prajelk]\n"


def docker(*arguments, check=True):
    result = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0 or not check, result.stdout + result.stderr
    return result.stdout + result.stderr


def compose_command():
    """The compose that is there, with an engine that answers; or why there is none."""
    if not shutil.which("docker") or subprocess.run(["docker", "info"], capture_output=True, check=False).returncode:
        pytest.skip("no container engine answers here")
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]):
            said = subprocess.run([*command, "version"], capture_output=True, text=True, check=False)
            if said.returncode == 0:
                return command
    pytest.skip("neither docker compose nor docker-compose is here")


class Project:
    """The compose project under a name, an image and a port of its own."""

    def __init__(self) -> None:
        self.command = compose_command()
        self.name = f"fedpt-test-{os.getpid()}"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.env = os.environ | {
            "COMPOSE_PROJECT_NAME": self.name,
            "FEDPT_IMAGE": f"{self.name}-image",
            "FEDPT_PORT": str(self.port),
            "FEDPT_ROUNDS": str(NUM_ROUNDS),
            "FEDPT_RUN_CONFIG": QUICK,
        }
        self.env.pop("FEDPT_API_KEY", None)

    def __call__(self, *arguments, check=True):
        command = [*self.command, "-f", str(ROOT / "docker" / "compose.yaml"), *arguments]
        result = subprocess.run(command, env=self.env, capture_output=True, text=True, check=False)
        assert result.returncode == 0 or not check, (result.stdout + result.stderr)[-4000:]
        return result.stdout + result.stderr

    def container(self, service):
        return docker(
            "ps",
            "-aq",
            "--filter",
            f"label=com.docker.compose.project={self.name}",
            "--filter",
            f"label=com.docker.compose.service={service}",
        ).strip()

    def state(self, service):
        return json.loads(docker("inspect", self.container(service)))[0]["State"]

    def exec(self, service, *command):
        return subprocess.run(
            ["docker", "exec", self.container(service), *command], capture_output=True, text=True, check=False
        )

    def rest(self):
        """What is there of this project."""
        mine = ("--filter", f"label=com.docker.compose.project={self.name}")
        found = [
            docker(kind, "ls", "-q", *all_, *mine) for kind, *all_ in (("container", "-a"), ("volume",), ("network",))
        ]
        return "".join([*found, docker("image", "ls", "-q", self.env["FEDPT_IMAGE"])]).split()


@pytest.fixture(scope="module")
def project():
    project = Project()
    try:
        project("up", "--build", "--detach")
        yield project
    finally:
        project("down", "--volumes", "--rmi", "all", check=False)


@pytest.fixture(scope="module")
def rounds(project):
    """The federation from its first round to its end, watched by the official client: rounds as they were served.

    After the first round all containers are killed at once and started again, as by a power cut.
    """
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{project.port}/v1", api_key="none", max_retries=0)
    seen, disturbed, deadline = [], False, time.monotonic() + 1500
    while True:
        ended = not project.state("submit")["Running"]
        try:
            answer = client.completions.create(model="proxy", prompt=PROMPT, max_tokens=4, temperature=0)
            number = int(re.search(r"\.r(\d{4})\.", answer.system_fingerprint)[1])
            if number not in seen[-1:]:
                seen.append(number)
        except openai.APIError:  # not there yet, or just being restarted
            assert not ended or not seen, "the service is gone"
        if seen and not disturbed:
            disturbed = True
            everything = [project.container(service) for service in ROLES]
            docker("kill", *everything)
            docker("start", *everything)
        if ended and (NUM_ROUNDS in seen or project.state("submit")["ExitCode"]):
            break
        assert time.monotonic() < deadline, project("logs", "--tail=20")
        time.sleep(0.5)
    return seen


def test_the_federation_completes_and_every_round_is_served_as_it_comes(project, rounds):
    log = docker("logs", project.container("submit"))
    assert project.state("submit")["ExitCode"] == 0, log
    assert "3 of 3 devices are online" in log
    assert "was cut off" in log
    assert "resuming 20" in log  # the power cut
    assert rounds == sorted(set(rounds))
    assert rounds[-1] == NUM_ROUNDS
    assert len(rounds) >= 2
    shards = docker("logs", project.container("shards"))
    assert [int(number) for number in re.findall(r"device \d: (\d+) examples", shards)] == [720, 720, 480]
    assert re.findall(r"device +(\d) +(\d+) examples", log)[:3] == [("1", "720"), ("2", "720"), ("3", "480")]


def test_curl_and_the_page_are_answered(project, rounds):
    with httpx.Client(base_url=f"http://127.0.0.1:{project.port}") as http:
        assert http.get("/health").status_code == 200
        assert http.get("/info").json()["round"] == NUM_ROUNDS
        assert "<html" in http.get("/").text


def test_nobody_is_root_and_nothing_but_the_service_is_published(project, rounds):
    for service in ("superlink", "serverapp", "supernode-1", "clientapp-1", "serve"):
        assert project.exec(service, "id", "-u").stdout.strip() == "10001"
        ports = json.loads(docker("inspect", project.container(service)))[0]["NetworkSettings"]["Ports"]
        published = [binding for bindings in ports.values() for binding in bindings or []]
        expected = [{"HostIp": "127.0.0.1", "HostPort": str(project.port)}] if service == "serve" else []
        assert published == expected


def test_data_and_keys_are_only_where_they_belong(project, rounds):
    assert project.exec("clientapp-1", "cat", "/data/own/train.jsonl").stdout.count("\n") == 720
    for service in ("superlink", "serverapp", "supernode-1", "serve"):
        assert project.exec(service, "find", "/data", "-name", "*.jsonl").stdout == ""
    for service in ("clientapp-1", "serve"):
        assert project.exec(service, "find", "/keys", "-type", "f").stdout == ""
    assert project.exec("supernode-1", "find", "/keys", "-type", "f").stdout == "/keys/node/key\n"
    keys = [project.exec(f"supernode-{n}", "cat", "/keys/node/key").stdout for n in (1, 2, 3)]
    assert len(set(keys)) == 3
    # A device's executor reaches its own SuperNode and nothing else.
    health = ("python", "/app/docker/health.py")
    assert project.exec("clientapp-1", *health, "supernode-1:9094").returncode == 0
    for address in ("superlink:8000", "supernode-2:9094"):
        assert project.exec("clientapp-1", *health, address).returncode != 0


def test_a_second_up_starts_no_second_run(project, rounds):
    project("up", "--detach")
    while project.state("submit")["Running"]:
        time.sleep(0.5)
    assert "has completed" in docker("logs", "--tail=3", project.container("submit"))
    assert project.state("submit")["ExitCode"] == 0


def test_down_leaves_nothing(project, rounds):
    """The last one, on purpose."""
    assert project.rest()
    project("down", "--volumes", "--rmi", "all")
    assert project.rest() == []
