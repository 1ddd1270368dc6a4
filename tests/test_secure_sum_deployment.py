"""Secure sums over a real federation: TLS, authenticated nodes, drop-outs, and all that devices send on record."""

import json
import os

import numpy as np
import pytest
from deployment import Deployment
from federation import federate
from safetensors.numpy import load_file
from test_secure_sum_run import BRIEF, SECURE, Recorder, clear_forms, found_in, silent

from fedpt_flwr.data import read_records
from fedpt_flwr.secure_sum.session import Rules

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(2400),
    # Four questions a round to each of five SuperNodes, a process for each: some 12 minutes of two cores.
    pytest.mark.skipif(
        not os.environ.get("FEDPT_FIVE_NODES"), reason="takes two cores for 12 minutes: FEDPT_FIVE_NODES=1"
    ),
]

NUM_DEVICES, NUM_ROUNDS = 5, 3
GONE = {2: [4], 3: [3, 4]}
"""Who drops out, by round: nobody, one, and as many as may."""

PATIENT = {"wait-timeout-s": 600.0, "min-devices": NUM_DEVICES}
"""Each question is answered by a process that first imports torch: on two cores that others use it takes its time."""

SETTINGS = SECURE | PATIENT
SETTINGS |= {"num-server-rounds": NUM_ROUNDS, "keep-rounds": 0, "privacy.secure-sum-threshold": 0.6}
RULES = Rules(0.6, 1.0, 32)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("secure")
    files = []
    for number in range(NUM_DEVICES):
        files.append(folder / f"{number}.jsonl")
        files[-1].write_text("".join(json.dumps(record) + "\n" for record in read_records("demo:train")[:4]))
    deployment = Deployment(folder, files, num_tampered=2)
    yield deployment
    deployment.stop()


@pytest.fixture(scope="module")
def secure(site):
    """The run over TLS: its folder, and what all devices have sent."""
    for device in (3, 4):
        rounds = [number for number, gone in GONE.items() if device in gone]
        site.tamper_file_of(device).write_text("".join(f"{number} raise\n" for number in rounds))
    for relay in site.relays:
        relay.forget()
    run = site.complete(site.submit(SETTINGS), timeout_s=2000)
    return run, b"\n".join(relay.text() for relay in site.relays)


def arrays_of(run, server_round):
    return load_file(run / "rounds" / f"{server_round:04d}" / "arrays.safetensors")


def test_every_round_gives_the_arrays_of_the_same_round_in_one_process_with_the_same_devices(secure, tmp_path):
    """Those are compared with sums in the clear in test_secure_sum_run.py; a sum depends on no key that is drawn."""
    gone = silent(**{f"train_{number}": devices for number, devices in GONE.items()})
    alone = federate(tmp_path, NUM_DEVICES, SETTINGS, tamper=gone)
    rows = [json.loads(line) for line in (secure[0] / "costs.jsonl").read_text().splitlines()]
    for number in range(1, NUM_ROUNDS + 1):
        refused = [row["device"] for row in rows if row["round"] == number and "refused" in row]
        assert refused == GONE.get(number, [])
        for name, values in arrays_of(alone, number).items():
            np.testing.assert_array_equal(arrays_of(secure[0], number)[name], values, err_msg=name)


def test_no_change_of_a_device_has_passed_in_any_form(site, secure, tmp_path):
    """Round 1 trains the same on a device whether its change is summed unseen or told, so that it is known here."""
    clear = Recorder()
    federate(tmp_path, NUM_DEVICES, BRIEF, tamper=clear)
    # The learning rate of round 1 is the first round's whatever their number.
    forms = clear_forms(clear.trained, RULES)
    assert found_in(secure[1], forms) == set()
    assert len(secure[1]) > NUM_DEVICES * 400_000
    for relay in site.relays:
        relay.forget()
    site.complete(site.submit(BRIEF | PATIENT), timeout_s=600)
    told = b"\n".join(relay.text() for relay in site.relays)
    assert found_in(told, forms) == {(device, "tuned") for device in range(NUM_DEVICES)}  # it would have been found
