"""What answers cost models, for many answers to one prompt at once.

The candidates of a canary share their prompt, and most of them their beginning: a thousand numbers of three digits have
a hundred beginnings. So an item is a prompt, a beginning, and all tokens that may end it, and a model reads it once. A
plain record is an item with one end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from fedpt_flwr.data import TokenizedExample

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

MOST_NATS = 1000.0
"""What an answer costs at most: a mask makes some impossible, and an infinite loss has no difference to another."""

Batches = Iterable[tuple[IntArray, Tensor, list[Tensor]]]
"""As :func:`~fedpt_flwr.losses.model_scores` yields them."""

Combine = Callable[[Sequence[Tensor]], Mapping[str, Tensor]]
"""From the scores of the models that were read to those of what is attacked, by name."""


@dataclass(frozen=True, slots=True)
class Item:
    """Answers to one prompt that differ in their last token.

    Attributes:
        read: The prompt with one of the answers.
        ends: The last tokens.
    """

    read: TokenizedExample
    ends: tuple[int, ...]


def items_of(prompt_ids: list[int], answers: Sequence[Sequence[int]]) -> tuple[list[Item], list[tuple[int, int]]]:
    """Answers to one prompt as few items.

    Args:
        prompt_ids: The prompt's tokens.
        answers: Each answer's tokens, at least one.

    Returns:
        The items, and for each answer the place of its item and of its end there.
    """
    ends: dict[tuple[int, ...], dict[int, int]] = {}
    for answer in answers:
        last = ends.setdefault(tuple(answer[:-1]), {})
        last.setdefault(answer[-1], len(last))
    place = {beginning: number for number, beginning in enumerate(ends)}
    items = [
        Item(TokenizedExample(prompt_ids, [*beginning, next(iter(last))]), tuple(last))
        for beginning, last in ends.items()
    ]
    where = [(place[tuple(answer[:-1])], ends[tuple(answer[:-1])][answer[-1]]) for answer in answers]
    return items, where


def read_losses(items: Sequence[Item], batches: Batches, combine: Combine) -> dict[str, list[FloatArray]]:
    """What each answer costs each of what is attacked.

    Args:
        items: The answers.
        batches: The scores of ``[item.read for item in items]``; those of one item come in the order of its tokens.
        combine: What is attacked.

    Returns:
        By name, for each item the nats of its answers, ``(ends,)``, at most :data:`MOST_NATS`, and as
        many where a model gives no number. An item of which no token is predicted costs nothing.
    """
    left = np.asarray([len(item.read.answer_ids) - (not item.read.prompt_ids) for item in items])
    begun: dict[str, FloatArray] = {}
    found: dict[str, list[FloatArray]] = {}
    for index, targets, scores in batches:
        starts = np.flatnonzero(np.diff(index, prepend=-1))  # where the tokens of another item begin
        lengths = np.diff(starts, append=len(index))
        nth = np.arange(len(index)) - np.repeat(starts, lengths)
        is_last = nth + 1 == left[index]
        left[index[starts]] -= lengths
        rows = np.flatnonzero(is_last)
        for name, combined in combine(scores).items():
            logs = combined.float().log_softmax(-1)
            if name not in begun:
                begun[name] = np.zeros(len(items))
                found[name] = [np.zeros(len(item.ends)) for item in items]
            nats = -logs.gather(-1, targets[:, None])[:, 0].double().cpu().numpy()
            np.add.at(begun[name], index[~is_last], nats[~is_last])
            for row in rows:
                ends = logs[row][list(items[index[row]].ends)]
                found[name][index[row]] = -ends.double().cpu().numpy()
    return {
        name: [np.fmin(nats + before, MOST_NATS) for nats, before in zip(each, begun[name], strict=True)]
        for name, each in found.items()
    }
