"""``ProxyModel.generate()`` with drafts, against the same call decoded by transformers' own loop."""

import copy
import logging
import pickle
import threading

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_speculative import relatives
from tiny import EOS, PAD, VOCAB, tiny_gpt2, tiny_llama, tiny_tokenizer
from transformers import (
    LogitsProcessorList,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    StoppingCriteriaList,
)
from transformers.generation import BaseStreamer, MaxLengthCriteria

from fedpt_flwr.errors import ModelError
from fedpt_flwr.proxy import ProxyModel

NEW = 10


@pytest.fixture(scope="module")
def proxy():
    return ProxyModel(*relatives(eos_token_id=None), tokenizer=tiny_tokenizer())


@pytest.fixture(scope="module")
def inputs():
    """Three prompts of different lengths, padded on the left."""
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(3, VOCAB, (length,), generator=generator) for length in (4, 11, 7)]
    ids = torch.stack([torch.cat([torch.full((11 - len(row),), PAD), row]) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


def only(inputs, row):
    """One of the prompts, without its padding."""
    ids = inputs["input_ids"][row]
    ids = ids[ids != PAD][None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def both(proxy, inputs, draft_tokens=3, **settings):
    """What drafting gives, and what transformers' loop gives."""
    how = {"max_new_tokens": NEW, "do_sample": False, **settings}
    return [proxy.generate(**inputs, **how, draft_tokens=number) for number in (draft_tokens, None)]


def drafted(proxy):
    """Drafts so far: to see that they were made."""
    return proxy.speculation().statistics.num_drafted


SETTINGS = {
    "greedy": {},
    "an end": {"eos_token_id": [EOS, 9, 17, 30]},
    "at least some tokens": {"eos_token_id": list(range(3, VOCAB)), "min_new_tokens": 5},
    "a last token": {"forced_eos_token_id": 8, "eos_token_id": 8},
    "penalties": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    "forbidden": {"bad_words_ids": [[5], [7, 9]], "suppress_tokens": [12, 13], "begin_suppress_tokens": [20, 21]},
    "biased": {"sequence_bias": [[[6], 3.0], [[8, 9], -4.0]]},
    "sampled": {"do_sample": True, "seed": 4, "top_k": 0},
    "sampled by rows": {"do_sample": True, "seed": [7, -1, 2**70], "temperature": 0.6, "top_p": 0.8},
    "sampled and penalised": {"do_sample": True, "seed": 1, "min_p": 0.02, "repetition_penalty": 1.3, "typical_p": 0.9},
    "sampled with cuts": {"do_sample": True, "seed": 9, "top_k": 7, "epsilon_cutoff": 0.001, "eta_cutoff": 0.002},
    "several of each": {"do_sample": True, "seed": 3, "num_return_sequences": 3},
    "strength": {"alpha": 0.4, "plausibility": 0.05},
    "strength by rows": {"alpha": torch.tensor([0.0, 2.0, 0.5]), "plausibility": torch.tensor([0.0, 0.3, 0.01])},
    "a long time": {"max_time": 1e6},
    "stop strings": {"stop_strings": ["a", "7", "q="], "tokenizer": tiny_tokenizer(), "eos_token_id": EOS},
    "one token": {"max_new_tokens": 1},
    "to a length": {"max_new_tokens": None, "max_length": 20},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("draft_tokens", [0, 4])
def test_tokens_are_those_of_transformers_loop(proxy, inputs, settings, draft_tokens):
    ours, theirs = both(proxy, inputs, draft_tokens, **settings)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("settings", ["an end", "sampled by rows", "penalties", "several of each"])
def test_tokens_are_the_same_when_lengths_are_chosen(proxy, inputs, settings):
    ours, theirs = both(proxy, inputs, "auto", **SETTINGS[settings])
    assert torch.equal(ours, theirs)


def sliding(seed):
    torch.manual_seed(seed)
    config = MistralConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=5,
        max_position_embeddings=64,
        initializer_range=0.3,
        eos_token_id=None,
    )
    return MistralForCausalLM(config).eval()


def with_biases(seed):
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        eos_token_id=None,
        pad_token_id=PAD,
    )
    return Qwen2ForCausalLM(config).eval()


@pytest.mark.parametrize("make", [sliding, with_biases, tiny_gpt2])
@pytest.mark.parametrize("settings", ["greedy", "sampled", "penalties"])
def test_every_family_writes_the_same(make, settings, inputs):
    proxy = ProxyModel(*relatives(make), tokenizer=tiny_tokenizer())
    ours, theirs = both(proxy, inputs, **SETTINGS[settings])
    assert torch.equal(ours, theirs)
    assert drafted(proxy)


def test_an_adapter_with_one_copy_of_the_weights_writes_the_same(inputs):
    large, small, _ = relatives(eos_token_id=None)
    torch.manual_seed(5)
    adapted = get_peft_model(small, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    proxy = ProxyModel(large, adapted, tokenizer=tiny_tokenizer())
    for settings in ("greedy", "sampled"):
        ours, theirs = both(proxy, inputs, **SETTINGS[settings])
        assert torch.equal(ours, theirs)
    assert drafted(proxy)


def test_models_of_different_widths_write_the_same(inputs):
    large, tuned, untuned = (
        tiny_llama(seed, vocab=VOCAB + pad, eos_token_id=None) for seed, pad in ((1, 4), (1, 0), (2, 9))
    )
    proxy = ProxyModel(large, tuned, untuned, vocab_size=VOCAB)
    for settings in ("greedy", "sampled", "strength"):
        ours, theirs = both(proxy, inputs, **SETTINGS[settings], pad_token_id=PAD)
        assert torch.equal(ours, theirs)


def test_a_prompt_of_one_token_and_a_context_that_ends(inputs):
    proxy = ProxyModel(*relatives(tiny_gpt2), tokenizer=tiny_tokenizer())  # 64 learned positions
    ids = torch.tensor([[5]])
    ours, theirs = both(proxy, {"input_ids": ids}, 8, max_new_tokens=63, eos_token_id=None)
    assert ours.shape == (1, 64)
    assert torch.equal(ours, theirs)


def test_rows_at_the_end_of_the_context_take_part_in_the_rounds_of_others():
    proxy = ProxyModel(*relatives(tiny_gpt2), tokenizer=tiny_tokenizer())
    ids = torch.randint(3, VOCAB, (2, 56), generator=torch.Generator().manual_seed(0))
    ids[1, :50] = PAD
    given = {"input_ids": ids, "attention_mask": (ids != PAD).long()}
    ours, theirs = both(proxy, given, 7, max_new_tokens=8, eos_token_id=None)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("settings", ["an end", "sampled", "sampled and penalised", "strength by rows"])
def test_scores_are_those_of_transformers_loop_while_a_row_lives(proxy, inputs, settings):
    how = SETTINGS[settings] | {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    ours, theirs = both(proxy, inputs, **how)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert len(ours.scores) == len(theirs.scores) == ours.sequences.shape[1] - 11
    new = ours.sequences[:, 11:].tolist()
    ends = set(SETTINGS[settings].get("eos_token_id", [EOS]))
    for row, tokens in enumerate(new):
        lives = next((place + 1 for place, token in enumerate(tokens) if token in ends), len(tokens))
        for mine, other in ((ours.scores, theirs.scores), (ours.logits, theirs.logits)):
            for place in range(lives):
                torch.testing.assert_close(mine[place][row], other[place][row], atol=1e-4, rtol=1e-4)
            assert not any(mine[place][row].any() for place in range(lives, len(tokens)))


def test_scores_are_returned_only_where_asked_for(proxy, inputs):
    ours, _ = both(proxy, inputs, return_dict_in_generate=True)
    assert ours.scores is ours.logits is ours.cache is None


class Collector(BaseStreamer):
    def __init__(self):
        self.puts, self.ended = [], 0

    def put(self, value):
        self.puts.append(value.flatten().tolist())

    def end(self):
        self.ended += 1


def test_a_streamer_gets_the_same_tokens_one_by_one(proxy, inputs):
    streams = Collector(), Collector()
    for stream, draft_tokens in zip(streams, (4, None), strict=True):
        before = drafted(proxy)
        proxy.generate(
            **only(inputs, 1), max_new_tokens=NEW, do_sample=False, streamer=stream, draft_tokens=draft_tokens
        )
        assert (drafted(proxy) > before) == (draft_tokens == 4)
    assert streams[0].puts == streams[1].puts
    assert streams[0].ended == streams[1].ended == 1


def test_a_users_own_criterion_is_asked_about_every_token_of_a_single_row(proxy, inputs):
    texts = {}
    for draft_tokens in (4, None):
        seen = []

        def stop(input_ids, scores, seen=seen, **_):
            seen.append((input_ids.tolist(), len(scores), scores[-1].argmax(-1).tolist()))
            return torch.tensor([len(seen) == 6])

        before = drafted(proxy)
        output = proxy.generate(
            **only(inputs, 2),
            max_new_tokens=NEW,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([stop]),
            return_dict_in_generate=True,
            output_scores=True,
            draft_tokens=draft_tokens,
        )
        assert (drafted(proxy) > before) == (draft_tokens == 4)
        texts[draft_tokens] = (output.sequences.tolist(), seen)
        assert len(seen) == 6
    assert texts[4] == texts[None]


def stops_never(input_ids, _scores, **_):
    return torch.zeros(len(input_ids), dtype=torch.bool)


def adds_nothing(_input_ids, scores):
    return scores


@pytest.mark.parametrize(
    "settings",
    [
        {"logits_processor": LogitsProcessorList([adds_nothing])},
        {"stopping_criteria": StoppingCriteriaList([stops_never])},
        {"use_cache": False},
        {"prefill_chunk_size": 4},
        {"stop_strings": ["a"], "tokenizer": tiny_tokenizer(), "eos_token_id": None},
    ],
    ids=["own processor", "own criterion of a batch", "no cache", "prefill in chunks", "stop strings without an end"],
)
def test_what_is_not_known_to_be_lossless_is_left_to_transformers(proxy, inputs, settings, caplog):
    before = drafted(proxy)
    with caplog.at_level(logging.WARNING):
        ours, theirs = both(proxy, inputs, **settings)
    assert torch.equal(ours, theirs)
    assert drafted(proxy) == before
    assert any("draft_tokens has no effect" in record.message for record in caplog.records)


def test_a_prefix_in_a_cache_and_holes_in_a_mask_are_left_to_transformers(proxy, inputs):
    before = drafted(proxy)
    one = only(inputs, 1)
    expected = proxy.generate(**one, max_new_tokens=4, do_sample=False, draft_tokens=None)
    cache = proxy(one["input_ids"][:, :5]).cache
    assert torch.equal(proxy.generate(**one, cache=cache, max_new_tokens=4, do_sample=False), expected)
    mask = one["attention_mask"].clone()
    mask[0, 3] = 0
    ours, theirs = both(proxy, {"input_ids": one["input_ids"], "attention_mask": mask}, "auto")
    assert torch.equal(ours, theirs)
    assert drafted(proxy) == before


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
def test_a_mask_may_be_of_any_dtype(proxy, inputs, dtype):
    expected = proxy.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    masked = inputs | {"attention_mask": inputs["attention_mask"].to(dtype)}
    assert torch.equal(proxy.generate(**masked, max_new_tokens=NEW, do_sample=False), expected)
    if dtype != torch.float32:  # which transformers' own loop does not take
        with_hole = masked | {"attention_mask": masked["attention_mask"].clone()}
        with_hole["attention_mask"][1, 3] = 0
        assert torch.equal(*both(proxy, with_hole, "auto"))


@pytest.mark.parametrize("draft_tokens", [0, 3, "auto"])
def test_a_prompt_that_is_longer_than_a_text_may_be_gets_one_token(proxy, inputs, draft_tokens):
    criteria = StoppingCriteriaList([MaxLengthCriteria(5)])
    ours, theirs = both(proxy, only(inputs, 1), draft_tokens, stopping_criteria=criteria, eos_token_id=None)
    assert torch.equal(ours, theirs)
    assert ours.shape[1] == 12


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda proxy: pickle.loads(pickle.dumps(proxy))])
@pytest.mark.parametrize("prepared", [False, True])
def test_a_copy_writes_with_its_own_weights(copied, prepared, inputs):
    proxy = ProxyModel(*relatives(eos_token_id=None))
    if prepared:
        proxy.prepare()
    before = proxy.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    twin = copied(proxy)
    assert torch.equal(twin.generate(**inputs, max_new_tokens=NEW, do_sample=False), before)
    twin.restore()
    with torch.no_grad():
        for weight in twin.parameters():
            weight.copy_(torch.randn_like(weight) * 0.2)
    ours, theirs = both(twin, inputs)
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, before)
    assert torch.equal(proxy.generate(**inputs, max_new_tokens=NEW, do_sample=False), before)


def _merge(proxy):
    proxy.tuned.merge_adapter()


def _hook(proxy):
    proxy.large.model.layers[0].register_forward_hook(lambda _layer, _inputs, states: states + 0.5)


def _become_dora(proxy):
    proxy.tuned.add_adapter("other", LoraConfig(r=4, target_modules=["q_proj"], use_dora=True, init_lora_weights=False))
    proxy.tuned.set_adapter("other")
    with torch.no_grad():
        for name, weight in proxy.tuned.named_parameters():
            if "magnitude" in name:
                weight.mul_(3.0)


@pytest.mark.parametrize("change", [_merge, _hook, _become_dora])
def test_models_that_change_after_a_text_are_seen_as_they_are(change, inputs):
    large, base, untuned = relatives(eos_token_id=None)
    tuned = get_peft_model(
        base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    ).eval()
    proxy = ProxyModel(large, tuned, untuned)
    before = proxy.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    change(proxy)
    ours, theirs = both(proxy, inputs)
    assert torch.equal(ours, theirs)
    assert torch.equal(ours, before) == (change is _merge)


def test_threads_that_share_one_copy_of_the_small_weights_write_one_after_the_other(inputs):
    large, base, _ = relatives(eos_token_id=None)
    proxy = ProxyModel(
        large, get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    )
    expected = proxy.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    found = []

    def write():
        for _ in range(4):
            found.append(proxy.generate(**inputs, max_new_tokens=NEW, do_sample=False))

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 16
    assert all(torch.equal(one, expected) for one in found)


def test_beams_and_assistants_take_no_drafts(proxy, inputs):
    one = only(inputs, 1)
    before = drafted(proxy)
    for settings in ({"num_beams": 3}, {"assistant_model": proxy.tuned}):
        assert torch.equal(*both(proxy, one, **settings))
    assert drafted(proxy) == before


def test_transformers_own_assisted_decoding_gives_the_same_tokens(proxy, inputs):
    one = only(inputs, 1)
    how = {"max_new_tokens": NEW, "do_sample": False}
    assert torch.equal(proxy.generate(**one, **how, assistant_model=proxy.tuned), proxy.generate(**one, **how))


def test_without_a_seed_the_global_generator_decides(proxy, inputs):
    texts = []
    for draft_tokens in (3, None):
        torch.manual_seed(11)
        texts.append(proxy.generate(**inputs, max_new_tokens=NEW, do_sample=True, draft_tokens=draft_tokens))
        texts.append(torch.rand(1))
    assert torch.equal(texts[0], texts[2])
    assert torch.equal(texts[1], texts[3])


@pytest.mark.parametrize("draft_tokens", [-1, 1.5, "many", True])
def test_other_values_of_draft_tokens_are_refused(proxy, inputs, draft_tokens):
    with pytest.raises(ModelError, match="draft_tokens must be"):
        proxy.generate(**inputs, draft_tokens=draft_tokens)
