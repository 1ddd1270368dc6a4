"""The maths of proxy-tuning: scores of three models in, scores of the proxy out.

    scores = large + alpha * (tuned - untuned)

Liu et al. 2024, "Tuning language models by proxy" (arXiv:2401.08565). The plausibility mask is the one of
contrastive decoding (Li et al. 2023, arXiv:2210.15097), taken over the tuned model. Nothing here knows models, caches
or tokenizers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedpt_flwr.errors import ModelError, VocabularyMismatch


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
            one, and set the others to -inf; from 0 (keep all) to below 1. A number or a tensor, as ``alpha``.
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


def mask_implausible(scores: Tensor, tuned: Tensor, *, plausibility: float | Tensor, vocab_size: int) -> None:
    """Set the scores of all but the :func:`plausible_tokens` to -inf, in place.

    Args:
        scores: What :func:`combine_logits` returned without a mask.
        tuned: Scores of the tuned small model, the same shape, but its width may differ by padding.
        plausibility: As in :func:`combine_logits`; the number 0 leaves everything as it is.
        vocab_size: Number of ids that are real tokens.
    """
    if isinstance(plausibility, Tensor) or plausibility > 0:
        kept = plausible_tokens(tuned[..., :vocab_size], plausibility=plausibility)
        scores[..., :vocab_size].masked_fill_(~kept.to(scores.device), -math.inf)


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
        direction: Such as ``large - untuned``, the same shape.

    Returns:
        ``<change, direction> / <direction, direction>``; 0 where the direction is no direction.
    """
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
    if not _is_number(alpha) or not math.isfinite(alpha):
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
    if value.dim() == 1:
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
