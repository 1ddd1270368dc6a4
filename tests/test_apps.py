"""The real ServerApp and the real ClientApp, on the demo world, in one process."""

import errno
import json
import logging
import re

import federation
import numpy as np
import pytest
import torch
from federation import final_arrays
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from local_grid import LocalGrid
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import client_app
import server_app
from fedpt_flwr import server
from fedpt_flwr.config import flat_values, parse_run_config
from fedpt_flwr.data import load_records, tokenize_examples
from fedpt_flwr.distiller import Distiller
from fedpt_flwr.errors import ConfigError, DataError, ModelError, RoundError, RunError
from fedpt_flwr.evaluation import Evaluator
from fedpt_flwr.models import load_causal_lm, load_tokenizer, make_tunable, tunable_arrays
from fedpt_flwr.prompts import Template
from fedpt_flwr.proxy import ProxyModel
from fedpt_flwr.shapes import TemplateShape
from fedpt_flwr.sources import held_out_items, public_prompts
from fedpt_flwr.training import device_seed, round_learning_rate, train_locally

SHORT_LESSONS = {
    "distillation.steps": 2,
    "distillation.num-prompts": 6,
    "distillation.final-steps": 3,
    "distillation.final-num-prompts": 6,
}


def federate(root, num_devices=3, run_config=None, **settings):
    return federation.federate(root, num_devices, SHORT_LESSONS | (run_config or {}), **settings)


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One run of three devices."""
    return federate(tmp_path_factory.mktemp("runs"))


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_leaves_what_is_promised(run):
    assert {path.name for path in run.iterdir()} >= {
        "config.json", "results.json", "metrics.jsonl", "costs.jsonl", "answers.jsonl", "examples.jsonl", "shards.json",
        "device", "proxy", "rounds",
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
    assert list(results["rows"]) == ["large", "untuned", "tuned", "proxy", "large_few_shot", "device"]
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
    assert [(row["round"], row["phase"]) for row in rows] == [
        (1, "validation"), (2, "validation"), (2, "test"), (2, "curve"), (2, "examples"), (2, "device")
    ]  # fmt: skip
    # The large model's own rows are measured in round 1 only; the proxy reads through it every time.
    assert rows[0]["large_tokens"] > rows[1]["large_tokens"] > 0
    results = json.loads((run / "results.json").read_text())
    assert results["costs"]["server_large_tokens"] == sum(row["large_tokens"] for row in rows)
    assert results["costs"]["server_large_tokens_device"] == rows[5]["large_tokens"] > 0


def test_metrics_have_every_round_and_phase(run):
    rows = read_lines(run / "metrics.jsonl")
    assert [(row["round"], row["phase"]) for row in rows] == [
        (1, "train"), (1, "validation"), (2, "train"), (2, "validation"), (2, "device")
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


@pytest.mark.slow
def test_the_same_seed_gives_the_same_arrays_and_scores(run, tmp_path):
    again = federate(tmp_path)
    assert_same(final_arrays(run), final_arrays(again))
    first, second = (json.loads((path / "results.json").read_text()) for path in (run, again))
    assert first["rows"] == second["rows"]


@pytest.mark.slow
def test_another_seed_gives_other_arrays(run, tmp_path):
    other = final_arrays(federate(tmp_path, run_config={"seed": 1}))
    assert any(not np.array_equal(values, other[name]) for name, values in final_arrays(run).items())


@pytest.mark.slow
def test_devices_that_work_in_another_order_at_half_participation_give_the_same_arrays(tmp_path):
    worked = {"plain": [], "backwards": []}

    def run_in_order(name, at_once=None):
        def watch(device, message, reply):
            worked[name].append((message.metadata.message_type, device))
            return reply

        settings = {"fraction-train": 0.5, "scoring.round-items": 0}
        return final_arrays(federate(tmp_path / name, 4, settings, tamper=watch, at_once=at_once))

    assert_same(run_in_order("plain"), run_in_order("backwards", lambda ids: ids[::-1]))
    plain, backwards = ([device for kind, device in seen if kind == "train"] for seen in worked.values())
    assert len(plain) == 4
    assert backwards == [plain[1], plain[0], plain[3], plain[2]]


@pytest.mark.slow
def test_a_federation_of_one_device_is_plain_training(tmp_path):
    run = federate(
        tmp_path, 1, {"min-devices": 1, "num-server-rounds": 1, "data.partitioner": "iid", "scoring.round-items": 0}
    )
    config = parse_run_config({"train.max-steps": 2, "train.batch-size": 4})
    model = make_tunable(load_causal_lm("demo:small"), config.tuning, seed=0)
    tokenizer = load_tokenizer("demo:small")
    shape = TemplateShape(Template(config.data.template), "answer")
    examples = [example for item in load_records("demo:train", shape) for example in item.examples]
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
    lora = {"tuning.mode": "lora", "tuning.lora-rank": 2, "train.learning-rate": 0.01}
    run = federate(tmp_path, 2, lora | {"distillation.mode": "carry"})
    arrays = final_arrays(run)
    assert all("lora_" in name for name in arrays)
    assert checkpoint(run, 2, "tuned").keys() == arrays.keys()
    for folder in (run / "device", run / "proxy" / "tuned"):
        weights = load_file(folder / "adapter_model.safetensors")
        assert {name for name in weights if "lora_" in name} == weights.keys()
        assert len(weights) == len(arrays)
    rows = read_lines(run / "costs.jsonl")
    assert max(row.get("bytes_up", 0) for row in rows) < 4 * 100_000 / 2
    proxy = ProxyModel.from_pretrained(run)
    ids = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        shifted = proxy(ids).logits
        proxy.alpha = 0.0
        plain = proxy(ids).logits
    assert not torch.equal(shifted, plain)


@pytest.mark.slow
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


@pytest.mark.slow
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
        "data.prompts": "",
        "distillation.mode": "off",
    }
    run = federate(
        tmp_path / "runs", 2, config,
        node_config=lambda device: {"device-id": device + 10, "data-path": str(tmp_path / f"{device}.jsonl")},
    )  # fmt: skip
    devices = [row["device"] for row in read_lines(run / "costs.jsonl")]
    assert [device for device in devices if device != "server"] == [10, 11, 10, 11]
    assert "large_few_shot" not in json.loads((run / "results.json").read_text())["rows"]


SECRET = "the patient's number is 4711"


@pytest.mark.parametrize(
    ("content", "change", "told", "logged"),
    [
        (f'{{"q": "{SECRET}"', None, "its data cannot be used", "broken JSON"),
        (json.dumps({"q": SECRET, "a": ""}), None, "its data cannot be used", "got an empty one"),
        (json.dumps({"q": SECRET, "a": "x"}), KeyError(SECRET), "it failed with KeyError", SECRET),
    ],
    ids=["broken file", "empty answer", "failure"],
)
def test_a_device_that_cannot_use_its_own_data_says_why_in_its_own_log_only(
    content, change, told, logged, tmp_path, caplog, monkeypatch
):
    def fail(*_args, **_kwargs):
        raise change

    if change:
        monkeypatch.setattr(client_app, "local_shard", fail)
    path = tmp_path / "patients.jsonl"
    path.write_text(content)
    config = flat_values(parse_run_config({})) | {"data.partitioner": "node-local"}
    config |= {"data.template": "{q}", "data.answer-field": "a"}
    grid = LocalGrid(client_app.app, 1, config, node_config=lambda _: {"device-id": 7, "data-path": str(path)})
    question = RecordDict({"config": ConfigRecord({"code-hash": ""})})
    with caplog.at_level(logging.INFO, logger="flwr"):
        ids = grid.push_messages([Message(question, dst_node_id=next(iter(grid.get_node_ids())), message_type="query")])
        (reply,) = grid.pull_messages(ids)
    reason = reply.content["refusal"]["reason"]
    assert reason == f"device 7: {told}; the log of its ClientApp says why"
    assert logged in caplog.text


def test_a_device_without_a_number_shows_no_values_of_its_node_config(tmp_path, caplog):
    settings = {"node_config": lambda _: {"data-path": "/home/alice/letters.jsonl"}}
    text = failing(caplog, tmp_path, RoundError, "0 are", **settings)
    assert "got ['data-path']" in text
    assert "alice" not in text


# --- devices that can bear less than others ---

UNSCORED = {"scoring.round-items": 0, "distillation.mode": "off", "scoring.few-shot": 0}


def limited(limits, num_devices=2):
    """Node configs of devices, of which the last has limits."""

    def node_config(device):
        own = {"partition-id": device, "num-partitions": num_devices}
        return own | (limits if device == num_devices - 1 else {})

    return node_config


def device_rows(run, device):
    return [row for row in read_lines(run / "costs.jsonl") if row["device"] == device]


def test_a_device_does_what_its_limits_allow_and_the_ledger_says_so(tmp_path):
    limits = {"max-batch-size": 3, "max-steps": 1, "dtype": "bfloat16", "threads": 2, "memory-limit-mb": 50_000}
    run = federate(tmp_path, 2, UNSCORED, node_config=limited(limits))
    assert [len(device_rows(run, device)) for device in (0, 1)] == [2, 2]
    for row in device_rows(run, 1):
        assert row["limits"] == limits
        assert (row["num_steps"], row["batch_size"], row["num_examples_seen"]) == (1, 3, 4)
        assert row["memory_estimate_bytes"] > row["state_bytes"]
    for row in device_rows(run, 0):
        assert "limits" not in row
        assert (row["num_steps"], row["batch_size"], row["num_examples_seen"]) == (2, 4, 8)
    assert torch.get_num_threads() == 1


@pytest.mark.slow
def test_smaller_passes_give_the_same_update(tmp_path):
    plain = federate(tmp_path / "plain", 2, UNSCORED)
    limited_run = federate(tmp_path / "limited", 2, UNSCORED, node_config=limited({"max-batch-size": 1}))
    close(final_arrays(limited_run), final_arrays(plain), 1e-4)
    assert [row["num_examples_seen"] for row in device_rows(limited_run, 1)] == [8, 8]


@pytest.mark.slow
def test_a_device_whose_memory_is_too_small_declines_every_round_and_the_others_go_on(tmp_path, caplog):
    def silent(device, message, reply):
        return None if device == 1 and message.metadata.message_type == "train" else reply

    without = federate(tmp_path / "without", 2, UNSCORED, tamper=silent)
    loaded = client_app.load_small_model.cache_info()
    with caplog.at_level(logging.INFO, logger="flwr"):
        run = federate(tmp_path / "limited", 2, UNSCORED, node_config=limited({"memory-limit-mb": 100}))
    assert_same(final_arrays(run), final_arrays(without))
    rows = device_rows(run, 1)
    assert [row["round"] for row in rows] == [1, 2]
    for row in rows:
        assert row["limits"] == {"memory-limit-mb": 100}
        assert row["refused"].startswith(f"device 1, round {row['round']}: training would take about ")
        assert "more than this device's memory-limit-mb, got 100" in row["refused"]
    assert "Round 1: device 1 is left out: device 1, round 1: training would take" in caplog.text
    now = client_app.load_small_model.cache_info()
    assert now.hits + now.misses == loaded.hits + loaded.misses + 2  # device 0's two rounds: device 1 loaded nothing


@pytest.mark.slow
@pytest.mark.parametrize(
    ("aggregation", "held"), [("average", {torch.bfloat16}), ("frozen-a", {torch.bfloat16, torch.float32})]
)
def test_the_frozen_weights_of_an_adapter_are_held_in_the_devices_own_type_and_the_wire_stays_float32(
    aggregation, held, tmp_path
):
    seen = []

    def watch(device, message, reply):
        if message.metadata.message_type == "train":
            loaded = client_app.load_small_model.cache_info().misses
            model, *_ = client_app.load_small_model(*client_app_arguments)
            assert client_app.load_small_model.cache_info().misses == loaded, "another model than the device's"
            frozen = {weight.dtype for weight in model.parameters() if not weight.requires_grad}
            tuned = {weight.dtype for weight in model.parameters() if weight.requires_grad}
            wire = {array.dtype for array in reply.content["arrays"].values()}
            seen.append((frozen, tuned, wire))
        return reply

    settings = UNSCORED | {"min-devices": 1, "num-server-rounds": 1, "tuning.mode": "lora", "tuning.lora-rank": 2}
    settings |= {"tuning.lora-aggregation": aggregation}
    config = parse_run_config(settings)
    client_app_arguments = (config.model, config.tuning, config.seed, "bfloat16", 0)
    federate(tmp_path, 1, settings, node_config=limited({"dtype": "bfloat16"}, 1), tamper=watch)
    assert seen == [(held, {torch.float32}, {"float32"})]  # a first matrix that is not tuned stays as it was drawn


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"max-steps": 0}, "device 1, node config, max-steps: must be a whole number of at least 1, got 0; restart"),
        pytest.param(
            {"dtype": "float16"},
            "device 1, node config, dtype: float16 needs a GPU, got 'float16'; restart",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"max_batch_size": 2},
            "max_batch_size: is not a key of this app; did you mean max-batch-size?",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["value", "type", "name"],
)
def test_a_limit_that_cannot_be_kept_is_said_by_the_device(limits, said, tmp_path, caplog):
    settings = UNSCORED | {"model.device": "cpu", "min-devices": 1, "num-server-rounds": 1}
    with caplog.at_level(logging.INFO, logger="flwr"):
        run = federate(tmp_path, 2, settings, node_config=limited(limits))
    assert "A device cannot take part: device 1, node config, " in caplog.text
    assert said in caplog.text
    assert device_rows(run, 1) == []  # it was never sent a model


@pytest.mark.slow
def test_limits_that_a_reply_makes_up_are_refused(tmp_path):
    def boast(device, message, reply):
        if device == 1 and message.metadata.message_type == "train":
            reply.content["limits"] = ConfigRecord({"max-steps": -3, "dtype": "x" * 100_000})
        return reply

    run = federate(tmp_path, 2, UNSCORED, tamper=boast)
    rows = device_rows(run, 1)
    assert len(rows) == 2
    for row in rows:
        assert "2 limits are wrong" in row["refused"]
        assert len(row["refused"]) < 2000
        assert "limits" not in row


def test_a_device_that_runs_out_of_memory_says_so_and_what_to_do(tmp_path, monkeypatch):
    train = client_app.train_locally

    def too_much(model, *arguments, **settings):
        if settings["seed"] == device_seed(0, 1, 1):
            torch.empty(2**58, dtype=torch.uint8)
        return train(model, *arguments, **settings)

    monkeypatch.setattr(client_app, "train_locally", too_much)
    run = federate(tmp_path, 2, UNSCORED, node_config=limited({"max-steps": 1}))
    first, second = device_rows(run, 1)
    assert first["refused"].startswith("device 1: it ran out of memory; lower max-batch-size in its node config")
    assert first["limits"] == second["limits"] == {"max-steps": 1}
    assert "refused" not in second


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
        "proxy.alpha: must be a finite number or 'auto', got 'much'",
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
    assert "/no/such.jsonl: there is no such file or folder" in marker
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
    for size, extra in (("large", "<one>"), ("small", "<other>")):
        tokenizer, model = load_tokenizer(f"demo:{size}"), load_causal_lm(f"demo:{size}")
        tokenizer.add_tokens([extra])
        model.resize_token_embeddings(len(tokenizer))
        model.save_pretrained(tmp_path / size)
        tokenizer.save_pretrained(tmp_path / size)
    settings = {f"model.{size}": str(tmp_path / size) for size in ("large", "small")}
    failing(caplog, tmp_path, ModelError, r"'<one>' \(1024 / None\), '<other>' \(None / 1024\)", settings)


def test_an_error_that_nobody_foresaw_is_marked_too(caplog, tmp_path, monkeypatch):
    monkeypatch.setattr("fedpt_flwr.server.Server.load", lambda *_, **__: 1 / 0)
    with caplog.at_level(logging.INFO, logger="flwr"), pytest.raises(ZeroDivisionError):
        federate(tmp_path, 2)
    assert "FEDPT-RUN-FAILED: ZeroDivisionError" in caplog.text


def test_a_full_disk_ends_the_run_with_a_sentence_and_whole_checkpoints(caplog, tmp_path, monkeypatch):
    write = server.save_file

    def fills_up_in_round_2(tensors, path):
        if re.search("rounds/[^/]*0002", str(path)):  # and not a time of day
            raise OSError(errno.ENOSPC, "No space left on device")
        write(tensors, path)

    monkeypatch.setattr(server, "save_file", fills_up_in_round_2)
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


@pytest.mark.slow
def test_a_run_in_which_no_round_succeeds_fails_however_patient_it_is(caplog, tmp_path):
    def silent(device, message, reply):
        return reply if message.metadata.message_type == "query" else None

    settings = {"max-failed-rounds": 9}
    failing(caplog, tmp_path, RoundError, "a run needs at least one complete round", settings, tamper=silent)


def test_a_run_whose_last_round_failed_has_its_results_and_is_left_alone(caplog, tmp_path):
    def silent_in_round_2(device, message, reply):
        told = message.content.config_records["config"]
        return None if told.get("server-round") == 2 else reply

    settings = {"max-failed-rounds": 1, "distillation.mode": "off", "scoring.rows": "tuned", "scoring.few-shot": 0}
    run = federate(tmp_path, 2, settings, tamper=silent_in_round_2)
    before = (run / "results.json").read_bytes()
    assert json.loads(before)["rounds"] == 1
    with caplog.at_level(logging.INFO, logger="flwr"):
        federate(tmp_path, 2, settings | {"resume": "latest"})
    assert (run / "results.json").read_bytes() == before
    assert "This run has ended after round 1 and has its results: it is left as it is" in caplog.text


def test_answers_that_leave_no_room_for_a_prompt_are_refused_with_the_key(caplog, tmp_path):
    settings = {"scoring.max-new-tokens": 511}
    failing(caplog, tmp_path, DataError, r"^scoring\.max-new-tokens: the models read 512 tokens", settings)


def test_texts_longer_than_the_small_model_can_read_are_refused(caplog, tmp_path):
    failing(caplog, tmp_path, ConfigError, "train.max-length: must not exceed the 512", {"train.max-length": 513})


@pytest.mark.slow
def test_a_device_cannot_overwrite_what_the_server_measured(tmp_path):
    def boast(device, message, reply):
        if device == 0 and message.metadata.message_type == "train":
            reply.content["metrics"]["bytes-up"] = 1
        return reply

    run = federate(tmp_path, 2, {"scoring.round-items": 0}, tamper=boast)
    rows = device_rows(run, 0)
    assert len(rows) == 2
    assert all(row["bytes_up"] > 100_000 and "unknown metric" in row["refused"] for row in rows)


@pytest.mark.slow
def test_a_proxy_that_loses_to_the_tuned_model_is_said_to(caplog, tmp_path):
    # Against the direction of tuning: the proxy then has a larger loss than the tuned model on every item.
    settings = {"proxy.alpha": -4.0, "scoring.loss-alpha": -4.0, "scoring.round-items": 0, "scoring.num-items": 8}
    with caplog.at_level(logging.WARNING, logger="flwr"):
        federate(tmp_path, 2, settings | {"train.max-steps": 10, "train.batch-size": 8})
    assert "On this data the proxy is worse than the tuned small model by loss" in caplog.text


# --- what the server does after a round, and what is left of it ---

TAUGHT = {"num-server-rounds": 3, "keep-rounds": 0, "scoring.round-items": 0, "distillation.learning-rate": 0.001}


class Watched:
    """What went over the wire in each round: what was sent, and the mean of what came back."""

    def __init__(self):
        self.sent, self.replies = {}, {}

    def __call__(self, device, message, reply):
        if message.metadata.message_type == "train":
            server_round = message.content["config"]["server-round"]
            self.sent[server_round] = {name: array.numpy() for name, array in message.content["arrays"].items()}
            weight = reply.content["metrics"]["num-examples"]
            arrays = {name: array.numpy().astype(np.float64) for name, array in reply.content["arrays"].items()}
            self.replies.setdefault(server_round, []).append((weight, arrays))
        return reply

    def aggregated(self, server_round):
        """FedAvg, as it is written down in the paper."""
        replies = self.replies[server_round]
        total = sum(weight for weight, _ in replies)
        return {name: sum(w * arrays[name] for w, arrays in replies) / total for name in replies[0][1]}


def taught(tmp_path_factory, mode):
    watched = Watched()
    run = federate(tmp_path_factory.mktemp(mode), 2, TAUGHT | {"distillation.mode": mode}, tamper=watched)
    return run, watched


@pytest.fixture(scope="module")
def carry(tmp_path_factory):
    return taught(tmp_path_factory, "carry")


@pytest.fixture(scope="module")
def paired(tmp_path_factory):
    return taught(tmp_path_factory, "paired")


@pytest.fixture(scope="module")
def paper(tmp_path_factory):
    return taught(tmp_path_factory, "paper")


@pytest.fixture(scope="module")
def off(tmp_path_factory):
    """The run of the fixture ``run`` without any distillation."""
    return federate(tmp_path_factory.mktemp("off"), 3, {"distillation.mode": "off"})


def small_weights(model=None):
    model = load_causal_lm("demo:small") if model is None else model
    return {name: weight.detach().numpy() for name, weight in model.named_parameters()}


def differs(first, second, by=0.0):
    return any(np.abs(first[name] - second[name]).max() > by for name in first)


def close(first, second, tolerance=1e-6):
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_allclose(first[name], second[name], rtol=0, atol=tolerance, err_msg=name)


def checkpoint(run, server_round, name="arrays"):
    return load_file(run / "rounds" / f"{server_round:04d}" / f"{name}.safetensors")


def proxy_of(run, server_round):
    return ProxyModel.from_pretrained(run / "rounds" / f"{server_round:04d}" / "proxy")


def results_of(run):
    return json.loads((run / "results.json").read_text())


@pytest.mark.slow
def test_a_copy_for_the_devices_changes_neither_arrays_nor_proxy_nor_any_other_number(run, off):
    assert_same(final_arrays(run), final_arrays(off))
    for name in ("config.json", "tuned/model.safetensors", "tokenizer.json"):
        assert (run / "proxy" / name).read_bytes() == (off / "proxy" / name).read_bytes()
    with_copy, without = results_of(run)["rows"], results_of(off)["rows"]
    assert with_copy.keys() - without.keys() == {"device"}
    assert {name: with_copy[name] for name in without} == without
    assert (run / "examples.jsonl").read_bytes() == (off / "examples.jsonl").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["final", "carry", "paired"])
def test_the_devices_copy_is_loaded_by_transformers_and_is_not_the_proxys_model(mode, request):
    run = request.getfixturevalue("run") if mode == "final" else request.getfixturevalue(mode)[0]
    copied = AutoModelForCausalLM.from_pretrained(run / "device")
    tokenizer = AutoTokenizer.from_pretrained(run / "device")
    assert tokenizer.get_vocab() == load_tokenizer("demo:small").get_vocab()
    ids = tokenizer("> The depot, please.\n", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert copied(ids).logits.isfinite().all()
    tuned = small_weights(ProxyModel.from_pretrained(run).tuned)
    (row,) = [row for row in read_lines(run / "metrics.jsonl") if row["phase"] == "device"]
    assert row["num_steps"] == 3
    assert differs(small_weights(copied), tuned) == (row["share"] > 0)
    assert "device" in results_of(run)["rows"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["off", "paper"])
def test_there_is_no_copy_for_the_devices_where_none_was_asked_for(mode, request):
    run = request.getfixturevalue("off") if mode == "off" else request.getfixturevalue(mode)[0]
    assert not (run / "device").exists()
    assert not [name for name in results_of(run)["rows"] if name.startswith("device")]


@pytest.mark.parametrize(
    "mode",
    ["carry", pytest.param("paired", marks=pytest.mark.slow), pytest.param("paper", marks=pytest.mark.slow)],
)
def test_every_round_begins_with_what_the_checkpoint_before_holds_and_the_first_with_the_small_model(mode, request):
    run, watched = request.getfixturevalue(mode)
    assert sorted(watched.sent) == [1, 2, 3]
    assert_same(watched.sent[1], small_weights())
    for server_round in (1, 2):
        assert_same(watched.sent[server_round + 1], checkpoint(run, server_round))
        # by what was taught, and not by rounding
        assert differs(checkpoint(run, server_round), watched.aggregated(server_round), by=1e-4)
    # after the last round nobody begins, so nobody is taught
    close(checkpoint(run, 3), watched.aggregated(3))


def test_carry_decodes_with_the_sum_of_what_the_devices_changed(carry):
    run, watched = carry
    expected = {name: weights.astype(np.float64) for name, weights in small_weights().items()}
    for server_round in (1, 2, 3):
        made = watched.aggregated(server_round)
        expected = {name: weights + made[name] - watched.sent[server_round][name] for name, weights in expected.items()}
        proxy = proxy_of(run, server_round)
        close(small_weights(proxy.tuned), expected)
        assert_same(small_weights(proxy.tuned), checkpoint(run, server_round, "tuned"))
        assert_same(small_weights(proxy.untuned), small_weights())
    # that is neither what was aggregated last nor what was sent
    for other in (checkpoint(run, 3), watched.sent[3]):
        assert differs(checkpoint(run, 3, "tuned"), other, by=1e-4)


@pytest.mark.slow
def test_paper_decodes_with_what_was_aggregated_and_goes_on_with_what_was_distilled(paper):
    run, watched = paper
    for server_round in (1, 2, 3):
        proxy = proxy_of(run, server_round)
        close(small_weights(proxy.tuned), watched.aggregated(server_round))
        assert_same(small_weights(proxy.untuned), small_weights())


@pytest.mark.slow
def test_what_a_round_taught_can_be_made_again_from_its_checkpoint(paper):
    run, _ = paper
    proxy = proxy_of(run, 2)
    config = parse_run_config(json.loads((run / "config.json").read_text())["run_config"])
    weights = {name: torch.from_numpy(values) for name, values in small_weights(proxy.tuned).items()}
    distiller = Distiller(
        config, proxy, load_tokenizer("demo:small"), prompts=public_prompts(config.data).texts, texts=[],
        trainable=list(weights),
    )  # fmt: skip
    following, _, lesson = distiller.teach_round(2, weights)
    assert_same({name: values.numpy() for name, values in following.items()}, checkpoint(run, 2))
    (row,) = [row for row in read_lines(run / "metrics.jsonl") if (row["round"], row["phase"]) == (2, "distillation")]
    assert (row["kl_first"], row["drift"]) == (lesson.result.kl_first, lesson.drift)
    costs = [row["large_tokens"] for row in read_lines(run / "costs.jsonl") if row.get("phase") == "distillation"]
    assert costs[1] == lesson.large_tokens


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["carry", "paired", "paper"])
def test_drift_is_written_for_every_lesson_and_added_up(mode, request):
    run, _ = request.getfixturevalue(mode)
    rows = [row for row in read_lines(run / "metrics.jsonl") if row["phase"] == "distillation"]
    assert [(row["round"], row["mode"], row["num_steps"]) for row in rows] == [(1, mode, 2), (2, mode, 2)]
    assert rows[0]["drift_total"] == rows[0]["drift"] != 0
    assert rows[1]["drift_total"] == rows[0]["drift"] + rows[1]["drift"]
    results = results_of(run)
    assert results["distillation"] == mode
    assert results["costs"]["server_large_tokens_distillation"] > 0


def test_a_pair_goes_with_its_proxy_and_its_untuned_model_learns(paired):
    run, watched = paired
    untuned = [small_weights(proxy_of(run, server_round).untuned) for server_round in (1, 2, 3)]
    assert_same(untuned[0], small_weights())
    for server_round in (1, 2, 3):
        assert_same(checkpoint(run, server_round, "untuned"), untuned[server_round - 1])
        close(small_weights(proxy_of(run, server_round).tuned), watched.aggregated(server_round))
        following = untuned[min(server_round, 2)]  # after the last round nobody is taught
        assert_same(checkpoint(run, server_round, "next-untuned"), following)
    assert differs(untuned[1], untuned[0])
    assert differs(untuned[2], untuned[1])


@pytest.mark.slow
def test_a_pair_whose_last_round_fails_is_scored_as_it_was_saved(tmp_path):
    def from_round_2(device, message, reply):
        late = message.metadata.message_type == "train" and message.content["config"]["server-round"] == 2
        return spoil(1, message, reply) if late else reply

    settings = {"distillation.mode": "paired", "max-failed-rounds": 1, "distillation.learning-rate": 0.001}
    run = federate(tmp_path, 2, settings | {"scoring.round-items": 0}, tamper=from_round_2)
    assert results_of(run)["rounds"] == 1
    assert scored_again(run, "proxy") == results_of(run)["rows"]["proxy"]


def scored_again(run, name):
    """The row that the proxy that was saved last gets on the run's test items."""
    proxy = ProxyModel.from_pretrained(run)
    config = parse_run_config(json.loads((run / "config.json").read_text())["run_config"])
    items = held_out_items(config.data, "test", seed=0).first(config.scoring.num_items)
    evaluator = Evaluator(items, load_tokenizer("demo:small"), config, proxy, place="data.test")
    return evaluator.score(proxy, rows=(name,)).rows[name].to_json()


def test_the_row_of_the_untuned_model_is_that_of_the_small_model_as_it_came(paired, off):
    assert results_of(paired[0])["rows"]["untuned"] == results_of(off)["rows"]["untuned"]


@pytest.mark.parametrize("mode", ["carry", "paired", "paper"])
def test_the_proxy_that_was_saved_last_is_the_one_that_was_scored(mode, request):
    run, _ = request.getfixturevalue(mode)
    for name in ("tuned", "proxy"):
        assert scored_again(run, name) == results_of(run)["rows"][name]


def test_shards_say_who_has_how_much_of_what(run):
    shards = json.loads((run / "shards.json").read_text())
    assert [shard["device"] for shard in shards] == [0, 1, 2]
    assert [shard["num_examples"] for shard in shards] == [720, 720, 480]
    assert all(set(shard["groups"].values()) == {240} for shard in shards)
    assert sum(len(shard["groups"]) for shard in shards) == 8
    # Eight kinds of one size: a device of three has 3/8 of all kinds and lacks 5/8, one of two lacks 6/8.
    assert [shard["distance"] for shard in shards] == [0.625, 0.625, 0.75]
    form = json.loads((run / "proxy" / "prompt.json").read_text())
    assert form == {"format": "template", "template": "> {request}\n[{unit}]\n"}
    assert results_of(run)["devices"] == 3


def test_examples_are_the_answers_of_the_run_token_by_token(run):
    answers = {row["prompt"]: row for row in read_lines(run / "answers.jsonl")}
    examples = read_lines(run / "examples.jsonl")
    assert len(examples) == len(answers) == 4
    for example in examples:
        row = answers[example["prompt"]]
        assert example["reference"] == row["reference"]
        assert example["models"] == {name: seen["answer"] for name, seen in row["models"].items()}
        written = "".join(token["text"] for token in example["tokens"]).removesuffix("<eos>")
        assert written == example["models"]["proxy"]
        assert all(
            token.keys() == {"text", "changed"} | ({"large"} if token["changed"] else set())
            for token in example["tokens"]
        )
    assert any(token["changed"] for example in examples for token in example["tokens"])


def test_a_shift_that_was_given_is_shown_beside_what_others_would_have_given(run):
    results = results_of(run)
    shift = results["shift"]
    assert (shift["alpha"], shift["plausibility"], shift["chosen_by"], shift["items"]) == (1.0, 0.0, "config", 24)
    assert len(shift["curve"]) == 60
    assert json.loads((run / "proxy" / "config.json").read_text())["alpha"] == 1.0


# --- a shift that is chosen, and an early end ---


@pytest.fixture(scope="module")
def chosen(tmp_path_factory):
    """A run that chooses alpha and mask, and that ends by patience: nothing is right after its first two rounds."""
    settings = {
        "num-server-rounds": 4, "keep-rounds": 0, "train.max-steps": 5, "proxy.alpha": "auto",
        "stop.metric": "exact_match", "stop.patience": 1, "train.learning-rate": 0.02, "distillation.mode": "carry",
    }  # fmt: skip
    return federate(tmp_path_factory.mktemp("chosen"), 2, settings)


def test_alpha_and_mask_that_were_chosen_are_those_of_the_proxy_the_rounds_and_the_results(chosen):
    rows = read_lines(chosen / "metrics.jsonl")
    shifts = {row["round"]: row for row in rows if row["phase"] == "shift"}
    scored = {row["round"]: row for row in rows if row["phase"] == "validation"}
    rounds = sorted(shifts)
    assert rounds == sorted(scored) == list(range(1, rounds[-1] + 1))
    for server_round, shift in shifts.items():
        saved = json.loads((chosen / "rounds" / f"{server_round:04d}" / "proxy" / "config.json").read_text())
        pair = (shift["alpha"], shift["plausibility"])
        assert pair == (saved["alpha"], saved["plausibility"])
        assert pair == (scored[server_round]["alpha"], scored[server_round]["plausibility"])
        right = [point for point in shift["curve"] if point["exact_match"] > 0]
        best = (
            max(point["exact_match"] for point in shift["curve"])
            if right
            else min(point["loss"] for point in shift["curve"])
        )
        by = "exact_match" if right else "loss"
        assert shift["chosen_by"] == by
        assert pair in {(point["alpha"], point["plausibility"]) for point in shift["curve"] if point[by] == best}
    results = results_of(chosen)
    last = shifts[rounds[-1]]
    assert results["shift"] == {name: last[name] for name in results["shift"]}
    assert (results["alpha"], results["plausibility"]) == (last["alpha"], last["plausibility"])
    assert {(shift["alpha"], shift["plausibility"]) for shift in shifts.values()} != {(1.0, 0.0)}
    costs = {(row["round"], row["phase"]) for row in read_lines(chosen / "costs.jsonl") if row["device"] == "server"}
    assert {(server_round, "shift") for server_round in rounds} <= costs
    assert (rounds[-1], "curve") not in costs


def test_a_shift_that_was_chosen_is_in_the_results_whatever_is_scored(tmp_path, caplog):
    settings = {"num-server-rounds": 1, "proxy.alpha": "auto", "scoring.rows": "tuned", "scoring.few-shot": 0}
    with caplog.at_level(logging.INFO, logger="flwr"):
        run = federate(tmp_path, 2, settings)
    rows = {row["phase"]: row for row in read_lines(run / "metrics.jsonl")}
    shift = results_of(run)["shift"]
    assert shift["curve"]
    assert shift == {name: rows["shift"][name] for name in shift}
    assert f"drift to large {rows['device']['drift']:+.3f}; the copy goes" in caplog.text


def test_a_run_that_is_good_enough_ends_early_and_is_scored(tmp_path, caplog):
    settings = {
        "num-server-rounds": 3, "stop.metric": "loss", "stop.target": 100.0, "distillation.mode": "carry",
        "scoring.rows": "tuned", "scoring.num-items": 42, "scoring.few-shot": 0,
    }  # fmt: skip
    with caplog.at_level(logging.INFO, logger="flwr"):
        run = federate(tmp_path, 2, settings)
    assert "Ended after round 1: loss is good enough" in caplog.text
    assert [path.name for path in (run / "rounds").iterdir()] == ["0001"]
    phases = [row["phase"] for row in read_lines(run / "metrics.jsonl")]
    assert phases == ["train", "validation", "device"]  # what is not gone on with is not taught
    results = results_of(run)
    assert results["rounds"] == 1
    # one model was asked for: it has a row, and there is nothing to compare
    rows = results["rows"]
    assert list(rows) == ["tuned", "device", "device_covered", "device_not_covered"]
    assert [row["n"] for row in rows.values()] == [42, 42, 24, 18]
    assert not {"shift", "proxy_minus_tuned", "proxy_minus_large"} & results.keys()
    assert not (run / "examples.jsonl").exists()
    assert all(set(row["models"]) == {"tuned"} for row in read_lines(run / "answers.jsonl"))


def test_a_run_that_gets_no_better_is_ended_by_patience(chosen):
    rows = [row["rows"]["proxy"] for row in read_lines(chosen / "metrics.jsonl") if row["phase"] == "validation"]
    assert [row["exact_match"] for row in rows] == [0, 0]
    assert results_of(chosen)["rounds"] == 2
