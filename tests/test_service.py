"""A real service in a process of its own, asked by the official OpenAI client and by whoever means no good."""

import asyncio
import contextlib
import gzip
import json
import socket
import subprocess
import sys

import httpx
import openai
import pytest
import torch
from deployment import wait_until
from serving import generated, make_run, serving, wait_for_metric
from transformers import AutoTokenizer

from fedpt_flwr.proxy import ProxyModel
from fedpt_flwr.runs import read_json

PROMPT = "> can you check the glow for me?\n[Prajelk]\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def service(run):
    with serving(run, "--slots", "8", "--queue", "200") as running:
        yield running


@pytest.fixture(scope="module")
def proxy(run):
    return ProxyModel.from_pretrained(run)


@pytest.fixture(scope="module")
def tokenizer(run):
    return AutoTokenizer.from_pretrained(run / "proxy")


@pytest.fixture
def client(service):
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as connected:
        yield connected


@pytest.fixture
def http(service):
    with httpx.Client(base_url=service.url, timeout=60) as connected:
        yield connected


def prompts(run):
    """Prompts of many lengths, some of them the run's own."""
    questions = [json.loads(line)["prompt"] for line in (run / "answers.jsonl").read_text().splitlines()[:12]]
    return [PROMPT, "hello", "a longer text that is no question at all, " * 3, *questions]


# --- the official client ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0},
        {"temperature": 0, "alpha": 0.4, "plausibility": 0.1},
        {"temperature": 0, "model": "large"},
        {"temperature": 0, "model": "tuned"},
        {"temperature": 0, "model": "untuned"},
        {"temperature": 1.0, "seed": 3},
        {"temperature": 0.8, "seed": 4, "top_p": 0.7, "alpha": 1.5},
    ],
    ids=str,
)
def test_a_completion_is_what_generate_writes(client, proxy, tokenizer, settings, stream):
    settings = {"model": "proxy", **settings}
    ids, text = generated(proxy, tokenizer, PROMPT, max_tokens=20, **settings)
    extra = {name: settings.pop(name) for name in ("alpha", "plausibility") if name in settings}
    answer = client.completions.create(prompt=PROMPT, max_tokens=20, stream=stream, extra_body=extra, **settings)
    if stream:
        chunks = list(answer)
        assert "".join(chunk.choices[0].text for chunk in chunks) == text
        assert chunks[-1].choices[0].finish_reason in ("stop", "length")
        assert all(chunk.choices[0].finish_reason is None for chunk in chunks[:-1])
        return
    assert answer.choices[0].text == text
    assert answer.usage.completion_tokens == len(ids)
    assert answer.usage.prompt_tokens == len(tokenizer(PROMPT)["input_ids"])
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + len(ids)
    ended = ids[-1] in torch.tensor(proxy.generation_config.eos_token_id)
    assert answer.choices[0].finish_reason == ("stop" if ended else "length")


def test_chat_uses_the_template_of_the_run(client, proxy, tokenizer):
    _, text = generated(proxy, tokenizer, PROMPT, max_tokens=24)
    content = json.dumps({"request": "can you check the glow for me?", "unit": "Prajelk"})
    messages = [{"role": "user", "content": content}]
    answer = client.chat.completions.create(model="proxy", messages=messages, temperature=0, max_completion_tokens=24)
    assert answer.choices[0].message.content == text
    assert answer.choices[0].message.role == "assistant"
    streamed = client.chat.completions.create(
        model="proxy",
        messages=[{"role": "user", "content": PROMPT.rstrip("\n")}],
        temperature=0,
        max_tokens=24,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(streamed)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens


def test_thirty_two_different_requests_at_once_are_what_generate_writes(service, run, proxy, tokenizer):
    texts = prompts(run)
    asked = []
    for number in range(32):
        settings = {"model": ("proxy", "proxy", "large", "tuned")[number % 4], "max_tokens": 4 + number % 23}
        if number % 3 == 1 and settings["model"] == "proxy":
            settings |= {"temperature": 0.9, "seed": number}
        if number % 5 == 1 and settings["model"] == "proxy":
            settings |= {"alpha": number / 20, "plausibility": 0.05}
        asked.append((texts[number % len(texts)], settings))

    async def ask(client, number):
        prompt, settings = asked[number]
        settings = {"temperature": 0} | settings
        extra = {name: settings.pop(name) for name in ("alpha", "plausibility") if name in settings}
        answer = await client.completions.create(prompt=prompt, stream=number % 2 == 0, extra_body=extra, **settings)
        if number % 2:
            return answer.choices[0].text
        return "".join([chunk.choices[0].text async for chunk in answer])

    async def ask_all():
        async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, number) for number in range(32)))

    expected = [generated(proxy, tokenizer, prompt, **settings)[1] for prompt, settings in asked]
    assert asyncio.run(ask_all()) == expected


def test_prompts_of_all_forms_and_several_choices(client, proxy, tokenizer):
    ids = tokenizer(PROMPT)["input_ids"]
    _, text = generated(proxy, tokenizer, PROMPT)
    for prompt in (ids, [PROMPT, "hello"], [ids, tokenizer("hello")["input_ids"]]):
        answer = client.completions.create(model="proxy", prompt=prompt, temperature=0)
        assert answer.choices[0].text == text
    assert answer.choices[1].text == generated(proxy, tokenizer, "hello")[1]
    assert [choice.index for choice in answer.choices] == [0, 1]
    answer = client.completions.create(model="proxy", prompt=PROMPT, temperature=1, n=3, seed=7)
    expected = [generated(proxy, tokenizer, PROMPT, temperature=1.0, seed=7 + index)[1] for index in range(3)]
    assert [choice.text for choice in answer.choices] == expected


def test_stop_strings_and_echo(client, proxy, tokenizer):
    _, text = generated(proxy, tokenizer, PROMPT, max_tokens=24)
    stop = text[5:8]
    for stream in (False, True):
        answer = client.completions.create(
            model="proxy", prompt=PROMPT, temperature=0, max_tokens=24, stop=[stop, "never"], echo=True, stream=stream
        )
        got = "".join(chunk.choices[0].text for chunk in answer) if stream else answer.choices[0].text
        assert got == PROMPT + text[: text.index(stop)]


def test_log_probabilities_are_those_of_the_proxy(client, proxy, tokenizer):
    ids, _ = generated(proxy, tokenizer, PROMPT, max_tokens=6)
    prompt_ids = tokenizer(PROMPT)["input_ids"]
    with torch.no_grad():
        logprobs = proxy(torch.tensor([prompt_ids + ids])).logits[0].log_softmax(-1)
    wanted = [logprobs[len(prompt_ids) - 1 + place, token].item() for place, token in enumerate(ids)]
    legacy = client.completions.create(model="proxy", prompt=PROMPT, temperature=0, max_tokens=6, logprobs=2)
    assert legacy.choices[0].logprobs.token_logprobs == pytest.approx(wanted, abs=1e-4)
    assert all(len(top) == 2 for top in legacy.choices[0].logprobs.top_logprobs)
    chat = client.chat.completions.create(
        model="proxy",
        messages=[{"role": "user", "content": PROMPT}],
        temperature=0,
        max_tokens=6,
        logprobs=True,
        top_logprobs=3,
    )
    content = chat.choices[0].logprobs.content
    assert [token.logprob for token in content] == pytest.approx(wanted, abs=1e-4)
    assert all(token.top_logprobs[0].logprob == pytest.approx(token.logprob) for token in content)
    assert (
        bytes(byte for token in content for byte in token.bytes or [])
        .decode()
        .startswith(chat.choices[0].message.content)
    )
    scored = client.completions.create(model="proxy", prompt=PROMPT, max_tokens=0, echo=True, logprobs=0)
    of_prompt = [logprobs[place, token].item() for place, token in enumerate(prompt_ids[1:])]
    assert scored.choices[0].logprobs.token_logprobs[0] is None
    assert scored.choices[0].logprobs.token_logprobs[1:] == pytest.approx(of_prompt, abs=1e-3)
    assert "".join(scored.choices[0].logprobs.tokens) == PROMPT


def test_details_tell_what_the_large_model_would_have_said(http, proxy, tokenizer):
    body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 12, "details": True}
    choice = http.post("/v1/completions", json=body).json()["choices"][0]
    details = choice["fedpt"]
    assert "".join(detail["token"] for detail in details).startswith(choice["text"])
    assert any(detail["changed"] for detail in details)
    for detail in details:
        assert detail["changed"] == (detail["token"] != detail["large_token"])
        assert 0 <= detail["large_probability"] <= detail["large_token_probability"] <= 1
    unchanged = http.post("/v1/completions", json=body | {"alpha": 0}).json()["choices"][0]
    assert not any(detail["changed"] for detail in unchanged["fedpt"])


def test_models_info_health_metrics_and_page(client, http, run):
    assert [model.id for model in client.models.list()] == ["proxy", "large", "tuned", "untuned"]
    assert client.models.retrieve("tuned").id == "tuned"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("small")
    info = http.get("/info").json()
    assert info["run"] == run.name
    assert info["round"] == 3
    assert info["examples"][0]["prompt"].endswith("]\n")
    assert info["scores"]["proxy"]["exact_match"] == read_json(run / "results.json")["rows"]["proxy"]["exact_match"]
    assert http.get("/health").json()["status"] == "ready"
    client.completions.create(model="proxy", prompt="a", max_tokens=3, temperature=0)
    metrics = http.get("/metrics").text
    assert f'run="{run.name}"' in metrics
    assert 'fedpt_requests_total{endpoint="/v1/completions",outcome="ok"}' in metrics
    assert "fedpt_time_to_first_token_seconds_count" in metrics
    page = http.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "{{nonce}}" not in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]


# --- bad input ----------------------------------------------------------------------------------------------------

GOOD = {"prompt": "hello", "max_tokens": 2, "temperature": 0}
BAD = {
    "unknown model": ({"model": "gpt-4"}, 404, "gpt-4"),
    "empty prompt": ({"prompt": ""}, 400, "prompt"),
    "no prompts": ({"prompt": []}, 400, "prompt"),
    "null prompt": ({"prompt": None}, 400, "prompt"),
    "number for a prompt": ({"prompt": 5}, 400, "prompt"),
    "mixed prompt": ({"prompt": ["a", 5]}, 400, "prompt"),
    "a token that is none": ({"prompt": [10**9]}, 400, "prompt"),
    "a negative token": ({"prompt": [-1]}, 400, "prompt"),
    "prompt too long": ({"prompt": "word " * 5000}, 400, "context"),
    "max_tokens 0": ({"max_tokens": 0}, 400, "max_tokens"),
    "max_tokens negative": ({"max_tokens": -1}, 400, "max_tokens"),
    "max_tokens huge": ({"max_tokens": 10**9}, 400, "max_tokens"),
    "max_tokens as text": ({"max_tokens": "5"}, 400, "max_tokens"),
    "temperature too high": ({"temperature": 9}, 400, "temperature"),
    "temperature negative": ({"temperature": -0.1}, 400, "temperature"),
    "top_p 0": ({"top_p": 0}, 400, "top_p"),
    "alpha out of range": ({"alpha": 1e9}, 400, "alpha"),
    "alpha as text": ({"alpha": "strong"}, 400, "alpha"),
    "plausibility 1": ({"plausibility": 1}, 400, "plausibility"),
    "n too large": ({"n": 1000}, 400, "n"),
    "n 0": ({"n": 0}, 400, "n"),
    "bool for a number": ({"seed": True}, 400, "seed"),
    "empty stop": ({"stop": [""]}, 400, "stop"),
    "misspelt": ({"alhpa": 1}, 400, "alhpa"),
    "not supported": ({"frequency_penalty": 1.0}, 400, "frequency_penalty"),
    "details of another model": ({"model": "tuned", "details": True}, 400, "details"),
    "half a surrogate pair": ({"prompt": "\ud800"}, 400, "prompt"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_are_refused_by_a_sentence(http, name):
    change, status, named = BAD[name]
    response = http.post(
        "/v1/completions", content=json.dumps(GOOD | change), headers={"content-type": "application/json"}
    )
    error = response.json()["error"]
    assert response.status_code == status, error
    assert named in error["message"]
    assert error["type"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "Traceback" not in response.text
    assert http.post("/v1/completions", json=GOOD).status_code == 200


def test_a_compressed_body_is_refused_for_what_it_is(http):
    content = gzip.compress(json.dumps(GOOD).encode())
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    response = http.post("/v1/completions", content=content, headers=headers)
    assert response.status_code == 415
    assert response.json()["error"]["message"] == "the body must not be compressed"
    headers["content-encoding"] = "identity"
    assert http.post("/v1/completions", content=json.dumps(GOOD), headers=headers).status_code == 200


def test_balancers_may_ask_for_the_head_of_health(http):
    response = http.head("/health")
    assert response.status_code == 200
    assert not response.content


@pytest.mark.parametrize(
    ("content", "content_type", "status"),
    [
        (b"{", "application/json", 400),
        (b"", "application/json", 400),
        (b"[]", "application/json", 400),
        (b"null", "application/json", 400),
        (b'{"prompt": "a", "temperature": NaN}', "application/json", 400),
        (b'{"prompt": "a", "alpha": Infinity}', "application/json", 400),
        (b'{"prompt": "\xff\xfe"}', "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b'{"prompt": "a"}', "text/plain", 415),
        (b'{"prompt": "a"}', "", 415),
        (b'{"prompt": "' + b"a" * 10_000_000 + b'"}', "application/json", 413),
    ],
    ids=["half", "empty", "list", "null", "nan", "inf", "not utf-8", "deep", "text", "no type", "10 MB"],
)
def test_bodies_that_cannot_be_read_are_refused(http, content, content_type, status):
    headers = {"content-type": content_type} if content_type else {}
    with contextlib.suppress(httpx.WriteError):  # the answer may come, and the connection go, before all is sent
        response = http.post("/v1/completions", content=content, headers=headers)
        assert response.status_code == status
        assert response.json()["error"]["message"]
    assert http.post("/v1/completions", json=GOOD).status_code == 200


def test_a_body_without_a_length_is_bounded_too(service, http):
    def endless():
        yield b'{"prompt": "'
        for _ in range(200):
            yield b"a" * 65_536

    with contextlib.suppress(httpx.WriteError, httpx.RemoteProtocolError):
        response = http.post("/v1/completions", content=endless(), headers={"content-type": "application/json"})
        assert response.status_code == 413
    assert httpx.post(f"{service.url}/v1/completions", json=GOOD).status_code == 200


def test_a_service_without_a_key_goes_by_its_own_names_only(http):
    for name, status in (("localhost:80", 200), ("127.0.0.1", 200), ("evil.example", 403), ("[::1]:8080", 200)):
        assert http.post("/v1/completions", json=GOOD, headers={"host": name}).status_code == status


def test_a_text_that_cannot_fit_is_refused_before_it_is_read(http):
    response = http.post("/v1/completions", json=GOOD | {"prompt": "a b " * 900_000})
    assert response.status_code == 400
    assert "3600000 characters" in response.json()["error"]["message"]


def test_unknown_paths_and_methods(http):
    for response, status in ((http.get("/v1/engines"), 404), (http.delete("/v1/completions"), 405)):
        assert response.status_code == status
        assert response.json()["error"]["message"]


def test_clients_that_vanish_or_never_read_take_nothing_with_them(service, http):
    address = service.url.removeprefix("http://").split(":")
    body = json.dumps({"prompt": "hello", "max_tokens": 150, "stream": True, "n": 8, "temperature": 1}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    whole = head + b"Content-Length: %d\r\n\r\n" % len(body) + body
    connections = []
    for sent in (whole, whole, whole[: len(head) + 10], head, b"POST /v1", b"\x16\x03\x01 nonsense", b""):
        connection = socket.create_connection((address[0], int(address[1])))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        connection.sendall(sent)
        connections.append(connection)
    for _ in range(3):
        assert http.post("/v1/completions", json=GOOD).status_code == 200
    connections[1].close()
    wait_for_metric(http, "fedpt_slots_in_use", 0.0)
    for connection in connections:
        connection.close()


def test_a_cancelled_stream_frees_its_slots(client, http):
    stream = client.completions.create(
        model="proxy", prompt="hello", max_tokens=200, temperature=1.5, n=8, stream=True, extra_body={"alpha": 0}
    )
    next(iter(stream))
    stream.close()
    wait_for_metric(http, "fedpt_slots_in_use", 0.0)
    assert 'outcome="client gone"' in http.get("/metrics").text


def test_the_log_has_no_prompts(service, http):
    response = http.post("/v1/completions", json=GOOD | {"prompt": "a secret phrase, " * 17})
    number = response.json()["usage"]["prompt_tokens"]  # which no other request here has

    def written():
        lines = [json.loads(line) for line in service.log if line.startswith("{")]
        return [line for line in lines if line.get("prompt_tokens") == number]

    (line,) = wait_until(written, 30, "the request is in the log")
    assert line["path"] == "/v1/completions"
    assert line["completion_tokens"] == 2
    assert line["outcome"] == "ok"
    assert "secret" not in "".join(service.log)


def test_generate_asks_a_running_service(service, proxy, tokenizer):
    command = [sys.executable, "-m", "fedpt_flwr.cli", "generate", "--url", service.url]
    ended = subprocess.run([*command, "--example", "1", "--compare"], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    assert "proxy" in ended.stdout
    _, text = generated(proxy, tokenizer, PROMPT, max_tokens=24)
    ended = subprocess.run([*command, PROMPT], capture_output=True, text=True, timeout=60)
    assert ended.stdout == text + "\n"
    refused = subprocess.run([*command[:-1], "http://127.0.0.1:9", "hello"], capture_output=True, text=True, timeout=60)
    assert refused.returncode == 1
    assert "cannot be asked" in refused.stderr
