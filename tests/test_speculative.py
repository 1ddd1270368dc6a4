"""Drafting and verifying, without transformers' ``generate()``: what comes out, in which rounds, and how often."""

import itertools
import math

import pytest
import torch
from reference import reference_greedy, reference_scores
from tiny import VOCAB, tiny_gpt2, tiny_llama
from torch import Tensor

from fedpt_flwr import packing, ragged, speculative
from fedpt_flwr.drafting import StepCosts
from fedpt_flwr.lean import LeanStepper
from fedpt_flwr.logits import combine_logits, keyed_gumbel
from fedpt_flwr.proxy import ProxyModel
from fedpt_flwr.speculative import Speculation, num_accepted

NEW = 12


def relatives(make=tiny_llama, noise=0.25, **settings):
    """Large, tuned and untuned: copies of one model that differ a little, so that drafts are right now and then."""
    models = [make(1, **settings) for _ in range(3)]
    for seed, model in enumerate(models):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in model.parameters():
                weight += noise * weight.std() * torch.randn(weight.shape, generator=generator)
    return models


def prompts(lengths, vocab=VOCAB, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocab, (length,), generator=generator).tolist() for length in lengths]


class Writer:
    """The simplest rules: the best token, or one drawn by keyed noise, up to a length or a token."""

    def __init__(self, num_rows, *, room=NEW, alpha=1.0, seeds=None, end=None):
        self.texts = [[] for _ in range(num_rows)]
        self.rooms = room if isinstance(room, list) else [room] * num_rows
        self.alpha, self.seeds, self.end = alpha, seeds, end
        self.rounds = []

    def begin(self, rows, num_new):
        self.rows = list(rows)
        self.rounds.append(num_new - 1)

    def _noise(self, first, num_new, width):
        if self.seeds is None:
            return 0.0
        places = torch.tensor([len(self.texts[row]) + first for row in self.rows])[:, None] + torch.arange(num_new)
        seeds = torch.tensor([self.seeds[row] for row in self.rows])[:, None].expand_as(places)
        return keyed_gumbel(seeds.reshape(-1), places.reshape(-1), width).view(len(self.rows), num_new, width)

    def draft(self, tuned, drafts):
        noise = self._noise(drafts.shape[1], 1, tuned.shape[-1])
        return (tuned.float()[:, None] + noise).argmax(-1)[:, 0]

    def choose(self, asked):
        scores = combine_logits(asked.large, asked.tuned, asked.untuned, alpha=self.alpha)
        return (scores + self._noise(0, *scores.shape[1:])).argmax(-1)

    def take(self, row, ids):
        for token_id in ids:
            self.texts[row].append(token_id)
            if token_id == self.end or self.room(row) == 0:
                return True
        return False

    def room(self, row):
        return self.rooms[row] - len(self.texts[row])


class Opposite(Writer):
    """Drafts what the tuned model finds least likely."""

    def draft(self, tuned, drafts):
        return tuned.argmin(-1)


def speculation(models):
    return Speculation(ProxyModel(*models).steppers())


def write(models, given, draft_tokens, rules=None, **settings):
    decoder = speculation(models)
    rules = rules or Writer(len(given), **settings)
    decoder.decode(given, rules, draft_tokens=draft_tokens)
    return rules.texts, decoder.statistics


@pytest.mark.parametrize("draft_tokens", [0, 1, 2, 5, 40, "auto"])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_texts_are_those_of_three_passes_a_token(make, draft_tokens):
    models, given = relatives(make), prompts([1, 9, 4, 1, 17])
    expected = [reference_greedy(*models, torch.tensor(ids), max_new_tokens=NEW) for ids in given]
    texts, statistics = write(models, given, draft_tokens)
    assert texts == expected
    if draft_tokens not in (0, "auto"):
        assert 0.1 < statistics.num_accepted / statistics.num_drafted < 0.95  # both are tried


def test_prompts_are_read_together_where_little_of_it_is_padding_or_padding_is_free(monkeypatch):
    lengths = [1, 9, 4, 100, 17, 90]
    assert ragged._groups(lengths, 0) == [[0], [2], [1], [4], [5, 3]]
    assert ragged._groups(lengths, 60) == [[0, 2, 1], [4], [5, 3]]
    assert ragged._groups(lengths, 600) == [[0, 2, 1, 4, 5, 3]]
    models, given = relatives(tiny_llama), prompts([1, 9, 4, 1, 17])
    expected = [reference_greedy(*models, torch.tensor(ids), max_new_tokens=NEW) for ids in given]
    monkeypatch.setattr(ragged, "_WASTE", 0.0)
    assert write(models, given, 3)[0] == expected


@pytest.mark.parametrize(
    "settings",
    [
        {"num_key_value_heads": 1},
        {"tie_word_embeddings": False, "attn_implementation": "eager"},
    ],
    ids=["grouped queries", "eager"],
)
def test_models_of_other_shapes_write_the_same(settings):
    models, given = relatives(**settings), prompts([3, 8])
    expected = [reference_greedy(*models, torch.tensor(ids), max_new_tokens=NEW) for ids in given]
    assert write(models, given, 3)[0] == expected


def test_a_thousand_rows_differ_nowhere():
    models, given = relatives(), prompts([2 + row % 11 for row in range(250)])
    expected, _ = write(models, given, 0)
    differing = sum(
        text != other
        for draft_tokens in (1, 2, 4, 7)
        for text, other in zip(write(models, given, draft_tokens)[0], expected, strict=True)
    )
    assert differing == 0


def test_rows_end_where_they_should_and_the_others_go_on():
    models, given = relatives(), prompts([5] * 6)
    free, _ = write(models, given, 0, room=20)
    end = free[2][4]
    rooms = [20, 1, 20, 7, 20, 20]
    expected = [text[:room] for text, room in zip(free, rooms, strict=True)]
    expected = [text[: text.index(end) + 1] if end in text else text for text in expected]
    assert len({len(text) for text in expected}) > 2
    for draft_tokens in (0, 3, 9):
        assert write(models, given, draft_tokens, room=rooms, end=end)[0] == expected


def test_a_drafter_that_is_always_wrong_changes_nothing_and_is_soon_not_asked():
    models, given = relatives(), prompts([5, 6, 7])
    expected, _ = write(models, given, 0, room=40)
    rules = Opposite(3, room=40)
    _, fixed = write(models, given, 4, rules=rules)
    assert rules.texts == expected
    assert fixed.num_accepted == 0
    assert fixed.num_rounds == 40
    rules = Opposite(3, room=40)
    write(models, given, "auto", rules=rules)
    assert rules.texts == expected
    assert set(rules.rounds[10:]) == {0}


def test_a_drafter_that_is_always_right_gives_all_its_tokens_and_one_more():
    large, tuned, _ = relatives()
    texts, statistics = write([large, large, tuned], prompts([4, 4]), 3, alpha=0.0)
    assert statistics.num_rounds == NEW // 4
    assert statistics.num_accepted == statistics.num_drafted == 2 * 3 * NEW // 4
    assert texts == write([large, large, tuned], prompts([4, 4]), 0, alpha=0.0)[0]


@pytest.mark.parametrize("draft_tokens", [0, 2, "auto"])
def test_what_every_round_took_is_taken_up_where_that_chooses(draft_tokens, monkeypatch):
    seen = []
    monkeypatch.setattr(StepCosts, "observe", lambda _self, *given: seen.append(given))
    _, statistics = write(relatives(), prompts([4, 9]), draft_tokens)
    assert len(seen) == (statistics.num_rounds if draft_tokens == "auto" else 0)
    assert all(num_rows in (1, 2) and seconds > 0 for num_rows, _, seconds in seen)


@pytest.fixture
def guess_with(monkeypatch):
    """Has drafts guessed by another model, on the tuned one's cache, wherever that may be done."""

    def use(model):
        for kind in (ragged.Stepper, LeanStepper):
            monkeypatch.setattr(kind, "rough", property(lambda _: ragged.Stepper(model)))
        monkeypatch.setattr(StepCosts, "drafts_roughly", lambda _self, _rows, num_drafts: num_drafts > 0)

    return use


@pytest.mark.parametrize("seeds", [None, [5, 6, -7]], ids=["greedy", "sampled"])
@pytest.mark.parametrize("draft_tokens", [1, 4, "auto"])
def test_drafts_that_another_model_guessed_change_nothing(draft_tokens, seeds, guess_with):
    models, given = relatives(), prompts([4, 9, 2])
    expected, _ = write(models, given, 0, seeds=seeds)
    guess_with(tiny_llama(5))
    texts, wrong = write(models, given, draft_tokens, seeds=seeds)
    assert texts == expected
    guess_with(models[1])
    texts, right = write(models, given, draft_tokens, seeds=seeds)
    assert texts == expected
    if draft_tokens != "auto":
        assert right.num_accepted / right.num_drafted > wrong.num_accepted / wrong.num_drafted + 0.1


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("lengths", [[5], [5, 9, 3]])
def test_a_refused_draft_on_which_a_model_says_nan_spoils_nothing(lengths, packed):
    models, given = relatives(tie_word_embeddings=False), prompts(lengths)
    expected, _ = write(models, given, 0, room=20)
    unused = next(token for token in range(3, VOCAB) if all(token not in text for text in expected + given))
    with torch.no_grad():
        models[0].get_input_embeddings().weight[unused] = float("nan")
    if packed:
        for model in models:
            packing.prepare(model)

    class Unlucky(Writer):
        def draft(self, tuned, drafts):
            return torch.full_like(super().draft(tuned, drafts), unused)

    for draft_tokens in (1, 3):
        rules = Unlucky(len(given), room=20)
        write(models, given, draft_tokens, rules=rules)
        assert rules.texts == expected


def test_no_more_is_drafted_than_there_is_room_for():
    rules = Writer(1, room=3)
    write(relatives(), prompts([4]), 8, rules=rules)
    assert rules.rounds[0] == 2


def test_accepted_drafts_are_those_before_the_first_wrong_one():
    drafts = torch.tensor([[1, 2, 3], [1, 9, 3], [9, 2, 3]])
    choices = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]])
    assert num_accepted(drafts, choices) == [3, 1, 0]
    assert num_accepted(drafts[:, :0], choices[:, :1]) == [0, 0, 0]


# Sampling


@pytest.mark.parametrize("draft_tokens", [1, 3, "auto"])
def test_the_text_of_a_seed_does_not_depend_on_how_many_tokens_are_drafted(draft_tokens):
    models, given, seeds = relatives(), prompts([4, 9, 2, 6]), [5, 6, -7, 2**60]
    expected, _ = write(models, given, 0, seeds=seeds)
    texts, statistics = write(models, given, draft_tokens, seeds=seeds)
    assert texts == expected
    alone = [write(models, [ids], draft_tokens, seeds=[seed])[0][0] for ids, seed in zip(given, seeds, strict=True)]
    assert alone == expected
    assert expected != write(models, given, 0)[0]
    if draft_tokens != "auto":
        assert statistics.num_accepted


SMALL_VOCAB = 6


@pytest.fixture(scope="module")
def enumerated():
    """Three models over six tokens, and the exact probability of each text of three of them."""
    models = relatives(vocab=SMALL_VOCAB, noise=0.5, eos_token_id=None, pad_token_id=None, bos_token_id=None)
    prompt = torch.tensor([3, 4, 5])
    texts = list(itertools.product(range(SMALL_VOCAB), repeat=3))
    probabilities = []
    for text in texts:
        scores = reference_scores(*models, torch.cat([prompt, torch.tensor(text)]), alpha=0.8)
        log_probabilities = scores.double().log_softmax(-1)
        probabilities.append(math.exp(sum(log_probabilities[2 + i, token].item() for i, token in enumerate(text))))
    assert sum(probabilities) == pytest.approx(1)
    return models, prompt.tolist(), torch.tensor(probabilities, dtype=torch.float64)


def sampled(models, prompt, draft_tokens, num=4_000):
    """How often each text of three tokens came out."""
    texts, _ = write(models, [prompt] * num, draft_tokens, room=3, alpha=0.8, seeds=list(range(num)))
    codes = torch.tensor(texts) @ torch.tensor([SMALL_VOCAB**2, SMALL_VOCAB, 1])
    return torch.bincount(codes, minlength=SMALL_VOCAB**3).double()


def deviation(counts: Tensor, probabilities: Tensor) -> float:
    """By how many standard deviations chi-square is off; texts that are expected less than five times share a cell."""
    expected = probabilities * counts.sum()
    rare = expected < 5
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    freedom = len(counts) - 1
    assert freedom > 30
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / (2 * freedom) ** 0.5)


@pytest.mark.parametrize("draft_tokens", [0, 1, 2])
def test_texts_are_distributed_as_the_proxy_says(enumerated, draft_tokens):
    models, prompt, probabilities = enumerated
    assert abs(deviation(sampled(models, prompt, draft_tokens), probabilities)) < 4


def accepts_everything(drafts, choices):
    return [drafts.shape[1]] * len(drafts)


def accepts_each_draft_by_itself(drafts, choices):
    return (drafts == choices[:, :-1]).sum(1).tolist()


@pytest.mark.parametrize("wrong", [accepts_everything, accepts_each_draft_by_itself])
def test_wrong_rules_of_acceptance_are_seen_by_that_test(enumerated, wrong, monkeypatch):
    models, prompt, probabilities = enumerated
    keeps_drafts = {accepts_everything: True}.get(wrong, False)
    monkeypatch.setattr(speculative, "num_accepted", wrong)
    if keeps_drafts:  # what is accepted is the draft, not the choice
        choose = Writer.choose
        monkeypatch.setattr(
            Writer, "choose", lambda self, asked: torch.cat([asked.drafts, choose(self, asked)[:, -1:]], 1)
        )
    assert deviation(sampled(models, prompt, 2), probabilities) > 10
