import copy
import json
import shutil

import pytest
import torch
import transformers
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from reference import reference_beams, reference_greedy, reference_scores
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MaxLengthCriteria,
    PreTrainedTokenizerFast,
    StoppingCriteriaList,
)
from transformers.generation import BaseStreamer

from fedpt_flwr.errors import ModelError, VocabularyMismatch
from fedpt_flwr.logits import plausible_tokens
from fedpt_flwr.models import fingerprint
from fedpt_flwr.proxy import ProxyCache, ProxyModel
from fedpt_flwr.proxy_folder import BUNDLED, ProxyConfig, save_small
from fedpt_flwr.speculative import Speculation

# peft asks transformers by a name that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

VOCAB = 64
PAD, BOS, EOS = 0, 1, 2


def llama(seed, *, vocab=VOCAB, spread=0.3, layers=2, **settings):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=96,
        initializer_range=spread,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=None,
        **settings,
    )
    return LlamaForCausalLM(config).eval()


def gpt2(seed, *, vocab=VOCAB, spread=0.3):
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=vocab,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=80,
        initializer_range=spread,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=None,
    )
    return GPT2LMHeadModel(config).eval()


def trio(family="llama", **settings):
    """A large model with three layers, and a tuned and an untuned small one."""
    if family == "gpt2":
        return gpt2(1, **settings), gpt2(2, **settings), gpt2(3, **settings)
    if family == "mixed":
        return llama(1, layers=3, **settings), gpt2(2, **settings), gpt2(3, **settings)
    return llama(1, layers=3, **settings), llama(2, **settings), llama(3, **settings)


def adapted(base, *, seed=5, **settings):
    """``base`` (changed in place) under a LoRA adapter whose weights are not zero."""
    kind = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", "r": 4, "fan_in_fan_out": False}
    model = get_peft_model(base, LoraConfig(**{**kind, **settings})).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    return model


def prompts(batch, length, seed=0):
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padded(rows):
    width = max(len(row) for row in rows)
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def new_tokens(output, prompt_length):
    return output[:, prompt_length:].tolist()


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {"<pad>": PAD, "<bos>": BOS, "</s>": EOS} | {f"w{i}": i for i in range(3, VOCAB)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="<pad>")), eos_token="</s>", pad_token="<pad>"
    )


# Scores


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixed"])
def test_forward_equals_the_definition(family):
    models = trio(family)
    ids = prompts(2, 9)
    with torch.no_grad():
        logits = ProxyModel(*models, alpha=0.7, plausibility=0.05)(ids).logits
    assert logits.dtype == torch.float32
    for row in range(2):
        expected = reference_scores(*models, ids[row], alpha=0.7, plausibility=0.05)
        torch.testing.assert_close(logits[row], expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_alpha_zero_is_the_large_model_bit_for_bit(family):
    large, tuned, untuned = trio(family)
    proxy = ProxyModel(large, tuned, untuned, alpha=0.0)
    ids = prompts(2, 9)
    assert torch.equal(proxy(ids).logits, large(ids).logits)
    settings = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    ours, theirs = proxy.generate(ids, draft_tokens=None, **settings), large.generate(ids, **settings)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert all(torch.equal(a, b) for a, b in zip(ours.logits, theirs.logits, strict=True))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_untouched_small_model_leaves_the_large_one_bit_for_bit(family):
    large, tuned, _ = trio(family)
    proxy = ProxyModel(large, tuned, copy.deepcopy(tuned), alpha=0.9)
    ids = prompts(2, 9)
    assert torch.equal(proxy(ids).logits, large(ids).logits)
    assert torch.equal(
        proxy.generate(ids, max_new_tokens=12, do_sample=False), large.generate(ids, max_new_tokens=12, do_sample=False)
    )


def test_large_equal_to_untuned_with_alpha_one_is_the_tuned_model():
    _, tuned, untuned = trio()
    ids = prompts(2, 9)
    logits = ProxyModel(copy.deepcopy(untuned), tuned, untuned)(ids).logits
    torch.testing.assert_close(logits, tuned(ids).logits, atol=1e-4, rtol=1e-5)


def test_alpha_and_plausibility_can_be_changed_and_the_config_follows():
    models = trio()
    proxy = ProxyModel(*models)
    ids = prompts(1, 6)
    proxy.alpha, proxy.plausibility = 0.25, 0.1
    assert (proxy.config.alpha, proxy.config.plausibility) == (0.25, 0.1)
    expected = reference_scores(*models, ids[0], alpha=0.25, plausibility=0.1)
    torch.testing.assert_close(proxy(ids).logits[0], expected, atol=1e-4, rtol=1e-5)


def test_each_row_of_a_batch_may_have_its_own_strength():
    models = trio()
    ids = prompts(3, 6)
    alphas, thresholds = [0.0, 0.5, 1.5], [0.0, 0.2, 0.05]
    output = ProxyModel(*models).generate(
        ids,
        max_new_tokens=8,
        do_sample=False,
        alpha=torch.tensor(alphas),
        plausibility=torch.tensor(thresholds),
    )
    expected = [
        reference_greedy(*models, row, max_new_tokens=8, alpha=alpha, plausibility=tau)
        for row, alpha, tau in zip(ids, alphas, thresholds, strict=True)
    ]
    assert new_tokens(output, 6) == expected


def test_loss_is_that_of_the_unmasked_scores():
    models = trio()
    ids = prompts(2, 9)
    labels = ids.clone()
    labels[:, :4] = -100
    output = ProxyModel(*models, plausibility=0.5)(ids, labels=labels)
    assert output.logits.isinf().any()
    scores = torch.stack([reference_scores(*models, row) for row in ids])
    # Position t scores token t + 1: labels 4..8 belong to positions 3..7
    expected = torch.nn.functional.cross_entropy(scores[:, 3:8].reshape(-1, VOCAB), ids[:, 4:].reshape(-1))
    torch.testing.assert_close(output.loss, expected)


@pytest.mark.parametrize("keep", [1, 3, torch.tensor([0, 4, 7])], ids=str)
def test_only_the_asked_positions_are_scored(keep):
    proxy = ProxyModel(*trio("mixed"))
    ids = prompts(2, 8)
    full = proxy(ids).logits
    wanted = full[:, -keep:] if isinstance(keep, int) else full[:, keep]
    torch.testing.assert_close(proxy(ids, logits_to_keep=keep).logits, wanted)


def test_a_model_that_scores_all_positions_is_cut_to_the_asked_ones():
    class Wordy(LlamaForCausalLM):
        def forward(self, input_ids, attention_mask=None, cache=None, use_cache=None, return_dict=None):
            return super().forward(input_ids, attention_mask, None, cache, use_cache=use_cache)

    large, tuned, untuned = trio()
    proxy = ProxyModel(large, Wordy(tuned.config).eval(), untuned)
    ids = prompts(2, 6)
    full = proxy(ids).logits
    torch.testing.assert_close(proxy(ids, logits_to_keep=2).logits, full[:, -2:])
    torch.testing.assert_close(proxy(ids, logits_to_keep=torch.tensor([1, 3])).logits, full[:, [1, 3]])


def test_tuple_output_is_available():
    proxy = ProxyModel(*trio())
    logits, cache = proxy(prompts(1, 4), return_dict=False)
    assert logits.shape == (1, 4, VOCAB)
    assert isinstance(cache, ProxyCache)
    assert len(proxy(prompts(1, 4), return_dict=False, use_cache=False)) == 1


def test_models_may_have_different_dtypes():
    large, tuned, untuned = trio()
    ids = prompts(1, 6)
    proxy = ProxyModel(large.bfloat16(), tuned, untuned.half())
    expected = large(ids).logits.float() + tuned(ids).logits - untuned(ids).logits.float()
    torch.testing.assert_close(proxy(ids).logits, expected)


# The cache


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixed"])
def test_cached_decoding_equals_a_full_pass_per_token(family):
    proxy = ProxyModel(*trio(family), alpha=0.8)
    ids = prompts(2, 14)
    full = proxy(ids, use_cache=False).logits
    cache, pieces = None, []
    for start, stop in ((0, 5), (5, 6), (6, 7), (7, 11), (11, 14)):
        output = proxy(ids[:, start:stop], cache=cache)
        cache = output.cache
        pieces.append(output.logits)
    assert cache.get_seq_length() == 14
    torch.testing.assert_close(torch.cat(pieces, dim=1), full, atol=1e-4, rtol=1e-5)


def test_cropping_takes_back_tokens_in_all_three_models():
    proxy = ProxyModel(*trio())
    ids = prompts(1, 10)
    cache = proxy(ids).cache
    cache.crop(-4)
    assert [part.get_seq_length() for part in cache.caches] == [6, 6, 6]
    again = proxy(ids[:, 6:], cache=cache).logits
    torch.testing.assert_close(again, proxy(ids).logits[:, 6:], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("method", ["reorder_cache", "batch_select_indices"])
def test_rows_are_selected_in_all_three_models(method):
    proxy = ProxyModel(*trio())
    ids = prompts(3, 8)
    cache = proxy(ids[:, :7]).cache
    rows = torch.tensor([2, 0])
    getattr(cache, method)(rows)
    again = proxy(ids[rows, 7:], cache=cache).logits
    torch.testing.assert_close(again, proxy(ids).logits[rows, 7:], atol=1e-4, rtol=1e-5)


def test_a_copied_cache_is_independent():
    proxy = ProxyModel(*trio())
    ids = prompts(1, 8)
    prefix = proxy(ids[:, :5]).cache
    branch = copy.deepcopy(prefix)
    output = proxy.generate(ids, cache=branch, max_new_tokens=4, do_sample=False)
    assert prefix.get_seq_length() == 5
    assert torch.equal(output, proxy.generate(ids, max_new_tokens=4, do_sample=False))


def test_a_plain_cache_is_refused():
    proxy = ProxyModel(*trio())
    with pytest.raises(ModelError, match=r"must be a ProxyCache, got 'DynamicCache'; start from proxy.new_cache\(\)"):
        proxy(prompts(1, 4), cache=DynamicCache(config=proxy.large.config))


def test_a_static_cache_is_refused():
    with pytest.raises(ModelError, match="dynamic caches"):
        ProxyModel(*trio()).generate(prompts(1, 4), max_new_tokens=2, cache_implementation="static")


# Generation


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixed"])
def test_greedy_generation_equals_the_definition(family):
    models = trio(family)
    proxy = ProxyModel(*models, alpha=0.6)
    ids = prompts(3, 7)
    output = proxy.generate(ids, max_new_tokens=12, do_sample=False)
    expected = [reference_greedy(*models, row, max_new_tokens=12, alpha=0.6) for row in ids]
    assert new_tokens(output, 7) == expected
    assert torch.equal(output, proxy.generate(ids, max_new_tokens=12, do_sample=False, use_cache=False))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixed"])
def test_batch_of_unequal_prompts_equals_one_by_one(family):
    models = trio(family)
    rows = [prompts(1, length, seed=length)[0].tolist() for length in (3, 9, 6)]
    output = ProxyModel(*models).generate(**left_padded(rows), max_new_tokens=10, do_sample=False)
    expected = [reference_greedy(*models, torch.tensor(row), max_new_tokens=10) for row in rows]
    assert new_tokens(output, 9) == expected


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("Qwen3", {"head_dim": 8, "num_key_value_heads": 2}),
        ("Gemma2", {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8}),
        ("GPTNeoX", {}),
        ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.3}),
    ],
)
def test_other_families_generate_as_defined(family, settings):
    def build(seed):
        torch.manual_seed(seed)
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.3}
        if family != "OPT":
            sizes["intermediate_size"] = 48
        ids = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": None}
        config = getattr(transformers, f"{family}Config")(vocab_size=VOCAB, **sizes, **ids, **settings)
        return getattr(transformers, f"{family}ForCausalLM")(config).eval()

    models = [build(seed) for seed in (1, 2, 3)]
    proxy = ProxyModel(*models, alpha=0.8)
    rows = [prompts(1, length, seed=length)[0].tolist() for length in (9, 4)]
    output = proxy.generate(**left_padded(rows), max_new_tokens=8, do_sample=False)
    expected = [reference_greedy(*models, torch.tensor(row), max_new_tokens=8, alpha=0.8) for row in rows]
    assert new_tokens(output, 9) == expected
    ids = torch.tensor([rows[0]])
    output = proxy.generate(ids, max_new_tokens=8, do_sample=False, assistant_model=models[1])
    assert new_tokens(output, 9) == expected[:1]


@pytest.fixture
def drafted(monkeypatch):
    """Holds something once texts were drafted."""
    drafted = []
    decode = Speculation.decode
    monkeypatch.setattr(Speculation, "decode", lambda *args, **told: (drafted.append(True), decode(*args, **told))[1])
    return drafted


@pytest.mark.parametrize("role", ["large", "small"])
@pytest.mark.parametrize("draft_tokens", [None, 3])
@pytest.mark.parametrize("max_new_tokens", [10, 11, 30])
def test_texts_go_on_past_the_length_at_which_longrope_changes(role, draft_tokens, max_new_tokens, drafted):
    def phi3(seed):
        torch.manual_seed(seed)
        sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        ids = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": None}
        rope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
        rope |= {"short_factor": [1.0] * 4, "long_factor": [1.0, 3.0, 6.0, 12.0]}
        config = transformers.Phi3Config(
            vocab_size=VOCAB,
            max_position_embeddings=64,
            original_max_position_embeddings=16,
            initializer_range=0.5,
            rope_parameters=rope,
            **sizes,
            **ids,
        )
        return transformers.Phi3ForCausalLM(config).eval()

    models = (phi3(1), llama(2), llama(3)) if role == "large" else (llama(1), phi3(2), phi3(3))
    proxy = ProxyModel(*models, alpha=0.5)
    ids = prompts(1, 6)
    output = proxy.generate(ids, max_new_tokens=max_new_tokens, do_sample=False, draft_tokens=draft_tokens)
    # The reference keeps no cache: every pass reads the whole text with the frequencies of its length.
    assert new_tokens(output, 6) == [reference_greedy(*models, ids[0], max_new_tokens=max_new_tokens, alpha=0.5)]
    assert bool(drafted) == (draft_tokens == 3 and max_new_tokens == 10), "only texts that end before it"
    assert proxy.steady_context == 16


@pytest.mark.parametrize("draft_tokens", [None, 3])
def test_texts_within_the_context_are_drafted_with_dynamic_frequencies(draft_tokens, drafted):
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    models = (llama(1, rope_parameters=rope), llama(2), llama(3))
    proxy = ProxyModel(*models, alpha=0.5)
    assert proxy.steady_context == 96
    rows = [prompts(1, length, seed=length)[0].tolist() for length in (81, 74)]
    output = proxy.generate(**left_padded(rows), max_new_tokens=15, do_sample=False, draft_tokens=draft_tokens)
    expected = [reference_greedy(*models, torch.tensor(row), max_new_tokens=15, alpha=0.5) for row in rows]
    assert new_tokens(output, 81) == expected
    assert bool(drafted) == (draft_tokens == 3)


@pytest.mark.parametrize("plausibility", [0.0, 0.3])
def test_beam_search_equals_a_search_without_cache(plausibility):
    models = trio(spread=0.08)
    proxy = ProxyModel(*models, plausibility=plausibility)
    ids = prompts(4, 6)
    output = proxy.generate(ids, max_new_tokens=6, num_beams=3, do_sample=False)
    expected = [reference_beams(*models, row, num_beams=3, max_new_tokens=6, plausibility=plausibility) for row in ids]
    assert new_tokens(output, 6) == expected
    assert not torch.equal(output, proxy.generate(ids, max_new_tokens=6, do_sample=False))  # beams found better ones


@pytest.mark.parametrize("plausibility", [0.0, 0.2])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_assisted_generation_with_the_tuned_model_changes_no_token(family, plausibility):
    large, _, untuned = trio(family, spread=0.1)
    tuned = copy.deepcopy(large)  # drafts that are often, but not always, accepted
    with torch.no_grad():
        for weight in tuned.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(4))
    proxy = ProxyModel(large, tuned, untuned, alpha=0.3, plausibility=plausibility)
    ids = prompts(1, 7)
    expected = reference_greedy(large, tuned, untuned, ids[0], max_new_tokens=24, alpha=0.3, plausibility=plausibility)
    output = proxy.generate(ids, max_new_tokens=24, do_sample=False, assistant_model=tuned)
    assert new_tokens(output, 7) == [expected]


def test_a_proxy_may_assist_another_model():
    large, tuned, untuned = trio()
    ids = prompts(1, 5)
    output = large.generate(ids, max_new_tokens=8, do_sample=False, assistant_model=ProxyModel(large, tuned, untuned))
    assert torch.equal(output, large.generate(ids, max_new_tokens=8, do_sample=False))


@pytest.mark.slow
def test_sampling_is_reproducible_and_follows_the_scores():
    models = trio(spread=0.08)
    proxy = ProxyModel(*models)
    ids = prompts(1, 5)

    def sample(seed, **settings):
        torch.manual_seed(seed)
        return proxy.generate(ids, max_new_tokens=6, do_sample=True, **settings)

    assert torch.equal(sample(7), sample(7))
    assert not torch.equal(sample(7), sample(8))
    first = new_tokens(sample(1, num_return_sequences=2000, top_k=0, plausibility=0.5), 5)
    counts = torch.bincount(torch.tensor([row[0] for row in first]), minlength=VOCAB)
    probabilities = reference_scores(*models, ids[0], plausibility=0.5)[-1].softmax(-1)
    assert (counts[probabilities == 0] == 0).all()
    kept = probabilities > 0
    chi_square = ((counts[kept] - 2000 * probabilities[kept]) ** 2 / (2000 * probabilities[kept])).sum()
    freedom = int(kept.sum()) - 1
    assert freedom > 1
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("how", [{"do_sample": False}, {"do_sample": True, "top_k": 0, "temperature": 3.0}])
def test_generation_never_leaves_the_plausible_set(how):
    large, tuned, untuned = trio(spread=0.1)
    ids = prompts(4, 6)
    torch.manual_seed(0)
    output = ProxyModel(large, tuned, untuned, alpha=3.0, plausibility=0.4).generate(ids, max_new_tokens=10, **how)
    kept = plausible_tokens(tuned(output).logits, plausibility=0.4 - 1e-4)
    chosen = kept[:, 5:-1].gather(2, output[:, 6:, None])
    assert chosen.all()
    unmasked = ProxyModel(large, tuned, untuned, alpha=3.0).generate(ids, max_new_tokens=10, do_sample=False)
    assert not kept[:, 5:-1].gather(2, unmasked[:, 6:, None]).all()  # so the mask was needed


def test_streamers_and_stopping_criteria_work():
    class Collector(BaseStreamer):
        def __init__(self):
            self.ids, self.ended = [], False

        def put(self, value):
            self.ids += value.flatten().tolist()

        def end(self):
            self.ended = True

    proxy, streamer, ids = ProxyModel(*trio()), Collector(), prompts(1, 5)
    stop = StoppingCriteriaList([MaxLengthCriteria(9)])
    output = proxy.generate(ids, max_new_tokens=20, do_sample=False, streamer=streamer, stopping_criteria=stop)
    assert output.shape == (1, 9)
    assert streamer.ids == output[0].tolist()
    assert streamer.ended


def test_generation_ends_where_the_tokenizer_says(tokenizer):
    models = trio()
    ids = prompts(1, 6)
    expected = reference_greedy(*models, ids[0], max_new_tokens=10)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = f"w{expected[3]}"
    output = ProxyModel(*models, tokenizer=tokenizer).generate(ids, max_new_tokens=10, do_sample=False)
    assert new_tokens(output, 6) == [expected[: expected.index(expected[3]) + 1]]


def test_end_of_text_ids_of_large_model_and_tokenizer_both_count(tokenizer):
    models = trio()
    models[0].generation_config.eos_token_id = [11, 12]
    models[0].generation_config.pad_token_id = None
    proxy = ProxyModel(*models, tokenizer=tokenizer)
    assert proxy.generation_config.eos_token_id == [11, 12, EOS]
    assert proxy.generation_config.pad_token_id == PAD
    assert models[0].generation_config.eos_token_id == [11, 12]  # the large model's own is not touched


def test_the_shortest_context_is_the_proxys():
    assert ProxyModel(*trio("mixed")).config.max_position_embeddings == 80


# One copy of the small weights


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("untuned", ["left out", "the base inside"])
def test_lora_pair_with_one_copy_equals_two_copies(family, untuned):
    large, small, _ = trio(family)
    settings = {"fan_in_fan_out": family == "gpt2", "target_modules": ["c_attn"] if family == "gpt2" else "all-linear"}
    two = ProxyModel(large, adapted(copy.deepcopy(small), **settings), copy.deepcopy(small))
    one = ProxyModel(large, adapted(small, **settings), None if untuned == "left out" else small)
    ids = prompts(2, 7)
    assert one.untuned is None
    assert not torch.equal(one(ids).logits, large(ids).logits)
    assert torch.equal(one(ids).logits, two(ids).logits)
    settings = {"max_new_tokens": 10, "do_sample": False}
    assert torch.equal(one.generate(ids, **settings), two.generate(ids, **settings))
    assert torch.equal(one.generate(ids[:1], assistant_model=one.tuned, **settings), two.generate(ids[:1], **settings))


def test_one_copy_keeps_whole_tuned_modules_apart():
    large, small, _ = trio()
    settings = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    ids = prompts(1, 6)
    untuned_logits = small(ids).logits
    tuned = adapted(small, **settings)
    with torch.no_grad():
        tuned.get_base_model().lm_head.modules_to_save["default"].weight.mul_(1.5)
    expected = large(ids).logits + tuned(ids).logits - untuned_logits
    torch.testing.assert_close(ProxyModel(large, tuned)(ids).logits, expected)


def test_a_plain_pair_needs_both_models():
    large, tuned, _ = trio()
    with pytest.raises(ModelError, match="only if the tuned one carries a PEFT adapter, got 'LlamaForCausalLM'"):
        ProxyModel(large, tuned)


def test_the_same_adapted_model_twice_is_refused():
    large, small, _ = trio()
    tuned = adapted(small)
    with pytest.raises(ModelError, match="leave untuned out"):
        ProxyModel(large, tuned, tuned)


def test_an_adapter_of_the_prompt_is_refused():
    large, small, _ = trio()
    tuned = get_peft_model(small, PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    with pytest.raises(ModelError, match="change its layers, not its prompt"):
        ProxyModel(large, tuned)


def test_all_parts_are_frozen_and_stay_so():
    large, small, _ = trio()
    proxy = ProxyModel(large.train(), adapted(small).train())
    proxy(prompts(1, 4))
    assert not any(weight.requires_grad for weight in proxy.parameters())
    assert not any(part.training for part in proxy.modules())


# Vocabularies


def test_padding_is_ruled_out_and_changes_nothing_else():
    models = [llama(1, vocab=70), llama(2, vocab=66), llama(3, vocab=66)]
    proxy = ProxyModel(*models, vocab_size=VOCAB)
    ids = prompts(2, 6)
    logits = proxy(ids, labels=ids).logits
    assert logits.shape[-1] == proxy.config.vocab_size == 70
    assert (logits[..., VOCAB:] == -torch.inf).all()
    expected = reference_scores(*models, ids[0], vocab_size=VOCAB)
    torch.testing.assert_close(logits[0, :, :VOCAB], expected, atol=1e-4, rtol=1e-5)
    assert proxy(ids, labels=ids).loss.isfinite()
    output = proxy.generate(ids, max_new_tokens=8, do_sample=False)
    assert new_tokens(output, 6)[0] == reference_greedy(*models, ids[0], max_new_tokens=8, vocab_size=VOCAB)


def test_the_tokenizer_tells_how_many_ids_are_real(tokenizer):
    models = [llama(1, vocab=70), llama(2, vocab=66), llama(3, vocab=66)]
    assert ProxyModel(*models, tokenizer=tokenizer).config.real_vocab_size == VOCAB


def test_vocabulary_mismatch_names_all_three_sizes():
    with pytest.raises(
        VocabularyMismatch, match=r"'large': 70, 'tuned': 66, 'untuned': 64.*vocab_size=len\(tokenizer\)"
    ):
        ProxyModel(llama(1, vocab=70), llama(2, vocab=66), llama(3))


# Saving and loading


@pytest.fixture
def saved(tmp_path):
    """Folders of a large and an untuned model, and a full and an adapter proxy over them."""
    large, tuned, untuned = trio()
    large.save_pretrained(tmp_path / "large")
    untuned.save_pretrained(tmp_path / "small")
    refs = {"large_ref": str(tmp_path / "large"), "untuned_ref": str(tmp_path / "small")}
    full = ProxyModel(large, tuned, untuned, 0.7, 0.01)
    full.save_pretrained(tmp_path / "full", **refs)
    lora = ProxyModel(large, adapted(copy.deepcopy(untuned)), None, 0.7, 0.01)
    lora.save_pretrained(tmp_path / "lora", **refs)
    return tmp_path, {"full": full, "lora": lora}


@pytest.mark.parametrize("form", ["full", "lora"])
def test_saving_and_loading_is_the_identity(saved, form):
    folder, proxies = saved
    loaded = ProxyModel.from_pretrained(folder / form)
    ids = prompts(2, 8)
    assert torch.equal(loaded(ids).logits, proxies[form](ids).logits)
    assert (loaded.alpha, loaded.plausibility) == (0.7, 0.01)
    assert (loaded.untuned is None) == (form == "lora")
    assert loaded.generation_config.pad_token_id == proxies[form].generation_config.pad_token_id
    loaded.save_pretrained(folder / form)  # over itself, with what it remembers
    assert torch.equal(ProxyModel.from_pretrained(folder / form)(ids).logits, proxies[form](ids).logits)


def test_the_folder_holds_the_small_model_only(saved):
    folder, _ = saved
    assert sorted(str(f.relative_to(folder / "lora")) for f in (folder / "lora").rglob("*") if f.is_file()) == [
        "config.json",
        "tuned/adapter_config.json",
        "tuned/adapter_model.safetensors",
    ]
    weights = [f.relative_to(folder / "full") for f in (folder / "full").rglob("*.safetensors")]
    assert [str(file) for file in weights] == ["tuned/model.safetensors"]
    config = json.loads((folder / "full" / "config.json").read_text())
    assert (config["model_type"], config["alpha"], config["plausibility"]) == ("fedpt_proxy", 0.7, 0.01)
    assert set(config["large"]) == set(config["untuned"]) == {"ref", "fingerprint", "dtype"}


def test_adapter_proxy_with_a_separate_untuned_model_loads_as_one_copy(saved):
    folder, proxies = saved
    untuned = LlamaForCausalLM.from_pretrained(folder / "small")
    two = ProxyModel(proxies["lora"].large, adapted(copy.deepcopy(untuned)), untuned, 0.7, 0.01)
    refs = {"large_ref": str(folder / "large"), "untuned_ref": str(folder / "small")}
    two.save_pretrained(folder / "two", **refs)
    loaded = ProxyModel.from_pretrained(folder / "two")
    ids = prompts(1, 5)
    assert loaded.untuned is None
    assert torch.equal(loaded(ids).logits, two(ids).logits)
    stranger = ProxyModel(proxies["lora"].large, adapted(llama(9)), untuned)
    with pytest.raises(ModelError, match="only if it sits on the untuned model's weights"):
        stranger.save_pretrained(folder / "three", **refs)


def test_saving_a_full_model_over_an_adapter_leaves_no_adapter(saved):
    folder, proxies = saved
    refs = {"large_ref": str(folder / "large"), "untuned_ref": str(folder / "small")}
    proxies["full"].save_pretrained(folder / "lora", **refs)
    assert not (folder / "lora" / "tuned" / "adapter_config.json").exists()
    assert ProxyModel.from_pretrained(folder / "lora").untuned is not None


def test_a_run_folder_is_loaded_through_its_link(saved):
    folder, proxies = saved
    run = folder / "run"
    (run / "rounds" / "0001").mkdir(parents=True)
    (run / "config.json").write_text('{"the": "run config"}')
    (folder / "full").rename(run / "rounds" / "0001" / "proxy")
    (run / "proxy").symlink_to("rounds/0001/proxy")
    ids = prompts(1, 5)
    for path in (run, run / "proxy", str(run)):
        assert torch.equal(ProxyModel.from_pretrained(path)(ids).logits, proxies["full"](ids).logits)


def test_auto_class_loads_a_proxy(saved):
    folder, proxies = saved
    loaded = AutoModelForCausalLM.from_pretrained(folder / "full", device_map={"": "cpu"})
    assert isinstance(loaded, ProxyModel)
    assert isinstance(AutoConfig.from_pretrained(folder / "full"), ProxyConfig)
    ids = prompts(1, 5)
    assert torch.equal(loaded(ids).logits, proxies["full"](ids).logits)
    weaker = AutoModelForCausalLM.from_pretrained(folder / "full", alpha=0.1, dtype=torch.bfloat16)
    assert weaker.alpha == 0.1
    assert {weight.dtype for weight in weaker.parameters()} == {torch.bfloat16}


def test_a_tokenizer_is_found_in_the_folder(saved, tokenizer):
    folder, proxies = saved
    refs = {"large_ref": str(folder / "large"), "untuned_ref": str(folder / "small")}
    proxies["full"].save_pretrained(folder / "full", tokenizer=tokenizer, **refs)
    loaded = AutoTokenizer.from_pretrained(folder / "full")
    assert loaded.get_vocab() == tokenizer.get_vocab()


def test_references_do_not_depend_on_the_working_directory(saved, monkeypatch):
    folder, proxies = saved
    monkeypatch.chdir(folder)
    proxies["full"].save_pretrained("full", large_ref="large", untuned_ref="./small")
    config = json.loads((folder / "full" / "config.json").read_text())
    assert config["large"]["ref"] == str(folder / "large")
    assert config["untuned"]["ref"] == str(folder / "small")
    monkeypatch.chdir("/")
    ProxyModel.from_pretrained(folder / "full")


def test_symbolic_references_are_stored_as_they_are(saved):
    folder, proxies = saved
    proxies["full"].save_pretrained(folder / "full", large_ref="demo:large", untuned_ref="some/hub-id")
    config = json.loads((folder / "full" / "config.json").read_text())
    assert (config["large"]["ref"], config["untuned"]["ref"]) == ("demo:large", "some/hub-id")


def test_saving_models_of_unknown_origin_asks_for_references(tmp_path):
    with pytest.raises(ModelError, match=r"where the large model came from.*pass large_ref: demo:large"):
        ProxyModel(*trio()).save_pretrained(tmp_path)


def test_large_may_lie_elsewhere_or_be_loaded_already(saved, monkeypatch):
    folder, proxies = saved
    (folder / "large").rename(folder / "moved")
    ids = prompts(1, 5)
    with pytest.raises(ModelError, match=r"the large model of the proxy cannot be loaded.*pass large=PATH"):
        ProxyModel.from_pretrained(folder / "full")
    monkeypatch.chdir(folder)
    for large in ("moved", folder / "moved", proxies["full"].large):
        loaded = ProxyModel.from_pretrained(folder / "full", large=large)
        assert torch.equal(loaded(ids).logits, proxies["full"](ids).logits)
    assert ProxyModel.from_pretrained(folder / "full", large="moved").config.large["ref"] == str(folder / "moved")


@pytest.mark.parametrize(
    ("role", "name", "remedy"), [("large", "large", "pass large=PATH"), ("untuned", "small", "bring the original back")]
)
@pytest.mark.parametrize("form", ["full", "lora"])
def test_another_model_behind_a_reference_is_refused(saved, form, role, name, remedy):
    folder, _ = saved
    model = LlamaForCausalLM.from_pretrained(folder / name)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    model.save_pretrained(folder / name)
    with pytest.raises(ModelError, match=rf"the {role} model .*{name} is not the one .*{remedy}.*train again"):
        ProxyModel.from_pretrained(folder / form)


def test_another_large_model_as_an_object_is_refused(saved):
    with pytest.raises(ModelError, match=r"the large model .* is not the one"):
        ProxyModel.from_pretrained(saved[0] / "full", large=llama(8))


def test_a_large_model_of_another_dtype_is_taken_with_a_warning(saved, caplog):
    folder, proxies = saved
    large = copy.deepcopy(proxies["full"].large).bfloat16()
    loaded = ProxyModel.from_pretrained(folder / "full", large=large)
    assert loaded.large is large
    assert "not compared" in caplog.text


def test_conversion_leaves_models_that_others_use_as_they_are(saved):
    folder, _ = saved
    first = ProxyModel.from_pretrained(folder / "full")
    converted = ProxyModel.from_pretrained(folder / "full", like=first, dtype="bfloat16")
    assert {part.dtype for part in (first.large, first.tuned, first.untuned)} == {torch.float32}
    assert {part.dtype for part in (converted.large, converted.tuned, converted.untuned)} == {torch.bfloat16}
    # What is of the wanted dtype already is shared, and what is not is loaded.
    third = ProxyModel.from_pretrained(folder / "full", like=converted, dtype="bfloat16")
    assert (third.large is converted.large, third.untuned is converted.untuned) == (True, True)
    again = ProxyModel.from_pretrained(folder / "full", like=converted)
    assert {part.dtype for part in (again.large, again.tuned, again.untuned)} == {torch.float32}
    lora = ProxyModel.from_pretrained(folder / "lora", like=first, dtype="bfloat16")
    assert {weight.dtype for weight in lora.parameters()} == {torch.bfloat16}
    assert first.untuned.dtype == torch.float32
    with pytest.raises(ModelError, match="a large model that is loaded already is not converted.*got 'float32'"):
        ProxyModel.from_pretrained(folder / "full", large=first.large, dtype="bfloat16")
    assert first.large.dtype == torch.float32
    ProxyModel.from_pretrained(folder / "full", large=converted.large, dtype="bfloat16")


def test_fingerprint_of_the_untuned_model_does_not_see_the_adapter(saved):
    folder, _ = saved
    plain = LlamaForCausalLM.from_pretrained(folder / "small")
    for form in ("full", "lora"):
        config = json.loads((folder / form / "config.json").read_text())
        assert config["untuned"]["fingerprint"] == fingerprint(plain)


@pytest.fixture
def bundled(saved):
    """A proxy whose untuned model lies nowhere else."""
    folder, proxies = saved
    proxy = ProxyModel(proxies["full"].large, proxies["full"].tuned, llama(9), 0.7, 0.01)
    proxy.save_pretrained(folder / "bundled", large_ref=str(folder / "large"), untuned_ref=BUNDLED)
    return folder, proxy


def test_an_untuned_model_that_is_nowhere_else_goes_with_the_folder(bundled):
    folder, proxy = bundled
    (folder / "bundled").rename(folder / "elsewhere")
    loaded = ProxyModel.from_pretrained(folder / "elsewhere")
    ids = prompts(2, 8)
    assert torch.equal(loaded(ids).logits, proxy(ids).logits)
    weights = [str(f.relative_to(folder / "elsewhere")) for f in (folder / "elsewhere").rglob("*.safetensors")]
    assert sorted(weights) == ["tuned/model.safetensors", "untuned/model.safetensors"]
    loaded.save_pretrained(folder / "elsewhere")  # over itself, with what it remembers
    loaded.save_pretrained(folder / "copy")
    for again in ("elsewhere", "copy"):
        assert torch.equal(ProxyModel.from_pretrained(folder / again)(ids).logits, proxy(ids).logits)


def test_a_folder_whose_untuned_model_has_a_reference_again_holds_none(bundled):
    folder, _ = bundled
    loaded = ProxyModel.from_pretrained(folder / "full")
    loaded.save_pretrained(folder / "bundled")
    assert not (folder / "bundled" / "untuned").exists()
    ids = prompts(1, 5)
    assert torch.equal(ProxyModel.from_pretrained(folder / "bundled")(ids).logits, loaded(ids).logits)


@pytest.mark.parametrize("damage", ["missing", "another"])
def test_an_untuned_model_in_the_folder_that_is_not_the_one_is_refused(bundled, damage):
    folder, _ = bundled
    untuned = folder / "bundled" / "untuned"
    if damage == "missing":
        shutil.rmtree(untuned)
    else:
        llama(4).save_pretrained(untuned)
    with pytest.raises(ModelError, match="the untuned model .*bundled"):
        ProxyModel.from_pretrained(folder / "bundled")


@pytest.mark.parametrize("form", ["full", "lora"])
def test_a_small_model_by_itself_is_loaded_by_transformers_with_its_tokenizer(saved, tokenizer, form):
    folder, proxies = saved
    save_small(proxies[form].tuned, folder / "device", str(folder / "small"), tokenizer)
    loaded = AutoModelForCausalLM.from_pretrained(folder / "device").eval()
    ids = prompts(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, proxies[form].tuned(ids).logits)
    assert AutoTokenizer.from_pretrained(folder / "device").get_vocab() == tokenizer.get_vocab()


# Bad input


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), "auto"])
def test_alpha_must_be_finite(alpha):
    with pytest.raises(ModelError, match="alpha must be a finite number"):
        ProxyModel(*trio(), alpha=alpha)
    proxy = ProxyModel(*trio())
    with pytest.raises(ModelError, match="alpha must be a finite number"):
        proxy.alpha = alpha


@pytest.mark.parametrize("plausibility", [-0.1, 1.0, float("nan")])
def test_plausibility_must_be_in_its_range(plausibility):
    proxy = ProxyModel(*trio())
    with pytest.raises(ModelError, match="at least 0 and below 1"):
        ProxyModel(*trio(), plausibility=plausibility)
    with pytest.raises(ModelError, match="at least 0 and below 1"):
        proxy.plausibility = plausibility
    with pytest.raises(ModelError, match="at least 0 and below 1"):
        proxy(prompts(1, 3), plausibility=plausibility)


def test_arguments_that_a_proxy_cannot_serve_are_refused():
    proxy, ids = ProxyModel(*trio()), prompts(1, 4)
    with pytest.raises(ModelError, match=r"\['output_hidden_states'\]"):
        proxy(ids, output_hidden_states=True)
    with pytest.raises(ModelError, match="different embeddings"):
        proxy()
    with pytest.raises(ModelError, match="leave logits_to_keep out"):
        proxy(ids, labels=ids, logits_to_keep=1)


def _missing_folder(proxy):
    return proxy.parent / "nowhere"


def _of_nobody(proxy):
    return "~nosuchuser/proxy"


def _no_config(proxy):
    (proxy / "config.json").unlink()
    return proxy


def _broken_json(proxy):
    (proxy / "config.json").write_text('{"model_type": ')
    return proxy


def _binary_config(proxy):
    (proxy / "config.json").write_bytes(b"\xff\xfe\x00")
    return proxy


def _other_model(proxy):
    return proxy.parent / "large"


def _not_an_object(proxy):
    (proxy / "config.json").write_text("[]")
    return proxy


def _nested_without_end(proxy):
    (proxy / "config.json").write_text("[" * 100_000)
    return proxy


def _edited(**changes):
    def edit(proxy):
        config = json.loads((proxy / "config.json").read_text())
        (proxy / "config.json").write_text(json.dumps(config | changes))
        return proxy

    return edit


def _no_weights(proxy):
    (proxy / "tuned" / "model.safetensors").unlink()
    return proxy


def _cut_weights(proxy):
    file = proxy / "tuned" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    return proxy


def _weights_with_nan(proxy):
    file = proxy / "tuned" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-64:] = b"\xff" * 64
    file.write_bytes(content)
    return proxy


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_missing_folder, "folder that exists"),
        (_of_nobody, "folder that exists"),
        (_no_config, "must hold config.json"),
        (_broken_json, "must be readable JSON"),
        (_binary_config, "must be readable JSON"),
        (_other_model, "must have model_type 'fedpt_proxy', got 'llama'"),
        (_not_an_object, "must have model_type 'fedpt_proxy'"),
        (_edited(alpha="strong"), "config.json: alpha must be a finite number, got 'strong'"),
        (_edited(plausibility=1.5), "config.json: plausibility must be at least 0 and below 1, got 1.5"),
        (
            _edited(large={"ref": "x", "fingerprint": "y", "dtype": "float32", "device_map": {"": "cpu"}}),
            "device_map of",
        ),
        (_edited(large={"ref": "x", "fingerprint": "y", "dtype": "float32", "quantization": True}), "as text"),
        (_edited(alpha=10**400), "alpha must be a finite number"),
        (_edited(dtype="nonsense"), "holds what no config does .AttributeError"),
        (_edited(id2label=3), "holds what no config does .AttributeError"),
        (_edited(real_vocab_size=True), "real_vocab_size must be a positive number"),
        (_edited(eos_token_id=[1, "x"]), "eos_token_id must be a token's number"),
        (_nested_without_end, "must be readable JSON"),
        (_edited(large=None), "must say ref, fingerprint, dtype of large;"),
        (_edited(untuned={"ref": "x"}), "must say ref, fingerprint, dtype of untuned"),
        (_edited(tuned={"form": "half", "dtype": "float32"}), "must be full or adapter, got 'half'"),
        (_edited(tuned={"form": "full", "dtype": "int8"}), "must be one of float32, bfloat16, float16, got 'int8'"),
        (_edited(real_vocab_size=0), "real_vocab_size must be a positive number"),
        (_edited(real_vocab_size=1000), "vocab_size must be between 1"),
        (_no_weights, "must hold the tuned small model, got 'no tuned/model"),
        (_cut_weights, "damaged|cannot be loaded"),
        (_weights_with_nan, "tuned: a tuned model's weights must be finite, got '.*'; copy the folder again"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_damaged_folders_are_refused_in_a_sentence(saved, damage, message):
    with pytest.raises(ModelError, match=message):
        ProxyModel.from_pretrained(damage(saved[0] / "full"))


def test_damaged_adapter_is_refused_in_a_sentence(saved):
    proxy = saved[0] / "lora"
    file = proxy / "tuned" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ModelError, match=r"damaged|cannot be loaded"):
        ProxyModel.from_pretrained(proxy)
    file.unlink()
    with pytest.raises(ModelError, match=r"no tuned/adapter_model\.safetensors"):
        ProxyModel.from_pretrained(proxy)


def test_unknown_loading_arguments_are_refused(saved):
    with pytest.raises(ModelError, match=r"\['devcie'\]"):
        ProxyModel.from_pretrained(saved[0] / "full", devcie="cpu")
    with pytest.raises(ModelError, match="loaded onto one device"):
        ProxyModel.from_pretrained(saved[0] / "full", device_map={"large": 0, "tuned": "cpu"})
    with pytest.raises(ModelError, match="dtype must be one of"):
        ProxyModel.from_pretrained(saved[0] / "full", dtype="int8")


# The package


def test_the_package_exports_its_names():
    import fedpt_flwr

    assert fedpt_flwr.ProxyModel is ProxyModel
    assert fedpt_flwr.__all__ == sorted(fedpt_flwr.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        fedpt_flwr.nothing  # noqa: B018
