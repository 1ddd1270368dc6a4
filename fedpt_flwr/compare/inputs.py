"""What a run reads from this machine: whether it is still the same behind the same path."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

from fedpt_flwr.config import Scalar, settings
from fedpt_flwr.errors import ConfigError

_NOT_READ = ("output-dir", "model.large-offload-folder", "remote.cache")  # folders that a run writes to
_LARGEST_READ = 64 * 2**20
"""Bytes; of larger files, such as weights of many GB, size and time tell whether they changed."""


def input_digests(flat: Mapping[str, Scalar], digest_of: Callable[[Path], str] | None = None) -> dict[str, str]:
    """Digests of the files and folders that a run config names and that lie here, by key.

    A hub id and what is packaged are not among them.

    Args:
        flat: The run config.
        digest_of: Gives a path's digest, such as one that remembers it; None: :func:`digest_of_path`.

    Raises:
        ConfigError: One cannot be read.
    """
    found = {}
    for key, setting in settings().items():
        path = Path(str(flat.get(key, setting.default)))
        if not setting.path or key in _NOT_READ or not path.is_absolute():
            continue
        try:
            if path.exists():
                found[key] = (digest_of or digest_of_path)(path)
        except OSError as error:
            raise ConfigError(f"cannot be read ({error.strerror})", value=error.filename, place=key) from error
    return found


def digest_of_path(path: Path) -> str:
    """A hash of a file, or of a folder's own files with their names; nothing is read from the folders in it.

    A file of up to 64 MiB counts by its bytes, a larger one by its size and the time of its last change: to copy such a
    file makes it another one, which costs time but no mistake.

    Raises:
        OSError: Something cannot be read.
    """
    digest = hashlib.sha256()
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file())
    for file in files:
        told = file.stat()
        is_read = told.st_size <= _LARGEST_READ
        content = hashlib.sha256(file.read_bytes()).hexdigest() if is_read else f"{told.st_size} {told.st_mtime_ns}"
        digest.update(f"{file.relative_to(path)}\0{content}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]
