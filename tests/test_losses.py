"""What answers cost models, item by item."""

import copy
import math

import numpy as np
import pytest
import torch
from letters import VOCAB, WORLD, gpt2, knowing_model, letter_tokenizer, llama, random_items, tokenized
from peft import LoraConfig, get_peft_model

from fedpt_flwr import losses, scoring
from fedpt_flwr.data import TokenizedExample
from fedpt_flwr.losses import answer_losses, proxy_losses
from fedpt_flwr.proxy import ProxyModel
from fedpt_flwr.scoring import score_models


@pytest.fixture(scope="module")
def tokenizer():
    return letter_tokenizer()


@pytest.fixture(scope="module")
def knowing(tokenizer):
    return knowing_model(tokenizer)


@pytest.mark.parametrize("model", [llama(0), gpt2(0)], ids=["rotary", "learned positions"])
def test_losses_are_those_of_transformers_item_by_item(model):
    items = random_items()
    losses = answer_losses(model, items, pad_id=0, batch_size=5)
    for index, item in enumerate(items):
        input_ids = torch.tensor([item.prompt_ids + item.answer_ids])
        labels = torch.tensor([[-100] * len(item.prompt_ids) + item.answer_ids])
        expected = model(input_ids=input_ids, labels=labels).loss.item()
        assert losses.nats[index] / losses.tokens[index] == pytest.approx(expected, rel=1e-5)
    assert losses.tokens.tolist() == [len(item.answer_ids) for item in items]


def test_a_model_that_knows_nothing_pays_the_logarithm_of_the_vocabulary_for_each_token():
    model = llama(0)
    torch.nn.init.zeros_(model.lm_head.weight)
    losses = answer_losses(model, [TokenizedExample([5, 6], [7, 8, 2]), TokenizedExample([5], [2])], pad_id=0)
    # every token has probability 1/44: 3 ln 44 and 1 ln 44
    np.testing.assert_allclose(losses.nats, [3 * math.log(VOCAB), math.log(VOCAB)], rtol=1e-6)
    assert losses.mean == pytest.approx(math.log(VOCAB))


def test_the_first_token_of_an_item_without_prompt_is_not_counted():
    model = llama(0)
    alone = answer_losses(model, [TokenizedExample([], [7, 8, 2])], pad_id=0)
    after_prompt = answer_losses(model, [TokenizedExample([7], [8, 2])], pad_id=0)
    assert alone.tokens.tolist() == [2]
    np.testing.assert_array_equal(alone.nats, after_prompt.nats)
    nothing = answer_losses(model, [TokenizedExample([], [7]), TokenizedExample([7], [8])], pad_id=0)
    assert nothing.tokens.tolist() == [0, 1]


@pytest.mark.parametrize("model", [llama(0), gpt2(0)], ids=["rotary", "learned positions"])
def test_batches_padding_and_chunks_do_not_change_an_items_loss(model, monkeypatch):
    items = random_items()
    one_by_one = answer_losses(model, items, pad_id=0, batch_size=1)
    for batch_size, pad_id in ((4, 9), (64, 0)):
        batched = answer_losses(model, items, pad_id=pad_id, batch_size=batch_size)
        np.testing.assert_allclose(batched.nats, one_by_one.nats, rtol=1e-5)
        np.testing.assert_array_equal(batched.tokens, one_by_one.tokens)
    monkeypatch.setattr(losses, "_MAX_SCORES", 30 * VOCAB)
    monkeypatch.setattr(losses, "_MAX_SCORES_IN_FLOAT32", 7 * VOCAB)
    np.testing.assert_allclose(answer_losses(model, items, pad_id=0).nats, one_by_one.nats, rtol=1e-5)


def test_a_large_vocabulary_means_small_batches(monkeypatch):
    seen = []
    model = llama(0)
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **inputs: seen.append(inputs) or forward(**inputs))
    monkeypatch.setattr(losses, "_MAX_SCORES", 40 * VOCAB)
    answer_losses(model, random_items(), pad_id=0, batch_size=64)
    scored = [inputs["input_ids"].shape[0] * inputs["logits_to_keep"] for inputs in seen]
    assert len(seen) > 2
    assert max(scored) <= 40


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.7])
def test_four_rows_from_three_passes_equal_four_separate_scorings(alpha):
    # The large model's vocabulary is padded.
    large, tuned, untuned = llama(0, hidden=32, vocab=VOCAB + 5), llama(1), llama(2)
    proxy = ProxyModel(large, tuned, untuned, alpha=alpha, vocab_size=VOCAB)
    items = random_items()
    together = proxy_losses(proxy, items, alpha=alpha, pad_id=0, batch_size=4)
    for name, model in (("large", large), ("tuned", tuned), ("untuned", untuned), ("proxy", proxy)):
        separate = answer_losses(model, items, pad_id=0, batch_size=4, vocab_size=VOCAB)
        np.testing.assert_allclose(together[name].nats, separate.nats, rtol=1e-5)
        np.testing.assert_array_equal(together[name].tokens, separate.tokens)
    if alpha == 0:
        np.testing.assert_array_equal(together["proxy"].nats, together["large"].nats)


def test_the_proxys_loss_has_its_own_alpha_and_no_mask():
    large, tuned, untuned = llama(0, hidden=32), llama(1), llama(2)
    items = random_items()
    masked = proxy_losses(ProxyModel(large, tuned, untuned, 0.3, 0.9), items, alpha=0.5, pad_id=0)["proxy"]
    plain = answer_losses(ProxyModel(large, tuned, untuned, 0.5), items, pad_id=0)
    assert np.isfinite(masked.nats).all()
    np.testing.assert_allclose(masked.nats, plain.nats, rtol=1e-5)


def test_an_adapter_is_switched_off_for_the_untuned_row(tokenizer):
    large, untuned = llama(0, hidden=32), llama(1)
    adapted = get_peft_model(
        copy.deepcopy(untuned), LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    shared, apart = ProxyModel(large, adapted), ProxyModel(large, copy.deepcopy(adapted), untuned)
    items = random_items()
    by_shared, by_apart = (proxy_losses(proxy, items, alpha=1.0, pad_id=0) for proxy in (shared, apart))
    for name in scoring.MODELS:
        np.testing.assert_allclose(by_shared[name].nats, by_apart[name].nats, rtol=1e-5)
    assert by_shared["tuned"].mean != pytest.approx(by_shared["untuned"].mean)
    answers = [
        score_models(proxy, WORLD, tokenized(tokenizer, WORLD), tokenizer=tokenizer, max_new_tokens=5, seed=0)
        .measurements["untuned"]
        .answers
        for proxy in (shared, apart)
    ]
    assert answers[0] == answers[1]


def test_scoring_leaves_a_models_mode_as_it_was_and_drops_nothing_out():
    model = llama(0)
    model.config.attention_dropout = 0.9
    items = random_items()
    expected = answer_losses(model, items, pad_id=0)
    model.train()
    np.testing.assert_array_equal(answer_losses(model, items, pad_id=0).nats, expected.nats)
    assert model.training
