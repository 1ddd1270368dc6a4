"""Scores a proxy-tuned model as a run config says: on which items, with which rows, how much of it.

Used by the server between rounds and at the end, and by ``fedpt score``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from fedpt_flwr.config import RunConfig
from fedpt_flwr.data import tokenize_examples, tokenize_prompts
from fedpt_flwr.errors import DataError
from fedpt_flwr.models import cpu_threads, max_positions
from fedpt_flwr.proxy import ProxyModel
from fedpt_flwr.scoring import MODELS, Measurement, Scores, score_models
from fedpt_flwr.sources import Items

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]


class Evaluator:
    """Scores one set of items again and again; what never changes is measured once.

    How much of an item the models see is decided here, once and for all rows. Answers are written after a prompt that
    does not depend on the right answer: its end, ``train.max-length`` tokens at most, or as many as the smallest
    context leaves beside ``scoring.max-new-tokens``. Losses are of prompt and right answer as far as the smallest
    context reaches (see `tokenize_examples`), or ``train.max-length`` tokens where no model says what it can read.

    Args:
        items: What to score on.
        tokenizer: The models' tokenizer.
        config: Gives the lengths, the batch size, the alpha of the loss, the seed.
        proxy: The model that will be scored, or one with the same contexts.
        place: Names the items in errors: ``data.test`` or ``data.validation``.

    Raises:
        DataError: There are no items, one has no answer, or the models' context leaves no room for a prompt.
        ModelError: The tokenizer has no end-of-sequence token.
    """

    def __init__(
        self, items: Items, tokenizer: PreTrainedTokenizerBase, config: RunConfig, proxy: ProxyModel, *, place: str
    ) -> None:
        self.items = items
        self._tokenizer = tokenizer
        self._config = config
        self._place = place
        self._known: dict[str, Measurement] = {}
        if not items.examples:
            raise DataError("must hold at least one example", place=place)
        context = max_positions(proxy)
        room = _prompt_room(context, config)
        longest = config.train.max_length if context is None else context
        self._tokenized, report = tokenize_examples(items.examples, tokenizer, max_length=longest)
        if report.dropped:
            raise DataError(
                "an example must have an answer to score",
                value=items.examples[report.dropped[0]].answer,
                place=f"{place}, item {report.dropped[0] + 1}",
                remedy=f"remove the examples without one ({report.num_dropped} of {report.num_examples})",
            )
        texts = [example.prompt for example in items.examples]
        whole = tokenize_prompts(texts, tokenizer, max_length=None)
        self._prompts = tokenize_prompts(texts, tokenizer, max_length=room)
        num_cut = sum(len(prompt) > room for prompt in whole)
        if num_cut or report.num_prompts_cut or report.num_answers_cut:
            _log.warning(
                "%s: of %d items, %d prompts lost their beginning for answers (over %d tokens), and %d prompts their "
                "beginning and %d answers their end for losses (over %d tokens together)",
                place,
                report.num_examples,
                num_cut,
                room,
                report.num_prompts_cut,
                report.num_answers_cut,
                longest,
            )

    def score(
        self,
        proxy: ProxyModel,
        *,
        rows: Sequence[str] = MODELS,
        public_texts: Sequence[str] = (),
        on_progress: Progress | None = None,
    ) -> Scores:
        """Score these rows; ``large`` and ``untuned`` are measured the first time only.

        Args:
            proxy: The model.
            rows: Which of large, untuned, tuned and proxy.
            public_texts: For the row ``large_few_shot``; none: no such row.
            on_progress: Called with what is done, the number done and of all.
        """
        scoring = self._config.scoring
        with cpu_threads(self._config.threads.server):
            scores = score_models(
                proxy,
                self.items.examples,
                self._tokenized,
                tokenizer=self._tokenizer,
                max_new_tokens=scoring.max_new_tokens,
                seed=self._config.seed,
                prompts=self._prompts,
                rows=rows,
                loss_alpha=scoring.loss_alpha,
                batch_size=scoring.batch_size,
                answer_pattern=self._config.data.answer_pattern,
                values=self.items.values,
                fields=self.items.fields,
                public_texts=public_texts,
                shots=scoring.few_shot,
                known=self._known,
                place=self._place,
                on_progress=on_progress,
            )
        self._known |= {name: scores.measurements[name] for name in ("large", "untuned") if name in scores.measurements}
        return scores


def _prompt_room(context: int | None, config: RunConfig) -> int:
    """Tokens that a prompt may have, so that an answer can be written after it."""
    longest = config.train.max_length
    if context is not None:
        longest = min(longest, context - config.scoring.max_new_tokens)
    if longest < 2:
        raise DataError(
            f"the models read {context} tokens, which leaves no room for a prompt",
            value=config.scoring.max_new_tokens,
            place="scoring.max-new-tokens",
            remedy="lower it",
        )
    return longest
