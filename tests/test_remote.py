"""A large model behind an API: our own service over a real connection, and a relay in between that can break things."""

import json
import math
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
import torch
import uvicorn
from fake_endpoint import FakeEndpoint, fake_remote
from llama_server import export, interpreter, llama_server
from test_scheduler import deliver, make_version, task
from test_speculative import relatives
from tiny import EOS, VOCAB, tiny_llama, tiny_tokenizer
from transformers import AutoTokenizer

from fedpt_flwr.cli.loading import find_large
from fedpt_flwr.config import RemoteConfig, parse_run_config
from fedpt_flwr.data import TokenizedExample
from fedpt_flwr.drafting import StepCosts
from fedpt_flwr.endpoint import Endpoint, vocabulary_digest
from fedpt_flwr.errors import ModelError, RemoteError, VocabularyMismatch
from fedpt_flwr.logits import bound_hidden, combine_logits, fill_hidden
from fedpt_flwr.losses import answer_losses, proxy_losses
from fedpt_flwr.models import load_causal_lm, load_tokenizer
from fedpt_flwr.proxy import ProxyModel
from fedpt_flwr.proxy_folder import BUNDLED
from fedpt_flwr.recall import Recall
from fedpt_flwr.remote import connect, remote_large
from fedpt_flwr.results import _summed_costs, server_cost_row
from fedpt_flwr.runs import read_json
from fedpt_flwr.scoring import Measurement, make_row
from fedpt_flwr.service.app import create_app
from fedpt_flwr.service.guard import Service, ServiceConfig
from fedpt_flwr.service.metrics import Metrics
from fedpt_flwr.service.scheduler import Failure, Limits, Scheduler

TEXT = "the cat = 12;\n> a dog"


@contextmanager
def service(proxy, **config):
    """Our own service for a proxy of tiny models, over a real connection; its address."""
    tokenizer = tiny_tokenizer()
    version = replace(make_version(proxy), vocabulary=vocabulary_digest(tokenizer))
    loops = []

    def deliver(events):
        loops[0].call_soon_threadsafe(lambda: [sink(event) for sink, event in events])

    scheduler = Scheduler(version, Limits(num_slots=8), Metrics(), deliver, num_threads=1)
    shared = Service(scheduler=scheduler, metrics=Metrics(), config=ServiceConfig(**config))

    def on_start(loop):
        loops.append(loop)
        scheduler.start()

    server = uvicorn.Server(
        uvicorn.Config(create_app(shared, on_start=on_start), log_config=None, access_log=False, ws="none")
    )
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join(10)
        scheduler.stop(0)
        scheduler.join(10)


@contextmanager
def relay(target, fault):
    """A server between client and service: ``fault(number, body, answer)`` gives status, body and headers."""
    numbers = iter(range(10**6))

    class Handler(BaseHTTPRequestHandler):
        def _go(self, body=None):
            with httpx.Client(timeout=30, verify=False, trust_env=False) as client:
                answer = client.request(
                    self.command, target + self.path, content=body, headers={"content-type": "application/json"}
                )
            status, content, headers = answer.status_code, answer.content, {}
            if self.path == "/v1/completions":
                status, content, headers = fault(next(numbers), json.loads(body), answer)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            size = 8 if "slowly" in headers else len(content)
            for first in range(0, len(content), size or 1):
                self.wfile.write(content[first : first + size])
                time.sleep(0.05 * ("slowly" in headers))

        def do_GET(self):
            self._go()

        def do_POST(self):
            self._go(self.rfile.read(int(self.headers["content-length"])))

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join(10)


def passed(answer):
    return answer.status_code, answer.content, {}


@pytest.fixture(scope="module")
def proxy():
    return ProxyModel(tiny_llama(1), tiny_llama(2), tiny_llama(3), vocab_size=VOCAB, tokenizer=tiny_tokenizer())


@pytest.fixture(scope="module")
def url(proxy):
    with service(proxy) as address:
        yield address


@pytest.fixture
def settings(tmp_path):
    return RemoteConfig(cache=str(tmp_path / "cache"), retries=0, timeout_s=20.0)


def ids_of(text):
    return torch.tensor([tiny_tokenizer()(text)["input_ids"]])


def over(proxy, large):
    """The same proxy with another large model."""
    return ProxyModel(large, proxy.tuned, proxy.untuned, vocab_size=VOCAB, tokenizer=tiny_tokenizer())


# --- the same numbers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("api", "top"), [("full", 0), ("echo", 20), ("next", 20)])
def test_log_probabilities_are_those_of_the_model_that_is_here(proxy, url, settings, api, top):
    remote = connect(url, tiny_tokenizer(), replace(settings, api=api, top_logprobs=top))
    assert (remote.endpoint.api, remote.hides_tokens) == (api, top > 0)
    ids = ids_of(TEXT)
    found, expected = remote(ids).logits, proxy.large(ids).logits.log_softmax(-1)
    shown = found.isfinite()
    assert (shown.sum(-1) == (top or VOCAB)).all()
    torch.testing.assert_close(found[shown], expected[shown], atol=1e-4, rtol=0)
    if top:
        assert shown.gather(-1, expected.topk(top, dim=-1).indices).all()


def test_a_batch_with_padding_is_scored_row_by_row(proxy, url, settings):
    remote = connect(url, tiny_tokenizer(), settings)
    short, long = ids_of("a cat")[0], ids_of(TEXT)[0]
    for side in ("left", "right"):
        padded = torch.zeros((2, len(long)), dtype=torch.int64)
        mask = torch.zeros_like(padded)
        place = slice(0, len(short)) if side == "right" else slice(len(long) - len(short), None)
        padded[0, place], mask[0, place] = short, 1
        padded[1], mask[1] = long, 1
        found = remote(padded, attention_mask=mask).logits
        expected = proxy.large(short[None]).logits.log_softmax(-1)[0]
        torch.testing.assert_close(found[0, place], expected, atol=1e-4, rtol=0)
        assert not found[0][mask[0] == 0].any()


@pytest.mark.parametrize("sampling", [{"do_sample": False}, {"do_sample": True, "seed": [3, 4], "top_k": 0}])
@pytest.mark.parametrize("drafts", ["auto", 0, 3, None])
def test_answers_are_those_of_the_proxy_whose_large_model_is_here(proxy, url, settings, sampling, drafts):
    remote = over(proxy, connect(url, tiny_tokenizer(), settings))
    ids = torch.cat([ids_of("the cat"), ids_of("a dog =")])
    asked = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 10, "draft_tokens": drafts, **sampling}
    assert remote.generate(ids, **asked).tolist() == proxy.generate(ids, **asked).tolist()


def test_beams_edit_the_text_that_is_asked_about(proxy, url, settings):
    remote = over(proxy, connect(url, tiny_tokenizer(), settings))
    ids = ids_of("the cat")
    asked = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "num_beams": 3, "do_sample": False}
    assert remote.generate(ids, **asked).tolist() == proxy.generate(ids, **asked).tolist()


def test_text_is_sent_where_ids_are_not_taken_if_it_reads_back(proxy, url, settings):
    remote = connect(url, tiny_tokenizer(), replace(settings, api="next", top_logprobs=20))
    remote.endpoint.sends_ids = remote.endpoint._names_ids = False
    ids = ids_of(TEXT)
    found, expected = remote(ids, logits_to_keep=1).logits[0, 0], proxy.large(ids).logits[0, -1].log_softmax(-1)
    assert found.argmax() == expected.argmax()
    torch.testing.assert_close(found[found.isfinite()], expected[found.isfinite()], atol=1e-4, rtol=0)
    # Byte-level BPE: "th" and "e" are two tokens of a text that would be read as other ones.
    demo = load_tokenizer("demo:large")
    remote.endpoint._tokenizer = demo
    apart = demo("th")["input_ids"] + demo("e")["input_ids"]
    assert demo("the")["input_ids"] != apart
    with pytest.raises(RemoteError, match="must read back as the same tokens"):
        remote.endpoint._as_text(apart)


def test_a_folder_knows_how_its_remote_model_was_asked(proxy, url, settings, tmp_path, monkeypatch):
    monkeypatch.setenv("FEDPT_HOME", str(tmp_path / "home"))
    asked = replace(settings, api="next", top_logprobs=5, hidden="fill")
    folder = tmp_path / "proxy"
    over(proxy, connect(url, tiny_tokenizer(), asked)).save_pretrained(
        folder, untuned_ref=BUNDLED, tokenizer=tiny_tokenizer()
    )
    again = ProxyModel.from_pretrained(folder).large.endpoint
    assert (again.config.api, again.config.top_logprobs, again.config.hidden) == ("next", 5, "fill")
    assert (again.api, again.num_top) == ("next", 5)
    content = json.loads((folder / "config.json").read_text())  # as it was written before these were kept
    content["large"] = {key: value for key, value in content["large"].items() if key in ("ref", "fingerprint", "dtype")}
    (folder / "config.json").write_text(json.dumps(content))
    assert ProxyModel.from_pretrained(folder).large.endpoint.api == "full"


# --- a part of the distribution -----------------------------------------------------------------------------------


def test_hidden_probability_goes_to_tokens_as_the_untuned_model_shares_it():
    # .4 is hidden; the untuned model gives the hidden two .1 and .3, that is a quarter and three quarters.
    large = torch.tensor([[0.5, 0.1, 0.0, 0.0]]).log()
    untuned = torch.tensor([[0.3, 0.3, 0.1, 0.3]]).log()
    filled = fill_hidden(large, untuned, vocab_size=4).exp()
    torch.testing.assert_close(filled, torch.tensor([[0.5, 0.1, 0.1, 0.3]]))
    whole = torch.tensor([[0.5, 0.1, 0.2, 0.2]]).log()
    assert torch.equal(fill_hidden(whole, untuned, vocab_size=4), whole)


def test_the_bound_holds_for_every_way_to_share_the_hidden_probability():
    torch.manual_seed(0)
    full, tuned, untuned = (torch.randn(200, 12).log_softmax(-1) for _ in range(3))
    seen = full.topk(4, dim=-1).indices
    shown = torch.full_like(full, -math.inf).scatter(-1, seen, full.gather(-1, seen))
    bound = combine_logits(bound_hidden(shown, tuned, untuned, alpha=1.0, vocab_size=12), tuned, untuned, alpha=1.0)
    truth = combine_logits(full, tuned, untuned, alpha=1.0)
    worst, real = (-scores.log_softmax(-1).gather(-1, seen) for scores in (bound, truth))
    assert (worst >= real - 1e-5).all()
    restricted = -combine_logits(shown, tuned, untuned, alpha=1.0).log_softmax(-1).gather(-1, seen)
    assert (restricted < real).any()  # what must not be called a loss


def test_with_a_part_only_a_loss_is_a_bound_that_is_named_so_or_absent(proxy, url, settings):
    items = [TokenizedExample(ids_of("the cat")[0].tolist(), ids_of(" = 12;")[0].tolist())]
    truth = proxy_losses(proxy, items, alpha=1.0, pad_id=0)
    echo = over(proxy, connect(url, tiny_tokenizer(), replace(settings, api="echo", top_logprobs=5)))
    found = proxy_losses(echo, items, alpha=1.0, pad_id=0)
    # An echo shows the text's own tokens, so that the large model's loss is exact.
    assert found["large"].mean == pytest.approx(truth["large"].mean, abs=1e-4)
    assert truth["proxy"].mean - 1e-4 <= found["proxy"].mean < math.inf
    row = make_row(Measurement(losses=found["proxy"]), n=1, seed=0).to_json()
    assert "loss" not in row
    assert "perplexity" not in row
    assert row["loss_upper_bound"] == pytest.approx(found["proxy"].mean)
    hidden = over(proxy, connect(url, tiny_tokenizer(), replace(settings, api="next", top_logprobs=1)))
    # Nor may what is chosen depend on what stands in the text.
    again = echo.large(ids_of("the cat = 12;")).logits
    assert (again.isfinite().sum(-1) == 5).all()
    lost = answer_losses(hidden.large, items, pad_id=0)
    assert math.isinf(lost.mean)
    assert "loss" not in make_row(Measurement(losses=lost), n=1, seed=0).to_json()


def test_greedy_rules_hidden_tokens_out_and_sampling_fills_them_in(proxy, url, settings):
    remote = over(proxy, connect(url, tiny_tokenizer(), replace(settings, top_logprobs=3)))
    ids = ids_of("the cat")
    assert remote(ids, hidden="restrict").logits[0, -1].isfinite().sum() == 3
    assert remote(ids).logits[0, -1].isfinite().all()
    asked = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 1, "draft_tokens": 0}
    best = remote.generate(ids, do_sample=False, **asked)[0, -1]
    assert remote.large(ids).logits[0, -1, best].isfinite()
    drawn = {int(remote.generate(ids, do_sample=True, top_k=0, seed=seed, **asked)[0, -1]) for seed in range(24)}
    assert any(not remote.large(ids).logits[0, -1, token].isfinite() for token in drawn)


# --- money --------------------------------------------------------------------------------------------------------


def test_nothing_is_asked_twice_nor_after_the_end_nor_where_nobody_looks(proxy, url, settings):
    ids = ids_of(TEXT)
    first = connect(url, tiny_tokenizer(), settings)
    row = first(ids, logits_to_keep=1).logits
    assert first.endpoint.usage.requests == 1
    assert first.endpoint.usage.tokens_sent == ids.shape[1]
    first(ids, logits_to_keep=1)
    again = connect(url, tiny_tokenizer(), settings)  # another process would find the same
    assert torch.equal(again(ids, logits_to_keep=1).logits, row)
    assert (first.endpoint.usage.requests, again.endpoint.usage.requests) == (1, 0)
    assert again.endpoint.usage.recalled == 1
    nothing = torch.empty(0, dtype=torch.int64)
    assert again(ids_of("never asked"), logits_to_keep=nothing).logits.shape == (1, 0, VOCAB)
    assert again.endpoint.usage.requests == 0


def test_drafts_save_requests(proxy, url, settings):
    ids = ids_of("the cat")
    asked = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    counts = []
    for drafts in (0, 3):
        # The tuned model is the large one: every draft is right.
        large = connect(url, tiny_tokenizer(), replace(settings, cache="off"))
        agreed = ProxyModel(large, tiny_llama(1), tiny_llama(1), vocab_size=VOCAB, tokenizer=tiny_tokenizer())
        agreed.generate(ids, draft_tokens=drafts, **asked)
        counts.append(large.endpoint.usage.requests)
    assert counts == [12, 3]


def test_the_ledger_adds_up_what_was_spent(proxy, url, settings):
    remote = connect(
        url, tiny_tokenizer(), replace(settings, price_sent=2.0, price_received=6.0, top_logprobs=5, api="next")
    )
    start = remote.endpoint.usage.copy()
    remote(ids_of("the cat"), logits_to_keep=2)
    spent = remote.usage_since(start)
    # Two requests, of 6 and of 7 tokens, and one token each comes back.
    assert (spent["remote_requests"], spent["remote_tokens_sent"], spent["remote_tokens_received"]) == (2, 13, 2)
    assert spent["remote_price"] == pytest.approx((13 * 2 + 2 * 6) / 1e6)
    rows = [server_cost_row(number, "test", large_tokens=7, seconds=1.0, remote=spent) for number in (1, 2)]
    assert _summed_costs(rows)["remote_tokens_sent"] == 26


def test_a_budget_ends_it_and_what_was_answered_is_kept(proxy, url, settings):
    long, short = ids_of(TEXT), ids_of("a")
    remote = connect(url, tiny_tokenizer(), replace(settings, token_budget=long.shape[1] + 1))
    remote(long, logits_to_keep=1)
    with pytest.raises(RemoteError, match=r"remote.token-budget: .*budget of 22 tokens.*what was answered is kept"):
        remote(ids_of("a dog"), logits_to_keep=1)
    remote(long, logits_to_keep=1)  # known
    remote(short, logits_to_keep=1)  # the last token of the budget


def test_what_lies_on_disk_is_checked(tmp_path):
    kept = Recall(tmp_path, "x", width=4, max_bytes=2**20)
    row = torch.tensor([0.1, -torch.inf, 0.2, -torch.inf]).log().nan_to_num(nan=-math.inf)
    kept.put({(1, 2): row, (1, 3): torch.tensor([0.25] * 4).log()})
    assert torch.equal(kept.get([(1, 2)])[1, 2], row)
    kept._database.execute("UPDATE answers SET logprobs = x'00ff'")
    assert kept.get([(1, 2), (1, 3)]) == {}
    kept.close()


# --- what can go wrong --------------------------------------------------------------------------------------------


def slow(number, body, answer):
    time.sleep(0.6)
    return passed(answer)


def changed(**parts):
    def fault(number, body, answer):
        return 200, json.dumps(answer.json() | parts).encode(), {}

    return fault


def too_sure(number, body, answer):
    content = answer.json()
    content["choices"][0]["logprobs"]["top_logprobs"][0] = {"token_id:5": -0.01, "token_id:6": -0.01}
    return 200, json.dumps(content).encode(), {}


WRONG = {
    "slow": ("next", slow, "did not answer within 0.3 s, asked 1 times"),
    "slow, piece by piece": (
        "next",
        lambda number, body, answer: (200, answer.content, {"slowly": "1"}),
        "did not answer within 0.3 s, asked 1 times; look whether it is overloaded, else raise remote.timeout-s; what "
        "was answered is kept$",
    ),
    "elsewhere": (
        "next",
        lambda *_: (307, b"", {"location": "https://other/v1/completions"}),
        "must not redirect, but does so with status 307, got 'https://other/v1/completions'; give the address",
    ),
    "at another path": (
        "next",
        lambda *_: (404, b"<html>not here</html>", {}),
        "status 404: <html>not here</html>; look whether model.large-url is all that stands before /v1/completions",
    ),
    "too large a number": (
        "next",
        changed(choices=[{"logprobs": {"top_logprobs": [{"token_id:5": -(10**400)}]}}]),
        "must come as an object of names and numbers",
    ),
    "nested": ("next", lambda *_: (200, b"[" * 200_000, {}), "must be JSON"),
    "overloaded": (
        "next",
        lambda *_: (503, b'{"error": {"message": "no room"}}', {}),
        "status 503: no room, asked 1 times",
    ),
    "without a key": ("next", lambda *_: (401, b"{}", {}), "FEDPT_LARGE_API_KEY"),
    "no JSON": ("next", lambda *_: (200, b"<html>", {}), "must be JSON"),
    "no log-probabilities": ("next", changed(choices=[{"text": "a", "logprobs": None}]), "must name the likeliest"),
    "another tokenizer": ("next", changed(usage={"prompt_tokens": 99}), "must have as many to the service, got 99"),
    "unknown tokens": (
        "next",
        changed(choices=[{"logprobs": {"top_logprobs": [{"Zürich": -0.1}]}}]),
        "must show at least one token by a name of its own, got .*; use a service that names token ids",
    ),
    "a token with too long a number": (
        "next",
        changed(choices=[{"logprobs": {"top_logprobs": [{"token_id:" + "9" * 5000: -0.1}]}}]),
        "must show at least one token by a name of its own",
    ),
    "more than certain": ("next", too_sure, "must add up to 1"),
    "a part of the numbers": (
        "full",
        changed(choices=[{"full_logprobs": {"positions": 1}}]),
        "full_logprobs must hold numbers",
    ),
}


def wait_for_answers(remote, timeout_s):
    remote.endpoint.config = replace(remote.endpoint.config, timeout_s=timeout_s)
    remote.endpoint._http.timeout = httpx.Timeout(timeout_s, connect=20)


@pytest.mark.parametrize("owns", [5, {"0": -0.1}, None])
def test_an_echo_whose_own_tokens_are_no_list_is_refused(url, settings, owns):
    faults = [lambda number, body, answer: passed(answer)]
    with relay(url, lambda *about: faults[0](*about)) as address:
        remote = connect(address, tiny_tokenizer(), replace(settings, api="echo", top_logprobs=5, timeout_s=20))

        def without_owns(number, body, answer):
            content = answer.json()
            content["choices"][0]["logprobs"]["token_logprobs"] = owns
            return 200, json.dumps(content).encode(), {}

        faults[0] = without_owns
        with pytest.raises(RemoteError, match=rf"{address}: .* an echo must have \d+ tokens"):
            remote(ids_of(TEXT))


@pytest.mark.parametrize("name", WRONG)
def test_every_failure_is_one_sentence_that_names_the_service(proxy, url, settings, name):
    api, fault, sentence = WRONG[name]
    faults = []
    with relay(url, lambda *about: (faults[0] if faults else lambda n, b, answer: passed(answer))(*about)) as address:
        asked = replace(settings, api=api, top_logprobs=0 if api == "full" else 5, timeout_s=20)
        remote = connect(address, tiny_tokenizer(), asked)
        faults.append(fault)
        # Only now: what must be answered has time also on a busy machine.
        wait_for_answers(remote, 0.3 if "slow" in name else 20)
        with pytest.raises(RemoteError, match=sentence) as error:
            remote(ids_of(TEXT), logits_to_keep=1)
        assert address in str(error.value)
        wait_for_answers(remote, 20)
        faults[0] = lambda number, body, answer: passed(answer)
        assert remote(ids_of(TEXT), logits_to_keep=1).logits.isfinite().any()  # nothing is broken for good


def test_a_request_is_sent_again_until_it_is_answered(proxy, url, settings):
    def twice(number, body, answer):
        return (429, b"{}", {"retry-after": "0"}) if number < 2 else passed(answer)

    with relay(url, twice) as address:
        remote = connect(address, tiny_tokenizer(), replace(settings, retries=2))
        assert remote(ids_of(TEXT), logits_to_keep=1).logits.isfinite().all()
        assert (remote.endpoint.usage.requests, remote.endpoint.usage.retries) == (1, 2)


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 507, 520, 529])
def test_failures_that_pass_are_asked_about_again(monkeypatch, status):
    answers = [httpx.Response(status), httpx.Response(200, json={"data": []})]

    class Recovering(FakeEndpoint):
        def _whole(self, *_about):
            return answers.pop(0)

    monkeypatch.setattr("fedpt_flwr.endpoint._FIRST_WAIT_S", 0.0)
    assert Recovering(retries=1)._send("GET", "/v1/models").status_code == 200


@pytest.mark.parametrize("status", [501, 505])
def test_what_a_service_cannot_do_is_asked_once(status):
    answers = [httpx.Response(status), httpx.Response(200, json={"data": []})]

    class Lacking(FakeEndpoint):
        def _whole(self, *_about):
            return answers.pop(0)

    assert Lacking(retries=1)._send("GET", "/v1/models").status_code == status
    assert len(answers) == 1


def test_a_remote_model_has_no_dtype_to_convert(proxy, tmp_path):
    remote = fake_remote()
    over(proxy, remote).save_pretrained(tmp_path / "proxy", untuned_ref=BUNDLED, tokenizer=tiny_tokenizer())
    loaded = ProxyModel.from_pretrained(tmp_path / "proxy", large=remote, dtype="bfloat16")
    assert (loaded.tuned.dtype, loaded.large.dtype) == (torch.bfloat16, torch.float32)
    assert loaded.config.large["dtype"] == "float32"


def test_a_place_that_shows_only_shared_names_is_a_failure_of_the_service(proxy, url, settings):
    """As with byte-level tokens: parts of characters have one name, and after some texts only such are likely."""
    remote = connect(url, tiny_tokenizer(), replace(settings, api="next", top_logprobs=5))
    remote.endpoint._names_ids, remote.endpoint._spelling = False, {}
    with pytest.raises(RemoteError, match=r"at least one token by a name of its own, got \["):
        remote(ids_of("the cat"), logits_to_keep=1)


def test_a_full_disk_is_a_failure_of_the_remote_model(settings, tmp_path):
    endpoint = FakeEndpoint()
    endpoint._recall = Recall(tmp_path, "x", width=VOCAB, max_bytes=2**20)
    endpoint._recall._database.execute("PRAGMA max_page_count = 1")
    with pytest.raises(RemoteError, match=r"answers of the remote large model cannot be kept \(.*full"):
        endpoint.ask([list(range(3, VOCAB)) * 3], [list(range(VOCAB))])
    endpoint._recall._database.execute("DROP TABLE answers")
    with pytest.raises(RemoteError, match=r"cannot be kept \(no such table"):
        endpoint.ask([[3, 5]], [[1]])


def test_answers_beside_one_that_failed_are_kept(proxy, url, settings):
    def only_short(number, body, answer):
        return passed(answer) if len(body["prompt"]) < 10 else (500, b"{}", {})

    with relay(url, only_short) as address:
        remote = connect(address, tiny_tokenizer(), settings)
        texts = [ids_of("the cat")[0].tolist(), ids_of(TEXT)[0].tolist()]
        with pytest.raises(RemoteError, match="status 500"):
            remote.endpoint.ask(texts, [[6], [len(texts[1]) - 1]])
        remote.endpoint.ask(texts[:1], [[6]])
        assert remote.endpoint.usage.recalled == 1


def test_when_one_request_fails_nothing_new_is_begun_nor_tried_again(proxy, url, settings):
    asked = []

    def fault(number, body, answer):
        asked.append(number)
        return 500, b"{}", {"retry-after": "0"}

    with relay(url, fault) as address:
        remote = connect(address, tiny_tokenizer(), replace(settings, retries=2, concurrency=2))
        with pytest.raises(
            RemoteError, match="status 500.*, asked 3 times; wait, or lower remote.concurrency; what was"
        ):
            remote.endpoint.ask([[first, 5] for first in range(3, 33)], [[1]] * 30)
    assert len(asked) < 15  # of 90


def test_who_is_interrupted_sends_nothing_more(monkeypatch):
    begun, may_end = threading.Event(), threading.Event()

    class Slow(FakeEndpoint):
        def _ask_full(self, text, first):
            begun.set()
            assert may_end.wait(60)
            return super()._ask_full(text, first)

    def interrupted(*_args, **_settings):
        assert begun.wait(60)
        raise KeyboardInterrupt

    endpoint = Slow(concurrency=1)
    monkeypatch.setattr("fedpt_flwr.endpoint.wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        endpoint.ask([[first, 5] for first in range(3, 33)], [[1]] * 30)
    may_end.set()
    endpoint._pool.shutdown(wait=True)
    assert len(endpoint.asked) == 1


def test_who_waits_to_ask_again_gives_up_when_the_connection_is_closed(monkeypatch):
    asked = threading.Event()

    class Unreachable(FakeEndpoint):
        _ask_full = Endpoint._ask_full

        def _whole(self, *_about):
            asked.set()
            raise httpx.ConnectError("nobody there")

    monkeypatch.setattr("fedpt_flwr.endpoint._FIRST_WAIT_S", 1000.0)
    monkeypatch.setattr("fedpt_flwr.endpoint._LONGEST_WAIT_S", 1000.0)
    endpoint = Unreachable(retries=3)
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(endpoint.ask, [[3, 5]], [[1]])
        assert asked.wait(60)
        endpoint.close()
        with pytest.raises(RemoteError, match="cannot be reached .*asked 1 times"):
            job.result(60)
    with pytest.raises(RemoteError, match="the connection is closed"):
        endpoint.ask([[3, 5]], [[1]])


def test_without_a_cache_nobody_says_that_answers_are_kept(proxy, url, settings):
    with relay(url, lambda *_: (500, b"{}", {})) as address:
        remote = connect(address, tiny_tokenizer(), replace(settings, cache="off"))
        with pytest.raises(RemoteError, match="; wait, or lower remote.concurrency$"):
            remote(ids_of(TEXT))


def test_a_service_that_shows_less_than_it_is_asked_for_is_known_by_what_it_shows(proxy, url, settings):
    def capped(number, body, answer):
        content = answer.json()
        tops = content["choices"][0]["logprobs"]["top_logprobs"]
        content["choices"][0]["logprobs"]["top_logprobs"] = [dict(list(top.items())[:3]) for top in tops]
        return 200, json.dumps(content).encode(), {}

    with relay(url, capped) as address:
        remote = connect(address, tiny_tokenizer(), replace(settings, api="next", top_logprobs=20))
        assert remote.endpoint.shows == "top 3"
        assert (remote(ids_of("the cat")).logits.isfinite().sum(-1) == 3).all()


def test_another_vocabulary_is_refused_before_anything_is_asked(url, settings):
    with pytest.raises(VocabularyMismatch, match="must have the small models' vocabulary"):
        connect(url, load_tokenizer("demo:small"), settings)


def test_the_key_is_never_shown(proxy, settings, monkeypatch):
    monkeypatch.setenv("FEDPT_LARGE_API_KEY", "sk-secret")
    with service(proxy, api_keys=("sk-secret",)) as address:
        assert connect(address, tiny_tokenizer(), settings)(ids_of("the cat")).logits.isfinite().all()
        monkeypatch.setenv("FEDPT_LARGE_API_KEY", "sk-other")
        with pytest.raises(RemoteError, match="FEDPT_LARGE_API_KEY") as error:
            connect(address, tiny_tokenizer(), settings)
    assert "sk-" not in str(error.value)
    for address in (
        "http://user:sk-other@127.0.0.1:1",
        "http://127.0.0.1:1?api_key=sk-other",
        "http://127.0.0.1:1/v1#sk",
    ):
        with pytest.raises(RemoteError, match="hold no key"):
            connect(address, tiny_tokenizer(), settings)


@pytest.mark.parametrize("key", ["sk-one\nsk-two", "sk-one two", "sk-schlüssel", "sk-\x7f"])
def test_a_key_that_no_header_can_hold_is_refused_and_not_shown(monkeypatch, key):
    monkeypatch.setenv("FEDPT_LARGE_API_KEY", key)
    with pytest.raises(RemoteError) as error:
        fake_remote()
    assert str(error.value) == (
        "FEDPT_LARGE_API_KEY: the key must be printable ASCII without white space; look how it was copied"
    )


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(200, json={"error": {"message": "Incorrect API key provided: sk-it's", "sk-it's": ["sk-it's"]}}),
        httpx.Response(200, text="x" * 74 + "sk-it's"),
        httpx.Response(200, json={"data": [{"id": "sk-it's"}, {"id": "b"}]}),
        httpx.Response(500, text="sk-it's"),
        httpx.ConnectError("no way to sk-it's"),
    ],
    ids=["refused with status 200", "at the end of what is shown", "name of a model", "broken", "in an exception"],
)
def test_what_a_service_repeats_of_the_key_is_not_shown(monkeypatch, caplog, answer):
    class Repeating(FakeEndpoint):
        _open = Endpoint._open

        def _whole(self, *_about):
            if isinstance(answer, Exception):
                raise answer
            return answer

    monkeypatch.setenv("FEDPT_LARGE_API_KEY", "sk-it's")
    monkeypatch.setattr("fedpt_flwr.endpoint._FIRST_WAIT_S", 0.0)
    caplog.set_level("DEBUG")
    with pytest.raises(RemoteError) as error:
        Repeating(retries=1)
    for said in (str(error.value), caplog.text):
        assert "sk-" not in said


def test_a_folder_cannot_have_the_key_sent_where_it_likes(proxy, settings, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("FEDPT_LARGE_API_KEY", "sk-secret")
    monkeypatch.setenv("FEDPT_HOME", str(tmp_path / "home"))
    sent = []
    whole = httpx.Client.stream

    def stream(self, *args, **kwargs):
        sent.append(self.headers.get("authorization"))
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(httpx.Client, "stream", stream)
    folder = tmp_path / "proxy"
    with service(proxy, api_keys=("sk-secret",)) as address:
        remote = connect(address, tiny_tokenizer(), settings)
        over(proxy, remote).save_pretrained(folder, untuned_ref=BUNDLED, tokenizer=tiny_tokenizer())
        config = parse_run_config({"model.large-url": f"{address}/v1/", "remote.cache": "off"})
        assert set(sent) == {"Bearer sk-secret"}
        for load in (
            lambda: ProxyModel.from_pretrained(folder),
            lambda: remote_large(config, tiny_tokenizer()),
            lambda: find_large(tmp_path, config, None, None, None),
        ):
            monkeypatch.delenv("FEDPT_LARGE_API_URL", raising=False)
            sent.clear()
            caplog.clear()
            with pytest.raises(ModelError, match="the key is not sent to an address that a folder names.*--large-url"):
                load()
            assert set(sent) == {None}
            assert f"FEDPT_LARGE_API_KEY is not sent to {address}" in caplog.text
            monkeypatch.setenv("FEDPT_LARGE_API_URL", "http://127.0.0.1:1")
            with pytest.raises(ModelError, match="FEDPT_LARGE_API_URL"):
                load()
            assert set(sent) == {None}
            monkeypatch.setenv("FEDPT_LARGE_API_URL", f"{address}/")
            load()
        monkeypatch.delenv("FEDPT_LARGE_API_URL")
        # The caller's own word is enough.
        assert ProxyModel.from_pretrained(folder, large=address).large.endpoint.url == address
        assert find_large(tmp_path, config, None, address, None).endpoint.url == address


def test_nobody_there(settings):
    with pytest.raises(RemoteError, match="cannot be reached .*asked 1 times; look whether it runs"):
        connect("http://127.0.0.1:1", tiny_tokenizer(), settings)
    with socket.socket() as full:  # nobody takes its connections, and no more may wait
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        waiting = [socket.socket() for _ in range(4)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(full.getsockname())
        address = f"http://127.0.0.1:{full.getsockname()[1]}"
        with pytest.raises(RemoteError, match=r"cannot be reached within 0\.3 s, asked 1 times; look whether it runs"):
            connect(address, tiny_tokenizer(), replace(settings, timeout_s=0.3))
        for one in waiting:
            one.close()


# --- the service --------------------------------------------------------------------------------------------------


def test_full_log_probabilities_have_a_limit_of_their_own_that_the_client_keeps(proxy, settings):
    with service(proxy, max_full_logprobs=4 * VOCAB) as address:
        body = {"model": "large", "prompt": ids_of(TEXT)[0].tolist(), "max_tokens": 0, "full_logprobs": 5}
        refused = httpx.post(f"{address}/v1/completions", json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "too_many_logprobs")
        remote = connect(address, tiny_tokenizer(), settings)
        expected = proxy.large(ids_of(TEXT)).logits.log_softmax(-1)
        torch.testing.assert_close(remote(ids_of(TEXT)).logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("top", "temperature", "hidden"), [(0, 0, "none"), (5, 0, "restricted"), (5, 1, "filled")])
def test_a_service_over_a_service_says_where_its_large_model_is(proxy, url, settings, top, temperature, hidden):
    remote = over(proxy, connect(url, tiny_tokenizer(), replace(settings, top_logprobs=top)))
    body = {"prompt": "the cat", "max_tokens": 8, "temperature": temperature, "seed": 7}
    with service(remote) as second:
        found = httpx.post(f"{second}/v1/completions", json=body, timeout=60).json()
        assert found["fedpt_large"] == {"shows": f"top {top}" if top else "all", "hidden": hidden}
        if not top:
            direct = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()
            assert "fedpt_large" not in direct
            assert found["choices"] == direct["choices"]
            spent = remote.large.endpoint.usage
            assert spent.requests


def test_a_service_whose_remote_fails_says_so_and_goes_on(proxy, url, settings):
    broken = threading.Event()

    def fault(number, body, answer):
        return (500, b'{"error": {"message": "on fire"}}', {}) if broken.is_set() else passed(answer)

    with relay(url, fault) as address:
        remote = over(proxy, connect(address, tiny_tokenizer(), replace(settings, cache="off")))
        with service(remote) as second:
            body = {"prompt": "the cat", "max_tokens": 2, "temperature": 0}
            broken.set()
            failed = httpx.post(f"{second}/v1/completions", json=body, timeout=60)
            assert failed.status_code == 503
            assert "on fire" in failed.json()["error"]["message"]
            broken.clear()
            assert httpx.post(f"{second}/v1/completions", json=body, timeout=60).status_code == 200


@pytest.mark.parametrize("answered", [0, 1], ids=["reading", "writing"])
def test_what_does_not_need_the_remote_model_goes_on_without_it(proxy, url, settings, answered):
    def fault(number, body, answer):
        return passed(answer) if number < answered else (500, b"{}", {})

    with relay(url, fault) as address:
        remote = over(proxy, connect(address, tiny_tokenizer(), replace(settings, cache="off")))
        version, prompt = make_version(remote), ids_of("the cat")[0].tolist()
        scheduler = Scheduler(version, Limits(draft_tokens=2), Metrics(), deliver, num_threads=1)
        tuned, mixed, again = (task(version, prompt, model=name) for name in ("tuned", "proxy", "tuned"))
        scheduler.submit([tuned, mixed])
        scheduler.start()
        tuned.sink.ended(1)
        mixed.sink.wait(lambda events: any(isinstance(event, Failure) and event.reason == "remote" for event in events))
        assert len(mixed.sink.ids()) == answered
        scheduler.submit([again])
        assert again.sink.ended(1).ids() == tuned.sink.ids()
        scheduler.stop(0)
        assert scheduler.join(30)


def test_texts_that_end_at_a_remote_models_context_take_nobody_along(proxy):
    remote = over(proxy, fake_remote(context=64))
    version = make_version(remote, end_ids=frozenset())
    scheduler = Scheduler(version, Limits(draft_tokens=4), Metrics(), deliver, num_threads=1)
    at_the_end = task(version, [5] * 60, max_new_tokens=4)
    short = task(version, [7] * 5, max_new_tokens=40)
    scheduler.submit([at_the_end, short])
    scheduler.start()
    for text, number in ((at_the_end, 4), (short, 40)):
        assert len(text.sink.ended(1).ids()) == number
    scheduler.stop(0)
    assert scheduler.join(30)


def test_nothing_is_asked_about_drafts_that_a_text_does_not_have(proxy):
    remote = over(proxy, fake_remote())
    version = make_version(remote, end_ids=frozenset())
    scheduler = Scheduler(version, Limits(draft_tokens=3), Metrics(), deliver, num_threads=1)
    with_drafts, without = task(version, [5, 6, 7], max_new_tokens=9), task(version, [9, 10], model="large")
    scheduler.submit([with_drafts, without])
    scheduler.start()
    whole = (9, 10, *without.sink.ended(1).ids())
    with_drafts.sink.ended(1)
    scheduler.stop(0)
    assert scheduler.join(30)
    asked = [(text, first) for text, first in remote.large.endpoint.asked if text[:2] == (9, 10)]
    assert asked == [(whole[:length], length - 1) for length in range(2, len(whole))]


def test_what_a_pass_of_a_remote_model_costs_follows_what_its_requests_take(proxy):
    remote = over(proxy, fake_remote())
    costs, usage = StepCosts(remote.steppers()), remote.large.endpoint.usage
    found = []
    for seconds in (1.0, 3.0):
        usage.requests, usage.seconds = 2, seconds
        found.append(costs.seconds("large", 3))
    assert found == [0.5, 1.5]


def test_a_batch_may_end_at_a_remote_models_context():
    large, tuned, untuned = relatives()  # drafts are right now and then, so that rows advance unequally
    local, remote = (
        ProxyModel(model, tuned, untuned, vocab_size=VOCAB) for model in (large, fake_remote(context=64, model=large))
    )
    ids = torch.randint(3, VOCAB, (4, 52), generator=torch.Generator().manual_seed(0))
    asked = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    expected = local.generate(ids, draft_tokens=0, **asked).tolist()
    for drafts in (0, 1, 4):
        assert remote.generate(ids, draft_tokens=drafts, **asked).tolist() == expected


# --- whole programs -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_with_a_remote_large_model_is_that_with_a_local_one(tmp_path, monkeypatch):
    from serving import make_run, serving  # which import Flower: too long for the tests above

    monkeypatch.setenv("FEDPT_HOME", str(tmp_path / "home"))
    small = {"num-server-rounds": 1, "train.max-steps": 4, "scoring.num-items": 6, "scoring.few-shot": 0}
    small |= {"distillation.mode": "final", "distillation.final-steps": 2, "distillation.final-num-prompts": 4}
    local = make_run(tmp_path / "local", small)
    with serving(local) as running:
        prices = {"model.large-url": running.url, "remote.price-sent": 1.0}
        remote = make_run(tmp_path / "remote", small | prices)
        answers = [(run / "answers.jsonl").read_text() for run in (local, remote)]
        written = [
            [json.loads(line)["models"][name]["answer"] for line in text.splitlines() for name in ("large", "proxy")]
            for text in answers
        ]
        assert written[0] == written[1]
        results = [read_json(run / "results.json") for run in (local, remote)]
        for row in ("large", "tuned", "proxy"):
            assert results[0]["rows"][row]["loss"] == pytest.approx(results[1]["rows"][row]["loss"], abs=1e-3)
        costs = results[1]["costs"]
        assert costs["remote_price"] == pytest.approx(costs["remote_tokens_sent"] / 1e6)
        lines = [json.loads(line) for line in (remote / "costs.jsonl").read_text().splitlines()]
        assert {line["phase"] for line in lines if line.get("remote_requests")} >= {"validation", "test", "device"}
        # And it can be loaded again, as long as the service is there.
        again = ProxyModel.from_pretrained(remote)
        assert again.large.endpoint.url == running.url


@pytest.mark.slow
def test_what_a_run_paid_a_service_stays_paid_and_counts_in_its_budget_over_every_resume(tmp_path, monkeypatch):
    from serving import make_run, serving

    from fedpt_flwr.errors import FedPTError

    monkeypatch.setenv("FEDPT_HOME", str(tmp_path / "home"))
    small = {"num-server-rounds": 1, "train.max-steps": 2, "scoring.num-items": 8, "scoring.few-shot": 0}
    small |= {"scoring.round-items": 4, "remote.cache": "off"}
    with serving(make_run(tmp_path / "local", small)) as running:
        small |= {"model.large-url": running.url}
        whole = read_json(make_run(tmp_path / "whole", small) / "results.json")["costs"]
        needed = whole["remote_tokens_sent"] + whole["remote_tokens_received"]
        budget = {"remote.token-budget": needed - 100}
        with pytest.raises(FedPTError, match="budget of .* tokens does not allow another request"):
            make_run(tmp_path / "runs", small | budget)
        (run,) = (path for path in (tmp_path / "runs").iterdir() if not path.is_symlink())

        def paid():
            rows = [json.loads(line) for line in (run / "costs.jsonl").read_text().splitlines()]
            return sum(row.get(f"remote_tokens_{way}", 0) for row in rows for way in ("sent", "received"))

        before = paid()
        assert needed - 300 < before <= needed - 100
        with pytest.raises(FedPTError, match="budget of .* tokens does not allow another request") as raised:
            make_run(tmp_path / "runs", small | budget | {"resume": "latest"})
        assert before <= int(str(raised.value).split(" spent")[0].split("'")[-1].replace(",", ""))
        assert paid() >= before
        before = paid()
        make_run(tmp_path / "runs", small | {"resume": "latest"})
        assert paid() > before + 100
        costs = read_json(run / "results.json")["costs"]
        assert costs["remote_tokens_sent"] + costs["remote_tokens_received"] == paid()
        lines = (run / "costs.jsonl").read_bytes()
        make_run(tmp_path / "runs", small | {"resume": "latest"})
        assert (run / "costs.jsonl").read_bytes() == lines


@pytest.mark.slow
def test_answers_through_a_server_that_this_project_did_not_write(tmp_path):
    from serving import generated

    python = interpreter()
    if python is None:
        pytest.skip("no interpreter with xllamacpp and gguf; FEDPT_LLAMA_PYTHON names one")
    tokenizer, large = load_tokenizer("demo:large"), load_causal_lm("demo:large")
    small = load_causal_lm("demo:small")
    tuned = load_causal_lm("demo:small")
    torch.manual_seed(0)
    for weight in tuned.parameters():
        weight.data += 0.02 * torch.randn_like(weight)
    export(large, tokenizer, tmp_path)
    local = ProxyModel(large, tuned, small, tokenizer=tokenizer)
    prompt = "> can you check the glow for me?\n[Prajelk]\n"
    with llama_server(python, tmp_path) as address:
        for top, sampling in ((0, {}), (0, {"temperature": 1.0, "seed": 3}), (100, {})):
            remote = connect(address, tokenizer, RemoteConfig(top_logprobs=top, cache="off"))
            assert (remote.endpoint.api, remote.endpoint.sends_ids, remote.hides_tokens) == ("next", True, top > 0)
            there = ProxyModel(remote, tuned, small, tokenizer=tokenizer)
            arguments = {"max_tokens": 16, "draft_tokens": 0, **sampling}
            assert generated(there, tokenizer, prompt, **arguments) == generated(local, tokenizer, prompt, **arguments)


def test_the_end_of_a_text_is_a_token_like_others(proxy, url, settings):
    # With a service that names tokens by text, the end token has a name too.
    remote = connect(url, tiny_tokenizer(), replace(settings, api="next", top_logprobs=20))
    assert remote.endpoint._id_of("</s>") == EOS
    assert remote.endpoint._id_of("") == EOS
    assert remote.endpoint._id_of("token_id:7") == 7
    assert remote.endpoint._id_of("token_id:70000") is None
    demo = AutoTokenizer.from_pretrained(str(load_tokenizer("demo:large").name_or_path))
    remote.endpoint._tokenizer, remote.endpoint._spelling = demo, None
    assert remote.endpoint._id_of("\ufffd") is None  # a hundred tokens are parts of characters
