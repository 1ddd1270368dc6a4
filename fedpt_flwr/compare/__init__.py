"""Proxy-tuning beside tuning the large model itself: a grid of federations, and the table that comes of it.

A comparison consists of cells. A cell is one federation of one world, with one seed:

    fedpt                 the run as its config describes it, in one distillation mode: the rows large, untuned, tuned,
                          proxy and whatever else such a run scores
    large_federated       the devices tune the large model, all its weights, in as many rounds, steps and batches
    large_federated_lora  the same with an adapter on the large model

What suits the small model need not suit the large one, so the learning rate of the last two is chosen: each of several
is tried with the first seed, and the one with the best exact match on the *validation* items (of equal ones that with
the lower loss) is used with all seeds. The test items play no part in that.

Cells run in worker processes, through ``fedpt_flwr.grid``, with the app's real ServerApp and ClientApp. A finished cell
is one JSON file, which is whole or not there, so a comparison that was ended in whatever way goes on where it was. What
a cell computes does not depend on how many workers there are; the seconds that it measures do.

The folder of a comparison holds ``grid.json`` (what was asked for), ``cells/``, ``errors/``, ``logs/``, ``runs/`` (the
run folders, where they are kept), ``work/`` (what is being computed) and ``summary.json``.
"""

from __future__ import annotations

from fedpt_flwr.compare.comparison import Comparison, Progress, default_jobs, new_folder
from fedpt_flwr.compare.plan import KINDS, LARGE, LARGE_LORA, LEARNING_RATES, RATES_OPTIONS, Cell, Plan
from fedpt_flwr.compare.summary import summarise, summary_text

__all__ = [
    "KINDS",
    "LARGE",
    "LARGE_LORA",
    "LEARNING_RATES",
    "RATES_OPTIONS",
    "Cell",
    "Comparison",
    "Plan",
    "Progress",
    "default_jobs",
    "new_folder",
    "summarise",
    "summary_text",
]
