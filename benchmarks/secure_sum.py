"""What a secure sum costs: bytes and processor seconds of one device and of the server, by devices and by weights.

Devices and server are the real ones, with nothing between them and no training. One device of each size is timed.

    python benchmarks/secure_sum.py --devices 8 32 64 --weights 104688 1000000
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedpt_flwr.errors import RoundError
from fedpt_flwr.records import message_bytes
from fedpt_flwr.secure_sum.collector import Collector
from fedpt_flwr.secure_sum.device import Device
from fedpt_flwr.secure_sum.session import KEYS, RECORD, REVEAL, SHARES, Rules

TRAIN = "train"
RULES = Rules(0.7, 1.0, 32)
TOLD = ConfigRecord({"server-round": 1})


def measure(num_devices: int, num_weights: int, num_gone: int) -> dict[str, float]:
    """One round; the costs of device 0 and of the server, and how far the mean is from the true one.

    Args:
        num_devices: That begin.
        num_weights: Of the model.
        num_gone: Devices that drop out before they answer with their change.
    """
    sent = ArrayRecord({"weights": Array(np.zeros(num_weights, np.float32))})
    devices = [Device(number, RULES, RecordDict()) for number in range(num_devices)]
    collector = Collector(1, dict.fromkeys(range(num_devices), 100), RULES, sent, TOLD)
    change = np.random.default_rng(0).uniform(-0.1, 0.1, num_weights).astype(np.float32)
    seconds: dict[str, float] = defaultdict(float)
    up = down = 0
    here = list(range(num_devices))
    for phase in (KEYS, SHARES, TRAIN, REVEAL):
        if phase == TRAIN:
            here = here[: num_devices - num_gone]
        for number in here:
            begun = time.process_time()
            question = RecordDict({RECORD: collector.question(phase, number)})
            asked = time.process_time()
            content = answer(devices[number], phase, question, sent, change)
            answered = time.process_time()
            collector.take(phase, number, content, place=f"device {number}")
            seconds["server"] += asked - begun + time.process_time() - answered
            if number == 0:
                seconds["device"] += answered - asked
                up, down = up + message_bytes(content), down + message_bytes(question)
        collector.check_enough(phase)
    begun = time.process_time()
    opened = collector.open()
    seconds["server"] += time.process_time() - begun
    error = float(np.abs(opened.changes["weights"] - change).max())
    return {"up": up, "down": down, **seconds, "error": error, "bound": opened.error}


def answer(device: Device, phase: str, question: RecordDict, sent: ArrayRecord, change: np.ndarray) -> RecordDict:
    """What a device says in a phase."""
    if phase == TRAIN:
        summed = device.join(question)
        return RecordDict(
            {"arrays": summed.answer([("weights", change)], sent, TOLD, num_examples=100, train_loss=1.0)}
        )
    return {KEYS: device.offer_keys, SHARES: device.share_secrets, REVEAL: device.reveal}[phase](question)


def main(words: Sequence[str] | None = None) -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, nargs="+", default=[8, 32, 64])
    parser.add_argument("--weights", type=int, nargs="+", default=[104_688])
    arguments = parser.parse_args(words)
    print("| devices | weights | gone | kB up beside the change | kB down | device s | server s | error | bound |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for num_weights in arguments.weights:
        for num_devices in arguments.devices:
            for num_gone in (0, num_devices - RULES.threshold(num_devices)):
                try:
                    got = measure(num_devices, num_weights, num_gone)
                except RoundError as error:
                    sys.exit(str(error))
                beside = (got["up"] - 4 * num_weights) / 1e3
                print(
                    f"| {num_devices} | {num_weights:,} | {num_gone} | {beside:.1f} | {got['down'] / 1e3:.1f} "
                    f"| {got['device']:.3f} | {got['server']:.2f} | {got['error']:.1e} | {got['bound']:.1e} |"
                )


if __name__ == "__main__":
    main()
