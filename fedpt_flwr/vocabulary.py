"""Two tokenizers that number the same tokens differently: an exact map of their ids, or a refusal that shows why not.

A proxy adds the scores of three models id by id, so an id must be one token to all of them. Where the large model's
tokenizer has the same tokens in another order, or one of the two has further tokens that no text is cut into (padding,
special and added tokens), there is an exact map between them. :func:`translate` then makes the large model speak the
small one's ids: those it reads are mapped before its embedding, and its scores are gathered behind its head. Its
weights stay as they are, and everything else takes it for a model of the small one's family.

The small model's ids are the common language, because devices know no other: a text is tokenised once, by the small
model's tokenizer. A token that the large model lacks gets the score -inf from it, so that the proxy never writes it,
and cannot be read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fedpt_flwr.errors import ModelError, VocabularyMismatch

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

_PLACE = "model.large and model.small"
_SHOWN = 3
_REMEDY = "choose two models of one family"
_FILE = "large-ids.safetensors"
_SINGLE_IDS = ("bos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id")
_ID_LISTS = ("eos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens")


@dataclass(frozen=True, eq=False, slots=True)
class IdMap:
    """Which of the large model's ids is which of the small one's.

    Attributes:
        large_ids: For each of the small model's ids the large one's id of the same token, -1 for none; ``(tokens,)``,
            int64, on the CPU.
        pad_id: The id that fills up batches of the small model: it may be read, masked, even if the large model has no
            such token. -1 for none.
    """

    large_ids: Tensor
    pad_id: int = -1

    def __post_init__(self) -> None:
        known = self.large_ids[self.large_ids >= 0]
        is_fine = self.large_ids.dim() == 1 and self.large_ids.dtype == torch.int64 and len(known) > 0
        if not is_fine or int(self.large_ids.min()) < -1 or len(known.unique()) < len(known):
            raise ModelError("a map of ids must give each of them another one, or -1", remedy="write the folder again")

    @property
    def is_whole(self) -> bool:
        """Whether the large model has all the small model's tokens."""
        return bool((self.large_ids >= 0).all())

    def digest(self) -> str:
        """A short hash that tells maps apart."""
        values = [*self.large_ids.tolist(), self.pad_id]
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]

    def save(self, folder: Path) -> None:
        """Write the map into a folder."""
        save_file({"large_ids": self.large_ids, "pad_id": torch.tensor([self.pad_id])}, str(folder / _FILE))

    @classmethod
    def load(cls, folder: Path, digest: str) -> IdMap:
        """Read the map of a folder.

        Raises:
            ModelError: It is missing, damaged or another one.
        """
        path = folder / _FILE
        remedy = "copy the folder again"
        try:
            arrays = load_file(str(path))
            found = cls(arrays["large_ids"], int(arrays["pad_id"]))
        except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ModelError(f"the map of ids cannot be read ({reason})", place=str(path), remedy=remedy) from error
        if found.digest() != digest:
            raise ModelError(
                f"the map of ids is not the one of this proxy ({digest})",
                value=found.digest(),
                place=str(path),
                remedy=remedy,
            )
        return found


@dataclass(frozen=True, eq=False, slots=True)
class Vocabulary:
    """What the proxy of two models can write.

    Attributes:
        size: The small model's ids that are tokens are below this.
        id_map: How the large model is translated, or None where both number their tokens alike.
    """

    size: int
    id_map: IdMap | None = None


def match_vocabularies(
    large: PreTrainedTokenizerBase, small: PreTrainedTokenizerBase, sizes: Mapping[str, int] | None = None
) -> Vocabulary:
    """Find how one token id can mean the same text to both models.

    Args:
        large: The large model's tokenizer.
        small: The small model's tokenizer.
        sizes: Rows of each model's output layer, by name. More than the vocabulary's is padding, and fine.

    Returns:
        The number of the small model's ids that are tokens, and the map to the large model's.

    Raises:
        VocabularyMismatch: There is no exact map: both have tokens that the other lacks, or one is cut into tokens by
            other rules. Says how many entries differ and shows the first ones.
    """
    ours, theirs = large.get_vocab(), small.get_vocab()
    for name, tokens in (("large", ours), ("small", theirs)):
        if (size := (sizes or {}).get(name)) is not None and size <= max(tokens.values()):
            raise VocabularyMismatch(
                f"the {name} model scores {size} ids, fewer than the tokenizer's {max(tokens.values()) + 1}",
                place=f"model.{name}",
                remedy="use the tokenizer that belongs to the model",
            )
    vocab_size: int = max(theirs.values()) + 1
    if ours == theirs:
        return Vocabulary(vocab_size)
    if ours.keys() - theirs.keys() and theirs.keys() - ours.keys():
        raise _both_have_others(ours, theirs)
    _check_rules(large, small)
    large_ids = torch.full((vocab_size,), -1, dtype=torch.int64)
    for token, number in theirs.items():
        large_ids[number] = ours.get(token, -1)
    pad_id = small.pad_token_id
    return Vocabulary(vocab_size, IdMap(large_ids, -1 if pad_id is None else int(pad_id)))


def _both_have_others(ours: Mapping[str, int], theirs: Mapping[str, int]) -> VocabularyMismatch:
    """Neither vocabulary holds the other: what only one has comes first, since that is what cannot be mapped."""
    differing = sorted(
        (token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)),
        key=lambda token: (token in ours and token in theirs, min(_id(ours, token), _id(theirs, token)), token),
    )
    # One that only the large model has beside one that only the small one has: either alone could be mapped.
    firsts = [next(token for token in differing if token not in other) for other in (theirs, ours)]
    shown = [*firsts, *(token for token in differing if token not in firsts)][:_SHOWN]
    return VocabularyMismatch(
        f"large and small model must share one vocabulary, or one of them must have all tokens of the other; "
        f"{len(ours.keys() - theirs.keys())} of {len(ours)} are the large model's alone and "
        f"{len(theirs.keys() - ours.keys())} of {len(theirs)} the small one's, the first as (id in large / in small): "
        + ", ".join(f"{token!r} ({ours.get(token)} / {theirs.get(token)})" for token in shown),
        place=_PLACE,
        remedy=_REMEDY,
    )


def _id(tokens: Mapping[str, int], token: str) -> int:
    return tokens.get(token, 1 << 60)


def _check_rules(large: PreTrainedTokenizerBase, small: PreTrainedTokenizerBase) -> None:
    """Make sure that what was learnt about how texts are cut is the same, token by token.

    How a text is normalised and split before that is not compared: the small model's tokenizer alone does it.

    Raises:
        VocabularyMismatch: It is not.
    """
    ours, theirs = _learnt(large), _learnt(small)
    if ours is None or theirs is None:
        return
    if ours["type"] != theirs["type"]:
        difference = f"one is of the kind {ours['type']}, the other {theirs['type']}"
    elif ours.get("merges") != theirs.get("merges"):
        left, right = _merges(ours), _merges(theirs)
        number = next(
            (place for place, pair in enumerate(zip(left, right, strict=False)) if pair[0] != pair[1]),
            min(len(left), len(right)),
        )
        one, other = (repr(part[number]) if number < len(part) else "none" for part in (left, right))
        difference = (
            f"{len(left)} and {len(right)} merges, which differ first at number {number} (in large / in small): "
            f"{one} / {other}"
        )
    elif ours["type"] == "BPE":
        return  # a token that only one has is no product of a merge
    else:
        added = {*large.added_tokens_encoder, *small.added_tokens_encoder}
        left_vocab, right_vocab = large.get_vocab(), small.get_vocab()
        others = sorted((left_vocab.keys() ^ right_vocab.keys()) - added)
        pieces = [dict(map(tuple, part["vocab"])) for part in (ours, theirs)] if ours["type"] == "Unigram" else [{}, {}]
        others += sorted(piece for piece in pieces[0].keys() & pieces[1].keys() if pieces[0][piece] != pieces[1][piece])
        if not others:
            return
        difference = f"{len(others)} tokens are one's alone or weigh otherwise, the first {others[0]!r}"
    raise VocabularyMismatch(
        f"large and small model must cut texts into tokens by the same rules; {difference}",
        place=_PLACE,
        remedy=_REMEDY,
    )


def _learnt(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any] | None:
    """The model of a tokenizer as its file has it, or None where it is not one of the library ``tokenizers``."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    learnt: dict[str, Any] = json.loads(backend.to_str())["model"]
    return learnt


def _merges(learnt: Mapping[str, Any]) -> list[str]:
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in learnt.get("merges") or ()]


# --- a model that speaks other ids ------------------------------------------------------------------------------------


def translate(model: PreTrainedModel, id_map: IdMap) -> None:
    """Make a large model read and score the small model's ids, in place; no weight is changed.

    Args:
        model: The large model. One that is translated by the same map already stays as it is.
        id_map: The ids.

    Raises:
        ModelError: The model is translated by another map, or has fewer rows than the map speaks of.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    before = translation_of(model)
    if before is not None:
        if before.digest() != id_map.digest():
            raise ModelError(
                "a large model can speak the ids of one small model at a time", remedy="load it once more for the other"
            )
        return
    rows = min(int(embedding.num_embeddings), int(head.out_features))
    if int(id_map.large_ids.max()) >= rows:
        raise VocabularyMismatch(
            f"the map of ids must stay below the large model's {rows} rows", value=int(id_map.large_ids.max())
        )
    embedding.register_forward_pre_hook(_Reading(id_map))
    head.register_forward_hook(_Scoring(id_map))
    if not id_map.is_whole:
        model.register_forward_hook(_RulingOut(id_map))
    head.id_map = id_map
    if model.generation_config is not None:
        _translate_settings(model.generation_config, id_map)


def translation_of(model: PreTrainedModel) -> IdMap | None:
    """The map by which a model is translated, or None."""
    return getattr(model.get_output_embeddings(), "id_map", None)


def missing_ids(model: PreTrainedModel) -> Tensor | None:
    """The ids that a translated model cannot read, ``(tokens,)``, int64, on the CPU; None where it reads all."""
    id_map = translation_of(model)
    return None if id_map is None or id_map.is_whole else (id_map.large_ids < 0).nonzero()[:, 0]


def any_id(model: PreTrainedModel) -> int:
    """An id that a model reads: where it is translated, not every id is one."""
    id_map = translation_of(model)
    return 0 if id_map is None else int((id_map.large_ids >= 0).nonzero()[0])


class _Indices:
    """A tensor of ids, once on every device where it is needed."""

    def __init__(self, ids: Tensor) -> None:
        self._on = {torch.device("cpu"): ids}

    def on(self, device: torch.device) -> Tensor:
        """The ids on this device."""
        if device not in self._on:
            self._on[device] = next(iter(self._on.values())).to(device)
        return self._on[device]


class _Reading:
    """Maps ids on their way into an embedding."""

    def __init__(self, id_map: IdMap) -> None:
        ids = id_map.large_ids.clone()
        if 0 <= id_map.pad_id < len(ids) and ids[id_map.pad_id] < 0:
            ids[id_map.pad_id] = int(ids.max())  # masked wherever it stands
        self._is_whole = bool((ids >= 0).all())
        self._size = len(ids)
        self._ids = _Indices(ids)

    def __call__(self, _embedding: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        ids, *others = inputs
        mapped = self._ids.on(ids.device)[ids]
        if not self._is_whole and bool((mapped < 0).any()):
            raise ModelError(
                "the large model cannot read tokens that its vocabulary lacks",
                value=sorted(set(ids[mapped < 0].tolist()))[:_SHOWN],
                remedy="leave these tokens out of prompts and answers, or choose a large model that has them",
            )
        return (mapped, *others)


class _Scoring:
    """Puts scores that come out of a head into the order of the small model's ids; any for those that it lacks."""

    def __init__(self, id_map: IdMap) -> None:
        ids = id_map.large_ids
        self._is_prefix = bool((ids == torch.arange(len(ids))).all())
        self._ids = _Indices(ids.clamp_min(0))
        self._size = len(ids)

    def __call__(self, _head: nn.Module, _inputs: tuple[Any, ...], scores: Tensor) -> Tensor:
        if self._is_prefix:
            return scores[..., : self._size]
        return scores.index_select(-1, self._ids.on(scores.device))


class _RulingOut:
    """Scores tokens that the model lacks -inf, once it is done: some models cap what comes out of their head."""

    def __init__(self, id_map: IdMap) -> None:
        self._missing = _Indices((id_map.large_ids < 0).nonzero()[:, 0])

    def __call__(self, _model: nn.Module, _inputs: tuple[Any, ...], output: Any) -> Any:
        is_tuple = isinstance(output, tuple)
        logits = output[0] if is_tuple else output.logits
        ruled = logits.index_fill(-1, self._missing.on(logits.device), -torch.inf)
        if is_tuple:
            return (ruled, *output[1:])
        output.logits = ruled
        return output


def _translate_settings(config: GenerationConfig, id_map: IdMap) -> None:
    """Where decoding begins and ends, in the small model's ids; what it cannot write is left out."""
    small_ids = {large: small for small, large in enumerate(id_map.large_ids.tolist()) if large >= 0}
    for name in _SINGLE_IDS:
        setattr(config, name, small_ids.get(getattr(config, name, None)))
    for name in _ID_LISTS:
        value = getattr(config, name, None)
        if value is not None:
            ids: Sequence[int] = [value] if isinstance(value, int) else value
            known = [small_ids[number] for number in ids if number in small_ids]
            setattr(config, name, known[0] if len(known) == 1 else known or None)
