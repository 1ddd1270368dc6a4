"""The real ServerApp and the real ClientApp, on the demo world, in one process."""

import errno
import json
import logging
import random

import numpy as np
import pytest
import torch
from federation import federate, final_arrays
from flwr.app import Array, ArrayRecord, Context, RecordDict

import client_app
import server_app
from fedpt_flwr.config import parse_run_config
from fedpt_flwr.data import load_examples, tokenize_examples
from fedpt_flwr.errors import ConfigError, DataError, ModelError, RoundError, RunError
from fedpt_flwr.models import load_causal_lm, load_tokenizer, make_tunable, tunable_arrays
from fedpt_flwr.proxy import ProxyModel
from fedpt_flwr.training import device_seed, round_learning_rate, train_locally


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One run of three devices."""
    torch.set_num_threads(1)
    return federate(tmp_path_factory.mktemp("runs"))


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_leaves_what_is_promised(run):
    assert {path.name for path in run.iterdir()} >= {
        "config.json", "results.json", "metrics.jsonl", "costs.jsonl", "proxy", "rounds"
    }  # fmt: skip
    assert (run.parent / "latest").resolve() == run
    assert (run / "proxy").resolve() == run / "rounds" / "0002" / "proxy"
    assert not (run / "proxy").readlink().is_absolute()
    config = json.loads((run / "config.json").read_text())
    assert config["run_config"]["train.max-steps"] == 2
    assert set(config["fingerprints"]) == {"large", "small"}
    assert config["versions"]["torch"]


def test_results_have_the_rows_intervals_and_costs(run):
    results = json.loads((run / "results.json").read_text())
    assert list(results["rows"]) == ["large", "untuned", "tuned", "proxy", "large_few_shot"]
    for row in results["rows"].values():
        assert row["n"] == 4
        assert {"loss", "perplexity", "exact_match", "contains_value", "right_field"} <= row.keys()
        low, high = row["ci95"]["loss"]
        assert low <= row["loss"] <= high
        assert row["perplexity"] == pytest.approx(np.exp(row["loss"]))
    assert {"value", "ci95"} == results["proxy_minus_tuned"].keys()
    assert results["alpha"] == results["loss_alpha"] == 1.0
    assert results["costs"]["bytes_up_per_device_and_round"] > 4 * 100_000


def test_costs_have_a_line_for_every_device_and_round(run):
    rows = [row for row in read_lines(run / "costs.jsonl") if row["device"] != "server"]
    assert [(row["round"], row["device"]) for row in rows] == [(r, d) for r in (1, 2) for d in (0, 1, 2)]
    small = load_causal_lm("demo:small")
    own_bytes = sum(weight.numel() * 4 for weight in small.parameters())
    for row in rows:
        assert own_bytes < row["bytes_up"] < 1.02 * own_bytes
        assert own_bytes < row["bytes_down"] < 1.02 * own_bytes
        assert row["num_steps"] == 2
        assert row["num_examples_seen"] == 8
        assert row["state_bytes"] > 4 * own_bytes  # weights, gradients, two moments
        assert row["flops"] > 0


def test_costs_have_what_the_server_spent_on_the_large_model(run):
    rows = [row for row in read_lines(run / "costs.jsonl") if row["device"] == "server"]
    assert [(row["round"], row["phase"]) for row in rows] == [(1, "validation"), (2, "validation"), (2, "test")]
    # The large model's own rows are measured in round 1 only; the proxy reads through it every time.
    assert rows[0]["large_tokens"] > rows[1]["large_tokens"] > 0
    results = json.loads((run / "results.json").read_text())
    assert results["costs"]["server_large_tokens"] == sum(row["large_tokens"] for row in rows)


def test_metrics_have_every_round_and_phase(run):
    rows = read_lines(run / "metrics.jsonl")
    assert [(row["round"], row["phase"]) for row in rows] == [
        (1, "train"), (1, "validation"), (2, "train"), (2, "validation")
    ]  # fmt: skip
    assert rows[2]["train_loss"] < rows[0]["train_loss"]
    assert set(rows[1]["rows"]) == {"large", "untuned", "tuned", "proxy"}
    for row in rows[1]["rows"].values():
        assert {"loss", "perplexity", "exact_match", "contains_value", "right_field"} <= row["ci95"].keys() & row.keys()


def test_the_proxy_of_a_run_loads_and_holds_the_last_arrays(run):
    proxy = ProxyModel.from_pretrained(run)
    arrays = final_arrays(run)
    for name, weight in proxy.tuned.named_parameters():
        np.testing.assert_array_equal(weight.numpy(), arrays[name], err_msg=name)


def test_the_same_seed_gives_the_same_arrays_and_scores(run, tmp_path):
    again = federate(tmp_path)
    assert_same(final_arrays(run), final_arrays(again))
    first, second = (json.loads((path / "results.json").read_text()) for path in (run, again))
    assert first["rows"] == second["rows"]


def test_another_seed_gives_other_arrays(run, tmp_path):
    other = final_arrays(federate(tmp_path, run_config={"seed": 1}))
    assert any(not np.array_equal(values, other[name]) for name, values in final_arrays(run).items())


def test_shuffled_replies_at_half_participation_give_the_same_arrays(tmp_path):
    settings = {"run_config": {"fraction-train": 0.5, "scoring.round-items": 0}, "num_devices": 4}
    plain = federate(tmp_path / "plain", **settings)
    shuffled = federate(tmp_path / "shuffled", order=lambda r: random.Random(len(r)).sample(r, len(r)), **settings)
    backwards = federate(tmp_path / "backwards", order=lambda r: r[::-1], **settings)
    assert_same(final_arrays(plain), final_arrays(shuffled))
    assert_same(final_arrays(plain), final_arrays(backwards))


def test_a_federation_of_one_device_is_plain_training(tmp_path):
    run = federate(
        tmp_path, 1, {"min-devices": 1, "num-server-rounds": 1, "data.partitioner": "iid", "scoring.round-items": 0}
    )
    config = parse_run_config({"train.max-steps": 2, "train.batch-size": 4})
    model = make_tunable(load_causal_lm("demo:small"), config.tuning, seed=0)
    tokenizer = load_tokenizer("demo:small")
    examples = load_examples("demo:train", template=config.data.template, answer_field="answer")
    tokenized, _ = tokenize_examples(examples, tokenizer, max_length=config.train.max_length)
    train_locally(
        model,
        tokenized,
        config.train,
        learning_rate=round_learning_rate(config.train, 1, 1),
        fedprox_mu=0.0,
        pad_id=tokenizer.pad_token_id,
        seed=device_seed(0, 1, 0),
    )
    expected = {name: values.numpy() for name, values in tunable_arrays(model).items()}
    assert_same(final_arrays(run), expected)


def test_lora_sends_the_adapter_only_and_its_proxy_loads(tmp_path):
    run = federate(tmp_path, 2, {"tuning.mode": "lora", "tuning.lora-rank": 2, "train.learning-rate": 0.01})
    arrays = final_arrays(run)
    assert all("lora_" in name for name in arrays)
    rows = read_lines(run / "costs.jsonl")
    assert max(row.get("bytes_up", 0) for row in rows) < 4 * 100_000 / 2
    proxy = ProxyModel.from_pretrained(run)
    ids = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        shifted = proxy(ids).logits
        proxy.alpha = 0.0
        plain = proxy(ids).logits
    assert not torch.equal(shifted, plain)


@pytest.mark.parametrize(
    "settings",
    [
        {"strategy.name": "FedAdam", "strategy.arguments": "eta = 0.01"},
        {"strategy.name": "FedProx", "strategy.arguments": "proximal-mu = 0.1"},
        {"train.fedprox-mu": 0.1},
        {"data.partitioner": "dirichlet"},
        {"proxy.plausibility": 0.01, "proxy.alpha": 0.5},
        {"data.validation": "", "data.test": "", "data.holdout-fraction": 0.01},
        {"train.mixed-precision": "bf16"},
    ],
    ids=lambda settings: " ".join(map(str, settings.values())),
)
def test_other_settings_run_to_their_end(settings, tmp_path):
    run = federate(tmp_path, 2, {"num-server-rounds": 1, "scoring.few-shot": 0} | settings)
    assert json.loads((run / "results.json").read_text())["rows"]["proxy"]["n"] == 4


def test_keep_rounds_bounds_the_checkpoints(tmp_path):
    run = federate(tmp_path, 2, {"num-server-rounds": 3, "keep-rounds": 1, "scoring.round-items": 0})
    assert [path.name for path in (run / "rounds").iterdir()] == ["0003"]


def test_devices_with_data_of_their_own_need_no_common_source(tmp_path):
    lines = [json.dumps({"q": f"number {n} ?", "a": str(n)}) for n in range(12)]
    for device in (0, 1):
        (tmp_path / f"{device}.jsonl").write_text("\n".join(lines[6 * device : 6 * device + 6]))
    (tmp_path / "held.jsonl").write_text("\n".join(lines[:3]))
    config = {
        "data.partitioner": "node-local",
        "data.template": "{q}\n",
        "data.answer-field": "a",
        "data.validation": str(tmp_path / "held.jsonl"),
        "data.test": str(tmp_path / "held.jsonl"),
        "data.train": "",
        "data.public": "",
    }
    run = federate(
        tmp_path / "runs", 2, config,
        node_config=lambda device: {"device-id": device + 10, "data-path": str(tmp_path / f"{device}.jsonl")},
    )  # fmt: skip
    devices = [row["device"] for row in read_lines(run / "costs.jsonl")]
    assert [device for device in devices if device != "server"] == [10, 11, 10, 11]
    assert "large_few_shot" not in json.loads((run / "results.json").read_text())["rows"]


def spoil(device, message, reply):
    """Device 1 answers NaN."""
    if device == 1 and message.metadata.message_type == "train" and reply.has_content():
        arrays = {name: array.numpy() * np.float32("nan") for name, array in reply.content["arrays"].items()}
        reply.content["arrays"] = ArrayRecord({name: Array(values) for name, values in arrays.items()})
    return reply


def test_a_device_that_answers_nan_costs_its_reply_and_nothing_else(tmp_path):
    run = federate(tmp_path, 3, tamper=spoil)
    assert all(np.isfinite(values).all() for values in final_arrays(run).values())
    refused = [row for row in read_lines(run / "costs.jsonl") if "refused" in row]
    assert [(row["round"], row["device"]) for row in refused] == [(1, 1), (2, 1)]
    assert "not finite" in refused[0]["refused"]


def failing(caplog, tmp_path, error, match, run_config=None, **settings):
    """Run into an error; the log of what was said."""
    with caplog.at_level(logging.INFO, logger="flwr"), pytest.raises(error, match=match):
        federate(tmp_path / "runs", 2, run_config, **settings)
    said = [record.getMessage() for record in caplog.records if record.name == "flwr"]
    assert said[-1].startswith("FEDPT-RUN-FAILED: ")
    assert "\n" not in said[-1]
    return "\n".join(said)


def test_all_devices_failing_ends_the_run_with_their_reasons_and_keeps_earlier_rounds(caplog, tmp_path):
    def from_round_2(device, message, reply):
        if message.metadata.message_type == "train" and message.content["config"]["server-round"] == 2:
            return spoil(1, message, reply)
        return reply

    text = failing(caplog, tmp_path, RoundError, "round 2 needs 1 usable replies", tamper=from_round_2)
    assert "device 0, round 2: array model.embed_tokens.weight" in text
    assert "device 1, round 2: array model.embed_tokens.weight" in text
    runs = [path for path in (tmp_path / "runs").iterdir() if not path.is_symlink()]
    assert ProxyModel.from_pretrained(runs[0])


def test_all_wrong_settings_are_said_at_once(caplog):
    wrong = {"train.batch-size": 0, "proxy.alpha": "much", "trian.epochs": 1}
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=wrong)
    with caplog.at_level(logging.INFO, logger="flwr"), pytest.raises(ConfigError, match="3 settings"):
        server_app.app(None, context)
    for sentence in (
        "train.batch-size: must be at least 1, got 0",
        "proxy.alpha: must be a number, got 'much'",
        "trian.epochs: is not a key of this app; did you mean train.epochs?",
    ):
        assert sentence in caplog.text


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        (
            {"model.large": "/no/such/folder"},
            ModelError,
            "^model.large: a model's path must be a folder that exists, got '/no/such",
        ),
        ({"data.train": "/no/such.jsonl"}, RoundError, "no device can take part: .*no such"),
        ({"data.test": "/no/such.jsonl"}, DataError, "no such"),
        ({"strategy.name": "FedBest"}, ConfigError, "must be one of"),
        ({"data.answer-field": "reply"}, DataError, "reply"),
        ({"tuning.mode": "lora", "tuning.lora-targets": "query"}, ModelError, "it has .*q_proj"),
        ({"model.device": "cuda:7"}, ModelError, "CUDA devices"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_wrong_setting_ends_the_run_with_its_sentence(settings, error, match, caplog, tmp_path):
    failing(caplog, tmp_path, error, match, settings)


def test_what_devices_find_wrong_reaches_the_log(caplog, tmp_path):
    text = failing(caplog, tmp_path, RoundError, "no device can take part", {"data.train": "/no/such.jsonl"})
    marker = text.splitlines()[-1]
    assert marker.startswith("FEDPT-RUN-FAILED: no device can take part: ")
    assert "/no/such.jsonl" in marker
    assert text.count("A device cannot take part") == 1


def test_more_devices_than_groups_names_dirichlet(caplog, tmp_path):
    settings = {"node_config": lambda device: {"partition-id": device, "num-partitions": 9}}
    assert "dirichlet" in failing(caplog, tmp_path, RoundError, "no device can take part", **settings)


def test_a_device_without_a_number_says_how_to_give_one(caplog, tmp_path):
    text = failing(caplog, tmp_path, RoundError, "at least 2 devices", node_config=lambda device: {})
    assert "--node-config 'device-id=0'" in text


def test_another_small_model_on_the_device_is_refused(caplog, tmp_path, monkeypatch):
    monkeypatch.setattr(client_app, "fingerprint", lambda model: "0" * 16)
    client_app.load_small_model.cache_clear()
    text = failing(caplog, tmp_path, RoundError, "round 1 needs 1 usable replies")
    client_app.load_small_model.cache_clear()
    assert "server and device must have the same small model" in text


def test_two_vocabularies_that_differ_are_refused_with_the_first_differences(caplog, tmp_path):
    tokenizer = load_tokenizer("demo:large")
    tokenizer.add_tokens(["<extra>"])
    model = load_causal_lm("demo:large")
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path / "large")
    tokenizer.save_pretrained(tmp_path / "large")
    settings = {"model.large": str(tmp_path / "large")}
    failing(caplog, tmp_path, ModelError, r"1 of 102\d / 102\d entries differ, the first .*'<extra>'", settings)


def test_an_error_that_nobody_foresaw_is_marked_too(caplog, tmp_path, monkeypatch):
    monkeypatch.setattr("server_app.Server.load", lambda *_: 1 / 0)
    with caplog.at_level(logging.INFO, logger="flwr"), pytest.raises(ZeroDivisionError):
        federate(tmp_path, 2)
    assert "FEDPT-RUN-FAILED: ZeroDivisionError" in caplog.text


def test_a_full_disk_ends_the_run_with_a_sentence_and_whole_checkpoints(caplog, tmp_path, monkeypatch):
    write = server_app.save_file

    def fills_up_in_round_2(tensors, path):
        if "0002" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(tensors, path)

    monkeypatch.setattr(server_app, "save_file", fills_up_in_round_2)
    text = failing(caplog, tmp_path, RunError, "No space left on device")
    assert "what was written before is whole" in text
    run = next(path for path in (tmp_path / "runs").iterdir() if not path.is_symlink())
    assert [path.name for path in (run / "rounds").iterdir()] == ["0001"]
    assert ProxyModel.from_pretrained(run)


def test_a_checkpoint_that_lacks_weights_is_refused(caplog, tmp_path):
    large = load_causal_lm("demo:large")
    large.config.num_hidden_layers += 1
    large.save_pretrained(tmp_path / "large")
    load_tokenizer("demo:large").save_pretrained(tmp_path / "large")
    failing(caplog, tmp_path, ModelError, "the checkpoint lacks", {"model.large": str(tmp_path / "large")})


def test_fp16_on_a_cpu_is_declined_instead_of_ignored(caplog, tmp_path):
    settings = {"train.mixed-precision": "fp16", "model.device": "cpu"}
    assert "fp16 needs a GPU" in failing(caplog, tmp_path, RoundError, "round 1 needs 1 usable", settings)


@pytest.mark.parametrize("key", ["data.template", "data.public-template"])
def test_a_wrong_template_is_named_by_its_key(key, caplog, tmp_path):
    failing(caplog, tmp_path, ConfigError, f"^{key}: the template cannot be read", {key: "{request"})


def test_a_run_in_which_no_round_succeeds_fails_however_patient_it_is(caplog, tmp_path):
    def silent(device, message, reply):
        return reply if message.metadata.message_type == "query" else None

    settings = {"max-failed-rounds": 9}
    failing(caplog, tmp_path, RoundError, "a run needs at least one complete round", settings, tamper=silent)


def test_texts_longer_than_the_small_model_can_read_are_refused(caplog, tmp_path):
    failing(caplog, tmp_path, ConfigError, "train.max-length: must not exceed the 512", {"train.max-length": 513})


def test_a_device_cannot_overwrite_what_the_server_measured(tmp_path):
    def boast(device, message, reply):
        if device == 0 and message.metadata.message_type == "train":
            reply.content["metrics"]["bytes-up"] = 1
        return reply

    run = federate(tmp_path, 2, {"scoring.round-items": 0}, tamper=boast)
    rows = [row for row in read_lines(run / "costs.jsonl") if row["device"] == 0]
    assert all(row["bytes_up"] > 100_000 and "unknown metric" in row["refused"] for row in rows)


def test_a_proxy_that_loses_to_the_tuned_model_is_said_to(caplog, tmp_path):
    # Against the direction of tuning: the proxy then has a larger loss than the tuned model on every item.
    settings = {"proxy.alpha": -4.0, "scoring.loss-alpha": -4.0, "scoring.round-items": 0, "scoring.num-items": 8}
    with caplog.at_level(logging.WARNING, logger="flwr"):
        federate(tmp_path, 2, settings | {"train.max-steps": 10, "train.batch-size": 8})
    assert "On this data the proxy is worse than the tuned small model by loss" in caplog.text
