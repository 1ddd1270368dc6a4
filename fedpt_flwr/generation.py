"""Speculative decoding under the contract of transformers' ``generate()``.

``generate()`` prepares processors, criteria and the rest; :func:`is_lossless` says whether a batch with all that can be
decoded speculatively so that the same tokens come out, and :class:`Generation` does it: it applies the processors at
every place that is verified, asks the criteria and feeds the streamer token by token, and returns what transformers'
own loop returns. What it does not know it leaves to that loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import (
    EosTokenCriteria,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    GenerateDecoderOnlyOutput,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    MaxLengthCriteria,
    MaxTimeCriteria,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    StopStringCriteria,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from fedpt_flwr.errors import ModelError
from fedpt_flwr.logits import keyed_gumbel
from fedpt_flwr.sampling import Seeded
from fedpt_flwr.speculative import Round

AUTO: Literal["auto"] = "auto"

_OF_SCORES = (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    MinPLogitsWarper,
    Seeded,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
"""Processors that look at the scores alone: all places of all rows go through them together."""

_OF_TEXTS = (
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
)
"""Processors that look at the row's text too, and at nothing else: each place goes through them by itself."""

_OF_ROWS = (EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria, StopStringCriteria)
"""Criteria that a row can be asked about without the others."""

_KNOWN_ARGUMENTS = frozenset(
    {
        "alpha",
        "attention_mask",
        "cache",
        "hidden",
        "logits_to_keep",
        "plausibility",
        "position_ids",
        "tokenizer",
        "use_cache",
    }
)


class Drafts:
    """A logits processor that leaves the scores alone: it carries ``draft_tokens`` through ``generate()``.

    Args:
        draft_tokens: ``auto``, a number, or None for transformers' own loop.

    Raises:
        ModelError: It is none of these.
    """

    def __init__(self, draft_tokens: int | str | None) -> None:
        is_number = isinstance(draft_tokens, int) and not isinstance(draft_tokens, bool) and draft_tokens >= 0
        if not is_number and draft_tokens not in (AUTO, None):
            raise ModelError(
                "draft_tokens must be 'auto', a whole number from 0, or None",
                value=draft_tokens,
                remedy="'auto' drafts as many tokens as pay, 0 none; None decodes with transformers' own loop",
            )
        self.draft_tokens: Any = draft_tokens

    def __call__(self, _input_ids: Tensor, scores: Tensor) -> Tensor:
        """Change nothing."""
        return scores


Combine = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Scores of large, tuned and untuned model, ``(rows, new, width)``, and which rows these are: the proxy's, float32."""

DraftScores = Callable[[Tensor, Tensor], Tensor]
"""The tuned model's scores, ``(rows, width)``, and which rows these are: what drafts are chosen from, float32 and
as wide as the proxy's."""


def is_lossless(
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    *,
    synced_gpus: bool = False,
    streamer: Any = None,
    **model_kwargs: Any,
) -> bool:
    """Whether :class:`Generation` writes what transformers' loop would; the arguments are those of ``_sample``."""
    alone = len(input_ids) == 1
    processors = (*_OF_SCORES, *_OF_TEXTS, Drafts)
    by_row = [criterion for criterion in stopping_criteria if type(criterion) in _OF_ROWS]
    ends = any(isinstance(criterion, EosTokenCriteria) for criterion in stopping_criteria)
    cache = model_kwargs.get("cache")
    return (
        input_ids.shape[1] > 0
        and all(type(processor) in processors for processor in logits_processor)
        and (alone or len(by_row) == len(stopping_criteria))
        # Without an end token, transformers lets rows that a criterion has stopped go on until all have.
        and (alone or ends or not any(isinstance(criterion, StopStringCriteria) for criterion in by_row))
        and any(isinstance(criterion, MaxLengthCriteria) for criterion in stopping_criteria)
        and (alone or streamer is None)
        and not synced_gpus
        and not generation_config.is_assistant
        and not generation_config.prefill_chunk_size
        and not (generation_config.output_attentions or generation_config.output_hidden_states)
        and cache is not None
        and not getattr(cache, "_is_user_defined", False)
        and cache.get_seq_length() == 0
        and all(name in _KNOWN_ARGUMENTS for name, value in model_kwargs.items() if value is not None)
        and _is_plain(model_kwargs.get("attention_mask"), model_kwargs.get("position_ids"))
    )


def _is_plain(attention_mask: Tensor | None, position_ids: Tensor | None) -> bool:
    """Whether padding stands on the left only, and positions count the tokens."""
    if attention_mask is not None:
        shown = attention_mask != 0  # of any dtype
        if shown.dim() != 2 or not bool(shown[:, -1].all()) or bool((shown[:, :-1] & ~shown[:, 1:]).any()):
            return False
    if position_ids is None:
        return True
    if attention_mask is None:
        return bool((position_ids == torch.arange(position_ids.shape[1], device=position_ids.device)).all())
    counted = attention_mask.long().cumsum(-1) - 1
    return bool(((position_ids == counted) | (attention_mask == 0)).all())


class Generation:
    """The rules of one call of ``generate()``, for :meth:`~fedpt_flwr.speculative.Speculation.decode`.

    Args:
        input_ids: The prompts, ``(rows, length)``, padded on the left.
        logits_processor: What ``generate()`` prepared, with :class:`~fedpt_flwr.sampling.Seeded` or without.
        stopping_criteria: What ``generate()`` prepared.
        generation_config: What ``generate()`` prepared.
        attention_mask: ``(rows, length)``, or None without padding.
        streamer: Gets every token of the only row.
        combine: The proxy's scores.
        draft_scores: What drafts are chosen from.
    """

    def __init__(
        self,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        *,
        attention_mask: Tensor | None,
        streamer: Any,
        combine: Combine,
        draft_scores: DraftScores,
    ) -> None:
        num_rows, self._width = input_ids.shape
        self._device = input_ids.device
        self._combine, self._draft_scores = combine, draft_scores
        self._streamer = streamer
        self._processors = [part for part in logits_processor if type(part) not in (Seeded, Drafts)]
        self._of_texts = (
            [[_of_row(part, row) for part in self._processors] for row in range(num_rows)]
            if any(type(part) in _OF_TEXTS for part in self._processors)
            else None
        )
        self._seeds = _seeds(logits_processor, num_rows) if generation_config.do_sample else None
        self._end_ids: set[int] = set()
        for criterion in stopping_criteria:
            if isinstance(criterion, EosTokenCriteria):
                self._end_ids.update(criterion.eos_token_id.flatten().tolist())
        pad = generation_config._pad_token_tensor
        self._pad_id = 0 if pad is None else int(pad)
        self._max_length: int = min(
            criterion.max_length for criterion in stopping_criteria if isinstance(criterion, MaxLengthCriteria)
        )
        self._criteria = StoppingCriteriaList(
            criterion
            for criterion in stopping_criteria
            if not isinstance(criterion, EosTokenCriteria | MaxLengthCriteria)
        )
        wants = generation_config.return_dict_in_generate
        self._returns_dict = bool(wants)
        self._kept: list[list[Tensor]] | None = (
            [[] for _ in range(num_rows)] if wants and generation_config.output_scores else None
        )
        self._raw: list[list[Tensor]] | None = (
            [[] for _ in range(num_rows)] if wants and generation_config.output_logits else None
        )
        starts = [0] * num_rows if attention_mask is None else (attention_mask == 0).sum(1).tolist()
        padded: list[list[int]] = input_ids.tolist()
        self._padded = padded  # what transformers shows to processors and criteria
        self.prompts = [ids[start:] for ids, start in zip(padded, starts, strict=True)]
        self._new: list[list[int]] = [[] for _ in range(num_rows)]
        # Of the round:
        self._rows: Sequence[int] = ()
        self._noise: Tensor | None = None
        self._index = torch.empty(0, dtype=torch.int64)
        self._scores = self._processed = torch.empty(0)

    def begin(self, rows: Sequence[int], num_new: int) -> None:
        """Make the noise of all places, for drafts and choices alike."""
        self._rows = list(rows)
        self._index = torch.tensor(self._rows)
        if self._seeds is not None:
            self._places = torch.tensor([len(self._new[row]) for row in rows])[:, None] + torch.arange(num_new)
        self._noise = None

    def draft(self, tuned: Tensor, drafts: Tensor) -> Tensor:
        """What the tuned model would choose by itself."""
        scores = self._draft_scores(tuned, self._index)
        offset = drafts.shape[1]
        if self._of_texts is not None:
            for number, (row, before) in enumerate(zip(self._rows, drafts.tolist(), strict=True)):
                scores[number] = self._process(self._of_texts[row], scores[number : number + 1], row, before)[0]
        else:
            for part in self._processors:
                scores = part(None, scores)
        return (scores + self._noise_at(offset, scores)).argmax(-1)

    def choose(self, asked: Round) -> Tensor:
        """What the proxy chooses: the best of the processed scores, with noise where it samples."""
        scores = self._combine(asked.large, asked.tuned, asked.untuned, self._index)
        self._scores = scores
        num_rows, num_new, width = scores.shape
        if self._of_texts is not None:
            processed = torch.empty_like(scores)
            chosen = torch.zeros((num_rows, num_new), dtype=torch.int64)
            noise = self._all_noise(scores)
            for number, (row, drafts) in enumerate(zip(self._rows, asked.drafts.tolist(), strict=True)):
                for place in range(num_new):
                    one = self._process(self._of_texts[row], scores[number : number + 1, place], row, drafts[:place])
                    processed[number, place] = one[0]
                    chosen[number, place] = (one[0] if noise is None else one[0] + noise[number, place]).argmax()
                    if place < num_new - 1 and int(chosen[number, place]) != drafts[place]:
                        break
            self._processed = processed
            return chosen
        flat = scores.view(-1, width)
        for part in self._processors:
            flat = part(None, flat)
        self._processed = flat.view(num_rows, num_new, width)
        noise = self._all_noise(scores)
        return (self._processed if noise is None else self._processed + noise).argmax(-1)

    def take(self, row: int, ids: Sequence[int]) -> bool:
        """Put tokens at the end of a text until something ends it."""
        number = self._rows.index(row)
        for place, token_id in enumerate(ids):
            self._new[row].append(token_id)
            if self._kept is not None:
                self._kept[row].append(self._processed[number, place].clone())
            if self._raw is not None:
                self._raw[row].append(self._scores[number, place].clone())
            if self._streamer is not None:
                self._streamer.put(torch.tensor([token_id]))
            over = token_id in self._end_ids or self.room(row) <= 0
            if self._criteria:
                text = torch.tensor([self._padded[row] + self._new[row]], device=self._device)
                scores = None if self._kept is None else tuple(kept[None] for kept in self._kept[row])
                over |= bool(self._criteria(text, scores)[0])
            if over:
                return True
        return False

    def room(self, row: int) -> int:
        """Tokens up to the longest text that is allowed."""
        return self._max_length - self._width - len(self._new[row])  # a prompt may be longer than that itself

    def result(self) -> GenerateDecoderOnlyOutput | Tensor:
        """What ``_sample`` returns. Scores behind a text's end are 0, and there is no cache to go on with."""
        if self._streamer is not None:
            self._streamer.end()
        longest = max(map(len, self._new))
        filled = [
            [*prompt, *new, *[self._pad_id] * (longest - len(new))]
            for prompt, new in zip(self._padded, self._new, strict=True)
        ]
        sequences = torch.tensor(filled, device=self._device)
        if not self._returns_dict:
            return sequences
        return GenerateDecoderOnlyOutput(
            sequences=sequences,
            scores=None if self._kept is None else _by_place(self._kept, longest),
            logits=None if self._raw is None else _by_place(self._raw, longest),
        )

    def _process(self, processors: Sequence[Any], scores: Tensor, row: int, drafts: Sequence[int]) -> Tensor:
        """Processed scores ``(1, width)`` of one place, whose text ends with these drafts."""
        text = torch.tensor([[*self._padded[row], *self._new[row], *drafts]], device=scores.device)
        for part in processors:
            scores = part(text, scores)
        return scores

    def _noise_at(self, place: int, like: Tensor) -> Tensor | float:
        noise = self._all_noise(like)
        return 0.0 if noise is None else noise[:, place]

    def _all_noise(self, like: Tensor) -> Tensor | None:
        """``(rows, new, width)``, float32."""
        if self._seeds is None:
            return None
        if self._noise is None or self._noise.device != like.device:
            seeds = self._seeds[self._index][:, None].expand_as(self._places)
            flat = keyed_gumbel(
                seeds.reshape(-1).to(like.device), self._places.reshape(-1).to(like.device), like.shape[-1]
            )
            self._noise = flat.view(*self._places.shape, -1)
        return self._noise


def _seeds(logits_processor: LogitsProcessorList, num_rows: int) -> Tensor:
    """``(rows,)``, int64; drawn from torch's global generator where none were given."""
    seeded = next((part for part in logits_processor if isinstance(part, Seeded)), None)
    if seeded is None:
        seeded = Seeded(int(torch.randint(-(2**63), 2**63 - 1, ())))
    return seeded.of_rows(num_rows)


def _of_row(processor: Any, row: int) -> Any:
    """A processor for one row: this one, unless it holds something for each."""
    if isinstance(processor, RepetitionPenaltyLogitsProcessor) and isinstance(processor.prompt_ignore_length, Tensor):
        return RepetitionPenaltyLogitsProcessor(processor.penalty, processor.prompt_ignore_length[row : row + 1])
    return processor


def _by_place(rows: Sequence[Sequence[Tensor]], longest: int) -> tuple[Tensor, ...]:
    """One tensor ``(rows, width)`` for each new token; 0 where a row has none."""
    nothing = torch.zeros_like(next(row[0] for row in rows if row))
    return tuple(torch.stack([row[place] if place < len(row) else nothing for row in rows]) for place in range(longest))
