"""The run folder: where it lies, what is written when, and how it is found again.

Everything is written under a temporary name and then renamed, so that a file or a checkpoint is whole or not there; the
links ``latest`` and ``proxy`` are replaced in one step. What goes into the files is the caller's business.
"""

from __future__ import annotations

import datetime
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fedpt_flwr.errors import RunError

LATEST = "latest"
_ROUND_DIGITS = 4


def runs_root(output_dir: str = "") -> Path:
    """The folder that holds all runs: ``output_dir``, else ``$FEDPT_HOME/runs``, else ``~/.fedpt/runs``."""
    if output_dir:
        return Path(output_dir)
    home = os.environ.get("FEDPT_HOME")
    return (Path(home).expanduser() if home else Path.home() / ".fedpt").absolute() / "runs"


def find_run(name: str = LATEST, *, root: Path | None = None) -> Path:
    """The folder of a run.

    Args:
        name: ``latest``, a run id, a unique beginning of one, or a folder.
        root: Folder of all runs; by default that of :func:`runs_root`.

    Raises:
        RunError: There is no such run, or more than one.
    """
    root = root or runs_root()
    if (os.sep in name or name in (".", "..")) and Path(name).expanduser().is_dir():
        return Path(name).expanduser().resolve()
    if name == LATEST:
        link = root / LATEST
        if not link.is_dir():
            raise RunError("there is no run yet", value=str(root), remedy="make one with `flwr run . --stream`")
        return link.resolve()
    ids = (
        sorted(path.name for path in root.glob("*") if path.is_dir() and not path.is_symlink()) if root.is_dir() else []
    )
    matches = [run for run in ids if run == name] or [run for run in ids if run.startswith(name)]
    if not matches and (Path(name) / "config.json").is_file():
        return Path(name).resolve()
    if len(matches) != 1:
        known = ", ".join(ids[-5:]) or "none"
        rule = "is the beginning of more than one run" if matches else "is not a run"
        raise RunError(f"{name} {rule} in {root}", remedy=f"the newest are: {known}")
    return root / matches[0]


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn an operating system's error while writing into a sentence."""
    try:
        yield
    except Exception as error:
        # safetensors wraps what the operating system says, tokenizers raises a bare Exception.
        if not isinstance(error, OSError | SafetensorError) and type(error) is not Exception:
            raise
        raise RunError(
            f"cannot be written ({getattr(error, 'strerror', None) or error})",
            place=str(path),
            remedy="free some space or set output-dir to another disk; what was written before is whole",
        ) from error


def _flush(path: Path) -> None:
    """Bring a file, or the entries of a folder, to the disk: a rename must not overtake what it names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_file(path: Path, data: bytes) -> None:
    """Write a file so that it is there as a whole or not at all.

    Raises:
        RunError: It cannot be written; nothing is left behind.
    """
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).chmod(0o644)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON that any reader accepts: no NaN, keys in the order given."""
    write_file(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read a JSON file of a run.

    Raises:
        RunError: It is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"cannot be read ({error})", place=str(path), remedy="is the run complete?") from error


def replace_link(link: Path, target: str) -> None:
    """Point a symbolic link somewhere else in one step; readers see the old target or the new one."""
    temporary = link.with_name(f".{link.name}.{os.getpid()}")
    with _writing(link):
        with suppress(FileNotFoundError):
            temporary.unlink()
        temporary.symlink_to(target)
        temporary.replace(link)


class RunFolder:
    """The folder of one run.

    Attributes:
        path: Absolute path.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, root: Path, flower_run_id: int, *, now: datetime.datetime | None = None) -> RunFolder:
        """Make the folder ``<UTC time>-<Flower run id>``; ``latest`` will mean it from its first checkpoint on.

        Raises:
            RunError: The folder cannot be made.
        """
        now = now or datetime.datetime.now(datetime.UTC)
        path = root / f"{now:%Y%m%dT%H%M%SZ}-{flower_run_id}"
        with _writing(path):
            path.mkdir(parents=True)
        return cls(path)

    def write_config(self, value: Mapping[str, Any]) -> None:
        """Write ``config.json``."""
        write_json(self.path / "config.json", value)

    def write_results(self, value: Mapping[str, Any]) -> None:
        """Write ``results.json``."""
        write_json(self.path / "results.json", value)

    def append(self, name: str, *rows: Mapping[str, Any]) -> None:
        """Add lines to a JSON Lines file of the run, such as ``metrics.jsonl``.

        Raises:
            RunError: They cannot be written; the file is as it was.
        """
        path = self.path / name
        lines = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        left = lines.encode()
        # Unbuffered: a buffer would be written on closing, after the file has been cut to its old length.
        with _writing(path), path.open("ab", buffering=0) as file:
            before = file.tell()
            try:
                while left:
                    left = left[file.write(left) :]
            except OSError:
                with suppress(OSError):
                    os.truncate(path, before)
                raise

    def read_lines(self, name: str) -> list[dict[str, Any]]:
        """The rows of a JSON Lines file of the run; none where there is no such file.

        Raises:
            RunError: It cannot be read, or a line is damaged.
        """
        path = self.path / name
        if not path.is_file():
            return []
        try:
            # Not splitlines(): texts may hold other line ends, such as U+2028, which JSON leaves as they are.
            return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
        except (OSError, ValueError) as error:
            raise RunError(f"cannot be read ({error})", place=str(path), remedy="is the run complete?") from error

    def round_path(self, server_round: int) -> Path:
        """Where the checkpoint of a round lies."""
        return self.path / "rounds" / f"{server_round:0{_ROUND_DIGITS}d}"

    def save_round(self, server_round: int, write: Callable[[Path], None], *, keep: int) -> Path:
        """Write the checkpoint of a round, point ``proxy`` and ``latest`` at it, remove checkpoints that are too old.

        Args:
            server_round: The round.
            write: Fills the folder that it is given, which must get a folder ``proxy``.
            keep: How many checkpoints stay; 0 keeps all.

        Returns:
            The checkpoint's folder.

        Raises:
            RunError: It cannot be written; the earlier checkpoints and the link are as they were.
        """
        target = self.round_path(server_round)
        temporary = target.with_name(f".{target.name}.tmp")
        with _writing(target):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            try:
                write(temporary)
                for path in [*temporary.rglob("*"), temporary]:
                    path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors' are their owner's alone
                    _flush(path)
                shutil.rmtree(target, ignore_errors=True)
                temporary.rename(target)
                _flush(target.parent)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
        replace_link(self.path / "proxy", os.path.relpath(target / "proxy", self.path))
        replace_link(self.path.parent / LATEST, self.path.name)
        self._remove_old_rounds(keep)
        return target

    def rounds(self) -> list[int]:
        """The rounds that have a complete checkpoint, in order."""
        return sorted(int(path.name) for path in (self.path / "rounds").glob("[0-9]*") if path.is_dir())

    def _remove_old_rounds(self, keep: int) -> None:
        if keep == 0:
            return
        in_use = (self.path / "proxy").resolve().parent
        for server_round in self.rounds()[:-keep]:
            folder = self.round_path(server_round)
            if folder.resolve() != in_use:
                shutil.rmtree(folder, ignore_errors=True)
