import math

import numpy as np
import pytest
import torch
from torch.distributions import Categorical
from torch.nn import functional as F

from fedpt_flwr.errors import ModelError, VocabularyMismatch
from fedpt_flwr.logits import combine_logits, drift_along, kl_divergence, plausible_tokens

INF = math.inf


def three(*shape, seed=0, scale=5.0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator) * scale for _ in range(3)]


def test_hand_computed_scores():
    # 2 + 0.5 * (3 - 1) = 3;  0 + 0.5 * (-1 - 1) = -1
    scores = combine_logits(
        torch.tensor([[2.0, 0.0]]), torch.tensor([[3.0, -1.0]]), torch.tensor([[1.0, 1.0]]), alpha=0.5
    )
    assert scores.tolist() == [[3.0, -1.0]]


def test_combined_probabilities_follow_the_ratio_of_small_models():
    # p = large * tuned / untuned, then normalised: (.5*.8/.5, .5*.2/.5) = (.8, .2)
    large, tuned, untuned = (torch.tensor([p]).log() for p in ([0.5, 0.5], [0.8, 0.2], [0.5, 0.5]))
    torch.testing.assert_close(combine_logits(large, tuned, untuned, alpha=1.0).softmax(-1), torch.tensor([[0.8, 0.2]]))


def test_alpha_zero_is_large_bit_for_bit():
    large, tuned, untuned = three(4, 7, 50)
    assert torch.equal(combine_logits(large, tuned, untuned, alpha=0.0), large)
    assert torch.equal(combine_logits(large, tuned, untuned, alpha=torch.zeros(4)), large)


@pytest.mark.parametrize("alpha", [0.0, torch.zeros(2)], ids=["number", "per row"])
@pytest.mark.parametrize("bad", [INF, -INF, math.nan])
def test_alpha_zero_is_large_even_where_the_small_models_are_not_finite(alpha, bad):
    large, tuned, untuned = three(2, 5)
    tuned[0, 1] = untuned[1, 2] = bad
    assert torch.equal(combine_logits(large, tuned, untuned, alpha=alpha), large)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_untouched_small_model_leaves_large_exactly_as_it_was(dtype):
    large, tuned, _ = (scores.to(dtype) for scores in three(4, 50))
    scores = combine_logits(large, tuned, tuned.clone(), alpha=0.7)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, large.float())


def test_large_equal_to_untuned_gives_tuned_with_alpha_one():
    large, tuned, _ = three(4, 50)
    torch.testing.assert_close(combine_logits(large, tuned, large.clone(), alpha=1.0), tuned)


def test_inputs_are_neither_changed_nor_returned():
    inputs = three(2, 9)
    copies = [scores.clone() for scores in inputs]
    for alpha in (0.0, 1.0):
        combine_logits(*inputs, alpha=alpha, plausibility=0.3).zero_()
    assert all(torch.equal(before, after) for before, after in zip(copies, inputs, strict=True))


def test_each_row_may_have_its_own_alpha_and_plausibility():
    large, tuned, untuned = three(3, 4, 20)
    alphas, thresholds = [0.0, 0.5, 2.0], [0.5, 0.0, 0.1]
    for shape in ((3,), (3, 1, 1)):
        scores = combine_logits(
            large,
            tuned,
            untuned,
            alpha=torch.tensor(alphas).view(shape),
            plausibility=torch.tensor(thresholds).view(shape),
        )
        for row, (alpha, tau) in enumerate(zip(alphas, thresholds, strict=True)):
            alone = combine_logits(large[row], tuned[row], untuned[row], alpha=alpha, plausibility=tau)
            assert torch.equal(scores[row], alone)


@pytest.mark.parametrize("shape", [(4,), (1, 3), (2, 1, 1, 1)])
def test_per_row_values_of_another_shape_are_refused(shape):
    # (1, 3) would silently broadcast over a vocabulary of 3
    with pytest.raises(ModelError, match="one value, or one per row"):
        combine_logits(*three(3, 2, 3), alpha=torch.ones(shape))


def test_mask_keeps_exactly_the_plausible_tokens():
    # p_tuned = .5, .3, .15, .05; with tau = .25 the threshold is .125
    tuned = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    scores = combine_logits(torch.zeros(1, 4), tuned, torch.zeros(1, 4), alpha=1.0, plausibility=0.25)
    assert scores.isfinite().tolist() == [[True, True, True, False]]
    assert scores[0, 3] == -INF
    assert torch.equal(scores[0, :3], tuned[0, :3])


def test_the_most_plausible_token_is_always_kept():
    _, tuned, _ = three(100, 50, scale=50.0)
    kept = plausible_tokens(tuned, plausibility=0.999)
    assert kept.gather(1, tuned.argmax(-1, keepdim=True)).all()


def test_mask_applies_at_alpha_zero_too():
    scores = combine_logits(torch.zeros(1, 2), torch.tensor([[5.0, 0.0]]), torch.zeros(1, 2), alpha=0, plausibility=0.5)
    assert scores.tolist() == [[0.0, -INF]]


def test_padded_vocabularies_are_combined_over_the_real_tokens():
    (large, _, _), (_, tuned, _), (_, _, untuned) = three(2, 12), three(2, 10), three(2, 16)
    scores = combine_logits(large, tuned, untuned, alpha=1.0, plausibility=0.0, vocab_size=9)
    assert scores.shape == (2, 12)  # as wide as the large model
    assert torch.equal(scores[:, :9], combine_logits(large[:, :9], tuned[:, :9], untuned[:, :9], alpha=1.0))
    assert (scores[:, 9:] == -INF).all()


def test_padding_cannot_make_a_real_token_implausible():
    tuned = torch.tensor([[1.0, 0.9, 99.0]])
    scores = combine_logits(torch.zeros(1, 3), tuned, torch.zeros(1, 3), alpha=1.0, plausibility=0.5, vocab_size=2)
    assert scores.isfinite().tolist() == [[True, True, False]]


def test_ruled_out_ids_never_become_nan():
    # id 0: both small models rule it out; 1: only large does; 2: all do; 3: tuned does; 4: large and untuned do
    large = torch.tensor([[1.0, -INF, -INF, 1.0, -INF]])
    tuned = torch.tensor([[-INF, 2.0, -INF, -INF, 2.0]])
    untuned = torch.tensor([[-INF, 1.0, -INF, 1.0, -INF]])
    assert combine_logits(large, tuned, untuned, alpha=1.0).tolist() == [[1.0, -INF, -INF, -INF, -INF]]


def test_nan_of_a_broken_model_is_not_hidden():
    large, tuned, untuned = three(1, 4)
    tuned[0, 2] = math.nan
    assert combine_logits(large, tuned, untuned, alpha=1.0).isnan().tolist() == [[False, False, True, False]]


def test_vocabulary_mismatch_names_all_three_sizes():
    with pytest.raises(VocabularyMismatch, match=r"'large': 12, 'tuned': 10, 'untuned': 11.*vocab_size"):
        combine_logits(torch.zeros(1, 12), torch.zeros(1, 10), torch.zeros(1, 11), alpha=1.0)


def test_more_real_tokens_than_a_model_scores_is_a_mismatch():
    with pytest.raises(VocabularyMismatch, match=r"is 11, got .*'large': 12, 'tuned': 10, 'untuned': 12"):
        combine_logits(torch.zeros(1, 12), torch.zeros(1, 10), torch.zeros(1, 12), alpha=1.0, vocab_size=11)


def test_scores_of_different_positions_are_refused():
    with pytest.raises(ModelError, match="same positions"):
        combine_logits(torch.zeros(2, 3, 8), torch.zeros(2, 3, 8), torch.zeros(2, 1, 8), alpha=1.0)


@pytest.mark.parametrize("alpha", [math.nan, INF, -INF, "auto", None, True])
def test_alpha_must_be_a_finite_number(alpha):
    with pytest.raises(ModelError, match="alpha must be a finite number"):
        combine_logits(*three(1, 3), alpha=alpha)


@pytest.mark.parametrize("plausibility", [-0.1, 1.0, 2, math.nan, "0.1", None])
def test_plausibility_must_be_in_its_range(plausibility):
    with pytest.raises(ModelError, match="plausibility must be at least 0 and below 1"):
        combine_logits(*three(1, 3), alpha=1.0, plausibility=plausibility)


def test_gradients_reach_the_small_models():
    large, tuned, untuned = three(2, 6)
    tuned.requires_grad_()
    untuned.requires_grad_()
    combine_logits(large, tuned, untuned, alpha=0.5).sum().backward()
    assert torch.equal(tuned.grad, torch.full_like(tuned, 0.5))
    assert torch.equal(untuned.grad, torch.full_like(untuned, -0.5))


# --- divergence ---


def test_a_distribution_does_not_diverge_from_itself():
    scores, _, _ = three(4, 7, 50)
    assert torch.equal(kl_divergence(scores, scores.clone()), torch.zeros(4, 7))
    assert torch.equal(kl_divergence(scores, scores.clone(), temperature=3.0), torch.zeros(4, 7))


def test_hand_computed_divergence():
    # p = (1/2, 1/2), q = (1/4, 3/4): 1/2 ln 2 + 1/2 ln 2/3
    target, scores = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    assert kl_divergence(target, scores).item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), rel=1e-6)


def test_hand_computed_divergence_at_temperature_two():
    # sqrt of (4/5, 1/5) normalised is (2/3, 1/3), of (1/2, 1/2) itself: 4 (2/3 ln 4/3 + 1/3 ln 2/3)
    target, scores = torch.tensor([0.8, 0.2]).log(), torch.tensor([0.5, 0.5]).log()
    expected = 4 * (2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3))
    assert kl_divergence(target, scores, temperature=2.0).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_divergence_is_that_of_torch_times_the_squared_temperature(temperature):
    target, scores, _ = three(3, 5, 40)
    found = kl_divergence(target, scores, temperature=temperature)
    p, q = (Categorical(logits=part.double() / temperature) for part in (target, scores))
    for expected in (torch.distributions.kl_divergence(p, q), F.kl_div(q.logits, p.probs, reduction="none").sum(-1)):
        torch.testing.assert_close(found, (temperature**2 * expected).float(), rtol=1e-4, atol=1e-5)


def test_ids_that_the_target_rules_out_weigh_nothing_and_send_back_no_nan():
    target, scores, _ = three(6, 20)
    target[:, ::3] = -INF
    scores.requires_grad_()
    found = kl_divergence(target, scores)
    p, q = target.softmax(-1), scores.detach().softmax(-1)
    expected = torch.special.xlogy(p, p) - torch.special.xlogy(p, q)  # 0 log 0 is 0
    torch.testing.assert_close(found.detach(), expected.sum(-1), rtol=1e-4, atol=1e-5)
    found.sum().backward()
    # the gradient of a divergence is q - p, on the ids that are ruled out too
    torch.testing.assert_close(scores.grad, q - p, rtol=1e-4, atol=1e-6)


def test_an_id_that_both_rule_out_weighs_nothing():
    target, scores, _ = three(2, 6)
    target[:, 2] = scores[:, 2] = -INF
    kept = [0, 1, 3, 4, 5]
    torch.testing.assert_close(kl_divergence(target, scores), kl_divergence(target[:, kept], scores[:, kept]))


def test_a_token_that_only_the_learner_rules_out_is_infinitely_wrong():
    assert kl_divergence(torch.zeros(2), torch.tensor([0.0, -INF])).item() == INF


def test_constants_at_a_position_do_not_count_in_a_divergence():
    target, scores, other = three(4, 9)
    moved = kl_divergence(target + other[:, :1], scores + other[:, 1:2])
    torch.testing.assert_close(moved, kl_divergence(target, scores), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_divergence_is_computed_in_float32(dtype):
    target, scores = (part.to(dtype) for part in three(4, 9)[:2])
    found = kl_divergence(target, scores)
    assert found.dtype == torch.float32
    assert torch.equal(found, kl_divergence(target.float(), scores.float()))


# --- drift ---


@pytest.mark.parametrize("coefficient", [-0.5, 0.0, 0.037, 1.0])
def test_drift_is_the_coefficient_of_the_direction_whatever_constants_are_added(coefficient):
    direction, offsets, other = three(6, 30)
    change = coefficient * direction + offsets[:, :1]
    assert drift_along(change, direction + other[:, :1]) == pytest.approx(coefficient, abs=1e-6)


def test_drift_counts_what_goes_along_and_not_what_goes_across():
    # centred, the direction is (1, -1, 0); (1, 1, -2) is across it
    direction, across = torch.tensor([[1.0, -1.0, 0.0]]), torch.tensor([[1.0, 1.0, -2.0]])
    assert drift_along(across, direction) == 0
    assert drift_along(0.25 * direction + 7 * across, direction) == pytest.approx(0.25)


def test_drift_is_the_least_squares_fit_over_all_positions_together():
    change, direction, _ = three(8, 12)
    centred = [(part - part.mean(-1, keepdim=True)).double().numpy().ravel() for part in (change, direction)]
    (expected,), *_ = np.linalg.lstsq(centred[1][:, None], centred[0], rcond=None)
    assert drift_along(change, direction) == pytest.approx(expected)


def test_there_is_no_drift_without_a_direction():
    change, _, _ = three(3, 5)
    assert drift_along(change, torch.zeros(3, 5)) == 0.0
    assert drift_along(change, torch.full((3, 5), 2.5)) == 0.0  # a constant is no direction
