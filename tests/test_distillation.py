"""Claims about distillation: what a student learns from a teacher, and which weights it learns it with."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import EOS, PAD, VOCAB, tiny_gpt2, tiny_llama
from torch.nn import functional as F

from fedpt_flwr.config import DistillationConfig
from fedpt_flwr.data import TokenizedExample, batches, collate
from fedpt_flwr.distillation import Targets, answer_scores, distil, num_answer_tokens, remembering
from fedpt_flwr.errors import RoundError
from fedpt_flwr.logits import drift_along

RATE = 3e-3


def lesson(number=12, seed=0):
    """Texts of different lengths, two of them without a prompt."""
    rng = np.random.default_rng(seed)
    texts = [
        TokenizedExample(
            rng.integers(3, VOCAB, rng.integers(1, 6)).tolist(),
            [*rng.integers(3, VOCAB, rng.integers(1, 5)).tolist(), EOS],
        )
        for _ in range(number - 2)
    ]
    return [*texts, TokenizedExample([], [5, 6, EOS]), TokenizedExample([], [7, 8, 9, 10])]


TEXTS = lesson()


def names_of(model):
    return [name for name, _ in model.named_parameters()]


def weights_of(model):
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@torch.no_grad()
def alone(model, text):
    """Scores of one text's answer tokens, from a pass without padding or batches."""
    ids = torch.tensor([text.prompt_ids + text.answer_ids])
    begin = max(1, len(text.prompt_ids))
    return model(ids).logits[0, begin - 1 : -1].float()


def taught_by(model, large=None, texts=TEXTS):
    """The teacher that asks two models for a batch at a time."""

    @torch.no_grad()
    def teacher(indices):
        batch = collate([texts[index] for index in indices], PAD)
        proxy = answer_scores(model, batch, vocab_size=VOCAB)
        return Targets(proxy, proxy if large is None else answer_scores(large, batch, vocab_size=VOCAB))

    return teacher


def teach(
    student, teacher, *, texts=TEXTS, steps=4, rate=RATE, seed=3, untuned=None, alpha=1.0, names=None, **settings
):
    return distil(
        student,
        texts,
        teacher,
        DistillationConfig(**{"batch_size": 5, **settings}),
        trainable=names_of(student) if names is None else names,
        num_steps=steps,
        learning_rate=rate,
        pad_id=PAD,
        vocab_size=VOCAB,
        seed=seed,
        untuned=untuned,
        alpha=alpha,
    )


@torch.no_grad()
def divergence(teacher, *models, texts=TEXTS):
    """Mean nats per answer token of a sum of models from the teacher: the first, plus the second, minus the third."""
    targets = teacher(range(len(texts))).proxy
    parts = [answer_scores(model, collate(texts, PAD), vocab_size=VOCAB) for model in models]
    scores = parts[0] + parts[1] - parts[2] if len(parts) == 3 else parts[0]
    log_q = scores.log_softmax(-1)
    log_p = targets.log_softmax(-1)
    return float(F.kl_div(log_q, log_p, log_target=True, reduction="sum")) / len(log_q)


# --- scores of answer tokens ---


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_scores_of_a_batch_are_those_of_its_texts_one_by_one_in_their_order(make):
    model = make(1)
    together = answer_scores(model, collate(TEXTS, PAD), vocab_size=VOCAB)
    torch.testing.assert_close(together, torch.cat([alone(model, text) for text in TEXTS]), rtol=1e-4, atol=1e-5)


def test_padding_of_the_vocabulary_is_left_out():
    model = tiny_llama(1, vocab=VOCAB + 5)
    batch = collate(TEXTS, PAD)
    wide, narrow = (answer_scores(model, batch, vocab_size=size) for size in (VOCAB + 5, VOCAB))
    assert torch.equal(narrow, wide[:, :VOCAB])


def test_scores_are_float32_whatever_the_model_computes_in():
    assert answer_scores(tiny_llama(1).bfloat16(), collate(TEXTS, PAD), vocab_size=VOCAB).dtype == torch.float32


def test_answer_tokens_are_those_that_have_scores():
    for text in TEXTS:
        assert num_answer_tokens(text) == len(alone(tiny_llama(1), text))
    assert [num_answer_tokens(TokenizedExample(*pair)) for pair in (([3], [4, 5]), ([], [4, 5]), ([], [4]))] == [
        2,
        1,
        0,
    ]


# --- the steps ---


def bare_loop(
    student,
    teacher,
    *,
    steps,
    seed,
    temperature=1.0,
    clip=1.0,
    untuned=None,
    gamma=1.0,
    alpha=1.0,
    batch_size=5,
    turned=False,
):
    """Distillation as it is written down in a textbook, text by text; the divergences of its steps."""
    students = [student] if untuned is None else [student, untuned]
    weights = [weight for model in students for weight in model.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=RATE, betas=(0.9, 0.99), weight_decay=0.0, foreach=False, fused=False)
    found = []

    def kl(wanted, scores, heat):
        log_q, log_p = (scores / heat).log_softmax(-1), (wanted / heat).log_softmax(-1)
        return heat * heat * F.kl_div(log_q, log_p, log_target=True, reduction="sum")

    for indices in batches(len(TEXTS), batch_size, steps, np.random.default_rng(seed)):
        tokens = first = others = 0.0
        for index in indices:
            text = TEXTS[index]
            ids = torch.tensor([text.prompt_ids + text.answer_ids])
            begin = max(1, len(text.prompt_ids))
            scores = [model(ids).logits[0, begin - 1 : -1] for model in students]
            targets = teacher([index])
            tokens += len(scores[0])
            first = first + kl(*([targets.proxy, scores[0]][:: -1 if turned else 1]), temperature)
            if untuned is not None:
                others = others + kl(
                    targets.large if targets.untuned is None else targets.untuned, scores[1], temperature
                )
                others = others + gamma * kl(targets.proxy, targets.large + alpha * (scores[0] - scores[1]), 1.0)
        found.append(first.item() / tokens)
        optimizer.zero_grad()
        ((first + others) / tokens).backward()
        norm = torch.stack([weight.grad.square().sum() for weight in weights]).sum().sqrt()
        for weight in weights:
            weight.grad *= min(1.0, clip / (norm.item() + 1e-6))
        optimizer.step()
    return found


@pytest.mark.parametrize(("temperature", "direction"), [(1.0, "forward"), (2.5, "forward"), (2.5, "reverse")])
def test_distillation_equals_a_bare_loop(temperature, direction):
    teacher = taught_by(tiny_llama(9))
    student, reference = tiny_llama(1), tiny_llama(1)
    result = teach(student, teacher, steps=5, temperature=temperature, direction=direction)
    turned = direction == "reverse"
    expected = bare_loop(reference, teacher, steps=5, seed=3, temperature=temperature, turned=turned)
    assert result.kl_first == pytest.approx(expected[0], rel=1e-5)
    assert result.kl_last == pytest.approx(expected[-1], rel=1e-3)
    for (name, weight), other in zip(student.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(weight, other, rtol=0, atol=1e-4, msg=name)


@pytest.mark.parametrize(("gamma", "alpha"), [(0.0, 1.0), (3.0, 1.0), (3.0, 0.5)])
def test_paired_distillation_equals_a_bare_loop(gamma, alpha):
    taught, for_untuned = taught_by(tiny_llama(9), tiny_llama(8)), taught_by(tiny_llama(7))

    def teacher(indices):
        targets = taught(indices)
        return targets if alpha == 1 else replace(targets, untuned=for_untuned(indices).proxy)

    pair, reference = ([tiny_llama(1), tiny_llama(2)] for _ in range(2))
    result = teach(pair[0], teacher, untuned=pair[1], steps=4, gamma=gamma, alpha=alpha)
    expected = bare_loop(reference[0], teacher, untuned=reference[1], steps=4, seed=3, gamma=gamma, alpha=alpha)
    assert result.kl_last == pytest.approx(expected[-1], rel=1e-3)  # of the tuned one alone
    for model, other in zip(pair, reference, strict=True):
        for (name, weight), known in zip(model.named_parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(weight, known, rtol=0, atol=1e-4, msg=name)


def test_the_last_divergence_is_the_mean_of_the_last_tenth_of_the_steps():
    expected = bare_loop(tiny_llama(1), taught_by(tiny_llama(9)), steps=20, seed=3)
    result = teach(tiny_llama(1), taught_by(tiny_llama(9)), steps=20)
    assert result.num_steps == 20
    assert result.kl_last == pytest.approx(sum(expected[-2:]) / 2, rel=1e-3)


def test_a_student_that_is_the_teacher_has_nothing_to_learn():
    student = tiny_llama(1)
    before = weights_of(student)
    result = teach(student, taught_by(tiny_llama(1)), steps=10, rate=1e-5)
    assert result.kl_first == 0
    # AdamW makes steps of the learning rate of whatever rounding leaves; the divergence falls with its square.
    assert 0 <= result.kl_last < 1e-5
    for name, weight in student.named_parameters():
        assert (weight - before[name]).abs().max() <= 10 * 1e-5 * 1.01


def test_a_student_comes_closer_to_its_teacher():
    student, teacher = tiny_llama(1), taught_by(tiny_llama(9))
    before = divergence(teacher, student)
    result = teach(student, teacher, steps=60)
    after = divergence(teacher, student)
    assert after < before / 3
    assert result.kl_last < result.kl_first / 3


def test_tokens_that_the_teacher_rules_out_are_unlearnt():
    even = torch.arange(VOCAB) % 2 == 0

    def masked(indices):
        targets = taught_by(tiny_llama(9))(indices)
        return Targets(targets.proxy.masked_fill(even, -torch.inf), targets.large)

    def share_of_even(model):
        return float(torch.cat([alone(model, text) for text in TEXTS]).softmax(-1)[:, even].sum(-1).mean())

    student = tiny_llama(1)
    before = share_of_even(student)
    teach(student, masked, steps=30)
    assert share_of_even(student) < 0.6 * before


def test_the_pair_is_held_where_the_proxy_was_by_gamma_alone():
    large, tuned, untuned = tiny_llama(7), tiny_llama(1), tiny_llama(2)

    @torch.no_grad()
    def teacher(indices):
        batch = collate([TEXTS[index] for index in indices], PAD)
        scores, plus, minus = (answer_scores(model, batch, vocab_size=VOCAB) for model in (large, tuned, untuned))
        return Targets(scores + plus - minus, scores)

    assert divergence(teacher, large, tuned, untuned) == pytest.approx(0, abs=1e-6)
    left = {}
    for gamma in (0.0, 1.0):
        pair = copy.deepcopy(tuned), copy.deepcopy(untuned)
        teach(pair[0], teacher, untuned=pair[1], steps=25, gamma=gamma)
        left[gamma] = divergence(teacher, large, *pair)
        assert divergence(teacher, pair[0]) < divergence(teacher, tuned)  # and both have learnt
        assert divergence(taught_by(large), pair[1]) < divergence(taught_by(large), untuned)
    assert left[1.0] < left[0.0] / 2


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.5])
def test_a_pair_keeps_its_shift_whatever_the_proxys_alpha_is(alpha):
    """Held with another alpha than the proxy decodes with, the pair learns another shift: alpha times what it was."""
    large, untuned = tiny_llama(7), tiny_llama(2)
    tuned = copy.deepcopy(untuned)
    torch.manual_seed(9)
    with torch.no_grad():
        for weight in tuned.parameters():
            weight.add_(0.05 * torch.randn_like(weight))

    @torch.no_grad()
    def scores_of(indices, *models):
        batch = collate([TEXTS[index] for index in indices], PAD)
        return [answer_scores(model, batch, vocab_size=VOCAB) for model in models]

    def teacher(indices):
        scores, plus, minus = scores_of(indices, large, tuned, untuned)
        shift = plus - minus
        return Targets(scores + alpha * shift, scores, scores + (alpha - 1) * shift)

    def shift_of(plus, minus):
        plus, minus = scores_of(range(len(TEXTS)), plus, minus)
        return plus - minus

    before = shift_of(tuned, untuned)
    pair = copy.deepcopy(tuned), copy.deepcopy(untuned)
    teach(pair[0], teacher, untuned=pair[1], steps=150, alpha=alpha)
    assert divergence(taught_by(large), pair[1]) < 0.3 * divergence(taught_by(large), untuned)
    assert drift_along(shift_of(*pair), before) == pytest.approx(1, abs=0.25)


# --- what changes, and what does not ---


def test_only_answer_tokens_count():
    """A prompt is read, and what it would continue with is nobody's business."""
    texts = [TokenizedExample([5, 6, 7, 8], [9, EOS])]
    asked = []

    def teacher(indices):
        asked.append(list(indices))
        return Targets(torch.zeros(2, VOCAB), torch.zeros(2, VOCAB))  # one row for each of the two answer tokens

    student = tiny_llama(1)
    result = teach(student, teacher, texts=texts, steps=1)
    uniform = torch.full((VOCAB,), 1 / VOCAB)
    scores = alone(tiny_llama(1), texts[0]).log_softmax(-1)
    expected = [F.kl_div(row, uniform, reduction="sum").item() for row in scores]
    assert asked == [[0]]
    assert result.kl_first == pytest.approx(sum(expected) / 2, rel=1e-5)


@pytest.mark.parametrize("paired", [False, True])
def test_only_the_weights_that_are_named_change(paired):
    student, untuned = tiny_llama(1), tiny_llama(2)
    names = [name for name in names_of(student) if "layers.1" in name]
    before = [weights_of(model) for model in (student, untuned)]
    teach(student, taught_by(tiny_llama(9)), names=names, untuned=untuned if paired else None)
    for model, old, learnt in ((student, before[0], True), (untuned, before[1], paired)):
        changed = [name for name, weight in model.named_parameters() if not torch.equal(weight, old[name])]
        assert changed == (names if learnt else [])


def test_an_adapter_learns_and_the_model_under_it_stays_bit_for_bit():
    base = tiny_llama(1)
    student = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    names = [name for name, weight in student.named_parameters() if weight.requires_grad]
    before = weights_of(student)
    teacher = taught_by(tiny_llama(9))
    first = divergence(teacher, student)
    teach(student, teacher, names=names, steps=40)
    changed = {name for name, weight in student.named_parameters() if not torch.equal(weight, before[name])}
    assert changed == set(names)
    assert divergence(teacher, student) < 0.7 * first


def test_the_teacher_is_asked_for_each_batch_in_its_order_and_never_changed():
    asked = []
    model = tiny_llama(9)
    before = weights_of(model)

    def teacher(indices):
        asked.append(list(indices))
        return taught_by(model)(indices)

    teach(tiny_llama(1), teacher, steps=7, seed=11)
    assert asked == list(batches(len(TEXTS), 5, 7, np.random.default_rng(11)))
    assert equal(weights_of(model), before)


def test_a_seed_gives_the_same_bits_and_another_one_others():
    def taught(seed):
        student, untuned = tiny_llama(1), tiny_llama(2)
        teach(student, taught_by(tiny_llama(9), tiny_llama(8)), untuned=untuned, seed=seed)
        return {f"{which} {name}": w for which, m in enumerate((student, untuned)) for name, w in weights_of(m).items()}

    assert equal(taught(3), taught(3))
    assert not equal(taught(3), taught(4))


def test_torchs_own_generator_neither_matters_nor_changes():
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first, second = tiny_llama(1), tiny_llama(1)
    torch.random.set_rng_state(state)
    teach(first, taught_by(tiny_llama(9)))
    torch.manual_seed(2)
    teach(second, taught_by(tiny_llama(9)))
    assert equal(weights_of(first), weights_of(second))


def test_a_student_is_left_ready_to_be_used():
    student, untuned = tiny_llama(1).train(), tiny_llama(2)
    teach(student, taught_by(tiny_llama(9)), untuned=untuned)
    for model in (student, untuned):
        assert not model.training
        assert not any(weight.requires_grad or weight.grad is not None for weight in model.parameters())


@pytest.mark.parametrize("broken", ["a loss that is not finite", "a teacher that fails"])
def test_a_student_is_left_ready_to_be_used_after_an_error_too(broken):
    student, calls = tiny_llama(1), []

    def teacher(indices):
        calls.append(indices)
        targets = taught_by(tiny_llama(9))(indices)
        if len(calls) < 3:
            return targets
        if broken.startswith("a teacher"):
            raise ZeroDivisionError
        return Targets(targets.proxy * torch.nan, targets.large)

    with pytest.raises((ZeroDivisionError, RoundError)):
        teach(student, teacher)
    assert not any(weight.requires_grad or weight.grad is not None for weight in student.parameters())


def test_a_loss_that_is_not_finite_ends_with_a_sentence():
    student = tiny_llama(1)
    with torch.no_grad():
        student.model.norm.weight.fill_(torch.nan)
    with pytest.raises(
        RoundError,
        match=r"^distillation\.learning-rate: the distillation's loss became nan after 0 steps; "
        r"lower it, or set distillation\.mode='off'$",
    ):
        teach(student, taught_by(tiny_llama(9)))


@pytest.mark.parametrize("paired", [False, True])
def test_a_learning_rate_that_is_far_too_high_ends_with_a_sentence(paired):
    untuned = tiny_llama(2) if paired else None
    with pytest.raises(RoundError, match=r"the distillation's loss became (nan|inf) after \d+ steps"):
        teach(tiny_llama(1), taught_by(tiny_llama(9)), rate=1e38, steps=20, untuned=untuned)


def test_progress_is_told_step_by_step():
    seen = []
    distil(
        tiny_llama(1), TEXTS, taught_by(tiny_llama(9)), DistillationConfig(),
        trainable=["model.norm.weight"], num_steps=3, learning_rate=RATE, pad_id=PAD, vocab_size=VOCAB, seed=0,
        on_progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert seen == [(1, 3), (2, 3), (3, 3)]


# --- a teacher that remembers ---


def bytes_of(text):
    return 2 * num_answer_tokens(text) * VOCAB * 4  # two tables of float32


class Asked:
    """A teacher that writes down what it is asked."""

    def __init__(self, texts=TEXTS):
        self.teacher = taught_by(tiny_llama(9), tiny_llama(8), texts)
        self.indices = []

    def __call__(self, indices):
        self.indices += indices
        return self.teacher(indices)


ORDERS = [[0, 1, 2], [2, 0], [11, 3, 1, 10], [5], list(range(12)), list(range(11, -1, -1))]


@pytest.mark.parametrize("max_bytes", [0, bytes_of(TEXTS[0]), 3000, 10**9])
def test_what_is_remembered_is_what_the_teacher_said_whatever_the_order(max_bytes):
    asked = Asked()
    teacher = remembering(asked, TEXTS, max_bytes=max_bytes)
    models = tiny_llama(9), tiny_llama(8)
    for order in ORDERS:
        targets = teacher(order)
        for found, model in ((targets.proxy, models[0]), (targets.large, models[1])):
            expected = torch.cat([alone(model, TEXTS[index]) for index in order])
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_with_room_for_all_each_text_is_asked_about_once():
    asked = Asked()
    teacher = remembering(asked, TEXTS, max_bytes=sum(map(bytes_of, TEXTS)))
    for order in ORDERS:
        teacher(order)
    assert sorted(asked.indices) == list(range(12))


def test_without_room_every_text_is_asked_about_every_time():
    asked = Asked()
    teacher = remembering(asked, TEXTS, max_bytes=0)
    for order in ORDERS:
        teacher(order)
    assert asked.indices == [index for order in ORDERS for index in order]


def test_as_many_texts_are_remembered_as_there_is_room_for():
    texts = [TokenizedExample([5], [6] * length) for length in (3, 1, 2, 2)]
    size = bytes_of(TokenizedExample([5], [6]))
    # 3 + 1 + 2 + 2 units: what fits when it comes is kept, whatever did not fit before it.
    for room, again in ((3 * size, [1, 2, 3]), (3 * size - 1, [0, 2, 3]), (6 * size, [3]), (8 * size, [])):
        asked = Asked(texts)
        teacher = remembering(asked, texts, max_bytes=room)
        teacher([0, 1, 2, 3])
        teacher([0, 1, 2, 3])
        assert asked.indices == [0, 1, 2, 3, *again], room


def test_what_is_remembered_does_not_change_with_what_was_given():
    teacher = remembering(Asked(), TEXTS, max_bytes=10**9)
    first = teacher([0, 1])
    kept = first.proxy.clone()
    first.proxy.zero_()
    assert torch.equal(teacher([0, 1]).proxy, kept)


@pytest.mark.parametrize("max_bytes", [0, 4000, 10**9])
def test_a_student_learns_the_same_from_memory(max_bytes):
    bare, other = tiny_llama(1), tiny_llama(1)
    source = taught_by(tiny_llama(9))
    teach(bare, source, steps=8)
    teach(other, remembering(source, TEXTS, max_bytes=max_bytes), steps=8)
    for weight, known in zip(other.parameters(), bare.parameters(), strict=True):
        torch.testing.assert_close(weight, known, rtol=0, atol=1e-5)
