"""Speculative proxy decoding: the tuned model drafts, one pass of the large and one of the untuned model verify.

The tuned model is part of the proxy anyway. It writes some tokens ahead; then the two others read them all in one pass
each, which costs little more than a pass over one token, and what the proxy would have chosen at every place is known.
Drafts are kept up to the first one that the proxy would not have chosen, and the proxy's own choice comes behind them,
so that the text is that of plain proxy decoding, whoever drafts. Sampling is no exception: with noise that depends on
seed and position only (``logits.keyed_gumbel``) the proxy's choice is a function of the text before it, and the drafter
guesses well because it uses the same noise.

Rows advance unequally. Each has its own length in the caches, and a refused draft is taken back by moving that.

What is decoded under which rules is the caller's business: three step functions and their caches are all that is known
here.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from fedpt_flwr.drafting import Acceptance, DraftLength, StepCosts
from fedpt_flwr.ragged import RaggedCache, Stepper

PARTS = ("large", "tuned", "untuned")
"""The three models of a proxy, in the order of its formula."""


class Round(NamedTuple):
    """What the models say about the tokens that follow those given to them."""

    drafts: Tensor
    """``(rows, k)``, int64, on the CPU."""
    large: Tensor
    """``(rows, k + 1, width)``: scores of the large model after the last token and after each draft."""
    tuned: Tensor
    untuned: Tensor


class Drafter(Protocol):
    """Guesses the next token."""

    def __call__(self, tuned: Tensor, drafts: Tensor) -> Tensor:
        """Guess from the tuned model's scores.

        Args:
            tuned: ``(rows, width)``, in the model's dtype.
            drafts: ``(rows, n)``, int64, the ``n`` guesses before this one.

        Returns:
            Ids, ``(rows,)``, int64.
        """
        ...


class Rules(Protocol):
    """How texts are written. Rows are numbered as the prompts were, and come and go in no particular order."""

    def begin(self, rows: Sequence[int], num_new: int) -> None:
        """Say whose tokens come next, and how many places of each are decided upon."""
        ...

    def draft(self, tuned: Tensor, drafts: Tensor) -> Tensor:
        """Guess the next token of each row; see :class:`Drafter`."""
        ...

    def choose(self, asked: Round) -> Tensor:
        """What the proxy chooses behind the last token and behind each draft.

        Returns:
            ``(rows, k + 1)``, int64; whatever stands behind the first choice that is not the draft is not looked at.
        """
        ...

    def take(self, row: int, ids: Sequence[int]) -> bool:
        """Put tokens at the end of a text, as many of them as it still wants; whether it is complete."""
        ...

    def room(self, row: int) -> int:
        """Tokens that a text can still get; it gets one, even if there is no room."""
        ...


class Statistics:
    """What speculation has done.

    Attributes:
        num_rounds: Rounds.
        num_tokens: Tokens that came out.
        num_drafted: Drafts.
        num_accepted: Those that were right.
    """

    def __init__(self) -> None:
        self.num_rounds = 0
        self.num_tokens = 0
        self.num_drafted = 0
        self.num_accepted = 0


def ask(
    steps: Mapping[str, Stepper],
    caches: Mapping[str, RaggedCache],
    last_ids: Tensor,
    num_drafts: int,
    drafter: Drafter,
    *,
    is_rough: bool = False,
) -> Round:
    """Draft, and let all three models score: every cache grows by ``num_drafts + 1`` tokens per row.

    Args:
        steps: The step function of each model, by name.
        caches: The cache of each, with the same rows; they hold all tokens but the last.
        last_ids: ``(rows, 1)``, int64: the last token of each row.
        num_drafts: Tokens to draft for each row; may be 0.
        drafter: Guesses tokens.
        is_rough: See :func:`draft`.
    """
    if not num_drafts:
        begun = [steps[name].launch(caches[name], last_ids, keep=0) for name in PARTS]
        return Round(torch.empty((len(last_ids), 0), dtype=torch.int64), *(wait() for wait in begun))
    drafts, tuned = draft(steps["tuned"], caches["tuned"], last_ids, num_drafts, drafter, is_rough=is_rough)
    ids = torch.cat([last_ids.to(drafts.device), drafts], 1)
    begun = [steps[name].launch(caches[name], ids, keep=0) for name in ("large", "untuned")]
    large, untuned = (wait() for wait in begun)
    return Round(drafts.cpu(), large, tuned, untuned)


def draft(
    step: Stepper, cache: RaggedCache, last_ids: Tensor, num_drafts: int, drafter: Drafter, *, is_rough: bool
) -> tuple[Tensor, Tensor]:
    """Have the tuned model draft, and score what it has drafted: its cache grows by ``num_drafts + 1`` tokens per row.

    Args:
        step: Its step function.
        cache: Its cache.
        last_ids: ``(rows, 1)``, int64: the last token of each row, which the cache does not hold.
        num_drafts: Tokens to draft for each row, at least 1.
        drafter: Guesses tokens.
        is_rough: Whether guesses are of scores that are only nearly right (:attr:`Stepper.rough`, if there is one). All
            tokens are then read again, in one pass, and what is returned and remembered is right.

    Returns:
        The drafts, ``(rows, k)``, int64; the model's scores after the last token and after each draft,
        ``(rows, k + 1, width)``. Both are on its device.
    """
    rough = step.rough if is_rough else None
    lengths, scores = list(cache.lengths), []
    ids, drafts = last_ids, last_ids[:, :0]
    for _ in range(num_drafts):
        scores.append((rough or step)(cache, ids)[:, -1])
        drafts = drafts.to(scores[-1].device)
        ids = drafter(scores[-1], drafts)[:, None]
        drafts = torch.cat([drafts, ids], 1)
    if rough is None:
        return drafts, torch.stack([*scores, step(cache, ids)[:, -1]], 1)
    cache.cut(lengths)
    return drafts, step(cache, torch.cat([last_ids.to(drafts.device), drafts], 1), keep=0)


def is_spoilt(*scores: Tensor) -> bool:
    """Whether a model said NaN at some place of ``(rows, places, width)``.

    Attention gives such a place no weight in those before it, but 0 * NaN is NaN: a draft that would have been refused
    can spoil what is said about the tokens before it.
    """
    return any(bool(part[..., 0].isnan().any()) for part in scores)


def num_accepted(drafts: Tensor, choices: Tensor) -> list[int]:
    """How many drafts of each row are right before the first that is wrong.

    Args:
        drafts: ``(rows, k)``, int64.
        choices: ``(rows, k + 1)``, int64.
    """
    right: list[int] = (drafts == choices[:, :-1]).long().cumprod(1).sum(1).tolist()
    return right


class Speculation:
    """Decodes with the three models of a proxy; keeps what it has learnt about them.

    Args:
        steps: A step function for each of :data:`PARTS`.
        context: The longest text in tokens that all models take; None if none of them says.

    Attributes:
        steps: These.
        length: Chooses how many tokens to draft.
        statistics: Of all that was decoded.
    """

    def __init__(self, steps: Mapping[str, Stepper], context: int | None = None) -> None:
        self.steps = steps
        self._context = context
        self.length = DraftLength(StepCosts(steps))
        self.statistics = Statistics()

    def decode(
        self, prompts: Sequence[Sequence[int]], rules: Rules, *, draft_tokens: int | Literal["auto"] = "auto"
    ) -> None:
        """Write a text behind every prompt, until the rules call it complete.

        Args:
            prompts: Token ids, at least one each.
            rules: How.
            draft_tokens: Tokens to draft in every round; ``auto`` drafts as many as pay.
        """
        rows = list(range(len(prompts)))
        caches = {name: step.read_prompts(prompts) for name, step in self.steps.items()}
        last_ids = [prompts[row][-1] for row in rows]
        texts = [Acceptance(self.length.prior) for _ in rows]
        while rows:
            lengths = list(caches["large"].lengths)
            longest = max(rules.room(row) for row in rows) - 1
            if self._context is not None:  # a row near its end takes part in a pass over as many tokens as the others
                # No text fills the context: a remote model is asked for one token more, which must have room.
                longest = min(longest, self._context - 2 - max(lengths))
            longest = max(0, longest)
            num_drafts = self.length.choose(texts, longest) if draft_tokens == "auto" else min(draft_tokens, longest)
            begun = time.perf_counter()
            rules.begin(rows, num_drafts + 1)
            is_rough = self.length.costs.drafts_roughly(len(rows), num_drafts)
            asked = ask(self.steps, caches, torch.tensor(last_ids)[:, None], num_drafts, rules.draft, is_rough=is_rough)
            if draft_tokens == "auto":
                self.length.costs.observe(len(rows), num_drafts, time.perf_counter() - begun)
            if num_drafts and is_spoilt(asked.large, asked.tuned, asked.untuned):
                for cache in caches.values():
                    cache.cut(lengths, clear=True)
                num_drafts = 0
                rules.begin(rows, 1)
                asked = ask(self.steps, caches, torch.tensor(last_ids)[:, None], 0, rules.draft)
            choices = rules.choose(asked).cpu()
            accepted = num_accepted(asked.drafts, choices)
            if num_drafts:
                for text, number in zip(texts, accepted, strict=True):
                    text.observe(number, num_drafts)
            elif draft_tokens == "auto":  # a guess costs nothing that is not there: look whether drafting would pay now
                guesses = rules.draft(asked.tuned[:, 0], asked.drafts).cpu()
                for text, right in zip(texts, (guesses == choices[:, 0]).tolist(), strict=True):
                    text.observe(int(right), 1)
            new = [ids[: number + 1] for ids, number in zip(choices.tolist(), accepted, strict=True)]
            for cache in caches.values():
                cache.cut([length + len(ids) for length, ids in zip(lengths, new, strict=True)])
            last_ids = [ids[-1] for ids in new]
            self._count(num_drafts, new)
            complete = [index for index, row in enumerate(rows) if rules.take(row, new[index])]
            for index in reversed(complete):
                self.length.remember(texts[index])
                for cache in caches.values():
                    cache.remove(index)
                for kept in (rows, last_ids, texts):
                    _remove(kept, index)

    def _count(self, num_drafts: int, new: Sequence[Sequence[int]]) -> None:
        self.statistics.num_rounds += 1
        self.statistics.num_tokens += sum(map(len, new))
        self.statistics.num_drafted += num_drafts * len(new)
        self.statistics.num_accepted += sum(len(ids) - 1 for ids in new)


def _remove(values: list[Any], index: int) -> None:
    """Take a value away; the last one gets its place, as in a cache."""
    last = values.pop()
    if index < len(values):
        values[index] = last
