"""The lean forward pass, against transformers' own."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_packing import adapted
from test_ragged import FAMILIES, alone, make, random_ids, read
from torch import nn

from fedpt_flwr import huge_pages, lean
from fedpt_flwr.lean import LeanStepper, step_function
from fedpt_flwr.models import set_arrays
from fedpt_flwr.packing import prepare, restore
from fedpt_flwr.proxy import ProxyModel
from fedpt_flwr.ragged import RaggedCache, Stepper

_MANY_WINDOWS = {"sliding_window": 6, "use_sliding_window": True, "max_window_layers": 1}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 48}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 2.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 48,
}

TAKEN = {
    "llama, shared keys": ("llama", {}),
    "llama, one key per head": ("llama", {"num_key_value_heads": 4}),
    "llama, biases and wide heads": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 16}),
    "llama, tied, gelu": ("llama", {"tie_word_embeddings": True, "hidden_act": "gelu"}),
    "llama, yarn": ("llama", {"rope_parameters": _YARN}),
    "llama, llama3": ("llama", {"rope_parameters": _LLAMA3}),
    "mistral, window": ("mistral, window", {}),
    "mistral, no window": ("mistral, window", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2, windows and not": ("qwen2", _MANY_WINDOWS),
    "qwen3": ("qwen3", {}),
    "qwen3, windows and not": ("qwen3", _MANY_WINDOWS),
    "gpt2": ("gpt2", {}),
    "gpt2, no scaling, another activation": ("gpt2", {"scale_attn_weights": False, "activation_function": "relu"}),
    "gpt2, scaled by layer, tied": (
        "gpt2",
        {"scale_attn_by_inverse_layer_idx": True, "tie_word_embeddings": True, "n_inner": 40},
    ),
    "neox": ("gpt-neox", {}),
    "neox, one half after the other, all turned": (
        "gpt-neox",
        {"use_parallel_residual": False, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    ),
    "neox, one head": ("gpt-neox", {"num_attention_heads": 1}),
    "neox, no biases": ("gpt-neox", {"attention_bias": False}),
}


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("packed", [False, True, "as of many rows"])
@pytest.mark.parametrize("name", TAKEN)
def test_rows_that_come_and_go_score_as_transformers_says(name, packed, monkeypatch):
    if packed == "as of many rows":
        monkeypatch.setattr(lean, "_MANY_ROWS", 1)
        monkeypatch.setattr(huge_pages, "_LEAST_BYTES", 1)
    family, settings = TAKEN[name]
    plain = make(family, **settings)
    model = make(family, **settings)
    if packed:
        assert prepare(model) > 0
    stepper = step_function(model)
    assert type(stepper) is LeanStepper
    prompts = [random_ids(length, seed=length) for length in (5, 21, 3, 21)]
    read_together, after_prompts = read(stepper, prompts)
    for prompt, scores in zip(prompts, after_prompts, strict=True):
        torch.testing.assert_close(scores, alone(plain, prompt)[0], atol=1e-4, rtol=1e-4)
    cache = stepper.new_cache()
    rows = []
    for number in (2, 0, 1):
        cache.append(read_together, number)
        rows.append(prompts[number])
    for step in range(9):
        num_new = (1, 3, 1, 20)[step % 4]
        new = random_ids(len(rows), num_new, seed=100 + step)
        logits = stepper(cache, new, keep=0)
        rows = [torch.cat([row, ids]) for row, ids in zip(rows, new, strict=True)]
        assert cache.lengths == [len(row) for row in rows]
        for row, scores in zip(rows, logits, strict=True):
            torch.testing.assert_close(scores, alone(plain, row, num_new), atol=1e-4, rtol=1e-4)
        if step == 2:
            cache.remove(0)
            rows[0] = rows.pop()
        if step in (4, 6):  # at the second time to one length
            shortest = min(map(len, rows))
            kept = [len(row) - 1 - number if step == 4 else shortest for number, row in enumerate(rows)]
            cache.cut(kept)
            rows = [row[:length] for row, length in zip(rows, kept, strict=True)]


@pytest.mark.parametrize("name", ["llama", "mistral, window", "qwen3"])
def test_rows_of_one_length_need_no_ragged_mask(name):
    model = make(name)
    ordinary, stepper = Stepper(model), step_function(model)
    caches = [ordinary.new_cache(), stepper.new_cache()]
    for cache in caches:
        cache.add_rows(3)
    for step, num_new in enumerate((4, 1, 1, 1, 5, 18, 1, 2)):
        ids = random_ids(3, num_new, seed=step)
        expected, found = (one(cache, ids, keep=0) for one, cache in zip((ordinary, stepper), caches, strict=True))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("keep", [1, 2, 0, torch.tensor([0, 2])])
def test_only_the_wanted_positions_are_scored(keep):
    model = make("llama")
    ordinary, stepper = Stepper(model), step_function(model)
    caches = [ordinary.new_cache(), stepper.new_cache()]
    for cache in caches:
        cache.add_rows(2)
    expected, found = (
        one(cache, random_ids(2, 4), keep=keep) for one, cache in zip((ordinary, stepper), caches, strict=True)
    )
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("packed", [False, True])
def test_an_adapter_is_on_or_off_as_the_context_says(packed):
    untuned = make("llama")
    proxy = ProxyModel(make("llama"), adapted(make("llama")))
    prompt = random_ids(6)
    with proxy.without_adapter():
        torch.testing.assert_close(alone(proxy.tuned, prompt), alone(untuned, prompt))
    tuned = alone(proxy.tuned, prompt)[0]
    if packed:
        proxy.prepare()
    steppers = proxy.steppers()
    assert all(type(stepper) is LeanStepper for stepper in steppers.values())
    for _ in range(2):  # switching back and forth
        torch.testing.assert_close(read(steppers["tuned"], [prompt])[1][0], tuned, atol=1e-4, rtol=1e-4)
        off = read(steppers["untuned"], [prompt])[1][0]
        torch.testing.assert_close(off, alone(untuned, prompt)[0], atol=1e-4, rtol=1e-4)
    assert (tuned - off).abs().max() > 0.01


def test_weights_are_read_when_they_are_used():
    model, other = make("llama"), make("llama")
    for weight in other.parameters():
        weight.mul_(1.1)
    prompt = random_ids(6)
    stepper = step_function(model)
    set_arrays(model, dict(other.named_parameters()))
    torch.testing.assert_close(read(stepper, [prompt])[1][0], alone(other, prompt)[0], atol=1e-4, rtol=1e-4)
    prepare(model)
    torch.testing.assert_close(read(stepper, [prompt])[1][0], alone(other, prompt)[0], atol=1e-4, rtol=1e-4)
    restore(model)
    torch.testing.assert_close(read(stepper, [prompt])[1][0], alone(other, prompt)[0], atol=1e-4, rtol=1e-4)


def test_half_precision_is_taken_too():
    model = make("llama").to(torch.bfloat16)
    stepper = step_function(model)
    assert type(stepper) is LeanStepper
    prompt = random_ids(6)
    found, expected = read(stepper, [prompt])[1][0], alone(model, prompt)[0]
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, atol=0.2, rtol=0.1)


def _hooked(model):
    model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    return model


def _with_another_layer(model):
    model.model.layers[1].mlp.up_proj = nn.Sequential(model.model.layers[1].mlp.up_proj)
    return model


def _with_a_child_more(model):
    model.model.layers[0].self_attn.extra = nn.Identity()
    return model


def _dora(model):
    config = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", r=4, use_dora=True)
    return get_peft_model(model, config).eval()


def _with_a_new_embedding(model):
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"], task_type="CAUSAL_LM", r=4)
    return get_peft_model(model, config).eval()


def _with_other_positions(model):
    model.model.rotary_emb.rope_type = "proportional"
    return model


def _with_other_positions_of_neox(model):
    model.gpt_neox.rotary_emb.rope_type = "dynamic"
    return model


def _neox_with_a_child_more(model):
    model.gpt_neox.layers[0].attention.extra = nn.Identity()
    return model


def _with_a_hooked_gate(model):
    model.model.layers[1].mlp.act_fn.register_forward_hook(lambda *_: None)
    return model


def _with_another_gate(model):
    model.model.layers[1].mlp.act_fn = nn.GELU()
    return model


def _gpt2_with_another_activation(model):
    model.transformer.h[0].mlp.act = nn.SiLU()
    return model


def _neox_with_a_hooked_activation(model):
    model.gpt_neox.layers[0].mlp.act.register_forward_pre_hook(lambda *_: None)
    return model


def _hooked_gpt2(model):
    model.transformer.h[1].attn.c_attn.register_forward_hook(lambda *_: None)
    return model


def _with_another_norm(model):
    model.transformer.h[1].ln_2 = nn.RMSNorm(32)
    return model


REFUSED = {
    **{name: (name, {}, None) for name in FAMILIES if name.startswith(("opt", "phi3", "mixtral", "gemma"))},
    "positions of another kind": ("llama", {}, _with_other_positions),
    "DoRA": ("llama", {}, _dora),
    "an embedding of the adapter's": ("llama", {}, _with_a_new_embedding),
    "a hook": ("llama", {}, _hooked),
    "a hook of the gate": ("llama", {}, _with_a_hooked_gate),
    "another gate": ("llama", {}, _with_another_gate),
    "gpt2, another activation": ("gpt2", {}, _gpt2_with_another_activation),
    "gpt-neox, a hook of the activation": ("gpt-neox", {}, _neox_with_a_hooked_activation),
    "another layer": ("llama", {}, _with_another_layer),
    "a child more": ("llama", {}, _with_a_child_more),
    "training": ("llama", {}, nn.Module.train),
    "gpt2, a hook": ("gpt2", {}, _hooked_gpt2),
    "gpt2, another norm": ("gpt2", {}, _with_another_norm),
    "gpt-neox, positions of another kind": ("gpt-neox", {}, _with_other_positions_of_neox),
    "gpt-neox, a child more": ("gpt-neox", {}, _neox_with_a_child_more),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_of_another_build_takes_the_ordinary_way(name):
    family, settings, change = REFUSED[name]
    model = make(family, **settings)
    stepper = step_function(change(model) if change else model)
    assert type(stepper) is Stepper


@pytest.mark.parametrize("name", ["a hook", "a hook of the gate", "another gate", "another layer"])
def test_a_model_that_is_changed_later_is_not_what_it_was_seen_to_be(name):
    family, settings, change = REFUSED[name]
    model = make(family, **settings)
    stepper = step_function(model)
    assert stepper.is_current
    change(model)
    assert not stepper.is_current


@pytest.mark.parametrize("num_tokens", [3, 20])
@pytest.mark.parametrize("family", ["qwen3", "gpt2", "gpt-neox"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_text_that_is_only_read_is_remembered_like_one_that_is_scored(family, packed, num_tokens):
    model = make(family)
    if packed:
        prepare(model)
    stepper = step_function(model)
    ids = random_ids(2, num_tokens)
    caches = [stepper.new_cache(), stepper.new_cache()]
    for cache in caches:
        cache.add_rows(2)
    stepper.read(caches[0], ids)
    stepper(caches[1], ids)
    assert caches[0].lengths == caches[1].lengths == [num_tokens] * 2
    scores = [stepper(cache, random_ids(2, 1, seed=1)) for cache in caches]
    assert torch.equal(*scores)


@pytest.mark.parametrize("packed", [False, True, "as of many rows"])
@pytest.mark.parametrize("name", TAKEN)
def test_prompts_of_unequal_lengths_are_read_side_by_side(name, packed, monkeypatch):
    if packed == "as of many rows":
        monkeypatch.setattr(lean, "_MANY_ROWS", 1)
        monkeypatch.setattr(huge_pages, "_LEAST_BYTES", 1)
    family, settings = TAKEN[name]
    model, plain = make(family, **settings), make(family, **settings)
    if packed:
        prepare(model)
    stepper = step_function(model)
    prompts = [random_ids(length, seed=length) for length in (5, 21, 1, 3, 21, 9)]
    cache = stepper.read_prompts([prompt.tolist() for prompt in prompts])
    assert cache.lengths == [len(prompt) - 1 for prompt in prompts]
    for new in range(2):
        scores = stepper(cache, torch.stack([prompt[-1:] for prompt in prompts]))[:, 0]
        for row, prompt in enumerate(prompts):
            torch.testing.assert_close(scores[row], alone(plain, prompt)[0], atol=1e-4, rtol=1e-4)
        prompts = [torch.cat([prompt, random_ids(1, seed=new)]) for prompt in prompts]


@pytest.mark.parametrize("lengths", [(40, 40), (40, 30)])
@pytest.mark.parametrize("name", ["llama, shared keys", "mistral, no window", "gpt2", "neox"])
def test_long_prompts_need_no_mask(name, lengths, monkeypatch):
    family, settings = TAKEN[name]
    model = make(family, **settings)
    stepper = step_function(model)
    prompts = [random_ids(length, seed=length) for length in lengths]
    monkeypatch.delattr(RaggedCache, "_mask")
    monkeypatch.delattr(lean._SideBySide, "_mask")
    cache = stepper.read_prompts([prompt.tolist() for prompt in prompts])
    monkeypatch.undo()
    scores = stepper(cache, torch.stack([prompt[-1:] for prompt in prompts]))[:, 0]
    for row, prompt in enumerate(prompts):
        torch.testing.assert_close(scores[row], alone(model, prompt)[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["opt", "mixtral", "llama"])
def test_prompts_are_in_the_cache_in_their_order_whoever_reads_them(name):
    model = make(name)
    prompts = [random_ids(length, seed=length) for length in (20, 5, 21, 1, 19, 4)]
    cache = Stepper(model).read_prompts([prompt.tolist() for prompt in prompts])
    scores = Stepper(model)(cache, torch.stack([prompt[-1:] for prompt in prompts]))[:, 0]
    for row, prompt in enumerate(prompts):
        torch.testing.assert_close(scores[row], alone(model, prompt)[0], atol=1e-4, rtol=1e-4)


def test_a_model_that_scores_otherwise_takes_the_ordinary_way(monkeypatch):
    monkeypatch.setattr(lean, "_normed", lambda norm, x, *_: x * 1.001)
    assert type(step_function(make("llama"))) is Stepper


def test_a_model_with_nan_takes_the_ordinary_way():
    model = make("llama")
    model.model.layers[0].mlp.up_proj.weight.fill_(torch.nan)
    assert type(step_function(model)) is Stepper
