"""How a real service starts, changes its model, lets people in and ends; each test has one of its own."""

import asyncio
import base64
import contextlib
import os
import re
import signal
import socket
import ssl
import subprocess
import sys

import httpx
import openai
import pytest
from deployment import wait_until
from serving import generated, make_run, serving, wait_for_metric
from transformers import AutoTokenizer

from fedpt_flwr.proxy import ProxyModel
from fedpt_flwr.runs import replace_link
from fedpt_flwr.service.client import ServiceClient

pytestmark = pytest.mark.slow

PROMPT = "> can you check the glow for me?\n[Prajelk]\n"
GOOD = {"prompt": "hello", "max_tokens": 2, "temperature": 0}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def proxy(run):
    return ProxyModel.from_pretrained(run)


@pytest.fixture(scope="module")
def tokenizer(run):
    return AutoTokenizer.from_pretrained(run / "proxy")


def test_a_key_is_needed_for_all_but_health(run):
    with serving(run, environment={"FEDPT_API_KEY": "first second"}) as service:
        with httpx.Client(base_url=service.url) as http:
            assert http.get("/health").status_code == 200
            for path in ("/", "/info", "/metrics", "/v1/models", "/openapi.json", "/nothing"):
                response = http.get(path)
                assert response.status_code == 401
                assert response.json()["error"]["code"] == "invalid_api_key"
            assert http.get("/").headers["www-authenticate"].startswith("Basic")
            for key in ("first", "second"):
                assert http.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 200
            password = base64.b64encode(b"anybody:second").decode()
            assert http.get("/", headers={"authorization": f"Basic {password}"}).status_code == 200
            for wrong in ("Bearer third", "Bearer", "Basic first", "Basic !!", "first", "Bearer first second"):
                assert http.get("/v1/models", headers={"authorization": wrong}).status_code == 401
            assert http.post("/v1/completions", json=GOOD).status_code == 401
        client = openai.OpenAI(base_url=f"{service.url}/v1", api_key="wrong", max_retries=0)
        with client, pytest.raises(openai.AuthenticationError):
            client.models.list()
        with contextlib.closing(ServiceClient(service.url, "second")) as ours:
            assert "".join(ours.stream({"prompt": PROMPT, "max_tokens": 3, "temperature": 0}))


def test_a_full_queue_says_when_to_come_again(run):
    with serving(run, "--slots", "1", "--queue", "1") as service:
        body = {"prompt": "hello", "max_tokens": 200, "temperature": 1, "model": "large"}

        async def ask_all():
            async with httpx.AsyncClient(base_url=service.url, timeout=60) as http:
                return await asyncio.gather(*(http.post("/v1/completions", json=body) for _ in range(12)))

        responses = asyncio.run(ask_all())
        refused = [response for response in responses if response.status_code == 429]
        assert refused
        assert {response.status_code for response in responses} == {200, 429}
        assert all(int(response.headers["retry-after"]) >= 1 for response in refused)
        # The official client tries again by itself.
        with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none") as client:
            assert client.completions.create(model="large", prompt="hello", max_tokens=3)


def test_a_deadline_is_an_error_that_is_not_retried(run):
    with serving(run, "--request-timeout-s", "0.001") as service, httpx.Client(base_url=service.url) as http:
        long = GOOD | {"max_tokens": 200, "temperature": 2, "alpha": 0, "n": 8}
        response = http.post("/v1/completions", json=long)
        assert response.status_code == 408
        assert response.headers["x-should-retry"] == "false"
        streamed = http.post("/v1/completions", json=long | {"stream": True})
        assert '"code":"deadline"' in streamed.text
        assert streamed.text.endswith("data: [DONE]\n\n")


def test_a_new_round_is_picked_up_and_a_damaged_one_is_not(run, tmp_path, proxy, tokenizer):
    copy = tmp_path / run.name
    subprocess.run(["cp", "-a", run, copy], check=True)
    replace_link(copy / "proxy", "rounds/0001/proxy")
    with serving(copy, "--poll-s", "0.05") as service, httpx.Client(base_url=service.url, timeout=60) as http:
        assert http.get("/info").json()["round"] == 1
        asked = GOOD | {"prompt": PROMPT, "max_tokens": 20, "logprobs": 0}
        first = http.post("/v1/completions", json=asked).json()
        assert ".r0001." in first["system_fingerprint"]
        weights = copy / "rounds/0002/proxy/tuned/model.safetensors"
        whole = weights.read_bytes()
        weights.write_bytes(whole[: len(whole) // 2])
        replace_link(copy / "proxy", "rounds/0002/proxy")
        wait_for_metric(http, 'fedpt_version_swaps_total{outcome="failed"}', 1.0)
        assert http.get("/info").json()["round"] == 1
        replace_link(copy / "proxy", "rounds/0003/proxy")
        wait_for_metric(http, 'fedpt_version_swaps_total{outcome="ok"}', 1.0)
        last = http.post("/v1/completions", json=asked).json()
        assert ".r0003." in last["system_fingerprint"]
        assert last["choices"][0]["text"] == generated(proxy, tokenizer, PROMPT, max_tokens=20)[1]
        assert first["choices"][0]["logprobs"] != last["choices"][0]["logprobs"]


def test_follow_goes_over_to_a_newer_run(run, tmp_path):
    for name in ("20260101T000000Z-1", "20260102T000000Z-2"):
        subprocess.run(["cp", "-a", run, tmp_path / name], check=True)
    replace_link(tmp_path / "latest", "20260101T000000Z-1")
    with (
        serving(tmp_path / "20260101T000000Z-1", "--follow", "--poll-s", "0.05") as service,
        httpx.Client(base_url=service.url) as http,
    ):
        assert http.get("/info").json()["run"] == "20260101T000000Z-1"
        replace_link(tmp_path / "latest", "20260102T000000Z-2")
        wait_for_metric(http, 'fedpt_version_swaps_total{outcome="ok"}', 1.0)
        assert http.get("/info").json()["run"] == "20260102T000000Z-2"


@contextlib.contextmanager
def begun_stream(service, **settings):
    """The lines behind the first one of a stream that goes on for some time."""
    body = {"prompt": "hello", "temperature": 1, "stream": True, "alpha": 0, "seed": 1} | settings
    with (
        httpx.Client(base_url=service.url, timeout=60) as http,
        http.stream("POST", "/v1/completions", json=body) as stream,
    ):
        lines = stream.iter_lines()
        next(lines)
        yield lines


def test_sigterm_finishes_what_runs_and_ends_in_peace(run):
    with serving(run, "--grace-s", "30") as service:
        with begun_stream(service, max_tokens=200, n=4) as lines:
            os.kill(service.process.pid, signal.SIGTERM)
            rest = list(lines)
        assert rest[-2] == "data: [DONE]"
        assert sum('"finish_reason":"' in line for line in rest) == 4
        assert service.process.wait(30) == 0
    assert not any("Traceback" in line for line in service.log)


def test_after_the_grace_period_streams_end_with_an_error(run):
    with serving(run, "--grace-s", "0") as service:
        with begun_stream(service, max_tokens=200, n=8) as lines:
            os.kill(service.process.pid, signal.SIGTERM)
            rest = list(lines)
        assert any('"code":"stopping"' in line for line in rest)
        assert rest[-2] == "data: [DONE]"
        assert service.process.wait(30) == 0


def test_a_second_ctrl_c_ends_at_once_and_without_a_traceback(run):
    with serving(run, "--grace-s", "300") as service, begun_stream(service, max_tokens=400, n=8):
        os.kill(service.process.pid, signal.SIGINT)
        wait_until(lambda: http_of_others_is_refused(service.url), 30, "nobody else is let in")
        os.kill(service.process.pid, signal.SIGINT)
        service.process.wait(60)
    assert not any("raceback" in line or '"level": "error"' in line for line in service.log), service.log


def http_of_others_is_refused(url):
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 503
    except httpx.TransportError:
        return True


def test_tls(run, tmp_path):
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*command, *names], check=True, capture_output=True)
    with serving(run, "--ssl-certfile", str(certificate), "--ssl-keyfile", str(key)) as service:
        assert service.url.startswith("https://")
        context = ssl.create_default_context(cafile=str(certificate))
        assert httpx.get(f"{service.url}/health", verify=context).json()["status"] == "ready"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing", "nothing is not a run in"),
        ("without a proxy", "has no model"),
        ("damaged", "cannot be loaded .*not a valid JSON file"),
        ("taken port", "cannot listen at .*choose another --port"),
        ("bad alpha", "alpha must be a finite number, got nan"),
        ("key of nothing", "an API key must be ASCII text and not empty"),
    ],
)
def test_what_cannot_be_served_is_refused_by_a_sentence(run, tmp_path, name, words):
    copy = tmp_path / run.name
    subprocess.run(["cp", "-a", run, copy], check=True)
    options = ["--port", "0"]
    taken = socket.create_server(("127.0.0.1", 0))
    if name == "missing":
        copy = tmp_path / "nothing"
    elif name == "without a proxy":
        (copy / "proxy").unlink()
    elif name == "damaged":
        (copy / "rounds/0003/proxy/config.json").write_text("{")
    elif name == "taken port":
        options = ["--port", str(taken.getsockname()[1])]
    elif name == "bad alpha":
        options += ["--alpha", "nan"]
    else:
        options += ["--api-key", " "]
    ended = subprocess.run(
        [sys.executable, "-m", "fedpt_flwr.cli", "serve", str(copy), *options],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    taken.close()
    assert ended.returncode == 1
    assert re.search(f"fedpt: .*{words}", ended.stderr)
    assert "Traceback" not in ended.stderr
