"""Answers that are chosen by their likelihood, not written."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_gpt2, tiny_llama, tiny_tokenizer

from fedpt_flwr import choices as choosing
from fedpt_flwr.choices import Choices
from fedpt_flwr.config import parse_run_config
from fedpt_flwr.data import TokenizedExample, tokenize_answers
from fedpt_flwr.errors import ConfigError, DataError
from fedpt_flwr.evaluation import Evaluator
from fedpt_flwr.losses import MODELS, answer_losses, choice_scores, choose_answers, chosen, proxy_losses
from fedpt_flwr.prompts import Example
from fedpt_flwr.proxy import ProxyModel
from fedpt_flwr.scoring import score_models
from fedpt_flwr.sources import Items, answer_choices

LABELS = ["card", "card lost", "refund", "b", "top up 9"]
PROMPTS = ["where is my card", "q", "refund pls\n", "how do i top up my card again and again"]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def choices(tokenizer):
    return Choices(texts=LABELS, ids=tokenize_answers(LABELS, tokenizer))


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return tokenizer(PROMPTS, add_special_tokens=False)["input_ids"]


@pytest.fixture(scope="module")
def proxy():
    return ProxyModel(tiny_llama(0), tiny_llama(1), tiny_llama(2))


@pytest.fixture(scope="module")
def adapted():
    """A proxy whose untuned model is the tuned one with its adapter switched off."""
    small = tiny_llama(1)
    torch.manual_seed(3)
    tuned = get_peft_model(small, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    return ProxyModel(tiny_llama(0), tuned)


def every_pair(prompts, choices):
    """The obvious way: each prompt with each choice, as an item of its own."""
    return [TokenizedExample(list(prompt), list(ids)) for prompt in prompts for ids in choices.ids]


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_a_prompt_that_is_read_once_gives_what_reading_it_with_every_choice_gives(make, prompts, choices):
    model = make(4)
    losses = choose_answers(model, prompts, choices, pad_id=0)
    plain = answer_losses(model, every_pair(prompts, choices), pad_id=0)
    np.testing.assert_allclose(losses.nats, plain.nats, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(losses.tokens, plain.tokens)


@pytest.mark.parametrize("at_once", [1, 3])
def test_choices_read_a_few_at_a_time_give_the_same(at_once, proxy, prompts, choices, monkeypatch):
    def of_large():
        losses = np.zeros(len(prompts) * len(LABELS))
        for owners, targets, (large, _, _) in choice_scores(proxy, prompts, choices, pad_id=0):
            np.add.at(losses, owners, large.log_softmax(-1).gather(-1, targets[:, None])[:, 0].numpy())
        return losses

    whole = of_large()
    width = proxy.large.config.vocab_size
    monkeypatch.setattr(choosing, "_MAX_SCORES", at_once * choices.longest * width)
    np.testing.assert_allclose(of_large(), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["proxy", "adapted"])
def test_every_row_chooses_what_is_likeliest_when_prompt_and_choice_are_read_together(
    kind, request, tokenizer, prompts, choices, monkeypatch
):
    proxy = request.getfixturevalue(kind)
    monkeypatch.setattr(proxy, "alpha", 0.7)
    choices = replace(choices, length="tokens")  # without it the shortest one is always the likeliest here
    examples = [Example(prompt, LABELS[place]) for place, prompt in enumerate(PROMPTS)]
    tokenized = [TokenizedExample(list(ids), list(choices.ids[place])) for place, ids in enumerate(prompts)]
    scores = score_models(
        proxy, examples, tokenized, tokenizer=tokenizer, max_new_tokens=4, seed=0, choices=choices, prompts=prompts
    )
    reference = proxy_losses(proxy, every_pair(prompts, choices), alpha=0.7, pad_id=0)
    for name in MODELS:
        best = (reference[name].nats / reference[name].tokens).reshape(len(prompts), -1).argmin(axis=1)
        assert scores.measurements[name].answers == [LABELS[index] for index in best], name
        right = [index == place for place, index in enumerate(best)]
        assert scores.rows[name].exact_match == np.mean(right)
        assert (scores.rows[name].invalid_rate, scores.rows[name].num_invalid) == (0, 0)
        assert scores.rows[name].loss > 0
    assert len({tuple(scores.measurements[name].answers) for name in MODELS}) > 1, "or the test shows nothing"


def test_alpha_0_chooses_as_the_large_model_and_a_mask_rules_no_choice_out(proxy, tokenizer, prompts, choices):
    def answers(**settings):
        for name, value in settings.items():
            setattr(proxy, name, value)
        examples = [Example(prompt, LABELS[0]) for prompt in PROMPTS]
        tokenized = [TokenizedExample(list(ids), list(choices.ids[0])) for ids in prompts]
        found = score_models(
            proxy, examples, tokenized, tokenizer=tokenizer, max_new_tokens=4, seed=0, choices=choices, prompts=prompts
        )
        return {name: found.measurements[name].answers for name in ("large", "proxy")}

    try:
        plain = answers(alpha=0.0)
        assert plain["proxy"] == plain["large"]
        assert answers(alpha=1.0, plausibility=0.9)["proxy"] == answers(alpha=1.0, plausibility=0.0)["proxy"]
    finally:
        proxy.alpha, proxy.plausibility = 1.0, 0.0


def test_tokens_that_the_large_model_reads_are_counted(proxy, tokenizer, prompts):
    same_length = ["card", "send", "keep"]  # so that nothing is a gap
    choices = Choices(texts=same_length, ids=tokenize_answers(same_length, tokenizer))
    read = []
    hook = proxy.large.register_forward_pre_hook(
        lambda model, args, inputs: read.append(inputs["input_ids"].numel()), with_kwargs=True
    )
    found = score_models(
        proxy,
        [Example(prompt, "card") for prompt in PROMPTS],
        [TokenizedExample(list(ids), list(choices.ids[0])) for ids in prompts],
        tokenizer=tokenizer,
        max_new_tokens=4,
        seed=0,
        batch_size=1,
        choices=choices,
        prompts=prompts,
        public_texts=["where\nkeep"],
        shots=1,
    )
    hook.remove()
    assert found.rows["large_few_shot"].shots == 1
    assert found.large_tokens == sum(read) > 0


# Choices of 1, 4 and 2 tokens, and of 1, 9 and 3 bytes.
TEXTS, IDS = ["a", "bcdefghij", "klm"], [[5], [5, 6, 7, 8], [5, 6]]


@pytest.mark.parametrize(
    ("length", "best"),
    [
        ("sum", 0),  # 2.0, 5.4, 2.1
        ("tokens", 2),  # 2.0, 5.4 / 4 = 1.35, 2.1 / 2 = 1.05
        ("bytes", 1),  # 2.0, 5.4 / 9 = 0.6, 2.1 / 3 = 0.7
    ],
)
def test_the_length_of_a_choice_counts_as_asked_for(length, best):
    nats = np.array([[2.0, 5.4, 2.1], [np.nan, 5.4, np.inf], [np.nan, np.nan, np.inf]])
    found = Choices(texts=TEXTS, ids=IDS, length=length).best(nats)
    assert found[0] == best
    assert found[1:].tolist() == [1, -1], "what is not finite is never chosen"


def test_of_equally_likely_choices_the_first_is_taken():
    assert Choices(texts=TEXTS, ids=IDS).best(np.array([[3.0, 1.0, 1.0]])).tolist() == [1]


@pytest.mark.parametrize("length", ["sum", "tokens", "bytes"])
def test_the_confidence_is_the_softmax_of_what_choices_are_chosen_by(length):
    nats = np.array([[2.0, 4.0, 9.0], [800.0, 801.0, 950.0]])
    lengths = {"sum": [1] * 3, "tokens": list(map(len, IDS)), "bytes": [len(text.encode()) for text in TEXTS]}[length]
    shares = torch.softmax(torch.tensor(-nats / lengths), dim=1).amax(1)
    assert Choices(texts=TEXTS, ids=IDS, length=length).confidence(nats) == pytest.approx(shares.numpy())


def test_of_what_is_not_finite_nothing_is_sure():
    nats = np.array([[np.nan, np.inf, np.nan], [np.nan, 1.0, np.inf]])
    assert Choices(texts=TEXTS, ids=IDS).confidence(nats).tolist() == [0.0, 1.0]


def test_no_choice_is_an_invalid_answer(tokenizer, prompts, choices):
    broken = tiny_llama(1)
    torch.nn.init.constant_(broken.model.norm.weight, torch.nan)
    losses = choose_answers(broken, prompts, choices, pad_id=0)
    assert chosen(losses, choices).tolist() == [-1] * len(prompts)
    assert choices.text_of(-1) == ""


# --- as a run config asks for it --------------------------------------------------------------------------------------


@pytest.fixture
def labels_file(tmp_path):
    path = tmp_path / "labels.txt"
    path.write_text("\n".join(LABELS) + "\n")
    return path


def evaluator(proxy, tokenizer, labels_file, answers=LABELS[:4], **changes):
    items = Items(
        examples=[Example(prompt, answer) for prompt, answer in zip(PROMPTS, answers, strict=True)],
        values=None,
        fields=None,
    )
    settings = {"data.choices": str(labels_file), "scoring.max-new-tokens": 4, "threads.server": 1, **changes}
    return Evaluator(items, tokenizer, parse_run_config(settings), proxy, place="data.test")


def test_the_curve_of_the_shift_is_what_scoring_gives_at_every_alpha(proxy, tokenizer, labels_file):
    evaluating = evaluator(proxy, tokenizer, labels_file)
    curve, large_tokens = evaluating.shift_curve(proxy)
    assert large_tokens > 0
    try:
        for point in (curve[0], curve[-1]):
            proxy.alpha = point.alpha
            again = evaluator(proxy, tokenizer, labels_file, **{"scoring.loss-alpha": point.alpha})
            row = again.score(proxy, rows=("proxy",)).rows["proxy"]
            assert row.exact_match == point.exact_match
            assert row.loss == pytest.approx(point.loss, rel=1e-4)
            assert point.plausibility == 0
    finally:
        proxy.alpha = 1.0


def test_the_quality_of_a_plain_model_is_that_of_its_row(proxy, tokenizer, labels_file):
    evaluating = evaluator(proxy, tokenizer, labels_file)
    scores = evaluating.score(proxy, rows=("tuned",))
    assert scores.large_tokens == 0, "nobody needs the large model for that"
    of_all = evaluator(proxy, tokenizer, labels_file).score(proxy, rows=("tuned", "large"))
    assert of_all.measurements["tuned"].answers == scores.measurements["tuned"].answers
    exact_match, loss = evaluating.quality(proxy.tuned)
    assert exact_match == scores.rows["tuned"].exact_match
    assert loss == pytest.approx(scores.rows["tuned"].loss, rel=1e-4)
    measured, scored = evaluating.measure(proxy.tuned), scores.measurements["tuned"]
    assert measured.answers == scored.answers
    np.testing.assert_allclose(measured.confidence, scored.confidence, rtol=1e-4)


def test_examples_show_the_choice_token_by_token(proxy, tokenizer, labels_file):
    evaluating = evaluator(proxy, tokenizer, labels_file)
    scores = evaluating.score(proxy)
    examples, large_tokens = evaluating.examples(proxy, scores, number=2)
    # Nothing is written: the large model reads each prompt and choice once, but for the last token.
    shown = [(example["prompt"], example["models"]["proxy"]) for example in examples]
    assert large_tokens == sum(len(tokenizer(prompt + answer)["input_ids"]) for prompt, answer in shown)
    for example in examples:
        said = "".join(token["text"] for token in example["tokens"])
        assert said.removesuffix("</s>") == example["models"]["proxy"]
    json.dumps(examples)


def test_an_answer_that_is_no_choice_is_named_before_anything_is_scored(proxy, tokenizer, labels_file):
    with pytest.raises(DataError, match=r"data.test, item 3: its answer must be one of the 5 choices .*got 'cash'"):
        evaluator(proxy, tokenizer, labels_file, answers=["card", "b", "cash", "b"])


def test_choices_are_the_answers_of_the_sets_that_are_named_or_of_a_source_of_their_own(tmp_path, labels_file):
    def write(name, *labels):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": "t", "label": label}) + "\n" for label in labels))
        return str(path)

    data = parse_run_config(
        {
            "data.answer-field": "label",
            "data.train": write("train", "b", "a", "b"),
            "data.test": write("test", "c", "a"),
            "data.validation": "",
            "data.public": "",
            "distillation.mode": "off",
        }
    ).data
    assert answer_choices(data) == []
    assert answer_choices(replace(data, choices="test")) == ["c", "a"]
    assert answer_choices(replace(data, choices="test, train")) == ["c", "a", "b"]
    assert answer_choices(replace(data, choices="validation")) == ["b", "a"]  # it is a part of data.train
    assert answer_choices(replace(data, choices=data.test)) == ["c", "a"]
    assert answer_choices(replace(data, choices=str(labels_file))) == LABELS
    for nothing in ("public", write("one", "a", "a")):
        with pytest.raises(DataError, match="data.choices: there must be at least two different answers"):
            answer_choices(replace(data, choices=nothing))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"data.choices": "test", "data.answer-pattern": "#(.+)"}, "an answer that is chosen counts as a whole"),
        ({"data.choices": "train", "data.partitioner": "node-local"}, "the server has no data.train to find answers"),
        ({"data.choices": "labels.txt"}, "must be an absolute path"),
        ({"scoring.choice-length": "words"}, "must be one of sum, tokens, bytes"),
    ],
)
def test_keys_that_make_no_sense_are_refused(changes, match):
    with pytest.raises(ConfigError, match=match):
        parse_run_config(changes)


def test_a_blank_choice_is_refused(tokenizer):
    with pytest.raises(DataError, match="must not be blank"):
        tokenize_answers(["a", " "], tokenizer)
