"""How good are the large, untuned, tuned and proxy models on a test set, and how sure can one be of it?

Two views of every model, each on the same items, prompts and token budget for all models:

- its loss on the right answers, teacher-forced, in nats per answer token. Losses are always computed without the
  plausibility mask, which gives some right answers the probability 0;
- the answers that it writes by itself, greedily, judged by the metrics of ``fedpt_flwr.metrics``. An answer from which
  nothing can be extracted counts as wrong, and the share and number of those are reported. Where all possible answers
  are known, such as the labels of a classification, nothing is written: the likeliest of them is the answer.

The 95 % intervals are Wilson's for shares (Wilson 1927) and the percentile bootstrap over items for losses; two models
are compared by the paired bootstrap, which resamples the items that both answered (Koehn 2004). They say how far
another draw of test items could move a number, not another seed of training.

Nothing here knows Flower, files or run folders.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedpt_flwr.choices import Choices, score_choices
from fedpt_flwr.data import IGNORED_LABEL, TokenizedExample, collate, collate_prompts, first_token
from fedpt_flwr.errors import DataError, ModelError
from fedpt_flwr.logits import bound_hidden, combine_logits
from fedpt_flwr.models import hides_tokens, input_device, is_remote, max_positions
from fedpt_flwr.prompts import Example, extract_answer
from fedpt_flwr.proxy import ProxyModel

if TYPE_CHECKING:
    from evaluate import EvaluationModule

_log = logging.getLogger(__name__)

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Interval = tuple[float, float]

MODELS = ("large", "untuned", "tuned", "proxy")
"""The rows that a :class:`ProxyModel` gives by itself."""

FEW_SHOT = "large_few_shot"
"""The row of the large model with public texts in its prompt."""

SHARES = ("exact_match", "contains_value", "right_field", "invalid_rate")
"""Quantities that are shares of the items, with Wilson intervals."""

ROUGE_L = "rouge_l"
"""A mark from 0 to 1 for every item; its mean has a bootstrap interval."""

_MAX_SCORES = 2**26  # scores that one model may return at once: 256 MiB of float32
_MAX_SCORES_IN_FLOAT32 = 2**24  # scores that are turned into losses at once: 64 MiB, and a few copies of it
_RESAMPLES = 10_000
_RESAMPLED_AT_ONCE = 2**17  # item counts; larger blocks leave the processor's cache and are slower
_Z_95 = 1.959963984540054  # 97.5 % quantile of the standard normal distribution
_FEW_SHOT_POOL = 1000  # public texts that are tokenised to choose from


# --- losses ----------------------------------------------------------------------------------------------------------


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
    return _losses_of_all(proxy, batches, alpha=alpha, items=len(examples))


def _losses_of_all(
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
        [lambda: _opened(lambda: contextlib.nullcontext(model))],
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
        [functools.partial(_opened, opener) for opener in _openers(proxy)],
        prompts,
        choices.ids,
        pad_id=pad_id,
        vocab_size=proxy.config.real_vocab_size,
        on_progress=on_progress,
    )


def chosen(losses: AnswerLosses, choices: Choices) -> IntArray:
    """The index of the likeliest choice after each prompt, ``(prompts,)``, from the losses of all pairs."""
    return choices.best(_by_prompt(losses, choices))


def _by_prompt(losses: AnswerLosses, choices: Choices) -> npt.NDArray[np.float64]:
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
        _openers(proxy),
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


_Opener = Callable[[], contextlib.AbstractContextManager[PreTrainedModel]]
"""Gives a model for as long as its context lasts: the untuned one may be the tuned one without its adapter."""


def _openers(proxy: ProxyModel) -> list[_Opener]:
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
    openers: Sequence[_Opener],
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
    with _opened(openers[0]) as model:
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
            with _opened(opener) as model:
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
    scores = scores.float()
    nats = -scores.gather(-1, targets[:, None])[:, 0]
    if not are_logprobs:
        nats = nats + scores.logsumexp(-1)
    return nats.double().cpu().numpy()


@contextlib.contextmanager
def _opened(opener: _Opener) -> Iterator[PreTrainedModel]:
    """A model without dropout and gradients; its mode is put back afterwards."""
    with opener() as model, torch.no_grad():
        was_training = model.training
        model.train(False)
        try:
            yield model
        finally:
            model.train(was_training)


# --- answers ---------------------------------------------------------------------------------------------------------


def generate_ids(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    batch_size: int = 32,
    place: str = "prompts",
    on_progress: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """What a model writes after each prompt, greedily and by its own ``generate()``, as token ids.

    A model's repetition penalty and the like are switched off, so that all models decode alike.

    Args:
        model: Any causal LM, a :class:`ProxyModel` included.
        prompts: Token ids, each prompt with at least one.
        tokenizer: Names the tokens that end an answer and fill up a batch.
        max_new_tokens: Longest answer, in tokens.
        batch_size: Prompts that are answered at the same time.
        place: Names the prompts in errors.
        on_progress: Called with the number of prompts answered and of all prompts.

    Returns:
        The answers in the order of ``prompts``, each up to and with the token that ended it, if one did. Prompts of
        similar length share a batch; up to rounding in floating point, an answer does not depend on the others in it.

    Raises:
        DataError: A prompt is empty or leaves no room for an answer in the model's context.
    """
    _check_room(prompts, max_new_tokens=max_new_tokens, context=max_positions(model), place=place)
    end_ids = end_token_ids(model, tokenizer)
    pad_id = end_ids[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)
    answers: list[list[int]] = [[] for _ in prompts]
    # How many tokens are drafted depends on timings, and so do the ties that rounding decides. A score must not.
    # Where every token would be a request, as many are drafted as the run config says.
    one_by_one: dict[str, Any] = {"draft_tokens": None} if isinstance(model, ProxyModel) else {}
    if isinstance(model, ProxyModel) and is_remote(model.large):
        one_by_one = {"draft_tokens": model.large.draft_tokens}
    with _opened(lambda: contextlib.nullcontext(model)):
        for first in range(0, len(order), batch_size):
            batch = order[first : first + batch_size]
            padded = collate_prompts([list(prompts[index]) for index in batch], pad_id)
            sequences = model.generate(
                **{name: tensor.to(input_device(model)) for name, tensor in padded.items()},
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                repetition_penalty=1.0,
                no_repeat_ngram_size=0,
                pad_token_id=pad_id,
                eos_token_id=end_ids,
                **one_by_one,
            )
            written = sequences[:, padded["input_ids"].shape[1] :].tolist()
            for index, token_ids in zip(batch, written, strict=True):
                answers[index] = token_ids[: len(_until_end(token_ids, end_ids)) + 1]
            if on_progress is not None:
                on_progress(first + len(batch), len(prompts))
    return answers


def decode_answer(token_ids: list[int], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of an answer, without what ended it and without special tokens."""
    return _decode(_until_end(token_ids, end_token_ids(model, tokenizer)), tokenizer)


def _check_room(prompts: Sequence[Sequence[int]], *, max_new_tokens: int, context: int | None, place: str) -> None:
    for number, prompt in enumerate(prompts, start=1):
        if not prompt:
            raise DataError("a prompt must have at least one token", place=f"{place}, item {number}")
        if context is not None and len(prompt) + max_new_tokens > context:
            raise DataError(
                f"prompt and answer together must fit into the model's {context} tokens",
                value=f"{len(prompt)} + {max_new_tokens}",
                place=f"{place}, item {number}",
                remedy="shorten the prompts or lower the number of new tokens",
            )


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: the tokenizer's, then those that the model itself stops at.

    Raises:
        ModelError: There are none.
    """
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    own = configured if isinstance(configured, list) else [configured]
    ends = [token for token in dict.fromkeys([tokenizer.eos_token_id, *own]) if token is not None]
    if not ends:
        raise ModelError("the tokenizer must have a token that ends an answer", remedy="set tokenizer.eos_token to one")
    return ends


def _until_end(token_ids: list[int], end_ids: Sequence[int]) -> list[int]:
    ends = [position for position, token in enumerate(token_ids) if token in end_ids]
    return token_ids[: ends[0]] if ends else token_ids


def _decode(token_ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    # The clean-up of spaces would rewrite answers such as "jute ;ok" that a right answer must equal.
    return str(tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def few_shot_prompt(
    prompt_ids: Sequence[int],
    public_ids: Sequence[Sequence[int]],
    *,
    shots: int,
    max_prompt_tokens: int,
    generator: np.random.Generator,
    bos_token_id: int | None = None,
) -> tuple[list[int], int]:
    """Puts public texts before a prompt: as many as fit, up to ``shots``.

    Args:
        prompt_ids: The prompt's tokens, which stay as they are in every other row.
        public_ids: Tokens of the texts to choose from, each with the blank line that ends it.
        shots: Texts to take at most.
        max_prompt_tokens: Length of the result at most.
        generator: Decides which texts, and their order.
        bos_token_id: If the prompt begins with this token, so does the result, and only there.

    Returns:
        The longer prompt and the number of texts in it, which is 0 where none fits.
    """
    begins_with_bos = bos_token_id is not None and list(prompt_ids[:1]) == [bos_token_id]
    begin, rest = (list(prompt_ids[:1]), list(prompt_ids[1:])) if begins_with_bos else ([], list(prompt_ids))
    room = max_prompt_tokens - len(prompt_ids)
    taken: list[int] = []
    used = 0
    for index in generator.permutation(len(public_ids)):
        if used == shots:
            break
        text = public_ids[index]
        if len(text) <= room:
            taken += text
            room -= len(text)
            used += 1
    return begin + taken + rest, used


# --- judging ---------------------------------------------------------------------------------------------------------


@functools.cache
def load_metric(name: str) -> EvaluationModule:
    """One of the package's own metrics, by ``evaluate.load`` and without a network; each process loads it once.

    ``evaluate`` copies a metric to a cache in the home folder and imports the copy. Where nothing can be written there,
    the metric is imported from where it lies.

    Args:
        name: A folder of ``fedpt_flwr.metrics``: ``exact_match``, ``contains_value``, ``right_field`` or ``rouge_l``.
    """
    import evaluate  # takes two seconds, for which only those wait who judge answers

    path = Path(__file__).parent / "metrics" / name / f"{name}.py"
    # The folder for intermediate files must exist when a metric is made; kept in memory, it writes none.
    with tempfile.TemporaryDirectory() as folder:
        try:
            return evaluate.load(str(path), keep_in_memory=True, cache_dir=folder)
        except OSError:
            module = importlib.import_module(f"fedpt_flwr.metrics.{name}.{name}")
            metric_class = next(
                value
                for value in vars(module).values()
                if isinstance(value, type) and issubclass(value, evaluate.EvaluationModule)
            )
            return metric_class(keep_in_memory=True, cache_dir=folder)


def judge_answers(
    answers: Sequence[str],
    references: Sequence[str],
    *,
    answer_pattern: str = "",
    values: Sequence[str] | None = None,
    fields: Sequence[str] | None = None,
    rouge_l: bool = False,
) -> dict[str, npt.NDArray[Any]]:
    """Marks every answer with 0 or 1, and by ROUGE-L with a number between.

    Args:
        answers: What a model wrote.
        references: The right answers.
        answer_pattern: Regular expression for the part of an answer that counts; empty: the whole answer.
        values: The value that a right answer holds, for ``contains_value``; None: not judged.
        fields: What a right answer of the form ``field = value`` names, for ``right_field``; None: not judged.
        rouge_l: Whether to measure ROUGE-L, of whole answers whatever the pattern.

    Returns:
        ``exact_match``, ``invalid_rate`` (1: nothing can be extracted, so the answer is wrong), and where asked for
        ``contains_value``, ``right_field`` and ``rouge_l``, each ``(items,)``.
    """

    def marks(metric: str, wanted: Sequence[str], **options: str) -> npt.NDArray[Any]:
        result = load_metric(metric).compute(predictions=list(answers), references=list(wanted), **options)
        return np.asarray(result["scores"], dtype=np.float64 if metric == ROUGE_L else np.int64)

    judged = {"exact_match": marks("exact_match", references, answer_pattern=answer_pattern)}
    if values is not None:
        judged["contains_value"] = marks("contains_value", values)
    if fields is not None:
        judged["right_field"] = marks("right_field", fields)
    if rouge_l:
        judged[ROUGE_L] = marks(ROUGE_L, references)
    invalid = [not extract_answer(answer, answer_pattern) for answer in answers]
    return judged | {"invalid_rate": np.asarray(invalid, dtype=np.int64)}


# --- uncertainty -----------------------------------------------------------------------------------------------------


def wilson_interval(successes: int, n: int) -> Interval:
    """95 % interval of a share (Wilson 1927), good for small n and for shares near 0 and 1.

    Args:
        successes: Items that count, 0 to ``n``.
        n: Items, at least 1.
    """
    share, z2 = successes / n, _Z_95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z_95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    # At both ends the formula gives 0 and 1 exactly, but for rounding.
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == n else centre + half)


def bootstrap_sums(columns: FloatArray, *, seed: int, resamples: int = _RESAMPLES) -> FloatArray:
    """Sums over items drawn with replacement, as often as there are items.

    Args:
        columns: ``(items, quantities)``. All quantities of an item are drawn together, so ratios and differences of
            the sums are paired.
        seed: The same seed and number of items give the same draws.
        resamples: Repetitions.

    Returns:
        ``(resamples, quantities)``, float64.
    """
    generator = np.random.default_rng(seed)
    items = len(columns)
    at_once = max(1, _RESAMPLED_AT_ONCE // items)
    sums = []
    for first in range(0, resamples, at_once):
        count = min(at_once, resamples - first)
        drawn = generator.integers(0, items, (count, items), dtype=np.int32)
        drawn += np.arange(count, dtype=np.int32)[:, None] * items
        times_drawn = np.bincount(drawn.ravel(), minlength=count * items).reshape(count, items)
        sums.append(times_drawn.astype(np.float64) @ columns)
    return np.concatenate(sums)


def bootstrap_ratio(numerators: FloatArray, denominators: FloatArray, *, seed: int) -> Interval:
    """95 % percentile interval of ``sum(numerators) / sum(denominators)`` over items.

    Args:
        numerators: ``(items,)``, finite.
        denominators: ``(items,)``; items where it is 0 are left out, and at least one is not.
        seed: Of the draws.
    """
    present = denominators > 0
    sums = bootstrap_sums(np.stack([numerators[present], denominators[present]], axis=1), seed=seed)
    low, high = np.percentile(sums[:, 0] / sums[:, 1], [2.5, 97.5])
    return float(low), float(high)


def paired_bootstrap(
    first: npt.ArrayLike, second: npt.ArrayLike, seed: int, *, tokens: npt.ArrayLike | None = None
) -> tuple[float, float, float]:
    """How much more the first model has than the second, per item or per token, on the same items.

    Args:
        first: One number per item of the first model: 0 or 1 for right answers, or the item's nats.
        second: The same of the second model.
        seed: Of the draws.
        tokens: Answer tokens per item, for a difference per token; None: per item.

    Returns:
        The difference ``first - second`` and its 95 % percentile interval.
    """
    difference = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    weights = np.ones_like(difference) if tokens is None else np.asarray(tokens, dtype=np.float64)
    low, high = bootstrap_ratio(difference, weights, seed=seed)
    return float(difference.sum() / weights.sum()), low, high


def gap_closed(
    proxy: float | None, large: float | None, reference: float | None, *, higher_is_better: bool = True
) -> float | None:
    """Share of the way from the large model to a reference that the proxy goes: 1 is all of it, 0 none.

    Args:
        proxy: A metric of the proxy.
        large: The same metric of the untuned large model.
        reference: The same metric of the reference, such as the large model tuned by the devices themselves.
        higher_is_better: False for losses.

    Returns:
        The share, or None where it has no meaning: a number is missing, or the reference is no better than the large.
    """
    if proxy is None or large is None or reference is None or not all(map(math.isfinite, (proxy, large, reference))):
        return None
    gap = reference - large
    if (gap if higher_is_better else -gap) <= 0:
        return None
    return (proxy - large) / gap


# --- results ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What one model did on every item, in the order of the items.

    Attributes:
        losses: Its losses on the right answers, or None if they were not computed.
        answers: What it wrote or chose, or None if it did neither.
        written: What it wrote as token ids, up to and with the token that ended each answer; None if it chose.
        confidence: How sure it was of what it chose, ``(items,)``, see ``Choices.confidence``; None if it wrote.
        judged: A mark for every answer, by metric; see :func:`judge_answers`.
        shots: Public texts in each prompt, or None for a prompt without any.
    """

    losses: AnswerLosses | None = None
    answers: list[str] | None = None
    written: list[list[int]] | None = None
    confidence: FloatArray | None = None
    judged: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    shots: IntArray | None = None

    def only(self, indices: Sequence[int]) -> Measurement:
        """The same of some of the items."""
        chosen = np.asarray(indices, dtype=np.int64)
        return Measurement(
            losses=self.losses
            and AnswerLosses(self.losses.nats[chosen], self.losses.tokens[chosen], self.losses.is_bound),
            answers=self.answers and [self.answers[index] for index in indices],
            written=self.written and [self.written[index] for index in indices],
            confidence=None if self.confidence is None else self.confidence[chosen],
            judged={name: marks[chosen] for name, marks in self.judged.items()},
            shots=None if self.shots is None else self.shots[chosen],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One model's line of the results table; what was not measured is None.

    Attributes:
        n: Items.
        loss: Nats per answer token.
        loss_upper_bound: What ``loss`` is at most, where a remote large model does not show enough to know it.
        perplexity: ``exp(loss)``.
        exact_match: Share of answers that are right.
        contains_value: Share of answers that hold the right value, whatever else they hold.
        right_field: Share of answers that name what was asked for.
        rouge_l: Mean ROUGE-L of the answers (F measure).
        invalid_rate: Share of answers from which nothing could be extracted; they are wrong in all other shares.
        num_invalid: How many these are.
        shots: Mean number of public texts in the prompts.
        ci95: 95 % interval of each of the above but ``n``, ``num_invalid`` and ``shots``, by name.
    """

    n: int
    loss: float | None = None
    loss_upper_bound: float | None = None
    perplexity: float | None = None
    exact_match: float | None = None
    contains_value: float | None = None
    right_field: float | None = None
    rouge_l: float | None = None
    invalid_rate: float | None = None
    num_invalid: int | None = None
    shots: float | None = None
    ci95: Mapping[str, Interval] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The row for ``results.json``; holds neither null, NaN nor infinity."""
        names = ("loss", "loss_upper_bound", "perplexity", *SHARES, ROUGE_L, "num_invalid", "shots")
        values = {name: value for name in names if (value := getattr(self, name)) is not None}
        return values | {"n": self.n, "ci95": {name: list(interval) for name, interval in self.ci95.items()}}


def make_row(measurement: Measurement, *, n: int, seed: int) -> Row:
    """Sums up one model's items.

    Args:
        measurement: What it did.
        n: Number of items.
        seed: Of the bootstrap.

    Returns:
        The row. A loss that is not finite, such as that of a model whose training diverged, is logged and left out.
    """
    values: dict[str, Any] = {}
    ci95: dict[str, Interval] = {}
    losses = measurement.losses
    if losses is not None and losses.tokens.any():
        if losses.is_bound and np.isfinite(losses.nats).all():
            values["loss_upper_bound"] = losses.mean
        elif np.isfinite(losses.nats).all():
            values["loss"] = losses.mean
            ci95["loss"] = bootstrap_ratio(losses.nats, losses.tokens.astype(np.float64), seed=seed)
            if max(values["loss"], *ci95["loss"]) < math.log(np.finfo(np.float64).max):
                values["perplexity"] = math.exp(values["loss"])
                ci95["perplexity"] = (math.exp(ci95["loss"][0]), math.exp(ci95["loss"][1]))
        else:
            infinite = int((~np.isfinite(losses.nats)).sum())
            _log.warning("the loss of %d of %d items is not a finite number, so the row has none", infinite, n)
    for name, marks in measurement.judged.items():
        values[name] = float(marks.mean())
        ci95[name] = (
            bootstrap_ratio(marks, np.ones(len(marks)), seed=seed)
            if name == ROUGE_L
            else wilson_interval(int(marks.sum()), len(marks))
        )
        if name == "invalid_rate":
            values["num_invalid"] = int(marks.sum())
    if measurement.shots is not None:
        values["shots"] = float(measurement.shots.mean())
    return Row(n=n, ci95=ci95, **values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Everything that :func:`score_models` found.

    Attributes:
        rows: A row for each model.
        differences: ``proxy_minus_tuned`` and ``proxy_minus_large`` in exact match, and the same with ``_rouge_l`` at
            the end, or with ``_loss`` in nats per answer token: the value and its paired 95 % interval.
        records: For each item its prompt, right answer, group, and what each model made of it; fit for JSON.
        measurements: The items' numbers by row, to be handed to a later call as ``known``.
        alpha: Strength of the shift in the proxy's answers.
        plausibility: Mask in the proxy's answers.
        loss_alpha: Strength of the shift in the proxy's loss.
        seed: Of the bootstrap and of the few-shot prompts.
        large_tokens: Tokens that the large model read in this call, padding left out: for losses those of prompts and
            right answers, for answers those of prompts and what was written. The last token of each is only predicted,
            never read. What was known before the call costs nothing.
    """

    rows: dict[str, Row]
    differences: dict[str, tuple[float, float, float]]
    records: list[dict[str, Any]]
    measurements: dict[str, Measurement]
    alpha: float
    plausibility: float
    loss_alpha: float
    seed: int
    large_tokens: int

    def to_json(self) -> dict[str, Any]:
        """The part of ``results.json`` that comes from scoring."""
        return {
            "rows": {name: row.to_json() for name, row in self.rows.items()},
            **{name: {"value": value, "ci95": [low, high]} for name, (value, low, high) in self.differences.items()},
            "alpha": self.alpha,
            "plausibility": self.plausibility,
            "loss_alpha": self.loss_alpha,
            "seed": self.seed,
        }


def score_models(
    proxy: ProxyModel,
    examples: Sequence[Example],
    tokenized: Sequence[TokenizedExample],
    *,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    seed: int,
    prompts: Sequence[Sequence[int]] | None = None,
    rows: Sequence[str] = MODELS,
    loss_alpha: float = 1.0,
    batch_size: int = 32,
    answer_pattern: str = "",
    values: Sequence[str] | None = None,
    fields: Sequence[str] | None = None,
    rouge_l: bool = False,
    choices: Choices | None = None,
    public_texts: Sequence[str] = (),
    shots: int = 0,
    known: Mapping[str, Measurement] | None = None,
    place: str = "items",
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Scores:
    """Scores the proxy and its three parts on the same items.

    For a look between rounds, ask for ``rows=("tuned", "proxy")`` on some of the items, and hand over what an earlier
    call found for the models that never change as ``known``.

    Args:
        proxy: The proxy-tuned model; its alpha and mask decide its answers.
        examples: The items as text.
        tokenized: The same items as tokens, for the losses.
        tokenizer: The one that made ``tokenized``.
        max_new_tokens: Longest answer that is written, in tokens.
        seed: Of the bootstrap and of the few-shot prompts.
        prompts: The same items' prompts as tokens, for the answers. They must not depend on the right answers, as those
            of ``tokenized`` do where a long answer left little room. None: those of ``tokenized``.
        rows: Which of :data:`MODELS`.
        loss_alpha: Strength of the shift in the proxy's loss, which is computed without the mask.
        batch_size: Items at once.
        answer_pattern: See :func:`judge_answers`.
        values: See :func:`judge_answers`.
        fields: See :func:`judge_answers`.
        rouge_l: See :func:`judge_answers`.
        choices: All that may be answered: the likeliest is, at the proxy's alpha and without its mask. None: answers
            are written.
        public_texts: Texts to choose from for the row ``large_few_shot``.
        shots: Texts in front of each of its prompts, as far as they fit; 0: no such row.
        known: Measurements of the same items by row, taken as they are instead of being made again.
        place: Names the items in errors.
        on_progress: Called with what is being done, the number of items done and of all items.

    Raises:
        DataError: There are no items, or the texts and tokens or the known measurements are not of the same items.
    """
    if prompts is None:
        prompts = [item.prompt_ids for item in tokenized]
    _check_items(examples, tokenized, prompts, known or {}, place=place)
    large_tokens = 0

    def progress(what: str) -> Callable[[int, int], None] | None:
        return None if on_progress is None else lambda done, total: on_progress(what, done, total)

    def judge(answers: list[str], losses: AnswerLosses) -> Measurement:
        references = [example.answer for example in examples]
        marks = judge_answers(
            answers, references, answer_pattern=answer_pattern, values=values, fields=fields, rouge_l=rouge_l
        )
        return Measurement(losses=losses, answers=answers, judged=marks)

    def choose(costs: AnswerLosses, choices: Choices, losses: AnswerLosses) -> Measurement:
        answers = [choices.text_of(index) for index in chosen(costs, choices)]
        return replace(judge(answers, losses), confidence=choices.confidence(_by_prompt(costs, choices)))

    def measure(name: str, opener: _Opener, prompts: Sequence[Sequence[int]], losses: AnswerLosses) -> Measurement:
        nonlocal large_tokens
        with opener() as model:
            written = generate_ids(
                model,
                prompts,
                tokenizer=tokenizer,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                place=place,
                on_progress=progress(f"answers of {name}"),
            )
            answers = [decode_answer(answer, model, tokenizer) for answer in written]
        if name in ("large", "proxy", FEW_SHOT):
            large_tokens += sum(map(len, prompts)) + sum(len(answer) - 1 for answer in written)
        return replace(judge(answers, losses), written=written)

    pad_id = tokenizer.pad_token_id or 0
    measurements = {name: measurement for name, measurement in (known or {}).items() if name in (*rows, FEW_SHOT)}
    missing = [name for name in rows if name not in measurements]
    if missing:
        if missing == ["tuned"] and choices is None:  # it alone has to read the items, not the two others too
            losses = {
                "tuned": answer_losses(
                    proxy.tuned,
                    tokenized,
                    pad_id=pad_id,
                    batch_size=batch_size,
                    vocab_size=proxy.config.real_vocab_size,
                    on_progress=progress("losses"),
                )
            }
        else:
            losses = proxy_losses(
                proxy,
                tokenized,
                alpha=loss_alpha,
                pad_id=pad_id,
                batch_size=batch_size,
                on_progress=progress("losses"),
            )
            large_tokens += tokens_read(tokenized)
        if choices is None:
            openers = dict(zip(("large", "tuned", "untuned"), _openers(proxy), strict=True))
            openers["proxy"] = lambda: contextlib.nullcontext(proxy)
            measurements |= {name: measure(name, openers[name], prompts, losses[name]) for name in missing}
        else:
            scored = choice_scores(proxy, prompts, choices, pad_id=pad_id, on_progress=progress("choices"))
            costs = _losses_of_all(proxy, scored, alpha=proxy.alpha, items=len(prompts) * len(choices.texts))
            large_tokens += choices.tokens_read(prompts)
            measurements |= {name: choose(costs[name], choices, losses[name]) for name in missing}

    if shots > 0 and public_texts and FEW_SHOT not in measurements:
        context = max_positions(proxy.large) or 2**31
        longest = max_new_tokens if choices is None else choices.longest
        few_shot_prompts, used = _few_shot_prompts(
            prompts,
            public_texts,
            tokenizer=tokenizer,
            shots=shots,
            rooms=[context - longest] * len(prompts),
            seed=seed,
        )
        # The same texts, but fewer of them before an answer that is longer than what is generated.
        loss_prompts, _ = _few_shot_prompts(
            [item.prompt_ids for item in tokenized],
            public_texts,
            tokenizer=tokenizer,
            shots=shots,
            rooms=[context - max(longest, len(item.answer_ids)) for item in tokenized],
            seed=seed,
        )
        few_shot_items = [
            TokenizedExample(prompt_ids, item.answer_ids)
            for prompt_ids, item in zip(loss_prompts, tokenized, strict=True)
        ]
        few_shot_losses = answer_losses(
            proxy.large,
            few_shot_items,
            pad_id=pad_id,
            batch_size=batch_size,
            vocab_size=proxy.config.real_vocab_size,
            on_progress=progress(f"losses of {FEW_SHOT}"),
        )
        large_tokens += tokens_read(few_shot_items)
        if choices is None:
            measured = measure(FEW_SHOT, _openers(proxy)[0], few_shot_prompts, few_shot_losses)
        else:
            found = choose_answers(
                proxy.large,
                few_shot_prompts,
                choices,
                pad_id=pad_id,
                vocab_size=proxy.config.real_vocab_size,
                on_progress=progress(f"choices of {FEW_SHOT}"),
            )
            large_tokens += choices.tokens_read(few_shot_prompts)
            measured = choose(found, choices, few_shot_losses)
        measurements[FEW_SHOT] = replace(measured, shots=used)

    names = [name for name in (*MODELS, FEW_SHOT) if name in measurements]
    measurements = {name: measurements[name] for name in names}
    return Scores(
        rows={name: make_row(measurements[name], n=len(examples), seed=seed) for name in names},
        differences=compare_measurements(measurements, seed=seed),
        records=make_records(examples, measurements),
        measurements=measurements,
        alpha=proxy.alpha,
        plausibility=proxy.plausibility,
        loss_alpha=loss_alpha,
        seed=seed,
        large_tokens=large_tokens,
    )


def measure_model(
    model: PreTrainedModel,
    examples: Sequence[Example],
    tokenized: Sequence[TokenizedExample],
    *,
    prompts: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    batch_size: int = 32,
    vocab_size: int | None = None,
    answer_pattern: str = "",
    values: Sequence[str] | None = None,
    fields: Sequence[str] | None = None,
    rouge_l: bool = False,
    choices: Choices | None = None,
    place: str = "items",
) -> Measurement:
    """Loss and answers of one plain model; the arguments are those of :func:`score_models`."""
    pad_id, written = tokenizer.pad_token_id or 0, None
    losses = answer_losses(model, tokenized, pad_id=pad_id, batch_size=batch_size, vocab_size=vocab_size)
    if choices is None:
        written = generate_ids(
            model, prompts, tokenizer=tokenizer, max_new_tokens=max_new_tokens, batch_size=batch_size, place=place
        )
        answers = [decode_answer(answer, model, tokenizer) for answer in written]
    else:
        costs = choose_answers(model, prompts, choices, pad_id=pad_id, vocab_size=vocab_size)
        answers = [choices.text_of(index) for index in chosen(costs, choices)]
    references = [example.answer for example in examples]
    judged = judge_answers(
        answers, references, answer_pattern=answer_pattern, values=values, fields=fields, rouge_l=rouge_l
    )
    return Measurement(losses=losses, answers=answers, written=written, judged=judged)


def tokens_read(examples: Sequence[TokenizedExample]) -> int:
    """Tokens that a model reads to score these items: all but the last of each item that has a token to score."""
    return sum(_length(example) - 1 for example in examples if _length(example) > _first_scored(example))


def _check_items(
    examples: Sequence[Example],
    tokenized: Sequence[TokenizedExample],
    prompts: Sequence[Sequence[int]],
    known: Mapping[str, Measurement],
    *,
    place: str,
) -> None:
    if not examples:
        raise DataError("there must be at least one item to score", place=place, remedy="look at the data")
    if not len(examples) == len(tokenized) == len(prompts):
        raise DataError(
            "every item must be there as text, as tokens and as a prompt",
            value=(len(examples), len(tokenized), len(prompts)),
            place=place,
        )
    for name, measurement in known.items():
        counts = [len(marks) for marks in measurement.judged.values()]
        if measurement.losses is not None:
            counts.append(len(measurement.losses.nats))
        if any(count != len(examples) for count in counts):
            raise DataError(
                f"what is known of a model must be of the same {len(examples)} items",
                value=counts,
                place=f"{place}, {name}",
            )


def _few_shot_prompts(
    prompts: Sequence[Sequence[int]],
    public_texts: Sequence[str],
    *,
    tokenizer: PreTrainedTokenizerBase,
    shots: int,
    rooms: Sequence[int],
    seed: int,
) -> tuple[list[list[int]], IntArray]:
    """The prompts with public texts before them, different ones for each, and how many."""
    generator = np.random.default_rng(seed)
    pool = generator.permutation(len(public_texts))[:_FEW_SHOT_POOL]
    texts = [public_texts[index].strip() + "\n\n" for index in pool]
    public_ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    longer, used = [], []
    for prompt, room in zip(prompts, rooms, strict=True):
        prompt_ids, count = few_shot_prompt(
            prompt,
            public_ids,
            shots=shots,
            max_prompt_tokens=room,
            generator=generator,
            bos_token_id=first_token(tokenizer),
        )
        longer.append(prompt_ids)
        used.append(count)
    return longer, np.asarray(used, dtype=np.int64)


def compare_measurements(
    measurements: Mapping[str, Measurement], *, seed: int
) -> dict[str, tuple[float, float, float]]:
    """The proxy against the tuned and the large model, item by item.

    Args:
        measurements: By row; what is not there, or was not measured, is not compared.
        seed: Of the bootstrap.

    Returns:
        ``proxy_minus_<row>`` (exact match), ``proxy_minus_<row>_rouge_l`` and ``proxy_minus_<row>_loss`` (nats per
        answer token): the difference and its paired 95 % interval.
    """
    found: dict[str, tuple[float, float, float]] = {}
    for other in ("tuned", "large"):
        if "proxy" not in measurements or other not in measurements:
            continue
        proxy, rival = measurements["proxy"], measurements[other]
        for metric, name in (("exact_match", f"proxy_minus_{other}"), (ROUGE_L, f"proxy_minus_{other}_{ROUGE_L}")):
            if metric in proxy.judged and metric in rival.judged:
                found[name] = paired_bootstrap(proxy.judged[metric], rival.judged[metric], seed)
        ours, theirs = proxy.losses, rival.losses
        if ours is None or theirs is None or not ours.tokens.any() or ours.is_bound or theirs.is_bound:
            continue
        if np.isfinite(ours.nats).all() and np.isfinite(theirs.nats).all():
            found[f"proxy_minus_{other}_loss"] = paired_bootstrap(ours.nats, theirs.nats, seed, tokens=ours.tokens)
    return found


def make_records(examples: Sequence[Example], measurements: Mapping[str, Measurement]) -> list[dict[str, Any]]:
    """For each item what every model made of it, fit for JSON.

    Returns:
        ``{"prompt", "reference", "group", "answer_tokens", "models": {row: {"answer", "exact_match", ..., "loss"}}}``,
        where the marks are 0 or 1 (``rouge_l`` lies between), ``answer_tokens`` counts the right answer's tokens and
        ``loss`` is in nats per token of it; what was not measured is not there.
    """
    records = []
    of_tokens = [measured.losses.tokens for measured in measurements.values() if measured.losses is not None]
    for index, example in enumerate(examples):
        models: dict[str, dict[str, Any]] = {}
        for name, measurement in measurements.items():
            seen = models[name] = {}
            if measurement.answers is not None:
                seen["answer"] = measurement.answers[index]
            for metric, marks in measurement.judged.items():
                seen["invalid" if metric == "invalid_rate" else metric] = marks[index].item()
            losses = measurement.losses
            if losses is not None and losses.tokens[index] and math.isfinite(losses.nats[index]):
                name_of_loss = "loss_upper_bound" if losses.is_bound else "loss"
                seen[name_of_loss] = float(losses.nats[index]) / int(losses.tokens[index])
        counted = {"answer_tokens": int(of_tokens[0][index])} if of_tokens else {}
        head = {"prompt": example.prompt, "reference": example.answer, "group": example.group}
        records.append(head | counted | {"models": models})
    return records


# --- for people ------------------------------------------------------------------------------------------------------

_COLUMNS = {
    "exact_match": "exact match %",
    "contains_value": "contains value %",
    "right_field": "right field %",
    "rouge_l": "ROUGE-L %",
    "invalid_rate": "invalid %",
    "num_invalid": "invalid",
    "loss": "loss",
    "loss_upper_bound": "loss at most",
    "perplexity": "perplexity",
    "shots": "shots",
}


def results_table(results: Mapping[str, Any]) -> list[list[str]]:
    """The results as cells of text, the head first.

    Args:
        results: What ``results.json`` holds: :meth:`Scores.to_json`, or with more rows.

    Returns:
        A list of cells for the head and each row. Shares are in per cent, losses in nats per answer token, both with
        their 95 % intervals in brackets. A column that no row has is left out, a cell without a value is ``-``.
    """
    rows: Mapping[str, Mapping[str, Any]] = results["rows"]
    columns = [name for name in _COLUMNS if any(name in row for row in rows.values())]
    table = [["model", "items", *(_COLUMNS[name] for name in columns)]]
    for model, row in rows.items():
        interval = row.get("ci95", {})
        cells = [_cell(name, row.get(name), interval.get(name)) for name in columns]
        table.append([model, str(row["n"]), *cells])
    return table


def _cell(name: str, value: float | None, interval: Sequence[float] | None) -> str:
    if value is None:
        return "-"
    plain = {"shots": "{:.1f}".format, "num_invalid": "{:.0f}".format}.get(name, "{:.4g}".format)
    write = _percent if name in (*SHARES, ROUGE_L) else plain
    return write(value) + (f" [{write(interval[0])}, {write(interval[1])}]" if interval is not None else "")


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def render_table(table: Sequence[Sequence[str]]) -> str:
    """Cells as lines of plain ASCII text, in columns; for logs and terminals."""
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def verdict(results: Mapping[str, Any]) -> str:
    """Says plainly whether the proxy beats, ties with or loses to the tuned small model and the large one.

    By the paired 95 % intervals of the difference in exact match and in loss: it beats or loses where the interval
    leaves out 0. Where no model gets anything right, exact match is a tie that says nothing and loss tells them apart.

    Args:
        results: What ``results.json`` holds.
    """
    sentences = []
    for other, name in (("tuned", "tuned small"), ("large", "large")):
        measures = [
            ("exact match", _by_exact_match(results, other)),
            ("ROUGE-L", _by_rouge_l(results, other)),
            ("loss", _by_loss(results, other)),
        ]
        compared = [(measure, *found) for measure, found in measures if found is not None]
        for place, (measure, outcome, numbers) in enumerate(compared):
            said = f"By {measure} it {outcome} it" if place else f"The proxy {outcome} the {name} model"
            sentences.append(f"{said}: {numbers}.")
    return " ".join(sentences) or "No verdict: the proxy was not compared."


def _by_exact_match(results: Mapping[str, Any], other: str) -> tuple[str, str] | None:
    difference = results.get(f"proxy_minus_{other}")
    if difference is None:
        return None
    low, high = difference["ci95"]
    rows = results["rows"]
    ours, theirs = (f"{_percent(rows[row]['exact_match'])} %" for row in ("proxy", other))
    return _outcome(low, high), (
        f"exact match {ours} against {theirs}, difference {100 * difference['value']:+.1f} points "
        f"(95 % interval {100 * low:+.1f} to {100 * high:+.1f}, {rows['proxy']['n']} items, paired)"
    )


def _by_rouge_l(results: Mapping[str, Any], other: str) -> tuple[str, str] | None:
    difference = results.get(f"proxy_minus_{other}_{ROUGE_L}")
    if difference is None:
        return None
    low, high = difference["ci95"]
    rows = results["rows"]
    ours, theirs = (_percent(rows[row][ROUGE_L]) for row in ("proxy", other))
    return _outcome(low, high), (
        f"ROUGE-L {ours} against {theirs}, difference {100 * difference['value']:+.1f} points "
        f"(95 % interval {100 * low:+.1f} to {100 * high:+.1f}, {rows['proxy']['n']} items, paired)"
    )


def _by_loss(results: Mapping[str, Any], other: str) -> tuple[str, str] | None:
    difference = results.get(f"proxy_minus_{other}_loss")
    if difference is None:
        return None
    low, high = difference["ci95"]
    rows = results["rows"]
    ours, theirs = (f"{rows[row]['loss']:.4g}" for row in ("proxy", other))
    return _outcome(-high, -low), (
        f"loss {ours} against {theirs} nats per answer token, difference {difference['value']:+.4g} "
        f"(95 % interval {low:+.4g} to {high:+.4g}, {rows['proxy']['n']} items, paired)"
    )


def _outcome(low: float, high: float) -> str:
    """What an interval of an advantage says."""
    return "BEATS" if low > 0 else "LOSES TO" if high < 0 else "TIES WITH"
