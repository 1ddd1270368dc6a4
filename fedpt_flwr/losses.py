"""What models make of given answers, teacher-forced: scores of their tokens, losses, the likeliest of several answers.

Losses are in nats per answer token, and always computed without the plausibility mask, which gives some right answers
the probability 0.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fedpt_flwr.choices import Choices, score_choices
from fedpt_flwr.data import IGNORED_LABEL, TokenizedExample, collate
from fedpt_flwr.logits import bound_hidden, combine_logits
from fedpt_flwr.models import hides_tokens, input_device
from fedpt_flwr.proxy import ProxyModel
from fedpt_flwr.uncertainty import FloatArray, IntArray

MODELS = ("large", "untuned", "tuned", "proxy")
"""The rows that a :class:`ProxyModel` gives by itself."""

_MAX_SCORES = 2**26  # scores that one model may return at once: 256 MiB of float32

_MAX_SCORES_IN_FLOAT32 = 2**24  # scores that are turned into losses at once: 64 MiB, and a few copies of it


@dataclass(frozen=True, slots=True)
class AnswerLosses:
    """What the right answers cost a model, item by item.

    Attributes:
        nats: Sum over the answer's tokens of minus the natural logarithm of their probability, ``(items,)``.
        tokens: Number of those tokens, ``(items,)``. The first token of an item without prompt has nothing to be
            predicted from and is not counted.
        is_bound: Whether ``nats`` are an upper bound, because a remote large model does not show all it knows.
    """

    nats: FloatArray
    tokens: IntArray
    is_bound: bool = False

    @classmethod
    def none_yet(cls, items: int, *, is_bound: bool = False) -> AnswerLosses:
        """Zeros, to add to."""
        return cls(np.zeros(items), np.zeros(items, dtype=np.int64), is_bound)

    def add_scores(self, items: IntArray, scores: Tensor, targets: Tensor, *, are_logprobs: bool = False) -> None:
        """Adds the losses of some tokens to the items that they belong to, in place.

        Args:
            items: Index of each token's item, ``(tokens,)``.
            scores: A model's scores, ``(tokens, vocab)``.
            targets: The right tokens, ``(tokens,)``.
            are_logprobs: The scores are log-probabilities, of which some may be missing (-inf): those lose the item.
        """
        np.add.at(self.nats, items, _nats(scores, targets, are_logprobs=are_logprobs))
        np.add.at(self.tokens, items, 1)

    @property
    def mean(self) -> float:
        """Nats per answer token over all items; NaN if there are no tokens."""
        total = int(self.tokens.sum())
        return float(self.nats.sum()) / total if total else math.nan


def answer_losses(
    model: PreTrainedModel,
    examples: Sequence[TokenizedExample],
    *,
    pad_id: int,
    batch_size: int = 32,
    vocab_size: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> AnswerLosses:
    """Teacher-forced loss of one model on every item.

    Args:
        model: Any causal LM; a :class:`ProxyModel` is scored as it decodes, with its mask if it has one.
        examples: The items.
        pad_id: Token that fills up shorter items; which one makes no difference.
        batch_size: Items in a forward pass at most; fewer where the vocabulary is large.
        vocab_size: Only the first so many scores are tokens; None: all that the model returns.
        on_progress: Called with the number of items done and of all items.

    Returns:
        Losses in the order of ``examples``.
    """
    losses = AnswerLosses.none_yet(len(examples))
    batches = _forward(
        [lambda: contextlib.nullcontext(model)],
        examples,
        pad_id=pad_id,
        batch_size=batch_size,
        vocab_size=vocab_size,
        on_progress=on_progress,
    )
    for items, targets, (scores,) in batches:
        losses.add_scores(items, scores, targets, are_logprobs=_shows_a_part(model))
    return losses


class GreedyMistakes:
    """Which items a model would not answer right, found from its best tokens after the right ones.

    An answer would be written greedily without a mistake exactly if each of its tokens is the best one after those
    before it. Writing stops at any token that ends an answer, and after ``max_new_tokens``: an answer of just so many
    needs no end.

    Args:
        examples: The items.
        end_ids: Tokens that end an answer; with none, an item's last token is one like the others.
        max_new_tokens: Longest answer that would be written; longer ones are wrong. None: no limit.
    """

    def __init__(
        self, examples: Sequence[TokenizedExample], *, end_ids: Sequence[int] = (), max_new_tokens: int | None = None
    ) -> None:
        limit = 2**31 if max_new_tokens is None else max_new_tokens
        lengths = [len(item.answer_ids) - (item.answer_ids[-1] in end_ids) for item in examples]
        self._ends = torch.tensor(list(end_ids), dtype=torch.int64)
        self._open_ended = torch.tensor([length == limit for length in lengths])
        self.wrong = np.asarray([length > limit for length in lengths])
        """Bool, ``(items,)``."""

    def add(self, items: IntArray, best: Tensor, targets: Tensor) -> None:
        """Notes some tokens.

        Args:
            items: Index of each token's item, ``(tokens,)``.
            best: The model's best tokens, ``(tokens,)``.
            targets: The right ones, ``(tokens,)``.
        """
        best, targets = best.cpu(), targets.cpu()
        is_end = torch.isin(targets, self._ends)
        right = (best == targets) | (
            is_end & (torch.isin(best, self._ends) | self._open_ended[torch.from_numpy(items)])
        )
        self.wrong[items[~right.numpy()]] = True

    @property
    def exact_match(self) -> float:
        """Share of the items that would be answered right."""
        return float(np.mean(~self.wrong))


def greedy_quality(
    model: PreTrainedModel,
    examples: Sequence[TokenizedExample],
    *,
    pad_id: int,
    end_ids: Sequence[int] = (),
    max_new_tokens: int | None = None,
    batch_size: int = 32,
    vocab_size: int | None = None,
) -> tuple[float, float]:
    """Exact match and loss of a plain model from one pass over the right answers; nothing is written.

    Args:
        model: Any causal LM.
        examples: The items.
        pad_id: Token that fills up shorter items.
        end_ids: See :class:`GreedyMistakes`.
        max_new_tokens: See :class:`GreedyMistakes`.
        batch_size: Items in a forward pass at most.
        vocab_size: Only the first so many scores are tokens.

    Returns:
        Share of the items that would be answered right, and nats per answer token.
    """
    losses = AnswerLosses.none_yet(len(examples))
    mistakes = GreedyMistakes(examples, end_ids=end_ids, max_new_tokens=max_new_tokens)
    for items, targets, (scores,) in _forward(
        [lambda: contextlib.nullcontext(model)],
        examples,
        pad_id=pad_id,
        batch_size=batch_size,
        vocab_size=vocab_size,
        on_progress=None,
    ):
        losses.add_scores(items, scores, targets)
        mistakes.add(items, scores.argmax(-1), targets)
    return mistakes.exact_match, losses.mean


def proxy_losses(
    proxy: ProxyModel,
    examples: Sequence[TokenizedExample],
    *,
    alpha: float,
    pad_id: int,
    batch_size: int = 32,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, AnswerLosses]:
    """Teacher-forced losses of a proxy and its parts: four rows for three forward passes.

    Args:
        proxy: Holds the large, tuned and untuned model. Its own alpha and mask are not used. All four rows are scored
            over the tokens that the proxy takes for real.
        examples: The items.
        alpha: Strength of the shift at which the proxy is scored.
        pad_id: Token that fills up shorter items; which one makes no difference.
        batch_size: Items in a forward pass at most; fewer where the vocabulary is large.
        on_progress: Called with the number of items done and of all items.

    Returns:
        Losses by the names of :data:`MODELS`, each in the order of ``examples``.
    """
    batches = model_scores(proxy, examples, pad_id=pad_id, batch_size=batch_size, on_progress=on_progress)
    return losses_of_all(proxy, batches, alpha=alpha, items=len(examples))


def losses_of_all(
    proxy: ProxyModel, batches: Iterable[tuple[IntArray, Tensor, list[Tensor]]], *, alpha: float, items: int
) -> dict[str, AnswerLosses]:
    """The losses of all four rows from the scores of three models; the proxy's may be a bound."""
    is_partial, vocab_size = hides_tokens(proxy.large), proxy.config.real_vocab_size
    losses = {name: AnswerLosses.none_yet(items, is_bound=is_partial and name == "proxy") for name in MODELS}
    for owners, targets, (large, tuned, untuned) in batches:
        losses["large"].add_scores(owners, large, targets, are_logprobs=is_partial)
        if is_partial:
            bound = bound_hidden(large, tuned, untuned, alpha=alpha, vocab_size=vocab_size)
            # A target that is not shown may have any probability down to 0.
            is_shown = large.gather(-1, targets[:, None]) > -torch.inf
            large = bound.scatter(-1, targets[:, None], bound.gather(-1, targets[:, None]).where(is_shown, -torch.inf))
        losses["tuned"].add_scores(owners, tuned, targets)
        losses["untuned"].add_scores(owners, untuned, targets)
        losses["proxy"].add_scores(owners, combine_logits(large, tuned, untuned, alpha=alpha), targets)
    return losses


def choose_answers(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    choices: Choices,
    *,
    pad_id: int,
    vocab_size: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> AnswerLosses:
    """What every choice after every prompt costs one plain model.

    Args:
        model: Any causal LM but a :class:`ProxyModel`.
        prompts: Token ids; the longest choice fits behind each.
        choices: What may be answered.
        pad_id: Token that fills up shorter choices.
        vocab_size: Only the first so many scores are tokens; None: all that the model returns.
        on_progress: Called with the number of prompts done and of all prompts.

    Returns:
        Losses of all pairs, prompt by prompt, ``(prompts * choices,)``; :func:`chosen` picks from them.
    """
    losses = AnswerLosses.none_yet(len(prompts) * len(choices.texts))
    batches = score_choices(
        [lambda: opened(lambda: contextlib.nullcontext(model))],
        prompts,
        choices.ids,
        pad_id=pad_id,
        vocab_size=vocab_size,
        on_progress=on_progress,
    )
    for owners, targets, (scores,) in batches:
        losses.add_scores(owners, scores, targets, are_logprobs=_shows_a_part(model))
    return losses


def choice_scores(
    proxy: ProxyModel,
    prompts: Sequence[Sequence[int]],
    choices: Choices,
    *,
    pad_id: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[IntArray, Tensor, list[Tensor]]]:
    """As :func:`model_scores`, of every choice after every prompt; see ``choices.score_choices`` for the indices."""
    return score_choices(
        [functools.partial(opened, opener) for opener in openers(proxy)],
        prompts,
        choices.ids,
        pad_id=pad_id,
        vocab_size=proxy.config.real_vocab_size,
        on_progress=on_progress,
    )


def chosen(losses: AnswerLosses, choices: Choices) -> IntArray:
    """The index of the likeliest choice after each prompt, ``(prompts,)``, from the losses of all pairs."""
    return choices.best(by_prompt(losses, choices))


def by_prompt(losses: AnswerLosses, choices: Choices) -> npt.NDArray[np.float64]:
    """Nats of every choice after every prompt, ``(prompts, choices)``, from the losses of all pairs."""
    return losses.nats.reshape(-1, len(choices.texts))


def choice_quality(losses: AnswerLosses, choices: Choices, right: IntArray) -> tuple[float, float]:
    """Exact match, and the loss of the right choices, from the losses of all pairs.

    Args:
        losses: Of all pairs.
        choices: What may be answered.
        right: Index of the right choice for each prompt, ``(prompts,)``.
    """
    pairs = np.arange(len(right)) * len(choices.texts) + right
    return float(np.mean(chosen(losses, choices) == right)), AnswerLosses(losses.nats[pairs], losses.tokens[pairs]).mean


def model_scores(
    proxy: ProxyModel,
    examples: Sequence[TokenizedExample],
    *,
    pad_id: int,
    batch_size: int = 32,
    on_progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[IntArray, Tensor, list[Tensor]]]:
    """The scores that large, tuned and untuned model give to the answer tokens of the items.

    Args:
        proxy: Holds the models.
        examples: The items.
        pad_id: Token that fills up shorter items; which one makes no difference.
        batch_size: Items in a forward pass at most; fewer where the vocabulary is large.
        on_progress: Called with the number of items done and of all items.

    Yields:
        For some answer tokens at a time: the index of the item that each belongs to, ``(tokens,)``; the tokens,
        ``(tokens,)``; and the scores of large, tuned and untuned over the proxy's real tokens, each
        ``(tokens, vocab)``, all on one device.
    """
    return _forward(
        openers(proxy),
        examples,
        pad_id=pad_id,
        batch_size=batch_size,
        vocab_size=proxy.config.real_vocab_size,
        on_progress=on_progress,
    )


def _shows_a_part(model: PreTrainedModel) -> bool:
    """Whether a model's scores are log-probabilities of which some are missing; a proxy has filled them in."""
    return hides_tokens(model) and not isinstance(model, ProxyModel)


def answer_scores(
    model: PreTrainedModel,
    examples: Sequence[TokenizedExample],
    *,
    pad_id: int,
    batch_size: int = 32,
    vocab_size: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[IntArray, Tensor, list[Tensor]]]:
    """As :func:`model_scores`, of one model: the scores that it gives to the answer tokens of the items.

    Args:
        model: Any causal LM.
        examples: The items.
        pad_id: Token that fills up shorter items.
        batch_size: Items in a forward pass at most; fewer where the vocabulary is large.
        vocab_size: Only the first so many scores are tokens; None: all that the model returns.
        on_progress: Called with the number of items done and of all items.

    Yields:
        For some answer tokens at a time, those of an item in their order: the item's index, ``(tokens,)``; the tokens,
        ``(tokens,)``; and the scores, a list of one ``(tokens, vocab)``.
    """
    return _forward(
        [lambda: contextlib.nullcontext(model)],
        examples,
        pad_id=pad_id,
        batch_size=batch_size,
        vocab_size=vocab_size,
        on_progress=on_progress,
    )


Opener = Callable[[], contextlib.AbstractContextManager[PreTrainedModel]]
"""Gives a model for as long as its context lasts: the untuned one may be the tuned one without its adapter."""


def openers(proxy: ProxyModel) -> list[Opener]:
    """Large, tuned and untuned."""
    return [
        lambda: contextlib.nullcontext(proxy.large),
        lambda: contextlib.nullcontext(proxy.tuned),
        lambda: untuned_of(proxy),
    ]


@contextlib.contextmanager
def untuned_of(proxy: ProxyModel) -> Iterator[PreTrainedModel]:
    """The small model before tuning, for as long as the context lasts: it may be the tuned one without its adapter."""
    if proxy.untuned is not None:
        yield proxy.untuned
    else:
        with proxy.without_adapter():
            yield proxy.tuned


def _forward(
    openers: Sequence[Opener],
    examples: Sequence[TokenizedExample],
    *,
    pad_id: int,
    batch_size: int,
    vocab_size: int | None,
    on_progress: Callable[[int, int], None] | None,
) -> Iterator[tuple[IntArray, Tensor, list[Tensor]]]:
    """Runs every model on every item, and keeps the scores of answer tokens alone.

    Yields:
        For some answer tokens at a time: the index of the item that each belongs to, ``(tokens,)``; the tokens,
        ``(tokens,)``; and for each model its scores of them, ``(tokens, vocab)``, all on one device.
    """
    with opened(openers[0]) as model:
        width = int(model.config.get_text_config(decoder=True).vocab_size)
    done = 0
    for batch in _plan_batches(examples, batch_size=batch_size, max_positions=max(1, _MAX_SCORES // width)):
        padded = collate([examples[index] for index in batch], pad_id, side="right")
        # Position t predicts token t + 1: the last token is only predicted, and what comes before the first answer
        # predicts nothing that counts.
        start = min(_first_scored(examples[index]) for index in batch)
        targets = padded["labels"][:, start:]
        counted = targets != IGNORED_LABEL
        scores: list[Tensor] = []
        for opener in openers:
            with opened(opener) as model:
                last = _last_scores(model, padded, positions=targets.shape[1])
            scores.append(last[counted.to(last.device)][:, :vocab_size].to(scores[0].device if scores else last.device))
        items = np.asarray(batch, dtype=np.int64)[counted.nonzero()[:, 0].numpy()]
        token_ids = targets[counted].to(scores[0].device)
        step = max(1, _MAX_SCORES_IN_FLOAT32 // scores[0].shape[-1])
        for first in range(0, len(items), step):
            rows = slice(first, first + step)
            yield items[rows], token_ids[rows], [score[rows] for score in scores]
        done += len(batch)
        if on_progress is not None:
            on_progress(done, len(examples))


def _plan_batches(examples: Sequence[TokenizedExample], *, batch_size: int, max_positions: int) -> Iterator[list[int]]:
    """Deals items of similar length into batches, the longest first, so that memory runs out at once or never.

    Args:
        examples: The items; those without a token to score are left out.
        batch_size: Items in a batch at most.
        max_positions: Scored positions of a batch at most, padding included, unless one item alone has more.
    """
    order = sorted(
        (index for index, example in enumerate(examples) if _length(example) > _first_scored(example)),
        key=lambda index: (_length(examples[index]), len(examples[index].prompt_ids)),
        reverse=True,
    )
    batch: list[int] = []
    start = 0
    for index in order:
        begins = _first_scored(examples[index])
        if batch:
            positions = (len(batch) + 1) * (_length(examples[batch[0]]) - min(start, begins))
            if len(batch) == batch_size or positions > max_positions:
                yield batch
                batch = []
        start = min(start, begins) if batch else begins
        batch.append(index)
    if batch:
        yield batch


def _length(example: TokenizedExample) -> int:
    return len(example.prompt_ids) + len(example.answer_ids)


def _first_scored(example: TokenizedExample) -> int:
    return max(1, len(example.prompt_ids))


def _last_scores(model: PreTrainedModel, padded: Mapping[str, Tensor], *, positions: int) -> Tensor:
    """Scores at the last positions of a batch but the very last, ``(batch, positions, vocab)``."""
    if _shows_a_part(model):  # some services say how likely a text's own tokens are, if those are there
        before = torch.arange(padded["input_ids"].shape[1] - 1)[-positions:]
        shown = {name: padded[name] for name in ("input_ids", "attention_mask")}
        logprobs: Tensor = model(**shown, logits_to_keep=before, shows_next=True, use_cache=False).logits
        return logprobs
    inputs = {name: padded[name][:, :-1].to(input_device(model)) for name in ("input_ids", "attention_mask")}
    # Decoder-only LMs of transformers 5 take `logits_to_keep`; one of another origin may ignore it, hence the slice.
    scores: Tensor = model(**inputs, logits_to_keep=positions, use_cache=False).logits
    return scores[:, -positions:]


def _nats(scores: Tensor, targets: Tensor, *, are_logprobs: bool = False) -> FloatArray:
    """Minus the logarithm of the targets' probabilities, ``(tokens,)``."""
    logprobs = scores.float() if are_logprobs else scores.float().log_softmax(-1)
    return -logprobs.gather(-1, targets[:, None])[:, 0].double().cpu().numpy()


@contextlib.contextmanager
def opened(opener: Opener) -> Iterator[PreTrainedModel]:
    """A model without dropout and gradients; its mode is put back afterwards."""
    with opener() as model, torch.no_grad():
        was_training = model.training
        model.train(False)
        try:
            yield model
        finally:
            model.train(was_training)


def tokens_read(examples: Sequence[TokenizedExample]) -> int:
    """Tokens that a model reads to score these items: all but the last of each item that has a token to score."""
    return sum(_length(example) - 1 for example in examples if _length(example) > _first_scored(example))
