"""Secure sums through the strategy, and whole runs of the real apps: beside the same rounds summed in the clear."""

import json
import logging

import numpy as np
import pytest
from federation import federate, final_arrays
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg, FedMedian, Strategy
from local_grid import LocalGrid

from fedpt_flwr.config import StrategyConfig
from fedpt_flwr.errors import ConfigError, DeviceError, RoundError
from fedpt_flwr.grid import to_bytes
from fedpt_flwr.inner import FOLDED, inner_state, make_inner_strategy
from fedpt_flwr.records import DeviceCard, refusal
from fedpt_flwr.secure_sum.device import Device
from fedpt_flwr.secure_sum.ring import Ring
from fedpt_flwr.secure_sum.session import KEYS, RECORD, REVEAL, SHARES, Rules
from fedpt_flwr.strategy import FedPT

TRAIN = "train"
RULES = Rules(0.7, 1.0, 32)

# --- the strategy, with devices of a few numbers ---


def start_arrays():
    return ArrayRecord({"weight": Array(np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3))})


def examples_of(device):
    return 10 * (device + 1)


def handle(message, context):
    """A device whose change depends on its number, the round and what it was sent; summed unseen if it is asked so."""
    number, kind = context.node_config["partition-id"], message.metadata.message_type
    device = Device(number, RULES, context.state)
    acts = {KEYS: device.offer_keys, SHARES: device.share_secrets, REVEAL: device.reveal}
    try:
        if kind in acts:
            return Message(acts[kind](message.content), reply_to=message)
        if kind != TRAIN:
            card = DeviceCard(device=number, num_examples=examples_of(number), groups={}, code_hash="")
            return Message(card.to_content(), reply_to=message)
        return Message(train(device, message.content), reply_to=message)
    except DeviceError as error:
        return Message(refusal(str(error)), reply_to=message)


def train(device, content):
    number, server_round = device.number, content["config"]["server-round"]
    sent = content["arrays"]
    draw = np.random.default_rng([number, server_round])
    change = (0.1 * draw.normal(size=(2, 3)) - 0.1 * sent["weight"].numpy()).astype(np.float32)
    metrics = {"device": number, "server-round": server_round, "seconds": 1.0}
    if RECORD in content:
        arrays = device.join(content).answer(
            [("weight", change)], sent, content["config"], num_examples=examples_of(number), train_loss=float(number)
        )
    else:
        arrays = ArrayRecord({"weight": Array(sent["weight"].numpy() + change)})
        metrics |= {"num-examples": examples_of(number), "train-loss": float(number)}
    return RecordDict({"arrays": arrays, "metrics": MetricRecord(metrics)})


def silent(**gone):
    """Devices that do not answer, by the last word of the message's type; ``train_2`` in round 2 alone."""

    def tamper(device, message, reply):
        kind = message.metadata.message_type.rpartition(".")[2]
        content = message.content.config_records
        server_round = content.get(RECORD, content.get("config", {})).get("round", 0)
        names = (kind, f"{kind}_{server_round}")
        return None if any(device in gone.get(name, ()) for name in names) else reply

    return tamper


def run(name, secure, *, rounds=1, num_devices=6, tamper=None, **settings):
    outcomes = []
    strategy = FedPT(
        make_inner_strategy(StrategyConfig(name=name)),
        outcomes.append,
        wait_timeout_s=1.0,
        secure_sum=RULES if secure else None,
        **settings,
    )
    grid = LocalGrid(handle, num_devices, tamper=tamper)
    strategy.start(grid, initial_arrays=start_arrays(), num_rounds=rounds, timeout=5)
    return outcomes, strategy, grid


@pytest.mark.parametrize("name", [strategy.__name__ for strategy in FOLDED])
def test_every_strategy_that_makes_a_mean_gets_the_plain_one_to_within_the_error(name):
    ours, mine, _ = run(name, secure=True)
    plain, theirs, _ = run(name, secure=False)
    assert ours[0].train_loss == pytest.approx(plain[0].train_loss, abs=1e-6)
    bound = RULES_RING.error(6, 1.0) + 2**-23  # and float32's own rounding of numbers up to 2
    if name in ("FedAvg", "FedProx", "FedAvgM"):  # the others divide by the mean itself
        np.testing.assert_allclose(
            ours[0].arrays["weight"].numpy(), plain[0].arrays["weight"].numpy(), rtol=0, atol=bound
        )
    for key, value in inner_state(theirs.inner).items():
        np.testing.assert_allclose(inner_state(mine.inner)[key], value, rtol=1e-4, atol=bound)
    np.testing.assert_allclose(ours[0].arrays["weight"].numpy(), plain[0].arrays["weight"].numpy(), rtol=0, atol=1e-3)


RULES_RING = Ring(RULES.bits, RULES.limit, 6)


@pytest.mark.parametrize("gone", [[], [3], [0, 5]], ids=str)
def test_with_devices_that_drop_out_it_is_the_plain_mean_of_the_others_over_three_rounds(gone):
    """Eight devices, of which six must stay: 0, 1 and the tolerated maximum are gone in every round."""
    ours, _, _ = run("FedAvg", secure=True, rounds=3, num_devices=8, tamper=silent(train=gone))
    plain, _, _ = run("FedAvg", secure=False, rounds=3, num_devices=8, tamper=silent(train=gone))
    share = sum(examples_of(n) for n in range(8) if n not in gone) / sum(map(examples_of, range(8)))
    bound = Ring(32, 1.0, 8).error(8 - len(gone), share) + 2**-23
    for number, (mine, other) in enumerate(zip(ours, plain, strict=True), start=1):
        got, expected = (part.arrays["weight"].numpy() for part in (mine, other))
        np.testing.assert_allclose(got, expected, rtol=0, atol=number * bound)
        assert [part.device for part in mine.devices if part.refused] == gone


def test_the_same_sum_comes_out_bit_for_bit_whatever_keys_are_drawn():
    first, second = (run("FedAvg", secure=True, rounds=2)[0][-1].arrays["weight"].numpy() for _ in range(2))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    ("rules", "warning"),
    [
        (RULES, ""),
        (Rules(0.7, 1e6, 16), "are 0.0e+00 on average and may be nothing but rounding; lower privacy.secure-sum-range"),
        (Rules(0.7, 1e-6, 32), "of {} changes of single weights were cut to 1e-06; raise privacy.secure-sum-range"),
    ],
)
def test_a_range_that_spoils_the_sum_is_warned_about(rules, warning, caplog, monkeypatch):
    monkeypatch.setitem(globals(), "RULES", rules)  # the devices' too
    with caplog.at_level(logging.WARNING, logger="flwr"):
        run("FedAvg", secure=True)
    lines = [record.getMessage() for record in caplog.records]
    said = [line for line in lines if "its means" in line or "single weights" in line]
    weights = 6 * sum(array.numpy().size for array in start_arrays().values())
    assert len(said) == bool(warning)
    assert warning.format(weights) in "".join(said)


def test_devices_may_drop_out_at_every_question_and_come_back():
    gone = {"sum_keys_1": [0], "sum_shares_1": [1], "train_2": [2], "sum_reveal_2": [3], "sum_keys_3": [1, 4]}
    outcomes, _, _ = run("FedAvg", secure=True, rounds=4, num_devices=8, tamper=silent(**gone))
    refused = [[part.device for part in outcome.devices if part.refused] for outcome in outcomes]
    assert refused == [[0, 1], [2], [1, 4], []]  # who does not help to open has its change in the sum
    reasons = {part.device: part.refused for part in outcomes[0].devices}
    assert reasons[0] == "device 0, round 1: no reply with its keys came in time; see wait-timeout-s"
    assert {part.device for part in outcomes[1].devices if "round-timeout-s" in part.refused} == {2}


def test_the_ledger_has_the_bytes_of_all_four_answers_and_no_loss_of_a_device():
    outcomes, _, _ = run("FedAvg", secure=True)
    for part in outcomes[0].devices:
        assert set(part.metrics) == {"device", "server-round", "seconds"}
        assert part.bytes_up > 5 * (32 + 2 * 33) + 6 * 4
        assert part.bytes_down > 6 * 2 * 32


def test_a_round_with_too_few_fails_with_the_reasons_and_the_next_goes_on(caplog):
    gone = silent(train_2=[1, 2, 3], sum_reveal_3=[0, 1, 2])
    with caplog.at_level(logging.WARNING, logger="flwr"):
        outcomes, _, _ = run("FedAvg", secure=True, rounds=4, tamper=gone, max_failed_rounds=2)
    assert [outcome.server_round for outcome in outcomes] == [1, 4]
    said = "round {}: a secure sum that 6 devices begin needs 5 of them to its end, and 3 answered with {}"
    assert said.format(2, "their change") in caplog.text
    assert "  - device 1, round 2: no reply with its change came in time" in caplog.text
    assert [f"Round 2: device {device} is left out" in caplog.text for device in range(6)] == [0, 1, 1, 1, 0, 0]
    assert said.format(3, "the shares that open it") in caplog.text
    with pytest.raises(RoundError, match="3 answered with their change"):
        run("FedAvg", secure=True, rounds=2, tamper=gone)


def test_more_may_be_asked_for_than_the_threshold(monkeypatch):
    monkeypatch.setitem(globals(), "RULES", Rules(0.7, 1.0, 32, 6))  # the devices' too
    with pytest.raises(RoundError, match="that 6 devices begin needs 6 of them to its end, and 5 answered"):
        run("FedAvg", secure=True, tamper=silent(train=[2]))


def test_no_fewer_than_three_are_drawn():
    outcomes, _, _ = run("FedAvg", secure=True, fraction_train=0.1)
    assert len(outcomes[0].devices) == 3


def test_two_devices_end_the_run_before_one_of_them_has_answered():
    with pytest.raises(RoundError, match="that 2 devices begin needs 3 of them to its end") as error:
        run("FedAvg", secure=True, num_devices=2)
    assert "privacy.secure-sum-threshold" in str(error.value)


def test_strategies_that_must_see_single_updates_are_refused():
    class Curious(FedAvg):
        pass

    settings = {"fraction_evaluate": 0.0, "min_train_nodes": 1, "min_available_nodes": 1}
    for inner in (FedMedian(**settings), Curious(**settings)):
        with pytest.raises(ConfigError, match=f"got '{type(inner).__name__}'; take one of FedAvg, FedProx, FedAvgM"):
            FedPT(inner, secure_sum=RULES)


def test_devices_of_a_lower_rank_have_no_part_in_a_sum():
    def of_rank_1(device, message, reply):
        if message.metadata.message_type == "query":
            reply.content["config"]["lora-rank"] = 1
        return reply

    strategy = FedPT(
        make_inner_strategy(StrategyConfig()),
        wait_timeout_s=1.0,
        secure_sum=RULES,
        lora_rank=8,
        lora_aggregation="frozen-a",
    )
    with pytest.raises(RoundError, match="in a secure sum all devices must send arrays of the same shapes, got 1"):
        strategy.start(LocalGrid(handle, 3, tamper=of_rank_1), initial_arrays=start_arrays(), num_rounds=1, timeout=5)


def test_a_strategy_that_tells_devices_different_things_is_refused():
    class Uneven(FedPT):
        def configure_train(self, *arguments):
            messages = list(super().configure_train(*arguments))
            for number, message in enumerate(messages):
                told = ConfigRecord({**message.content["config"], "rate": 0.1 * number})
                message.content = RecordDict({**message.content, "config": told})
            return messages

    strategy = Uneven(make_inner_strategy(StrategyConfig()), wait_timeout_s=1.0, secure_sum=RULES)
    with pytest.raises(RoundError, match=r"must be told the same of how to train, got \['rate'\]"):
        strategy.start(LocalGrid(handle, 3), initial_arrays=start_arrays(), num_rounds=1, timeout=5)


def test_flowers_own_loop_is_refused():
    strategy = FedPT(make_inner_strategy(StrategyConfig()), wait_timeout_s=1.0, secure_sum=RULES)
    with pytest.raises(RoundError, match="which Flower's own loop does not; call the method start of FedPT"):
        Strategy.start(strategy, LocalGrid(handle, 3), initial_arrays=start_arrays(), num_rounds=1, timeout=5)


# --- whole runs of the real apps ---

BRIEF = {
    "num-server-rounds": 1,
    "scoring.rows": "tuned",
    "scoring.round-items": 0,
    "scoring.few-shot": 0,
    "distillation.mode": "off",
    "min-devices": 3,
}
SECURE = BRIEF | {"privacy.secure-sum": True}
NUM_DEVICES = 4
_PROBE_VALUES, _PROBES = 6, 25


class Recorder:
    """All that reaches the server, as bytes; and what devices trained, where they say it in the clear."""

    def __init__(self, tamper=None):
        self.log, self.trained = bytearray(), {}
        self.tamper = tamper or (lambda device, message, reply: reply)

    def __call__(self, device, message, reply):
        reply = self.tamper(device, message, reply)
        if reply is None:
            return None
        self.log += to_bytes(reply)
        is_clear = (
            message.metadata.message_type == TRAIN and "arrays" in reply.content and RECORD not in message.content
        )
        if is_clear:
            tuned = {name: array.numpy().copy() for name, array in reply.content["arrays"].items()}
            sent = {name: array.numpy().copy() for name, array in message.content["arrays"].items()}
            examples = reply.content["metrics"]["num-examples"]
            self.trained[device] = (sent, tuned, examples)
        return reply


def clear_forms(trained, rules):
    """Pieces of every device's update in all the forms in which it could be told: 24 bytes each, at many places."""
    whole, forms = sum(examples for *_, examples in trained.values()), {}
    ring = Ring(rules.bits, rules.limit, len(trained))
    draw = np.random.default_rng(0)
    for device, (sent, tuned, examples) in trained.items():
        for name, values in tuned.items():
            change = values - sent[name]
            words = ring.encode(change, examples / whole)[0]
            for form, array in (("tuned", values), ("change", change), ("quantised", words)):
                for begin in draw.integers(0, max(1, change.size - _PROBE_VALUES), _PROBES):
                    part = slice(begin, begin + _PROBE_VALUES)
                    if np.count_nonzero(words.reshape(-1)[part]) == _PROBE_VALUES:
                        probe = np.ascontiguousarray(array).reshape(-1)[part].tobytes()
                        forms.setdefault((device, form), []).append(probe)
    return forms


def found_in(log, forms):
    """Which devices' updates are in a log, in which form."""
    return {who for who, probes in forms.items() if any(probe in log for probe in probes)}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run in the clear: its folder and what the server saw."""
    recorder = Recorder()
    return federate(tmp_path_factory.mktemp("plain"), NUM_DEVICES, BRIEF, tamper=recorder), recorder


def plain_mean(trained, there):
    """What the server would make of these devices' arrays, in float64."""
    whole = sum(trained[device][2] for device in there)
    names = trained[there[0]][1]
    return {name: sum(trained[n][2] * trained[n][1][name].astype(np.float64) for n in there) / whole for name in names}


def assert_within_the_error(run, trained, there, rules=RULES):
    """The run's arrays are the mean of these devices' own to within what docs/secure-sum.md states.

    That is the error of the ring, and float32's own rounding of every change and of the result, by half a unit each.
    """
    whole = sum(examples for *_, examples in trained.values())
    share = sum(trained[device][2] for device in there) / whole
    bound = Ring(rules.bits, rules.limit, len(trained)).error(len(there), share)
    got, largest = final_arrays(run), 0.0
    for name, expected in plain_mean(trained, there).items():
        changes = [np.abs(trained[device][1][name] - trained[device][0][name]) for device in there]
        units = np.spacing(np.abs(got[name])).astype(np.float64) + np.spacing(np.max(changes, axis=0))
        difference = np.abs(got[name] - expected)
        assert (difference <= bound + units / 2).all(), name
        largest = max(largest, float(difference.max()))
    return largest, bound


@pytest.mark.parametrize(
    "gone", [pytest.param([], marks=pytest.mark.slow), [1]], ids=["nobody is gone", "as many are gone as may be"]
)
def test_a_run_ends_with_the_mean_of_the_others_and_the_server_has_seen_nobodys_change(gone, plain, tmp_path):
    recorder = Recorder(silent(train=gone))
    run = federate(tmp_path, NUM_DEVICES, SECURE, tamper=recorder)
    trained = plain[1].trained
    assert_within_the_error(run, trained, [n for n in range(NUM_DEVICES) if n not in gone])
    forms = clear_forms(trained, RULES)
    assert len(forms) == 3 * NUM_DEVICES
    assert found_in(plain[1].log, forms) == {(device, "tuned") for device in range(NUM_DEVICES)}  # it would be found
    assert found_in(recorder.log, forms) == set()
    assert len(recorder.log) > 0.7 * len(plain[1].log)
    rows = [json.loads(line) for line in (run / "costs.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["device"] != "server"]
    assert [row["device"] for row in rows if "refused" in row] == gone
    for row in rows:
        if "refused" not in row:
            assert not {"train_loss", "train_loss_last", "num_examples"} & row.keys()
            assert row["mask_seconds"] > 0
    assert not (run / "metrics.jsonl").read_text().count("NaN")


def test_a_device_whose_change_should_go_into_a_sum_never_tells_it_in_the_clear(tmp_path):
    """A server that leaves the protocol out of its messages."""

    class Plain(LocalGrid):
        def _push(self, message):
            if message.metadata.message_type == TRAIN:
                message.content = RecordDict({name: part for name, part in message.content.items() if name != RECORD})
            return super()._push(message)

    recorder = Recorder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("federation.LocalGrid", Plain)
        with pytest.raises(RoundError) as error:
            federate(tmp_path, 3, SECURE, tamper=recorder)
    said = "this device's change goes into a secure sum or nowhere, and the server asks for it in the clear"
    assert said in str(error.value)
    assert recorder.trained == {}


class Killed(BaseException):
    """What ends a server in the middle of a round, past everything that catches errors."""


def kill_in_round_2(kind):
    def tamper(device, message, reply):
        records = message.content.config_records
        is_now = records.get(RECORD, {}).get("round") == 2 and device == 1
        if is_now and message.metadata.message_type.rpartition(".")[2] == kind:
            raise Killed
        return reply

    return tamper


@pytest.fixture(scope="module")
def two_rounds(tmp_path_factory):
    return federate(tmp_path_factory.mktemp("whole"), NUM_DEVICES, SECURE | {"num-server-rounds": 2})


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sum_keys", "sum_shares", "train", "sum_reveal"])
def test_a_run_that_was_ended_at_any_question_goes_on_to_the_same_arrays(kind, two_rounds, tmp_path):
    settings = SECURE | {"num-server-rounds": 2}
    with pytest.raises(Killed):
        federate(tmp_path, NUM_DEVICES, settings, tamper=kill_in_round_2(kind))
    resumed = federate(tmp_path, NUM_DEVICES, settings | {"resume": "latest"})
    for name, values in final_arrays(two_rounds).items():
        np.testing.assert_array_equal(final_arrays(resumed)[name], values, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_and_16_bits_give_the_plain_mean_to_within_their_error(dtype, tmp_path):
    """With a shorter type on the wire devices begin from rounded arrays, and the server adds to its own."""
    settings = {"tuning.mode": "lora", "wire.dtype": dtype}
    recorder, rules = Recorder(), Rules(0.7, 0.25, 16)
    plain = federate(tmp_path / "plain", NUM_DEVICES, BRIEF | settings, tamper=recorder)
    sixteen = {"privacy.secure-sum-bits": rules.bits, "privacy.secure-sum-range": rules.limit}
    secure = federate(tmp_path / "secure", NUM_DEVICES, SECURE | settings | sixteen)
    if dtype == "float32":
        assert_within_the_error(secure, recorder.trained, list(range(NUM_DEVICES)), rules)
    # In bfloat16 the plain run rounds each change, by 2**-9 of it: changes of this run are below 0.1.
    bound = Ring(16, rules.limit, NUM_DEVICES).error(NUM_DEVICES, 1.0) + 2**-9 * 0.1
    for name, values in final_arrays(plain).items():
        np.testing.assert_allclose(final_arrays(secure)[name], values, rtol=1e-6, atol=bound, err_msg=name)
    rows = [[json.loads(line) for line in (run / "costs.jsonl").read_text().splitlines()] for run in (plain, secure)]
    up = [row[0]["bytes_up"] for row in rows]
    assert up[1] < (0.7 if dtype == "float32" else 1.1) * up[0]
