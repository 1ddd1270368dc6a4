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
    assert Room(tensor.nbytes, huge_pages._free_bytes() + 64 * MEGABYTE).moved(tensor) is tensor

    def refused(*_, **__):
        raise OSError("Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refused)
    assert Room(tensor.nbytes, 0).moved(tensor) is tensor


def test_a_containers_limit_is_heeded(tmp_path, monkeypatch):
    system = huge_pages._free_bytes()
    for name, text in {"memory.max": "max", "memory.current": "700", "memory.stat": "anon 600\nfile 50"}.items():
        (tmp_path / name).write_text(f"{text}\n")
    monkeypatch.setattr(huge_pages, "_GROUP", tmp_path)
    assert huge_pages._free_bytes() == pytest.approx(system, rel=0.2)
    (tmp_path / "memory.max").write_text("1000\n")
    assert huge_pages._free_bytes() == 350
