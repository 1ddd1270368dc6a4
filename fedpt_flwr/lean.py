"""A forward pass of our own for models of Llama's build: what transformers computes, with fewer steps in between.

A decoding step of a small model is short: much of it is not arithmetic but what surrounds it, and each layer of
transformers' models does much of that. :class:`LeanStepper` asks the same modules for the same weights, packed or not
(``packing.py``), and does the rest in a few calls per layer, straight into a :class:`~fedpt_flwr.ragged.RaggedCache`.

Whether a model is of that build is not guessed: every module must be of a class that is known here and have the
children that it is known to have, and the scores must then agree with transformers' own on a few tokens.
:func:`step_function` takes the ordinary :class:`~fedpt_flwr.ragged.Stepper` where either is not so.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

from fedpt_flwr.packing import PackedLinear
from fedpt_flwr.ragged import RaggedCache, Stepper, agree

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

_FAMILIES = {
    "Llama": modeling_llama,
    "Mistral": modeling_mistral,
    "Qwen2": modeling_qwen2,
    "Qwen3": modeling_qwen3,
}
_FIXED_ROPES = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary embedding that turn a position by the same angle however long the text is."""

_FOLD_UP_TO = 16
"""New tokens per row up to which the heads that share keys are put side by side as if they were tokens."""

_FEW_ROWS = 8
"""Rows up to which a plain weight is multiplied from the left: in down to half of the time of ``F.linear``."""


class LeanStepper(Stepper):
    """A model of Llama's build, asked about the next tokens of rows that have different lengths.

    It is called and answers like the class that it derives from, which it is made of.

    Args:
        model: A model that :func:`step_function` found fit, plain or with a LoRA adapter.
        context: Makes the context in which it must be called.
    """

    @torch.no_grad()
    def __call__(
        self,
        cache: RaggedCache,
        ids: Tensor,
        *,
        keep: int | Tensor = 1,
        num_wanted: Sequence[int] | None = None,  # noqa: ARG002
    ) -> Tensor:
        """See :meth:`fedpt_flwr.ragged.Stepper.__call__`."""
        device = self.device
        num_rows, num_new = ids.shape
        body = self.base.model
        starts = list(cache.lengths)
        positions = cache.begin(num_new, device)
        config = self.base.config
        groups = config.num_attention_heads // config.num_key_value_heads
        folded = groups if num_new <= _FOLD_UP_TO else 1
        with self.context():
            x = F.embedding(ids.to(device), body.embed_tokens.weight).view(num_rows * num_new, -1)
            few_tokens = _few_tokens()
            if few_tokens is not None and few_tokens.takes(body, len(x), max(starts) + num_new):
                x = few_tokens.run(body, cache, x, body.rotary_emb(x, positions), starts)
                return self._kept(x.view(num_rows, num_new, -1), keep)
            masks = {
                window: None if mask is None else mask.repeat(1, 1, folded, 1)
                for window, mask in cache.score_masks(positions, x.dtype).items()
            }
            rotation = _rotation(*body.rotary_emb(x, positions))
            for number, layer in enumerate(body.layers):
                attention, mlp = layer.self_attn, layer.mlp
                mask = masks[cache.windows[number]]
                states = _normed(layer.input_layernorm, x)
                shape = (num_rows, num_new, -1, attention.head_dim)
                queries = _linear(attention.q_proj, states).view(shape)
                keys = _linear(attention.k_proj, states).view(shape)
                values = _linear(attention.v_proj, states).view(shape)
                if "q_norm" in attention._modules:
                    queries, keys = _normed(attention.q_norm, queries), _normed(attention.k_norm, keys)
                queries, keys = _rotated(queries, rotation), _rotated(keys, rotation)
                all_keys, all_values = cache.layers[number].update(keys.transpose(1, 2), values.transpose(1, 2))
                mixed = _attend(queries, all_keys, all_values, mask, attention.scaling, folded)
                x = x + _linear(attention.o_proj, mixed)
                states = _normed(layer.post_attention_layernorm, x)
                gate = mlp.act_fn(_linear(mlp.gate_proj, states))
                x = x + _linear(mlp.down_proj, gate * _linear(mlp.up_proj, states))
            return self._kept(x.view(num_rows, num_new, -1), keep)

    def _kept(self, x: Tensor, keep: int | Tensor) -> Tensor:
        """Scores of the wanted positions, from what the last layer gave."""
        x = x[:, -keep:] if isinstance(keep, int) else x[:, keep.to(x.device)]
        return _scores(self.base.lm_head, _normed(self.base.model.norm, x))


@functools.cache
def _few_tokens() -> Any:
    """The module with the compiled loops, if there is numba."""
    try:
        from fedpt_flwr import few_tokens
    except ImportError:
        return None
    return few_tokens


def step_function(
    model: PreTrainedModel | PeftModel,
    context: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Stepper:
    """The fastest step function that a model can have.

    Args:
        model: The model, plain or with an adapter.
        context: Makes the context in which it must be called.

    Returns:
        A :class:`LeanStepper` where the model is of Llama's build and scores as transformers says; else a
        :class:`~fedpt_flwr.ragged.Stepper`.

    Raises:
        ModelError: The model cannot take rows of different lengths.
    """
    stepper = Stepper(model, context)
    if is_llama_type(model):
        lean = LeanStepper(model, context)
        if agree(lean, stepper):
            return lean
    return stepper


def is_llama_type(model: PreTrainedModel | PeftModel) -> bool:
    """Whether a model consists of exactly the modules that the lean forward pass knows."""
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    family = type(base).__name__.removesuffix("ForCausalLM")
    source = _FAMILIES.get(family)
    if source is None or base.training or base.config._attn_implementation not in ("sdpa", "eager"):
        return False

    def is_a(part: Any, name: str, children: str) -> bool:
        return (
            type(part) is getattr(source, family + name)
            and part._modules.keys() == set(children.split())
            and not (part._forward_hooks or part._forward_pre_hooks or "forward" in part.__dict__)
        )

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
        return all(is_a(norm, "RMSNorm", "") for norm in norms) and all(map(_is_linear, linear))

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


def _is_linear(part: Any) -> bool:
    if part is None or part._forward_hooks or part._forward_pre_hooks or "forward" in part.__dict__:
        return False
    if type(part) in (nn.Linear, PackedLinear):
        return True
    return _is_plain_lora(part) and _is_linear(part.base_layer)


def _is_plain_lora(part: nn.Module) -> bool:
    """Whether a layer adds nothing but two small matrices, one after the other."""
    from peft.tuners.lora.layer import Linear

    return type(part) is Linear and not part.lora_variant and not part.merged_adapters


def _linear(layer: Any, x: Tensor) -> Tensor:
    """A linear layer, plain, packed or with LoRA."""
    if type(layer) is PackedLinear:
        return layer.forward(x)
    if type(layer) is nn.Linear:
        return _plain(layer, x)
    product = _linear(layer.base_layer, x)
    if layer.disable_adapters:
        return product
    dtype = product.dtype
    for name in layer.active_adapters:
        if name in layer.lora_A:
            down, up = layer.lora_A[name], layer.lora_B[name]
            change = F.linear(F.linear(x.to(down.weight.dtype), down.weight), up.weight, up.bias)
            product = product + change * layer.scaling[name]
    return product.to(dtype)


def _plain(layer: nn.Linear, x: Tensor) -> Tensor:
    """A layer that is not packed: the drafter's on some processors, a head that is tied, or nothing is prepared."""
    if not (2 <= x.shape[0] <= _FEW_ROWS and x.dtype == torch.float32 and x.device.type == "cpu"):
        return F.linear(x, layer.weight, layer.bias)
    product = (layer.weight @ x.t()).t().contiguous()
    return product if layer.bias is None else product.add_(layer.bias)


def _scores(head: Any, x: Tensor) -> Tensor:
    """The head, ``(rows, kept, hidden)`` to ``(rows, kept, vocab)``."""
    return _linear(head, x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)


def _normed(norm: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


def _rotation(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Both as ``(rows, new, 1, head_dim)``, the sine with the signs that rotation gives to the two halves."""
    half = sin.shape[-1] // 2
    signed = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)
    return cos.unsqueeze(2), signed.unsqueeze(2)


def _rotated(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Queries or keys turned by their positions, ``(rows, new, heads, head_dim)``."""
    cos, signed_sin = rotation
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), signed_sin)


def _attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float, folded: int) -> Tensor:
    """Attention of ``(rows, new, heads, head_dim)`` over ``(rows, key heads, columns, head_dim)``.

    Heads that share keys are folded into the axis of tokens, so that keys are read once and never repeated; the mask
    is repeated there instead, by the caller.
    """
    rows, new, heads, size = queries.shape
    shared = keys.shape[1]
    queries = queries.transpose(1, 2)
    if folded > 1:
        queries = queries.reshape(rows, shared, folded * new, size)
    mixed = F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=mask, scale=scale, enable_gqa=queries.shape[1] != shared
    )
    return mixed.reshape(rows, heads, new, size).transpose(1, 2).reshape(rows * new, heads * size)
