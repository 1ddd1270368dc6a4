"""What a device's node config allows: read, refused, applied; and the memory that a round is told to take."""

import ctypes
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import VOCAB, tiny_gpt2, tiny_llama

from benchmarks import limits
from fedpt_flwr import memory
from fedpt_flwr.config import ModelConfig, RunConfig, TrainConfig, TuningConfig, parse_run_config
from fedpt_flwr.data import TokenizedExample
from fedpt_flwr.errors import DeviceError
from fedpt_flwr.limits import DeviceLimits, limits_markdown, parse_limits
from fedpt_flwr.memory import check_fits, is_out_of_memory, training_memory
from fedpt_flwr.models import (
    hold_frozen_weights_in,
    load_causal_lm,
    load_tokenizer,
    make_tunable,
    model_without_weights,
)

ALL = {"max-batch-size": 2, "max-steps": 3, "memory-limit-mb": 800, "dtype": "bfloat16", "threads": 4}


def test_limits_are_read_and_written_by_their_keys_and_other_keys_are_left_alone():
    assert parse_limits({}, place="here") == DeviceLimits()
    limits = parse_limits(ALL | {"partition-id": 1, "data-path": "/data", "colour": "blue"}, place="here")
    assert limits.to_flat() == ALL
    assert DeviceLimits().to_flat() == {}


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("max-batch-size", 0, "must be a whole number of at least 1"),
        ("max-batch-size", 2.0, "must be a whole number of at least 1"),
        ("max-steps", True, "must be a whole number of at least 1"),
        ("max-steps", "3", "must be a whole number of at least 1"),
        ("memory-limit-mb", -1, "must be a number greater than 0"),
        ("memory-limit-mb", float("nan"), "must be a number greater than 0"),
        ("memory-limit-mb", float("inf"), "must be a number greater than 0"),
        ("dtype", "int8", "must be one of float32, bfloat16, float16"),
        ("dtype", ["float32"], "must be one of float32, bfloat16, float16"),
        ("threads", 5000, "must be a whole number from 1 to 1024"),
    ],
)
def test_a_wrong_limit_is_refused_with_key_value_device_and_remedy(key, value, rule):
    with pytest.raises(DeviceError) as caught:
        parse_limits({key: value}, place="device 7")
    assert str(caught.value) == (
        f"device 7, node config, {key}: {rule}, got {value!r}; restart its SuperNode with another {key} in "
        "--node-config, or without"
    )


def test_a_mistyped_limit_is_refused_instead_of_ignored_and_all_errors_are_said_at_once():
    with pytest.raises(DeviceError, match="device 7: 2 limits are wrong") as caught:
        parse_limits({"max-batchsize": 2, "threads": 0}, place="device 7")
    assert "max-batchsize: is not a key of this app; did you mean max-batch-size?" in str(caught.value)
    assert "threads: must be" in str(caught.value)


@pytest.mark.parametrize(
    ("asked", "limit", "steps"), [(20, 3, 3), (2, 3, 2), (0, 3, 3), (20, None, 20)], ids=lambda value: str(value)
)
def test_steps_are_those_of_the_run_or_of_the_device_whichever_are_fewer(asked, limit, steps):
    assert DeviceLimits(max_steps=limit).apply(TrainConfig(max_steps=asked)).max_steps == steps


def test_a_type_replaces_the_runs_precision_and_nothing_else_is_changed():
    train = TrainConfig(mixed_precision="bf16")
    assert DeviceLimits(dtype="float32").apply(train).mixed_precision == "no"
    assert DeviceLimits(dtype="bfloat16").apply(TrainConfig()).mixed_precision == "bf16"
    others = DeviceLimits(max_batch_size=1, memory_limit_mb=1, threads=2)
    assert others.apply(train) == train


def test_the_table_of_the_documentation_is_made_from_the_limits():
    text = (Path(__file__).parents[1] / "docs" / "deployment.md").read_text()
    assert limits_markdown() in text


# --- memory ---


def saved(model, folder):
    model.save_pretrained(folder)
    return ModelConfig(small=str(folder))


def examples(number=8, prompt=20, answer=4):
    return [TokenizedExample([5] * prompt, [6] * answer) for _ in range(number)]


def need(
    model, tuning=None, *, batch_size=4, dtype="float32", with_fedprox=False, with_clipping=False, shard=None, **train
):
    return training_memory(
        model,
        tuning or TuningConfig(),
        TrainConfig(**train),
        shard or examples(),
        dtype=dtype,
        batch_size=batch_size,
        with_fedprox=with_fedprox,
        with_clipping=with_clipping,
    )


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("tuning", [TuningConfig(), TuningConfig(mode="lora", lora_rank=2)], ids=["full", "lora"])
def test_weights_are_counted_from_the_config_alone_as_they_are_once_loaded(make, tuning, tmp_path):
    model = saved(make(), tmp_path)
    loaded = make_tunable(load_causal_lm(model.small), tuning, seed=0)
    told = need(model, tuning)
    assert told.weights == sum(4 * weight.numel() for weight in loaded.parameters())
    assert told.tuned == sum(4 * weight.numel() for weight in loaded.parameters() if weight.requires_grad)
    assert all(weight.is_meta for weight in model_without_weights(model.small).parameters())


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("tuning", [TuningConfig(), TuningConfig(mode="lora", lora_rank=2)], ids=["full", "lora"])
def test_activations_are_those_that_a_real_forward_pass_keeps(make, tuning, tmp_path):
    model = saved(make(), tmp_path)
    loaded = make_tunable(load_causal_lm(model.small), tuning, seed=0).train()
    kept = {weight.untyped_storage().data_ptr(): 0 for weight in loaded.parameters()}

    def keep(tensor):
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
        return tensor

    ids = torch.full((4, 24), 5)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = loaded(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    del output
    told = memory._kept_for_backward(memory._shape(model, tuning), 4, 24, model.small)
    assert told == pytest.approx(sum(kept.values()), rel=0.35)


def test_activations_grow_with_the_batch_and_a_batch_never_exceeds_the_shard(tmp_path):
    model = saved(tiny_llama(), tmp_path)
    sizes = [need(model, batch_size=size).activations for size in (1, 2, 4, 8, 16)]
    assert sizes[0] < sizes[1] < sizes[2] < sizes[3] == sizes[4]
    assert sizes[1] < 2.2 * sizes[0]
    assert need(model, gradient_checkpointing=True).activations < need(model).activations


def test_scores_are_counted_from_the_end_of_the_shortest_prompt(tmp_path):
    model = saved(tiny_llama(), tmp_path)
    alike, mixed = examples(8), [*examples(7), *examples(1, prompt=2, answer=22)]
    more = 2 * 4 * 18 + 3 * (22 - 4)  # positions of four rows, and tokens of the longest answer
    assert need(model, shard=mixed).activations - need(model, shard=alike).activations == VOCAB * more * 4


def test_a_shorter_type_halves_the_frozen_weights_and_fedprox_keeps_a_copy(tmp_path):
    model, lora = saved(tiny_llama(), tmp_path), TuningConfig(mode="lora", lora_rank=2)
    long, short = need(model, lora), need(model, lora, dtype="bfloat16")
    assert short.weights - short.tuned == (long.weights - long.tuned) / 2
    assert short.tuned == long.tuned
    assert need(model, with_fedprox=True).copies - need(model).copies == need(model).tuned


def test_clipping_on_the_device_is_counted_where_it_is_the_peak(tmp_path):
    model = saved(tiny_llama(), tmp_path)
    plain, clipped = need(model), need(model, with_clipping=True)
    assert plain.clipping == 0
    assert clipped.clipping == 10 * clipped.tuned
    few = dataclasses.replace(clipped, activations=0)
    assert few.total() - dataclasses.replace(few, clipping=0).total() == 11 * clipped.tuned - 5 * clipped.tuned


def test_what_does_not_fit_is_said_with_its_parts_and_the_batch_that_would(tmp_path):
    config = RunConfig(model=saved(tiny_llama(), tmp_path), train=TrainConfig(batch_size=16))
    shard = examples(16, 60)
    settings = {"dtype": "float32", "batch_size": 16, "with_fedprox": False, "base_bytes": 400_000_000}

    def check(limit_mb):
        return check_fits(config, shard, limit_mb=limit_mb, place="device 7, round 2", **settings)

    need_of = {
        size: need(config.model, batch_size=size, shard=shard).total() + settings["base_bytes"] for size in (16, 8)
    }
    assert check(need_of[16] / 1e6) == need_of[16] - settings["base_bytes"]
    with pytest.raises(DeviceError, match=r"^device 7, round 2: training would take about \d+ MB") as caught:
        check(need_of[8] / 1e6)
    assert "more than this device's memory-limit-mb, got" in str(caught.value)
    assert "set max-batch-size=8, or raise memory-limit-mb in its node config" in str(caught.value)
    with pytest.raises(DeviceError, match="shorten train.max-length, tune an adapter, or raise memory-limit-mb"):
        check(100)


def test_a_model_that_looks_at_values_cannot_be_told_and_says_so(tmp_path, monkeypatch):
    model = saved(tiny_llama(), tmp_path)
    shape = memory._shape(model, TuningConfig())
    monkeypatch.setattr(shape, "forward", lambda **_: bool(torch.zeros(1, device="meta")))
    with pytest.raises(DeviceError, match="memory-limit-mb: the memory of this model's training cannot be told"):
        need(model)
    memory._shape.cache_clear()


def test_real_lack_of_memory_is_told_from_other_errors():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**58, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("out of paper"))


def test_rotary_frequencies_stay_as_they_are_when_frozen_weights_are_shortened():
    model = tiny_llama()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    hold_frozen_weights_in(model.requires_grad_(False).parameters(), "bfloat16")
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert before
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_the_defaults_of_a_run_are_not_changed_by_a_device_without_limits():
    train = parse_run_config({}).train
    assert DeviceLimits().apply(train) == train


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the system does not tell")
@pytest.mark.parametrize("mode", ["full", "lora"])
def test_a_process_takes_no_more_than_was_told_and_not_much_less(mode, tmp_path):
    model = tiny_llama(vocab=12000, hidden_size=320, intermediate_size=800, num_hidden_layers=6, num_attention_heads=4)
    model.save_pretrained(tmp_path)
    load_tokenizer("demo:small").save_pretrained(tmp_path)
    settings = {"model.small": str(tmp_path), "tuning.mode": mode, "train.max-steps": 2, "train.batch-size": 32}
    figures = limits.measured(settings)
    assert figures["growth"] < figures["estimate"] < 2.5 * figures["growth"]


FAULTS = """
import ctypes, json, resource
import torch
from fedpt_flwr.memory import give_freed_memory_back, keeping_freed_memory

def faults(megabytes):
    \"\"\"Pages that the system has to clear for a tensor that comes and goes fifty times, in tensors.\"\"\"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(50):
        torch.ones(megabytes << 18)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize() / (megabytes << 20)

ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # no huge pages, where the system would give them by itself
# Larger every time: what is given back must not find room that smaller ones have left.
faults(4)
found = [faults(4)]
with keeping_freed_memory():
    found.append(faults(4))
give_freed_memory_back()
found.append(faults(8))
with keeping_freed_memory():
    faults(12)
    found.append(faults(12))
found.append(faults(16))
print(json.dumps(found))
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="not glibc")
def test_freed_memory_is_given_back_where_asked_and_kept_while_a_model_computes():
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    as_ever, outside, given_back, kept, after = json.loads(done.stdout)
    assert max(as_ever, outside, kept) < 5  # of 50 tensors
    assert min(given_back, after) > 45


# --- the rank of a device's adapter ---


@pytest.mark.parametrize(
    ("tuning", "rank", "expected"),
    [
        ({"mode": "full"}, None, 0),
        ({"mode": "lora"}, None, 0),
        ({"mode": "lora"}, 8, 0),  # the run's own
        ({"mode": "lora", "lora_aggregation": "exact"}, 3, 3),
        ({"mode": "lora", "lora_aggregation": "frozen-a"}, 1, 1),
    ],
)
def test_a_device_says_its_rank_where_it_is_not_the_runs(tuning, rank, expected):
    assert DeviceLimits(lora_rank=rank).rank_of(TuningConfig(**tuning), place="device 1") == expected


@pytest.mark.parametrize(
    ("tuning", "rank", "words"),
    [
        ({"mode": "full"}, 8, "this run tunes no adapter (tuning.mode='full'), got 8; leave lora-rank out"),
        ({"mode": "lora", "lora_aggregation": "exact"}, 9, "must be at most the run's tuning.lora-rank of 8, got 9"),
        ({"mode": "lora"}, 4, "with tuning.lora-aggregation='average' all adapters must have one rank"),
    ],
)
def test_a_rank_that_the_run_cannot_have_is_declined(tuning, rank, words):
    with pytest.raises(DeviceError) as raised:
        DeviceLimits(lora_rank=rank).rank_of(TuningConfig(**tuning), place="device 1")
    assert str(raised.value).startswith(f"device 1, node config, lora-rank: {words}")
