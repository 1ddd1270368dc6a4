"""Memory in pages of 2 MB, which Linux gives to whoever asks for them.

Decoding reads every weight once a pass, and the processor has to look up where each page of it lies. Pages are 4 KB
otherwise, more than the processor keeps in mind, and a look-up in a virtual machine is two: few rows took up to
a third longer to multiply (``benchmarks/products.py``).

Memory that is new has to be cleared, which is one page at a time, too: so this is the place for what a long prompt
needs on the way (``lean.py``), and for keys and values, of which many rows read as much as of weights (``ragged.py``).

torch has no way to say where one tensor should lie, so what is moved here lies in memory of our own, one weight behind
the other, and that is given back when the last of them is gone. Each is a tensor like any other, with a storage of
its own.
"""

from __future__ import annotations

import math
import mmap
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from fedpt_flwr.free_memory import free_bytes

_SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
_LEAST_BYTES = 1 << 22
"""Less than this lies in a cache, or is read in no time."""
_MOST_PAGE_BYTES = 1 << 25
"""Where pages are larger, half a page too much would be a lot."""
_MOST_OF_FREE = 0.9
"""So much of what is free may be needed."""
_ALIGNMENT = 64
"""Bytes of a cache line."""

_rooms: list[range] = []
"""The addresses of all that are there."""


class Room:
    """Memory for tensors of a known size together; none, and then nothing is moved, where it would not help.

    It does not help where the system has no such pages, and for little; and it must not be taken where so much is not
    free: a checkpoint that is seen as memory can be larger than that.

    Args:
        num_bytes: Of all tensors that will be moved, each rounded up by :func:`rounded_up`.
        num_further: Bytes that have to be free.
    """

    def __init__(self, num_bytes: int, num_further: int) -> None:
        self._memory: mmap.mmap | None = None
        self._offset = self._end = 0
        page = _page_bytes()
        if not page or num_bytes < _LEAST_BYTES or num_further > _MOST_OF_FREE * free_bytes():
            return
        with suppress(OSError):  # there is no room
            self._memory = mmap.mmap(-1, num_bytes + page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            begin = torch.frombuffer(self._memory, dtype=torch.uint8).data_ptr()
            self._offset = -begin % page
            self._end = len(self._memory)
            addresses = range(begin, begin + self._end)
            _rooms.append(addresses)
            weakref.finalize(self._memory, _rooms.remove, addresses).atexit = False
            # What does not fill a page lies in small ones, or every tensor would take half a page more.
            self._memory.madvise(mmap.MADV_HUGEPAGE, self._offset, num_bytes // page * page)

    @property
    def is_there(self) -> bool:
        """Whether there is any."""
        return self._memory is not None

    def moved(self, tensor: Tensor) -> Tensor:
        """A copy of a CPU tensor in this memory, with rows one behind the other.

        Itself where there is none, and where it lies in such memory already.
        """
        if self._memory is None or lies_in_room(tensor):
            return tensor
        return self.empty(tensor.shape, tensor.dtype).copy_(tensor)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor in this memory, of whatever lies there; in torch's own where there is none left."""
        count = math.prod(shape)
        begin, size = self._offset, rounded_up(count * dtype.itemsize)
        if self._memory is None or not count or begin + size > self._end:
            return torch.empty(shape, dtype=dtype, device="cpu")
        self._offset += size
        return torch.frombuffer(self._memory, dtype=dtype, count=count, offset=begin).view(shape)


def lies_in_room(tensor: Tensor) -> bool:
    """Whether a CPU tensor lies in such memory, with rows one behind the other."""
    return tensor.is_contiguous() and any(tensor.data_ptr() in addresses for addresses in list(_rooms))


def zeros(shape: Sequence[int], like: Tensor) -> Tensor:
    """A tensor of zeros of the dtype and on the device of another: on a CPU in such pages, if it is not small."""
    num_bytes = math.prod(shape) * like.dtype.itemsize
    room = Room(num_bytes, num_bytes) if like.device.type == "cpu" else None
    if room is None or not room.is_there:
        return like.new_zeros(shape)
    return room.empty(shape, like.dtype)  # the system has cleared it


def rounded_up(num_bytes: int) -> int:
    """What a tensor of so many bytes takes: each begins with a cache line."""
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def _page_bytes() -> int:
    """Size of a huge page; 0 where the system has none, or keeps them to itself."""
    try:
        mode, size = ((_SETTINGS / name).read_text() for name in ("enabled", "hpage_pmd_size"))
    except OSError:
        return 0
    is_given = "[never]" not in mode and hasattr(mmap, "MADV_HUGEPAGE") and int(size) <= _MOST_PAGE_BYTES
    return int(size) if is_given else 0
