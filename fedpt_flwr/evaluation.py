"""Scores a proxy-tuned model as a run config says: on which items, with which rows, how much of it.

Used by the server between rounds and at the end, and by ``fedpt score``.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from fedpt_flwr.choices import Choices
from fedpt_flwr.config import RunConfig
from fedpt_flwr.data import TokenizedExample, collate, tokenize_answers, tokenize_examples, tokenize_prompts
from fedpt_flwr.distillation import answer_scores, num_answer_tokens
from fedpt_flwr.errors import DataError, naming
from fedpt_flwr.losses import MODELS, answer_losses, choice_quality, choose_answers, greedy_quality, tokens_read
from fedpt_flwr.models import cpu_threads, input_device, max_positions
from fedpt_flwr.proxy import ProxyModel
from fedpt_flwr.scoring import Measurement, Row, Scores, make_row, measure_model, score_models
from fedpt_flwr.shift import Shift, ShiftPoint, choice_curve, choose_shift, shift_curve
from fedpt_flwr.sources import Items, answer_choices, check_choices
from fedpt_flwr.writing import end_token_ids, generate_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]

_WRITTEN_ALPHAS, _WRITTEN_MASKS = (0.5, 0.75, 1.0), (0.0, 0.001, 0.01)
"""What is tried where answers must be written to be judged, which costs a generation each."""

WRITTEN_POINTS = len(_WRITTEN_ALPHAS) * len(_WRITTEN_MASKS)
"""How many points of a curve that is."""


class Evaluator:
    """Scores one set of items again and again; what never changes is measured once.

    How much of an item the models see is decided here, once and for all rows. Answers are written after a prompt that
    does not depend on the right answer: its end, ``train.max-length`` tokens at most, or as many as the smallest
    context leaves beside ``scoring.max-new-tokens``. Losses are of prompt and right answer as far as the smallest
    context reaches (see `tokenize_examples`), or ``train.max-length`` tokens where no model says what it can read.
    With ``data.choices`` answers are chosen, not written, and the longest choice is what the context leaves room for.

    Args:
        items: What to score on.
        tokenizer: The models' tokenizer.
        config: Gives the lengths, the batch size, the alpha of the loss, the seed.
        proxy: The model that will be scored, or one with the same contexts.
        place: Names the items in errors: ``data.test`` or ``data.validation``.

    Raises:
        DataError: There are no items, one has no answer or one that is no choice, or the models' context leaves no room
            for a prompt.
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
        self._vocab_size = int(proxy.config.real_vocab_size)
        if not items.examples:
            raise DataError("must hold at least one example", place=place)
        context = max_positions(proxy)
        self._choices = _choices(config, tokenizer)
        self._right = None if self._choices is None else _right_choices(items, self._choices, place)
        room = _prompt_room(context, config, self._choices)
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
        # As they would be written: after the same prompts, and no longer than one can tell that they are too long.
        self._to_write = [
            TokenizedExample(prompt, item.answer_ids[: config.scoring.max_new_tokens + 1])
            for prompt, item in zip(self._prompts, self._tokenized, strict=True)
        ]
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
                rouge_l=scoring.rouge_l,
                choices=self._choices,
                public_texts=public_texts,
                shots=scoring.few_shot,
                known=self._known,
                place=self._place,
                on_progress=on_progress,
            )
        self._known |= {name: scores.measurements[name] for name in ("large", "untuned") if name in scores.measurements}
        return scores

    def shift_curve(self, proxy: ProxyModel) -> tuple[list[ShiftPoint], int]:
        """What other strengths of the shift and masks would give on these items.

        Where the whole answer counts, or one is chosen, one pass of the models tells (see ``shift.py``). Where a part
        of it counts (``data.answer-pattern``), answers are written for each of a few strengths and masks.

        Args:
            proxy: The model; its alpha and mask are as before afterwards.

        Returns:
            The curve, and the tokens that went through the large model.
        """
        scoring = self._config.scoring
        if self._choices is not None and self._right is not None:
            with cpu_threads(self._config.threads.server):
                pad_id = self._tokenizer.pad_token_id or 0
                points = choice_curve(proxy, self._prompts, self._choices, self._right, pad_id=pad_id)
            return points, self._choices.tokens_read(self._prompts)
        written = bool(self._config.data.answer_pattern)
        settings = {"alphas": _WRITTEN_ALPHAS, "masks": _WRITTEN_MASKS} if written else {}
        with cpu_threads(self._config.threads.server):
            curve = shift_curve(
                proxy,
                self._to_write,
                pad_id=self._tokenizer.pad_token_id or 0,
                end_ids=end_token_ids(proxy, self._tokenizer),
                max_new_tokens=scoring.max_new_tokens,
                batch_size=scoring.batch_size,
                **settings,
            )
        large_tokens = tokens_read(self._to_write)
        if written:
            curve, spent = self._written_curve(proxy, curve)
            large_tokens += spent
        return curve, large_tokens

    def choose_shift(self, proxy: ProxyModel) -> tuple[Shift, int]:
        """The best alpha and mask on these items, and the tokens that went through the large model to find them."""
        curve, large_tokens = self.shift_curve(proxy)
        return choose_shift(curve, items=len(self.items.examples)), large_tokens

    def _written_curve(self, proxy: ProxyModel, curve: Sequence[ShiftPoint]) -> tuple[list[ShiftPoint], int]:
        before = proxy.alpha, proxy.plausibility
        points, spent = [], 0
        try:
            for point in curve:
                proxy.alpha, proxy.plausibility = point.alpha, point.plausibility
                scores = self.score(proxy, rows=("proxy",))
                points.append(replace(point, exact_match=scores.rows["proxy"].exact_match or 0.0))
                spent += scores.large_tokens
        finally:
            proxy.alpha, proxy.plausibility = before
        return points, spent

    def quality(self, model: PreTrainedModel) -> tuple[float, float]:
        """Exact match and loss of a plain model on the whole answers, without writing any."""
        pad_id = self._tokenizer.pad_token_id or 0
        with cpu_threads(self._config.threads.server):
            if self._choices is not None and self._right is not None:
                losses = choose_answers(model, self._prompts, self._choices, pad_id=pad_id, vocab_size=self._vocab_size)
                return choice_quality(losses, self._choices, self._right)
            return greedy_quality(
                model,
                self._to_write,
                pad_id=pad_id,
                end_ids=end_token_ids(model, self._tokenizer),
                max_new_tokens=self._config.scoring.max_new_tokens,
                batch_size=self._config.scoring.batch_size,
                vocab_size=self._vocab_size,
            )

    def measure(self, model: PreTrainedModel) -> Measurement:
        """Loss and answers of one plain model on every item."""
        data, scoring = self._config.data, self._config.scoring
        with cpu_threads(self._config.threads.server):
            return measure_model(
                model,
                self.items.examples,
                self._tokenized,
                prompts=self._prompts,
                tokenizer=self._tokenizer,
                max_new_tokens=scoring.max_new_tokens,
                batch_size=scoring.batch_size,
                vocab_size=self._vocab_size,
                answer_pattern=data.answer_pattern,
                values=self.items.values,
                fields=self.items.fields,
                rouge_l=scoring.rouge_l,
                choices=self._choices,
                place=self._place,
            )

    def answer_probabilities(self, model: PreTrainedModel, measurement: Measurement) -> list[float]:
        """How likely a model finds each answer that it wrote, from its first token to the one that ended it.

        An answer of which it has no finite loss, as where its training diverged, has the probability 0.

        Args:
            model: The model, a :class:`ProxyModel` included, whose alpha and mask then count.
            measurement: What it did on these items.
        """
        texts = [TokenizedExample(*pair) for pair in zip(self._prompts, measurement.written or [], strict=True)]
        with cpu_threads(self._config.threads.server):
            losses = answer_losses(
                model,
                texts,
                pad_id=self._tokenizer.pad_token_id or 0,
                batch_size=self._config.scoring.batch_size,
                vocab_size=self._vocab_size,
            )
        return [math.exp(-nats) if math.isfinite(nats) else 0.0 for nats in losses.nats]

    def tokens_per_second(self, model: PreTrainedModel, *, number: int) -> float:
        """How fast a model writes, one answer at a time, as its own ``generate()`` does it by default.

        Args:
            model: The model.
            number: Items to answer; one more is answered before, to warm up.
        """
        ends, limit = end_token_ids(model, self._tokenizer), self._config.scoring.max_new_tokens
        prompts = [torch.tensor([prompt], device=input_device(model)) for prompt in self._prompts[: number + 1]]
        written, started = 0, 0.0
        with cpu_threads(self._config.threads.server), torch.inference_mode():
            for place, ids in enumerate(prompts):
                if place == min(1, len(prompts) - 1):
                    written, started = 0, time.perf_counter()
                output = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=limit,
                    do_sample=False,
                    num_beams=1,
                    repetition_penalty=1.0,
                    no_repeat_ngram_size=0,
                    eos_token_id=ends,
                    pad_token_id=ends[0],
                )
                written += output.shape[1] - ids.shape[1]
        return written / (time.perf_counter() - started)

    def remember_untuned(self, model: PreTrainedModel) -> None:
        """Let the row ``untuned`` be of this model, where the proxy's own untuned model is another one by now."""
        self._known["untuned"] = self.measure(model)

    def rows_by_topic(self, name: str, measurement: Measurement, topics: frozenset[str]) -> Mapping[str, Row]:
        """A model's row over all items, and over the items about these topics and the others, where there are both.

        Args:
            name: Of the row; the others are ``<name>_covered`` and ``<name>_not_covered``.
            measurement: What the model did.
            topics: What public prompts are about.
        """
        seed = self._config.seed
        every = range(len(self.items.examples))
        parts = {name: list(every)}
        if self.items.topics is not None and topics:
            covered = [index for index in every if self.items.topics[index] in topics]
            others = [index for index in every if self.items.topics[index] not in topics]
            if covered and others:
                parts |= {f"{name}_covered": covered, f"{name}_not_covered": others}
        return {part: make_row(measurement.only(indices), n=len(indices), seed=seed) for part, indices in parts.items()}

    def examples(self, proxy: ProxyModel, scores: Scores, *, number: int) -> tuple[list[dict[str, Any]], int]:
        """Some items with what every model wrote, and which tokens of the proxy's answer the large model did not want.

        Args:
            proxy: The model.
            scores: What :meth:`score` found with it.
            number: Items, taken at equal distances.

        Returns:
            For each item ``prompt``, ``reference``, ``models`` (answers by row) and ``tokens``: for each token of the
            proxy's answer its ``text``, whether it is ``changed``, and if so what the ``large`` model alone would
            have written there. And the tokens that went through the large model for it.
        """
        total = len(self.items.examples)
        chosen = sorted({round(place * total / number) for place in range(number)} & set(range(total)))
        prompts = [self._prompts[index] for index in chosen]
        scoring = self._config.scoring
        with cpu_threads(self._config.threads.server), torch.no_grad():
            if self._choices is None:
                answers = generate_ids(
                    proxy, prompts, tokenizer=self._tokenizer, max_new_tokens=scoring.max_new_tokens, place=self._place
                )
            else:
                ids_of = dict(zip(self._choices.texts, self._choices.ids, strict=True))
                said = [scores.records[index]["models"]["proxy"]["answer"] for index in chosen]
                answers = [list(ids_of.get(answer, self._choices.ids[0])) for answer in said]
            texts = [TokenizedExample(*pair) for pair in zip(prompts, answers, strict=True)]
            batch = collate(texts, self._tokenizer.pad_token_id or 0)
            wanted = (
                answer_scores(proxy.large, batch, vocab_size=self._vocab_size)
                .argmax(-1)
                .split([num_answer_tokens(text) for text in texts])
            )
        found = []
        for index, answer, large in zip(chosen, answers, wanted, strict=True):
            record = scores.records[index]
            found.append(
                {
                    "prompt": record["prompt"],
                    "reference": record["reference"],
                    "models": {name: seen["answer"] for name, seen in record["models"].items() if "answer" in seen},
                    "tokens": self._marked(answer, large.tolist()),
                }
            )
        written = tokens_read(texts) if self._choices is None else 0  # what is chosen is known
        return found, written + tokens_read(texts)

    def _marked(self, answer: list[int], large: list[int]) -> list[dict[str, Any]]:
        """The tokens of an answer; each text is what the token adds, since one character may take several tokens."""
        marked: list[dict[str, Any]] = []
        before = ""
        for end, other in enumerate(large, len(answer) - len(large) + 1):
            decoded = str(self._tokenizer.decode(answer[:end], clean_up_tokenization_spaces=False))
            text = decoded.rstrip("\ufffd")  # the first bytes of a character: it belongs to the token that ends it
            changed = answer[end - 1] != other
            token = {"text": text[len(before) :], "changed": changed}
            marked.append(token | ({"large": str(self._tokenizer.decode([other]))} if changed else {}))
            before = text
        return marked


def _choices(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Choices | None:
    """All that may be answered, in tokens; None where answers are written."""
    texts = answer_choices(config.data)
    if not texts:
        return None
    with naming("data.choices"):
        return Choices(texts=texts, ids=tokenize_answers(texts, tokenizer), length=config.scoring.choice_length)


def _right_choices(items: Items, choices: Choices, place: str) -> npt.NDArray[np.int64]:
    """The index of every item's answer among the choices."""
    check_choices(items, choices.texts, place=place)
    index_of = {text: index for index, text in enumerate(choices.texts)}
    return np.asarray([index_of[example.answer] for example in items.examples], dtype=np.int64)


def _prompt_room(context: int | None, config: RunConfig, choices: Choices | None) -> int:
    """Tokens that a prompt may have, so that an answer can be written after it."""
    longest = config.train.max_length
    answer = config.scoring.max_new_tokens if choices is None else choices.longest
    if context is not None:
        longest = min(longest, context - answer)
    if longest < 2:
        raise DataError(
            f"the models read {context} tokens, which leaves no room for a prompt",
            value=answer,
            place="scoring.max-new-tokens" if choices is None else "data.choices",
            remedy="lower it" if choices is None else "use models that read more",
        )
    return longest
