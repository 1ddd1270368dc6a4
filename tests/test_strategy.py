import gc
import logging
import pickle
import random
import re
import weakref

import numpy as np
import pytest
import safetensors.numpy
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp.strategy import FedAvg, Strategy
from hypothesis import given, settings
from hypothesis import strategies as st
from local_grid import LocalGrid

from fedpt_flwr.config import INNER_STRATEGIES, StrategyConfig
from fedpt_flwr.errors import ConfigError, RoundError, RunError, WireError
from fedpt_flwr.inner import FOLDED, inner_state, make_inner_strategy, set_inner_state
from fedpt_flwr.records import DeviceCard, refusal, to_array_record, to_reply, to_tensors
from fedpt_flwr.strategy import FedPT, sample_devices

NUM_DEVICES = 6


@pytest.fixture(autouse=True, scope="module")
def _no_garbage_collection():
    """Bulyan collects garbage once a reply, which takes longer than all else together."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gc.collect", lambda *_: 0)
        yield


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
        if message.metadata.message_type == "evaluate":
            error = float(message.content["arrays"]["scale"].numpy()[0]) * (device + 1)
            metrics = MetricRecord({"num-examples": examples(device), "error": error})
            return Message(content=RecordDict({"metrics": metrics}), reply_to=message)
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
    """In Flower's own loop, which takes in all replies together as they come; ours fetches them in order."""

    def shuffled(replies):
        return random.Random(len(replies)).sample(replies, len(replies))

    def run_in_flowers_loop(order=None):
        grid = LocalGrid(make_device(), NUM_DEVICES, order=order)
        strategy = fedpt(inner=inner, fraction_train=0.5, seed=3)
        return Strategy.start(strategy, grid, initial_arrays=start_arrays(), num_rounds=4, timeout=5).arrays

    plain = run(fedpt(inner=inner, fraction_train=0.5, seed=3), LocalGrid(make_device(), NUM_DEVICES), rounds=4)
    for order in (None, shuffled, lambda replies: replies[::-1]):
        assert_same(plain, run_in_flowers_loop(order))


@pytest.mark.parametrize("name", [strategy.__name__ for strategy in FOLDED])
def test_replies_added_up_one_by_one_give_flowers_own_bits(name, monkeypatch):
    ours = outcomes_of(name)
    monkeypatch.setattr("fedpt_flwr.inner.FOLDED", ())
    flowers = outcomes_of(name)
    assert len(ours) == len(flowers) > 2
    for (mine, _), (expected, _) in zip(ours, flowers, strict=True):
        assert_same(mine.arrays, expected.arrays)
        assert mine.train_loss == expected.train_loss
        assert mine.inner_state.keys() == expected.inner_state.keys()
        for key, value in expected.inner_state.items():
            np.testing.assert_array_equal(mine.inner_state[key], value)


@pytest.mark.parametrize("inner", ["FedAvg", "FedProx", "FedAvgM", "FedAdam"])
def test_a_mean_holds_no_reply_when_the_next_one_is_fetched(inner):
    replies, alive = [], []

    def watch(device, message, reply):
        if message.metadata.message_type == "train":
            alive.append(sum(array() is not None for array in replies))
            replies.append(weakref.ref(reply.content["arrays"]["weight"]))
        return reply

    gc.disable()
    try:
        run(fedpt(inner=inner), LocalGrid(make_device(), 5, tamper=watch), rounds=1)
    finally:
        gc.enable()
    assert alive == [0, 0, 0, 0, 0]


def test_a_strategy_that_wants_more_than_the_mean_gets_all_replies():
    class Counting(FedAvg):
        def aggregate_train(self, server_round, replies):
            self.seen = len(list(replies))
            return super().aggregate_train(server_round, replies)

    inner = Counting(fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1)
    run(FedPT(inner, wait_timeout_s=1.0), LocalGrid(make_device(), 4), rounds=1)
    assert inner.seen == 4


@pytest.mark.parametrize("name", INNER_STRATEGIES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_the_bytes_give_nearly_the_same_arrays_with_every_strategy(name, dtype):
    start = ArrayRecord({"weight": Array(np.linspace(-2, 3, 600, dtype=np.float32).reshape(20, 30))})
    exact = outcomes_of(name, arrays=start, rounds=2)
    outcomes = []
    strategy = fedpt(inner=name, arguments=ARGUMENTS.get(name, ""), after_aggregate=outcomes.append, wire_dtype=dtype)
    strategy.start(LocalGrid(in_half(dtype), NUM_DEVICES), initial_arrays=start, num_rounds=2, timeout=5)
    # The devices' steps are about 1: 2**-9 of that is what bfloat16 rounds, times what a strategy makes of it.
    for (whole, _), half in zip(exact, outcomes, strict=True):
        np.testing.assert_allclose(half.arrays["weight"].numpy(), whole.arrays["weight"].numpy(), atol=0.05)
        for mine, other in zip(half.devices, whole.devices, strict=True):
            assert not mine.refused
            assert mine.bytes_up < 0.8 * other.bytes_up
            assert mine.bytes_down < 0.8 * other.bytes_down


def in_half(dtype):
    """:func:`make_device`, which reads and answers in this type."""
    device = make_device()

    def handle(message, context):
        if message.metadata.message_type != "train":
            return device(message, context)
        received = message.content["arrays"]
        message.content["arrays"] = to_array_record(to_tensors(received, dtype))
        reply = device(message, context)
        tuned = to_tensors(reply.content["arrays"])
        reply.content["arrays"] = to_reply(tuned, received, dtype, place="")
        return reply

    return handle


def test_arrays_that_float16_cannot_hold_end_the_run_with_the_remedy():
    arrays = ArrayRecord({"weight": Array(np.float32([1e5]))})
    with pytest.raises(WireError, match=r"what round 1 sends: array weight: float16 holds .* set wire.dtype='float32'"):
        fedpt(wire_dtype="float16").start(LocalGrid(make_device(), 2), initial_arrays=arrays, num_rounds=1)


def test_of_a_thousand_devices_the_log_names_twenty_and_those_that_are_left_out_with_why(caplog):
    with caplog.at_level(logging.INFO, logger="flwr"):
        run(fedpt(), LocalGrid(make_device(), 50, tamper=nobody_but_one), rounds=1)
    assert "and 30 more devices; all are in shards.json" in caplog.text
    assert "Round 1: devices 0, 1, 2," in caplog.text
    assert "18, 19 and 30 more train" in caplog.text
    assert caplog.text.count("is left out:") == 49
    assert len(caplog.records) < 110


def nobody_but_one(device, message, reply):
    return reply if message.metadata.message_type == "query" or device == 0 else None


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
        "scale: some of its values are not finite",
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
        "scale: must be float32, as wire.dtype says, got 'int64'",
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
        r"the metric seconds must be a number from 0 to 1e\+30, got -1.0",
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


def silence_of_device_1(device, message, reply):
    return None if device == 1 and message.metadata.message_type == "train" else reply


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
    # To the last bit as if no reply had come; and as if there were no such device, which is one rounding less.
    assert_same(got, run(fedpt(), LocalGrid(make_device(), 3, tamper=silence_of_device_1), rounds=1))
    for name, expected in values(alone).items():
        np.testing.assert_allclose(got[name].numpy(), expected, rtol=3e-7)
    assert [bool(part.refused) for part in outcomes[0].devices] == [False, True, False]
    assert re.search(said, outcomes[0].devices[1].refused)
    assert re.search(said, caplog.text)


def test_a_reply_to_nothing_is_left_out(caplog):
    extra = Message(RecordDict(), dst_node_id=5, message_type="train")
    extra.metadata.__dict__["_message_id"] = "somebody else's"
    stray = Message(RecordDict(), reply_to=extra)
    with caplog.at_level(logging.WARNING, logger="flwr"):
        got = run(fedpt(), LocalGrid(make_device(), 2, order=lambda replies: replies and [stray, *replies]), rounds=1)
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
    with pytest.raises(RoundError, match=r"at least 3 devices with examples .* 2 are, 1 missing \(there: 0, 1\)"):
        run(fedpt(min_devices=3, wait_timeout_s=0.1), LocalGrid(make_device(), 2))


def test_devices_that_are_slow_to_answer_are_told_apart_from_too_few():
    def silent(device, message, reply):
        return None if device else reply

    remedy = "raise wait-timeout-s if nodes that are connected need longer to answer; else start more devices"
    with pytest.raises(RoundError, match=remedy):
        fedpt(min_devices=2, wait_timeout_s=0.1).meet_devices(LocalGrid(make_device(), 2, tamper=silent))


@pytest.mark.parametrize("code", [None, ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE])
def test_a_device_whose_answer_was_lost_is_asked_again_while_it_is_waited_for(code, monkeypatch):
    monkeypatch.setattr("fedpt_flwr.roster._ASK_AGAIN_S", 0.5)
    asked = []

    def lose_the_first(device, message, reply):
        if device == 1 and message.metadata.message_type == "query":
            asked.append(message)
            if len(asked) == 1:
                return None if code is None else Message(Error(code, "lost"), reply_to=message)
        return reply

    cards = fedpt(min_devices=2, wait_timeout_s=60.0).meet_devices(LocalGrid(make_device(), 2, tamper=lose_the_first))
    assert sorted(card.device for card in cards.values()) == [0, 1]
    assert len(asked) == 2


def test_too_few_devices_are_said_with_who_is_gone_silent_declining_or_empty():
    def change(device, message, reply):
        if message.metadata.message_type == "query" and device == 2:
            return None
        if message.metadata.message_type == "query" and device == 3:
            reply.content = refusal("no battery")
        return reply

    grid = LocalGrid(make_device(examples=lambda device: 10 * (device != 4)), 5, tamper=change)
    node_of = {device: node for node, device in grid.device_of.items()}
    strategy = fedpt(min_devices=2, wait_timeout_s=0.1)
    strategy.meet_devices(grid)
    grid.online.discard(node_of[1])
    with pytest.raises(RoundError) as raised:
        strategy.meet_devices(grid)
    said = (
        f"1 are, 1 missing (there: 0; seen before and gone: 1; without examples: 4; "
        f"connected nodes that do not answer: {node_of[2]}; nodes that decline: {node_of[3]})"
    )
    assert said in str(raised.value)
    assert "no battery" in str(raised.value)


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
    strategy = fedpt(inner="FedMedian")
    strategy.inner.aggregate_train = lambda *_: [].remove(1)
    with pytest.raises(RoundError, match="FedMedian cannot aggregate round 1"):
        run(strategy, LocalGrid(make_device(), 2))


def test_a_strategy_that_needs_more_replies_says_so_and_may_try_again():
    with pytest.raises(RoundError, match=r"Bulyan cannot aggregate round 1 .*does it need more than 2 replies"):
        run(fedpt(inner="Bulyan"), LocalGrid(make_device(), 2))
    outcomes = []
    grid = LocalGrid(make_device(), 3, tamper=lambda d, m, reply: lost_in({1})(d, m, reply) if d == 2 else reply)
    run(fedpt(inner="Bulyan", max_failed_rounds=1, after_aggregate=outcomes.append), grid, rounds=2)
    assert [outcome.server_round for outcome in outcomes] == [2]


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


def test_the_shards_are_logged_and_handed_over_before_round_1(caplog):
    grid, told = LocalGrid(make_device(groups={"lamp": 4, "pump": 16}), 2), []

    def remember(cards):
        asked = {message.metadata.message_type for message in grid.sent}
        told.append((asked, sorted(card.device for card in cards)))

    with caplog.at_level(logging.INFO, logger="flwr"):
        run(fedpt(on_devices=remember), grid, rounds=2)
    assert told == [({"query"}, [0, 1])]
    assert "Shards: 2 devices, 30 examples" in caplog.text
    assert "differs by 0.00  pump 16, lamp 4" in caplog.text
    assert "2 groups; a device's mixture differs from that of all by 0.00 on average" in caplog.text
    assert caplog.text.index("pump 16, lamp 4") < caplog.text.index("Round 1: devices 0, 1 train")


def test_bytes_are_those_of_the_records_sent():
    outcomes = []
    grid = LocalGrid(make_device(), 2)
    run(fedpt(after_aggregate=outcomes.append), grid, rounds=1)
    sent = next(message for message in grid.sent if message.metadata.message_type == "train")
    arrays = sum(len(array.data) + len(name) for name, array in sent.content["arrays"].items())
    assert len(outcomes[0].devices) == 2
    for part in outcomes[0].devices:  # beside arrays of the same sizes, either way a few short values
        assert arrays < part.bytes_down < arrays + 150
        assert arrays < part.bytes_up < arrays + 150


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


# --- the rounds ---


def test_the_rounds_are_those_of_flowers_own_loop():
    """Flower's ``start``, called on our strategy, is the reference for ours."""

    def run_with(start):
        asked = []

        def evaluate(server_round, arrays):
            asked.append(server_round)
            return MetricRecord({"sum": float(arrays["weight"].numpy().sum())}) if server_round != 2 else None

        inner = FedAvg(min_train_nodes=1, min_evaluate_nodes=1, min_available_nodes=1)
        grid = LocalGrid(make_device(), 3, tamper=lost_in({2}))
        result = start(
            FedPT(inner, max_failed_rounds=1, wait_timeout_s=1.0),
            grid,
            initial_arrays=start_arrays(),
            num_rounds=4,
            timeout=5,
            train_config=ConfigRecord({"key": 7}),
            evaluate_config=ConfigRecord({"key": 8}),
            evaluate_fn=evaluate,
        )
        types = [message.metadata.message_type for message in grid.sent]
        keys = [m.content["config"]["key"] for m in grid.sent if m.metadata.message_type != "query"]
        return result, asked, types, keys

    (ours, *traffic), (flowers, *expected) = run_with(FedPT.start), run_with(Strategy.start)
    assert traffic == expected
    assert_same(ours.arrays, flowers.arrays)
    for name in ("train_metrics_clientapp", "evaluate_metrics_clientapp", "evaluate_metrics_serverapp"):
        mine, theirs = getattr(ours, name), getattr(flowers, name)
        assert mine.keys() == theirs.keys()
        # Flower shuffles the devices that evaluate, so sums may differ in the last bit.
        for server_round in mine:
            assert dict(mine[server_round]) == pytest.approx(dict(theirs[server_round]), rel=1e-12)
    assert ours.evaluate_metrics_clientapp.keys() == {1, 2, 3, 4}


def lost_in(rounds):
    """No reply comes in these rounds."""

    def tamper(device, message, reply):
        is_train = message.metadata.message_type == "train"
        return None if is_train and message.content["config"]["server-round"] in rounds else reply

    return tamper


def test_without_a_complete_round_the_result_is_what_was_given():
    grid = LocalGrid(make_device(), 2, tamper=nobody)
    assert_same(run(fedpt(max_failed_rounds=9), grid, rounds=2), start_arrays())
    result = fedpt().start(grid, initial_arrays=start_arrays(), num_rounds=3, first_round=4)
    assert_same(result.arrays, start_arrays())


def test_the_outcome_says_what_the_devices_began_with():
    outcomes, grid = [], LocalGrid(make_device(), 2)
    got = run(fedpt(after_aggregate=outcomes.append), grid, rounds=2)
    assert_same(outcomes[0].sent, start_arrays())
    assert_same(outcomes[1].sent, outcomes[0].arrays)
    assert_same(outcomes[1].arrays, got)


def test_a_device_that_orders_its_memory_otherwise_does_not_decide_how_checkpoints_lie_in_memory():
    def columns_first(device, message, reply):
        if message.metadata.message_type == "query":
            return reply
        return changed(reply, arrays=lambda a: as_arrays({name: np.asfortranarray(x) for name, x in a.items()}))

    got = run(fedpt(), LocalGrid(make_device(), 2, tamper=columns_first), rounds=1)
    assert_same(got, run(fedpt(), LocalGrid(make_device(), 2), rounds=1))
    assert all(part.flags.c_contiguous for part in values(got).values())


@pytest.mark.parametrize("name", ["FedAdam", "FedAvgM"])
def test_state_can_be_written_in_whatever_order_the_arrays_lie_in_memory(name):
    arrays = ArrayRecord({"weight": Array(np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)))})
    device = make_device()

    def handle(message, context):  # an update that differs from value to value
        reply = device(message, context)
        if message.metadata.message_type == "query":
            return reply
        return changed(reply, arrays=lambda a: as_arrays({key: value**2 for key, value in a.items()}))

    [(outcome, _)] = outcomes_of(name, arrays=arrays, rounds=1, handle=handle)
    for key, value in from_disk(outcome.inner_state).items():
        np.testing.assert_array_equal(value, outcome.inner_state[key])
    assert len({*outcome.inner_state[next(iter(outcome.inner_state))].flat}) == 6


def test_a_run_that_goes_on_is_not_evaluated_before_its_first_round():
    asked = []
    fedpt().start(
        LocalGrid(make_device(), 2),
        initial_arrays=start_arrays(),
        num_rounds=4,
        first_round=3,
        evaluate_fn=lambda server_round, arrays: asked.append(server_round),
    )
    assert asked == [3, 4]


# --- an early end ---


def asked_after(num_questions):
    """A question that is answered with yes at the n-th time, and the list of the answers."""
    answers = []

    def is_good_enough():
        answers.append(len(answers) + 1 >= num_questions)
        return answers[-1]

    return is_good_enough, answers


@pytest.mark.parametrize(("yes_at", "last_round"), [(1, 1), (2, 2), (4, 4), (9, 4)])
def test_a_run_ends_after_the_round_that_is_good_enough(yes_at, last_round):
    question, answers = asked_after(yes_at)
    outcomes = []
    run(fedpt(after_aggregate=outcomes.append, is_good_enough=question), LocalGrid(make_device(), 2), rounds=4)
    assert [outcome.server_round for outcome in outcomes] == list(range(1, last_round + 1))
    assert len(answers) == last_round


def test_a_failed_round_is_not_asked_about():
    question, answers = asked_after(2)
    outcomes = []
    strategy = fedpt(after_aggregate=outcomes.append, is_good_enough=question, max_failed_rounds=2)
    run(strategy, LocalGrid(make_device(), 2, tamper=lost_in({1, 3})), rounds=6)
    assert [outcome.server_round for outcome in outcomes] == [2, 4]
    assert answers == [False, True]


def test_a_run_that_goes_on_asks_first_whether_it_need():
    question, _ = asked_after(1)
    grid = LocalGrid(make_device(), 2)
    fedpt(is_good_enough=question).start(grid, initial_arrays=start_arrays(), num_rounds=5, first_round=3)
    assert grid.sent == []


# --- going on ---

ARGUMENTS = {
    "FedAvgM": "server-momentum = 0.9, server-learning-rate = 0.7",
    "FedAdam": "eta = 0.3, beta-1 = 0.8, beta-2 = 0.95",
    "FedYogi": "eta = 0.2",
    "FedTrimmedAvg": "beta = 0.34",
    "MultiKrum": "num-nodes-to-select = 2",
}


def shifted(outcome):
    """Arrays other than the aggregated, as a distilled model has them; they depend on the round."""
    return ArrayRecord(
        {
            name: Array(array.numpy() * np.float32(0.75) + np.float32(outcome.server_round))
            for name, array in outcome.arrays.items()
        }
    )


def outcomes_of(
    name, *, first_round=1, arrays=None, state=None, replace=None, tamper=None, handle=None, rounds=4, **settings
):
    """Outcomes of the rounds, each with the arrays that the next one sends."""
    found = []

    def remember(outcome):
        following = replace(outcome) if replace else None
        found.append((outcome, following or outcome.arrays))
        return following

    strategy = fedpt(
        inner=name, arguments=ARGUMENTS.get(name, ""), after_aggregate=remember, max_failed_rounds=9, **settings
    )
    if state is not None:
        set_inner_state(strategy.inner, state, arrays)
    grid = LocalGrid(handle or make_device(), NUM_DEVICES, tamper=tamper)
    strategy.start(grid, initial_arrays=arrays or start_arrays(), num_rounds=rounds, timeout=5, first_round=first_round)
    return found


def from_disk(arrays):
    """Arrays as they come back from a checkpoint: of another memory, and in another order."""
    return safetensors.numpy.load(safetensors.numpy.save(dict(arrays)))


def assert_goes_on(name, whole, stopped, **settings):
    """Going on after the ``stopped``-th complete round gives what the whole run gave."""
    outcome, following = whole[stopped - 1]
    rest = outcomes_of(
        name,
        first_round=outcome.server_round + 1,
        arrays=ArrayRecord({key: Array(value) for key, value in from_disk(values(following)).items()}),
        state=from_disk(outcome.inner_state),
        **settings,
    )
    assert len(rest) == len(whole) - stopped
    for (mine, mine_sends), (expected, expected_sends) in zip(rest, whole[stopped:], strict=True):
        assert_same(mine.sent, expected.sent)
        assert_same(mine.arrays, expected.arrays)
        assert_same(mine_sends, expected_sends)
        assert mine.inner_state.keys() == expected.inner_state.keys()
        for key, value in expected.inner_state.items():
            assert mine.inner_state[key].dtype == value.dtype
            np.testing.assert_array_equal(mine.inner_state[key], value)
        assert (mine.server_round, mine.train_loss) == (expected.server_round, expected.train_loss)
        assert mine.devices == expected.devices


@pytest.mark.parametrize("replace", [None, shifted], ids=["aggregated", "replaced"])
@pytest.mark.parametrize("name", INNER_STRATEGIES)
def test_going_on_after_any_round_gives_the_same_bits_as_not_stopping(name, replace):
    settings = {"replace": replace, "fraction_train": 0.5, "seed": 5}
    whole = outcomes_of(name, **settings)
    assert len(whole) == 4
    for stopped in (1, 2, 3, 4):
        assert_goes_on(name, whole, stopped, **settings)


@pytest.mark.slow
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(INNER_STRATEGIES),
    fraction=st.sampled_from([0.34, 0.5, 0.8, 1.0]),
    seed=st.integers(0, 2**32 - 1),
    lost=st.sets(st.integers(1, 5), max_size=3),
    replace=st.sampled_from([None, shifted]),
    data=st.data(),
)
def test_rounds_without_replies_change_nothing_about_that(name, fraction, seed, lost, replace, data):
    settings = {
        "fraction_train": fraction,
        "min_replies": 3,  # Bulyan's least
        "seed": seed,
        "replace": replace,
        "tamper": lost_in(lost),
        "rounds": 5,
    }
    whole = outcomes_of(name, **settings)
    assert [outcome.server_round for outcome, _ in whole] == sorted({1, 2, 3, 4, 5} - lost)
    assert_goes_on(name, whole, data.draw(st.integers(1, len(whole))), **settings)


@pytest.mark.parametrize("name", INNER_STRATEGIES)
def test_the_order_of_the_arrays_changes_no_bit(name):
    # It is one in a model, another in a file, and any in what after_aggregate returns.
    def reversed_(outcome):
        return ArrayRecord(dict(reversed(list(shifted(outcome).items())))) if outcome.server_round % 2 else None

    def in_order(outcome):
        return shifted(outcome) if outcome.server_round % 2 else None

    backwards = ArrayRecord(dict(reversed(list(start_arrays().items()))))
    mixed = outcomes_of(name, replace=reversed_, arrays=backwards)
    for (mine, _), (expected, _) in zip(mixed, outcomes_of(name, replace=in_order), strict=True):
        assert_same(mine.arrays, expected.arrays)
        for key, value in expected.inner_state.items():
            np.testing.assert_array_equal(mine.inner_state[key], value)


@pytest.mark.parametrize("name", INNER_STRATEGIES)
def test_a_strategy_that_remembers_anything_else_would_be_noticed(name):
    strategy = fedpt(inner=name, arguments=ARGUMENTS.get(name, ""))
    before = {field: pickle.dumps(value) for field, value in vars(strategy.inner).items()}
    run(strategy, LocalGrid(make_device(), NUM_DEVICES))
    after = {field: pickle.dumps(value) for field, value in vars(strategy.inner).items()}
    changed_fields = {field for field in after if after[field] != before.get(field)}
    saved = {key.split("/")[0] for key in inner_state(strategy.inner)}
    assert changed_fields - {"current_arrays"} == saved  # current_arrays is what the round sends


def test_a_strategy_has_no_state_before_its_first_round():
    for name in INNER_STRATEGIES:
        assert inner_state(make_inner_strategy(StrategyConfig(name=name, arguments=ARGUMENTS.get(name, "")))) == {}


def test_state_is_named_after_the_arrays_and_can_be_computed_by_hand():
    strategy = fedpt(inner="FedAdam", arguments="beta-1 = 0.5, beta-2 = 0.75")
    run(strategy, LocalGrid(make_device(), 1), rounds=1)
    step = np.random.default_rng([0, 1]).normal()
    state = inner_state(strategy.inner)
    assert sorted(state) == ["m_t/scale", "m_t/weight", "v_t/scale", "v_t/weight"]
    np.testing.assert_allclose(state["m_t/weight"], np.full((2, 3), 0.5 * step), rtol=1e-6)
    np.testing.assert_allclose(state["v_t/weight"], np.full((2, 3), 0.25 * step**2), rtol=1e-6)


def test_updates_start_from_what_was_broadcast_not_from_what_the_strategy_made():
    outcomes = []

    def distilled(outcome):
        outcomes.append(outcome)
        return ArrayRecord({name: Array(array.numpy() + 100) for name, array in outcome.arrays.items()})

    strategy = fedpt(inner="FedAvgM", arguments="server-momentum = 0.9", after_aggregate=distilled)
    run(strategy, LocalGrid(make_device(), 1), rounds=3)
    # Of one device, whatever it is sent, round r aggregates to sent + s_r: the pseudo-gradient is -s_r, the momentum
    # m_r = 0.9 m_(r-1) - s_r, and the result sent - m_r. Without the 100 that was put on top, of which no device knows.
    steps = [np.random.default_rng([0, server_round]).normal() for server_round in (1, 2, 3)]
    momentum, sent = 0.0, 0.0
    for outcome, step in zip(outcomes, steps, strict=True):
        momentum = 0.9 * momentum - step
        np.testing.assert_allclose(outcome.inner_state["momentum_vector/weight"], momentum, rtol=1e-4)
        np.testing.assert_allclose(outcome.sent["weight"].numpy(), sent, rtol=1e-6)
        np.testing.assert_allclose(outcome.arrays["weight"].numpy(), sent - momentum, rtol=1e-6)
        sent += -momentum + 100


@pytest.mark.parametrize("name", INNER_STRATEGIES)
def test_arrays_that_are_moved_after_every_round_move_the_result_and_nothing_else(name):
    # The devices' steps do not depend on where they begin, so no strategy may take the move for their doing.
    def moved(outcome):
        return ArrayRecord({key: Array(array.numpy() + np.float32(4)) for key, array in outcome.arrays.items()})

    plain, far = outcomes_of(name), outcomes_of(name, replace=moved)
    for (here, _), (there, _) in zip(plain, far, strict=True):
        by = 4 * (here.server_round - 1)
        for key in here.arrays:
            np.testing.assert_allclose(there.arrays[key].numpy(), here.arrays[key].numpy() + by, atol=1e-4)


def huge_in(server_round, size):
    """Devices send finite numbers of which the strategy makes infinite ones."""

    def tamper(device, message, reply):
        if message.metadata.message_type == "query" or message.content["config"]["server-round"] != server_round:
            return reply
        return changed(reply, arrays=lambda a: as_arrays({**a, "scale": np.float32([size])}))

    return tamper


@pytest.mark.parametrize(
    ("name", "size"),
    [("FedAdam", 1e30), ("FedYogi", 1e30), ("FedAdagrad", 1e30), ("FedAvgM", -3e38)],
)
def test_a_round_of_which_a_strategy_makes_infinite_numbers_leaves_no_trace_in_it(name, size, monkeypatch):
    monkeypatch.setitem(ARGUMENTS, "FedAvgM", "server-momentum = 0.9, server-learning-rate = 2.0")
    infinite = outcomes_of(name, tamper=huge_in(2, size))
    lost = outcomes_of(name, tamper=lost_in({2}))
    assert [outcome.server_round for outcome, _ in infinite] == [1, 3, 4]
    for (mine, _), (expected, _) in zip(infinite, lost, strict=True):
        assert_same(mine.arrays, expected.arrays)
        for key, value in expected.inner_state.items():
            np.testing.assert_array_equal(mine.inner_state[key], value)


def saved_state(name="FedAdam"):
    strategy = fedpt(inner=name, arguments=ARGUMENTS.get(name, ""))
    run(strategy, LocalGrid(make_device(), 2), rounds=1)
    return inner_state(strategy.inner)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {}, r"the saved state of FedAdam must hold 4 arrays, got \"4 missing \['m_t/scale'\], 0 unknown"),
        (lambda s: {**s, "m_t/bias": s["m_t/scale"]}, r"4 arrays, got \"0 missing \[\], 1 unknown \['m_t/bias'\]"),
        (lambda s: {**s, "m_t/scale": np.zeros(2, np.float32)}, r"m_t/scale must have shape \(1,\), got '\(2,\)'"),
        (lambda s: {**s, "m_t/scale": np.zeros(1, np.int64)}, "m_t/scale must be float32 or float64, got 'int64'"),
        (lambda s: {**s, "v_t/scale": np.float32([np.inf])}, "v_t/scale must be finite numbers, got '1 that are not'"),
    ],
    ids=["none", "one too many", "shape", "type", "infinite"],
)
def test_state_that_does_not_fit_is_refused(change, message):
    inner = make_inner_strategy(StrategyConfig(name="FedAdam", arguments=ARGUMENTS["FedAdam"]))
    with pytest.raises(RunError, match=message):
        set_inner_state(inner, change(saved_state()), start_arrays())
    assert inner_state(inner) == {}


def test_state_of_another_strategy_is_refused():
    inner = make_inner_strategy(StrategyConfig(name="FedAvgM", arguments=ARGUMENTS["FedAvgM"]))
    with pytest.raises(RunError, match="the saved state of FedAvgM must hold 2 arrays"):
        set_inner_state(inner, saved_state("FedAdam"), start_arrays())
    with pytest.raises(RunError, match="the saved state of FedAvg must hold 0 arrays"):
        set_inner_state(make_inner_strategy(StrategyConfig()), saved_state("FedAvgM"), start_arrays())


def test_a_strategy_whose_state_is_not_known_is_refused_with_those_that_can_go_on():
    class Own(FedAvg):
        pass

    with pytest.raises(ConfigError) as caught:
        set_inner_state(Own(), {}, start_arrays())
    assert str(caught.value) == (
        "strategy.name: what this strategy remembers from round to round cannot be saved, got 'Own'; "
        "a run can be resumed with " + ", ".join(INNER_STRATEGIES)
    )


# --- how long a change may be ---


def update_norm_of(device, server_round=1):
    """The norm of what :func:`make_device` changes: seven weights by one number."""
    return abs(np.random.default_rng([device, server_round]).normal()) * np.sqrt(7)


def bounded(bound, *, above="clip", wire="float32", **settings):
    outcomes = []
    strategy = fedpt(
        after_aggregate=outcomes.append,
        max_update_norm=bound,
        refuse_above_norm=above == "refuse",
        wire_dtype=wire,
        **settings,
    )
    return strategy, outcomes


@pytest.mark.parametrize("inner", ["FedAvg", "FedMedian"])
def test_longer_changes_are_scaled_down_to_the_bound_and_shorter_ones_left_alone(inner):
    norms = [update_norm_of(device) for device in range(3)]
    bound = sorted(norms)[1]  # the longest of three is shortened
    strategy, outcomes = bounded(bound * 1.0001, inner=inner)
    got = run(strategy, LocalGrid(make_device(examples=lambda device: 10), 3), rounds=1)
    steps = [np.random.default_rng([device, 1]).normal() for device in range(3)]
    short = [step * min(1.0, bound * 1.0001 / norm) for step, norm in zip(steps, norms, strict=True)]
    expected = np.mean(short) if inner == "FedAvg" else np.median(short)
    np.testing.assert_allclose(got["weight"].numpy(), np.full((2, 3), expected), rtol=1e-4)
    measured = [device.update_norm for device in outcomes[0].devices]
    np.testing.assert_allclose(measured, norms, rtol=1e-5)


def test_longer_changes_are_refused_where_that_is_asked_for_with_their_norm():
    norms = [update_norm_of(device) for device in range(3)]
    worst = int(np.argmax(norms))
    strategy, outcomes = bounded(sorted(norms)[1] * 1.0001, above="refuse")
    run(strategy, LocalGrid(make_device(), 3), rounds=1)
    refused = {device.device: device.refused for device in outcomes[0].devices if device.refused}
    assert list(refused) == [worst]
    assert f"device {worst}, round 1: a device's change must have a norm of at most" in refused[worst]
    assert f"got {norms[worst]:.4g}" in refused[worst]
    assert "raise strategy.max-update-norm" in refused[worst]


def test_a_bound_that_nothing_exceeds_changes_no_bit():
    plain = run(fedpt(), LocalGrid(make_device(), 3), rounds=2)
    strategy, _ = bounded(1e9)
    assert_same(plain, run(strategy, LocalGrid(make_device(), 3), rounds=2))


def test_without_a_bound_nothing_is_measured():
    strategy, outcomes = bounded(0.0)
    run(strategy, LocalGrid(make_device(), 2), rounds=1)
    assert [device.update_norm for device in outcomes[0].devices] == [None, None]
