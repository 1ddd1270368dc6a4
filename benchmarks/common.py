"""What the benchmarks share: timing, ratios of turns, and words about the machine."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from fedpt_flwr.errors import ConfigError


def timed(work: Callable[[], object]) -> float:
    """How long something takes, in seconds."""
    begun = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def spread(ratios: Sequence[float]) -> dict[str, float]:
    """The median of the turns' ratios, with the lowest and the highest."""
    return {"ratio": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}


def resident_bytes(device: str, *, peak: bool = False) -> int:
    """Memory that this process has, or had at most: on its device, or of the machine (Linux only)."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:" if peak else "VmRSS:")[1].split()[0]) * 1024


def machine(device: str, num_threads: int) -> dict[str, str | int]:
    """What the figures depend on."""
    processor = platform.processor() or platform.machine()
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        names = [line.split(": ", 1)[1] for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        processor = names[0] if names else processor
    return {
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else processor,
        "threads": num_threads,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def check_cells(
    cells: Mapping[str, Mapping[str, Any]], wanted: Mapping[str, Mapping[str, Any]], *, place: str, unless: str = ""
) -> None:
    """Make sure that the cells of a file which are wanted again were made with the same config.

    Args:
        cells: What the file has; each holds its ``config``.
        wanted: The config of every cell that is asked for, by the same keys.
        place: The file.
        unless: A key that may differ, because it follows from other cells.

    Raises:
        ConfigError: One was made with another.
    """
    for name, now in wanted.items():
        made = cells[name]["config"] if name in cells else now
        for key in sorted((made.keys() | now.keys()) - {unless}):
            if made.get(key) != now.get(key):
                raise ConfigError(
                    f"the cell {name} was made with {key}={made.get(key)!r}, and cells of one table must have the "
                    "same config",
                    value=now.get(key),
                    place=place,
                    remedy="name another file in --out, or ask for what this one has",
                )
