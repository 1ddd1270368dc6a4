"""What leaves a device, read from real messages byte by byte, against what docs/privacy.md says."""

import math
import re
from pathlib import Path

import pytest
import torch
from federation import federate

from fedpt_flwr.data import read_records
from fedpt_flwr.demo_world import SLANG
from fedpt_flwr.grid import from_bytes, to_bytes
from fedpt_flwr.models import load_causal_lm, load_tokenizer
from fedpt_flwr.proxy import ProxyModel
from fedpt_flwr.records import array_bytes

APP = Path(__file__).parents[1]
ONE_ROUND = {"num-server-rounds": 1, "distillation.mode": "off", "scoring.rows": "tuned", "scoring.round-items": 0}
ANY_WEIGHT = "every tuned weight"


def documented():
    """The table of docs/privacy.md: message, record and name, without what depends on limits or a refusal."""
    rows = re.findall(r"^\| (query|train) \| `(\w+)` \| (?:`([\w-]+)`|(every tuned weight)) \|", docs(), re.MULTILINE)
    return {(message, record, name or other) for message, record, name, other in rows}


def docs():
    return (APP / "docs" / "privacy.md").read_text()


def names_in(message_type, content):
    """Message, record and name of everything in a reply, however deep."""
    weights = {("train", record, ANY_WEIGHT) for record in content.array_records}
    plain = [*content.config_records.items(), *content.metric_records.items()]
    return weights | {(message_type, record, name) for record, part in plain for name in part}


@pytest.fixture(scope="module")
def wire(tmp_path_factory):
    """Everything that went over the wire in a real federation of two devices: pairs of message and reply."""
    heard = []

    def listen(device, message, reply):
        heard.append((device, to_bytes(message), to_bytes(reply)))
        return reply

    federate(tmp_path_factory.mktemp("runs"), 2, ONE_ROUND, tamper=listen)
    return [(device, from_bytes(message), message, from_bytes(reply), reply) for device, message, reply in heard]


@pytest.fixture(scope="module")
def weights():
    return {name: tuple(weight.shape) for name, weight in load_causal_lm("demo:small").named_parameters()}


def test_exactly_what_the_table_lists_leaves_a_device(wire, weights):
    found = set()
    for _, message, _, reply, _ in wire:
        kind = message.metadata.message_type
        found |= names_in(kind, reply.content)
        for arrays in reply.content.array_records.values():
            assert {name: tuple(array.shape) for name, array in arrays.items()} == weights
            assert {array.dtype for array in arrays.values()} == {"float32"}
    optional = {("train", "metrics", name) for name in ("memory-estimate-bytes", "memory-growth-bytes")}
    assert found - optional == documented() - optional
    assert {message.metadata.message_type for _, message, _, _, _ in wire} == {"query", "train"}


def test_no_text_of_a_device_is_in_any_byte_that_it_sends(wire):
    records = read_records("demo:train")
    texts = {record[name] for record in records for name in ("request", "answer", "unit")}
    texts |= {word for words in SLANG.values() for word in words}
    tokenizer = load_tokenizer("demo:small")
    groups = {record["kind"].encode() for record in records}
    assert len(texts) > 300
    heard = b"".join(reply for *_, reply in wire)
    assert [text for text in texts if len(text) > 5 and text.encode() in heard] == []
    assert any(group in heard for group in groups), "the docs say that group names are sent"
    # Nor a request or answer as token ids, as they would lie in an array of integers.
    for record in records[:200]:
        ids = tokenizer.encode(record["request"])
        assert torch.tensor(ids[:4]).numpy().tobytes() not in heard
        assert torch.tensor(ids[:4], dtype=torch.int32).numpy().tobytes() not in heard


def test_a_reply_is_its_weights_and_little_else(wire, weights):
    own = array_bytes(weights, "float32")
    numbers = sum(4 * math.prod(shape) for shape in weights.values())
    for _, message, _, reply, data in wire:
        if message.metadata.message_type != "train":
            assert len(data) < 1000
            continue
        held = sum(len(array.data) for arrays in reply.content.array_records.values() for array in arrays.values())
        assert numbers <= held <= own
        assert len(data) - held < 0.02 * held


def test_a_device_receives_the_small_model_and_no_more(wire, weights):
    config = {"server-round", "small-fingerprint", "code-hash"}
    for _, message, data, _, _ in wire:
        for arrays in message.content.array_records.values():
            assert set(arrays) == set(weights)
        told = {name for part in message.content.config_records.values() for name in part}
        assert told <= config
        assert len(data) < 1.02 * array_bytes(weights, "float32") + 2000


def test_a_device_with_data_of_its_own_names_no_group(tmp_path):
    source = tmp_path / "own.jsonl"
    source.write_text("".join((APP / "fedpt_demo_world" / "train.jsonl").read_text().splitlines(keepends=True)[:40]))
    heard = []

    def listen(device, message, reply):
        heard.append(to_bytes(reply))
        return reply

    federate(
        tmp_path / "runs",
        1,
        ONE_ROUND | {"data.partitioner": "node-local", "data.train": "", "min-devices": 1},
        tamper=listen,
        node_config=lambda device: {"partition-id": device, "data-path": str(source)},
    )
    (group,) = {record["kind"] for record in read_records(str(source))}
    assert group.encode() not in b"".join(heard)
    assert str(source).encode() not in b"".join(heard)
    assert from_bytes(heard[0]).content.config_records["config"]["groups"] == "{}"


def test_log_probabilities_of_the_service_give_the_difference_away():
    large, untuned, tuned = (load_causal_lm(f"demo:{name}") for name in ("large", "small", "small"))
    with torch.no_grad():
        for weight in tuned.parameters():
            weight.add_(0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    alpha = 0.6
    proxy = ProxyModel(large, tuned, untuned, alpha=alpha)
    ids = torch.tensor([load_tokenizer("demo:small").encode("> need the glow for this one pls\n")])
    with torch.no_grad():
        served = [model(input_ids=ids).logits.log_softmax(-1) for model in (proxy, large)]
        true = tuned(input_ids=ids).logits - untuned(input_ids=ids).logits
    seen = (served[0] - served[1]) / alpha
    constant = (seen - true).mean(-1, keepdim=True)
    torch.testing.assert_close(seen - constant, true, atol=1e-3, rtol=1e-3)


def test_every_test_that_the_table_of_claims_names_is_there():
    named = re.findall(r"`(test_\w+\.py)(?:::(test_\w+))?`", docs())
    assert len(named) > 5
    for file, test in named:
        text = (APP / "tests" / file).read_text()
        assert not test or f"def {test}(" in text, f"{file}::{test}"
