import logging
import random
import re

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from local_grid import LocalGrid

from fedpt_flwr.config import INNER_STRATEGIES, StrategyConfig
from fedpt_flwr.errors import ConfigError, RoundError
from fedpt_flwr.records import DeviceCard, refusal
from fedpt_flwr.strategy import FedPT, make_inner_strategy, sample_devices

NUM_DEVICES = 6


def start_arrays():
    return ArrayRecord({"weight": Array(np.zeros((2, 3), np.float32)), "scale": Array(np.float32([1.0]))})


def examples_of(device):
    return 10 * (device + 1)


def make_device(*, code_hash="", examples=examples_of, groups=None):
    """A device that adds a number that depends on itself and the round to every weight."""

    def handle(message, context):
        device = context.node_config["partition-id"]
        if message.metadata.message_type == "query":
            card = DeviceCard(
                device=device, num_examples=examples(device), groups=groups or {"a": 1}, code_hash=code_hash
            )
            return Message(content=card.to_content(), reply_to=message)
        server_round = message.content["config"]["server-round"]
        step = np.random.default_rng([device, server_round]).normal()
        arrays = {
            name: Array((array.numpy() + step).astype(np.float32)) for name, array in message.content["arrays"].items()
        }
        metrics = {
            "num-examples": examples(device),
            "train-loss": float(device),
            "server-round": server_round,
            "device": device,
        }
        return Message(
            content=RecordDict({"arrays": ArrayRecord(arrays), "metrics": MetricRecord(metrics)}), reply_to=message
        )

    return handle


def fedpt(*, inner="FedAvg", arguments="", **settings):
    strategy = make_inner_strategy(StrategyConfig(name=inner, arguments=arguments))
    return FedPT(strategy, **{"wait_timeout_s": 1.0, **settings})


def run(strategy, grid, *, rounds=3):
    return strategy.start(grid, initial_arrays=start_arrays(), num_rounds=rounds, timeout=5).arrays


def values(arrays):
    return {name: array.numpy() for name, array in arrays.items()}


def assert_same(first, second):
    first, second = values(first), values(second)
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])


def test_weights_are_averaged_by_number_of_examples():
    got = run(fedpt(), LocalGrid(make_device(), 2), rounds=1)
    # devices 0 and 1 have 10 and 20 examples: (10 * s0 + 20 * s1) / 30 is added to every weight
    steps = [np.random.default_rng([device, 1]).normal() for device in (0, 1)]
    expected = (10 * steps[0] + 20 * steps[1]) / 30
    np.testing.assert_allclose(got["weight"].numpy(), np.full((2, 3), expected), rtol=1e-6)
    np.testing.assert_allclose(got["scale"].numpy(), [1 + expected], rtol=1e-6)


@pytest.mark.parametrize("name", INNER_STRATEGIES)
def test_every_strategy_that_can_be_named_runs_and_gives_finite_float32(name):
    got = run(fedpt(inner=name), LocalGrid(make_device(), NUM_DEVICES), rounds=2)
    assert got.keys() == start_arrays().keys()
    for array in got.values():
        assert array.dtype == "float32"
        assert np.isfinite(array.numpy()).all()


@pytest.mark.parametrize("inner", ["FedAvg", "FedAdam", "FedMedian", "Krum"])
def test_the_order_in_which_replies_arrive_changes_no_bit(inner):
    def shuffled(replies):
        return random.Random(len(replies)).sample(replies, len(replies))

    settings = {"inner": inner, "fraction_train": 0.5, "seed": 3}
    plain = run(fedpt(**settings), LocalGrid(make_device(), NUM_DEVICES), rounds=4)
    mixed = run(fedpt(**settings), LocalGrid(make_device(), NUM_DEVICES, order=shuffled), rounds=4)
    reversed_ = run(fedpt(**settings), LocalGrid(make_device(), NUM_DEVICES, order=lambda r: r[::-1]), rounds=4)
    assert_same(plain, mixed)
    assert_same(plain, reversed_)


def test_another_seed_samples_other_devices():
    settings = {"fraction_train": 0.5}
    first = run(fedpt(seed=0, **settings), LocalGrid(make_device(), NUM_DEVICES))
    second = run(fedpt(seed=1, **settings), LocalGrid(make_device(), NUM_DEVICES))
    assert not np.array_equal(first["weight"].numpy(), second["weight"].numpy())


def test_sampling_depends_on_numbers_seed_and_round_alone():
    drawn = sample_devices([5, 3, 1, 0, 2, 4], 0.5, 1, seed=7, server_round=2)
    assert drawn == sample_devices(range(6), 0.5, 1, seed=7, server_round=2)
    assert len(drawn) == 3
    assert drawn == sorted(drawn)
    rounds = {tuple(sample_devices(range(6), 0.5, 1, seed=7, server_round=r)) for r in range(1, 30)}
    assert len(rounds) > 5


@pytest.mark.parametrize(
    ("devices", "fraction", "at_least", "count"),
    [(6, 1.0, 1, 6), (6, 0.1, 1, 1), (6, 0.1, 4, 4), (3, 0.5, 9, 3), (10, 0.3, 1, 3)],
)
def test_so_many_devices_are_sampled(devices, fraction, at_least, count):
    assert len(sample_devices(range(devices), fraction, at_least, seed=0, server_round=1)) == count


def changed(reply, *, arrays=None, metrics=None):
    content = reply.content
    if arrays is not None:
        content["arrays"] = ArrayRecord(arrays({name: array.numpy() for name, array in content["arrays"].items()}))
    if metrics is not None:
        content["metrics"] = MetricRecord({**content["metrics"], **metrics})
    return reply


def as_arrays(arrays):
    return {name: Array(values) for name, values in arrays.items()}


BAD_REPLIES = {
    "a value that is not finite": (
        lambda message, reply: changed(reply, arrays=lambda a: as_arrays({**a, "scale": np.float32([np.nan])})),
        "scale: 1 of its 1 values are not finite",
    ),
    "another shape": (
        lambda message, reply: changed(reply, arrays=lambda a: as_arrays({**a, "scale": np.float32([1, 2])})),
        r"scale: must have shape \(1,\), got \(2,\)",
    ),
    "a missing array": (
        lambda message, reply: changed(reply, arrays=lambda a: as_arrays({"scale": a["scale"]})),
        "a reply must hold the 2 arrays that were sent",
    ),
    "integers": (
        lambda message, reply: changed(reply, arrays=lambda a: as_arrays({**a, "scale": np.array([1])})),
        "scale: must be of a float type, got 'int64'",
    ),
    "another round": (
        lambda message, reply: changed(reply, metrics={"server-round": 9}),
        "the reply must be of round 1, got 9",
    ),
    "no examples": (
        lambda message, reply: changed(reply, metrics={"num-examples": 0}),
        "num-examples must be a whole number from 1 to the 20 that the device said it has, got 0",
    ),
    "more examples than it has": (
        lambda message, reply: changed(reply, metrics={"num-examples": 10**9}),
        "num-examples must be a whole number from 1 to the 20",
    ),
    "another device's number": (
        lambda message, reply: changed(reply, metrics={"device": 2}),
        "the reply must be of device 1, got 2",
    ),
    "a metric that nobody asked for": (
        lambda message, reply: changed(reply, metrics={"bytes-up": 1}),
        "unknown metric, got 'bytes-up'",
    ),
    "a negative cost": (
        lambda message, reply: changed(reply, metrics={"seconds": -1.0}),
        "the metric seconds must be a finite number of at least 0, got -1.0",
    ),
    "no arrays": (
        lambda message, reply: Message(RecordDict({"metrics": reply.content["metrics"]}), reply_to=message),
        "a reply must hold one record of arrays",
    ),
    "an error": (
        lambda message, reply: Message(
            Error(code=2, reason="Traceback\\nRuntimeError: out of memory"), reply_to=message
        ),
        "the device failed: RuntimeError: out of memory",
    ),
    "a refusal": (lambda message, reply: Message(refusal("no space left"), reply_to=message), "no space left"),
    "silence": (lambda message, reply: None, "no reply came in time"),
}


@pytest.mark.parametrize("fault", BAD_REPLIES)
def test_a_bad_reply_is_left_out_and_said_and_the_others_count(fault, caplog):
    tamper, said = BAD_REPLIES[fault]

    def of_device_1(device, message, reply):
        return tamper(message, reply) if device == 1 and message.metadata.message_type == "train" else reply

    outcomes = []
    with caplog.at_level(logging.WARNING, logger="flwr"):
        got = run(fedpt(after_aggregate=outcomes.append), LocalGrid(make_device(), 3, tamper=of_device_1), rounds=1)
    alone = run(
        fedpt(),
        LocalGrid(lambda m, c: make_device(examples=lambda d: 0 if d == 1 else examples_of(d))(m, c), 3),
        rounds=1,
    )
    assert_same(got, alone)
    assert [bool(part.refused) for part in outcomes[0].devices] == [False, True, False]
    assert re.search(said, outcomes[0].devices[1].refused)
    assert re.search(said, caplog.text)


def test_a_reply_to_nothing_is_left_out(caplog):
    extra = Message(RecordDict(), dst_node_id=5, message_type="train")
    extra.metadata.__dict__["_message_id"] = "somebody else's"
    stray = Message(RecordDict(), reply_to=extra)
    with caplog.at_level(logging.WARNING, logger="flwr"):
        got = run(fedpt(), LocalGrid(make_device(), 2, order=lambda replies: replies and [*replies, stray]), rounds=1)
    assert_same(got, run(fedpt(), LocalGrid(make_device(), 2), rounds=1))
    assert "a reply to no message of this round" in caplog.text


def nobody(device, message, reply):
    return reply if message.metadata.message_type == "query" else None


def test_a_round_without_enough_replies_ends_the_run_with_the_reasons():
    with pytest.raises(RoundError, match="round 1 needs 1 usable replies of 2 devices and has 0") as caught:
        run(fedpt(), LocalGrid(make_device(), 2, tamper=nobody))
    assert "no reply came in time" in str(caught.value)


def test_min_replies_is_a_bound():
    def first_only(device, message, reply):
        return reply if device == 0 or message.metadata.message_type == "query" else None

    run(fedpt(min_replies=1), LocalGrid(make_device(), 3, tamper=first_only), rounds=1)
    with pytest.raises(RoundError, match="needs 2 usable replies of 3 devices and has 1"):
        run(fedpt(min_replies=2), LocalGrid(make_device(), 3, tamper=first_only), rounds=1)


def test_so_many_failed_rounds_in_a_row_are_survived_with_the_model_as_it_was():
    lost = {2, 3, 5}

    def tamper(device, message, reply):
        return (
            None
            if message.metadata.message_type == "train" and message.content["config"]["server-round"] in lost
            else reply
        )

    outcomes = []
    run(
        fedpt(after_aggregate=outcomes.append, max_failed_rounds=2),
        LocalGrid(make_device(), 2, tamper=tamper),
        rounds=6,
    )
    assert [outcome.server_round for outcome in outcomes] == [1, 4, 6]
    with pytest.raises(RoundError, match="round 3"):
        run(fedpt(max_failed_rounds=1), LocalGrid(make_device(), 2, tamper=tamper), rounds=6)


def test_what_after_aggregate_returns_is_sent_in_the_next_round():
    replacement = ArrayRecord({name: Array(array.numpy() + 100) for name, array in start_arrays().items()})
    grid = LocalGrid(make_device(), 2)
    run(fedpt(after_aggregate=lambda outcome: replacement), grid, rounds=2)
    second = [message for message in grid.sent if message.metadata.message_type == "train"][-1]
    assert_same(second.content["arrays"], replacement)


def test_too_few_devices_end_the_wait_with_their_number():
    with pytest.raises(RoundError, match=r"at least 3 devices with examples .* 2 are \(connected: 1, 0\)"):
        run(fedpt(min_devices=3, wait_timeout_s=0.1), LocalGrid(make_device(), 2))


def test_a_device_that_comes_later_takes_part():
    grid = LocalGrid(make_device(), 2)
    late = min(grid.online)
    grid.online.discard(late)
    rounds = []

    def next_round(outcome):
        rounds.append([part.device for part in outcome.devices])
        grid.online.add(late)

    run(fedpt(after_aggregate=next_round), grid, rounds=2)
    assert rounds == [[0], [0, 1]]


def test_a_device_without_examples_is_left_out_and_said(caplog):
    outcomes = []
    grid = LocalGrid(make_device(examples=lambda device: 10 * device), 3)
    with caplog.at_level(logging.WARNING, logger="flwr"):
        run(fedpt(after_aggregate=outcomes.append), grid, rounds=1)
    assert [part.device for part in outcomes[0].devices] == [1, 2]
    assert "Device 0 has no examples" in caplog.text


def test_a_device_that_misses_the_first_question_is_asked_again():
    questions = []

    def silent_at_first(device, message, reply):
        if device == 0 and message.metadata.message_type == "query":
            questions.append(device)
            return None if len(questions) == 1 else reply
        return reply

    outcomes = []
    run(fedpt(after_aggregate=outcomes.append), LocalGrid(make_device(), 3, tamper=silent_at_first), rounds=2)
    assert [[part.device for part in outcome.devices] for outcome in outcomes] == [[1, 2], [0, 1, 2]]


def test_a_restarted_device_under_a_new_node_id_does_not_end_the_run(caplog):
    grid = LocalGrid(make_device(), 2)
    old = min(grid.online)
    outcomes = []

    def restart(outcome):
        outcomes.append(outcome)
        if outcome.server_round == 1:  # the new node is there before the old one is given up
            new = old + 1
            grid.device_of[new], grid.contexts[new] = grid.device_of[old], grid.contexts[old]
            grid.online.add(new)
        if outcome.server_round == 2:
            grid.online.discard(old)

    with caplog.at_level(logging.WARNING, logger="flwr"):
        run(fedpt(after_aggregate=restart), grid, rounds=3)
    assert [[part.device for part in outcome.devices] for outcome in outcomes] == [[0, 1]] * 3
    assert "is there twice" in caplog.text


def test_an_aggregate_that_is_not_finite_is_said_to_be_the_strategys():
    strategy = fedpt(inner="FedAdam", arguments="eta = 1e39")
    with pytest.raises(RoundError, match="what FedAdam made of round 1 must be finite numbers"):
        run(strategy, LocalGrid(make_device(), 2))


def test_a_strategy_that_cannot_aggregate_is_named():
    strategy = fedpt()
    strategy.inner.aggregate_train = lambda *_: [].remove(1)
    with pytest.raises(RoundError, match="FedAvg cannot aggregate round 1"):
        run(strategy, LocalGrid(make_device(), 2))


def test_other_code_is_refused_with_the_remedy():
    with pytest.raises(RoundError) as caught:
        run(fedpt(code_hash="aaaa"), LocalGrid(make_device(code_hash="bbbb"), 2))
    assert "the server has aaaa, this device bbbb" in str(caught.value)
    assert "flower-superlink" in str(caught.value)


def test_two_devices_of_one_number_are_refused():
    grid = LocalGrid(make_device(), 2, node_config=lambda device: {"partition-id": 4})
    with pytest.raises(RoundError, match="device numbers must be unique, but nodes .* both say 4"):
        run(fedpt(), grid)


def test_a_device_that_does_not_introduce_itself_is_left_out():
    def tamper(device, message, reply):
        if device == 0 and message.metadata.message_type == "query":
            return Message(RecordDict({"config": ConfigRecord({"device": "zero"})}), reply_to=message)
        return reply

    outcomes = []
    run(fedpt(after_aggregate=outcomes.append), LocalGrid(make_device(), 3, tamper=tamper), rounds=1)
    assert [part.device for part in outcomes[0].devices] == [1, 2]


def test_the_shards_are_logged_before_round_1(caplog):
    with caplog.at_level(logging.INFO, logger="flwr"):
        run(fedpt(), LocalGrid(make_device(groups={"lamp": 4, "pump": 16}), 2), rounds=1)
    assert "Shards: 2 devices, 30 examples" in caplog.text
    assert caplog.text.index("pump 16, lamp 4") < caplog.text.index("Round 1: devices 0, 1 train")


def test_bytes_are_those_of_the_records_sent():
    outcomes = []
    grid = LocalGrid(make_device(), 2)
    run(fedpt(after_aggregate=outcomes.append), grid, rounds=1)
    sent = next(message for message in grid.sent if message.metadata.message_type == "train")
    arrays = sum(len(array.data) + len(name) for name, array in sent.content["arrays"].items())
    assert all(part.bytes_down >= arrays for part in outcomes[0].devices)
    assert all(part.bytes_up > 0 for part in outcomes[0].devices)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (
            "FedAdam",
            "nonsense = 1",
            "FedAdam takes no argument nonsense here; it takes beta_1, beta_2, eta, eta_l, tau",
        ),
        ("FedAvg", "fraction-train = 0.5", "fraction_train is set by this app; use fraction-train"),
        ("FedTrimmedAvg", "beta = ", "must be `name = value` pairs"),
        ("FedAdam", "eta = 'x'", "eta must be a number, got 'x'"),
    ],
)
def test_wrong_strategy_arguments_are_refused(name, arguments, message):
    with pytest.raises(ConfigError, match=message):
        make_inner_strategy(StrategyConfig(name=name, arguments=arguments))


def test_strategy_arguments_arrive():
    strategy = make_inner_strategy(StrategyConfig(name="FedAdam", arguments="eta = 0.5, beta-1 = 0.25"))
    assert (strategy.eta, strategy.beta_1) == (0.5, 0.25)


def test_a_bare_flower_strategy_can_be_wrapped_as_a_library_would():
    inner = FedAvg(fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1)
    assert_same(run(FedPT(inner), LocalGrid(make_device(), 2)), run(fedpt(), LocalGrid(make_device(), 2)))
