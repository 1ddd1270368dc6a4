"""How much memory a process could still take, and giving back what it has freed."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import NamedTuple

_SYSTEM = Path("/proc/meminfo")
_OWN_GROUPS = Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")


class _Files(NamedTuple):
    """What a control group says of its memory, and where: in version 1 and 2 of them."""

    mounts: tuple[Path, ...]
    limit: str
    used: str
    files: str
    """In ``memory.stat``: files that are kept in memory, which the system takes back when it needs the room …"""
    shared: str
    """… but for those that lie nowhere else."""


def free_bytes() -> int:
    """Bytes that this process could still take, by the system and by all limits on its control groups; Linux only."""
    lines = dict(line.split(":") for line in _SYSTEM.read_text().splitlines())
    return max(0, min(1024 * int(lines["MemAvailable"].split()[0]), *_left_in_groups()))


def trim() -> None:
    """Have glibc give the system what was freed, with holes between what is in use; elsewhere this does nothing."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _left_in_groups() -> Iterator[int]:
    """What each limit leaves: of the process's groups and those around them, such as a container's or a service's."""
    yield 1 << 63  # without limits
    for line in _OWN_GROUPS.read_text().splitlines() if _OWN_GROUPS.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            files = _Files((_GROUPS, _GROUPS / "unified"), "memory.max", "memory.current", "file", "shmem")
        elif "memory" in controllers.split(","):
            files = _Files(
                (_GROUPS / "memory",), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache", "total_shmem"
            )
        else:
            continue
        own = PurePosixPath(path).relative_to("/")
        for group in (own, *own.parents):  # in a container some of these may not be there
            for folder in (mount / group for mount in files.mounts):
                with suppress(OSError, ValueError, KeyError):  # no such group, no limit, or no account of it
                    limit, used = (int((folder / name).read_text()) for name in (files.limit, files.used))
                    counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                    yield limit - used + int(counts[files.files]) - int(counts[files.shared])
