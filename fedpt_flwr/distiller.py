"""What the server does with the proxy after a round: it teaches the small model, as ``distillation.mode`` says.

A perfectly distilled small model would be ``large + tuned - untuned``; used as the next ``tuned`` it would make the
next proxy count the large model twice. So in every mode but ``paper`` the pair that decodes is kept apart from what is
learnt back:

    final    tuned = what the devices made; a copy for the devices learns at the end
    carry    tuned = untuned + the sum of what the devices changed in each round; what was learnt back is only in what
             the next round begins with
    paired   tuned and untuned learn side by side, and the proxy that they make, with its alpha, is held where it was
    paper    tuned learns, and is the next round's tuned; how far it drifts along ``large - untuned`` is measured
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fedpt_flwr.config import RunConfig
from fedpt_flwr.data import TokenizedExample, collate, first_token, tokenize_prompts
from fedpt_flwr.distillation import (
    DistillationResult,
    Targets,
    Teacher,
    answer_scores,
    distil,
    num_answer_tokens,
    remembering,
)
from fedpt_flwr.errors import ConfigError, DataError
from fedpt_flwr.logits import combine_logits, drift_along
from fedpt_flwr.losses import tokens_read, untuned_of
from fedpt_flwr.models import cpu_threads, set_arrays
from fedpt_flwr.proxy import ProxyModel
from fedpt_flwr.vocabulary import IdMap
from fedpt_flwr.writing import generate_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

IN_ROUNDS = ("carry", "paired", "paper")
"""Modes that teach after every round."""

WITH_DEVICE_COPY = ("final", "carry", "paired")
"""Modes that end with a copy for the devices."""

SHARES = (0.0, 0.25, 0.5, 0.625, 0.75, 0.875, 1.0)
"""How far the devices' copy may go from the tuned weights to the distilled ones."""

MAX_REMEMBERED_BYTES = 2**30
"""What a teacher has said is kept up to this many bytes; the rest is asked for again and again."""

_WITHOUT_INFINITIES = (("mode", "paper"), ("direction", "reverse"))
DRIFT_TEXTS = 64
"""Texts of a lesson on which the drift is measured, if that takes no more scores than :data:`MAX_DRIFT_SCORES`."""

MAX_DRIFT_SCORES = 2**26
"""256 MiB of float32, and a few copies of it."""

_FINAL = 0  # stands for the round in seeds of what comes after the last one


def check_translated(config: RunConfig, id_map: IdMap) -> None:
    """Refuse what cannot be taught by a large model that lacks some of the small one's tokens: it scores them -inf.

    Raises:
        ConfigError: The mode measures a drift along these scores, or the direction asks for their logarithm.
    """
    for name, value in _WITHOUT_INFINITIES:
        if not id_map.is_whole and config.distillation.mode != "off" and getattr(config.distillation, name) == value:
            raise ConfigError(
                "needs a large model that has all of the small model's tokens",
                value=value,
                place=f"distillation.{name}",
                remedy="choose another, or another large model",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """One distillation: what it measured, and what it cost.

    Attributes:
        result: Of the steps.
        drift: Change of the student's scores along ``large - untuned`` on the public texts: 1 would be all the way.
        large_tokens: Tokens that went through the large model.
        seconds: From the first prompt to the last step.
    """

    result: DistillationResult
    drift: float
    large_tokens: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """For ``metrics.jsonl``."""
        return {
            "num_steps": self.result.num_steps,
            "kl_first": self.result.kl_first,
            "kl_last": self.result.kl_last,
            "drift": self.drift,
            "seconds": round(self.seconds, 3),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceLesson:
    """How the devices' copy came about.

    Attributes:
        lesson: The distillation.
        share: How far the copy goes from the tuned weights (0) to the distilled ones (1).
        curve: ``share``, ``exact_match`` and ``loss`` on the validation items of all that were tried.
    """

    lesson: Lesson
    share: float
    curve: Sequence[Mapping[str, float]]

    def to_json(self) -> dict[str, Any]:
        """For ``metrics.jsonl``; a loss that is not finite is left out."""
        curve = [{key: value for key, value in point.items() if math.isfinite(value)} for point in self.curve]
        return {**self.lesson.to_json(), "share": self.share, "curve": curve}


class Distiller:
    """Writes lessons on public text with a proxy, and teaches small models with them.

    Args:
        config: Of the run.
        proxy: The teacher; its weights, alpha and mask are those of the moment when a lesson is written.
        tokenizer: Of all models.
        prompts: Public prompts that the proxy answers; None: ``texts`` are learnt from as they stand.
        texts: Public texts.
        trainable: Names of the small model's weights that tuning changes.

    Raises:
        DataError: There are neither prompts nor texts.
    """

    def __init__(
        self,
        config: RunConfig,
        proxy: ProxyModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        prompts: Sequence[str] | None,
        texts: Sequence[str],
        trainable: Sequence[str],
    ) -> None:
        self._config = config
        self._proxy = proxy
        self._tokenizer = tokenizer
        self._trainable = list(trainable)
        self._vocab_size = int(proxy.config.real_vocab_size)
        self._pad_id = int(tokenizer.pad_token_id or 0)
        self._student: PreTrainedModel | None = None
        context = proxy.config.max_position_embeddings or 1 << 30
        longest = min(config.train.max_length, context)
        self._has_answers = prompts is None
        if prompts is not None:
            room = min(longest, context - config.scoring.max_new_tokens)
            whole = tokenize_prompts(list(prompts), tokenizer, max_length=None)
            ids = tokenize_prompts(list(prompts), tokenizer, max_length=room)
            _warn_of_cut("prompts", [len(prompt_ids) for prompt_ids in whole], room, "last")
            self._pool = [TokenizedExample(prompt_ids, []) for prompt_ids in ids]
        else:
            whole = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []
            start = [token for token in [first_token(tokenizer)] if token is not None]
            _warn_of_cut("texts", [len(start) + len(ids) for ids in whole], longest, "first")
            pool = [TokenizedExample(start, ids[: longest - len(start)]) for ids in whole]
            self._pool = [text for text in pool if num_answer_tokens(text) > 0]
        if not self._pool:
            raise DataError("distillation needs at least one public prompt or text", place="data.prompts")

    def teach_round(
        self, server_round: int, arrays: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor] | None, Lesson]:
        """Teach the model that the next round begins with; the proxy is untouched.

        Args:
            server_round: The round that has just been aggregated.
            arrays: The weights that learn.

        Returns:
            The weights after learning; in the mode ``paired`` those of the untuned model that learnt with them, else
            None; and what was measured.
        """
        distillation = self._config.distillation
        student = self._get_student(arrays)
        untuned = copy.deepcopy(self._proxy.untuned) if distillation.mode == "paired" else None
        lesson = self._teach(
            student,
            server_round,
            num_prompts=distillation.num_prompts,
            num_steps=distillation.steps,
            learning_rate=distillation.learning_rate,
            untuned=untuned,
        )
        return self.arrays_of(student), None if untuned is None else self.arrays_of(untuned), lesson

    def teach_device_copy(
        self,
        quality: Callable[[PreTrainedModel], tuple[float, float]],
        *,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> tuple[PreTrainedModel, DeviceLesson]:
        """Teach a copy of the tuned model, for the devices to use by itself; the proxy is untouched.

        What it learns of public prompts it pays for by forgetting: the devices' own wordings are not among them. So
        the copy goes only a part of the way from the tuned weights to the distilled ones, as far as it is best
        (Wortsman et al. 2022, arXiv:2109.01903).

        Args:
            quality: Exact match and loss of a model, on validation items.
            on_progress: Called with the steps done and of all.
        """
        distillation = self._config.distillation
        start = self.arrays_of(self._proxy.tuned)
        student = self._get_student(start)
        lesson = self._teach(
            student,
            _FINAL,
            num_prompts=distillation.final_num_prompts,
            num_steps=distillation.final_steps,
            learning_rate=distillation.final_learning_rate,
            on_progress=on_progress,
        )
        end = self.arrays_of(student)

        def part_way(share: float) -> dict[str, Tensor]:
            return {name: torch.lerp(start[name], end[name], share) for name in start}

        curve = []
        for share in SHARES:
            set_arrays(student, part_way(share))
            exact_match, loss = quality(student)
            curve.append((exact_match, -loss, share))
        best = max(curve, key=lambda point: (point[0], point[1]) if math.isfinite(point[1]) else (point[0], -math.inf))
        set_arrays(student, part_way(best[2]))
        points = [{"share": share, "exact_match": match, "loss": -minus} for match, minus, share in curve]
        return student, DeviceLesson(lesson=lesson, share=best[2], curve=points)

    def _get_student(self, arrays: Mapping[str, Tensor]) -> PreTrainedModel:
        """A model of its own with these weights."""
        if self._student is None:
            self._student = copy.deepcopy(self._proxy.tuned)
        set_arrays(self._student, arrays)
        return self._student

    def arrays_of(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """A copy of a small model's weights that tuning changes, float32 on the CPU."""
        weights = dict(model.named_parameters())
        return {name: weights[name].detach().to("cpu", torch.float32, copy=True) for name in self._trainable}

    def _teach(
        self,
        student: PreTrainedModel,
        server_round: int,
        *,
        num_prompts: int,
        num_steps: int,
        learning_rate: float,
        untuned: PreTrainedModel | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Lesson:
        started = time.perf_counter()
        # A list of numbers as the seed: independent of every other stream of the run.
        generator = np.random.default_rng([self._config.seed, server_round, 0xD157])
        with cpu_threads(self._config.threads.server):
            texts, large_tokens = self._write_texts(num_prompts, generator)
            counter = _Counter(self._teacher(texts, for_pair=untuned is not None), texts)
            teacher = remembering(counter, texts, max_bytes=MAX_REMEMBERED_BYTES)
            shown = self._shown(texts)
            before = self._scores(student, texts, shown)
            direction = self._direction(teacher, texts, shown)
            result = distil(
                student,
                texts,
                teacher,
                self._config.distillation,
                trainable=self._trainable,
                num_steps=num_steps,
                learning_rate=learning_rate,
                pad_id=self._pad_id,
                vocab_size=self._vocab_size,
                seed=int(generator.integers(2**32)),
                untuned=untuned,
                alpha=self._proxy.alpha,
                on_progress=on_progress,
            )
            drift = drift_along(self._scores(student, texts, shown) - before, direction)
        return Lesson(
            result=result,
            drift=drift,
            large_tokens=large_tokens + counter.tokens,
            seconds=time.perf_counter() - started,
        )

    def _write_texts(self, number: int, generator: np.random.Generator) -> tuple[list[TokenizedExample], int]:
        """Public texts to learn from: prompts with the proxy's own greedy answers, or texts as they stand."""
        order = generator.permutation(len(self._pool))[: number or None]
        chosen = [self._pool[index] for index in order]
        if self._has_answers:
            return chosen, 0
        prompts = [text.prompt_ids for text in chosen]
        scoring = self._config.scoring
        answers = generate_ids(
            self._proxy,
            prompts,
            tokenizer=self._tokenizer,
            max_new_tokens=scoring.max_new_tokens,
            batch_size=scoring.batch_size,
            place="data.prompts",
        )
        texts = [TokenizedExample(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        return texts, sum(len(text.prompt_ids) + len(text.answer_ids) - 1 for text in texts)

    def _teacher(self, texts: Sequence[TokenizedExample], *, for_pair: bool) -> Teacher:
        proxy = self._proxy
        # With alpha 1 the untuned student learns the large model's own scores, which need not be kept twice.
        is_left_out = for_pair and proxy.alpha != 1
        mask = proxy.plausibility if self._config.distillation.direction == "forward" else 0.0

        @torch.no_grad()
        def teach(indices: Sequence[int]) -> Targets:
            batch = collate([texts[index] for index in indices], self._pad_id)
            large = answer_scores(proxy.large, batch, vocab_size=self._vocab_size)
            tuned = answer_scores(proxy.tuned, batch, vocab_size=self._vocab_size)
            with untuned_of(proxy) as model:
                untuned = answer_scores(model, batch, vocab_size=self._vocab_size)
            large = proxy.fill(large, untuned)
            combined = combine_logits(large, tuned, untuned, alpha=proxy.alpha, plausibility=mask)
            home = proxy.tuned.device
            left = combine_logits(large, tuned, untuned, alpha=proxy.alpha - 1).to(home) if is_left_out else None
            return Targets(proxy=combined.to(home), large=large.to(home), untuned=left)

        return teach

    def _shown(self, texts: Sequence[TokenizedExample]) -> range:
        """The first texts, as many as the drift is measured on."""
        number = scores = 0
        while number < min(DRIFT_TEXTS, len(texts)) and (number == 0 or scores <= MAX_DRIFT_SCORES):
            scores += num_answer_tokens(texts[number]) * self._vocab_size
            number += 1
        return range(number)

    @torch.no_grad()
    def _scores(self, model: PreTrainedModel, texts: Sequence[TokenizedExample], indices: Sequence[int]) -> Tensor:
        batch = collate([texts[index] for index in indices], self._pad_id)
        return answer_scores(model, batch, vocab_size=self._vocab_size)

    @torch.no_grad()
    def _direction(self, teacher: Teacher, texts: Sequence[TokenizedExample], indices: Sequence[int]) -> Tensor:
        """``large - untuned`` on some texts, ``(tokens, vocab)``."""
        large = teacher(indices).large  # not below: the tuned model's adapter is switched off there
        with untuned_of(self._proxy) as model:
            return large - self._scores(model, texts, indices)


def _warn_of_cut(what: str, lengths: Sequence[int], longest: int, kept: str) -> None:
    """Say how many public texts are longer than what is learnt of one."""
    num_cut = sum(length > longest for length in lengths)
    if num_cut:
        _log.warning("Of %d public %s %d are cut to their %s %d tokens", len(lengths), what, num_cut, kept, longest)


class _Counter:
    """A teacher that counts the tokens that the large model reads."""

    def __init__(self, teacher: Teacher, texts: Sequence[TokenizedExample]) -> None:
        self._teacher, self._texts = teacher, texts
        self.tokens = 0

    def __call__(self, indices: Sequence[int]) -> Targets:
        self.tokens += tokens_read([self._texts[index] for index in indices])
        return self._teacher(indices)
