"""A large model behind somebody's API, as a causal LM of transformers that has no weights.

:class:`RemoteModel` answers ``forward()`` with log-probabilities that it asks a service for (``endpoint.py``). Its
key-value cache holds the token ids themselves, so whatever edits a cache between two passes (beams, batches of rows of
different lengths, drafts that are taken back) edits the text that is asked about. So the proxy, its decoding, scoring
and distillation take it for a large model like any other; positions that nobody looks at are never asked about.

A service that shows the likeliest tokens only leaves the others at -inf, and :attr:`RemoteModel.hides_tokens` says so.
What is made of that is for whoever knows the small models (``logits.fill_hidden``, ``logits.bound_hidden``).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.generation import StoppingCriteriaList
from transformers.modeling_outputs import CausalLMOutputWithPast

from fedpt_flwr.config import RemoteConfig, RunConfig, parse_run_config
from fedpt_flwr.endpoint import NEXT, Endpoint, Usage
from fedpt_flwr.errors import ModelError
from fedpt_flwr.paths import expanded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROUND_TRIP_S = 0.05
"""What a request takes if nothing is known."""


class RemoteLMConfig(PreTrainedConfig):
    """Of a model without weights: what is asked about it by those that use it."""

    model_type = "fedpt_remote"

    vocab_size: int = 0
    num_hidden_layers: int = 1
    """One layer of the cache, for the token ids."""
    max_position_embeddings: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    use_cache: bool = True


class RemoteModel(PreTrainedModel, GenerationMixin):
    """A causal LM that asks a service.

    Args:
        endpoint: The service's model.
        tokenizer: Of the small models, and by its vocabulary this one's.

    Attributes:
        endpoint: The same.
    """

    config_class = RemoteLMConfig
    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(self, endpoint: Endpoint, tokenizer: PreTrainedTokenizerBase) -> None:
        special = {
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        super().__init__(RemoteLMConfig(vocab_size=endpoint.width, max_position_embeddings=endpoint.context, **special))
        self.all_tied_weights_keys: dict[str, str] = {}
        self.generation_config = GenerationConfig(**special)
        self.endpoint = endpoint
        self.name_or_path = endpoint.url
        self._complete: Tensor | None = None  # rows of generate() that have ended

    @property
    def device(self) -> torch.device:
        """Where its scores are."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Type of its scores."""
        return torch.float32

    @property
    def identity(self) -> str:
        """What tells it from other models, in place of weights."""
        return f"{self.endpoint.url} {self.endpoint.model}"

    @property
    def is_remote(self) -> bool:
        """That every position which is looked at costs something."""
        return True

    @property
    def hides_tokens(self) -> bool:
        """Whether some tokens' log-probabilities are not shown, and stand at -inf."""
        return self.endpoint.num_top is not None

    def fills(self, *, samples: bool) -> bool:
        """Whether hidden tokens get a share of what is left, as the untuned model would give it, or are ruled out."""
        how = self.endpoint.config.hidden
        return how == "fill" or (how == "auto" and samples)

    @property
    def draft_tokens(self) -> int:
        """How many drafts save requests, whatever the timings are."""
        return 0 if self.endpoint.api == NEXT else self.endpoint.config.draft_tokens

    def reference(self) -> dict[str, str]:
        """What a proxy's folder says to find it again."""
        config = self.endpoint.config
        return {
            "ref": self.endpoint.url,
            "remote_model": self.endpoint.model,
            "remote_api": config.api,
            "remote_top_logprobs": str(config.top_logprobs),
            "remote_hidden": config.hidden,
        }

    def seconds(self, num_tokens: int) -> float:
        """What a pass over so many tokens takes, without making one."""
        usage = self.endpoint.usage
        each = usage.seconds / usage.requests if usage.requests else _ROUND_TRIP_S
        return each if self.endpoint.asks_once else each * num_tokens

    def usage_since(self, earlier: Usage) -> dict[str, Any]:
        """What has been spent since then, for ``costs.jsonl``."""
        return self.endpoint.usage.minus(earlier).to_json(self.endpoint.config)

    def get_output_embeddings(self) -> None:
        """There are none here."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_wanted: Sequence[int] | None = None,
        shows_next: bool = False,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Score the next token at every position that is kept.

        Args:
            input_ids: ``(batch, seq)``, int64; with a cache, the new tokens only.
            attention_mask: ``(batch, cached + seq)``, 1 for tokens and 0 for padding; or what a ``RaggedCache`` gives;
                None means no padding.
            position_ids: ``(batch, seq)``; read only with a mask of a ``RaggedCache``.
            cache: A cache for this model's config, extended in place.
            use_cache: Whether to return a cache.
            logits_to_keep: Score only the last so many positions (0 is all), or the positions in this tensor.
            num_wanted: Ask only about the first so many of them, of each row; the others score 0. None: about all.
            shows_next: See :meth:`~fedpt_flwr.endpoint.Endpoint.ask`: for losses, not for decoding.
            return_dict: False returns a tuple.
            **kwargs: Other arguments of transformers models; ignored, but for labels, which are refused.

        Returns:
            ``logits``: log-probabilities ``(batch, kept, vocab)``, float32; -inf for tokens that the service hides, 0
            at padding.

        Raises:
            RemoteError: The service does not answer, or not as it must.
        """
        if input_ids is None:
            raise ModelError("a remote model reads input_ids", value="inputs_embeds or nothing")
        if kwargs.get("labels") is not None:
            raise ModelError("a remote model computes no loss", value="labels", remedy="see fedpt_flwr.scoring")
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if cache is None and use_cache:
            cache = DynamicCache(config=self.config)
        ids = input_ids.cpu()
        num_new = ids.shape[1]
        if cache is not None:  # the ids are the keys, and the values too, since there must be some
            states = ids[:, None, :, None]
            ids = cache.update(states, states, 0)[0][:, 0, :, 0]
        visible, places = _visible(ids, num_new, attention_mask, position_ids)
        if isinstance(logits_to_keep, Tensor):
            places = places[:, logits_to_keep.cpu()]
        elif logits_to_keep:
            places = places[:, -logits_to_keep:]
        if num_wanted is not None:
            unwanted = torch.arange(places.shape[1]) >= torch.tensor(num_wanted)[:, None]
            places = places.masked_fill(unwanted, -1)
        scores = self._scores(ids, visible, places, shows_next=shows_next)
        output = CausalLMOutputWithPast(logits=scores, cache=cache if use_cache else None)
        return output.to_tuple() if return_dict is False else output

    def _scores(self, ids: Tensor, visible: Tensor, places: Tensor, *, shows_next: bool) -> Tensor:
        """Ask about these places of the rows' visible tokens; -1 is none."""
        texts, wanted = [], []
        for row, of in enumerate(places.tolist()):
            is_complete = self._complete is not None and len(self._complete) == len(ids) and bool(self._complete[row])
            texts.append(ids[row][visible[row]].tolist())
            wanted.append([] if is_complete else sorted({place for place in of if place >= 0}))
        scores = torch.zeros((*places.shape, self.config.vocab_size))
        answers = self.endpoint.ask(texts, wanted, shows_next=shows_next)
        for row, (asked, found) in enumerate(zip(wanted, answers, strict=True)):
            index = {place: number for number, place in enumerate(asked)}
            for column, place in enumerate(places[row].tolist()):
                if place in index:
                    scores[row, column] = found[index[place]]
        return scores

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: StoppingCriteriaList,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Sample by the loop of transformers, which goes on with rows that have ended; nothing is asked about those."""
        watched = _Watched(stopping_criteria, self)
        self._complete = torch.zeros(len(input_ids), dtype=torch.bool)
        try:
            return super()._sample(input_ids, logits_processor, watched, *args, **kwargs)
        finally:
            self._complete = None

    def note_complete(self, rows: Tensor) -> None:
        """Remember which rows of ``generate()`` have ended."""
        if self._complete is not None:
            self._complete |= rows.cpu()


class _Watched(StoppingCriteriaList):
    """Criteria that tell the model which rows they have ended."""

    def __init__(self, criteria: StoppingCriteriaList, model: RemoteModel) -> None:
        super().__init__(criteria)
        self._model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        done: Tensor = super().__call__(*args, **kwargs)
        self._model.note_complete(done)
        return done


def _visible(ids: Tensor, num_new: int, mask: Tensor | None, position_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """Which columns are a row's text, ``(rows, columns)``, and which place of it each new token has, -1 for padding."""
    if mask is not None and mask.dim() == 4 and position_ids is not None:  # rows of different lengths, without padding
        places = position_ids.cpu()
        return torch.arange(ids.shape[1]) <= places[:, -1:], places
    visible = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.cpu().bool()
    counted = visible.long().cumsum(1) - 1
    return visible, counted.masked_fill(~visible, -1)[:, ids.shape[1] - num_new :]


def is_address(ref: str) -> bool:
    """Whether a reference to a model is the address of a service."""
    return ref.startswith(("http://", "https://"))


def connect(
    url: str, tokenizer: PreTrainedTokenizerBase, config: RemoteConfig | None = None, *, named_by_folder: bool = False
) -> RemoteModel:
    """A large model behind an API, once it is known how to ask it.

    Args:
        url: The service's address; its key is in the environment variable ``FEDPT_LARGE_API_KEY``.
        tokenizer: Of the small models.
        config: How to ask; None: the defaults.
        named_by_folder: See :class:`~fedpt_flwr.endpoint.Endpoint`.

    Raises:
        RemoteError: The service cannot be reached or used.
        VocabularyMismatch: Its model has another vocabulary.
    """
    config = RemoteConfig() if config is None else config
    cache = _cache_folder(config.cache)
    model = RemoteModel(Endpoint(url, tokenizer, config, cache=cache, named_by_folder=named_by_folder), tokenizer)
    model.eval()
    return model


def remote_large(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, *, named_by_folder: bool = True
) -> RemoteModel | None:
    """A run's large model, asked as the run asked it, if it is behind an API."""
    url = config.model.large_url
    return connect(url, tokenizer, config.remote, named_by_folder=named_by_folder) if url else None


def connect_again(
    entry: Mapping[str, str], tokenizer: PreTrainedTokenizerBase, *, named_by_folder: bool = True
) -> RemoteModel:
    """The model that :meth:`RemoteModel.reference` was of, asked as it was; older references say its name alone."""
    told = {
        f"remote.{name.replace('_', '-')}": entry[f"remote_{name}"]
        for name in ("model", "api", "top_logprobs", "hidden")
        if f"remote_{name}" in entry
    }
    number = told.get("remote.top-logprobs", "0")
    config = parse_run_config(told | {"remote.top-logprobs": int(number) if number.isdecimal() else number})
    return connect(entry["ref"], tokenizer, config.remote, named_by_folder=named_by_folder)


def _cache_folder(name: str) -> Path | None:
    if name == "off":
        return None
    if name:
        return Path(name)
    home = os.environ.get("FEDPT_HOME")
    return (expanded(home) if home else Path.home() / ".fedpt").absolute() / "remote"
