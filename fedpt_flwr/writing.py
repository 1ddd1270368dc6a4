"""Answers that models write by themselves, token by token, in batches of prompts of any length."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedpt_flwr.data import collate_prompts
from fedpt_flwr.errors import DataError, ModelError
from fedpt_flwr.losses import opened
from fedpt_flwr.models import input_device, is_remote, max_positions
from fedpt_flwr.proxy import ProxyModel


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
    with opened(lambda: contextlib.nullcontext(model)):
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


def draw_texts(
    public_ids: Sequence[Sequence[int]], *, shots: int, room: int, generator: np.random.Generator
) -> list[Sequence[int]]:
    """Draws public texts for a prompt: as many as fit together, up to ``shots``.

    Args:
        public_ids: Tokens of the texts to choose from, each with the blank line that ends it.
        shots: Texts to take at most.
        room: Tokens of all of them at most.
        generator: Decides which texts, and their order; one that does not fit is passed over.
    """
    taken: list[Sequence[int]] = []
    for index in generator.permutation(len(public_ids)):
        if len(taken) == shots:
            break
        if len(public_ids[index]) <= room:
            taken.append(public_ids[index])
            room -= len(public_ids[index])
    return taken


def few_shot_prompt(
    prompt_ids: Sequence[int],
    texts: Sequence[Sequence[int]],
    *,
    max_prompt_tokens: int,
    bos_token_id: int | None = None,
) -> tuple[list[int], int]:
    """Puts public texts before a prompt: from the first on, as many as fit.

    Args:
        prompt_ids: The prompt's tokens, which stay as they are in every other row.
        texts: Tokens of the texts.
        max_prompt_tokens: Length of the result at most.
        bos_token_id: If the prompt begins with this token, so does the result, and only there.

    Returns:
        The longer prompt and the number of texts in it, which is 0 where not even the first fits.
    """
    begins_with_bos = bos_token_id is not None and list(prompt_ids[:1]) == [bos_token_id]
    begin, rest = (list(prompt_ids[:1]), list(prompt_ids[1:])) if begins_with_bos else ([], list(prompt_ids))
    used = sum(total <= max_prompt_tokens - len(prompt_ids) for total in itertools.accumulate(map(len, texts)))
    return [*begin, *itertools.chain.from_iterable(texts[:used]), *rest], used
