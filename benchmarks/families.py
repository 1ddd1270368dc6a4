"""Checkpoints of real architectures, of a few hundred kilobytes each, in the hub's layout.

No weights are fetched: models are random, tokenizers are trained on the demo world's public texts. What is real is
everything that differs from family to family: transformers' own model and tokenizer classes, which tokens there are and
which of them begin, end and pad a text, which embeddings are tied, how vocabularies are padded, where answers end
according to ``generation_config.json``, how a conversation is written, and that weights lie in several shards.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GemmaTokenizer,
    GPT2Tokenizer,
    GPTNeoXTokenizer,
    LlamaTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)

from fedpt_flwr.data import read_records

SHARD_BYTES = 100_000
"""Small enough for every checkpoint here to have several shards."""

_NUM_LEARNT = 420  # tokens that training finds, bytes included
_CONTEXT = 160


# --- tokenizers -------------------------------------------------------------------------------------------------------


@cache
def _byte_level() -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """Tokens and merges of a byte-level BPE, as GPT-2's descendants have it."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=_NUM_LEARNT, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    return _learnt(bpe, trainer)


@cache
def _byte_fallback() -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """Tokens and merges of a BPE over characters, as sentencepiece makes it; the bytes it falls back to left out."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Metaspace()
    return _learnt(bpe, trainers.BpeTrainer(vocab_size=_NUM_LEARNT - 256, show_progress=False))


def _learnt(bpe: Tokenizer, trainer: trainers.BpeTrainer) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    bpe.train_from_iterator((str(record["text"]) for record in read_records("demo:public")[:1000]), trainer)
    learnt = json.loads(bpe.to_str())["model"]
    return tuple(learnt["vocab"]), tuple((left, right) for left, right in learnt["merges"])


def _numbered(*groups: tuple[str, ...]) -> dict[str, int]:
    return {token: number for number, token in enumerate(token for group in groups for token in group)}


_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))


def llama_2(*added: str) -> PreTrainedTokenizerBase:
    """Begins texts with ``<s>``, has no padding token; with ``added`` special tokens behind all others, as Phi-3."""
    tokens, merges = _byte_fallback()
    vocabulary = _numbered(("<unk>", "<s>", "</s>"), _BYTES, tokens)
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=list(merges), add_bos_token=True)
    tokenizer.add_special_tokens({"additional_special_tokens": list(added)} if added else {})
    return tokenizer


def gemma() -> PreTrainedTokenizerBase:
    """Begins texts with ``<bos>``, spaces stay where they are; turns are marked by tokens behind the others."""
    tokens, merges = _byte_fallback()
    vocabulary = _numbered(("<pad>", "<eos>", "<bos>", "<unk>", "<mask>"), _BYTES, tokens)
    tokenizer = GemmaTokenizer(vocab=vocabulary, merges=list(merges), add_bos_token=True)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"]})
    return tokenizer


def llama_3() -> PreTrainedTokenizerBase:
    """Byte-level, begins texts by its post-processor; has no padding token."""
    tokens, merges = _byte_level()
    bpe = Tokenizer(models.BPE(vocab=_numbered(tokens), merges=list(merges), ignore_merges=True))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    bpe.add_special_tokens(special)
    bpe.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[(special[0], bpe.token_to_id(special[0]))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=special[0], eos_token="<|eot_id|>", clean_up_tokenization_spaces=False
    )


def qwen(*added: str) -> PreTrainedTokenizerBase:
    """Byte-level, nothing begins a text; with ``added`` tokens behind the others, as Qwen3's beside Qwen2.5's."""
    tokens, merges = _byte_level()
    tokenizer = Qwen2Tokenizer(
        vocab=_numbered(tokens), merges=list(merges), eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token=None
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", *added]})
    return tokenizer


def gpt2() -> PreTrainedTokenizerBase:
    """Byte-level, one special token for everything."""
    tokens, merges = _byte_level()
    return GPT2Tokenizer(vocab=_numbered(tokens, ("<|endoftext|>",)), merges=list(merges))


def neox() -> PreTrainedTokenizerBase:
    """Byte-level, special tokens in front."""
    tokens, merges = _byte_level()
    return GPTNeoXTokenizer(vocab=_numbered(("<|endoftext|>", "<|padding|>"), tokens), merges=list(merges))


def opt() -> PreTrainedTokenizerBase:
    """GPT-2's tokens in another order behind four of its own, ``</s>`` in front of every text."""
    tokens, merges = _byte_level()
    others = tuple(sorted(tokens, key=lambda token: (len(token), token[::-1])))
    return GPT2Tokenizer(
        vocab=_numbered(("<s>", "<pad>", "</s>", "<unk>"), others, ("<|endoftext|>",)),
        merges=list(merges),
        bos_token="</s>",
        eos_token="</s>",
        unk_token="</s>",
        pad_token="<pad>",
        add_bos_token=True,
    )


# --- conversations ----------------------------------------------------------------------------------------------------


def _turns(begin: str, middle: str, end: str, *, first: str = "", assistant: str = "assistant") -> str:
    """A chat template with these marks around the role and the content of each turn."""
    role = (
        "message['role']"
        if assistant == "assistant"
        else (f"('{assistant}' if message['role'] == 'assistant' else message['role'])")
    )
    return (
        f"{first}{{% for message in messages %}}{begin}{{{{ {role} }}}}{middle}"
        f"{{{{ message['content'] | trim }}}}{end}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{begin}{assistant}{middle}{{% endif %}}"
    )


_INST = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    " {{ message['content'] }}{{ eos_token }}{% else %}[INST] {{ message['content'] }} [/INST]{% endif %}{% endfor %}"
)
_CHATML = _turns("<|im_start|>", "\n", "<|im_end|>\n")
_HEADERS = _turns("<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>", first="{{ bos_token }}")
_GEMMA_TURNS = _turns("<start_of_turn>", "\n", "<end_of_turn>\n", first="{{ bos_token }}", assistant="model")
_PHI_TURNS = "".join(
    (
        "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n{% endfor %}",
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    )
)


# --- models -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Member:
    """One model of a family.

    Attributes:
        model_type: As in ``config.json``.
        settings: Further entries of ``config.json``.
        tokenizer: Makes its tokenizer.
        padding: Rows of the embedding behind the last token.
        ends: Tokens that ``generation_config.json`` calls ends, where that is not the tokenizer's one alone.
        chat_template: How conversations are written; empty: the model is no chat model.
    """

    model_type: str
    settings: Mapping[str, Any]
    tokenizer: Callable[[], PreTrainedTokenizerBase]
    padding: int = 0
    ends: tuple[str, ...] = ()
    chat_template: str = ""

    def config(self, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
        """Its config, with the ids of this tokenizer."""
        size = max(tokenizer.get_vocab().values()) + 1 + self.padding
        ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        settings = dict(self.settings)
        if "text_config" in settings:
            settings["text_config"] = {**settings["text_config"], "vocab_size": size, **ids}
        else:
            settings["vocab_size"] = size
        return AutoConfig.for_model(self.model_type, **settings, **ids)

    def make(self, folder: Path, *, seed: int, dtype: torch.dtype = torch.float32) -> Path:
        """Write the checkpoint into ``folder``, which is returned."""
        tokenizer = self.tokenizer()
        if self.chat_template:
            tokenizer.chat_template = self.chat_template
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(self.config(tokenizer)).to(dtype)
        randomise(model, seed=seed)
        rare = [number for token, number in tokenizer.get_vocab().items() if token in _BYTES]
        with torch.no_grad():  # a trained model writes single bytes only where they make characters
            model.get_output_embeddings().weight[rare] *= 0.1
        model.config.eos_token_id = tokenizer.eos_token_id
        model.generation_config.eos_token_id = [
            tokenizer.convert_tokens_to_ids(token) for token in self.ends
        ] or tokenizer.eos_token_id
        model.generation_config.bos_token_id = tokenizer.bos_token_id
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.save_pretrained(folder, max_shard_size=SHARD_BYTES)
        tokenizer.save_pretrained(folder)
        return folder


@torch.no_grad()
def randomise(model: torch.nn.Module, *, seed: int) -> None:
    """Random weights under which texts matter: matrices of deviation 0.25, everything else a little off its start."""
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        noise = torch.randn(weight.shape, generator=generator).to(weight.dtype)
        if weight.dim() >= 2:
            weight.copy_(noise * 0.25)
        else:
            weight.add_(noise * 0.1)


def _rope(hidden: int, layers: int, heads: int, shared: int, **settings: Any) -> dict[str, Any]:
    """The settings that Llama's descendants share."""
    return {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": shared,
        "max_position_embeddings": _CONTEXT,
        **settings,
    }


def _pair(
    model_type: str, small: dict[str, Any], large: dict[str, Any], paddings: tuple[int, int] = (0, 0), **common: Any
) -> dict[str, Member]:
    return {
        "small": Member(model_type=model_type, settings=small, padding=paddings[0], **common),
        "large": Member(model_type=model_type, settings=large, padding=paddings[1], **common),
    }


_LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_GEMMA_3 = {"head_dim": 16, "sliding_window": 12, "query_pre_attn_scalar": 16}
_THREE_KINDS = ["sliding_attention", "sliding_attention", "full_attention"]


FAMILIES: Mapping[str, Mapping[str, Member]] = {
    "llama-2": _pair(
        "llama",
        _rope(32, 2, 4, 4, tie_word_embeddings=False),
        _rope(64, 3, 4, 4, tie_word_embeddings=False),
        tokenizer=llama_2,
        chat_template=_INST,
    ),
    "llama-3": _pair(
        "llama",
        _rope(32, 2, 4, 2, tie_word_embeddings=True, rope_parameters=_LLAMA_3_ROPE),
        _rope(64, 3, 8, 2, tie_word_embeddings=False, rope_parameters=_LLAMA_3_ROPE),
        tokenizer=llama_3,
        ends=("<|end_of_text|>", "<|eot_id|>"),
        chat_template=_HEADERS,
    ),
    "qwen2.5": _pair(
        "qwen2",
        _rope(32, 2, 4, 2, tie_word_embeddings=True),
        _rope(64, 3, 4, 2, tie_word_embeddings=False),
        (21, 85),
        tokenizer=qwen,
        ends=("<|im_end|>", "<|endoftext|>"),
        chat_template=_CHATML,
    ),
    "qwen3": _pair(
        "qwen3",
        _rope(32, 2, 4, 2, tie_word_embeddings=True, head_dim=16),
        _rope(64, 3, 4, 2, tie_word_embeddings=False, head_dim=16),
        (21, 21),
        tokenizer=lambda: qwen("<think>", "</think>"),
        ends=("<|im_end|>", "<|endoftext|>"),
        chat_template=_CHATML,
    ),
    "gemma-2": _pair(
        "gemma2",
        _rope(32, 2, 4, 2, head_dim=16, sliding_window=12, attn_logit_softcapping=5.0, final_logit_softcapping=3.0),
        _rope(64, 3, 4, 2, head_dim=16, sliding_window=12, attn_logit_softcapping=5.0, final_logit_softcapping=3.0),
        tokenizer=gemma,
        ends=("<eos>", "<end_of_turn>"),
        chat_template=_GEMMA_TURNS,
    ),
    "gemma-3": _pair(
        "gemma3_text",
        _rope(32, 3, 4, 1, layer_types=_THREE_KINDS, **_GEMMA_3),
        _rope(64, 3, 4, 2, layer_types=_THREE_KINDS, **_GEMMA_3),
        (0, 64),
        tokenizer=gemma,
        ends=("<eos>", "<end_of_turn>"),
        chat_template=_GEMMA_TURNS,
    ),
    "gpt-2": _pair(
        "gpt2",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": _CONTEXT},
        {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": _CONTEXT},
        tokenizer=gpt2,
    ),
    "pythia": _pair(
        "gpt_neox",
        _rope(32, 2, 4, 4, tie_word_embeddings=False, use_parallel_residual=True),
        _rope(64, 3, 4, 4, tie_word_embeddings=False, use_parallel_residual=True),
        (50, 434),
        tokenizer=neox,
    ),
    "opt": {
        "small": Member(  # the 350 million's build: narrow embeddings, norms behind the layers
            model_type="opt",
            settings={
                "hidden_size": 32, "word_embed_proj_dim": 16, "ffn_dim": 64, "num_hidden_layers": 2,
                "num_attention_heads": 4, "max_position_embeddings": _CONTEXT, "do_layer_norm_before": False,
            },
            tokenizer=opt,
        ),
        "large": Member(
            model_type="opt",
            settings={
                "hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128, "num_hidden_layers": 3,
                "num_attention_heads": 4, "max_position_embeddings": _CONTEXT,
            },
            padding=7,
            tokenizer=opt,
        ),
    },
}  # fmt: skip
"""Small and large member of each family that devices may tune."""


_VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip

LARGE_ONLY: Mapping[str, tuple[str, Member]] = {
    "mistral": (
        "llama-2",
        Member(
            model_type="mistral",
            settings=_rope(64, 3, 4, 2, sliding_window=12, tie_word_embeddings=False),
            tokenizer=llama_2,
            chat_template=_INST,
        ),
    ),
    "phi-3": (
        "llama-2",
        Member(
            model_type="phi3",
            settings=_rope(64, 3, 4, 4, tie_word_embeddings=False),
            tokenizer=lambda: llama_2("<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"),
            padding=9,
            ends=("<|endoftext|>", "<|assistant|>", "<|end|>"),
            chat_template=_PHI_TURNS,
        ),
    ),
    "mixtral": (
        "llama-2",
        Member(
            model_type="mixtral",
            settings=_rope(64, 2, 4, 2, num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=False),
            tokenizer=llama_2,
            chat_template=_INST,
        ),
    ),
    "gemma-3 with vision": (
        "gemma-3",
        Member(
            model_type="gemma3",
            settings={
                "text_config": _rope(64, 3, 4, 2, layer_types=_THREE_KINDS, **_GEMMA_3),
                "vision_config": _VISION,
                "mm_tokens_per_image": 4,
            },
            tokenizer=gemma,
            padding=64,
            ends=("<eos>", "<end_of_turn>"),
            chat_template=_GEMMA_TURNS,
        ),
    ),
    "opt beside gpt-2": ("gpt-2", FAMILIES["opt"]["large"]),
    "qwen3 beside qwen2.5": ("qwen2.5", FAMILIES["qwen3"]["large"]),
    "qwen2.5 beside qwen3": ("qwen3", FAMILIES["qwen2.5"]["large"]),
}
"""Large models beside the small model of the family that is named first."""


@dataclass
class Checkpoints:
    """Makes checkpoints when they are first asked for.

    Args:
        root: Where they are put.
    """

    root: Path
    _made: dict[str, Path] = field(default_factory=dict)

    def pair(self, name: str) -> tuple[Path, Path]:
        """The folders of the small and of the large model of a row of :data:`FAMILIES` or :data:`LARGE_ONLY`."""
        if name in FAMILIES:
            family = FAMILIES[name]
            return self._make(f"{name}-small", family["small"], 1), self._make(f"{name}-large", family["large"], 2)
        family_name, large = LARGE_ONLY[name]
        small = self._make(f"{family_name}-small", FAMILIES[family_name]["small"], 1)
        return small, self._make(f"{name}-large".replace(" ", "-"), large, 2)

    def _make(self, name: str, member: Member, seed: int) -> Path:
        if name not in self._made:
            self._made[name] = member.make(self.root / name, seed=seed)
        return self._made[name]
