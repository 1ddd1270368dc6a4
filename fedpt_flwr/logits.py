"""The maths of proxy-tuning: scores of three models in, scores of the proxy out.

    scores = large + alpha * (tuned - untuned)

Liu et al. 2024, "Tuning language models by proxy" (arXiv:2401.08565). The plausibility mask is the one of
contrastive decoding (Li et al. 2023, arXiv:2210.15097), taken over the tuned model.

Tokens are drawn by the Gumbel-max trick: the best of scores plus noise is a draw from their softmax. The noise is a
hash of (seed, position, id), so a seed gives the same text whoever else is in the batch, and whenever it is drawn.

Nothing here knows models, caches or tokenizers.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from fedpt_flwr.errors import ModelError, VocabularyMismatch

# Below it, scores divided by the temperature could overflow float32.
_COLDEST = 1e-30
_LARGEST = sys.float_info.max
# SplitMix64: 2**64 divided by the golden ratio, and the factors of the finaliser, as int64 writes them.
_STRIDE = 0x9E3779B97F4A7C15 - 2**64
_FACTORS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


def combine_logits(
    large: Tensor,
    tuned: Tensor,
    untuned: Tensor,
    *,
    alpha: float | Tensor,
    plausibility: float | Tensor = 0.0,
    vocab_size: int | None = None,
) -> Tensor:
    """Steer a frozen large model with what tuning changed in a small one.

    Computed in float32 as ``large + alpha * (tuned - untuned)``, in this order, so that

    - ``alpha`` 0 gives ``large`` exactly, whatever the small models say;
    - ``tuned`` equal to ``untuned`` gives ``large`` exactly;
    - ``large`` equal to ``untuned`` with ``alpha`` 1 gives ``tuned`` up to float32 rounding.

    An id that ``large`` rules out (-inf) stays ruled out, and one that both small models rule out is not shifted; no
    difference of infinities becomes NaN.

    Args:
        large: Scores of the large model, ``(batch, ..., width)``, any float dtype. It is not changed.
        tuned: Scores of the tuned small model, the same shape, but its width may differ by padding.
        untuned: Scores of the small model before tuning, like ``tuned``.
        alpha: Strength of the shift: a number, or a float tensor with one value per row, ``(batch,)`` or any shape that
            broadcasts as ``(batch, ..., 1)``.
        plausibility: Keep only the tokens that the tuned model finds at least this many times as probable as its best
            one of those that ``large`` does not rule out, and set the others to -inf; from 0 (keep all) to below 1. A
            number or a tensor, as ``alpha``.
        vocab_size: Number of ids that are real tokens, where models pad their vocabulary. Later ids become -inf. None
            means that all ids are real.

    Returns:
        Unnormalised scores, ``(batch, ..., width)`` with the width of ``large``, float32, on the device of ``large``.
        Always new memory.

    Raises:
        VocabularyMismatch: The widths differ and ``vocab_size`` is None, or one of them is below ``vocab_size``.
        ModelError: ``alpha`` or ``plausibility`` is out of range, or the three score different positions.
    """
    check_alpha(alpha)
    check_plausibility(plausibility)
    vocab_size = common_vocab_size(large.shape[-1], tuned.shape[-1], untuned.shape[-1], vocab_size=vocab_size)
    if not large.shape[:-1] == tuned.shape[:-1] == untuned.shape[:-1]:
        raise ModelError(
            "the three models must score the same positions",
            value={"large": tuple(large.shape), "tuned": tuple(tuned.shape), "untuned": tuple(untuned.shape)},
        )

    scores = large.to(torch.float32, copy=True)
    scores[..., vocab_size:] = -math.inf
    if isinstance(alpha, Tensor) or alpha != 0:
        real = scores[..., :vocab_size]
        real += _shift(real, tuned[..., :vocab_size], untuned[..., :vocab_size], alpha)
    mask_implausible(scores, tuned, plausibility=plausibility, vocab_size=vocab_size)
    return scores


def combine_each(large: Tensor, tuned: Tensor, untuned: Tensor, *, alphas: Iterable[float]) -> Iterator[Tensor]:
    """What :func:`combine_logits` gives for one strength after the other, bit for bit, at a fraction of its cost.

    Args:
        large: Scores of the large model, ``(..., vocab)``, any float dtype, all of them real tokens. Not changed.
        tuned: Scores of the tuned small model, the same shape.
        untuned: Scores of the small model before tuning, the same shape.
        alphas: Strengths of the shift, each a finite number.

    Yields:
        Scores for each strength, float32, **in memory that the next one takes**.
    """
    large = large.float()
    difference = _shift(large, tuned, untuned, 1.0)
    shift, scores = torch.empty_like(large), torch.empty_like(large)
    for alpha in alphas:
        check_alpha(alpha)
        if alpha == 0:  # 0 * inf is NaN
            yield scores.copy_(large)
        else:
            yield torch.add(large, torch.mul(difference, alpha, out=shift), out=scores)


def mask_implausible(scores: Tensor, tuned: Tensor, *, plausibility: float | Tensor, vocab_size: int) -> None:
    """Set the scores of all but the :func:`plausible_tokens` to -inf, in place.

    Tokens that are ruled out already do not count: the tuned model's favourite may be one that a large model behind an
    API does not show, or one that a translated one lacks, and beside it nothing might be plausible.

    Args:
        scores: What :func:`combine_logits` returned without a mask.
        tuned: Scores of the tuned small model, the same shape, but its width may differ by padding.
        plausibility: As in :func:`combine_logits`; the number 0 leaves everything as it is.
        vocab_size: Number of ids that are real tokens.
    """
    if isinstance(plausibility, Tensor) or plausibility > 0:
        real = scores[..., :vocab_size]
        possible = tuned[..., :vocab_size].to(real.device).masked_fill(real == -math.inf, -math.inf)
        real.masked_fill_(~plausible_tokens(possible, plausibility=plausibility), -math.inf)


def fill_hidden(large: Tensor, untuned: Tensor, *, vocab_size: int) -> Tensor:
    """Share out the probability that a large model leaves to the tokens which it does not show, as the untuned would.

    Args:
        large: Log-probabilities, ``(batch, ..., width)``, -inf where a token is not shown.
        untuned: Scores of the small model before tuning, the same shape up to padding.
        vocab_size: Number of ids that are real tokens.

    Returns:
        Log-probabilities, float32, new memory; what was shown is as it was, and rows that hide nothing too.
    """
    filled = large.to(torch.float32, copy=True)
    real = filled[..., :vocab_size]
    hidden = real == -math.inf
    guess = untuned[..., :vocab_size].to(real.device, torch.float32).masked_fill(~hidden, -math.inf)
    shares = guess - guess.logsumexp(-1, keepdim=True)
    real[hidden] = (shares + _hidden_mass(real))[hidden]
    return filled


def bound_hidden(large: Tensor, tuned: Tensor, untuned: Tensor, *, alpha: float, vocab_size: int) -> Tensor:
    """The worst that the hidden part of a large model's distribution can do to the loss of tokens that are shown.

    All of its probability on the hidden token that the shift favours most makes the sum of the shifted probabilities as
    large as it can be, and so every shown token's as small.

    Args:
        large: Log-probabilities, ``(batch, ..., width)``, -inf where a token is not shown.
        tuned: Scores of the tuned small model, the same shape up to padding.
        untuned: Scores of the small model before tuning.
        alpha: Strength of the shift.
        vocab_size: Number of ids that are real tokens.

    Returns:
        Log-probabilities, float32, new memory; the scores that :func:`combine_logits` makes of them give an upper bound
        of the loss of every token that is shown.
    """
    bound = large.to(torch.float32, copy=True)
    real = bound[..., :vocab_size]
    hidden = real == -math.inf
    log_ratio = [part[..., :vocab_size].to(real.device, torch.float32).log_softmax(-1) for part in (tuned, untuned)]
    shift = (alpha * (log_ratio[0] - log_ratio[1])).masked_fill(~hidden, -math.inf)
    worst = shift.argmax(-1, keepdim=True)
    mass = _hidden_mass(real).masked_fill(~hidden.any(-1, keepdim=True), -math.inf)
    real.scatter_(-1, worst, torch.where(hidden.gather(-1, worst), mass, real.gather(-1, worst)))
    return bound


def _hidden_mass(real: Tensor) -> Tensor:
    """Logarithm of what the shown probabilities leave, ``(batch, ..., 1)``."""
    return (1 - real.double().exp().sum(-1, keepdim=True)).clamp_min(0).log().float()


def plausible_tokens(tuned: Tensor, *, plausibility: float | Tensor) -> Tensor:
    """The tokens whose probability is at least ``plausibility`` times that of the tuned model's best token.

    Args:
        tuned: Scores of the tuned small model over the real tokens, ``(batch, ..., vocab)``, any float dtype.
        plausibility: From 0 (all tokens) to below 1: a number, or a tensor with one value per row.

    Returns:
        ``(batch, ..., vocab)``, bool, True where a token may be chosen. The best token always may.
    """
    scores = tuned.to(torch.float32)
    best = scores.amax(dim=-1, keepdim=True)
    ratio = torch.as_tensor(_per_row(plausibility, scores), dtype=torch.float32, device=scores.device)
    return scores >= best + ratio.log()


def choose_next(
    scores: Tensor,
    *,
    temperature: Sequence[float],
    top_p: Sequence[float],
    seeds: Sequence[int],
    positions: Sequence[int],
) -> Tensor:
    """Choose the next token of each row: the best one, or a draw by :func:`keyed_gumbel`.

    A row's token depends on nothing but that row. The settings come from the host, so that a batch which samples
    nothing costs no more than its argmax, and none waits for the device.

    Args:
        scores: Of the next token, ``(rows, ids)``, float32. They are not changed.
        temperature: Divides the scores of each row before the softmax; 0 takes the best token.
        top_p: Draw from the smallest set of tokens with this probability, see :func:`nucleus_`; 1 draws from all.
        seeds: Of each row's noise, any whole numbers; they count modulo 2**64.
        positions: Index of the token to be chosen among the row's new ones, from 0.

    Returns:
        Ids, ``(rows,)``, int64, on the device of ``scores``.

    Raises:
        ModelError: The settings are not one per row.
    """
    lengths = {len(temperature), len(top_p), len(seeds), len(positions)}
    if lengths != {scores.shape[0]}:
        raise ModelError(
            "the next tokens need one temperature, top_p, seed and position per row",
            value=sorted(lengths),
            remedy=f"the scores have {scores.shape[0]} rows",
        )
    drawn = [row for row, value in enumerate(temperature) if value >= _COLDEST]
    if not drawn:
        return scores.argmax(-1)
    device = scores.device
    rows = None if len(drawn) == scores.shape[0] else torch.tensor(drawn).to(device, non_blocking=True)
    divisor = torch.tensor([temperature[row] for row in drawn]).to(device, torch.float32, non_blocking=True)
    warmed = (scores if rows is None else scores.index_select(0, rows)) / divisor[:, None]
    if any(top_p[row] < 1 for row in drawn):
        nucleus_(warmed, torch.tensor([top_p[row] for row in drawn], dtype=torch.float64))
    keys = torch.stack([as_int64(part[row] for row in drawn) for part in (seeds, positions)])
    keys = keys.to(device, non_blocking=True)
    warmed += keyed_gumbel(keys[0], keys[1], warmed.shape[-1])
    best = warmed.argmax(-1)
    return best if rows is None else scores.argmax(-1).index_copy_(0, rows, best)


def nucleus_(scores: Tensor, top_p: Tensor) -> None:
    """Set the scores of all but the likeliest tokens that together reach ``top_p`` to -inf, in place.

    The same tokens as those of ``TopPLogitsWarper`` of transformers, which takes one ``top_p`` for all rows.

    Args:
        scores: Unnormalised, ``(rows, ids)``, float32.
        top_p: ``(rows,)``, best float64 and on the CPU; a row at 1 or above stays as it is. The likeliest token always
            remains.
    """
    # Rounded as transformers does: in float64 up to the difference, then to the dtype of the scores. Sorted by the same
    # call too: it is not stable, so that another one could cut elsewhere among equals.
    refused = (1 - top_p.double()).to(scores.dtype).to(scores.device, non_blocking=True)
    untouched = (top_p >= 1).to(scores.device, non_blocking=True)
    ordered, ids = torch.sort(scores, descending=False)
    outside = ordered.softmax(-1).cumsum(-1) <= refused[:, None]
    outside &= ~untouched[:, None]
    outside[:, -1] = False
    scores.masked_fill_(outside.scatter(1, ids, outside), -math.inf)


def keyed_gumbel(seeds: Tensor, positions: Tensor, num_ids: int) -> Tensor:
    """Standard Gumbel noise that depends on nothing but the seed, the position and the id.

    Each value is a hash of the three, the finaliser of SplitMix64 (Steele et al. 2014, "Fast splittable pseudorandom
    number generators") applied once per part: neither the batch, nor the device, nor ``num_ids`` has a share in it.

    Args:
        seeds: ``(rows,)``, int64.
        positions: ``(rows,)``, int64, on the same device.
        num_ids: How many ids to make noise for, from 0.

    Returns:
        ``(rows, num_ids)``, float32, finite, on the device of ``seeds``.
    """
    if seeds.device.type == "mps":  # which has no float64
        return keyed_gumbel(seeds.cpu(), positions.cpu(), num_ids).to(seeds.device)
    # A hash between seed and position: were they added as they are, (seed + 1, position) could be (seed, position + 1).
    keys = _scramble_(_scramble_(seeds + _STRIDE) + positions * _STRIDE)
    bits = _scramble_(keys[:, None] + torch.arange(num_ids, device=seeds.device) * _STRIDE)
    # 52 bits and a half: the most that float64 holds exactly on both sides, so that u is neither 0 nor 1.
    u = _shift_right(bits, 12).double().add_(0.5).mul_(2.0**-52)
    return u.log_().neg_().log_().neg_().float()


def as_int64(values: Iterable[int]) -> Tensor:
    """Whole numbers of any size as a tensor, modulo 2**64."""
    return torch.tensor([(int(value) + 2**63) % 2**64 - 2**63 for value in values], dtype=torch.int64)


def _scramble_(bits: Tensor) -> Tensor:
    """The finaliser of SplitMix64, in place; int64 wraps around as uint64 does."""
    bits ^= _shift_right(bits, 30)
    bits *= _FACTORS[0]
    bits ^= _shift_right(bits, 27)
    bits *= _FACTORS[1]
    bits ^= _shift_right(bits, 31)
    return bits


def _shift_right(bits: Tensor, by: int) -> Tensor:
    """A shift that brings in zeros; that of int64 brings in the sign."""
    return (bits >> by).bitwise_and_((1 << (64 - by)) - 1)


def kl_divergence(target: Tensor, scores: Tensor, *, temperature: float = 1.0) -> Tensor:
    """KL divergence of a model from a target, position by position, over the whole vocabulary.

    Args:
        target: Scores of the distribution to be learnt, ``(..., vocab)``, any float dtype; ids at -inf have no part.
        scores: Scores of the model that learns, the same shape, finite wherever ``target`` is.
        temperature: Divides both before the softmax; the result is multiplied by its square, so that gradients keep
            their size (Hinton et al. 2015, arXiv:1503.02531).

    Returns:
        Nats, ``(...)``, float32: ``temperature**2 * sum p (log p - log q)``; 0 where both are equal.
    """
    wanted = (target.float() / temperature).log_softmax(-1)
    found = (scores.float() / temperature).log_softmax(-1)
    # An id that the target rules out weighs nothing: without the mask, 0 * inf would be NaN.
    terms = wanted.exp() * (wanted - found).masked_fill(wanted == -math.inf, 0.0)
    return temperature**2 * terms.sum(-1)


def drift_along(change: Tensor, direction: Tensor) -> float:
    """How far a change of scores goes along a direction: the least-squares coefficient.

    Scores mean the same when a constant is added at a position, so both are taken from their means there.

    Args:
        change: What happened to a model's scores, ``(positions, vocab)``.
        direction: Such as ``large - untuned``, the same shape; ids that are ruled out in it (-inf) do not count.

    Returns:
        ``<change, direction> / <direction, direction>``; 0 where the direction is no direction.
    """
    counted = direction.isfinite().all(0)
    if not counted.all():
        change, direction = change[:, counted], direction[:, counted]
    change, direction = (part.double() - part.double().mean(-1, keepdim=True) for part in (change, direction))
    length = (direction * direction).sum()
    return float((change * direction).sum() / length) if length > 0 else 0.0


def common_vocab_size(large: int, tuned: int, untuned: int, *, vocab_size: int | None = None) -> int:
    """The number of ids over which three models can be combined.

    Args:
        large: Width of the large model's scores, padding included.
        tuned: Width of the tuned model's scores.
        untuned: Width of the untuned model's scores.
        vocab_size: Number of real tokens, or None if there is no padding.

    Raises:
        VocabularyMismatch: The widths differ and ``vocab_size`` is None, or one of them is below ``vocab_size``.
    """
    sizes = {"large": large, "tuned": tuned, "untuned": untuned}
    if vocab_size is None:
        if len(set(sizes.values())) > 1:
            raise VocabularyMismatch(
                "large, tuned and untuned must score the same number of ids",
                value=sizes,
                remedy="if they share one tokenizer and differ only by padding, pass vocab_size=len(tokenizer)",
            )
        return large
    if not 0 < vocab_size <= min(sizes.values()):
        raise VocabularyMismatch(
            f"vocab_size must be between 1 and the smallest model's number of ids, but is {vocab_size}",
            value=sizes,
            remedy="use the tokenizer that belongs to all three models",
        )
    return vocab_size


def check_alpha(alpha: float | Tensor) -> None:
    """Refuse a strength that is not a finite number. Tensors are trusted: looking would stall an accelerator.

    Raises:
        ModelError: It is not.
    """
    if isinstance(alpha, Tensor):
        return
    if not _is_number(alpha) or not -_LARGEST <= alpha <= _LARGEST:  # math.isfinite fails at integers of 309 digits
        raise ModelError(
            "alpha must be a finite number", value=alpha, remedy="1.0 is the published strength, 0 turns it off"
        )


def check_plausibility(plausibility: float | Tensor) -> None:
    """Refuse a mask threshold outside [0, 1). Tensors are trusted, as in :func:`check_alpha`.

    Raises:
        ModelError: It is outside.
    """
    if isinstance(plausibility, Tensor):
        return
    if not _is_number(plausibility) or not 0 <= plausibility < 1:
        raise ModelError(
            "plausibility must be at least 0 and below 1",
            value=plausibility,
            remedy="0 turns the mask off, 0.1 is a usual value",
        )


def _shift(large: Tensor, tuned: Tensor, untuned: Tensor, alpha: float | Tensor) -> Tensor:
    """``alpha * (tuned - untuned)``, float32, and 0 where infinities would make it meaningless."""
    tuned = tuned.to(large.device, torch.float32)
    untuned = untuned.to(large.device, torch.float32)
    unmoved = (tuned == untuned) | (large == -math.inf)
    strength = _per_row(alpha, large)
    if isinstance(strength, Tensor):
        strength = strength.to(large.device, torch.float32)
        unmoved |= strength == 0  # 0 * inf is NaN
    return (tuned - untuned).mul_(strength).masked_fill_(unmoved, 0.0)


def _per_row(value: float | Tensor, like: Tensor) -> float | Tensor:
    """Shape one value per row so that it broadcasts over ``like``, ``(batch, ..., vocab)``."""
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    if value.dim() == 1 or value.shape[1:] == (1,):
        value = value.view(-1, *[1] * (like.dim() - 1))
    if value.shape[-1] != 1 or value.dim() > like.dim() or value.shape[0] not in (1, like.shape[0]):
        raise ModelError(
            "alpha and plausibility must hold one value, or one per row",
            value=tuple(value.shape),
            remedy=f"the scores have {like.shape[0]} rows",
        )
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
