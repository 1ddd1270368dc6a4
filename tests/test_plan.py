"""`fedpt plan`: what is told beforehand beside what runs measured, and what is known of public models."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from importlib import resources

import numpy as np
import pytest
import torch
from federation import QUICK, federate
from flwr.app import ConfigRecord, RecordDict
from local_grid import LocalGrid
from tiny import tiny_llama
from transformers import AutoConfig
from typer.testing import CliRunner

import client_app
from fedpt_flwr import cli
from fedpt_flwr.architectures import ARCHITECTURES, find_architecture
from fedpt_flwr.compare.kinds import KINDS
from fedpt_flwr.config import TuningConfig, flat_values, parse_run_config
from fedpt_flwr.data import batches, num_drawn
from fedpt_flwr.errors import ConfigError, DataError, FedPTError, ModelError, VocabularyMismatch
from fedpt_flwr.inner import make_inner_strategy
from fedpt_flwr.memory import MemoryNeed
from fedpt_flwr.models import fingerprint, load_causal_lm, load_tokenizer, make_tunable, shapes_of, tunable_arrays
from fedpt_flwr.plan import FEDPT, LARGE, LARGE_LORA, Rates, Told, counting, make_plan
from fedpt_flwr.plan.counting import Counting
from fedpt_flwr.plan.texts import find_texts
from fedpt_flwr.plan.wording import beside_run, plan_notes, plan_table
from fedpt_flwr.records import array_bytes, message_bytes, to_array_record
from fedpt_flwr.results import device_cost_row, run_results
from fedpt_flwr.runs import read_json, write_json
from fedpt_flwr.strategy import FedPT
from fedpt_flwr.training import count_flops, count_forward_flops

TOLD = Told(examples=6, prompt_tokens=10, answer_tokens=5, validation_items=4, test_items=3, prompts=20)
"""Nothing is left to be looked at or assumed."""

ALONE = {"distillation.mode": "off", "scoring.round-items": 0, "scoring.few-shot": 0, "scoring.rows": "tuned"}
QWEN = {"model.small": "Qwen2.5-0.5B", "model.large": "Qwen2.5-7B"}


def plan_of(flat=None, num_devices=8, **settings):
    return make_plan(parse_run_config(flat or {}), num_devices, **settings)


def counting_of(flat=None, num_devices=8, *, told=TOLD, rates=None):
    config = parse_run_config(flat or {})
    return Counting(config, FEDPT, find_texts(config, num_devices, told), rates or Rates())


# --- beside what runs measured ---

MEASURED = {
    "all weights": {"distillation.mode": "off"},
    "an adapter, half precision on the wire, alpha chosen": {
        "tuning.mode": "lora",
        "wire.dtype": "float16",
        "proxy.alpha": "auto",
    },
    "an epoch in accumulated batches, FedProx, learnt back after rounds": {
        "train.epochs": 1,
        "train.max-steps": 0,
        "train.batch-size": 3,
        "train.accumulation-steps": 2,
        "train.fedprox-mu": 0.1,
        "fraction-train": 0.67,
        "distillation.mode": "carry",
        "scoring.rows": "tuned,proxy",
        "scoring.few-shot": 0,
    },
    "answers that are chosen": {"distillation.mode": "off", "data.choices": "validation,test"},
    "the tuned model alone": {"distillation.mode": "off", "scoring.rows": "tuned", "scoring.few-shot": 0},
}


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """A run config of a few of the demo world's texts."""
    root, data = tmp_path_factory.mktemp("data"), {}
    for name, every in (("train", 60), ("validation", 24), ("test", 60), ("prompts", 60)):
        lines = resources.files("fedpt_demo_world").joinpath(f"{name}.jsonl").read_text().splitlines()
        (root / f"{name}.jsonl").write_text("\n".join(lines[::every]))
        data[f"data.{name}"] = str(root / f"{name}.jsonl")
    return QUICK | data


def device_costs(flat, num_devices):
    """The devices' costs of a run, without what its server does between rounds: the real ClientApp and strategy."""
    config, rows = parse_run_config(flat), []

    def note(outcome):
        kept = [
            {field.name: getattr(part, field.name) for field in dataclasses.fields(part)} for part in outcome.devices
        ]
        rows.extend(device_cost_row(outcome.server_round, part.pop("device"), **part) for part in kept)

    strategy = FedPT(
        make_inner_strategy(config.strategy), note, fraction_train=config.fraction_train, wire_dtype=config.wire.dtype
    )
    small = load_causal_lm(config.model.small)
    told = ConfigRecord({"small-fingerprint": fingerprint(small)})
    arrays = to_array_record(tunable_arrays(make_tunable(small, config.tuning, seed=config.seed)))
    grid = LocalGrid(client_app.app, num_devices, flat_values(config))
    strategy.start(grid, arrays, num_rounds=config.num_server_rounds, train_config=told)
    return run_results(config, rows, rounds=config.num_server_rounds, num_devices=num_devices, seconds=0.0)["costs"]


def check_devices(planned, costs):
    """What the devices spent; of the tokens, only which texts are drawn is not known beforehand."""
    for cost in ("bytes_down_per_device_and_round", "bytes_up_per_device_and_round"):
        assert planned[cost] == pytest.approx(costs[cost], rel=0.02), cost
    assert planned["device_state_bytes"] == pytest.approx(costs["device_state_bytes"], rel=0.001)
    for cost in ("device_tokens_per_round", "device_flops_per_round"):
        assert planned[cost] == pytest.approx(costs[cost], rel=0.1), cost


@pytest.mark.parametrize("name", MEASURED)
def test_what_is_planned_for_devices_is_what_they_measure(name, few):
    flat = few | MEASURED[name]
    check_devices(counting_of(flat, 3, told=Told()).column().to_json(), device_costs(flat, 3))


@pytest.mark.slow
@pytest.mark.parametrize("name", MEASURED)
def test_what_is_planned_for_a_run_is_what_it_measures(name, few, tmp_path):
    run = federate(tmp_path, 4, few | MEASURED[name])
    costs = read_json(run / "results.json")["costs"]
    fedpt("--run", str(run), "--json", str(tmp_path / "plan.json"))
    told = read_json(tmp_path / "plan.json")
    planned = told["columns"]["fedpt"]
    check_devices(planned, costs)
    phases = {cost for cost in costs if cost.startswith("server_large_tokens")}
    assert phases == {cost for cost in planned if cost.startswith("server_large_tokens")}
    # Where nothing is written, nothing depends on how long it gets.
    tolerance = {"answers that are chosen": 0.03, "the tuned model alone": 0.0}.get(name, 0.1)
    for phase in phases:
        assert planned[phase] == pytest.approx(costs[phase], rel=tolerance), phase
    assert told["measured"] == costs
    assert told["devices"] == 4


def test_the_other_columns_are_the_runs_that_a_comparison_would_make():
    flat = flat_values(parse_run_config(ALONE | {"wire.dtype": "bfloat16", "model.large-dtype": "bfloat16"}))
    for column in plan_of(flat, told=TOLD).columns[1:]:
        of_its_run = counting_of(flat | KINDS[column.name].told(flat, 8)).column()
        for name in ("parameters", "trainable", "bytes_down", "bytes_up", "bytes_in_all", "memory", "tokens", "flops"):
            assert getattr(column, name) == getattr(of_its_run, name), (column.name, name)


# --- counts ---

PUBLISHED = {
    "SmolLM2-135M": 134_515_008,
    "SmolLM2-1.7B": 1_711_376_384,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-7B": 7_615_616_512,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.1-70B": 70_553_706_496,
}


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED.items())
def test_models_that_are_known_by_name_have_the_published_number_of_weights(name, parameters):
    model = shapes_of(find_architecture(name), name)
    assert sum(weight.numel() for weight in model.parameters()) == parameters
    assert all(weight.is_meta for weight in model.parameters())


def test_every_known_model_is_tested_and_named_in_the_help():
    helped = " ".join(cli.plan.__doc__.split())
    assert all(name in helped for name in ARCHITECTURES)
    assert set(ARCHITECTURES) == set(PUBLISHED)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_bytes_of_arrays_are_those_of_a_message_that_holds_them(dtype):
    adapted = make_tunable(tiny_llama(), TuningConfig(mode="lora", lora_rank=2), seed=0)
    for arrays in (tunable_arrays(adapted), {"one": torch.zeros(()), "none": torch.zeros(0, 3), "long": torch.ones(7)}):
        shapes = {name: tuple(array.shape) for name, array in arrays.items()}
        message = RecordDict({"arrays": to_array_record(arrays, dtype)})
        assert array_bytes(shapes, dtype) == message_bytes(message)


@pytest.mark.parametrize(
    ("examples", "size", "steps"), [(10, 4, 1), (10, 4, 3), (10, 4, 8), (1, 4, 5), (8, 4, 2), (3, 1, 7)]
)
def test_examples_drawn_are_those_of_the_batches(examples, size, steps):
    drawn = batches(examples, size, steps, np.random.default_rng(0))
    assert num_drawn(examples, size, steps) == sum(map(len, drawn))


def test_reading_takes_two_operations_a_weight_of_a_matrix_and_learning_six():
    # 44 * 16 + 2 * (4 * 16 * 16 + 3 * 16 * 24) = 5056 weights in matrices.
    model = tiny_llama().requires_grad_(True)
    assert count_forward_flops(model, 10) == 10 * 2 * 5056
    assert count_flops(model, 10) == 3 * count_forward_flops(model, 10)


def test_the_memory_of_a_full_round_is_four_times_the_weights():
    column = counting_of().column()
    assert column.memory.state() == 4 * 4 * column.parameters
    assert column.parameters == column.trainable == sum(w.numel() for w in load_causal_lm("demo:small").parameters())
    assert column.bytes_in_all == 8 * 8 * (column.bytes_down + column.bytes_up)


def test_devices_that_take_part_are_paid_for_and_no_others():
    half = counting_of({"fraction-train": 0.5, "num-server-rounds": 3}).column()
    assert half.bytes_in_all == 4 * 3 * (half.bytes_down + half.bytes_up)


def test_the_devices_of_very_many_rounds_are_as_those_of_some(few, monkeypatch):
    monkeypatch.setattr(counting, "_DRAWN_ROUNDS", 3)
    flat = few | {"fraction-train": 0.5}
    one, three, many = (
        counting_of(flat | {"num-server-rounds": rounds}, 4, told=Told()).device_tokens() for rounds in (1, 3, 10**9)
    )
    assert one != three == many


def test_replies_that_a_strategy_wants_beside_each_other_are_all_in_memory():
    need = MemoryNeed(weights=0, tuned=0, copies=0, activations=0)
    mean, median = (
        counting_of({"strategy.name": name, "distillation.mode": "off"}).server_memory(need)["collecting"]
        for name in ("FedAvg", "FedMedian")
    )
    whole = 4 * 104_688
    assert mean == 3 * whole  # the round's arrays, the sum, a reply
    assert median == (1 + 8 + 1) * whole  # the round's, all replies, the median


def test_a_device_reads_as_many_tokens_as_its_batches_hold():
    # 3 steps of 2 passes over 6 examples in batches of 4: 4 + 2 + 4 + 2 + 4 + 2 examples of 15 tokens.
    flat = {"train.max-steps": 3, "train.accumulation-steps": 2, "train.batch-size": 4}
    assert counting_of(flat).device_tokens() == 18 * 15


def test_tokens_of_scoring_are_those_of_losses_and_of_answers():
    # Losses and answers read 14 tokens of each of 3 test and 2 validation items. Test: losses, answers of the proxy
    # and of the large model. Rounds: losses and the proxy's answers thrice, the large model's answers once.
    flat = ALONE | {"scoring.rows": "large,proxy", "scoring.round-items": 2, "num-server-rounds": 3}
    tokens = counting_of(flat | {"proxy.alpha": "auto"}).server_reads().large
    assert tokens["test"] == 3 * 3 * 14
    assert tokens["validation"] == (3 * 2 + 1) * 2 * 14
    assert tokens["shift"] == 3 * 4 * 14
    assert tokens["examples"] == 2 * 3 * 14
    assert counting_of(ALONE).server_reads().large == {"test": 0}  # the tuned model reads alone
    assert counting_of(ALONE).server_reads().small == 2 * 3 * 14


def test_every_choice_is_read_after_each_prompt_which_is_read_once_for_all_rows(tmp_path):
    (tmp_path / "choices.txt").write_text("coal\ngas\nwood\n")
    chosen = {"data.choices": str(tmp_path / "choices.txt"), "scoring.few-shot": 0}
    texts = find_texts(parse_run_config(chosen), 8, TOLD)
    tokenizer = load_tokenizer("demo:small")
    assert texts.choices == [len(tokenizer(name)["input_ids"]) + 1 for name in ("coal", "gas", "wood")]  # and the end
    read = 10 + sum(number - 1 for number in texts.choices)  # the last token of each is only predicted
    assert not texts.assumed
    flat = ALONE | chosen | {"scoring.rows": "large,proxy", "scoring.round-items": 2, "num-server-rounds": 3}
    reads = counting_of(flat | {"proxy.alpha": "auto"}).server_reads()
    assert reads.large == {
        "validation": 3 * 2 * (14 + read),
        "shift": 3 * 4 * read,
        "test": 3 * (14 + read),
        # What was chosen is known, and no longer than the longest choice: the large model alone reads it.
        "examples": 3 * (10 + max(texts.choices) - 1),
    }
    assert reads.small == 2 * (reads.large["validation"] + reads.large["shift"] + reads.large["test"])
    alone = counting_of(ALONE | chosen).server_reads()  # of the tuned model alone nobody asks the others
    assert (alone.large, alone.small) == ({"test": 0}, 3 * (14 + read))
    assert counting_of(flat).server_reads().large["curve"] == 4 * read


def test_choices_that_are_not_here_are_said_to_be_left_out(tmp_path):
    flat = QWEN | {"data.choices": "test", "data.test": "owner/set", "data.validation": "owner/set"}
    texts = find_texts(parse_run_config(flat), 8, Told())
    assert not texts.choices
    assert "what data.choices names is not here" in " ".join(texts.assumed)


def test_tokens_of_distillation_are_those_of_prompts_answers_and_the_teacher(monkeypatch):
    # 20 prompts of 10 tokens, answers of 5: 14 tokens are read to write each, and 14 to score it, once.
    flat = ALONE | {"distillation.mode": "final", "distillation.final-steps": 30, "distillation.batch-size": 5}
    assert counting_of(flat).server_reads().large["device"] == (20 + 20) * 14
    # Nothing is kept: 20 for the drift, and 30 steps of 5.
    monkeypatch.setattr(counting, "MAX_REMEMBERED_BYTES", 0)
    assert counting_of(flat).server_reads().large["device"] == (20 + 20 + 150) * 14


def test_time_and_money_follow_from_what_is_told_of_machines_and_prices():
    flat = ALONE | {"scoring.rows": "untuned"}  # losses are those of all three models
    column = counting_of(flat, rates=Rates(device_flops=2e9, server_flops=3e9, price=5.0)).column()
    assert column.seconds == column.flops / 2e9
    assert column.server_seconds == column.server_flops / 3e9
    assert column.money == pytest.approx(5.0 * 3 * 14 / 1e6)


# --- what is known, told, assumed ---


def test_texts_are_those_of_the_run_where_they_are_here(few):
    texts = find_texts(parse_run_config(few), 4, Told())
    assert [len(shard) for shard in texts.shards.values()] == [8] * 4
    assert (len(texts.validation), len(texts.test), len(texts.lessons)) == (6, 6, 9)
    assert not texts.assumed


def test_what_is_told_of_texts_wins_over_what_they_are(few):
    texts = find_texts(parse_run_config(few), 4, Told(answer_tokens=7, examples=300, test_items=10))
    assert [len(shard) for shard in texts.shards.values()] == [300] * 4
    assert len(texts.test) == 10
    assert {len(text.answer_ids) for text in texts.shards[0]} == {7}
    assert len({len(text.prompt_ids) for text in texts.shards[0]}) > 1


def test_texts_that_are_told_longer_than_a_run_reads_are_cut_as_it_cuts():
    told = dataclasses.replace(TOLD, prompt_tokens=400, answer_tokens=100)
    texts = find_texts(parse_run_config({"train.max-length": 256}), 8, told)
    ((prompt, answer),) = {(len(text.prompt_ids), len(text.answer_ids)) for text in texts.shards[0]}
    assert (prompt, answer) == (156, 100)
    assert {len(text.prompt_ids) + len(text.answer_ids) for text in texts.test} == {500}  # the models can read 512
    assert {(len(text.prompt_ids), len(text.answer_ids)) for text in texts.lessons} == {(256, 32)}
    assert "that training cuts these texts at train.max-length, 256 tokens" in " ".join(texts.assumed)
    told = dataclasses.replace(TOLD, prompt_tokens=400, answer_tokens=300)
    (text, *_) = find_texts(parse_run_config({"train.max-length": 256}), 8, told).shards[0]
    assert (len(text.prompt_ids), len(text.answer_ids)) == (128, 128)


def test_where_the_number_of_examples_is_told_the_data_is_not_dealt_out():
    texts = find_texts(parse_run_config({}), 100, Told(examples=500))  # of eight sites, each on one device
    assert [len(shard) for shard in texts.shards.values()] == [500] * 100
    assert len({len(text.prompt_ids) for text in texts.shards[0]}) > 1
    assert not texts.assumed


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Told)])
def test_more_than_a_plan_can_count_is_refused_with_its_option(name):
    option = f"--{name.replace('_', '-')}"
    with pytest.raises(
        ConfigError, match=f"^{option}: a plan counts from 1 to 1,000,000 of them, got 1000001; say fewer"
    ):
        Told(**{name: 1_000_001})


def test_more_than_a_plan_can_count_is_refused_of_devices_and_of_what_the_config_says():
    with pytest.raises(ConfigError, match="^--devices: a plan counts up to 1,000,000"):
        plan_of(num_devices=1_000_001)
    with pytest.raises(ConfigError, match="^--test-items: a plan counts from 1 to 1,000,000"):
        find_texts(parse_run_config(QWEN | {"scoring.num-items": 10**9}), 8, Told())


def test_what_nobody_tells_is_assumed_and_said_with_the_option_that_tells_it():
    config = parse_run_config(QWEN)
    assumed = " ".join(find_texts(config, 8, Told()).assumed)
    for option in (
        "--examples",
        "--prompt-tokens",
        "--answer-tokens",
        "--validation-items",
        "--test-items",
        "--prompts",
    ):
        assert option in assumed
    assert not find_texts(config, 8, TOLD).assumed


def test_a_model_is_the_same_by_name_by_folder_and_by_its_config_file(tmp_path):
    known = ARCHITECTURES["SmolLM2-135M"]
    known.config().save_pretrained(tmp_path)
    for ref in ("SmolLM2-135M", "HuggingFaceTB/smollm2-135m", str(tmp_path), str(tmp_path / "config.json")):
        found = find_architecture(ref).to_dict()
        assert {name: found[name] for name in dataclasses.asdict(known)} == dataclasses.asdict(known)


@pytest.mark.parametrize(
    ("flat", "kind", "match"),
    [
        (
            {"model.small": "owner/nobody-has-this"},
            ModelError,
            "nothing is downloaded .*, got 'owner/nobody.*; give the",
        ),
        (
            {"model.small": "/nowhere/config.json"},
            ModelError,
            r"^model.small: cannot be read \(No such file or directory\), got '/nowhere/config.json'",
        ),
        ({"model.small": "acme/Qwen2.5-0.5B"}, ModelError, "model.small: this model is not known here"),
        ({"model.large": "/nowhere"}, ModelError, "model.large: a model's path must be a folder"),
        (QWEN | {"model.large": "Llama-3.1-70B"}, VocabularyMismatch, "they have 128,256 and 151,936 entries"),
        ({"model.small": "SmolLM2-135M"}, VocabularyMismatch, "they have 1,024 and 49,152 entries"),
        ({"min-devices": 9}, ConfigError, "min-devices: a run would wait in vain .*8 devices .*got 9; plan with more"),
        ({"train.max-length": 513}, ConfigError, "train.max-length: must not exceed the 512 tokens"),
        ({"data.train": "/nowhere.jsonl"}, DataError, "/nowhere.jsonl"),
        ({"tuning.mode": "lora", "tuning.lora-targets": "query"}, ModelError, "tuning.lora-targets: .*'query'"),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(flat, kind, match):
    with pytest.raises(kind, match=match):
        plan_of(flat)


def test_a_model_whose_memory_cannot_be_told_is_one_sentence(tmp_path):
    experts = {
        "num_local_experts": 2,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    AutoConfig.for_model("mixtral", **experts, vocab_size=50).to_json_file(tmp_path / "moe.json")
    with pytest.raises(ModelError, match="^model.small: the memory of this model's training cannot be told .* --run"):
        counting_of({"model.small": str(tmp_path / "moe.json")}).column()


@pytest.mark.parametrize(
    "text",
    [
        "[1, 2]",
        "{",
        "{}",
        '{"model_type": "none"}',
        '{"model_type": "llama", "hidden_size": "x"}',
        '{"model_type": "llama", "hidden_size": 9}',
    ],
)
def test_a_file_that_is_no_config_says_so(text, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ModelError, match="must be a config that transformers knows.*config.json'"):
        find_architecture(str(path))


@pytest.mark.parametrize(
    "rates", [{"device_flops": 0.0}, {"server_flops": float("inf")}, {"price": -1.0}, {"price": float("nan")}]
)
def test_a_rate_that_cannot_be_is_refused_with_its_option(rates):
    (name,) = rates
    with pytest.raises(ConfigError, match=f"^--{name.replace('_', '-')}: "):
        Rates(**rates)


# --- the command ---


def fedpt(*arguments):
    result = CliRunner().invoke(cli.app, ["plan", *arguments], catch_exceptions=False, env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_command_prints_a_table_and_writes_the_same_numbers(tmp_path):
    for name, layers in (("small", 1), ("large", 2)):
        tiny_llama(num_hidden_layers=layers).config.to_json_file(tmp_path / f"{name}.json")
    models = " ".join(f"model.{name}='{tmp_path}/{name}.json'" for name in ("small", "large"))
    arguments = ["-c", f"{models} tuning.mode='lora' train.max-length=64", "--devices", "100", "--price", "0.3"]
    text = fedpt(*arguments, "--json", str(tmp_path / "plan.json"))
    told = json.loads((tmp_path / "plan.json").read_text())
    for part in ("FedPT", "all weights", "LoRA rank 8", "5.14 k", "price of these tokens", "Assumed", "100 of 100"):
        assert part in text
    assert told["devices"] == 100
    ours, large, large_lora = (told["columns"][name] for name in (FEDPT, LARGE, LARGE_LORA))
    assert large["device_state_bytes"] == 4 * 4 * 5136
    assert ours["money"] == pytest.approx(ours["server_large_tokens"] * 0.3 / 1e6)
    assert "money" not in large_lora


def test_a_plan_is_not_written_into_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="^--json: there is no such folder, got .*/nope'; make it, or name another"):
        fedpt("--json", str(tmp_path / "nope" / "plan.json"))
    assert not (tmp_path / "nope").exists()


def test_what_goes_through_the_large_model_has_one_name_in_a_plan():
    for alpha, name in ((1.0, "to draw the curve of alphas"), ("auto", "to choose alpha and mask")):
        plan = plan_of({"proxy.alpha": alpha}, told=TOLD)
        for table in (plan_table(plan), beside_run(plan, plan.columns[0].to_json())):
            assert name in {row[0].strip() for row in table}


def test_a_large_model_behind_an_api_is_not_asked_and_only_its_tokens_are_counted(few):
    here = make_plan(parse_run_config(few), 4).columns[0].to_json()
    plan = make_plan(parse_run_config(few | {"model.large-url": "http://127.0.0.1:9/v1", "model.large": "no/such"}), 4)
    (column,) = plan.columns
    there = column.to_json()
    assert plan.to_json()["models"]["large"] == "http://127.0.0.1:9/v1"
    assert there["server_large_tokens"] == here["server_large_tokens"]
    memory = here["server_memory_bytes"]
    assert there["server_memory_bytes"] == memory | {"large": 0, "peak": memory["peak"] - memory["large"]}
    assert 0 < there["server_flops"] < here["server_flops"]
    assert ("decoding_flops_in_large" in there, "decoding_flops_in_large" in here) == (False, True)
    assert "-" in plan_table(plan)[-1]
    assert "http://127.0.0.1:9/v1 and was not asked" in " ".join(plan_notes(plan))


@pytest.fixture
def run(tmp_path, few):
    """The folder of a run that has ended, with a made-up result."""
    config = parse_run_config(few | ALONE)
    folder = tmp_path / "run"
    (folder / "proxy").mkdir(parents=True)
    write_json(folder / "config.json", {"run_config": flat_values(config)})
    write_json(folder / "shards.json", [{"device": device} for device in range(4)])
    write_json(folder / "results.json", {"costs": {"device_flops_per_round": 3e9, "device_seconds_per_round": 2.0}})
    return folder


def test_the_command_shows_what_a_run_measured_beside_its_plan(run):
    text = fedpt("--run", str(run), "--device-flops", "3e9")
    assert "planned / measured" in text
    assert "4 of 4 devices train in each of 2 rounds; distillation: off" in text
    assert re.search(r"operations a second of a device .* 3 GFLOP .* 1.5 GFLOP .* 2.000 ", text)


@pytest.mark.parametrize("option", ["--devices", "-c"])
def test_a_run_is_planned_as_it_was(option, run):
    with pytest.raises(ConfigError, match="^--run: a run has its own config and devices; leave -c and --devices out"):
        fedpt("--run", str(run), option, "4")


def test_a_run_that_has_not_ended_has_nothing_to_show(run):
    (run / "results.json").unlink()
    with pytest.raises(FedPTError, match="run has not ended"):
        fedpt("--run", str(run))


@pytest.mark.parametrize(
    ("name", "text"),
    [("results.json", "[1, 2]"), ("results.json", '{"costs": 3}'), ("results.json", "{"), ("shards.json", '{"a": 1}')],
)
def test_a_run_whose_account_is_damaged_is_refused_with_its_file(name, text, run):
    (run / name).write_text(text)
    with pytest.raises(FedPTError, match=f"{name}: (must hold a run's|cannot be read)"):
        fedpt("--run", str(run))


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/status", os.R_OK), reason="the system does not tell a process's memory")
def test_a_model_of_70_billion_weights_is_planned_in_little_memory():
    # Not getrusage: its peak is at least what the process that started this one held when it did.
    code = (
        "from pathlib import Path\n"
        "from fedpt_flwr.config import parse_run_config; from fedpt_flwr.plan import make_plan\n"
        "flat = {'model.small': 'Llama-3.2-1B', 'model.large': 'Llama-3.1-70B', 'tuning.mode': 'lora'}\n"
        "make_plan(parse_run_config(flat), 100)\n"
        "print(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1e6  # kB


@pytest.mark.parametrize(("bits", "size"), [(32, 4), (16, 2)])
def test_a_masked_answer_is_one_array_of_as_many_bits_as_the_run_says(bits, size):
    column = counting_of({"privacy.secure-sum": True, "min-devices": 3, "privacy.secure-sum-bits": bits}).column()
    assert 0 < column.bytes_up - size * column.trainable < 200
