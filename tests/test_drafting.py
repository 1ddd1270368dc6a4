from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_gpt2, tiny_llama

from fedpt_flwr.drafting import LONGEST_DRAFT, Acceptance, DraftLength, StepCosts, expected_tokens
from fedpt_flwr.ragged import Stepper


class Costs(StepCosts):
    """Costs that are given instead of timed: a pass over n tokens costs ``base + slope * n``."""

    def __init__(self, *, beside=False, device="cpu", is_remote=False, **models):
        step = SimpleNamespace(
            runs_beside=beside,
            rough=SimpleNamespace() if "rough" in models else None,
            device=torch.device(device),
            is_remote=is_remote,
        )
        super().__init__(dict.fromkeys(models, step))
        self.models = models

    def _timing(self, name, num_tokens):
        base, slope = self.models[name]
        return base + slope * num_tokens


BOUND_BY_MEMORY = Costs(large=(10.0, 0.3), tuned=(0.6, 0.02), untuned=(0.6, 0.02))
BOUND_BY_ARITHMETIC = Costs(large=(0.0, 10.0), tuned=(0.0, 1.0), untuned=(0.0, 1.0))


def texts(*rates):
    return [Acceptance(rate) for rate in rates]


def best_by_definition(costs, rates, longest):
    def speed(drafts):
        gained = sum(sum(rate**power for power in range(drafts + 1)) for rate in rates)
        tokens = len(rates) * (drafts + 1)
        cost = costs.seconds("large", tokens) + costs.seconds("untuned", tokens)
        return gained / (cost + (drafts + 1) * costs.seconds("tuned", len(rates)))

    return max(range(longest + 1), key=speed)


@pytest.mark.parametrize("rates", [(0.0,), (0.3,), (0.6,), (0.8,), (0.97,), (0.9, 0.1, 0.5)])
def test_the_length_with_the_most_tokens_per_second_is_chosen(rates):
    for costs in (BOUND_BY_MEMORY, BOUND_BY_ARITHMETIC):
        expected = best_by_definition(costs, rates, LONGEST_DRAFT)
        assert DraftLength(costs).choose(texts(*rates), 100) == expected


def test_good_drafters_are_asked_for_more_and_bad_ones_for_nothing():
    length = DraftLength(BOUND_BY_MEMORY)
    chosen = [length.choose(texts(rate), 100) for rate in (0.0, 0.5, 0.7, 0.9, 1.0)]
    assert chosen == sorted(chosen)
    assert chosen[0] == 0
    assert chosen[-1] == LONGEST_DRAFT
    assert DraftLength(BOUND_BY_ARITHMETIC).choose(texts(0.8), 100) == 0


def test_passes_beside_each_other_cost_as_much_as_the_longest():
    models = {"large": (4.0, 0.0), "tuned": (1.0, 0.0), "untuned": (3.0, 0.0)}
    after, beside = Costs(**models), Costs(**models, beside=True)
    assert [after.of_round(1, drafts) for drafts in (0, 1, 2)] == [8.0, 9.0, 10.0]
    assert [beside.of_round(1, drafts) for drafts in (0, 1, 2)] == [4.0, 6.0, 7.0]
    assert DraftLength(after).choose(texts(0.3), 1) > DraftLength(beside).choose(texts(0.3), 1)


@pytest.mark.parametrize(("rough", "num_drafts"), [(None, 3), (SimpleNamespace(), 0)])
def test_nothing_is_timed_where_there_is_nothing_to_choose(rough, num_drafts):
    costs = StepCosts({"tuned": SimpleNamespace(rough=rough)})  # which cannot be called
    assert not costs.drafts_roughly(1, num_drafts)


def test_passes_are_timed_on_no_longer_texts_than_a_model_takes():
    assert StepCosts({"large": Stepper(tiny_gpt2())}).seconds("large", 1024) > 0  # it has 64 positions


def test_it_is_guessed_roughly_where_reading_all_guesses_again_costs_less_than_that_saves():
    models = {"large": (10.0, 0.0), "tuned": (1.0, 0.0), "untuned": (1.0, 0.0)}
    exact, rough = Costs(**models), Costs(**models, rough=(0.5, 0.0))
    assert [exact.drafts_roughly(1, drafts) for drafts in (0, 1, 4)] == [False, False, False]
    assert [rough.drafts_roughly(1, drafts) for drafts in (0, 1, 4)] == [False, True, True]
    assert [rough.of_round(1, drafts) for drafts in (0, 1, 4)] == [12.0, 12.5, 14.0]
    assert [exact.of_round(1, drafts) for drafts in (0, 1, 4)] == [12.0, 13.0, 16.0]
    dear = Costs(**models | {"tuned": (0.0, 1.0)}, rough=(0.9, 0.0))  # a pass over all costs what one by one does
    assert [dear.drafts_roughly(1, drafts) for drafts in (1, 2, 7)] == [False, False, False]


def test_no_more_is_drafted_than_makes_sense():
    length = DraftLength(BOUND_BY_MEMORY)
    assert length.choose(texts(0.95), 2) == 2
    assert length.choose(texts(0.95), 0) == 0
    assert length.choose(texts(*[0.99] * 32), 100) <= 1  # 64 tokens at once


def test_expected_tokens_are_those_of_independent_drafts():
    generator = torch.Generator().manual_seed(0)
    right = torch.rand((200_000, 4), generator=generator) < 0.6
    assert expected_tokens(0.6, 4) == pytest.approx(1 + right.long().cumprod(1).sum(1).double().mean().item(), rel=0.01)
    assert expected_tokens(0.0, 4) == 1
    assert expected_tokens(1.0, 4) == 5


def test_acceptance_follows_what_is_observed_and_what_was_not_judged_does_not_count():
    text = Acceptance(0.7)
    assert text.rate == pytest.approx(0.7)
    text.observe(0, 5)  # one refused, four never looked at
    assert text.rate == pytest.approx(0.7 * 3 * 0.9 / (3 * 0.9 + 1))
    for _ in range(60):
        text.observe(3, 3)
    assert text.rate > 0.98
    for _ in range(60):
        text.observe(0, 1)
    assert text.rate < 0.02


def test_new_texts_begin_with_what_earlier_ones_have_seen():
    length = DraftLength(BOUND_BY_MEMORY)
    for _ in range(30):
        length.remember(Acceptance(0.1))
    assert length.prior == pytest.approx(0.1, abs=0.01)


def test_passes_are_timed_once_and_interpolated():
    step = Stepper(tiny_llama(0))
    passes = []

    class Counting:
        model, device, is_remote = step.model, step.device, False
        new_cache = staticmethod(step.new_cache)

        def twin(self):
            return self

        def __call__(self, cache, ids, keep=1):
            passes.append(ids.numel())
            return step(cache, ids, keep=keep)

    costs = StepCosts({"large": Counting()})
    two, four, five, eight = (costs.seconds("large", tokens) for tokens in (2, 4, 5, 8))
    assert min(two, four, five, eight) > 0
    number = len(passes)
    assert costs.seconds("large", 3) == pytest.approx((two + four) / 2)
    assert costs.seconds("large", 6) == pytest.approx((2 * five + eight) / 3)
    assert costs.seconds("large", 4) == four
    assert len(passes) == number
    assert costs.seconds("large", 16) > 0  # more than one row
    assert passes[-1] == 16


SLOPING = {"large": (10.0, 4.0), "tuned": (0.0, 0.1), "untuned": (0.0, 0.1)}


def test_what_rounds_take_beyond_their_passes_makes_drafts_pay_sooner():
    length = DraftLength(Costs(**SLOPING))
    assert length.choose(texts(0.25), 100) == 0
    length.costs.observe(1, 0, 30.0)  # its passes were timed with 14.2
    assert length.costs.of_round(1, 0) == pytest.approx(30.0)
    # Another token for each judge, and another pass of the drafter, of 14.2, with its share of what is beyond.
    assert length.costs.of_round(1, 1) == pytest.approx(30.0 + 4.2 + (30.0 - 14.2) / 14.2 * 0.1)
    assert length.choose(texts(0.25), 100) == 1


def test_what_the_drafters_passes_take_beyond_is_not_charged_to_rounds_without_drafts():
    costs = Costs(large=(10.0, 0.0), tuned=(5.0, 0.0), untuned=(5.0, 0.0))
    costs.observe(1, 7, 2 * costs.of_round(1, 7))  # every pass took twice as long
    assert [costs.of_round(1, drafts) for drafts in (0, 1, 7)] == [40.0, 50.0, 110.0]


def test_the_quickest_of_the_last_rounds_counts_and_no_round_takes_less_than_its_passes():
    costs = Costs(**SLOPING)
    timed = costs.of_round(1, 0)
    for seconds in (100.0, 2 * timed, 1000.0, 500.0):
        costs.observe(1, 0, seconds)
    assert costs.of_round(1, 0) == pytest.approx(2 * timed)
    for _ in range(5):
        costs.observe(1, 0, 3 * timed)  # a longer text
    assert costs.of_round(1, 0) == pytest.approx(3 * timed)
    costs.observe(1, 0, timed / 2)
    assert costs.of_round(1, 0) == timed


def test_what_many_rows_take_says_nothing_about_few():
    costs = Costs(**SLOPING)
    before = [costs.of_round(rows, 1) for rows in (1, 31, 64)]
    costs.observe(32, 1, 1000.0)
    assert costs.of_round(32, 1) == 1000.0
    assert costs.of_round(63, 1) > 1000.0  # about nearly as many it does
    assert [costs.of_round(rows, 1) for rows in (1, 31, 64)] == before


@pytest.mark.parametrize("settings", [{"device": "cuda"}, {"is_remote": True}])
def test_elsewhere_rounds_have_no_say(settings):
    costs = Costs(**SLOPING, **settings)
    before = costs.of_round(1, 3)
    costs.observe(1, 3, 1000.0)
    assert costs.of_round(1, 3) == before
