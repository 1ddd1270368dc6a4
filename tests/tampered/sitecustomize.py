"""A device that does not do as it should: on the PYTHONPATH of one node, this changes what its ClientApp answers.

Python imports a module of this name when it starts. The app's own code is untouched, as on a device whose owner means
harm: it is Flower, below the app, that lies. The file that TAMPER_FILE names says how, a line for each round:
``1 nan``, ``2 shape``. Without such a line the device is honest.
"""

import importlib.machinery
import os
import signal
import sys
from pathlib import Path

PATCHED = "flwr.clientapp.client_app"


class Finder:
    """Finds the one module to change as Python would, and changes it once it is executed."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != PATCHED:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            tamper_with(module.ClientApp)

        spec.loader.exec_module = exec_module
        return spec


def tamper_with(cls):
    honest = cls.__call__

    def call(self, message, context):
        how = ""
        if message.metadata.message_type == "train":
            how = planned(int(message.content["config"]["server-round"]))
        if how == "raise":
            raise RuntimeError("out of paper")
        if how == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        reply = honest(self, message, context)
        if how:
            spoil(reply, how)
        return reply

    cls.__call__ = call


def planned(server_round):
    path = Path(os.environ["TAMPER_FILE"])
    lines = path.read_text().splitlines() if path.exists() else []
    return dict(line.split() for line in lines).get(str(server_round), "")


def spoil(reply, how):
    from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

    if how == "garbage":
        reply.content = RecordDict({"config": ConfigRecord({"x": b"\x00\xff"})})
        return
    arrays = {name: array.numpy().copy() for name, array in reply.content["arrays"].items()}
    first = next(iter(arrays))
    if how == "nan":
        arrays[first].flat[0] = float("nan")
    elif how == "shape":
        arrays[first] = arrays[first][:-1]
    elif how == "names":
        arrays["extra"] = arrays.pop(first)
    elif how == "weight":
        reply.content["metrics"]["num-examples"] = 10**9
    else:
        raise ValueError(how)
    reply.content["arrays"] = ArrayRecord({name: Array(values) for name, values in arrays.items()})


sys.meta_path.insert(0, Finder)
