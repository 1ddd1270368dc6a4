import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from reference import reference_greedy, reference_scores
from tiny import EOS, PAD, VOCAB, tiny_llama, tiny_tokenizer
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation import BaseStreamer

from fedpt_flwr.errors import ModelError
from fedpt_flwr.logits import as_int64, choose_next, keyed_gumbel
from fedpt_flwr.proxy import ProxyModel
from fedpt_flwr.sampling import Seeded, sample

# peft asks transformers by a name that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

NEW = 10


@pytest.fixture(scope="module")
def models():
    """Texts of them end only where a test says so."""
    return [tiny_llama(seed, eos_token_id=None) for seed in (1, 2, 3)]


@pytest.fixture(scope="module")
def proxy(models):
    return ProxyModel(*models)


def prompt(length, seed=0):
    return torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(seed))


PROMPTS = [prompt(length, seed=length) for length in (3, 9, 6)]


def left_padded(rows):
    width = max(len(row) for row in rows)
    ids = torch.stack([torch.cat([torch.full((width - len(row),), PAD), row]) for row in rows])
    return {
        "input_ids": ids,
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
    }


def draw(proxy, rows, **settings):
    """The new tokens of each row, sampled from the whole distribution."""
    inputs = left_padded(rows)
    output = proxy.generate(**inputs, **{"max_new_tokens": NEW, "do_sample": True, "top_k": 0, **settings})
    return output[:, inputs["input_ids"].shape[1] :].tolist()


def reference_draw(models, ids, seed, warpers=(), new=NEW, **settings):
    """Sampling as its definition reads: a full pass per token, then processors, then noise, then the best."""
    length = len(ids)
    for position in range(new):
        scores = reference_scores(*models, ids, **settings)[-1:]
        for warper in warpers:
            scores = warper(ids[None], scores)
        noise = keyed_gumbel(as_int64([seed]), torch.tensor([position]), scores.shape[-1])
        ids = torch.cat([ids, (scores + noise).argmax(-1)])
    return ids[length:].tolist()


def chi_square_is_plausible(counts, probabilities):
    kept = probabilities > 0
    assert (counts[~kept] == 0).all()
    expected = probabilities[kept] * counts.sum()
    common = expected > 5  # fewer would not be distributed like a chi-square: they share one cell
    counts = torch.cat([counts[kept][common], counts[kept][~common].sum()[None]])
    expected = torch.cat([expected[common], expected[~common].sum()[None]])
    counts, expected = counts[expected > 5], expected[expected > 5]
    freedom = len(counts) - 1
    assert freedom > 1
    return ((counts - expected) ** 2 / expected).sum() < freedom + 4 * (2 * freedom) ** 0.5


class Collector(BaseStreamer):
    def __init__(self):
        self.ids, self.ended = [], False

    def put(self, value):
        self.ids += value.flatten().tolist()

    def end(self):
        self.ended = True


# What a seed gives


@pytest.mark.parametrize("seed", [0, -3, 2**64 - 1, 2**80 + 5])
def test_tokens_are_those_of_the_definition(models, proxy, seed):
    assert draw(proxy, PROMPTS[:1], seed=seed) == [reference_draw(models, PROMPTS[0], seed)]


def test_processors_come_before_the_noise(models, proxy):
    settings = {"repetition_penalty": 1.8, "temperature": 1.3, "top_k": 20, "top_p": 0.9, "suppress_tokens": [5, 9]}
    warpers = [
        RepetitionPenaltyLogitsProcessor(1.8),
        SuppressTokensLogitsProcessor([5, 9]),
        TemperatureLogitsWarper(1.3),
        TopKLogitsWarper(20),
        TopPLogitsWarper(0.9),
    ]
    expected = [reference_draw(models, row, seed, warpers) for seed, row in enumerate(PROMPTS, 40)]
    assert draw(proxy, PROMPTS, seed=40, **settings) == expected
    assert draw(proxy, PROMPTS, seed=40) != expected  # so they did something


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.8, 0.7), (1.6, 0.95)])
def test_choosing_token_by_token_gives_the_same(models, proxy, temperature, top_p):
    ids = PROMPTS[1]
    for position in range(NEW):
        scores = reference_scores(*models, ids)[-1:]
        of_row = {"temperature": [temperature], "top_p": [top_p], "seeds": [21], "positions": [position]}
        ids = torch.cat([ids, choose_next(scores, **of_row)])
    assert draw(proxy, PROMPTS[1:2], seed=21, temperature=temperature, top_p=top_p) == [ids[9:].tolist()]


def test_a_seed_gives_one_text_alone_in_a_batch_and_in_another_order(models, proxy):
    seeds = [11, 4, 2**63]
    alone = [draw(proxy, [row], seed=seed)[0] for row, seed in zip(PROMPTS, seeds, strict=True)]
    assert alone == [reference_draw(models, row, seed) for row, seed in zip(PROMPTS, seeds, strict=True)]
    assert draw(proxy, PROMPTS, seed=seeds) == alone
    assert draw(proxy, PROMPTS[::-1], seed=seeds[::-1]) == alone[::-1]
    assert draw(proxy, PROMPTS * 2, seed=seeds * 2) == alone * 2


def test_one_seed_is_counted_up_over_the_rows(proxy):
    assert draw(proxy, PROMPTS, seed=7) == draw(proxy, PROMPTS, seed=[7, 8, 9])
    assert draw(proxy, PROMPTS, seed=2**64 - 1) == draw(proxy, PROMPTS, seed=(-1, 0, 1))


def test_the_same_prompt_has_other_texts_in_other_rows_and_with_other_seeds(proxy):
    texts = draw(proxy, [PROMPTS[0]] * 4, seed=0)
    texts += draw(proxy, [PROMPTS[0]], seed=100)
    assert len(set(map(tuple, texts))) == 5


def test_every_returned_sequence_is_a_row(proxy):
    one_by_one = [draw(proxy, [row], seed=[seed])[0] for seed, row in enumerate([r for r in PROMPTS for _ in "ab"], 3)]
    assert draw(proxy, PROMPTS, seed=3, num_return_sequences=2) == one_by_one
    assert draw(proxy, PROMPTS, seed=range(3, 9), num_return_sequences=2) == one_by_one


@pytest.mark.parametrize("num_return_sequences", [1, 2])
def test_each_row_may_have_its_own_strength_and_mask(models, proxy, num_return_sequences):
    alphas, masks = [0.0, 0.6, 1.7], [0.0, 0.1, 0.02]
    expected = [
        reference_draw(
            models, row, 3 + index * num_return_sequences + copy_, alpha=alphas[index], plausibility=masks[index]
        )
        for index, row in enumerate(PROMPTS)
        for copy_ in range(num_return_sequences)
    ]
    found = draw(
        proxy,
        PROMPTS,
        seed=3,
        alpha=torch.tensor(alphas),
        plausibility=torch.tensor(masks),
        num_return_sequences=num_return_sequences,
    )
    assert found == expected
    assert draw(proxy, PROMPTS[:1], seed=5, alpha=0.3) == [reference_draw(models, PROMPTS[0], 5, alpha=0.3)]


def test_no_cache_and_a_prefix_in_the_cache_change_nothing(proxy):
    expected = draw(proxy, PROMPTS, seed=1)
    assert draw(proxy, PROMPTS, seed=1, use_cache=False) == expected
    alone = draw(proxy, PROMPTS[1:2], seed=1)
    prefix = proxy(PROMPTS[1][None, :5]).cache
    assert draw(proxy, PROMPTS[1:2], seed=1, cache=prefix) == alone


def test_an_adapter_with_one_copy_of_the_weights_draws_the_same(models):
    large, small, _ = models

    def adapted(base):
        torch.manual_seed(0)
        kind = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", r=4, init_lora_weights=False)
        return get_peft_model(copy.deepcopy(base), kind).eval()

    one, two = ProxyModel(large, adapted(small)), ProxyModel(large, adapted(small), small)
    found = draw(one, PROMPTS, seed=6)
    assert found == draw(two, PROMPTS, seed=6)
    assert found == [draw(one, [row], seed=6 + index)[0] for index, row in enumerate(PROMPTS)]
    assert found != draw(one, PROMPTS, seed=6, alpha=0.0)


# Distributions


@pytest.mark.parametrize(
    ("settings", "warpers"),
    [
        ({}, []),
        ({"temperature": 0.7}, [TemperatureLogitsWarper(0.7)]),
        ({"top_k": 6}, [TopKLogitsWarper(6)]),
        ({"top_p": 0.8}, [TopPLogitsWarper(0.8)]),
        (
            {"temperature": 1.5, "top_k": 12, "top_p": 0.9},
            [TemperatureLogitsWarper(1.5), TopKLogitsWarper(12), TopPLogitsWarper(0.9)],
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_first_tokens_are_distributed_as_their_scores_say(models, proxy, settings, warpers):
    first = draw(proxy, PROMPTS[:1], seed=0, max_new_tokens=1, num_return_sequences=4000, **settings)
    scores = reference_scores(*models, PROMPTS[0])[-1:]
    for warper in warpers:
        scores = warper(None, scores)
    counts = torch.bincount(torch.tensor(first).flatten(), minlength=VOCAB)
    assert chi_square_is_plausible(counts, scores[0].softmax(-1))


def test_two_tokens_in_a_row_are_distributed_as_their_product_says(models, proxy):
    # Noise that is used twice would make the second token depend on the first.
    pairs = draw(proxy, PROMPTS[:1], seed=0, max_new_tokens=2, num_return_sequences=4000, top_k=4, temperature=3.0)
    probabilities = torch.zeros(VOCAB, VOCAB)

    def after(ids):
        return TopKLogitsWarper(4)(None, reference_scores(*models, ids)[-1:] / 3.0)[0].softmax(-1)

    for token in (firsts := after(PROMPTS[0])).nonzero():
        probabilities[token] = firsts[token] * after(torch.cat([PROMPTS[0], token]))
    cells = torch.tensor(pairs) @ torch.tensor([VOCAB, 1])
    assert chi_square_is_plausible(torch.bincount(cells, minlength=VOCAB**2), probabilities.flatten())


# Without a seed


def test_without_a_seed_the_global_generator_decides(proxy):
    def sampled(seed):
        torch.manual_seed(seed)
        return draw(proxy, PROMPTS)

    assert sampled(1) == sampled(1)
    assert sampled(1) != sampled(2)
    torch.manual_seed(1)
    assert draw(proxy, PROMPTS) != draw(proxy, PROMPTS)


@pytest.mark.parametrize("how", [{"do_sample": True, "seed": 0}, {"do_sample": False}, {"do_sample": False, "seed": 0}])
def test_what_draws_nothing_from_the_global_generator_leaves_it_as_it_was(proxy, how):
    before = torch.get_rng_state()
    draw(proxy, PROMPTS, **how)
    assert torch.equal(torch.get_rng_state(), before)


def test_sampling_may_be_asked_for_in_any_of_transformers_ways(models, proxy):
    expected = draw(proxy, PROMPTS[:1], seed=3)
    ids = PROMPTS[0][None]
    config = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=NEW, pad_token_id=PAD)
    assert proxy.generate(ids, config, seed=3)[:, 3:].tolist() == expected
    by_default = ProxyModel(*models)
    by_default.generation_config.update(do_sample=True, top_k=0, max_new_tokens=NEW)
    assert by_default.generate(inputs=ids, seed=3)[:, 3:].tolist() == expected
    torch.manual_seed(0)
    assert len({tuple(by_default.generate(ids)[0].tolist()) for _ in range(4)}) == 4


# The rest of generate()


def test_a_streamer_gets_what_is_returned(proxy):
    streamer = Collector()
    output = proxy.generate(PROMPTS[0][None], do_sample=True, top_k=0, max_new_tokens=NEW, seed=5, streamer=streamer)
    assert output[:, 3:].tolist() == draw(proxy, PROMPTS[:1], seed=5)
    assert streamer.ids == output[0].tolist()
    assert streamer.ended


def test_texts_end_at_an_end_and_are_padded(proxy):
    free = draw(proxy, PROMPTS, seed=2, max_new_tokens=20)
    ends = [free[0][4], free[1][11]]
    expected = []
    for row in free:
        length = next((index for index, token in enumerate(row, 1) if token in ends), 20)
        expected.append(row[:length] + [PAD] * (20 - length))
    longest = max(20 - row.count(PAD) for row in expected)
    assert len({row.count(PAD) for row in expected}) > 1
    assert draw(proxy, PROMPTS, seed=2, max_new_tokens=20, eos_token_id=ends) == [row[:longest] for row in expected]


def test_the_tokenizers_end_is_an_end(models):
    proxy = ProxyModel(*models, tokenizer=tiny_tokenizer())
    found = draw(proxy, [PROMPTS[0]] * 200, seed=0)
    ended = [row for row in found if EOS in row]
    assert len(ended) > 5
    assert all(set(row[row.index(EOS) + 1 :]) <= {PAD} for row in ended)


def test_stopping_criteria_stop(proxy):
    expected = draw(proxy, PROMPTS, seed=4)
    stop = StoppingCriteriaList([MaxLengthCriteria(9 + 3)])
    assert draw(proxy, PROMPTS, seed=4, stopping_criteria=stop) == [row[:3] for row in expected]


@pytest.mark.parametrize("how", [{"seed": 0}, {"do_sample": False}], ids=str)
def test_stop_strings_stop(proxy, how):
    tokenizer = tiny_tokenizer()
    (free,) = draw(proxy, PROMPTS[:1], **how)
    stop = tokenizer.decode(free[3])
    (found,) = draw(proxy, PROMPTS[:1], stop_strings=[stop], tokenizer=tokenizer, **how)
    assert found == free[: free.index(free[3]) + 1]
    assert draw(proxy, PROMPTS[:1], stop_strings=[stop], tokenizer=tokenizer, num_beams=2, **how)  # is not refused


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.5, "top_k": 9, "renormalize_logits": True}])
def test_returned_scores_are_the_processed_ones_without_noise(proxy, settings):
    seen = []

    def watch(input_ids, scores, **_):
        seen.append(scores[-1].clone())
        return torch.zeros(len(input_ids), dtype=torch.bool)

    how = {"do_sample": True, "top_k": 0, "max_new_tokens": 4, "return_dict_in_generate": True, **settings}
    inputs = left_padded(PROMPTS)
    output = proxy.generate(
        **inputs, **how, seed=8, output_scores=True, output_logits=True, stopping_criteria=StoppingCriteriaList([watch])
    )
    assert output.sequences[:, 9:].tolist() == draw(proxy, PROMPTS, seed=8, **settings, max_new_tokens=4)
    assert len(output.scores) == len(output.logits) == len(seen) == 4
    for step, (scores, logits) in enumerate(zip(output.scores, output.logits, strict=True)):
        expected = logits
        if settings:
            expected = TopKLogitsWarper(9)(None, TemperatureLogitsWarper(0.5)(None, logits)).log_softmax(-1)
        assert torch.equal(scores, expected)
        assert torch.equal(scores, seen[step])
        noise = keyed_gumbel(torch.arange(8, 11), torch.full((3,), step), VOCAB)
        assert torch.equal((scores + noise).argmax(-1), output.sequences[:, 9 + step])
    assert [part.get_seq_length() for part in output.cache.caches] == [12, 12, 12]


def test_scores_are_returned_only_where_asked_for(proxy):
    how = {"do_sample": True, "max_new_tokens": 3, "seed": 1, "return_dict_in_generate": True}
    output = proxy.generate(PROMPTS[0][None], **how)
    assert output.scores is output.logits is None
    assert proxy.generate(PROMPTS[0][None], **how, output_logits=True).scores is None


def test_a_users_own_processors_are_honoured(proxy):
    def only_two(input_ids, scores):
        return scores.index_fill(1, torch.tensor([i for i in range(VOCAB) if i not in (8, 9)]), -torch.inf)

    (found,) = draw(proxy, PROMPTS[:1], seed=0, logits_processor=LogitsProcessorList([only_two]), max_new_tokens=30)
    assert set(found) == {8, 9}
    config = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=30, pad_token_id=PAD)
    positional = proxy.generate(PROMPTS[0][None], config, LogitsProcessorList([only_two]), seed=0)
    assert positional[0, 3:].tolist() == found


def test_padding_ids_are_never_drawn():
    models = [tiny_llama(seed, vocab=vocab, eos_token_id=None) for seed, vocab in ((1, 60), (2, 52), (3, 52))]
    found = draw(ProxyModel(*models, vocab_size=VOCAB), PROMPTS * 20, seed=0, temperature=5.0)
    assert max(map(max, found)) == VOCAB - 1


# What a seed does not change


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_a_seed_changes_nothing_where_nothing_is_sampled(models, proxy, how):
    without = draw(proxy, PROMPTS, do_sample=False, **how)
    assert draw(proxy, PROMPTS, do_sample=False, seed=3, **how) == without
    if not how:
        assert without == [reference_greedy(*models, row, max_new_tokens=NEW) for row in PROMPTS]


def test_beams_and_assistants_sample_with_torchs_generator(models, proxy):
    for how in ({"num_beams": 2}, {"assistant_model": models[1]}, {"assistant_model": ProxyModel(*models, alpha=0.5)}):
        results = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            results.append(draw(proxy, PROMPTS[:1], seed=0, **how))
        assert results[0] == results[1] != results[2]


def test_a_proxy_may_assist_a_model_that_samples(models, proxy):
    torch.manual_seed(0)
    output = models[0].generate(PROMPTS[:1][0][None], max_new_tokens=NEW, do_sample=True, assistant_model=proxy)
    assert output.shape == (1, 3 + NEW)


def test_an_assistant_takes_no_seed_since_each_of_its_drafts_begins_at_position_0():
    def decode(input_ids, processors, criteria, config):
        return processors(input_ids, torch.zeros(1, 50))

    ids = torch.zeros(1, 4, dtype=torch.int64)
    config = GenerationConfig(do_sample=True)
    processors = LogitsProcessorList([Seeded(3)])
    own = [sample(decode, ids, processors, StoppingCriteriaList(), config) for _ in range(2)]
    assert torch.equal(*own)
    config.is_assistant = True
    drafts = [sample(decode, ids, processors, StoppingCriteriaList(), config) for _ in range(2)]
    assert not torch.equal(*drafts)
    assert config.do_sample  # the caller's config is not changed
    assert len(processors) == 1


def test_a_users_own_loop_is_called(proxy):
    def loop(model, input_ids, logits_processor, stopping_criteria, generation_config, word, **kwargs):
        return f"{word} {input_ids.shape[1]}"

    how = {"do_sample": True, "max_new_tokens": 1, "seed": 1}
    assert proxy.generate(PROMPTS[0][None], custom_generate=loop, word="mine", **how) == "mine 3"


# Bad input


@pytest.mark.parametrize("seed", [1.5, "7", True, b"12", [1, 2.0, 3], [None], torch.tensor(4), {1: 2}])
@pytest.mark.parametrize("do_sample", [True, False])
def test_a_seed_that_is_no_whole_number_is_refused(proxy, seed, do_sample):
    with pytest.raises(
        ModelError, match=r"seed must be a whole number, or a list of them with one per row, got .*; any"
    ):
        draw(proxy, PROMPTS, seed=seed, do_sample=do_sample)


@pytest.mark.parametrize("seeds", [[], [1, 2], [1, 2, 3]])
def test_seeds_that_are_not_one_per_row_are_refused(proxy, seeds):
    with pytest.raises(ModelError, match=rf"as the batch has rows.*, got '{len(seeds)} seeds'; the batch has 6 rows"):
        draw(proxy, PROMPTS, seed=seeds, num_return_sequences=2)
