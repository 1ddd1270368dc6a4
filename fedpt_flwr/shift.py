"""How strong the shift should be: alpha and the plausibility mask, chosen on validation items.

An answer is written greedily without a mistake exactly if every one of its tokens is the best one after the tokens
before it. So one forward pass of the three models over the right answers tells, for every alpha and mask at once,
which items would be answered right; nothing has to be written. Where the likeliest of some choices is the answer, the
scores of all of them tell it for every alpha; a mask has no part in that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedpt_flwr.choices import Choices
from fedpt_flwr.data import TokenizedExample
from fedpt_flwr.logits import combine_each, plausible_tokens
from fedpt_flwr.losses import AnswerLosses, GreedyMistakes, choice_quality, choice_scores, model_scores
from fedpt_flwr.proxy import ProxyModel

ALPHAS = (0.25, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.25, 1.5)
"""Strengths that are tried."""

MASKS = (0.0, 0.001, 0.003, 0.01, 0.03, 0.1)
"""Masks that are tried with each."""

BY_EXACT_MATCH, BY_LOSS, BY_CONFIG = "exact_match", "loss", "config"


@dataclass(frozen=True, slots=True, kw_only=True)
class ShiftPoint:
    """What one alpha and mask give on some items.

    Attributes:
        alpha: Strength of the shift.
        plausibility: Mask threshold; 0: no mask.
        exact_match: Share of the items that are answered right, greedily.
        loss: Nats per answer token, without the mask whatever ``plausibility`` is; None if it is not finite, or not
            known because a remote large model shows some tokens only.
    """

    alpha: float
    plausibility: float
    exact_match: float
    loss: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Shift:
    """An alpha and mask, and how they came about.

    Attributes:
        alpha: Strength of the shift.
        plausibility: Mask threshold.
        chosen_by: ``exact_match``, ``loss`` or ``config``.
        items: Validation items that the curve is of.
        curve: What all that were tried give.
    """

    alpha: float
    plausibility: float
    chosen_by: str
    items: int
    curve: Sequence[ShiftPoint]

    def to_json(self) -> dict[str, Any]:
        """For ``results.json``; a loss that is not finite is left out."""
        curve = [{key: value for key, value in asdict(point).items() if value is not None} for point in self.curve]
        return {
            "alpha": self.alpha,
            "plausibility": self.plausibility,
            "chosen_by": self.chosen_by,
            "items": self.items,
            "curve": curve,
        }

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Shift:
        """The inverse of :meth:`to_json`."""
        curve = [ShiftPoint(**{"loss": None, **point}) for point in row["curve"]]
        return cls(curve=curve, **{key: row[key] for key in ("alpha", "plausibility", "chosen_by", "items")})


def choose_shift(curve: Sequence[ShiftPoint], *, items: int) -> Shift:
    """The best point of a curve: of equally good ones the larger alpha, then the smaller mask.

    By exact match; where no point has any, by loss, which says nothing about a mask, so there is none then.

    Args:
        curve: At least one point.
        items: Number of items that it is of.
    """
    best = max(curve, key=lambda point: (point.exact_match, point.alpha, -point.plausibility))
    by = BY_EXACT_MATCH
    if best.exact_match == 0:
        with_loss = [point for point in curve if point.loss is not None] or [best]
        best = min(with_loss, key=lambda point: (point.loss or 0.0, -point.alpha, point.plausibility))
        by = BY_LOSS
    return Shift(alpha=best.alpha, plausibility=best.plausibility, chosen_by=by, items=items, curve=tuple(curve))


def shift_curve(
    proxy: ProxyModel,
    examples: Sequence[TokenizedExample],
    *,
    pad_id: int,
    max_new_tokens: int,
    end_ids: Sequence[int] = (),
    batch_size: int = 32,
    alphas: Sequence[float] = ALPHAS,
    masks: Sequence[float] = MASKS,
) -> list[ShiftPoint]:
    """Exact match and loss of the proxy on some items for every alpha and mask, from one pass of its models.

    Args:
        proxy: Its own alpha and mask play no part.
        examples: The items; an answer counts as written if it is, token by token, the greedy one.
        pad_id: Token that fills up shorter items.
        max_new_tokens: Longest answer that would be written; longer ones count as wrong.
        end_ids: Tokens that end an answer.
        batch_size: Items in a forward pass at most.
        alphas: Strengths to try.
        masks: Thresholds to try with each.
    """
    losses = {alpha: AnswerLosses.none_yet(len(examples)) for alpha in alphas}
    mistakes = {
        (alpha, mask): GreedyMistakes(examples, end_ids=end_ids, max_new_tokens=max_new_tokens)
        for alpha in alphas
        for mask in masks
    }
    for items, targets, (large, tuned, untuned) in model_scores(proxy, examples, pad_id=pad_id, batch_size=batch_size):
        if proxy.hides_tokens and proxy.large.fills(samples=False):  # as in greedy decoding
            large = proxy.fill(large, untuned)
        possible = tuned.to(large.device).masked_fill(large == -torch.inf, -torch.inf)  # as in `mask_implausible`
        ruled_out = {mask: ~plausible_tokens(possible, plausibility=mask) for mask in masks}
        for alpha, scores in zip(alphas, combine_each(large, tuned, untuned, alphas=alphas), strict=True):
            losses[alpha].add_scores(items, scores, targets)
            for mask in masks:
                mistakes[alpha, mask].add(items, scores.masked_fill(ruled_out[mask], -torch.inf).argmax(-1), targets)
    return [
        ShiftPoint(
            alpha=alpha,
            plausibility=mask,
            exact_match=mistakes[alpha, mask].exact_match,
            loss=losses[alpha].mean if np.isfinite(losses[alpha].mean) and not proxy.hides_tokens else None,
        )
        for alpha in alphas
        for mask in masks
    ]


def choice_curve(
    proxy: ProxyModel,
    prompts: Sequence[Sequence[int]],
    choices: Choices,
    right: npt.NDArray[np.int64],
    *,
    pad_id: int,
    alphas: Sequence[float] = ALPHAS,
) -> list[ShiftPoint]:
    """Exact match and loss of the proxy for every alpha where answers are chosen, from one pass of its models.

    Args:
        proxy: Its own alpha and mask play no part.
        prompts: Token ids.
        choices: All that may be answered.
        right: Index of the right choice for each prompt, ``(prompts,)``.
        pad_id: Token that fills up shorter choices.
        alphas: Strengths to try.
    """
    losses = {alpha: AnswerLosses.none_yet(len(prompts) * len(choices.texts)) for alpha in alphas}
    for owners, targets, (large, tuned, untuned) in choice_scores(proxy, prompts, choices, pad_id=pad_id):
        for alpha, scores in zip(alphas, combine_each(large, tuned, untuned, alphas=alphas), strict=True):
            losses[alpha].add_scores(owners, scores, targets)
    curve = []
    for alpha in alphas:
        exact_match, loss = choice_quality(losses[alpha], choices, right)
        finite = loss if np.isfinite(loss) and not proxy.hides_tokens else None
        curve.append(ShiftPoint(alpha=alpha, plausibility=0.0, exact_match=exact_match, loss=finite))
    return curve
