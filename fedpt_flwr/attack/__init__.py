"""What an attacker learns of devices' data from what leaves them: membership inference and canary exposure.

The devices of an attacked federation train on a random half of a pool of records, and on secrets that were hidden among
them. Everything else is the app's own run, with whatever protection its config asks for. The models that come of it,
and what was tapped from the wire on the way, are asked about every record and every secret:

    tuned, proxy, proxy_without_mask   what a run leaves, and what its service answers with
    device_first, device_last          single devices' replies
    aggregate_first                    what all devices receive with the second round
    large_federated                    for comparison: the large model itself, tuned by the devices
    untuned, large                     models that know none of it: the bench's own control

Shadow federations, with other halves, are what an attacker would make to learn from.

The folder of an attack holds ``attack-plan.json`` (what was asked for), ``cells/`` (one file for each federation),
``logs/`` and ``attack.json`` (the tables).

    pool         who holds what: records, halves, canaries
    plan         which federations there are, and what each is told
    losses       what many answers cost models, in few passes
    federation   one federation, its tapped wire, and what its models make of records
    membership   attacks as arithmetic on losses, and their success with intervals
    exposure     how many bits of a secret a model gives away
    summary      all tables
    bench        the folder, and whose turn it is
"""

from __future__ import annotations

from fedpt_flwr.attack.bench import Bench
from fedpt_flwr.attack.plan import CONTROLS, OWN_KEYS, TARGETS, Federation, Plan
from fedpt_flwr.attack.summary import ATTACK, summary_text

__all__ = ["ATTACK", "CONTROLS", "OWN_KEYS", "TARGETS", "Bench", "Federation", "Plan", "summary_text"]
