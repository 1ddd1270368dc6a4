"""How good are the large, untuned, tuned and proxy models on a test set, and how sure can one be of it?

Two views of every model, each on the same items, prompts and token budget for all models:

- its loss on the right answers, teacher-forced, in nats per answer token. Losses are always computed without the
  plausibility mask, which gives some right answers the probability 0;
- the answers that it writes by itself, greedily, judged by the metrics of ``fedpt_flwr.metrics``. An answer from which
  nothing can be extracted counts as wrong, and the share and number of those are reported. Where all possible answers
  are known, such as the labels of a classification, nothing is written: the likeliest of them is the answer.

The intervals (``uncertainty.py``) say how far another draw of test items could move a number, not another seed of
training.

Nothing here knows Flower, files or run folders.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedpt_flwr.choices import Choices
from fedpt_flwr.data import TokenizedExample, first_token
from fedpt_flwr.errors import DataError
from fedpt_flwr.losses import (
    MODELS,
    AnswerLosses,
    Opener,
    answer_losses,
    by_prompt,
    choice_scores,
    choose_answers,
    chosen,
    losses_of_all,
    openers,
    proxy_losses,
    tokens_read,
)
from fedpt_flwr.models import max_positions
from fedpt_flwr.prompts import Example, extract_answer
from fedpt_flwr.proxy import ProxyModel
from fedpt_flwr.uncertainty import FloatArray, IntArray, Interval, bootstrap_ratio, paired_bootstrap, wilson_interval
from fedpt_flwr.writing import decode_answer, draw_texts, few_shot_prompt, generate_ids

if TYPE_CHECKING:
    from evaluate import EvaluationModule

_log = logging.getLogger(__name__)

FEW_SHOT = "large_few_shot"
"""The row of the large model with public texts in its prompt."""

SHARES = ("exact_match", "contains_value", "right_field", "invalid_rate")
"""Quantities that are shares of the items, with Wilson intervals."""

ROUGE_L = "rouge_l"
"""A mark from 0 to 1 for every item; its mean has a bootstrap interval."""

_FEW_SHOT_POOL = 1000  # public texts that are tokenised to choose from


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

    how = {"answer_pattern": answer_pattern, "values": values, "fields": fields, "rouge_l": rouge_l}

    def measure(name: str, opener: Opener, prompts: Sequence[Sequence[int]], losses: AnswerLosses) -> Measurement:
        nonlocal large_tokens
        with opener() as model:
            measured = _written(
                model,
                prompts,
                losses,
                examples,
                tokenizer=tokenizer,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                place=place,
                on_progress=progress(f"answers of {name}"),
                how=how,
            )
        if name in ("large", "proxy", FEW_SHOT):
            large_tokens += sum(map(len, prompts)) + sum(len(answer) - 1 for answer in measured.written or ())
        return measured

    pad_id = tokenizer.pad_token_id or 0
    measurements = {name: measurement for name, measurement in (known or {}).items() if name in (*rows, FEW_SHOT)}
    missing = [name for name in rows if name not in measurements]
    if missing:
        is_tuned_alone = missing == ["tuned"]  # it alone has to read the items, not the two others too
        if is_tuned_alone:
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
            by_row = dict(zip(("large", "tuned", "untuned"), openers(proxy), strict=True))
            by_row["proxy"] = lambda: contextlib.nullcontext(proxy)
            measurements |= {name: measure(name, by_row[name], prompts, losses[name]) for name in missing}
        else:
            if is_tuned_alone:
                costs = {
                    "tuned": choose_answers(
                        proxy.tuned,
                        prompts,
                        choices,
                        pad_id=pad_id,
                        vocab_size=proxy.config.real_vocab_size,
                        on_progress=progress("choices"),
                    )
                }
            else:
                scored = choice_scores(proxy, prompts, choices, pad_id=pad_id, on_progress=progress("choices"))
                costs = losses_of_all(proxy, scored, alpha=proxy.alpha, items=len(prompts) * len(choices.texts))
                large_tokens += choices.tokens_read(prompts)
            measurements |= {name: _chosen(costs[name], choices, losses[name], examples, how=how) for name in missing}

    if shots > 0 and public_texts and FEW_SHOT not in measurements:
        context = max_positions(proxy.large) or 2**31
        longest = max_new_tokens if choices is None else choices.longest
        few_shot_prompts, few_shot_items, used = with_public_texts(
            prompts,
            tokenized,
            public_texts,
            tokenizer=tokenizer,
            shots=shots,
            context=context,
            longest=longest,
            seed=seed,
        )
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
            measured = measure(FEW_SHOT, openers(proxy)[0], few_shot_prompts, few_shot_losses)
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
            measured = _chosen(found, choices, few_shot_losses, examples, how=how)
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
    pad_id = tokenizer.pad_token_id or 0
    how = {"answer_pattern": answer_pattern, "values": values, "fields": fields, "rouge_l": rouge_l}
    losses = answer_losses(model, tokenized, pad_id=pad_id, batch_size=batch_size, vocab_size=vocab_size)
    if choices is not None:
        costs = choose_answers(model, prompts, choices, pad_id=pad_id, vocab_size=vocab_size)
        return _chosen(costs, choices, losses, examples, how=how)
    return _written(
        model,
        prompts,
        losses,
        examples,
        tokenizer=tokenizer,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        place=place,
        how=how,
    )


def _written(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    losses: AnswerLosses,
    examples: Sequence[Example],
    *,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    batch_size: int,
    place: str,
    how: Mapping[str, Any],
    on_progress: Callable[[int, int], None] | None = None,
) -> Measurement:
    """What a model writes after the prompts; ``how`` are the options of :func:`judge_answers`."""
    written = generate_ids(
        model,
        prompts,
        tokenizer=tokenizer,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        place=place,
        on_progress=on_progress,
    )
    answers = [decode_answer(answer, model, tokenizer) for answer in written]
    judged = judge_answers(answers, [example.answer for example in examples], **how)
    return Measurement(losses=losses, answers=answers, written=written, judged=judged)


def _chosen(
    costs: AnswerLosses, choices: Choices, losses: AnswerLosses, examples: Sequence[Example], *, how: Mapping[str, Any]
) -> Measurement:
    """What a model chooses, whose losses of every choice after every prompt are ``costs``."""
    answers = [choices.text_of(index) for index in chosen(costs, choices)]
    judged = judge_answers(answers, [example.answer for example in examples], **how)
    sure = choices.confidence(by_prompt(costs, choices))
    return Measurement(losses=losses, answers=answers, confidence=sure, judged=judged)


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


def with_public_texts(
    prompts: Sequence[Sequence[int]],
    tokenized: Sequence[TokenizedExample],
    public_texts: Sequence[str],
    *,
    tokenizer: PreTrainedTokenizerBase,
    shots: int,
    context: int,
    longest: int,
    seed: int,
) -> tuple[list[list[int]], list[TokenizedExample], IntArray]:
    """The prompts and the items with public texts before them, different ones for each.

    Args:
        prompts: For the answers.
        tokenized: The same items, for the losses: after the same texts, or the first of them where an answer is longer
            than what is written.
        public_texts: To choose from.
        tokenizer: Of all of these.
        shots: Texts at most.
        context: Tokens that the model reads.
        longest: Tokens that an answer may have.
        seed: Of the choice.

    Returns:
        The longer prompts, the longer items, and the number of texts in each prompt, ``(items,)``.
    """
    generator = np.random.default_rng(seed)
    pool = generator.permutation(len(public_texts))[:_FEW_SHOT_POOL]
    texts = [public_texts[index].strip() + "\n\n" for index in pool]
    public_ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    begin, room = first_token(tokenizer), context - longest
    longer, items, used = [], [], []
    for prompt, item in zip(prompts, tokenized, strict=True):
        drawn = draw_texts(public_ids, shots=shots, room=room - len(prompt), generator=generator)
        prompt_ids, count = few_shot_prompt(prompt, drawn, max_prompt_tokens=room, bos_token_id=begin)
        longer.append(prompt_ids)
        used.append(count)
        most = context - max(longest, len(item.answer_ids))
        prompt_ids, _ = few_shot_prompt(item.prompt_ids, drawn, max_prompt_tokens=most, bos_token_id=begin)
        items.append(TokenizedExample(prompt_ids, item.answer_ids))
    return longer, items, np.asarray(used, dtype=np.int64)


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
