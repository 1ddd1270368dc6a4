"""Claims about the choice of alpha and mask: what one pass tells is what writing the answers would have told."""

import json
from itertools import product

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import EOS, PAD, VOCAB, generate_answers, tiny_llama, tiny_tokenizer

from fedpt_flwr.data import collate, tokenize_examples
from fedpt_flwr.losses import proxy_losses
from fedpt_flwr.prompts import Example
from fedpt_flwr.proxy import ProxyModel
from fedpt_flwr.shift import ALPHAS, MASKS, Shift, ShiftPoint, choose_shift, shift_curve

# peft asks transformers by a name that it has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

NEW = 11  # tokens that may be written
HIDDEN = {"hidden_size": 32, "intermediate_size": 48}
TRIED = [(0.5, 0.0), (1.0, 0.0), (1.5, 0.0), (0.0, 0.01), (1.0, 0.01), (1.0, 0.3)]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def questions():
    """Questions with answers of 5 to 13 letters, but for 11: the longest are too long to be written."""
    rng = np.random.default_rng(0)

    def word(length):
        return "".join(rng.choice(list("abcdefghij"), length))

    made = [Example(f"> {word(3)}\n", f"{word(1 + index % 3)} = {word(1 + index // 3)}") for index in range(21)]
    return [question for question in made if len(question.answer) != NEW]


QUESTIONS = questions()


def learn(model, lesson, tokenizer, *, steps):
    items, _ = tokenize_examples(lesson, tokenizer, max_length=64)
    optimizer = torch.optim.Adam([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**collate(items, PAD)).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def items(tokenizer):
    return tokenize_examples(QUESTIONS, tokenizer, max_length=64)[0]


@pytest.fixture(scope="module")
def large(tokenizer):
    """Knows half of the answers, and never ends one."""
    lesson = [Example(question.prompt, question.answer + ";") for question in QUESTIONS[::2]]
    return learn(tiny_llama(3, vocab=VOCAB + 4, **HIDDEN), lesson, tokenizer, steps=40)


@pytest.fixture(scope="module")
def proxy(large, tokenizer):
    """A pair of models beside a large one that pads its vocabulary."""
    tuned = learn(tiny_llama(1, **HIDDEN), QUESTIONS, tokenizer, steps=55)
    return ProxyModel(large, tuned, tiny_llama(1, **HIDDEN), tokenizer=tokenizer)


@pytest.fixture(scope="module")
def adapted(large, tokenizer):
    """An adapter that is switched off for the untuned model."""
    kind = LoraConfig(r=8, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned = learn(get_peft_model(tiny_llama(1, **HIDDEN), kind), QUESTIONS, tokenizer, steps=55)
    return ProxyModel(large, tuned, tokenizer=tokenizer)


def curve_of(proxy, items, **settings):
    given = {"pad_id": PAD, "max_new_tokens": NEW, "end_ids": [EOS], "batch_size": 7, **settings}
    points = shift_curve(proxy, items, **given)
    return {(point.alpha, point.plausibility): point for point in points}


def written(proxy, items, tokenizer, *, max_new_tokens=NEW):
    """Which questions the proxy really answers right, with its present alpha and mask."""
    prompts = [item.prompt_ids for item in items]
    answers, _ = generate_answers(proxy, prompts, tokenizer=tokenizer, max_new_tokens=max_new_tokens)
    return [answer == question.answer for answer, question in zip(answers, QUESTIONS, strict=True)]


# --- the curve ---


@pytest.mark.parametrize("name", ["proxy", "adapted"])
def test_exact_match_is_what_really_writing_the_answers_gives(name, request, items, tokenizer):
    proxy = request.getfixturevalue(name)
    alphas, masks = (sorted({setting[place] for setting in TRIED}) for place in (0, 1))
    curve = curve_of(proxy, items, alphas=alphas, masks=masks)
    shares = {}
    for alpha, mask in TRIED:
        proxy.alpha, proxy.plausibility = alpha, mask
        shares[alpha, mask] = np.mean(written(proxy, items, tokenizer))
    proxy.alpha, proxy.plausibility = 1.0, 0.0
    assert {setting: curve[setting].exact_match for setting in TRIED} == pytest.approx(shares)
    # Neither is a claim about nothing: alpha and mask matter, and some of the answers are too long.
    assert len(set(shares.values())) > 3
    assert 0.3 < max(shares.values()) < 1


@pytest.mark.parametrize("name", ["proxy", "adapted"])
def test_losses_are_those_of_the_proxy_at_each_alpha_whatever_the_mask(name, request, items):
    proxy = request.getfixturevalue(name)
    curve = curve_of(proxy, items)
    for alpha in (0.25, 1.0, 1.5):
        expected = proxy_losses(proxy, items, alpha=alpha, pad_id=PAD)["proxy"].mean
        for mask in MASKS:
            assert curve[alpha, mask].loss == pytest.approx(expected, rel=1e-5)


def test_every_alpha_is_tried_with_every_mask(proxy, items):
    points = shift_curve(proxy, items, pad_id=PAD, max_new_tokens=NEW)
    assert [(point.alpha, point.plausibility) for point in points] == list(product(ALPHAS, MASKS))
    assert (1.0, 0.0) in product(ALPHAS, MASKS), "the published shift is always among them"


def test_the_proxys_own_alpha_and_mask_play_no_part_and_stay(proxy, items):
    first = curve_of(proxy, items)
    proxy.alpha, proxy.plausibility = 0.3, 0.2
    assert curve_of(proxy, items) == first
    assert (proxy.alpha, proxy.plausibility) == (0.3, 0.2)
    proxy.alpha, proxy.plausibility = 1.0, 0.0


def test_batches_do_not_change_a_curve(proxy, items):
    first, second = (curve_of(proxy, items, batch_size=size) for size in (1, 64))
    for setting, point in first.items():
        assert second[setting].exact_match == point.exact_match
        assert second[setting].loss == pytest.approx(point.loss, rel=1e-4)


def test_an_answer_that_is_too_long_to_be_written_is_wrong(proxy, items):
    """Each of the answers that are right is right as long as it fits, its end not counted."""
    setting = (1.0, 0.1)
    right = [curve_of(proxy, [item])[setting].exact_match == 1 for item in items]
    longest = max(len(item.answer_ids) - 1 for item, is_right in zip(items, right, strict=True) if is_right)
    assert longest == NEW - 1
    for max_new_tokens in (4, 7, 9, NEW):
        fit = [
            is_right and len(item.answer_ids) - 1 <= max_new_tokens for is_right, item in zip(right, items, strict=True)
        ]
        found = curve_of(proxy, items, max_new_tokens=max_new_tokens)[setting].exact_match
        assert found == pytest.approx(np.mean(fit))
        assert found < np.mean(right) or max_new_tokens == NEW


def test_a_model_whose_scores_are_not_finite_gives_no_loss_and_no_nan(items, tokenizer):
    tuned = tiny_llama(1)
    with torch.no_grad():
        tuned.model.norm.weight.fill_(torch.nan)
    proxy = ProxyModel(tiny_llama(0), tuned, tiny_llama(2), tokenizer=tokenizer)
    points = list(curve_of(proxy, items).values())
    assert {(point.exact_match, point.loss) for point in points} == {(0.0, None)}
    shift = choose_shift(points, items=len(items))
    assert json.loads(json.dumps(shift.to_json(), allow_nan=False))["chosen_by"] == "loss"


# --- the choice ---


def point(alpha, plausibility, exact_match, loss=1.0):
    return ShiftPoint(alpha=alpha, plausibility=plausibility, exact_match=exact_match, loss=loss)


def chosen(*points):
    shift = choose_shift(points, items=4)
    return shift.alpha, shift.plausibility, shift.chosen_by


def test_the_best_exact_match_is_chosen_whatever_the_loss():
    assert chosen(point(0.5, 0.0, 0.25, 0.1), point(1.0, 0.1, 0.75, 9.0), point(1.5, 0.0, 0.5, 1.0)) == (
        1.0, 0.1, "exact_match"
    )  # fmt: skip


@pytest.mark.parametrize("backwards", [False, True])
def test_of_equally_good_points_the_larger_alpha_and_then_the_smaller_mask_is_chosen(backwards):
    points = [point(alpha, mask, 0.5, loss=alpha) for alpha in (0.5, 1.0) for mask in (0.0, 0.01, 0.1)]
    assert chosen(*(points[::-1] if backwards else points)) == (1.0, 0.0, "exact_match")
    masked = [point(1.0, 0.1, 0.5), point(1.0, 0.01, 0.5), point(1.0, 0.0, 0.25), point(0.5, 0.0, 0.5)]
    assert chosen(*(masked[::-1] if backwards else masked)) == (1.0, 0.01, "exact_match")


@pytest.mark.parametrize("backwards", [False, True])
def test_where_nothing_is_right_the_loss_chooses_and_there_is_no_mask(backwards):
    points = [
        point(alpha, mask, 0.0, loss) for alpha, loss in ((0.5, 2.0), (1.0, 1.5), (1.25, 1.5), (1.5, 3.0))
        for mask in (0.0, 0.01, 0.1)
    ]  # fmt: skip
    assert chosen(*(points[::-1] if backwards else points)) == (1.25, 0.0, "loss")


def test_points_without_a_loss_are_not_chosen_by_loss():
    assert chosen(point(0.5, 0.0, 0.0, 7.0), point(1.0, 0.0, 0.0, None)) == (0.5, 0.0, "loss")
    assert chosen(point(0.5, 0.0, 0.0, None), point(1.0, 0.0, 0.0, None)) == (1.0, 0.0, "loss")


def test_a_single_right_item_is_enough_to_choose_by_exact_match():
    assert chosen(point(0.5, 0.1, 1 / 144, 9.0), point(1.0, 0.0, 0.0, 0.1)) == (0.5, 0.1, "exact_match")


def test_a_shift_survives_json_also_among_other_keys():
    shift = choose_shift([point(0.5, 0.0, 0.5, None), point(1.0, 0.1, 0.25, 2.0)], items=8)
    text = json.dumps({"round": 3, "phase": "shift", **shift.to_json()}, allow_nan=False)
    assert "null" not in text
    again = Shift.from_json(json.loads(text))
    assert (again.alpha, again.plausibility, again.chosen_by, again.items) == (0.5, 0.0, "exact_match", 8)
    assert list(again.curve) == list(shift.curve)


def test_the_best_point_of_a_real_curve_is_chosen(proxy, items):
    points = list(curve_of(proxy, items).values())
    shift = choose_shift(points, items=len(items))
    best = max(point.exact_match for point in points)
    assert best > 0
    assert shift.alpha == max(point.alpha for point in points if point.exact_match == best)
    assert shift.items == len(items)
    assert list(shift.curve) == points
