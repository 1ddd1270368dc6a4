"""What is free by the limits of control groups, as both versions lay them out; and memory that is given back."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from fedpt_flwr import free_memory
from fedpt_flwr.free_memory import free_bytes

if not Path("/proc/meminfo").is_file():
    pytest.skip("this is not Linux", allow_module_level=True)

SECOND = {"limit": "memory.max", "used": "memory.current", "files": "file", "shared": "shmem"}
FIRST = {
    "limit": "memory.limit_in_bytes",
    "used": "memory.usage_in_bytes",
    "files": "total_cache",
    "shared": "total_shmem",
}


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A system with 8000 bytes free, and control groups that are made up."""
    (tmp_path / "meminfo").write_text("MemTotal: 16 kB\nMemAvailable: 8 kB\n")
    monkeypatch.setattr(free_memory, "_SYSTEM", tmp_path / "meminfo")
    monkeypatch.setattr(free_memory, "_OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(free_memory, "_GROUPS", tmp_path / "groups")
    return tmp_path


def make_group(folder, names, *, limit, used, files=0, shared=0):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names["limit"]).write_text(f"{limit}\n")
    (folder / names["used"]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\n{names['files']} {files}\n{names['shared']} {shared}\n")


def test_without_groups_it_is_what_the_system_says(system):
    assert free_bytes() == 8 * 1024
    (system / "own").write_text("0::/some/where\n3:cpu:/\n")
    assert free_bytes() == 8 * 1024


@pytest.mark.parametrize(
    ("names", "line", "mount"),
    [
        (SECOND, "0::{}\n", "groups"),
        (SECOND, "1:cpu:/\n0::{}\n", "groups/unified"),
        (FIRST, "5:cpu,memory:{}\n", "groups/memory"),
    ],
    ids=["second version", "both, the second", "first version"],
)
def test_the_smallest_limit_around_the_process_counts(system, names, line, mount):
    (system / "own").write_text(line.format("/service/job"))
    mount = system / mount
    unlimited = "max" if names is SECOND else 2**63 - 4096
    make_group(mount / "service/job", names, limit=5000, used=1000)
    assert free_bytes() == 4000
    make_group(mount / "service", names, limit=5000, used=4000, files=500)
    assert free_bytes() == 1500  # files are given back
    make_group(mount / "service", names, limit=5000, used=4000, files=500, shared=400)
    assert free_bytes() == 1100  # what lies in no other place is not
    make_group(mount / "service", names, limit=unlimited, used=4000)
    assert free_bytes() == 4000
    make_group(mount / "service/job", names, limit=1000, used=2000)
    assert free_bytes() == 0
    make_group(mount / "service/job/inner", names, limit=1, used=1)  # not around it
    make_group(mount / "service/job", names, limit=unlimited, used=0)
    assert free_bytes() == 8 * 1024


@pytest.mark.parametrize("names", [FIRST, SECOND])
def test_in_a_container_the_path_outside_need_not_be_there(system, names):
    of_first = names is FIRST
    (system / "own").write_text("4:memory:/docker/abc\n" if of_first else "0::/../../docker/abc\n")
    make_group(system / "groups" / ("memory" if of_first else ""), names, limit=3000, used=500)
    assert free_bytes() == 2500


FREED = """
import ctypes
from pathlib import Path
import torch
from fedpt_flwr.free_memory import trim

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS"))

ctypes.CDLL(None).mallopt(-3, 1 << 25)  # as glibc itself does once a block of that size was freed
parts = [torch.ones(1 << 20) for _ in range(50)]
held = parts[::2]
del parts
before = resident()
trim()
print(before - resident())
"""


def test_what_was_freed_between_what_is_in_use_goes_back_to_the_system():
    if not hasattr(__import__("ctypes").CDLL(None), "malloc_trim"):
        pytest.skip("this C library has nothing to trim")
    out = subprocess.run([sys.executable, "-c", textwrap.dedent(FREED)], capture_output=True, text=True, check=True)
    assert int(out.stdout) > 20 * (4 << 20)
