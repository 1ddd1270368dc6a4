"""What a device keeps of what its 8-bit answers have lost, on its own disk, to add it to later ones.

Flower keeps a device's state in memory only, so it is lost with the SuperNode's process; and a run that was stopped
goes on as another Flower run, with none of it. So the residual of each round lies in a file,
``$FEDPT_HOME/devices/<run>/<device>/NNNN.safetensors``. Which one is to be used, the server says: that of the last
round in which it took the device's answer and which was completed. An answer that was lost, refused, or of a round
that is repeated, leaves no trace then, and a run that goes on after a stop sends the same bits as one that was not
stopped.

A file that is gone or damaged costs what rounding lost once, at most half a unit in the last place of the change, and
no more: the device begins without a residual.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedpt_flwr.errors import RunError
from fedpt_flwr.runs import runs_root, write_file

RUN_NAME = re.compile(r"[0-9a-f]{16}")
"""What a run is called here: it comes in a message, and becomes the name of a folder."""

_KEPT_S = 30 * 24 * 3600.0


class Residuals:
    """The residuals of one device in one run.

    Args:
        run: Name of the run, as :data:`RUN_NAME`.
        device: The device's number.
        root: Where all runs' residuals lie; by default beside the runs of this machine.

    Raises:
        RunError: The run has another name.
    """

    def __init__(self, run: str, device: int, *, root: Path | None = None) -> None:
        if not RUN_NAME.fullmatch(run):
            raise RunError("a run must be named by 16 hexadecimal digits here", value=run, place="residual-run")
        self._root = root or runs_root().parent / "devices"
        self._folder = self._root / run / str(device)

    def read(self, server_round: int, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, NDArray[np.float32]]:
        """What the answer of a round lost; empty where that is not known here, or is damaged.

        Args:
            server_round: The round; 0: of none.
            shapes: Of the arrays that are tuned, by name.
        """
        if server_round < 1:
            return {}
        try:
            arrays = load(self._path(server_round).read_bytes())
        except (OSError, SafetensorError, ValueError, KeyError):
            return {}
        fits = {name: tuple(array.shape) for name, array in arrays.items()} == dict(shapes) and all(
            array.dtype == np.float32 and np.isfinite(array).all() for array in arrays.values()
        )
        return arrays if fits else {}

    def write(self, server_round: int, residual: Mapping[str, NDArray[np.float32]], *, keep: int) -> None:
        """Write what the answer of a round lost, as a whole or not at all, and remove what nobody can ask for again.

        Args:
            server_round: The round.
            residual: By name.
            keep: The round whose residual went into this answer: it is needed if the round is repeated.

        Raises:
            RunError: It cannot be written.
        """
        if not self._folder.exists():
            self._remove_old_runs()
        write_file(self._path(server_round), save(dict(residual)))
        for path in self._folder.glob("*.safetensors"):
            if path not in (self._path(server_round), self._path(keep)):
                path.unlink(missing_ok=True)

    def _path(self, server_round: int) -> Path:
        return self._folder / f"{server_round:04d}.safetensors"

    def _remove_old_runs(self) -> None:
        """Remove what runs left here that have not gone on for a month."""
        for path in self._root.glob("*/*"):
            with suppress(OSError):
                if RUN_NAME.fullmatch(path.parent.name) and time.time() - path.stat().st_mtime > _KEPT_S:
                    shutil.rmtree(path)
