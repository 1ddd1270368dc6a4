"""Proxy-tuning beside what else one could do: a grid of federations, and the tables that come of it.

A comparison consists of cells. A cell is one run of the app with one seed in one world; what kind of run it is, which
rows of the table it gives and who trains in it is an entry of ``kinds.KINDS``:

    untouched             large and untuned, with and without public examples in the prompt (and untuned_few_shot)
    tuned_local           every device tunes the small model by itself
    fedpt                 the run as its config describes it, in each distillation mode: the rows tuned and proxy, and
                          device, the tuned model after it learnt from the proxy
    tuned_kd              the neighbouring method: the same, but the large model itself is the teacher
    central               one device has all the data: tuned_central and proxy_central
    large_federated       the devices tune the large model, all its weights, in as many rounds, steps and batches
    large_federated_lora  the same with an adapter on the large model
    large_central         one device that has all the data tunes the large model

What suits one model need not suit another, so every kind has a learning rate of its own. Of several that are given,
each is tried with the first seed, and the one with the best exact match on the *validation* items (of equal ones that
with the lower loss) is used with all seeds. ``--tune`` does that for all kinds, as many rates for each, and writes a
file that comparisons read. The test items play no part in it.

Cells run in worker processes, through ``fedpt_flwr.grid``, with the app's real ServerApp and ClientApp. A finished cell
is one JSON file, which is whole or not there, so a comparison that was ended in whatever way goes on where it was. What
a cell computes does not depend on how many workers there are; the seconds that it measures do.

The folder of a comparison holds ``grid.json`` (what was asked for), ``cells/``, ``errors/``, ``logs/``, ``runs/`` (the
run folders, where they are kept), ``work/`` (what is being computed) and ``summary.json``.

    kinds        what the cells are
    plan         which cells there are, what each is told, which learning rate is chosen
    tuning       learning rates that were chosen before
    cell         one cell: its runs, and what is read off them
    footprint    a device's memory, in a process of its own
    workers      processes that run cells
    comparison   whose turn it is, and what to do when a cell ends
    statistics   intervals over seeds and items, p values
    views        costs, and quality beside them
    summary      all of it, for a report and as text
"""

from __future__ import annotations

from fedpt_flwr.compare.comparison import Comparison, Progress, default_jobs, new_folder
from fedpt_flwr.compare.kinds import FEDPT, KINDS, LARGE, LARGE_LORA
from fedpt_flwr.compare.plan import MODES, RATES_OPTIONS, Ablation, Cell, Plan
from fedpt_flwr.compare.summary import summarise, summary_text
from fedpt_flwr.compare.tuning import packaged_tuning, read_tuning, tuning_of

__all__ = [
    "FEDPT",
    "KINDS",
    "LARGE",
    "LARGE_LORA",
    "MODES",
    "RATES_OPTIONS",
    "Ablation",
    "Cell",
    "Comparison",
    "Plan",
    "Progress",
    "default_jobs",
    "new_folder",
    "packaged_tuning",
    "read_tuning",
    "summarise",
    "summary_text",
    "tuning_of",
]
