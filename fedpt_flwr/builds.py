"""What the models whose layers this project runs by itself consist of.

A :class:`Build` says, in one vocabulary for all families, which modules of a model do what. Whether a model is of a
build is not guessed: every module must be of a class that is known here and have the children that it is known to have.
Nothing is computed here; ``lean.py`` and ``few_tokens.py`` do that, and compare scores with transformers' own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.gpt2 import modeling_gpt2
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3
from transformers.pytorch_utils import Conv1D

from fedpt_flwr.packing import PackedLinear

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

_OF_LLAMA = {
    "Llama": modeling_llama,
    "Mistral": modeling_mistral,
    "Qwen2": modeling_qwen2,
    "Qwen3": modeling_qwen3,
}
_FIXED_ROPES = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary embedding that turn a position by the same angle however long the text is."""


class Block(NamedTuple):
    """One layer: attention and what follows it."""

    attention_norm: nn.Module
    projections: tuple[nn.Module, ...]
    """To queries, keys and values; or one for all."""
    is_by_head: bool
    """Whether one for all gives queries, keys and values of one head after the other."""
    query_norm: nn.Module | None
    key_norm: nn.Module | None
    attention_out: nn.Module
    mlp_norm: nn.Module
    gate: nn.Module | None
    up: nn.Module
    activation: nn.Module
    """Of the gate, or what goes up if there is none."""
    activation_name: str
    """As transformers calls it."""
    down: nn.Module
    is_parallel: bool
    """Whether the second half starts from what the first one starts from."""
    num_heads: int
    num_key_heads: int
    head_dim: int
    scaling: float
    """Of the products of queries and keys."""


class Build(NamedTuple):
    """A model of one of the builds."""

    embed: Callable[[Tensor, Tensor], Tensor]
    """From ids and positions, both ``(rows, new)`` and int64, to ``(rows, new, hidden)``."""
    rotary: nn.Module | None
    """Has the angles by which queries and keys are turned; None if positions are embedded."""
    blocks: Callable[[], list[Block]]
    """The layers as they are now: :mod:`~fedpt_flwr.packing` exchanges their parts."""
    norm: nn.Module
    """The last one."""
    head: Callable[[], nn.Module]
    """What gives scores, as it is now."""
    is_llama: bool = False
    """Whether it is the build of Llama, Mistral, Qwen2 and Qwen3."""


def build_of(model: PreTrainedModel | PeftModel) -> Build | None:
    """What a model consists of.

    Args:
        model: A model of transformers, plain or with an adapter, packed or not.

    Returns:
        Its build, or None if it has none that is known.
    """
    base = _base(model)
    if base.training or base.config._attn_implementation not in ("sdpa", "eager"):
        return None
    if _is_llama(base):
        return _llama(base)
    if type(base) is modeling_gpt2.GPT2LMHeadModel and _is_gpt2(base):
        return _gpt2(base)
    if type(base) is modeling_gpt_neox.GPTNeoXForCausalLM and _is_neox(base):
        return _neox(base)
    return None


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "peft_config") else model


def _is_llama(base: Any) -> bool:
    family = type(base).__name__.removesuffix("ForCausalLM")
    source = _OF_LLAMA.get(family)
    if source is None:
        return False

    def is_a(part: Any, name: str, children: str) -> bool:
        return _is_a(part, getattr(source, family + name), children)

    def is_layer(layer: Any) -> bool:
        if not is_a(layer, "DecoderLayer", "self_attn mlp input_layernorm post_attention_layernorm"):
            return False
        attention, mlp = layer.self_attn, layer.mlp
        norms = [layer.input_layernorm, layer.post_attention_layernorm]
        head_norms = "q_norm k_norm" if family == "Qwen3" else ""
        if not is_a(attention, "Attention", f"q_proj k_proj v_proj o_proj {head_norms}"):
            return False
        norms += [getattr(attention, name) for name in head_norms.split()]
        linear = [part for name, part in attention._modules.items() if name not in head_norms.split()]
        linear += (
            [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
            if is_a(mlp, "MLP", "gate_proj up_proj down_proj act_fn")
            else [None]
        )
        are_known = all(is_a(norm, "RMSNorm", "") for norm in norms) and all(map(_is_linear, linear))
        return are_known and _is_activation(mlp.act_fn, base.config.hidden_act)

    return (
        is_a(base, "ForCausalLM", "model lm_head")
        and is_a(base.model, "Model", "embed_tokens layers norm rotary_emb")
        and is_a(base.model.rotary_emb, "RotaryEmbedding", "")
        and base.model.rotary_emb.rope_type in _FIXED_ROPES
        and is_a(base.model.norm, "RMSNorm", "")
        and type(base.model.embed_tokens) is nn.Embedding
        and len(base.model.layers) == base.config.num_hidden_layers
        and all(map(is_layer, base.model.layers))
        and _is_linear(base.lm_head)
    )


def _llama(base: Any) -> Build:
    body, config = base.model, base.config
    activation_name, num_heads = config.hidden_act, config.num_attention_heads
    num_key_heads = config.num_key_value_heads

    def block(layer: Any) -> Block:
        attention, mlp = layer._modules["self_attn"], layer._modules["mlp"]
        halves, of_mlp = attention._modules, mlp._modules
        return Block(
            attention_norm=layer._modules["input_layernorm"],
            projections=(halves["q_proj"], halves["k_proj"], halves["v_proj"]),
            is_by_head=False,
            query_norm=halves.get("q_norm"),
            key_norm=halves.get("k_norm"),
            attention_out=halves["o_proj"],
            mlp_norm=layer._modules["post_attention_layernorm"],
            gate=of_mlp["gate_proj"],
            up=of_mlp["up_proj"],
            activation=of_mlp["act_fn"],
            activation_name=activation_name,
            down=of_mlp["down_proj"],
            is_parallel=False,
            num_heads=num_heads,
            num_key_heads=num_key_heads,
            head_dim=attention.head_dim,
            scaling=attention.scaling,
        )

    return Build(
        embed=lambda ids, _: F.embedding(ids, body.embed_tokens.weight),
        rotary=body.rotary_emb,
        blocks=lambda: [block(layer) for layer in body.layers],
        norm=body.norm,
        head=lambda: base.lm_head,
        is_llama=True,
    )


def _is_gpt2(base: Any) -> bool:
    body = base.transformer

    def is_layer(layer: Any) -> bool:
        return (
            _is_a(layer, modeling_gpt2.GPT2Block, "ln_1 attn ln_2 mlp")
            and _is_a(layer.attn, modeling_gpt2.GPT2Attention, "c_attn c_proj attn_dropout resid_dropout")
            and _is_a(layer.mlp, modeling_gpt2.GPT2MLP, "c_fc c_proj act dropout")
            and all(_is_a(norm, nn.LayerNorm, "") for norm in (layer.ln_1, layer.ln_2))
            and all(map(_is_linear, (layer.attn.c_attn, layer.attn.c_proj, layer.mlp.c_fc, layer.mlp.c_proj)))
            and _is_activation(layer.mlp.act, base.config.activation_function)
        )

    return (
        _is_a(base, modeling_gpt2.GPT2LMHeadModel, "transformer lm_head")
        and _is_a(body, modeling_gpt2.GPT2Model, "wte wpe drop h ln_f")
        and all(type(embedding) is nn.Embedding for embedding in (body.wte, body.wpe))
        and _is_a(body.ln_f, nn.LayerNorm, "")
        and all(map(is_layer, body.h))
        and _is_linear(base.lm_head)
    )


def _gpt2(base: Any) -> Build:
    body, activation_name = base.transformer, base.config.activation_function

    def block(layer: Any) -> Block:
        parts = layer._modules
        attention, mlp = parts["attn"], parts["mlp"]
        return Block(
            attention_norm=parts["ln_1"],
            projections=(attention._modules["c_attn"],),
            is_by_head=False,
            query_norm=None,
            key_norm=None,
            attention_out=attention._modules["c_proj"],
            mlp_norm=parts["ln_2"],
            gate=None,
            up=mlp._modules["c_fc"],
            activation=mlp._modules["act"],
            activation_name=activation_name,
            down=mlp._modules["c_proj"],
            is_parallel=False,
            num_heads=attention.num_heads,
            num_key_heads=attention.num_heads,
            head_dim=attention.head_dim,
            scaling=attention.scaling,
        )

    return Build(
        embed=lambda ids, positions: F.embedding(ids, body.wte.weight) + F.embedding(positions, body.wpe.weight),
        rotary=None,
        blocks=lambda: [block(layer) for layer in body.h],
        norm=body.ln_f,
        head=lambda: base.lm_head,
    )


def _is_neox(base: Any) -> bool:
    body = base.gpt_neox
    norms = "input_layernorm post_attention_layernorm"

    def is_layer(layer: Any) -> bool:
        return (
            _is_a(
                layer,
                modeling_gpt_neox.GPTNeoXLayer,
                f"{norms} post_attention_dropout post_mlp_dropout attention mlp",
            )
            and _is_a(layer.attention, modeling_gpt_neox.GPTNeoXAttention, "query_key_value dense")
            and _is_a(layer.mlp, modeling_gpt_neox.GPTNeoXMLP, "dense_h_to_4h dense_4h_to_h act")
            and all(_is_a(getattr(layer, name), nn.LayerNorm, "") for name in norms.split())
            and all(map(_is_linear, layer.attention._modules.values()))
            and all(map(_is_linear, (layer.mlp.dense_h_to_4h, layer.mlp.dense_4h_to_h)))
            and _is_activation(layer.mlp.act, base.config.hidden_act)
        )

    return (
        _is_a(base, modeling_gpt_neox.GPTNeoXForCausalLM, "gpt_neox lm_head")
        and _is_a(body, modeling_gpt_neox.GPTNeoXModel, "embed_in emb_dropout layers final_layer_norm rotary_emb")
        and type(body.embed_in) is nn.Embedding
        and _is_a(body.rotary_emb, modeling_gpt_neox.GPTNeoXRotaryEmbedding, "")
        and body.rotary_emb.rope_type in _FIXED_ROPES
        and _is_a(body.final_layer_norm, nn.LayerNorm, "")
        and all(map(is_layer, body.layers))
        and _is_linear(base.lm_head)
    )


def _neox(base: Any) -> Build:
    body = base.gpt_neox
    activation_name, num_heads = base.config.hidden_act, base.config.num_attention_heads

    def block(layer: Any) -> Block:
        parts = layer._modules
        attention, mlp = parts["attention"], parts["mlp"]
        return Block(
            attention_norm=parts["input_layernorm"],
            projections=(attention._modules["query_key_value"],),
            is_by_head=True,
            query_norm=None,
            key_norm=None,
            attention_out=attention._modules["dense"],
            mlp_norm=parts["post_attention_layernorm"],
            gate=None,
            up=mlp._modules["dense_h_to_4h"],
            activation=mlp._modules["act"],
            activation_name=activation_name,
            down=mlp._modules["dense_4h_to_h"],
            is_parallel=layer.use_parallel_residual,
            num_heads=num_heads,
            num_key_heads=num_heads,
            head_dim=attention.head_size,
            scaling=attention.scaling,
        )

    return Build(
        embed=lambda ids, _: F.embedding(ids, body.embed_in.weight),
        rotary=body.rotary_emb,
        blocks=lambda: [block(layer) for layer in body.layers],
        norm=body.final_layer_norm,
        head=lambda: base.lm_head,
    )


def _is_a(part: Any, kind: type[nn.Module], children: str) -> bool:
    """Whether a module is of a class, with children of these names, and nobody has put a hand in."""
    return part.__class__ is kind and part._modules.keys() == set(children.split()) and _is_untouched(part)


def _is_untouched(part: Any) -> bool:
    return not (part._forward_hooks or part._forward_pre_hooks or "forward" in part.__dict__)


def _is_activation(part: Any, name: str) -> bool:
    """Whether a module is what transformers calls by a name, because that is what is computed."""
    return part.__class__ is _activation_class(name) and _is_untouched(part)


@functools.cache
def _activation_class(name: str) -> type[nn.Module]:
    return type(ACT2FN[name])


def _is_linear(part: Any) -> bool:
    if part is None or not _is_untouched(part):
        return False
    if type(part) in (nn.Linear, Conv1D, PackedLinear):
        return True
    return is_plain_lora(part) and _is_linear(part.base_layer)


def is_plain_lora(part: nn.Module) -> bool:
    """Whether a layer adds nothing but two small matrices, one after the other."""
    from peft.tuners.lora.layer import Linear

    return type(part) is Linear and not part.lora_variant and not part.merged_adapters
