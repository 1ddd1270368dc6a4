"""Real runs in one process: the real ServerApp and ClientApp over a :class:`local_grid.LocalGrid`."""

import itertools
from pathlib import Path

from flwr.app import Context, RecordDict
from local_grid import LocalGrid
from safetensors.numpy import load_file

import client_app
import server_app
from fedpt_flwr.config import flat_values, parse_run_config
from fedpt_flwr.runs import find_run

QUICK = {
    "num-server-rounds": 2,
    "train.max-steps": 2,
    "train.batch-size": 4,
    "scoring.num-items": 4,
    "scoring.round-items": 2,
    "scoring.max-new-tokens": 6,
    "scoring.few-shot": 2,
    "distillation.steps": 2,
    "distillation.num-prompts": 6,
    "distillation.final-steps": 3,
    "distillation.final-num-prompts": 6,
    "threads.server": 1,
    "data.validation": str(Path(__file__).with_name("validation.jsonl")),  # every sixth of the demo world's
}
"""A run of some seconds."""

_run_ids = itertools.count(1)


def federate(root: Path, num_devices: int = 3, run_config: dict | None = None, **grid_settings) -> Path:
    """Run a federation; its folder. ``run_config`` is put on top of :data:`QUICK`."""
    flat = QUICK | {"output-dir": str(root)} | (run_config or {})
    # Flower merges what a user gives with the app's defaults before anybody sees it.
    flat = flat_values(parse_run_config({})) | flat
    grid = LocalGrid(client_app.app, num_devices, flat, **grid_settings)
    context = Context(run_id=next(_run_ids), node_id=1, node_config={}, state=RecordDict(), run_config=flat)
    server_app.app(grid, context)
    return find_run(root=root)


def final_arrays(run: Path) -> dict:
    """The last checkpoint's arrays."""
    return load_file(max((run / "rounds").iterdir()) / "arrays.safetensors")
