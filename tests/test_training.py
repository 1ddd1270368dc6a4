import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from tiny import EOS, PAD, VOCAB, tiny_gpt2, tiny_llama

from fedpt_flwr import training
from fedpt_flwr.config import TrainConfig, TuningConfig
from fedpt_flwr.data import TokenizedExample, batches, collate, collate_packed
from fedpt_flwr.errors import DataError, DeviceError
from fedpt_flwr.models import make_tunable, set_arrays, tunable_arrays
from fedpt_flwr.training import (
    TaskMemory,
    count_flops,
    device_seed,
    num_steps,
    round_learning_rate,
    train_locally,
)

# peft and this project ask transformers by names that it has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

RATE = 0.01


def shard(number=10, seed=0):
    """Examples of different lengths."""
    rng = np.random.default_rng(seed)
    return [
        TokenizedExample(
            rng.integers(3, VOCAB, rng.integers(1, 6)).tolist(),
            [*rng.integers(3, VOCAB, rng.integers(1, 5)).tolist(), EOS],
        )
        for _ in range(number)
    ]


def fresh(seed=0, tuning=None, **settings):
    return make_tunable(tiny_llama(seed, **settings).requires_grad_(False), tuning or TuningConfig(), seed=1)


def train(model, examples=None, *, rate=RATE, mu=0.0, seed=5, max_piece=0, **settings):
    config = TrainConfig(**{"max_steps": 4, "batch_size": 4, **settings})
    examples = shard() if examples is None else examples
    return train_locally(
        model, examples, config, learning_rate=rate, fedprox_mu=mu, pad_id=PAD, seed=seed, max_batch_size=max_piece
    )


def trained(*, tuning=None, **settings):
    """The weights after training a fresh model."""
    model = fresh(tuning=tuning)
    train(model, **settings)
    return tunable_arrays(model)


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def close(one, other, tolerance=1e-6):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=tolerance)


# --- the loss ---


@pytest.mark.parametrize("put", [collate, collate_packed])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_the_loss_and_its_gradients_are_those_of_all_scores_though_few_are_computed(put, make):
    model = make().requires_grad_(True)
    batch = put([TokenizedExample([5] * 6, [7, 8, EOS]), TokenizedExample([9] * 4, [5, EOS])], PAD)
    widths = []
    model.get_output_embeddings().register_forward_hook(lambda _part, _read, scores: widths.append(scores.shape[1]))
    loss = training._answer_loss(model, batch)
    loss.backward()
    gradients = [weight.grad.clone() for weight in model.parameters()]
    model.zero_grad()
    read = {name: part for name, part in batch.items() if name != "labels"}
    scores = model(**read, use_cache=False).logits[:, :-1].flatten(0, 1)
    full = torch.nn.functional.cross_entropy(scores, batch["labels"][:, 1:].flatten(), reduction="sum")
    full.backward()
    assert widths == [6, 9], "from the place that predicts the first answer token, the last place included"
    torch.testing.assert_close(loss, full)
    for gradient, weight in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, weight.grad, rtol=1e-5, atol=1e-6)


# --- the weights ---


def bare_loop(model, examples, *, steps, batch_size, seed, mu=0.0, clip=1.0, beta2=0.99, decay=0.0):
    """The same training as it is written down in a textbook; the losses of its steps."""
    weights = list(model.parameters())
    start = [weight.detach().clone() for weight in weights]
    optimizer = torch.optim.AdamW(weights, lr=RATE, betas=(0.9, beta2), weight_decay=decay, foreach=False, fused=False)
    losses = []
    for indices in batches(len(examples), batch_size, steps, np.random.default_rng(seed)):
        nats = []
        for index in indices:
            example = examples[index]
            ids = torch.tensor([example.prompt_ids + example.answer_ids])
            scores = model(ids).logits[0].log_softmax(-1)
            nats += [
                -scores[place - 1, ids[0, place]] for place in range(max(1, len(example.prompt_ids)), ids.shape[1])
            ]
        loss = torch.stack(nats).mean()
        losses.append(loss.item())
        pull = sum((weight - begun).square().sum() for weight, begun in zip(weights, start, strict=True))
        optimizer.zero_grad()
        (loss + mu / 2 * pull).backward()
        norm = torch.stack([weight.grad.square().sum() for weight in weights]).sum().sqrt()
        if clip:
            for weight in weights:
                weight.grad *= min(1.0, clip / (norm.item() + 1e-6))
        optimizer.step()
    return losses


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"clip": 0.05},
        {"clip": 0.0},
        {"decay": 0.3, "beta2": 0.9},
        {"mu": 3.0},
    ],
    ids=str,
)
def test_training_equals_a_bare_loop(case):
    model, reference = fresh(), fresh()
    settings = {"max_grad_norm": case.get("clip", 1.0), "weight_decay": case.get("decay", 0.0)}
    result = train(model, mu=case.get("mu", 0.0), beta2=case.get("beta2", 0.99), **settings)
    losses = bare_loop(reference, shard(), steps=4, batch_size=4, seed=5, **case)
    close(tunable_arrays(model), tunable_arrays(reference), 2e-5)
    assert result.loss == pytest.approx(sum(losses) / 4, abs=1e-5)
    assert result.loss_last == pytest.approx(losses[-1], abs=1e-5)


def test_one_seed_gives_the_same_weights_bit_for_bit_and_another_seed_others():
    assert equal(trained(seed=5), trained(seed=5))
    assert not equal(trained(seed=5), trained(seed=6))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_torchs_own_generator_neither_matters_nor_changes(dropout):
    tuning = TuningConfig(mode="lora", lora_rank=2, lora_dropout=dropout)
    results = []
    for global_seed in (0, 1):
        model = fresh(tuning=tuning)
        torch.manual_seed(global_seed)
        state = torch.get_rng_state()
        train(model)
        assert torch.equal(torch.get_rng_state(), state)
        results.append(tunable_arrays(model))
    assert equal(*results)


def test_dropout_is_on_while_training_and_off_afterwards():
    with_dropout, without = (
        trained(tuning=TuningConfig(mode="lora", lora_rank=2, lora_dropout=dropout)) for dropout in (0.5, 0.0)
    )
    assert not equal(with_dropout, without)
    model = fresh(tuning=TuningConfig(mode="lora", lora_dropout=0.5))
    train(model)
    assert not model.training


def test_two_passes_of_four_are_one_of_eight_although_answers_differ_in_length():
    examples = shard(8)
    assert len({len(example.answer_ids) for example in examples}) > 1
    settings = {"examples": examples, "max_steps": 3}
    close(
        trained(batch_size=4, accumulation_steps=2, **settings),
        trained(batch_size=8, accumulation_steps=1, **settings),
        2e-5,
    )


@pytest.mark.parametrize("size", [1, 3, 4, 8, 100])
def test_a_batch_in_pieces_is_the_same_step_on_the_same_examples(size):
    settings = {"batch_size": 8, "accumulation_steps": 2, "epochs": 1, "max_steps": 0}
    whole, pieces = fresh(), fresh()
    expected, result = train(whole, **settings), train(pieces, max_piece=size, **settings)
    close(tunable_arrays(pieces), tunable_arrays(whole), 2e-5)
    for name in ("num_steps", "num_examples_seen", "num_tokens", "num_answer_tokens"):
        assert getattr(result, name) == getattr(expected, name)
    assert result.loss == pytest.approx(expected.loss, abs=1e-5)
    assert equal(tunable_arrays(pieces), tunable_arrays(whole)) == (size >= 8)


def test_fedprox_pulls_towards_the_weights_that_the_round_began_with():
    start = tunable_arrays(fresh())

    def distance(mu):
        return math.sqrt(sum(float((values - start[name]).square().sum()) for name, values in trained(mu=mu).items()))

    assert distance(0.0) > distance(1.0) > distance(100.0) > 0


def test_fedprox_has_no_effect_on_the_first_step():
    # mu/2 * |w - start|^2 has the gradient mu * (w - start), and w is still the start.
    assert equal(trained(mu=100.0, max_steps=1), trained(mu=0.0, max_steps=1))


def test_fedprox_is_as_strong_where_the_gradients_are_scaled(monkeypatch):
    # As on a GPU in float16, where a scaler multiplies the loss (by 65536) and divides the gradients again.
    def with_scaler(config, device):
        accelerator = make_accelerator(config, device)
        accelerator.scaler = torch.amp.GradScaler("cpu")
        return accelerator

    expected = trained(mu=30.0, max_grad_norm=0.0)
    make_accelerator = training._accelerator
    monkeypatch.setattr(training, "_accelerator", with_scaler)
    close(trained(mu=30.0, max_grad_norm=0.0), expected)


def test_an_adapter_is_tuned_and_the_model_under_it_stays_bit_for_bit():
    model = fresh(tuning=TuningConfig(mode="lora", lora_rank=2))
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    train(model)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name]) != ("lora_" in name), name


@pytest.mark.parametrize("tuning", [TuningConfig(), TuningConfig(mode="lora", lora_rank=2)], ids=["full", "lora"])
def test_gradient_checkpointing_gives_the_same_weights_and_leaves_no_trace(tuning):
    model = fresh(tuning=tuning)
    begun_with = tunable_arrays(model)
    train(model, gradient_checkpointing=True)
    close(tunable_arrays(model), trained(tuning=tuning))
    assert not any(getattr(part, "gradient_checkpointing", False) for part in model.modules())
    assert not any(part._forward_hooks for part in model.modules())
    set_arrays(model, begun_with)
    train(model)
    assert equal(tunable_arrays(model), trained(tuning=tuning))


@pytest.mark.parametrize("family", [tiny_llama, tiny_gpt2])
def test_mixed_precision_leaves_nothing_behind_in_a_model_that_is_used_again(family):
    model = make_tunable(family(), TuningConfig(), seed=1)
    begun_with, results = tunable_arrays(model), []
    for precision in ("no", "bf16", "no", "bf16"):
        set_arrays(model, begun_with)
        train(model, mixed_precision=precision)
        results.append(tunable_arrays(model))
        assert "_original_forward" not in vars(model)
        output = model(torch.tensor([[3, 4]]), return_dict=False)
        assert output[0].dtype == torch.float32
    assert equal(results[0], results[2])
    assert equal(results[1], results[3])
    assert not equal(results[0], results[1])
    close(results[0], results[1], 4 * RATE)


def test_a_model_in_bfloat16_can_be_tuned():
    model = make_tunable(tiny_llama().bfloat16(), TuningConfig(), seed=1)
    assert math.isfinite(train(model).loss)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


# --- what is measured ---


def hf_loss(model, examples):
    """The loss that transformers computes itself."""
    with torch.no_grad():
        return model(**collate(examples, PAD)).loss.item()


def test_the_loss_of_the_first_step_is_nats_per_answer_token():
    expected = hf_loss(tiny_llama(), shard())
    result = train(fresh(), max_steps=1, batch_size=10)
    assert result.loss == result.loss_last == pytest.approx(expected, rel=1e-6)


def test_an_answer_without_a_prompt_has_no_loss_on_its_first_token():
    examples = [TokenizedExample([], [5, 6, EOS])]
    result = train(fresh(), examples, max_steps=1)
    assert result.num_answer_tokens == 2
    assert result.loss == pytest.approx(hf_loss(tiny_llama(), examples), rel=1e-6)


def test_the_loss_falls_on_what_is_learnt():
    result = train(fresh(), max_steps=40, batch_size=10)
    assert result.loss_last < 0.5 * hf_loss(tiny_llama(), shard())
    assert result.loss_last < result.loss


def test_examples_and_tokens_are_counted_without_padding():
    examples = [
        TokenizedExample([3, 4, 5], [6, EOS]),
        TokenizedExample([3], [6, 7, 8, EOS]),
        TokenizedExample([3], [EOS]),
    ]
    # 5 + 5 + 2 tokens, 2 + 4 + 1 of them answers; two epochs of a batch of two and one of one.
    result = train(fresh(), examples, epochs=2, max_steps=0, batch_size=2)
    assert (result.num_steps, result.num_examples_seen) == (4, 6)
    assert (result.num_tokens, result.num_answer_tokens) == (24, 14)
    assert result.flops == count_flops(tiny_llama(), 24)
    assert result.seconds > 0
    assert result.peak_memory_bytes is None or result.peak_memory_bytes > 1e6


def test_the_state_is_weights_gradients_and_two_moments():
    # Output and input 44 * 16; a layer 4 * 16 * 16 + 3 * 16 * 24 + 2 * 16, twice; the last norm 16: 5136 weights in 20
    # tensors. Four float32 for each weight, and one step counter for each tensor.
    assert sum(weight.numel() for weight in tiny_llama().parameters()) == 5136
    assert train(fresh()).state_bytes == 4 * 4 * 5136 + 4 * 20


def test_the_state_of_an_adapter_is_the_model_and_four_times_the_adapter():
    # Rank 2 on q_proj of two layers: 2 * (2 * 16 + 16 * 2) = 128 weights in 4 tensors, all in float32.
    tuning = TuningConfig(mode="lora", lora_rank=2, lora_targets="q_proj")
    assert train(fresh(tuning=tuning)).state_bytes == 4 * 5136 + 4 * 4 * 128 + 4 * 4


def test_flops_count_each_matrix_and_a_tied_one_as_the_output():
    # 44 * 16 + 2 * (4 * 16 * 16 + 3 * 16 * 24) = 5056 weights in matrices; 6 operations for each and token.
    assert VOCAB == 44
    assert count_flops(fresh(), 10) == 10 * 6 * 5056


def test_flops_do_not_count_an_input_embedding_of_its_own():
    assert count_flops(fresh(tie_word_embeddings=False), 10) == 10 * 6 * 5056


def test_flops_of_an_adapter_have_no_gradients_of_frozen_weights():
    tuning = TuningConfig(mode="lora", lora_rank=2, lora_targets="q_proj")
    assert count_flops(fresh(tuning=tuning), 10) == 10 * (4 * (5056 + 128) + 2 * 128)


# --- steps, rates, seeds ---


@pytest.mark.parametrize(
    ("epochs", "max_steps", "batch_size", "accumulation", "steps"),
    [
        (0, 20, 4, 1, 20),
        (1, 0, 4, 1, 3),  # 4 + 4 + 2
        (2, 0, 4, 1, 6),
        (2, 5, 4, 1, 5),
        (2, 7, 4, 1, 6),
        (1, 0, 4, 2, 2),  # (4 + 4) + 2
        (3, 0, 4, 2, 6),
        (1, 0, 5, 1, 2),
        (1, 0, 16, 1, 1),
        (1, 0, 16, 4, 1),
        (1, 0, 1, 1, 10),
        (1, 1, 1, 1, 1),
    ],
)
def test_steps_end_with_the_epochs_or_the_bound_whichever_is_first(epochs, max_steps, batch_size, accumulation, steps):
    config = TrainConfig(epochs=epochs, max_steps=max_steps, batch_size=batch_size, accumulation_steps=accumulation)
    assert num_steps(config, 10) == steps


def test_an_epoch_sees_every_example_once():
    result = train(fresh(), epochs=1, max_steps=0, batch_size=3)
    assert (result.num_steps, result.num_examples_seen) == (4, 10)
    assert result.num_tokens == sum(len(example.prompt_ids + example.answer_ids) for example in shard())


HALF_WAY = 0.2 + 0.8 * 0.5 * (1 + math.sqrt(0.5))  # cosine after a quarter: cos(45 degrees) = sqrt(1/2)


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [1, 1, 1, 1, 1]),
        ("linear", [1, 0.8, 0.6, 0.4, 0.2]),
        ("cosine", [1, HALF_WAY, 0.6, 1.2 - HALF_WAY, 0.2]),
    ],
)
def test_the_learning_rate_runs_from_its_beginning_to_its_end_over_the_rounds(schedule, rates):
    config = TrainConfig(schedule=schedule, learning_rate=3.0, learning_rate_end=0.2)
    assert [round_learning_rate(config, number, 5) for number in range(1, 6)] == pytest.approx(
        [3.0 * rate for rate in rates]
    )
    assert round_learning_rate(config, 1, 1) == 3.0
    assert round_learning_rate(config, 9, 5) == pytest.approx(3.0 * rates[-1])


def test_every_round_and_device_has_a_seed_of_its_own():
    seeds = [
        device_seed(seed, server_round, device) for seed in range(4) for server_round in range(9) for device in range(9)
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert device_seed(1, 2, 3) == device_seed(1, 2, 3)


# --- what is refused ---


def test_an_empty_shard_is_refused():
    with pytest.raises(DataError, match="a device needs at least one example to train on"):
        train(fresh(), [])


def test_a_loss_that_is_not_finite_is_refused_before_it_reaches_the_weights():
    model = fresh()
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    before = tunable_arrays(model)
    with pytest.raises(DeviceError, match=r"the training loss became nan after 0 steps; lower train\.learning-rate"):
        train(model)
    assert all(
        torch.equal(values.nan_to_num(7), before[name].nan_to_num(7)) for name, values in tunable_arrays(model).items()
    )
    assert not model.training


def test_a_model_is_as_good_as_new_after_a_training_that_failed():
    model = fresh()
    begun_with = tunable_arrays(model)
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(DeviceError):
        train(model, mixed_precision="bf16")
    assert all(weight.grad is None for weight in model.parameters())
    set_arrays(model, begun_with)
    train(model)
    assert equal(tunable_arrays(model), trained())


# --- memory of a task ---

ON_LINUX = pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the system does not tell")

TASKS = """
import json, mmap
from fedpt_flwr.training import TaskMemory

def take():
    # Pages that go back to the system at once when nobody needs them any more.
    memory = mmap.mmap(-1, 50 * 2**20)
    for place in range(0, len(memory), 4096):
        memory[place] = 1
    memory.close()

def forget():
    # What train_locally does, to take a peak of its own.
    open("/proc/self/clear_refs", "w").write("5")

def nothing():
    pass

def growth(loading, training):
    memory, grown = TaskMemory(), []
    for _ in range(2):
        forget()
        memory.begin()
        loading()
        peak = memory.peak_before_training()
        forget()
        training()
        grown.append(memory.growth_bytes(peak))
    return grown

print(json.dumps([growth(take, nothing), growth(nothing, take), growth(take, take), growth(nothing, nothing)]))
"""


@ON_LINUX
def test_the_growth_of_a_first_task_is_all_that_it_takes_and_a_second_one_has_none():
    """50 MiB in loading, in training, in both one after the other, and in neither."""
    done = subprocess.run([sys.executable, "-c", TASKS], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert [second for _, second in found] == [None] * 4
    assert [first / 2**20 for first, _ in found] == pytest.approx([50, 50, 50, 0], abs=5)


def test_a_system_that_does_not_tell_gives_none(monkeypatch):
    monkeypatch.setattr(training, "_resident_bytes", lambda name: None)
    memory = TaskMemory()
    memory.begin()
    assert memory.peak_before_training() is None
    assert memory.growth_bytes(None) is None


def test_growth_is_from_the_beginning_to_the_highest_peak(monkeypatch):
    told = {"VmRSS": 100, "VmHWM": 130}
    monkeypatch.setattr(training, "_resident_bytes", told.get)
    memory = TaskMemory()
    memory.begin()
    assert memory.growth_bytes(150) == 50
    assert memory.growth_bytes(110) == memory.growth_bytes(None) == 30
    told["VmHWM"] = 90
    assert memory.growth_bytes(None) == 0


def test_a_task_that_was_never_begun_has_no_growth():
    memory = TaskMemory()
    assert memory.growth_bytes(memory.peak_before_training()) is None
