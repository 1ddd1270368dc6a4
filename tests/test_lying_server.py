"""Secure sums against a server that lies: the real ClientApp, asked what a server that keeps to the protocol would not.

Each test gives the server everything that it needs to get at one device's change, and would fail by finding it.
"""

import dataclasses

import pytest
from federation import QUICK
from flwr.app import ConfigRecord, Message, RecordDict

import client_app
from fedpt_flwr.config import flat_values, parse_run_config
from fedpt_flwr.errors import RoundError
from fedpt_flwr.grid import LocalGrid
from fedpt_flwr.models import load_causal_lm, make_tunable, tunable_arrays
from fedpt_flwr.records import CONFIG, to_array_record
from fedpt_flwr.secure_sum.collector import Collector
from fedpt_flwr.secure_sum.session import KEYS, RECORD, REVEAL, SHARES, Rules

TRAIN = "train"
NUM_DEVICES = 4
SETTINGS = QUICK | {"privacy.secure-sum": True, "min-devices": 3, "num-server-rounds": 4}


class LyingServer:
    """Asks devices for sums, and tells them what a test wants.

    Args:
        run_config: On top of :data:`SETTINGS`.

    Attributes:
        at_least: Devices of which it takes a sum.
        silent: Devices whose change it takes for lost.
        declined: Why devices declined in the last sum.
        masked: What they answered with their change in it.
    """

    def __init__(self, **run_config):
        flat = flat_values(parse_run_config({})) | SETTINGS | run_config
        self.config = parse_run_config(flat)
        self.grid = LocalGrid(client_app.app, NUM_DEVICES, flat)
        self.node_of = {device: node for node, device in self.grid.device_of.items()}
        model = load_causal_lm(self.config.model.small)
        self.sent = to_array_record(tunable_arrays(make_tunable(model, self.config.tuning, seed=0)))
        self.weights = {}
        for device in range(NUM_DEVICES):
            card = self.ask(device, "query", RecordDict({CONFIG: ConfigRecord({})}))
            self.weights[device] = int(card[CONFIG]["num-examples"])
        self.at_least = Rules.of(self.config).at_least
        self.silent: list[int] = []
        self.declined: dict[int, str] = {}
        self.masked: dict[int, RecordDict] = {}

    def ask(self, device, kind, content):
        reply = self.grid.ask(Message(content, self.node_of[device], kind))
        assert reply.has_content(), reply.error
        return reply.content

    def sum_of(self, devices, sum_round, told):
        """The sum of these devices' changes, in the sum of a round, where each is told what ``told`` gives for it."""
        self.declined, self.masked = {}, {}
        rules = dataclasses.replace(Rules.of(self.config), at_least=self.at_least)
        collector = Collector(sum_round, self.weights, rules, self.sent, ConfigRecord(told(0)))
        here = list(devices)
        for phase in (KEYS, SHARES, TRAIN, REVEAL):
            here = [device for device in here if phase != TRAIN or device not in self.silent]
            for device in list(here):
                content = RecordDict({RECORD: collector.question(phase, device)})
                if phase == TRAIN:
                    content = RecordDict({**content, "arrays": self.sent, CONFIG: ConfigRecord(told(device))})
                answer = self.ask(device, phase, content)
                if "refusal" in answer:
                    self.declined[device] = str(answer["refusal"]["reason"])
                    here.remove(device)
                    continue
                if phase == TRAIN:
                    self.masked[device] = answer
                collector.take(phase, device, answer, place=f"device {device}")
            collector.check_enough(phase)
        return collector.open()


def honest(server_round):
    return lambda device: {"server-round": server_round}


def test_a_round_is_not_trained_again_for_the_sum_of_another_which_would_give_single_changes():
    """Four sums of three of four devices, always of round 1's training, would be four equations for four changes."""
    server = LyingServer()
    server.sum_of([0, 1, 2], 1, honest(1))
    for sum_round, left_out in ((2, 2), (3, 1), (4, 0)):
        asked = [device for device in range(NUM_DEVICES) if device != left_out]
        with pytest.raises(RoundError, match="0 answered with their change"):
            server.sum_of(asked, sum_round, honest(1))
        assert server.masked == {}
        assert all(f"whose changes are summed, here {sum_round} of 4" in server.declined[device] for device in asked)


def test_there_are_no_more_sums_than_the_run_has_rounds():
    server = LyingServer()
    server.sum_of([0, 1, 2], 4, honest(4))
    with pytest.raises(RoundError, match="0 answered with their change"):
        server.sum_of([1, 2, 3], 5, honest(5))
    assert "here 5 of 4, and the server asks it to train another, got 5" in server.declined[3]


@pytest.mark.parametrize("other_round", [4, 10**6])
def test_the_others_do_not_train_a_round_that_leaves_them_as_they_were(other_round):
    """At a rate of nearly 0 they would add nothing, and the sum would be the change of device 0."""
    server = LyingServer(**{"train.learning-rate-end": 1e-9})
    with pytest.raises(RoundError, match="1 answered with their change"):
        server.sum_of(range(NUM_DEVICES), 1, lambda device: {"server-round": other_round if device else 1})
    assert list(server.masked) == [0]  # and nobody helps to take its masks off
    assert sorted(server.declined) == [1, 2, 3]


def test_a_device_takes_no_part_in_a_sum_of_fewer_than_the_run_config_says():
    """A server that has four devices could begin with three of them, and learn of fewer what it wants of all."""
    server = LyingServer(**{"min-replies": 4, "min-devices": 4})
    server.at_least = 3
    with pytest.raises(RoundError, match="0 answered with shares of their secrets"):
        server.sum_of([0, 1, 2], 1, honest(1))
    assert all("a secure sum needs 4 to 256 devices, got 3" in server.declined[device] for device in (0, 1, 2))


def test_a_device_does_not_help_to_open_a_sum_of_fewer_than_the_run_config_says():
    server = LyingServer(**{"min-replies": 4, "min-devices": 4})
    server.at_least, server.silent = 3, [3]
    with pytest.raises(RoundError, match="0 answered with the shares that open it"):
        server.sum_of(range(NUM_DEVICES), 1, honest(1))
    assert all("of 4 devices at least 4 must stay in a secure sum" in server.declined[device] for device in (0, 1, 2))


@pytest.mark.parametrize("lie", [{"proximal-mu": 1e30}, {"anything": 1}], ids=str)
def test_a_sum_of_devices_that_were_told_different_things_does_not_open(lie):
    """Held by a proximal term of their own the others would add nothing."""
    server = LyingServer()
    with pytest.raises(RoundError, match="do not open the masks of the sum"):
        server.sum_of(range(NUM_DEVICES), 1, lambda device: {"server-round": 1} | (lie if device else {}))
    assert sorted(server.masked) == list(range(NUM_DEVICES))
