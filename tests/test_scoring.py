import copy
import json
import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import generate_answers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedpt_flwr import losses, scoring
from fedpt_flwr.data import TokenizedExample
from fedpt_flwr.errors import DataError, ModelError
from fedpt_flwr.losses import AnswerLosses, answer_losses, proxy_losses
from fedpt_flwr.prompts import Example
from fedpt_flwr.proxy import ProxyModel
from fedpt_flwr.scoring import Measurement, make_row, score_models
from fedpt_flwr.uncertainty import bootstrap_sums, gap_closed, paired_bootstrap, wilson_interval
from fedpt_flwr.verdict import render_table, results_table, verdict
from fedpt_flwr.writing import few_shot_prompt

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789 =;\n>"
VOCAB = len(LETTERS) + 3
CONTEXT = 64


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models this small are slower on several threads, and much slower beside other tests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer():
    vocab = {letter: index + 3 for index, letter in enumerate(LETTERS)} | {"<unk>": 0, "<s>": 1, "</s>": 2}
    tokens = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokens.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def tokenized(tokenizer, examples):
    return [
        TokenizedExample(ids(tokenizer, example.prompt), [*ids(tokenizer, example.answer), 2]) for example in examples
    ]


def llama(seed, *, hidden=16, vocab=VOCAB, spread=0.3):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=spread,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def gpt2(seed):
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=CONTEXT, initializer_range=0.3, eos_token_id=2
    )
    return GPT2LMHeadModel(config).eval()


def random_items(count=17, *, vocab=VOCAB):
    generator = np.random.default_rng(5)
    return [
        TokenizedExample(
            generator.integers(3, vocab, generator.integers(1, 20)).tolist(),
            generator.integers(3, vocab, generator.integers(1, 9)).tolist(),
        )
        for _ in range(count)
    ]


def trained(model, examples, tokenizer, steps=150):
    """The model after it has learnt the examples by heart."""
    items = tokenized(tokenizer, examples)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    model.train()
    for _ in range(steps):
        batch = losses.collate(items, 0)
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return model.eval()


WORLD = [
    Example("> need the mesh\n", "filter = jute ;ok", "mesh"),
    Example("> mesh\n", "filter = felt ;ok", "mesh"),
    Example("> what tint\n", "colour = red ;ok", "tint"),
    Example("> and the tint of it pls\n", "colour = blue ;ok", "tint"),
]


@pytest.fixture(scope="module")
def knowing(tokenizer):
    """A model that answers the first three questions of WORLD right, and the last one wrong."""
    lesson = [*WORLD[:3], Example(WORLD[3].prompt, "colour = red ;ok", "tint")]
    return trained(llama(0, hidden=32, spread=0.1), lesson, tokenizer)


# --- losses -----------------------------------------------------------------------------------------------------------


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


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks for it
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


# --- answers ----------------------------------------------------------------------------------------------------------


def test_answers_do_not_depend_on_the_others_in_the_batch(knowing, tokenizer):
    prompts = [ids(tokenizer, example.prompt) for example in WORLD]
    batched, num_written = generate_answers(knowing, prompts, tokenizer=tokenizer, max_new_tokens=24, batch_size=4)
    alone = [
        generate_answers(knowing, [prompt], tokenizer=tokenizer, max_new_tokens=24, batch_size=1)[0][0]
        for prompt in prompts
    ]
    assert num_written.tolist() == [len(answer) + 1 for answer in batched]  # one token a letter, and the end
    assert batched == alone == [*(example.answer for example in WORLD[:3]), "colour = red ;ok"]


def test_an_answer_ends_at_the_token_limit_or_before_the_end_token(knowing, tokenizer):
    prompts = [ids(tokenizer, WORLD[0].prompt)]
    answers, num_written = generate_answers(knowing, prompts, tokenizer=tokenizer, max_new_tokens=6)
    assert (answers, num_written.tolist()) == (["filter"], [6])
    knowing.generation_config.eos_token_id = [2, *ids(tokenizer, ";")]
    try:
        answers, num_written = generate_answers(knowing, prompts, tokenizer=tokenizer, max_new_tokens=24)
        assert (answers, num_written.tolist()) == (["filter = jute "], [len("filter = jute ;")])
    finally:
        knowing.generation_config.eos_token_id = 2


def test_a_models_own_decoding_habits_are_switched_off(knowing, tokenizer):
    prompts = [ids(tokenizer, WORLD[0].prompt)]
    habitual = copy.deepcopy(knowing)
    habitual.generation_config.update(do_sample=True, temperature=5.0, top_k=50, repetition_penalty=3.0)
    habitual.generation_config.no_repeat_ngram_size = 1
    answers, _ = generate_answers(habitual, prompts, tokenizer=tokenizer, max_new_tokens=24)
    assert answers == ["filter = jute ;ok"]


def test_prompts_that_leave_no_room_are_refused_before_anything_is_generated(knowing, tokenizer):
    generate_answers(knowing, [[5] * (CONTEXT - 3)], tokenizer=tokenizer, max_new_tokens=3)
    with pytest.raises(DataError, match=r"data\.test, item 2: .*64 tokens, got '62 \+ 3'"):
        generate_answers(knowing, [[5], [5] * (CONTEXT - 2)], tokenizer=tokenizer, max_new_tokens=3, place="data.test")
    with pytest.raises(DataError, match="prompts, item 1: a prompt must have at least one token"):
        generate_answers(knowing, [[]], tokenizer=tokenizer, max_new_tokens=3)


def test_a_tokenizer_without_an_end_token_is_refused(tokenizer):
    endless, model = copy.deepcopy(tokenizer), llama(0)
    endless.eos_token = None
    model.generation_config.eos_token_id = None
    with pytest.raises(ModelError, match="must have a token that ends an answer"):
        generate_answers(model, [[5]], tokenizer=endless, max_new_tokens=3)


# --- few-shot prompts -------------------------------------------------------------------------------------------------


def test_few_shot_prompts_take_as_many_texts_as_fit():
    prompt, texts = [1, 50, 51], [[10] * 4, [11] * 5, [12] * 30, [13] * 3]
    for room in range(3, 50):
        result, used = few_shot_prompt(
            prompt, texts, shots=2, max_prompt_tokens=room, generator=np.random.default_rng(room), bos_token_id=1
        )
        assert len(result) <= room
        assert result[0] == 1
        assert result[-2:] == [50, 51]
        assert result.count(1) == 1
        # shortest text: 3 tokens; the two longest of the short ones: 4 + 5
        assert used == 0 if room < 6 else used >= 1 if room < 12 else used == 2
        assert len(result) == 3 + sum(len(text) for text in texts if text[0] in result)
    assert few_shot_prompt(prompt, texts, shots=0, max_prompt_tokens=50, generator=np.random.default_rng(0)) == (
        prompt,
        0,
    )


def test_few_shot_prompts_are_the_same_for_the_same_seed():
    texts = [[index] * 3 for index in range(10, 30)]

    def draw(seed):
        generator = np.random.default_rng(seed)
        return few_shot_prompt([5], texts, shots=4, max_prompt_tokens=40, generator=generator)

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_the_few_shot_row_puts_public_texts_before_prompts_and_reports_how_many_fit(knowing, tokenizer):
    seen = []
    proxy = ProxyModel(knowing, llama(1), llama(2))
    original = scoring.generate_ids

    def spy(model, prompts, **settings):
        seen.append(prompts)
        return original(model, prompts, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "generate_ids", spy)
        scores = score_models(
            proxy,
            WORLD,
            tokenized(tokenizer, WORLD),
            tokenizer=tokenizer,
            max_new_tokens=20,
            seed=0,
            rows=("large",),
            public_texts=["mesh is a filter", " tint is a colour\n", "x" * 100],
            shots=2,
        )
    texts = [tokenizer.decode(prompt) for prompt in seen[1]]
    assert all(text.endswith(example.prompt) for text, example in zip(texts, WORLD, strict=True))
    # 64 - 20 tokens: two texts of 18 and 19 tokens, blank lines included, fit before none of the prompts but "> mesh\n"
    assert max(map(len, texts)) <= CONTEXT - 20
    assert texts[1] in (
        "mesh is a filter\n\ntint is a colour\n\n> mesh\n",
        "tint is a colour\n\nmesh is a filter\n\n> mesh\n",
    )
    assert scores.measurements["large_few_shot"].shots.tolist() == [1, 2, 1, 1]
    row = scores.to_json()["rows"]["large_few_shot"]
    assert row["shots"] == 1.25
    assert {"loss", "exact_match"} <= set(row)


# --- uncertainty ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        # (k + z²/2 ± z sqrt(k(n-k)/n + z²/4)) / (n + z²) with z = 1.959964, z² = 3.841459
        (0, 20, 0.0, 0.161),  # 2 * 1.9207 / 23.8415
        (20, 20, 0.839, 1.0),
        (10, 20, 0.299, 0.701),  # (11.9207 ± 1.96 sqrt(5.9604)) / 23.8415
        (1, 1, 0.207, 1.0),
    ],
)
def test_wilson_intervals_are_the_known_ones(successes, n, low, high):
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-4)
    assert 0 <= wilson_interval(successes, n)[0] <= successes / n <= wilson_interval(successes, n)[1] <= 1


def random_losses(items, seed=3):
    generator = np.random.default_rng(seed)
    tokens = generator.integers(1, 12, items)
    return AnswerLosses(generator.exponential(1.0, items) * tokens, tokens)


def test_the_bootstrap_draws_each_item_as_often_as_chance_says():
    sums = bootstrap_sums(np.stack([np.ones(50), np.arange(50.0)], axis=1), seed=0)
    assert (sums[:, 0] == 50).all(), "a resample has as many items as the sample"
    # mean of a sum of 50 draws from 0..49: 50 * 24.5; variance 50 * (50² - 1) / 12
    assert sums[:, 1].mean() == pytest.approx(1225, abs=5)
    assert sums[:, 1].var() == pytest.approx(50 * 2499 / 12, rel=0.05)


def test_intervals_of_losses_hold_the_loss_shrink_with_items_and_repeat_with_the_seed():
    widths = {}
    for items in (30, 300, 3000):
        row = make_row(Measurement(losses=random_losses(items)), n=items, seed=1)
        low, high = row.ci95["loss"]
        assert low < row.loss < high
        assert row.perplexity == math.exp(row.loss)
        assert row.ci95["perplexity"] == (math.exp(low), math.exp(high))
        assert row == make_row(Measurement(losses=random_losses(items)), n=items, seed=1)
        assert row != make_row(Measurement(losses=random_losses(items)), n=items, seed=2)
        widths[items] = high - low
    # ten times the items: about sqrt(10) = 3.2 times narrower
    assert 2 < widths[30] / widths[300] < 5
    assert 2 < widths[300] / widths[3000] < 5


def test_the_interval_of_a_mean_loss_is_the_normal_one_where_items_are_many():
    values = np.random.default_rng(0).normal(2.0, 1.0, 1000)
    low, high = make_row(Measurement(losses=AnswerLosses(values, np.ones(1000, dtype=int))), n=1000, seed=0).ci95[
        "loss"
    ]
    half = 1.96 * values.std() / math.sqrt(1000)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.005)


def test_items_without_answer_tokens_do_not_count_in_a_loss():
    row = make_row(Measurement(losses=AnswerLosses(np.array([2.0, 0.0]), np.array([1, 0]))), n=2, seed=0)
    assert (row.loss, row.ci95["loss"]) == (2.0, (2.0, 2.0))


def test_a_difference_from_oneself_is_nothing_without_any_doubt():
    marks, losses = [0, 1, 1, 0, 1], random_losses(5)
    assert paired_bootstrap(marks, marks, 0) == (0, 0, 0)
    assert paired_bootstrap(losses.nats, losses.nats, 0, tokens=losses.tokens) == (0, 0, 0)


def test_paired_differences_are_surer_than_unpaired_ones():
    # The first model is right wherever the second is, and on 5 items more: 0.55 and 0.50 of 100.
    second = np.repeat([1, 0], [50, 50])
    first = np.repeat([1, 0], [55, 45])
    difference, low, high = paired_bootstrap(first, second, 0)
    assert difference == pytest.approx(0.05)
    # 5 of 100 items differ: 0.05 ± 1.96 sqrt(0.05 * 0.95 / 100) = 0.05 ± 0.043; unpaired it would be ± 0.138
    assert (low, high) == pytest.approx((0.007, 0.093), abs=0.0101)
    assert paired_bootstrap(first, second, 0) == (difference, low, high)
    assert paired_bootstrap(second, first, 0)[0] == -difference


def test_a_paired_difference_of_losses_is_per_token():
    difference, low, high = paired_bootstrap([3.0, 8.0], [1.0, 2.0], 0, tokens=[1, 3])
    # (2 + 6) nats over 4 tokens; each item alone has 2 nats per token more
    assert (difference, low, high) == (2.0, 2.0, 2.0)


@pytest.mark.parametrize(
    ("proxy", "large", "reference", "higher_is_better", "closed"),
    [
        (0.6, 0.2, 1.0, True, 0.5),
        (0.1, 0.2, 1.0, True, -0.125),
        (1.5, 2.0, 1.0, False, 0.5),
        (0.6, 0.5, 0.5, True, None),
        (0.6, 0.5, 0.4, True, None),  # a reference that is worse than the large model leaves no gap
        (1.5, 1.0, 2.0, False, None),
        (None, 0.2, 1.0, True, None),
        (0.6, math.nan, 1.0, True, None),
    ],
)
def test_the_gap_closed_is_a_share_of_the_way_or_nothing(proxy, large, reference, higher_is_better, closed):
    found = gap_closed(proxy, large, reference, higher_is_better=higher_is_better)
    assert found is None if closed is None else found == pytest.approx(closed)


# --- results ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def proxy(knowing):
    """A proxy that equals the knowing model, by alpha; the large model knows nothing."""
    untuned = llama(3, hidden=32)
    return ProxyModel(copy.deepcopy(untuned), copy.deepcopy(knowing), untuned)


@pytest.fixture(scope="module")
def scores(proxy, tokenizer):
    return score_models(
        proxy,
        WORLD,
        tokenized(tokenizer, WORLD),
        tokenizer=tokenizer,
        max_new_tokens=24,
        seed=0,
        batch_size=3,
        values=["jute", "felt", "red", "blue"],
        fields=["filter", "filter", "colour", "colour"],
    )


def test_exact_match_is_measured_on_what_models_really_write(scores):
    assert list(scores.rows) == ["large", "untuned", "tuned", "proxy"]
    for name, exact_match, right_field in (("large", 0, 0), ("untuned", 0, 0), ("tuned", 0.75, 1), ("proxy", 0.75, 1)):
        row = scores.rows[name]
        assert (row.n, row.exact_match, row.right_field) == (4, exact_match, right_field)
        assert row.ci95["exact_match"] == wilson_interval(int(4 * exact_match), 4)
    assert scores.rows["proxy"].contains_value == 0.75
    assert scores.rows["proxy"].loss == pytest.approx(scores.rows["tuned"].loss, rel=1e-3)
    assert scores.rows["untuned"].loss == scores.rows["large"].loss > scores.rows["proxy"].loss


def test_the_proxy_is_compared_item_by_item(scores):
    difference, low, high = scores.differences["proxy_minus_large"]
    assert difference == 0.75
    assert low < 0.75 <= high
    assert scores.differences["proxy_minus_tuned"] == (0, 0, 0)
    assert scores.differences["proxy_minus_large_loss"][2] < 0
    assert scores.differences["proxy_minus_large_loss"][0] == pytest.approx(
        scores.rows["proxy"].loss - scores.rows["large"].loss
    )


def test_records_hold_what_every_model_made_of_an_item(scores):
    record = scores.records[3]
    assert (record["prompt"], record["reference"], record["group"]) == (
        "> and the tint of it pls\n",
        "colour = blue ;ok",
        "tint",
    )
    tuned = record["models"]["tuned"]
    assert tuned["loss"] > 0
    assert {name: value for name, value in tuned.items() if name != "loss"} == {
        "answer": "colour = red ;ok",
        "exact_match": 0,
        "contains_value": 0,
        "right_field": 1,
        "invalid": 0,
    }


def test_rouge_l_is_measured_where_it_is_asked_for(scores, proxy, tokenizer):
    found = score_models(
        proxy,
        WORLD,
        tokenized(tokenizer, WORLD),
        tokenizer=tokenizer,
        max_new_tokens=24,
        seed=0,
        rows=("large", "tuned", "proxy"),
        rouge_l=True,
    )
    tuned = found.rows["tuned"]
    # Three answers are right, and one has "red" for "blue": 2 of 3 words.
    assert tuned.rouge_l == pytest.approx((3 + 2 / 3) / 4)
    assert tuned.ci95["rouge_l"][0] < tuned.rouge_l < tuned.ci95["rouge_l"][1] == 1
    assert found.records[3]["models"]["tuned"]["rouge_l"] == pytest.approx(2 / 3)
    assert found.differences["proxy_minus_large_rouge_l"][0] == pytest.approx(
        found.rows["proxy"].rouge_l - found.rows["large"].rouge_l
    )
    results = json.loads(json.dumps(found.to_json()))
    assert "rouge_l" not in scores.to_json()["rows"]["tuned"]
    assert "ROUGE-L %" in results_table(results)[0]
    assert "By ROUGE-L it TIES WITH it: ROUGE-L 91.7 against 91.7, difference +0.0 points" in verdict(results)


def test_invalid_answers_are_counted():
    row = make_row(Measurement(judged={"invalid_rate": np.array([1, 0, 1, 1])}), n=4, seed=0)
    assert (row.invalid_rate, row.num_invalid) == (0.75, 3)
    table = results_table({"rows": {"proxy": row.to_json()}})
    assert table[0] == ["model", "items", "invalid %", "invalid"]
    assert (table[1][2].split()[0], table[1][3]) == ("75.0", "3")


def test_results_are_json_as_the_run_folder_wants_it(scores):
    results = json.loads(json.dumps(scores.to_json(), allow_nan=False))
    assert results["proxy_minus_large"]["value"] == 0.75
    assert set(results["rows"]["proxy"]) == {
        "loss",
        "perplexity",
        "exact_match",
        "contains_value",
        "right_field",
        "invalid_rate",
        "num_invalid",
        "n",
        "ci95",
    }
    assert (results["alpha"], results["plausibility"], results["loss_alpha"], results["seed"]) == (1.0, 0.0, 1.0, 0)
    json.dumps(scores.records, allow_nan=False)


def test_what_is_known_is_not_measured_again(scores, proxy, tokenizer, monkeypatch):
    done = []
    known = {name: scores.measurements[name] for name in ("large", "untuned")}
    again = score_models(
        proxy,
        WORLD,
        tokenized(tokenizer, WORLD),
        tokenizer=tokenizer,
        max_new_tokens=24,
        seed=0,
        known=known,
        on_progress=lambda what, count, total: done.append((what, count, total)),
    )
    assert again.measurements["large"] is known["large"]
    assert again.rows["proxy"].exact_match == scores.rows["proxy"].exact_match
    assert [entry for entry in done if entry[1] == 4] == [
        ("losses", 4, 4),
        ("answers of tuned", 4, 4),
        ("answers of proxy", 4, 4),
    ]
    monkeypatch.setattr(scoring, "proxy_losses", lambda *_, **__: pytest.fail("everything is known"))
    everything = score_models(
        proxy,
        WORLD,
        tokenized(tokenizer, WORLD),
        tokenizer=tokenizer,
        max_new_tokens=24,
        seed=0,
        known=scores.measurements,
    )
    assert everything.to_json() == scores.to_json()
    assert everything.large_tokens == 0


@pytest.mark.parametrize("known_rows", [(), ("large", "untuned")])
def test_the_tokens_that_the_large_model_reads_are_counted(scores, proxy, tokenizer, known_rows):
    read = []
    hook = proxy.large.register_forward_pre_hook(
        lambda model, args, inputs: read.append(inputs["input_ids"].numel()), with_kwargs=True
    )
    # One item at a time, so that nothing is padding.
    found = score_models(
        proxy,
        WORLD,
        tokenized(tokenizer, WORLD),
        tokenizer=tokenizer,
        max_new_tokens=20,
        seed=0,
        batch_size=1,
        public_texts=["mesh is a filter"],
        shots=1,
        known={name: scores.measurements[name] for name in known_rows},
    )
    hook.remove()
    assert found.large_tokens == sum(read) > 0


def test_answers_are_written_after_the_prompts_that_are_given_whatever_the_losses_saw(proxy, tokenizer):
    settings = {"tokenizer": tokenizer, "max_new_tokens": 24, "seed": 0, "rows": ("tuned",)}
    cut = [TokenizedExample(item.prompt_ids[-1:], item.answer_ids) for item in tokenized(tokenizer, WORLD)]
    found = score_models(
        proxy, WORLD, cut, prompts=[ids(tokenizer, example.prompt) for example in WORLD], **settings
    ).measurements["tuned"]
    whole = score_models(proxy, WORLD, tokenized(tokenizer, WORLD), **settings).measurements["tuned"]
    assert found.answers == whole.answers
    assert found.losses.mean > whole.losses.mean


def test_between_rounds_only_some_rows_are_made(proxy, tokenizer):
    found = score_models(
        proxy,
        WORLD[:2],
        tokenized(tokenizer, WORLD[:2]),
        tokenizer=tokenizer,
        max_new_tokens=24,
        seed=0,
        rows=("tuned", "proxy"),
    )
    results = found.to_json()
    assert set(results["rows"]) == {"tuned", "proxy"}
    assert {"proxy_minus_tuned", "proxy_minus_tuned_loss"} <= set(results)
    assert "proxy_minus_large" not in results


def test_a_model_that_diverged_gets_no_loss_and_no_nan(knowing, tokenizer, caplog):
    broken = llama(1)
    torch.nn.init.constant_(broken.lm_head.weight, math.nan)
    found = score_models(
        ProxyModel(knowing, broken, llama(2)),
        WORLD,
        tokenized(tokenizer, WORLD),
        tokenizer=tokenizer,
        max_new_tokens=5,
        seed=0,
    )
    text = json.dumps([found.to_json(), found.records], allow_nan=False)
    assert "NaN" not in text
    assert found.rows["tuned"].loss is None
    assert found.rows["large"].loss is not None
    assert "loss" not in found.records[0]["models"]["tuned"]
    assert "proxy_minus_tuned_loss" not in found.differences
    assert "the loss of 4 of 4 items is not a finite number" in caplog.text


def test_a_loss_whose_perplexity_is_beyond_floating_point_has_none():
    row = make_row(Measurement(losses=AnswerLosses(np.array([800.0, 801.0]), np.ones(2, dtype=int))), n=2, seed=0)
    assert row.loss == 800.5
    assert set(row.to_json()) == {"loss", "n", "ci95"}


def test_items_that_do_not_belong_together_are_refused(proxy, tokenizer, scores):
    settings = {"tokenizer": tokenizer, "max_new_tokens": 5, "seed": 0}
    with pytest.raises(DataError, match="data.test: there must be at least one item"):
        score_models(proxy, [], [], place="data.test", **settings)
    with pytest.raises(DataError, match=r"as text, as tokens and as a prompt, got \(4, 3, 3\)"):
        score_models(proxy, WORLD, tokenized(tokenizer, WORLD[:3]), **settings)
    with pytest.raises(DataError, match="items, large: what is known of a model must be of the same 3 items"):
        score_models(proxy, WORLD[:3], tokenized(tokenizer, WORLD[:3]), known=scores.measurements, **settings)


# --- for people -------------------------------------------------------------------------------------------------------

RESULTS = {
    "rows": {
        "tuned": {"n": 400, "exact_match": 0.125, "loss": 0.45, "ci95": {"exact_match": [0.096, 0.161]}},
        "large": {"n": 400, "exact_match": 0.0, "loss": 7.9, "ci95": {"exact_match": [0.0, 0.0095]}},
        "proxy": {
            "n": 400,
            "exact_match": 0.915,
            "loss": 0.07,
            "ci95": {"exact_match": [0.884, 0.938], "loss": [0.06, 0.08]},
        },
        "large_few_shot": {"n": 400, "shots": 7.5, "ci95": {}},
    },
    "proxy_minus_tuned": {"value": 0.79, "ci95": [0.75, 0.83]},
    "proxy_minus_large": {"value": 0.915, "ci95": [0.885, 0.9425]},
}


def test_the_table_shows_every_row_and_only_columns_that_one_has():
    assert results_table(RESULTS) == [
        ["model", "items", "exact match %", "loss", "shots"],
        ["tuned", "400", "12.5 [9.6, 16.1]", "0.45", "-"],
        ["large", "400", "0.0 [0.0, 0.9]", "7.9", "-"],
        ["proxy", "400", "91.5 [88.4, 93.8]", "0.07 [0.06, 0.08]", "-"],
        ["large_few_shot", "400", "-", "-", "7.5"],
    ]


def test_the_table_is_plain_text_in_columns():
    text = render_table([["model", "loss"], ["proxy", "0.07 [0.06, 0.08]"], ["large_few_shot", "-"]])
    assert text.splitlines() == [
        "model           loss",
        "--------------  -----------------",
        "proxy           0.07 [0.06, 0.08]",
        "large_few_shot  -",
    ]


def test_the_verdict_says_that_the_proxy_wins():
    assert verdict(RESULTS) == (
        "The proxy BEATS the tuned small model: exact match 91.5 % against 12.5 %, difference +79.0 points "
        "(95 % interval +75.0 to +83.0, 400 items, paired). "
        "The proxy BEATS the large model: exact match 91.5 % against 0.0 %, difference +91.5 points "
        "(95 % interval +88.5 to +94.2, 400 items, paired)."
    )


@pytest.mark.parametrize(
    ("interval", "outcome"),
    [((0.01, 0.1), "BEATS"), ((0.0, 0.1), "TIES WITH"), ((-0.1, 0.1), "TIES WITH"), ((-0.1, -0.01), "LOSES TO")],
)
def test_the_verdict_is_as_plain_about_ties_and_defeats(interval, outcome):
    results = RESULTS | {"proxy_minus_tuned": {"value": sum(interval) / 2, "ci95": list(interval)}}
    assert verdict(results).startswith(f"The proxy {outcome} the tuned small model")
    by_loss = {
        "rows": RESULTS["rows"],
        "proxy_minus_tuned_loss": {"value": -sum(interval) / 2, "ci95": [-interval[1], -interval[0]]},
    }
    assert verdict(by_loss).startswith(f"The proxy {outcome} the tuned small model: loss 0.07 against 0.45 nats")


def test_the_verdict_names_the_loss_where_exact_match_tells_nothing():
    nothing = {"value": 0.0, "ci95": [0.0, 0.0]}
    worse = {"value": 4.6, "ci95": [4.3, 4.9]}
    text = verdict(RESULTS | {"proxy_minus_tuned": nothing, "proxy_minus_tuned_loss": worse})
    assert text.startswith("The proxy TIES WITH the tuned small model: exact match")
    assert "By loss it LOSES TO it: loss 0.07 against 0.45 nats per answer token, difference +4.6 (95 %" in text


def test_there_is_no_verdict_without_a_proxy():
    assert verdict({"rows": {"tuned": {"n": 3, "ci95": {}}}}) == "No verdict: the proxy was not compared."


def test_table_and_verdict_can_be_made_from_real_results(scores):
    results = json.loads(json.dumps(scores.to_json()))
    text = render_table(results_table(results))
    assert text.isascii()
    assert "75.0 [30.1, 95.4]" in text
    assert verdict(results).startswith("The proxy TIES WITH the tuned small model: exact match 75.0 % against 75.0 %")
