"""A thousand requests of all kinds at a service whose model changes every second; a third of them go away midway."""

import asyncio
import json
import os
import random
import subprocess
import threading
from pathlib import Path

import httpx
import pytest
from serving import generated, make_run, serving, wait_for_metric
from transformers import AutoTokenizer

from fedpt_flwr.proxy import ProxyModel
from fedpt_flwr.runs import replace_link

pytestmark = pytest.mark.slow

PROMPT = "> can you check the glow for me?\n[Prajelk]\n"
NUM_REQUESTS, NUM_CLIENTS, ROUNDS = 1000, 64, (1, 2, 3)

KINDS = [
    {"prompt": PROMPT, "temperature": 0},
    {"prompt": PROMPT, "temperature": 0, "alpha": 0.5},
    {"prompt": "> what is the price?\n", "temperature": 0, "alpha": 1.5, "plausibility": 0.1},
    {"prompt": "hello", "temperature": 0, "model": "large"},
    {"prompt": "hello", "temperature": 0, "model": "tuned"},
    {"prompt": "a longer text that is no question at all, " * 3, "temperature": 0, "model": "untuned"},
    {"prompt": PROMPT, "temperature": 1.0, "seed": 5},
    {"prompt": "word " * 20, "temperature": 0.7, "seed": 6, "top_p": 0.9},
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs"))


def expected_texts(run):
    """What each round's proxy writes for each kind of request."""
    tokenizer = AutoTokenizer.from_pretrained(run / "proxy")
    texts = {}
    for server_round in ROUNDS:
        proxy = ProxyModel.from_pretrained(run / f"rounds/{server_round:04d}/proxy")
        for number, kind in enumerate(KINDS):
            texts[server_round, number] = generated(proxy, tokenizer, max_tokens=40, **kind)[1]
    return texts


def resident_mb(process):
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_nothing_is_lost_or_mixed_up_while_versions_change(run, tmp_path):
    expected = expected_texts(run)
    by_round = {tuple(expected[server_round, kind] for kind in range(len(KINDS))) for server_round in ROUNDS}
    assert len(by_round) == len(ROUNDS)  # or a mix-up would not show
    copy = tmp_path / run.name
    subprocess.run(["cp", "-a", run, copy], check=True)
    plan = random.Random(0)
    requests = [(plan.randrange(len(KINDS)), plan.random() < 1 / 3, plan.random() < 0.5) for _ in range(NUM_REQUESTS)]
    outcomes: list[str] = []
    versions: set[int] = set()
    memory: list[float] = []

    def check(kind, fingerprint, text, *, whole):
        server_round = int(fingerprint.split(".r")[1][:4])
        versions.add(server_round)
        wanted = expected[server_round, kind]
        assert text == wanted if whole else wanted.startswith(text), (kind, server_round, wanted)

    async def stream(http, kind, body, goes_away):
        text, fingerprint, pieces = "", "", 0
        async with http.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
            assert response.status_code == 200
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                assert "error" not in event, event
                assert event["system_fingerprint"] == (fingerprint or event["system_fingerprint"])
                fingerprint = event["system_fingerprint"]
                text += event["choices"][0]["text"]
                pieces += 1
                if goes_away and pieces == 3:
                    check(kind, fingerprint, text, whole=False)
                    return "gone"
        check(kind, fingerprint, text, whole=True)
        return "whole"

    async def ask(http, kind, goes_away, streams):
        body = {"model": "proxy", "max_tokens": 40, **KINDS[kind]}
        if goes_away or streams:
            return await stream(http, kind, body, goes_away)
        answer = (await http.post("/v1/completions", json=body)).json()
        check(kind, answer["system_fingerprint"], answer["choices"][0]["text"], whole=True)
        return "whole"

    async def ask_all(service):
        waiting = list(enumerate(requests))
        limits = httpx.Limits(max_connections=NUM_CLIENTS)
        async with httpx.AsyncClient(base_url=service.url, timeout=300, limits=limits) as http:

            async def client():
                while waiting:
                    number, (kind, goes_away, streams) = waiting.pop()
                    outcomes.append(await ask(http, kind, goes_away, streams))
                    if number % 50 == 0:
                        memory.append(resident_mb(service.process))

            await asyncio.gather(*(client() for _ in range(NUM_CLIENTS)))

    with serving(copy, "--poll-s", "0.2", "--slots", "24") as service:
        over = threading.Event()

        def swap():
            number = 0
            while not over.wait(1):
                number += 1
                replace_link(copy / "proxy", f"rounds/{ROUNDS[number % len(ROUNDS)]:04d}/proxy")

        swapping = threading.Thread(target=swap)
        swapping.start()
        try:
            asyncio.run(ask_all(service))
        finally:
            over.set()
            swapping.join()
        with httpx.Client(base_url=service.url) as http:
            wait_for_metric(http, "fedpt_slots_in_use", 0.0)
            wait_for_metric(http, "fedpt_queue_length", 0.0)
            metrics = http.get("/metrics").text
    assert len(outcomes) == NUM_REQUESTS
    assert outcomes.count("gone") > NUM_REQUESTS / 5  # some texts are too short to be left midway
    assert versions == set(ROUNDS)
    counts = [line for line in metrics.splitlines() if line.startswith('fedpt_requests_total{endpoint="/v1/comp')]
    assert sum(float(line.split()[-1]) for line in counts) == NUM_REQUESTS
    assert not any("internal" in line or '"500"' in line for line in counts), counts
    assert 'fedpt_version_swaps_total{outcome="failed"}' not in metrics
    # Flat: the last quarter needs what the second quarter needed.
    quarter = len(memory) // 4
    assert max(memory[-quarter:]) < max(memory[quarter : 2 * quarter]) + 40, memory
