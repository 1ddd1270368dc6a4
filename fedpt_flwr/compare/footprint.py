"""A device's memory: one training task in a process of its own, as on a real device.

The workers of a comparison hold the server and all devices at once, so that their memory says nothing about a device's.
One task of a cell is therefore handed to a fresh process, which loads Python, the libraries and the app, answers this
one message, and ends. Its reply is the one that counts: the same bits, with the memory that it measured.

    python -m fedpt_flwr.compare.footprint APP  < message  > reply
"""

from __future__ import annotations

import importlib
import json
import os
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from fedpt_flwr.errors import RunError
from fedpt_flwr.grid import device_context, from_bytes, to_bytes

if TYPE_CHECKING:
    from fedpt_flwr.grid import Handler

_LENGTH = struct.Struct(">Q")


def first_task_apart(handle: Handler, app: Path) -> Handler:
    """A ClientApp whose first training task is done by a fresh process.

    Args:
        handle: The ClientApp.
        app: Folder of the Flower app.
    """
    is_done = False

    def answer(message: Any, context: Any) -> Any:
        nonlocal is_done
        # What a device keeps between the questions of a secure sum is in no other process.
        is_secret = context.run_config.get("privacy.secure-sum", False)
        if is_done or is_secret or message.metadata.message_type != "train":
            return handle(message, context)
        is_done = True
        return _ask(message, context, app)

    return answer


def _ask(message: Any, context: Any, app: Path) -> Any:
    head = {"node_id": context.node_id, "node_config": context.node_config, "run_config": context.run_config}
    command = [sys.executable, "-m", __name__, str(app)]
    said = subprocess.run(  # noqa: S603 (this module, by this interpreter)
        command, input=_packed(json.dumps(head).encode(), to_bytes(message)), stdout=subprocess.PIPE, check=False
    )
    if said.returncode:
        raise RunError(f"the process that stands for a device ended with status {said.returncode}", place=str(app))
    return from_bytes(said.stdout)


def _packed(*parts: bytes) -> bytes:
    return b"".join(_LENGTH.pack(len(part)) + part for part in parts)


def _unpacked(file: BinaryIO) -> bytes:
    (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
    return file.read(length)


def _work(app: Path) -> None:
    """The body of the fresh process."""
    reply_to = os.dup(1)
    os.dup2(2, 1)  # whatever is printed is no part of the reply
    head: Mapping[str, Any] = json.loads(_unpacked(sys.stdin.buffer))
    message = from_bytes(_unpacked(sys.stdin.buffer))
    sys.path.insert(0, str(app))
    client = importlib.import_module("client_app").app
    reply = client(message, device_context(head["node_id"], head["node_config"], head["run_config"]))
    with os.fdopen(reply_to, "wb") as file:
        file.write(to_bytes(reply))


if __name__ == "__main__":
    _work(Path(sys.argv[1]))
