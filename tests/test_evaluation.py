import dataclasses
import logging

import pytest
import torch
from tiny import EOS, tiny_llama, tiny_tokenizer

from fedpt_flwr.config import parse_run_config
from fedpt_flwr.errors import DataError
from fedpt_flwr.evaluation import Evaluator
from fedpt_flwr.prompts import Example
from fedpt_flwr.proxy import ProxyModel
from fedpt_flwr.scoring import MODELS
from fedpt_flwr.sources import Items

CONTEXT = 64
NEW = 8


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def proxy():
    """The small models read less than the large one."""
    return ProxyModel(tiny_llama(0, max_position_embeddings=2 * CONTEXT), tiny_llama(1), tiny_llama(2))


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
