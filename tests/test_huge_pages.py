"""Tensors in large pages: the same numbers, each a tensor of its own, and only where there is room for them."""

import copy
import gc
import mmap
from pathlib import Path

import pytest
import torch

from fedpt_flwr import huge_pages
from fedpt_flwr.huge_pages import Room, rounded_up

if not huge_pages._page_bytes():
    pytest.skip("this system has no huge pages", allow_module_level=True)

MEGABYTE = 1 << 20


def bytes_of(name):
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def test_what_is_moved_is_the_same_in_a_storage_of_its_own():
    tensors = [torch.randn(100, 77), torch.randn(77, 5_000).t(), torch.randn(3, 1).bfloat16(), torch.arange(17)]
    room = Room(sum(rounded_up(tensor.nbytes) for tensor in tensors), 0)
    moved = [room.moved(tensor) for tensor in tensors]
    assert room._memory is None  # 2 MB are too little
    assert all(one is other for one, other in zip(moved, tensors, strict=True))

    tensors.append(torch.randn(1000, 4000))
    room = Room(sum(rounded_up(tensor.nbytes) for tensor in tensors), 0)
    moved = [room.moved(tensor) for tensor in tensors]
    for one, other in zip(moved, tensors, strict=True):
        assert torch.equal(one, other)
        assert one.dtype == other.dtype
        assert one.is_contiguous()
        assert one.data_ptr() % 64 == 0
        assert one.untyped_storage().nbytes() == other.nbytes
    assert moved[0].data_ptr() % huge_pages._page_bytes() == 0
    ends = [one.data_ptr() + rounded_up(one.nbytes) for one in moved]
    assert [one.data_ptr() for one in moved[1:]] == ends[:-1]

    twin = copy.deepcopy(moved[0]).add_(1)
    assert torch.equal(moved[0], tensors[0])
    assert not torch.equal(twin, moved[0])
    moved[0].zero_()
    assert torch.equal(moved[1], tensors[1])


def test_the_system_gives_huge_pages_and_gets_them_back():
    before = bytes_of("AnonHugePages")
    room = Room(64 * MEGABYTE, 0)
    moved = [room.moved(torch.ones(2 * MEGABYTE)) for _ in range(8)]
    del room
    if not bytes_of("AnonHugePages") > before:
        page = huge_pages._page_bytes()
        memory = mmap.mmap(-1, 8 * page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
        memory[:] = bytes(8 * page)
        assert not bytes_of("AnonHugePages") > before  # others that ask for them get some
        pytest.skip("this system has none left")
    resident = bytes_of("Rss")
    last = moved.pop()
    del moved
    gc.collect()
    assert bool((last == 1).all())  # one is enough to keep the memory
    del last
    gc.collect()
    assert bytes_of("Rss") < resident - 48 * MEGABYTE


@pytest.mark.parametrize("shape", [(3, 5), (4, 9, 300, 1000)], ids=["small", "large"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_are_like_those_of_torch(shape, dtype, monkeypatch):
    like = torch.ones(2, dtype=dtype)
    for setting in (huge_pages._SETTINGS, Path("/nowhere")):
        monkeypatch.setattr(huge_pages, "_SETTINGS", setting)
        made = huge_pages.zeros(shape, like)
        assert torch.equal(made, like.new_zeros(shape))
        made += 1  # nobody else's
        assert not huge_pages.zeros(shape, like).any()
    assert huge_pages.zeros(shape, like.to("meta")).device.type == "meta"


@pytest.mark.parametrize("num_bytes", [9 * MEGABYTE, 10 * MEGABYTE - 8])
def test_no_page_is_taken_for_less_than_fills_it(num_bytes):
    before = bytes_of("Rss")
    made = [huge_pages.zeros((num_bytes,), torch.zeros(0, dtype=torch.uint8)).fill_(1) for _ in range(20)]
    assert all(one.data_ptr() % huge_pages._page_bytes() == 0 for one in made)
    assert bytes_of("Rss") - before < 20 * (num_bytes + MEGABYTE // 2)


@pytest.mark.parametrize(
    ("enabled", "size", "is_used"),
    [
        ("always [madvise] never", "2097152", True),
        ("[always] madvise never", "2097152", True),
        ("always madvise [never]", "2097152", False),
        ("always [madvise] never", str(512 * MEGABYTE), False),
        (None, "2097152", False),
    ],
)
def test_the_systems_setting_is_heeded(enabled, size, is_used, tmp_path, monkeypatch):
    if enabled:
        (tmp_path / "enabled").write_text(f"{enabled}\n")
        (tmp_path / "hpage_pmd_size").write_text(f"{size}\n")
    monkeypatch.setattr(huge_pages, "_SETTINGS", tmp_path)
    tensor = torch.ones(5 * MEGABYTE)
    assert (Room(tensor.nbytes, 0).moved(tensor) is not tensor) == is_used


def test_nothing_is_moved_where_memory_is_short(monkeypatch):
    tensor = torch.ones(5 * MEGABYTE)
    monkeypatch.setattr(huge_pages, "free_bytes", lambda: 1000)
    assert Room(tensor.nbytes, 950).moved(tensor) is tensor
    assert Room(tensor.nbytes, 850).moved(tensor) is not tensor

    def refused(*_, **__):
        raise OSError("Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refused)
    assert Room(tensor.nbytes, 0).moved(tensor) is tensor


def test_where_large_pages_are_refused_the_room_is_in_small_ones(monkeypatch):
    class Refusing(mmap.mmap):
        def madvise(self, *_):
            raise OSError("Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Refusing)
    tensor = torch.randn(5 * MEGABYTE)
    moved = Room(tensor.nbytes, 0).moved(tensor)
    assert moved is not tensor
    assert torch.equal(moved, tensor)


def test_what_lies_in_a_room_stays_there():
    tensor = torch.randn(1000, 5000)
    first = Room(tensor.nbytes, 0).moved(tensor)
    assert huge_pages.lies_in_room(first)
    assert not huge_pages.lies_in_room(tensor)
    room = Room(2 * tensor.nbytes, 0)
    assert room.moved(first) is first
    turned = room.moved(first.t())  # which has other rows
    assert torch.equal(turned, first.t())
    assert turned.is_contiguous()
    begin = first.data_ptr()
    assert any(begin in addresses for addresses in huge_pages._rooms)
    del first
    gc.collect()
    assert not any(begin in addresses for addresses in huge_pages._rooms)


def test_a_room_that_is_full_or_asked_for_nothing_gives_other_memory():
    room = Room(5 * MEGABYTE, 0)
    inside = room.empty((4 * MEGABYTE,), torch.uint8).fill_(7)
    outside = room.empty((4 * MEGABYTE,), torch.uint8).fill_(8)
    assert huge_pages.lies_in_room(inside)
    assert not huge_pages.lies_in_room(outside)
    assert bool((inside == 7).all())
    assert room.empty((0, 3), torch.float32).shape == (0, 3)
    with torch.device("meta"):
        assert room.empty((4 * MEGABYTE,), torch.uint8).device.type == "cpu"
