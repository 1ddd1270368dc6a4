"""Rows of different lengths in one forward pass, against one model call per row without any cache."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from fedpt_flwr.errors import ModelError
from fedpt_flwr.ragged import RaggedCache, Stepper

VOCAB = 64
_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 96,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA = _SHAPE | {"intermediate_size": 48, "num_key_value_heads": 2}
_MIXED = {"head_dim": 8, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96, "bos_token_id": 1, "eos_token_id": 2}

FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, _LLAMA),
    "gpt2": (GPT2LMHeadModel, GPT2Config, {"vocab_size": VOCAB, "initializer_range": 0.3, **_GPT2}),
    "gpt-neox": (GPTNeoXForCausalLM, GPTNeoXConfig, _SHAPE | {"intermediate_size": 48}),
    "opt": (OPTForCausalLM, OPTConfig, _SHAPE | {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.3}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, _LLAMA),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, _LLAMA | {"head_dim": 8}),
    "phi3": (Phi3ForCausalLM, Phi3Config, _LLAMA),
    "mixtral": (MixtralForCausalLM, MixtralConfig, _LLAMA | {"num_local_experts": 4}),
    "mistral, window": (MistralForCausalLM, MistralConfig, _LLAMA | {"sliding_window": 6}),
    "gemma3, windows and not": (Gemma3ForCausalLM, Gemma3TextConfig, _LLAMA | _MIXED),
    "gemma2, eager only": (Gemma2ForCausalLM, Gemma2Config, _LLAMA | _MIXED),
}


def make(name, **settings):
    kind, config, shape = FAMILIES[name]
    torch.manual_seed(1)
    # The stored generation config would warn about the token ids that these configs name.
    return kind(config(**{**shape, **settings})).eval()


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.inference_mode():
        yield


def random_ids(*shape, seed=0):
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def alone(model, ids, number=1):
    """The scores after the last ``number`` tokens of one sequence, without a cache."""
    return model(ids[None], use_cache=False).logits[0, -number:]


def read(stepper, rows):
    """Prompts read together, filled up on the right; the cache, and the scores after each."""
    lengths = [len(row) for row in rows]
    ids = torch.zeros(len(rows), max(lengths), dtype=torch.int64)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = row
    cache = stepper.new_cache()
    cache.add_rows(len(rows))
    columns = sorted({length - 1 for length in lengths})
    logits = stepper(cache, ids, keep=torch.tensor(columns))
    cache.cut(lengths)
    return cache, [logits[number, columns.index(length - 1)] for number, length in enumerate(lengths)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FAMILIES)
def test_rows_that_come_and_go_score_as_they_would_alone(name, attention):
    model = make(name)
    if "eager only" in name and attention == "sdpa":
        pytest.skip("this family has no other attention")
    model.set_attn_implementation(attention)
    stepper = Stepper(model)
    prompts = [random_ids(length, seed=length) for length in (5, 11, 3, 11)]
    read_together, after_prompts = read(stepper, prompts)
    for prompt, scores in zip(prompts, after_prompts, strict=True):
        torch.testing.assert_close(scores, alone(model, prompt)[0], atol=1e-4, rtol=1e-4)

    cache = stepper.new_cache()
    rows = []
    for number in (2, 0, 1):
        cache.append(read_together, number)
        rows.append(prompts[number])
    for step in range(9):
        num_new = (1, 3, 1)[step % 3]
        new = random_ids(len(rows), num_new, seed=100 + step)
        logits = stepper(cache, new, keep=0)
        rows = [torch.cat([row, ids]) for row, ids in zip(rows, new, strict=True)]
        assert cache.lengths == [len(row) for row in rows]
        for row, scores in zip(rows, logits, strict=True):
            torch.testing.assert_close(scores, alone(model, row, num_new), atol=1e-4, rtol=1e-4)
        if step == 2:  # one joins
            cache.append(read_together, 3)
            rows.append(prompts[3])
        if step == 4:  # one leaves; the last takes its place
            cache.remove(0)
            rows[0] = rows.pop()
        if step == 6:  # tokens are taken back, from each row as many as it likes
            back = list(range(1, 1 + len(rows)))
            cache.cut([len(row) - number for row, number in zip(rows, back, strict=True)])
            rows = [row[:-number] for row, number in zip(rows, back, strict=True)]


def test_a_row_can_be_copied_for_several_continuations():
    model = make("llama")
    stepper = Stepper(model)
    prompt = random_ids(6)
    read_once, _ = read(stepper, [prompt])
    cache = stepper.new_cache()
    cache.append(read_once, 0, times=3)
    new = torch.tensor([[7], [8], [9]])
    logits = stepper(cache, new)
    for ids, scores in zip(new, logits, strict=True):
        torch.testing.assert_close(scores, alone(model, torch.cat([prompt, ids])), atol=1e-4, rtol=1e-4)


def test_a_prompt_may_be_read_in_pieces():
    model = make("gemma3, windows and not")
    stepper = Stepper(model)
    prompt = random_ids(40)
    cache = stepper.new_cache()
    cache.add_rows(1)
    for begin in range(0, 40, 16):
        logits = stepper(cache, prompt[None, begin : begin + 16])
    torch.testing.assert_close(logits[0], alone(model, prompt), atol=1e-4, rtol=1e-4)


def test_what_an_earlier_row_left_behind_is_not_seen():
    model = make("llama")
    stepper = Stepper(model)
    prompts = [random_ids(30, seed=1), random_ids(4, seed=2), random_ids(5, seed=3)]
    together, _ = read(stepper, prompts)
    cache = stepper.new_cache()
    cache.append(together, 0)
    cache.append(together, 1)
    for layer in cache.layers:  # a model that has overflowed leaves such things
        layer.keys[0] = torch.nan
        layer.values[0] = torch.nan
    cache.remove(0)
    cache.append(together, 2)
    new = random_ids(2, 1, seed=4)
    logits = stepper(cache, new)
    for row, ids, scores in zip((1, 2), new, logits, strict=True):
        torch.testing.assert_close(scores, alone(model, torch.cat([prompts[row], ids])), atol=1e-4, rtol=1e-4)


def test_without_rows_the_memory_is_given_back():
    stepper = Stepper(make("llama"))
    cache, _ = read(stepper, [random_ids(5), random_ids(7)])
    cache.remove(0)
    cache.remove(0)
    assert cache.num_rows == 0
    assert all(layer.keys is None for layer in cache.layers)


@pytest.mark.parametrize(("num_tokens", "num_columns"), [(1, 64), (32, 64), (33, 128), (64, 128), (96, 128)])
def test_behind_what_is_read_there_is_room_for_what_is_written(num_tokens, num_columns):
    stepper = Stepper(make("llama"))
    cache = stepper.new_cache()
    cache.add_rows(2)
    stepper(cache, random_ids(2, num_tokens))
    assert {layer.keys.shape[2] for layer in cache.layers} == {num_columns}
    held = [layer.keys for layer in cache.layers]
    stepper(cache, random_ids(2, num_columns - num_tokens))
    assert all(layer.keys is before for layer, before in zip(cache.layers, held, strict=True))
    stepper(cache, random_ids(2, 1))
    assert all(layer.keys is not before for layer, before in zip(cache.layers, held, strict=True))


def test_rows_that_have_left_take_no_memory_once_the_others_need_more():
    stepper = Stepper(make("llama"))
    prompts = [random_ids(30, seed=seed) for seed in range(6)]
    cache, _ = read(stepper, prompts)
    for row in (5, 0, 1, 0):  # the last one takes the place of who leaves
        cache.remove(row)
    left = [prompts[2], prompts[3]]
    assert {layer.keys.shape[0] for layer in cache.layers} == {6}
    new = random_ids(2, 40, seed=9)
    scores = stepper(cache, new)
    assert {layer.keys.shape[0] for layer in cache.layers} == {2}
    for prompt, ids, found in zip(left, new, scores, strict=True):
        torch.testing.assert_close(found, alone(stepper.model, torch.cat([prompt, ids]))[-1:], atol=1e-4, rtol=1e-4)


def test_an_adapter_is_switched_by_the_context():
    base = make("llama")
    adapted = get_peft_model(base, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", r=4)).eval()
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    prompt = random_ids(6)
    with adapted.disable_adapter():
        expected = alone(adapted, prompt)[0]
    _, scores = read(Stepper(adapted, adapted.disable_adapter), [prompt])
    torch.testing.assert_close(scores[0], expected, atol=1e-4, rtol=1e-4)
    _, tuned = read(Stepper(adapted), [prompt])
    torch.testing.assert_close(tuned[0], alone(adapted, prompt)[0], atol=1e-4, rtol=1e-4)
    assert (tuned[0] - expected).abs().max() > 0.01


def test_models_that_cannot_be_called_this_way_are_refused():
    torch.manual_seed(0)
    bloom = BloomForCausalLM(BloomConfig(vocab_size=VOCAB, hidden_size=16, n_layer=1, n_head=2))
    with pytest.raises(ModelError, match="must take position_ids"):
        Stepper(bloom)
    mamba = MambaForCausalLM(MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, state_size=4))
    with pytest.raises(ModelError, match="must take position_ids"):
        Stepper(mamba)
    flash = make("llama")
    flash.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ModelError, match="dense mask"):
        RaggedCache(flash)


def test_alibi_is_refused_also_where_position_ids_are_taken():
    shape = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    Stepper(FalconForCausalLM(FalconConfig(**shape, alibi=False)))
    with pytest.raises(ModelError, match="FalconForCausalLM with ALiBi"):
        Stepper(FalconForCausalLM(FalconConfig(**shape, alibi=True)))


def test_windows_of_columns_are_refused():
    def neo(*kinds):
        shape = {"hidden_size": 16, "num_layers": len(kinds), "num_heads": 2, "attention_types": [[list(kinds), 1]]}
        return GPTNeoForCausalLM(GPTNeoConfig(vocab_size=VOCAB, **shape))

    Stepper(neo("global"))
    with pytest.raises(ModelError, match="GPTNeoForCausalLM with windows of columns"):
        Stepper(neo("global", "local"))
