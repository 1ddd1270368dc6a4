"""A forward pass of our own: what transformers computes, with fewer steps in between.

A decoding step of a small model is short: much of it is not arithmetic but what surrounds it, and each layer of
transformers' models does much of that. :class:`LeanStepper` asks the same modules for the same weights, packed or not
(``packing.py``), and does the rest in a few calls per layer, straight into a :class:`~fedpt_flwr.ragged.RaggedCache`. A
few tokens go through compiled layers (``few_tokens.py``) or a GPU's own kernels (``fused.py``), where that is possible.

Whether a model is of a build that is known says ``builds.py``, and its scores must then agree with transformers' own on
a few tokens. :func:`step_function` takes the ordinary :class:`~fedpt_flwr.ragged.Stepper` where either is not so.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedpt_flwr.builds import Block, Build, build_of
from fedpt_flwr.huge_pages import Room
from fedpt_flwr.models import input_device
from fedpt_flwr.packing import PackedLinear
from fedpt_flwr.ragged import RaggedCache, Stepper, agree

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

_log = logging.getLogger(__name__)

_FOLD_UP_TO = 16
"""New tokens per row up to which the heads that share keys are put side by side as if they were tokens."""

_CAUSAL: Final = "causal"
"""In place of a mask: each token sees those before it and itself, and there are no others."""

_Mask = Tensor | Literal["causal"] | None

_NO_POSITIONS = torch.empty(0, dtype=torch.int64, device="cpu")
"""Of scores that are wanted, if none are; and for compiled layers, which compute angles themselves."""

_MANY_ROWS = 64
"""Of more rows a product is so long that memory for it is kept."""

_FEW_ROWS = 8
"""Rows up to which a plain weight is multiplied from the left: in down to half of the time of ``F.linear``."""


class LeanStepper(Stepper):
    """A model of a build that is known, asked about the next tokens of rows that have different lengths.

    It is called and answers like the class that it derives from, which it is made of.

    Args:
        model: The model, plain or with an adapter.
        build: What it consists of.
        context: Makes the context in which it must be called.

    Attributes:
        build: This one.
        fuses: Whether a few tokens on a GPU may go through kernels of our own.
        is_rough: Whether a few tokens on a CPU go through compiled layers with weights rounded to bfloat16.

    Raises:
        ModelError: The model cannot be called this way.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        build: Build,
        context: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        super().__init__(model, context)
        self.build = build
        self.fuses = True
        self.is_rough = False
        self._blocks: tuple[int, list[Block]] | None = None
        self._known: tuple[Any, Any, Any] = None, None, None
        self._rough: LeanStepper | None = None

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
        blocks = self._current_blocks()
        layers = self._compiled(blocks) if device.type == "cpu" else None
        if layers is not None and ids.numel() > layers.most_tokens:
            layers = None
        is_only_read = isinstance(keep, Tensor) and not keep.numel()
        starts = list(cache.lengths)
        if layers is not None and self.build.rotary is not None:
            cache.extend(num_new)
            positions = _NO_POSITIONS
        else:
            positions = cache.begin(num_new, device)
        with self.context():
            x = self.build.embed(ids.to(device), positions)
            if layers is not None:
                stream = layers.run(cache, x, self.build.rotary, starts, is_only_read=is_only_read)
                stream = _kept(stream, keep)
                if layers.head is not None:
                    return torch.from_numpy(layers.scores(stream)).to(x.dtype)
                return _scores(self.build.head(), torch.from_numpy(layers.normed(stream)).to(x.dtype))
            x = x.view(num_rows * num_new, -1)
            angles = _angles(self.build.rotary, positions, x.dtype)
            fused = _fused(device.type) if self.fuses and self.build.is_llama else None
            if fused is not None and fused.takes(blocks, num_new, x):
                x = fused.run(blocks, cache, x, angles, positions, _linear)
            else:
                attention = _Appended(blocks, cache, positions, x.dtype, is_only_read)
                x = _through(blocks, x, angles, (num_rows, num_new), attention)
            return _scores(self.build.head(), _normed(self.build.norm, _kept(x.view(num_rows, num_new, -1), keep)))

    @property
    def device(self) -> torch.device:
        """See :attr:`fedpt_flwr.ragged.Stepper.device`; a model of such a build is on one, and its norm says which."""
        device: torch.device = self.build.norm._parameters["weight"].device  # type: ignore[union-attr]
        return device

    def __getstate__(self) -> dict[str, Any]:
        """What a copy takes over: nothing that shows memory of these very modules."""
        return self.__dict__ | {"_blocks": None, "_known": (None, None, None), "_rough": None}

    @property
    def is_current(self) -> bool:
        """See :attr:`fedpt_flwr.ragged.Stepper.is_current`."""
        return build_of(self.model) is not None

    @property
    def rough(self) -> LeanStepper | None:
        """See :attr:`fedpt_flwr.ragged.Stepper.rough`: where a prepared model of float32 has compiled layers."""
        if self.device.type != "cpu":
            return None
        if self._rough is None:
            self._rough = LeanStepper(self.model, self.build, self.context)
            self._rough.is_rough = True
        blocks = self._current_blocks()
        self._rough._blocks = self._blocks
        return self._rough if self._rough._compiled(blocks) is not None else None

    def new_cache(self) -> RaggedCache:
        """See :meth:`fedpt_flwr.ragged.Stepper.new_cache`.

        The layers are looked up anew: modules that somebody exchanged are found by the next text at the latest.
        """
        self._blocks = None
        return super().new_cache()

    def read(self, cache: RaggedCache, ids: Tensor) -> None:
        """See :meth:`fedpt_flwr.ragged.Stepper.read`."""
        self(cache, ids, keep=_NO_POSITIONS)

    @torch.no_grad()
    def read_prompts(self, prompts: Sequence[Sequence[int]]) -> RaggedCache:
        """See :meth:`fedpt_flwr.ragged.Stepper.read_prompts`.

        On a CPU prompts of unequal lengths go through the products side by side, without padding; only attention is
        each one's own. (A GPU reads padding faster than it begins a kernel for each.)
        """
        lengths = [len(prompt) - 1 for prompt in prompts]
        if self.device.type != "cpu" or min(lengths) == max(lengths):
            return super().read_prompts(prompts)
        cache = self.new_cache()
        cache.add_rows(len(prompts))
        cache.begin(max(lengths), self.device)
        blocks = self._current_blocks()
        with self.context():
            ids = torch.tensor([[token for prompt in prompts for token in prompt[:-1]]])
            positions = torch.cat([torch.arange(length) for length in lengths])[None]
            x = self.build.embed(ids, positions)[0]
            angles = _angles(self.build.rotary, positions, x.dtype)
            _through(blocks, x, angles, (1, len(x)), _SideBySide(blocks, cache, lengths))
        cache.cut(lengths)
        return cache

    def _current_blocks(self) -> list[Block]:
        """The layers as they were when the text was begun, or when some model was last prepared or restored."""
        number, known = PackedLinear.num_exchanged, self._blocks  # once: other threads begin texts meanwhile
        if known is None or known[0] != number:
            known = self._blocks = number, self.build.blocks()
        return known[1]

    def _compiled(self, blocks: list[Block]) -> Any:
        """The compiled layers of the model as it is now; None if there are none."""
        few_tokens = _few_tokens()
        if few_tokens is None:
            return None
        head = self.build.head()
        known_blocks, known_head, layers = self._known
        if blocks is known_blocks and head is known_head:
            return layers
        if [*blocks, head] != [*(known_blocks or ()), known_head]:  # prepared or restored meanwhile
            layers = few_tokens.layers_of(blocks, self.build.norm, head, is_rough=self.is_rough)
        self._known = blocks, head, layers
        return layers


class _Attention(Protocol):
    """Stores keys and values of new tokens, and attends to what is stored."""

    def __call__(self, number: int, block: Block, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor | None:
        """One layer's, from ``(rows, new, heads, head_dim)`` each.

        Returns:
            ``(rows * new, heads * head_dim)``; None where nobody looks at what comes out of the layer.
        """
        ...


class _Appended:
    """New tokens behind those that a cache has."""

    def __init__(
        self, blocks: Sequence[Block], cache: RaggedCache, positions: Tensor, dtype: torch.dtype, is_only_read: bool
    ) -> None:
        groups, num_new = blocks[0].num_heads // blocks[0].num_key_heads, positions.shape[1]
        self._folded = groups if num_new <= _FOLD_UP_TO else 1
        windows = set(cache.windows)
        # A mask of a long prompt can take more memory than the model.
        self._causal = {window for window in windows if num_new > _FOLD_UP_TO and cache.begins_with(num_new, window)}
        self._masks = {
            window: mask if mask is None or self._folded == 1 else mask.repeat(1, 1, self._folded, 1)
            for window, mask in cache.score_masks(positions, dtype, windows - self._causal).items()
        }
        self._cache = cache
        self._last = len(blocks) - 1 if is_only_read else len(blocks)

    def __call__(self, number: int, block: Block, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor | None:
        all_keys, all_values = self._cache.layers[number].update(keys.transpose(1, 2), values.transpose(1, 2))
        if number == self._last:
            return None
        window = self._cache.windows[number]
        mask: _Mask = _CAUSAL if window in self._causal else self._masks[window]
        return _attend(queries, all_keys, all_values, mask, block.scaling, self._folded)


class _SideBySide:
    """Texts one behind the other in what looks like one row, each of which begins a row of a cache."""

    def __init__(self, blocks: Sequence[Block], cache: RaggedCache, lengths: Sequence[int]) -> None:
        self._cache = cache
        self._lengths = lengths
        self._last = len(blocks) - 1
        self._masks: dict[tuple[int, int], Tensor] = {}

    def __call__(self, number: int, block: Block, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor | None:
        layer, window = self._cache.layers[number], self._cache.windows[number]
        layer.hold(block.num_key_heads, block.head_dim, keys)
        mixed = []
        texts = (part.split(self._lengths, dim=1) for part in (queries, keys, values))
        for row, (asking, *stored) in enumerate(zip(*texts, strict=True)):
            length = self._lengths[row]
            own_keys, own_values = (part.transpose(1, 2) for part in stored)
            layer.keys[row, :, :length], layer.values[row, :, :length] = own_keys[0], own_values[0]
            if number < self._last and length:
                mask: _Mask = _CAUSAL if window is None or length <= window else self._mask(length, window, queries)
                mixed.append(_attend(asking, own_keys, own_values, mask, block.scaling, 1))
        return torch.cat(mixed) if mixed else None

    def _mask(self, length: int, window: int, like: Tensor) -> Tensor:
        if (length, window) not in self._masks:
            place = torch.arange(length)
            back = place[:, None] - place
            seen = (back >= 0) & (back < window)
            mask = like.new_zeros((length, length)).masked_fill_(~seen, torch.finfo(like.dtype).min)
            self._masks[length, window] = mask
        return self._masks[length, window]


def _through(
    blocks: Sequence[Block],
    x: Tensor,
    angles: tuple[Tensor, Tensor] | None,
    shape: tuple[int, int],
    attention: _Attention,
) -> Tensor:
    """Any number of tokens through all layers, ``(rows * new, hidden)``; ``shape`` is rows and new ones."""
    rotation = None if angles is None else _rotation(*angles, shape[0])
    reused = _Reused()
    for number, block in enumerate(blocks):
        states = _normed(block.attention_norm, x, reused)
        products = [reused.product(f"product {place}", part, states) for place, part in enumerate(block.projections)]
        queries, keys, values = _heads(block, products, *shape)
        if block.query_norm is not None and block.key_norm is not None:
            queries, keys = _normed(block.query_norm, queries), _normed(block.key_norm, keys)
        if rotation is not None:
            queries = _rotated(queries, rotation, functools.partial(reused.like, "turned queries"))
            keys = _rotated(keys, rotation, functools.partial(reused.like, "turned keys"))
        mixed = attention(number, block, queries, keys, values)
        if mixed is None:
            break
        change = reused.product("change", block.attention_out, mixed)
        if block.is_parallel:
            states = _normed(block.mlp_norm, x, reused)
            x.add_(change)
        else:
            x.add_(change)
            states = _normed(block.mlp_norm, x, reused)
        inner = reused.product("inner", block.up if block.gate is None else block.gate, states)
        inner = F.silu(inner, inplace=True) if block.activation_name == "silu" else block.activation(inner)
        if block.gate is not None:
            inner.mul_(reused.product("up", block.up, states))
        x.add_(reused.product("change", block.down, inner))
    return x


class _Reused:
    """Memory for what comes between the weights, by name, which one layer after the other uses again.

    Of a long prompt each is tens of megabytes, and the system clears what a process gets: that took a quarter of the
    time of the products.
    """

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def like(self, name: str, shape: Sequence[int], x: Tensor) -> Tensor:
        """A tensor of whatever was left there, of the dtype and device of another."""
        held = self._held.get(name)
        if held is None or held.shape != tuple(shape):
            num_bytes = math.prod(shape) * x.dtype.itemsize
            on_cpu = x.device.type == "cpu"
            held = Room(num_bytes, num_bytes).empty(shape, x.dtype) if on_cpu else x.new_empty(shape)
            self._held[name] = held
        return held

    def product(self, name: str, layer: Any, x: Tensor) -> Tensor:
        """What :func:`_linear` gives; in memory of that name, if the weight is plain and there are many rows."""
        is_plain = type(layer) is PackedLinear and layer.is_plain and x.dtype == layer.weight.dtype == torch.float32
        if not is_plain or len(x) <= _MANY_ROWS:
            return _linear(layer, x)
        written: Tensor = layer.write(x, self.like(name, (len(x), layer.out_features), x))
        return written


def _kept(states: Any, keep: int | Tensor) -> Any:
    """Of what comes out of the last layer, ``(rows, new, hidden)``, the places at which scores are wanted."""
    if isinstance(keep, int):
        return states[:, -keep:]
    return states[:, keep.to(states.device) if isinstance(states, Tensor) else keep.cpu().numpy()]


def _heads(block: Block, products: list[Tensor], num_rows: int, num_new: int) -> tuple[Tensor, ...]:
    """Queries, keys and values, ``(rows, new, heads, head_dim)``, of what the projections gave."""
    shape = (num_rows, num_new, -1, block.head_dim)
    if len(products) == 1 and block.is_by_head:
        return products[0].view(num_rows, num_new, -1, 3, block.head_dim).unbind(3)
    if len(products) == 1:
        products = list(products[0].chunk(3, -1))
    return tuple(product.view(shape) for product in products)


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
        A :class:`LeanStepper` where the model is of a build that is known and scores as transformers says; else a
        :class:`~fedpt_flwr.ragged.Stepper`.

    Raises:
        ModelError: The model cannot take rows of different lengths.
    """
    stepper = Stepper(model, context)
    build = build_of(model)
    if build is None:
        return stepper
    lean = LeanStepper(model, build, context)
    lean.fuses = build.is_llama and _fused(lean.device.type) is not None and _may_fuse(lean, stepper)
    return lean if lean.fuses or agree(lean, stepper) else stepper


def has_kernels(model: PreTrainedModel | PeftModel) -> bool:
    """Whether a few tokens of a model may go through kernels of our own, on the GPU where it is."""
    build = build_of(model)
    return build is not None and build.is_llama and _fused(input_device(model).type) is not None


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
    if type(layer) is Conv1D:
        return torch.addmm(layer.bias, x, layer.weight)
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


def _normed(norm: Any, x: Tensor, reused: _Reused | None = None) -> Tensor:
    if type(norm) is nn.LayerNorm:
        return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    is_float = x.dtype == norm.weight.dtype == torch.float32 and x.device.type == "cpu"
    if reused is not None and len(x) > _FEW_ROWS and is_float:
        normed = torch.mul(x, x, out=reused.like("normed", x.shape, x))
        factors = normed.mean(-1, keepdim=True).add_(norm.variance_epsilon).rsqrt_()
        return torch.mul(x, factors, out=normed).mul_(norm.weight)
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


def _angles(rotary: Any, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """Cosines and sines of the angles at some positions, ``(rows * new, angles)``: each once, not for both halves."""
    if rotary is None:
        return None
    angles = positions.reshape(-1, 1).float() * rotary.inv_freq.to(torch.float32)
    scaling = rotary.attention_scaling
    return (angles.cos() * scaling).to(dtype), (angles.sin() * scaling).to(dtype)


def _rotation(cos: Tensor, sin: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """For both halves, ``(rows, new, 1, 2 * angles)``, the sine with the signs that rotation gives to them."""
    whole = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
    shape = (num_rows, -1, 1, 2 * cos.shape[-1])
    return whole[0].view(shape), whole[1].view(shape)


def _rotated(x: Tensor, rotation: tuple[Tensor, Tensor], room: Callable[[Sequence[int], Tensor], Tensor]) -> Tensor:
    """Queries or keys turned by their positions as far as there are angles, ``(rows, new, heads, head_dim)``."""
    cos, signed_sin = rotation
    size = cos.shape[-1]
    if size < x.shape[-1]:
        return torch.cat((_rotated(x[..., :size], rotation, room), x[..., size:]), -1)
    half = size // 2
    turned = torch.mul(x, cos, out=room(x.shape, x))
    turned[..., :half].addcmul_(x[..., half:], signed_sin[..., :half])
    turned[..., half:].addcmul_(x[..., :half], signed_sin[..., half:])
    return turned


def _attend(queries: Tensor, keys: Tensor, values: Tensor, mask: _Mask, scale: float, folded: int) -> Tensor:
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
        queries,
        keys,
        values,
        attn_mask=None if isinstance(mask, str) else mask,
        is_causal=isinstance(mask, str),
        scale=scale,
        enable_gqa=queries.shape[1] != shared,
    )
    return mixed.reshape(rows, heads, new, size).transpose(1, 2).reshape(rows * new, heads * size)
