"""Sampling in transformers' ``generate()`` by noise that depends only on (seed, position, id).

transformers draws from torch's generators, so that a text depends on who else is in the batch. Here the processed
scores get the noise of :func:`~fedpt_flwr.logits.keyed_gumbel`, and transformers' own loop then takes the best token:
caches, streamers, stopping and padding stay its business. Nothing here knows what the model is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from fedpt_flwr.errors import ModelError
from fedpt_flwr.logits import as_int64, keyed_gumbel


class Seeded:
    """A logits processor that leaves the scores alone: it carries a seed through ``generate()`` to :func:`sample`.

    Args:
        seed: One number, to which the index of the row is added, or one per row; they count modulo 2**64.

    Raises:
        ModelError: It is neither.
    """

    def __init__(self, seed: int | Sequence[int]) -> None:
        seeds: Sequence[Any] = seed if isinstance(seed, Sequence) and not isinstance(seed, str | bytes) else [seed]
        if not all(isinstance(value, Integral) and not isinstance(value, bool) for value in seeds):
            raise ModelError(
                "seed must be a whole number, or a list of them with one per row",
                value=seed,
                remedy="any number will do, and the same one gives the same text again",
            )
        self.seed = seed

    def __call__(self, _input_ids: Tensor, scores: Tensor) -> Tensor:
        """Change nothing."""
        return scores

    def of_rows(self, rows: int) -> Tensor:
        """The seed of each row, ``(rows,)``, int64.

        Raises:
            ModelError: There is one per row, but of another number of rows.
        """
        if not isinstance(self.seed, Sequence):
            return as_int64(int(self.seed) + row for row in range(rows))
        if len(self.seed) != rows:
            raise ModelError(
                "seed must be one number, or as many as the batch has rows, each prompt counted num_return_sequences "
                "times",
                value=f"{len(self.seed)} seeds",
                remedy=f"the batch has {rows} rows",
            )
        return as_int64(self.seed)


def sample(
    decode: Callable[..., Any],
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    **kwargs: Any,
) -> Any:
    """Draw tokens with ``decode``, transformers' loop that takes the best token or draws one (``_sample``).

    Args:
        decode: The loop, bound to its model. It must apply the processors, take the argmax, and then ask the criteria.
        input_ids: The prompts, ``(rows, length)``; the first new token of each row has position 0.
        logits_processor: What ``generate()`` prepared, with :class:`Seeded` among it, or without: then the seed is
            drawn from torch's global generator.
        stopping_criteria: What ``generate()`` prepared.
        generation_config: What ``generate()`` prepared.
        **kwargs: Further arguments of ``decode``.

    Returns:
        What ``decode`` does; ``scores`` are the processed ones, without noise.

    Raises:
        ModelError: There are not as many seeds as rows.
    """
    seeded = next((processor for processor in logits_processor if isinstance(processor, Seeded)), None)
    if seeded is None or generation_config.is_assistant:
        # An assistant, whose every draft begins at position 0 again, would reuse the noise of the first.
        seeded = Seeded(int(torch.randint(-(2**63), 2**63 - 1, ())))
    noise = _Noise(seeded.of_rows(input_ids.shape[0]), first=input_ids.shape[1])
    if generation_config.output_scores and generation_config.return_dict_in_generate:
        stopping_criteria = StoppingCriteriaList([noise.take_away, *stopping_criteria])
    best = copy.copy(generation_config)
    best.do_sample = False
    return decode(input_ids, LogitsProcessorList([*logits_processor, noise]), stopping_criteria, best, **kwargs)


class _Noise:
    """A logits processor, the last one: adds noise to the scores."""

    def __init__(self, seeds: Tensor, *, first: int) -> None:
        self.seeds = seeds
        self.first = first
        self.scores = torch.empty(0)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.scores = scores
        self.seeds = self.seeds.to(scores.device)
        positions = torch.full_like(self.seeds, input_ids.shape[1] - self.first)
        return scores + keyed_gumbel(self.seeds, positions, scores.shape[-1])

    def take_away(self, input_ids: Tensor, kept: tuple[Tensor, ...], **_kwargs: Any) -> Tensor:
        """A stopping criterion, the first one, that stops nothing.

        The token is chosen by now, and the scores kept of it, for later criteria and the caller, get their values back.
        """
        kept[-1].copy_(self.scores)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
