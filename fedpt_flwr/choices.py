"""How likely a model finds each of some answers after a prompt, such as the labels of a classification.

What a causal LM thinks of an answer's tokens depends on what stands before them alone. So a prompt goes through the
model once, whatever the number of answers: its key-value cache, once for each answer, then goes before all of them.
Reading every prompt again with every answer gives the same numbers up to rounding, at many times the cost; the tests do
so.

Which models there are, and what is made of their scores, is not decided here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fedpt_flwr.models import input_device

IntArray = npt.NDArray[np.int64]

_MAX_SCORES = 2**24  # that a model returns at once: 64 MiB of float32
_SIMILAR = 4  # tokens by which choices that are read at once differ at most


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """All that may be answered.

    Attributes:
        texts: The answers, at least two.
        ids: Their tokens, each with the token that ends an answer: "card" is not the beginning of "card lost".
        length: How their length counts: ``sum``, ``tokens`` or ``bytes``.
    """

    texts: Sequence[str]
    ids: Sequence[Sequence[int]]
    length: str = "sum"

    @property
    def longest(self) -> int:
        """Tokens of the longest one."""
        return max(map(len, self.ids))

    def best(self, nats: npt.NDArray[np.float64]) -> IntArray:
        """The likeliest choice after each prompt.

        Args:
            nats: Minus the logarithm of each choice's probability, ``(prompts, choices)``.

        Returns:
            Indices, ``(prompts,)``; of equally likely choices the first. -1 where no number is finite, as those of a
            model whose training diverged.
        """
        usable = self._costs(nats)
        best: IntArray = np.where(np.isinf(usable).all(axis=1), -1, usable.argmin(axis=1))
        return best

    def confidence(self, nats: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """How sure of the likeliest choice a model is: its share among all choices, by what they are chosen by.

        Args:
            nats: As for :meth:`best`.

        Returns:
            Shares in (0, 1], ``(prompts,)``; 0 where nothing is chosen.
        """
        usable = self._costs(nats)
        least = usable.min(axis=1, keepdims=True)
        logarithms = np.full_like(usable, -np.inf)
        np.subtract(least, usable, out=logarithms, where=np.isfinite(usable))
        found: npt.NDArray[np.float64] = np.isfinite(least[:, 0]) / np.maximum(np.exp(logarithms).sum(axis=1), 1.0)
        return found

    def _costs(self, nats: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """What choices are chosen by, the least first; infinite where a number is not finite."""
        if self.length == "tokens":
            nats = nats / [len(ids) for ids in self.ids]
        elif self.length == "bytes":
            nats = nats / [len(text.encode()) for text in self.texts]
        return np.where(np.isfinite(nats), nats, np.inf)

    def text_of(self, index: int) -> str:
        """The answer with this index; none for -1."""
        return self.texts[index] if index >= 0 else ""

    def tokens_read(self, prompts: Sequence[Sequence[int]]) -> int:
        """Tokens that a model reads to score all choices after these prompts: the last of each is only predicted."""
        return sum(map(len, prompts)) + len(prompts) * sum(len(ids) - 1 for ids in self.ids)


def score_choices(
    openers: Sequence[Callable[[], AbstractContextManager[PreTrainedModel]]],
    prompts: Sequence[Sequence[int]],
    choices: Sequence[Sequence[int]],
    *,
    pad_id: int,
    vocab_size: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[IntArray, Tensor, list[Tensor]]]:
    """The scores that some models give to the tokens of every choice after every prompt.

    Args:
        openers: Each gives a model, ready to be called without gradients, for as long as its context lasts.
        prompts: Token ids, each prompt with at least one.
        choices: Token ids, each choice with at least one. The longest one fits behind every prompt.
        pad_id: Token that fills up shorter choices; which one makes no difference.
        vocab_size: Only the first so many scores are tokens; None: all.
        on_progress: Called with the number of prompts done and of all prompts.

    Yields:
        For some tokens at a time: the index that each belongs to, which is that of the prompt times the number of
        choices plus that of the choice, ``(tokens,)``; the tokens, ``(tokens,)``; and for each model its scores of
        them, ``(tokens, vocab)``, all on one device.
    """
    groups: list[tuple[IntArray, Tensor, Tensor]] = []
    for number, prompt in enumerate(prompts):
        reads = []
        for opener in openers:
            with opener() as model:
                ids = torch.tensor([list(prompt)], device=input_device(model))
                reads.append(model(input_ids=ids, use_cache=True, logits_to_keep=1))
        groups = groups or list(_grouped(choices, pad_id, width=reads[0].logits.shape[-1]))
        for place, (members, targets, counted) in enumerate(groups, 1):
            scores: list[Tensor] = []
            for opener, read in zip(openers, reads, strict=True):
                with opener() as model:
                    found = _score(model, read, targets, is_last=place == len(groups))
                kept = found[counted.to(found.device)][:, :vocab_size]
                scores.append(kept.to(scores[0].device) if scores else kept)
            owners = number * len(choices) + members[counted.nonzero()[:, 0].numpy()]
            yield owners, targets[counted].to(scores[0].device), scores
        if on_progress is not None:
            on_progress(number + 1, len(prompts))


def _grouped(choices: Sequence[Sequence[int]], pad_id: int, *, width: int) -> Iterator[tuple[IntArray, Tensor, Tensor]]:
    """The choices that are read at once, of similar length because gaps cost as much as tokens.

    Yields:
        Their indices, ``(choices,)``; their tokens with gaps on the right, and where there are none,
        ``(choices, longest)`` each.
    """
    by_length: dict[int, list[int]] = {}
    for index, ids in enumerate(choices):
        by_length.setdefault(-(-len(ids) // _SIMILAR), []).append(index)
    for _, together in sorted(by_length.items()):
        longest = max(len(choices[index]) for index in together)
        step = max(1, _MAX_SCORES // (longest * width))
        for begin in range(0, len(together), step):
            members = together[begin : begin + step]
            rows = [[*choices[index], *[pad_id] * (longest - len(choices[index]))] for index in members]
            lengths = torch.tensor([[len(choices[index])] for index in members])
            yield np.asarray(members, dtype=np.int64), torch.tensor(rows), torch.arange(longest) < lengths


def _score(model: PreTrainedModel, read: Any, targets: Tensor, *, is_last: bool) -> Tensor:
    """One model's scores of some choices, ``(choices, longest, vocab)``.

    Args:
        model: The model.
        read: What it returned for the prompt.
        targets: The choices, ``(choices, longest)``.
        is_last: Whether the prompt's cache is not needed again.
    """
    first: Tensor = read.logits[:, -1:].expand(len(targets), -1, -1)  # of the first token of every choice
    if targets.shape[1] == 1:
        return first
    cache = read.cache if is_last else copy.deepcopy(read.cache)  # what is read is added to it
    cache.batch_repeat_interleave(len(targets))
    # The gaps are behind the tokens, where a causal model does not look, so no mask is needed.
    rest = model(input_ids=targets[:, :-1].to(input_device(model)), cache=cache, use_cache=True).logits
    return torch.cat([first, rest], dim=1)
