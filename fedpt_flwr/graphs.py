"""Passes over a few tokens as CUDA graphs: recorded once, and then launched as a whole.

On a GPU a pass over a few tokens consists of hundreds of short kernels, and Python takes longer to launch one than the
GPU to run it. A graph is launched by a single call. In return nothing about it may change: neither shapes nor
addresses. So :class:`GraphedStepper` keeps keys and values in memory of its own, in which one
:class:`~fedpt_flwr.ragged.RaggedCache` at a time lies, and records a graph for each number of rows, of tokens per row
and of columns, each rounded up so that there are few of them. Rows that are not there are filled with tokens that
nobody looks at; tokens behind a row's last one are written where the next ones go.

What is recorded is any step function (``ragged.py``, ``lean.py``), which knows nothing of it. :func:`graphed` takes one
only if graphs of it score as it does by itself.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fedpt_flwr.models import max_positions
from fedpt_flwr.ragged import RaggedCache, Stepper, agree

_log = logging.getLogger(__name__)

_MOST_NEW = 8
"""New tokens per row up to which a pass is recorded: prompts have too many lengths, and are read only once."""

_MOST_TOKENS = 256
"""Tokens of all rows up to which it is: more keep a GPU busy by themselves."""

_REST = 1000
"""Passes that are not recorded after there was no memory for one: asking for it takes time, too."""

_COLUMNS = 256
"""Columns are rounded up to a power of two from here, and beyond four times as many to a multiple of that."""


class Recorder(Protocol):
    """Records passes of one model."""

    def __call__(self, run: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
        """From a pass to a function that begins to repeat it, and returns the same tensor every time."""
        ...

    def wait(self) -> None:
        """Let what comes next find the scores of the pass that was begun last."""
        ...

    def anew(self) -> Recorder:
        """One that has recorded nothing."""
        ...


class _Memory:
    """Keys and values of all layers, at addresses that stay the same.

    Args:
        shapes: ``(heads, head_dim)`` of each layer's keys and values.
        num_rows: Rows there is room for.
        num_columns: Columns there is room for.
        like: A tensor of each layer, of the dtype and on the device that they are to have.
    """

    def __init__(
        self, shapes: Sequence[tuple[tuple[int, int], ...]], num_rows: int, num_columns: int, like: Sequence[Tensor]
    ) -> None:
        self.num_rows, self.num_columns = num_rows, num_columns
        self.layers = [
            tuple(one.new_zeros((num_rows, heads, num_columns, size)) for heads, size in of_layer)
            for of_layer, one in zip(shapes, like, strict=True)
        ]
        self._user: weakref.ref[RaggedCache] | None = None

    @property
    def user(self) -> RaggedCache | None:
        """The cache that lies in it, if only with some layers; None once that is gone or lies elsewhere."""
        cache = None if self._user is None else self._user()
        return cache if cache is not None and any(self._held(cache)) else None

    def holds(self, cache: RaggedCache) -> bool:
        """Whether a cache lies in it with all layers."""
        return all(self._held(cache))

    def _held(self, cache: RaggedCache) -> list[bool]:
        return [
            layer.is_initialized and layer.keys is keys and layer.values is values
            for layer, (keys, values) in zip(cache.layers, self.layers, strict=True)
        ]

    def take(self, cache: RaggedCache) -> None:
        """Put a cache into it, with what it holds; there must be room."""
        width = max(cache.lengths)
        for layer, stored, is_there in zip(cache.layers, self.layers, self._held(cache), strict=True):
            if is_there:
                continue
            former = (layer.keys, layer.values) if layer.is_initialized and layer.keys.numel() else None
            for number, target in enumerate(stored):
                target.zero_()  # what is masked has no weight, but 0 * NaN would be NaN
                if former is not None:
                    rows = min(cache.num_rows, len(former[number]))
                    columns = min(width, former[number].shape[2])
                    target[:rows, :, :columns] = former[number][:rows, :, :columns]
            layer.keys, layer.values = stored
            layer.is_initialized = True
        self._user = weakref.ref(cache)


class _FixedCache(RaggedCache):
    """A cache for a pass that is recorded: how long its rows are is not known before it is run.

    Args:
        step: The step function.
        memory: Where keys and values lie.
        starts: ``(rows, 1)``, int64: tokens of each row before the pass.
        num_columns: How many of the columns can be in use.
    """

    def __init__(self, step: Stepper, memory: _Memory, starts: Tensor, num_columns: int) -> None:
        super().__init__(step.base)
        self._starts = starts
        self.lengths = [0] * len(starts)  # which nobody may go by
        for layer, stored in zip(self.layers, memory.layers, strict=True):
            layer.keys, layer.values = stored
            layer.is_initialized = True
        place = self._place
        place.num_rows, place.width, place.start = len(starts), num_columns, None
        place.rows = torch.arange(len(starts), device=starts.device)[:, None]

    def begin(self, num_new: int, device: torch.device) -> Tensor:
        """Positions of the new tokens, by the lengths as they are when the pass is run."""
        positions = self._starts + torch.arange(num_new, device=device)
        self._place.columns = positions
        return positions


class _Pass:
    """One recorded pass: so many rows, tokens per row and columns."""

    def __init__(self, step: Stepper, memory: _Memory, num_rows: int, num_new: int, num_columns: int) -> None:
        device = step.device
        self._step = step
        self._ids = torch.zeros((num_rows, num_new), dtype=torch.int64, device=device)
        self._starts = torch.zeros((num_rows, 1), dtype=torch.int64, device=device)
        self._cache = _FixedCache(step, memory, self._starts, num_columns)
        self._run: Callable[[], Tensor] | None = None

    def begin(self, ids: Tensor, lengths: Sequence[int], record: Recorder) -> Tensor:
        """Launch it; what will be the scores of all tokens, ``(rows, new, width)``, until the next pass."""
        num_rows, num_new = ids.shape
        # Not waiting for what the GPU does: Python prepares the next pass meanwhile. (CUDA takes what lies in ordinary
        # memory away at once, so that may go.)
        self._ids[:num_rows, :num_new].copy_(ids, non_blocking=True)
        starts = torch.tensor([*lengths, *[0] * (len(self._starts) - num_rows)])
        self._starts.copy_(starts[:, None], non_blocking=True)
        if self._run is None:
            # The same tokens to the same places, so it does no harm that recording runs the pass more than once.
            self._run = record(lambda: self._step(self._cache, self._ids, keep=0), self._ids.device)
        return self._run()[:num_rows, :num_new]


class GraphedStepper(Stepper):
    """A step function whose passes over few tokens are CUDA graphs.

    It is called and answers like the one that it is made of, by several threads, too: the first one's cache lies in the
    memory, and the others' passes are launched kernel by kernel. Weights may change in place and adapters be switched;
    who exchanges parameters or an adapter, merges it or changes its scale makes another stepper.

    Args:
        step: Its model must be on one device as a whole.
        record: Makes a graph of a pass.

    Attributes:
        failure: Why no pass is recorded any more; empty while they are.
    """

    def __init__(self, step: Stepper, record: Recorder | None = None) -> None:
        super().__init__(step.model, step.context)
        self._step = step
        self._record = _Graphs() if record is None else record
        self.failure = ""
        self._longest = max_positions(self.base)
        self._weights = [*self.model.parameters(), *self.model.buffers()]
        self._kind = step.device.type
        self._lock = threading.Lock()
        self._rest = 0
        self._look()

    def _look(self) -> None:
        """Find out, now and when weights lie elsewhere, what keys and values are like; nothing is recorded yet."""
        self._known = self._state()
        self._passes: dict[tuple[int, int, int], _Pass] = {}
        self._memory: _Memory | None = None
        probe = self._step.new_cache()
        probe.add_rows(1)
        self._step(probe, torch.zeros((1, 1), dtype=torch.int64))
        self._like = [layer.keys.new_empty(0) for layer in probe.layers]
        self._shapes = [
            tuple((states.shape[1], states.shape[3]) for states in (layer.keys, layer.values)) for layer in probe.layers
        ]

    @property
    def is_current(self) -> bool:
        """See :attr:`fedpt_flwr.ragged.Stepper.is_current`."""
        return self._step.is_current

    @property
    def runs_beside(self) -> bool:
        """See :attr:`fedpt_flwr.ragged.Stepper.runs_beside`."""
        return not self.failure

    def twin(self) -> Stepper:
        """One with memory of its own, where passes are recorded."""
        return self if self.failure or self._rest else GraphedStepper(self._step, self._record.anew())

    def __call__(
        self, cache: RaggedCache, ids: Tensor, *, keep: int | Tensor = 1, num_wanted: Sequence[int] | None = None
    ) -> Tensor:
        """See :meth:`fedpt_flwr.ragged.Stepper.__call__`."""
        del num_wanted  # of remote models only
        return self.launch(cache, ids, keep=keep)()

    def launch(self, cache: RaggedCache, ids: Tensor, *, keep: int | Tensor = 1) -> Callable[[], Tensor]:
        """See :meth:`fedpt_flwr.ragged.Stepper.launch`."""
        num_rows, num_new = ids.shape
        rows, new = _rounded(num_rows), _rounded(num_new)
        width = max(cache.lengths) + new
        is_short = new <= _MOST_NEW and rows * new <= _MOST_TOKENS
        fits = is_short and (self._longest is None or width <= self._longest)
        # Tensors that are made in inference mode could not be written to outside of it.
        with torch.inference_mode(False), torch.no_grad(), self._lock:
            memory = self._memory_of(cache, rows, width) if fits and self._may_record() else None
            scores = None if memory is None else self._begin(memory, rows, new, width, ids, cache.lengths)
        if scores is None:
            return self._step.launch(cache, ids, keep=keep)
        cache.lengths = [length + num_new for length in cache.lengths]

        def result() -> Tensor:
            self._record.wait()
            return (scores[:, -keep:] if isinstance(keep, int) else scores[:, keep.to(scores.device)]).clone()

        return result

    def _begin(
        self, memory: _Memory, num_rows: int, num_new: int, width: int, ids: Tensor, lengths: Sequence[int]
    ) -> Tensor | None:
        """Launch a pass, recorded now if need be; None where that fails."""
        key = (num_rows, num_new, min(_rounded_columns(width), memory.num_columns))
        if key not in self._passes:
            self._passes[key] = _Pass(self._step, memory, *key)
        try:
            return self._passes[key].begin(ids, lengths, self._record)
        except torch.OutOfMemoryError:
            self._rest_a_while(num_rows, width)
        except RuntimeError as error:  # what a graph cannot hold, such as waiting for a result, shows only here
            self.failure = str(error).partition("\n")[0]
            _log.info("%s decodes without CUDA graphs: %s", type(self.base).__name__, self.failure)
            self._passes.clear()
            self._memory = None
        return None

    def _may_record(self) -> bool:
        self._rest = max(0, self._rest - 1)
        return not self.failure and not self._rest

    def _rest_a_while(self, num_rows: int, width: int) -> None:
        _log.warning("no memory for CUDA graphs of %d rows with %d tokens: going on without", num_rows, width)
        self._passes.clear()
        self._memory = None
        self._rest = _REST

    def _memory_of(self, cache: RaggedCache, num_rows: int, width: int) -> _Memory | None:
        """The memory with this cache in it; None where it cannot be there."""
        if self.device.type != self._kind:
            return None
        if self._known != self._state():
            self._look()
        user = None if self._memory is None else self._memory.user
        if user is not None and user is not cache:
            return None
        if self._memory is None or num_rows > self._memory.num_rows or width > self._memory.num_columns:
            self._enlarge(num_rows, width)
        if self._memory is not None and not self._memory.holds(cache):
            self._memory.take(cache)
        return self._memory

    def _enlarge(self, num_rows: int, width: int) -> None:
        """Make memory for at least so many rows and columns; what is recorded so far is bound to the former."""
        num_columns = _rounded_columns(width)
        if (former := self._memory) is not None:
            rows, columns = max(num_rows, former.num_rows), max(num_columns, former.num_columns)
            needed = max(num_rows * num_columns, former.num_rows * former.num_columns)
            if rows * columns <= 2 * needed:  # many rows once and many columns at another time need no room for both
                num_rows, num_columns = rows, columns
        self._passes.clear()
        self._memory = former = None  # first, or there may be no room; a cache that lies in it keeps what it needs
        try:
            self._memory = _Memory(self._shapes, num_rows, num_columns, self._like)
        except torch.OutOfMemoryError:
            self._rest_a_while(num_rows, num_columns)

    def _state(self) -> tuple[object, ...]:
        """What a recorded pass takes for granted: where weights and buffers lie, and which adapters are switched on."""
        adapters = getattr(self.model, "active_adapters", ()) if hasattr(self.model, "peft_config") else ()
        return tuple(adapters), [weight.data_ptr() for weight in self._weights]


def graphed(step: Stepper) -> Stepper:
    """The step function with its short passes as CUDA graphs.

    Args:
        step: Any.

    Returns:
        This one itself where its model is not on one GPU as a whole, or where recorded passes fail or score otherwise.
    """
    devices = {weight.device for weight in step.model.parameters()}
    if step.is_remote or len(devices) != 1 or next(iter(devices)).type != "cuda" or hasattr(step.base, "hf_device_map"):
        return step
    graphs = GraphedStepper(step)
    if not agree(graphs, step):
        _log.info("%s decodes without CUDA graphs: they score otherwise", type(step.base).__name__)
        return step
    return step if graphs.failure else graphs


class _Graphs:
    """Records passes as CUDA graphs, which share memory for what they compute in between and run beside other work."""

    def __init__(self) -> None:
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, run: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
        with torch.cuda.device(device), _one_at_a_time:
            stream = self._stream = torch.cuda.Stream() if self._stream is None else self._stream
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):  # what is made at a first call must be there before
                    run()
                graph = torch.cuda.CUDAGraph()
                # cuBLAS's scratch memory must be the graph's own: whoever compiles models gives the common one back.
                torch._C._cuda_clearCublasWorkspaces()
                # Other threads may load models meanwhile. (Where this fails, the outer block puts the stream back.)
                with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                    scores = run()
                torch._C._cuda_clearCublasWorkspaces()
            torch.cuda.current_stream().wait_stream(stream)
            self._pool = graph.pool()

        def replay() -> Tensor:
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                graph.replay()
            return scores

        return replay

    def wait(self) -> None:
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)

    def anew(self) -> _Graphs:
        return _Graphs()


_one_at_a_time = threading.Lock()
"""A graph is recorded while no other is: to begin one waits for all that the GPU does."""


def _rounded(number: int) -> int:
    """Up to a power of two, and beyond eight to a multiple of that."""
    return 1 << (number - 1).bit_length() if number <= 8 else -(-number // 8) * 8


def _rounded_columns(number: int) -> int:
    if number <= 4 * _COLUMNS:
        return max(_COLUMNS, 1 << (number - 1).bit_length())
    return -(-number // (4 * _COLUMNS)) * 4 * _COLUMNS
