"""Scores a proxy-tuned model as a run config says: on which items, with which rows, how much of it.

Used by the server between rounds and at the end, and by ``fedpt score``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from fedpt_flwr.config import RunConfig
from fedpt_flwr.data import TokenizedExample, tokenize_examples
from fedpt_flwr.errors import DataError
from fedpt_flwr.models import cpu_threads, max_positions
from fedpt_flwr.proxy import ProxyModel
from fedpt_flwr.scoring import MODELS, Measurement, Scores, score_models
from fedpt_flwr.sources import Items

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Progress = Callable[[str, int, int], None]


class Evaluator:
    """Scores one set of items again and again; what never changes is measured once.

    Args:
        items: What to score on.
        tokenizer: The models' tokenizer.
        config: Gives the longest answer, the batch size, the alpha of the loss, the seed.
        place: Names the items in errors: ``data.test`` or ``data.validation``.
        max_length: Tokens that prompt and answer may have.
    """

    def __init__(
        self, items: Items, tokenizer: PreTrainedTokenizerBase, config: RunConfig, *, place: str, max_length: int
    ) -> None:
        self.items = items
        self._tokenizer = tokenizer
        self._config = config
        self._tokenized = _tokenize(items, tokenizer, max_length, place)
        self._known: dict[str, Measurement] = {}

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
                rows=rows,
                loss_alpha=scoring.loss_alpha,
                batch_size=scoring.batch_size,
                answer_pattern=self._config.data.answer_pattern,
                values=self.items.values,
                fields=self.items.fields,
                public_texts=public_texts,
                shots=scoring.few_shot,
                known=self._known,
                on_progress=on_progress,
            )
        self._known |= {name: scores.measurements[name] for name in ("large", "untuned") if name in scores.measurements}
        return scores


def longest_item(proxy: ProxyModel, config: RunConfig) -> int:
    """Tokens that prompt and answer may have, so that every model can read the one and write the other."""
    contexts = [max_positions(model) for model in (proxy.large, proxy.tuned)]
    room = min((context for context in contexts if context is not None), default=config.train.max_length)
    longest = min(config.train.max_length, room - config.scoring.max_new_tokens)
    if longest < 2:
        raise DataError(
            f"the models read {room} tokens, which leaves no room for a prompt",
            value=config.scoring.max_new_tokens,
            place="scoring.max-new-tokens",
            remedy="lower it",
        )
    return longest


def _tokenize(
    items: Items, tokenizer: PreTrainedTokenizerBase, max_length: int, place: str
) -> Sequence[TokenizedExample]:
    if not items.examples:
        raise DataError("must hold at least one example", place=place)
    tokenized, report = tokenize_examples(items.examples, tokenizer, max_length=max_length)
    if report.num_dropped:
        raise DataError(
            f"{report.num_dropped} of {report.num_examples} examples have no answer to score",
            place=place,
            remedy="remove them, or raise train.max-length",
        )
    return tokenized


def round_metrics(scores: Scores) -> Mapping[str, Mapping[str, float]]:
    """The numbers of a round that go into ``metrics.jsonl``: loss and exact match by row."""
    return {
        name: {metric: value for metric in ("loss", "exact_match") if (value := getattr(row, metric)) is not None}
        for name, row in scores.rows.items()
    }
