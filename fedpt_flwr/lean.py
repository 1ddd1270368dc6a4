"""Forward passes of our own: what transformers computes, with fewer steps in between.

A decoding step of a small model is short: much of it is not arithmetic but what surrounds it, and each layer of
transformers' models does much of that. :class:`FewTokensStepper` puts a few tokens through layers that are compiled
(``few_tokens.py``), where that is possible; :class:`LeanStepper`, for models of Llama's build, does the same with any
number of tokens by asking the same modules for the same weights, packed or not (``packing.py``), and doing the rest in
a few calls per layer. Both write straight into a :class:`~fedpt_flwr.ragged.RaggedCache`.

Whether a model is of a build that is known says ``builds.py``, and its scores must then agree with transformers' own on
a few tokens. :func:`step_function` takes the ordinary :class:`~fedpt_flwr.ragged.Stepper` where either is not so.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedpt_flwr.builds import Block, Build, build_of, is_llama_type
from fedpt_flwr.errors import ModelError
from fedpt_flwr.models import input_device
from fedpt_flwr.packing import PackedLinear
from fedpt_flwr.ragged import RaggedCache, Stepper, agree

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

_log = logging.getLogger(__name__)

_FOLD_UP_TO = 16
"""New tokens per row up to which the heads that share keys are put side by side as if they were tokens."""

_FEW_TOKENS = 8
"""Tokens beyond which it need not be asked whether there are compiled layers."""

_FEW_ROWS = 8
"""Rows up to which a plain weight is multiplied from the left: in down to half of the time of ``F.linear``."""


class FewTokensStepper(Stepper):
    """A model of a build that is known, whose passes over few tokens go through compiled layers if it is prepared.

    It is called and answers like the class that it derives from, which it is made of.

    Args:
        model: A model that has a build.
        context: Makes the context in which it must be called.

    Raises:
        ModelError: The model cannot be called this way.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        context: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        super().__init__(model, context)
        build = build_of(model)
        if build is None:
            raise ModelError("a forward pass of our own needs a build that it knows", value=type(self.base).__name__)
        self.build: Build = build
        self._known: tuple[list[Block], Any] = ([], None)

    @torch.no_grad()
    def __call__(
        self,
        cache: RaggedCache,
        ids: Tensor,
        *,
        keep: int | Tensor = 1,
        num_wanted: Sequence[int] | None = None,
    ) -> Tensor:
        """See :meth:`fedpt_flwr.ragged.Stepper.__call__`."""
        num_rows, num_new = ids.shape
        layers = self._layers() if ids.numel() <= _FEW_TOKENS and self.device.type == "cpu" else None
        if layers is None or not layers.takes(ids.numel(), max(cache.lengths) + num_new):
            return self._long_pass(cache, ids, keep, num_wanted)
        device, starts = self.device, list(cache.lengths)
        positions = cache.begin(num_new, device)
        with self.context():
            x = self.build.embed(ids.to(device), positions).view(num_rows * num_new, -1)
            x = layers.run(cache, x, _angles(self.build.rotary, positions, x.dtype), starts)
            return self._kept(x.view(num_rows, num_new, -1), keep)

    def _long_pass(
        self, cache: RaggedCache, ids: Tensor, keep: int | Tensor, num_wanted: Sequence[int] | None
    ) -> Tensor:
        """A pass over any number of tokens."""
        return super().__call__(cache, ids, keep=keep, num_wanted=num_wanted)

    def _layers(self) -> Any:
        """The compiled layers of the model as it is now; None if there are none."""
        few_tokens = _few_tokens()
        if few_tokens is None:
            return None
        blocks, layers = self._known
        now = self.build.blocks()
        if now != blocks:  # prepared or restored meanwhile
            layers = few_tokens.layers_of(now)
            self._known = now, layers
        return layers

    def _kept(self, x: Tensor, keep: int | Tensor) -> Tensor:
        """Scores of the wanted positions, from what the last layer gave."""
        x = x[:, -keep:] if isinstance(keep, int) else x[:, keep.to(x.device)]
        return _scores(self.build.head(), _normed(self.build.norm, x))


class LeanStepper(FewTokensStepper):
    """A model of Llama's build: passes over many tokens, too, are this project's own.

    Attributes:
        fuses: Whether a few tokens on a GPU may go through kernels of our own.
    """

    fuses = True

    def read(self, cache: RaggedCache, ids: Tensor) -> None:
        """See :meth:`fedpt_flwr.ragged.Stepper.read`."""
        self(cache, ids, keep=torch.empty(0, dtype=torch.int64))

    def _long_pass(
        self,
        cache: RaggedCache,
        ids: Tensor,
        keep: int | Tensor,
        num_wanted: Sequence[int] | None,  # noqa: ARG002
    ) -> Tensor:
        device = self.device
        num_rows, num_new = ids.shape
        body = self.base.model
        positions = cache.begin(num_new, device)
        config = self.base.config
        groups = config.num_attention_heads // config.num_key_value_heads
        folded = groups if num_new <= _FOLD_UP_TO else 1
        with self.context():
            x = F.embedding(ids.to(device), body.embed_tokens.weight).view(num_rows * num_new, -1)
            fused = _fused(device.type) if self.fuses else None
            if fused is not None and fused.takes(body, num_new, x):
                x = fused.run(body, cache, x, body.rotary_emb(x, positions), positions, _linear)
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
                if number == len(body.layers) - 1 and isinstance(keep, Tensor) and not keep.numel():
                    break  # nobody looks at what would come out
                mixed = _attend(queries, all_keys, all_values, mask, attention.scaling, folded)
                x = x + _linear(attention.o_proj, mixed)
                states = _normed(layer.post_attention_layernorm, x)
                gate = mlp.act_fn(_linear(mlp.gate_proj, states))
                x = x + _linear(mlp.down_proj, gate * _linear(mlp.up_proj, states))
            return self._kept(x.view(num_rows, num_new, -1), keep)


@functools.cache
def _few_tokens() -> Any:
    """The module with the compiled loops, if there is numba."""
    try:
        from fedpt_flwr import few_tokens
    except ImportError:
        return None
    return few_tokens


@functools.cache
def _fused(kind: str) -> Any:
    """The module with kernels for a GPU, if the device is one and there is what compiles them."""
    if kind != "cuda":
        return None
    try:
        from fedpt_flwr import fused
    except ImportError:
        return None
    return fused if fused.is_available() else None


def step_function(
    model: PreTrainedModel | PeftModel,
    context: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Stepper:
    """The fastest step function that a model can have.

    Args:
        model: The model, plain or with an adapter.
        context: Makes the context in which it must be called.

    Returns:
        A :class:`LeanStepper` where the model is of Llama's build, a :class:`FewTokensStepper` where it is of another
        one that is known and there is numba, if that scores as transformers says; else a
        :class:`~fedpt_flwr.ragged.Stepper`.

    Raises:
        ModelError: The model cannot take rows of different lengths.
    """
    stepper = Stepper(model, context)
    if is_llama_type(model):
        lean = LeanStepper(model, context)
        lean.fuses = _fused(lean.device.type) is not None and _may_fuse(lean, stepper)
        return lean if lean.fuses or agree(lean, stepper) else stepper
    if _few_tokens() is not None and build_of(model) is not None:
        few = FewTokensStepper(model, context)
        return few if agree(few, stepper) else stepper
    return stepper


def has_kernels(model: PreTrainedModel | PeftModel) -> bool:
    """Whether a few tokens of a model may go through kernels of our own, on the GPU where it is."""
    return is_llama_type(model) and _fused(input_device(model).type) is not None


def _may_fuse(lean: LeanStepper, stepper: Stepper) -> bool:
    """Whether the kernels work for a model, and score as transformers says."""
    try:
        return agree(lean, stepper)
    except Exception as error:  # a compiler's, or a driver's: there is the other way
        _log.info("%s decodes without Triton's kernels: %s", type(lean.base).__name__, str(error).partition("\n")[0])
        return False


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
    scores = _linear(head, x.reshape(-1, x.shape[-1]))
    return scores.view(*x.shape[:-1], scores.shape[-1])


def _normed(norm: Any, x: Tensor) -> Tensor:
    if type(norm) is nn.LayerNorm:
        return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


def _angles(rotary: Any, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """Cosines and sines of the angles at some positions, ``(rows * new, angles)``: each once, not for both halves."""
    if rotary is None:
        return None
    angles = positions.reshape(-1, 1).float() * rotary.inv_freq.to(torch.float32)
    scaling = rotary.attention_scaling
    return (angles.cos() * scaling).to(dtype), (angles.sin() * scaling).to(dtype)


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
