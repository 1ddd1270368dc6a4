"""One forward pass over rows of different lengths: what continuous batching and speculation are made of.

:class:`RaggedCache` keeps keys and values of every row from column 0 on, with a length per row. Rows join at the end
and leave from anywhere; taking tokens back moves a length and copies nothing. :class:`Stepper` appends tokens to all
rows of such a cache, each at its own place, under the forward pass that transformers has for the model.

Where all rows have one length, no mask is built and the model takes the path that it takes in ``generate()``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from fedpt_flwr.errors import ModelError
from fedpt_flwr.huge_pages import zeros
from fedpt_flwr.models import input_device, is_remote

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

_COLUMNS_AT_ONCE = 64
"""Columns by which a cache grows, at least half of them spare: to copy it right behind a prompt, before a token is
written, took two thirds of a round of 32 rows."""

_WASTE = 0.75
"""Prompts are read together if the shortest has at least this share of the longest's tokens: the rest is padding."""

_FREE_TOKENS = 1024
"""A GPU takes as long for a pass over a few tokens as for one over so many, so up to here padding costs nothing."""

_TOLERANCES = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}
"""How far scores of one model may lie apart, as a share of the largest one."""


class _Place:
    """Where the tokens of the current forward pass go; shared by all layers of a cache."""

    def __init__(self) -> None:
        self.num_rows = 0
        self.width = 0  # columns that hold something once the tokens are in
        self.start: int | None = 0  # the column of every row's first new token, or None where rows differ
        self.rows: Tensor | None = None  # (num_rows, 1) and
        self.columns: Tensor | None = None  # (num_rows, new), int64, where rows differ


class _RaggedLayer(CacheLayerMixin):
    """Keys and values of one layer: ``(rows, heads, columns, head_dim)``, some of them spare."""

    is_sliding = False  # all columns are kept; the mask forgets what has left a window

    def __init__(self, place: _Place) -> None:
        super().__init__()
        self._place = place

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate nothing yet: :meth:`update` does."""
        # Zeros and not just memory: a masked column has no weight, but 0 * NaN would be NaN.
        self.keys = key_states.new_zeros((0, key_states.shape[1], 0, key_states.shape[3]))
        self.values = value_states.new_zeros((0, value_states.shape[1], 0, value_states.shape[3]))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Write the new tokens' states and return those of all rows and columns in use."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        place = self._place
        self.make_room(place.num_rows, place.width)
        for stored, new in ((self.keys, key_states), (self.values, value_states)):
            if place.rows is None or place.columns is None or place.start is not None:
                stored[: place.num_rows, :, place.start : place.width] = new
            else:
                # Layers of one model may lie on different devices.
                rows, columns = place.rows.to(stored.device), place.columns.to(stored.device)
                stored[rows, :, columns] = new.transpose(1, 2)
        return self.in_use()

    def hold(self, num_heads: int, head_dim: int, like: Tensor) -> None:
        """Have room for the new tokens, for who writes their keys and values himself.

        Args:
            num_heads: Of the keys.
            head_dim: Their size.
            like: A tensor of the dtype and on the device that they are to have.
        """
        if not self.is_initialized:
            nothing = like.new_empty((0, num_heads, 0, head_dim))
            self.lazy_initialization(nothing, nothing)
        self.make_room(self._place.num_rows, self._place.width)

    def in_use(self) -> tuple[Tensor, Tensor]:
        """Views of the rows and columns that hold something."""
        rows, width = self._place.num_rows, self._place.width
        return self.keys[:rows, :, :width], self.values[:rows, :, :width]

    def make_room(self, num_rows: int, width: int) -> None:
        """Have at least so many rows and columns, of which so many rows are in use or will be."""
        rows, columns = self.keys.shape[0], self.keys.shape[2]
        if num_rows <= rows and width <= columns:
            return
        if width > columns:  # all is copied anyway, and nothing of rows that have left
            columns = -(-(width + _COLUMNS_AT_ONCE // 2) // _COLUMNS_AT_ONCE) * _COLUMNS_AT_ONCE
        self.keys = _resized(self.keys, num_rows, columns)
        self.values = _resized(self.values, num_rows, columns)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:  # noqa: ARG002
        """Columns that attention sees, and the first of them."""
        return self._place.width, 0

    def get_seq_length(self) -> int:
        """Tokens before the current ones, where all rows have as many."""
        return self._place.start or 0

    def get_max_length(self) -> int:
        """No bound."""
        return -1


class RaggedCache(Cache):
    """Keys and values of rows that have different lengths.

    Args:
        model: The model whose cache this is.

    Attributes:
        lengths: Tokens of each row.
        windows: How far each layer looks back, None for everything.

    Raises:
        ModelError: The model remembers something else than keys and values, its attention takes no dense mask, or
            what a token looks like to it depends on the other rows.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        _check_positions(model)
        self.windows = _windows(model)
        self._place = _Place()
        self.lengths: list[int] = []
        super().__init__(layers=[_RaggedLayer(self._place) for _ in self.windows])

    @property
    def num_rows(self) -> int:
        """Rows that are there."""
        return len(self.lengths)

    def add_rows(self, number: int) -> None:
        """Add empty rows after the others."""
        self.lengths += [0] * number

    def append(self, other: RaggedCache, row: int, times: int = 1) -> None:
        """Add copies of another cache's row after the others.

        Args:
            other: A cache of the same model.
            row: Which of its rows.
            times: How many copies.
        """
        length = other.lengths[row]
        first = self.num_rows
        self.lengths += [length] * times
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            if not mine.is_initialized:
                mine.lazy_initialization(theirs.keys, theirs.values)
            # Rows come one at a time and go: some more are made at once.
            spare = self.num_rows if self.num_rows <= mine.keys.shape[0] else 2 * first + times
            mine.make_room(spare, max(self.lengths))
            mine.keys[first : self.num_rows, :, :length] = theirs.keys[row, :, :length]
            mine.values[first : self.num_rows, :, :length] = theirs.values[row, :, :length]

    def remove(self, row: int) -> None:
        """Take a row away; the last row gets its number. Without rows, the memory is given back."""
        last = self.num_rows - 1
        length = self.lengths.pop()
        if row != last:
            self.lengths[row] = length
        for layer in self.layers:
            if not self.lengths:
                layer.keys = layer.values = None
                layer.is_initialized = False
                continue
            for stored in (layer.keys, layer.values):
                if row != last:
                    stored[row] = stored[last]
                stored[last] = 0  # whoever comes next masks what is left here, and 0 * NaN would be NaN

    def cut(self, lengths: Sequence[int], *, clear: bool = False) -> None:
        """Take back each row's last tokens.

        Args:
            lengths: How many tokens each row keeps, at most as many as it has.
            clear: Whether what they left is written over: whoever comes next masks it, but 0 * NaN would be NaN.
        """
        for layer in (layer for layer in self.layers if clear and layer.is_initialized):
            for stored in (layer.keys, layer.values):
                for row, kept in enumerate(lengths):
                    stored[row, :, kept:] = 0
        self.lengths = [min(kept, length) for kept, length in zip(lengths, self.lengths, strict=True)]

    def begin(self, num_new: int, device: torch.device) -> Tensor:
        """Say that the next forward pass appends so many tokens to every row.

        Args:
            num_new: Tokens per row.
            device: Where the model is.

        Returns:
            Positions of the new tokens, ``(rows, num_new)``, int64.
        """
        starts = self.lengths
        self.extend(num_new)
        steps = torch.arange(num_new, device=device)
        positions = torch.tensor(starts, device=device)[:, None] + steps
        if self._place.start is None:
            self._place.rows = torch.arange(self.num_rows, device=device)[:, None]
            self._place.columns = positions
        return positions

    def extend(self, num_new: int) -> None:
        """The same, for who needs no positions and writes keys and values himself.

        Args:
            num_new: Tokens per row.
        """
        place, starts = self._place, self.lengths
        place.num_rows = self.num_rows
        place.width = max(starts) + num_new
        place.start = starts[0] if min(starts) == max(starts) else None
        place.rows = place.columns = None
        self.lengths = [start + num_new for start in starts]

    def mask(self, positions: Tensor, dtype: torch.dtype | None) -> Tensor | dict[str, Tensor] | None:
        """What each new token may look at.

        Args:
            positions: What :meth:`begin` returned.
            dtype: None for a mask of truth values; else scores of this dtype to be added, 0 or the lowest there is.

        Returns:
            ``(rows, 1, new, columns)``; one mask per kind of layer, where a model mixes windows with full attention; or
            None where all rows have one length, and the model knows by itself.
        """
        if self._place.start is not None:
            return None
        masks = {
            "full_attention" if window is None else "sliding_attention": self._mask(positions, window, dtype)
            for window in dict.fromkeys(self.windows)
        }
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def begins_with(self, num_new: int, window: int | None) -> bool:
        """Whether so many new tokens are all that there is, in rows of one length, and each sees all before it."""
        return self._place.start == 0 and (window is None or num_new <= window)

    def score_masks(
        self, positions: Tensor, dtype: torch.dtype, windows: Iterable[int | None] | None = None
    ) -> dict[int | None, Tensor | None]:
        """What each new token may look at, for attention that knows nothing by itself.

        Args:
            positions: What :meth:`begin` returned.
            dtype: Of the scores.
            windows: Those that are asked about; None is :attr:`windows`.

        Returns:
            For each of these, what to add to the scores: ``(rows, 1, new, columns)``, with one row for all
            where they have one length; or None where every new token sees all columns.
        """
        place = self._place
        if place.start is not None:
            positions = positions[:1]
        alone = place.start is not None and positions.shape[1] == 1
        return {
            window: None
            if alone and (window is None or place.width <= window)
            else self._mask(positions, window, dtype)
            for window in dict.fromkeys(self.windows if windows is None else windows)
        }

    def _mask(self, positions: Tensor, window: int | None, dtype: torch.dtype | None) -> Tensor:
        columns = torch.arange(self._place.width, device=positions.device)
        places = positions[:, None, :, None]
        seen = columns <= places
        if window is not None:
            seen &= columns > places - window
        if dtype is None:
            return seen
        return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)


class Stepper:
    """One model, asked about the next tokens of rows that have different lengths.

    Args:
        model: The model, plain or with an adapter.
        context: Makes the context in which it must be called.

    Attributes:
        model: This one.
        base: The model without its adapter; the same one if it has none.
        context: This one.

    Raises:
        ModelError: The model cannot be called this way.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        context: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.model = model
        self.context = context
        base = model.get_base_model() if hasattr(model, "peft_config") else model
        self.base = base
        accepted = inspect.signature(base.forward).parameters
        if "position_ids" not in accepted:
            raise ModelError(
                "a model whose rows have different lengths must take position_ids",
                value=type(base).__name__,
                remedy="use a model with rotary or learned positions; ALiBi's follow from the padding",
            )
        self._slices_itself = "logits_to_keep" in accepted
        self.new_cache()  # says now what it would say later

    @property
    def device(self) -> torch.device:
        """Where the model takes its inputs."""
        return input_device(self.model)

    def new_cache(self) -> RaggedCache:
        """A cache without rows."""
        return RaggedCache(self.base)

    @property
    def is_remote(self) -> bool:
        """Whether every position that is looked at costs something."""
        return is_remote(self.base)

    @property
    def runs_beside(self) -> bool:
        """Whether :meth:`launch` leaves time for passes of other models."""
        return False

    @property
    def is_current(self) -> bool:
        """Whether the model is still what it was seen to be: hooks and adapters may have come."""
        return True

    @property
    def rough(self) -> Stepper | None:
        """One that answers nearly as this one, in less time and on the same caches; None if there is none now."""
        return None

    def twin(self) -> Stepper:
        """One that shares nothing but the model, for passes beside those that are under way."""
        return self

    def launch(self, cache: RaggedCache, ids: Tensor, *, keep: int | Tensor = 1) -> Callable[[], Tensor]:
        """Begin what a call does, perhaps beside passes of other models.

        Args:
            cache: The rows; extended in place.
            ids: As in a call.
            keep: As in a call.

        Returns:
            Waits for the scores; to be called once, before the next pass begins.
        """
        scores = self(cache, ids, keep=keep)
        return lambda: scores

    def read(self, cache: RaggedCache, ids: Tensor) -> None:
        """Append tokens to every row of a cache, whatever comes next."""
        self(cache, ids, keep=torch.empty(0, dtype=torch.int64) if self.is_remote else 1)

    def read_prompts(self, prompts: Sequence[Sequence[int]]) -> RaggedCache:
        """Read prompts of any lengths but for their last tokens, which are asked about with what comes next.

        Args:
            prompts: Token ids, at least one each.

        Returns:
            A cache with a row for each, in their order.
        """
        groups = _groups([len(prompt) for prompt in prompts], _FREE_TOKENS if self.device.type == "cuda" else 0)
        caches = [self._read_group([prompts[row] for row in group]) for group in groups]
        if groups == [list(range(len(prompts)))]:
            return caches[0]
        places = {row: (cache, at) for group, cache in zip(groups, caches, strict=True) for at, row in enumerate(group)}
        whole = self.new_cache()
        for row, prompt in enumerate(prompts):
            if len(prompt) > 1:
                whole.append(*places[row])
            else:
                whole.add_rows(1)
        return whole

    def _read_group(self, prompts: Sequence[Sequence[int]]) -> RaggedCache:
        """Prompts of similar lengths in one pass, filled up on the right."""
        width = max(map(len, prompts)) - 1
        cache = self.new_cache()
        cache.add_rows(len(prompts))
        if width:
            # With a token of the row itself, because a translated model need not read any other.
            padded = [[*prompt[:-1], *[prompt[0]] * (width + 1 - len(prompt))] for prompt in prompts]
            self.read(cache, torch.tensor(padded))
            cache.cut([len(prompt) - 1 for prompt in prompts])
        return cache

    def __call__(
        self, cache: RaggedCache, ids: Tensor, *, keep: int | Tensor = 1, num_wanted: Sequence[int] | None = None
    ) -> Tensor:
        """Append tokens to every row of a cache, each at its own length, and score what comes next.

        Args:
            cache: The rows; extended in place.
            ids: ``(rows, new)``, int64, on any device.
            keep: Score only the last so many of the new positions (0 is all), or those in this tensor.
            num_wanted: Of each row only the first so many of these are looked at: a remote model is not asked about the
                others, and scores them 0. None: all are.

        Returns:
            ``(rows, kept, width)``, in the model's dtype and on its device.
        """
        device = self.device
        positions = cache.begin(ids.shape[1], device)
        dtype = self.base.dtype if self.base.config._attn_implementation == "eager" else None
        keep = keep.to(device) if isinstance(keep, Tensor) else keep
        settings: dict[str, Any] = {"logits_to_keep": keep} if self._slices_itself else {}
        if self.is_remote:
            settings["num_wanted"] = num_wanted
        with self.context():
            logits: Tensor = self.model(
                input_ids=ids.to(device),
                position_ids=positions,
                attention_mask=cache.mask(positions, dtype),
                cache=cache,
                use_cache=True,
                return_dict=True,
                **settings,
            ).logits
        if self._slices_itself:
            return logits
        return logits[:, -keep:] if isinstance(keep, int) else logits[:, keep]


def _groups(lengths: Sequence[int], free_tokens: int) -> list[list[int]]:
    """Which prompts are read together; those of a group follow each other by length.

    Args:
        lengths: Of the prompts.
        free_tokens: A pass over so many, with padding, takes no longer than a shorter one.
    """
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if groups:
            is_free = (len(groups[-1]) + 1) * lengths[row] <= free_tokens
            if is_free or lengths[groups[-1][0]] >= _WASTE * lengths[row]:
                groups[-1].append(row)
                continue
        groups.append([row])
    return groups


def agree(one: Stepper, other: Stepper) -> bool:
    """Whether two step functions of a model score a few tokens alike, in rows of one length and of several."""
    vocab_size: int = one.base.config.vocab_size
    ids = torch.arange(10).view(2, 5) * 7919 % vocab_size
    caches = [step.new_cache() for step in (one, other)]
    for cache in caches:
        cache.add_rows(2)
    pieces, lengths = ids.split([2, 2, 1], dim=1), ([1, 2], [2, 4], [3, 5])
    with torch.no_grad():
        for piece, kept in zip(pieces, lengths, strict=True):
            found, expected = (step(cache, piece, keep=0) for step, cache in zip((one, other), caches, strict=True))
            largest = _TOLERANCES.get(expected.dtype, 0.0) * expected.abs().max()
            # Written so that a NaN counts as disagreement.
            if expected.shape != found.shape or not bool((expected - found).abs().max() <= largest):
                return False
            for cache in caches:
                cache.cut(kept)
    return True


def _resized(stored: Tensor, num_rows: int, num_columns: int) -> Tensor:
    rows, heads, columns, size = stored.shape
    made = zeros((num_rows, heads, num_columns, size), stored)
    made[:rows, :, :columns] = stored[:num_rows]
    return made


def _check_positions(model: PreTrainedModel) -> None:
    """Make sure that a row's keys do not depend on where in the cache it lies, or on how long the pass is.

    Raises:
        ModelError: They do.
    """
    config = model.config.get_text_config(decoder=True)
    depends = None
    if getattr(config, "alibi", False):
        depends = "ALiBi positions"  # Falcon's follow from the padding, whatever position_ids say
    elif "local" in (getattr(config, "attention_layers", None) or ()):
        depends = "windows of columns"  # GPT-Neo's, beside the mask
    if depends is not None:
        raise ModelError(
            "rows of different lengths need positions that depend on the row alone",
            value=f"{type(model).__name__} with {depends}",
            remedy="use a model with learned positions, or rotary ones",
        )


def _windows(model: PreTrainedModel) -> list[int | None]:
    """The window of each layer, None where it sees everything."""
    layers = DynamicCache(config=model.config).layers
    kinds = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or []
    plain = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
    if not plain or "chunked_attention" in kinds:
        raise ModelError(
            "rows of different lengths need a model that remembers keys and values of all its tokens, or of a window",
            value=type(model).__name__,
            remedy="use a model with full or sliding attention in every layer",
        )
    implementation = model.config._attn_implementation
    if implementation not in ("sdpa", "eager"):
        raise ModelError(
            "rows of different lengths need attention that takes a dense mask",
            value=implementation,
            remedy="load the model with attn_implementation='sdpa'",
        )
    return [getattr(layer, "sliding_window", None) for layer in layers]
