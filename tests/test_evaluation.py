import dataclasses
import logging

import numpy as np
import pytest
import torch
from reference import reference_greedy
from tiny import EOS, tiny_llama, tiny_tokenizer

from fedpt_flwr.compare.cell import reliability
from fedpt_flwr.config import parse_run_config
from fedpt_flwr.errors import DataError
from fedpt_flwr.evaluation import Evaluator
from fedpt_flwr.losses import MODELS
from fedpt_flwr.models import load_tokenizer
from fedpt_flwr.prompts import Example
from fedpt_flwr.proxy import ProxyModel
from fedpt_flwr.scoring import make_row
from fedpt_flwr.shift import ALPHAS, MASKS
from fedpt_flwr.sources import Items

CONTEXT = 64
NEW = 8


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def proxy():
    """The small models read less than the large one."""
    return ProxyModel(tiny_llama(0, max_position_embeddings=2 * CONTEXT), tiny_llama(1), tiny_llama(2))


@pytest.fixture(autouse=True)
def _shift_as_it_was(proxy):
    """What a test sets it leaves to no other, also where it fails."""
    yield
    proxy.alpha, proxy.plausibility = 1.0, 0.0


def settings(**changes):
    return parse_run_config({"scoring.max-new-tokens": NEW, "threads.server": 1, **changes})


def items(*pairs):
    return Items(examples=[Example(prompt, answer) for prompt, answer in pairs], values=None, fields=None)


def make(found, tokenizer, proxy, place="data.test", **changes):
    return Evaluator(found, tokenizer, settings(**changes), proxy, place=place)


def seen_by(evaluator):
    """Lengths of the prompts for answers, and of prompts and answers for losses."""
    return (
        [len(prompt) for prompt in evaluator._prompts],
        [(len(item.prompt_ids), len(item.answer_ids)) for item in evaluator._tokenized],
    )


def test_prompts_for_answers_do_not_depend_on_the_right_answer(tokenizer, proxy):
    prompt = "> " + "a" * 58 + "end="
    short, long = (make(items((prompt, answer)), tokenizer, proxy) for answer in ("1", "2" * 100))
    assert short._prompts == long._prompts == [tokenizer(prompt)["input_ids"][-(CONTEXT - NEW) :]]


@pytest.mark.parametrize(
    ("max_length", "longest_prompt"),
    [(256, CONTEXT - NEW), (20, 20)],  # what the smallest context leaves; what training has seen
)
def test_a_prompt_is_as_long_as_the_smallest_context_and_training_allow(tokenizer, proxy, max_length, longest_prompt):
    evaluator = make(items(("a" * 99, "1"), ("b", "1")), tokenizer, proxy, **{"train.max-length": max_length})
    assert seen_by(evaluator)[0] == [longest_prompt, 1]


def test_losses_are_of_the_whole_answer_where_the_context_allows_it(tokenizer, proxy):
    evaluator = make(items(("ab", "1" * 40), ("a" * 99, "1" * 99)), tokenizer, proxy, **{"train.max-length": 16})
    assert seen_by(evaluator)[1] == [(2, 41), (CONTEXT // 2, CONTEXT // 2)]


def test_models_that_name_no_context_are_scored_at_the_length_of_training(tokenizer, proxy, monkeypatch):
    monkeypatch.setattr(proxy.config, "max_position_embeddings", None)
    evaluator = make(items(("a" * 99, "1")), tokenizer, proxy, **{"train.max-length": 16})
    assert seen_by(evaluator) == ([16], [(14, 2)])


def test_what_is_cut_is_logged_once_with_numbers(tokenizer, proxy, caplog):
    with caplog.at_level(logging.INFO):
        make(items(("a", "1"), ("b", "2")), tokenizer, proxy)
        assert not caplog.messages
        make(items(("a" * 60, "1"), ("b" * 99, "2" * 99), ("c", "3")), tokenizer, proxy)
    assert caplog.messages == [
        "data.test: of 3 items, 2 prompts lost their beginning for answers (over 56 tokens), and 1 prompts their "
        "beginning and 1 answers their end for losses (over 64 tokens together)"
    ]


@pytest.mark.parametrize("place", ["data.test", "data.validation"])
def test_items_that_cannot_be_scored_are_named_before_anything_is_scored(tokenizer, proxy, place):
    with pytest.raises(DataError, match=f"^{place}: must hold at least one example"):
        make(items(), tokenizer, proxy, place)
    with pytest.raises(
        DataError, match=rf"^{place}, item 2: an example must have an answer to score, got ' '; remove .* \(2 of 4\)"
    ):
        make(items(("a", "1"), ("b", " "), ("c", "2"), ("d", "")), tokenizer, proxy, place)


def test_a_context_that_the_answer_fills_is_refused_with_the_key_to_lower(tokenizer, proxy):
    with pytest.raises(
        DataError, match=r"^scoring\.max-new-tokens: the models read 64 tokens, .* no room for a prompt, got 63; lower"
    ):
        make(items(("a", "1")), tokenizer, proxy, **{"scoring.max-new-tokens": 63})


def test_items_longer_than_every_limit_are_scored_all_the_same(tokenizer, proxy):
    evaluator = make(items(("a" * 200, "1" * 200), ("b", "2")), tokenizer, proxy, **{"train.max-length": 16})
    scores = evaluator.score(proxy, public_texts=["a = 1", "b = 2"])
    assert list(scores.rows) == [*MODELS, "large_few_shot"]
    assert all(row.loss is not None and row.exact_match is not None for row in scores.rows.values())


def test_an_empty_prompt_is_answered_after_the_end_of_sequence_where_there_is_no_beginning(tokenizer, proxy):
    evaluator = make(items(("", "ab"), ("", "cd")), tokenizer, proxy)
    assert evaluator._prompts == [[EOS], [EOS]]
    scores = evaluator.score(proxy, public_texts=["a = 1"])
    first, second = scores.measurements["proxy"].answers
    assert first == second
    # two letters and the end: the first letter counts, because it is predicted from the end of sequence
    assert scores.measurements["large"].losses.tokens.tolist() == [3, 3]


def test_what_never_changes_is_measured_the_first_time_only(tokenizer, proxy):
    evaluator = make(items(("ab", "1"), ("b", "2")), tokenizer, proxy)
    first, again = evaluator.score(proxy), evaluator.score(proxy)
    for name in ("large", "untuned"):
        assert again.measurements[name] is first.measurements[name]
    assert 0 < again.large_tokens < first.large_tokens
    assert again.rows == first.rows


def test_items_keep_their_values(tokenizer, proxy):
    found = dataclasses.replace(items(("a", "1"), ("b", "2")), values=["1", "2"], fields=["x", "y"])
    row = make(found, tokenizer, proxy).score(proxy).rows["tuned"]
    assert row.contains_value is not None
    assert row.right_field is not None


# --- the strength of the shift ---

PAIRS = [("ab", "cd"), ("> q", "e = 1"), ("hello 1", "2"), ("x=", "y"), ("the end", "a;b"), ("o", "pq")]


def as_written(proxy, tokenizer, *, alpha, plausibility=0.0):
    """Items whose right answers are what this proxy writes at some alpha and mask, as far as it ends them."""
    before = proxy.alpha, proxy.plausibility
    proxy.alpha, proxy.plausibility = alpha, plausibility
    measured = make(items(*PAIRS), tokenizer, proxy).score(proxy, rows=("proxy",)).measurements["proxy"]
    proxy.alpha, proxy.plausibility = before
    return items(*((prompt, answer) for (prompt, _), answer in zip(PAIRS, measured.answers, strict=True)))


def test_one_pass_tells_every_alpha_and_mask_and_what_it_cost(tokenizer, proxy):
    evaluator = make(items(*PAIRS), tokenizer, proxy)
    curve, large_tokens = evaluator.shift_curve(proxy)
    assert len(curve) == len(ALPHAS) * len(MASKS)
    # every letter and the end is a token; the last of an item is only predicted
    assert large_tokens == sum(len(prompt) + len(answer) for prompt, answer in PAIRS)
    by_alpha = {point.alpha: point.loss for point in curve}
    assert by_alpha[1.0] == pytest.approx(evaluator.score(proxy).rows["proxy"].loss, rel=1e-5)


def test_where_a_part_of_an_answer_counts_answers_are_written_to_be_judged(tokenizer, proxy):
    """Every item is right if its first letter is: there one pass over the right answers would tell nothing."""
    wanted = as_written(proxy, tokenizer, alpha=0.5, plausibility=0.01)
    firsts = [dataclasses.replace(item, answer=item.answer[0] + "x") for item in wanted.examples]
    evaluator = make(dataclasses.replace(wanted, examples=firsts), tokenizer, proxy, **{"data.answer-pattern": "^(.)"})
    proxy.alpha, proxy.plausibility = 0.3, 0.2
    shift, large_tokens = evaluator.choose_shift(proxy)
    assert (proxy.alpha, proxy.plausibility) == (0.3, 0.2)
    expected, spent = {}, 0
    for point in shift.curve:
        proxy.alpha, proxy.plausibility = point.alpha, point.plausibility
        scores = evaluator.score(proxy, rows=("proxy",))
        expected[point.alpha, point.plausibility] = scores.rows["proxy"].exact_match
        spent += scores.large_tokens
    assert {(point.alpha, point.plausibility): point.exact_match for point in shift.curve} == expected
    assert expected[0.5, 0.01] == 1.0
    assert len(set(expected.values())) > 1
    best = max(expected.values())
    assert (shift.alpha, shift.chosen_by) == (
        max(alpha for alpha, mask in expected if expected[alpha, mask] == best),
        "exact_match",
    )
    assert shift.items == len(PAIRS)
    passed = sum(len(item.prompt) + len(item.answer) for item in firsts)
    assert large_tokens == spent + passed


def test_alpha_and_mask_stay_as_they_were_when_writing_fails(tokenizer, proxy, monkeypatch):
    evaluator = make(items(*PAIRS), tokenizer, proxy, **{"data.answer-pattern": "(.)"})
    monkeypatch.setattr(evaluator, "score", lambda *_, **__: 1 / 0)
    proxy.alpha, proxy.plausibility = 0.3, 0.2
    with pytest.raises(ZeroDivisionError):
        evaluator.choose_shift(proxy)
    assert (proxy.alpha, proxy.plausibility) == (0.3, 0.2)


# --- plain models ---


def test_a_plain_model_is_measured_as_it_is_beside_the_others(tokenizer, proxy):
    found = dataclasses.replace(items(*PAIRS), values=["1"] * 6, fields=["e"] * 6)
    evaluator = make(found, tokenizer, proxy)
    alone, beside = evaluator.measure(proxy.tuned), evaluator.score(proxy).measurements["tuned"]
    assert alone.answers == beside.answers
    assert {name: marks.tolist() for name, marks in alone.judged.items()} == {
        name: marks.tolist() for name, marks in beside.judged.items()
    }
    np.testing.assert_allclose(alone.losses.nats, beside.losses.nats, rtol=1e-4)
    assert alone.losses.tokens.tolist() == beside.losses.tokens.tolist()


def test_the_quality_of_a_plain_model_is_its_loss_and_what_it_would_write(tokenizer, proxy):
    model = tiny_llama(12)  # three of its answers end
    answers = make(items(*PAIRS), tokenizer, proxy).measure(model).answers
    ended = [(prompt, answer) for (prompt, _), answer in zip(PAIRS, answers, strict=True) if 0 < len(answer) < NEW]
    assert len(ended) == 3
    wanted = items(*ended, *PAIRS)
    evaluator = make(wanted, tokenizer, proxy)
    row = make_row(evaluator.measure(model), n=9, seed=0)
    assert row.exact_match == pytest.approx(3 / 9)
    assert evaluator.quality(model) == pytest.approx((row.exact_match, row.loss), rel=1e-4)


# --- what public prompts cover ---


def covering(proxy, tokenizer, topics):
    evaluator = make(dataclasses.replace(items(*PAIRS), topics=topics), tokenizer, proxy)
    return evaluator, evaluator.measure(proxy.tuned)


def test_covered_and_other_items_are_all_items_once(tokenizer, proxy):
    evaluator, measured = covering(proxy, tokenizer, ["u", "v", "u", "w", "x", "u"])
    rows = evaluator.rows_by_topic("device", measured, frozenset({"u", "x", "nobody asks"}))
    assert list(rows) == ["device", "device_covered", "device_not_covered"]
    parts = {"device_covered": [0, 2, 4, 5], "device_not_covered": [1, 3]}
    assert [row.n for row in rows.values()] == [6, 4, 2]
    for name, indices in parts.items():
        some = items(*(PAIRS[index] for index in indices))
        alone = make(some, tokenizer, proxy).score(proxy, rows=("tuned",)).rows["tuned"]
        assert rows[name].loss == pytest.approx(alone.loss, rel=1e-4)
        assert rows[name].exact_match == alone.exact_match
    nats, tokens = (
        sum(getattr(measured.losses, what)[parts[name]].sum() for name in parts) for what in ("nats", "tokens")
    )
    assert rows["device"].loss == pytest.approx(nats / tokens)


@pytest.mark.parametrize(
    ("topics", "about"),
    [
        (None, {"u"}),  # the records do not say
        (["u", "v", "u", "w", "x", "u"], set()),  # the prompts do not say
        (["u"] * 6, {"u"}),  # all are covered
        (["u"] * 6, {"v"}),  # none is
    ],
)
def test_there_is_one_row_where_there_are_not_both(tokenizer, proxy, topics, about):
    evaluator, measured = covering(proxy, tokenizer, topics)
    rows = evaluator.rows_by_topic("device", measured, frozenset(about))
    assert {name: row.n for name, row in rows.items()} == {"device": 6}


def test_an_answer_without_a_finite_loss_has_the_probability_0(tokenizer, proxy):
    evaluator = make(items(*PAIRS), tokenizer, proxy)
    measured = evaluator.measure(proxy.tuned)
    broken = tiny_llama(1)
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    found = evaluator.answer_probabilities(broken, measured)
    assert found == [0.0] * len(PAIRS)
    assert reliability(found, [0] * len(PAIRS))["ece"] == 0.0
    assert all(0 < probability < 1 for probability in evaluator.answer_probabilities(proxy.tuned, measured))


# --- answers token by token ---


@pytest.fixture(scope="module")
def shown(tokenizer, proxy):
    """Every item's answer token by token at alpha 1, and what was scored."""
    evaluator = make(items(*PAIRS), tokenizer, proxy)
    scores = evaluator.score(proxy)
    return evaluator.examples(proxy, scores, number=len(PAIRS))[0], scores


def test_the_tokens_of_an_example_are_the_proxys_answer(tokenizer, proxy, shown):
    examples, scores = shown
    answers = scores.measurements["proxy"].answers
    for (prompt, reference), example, answer in zip(PAIRS, examples, answers, strict=True):
        assert (example["prompt"], example["reference"]) == (prompt, reference)
        written = "".join(token["text"] for token in example["tokens"])
        assert written.removesuffix("</s>") == answer == example["models"]["proxy"]
        assert written.endswith("</s>") == (len(example["tokens"]) <= NEW and len(answer) < len(example["tokens"]))
        assert set(example["models"]) == set(MODELS)


def test_a_token_is_changed_exactly_where_the_large_model_alone_would_have_gone_on_otherwise(tokenizer, proxy, shown):
    examples, _ = shown
    marks = []
    for (prompt, _), example in zip(PAIRS, examples, strict=True):
        ids = tokenizer(prompt)["input_ids"]
        answer = reference_greedy(
            proxy.large, proxy.tuned, proxy.untuned, torch.tensor(ids), max_new_tokens=len(example["tokens"])
        )
        assert [token["text"] for token in example["tokens"]] == [tokenizer.decode([token]) for token in answer]
        for place, token in enumerate(example["tokens"]):
            with torch.no_grad():
                wanted = int(proxy.large(torch.tensor([ids + answer[:place]])).logits[0, -1].argmax())
            assert token["changed"] == (wanted != answer[place])
            assert token.get("large") == (tokenizer.decode([wanted]) if token["changed"] else None)
            marks.append(token["changed"])
    assert {True, False} <= set(marks)


def test_a_character_of_several_tokens_is_shown_where_it_is_complete():
    """The demo world's tokens are bytes: an accent takes two of them, a Chinese character three."""
    bytewise = load_tokenizer("demo:small")
    models = (tiny_llama(seed, vocab=len(bytewise)) for seed in range(3))
    evaluator = make(items(("a", "b")), bytewise, ProxyModel(*models))
    text = "fluid = é ß 日本 ok"
    ids = bytewise(text)["input_ids"]
    marked = evaluator._marked(ids, ids)
    assert len(marked) == len(ids)
    assert "".join(token["text"] for token in marked) == text
    assert {"é", "ß", "日", "本"} <= {token["text"] for token in marked}


def test_at_alpha_zero_no_token_is_changed(tokenizer, proxy):
    evaluator = make(items(*PAIRS), tokenizer, proxy)
    proxy.alpha = 0.0
    examples, _ = evaluator.examples(proxy, evaluator.score(proxy, rows=("proxy",)), number=4)
    assert [token["changed"] for example in examples for token in example["tokens"]].count(True) == 0
    assert all(example["tokens"] for example in examples)


@pytest.mark.parametrize(("number", "places"), [(1, [0]), (2, [0, 3]), (3, [0, 2, 4]), (99, [0, 1, 2, 3, 4, 5])])
def test_examples_are_taken_at_equal_distances_and_none_twice(tokenizer, proxy, shown, number, places):
    _, scores = shown
    examples, _ = make(items(*PAIRS), tokenizer, proxy).examples(proxy, scores, number=number)
    assert [example["prompt"] for example in examples] == [PAIRS[place][0] for place in places]
