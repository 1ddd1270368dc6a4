"""Claims about the lessons that a proxy writes on public text, and about who learns from them."""

import copy
import json
import math
import re
from pathlib import Path

import pytest
import torch
from reference import reference_greedy, reference_scores
from tiny import EOS, PAD, VOCAB, tiny_llama, tiny_tokenizer

from fedpt_flwr import distiller as distiller_module
from fedpt_flwr.config import DISTILLATION_MODES, TuningConfig, parse_run_config
from fedpt_flwr.data import collate
from fedpt_flwr.distillation import answer_scores
from fedpt_flwr.distiller import IN_ROUNDS, SHARES, WITH_DEVICE_COPY, Distiller
from fedpt_flwr.errors import DataError
from fedpt_flwr.logits import kl_divergence
from fedpt_flwr.models import make_tunable, tunable_arrays
from fedpt_flwr.proxy import ProxyModel

NEW = 6
PROMPTS = [f"> ask {number} {'abc'[number % 3] * (number % 5)}\n" for number in range(24)]
TEXTS = ["the end", "a = 1", "x", "", "hello there", "b;c"]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def plain(tokenizer, **settings):
    """Three models of which the large one reads more than the others; several of their answers end."""
    models = tiny_llama(6, max_position_embeddings=128), tiny_llama(7), tiny_llama(8)
    return ProxyModel(*models, tokenizer=tokenizer, **settings)


def adapted(tokenizer, **settings):
    """One small model with an adapter that is not zero."""
    tuned = make_tunable(tiny_llama(8), TuningConfig(mode="lora", lora_rank=4), seed=1)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "lora_" in name:
                weight.normal_(std=0.3)
    return ProxyModel(tiny_llama(6), tuned, tokenizer=tokenizer, **settings)


def names_of(model):
    every = [name for name, _ in model.named_parameters()]
    return [name for name in every if "lora_" in name] or every


def make(proxy, tokenizer, *, prompts=PROMPTS, texts=(), **changes):
    settings = {
        "scoring.max-new-tokens": NEW,
        "threads.server": 1,
        "distillation.steps": 3,
        "distillation.final-steps": 3,
        "distillation.learning-rate": 1e-3,
        "distillation.num-prompts": 9,
        "distillation.batch-size": 4,
        **changes,
    }
    names = names_of(proxy.tuned)
    return Distiller(parse_run_config(settings), proxy, tokenizer, prompts=prompts, texts=texts, trainable=names)


def arrays(model):
    weights = dict(model.named_parameters())
    return {name: weights[name].detach().clone() for name in names_of(model)}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def as_it_was(model):
    return (1.0, -math.inf)


@pytest.fixture
def lessons(monkeypatch):
    """What each distillation was given; it runs all the same."""
    seen = []
    real = distiller_module.distil

    def distil(student, texts, teacher, config, **settings):
        seen.append({"student": student, "texts": list(texts), "teacher": teacher, "config": config, **settings})
        return real(student, texts, teacher, config, **settings)

    monkeypatch.setattr(distiller_module, "distil", distil)
    return seen


def prompts_of(lesson, tokenizer):
    return [tokenizer.decode(text.prompt_ids) for text in lesson["texts"]]


# --- what a lesson holds ---


@pytest.mark.parametrize(("alpha", "plausibility"), [(1.0, 0.0), (0.5, 0.05)])
def test_a_lesson_is_prompts_with_the_proxys_own_greedy_answers_and_their_ends(tokenizer, lessons, alpha, plausibility):
    proxy = plain(tokenizer, alpha=alpha, plausibility=plausibility)
    make(proxy, tokenizer, **{"distillation.num-prompts": 0}).teach_round(1, arrays(proxy.tuned))
    (lesson,) = lessons
    assert sorted(prompts_of(lesson, tokenizer)) == sorted(PROMPTS)
    for text in lesson["texts"]:
        whole = reference_greedy(
            proxy.large, proxy.tuned, proxy.untuned, torch.tensor(text.prompt_ids),
            max_new_tokens=NEW, alpha=alpha, plausibility=plausibility,
        )  # fmt: skip
        end = whole.index(EOS) + 1 if EOS in whole else NEW
        assert text.answer_ids == whole[:end]
    ended = [text for text in lesson["texts"] if text.answer_ids[-1] == EOS]
    assert 0 < len(ended) < len(PROMPTS)


@pytest.mark.parametrize(("alpha", "plausibility"), [(1.0, 0.0), (0.5, 0.05)])
@pytest.mark.parametrize("make_proxy", [plain, adapted])
def test_the_teacher_is_the_proxy_with_its_alpha_and_mask(tokenizer, lessons, make_proxy, alpha, plausibility):
    proxy = make_proxy(tokenizer, alpha=alpha, plausibility=plausibility)
    untuned = tiny_llama(8)  # in both
    make(proxy, tokenizer, **{"distillation.num-prompts": 5}).teach_round(1, arrays(proxy.tuned))
    (lesson,) = lessons
    targets = lesson["teacher"]([3, 1])
    expected, of_large = [], []
    for text in (lesson["texts"][3], lesson["texts"][1]):
        ids = torch.tensor(text.prompt_ids + text.answer_ids)
        rows = slice(len(text.prompt_ids) - 1, len(ids) - 1)
        expected.append(
            reference_scores(proxy.large, proxy.tuned, untuned, ids, alpha=alpha, plausibility=plausibility)[rows]
        )
        of_large.append(reference_scores(proxy.large, untuned, untuned, ids)[rows])
    torch.testing.assert_close(targets.proxy, torch.cat(expected), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(targets.large, torch.cat(of_large), rtol=1e-4, atol=1e-4)
    assert targets.proxy.isinf().any() == (plausibility > 0)


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_the_pair_learns_with_the_proxys_alpha(tokenizer, lessons, alpha):
    """A perfect tuned student is the proxy, so that the untuned one must be the proxy less the whole shift."""
    proxy = plain(tokenizer, alpha=alpha, plausibility=0.05)
    taught = make(proxy, tokenizer, **{"distillation.mode": "paired", "distillation.num-prompts": 5})
    taught.teach_round(1, arrays(proxy.tuned))
    taught.teach_device_copy(as_it_was)
    lesson, of_copy = lessons
    assert lesson["alpha"] == alpha
    targets = lesson["teacher"]([3, 1])
    batch = collate([lesson["texts"][index] for index in (3, 1)], PAD)
    with torch.no_grad():
        large, tuned, untuned = (
            answer_scores(model, batch, vocab_size=VOCAB) for model in (proxy.large, proxy.tuned, proxy.untuned)
        )
    expected = large + alpha * (tuned - untuned) - (tuned - untuned)
    learnt = targets.large if targets.untuned is None else targets.untuned
    torch.testing.assert_close(learnt, expected, rtol=1e-4, atol=1e-4)
    assert (targets.untuned is None) == (alpha == 1)
    assert of_copy["teacher"]([0]).untuned is None


def test_without_prompts_public_texts_are_learnt_from_as_they_stand_without_the_empty_ones(tokenizer, lessons):
    proxy = plain(tokenizer)
    make(proxy, tokenizer, prompts=None, texts=TEXTS, **{"distillation.num-prompts": 0}).teach_round(
        1, arrays(proxy.tuned)
    )
    (lesson,) = lessons
    found = sorted((text.prompt_ids, tokenizer.decode(text.answer_ids)) for text in lesson["texts"])
    # every token counts, the first one too: it comes after the end of the text before
    assert found == sorted(([EOS], text) for text in TEXTS if text)


def test_long_texts_and_prompts_are_cut_as_in_training_and_that_is_said(tokenizer, lessons, caplog):
    proxy = plain(tokenizer)
    long = "abcdefghij" * 20
    short = {"train.max-length": 16}
    make(proxy, tokenizer, prompts=None, texts=["short", ""], **short)
    assert not caplog.records
    make(proxy, tokenizer, prompts=None, texts=[long, "short", ""], **short)
    make(proxy, tokenizer, prompts=["short", long, long], **short)
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "Of 3 public texts 1 are cut to their first 16 tokens",
        "Of 3 public prompts 2 are cut to their last 16 tokens",
    ]
    make(proxy, tokenizer, prompts=None, texts=[long], **short).teach_round(1, arrays(proxy.tuned))
    make(proxy, tokenizer, prompts=[long], **short).teach_round(1, arrays(proxy.tuned))
    make(proxy, tokenizer, prompts=[long]).teach_round(1, arrays(proxy.tuned))
    text, cut, longest = (lesson["texts"][0] for lesson in lessons)
    assert (text.prompt_ids, tokenizer.decode(text.answer_ids)) == ([EOS], long[:15])
    assert tokenizer.decode(cut.prompt_ids) == long[-16:]
    assert tokenizer.decode(longest.prompt_ids) == long[-(64 - NEW) :]  # what the smallest context leaves


@pytest.mark.parametrize("given", [{"prompts": []}, {"prompts": None}, {"prompts": None, "texts": ["", ""]}])
def test_a_lesson_about_nothing_is_refused(tokenizer, given):
    with pytest.raises(DataError, match=r"^data\.prompts: distillation needs at least one public prompt or text$"):
        make(plain(tokenizer), tokenizer, **given)


# --- which prompts ---


@pytest.mark.parametrize(("asked", "given"), [(1, 1), (9, 9), (24, 24), (99, 24), (0, 24)])
def test_so_many_prompts_are_drawn_and_none_twice(tokenizer, lessons, asked, given):
    proxy = plain(tokenizer)
    settings = {"distillation.num-prompts": asked, "distillation.final-num-prompts": asked}
    taught = make(proxy, tokenizer, **settings)
    taught.teach_round(1, arrays(proxy.tuned))
    taught.teach_device_copy(as_it_was)
    for lesson in lessons:
        assert len(lesson["texts"]) == len(set(prompts_of(lesson, tokenizer))) == given


def test_the_rounds_and_the_devices_copy_have_steps_rates_and_prompts_of_their_own(tokenizer, lessons):
    proxy = plain(tokenizer)
    settings = {
        "distillation.num-prompts": 4, "distillation.steps": 2, "distillation.learning-rate": 0.001,
        "distillation.final-num-prompts": 7, "distillation.final-steps": 3, "distillation.final-learning-rate": 0.002,
    }  # fmt: skip
    taught = make(proxy, tokenizer, **settings)
    _, _, lesson = taught.teach_round(1, arrays(proxy.tuned))
    _, last = taught.teach_device_copy(as_it_was)
    found = [(len(part["texts"]), part["num_steps"], part["learning_rate"]) for part in lessons]
    assert found == [(4, 2, 0.001), (7, 3, 0.002)]
    assert (lesson.result.num_steps, last.lesson.result.num_steps) == (2, 3)


def test_every_round_draws_prompts_anew(tokenizer, lessons):
    proxy = plain(tokenizer)
    taught = make(proxy, tokenizer)
    for server_round in (1, 2, 3):
        taught.teach_round(server_round, arrays(proxy.tuned))
    drawn = [prompts_of(lesson, tokenizer) for lesson in lessons]
    assert len({tuple(sorted(prompts)) for prompts in drawn}) == 3
    assert len({lesson["seed"] for lesson in lessons}) == 3


@pytest.mark.parametrize("mode", IN_ROUNDS)
def test_a_lesson_depends_on_seed_and_round_and_on_nothing_that_went_before(tokenizer, mode):
    def taught(seed, rounds):
        proxy = plain(tokenizer)
        teacher = make(proxy, tokenizer, seed=seed, **{"distillation.mode": mode})
        torch.manual_seed(len(rounds))  # nobody's business
        for server_round in rounds:
            following, untuned, _ = teacher.teach_round(server_round, arrays(proxy.tuned))
        return following | {f"untuned {name}": weights for name, weights in (untuned or {}).items()}

    alone = taught(0, [3])
    assert equal(taught(0, [1, 2, 3]), alone)
    assert not equal(taught(0, [2]), alone)
    assert not equal(taught(1, [3]), alone)


def test_the_devices_copy_is_the_same_whatever_was_taught_before(tokenizer):
    def taught(rounds):
        proxy = plain(tokenizer)
        teacher = make(proxy, tokenizer)
        for server_round in rounds:
            teacher.teach_round(server_round, arrays(tiny_llama(5)))
        return arrays(teacher.teach_device_copy(lambda model: (1.0, 0.0))[0])

    assert equal(taught([1, 2]), taught([]))


# --- who learns ---


def state_of(proxy):
    return (
        {name: weight.detach().clone() for name, weight in proxy.named_parameters()},
        (proxy.alpha, proxy.plausibility),
        [weight.requires_grad for weight in proxy.parameters()],
        [part.training for part in proxy.modules()],
        [part._disable_adapters for part in proxy._adapter_layers],
    )


@pytest.mark.parametrize("has_prompts", [True, False])
@pytest.mark.parametrize(
    ("make_proxy", "mode"), [(plain, mode) for mode in (*IN_ROUNDS, "final")] + [(adapted, "carry"), (adapted, "paper")]
)
def test_the_proxy_is_untouched_whoever_learns_from_it(tokenizer, make_proxy, mode, has_prompts):
    proxy = make_proxy(tokenizer, alpha=0.75, plausibility=0.01)
    taught = make(
        proxy, tokenizer, prompts=PROMPTS if has_prompts else None, texts=TEXTS, **{"distillation.mode": mode}
    )
    before, ids = state_of(proxy), torch.tensor([[5, 6, 7, 8]])
    scores = proxy(ids).logits
    if mode in IN_ROUNDS:
        taught.teach_round(1, arrays(proxy.tuned))
    if mode in WITH_DEVICE_COPY:
        copied, _ = taught.teach_device_copy(lambda model: (1.0, 0.0))
        assert copied is not proxy.tuned
        assert {id(weight) for weight in copied.parameters()}.isdisjoint(map(id, proxy.parameters()))
    weights, *others = state_of(proxy)
    assert equal(weights, before[0])
    assert tuple(others) == before[1:]
    assert torch.equal(proxy(ids).logits, scores)


def test_the_modes_that_end_with_a_copy_for_the_devices_are_those_of_the_documentation():
    text = (Path(__file__).parents[1] / "docs" / "algorithm.md").read_text(encoding="utf-8")
    said = re.findall(r"^\| `(\w+)` \|.*\| (yes|no) \|$", text, re.MULTILINE)
    assert said == [(mode, "yes" if mode in WITH_DEVICE_COPY else "no") for mode in DISTILLATION_MODES]


@pytest.mark.parametrize("mode", IN_ROUNDS)
def test_what_is_given_learns_and_is_not_changed_itself(tokenizer, lessons, mode):
    proxy = plain(tokenizer)
    given = arrays(tiny_llama(5))
    before = {name: weights.clone() for name, weights in given.items()}
    settings = {"distillation.mode": mode, "distillation.steps": 40, "distillation.batch-size": 9}  # all prompts
    following, untuned, lesson = make(proxy, tokenizer, **settings).teach_round(1, given)
    assert equal(given, before)
    assert following.keys() == given.keys()
    assert all(weights.dtype == torch.float32 for weights in following.values())
    assert lesson.result.kl_last < lesson.result.kl_first
    # the first step is taken with the weights that were given, not with the proxy's own
    student, texts = tiny_llama(5), lessons[0]["texts"]
    with torch.no_grad():
        scores = answer_scores(student, collate(texts, PAD), vocab_size=VOCAB)
    expected = kl_divergence(lessons[0]["teacher"](range(len(texts))).proxy, scores).mean().item()
    assert lesson.result.kl_first == pytest.approx(expected, rel=1e-4)
    changed = [name for name in given if not torch.equal(following[name], given[name])]
    assert changed == names_of(student)
    assert (untuned is not None) == (mode == "paired")


def test_the_untuned_model_of_a_pair_comes_closer_to_the_large_one(tokenizer, lessons):
    proxy = plain(tokenizer)
    taught = make(proxy, tokenizer, **{"distillation.mode": "paired", "distillation.steps": 40})
    _, untuned, _ = taught.teach_round(1, arrays(proxy.tuned))
    learnt = tiny_llama(8)
    learnt.load_state_dict(untuned, strict=False)
    batch = collate(lessons[0]["texts"], PAD)

    def distance(model):
        p, q = (answer_scores(part, batch, vocab_size=VOCAB).log_softmax(-1) for part in (proxy.large, model))
        return float((p.exp() * (p - q)).sum(-1).mean())

    with torch.no_grad():
        assert distance(learnt) < 0.7 * distance(proxy.untuned)


def test_of_an_adapted_model_the_adapter_alone_learns(tokenizer, lessons):
    proxy = adapted(tokenizer)
    given = arrays(proxy.tuned)
    taught = make(proxy, tokenizer, **{"distillation.mode": "carry", "distillation.steps": 20})
    following, untuned, lesson = taught.teach_round(1, given)
    assert untuned is None
    assert following.keys() == tunable_arrays_of_adapter()
    assert not any(torch.equal(following[name], given[name]) for name in given)
    assert lesson.result.kl_last < lesson.result.kl_first
    below = {name: weight for name, weight in lessons[0]["student"].named_parameters() if "lora_" not in name}
    assert equal(below, {name: weight for name, weight in proxy.tuned.named_parameters() if "lora_" not in name})


def tunable_arrays_of_adapter():
    return tunable_arrays(make_tunable(tiny_llama(8), TuningConfig(mode="lora", lora_rank=4), seed=1)).keys()


# --- what it measures ---


@pytest.mark.parametrize("make_proxy", [plain, adapted])
def test_tokens_through_the_large_model_are_those_of_answers_and_of_scores(tokenizer, lessons, make_proxy):
    """A text of n tokens is read to its last but one, once to be written and once to be scored."""
    proxy = make_proxy(tokenizer)
    _, _, lesson = make(proxy, tokenizer, **{"distillation.steps": 20}).teach_round(1, arrays(proxy.tuned))
    lengths = [len(text.prompt_ids) + len(text.answer_ids) for text in lessons[0]["texts"]]
    assert len(lengths) == 9
    assert lesson.large_tokens == 2 * (sum(lengths) - 9)


def test_by_hand_four_texts_without_answers_are_twenty_tokens(tokenizer):
    proxy = plain(tokenizer)
    taught = make(proxy, tokenizer, prompts=None, texts=["abc", "", "abcdefgh", "ab", "abcdefg"])
    _, _, lesson = taught.teach_round(1, arrays(proxy.tuned))
    assert (
        lesson.large_tokens == 3 + 8 + 2 + 7
    )  # each has the end of the text before in front, and its last is not read


def test_texts_that_are_not_remembered_cost_the_large_model_every_time(tokenizer, monkeypatch, lessons):
    monkeypatch.setattr(distiller_module, "MAX_REMEMBERED_BYTES", 0)
    proxy = plain(tokenizer)
    settings = {"distillation.steps": 5, "distillation.batch-size": 9}
    _, _, lesson = make(proxy, tokenizer, **settings).teach_round(1, arrays(proxy.tuned))
    lengths = [len(text.prompt_ids) + len(text.answer_ids) for text in lessons[0]["texts"]]
    # to be written, for the drift, and in each of five steps of all nine texts
    assert lesson.large_tokens == 7 * (sum(lengths) - 9)


def test_drift_is_how_far_the_student_went_along_large_minus_untuned(tokenizer, lessons):
    proxy = plain(tokenizer)
    given = arrays(proxy.tuned)
    following, _, lesson = make(proxy, tokenizer, **{"distillation.steps": 20}).teach_round(1, given)
    before, after = tiny_llama(7), tiny_llama(7)
    after.load_state_dict(following, strict=False)
    over = under = 0.0
    for text in lessons[0]["texts"]:
        ids = torch.tensor([text.prompt_ids + text.answer_ids])
        with torch.no_grad():
            old, new, large, untuned = (
                model(ids).logits[0, len(text.prompt_ids) - 1 : -1].double()
                for model in (before, after, proxy.large, proxy.untuned)
            )
        change, direction = (part - part.mean(-1, keepdim=True) for part in (new - old, large - untuned))
        over, under = over + float((change * direction).sum()), under + float((direction * direction).sum())
    assert abs(over / under) > 1e-3
    assert lesson.drift == pytest.approx(over / under, rel=1e-3)


def test_a_student_of_the_large_model_drifts_towards_it(tokenizer):
    """With nothing tuned the proxy is the large model, and all that is learnt lies along large - untuned."""
    proxy = ProxyModel(tiny_llama(6), tiny_llama(8), tiny_llama(8), tokenizer=tokenizer)
    drifts = []
    for steps in (5, 60):
        _, _, lesson = make(proxy, tokenizer, **{"distillation.steps": steps}).teach_round(1, arrays(proxy.tuned))
        drifts.append(lesson.drift)
    assert 0.02 < drifts[0] < drifts[1] < 1.2
    assert drifts[1] > 0.3


def test_a_lesson_is_json_with_what_it_measured(tokenizer):
    proxy = plain(tokenizer)
    taught = make(proxy, tokenizer)
    _, _, lesson = taught.teach_round(1, arrays(proxy.tuned))
    _, last = taught.teach_device_copy(as_it_was)
    for row in (lesson.to_json(), last.to_json()):
        assert json.loads(json.dumps(row, allow_nan=False)) == row
        assert row["num_steps"] == 3
        assert {"kl_first", "kl_last", "drift", "seconds"} <= row.keys()


def test_progress_of_the_devices_copy_is_told(tokenizer):
    seen = []
    taught = make(plain(tokenizer), tokenizer)
    taught.teach_device_copy(as_it_was, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


# --- how far the devices' copy goes ---


def device_copy(tokenizer, qualities):
    """A copy that is judged as ``qualities`` say, share by share, and the weights that were judged."""
    proxy = plain(tokenizer)
    judged, left = [], list(qualities)

    def quality(model):
        judged.append(arrays(model))
        return left.pop(0)

    copied, lesson = make(proxy, tokenizer).teach_device_copy(quality)
    return copied, lesson, judged


def test_the_devices_copy_is_tried_at_every_share_of_the_way(tokenizer):
    _, lesson, judged = device_copy(tokenizer, [(0.0, 1.0)] * len(SHARES))
    begin, end = judged[0], judged[-1]
    assert equal(begin, arrays(tiny_llama(7)))
    assert not equal(begin, end)
    assert [point["share"] for point in lesson.curve] == list(SHARES)
    assert (SHARES[0], SHARES[-1]) == (0.0, 1.0)
    for share, weights in zip(SHARES, judged, strict=True):
        for name in weights:
            expected = (1 - share) * begin[name] + share * end[name]
            torch.testing.assert_close(weights[name], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("qualities", "best"),
    [
        ([(0.1, 9.0), (0.2, 9.0), (0.9, 9.0), (0.3, 1.0), (0.2, 1.0), (0.1, 1.0), (0.0, 1.0)], 2),  # right answers
        ([(0.5, 3.0), (0.5, 2.0), (0.5, 1.5), (0.5, 1.0), (0.5, 0.5), (0.5, 0.9), (0.4, 0.1)], 4),  # then the loss
        ([(0.5, 1.0)] * 7, 0),  # then whatever has forgotten least
        ([(0.5, math.nan), (0.5, math.inf), (0.5, 7.0), (0.2, 1.0), (0.2, 1.0), (0.2, 1.0), (0.2, 1.0)], 2),
        ([(0.0, math.nan)] * 6 + [(0.1, math.nan)], 6),
    ],
)
def test_the_devices_copy_goes_as_far_as_it_is_best(tokenizer, qualities, best):
    copied, lesson, judged = device_copy(tokenizer, qualities)
    assert lesson.share == SHARES[best]
    assert equal(arrays(copied), judged[best])
    points = lesson.to_json()["curve"]
    assert [point["exact_match"] for point in points] == [match for match, _ in qualities]
    assert [point.get("loss") for point in points] == [loss if math.isfinite(loss) else None for _, loss in qualities]
    json.dumps(points, allow_nan=False)


def test_the_devices_copy_is_a_model_of_its_own_and_ready_to_be_used(tokenizer):
    proxy = plain(tokenizer)
    copied, _ = make(proxy, tokenizer).teach_device_copy(lambda model: (1.0, 0.0))
    assert not copied.training
    assert not any(weight.requires_grad for weight in copied.parameters())
    before = copy.deepcopy(proxy.tuned.state_dict())
    with torch.no_grad():
        copied.model.norm.weight.zero_()
    assert equal(dict(proxy.tuned.state_dict()), before)
