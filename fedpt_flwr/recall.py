"""What a large model behind an API has answered, kept on disk: the same question is not paid for twice.

One database per model and way of asking, one row for each text: what the model says about the token that follows it.
Nothing but numbers is kept; a text is known by its hash. Nothing here knows HTTP or models.
"""

from __future__ import annotations

import hashlib
import logging
import sqlite3
import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedpt_flwr.errors import RunError

_log = logging.getLogger(__name__)

_BUSY_S = 30.0
"""How long a process waits while another one writes."""
_AT_ONCE = 500


class Recall:
    """Log-probabilities by the text that they follow.

    Args:
        folder: Where databases lie; made if missing.
        identity: Whatever two questions must share to have one answer: address, model, vocabulary, number of tokens.
        width: Ids that a row of log-probabilities has.
        max_bytes: Size of the database from which on nothing more is put in.

    Raises:
        RunError: The folder cannot be written, or the database is damaged.
    """

    def __init__(self, folder: Path, identity: str, *, width: int, max_bytes: int) -> None:
        self.path = folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:24]}.sqlite"
        self._width = width
        self._max_bytes = max_bytes
        self._is_full = False
        self._lock = threading.Lock()
        self._database: sqlite3.Connection
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(self.path, timeout=_BUSY_S, check_same_thread=False, isolation_level=None)
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS answers (text BLOB PRIMARY KEY, ids BLOB, logprobs BLOB)"
            )
        except (OSError, sqlite3.Error) as error:
            raise self._broken(error) from error
        weakref.finalize(self, self._database.close)

    def get(self, texts: Iterable[Sequence[int]]) -> dict[tuple[int, ...], Tensor]:
        """The rows that are there, ``(width,)``, float32, -inf where a token was not shown; by text.

        Raises:
            RunError: The database is damaged.
        """
        keys = {_key(text): tuple(text) for text in texts}
        wanted, found = list(keys), {}
        with self._lock:
            for first in range(0, len(wanted), _AT_ONCE):
                part = wanted[first : first + _AT_ONCE]
                marks = ",".join("?" * len(part))
                query = f"SELECT text, ids, logprobs FROM answers WHERE text IN ({marks})"  # noqa: S608 (question marks)
                try:
                    rows = self._database.execute(query, part).fetchall()
                except sqlite3.Error as error:
                    raise self._broken(error) from error
                for key, ids, logprobs in rows:
                    row = self._row(ids, logprobs)
                    if row is not None:  # else it is asked for again, and replaced
                        found[keys[key]] = row
        return found

    def put(self, rows: Mapping[tuple[int, ...], Tensor]) -> None:
        """Keep rows, all or none of them.

        Raises:
            RunError: The disk is full, or the database is damaged.
        """
        if self._is_full or not rows:
            return
        values = []
        for text, row in rows.items():
            shown = row.isfinite().nonzero()[:, 0]
            is_whole = len(shown) == self._width
            ids = b"" if is_whole else shown.numpy().astype("<i4").tobytes()
            kept = row if is_whole else row[shown]
            values.append((_key(text), ids, kept.numpy().astype("<f4").tobytes()))
        with self._lock:
            try:
                pages, size = (
                    self._database.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "page_size")
                )
                if pages * size > self._max_bytes:
                    self._is_full = True
                    _log.warning(
                        "%s is as large as remote.cache-mb allows; what is answered now is not kept", self.path
                    )
                    return
                self._database.execute("BEGIN IMMEDIATE")
                self._database.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?, ?)", values)
                self._database.execute("COMMIT")
            except sqlite3.Error as error:
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")
                raise self._broken(error) from error

    def close(self) -> None:
        """Close the database."""
        self._database.close()

    def _row(self, ids: object, logprobs: object) -> Tensor | None:
        """A row, if that is what the bytes are: whatever lies on a disk may be something else."""
        if not isinstance(ids, bytes) or not isinstance(logprobs, bytes) or len(logprobs) % 4 or len(ids) % 4:
            return None
        values = torch.from_numpy(np.frombuffer(logprobs, "<f4").astype(np.float32))
        if not ids:
            return values if len(values) == self._width and bool(values.isfinite().all()) else None
        places = torch.from_numpy(np.frombuffer(ids, "<i4").astype(np.int64))
        is_row = len(places) == len(values) and bool(values.isfinite().all())
        if not is_row or not len(places) or int(places.min()) < 0 or int(places.max()) >= self._width:
            return None
        return torch.full((self._width,), -torch.inf).index_put((places,), values)

    def _broken(self, error: Exception) -> RunError:
        return RunError(
            f"answers of the remote large model cannot be kept ({error})",
            place=str(self.path),
            remedy="remove that file, name another folder in remote.cache, or set remote.cache='off'",
        )


def _key(text: Sequence[int]) -> bytes:
    return hashlib.sha256(np.asarray(text, dtype="<i4").tobytes()).digest()
