"""Paths as users type them, looked at without an error of the system's."""

from __future__ import annotations

import os.path
from pathlib import Path


def expanded(path: str | Path) -> Path:
    """The path with ``~`` written out; of a user who is not known here it stays."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 (pathlib's raises RuntimeError for such a user)


def is_there(path: Path) -> bool:
    """Whether there is such a file or folder; there is none of a name that the system refuses, as one too long."""
    try:
        return path.exists()
    except OSError:
        return False


def is_folder(path: Path) -> bool:
    """Whether there is such a folder; as :func:`is_there`."""
    try:
        return path.is_dir()
    except OSError:
        return False
