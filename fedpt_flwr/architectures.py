"""What a model is made of, told without its weights, its tokenizer or a network: for planning, not for runs.

Some public models are known here by name. Only what their size depends on is given; rotary frequencies and the like
are left at the defaults of transformers. ``tests/test_plan.py`` holds the sums to the published numbers of parameters.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from fedpt_flwr.errors import ModelError, VocabularyMismatch
from fedpt_flwr.models import pretrained_source
from fedpt_flwr.paths import expanded, is_folder

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_MOST_PADDING = 1.05  # of one vocabulary beside another of the same family
_CAUSES = (OSError, ValueError, KeyError, TypeError, RuntimeError, StrictDataclassError)


@dataclasses.dataclass(frozen=True, slots=True)
class Architecture:
    """What the size of a public decoder depends on, in the names of its ``config.json``."""

    model_type: str
    vocab_size: int
    max_position_embeddings: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    tie_word_embeddings: bool

    def config(self) -> PretrainedConfig:
        """As transformers describes it."""
        settings = dataclasses.asdict(self)
        return AutoConfig.for_model(settings.pop("model_type"), **settings)


ARCHITECTURES: Mapping[str, Architecture] = {
    "SmolLM2-135M": Architecture("llama", 49152, 8192, 576, 1536, 30, 9, 3, True),
    "SmolLM2-1.7B": Architecture("llama", 49152, 8192, 2048, 8192, 24, 32, 32, True),
    "Qwen2.5-0.5B": Architecture("qwen2", 151936, 32768, 896, 4864, 24, 14, 2, True),
    "Qwen2.5-7B": Architecture("qwen2", 152064, 131072, 3584, 18944, 28, 28, 4, False),
    "Llama-3.2-1B": Architecture("llama", 128256, 131072, 2048, 8192, 16, 32, 8, True),
    "Llama-3.1-70B": Architecture("llama", 128256, 131072, 8192, 28672, 80, 64, 8, False),
}
"""Public models by the name after the owner's."""

_OWNERS = {"SmolLM2": "HuggingFaceTB", "Qwen2.5": "Qwen", "Llama": "meta-llama"}  # of names that begin so


def find_architecture(ref: str) -> PretrainedConfig:
    """The config of the model that a reference means; nothing is fetched.

    Args:
        ref: ``demo:small``, ``demo:large``, the absolute path of a folder or of a ``config.json``, a name of
            :data:`ARCHITECTURES` with or without its owner, or a hub id whose config is on this machine already.

    Raises:
        ModelError: There is no such model here, or its config is none.
    """
    known = _known_name(ref)
    if known is not None:
        return ARCHITECTURES[known].config()
    path = expanded(ref)
    if path.is_absolute() and path.suffix == ".json":
        return _from_file(path)
    source, version = pretrained_source(ref)
    try:
        return AutoConfig.from_pretrained(source, local_files_only=True, **version)
    except _CAUSES as error:
        if is_folder(Path(source)):
            raise _not_a_config(Path(source) / "config.json", error) from error
        raise ModelError(
            "this model is not known here, and nothing is downloaded to plan with it",
            value=ref,
            remedy="give the absolute path of its config.json, or of a folder that holds one, or one of "
            + ", ".join(ARCHITECTURES),
        ) from error


def check_sizes(large: PretrainedConfig, small: PretrainedConfig) -> None:
    """Refuse two models that cannot share one vocabulary, as far as its size tells; padding may differ.

    Raises:
        VocabularyMismatch: Their sizes are too far apart.
    """
    sizes = [int(config.get_text_config().vocab_size) for config in (large, small)]
    if max(sizes) > _MOST_PADDING * min(sizes):
        raise VocabularyMismatch(
            f"large and small model must share one vocabulary; they have {sizes[0]:,} and {sizes[1]:,} entries",
            place="model.large and model.small",
            remedy="choose two models of one family",
        )


def _known_name(ref: str) -> str | None:
    """The name in :data:`ARCHITECTURES` that is meant: alone, or after its owner's as on the hub."""
    meant = ref.casefold()
    for known in ARCHITECTURES:
        whole = f"{_OWNERS[known.split('-')[0]]}/{known}"
        if meant in (known.casefold(), whole.casefold()):
            return known
    return None


def _from_file(path: Path) -> PretrainedConfig:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        return AutoConfig.for_model(settings.pop("model_type"), **settings)
    except OSError as error:
        raise ModelError(f"cannot be read ({error.strerror})", value=str(path), remedy="check the path") from error
    except (*_CAUSES, AttributeError) as error:
        raise _not_a_config(path, error) from error


def _not_a_config(path: Path, error: Exception) -> ModelError:
    reason = " ".join(str(error).split())[:200]
    return ModelError(
        f"must be a config that transformers knows, with its model_type ({type(error).__name__}: {reason})",
        value=str(path),
        remedy="take the config.json of a causal LM as save_pretrained writes it",
    )
