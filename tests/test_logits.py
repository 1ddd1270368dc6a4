import math

import numpy as np
import pytest
import torch
from torch.distributions import Categorical
from torch.nn import functional as F
from transformers import TopPLogitsWarper

from fedpt_flwr import logits
from fedpt_flwr.errors import ModelError, VocabularyMismatch
from fedpt_flwr.logits import (
    as_int64,
    choose_next,
    combine_each,
    combine_logits,
    drift_along,
    keyed_gumbel,
    kl_divergence,
    nucleus_,
    plausible_tokens,
)

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


def test_one_strength_after_the_other_gives_the_same_bits():
    large, tuned, untuned = three(6, 50)
    large[0, 1] = large[1, 2] = tuned[1, 2] = untuned[2, 3] = tuned[3, 4] = untuned[3, 4] = -INF
    tuned[4, 5], large[5, 6] = math.nan, math.nan
    alphas = (0.25, 0.0, 1.0, -0.5)
    for scores in (large, large.half()):
        parts = (scores, tuned.to(scores.dtype), untuned.to(scores.dtype))
        copies = [part.clone() for part in parts]
        for alpha, found in zip(alphas, combine_each(*parts, alphas=alphas), strict=True):
            assert torch.equal(found.nan_to_num(1e9), combine_logits(*parts, alpha=alpha).nan_to_num(1e9))
            assert torch.equal(found.isnan(), combine_logits(*parts, alpha=alpha).isnan())
        assert all(torch.equal(part.nan_to_num(), copy.nan_to_num()) for part, copy in zip(parts, copies, strict=True))


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


def test_one_value_per_row_is_for_all_its_places_in_either_shape():
    scores = [torch.randn(2, 2, 5) for _ in range(3)]  # as many rows as places
    alphas = torch.tensor([0.0, 2.0])
    flat, deep = (combine_logits(*scores, alpha=value) for value in (alphas, alphas[:, None]))
    assert torch.equal(flat, deep)
    assert torch.equal(flat[0], scores[0][0])


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


def test_of_tokens_that_the_large_model_rules_out_none_is_the_most_plausible():
    # Of those that are left, p_tuned = .3, .15, .05: with tau = .25 the threshold is .075, not .125.
    tuned = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.98, 0.01, 0.009, 0.001]]).log()
    large = torch.tensor([[-INF, 0.0, 0.0, 0.0], [-INF, 0.0, -INF, -INF]])
    scores = combine_logits(large, tuned, torch.zeros(2, 4), alpha=1.0, plausibility=0.25)
    assert scores.isfinite().tolist() == [[False, True, True, False], [False, True, False, False]]
    assert torch.equal(scores[:, 1], tuned[:, 1])


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


def test_ids_that_are_ruled_out_have_no_part_in_the_drift():
    change, direction, _ = three(4, 6)
    expected = drift_along(change[:, [0, 1, 3, 4, 5]], direction[:, [0, 1, 3, 4, 5]])
    direction[:, 2] = -math.inf
    assert expected != 0
    assert drift_along(change, direction) == pytest.approx(expected)


def test_there_is_no_drift_without_a_direction():
    change, _, _ = three(3, 5)
    assert drift_along(change, torch.zeros(3, 5)) == 0.0
    assert drift_along(change, torch.full((3, 5), 2.5)) == 0.0  # a constant is no direction


# --- noise ---

MASK = 2**64 - 1
STRIDE, FACTORS = 0x9E3779B97F4A7C15, (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def scrambled(z):
    """The finaliser of SplitMix64 over numbers of any size, masked to 64 bits: as its paper writes it."""
    z = ((z ^ (z >> 30)) * FACTORS[0]) & MASK
    z = ((z ^ (z >> 27)) * FACTORS[1]) & MASK
    return z ^ (z >> 31)


def unscrambled(z):
    """The way back: shifts are undone from the top, factors by their inverses."""
    z ^= (z >> 31) ^ (z >> 62)
    z = (z * pow(FACTORS[1], -1, 2**64)) & MASK
    z ^= (z >> 27) ^ (z >> 54)
    z = (z * pow(FACTORS[0], -1, 2**64)) & MASK
    return z ^ (z >> 30) ^ (z >> 60)


def reference_gumbel(seed, position, token):
    key = scrambled((scrambled((seed + STRIDE) & MASK) + position * STRIDE) & MASK)
    bits = scrambled((key + token * STRIDE) & MASK)
    return -math.log(-math.log(((bits >> 12) + 0.5) / 2**52))


def noise(seeds, positions, num_ids):
    return keyed_gumbel(as_int64(seeds), as_int64(positions), num_ids)


def uniform(gumbel):
    return gumbel.double().neg().exp().neg().exp()


SEEDS = [0, 1, 7, -1, 2**31, 2**63 - 1, -(2**63), 2**64 - 1, 0x9E3779B97F4A7C15]


def test_noise_is_that_of_the_hash_written_with_numbers_of_any_size():
    positions = [0, 1, 2, 3, 1000, 10**6, 5, 0, 2**40]
    expected = [
        [reference_gumbel(seed, position, token) for token in range(40)]
        for seed, position in zip(SEEDS, positions, strict=True)
    ]
    found = noise(SEEDS, positions, 40)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-6, atol=1e-6)


def test_the_hash_is_splitmix64():
    # The first outputs for seed 1234567 in Vigna's splitmix64.c, as Rosetta Code and others list them
    state, expected = 1234567, [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [scrambled((state + n * STRIDE) & MASK) for n in (1, 2, 3)] == expected


def test_the_most_extreme_bits_give_finite_noise():
    for bits, expected in ((MASK, 53 * math.log(2)), (0, -math.log(53 * math.log(2)))):
        seed = (unscrambled(unscrambled(unscrambled(bits))) - STRIDE) & MASK
        # u = 1 - 2**-53, of which -log is 2**-53; or u = 2**-53
        assert noise([seed], [0], 1).item() == pytest.approx(expected, rel=1e-6)


def test_seeds_count_modulo_2_to_the_64():
    assert as_int64([2**64 - 1, 2**64, 2**63, -(2**63) - 1]).tolist() == [-1, 0, -(2**63), 2**63 - 1]


@pytest.mark.parametrize("num_ids", [1, 2, 7, 100, 4099])
def test_noise_of_an_id_does_not_depend_on_how_many_there_are(num_ids):
    assert torch.equal(noise(SEEDS, range(9), num_ids), noise(SEEDS, range(9), 5000)[:, :num_ids])


def test_noise_of_a_row_does_not_depend_on_the_others_and_changes_no_input():
    seeds, positions = as_int64(SEEDS), torch.arange(9)
    together = keyed_gumbel(seeds, positions, 300)
    assert torch.equal(seeds, as_int64(SEEDS))
    assert torch.equal(positions, torch.arange(9))
    for row in range(9):
        assert torch.equal(keyed_gumbel(seeds[row : row + 1], positions[row : row + 1], 300)[0], together[row])


@pytest.mark.parametrize(
    "values",
    [
        lambda: noise([3], [0], 100_000),
        lambda: noise(range(100_000), [0] * 100_000, 1),
        lambda: noise([-5] * 100_000, range(100_000), 1),
    ],
    ids=["ids", "seeds", "positions"],
)
def test_noise_is_gumbel_distributed(values):
    # Kolmogorov and Smirnov: sqrt(n) times the largest distance stays below 1.95 with probability 0.999
    found = uniform(values()).flatten().sort().values
    steps = torch.arange(1, len(found) + 1, dtype=torch.float64) / len(found)
    distance = torch.maximum((steps - found).abs(), (steps - 1 / len(found) - found).abs()).max()
    assert distance * len(found) ** 0.5 < 1.95


@pytest.mark.parametrize(
    ("other_seed", "other_position", "other_id"),
    [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, -1, 0), (-1, 1, 0), (2, -1, 0), (0, 1, -1), (1, 0, -1), (2**32, 0, 0)],
)
def test_noise_of_neighbours_is_independent(other_seed, other_position, other_id):
    def at(seed, position, first):
        seeds = [base + seed for base in range(100, 140) for _ in range(10)]
        positions = [base + position for _ in range(40) for base in range(10, 20)]
        return uniform(noise(seeds, positions, 301)[:, first : first + 300]).flatten()

    cells = (at(0, 0, max(-other_id, 0)) * 8).long() * 8 + (at(other_seed, other_position, max(other_id, 0)) * 8).long()
    assert chi_square(torch.bincount(cells, minlength=64), torch.full((64,), 1 / 64)) < limit(63)


def test_no_two_of_many_seeds_and_positions_share_their_noise():
    seeds, positions = torch.cartesian_prod(torch.arange(-200, 200), torch.arange(200)).T
    found = keyed_gumbel(seeds, positions, 3)
    assert len({tuple(row) for row in found.tolist()}) == len(found)


# --- nucleus ---


def chi_square(counts, probabilities):
    expected = probabilities.double() / probabilities.double().sum() * counts.sum()
    assert (counts[expected == 0] == 0).all()
    assert (expected[expected > 0] > 5).all()  # fewer would not be distributed like a chi-square
    return ((counts - expected) ** 2 / expected)[expected > 0].sum().item()


def limit(freedom):
    return freedom + 4 * (2 * freedom) ** 0.5


def warped(scores, top_p):
    return torch.cat([TopPLogitsWarper(p)(None, row[None]) for row, p in zip(scores, top_p, strict=True)])


@pytest.mark.parametrize("scale", [0.01, 1.0, 5.0, 100.0])
def test_nucleus_is_that_of_transformers(scale):
    generator = torch.Generator().manual_seed(0)
    for ids in (1, 2, 17, 3000):
        scores = torch.randn(40, ids, generator=generator) * scale
        top_p = torch.rand(40, generator=generator, dtype=torch.float64)
        found = scores.clone()
        nucleus_(found, top_p)
        assert torch.equal(found, warped(scores, top_p.tolist()))
        assert found.isfinite().any(1).all()


@pytest.mark.parametrize("ids", [2, 3, 4, 5, 7, 10, 100, 2000])
def test_nucleus_cuts_where_transformers_does_when_the_mass_is_met_exactly(ids):
    # equal probabilities: the sums are multiples of 1 / ids, but for rounding
    top_p = [part / ids for part in range(ids)] + [0.1, 0.3, 0.7, 0.9]
    scores = torch.zeros(len(top_p), ids)
    found = scores.clone()
    nucleus_(found, torch.tensor(top_p, dtype=torch.float64))
    assert torch.equal(found, warped(scores, top_p))


def test_nucleus_treats_ids_that_are_ruled_out_and_equals_as_transformers_does():
    scores = torch.randint(0, 9, (60, 200), generator=torch.Generator().manual_seed(1)).float()
    scores[:30, ::3] = -INF
    top_p = torch.linspace(0, 0.999, 60, dtype=torch.float64)
    found = scores.clone()
    nucleus_(found, top_p)
    assert torch.equal(found, warped(scores, top_p.tolist()))


def test_hand_computed_nucleus():
    # .5, .3 and .15 make .95; .5 and .3 make .8
    scores = torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log().repeat(5, 1)
    nucleus_(scores, torch.tensor([0.9, 0.7, 0.4, 0.0, 1.0], dtype=torch.float64))
    assert scores.isfinite().int().tolist() == [[1, 1, 0, 1], [0, 1, 0, 1], [0, 1, 0, 0], [0, 1, 0, 0], [1, 1, 1, 1]]


def test_a_nucleus_of_everything_leaves_even_the_least_likely():
    scores = torch.tensor([[0.0, -200.0, -INF]])  # e**-200 is 0 in float32
    before = scores.clone()
    nucleus_(scores, torch.tensor([1.0]))
    assert torch.equal(scores, before)


# --- choice ---


def settings(rows, *, temperature=1.0, top_p=1.0, seeds=0, positions=0):
    every = {"temperature": temperature, "top_p": top_p, "seeds": seeds, "positions": positions}
    return {name: list(value) if hasattr(value, "__iter__") else [value] * rows for name, value in every.items()}


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.7, 1.0), (1.0, 0.8), (0.7, 0.9)])
@pytest.mark.parametrize("what", ["seeds", "positions"])
def test_choices_follow_the_softmax(temperature, top_p, what):
    scores, _, _ = three(12, seed=3, scale=1.5)
    expected = (scores / temperature)[None]
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    rows = scores.expand(20_000, 12)
    drawn = choose_next(rows, **settings(20_000, temperature=temperature, top_p=top_p, **{what: range(20_000)}))
    counts = torch.bincount(drawn, minlength=12)
    probabilities = expected[0].softmax(-1)
    kept = probabilities > 1e-3  # the others are too few to compare
    assert chi_square(counts[kept], probabilities[kept]) < limit(int(kept.sum()) - 1)
    assert (counts[probabilities == 0] == 0).all()


def test_a_choice_is_the_best_of_warmed_scores_and_noise():
    scores, _, _ = three(5, 30, scale=0.5)
    seeds, positions = [5, -1, 2**64 - 1, 0, 9], [0, 3, 3, 1, 7]
    drawn = choose_next(scores, **settings(5, temperature=0.5, seeds=seeds, positions=positions))
    expected = (scores / 0.5 + noise(seeds, positions, 30)).argmax(-1)
    assert torch.equal(drawn, expected)
    assert drawn.dtype == torch.int64
    assert not torch.equal(drawn, scores.argmax(-1))  # so the noise did decide


def test_rows_at_temperature_zero_take_the_best_token():
    scores, _, _ = three(200, 30, scale=0.1)
    temperature = [0.0, 1.0] * 100
    drawn = choose_next(scores, **settings(200, temperature=temperature, top_p=0.9, seeds=range(200)))
    best = scores.argmax(-1)
    assert torch.equal(drawn[::2], best[::2])
    assert (drawn[1::2] != best[1::2]).sum() > 50
    assert torch.equal(choose_next(scores, **settings(200, temperature=0.0, seeds=range(200))), best)


def test_a_choice_does_not_depend_on_the_other_rows():
    scores, _, _ = three(40, 500, scale=2.0)
    generator = torch.Generator().manual_seed(4)
    of_rows = {
        "temperature": [(0.0, 0.7, 1.0, 2.0)[row % 4] for row in range(40)],
        "top_p": [(1.0, 0.9, 0.5)[row % 3] for row in range(40)],
        "seeds": torch.randint(-(2**63), 2**63 - 1, (40,), generator=generator).tolist(),
        "positions": list(range(40)),
    }
    together = choose_next(scores, **of_rows)
    for order in (range(39, -1, -1), range(1, 40, 3), *([row] for row in range(40))):
        some = {name: [values[row] for row in order] for name, values in of_rows.items()}
        assert choose_next(scores[list(order)], **some).tolist() == together[list(order)].tolist()


def test_choosing_changes_no_scores():
    scores, _, _ = three(4, 20)
    before = scores.clone()
    choose_next(scores, **settings(4, top_p=0.5))
    choose_next(scores, **settings(4, temperature=[0.0, 1.0, 0.0, 1.0], top_p=0.5))
    assert torch.equal(scores, before)


def test_ids_that_are_ruled_out_are_never_chosen():
    scores = torch.full((500, 40), -INF)
    scores[:, 7] = scores[:, 20] = 0.0
    assert set(choose_next(scores, **settings(500, seeds=range(500))).tolist()) == {7, 20}
    assert set(choose_next(scores, **settings(500, top_p=0.99, seeds=range(500))).tolist()) == {7, 20}


def test_a_vanishing_temperature_takes_the_best_token():
    # 2 / 1e-39 and 1 / 1e-39 are both infinite in float32
    scores = torch.tensor([[1.0, 2.0, -1.0]])
    for temperature in (1e-300, 1e-39, 1e-31, 1e-29, 1e-10):
        assert choose_next(scores, **settings(1, temperature=temperature)).tolist() == [1]


def test_work_that_no_row_asks_for_is_left_out(monkeypatch):
    def never(*_):
        raise AssertionError("not needed")

    scores, _, _ = three(3, 9)
    monkeypatch.setattr(logits, "nucleus_", never)
    # a greedy row needs none, whatever its top_p
    choose_next(scores, **settings(3, temperature=[0.0, 1.0, 1.0], top_p=[0.5, 1.0, 1.0]))
    monkeypatch.setattr(logits, "keyed_gumbel", never)
    choose_next(scores, **settings(3, temperature=0.0, top_p=0.5))


@pytest.mark.parametrize("name", ["temperature", "top_p", "seeds", "positions"])
def test_settings_that_are_not_one_per_row_are_refused(name):
    of_rows = settings(3) | {name: [1]}
    with pytest.raises(ModelError, match=r"per row, got \[1, 3\]; the scores have 3 rows"):
        choose_next(torch.zeros(3, 5), **of_rows)
