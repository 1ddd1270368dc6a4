"""The run folder: where it lies, what is written when, how it is found again, and how a run goes on in it.

Everything is written under a temporary name and then renamed, so that a file or a checkpoint is whole or not there; the
links ``latest`` and ``proxy`` are replaced in one step. A round counts from the moment at which its checkpoint gets its
name: its lines are written before that, so a process that is killed leaves too many lines, never too few, and
:meth:`RunFolder.rewind` cuts them. A folder has one writer at a time. What goes into the files is the caller's
business.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fedpt_flwr.config import RunConfig, parse_run_config
from fedpt_flwr.errors import RunError
from fedpt_flwr.paths import expanded, is_folder

try:
    import fcntl
except ImportError:  # Windows; there nothing keeps a second writer out
    fcntl = None  # type: ignore[assignment]

LATEST = "latest"
PROMPT_FORM = "prompt.json"  # in a proxy's folder: how the prompts that it has learnt are written
_ROUND_DIGITS = 4
_LOCK = ".lock"
_LINES_OF_ROUNDS = ("metrics.jsonl", "costs.jsonl")
SIZES = "lines.json"  # in a checkpoint: how long these files were, so that what came later can be cut
_WRITTEN_AT_THE_END = ("results.json", "answers.jsonl", "examples.jsonl", "device", "report.html")
_PLOTS = "plot-*.png"  # of the report
_RUN_ID = re.compile(r"\d{8}T\d{6}Z-\d+")  # time of its beginning and number of the Flower run
_TEMPORARY = re.compile(r"\..+\.([a-z0-9_]{8}|\d+)")  # what write_file and replace_link write to before they rename


def runs_root(output_dir: str = "") -> Path:
    """The folder that holds all runs: ``output_dir``, else ``$FEDPT_HOME/runs``, else ``~/.fedpt/runs``."""
    if output_dir:
        return Path(output_dir)
    home = os.environ.get("FEDPT_HOME")
    return (expanded(home) if home else Path.home() / ".fedpt").absolute() / "runs"


def find_run(name: str = LATEST, *, root: Path | None = None) -> Path:
    """The folder of a run.

    Args:
        name: ``latest``, a run id, a unique beginning of one, or a folder.
        root: Folder of all runs; by default that of :func:`runs_root`.

    Raises:
        RunError: There is no such run, or more than one.
    """
    root = root or runs_root()
    if not name:
        raise RunError("a run is named by its id, a beginning of it, its folder, or latest", value=name)
    if (os.sep in name or name in (".", "..")) and is_folder(expanded(name)):
        return expanded(name).resolve()
    if name == LATEST:
        link = root / LATEST
        if not link.is_dir():
            raise RunError("there is no run yet", value=str(root), remedy="make one with `flwr run . --stream`")
        return link.resolve()
    ids = (
        sorted(path.name for path in root.glob("*") if path.is_dir() and not path.is_symlink()) if root.is_dir() else []
    )
    matches = [run for run in ids if run == name] or [run for run in ids if run.startswith(name)]
    if not matches and is_folder(Path(name)) and (Path(name) / "config.json").is_file():
        return Path(name).resolve()
    if len(matches) != 1:
        known = ", ".join(ids[-5:]) or "none"
        rule = "is the beginning of more than one run" if matches else "is not a run"
        raise RunError(f"{name} {rule} in {root}", remedy=f"the newest are: {known}")
    return root / matches[0]


def find_run_to_resume(name: str, *, root: Path | None = None) -> Path:
    """The folder of a run that goes on; as :func:`find_run`, but ``latest`` is the newest one that can.

    That is the newest by its id, whether it has a checkpoint or was stopped before its first, as long as it got as far
    as its ``config.json``. The link ``latest`` would still lead to the run before.

    Raises:
        RunError: There is no such run, or more than one.
    """
    if name != LATEST:
        return find_run(name, root=root)
    root = root or runs_root()
    begun = [path.parent for path in root.glob("*/config.json") if _RUN_ID.fullmatch(path.parent.name)]
    if not begun:
        raise RunError("there is no run to go on with", value=str(root), remedy="start a new one without resume")
    return max(begun, key=lambda path: (path.name.partition("-")[0], int(path.name.partition("-")[2])))


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
            remedy="free some space or write elsewhere (a run: set output-dir); what was written before is whole",
        ) from error


def _flush(path: Path) -> None:
    """Bring a file, or the entries of a folder, to the disk: a rename must not overtake what it names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _settle(folder: Path) -> None:
    """Make a new folder readable for all, as safetensors' files are not, and bring all of it to the disk."""
    for path in [*folder.rglob("*"), folder]:
        path.chmod(0o755 if path.is_dir() else 0o644)
        _flush(path)


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
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"cannot be read ({error})", place=str(path), remedy="is the run complete?") from error


def recorded_config(run: Path) -> RunConfig:
    """The config that a run was started with.

    Raises:
        RunError: The folder has none, or a damaged one.
        ConfigError: It holds what no run config does.
    """
    recorded = read_json(run / "config.json")
    if not isinstance(recorded, dict) or not isinstance(recorded.get("run_config"), dict):
        raise RunError("must hold a run's config", place=str(run / "config.json"), remedy="name the run's own folder")
    return parse_run_config(recorded["run_config"])


def replace_link(link: Path, target: str) -> None:
    """Point a symbolic link somewhere else in one step; readers see the old target or the new one."""
    temporary = link.with_name(f".{link.name}.{os.getpid()}")
    with _writing(link):
        with suppress(FileNotFoundError):
            temporary.unlink()
        temporary.symlink_to(target)
        temporary.replace(link)


def _remove(path: Path) -> None:
    """Remove a file, a link or a whole folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class RunFolder:
    """The folder of one run.

    Made by the constructor it is for reading. :meth:`create` and :meth:`open` make its only writer: until that object
    is closed or the process has ended, in whatever way, they refuse any other.

    Attributes:
        path: Absolute path.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._release: Callable[[], Any] | None = None

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
        run = cls(path)
        run._lock()
        return run

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Take over the folder of a run that has ended, in whatever way; :meth:`rewind` then prepares it.

        Raises:
            RunError: It is not the folder of a run, or another process writes to it.
        """
        path = path.resolve()  # `latest` would otherwise be pointed at itself
        if not (path / "config.json").is_file():
            raise RunError(
                "a run that can go on has a config.json, and there is none",
                place=str(path),
                remedy="name the folder of a run; one that was ended before it wrote this file is begun anew instead",
            )
        run = cls(path)
        run._lock()
        with _writing(path / "rounds"):
            for aside in (path / "rounds").glob(".*.old"):
                _bring_back(aside)
        return run

    def close(self) -> None:
        """Let others write to the folder."""
        if self._release is not None:
            self._release()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _lock(self) -> None:
        path = self.path / _LOCK
        with _writing(path):
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self._release = weakref.finalize(self, os.close, handle)
        if fcntl is None:
            return
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(handle, 200, 0).decode(errors="replace")
            self.close()
            raise RunError(
                "a run has one writer at a time",
                value=holder or "another process",
                place=str(self.path),
                remedy="wait until that process has ended, or end it",
            ) from None
        except OSError:  # some network file systems have no locks; a run there is better than none
            return
        with suppress(OSError):  # only a courtesy to whoever is refused
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {platform.node()}".encode(), 0)

    def write_config(self, value: Mapping[str, Any]) -> None:
        """Write ``config.json``."""
        write_json(self.path / "config.json", value)

    def read_config(self) -> dict[str, Any]:
        """What :meth:`write_config` wrote.

        Raises:
            RunError: It is missing or damaged.
        """
        path = self.path / "config.json"
        value = read_json(path)
        if not isinstance(value, dict):
            raise RunError("must hold a JSON object", value=value, place=str(path))
        return value

    def add_flower_run(self, run_id: int) -> None:
        """Add the id of the Flower run that writes here now to ``flower_run_ids`` of ``config.json``."""
        config = self.read_config()
        others = [known for known in config.get("flower_run_ids", []) if known != run_id]
        self.write_config(config | {"flower_run_ids": [*others, run_id]})

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
                os.fsync(file.fileno())  # a checkpoint that is on the disk has its lines there, too
            except OSError:
                with suppress(OSError):
                    os.truncate(path, before)
                raise
            if not before:
                _flush(self.path)

    def read_lines(self, name: str) -> list[dict[str, Any]]:
        """The rows of a JSON Lines file of the run; none where there is no such file.

        Raises:
            RunError: It cannot be read, or a line is damaged.
        """
        path = self.path / name
        if not path.is_file():
            return []
        try:
            data = path.read_bytes()
        except OSError as error:
            raise RunError(f"cannot be read ({error})", place=str(path), remedy="is the run complete?") from error
        return _parsed_lines(data, path)

    def read_lines_of_rounds(self, name: str, server_round: int) -> list[dict[str, Any]]:
        """The rows that such a file held when a round had just been saved; what came later is as good as not there.

        Raises:
            RunError: They are missing or damaged.
        """
        return _parsed_lines(self._head(name, self.sizes(server_round)[name]), self.path / name)

    def read_lines_after(self, name: str, server_round: int) -> list[dict[str, Any]]:
        """The rows that such a file got since a round was saved; half a line, as of a process that was killed, is none.

        Raises:
            RunError: The file cannot be read, or a line is damaged.
        """
        path, before = self.path / name, self.sizes(server_round)[name] if server_round else 0
        with _writing(path):
            data = path.read_bytes()[before:] if path.exists() else b""
        return _parsed_lines(data[: data.rfind(b"\n") + 1], path)

    def round_path(self, server_round: int) -> Path:
        """Where the checkpoint of a round lies."""
        return self.path / "rounds" / f"{server_round:0{_ROUND_DIGITS}d}"

    def save_round(self, server_round: int, write: Callable[[Path], None], *, keep: int) -> Path:
        """Write the checkpoint of a round, point ``proxy`` and ``latest`` at it, remove checkpoints that are too old.

        The round is complete as soon as its folder has its name. Whatever belongs to it must be written before.

        Args:
            server_round: The round.
            write: Fills the folder that it is given, which must get a file ``round.json`` and a folder ``proxy``.
            keep: How many checkpoints stay; 0 keeps all.

        Returns:
            The checkpoint's folder.

        Raises:
            RunError: It cannot be written; the earlier checkpoints and the link are as they were.
        """
        target = self.round_path(server_round)

        def write_round(folder: Path) -> None:
            write(folder)
            sizes = {name: self._size(name) for name in _LINES_OF_ROUNDS}
            write_json(folder / SIZES, sizes)

        write_folder(target, write_round)
        self._point_links(server_round)
        self._remove_old_rounds(keep)
        return target

    def save_folder(self, name: str, write: Callable[[Path], None]) -> Path:
        """Write a folder of the run so that it is there as a whole or not at all.

        Args:
            name: Of the folder; one of this name is replaced.
            write: Fills the folder that it is given.

        Raises:
            RunError: It cannot be written.
        """
        write_folder(self.path / name, write)
        return self.path / name

    def _size(self, name: str) -> int:
        path = self.path / name
        return path.stat().st_size if path.exists() else 0

    def rounds(self) -> list[int]:
        """The rounds that have a complete checkpoint, in order."""
        folders = (path for path in (self.path / "rounds").glob("[0-9]*") if path.name.isdecimal())
        return sorted(int(path.name) for path in folders if (path / "round.json").is_file())

    def _point_links(self, server_round: int) -> None:
        proxy = os.path.relpath(self.round_path(server_round) / "proxy", self.path)
        for link, target in ((self.path / "proxy", proxy), (self.path.parent / LATEST, self.path.name)):
            if not (link.is_symlink() and link.readlink() == Path(target)):
                replace_link(link, target)

    def _remove_old_rounds(self, keep: int) -> None:
        if keep == 0:
            return
        in_use = (self.path / "proxy").resolve().parent
        for server_round in self.rounds()[:-keep]:
            folder = self.round_path(server_round)
            if folder.resolve() != in_use:
                nameless = _beside(folder, "tmp")
                with suppress(OSError):
                    folder.rename(nameless)
                shutil.rmtree(nameless, ignore_errors=True)

    # --- going on -------------------------------------------------------------------------------------------------

    def rewind(self, server_round: int) -> None:
        """Make the folder what it was when a round had just been saved, so that a run goes on with the next one.

        Lines that were added since are cut; what is written at a run's end, later checkpoints and what was left under
        temporary names is removed; the links are put right. A process that is killed in here leaves a folder that can
        be rewound again.

        Args:
            server_round: The last complete round; 0 if there is none.

        Raises:
            RunError: The round has no complete checkpoint, lines of it are missing, or the folder cannot be written.
        """
        rounds = self.rounds()
        if server_round and server_round not in rounds:
            known = ", ".join(map(str, rounds)) or "none"
            raise RunError(
                f"round {server_round} has no complete checkpoint",
                place=str(self.path),
                remedy=f"there are those of rounds: {known}",
            )
        sizes = self.sizes(server_round) if server_round else dict.fromkeys(_LINES_OF_ROUNDS, 0)
        for name in _LINES_OF_ROUNDS:
            self._head(name, sizes[name])
        with _writing(self.path):
            for path in self._not_of_rounds_up_to(server_round):
                _remove(path)
            for name in _LINES_OF_ROUNDS:
                if self._size(name):
                    os.truncate(self.path / name, sizes[name])
        if server_round:
            self._point_links(server_round)
        else:
            with _writing(self.path):
                _remove(self.path / "proxy")

    def _not_of_rounds_up_to(self, server_round: int) -> list[Path]:
        complete = {self.round_path(number) for number in self.rounds() if number <= server_round}
        found = [*(self.path / name for name in _WRITTEN_AT_THE_END), *self.path.glob(_PLOTS)]
        found += [_beside(path, kind) for path in found for kind in ("tmp", "old")]
        found += [path for path in (self.path / "rounds").glob("*") if path not in complete]
        found += [path for path in self.path.glob(".*") if _is_temporary(path)]
        # Beside the run's folder there may be other runs' temporary links: those that point here are this run's.
        links = [path for path in self.path.parent.glob(f".{LATEST}.*") if path.is_symlink()]
        return found + [path for path in links if path.readlink() == Path(self.path.name)]

    def sizes(self, server_round: int) -> dict[str, int]:
        """How long the files of lines were when a round had just been saved.

        Raises:
            RunError: The checkpoint does not say so.
        """
        path = self.round_path(server_round) / SIZES
        sizes: dict[str, int] = read_json(path)
        is_whole = isinstance(sizes, dict) and sizes.keys() == set(_LINES_OF_ROUNDS)
        if not is_whole or not all(type(size) is int and size >= 0 for size in sizes.values()):
            rule = f"it must give the lengths of {' and '.join(_LINES_OF_ROUNDS)} in bytes"
            raise RunError(rule, value=sizes, place=str(path), remedy="remove this checkpoint")
        return sizes

    def _head(self, name: str, size: int) -> bytes:
        """A file's lines of the rounds up to one; a file that lacks some is refused, since they cannot be had again."""
        path = self.path / name
        with _writing(path):
            head = path.read_bytes()[:size] if path.exists() else b""
        if len(head) < size or not head.endswith(b"\n" if size else b""):
            raise RunError(
                f"must begin with the {size} bytes that were there when the last round was saved",
                value=f"{len(head)} bytes that end with {head[-20:]!r}",
                place=str(path),
                remedy="put back the file as the run wrote it",
            )
        return head


def _parsed_lines(data: bytes, path: Path) -> list[dict[str, Any]]:
    try:
        # Not splitlines(): texts may hold other line ends, such as U+2028, which JSON leaves as they are.
        return [json.loads(line) for line in data.decode("utf-8").split("\n") if line.strip()]
    except (ValueError, RecursionError) as error:
        raise RunError(f"cannot be read ({error})", place=str(path), remedy="is the run complete?") from error


def _is_temporary(path: Path) -> bool:
    return _TEMPORARY.fullmatch(path.name) is not None and (path.is_symlink() or path.is_file())


def _beside(folder: Path, kind: str) -> Path:
    """Where a folder lies that is being written or removed (``tmp``), or replaced (``old``)."""
    return folder.with_name(f".{folder.name}.{kind}")


def write_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a folder and give it its name when it is whole; a folder that has the name is replaced.

    Raises:
        RunError: It cannot be written; what was there before is there again.
    """
    temporary, aside = _beside(target, "tmp"), _beside(target, "old")
    with _writing(target):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            write(temporary)
            _settle(temporary)
            if target.exists():  # a folder that is being removed is neither there nor gone: it loses its name first
                shutil.rmtree(aside, ignore_errors=True)
                target.rename(aside)
            temporary.rename(target)
            _flush(target.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            _bring_back(aside)
            raise
    shutil.rmtree(aside, ignore_errors=True)


def _bring_back(aside: Path) -> None:
    """Give a checkpoint its name again if nothing has replaced it."""
    target = aside.with_name(aside.name.removeprefix(".").removesuffix(".old"))
    if aside.exists() and not target.exists():
        aside.rename(target)
