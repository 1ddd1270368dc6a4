import copy
import json
import math

import numpy as np
import pytest
import torch
from letters import CONTEXT, WORLD, ids, knowing_model, letter_tokenizer, llama, tokenized

from fedpt_flwr import scoring
from fedpt_flwr.data import TokenizedExample
from fedpt_flwr.errors import DataError
from fedpt_flwr.losses import AnswerLosses
from fedpt_flwr.proxy import ProxyModel
from fedpt_flwr.scoring import Measurement, make_row, score_models, with_public_texts
from fedpt_flwr.uncertainty import wilson_interval
from fedpt_flwr.verdict import render_table, results_table, verdict


@pytest.fixture(scope="module")
def tokenizer():
    return letter_tokenizer()


@pytest.fixture(scope="module")
def knowing(tokenizer):
    return knowing_model(tokenizer)


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
    assert "By ROUGE-L it CANNOT BE TOLD FROM it: ROUGE-L 91.7 against 91.7, difference +0.0 points" in verdict(results)


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


def test_loss_and_answer_of_the_few_shot_row_come_after_the_same_texts(tokenizer):
    """Or the first of them: a long right answer leaves less room, where another text might fit as well."""
    prompts = [ids(tokenizer, "> mesh\n")] * 29
    items = [TokenizedExample(prompt, [5] * (1 + 2 * place)) for place, prompt in enumerate(prompts)]
    texts = ["mesh is a filter", "tint", "red is a tint"]
    longer, losses, used = with_public_texts(
        prompts, items, texts, tokenizer=tokenizer, shots=3, context=CONTEXT, longest=8, seed=0
    )
    kept = []
    for prompt, answered, item in zip(prompts, longer, losses, strict=True):
        before = item.prompt_ids[: -len(prompt)]
        assert answered[: len(before)] == before
        assert len(item.prompt_ids) + len(item.answer_ids) <= CONTEXT
        kept.append(len(before))
    assert used.tolist() == [3] * 29
    assert kept[0] == len(longer[0]) - len(prompts[0])
    assert kept[-1] == 0
    assert len(set(kept)) > 2


def test_table_and_verdict_can_be_made_from_real_results(scores):
    results = json.loads(json.dumps(scores.to_json()))
    text = render_table(results_table(results))
    assert text.isascii()
    assert "75.0 [30.1, 95.4]" in text
    assert "The proxy CANNOT BE TOLD FROM the tuned small model: exact match 75.0 % against 75.0 %" in verdict(results)
