"""What a run would cost, told from the shapes of its models before anything is bought, downloaded or started.

Nothing is loaded but configs, and the texts if they are here: the models are made on torch's ``meta`` device, where
tensors have shapes and no memory, so a model of 70 billion weights is planned on a laptop. The counting is that of a
run: ``training.py`` counts operations, ``memory.py`` memory, ``records.py`` bytes, for real devices and for planned
ones. docs/plan.md has the formulas, and how they compare with what runs measured.

What a run does is counted; how fast a machine does it and what a token costs somebody must say. Whatever was assumed is
in :attr:`Plan.assumed`, with the option that changes it.
"""

from __future__ import annotations

from fedpt_flwr.plan.counting import DEVICE_FLOPS, FEDPT, LARGE, LARGE_LORA, SERVER_FLOPS, Column, Rates
from fedpt_flwr.plan.planning import Plan, make_plan
from fedpt_flwr.plan.texts import Told
from fedpt_flwr.plan.wording import beside_run, plan_notes, plan_table

__all__ = [
    "DEVICE_FLOPS",
    "FEDPT",
    "LARGE",
    "LARGE_LORA",
    "SERVER_FLOPS",
    "Column",
    "Plan",
    "Rates",
    "Told",
    "beside_run",
    "make_plan",
    "plan_notes",
    "plan_table",
]
