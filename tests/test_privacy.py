"""Differential privacy of devices: what is averaged, how much noise there is, what is spent, and what is refused."""

import dataclasses
import json
import math

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from local_grid import LocalGrid

from fedpt_flwr import privacy
from fedpt_flwr.accounting import epsilon_after
from fedpt_flwr.clipping import clip_update
from fedpt_flwr.config import DP_MODES, PrivacyConfig, StrategyConfig
from fedpt_flwr.errors import ConfigError, PrivacyError, RoundError, RunError
from fedpt_flwr.inner import make_inner_strategy
from fedpt_flwr.privacy import PrivateAverage, system_normal
from fedpt_flwr.records import DeviceCard
from fedpt_flwr.strategy import FedPT

MODES = [mode for mode in DP_MODES if mode != "off"]
FIXED = ["server-fixed", "client-fixed"]
ADAPTIVE = ["server-adaptive", "client-adaptive"]
NUM_DEVICES = 4
CHANGES = {0: (3.0, 4.0), 1: (0.3, 0.4), 2: (0.0, -10.0), 3: (0.06, 0.08)}
"""Each device's change of two weights; norms 5, 0.5, 10 and 0.1."""


def start_arrays():
    return ArrayRecord({"weight": Array(np.float32([1.0])), "scale": Array(np.float32([2.0]))})


def make_device(*, card=None, metrics=None, changes=CHANGES, clips=True):
    """A device that changes two weights by what is told, and clips if the run is one in which devices do."""

    def answer(message, context):
        device = context.node_config["partition-id"]
        if message.metadata.message_type == "query":
            said = DeviceCard(device=device, num_examples=1, groups={}, code_hash="")
            return Message(content=dataclasses.replace(said, **(card or {})).to_content(), reply_to=message)
        sent = message.content["arrays"]
        change = dict(zip(("weight", "scale"), changes[device], strict=True))
        arrays = {name: Array((sent[name].numpy() + np.float32(change[name])).astype(np.float32)) for name in change}
        said = {"device": device, "server-round": message.content["config"]["server-round"], "num-examples": 1}
        content = RecordDict({"arrays": ArrayRecord(arrays), "metrics": MetricRecord(said | (metrics or {}))})
        return Message(content=content, reply_to=message)

    def handle(message, context):
        if message.metadata.message_type == "query" or not clips:
            return answer(message, context)
        return clip_update(message, context, answer)

    return handle


class Run:
    """A run of :class:`FedPT` around a private average, with what it spent and what it made of each round."""

    def __init__(self, mode="server-fixed", *, spend=None, fedpt=None, **settings):
        self.ledger, self.outcomes, self.mode = [], [], mode
        # For four devices Flower would take a deviation of 0.2 for their number, too little for most noise.
        config = PrivacyConfig(dp=mode, **({"clipped_count_stddev": 10.0} | settings))
        inner = make_inner_strategy(StrategyConfig(name="FedAvg"))
        self.private = PrivateAverage(inner, config, spend or self.ledger.append)
        self.fedpt = FedPT(self.private, self.outcomes.append, **({"wait_timeout_s": 1.0} | (fedpt or {})))

    def start(self, rounds=1, *, device=None, num_devices=NUM_DEVICES, arrays=None, **settings):
        grid = LocalGrid(device or make_device(), num_devices, {"privacy.dp": self.mode})
        first = settings.pop("first_round", 1)
        for name, value in settings.items():
            setattr(grid, name, value)
        result = self.fedpt.start(grid, arrays or start_arrays(), num_rounds=rounds, timeout=5, first_round=first)
        return {name: array.numpy() for name, array in result.arrays.items()}


@pytest.fixture
def no_noise(monkeypatch):
    """In these tests noise is zero, so that what it is added to can be seen."""
    monkeypatch.setattr(privacy, "system_normal", np.zeros)


# --- what is averaged ---


@pytest.mark.parametrize("mode", MODES)
def test_changes_are_clipped_as_a_whole_and_averaged_with_equal_weights(mode, no_noise):
    got = Run(mode, clipping_norm=1.0, noise_multiplier=1.0).start()
    # Clipped to norm 1: (3, 4) to (0.6, 0.8) and (0, -10) to (0, -1); the others are short enough.
    np.testing.assert_allclose(got["weight"], [1 + (0.6 + 0.3 + 0.0 + 0.06) / 4], rtol=1e-6)
    np.testing.assert_allclose(got["scale"], [2 + (0.8 + 0.4 - 1.0 + 0.08) / 4], rtol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_arrays_are_taken_by_name_in_whatever_order_a_device_sends_them(mode, no_noise):
    """Flower takes them by their place; this device sends `weight` first, the server `scale`."""
    sent = []
    grid_device = make_device()

    def device(message, context):
        if message.metadata.message_type == "train":
            sent.append(list(message.content["arrays"]))
        return grid_device(message, context)

    got = Run(mode, clipping_norm=100.0, noise_multiplier=1.0).start(device=device)
    assert sent[0] == ["scale", "weight"]
    np.testing.assert_allclose(got["weight"], [1 + (3 + 0.3 + 0 + 0.06) / 4], rtol=1e-5)


# --- precision ---


def device_of(change):
    """A device that adds the same to every weight."""

    def answer(message, context):
        arrays = {name: Array(array.numpy() + np.float32(change)) for name, array in message.content["arrays"].items()}
        said = {
            "device": context.node_config["partition-id"],
            "server-round": message.content["config"]["server-round"],
            "num-examples": 1,
        }
        content = RecordDict({"arrays": ArrayRecord(arrays), "metrics": MetricRecord(said)})
        return Message(content=content, reply_to=message)

    def handle(message, context):
        if message.metadata.message_type == "query":
            card = DeviceCard(device=context.node_config["partition-id"], num_examples=1, groups={}, code_hash="")
            return Message(content=card.to_content(), reply_to=message)
        return clip_update(message, context, answer)

    return handle


@pytest.mark.parametrize("mode", MODES)
def test_a_change_of_millions_of_weights_is_clipped_to_its_norm(mode, no_noise):
    """In float32 the norm of these comes out too small by 3.7e-4: the server refuses what devices clip to it."""
    count, norm = 4_000_000, 0.5
    run = Run(mode, clipping_norm=norm)
    got = run.start(device=device_of(0.001), arrays=many_weights(count))
    length = float(np.linalg.norm(got["weight"].astype(np.float64)))
    assert length == pytest.approx(norm, rel=1e-6)
    assert len(run.outcomes) == 1


@pytest.mark.parametrize("mode", MODES)
def test_a_change_whose_square_is_nothing_in_float32_costs_no_budget_for_nothing(mode, no_noise):
    """Flower would divide by its norm of 0, after the round was written down as spent."""
    run = Run(mode, clipping_norm=0.5)
    got = run.start(device=device_of(1e-30), arrays=many_weights(3))
    np.testing.assert_allclose(got["weight"], 1e-30, rtol=1e-6)
    assert len(run.outcomes) == len(run.ledger) == 1


# --- noise ---


def many_weights(count=40_000):
    return ArrayRecord({"weight": Array(np.zeros(count, np.float32))})


def long_device(message, context):
    """A device whose change is one in every weight."""
    device = context.node_config["partition-id"]
    if message.metadata.message_type == "query":
        card = DeviceCard(device=device, num_examples=1, groups={}, code_hash="")
        return Message(content=card.to_content(), reply_to=message)

    def answer(message, _context):
        arrays = {name: Array(array.numpy() + np.float32(1)) for name, array in message.content["arrays"].items()}
        said = {"device": device, "server-round": message.content["config"]["server-round"], "num-examples": 1}
        return Message(
            content=RecordDict({"arrays": ArrayRecord(arrays), "metrics": MetricRecord(said)}), reply_to=message
        )

    return clip_update(message, context, answer)


@pytest.mark.parametrize("mode", MODES)
def test_noise_has_the_deviation_that_the_accountant_counts(mode):
    count, norm, noise = 40_000, 5.0, 2.0
    got = Run(mode, clipping_norm=norm, noise_multiplier=noise).start(device=long_device, arrays=many_weights(count))
    # Every device sends the same: after clipping, norm / sqrt(count) in each weight. The rest is noise.
    rest = got["weight"].astype(np.float64) - norm / math.sqrt(count)
    stddev = noise * norm / NUM_DEVICES
    if mode in ADAPTIVE:  # a part is spent on the number of those clipped: 1/z^2 = 1/z_weights^2 + 1/(2 sigma)^2
        stddev = (noise**-2 - (2 * 10.0) ** -2) ** -0.5 * norm / NUM_DEVICES
    # The deviation of 40,000 numbers is known to 0.35 %, their mean to stddev / 200.
    assert rest.std() == pytest.approx(stddev, rel=0.03)
    assert abs(rest.mean()) < 6 * stddev / 200


def test_noise_is_not_that_of_another_run_with_the_same_seed_and_leaves_numpys_generator_alone():
    before = np.random.get_state()  # noqa: NPY002
    first, second = (Run().start(device=long_device, arrays=many_weights(100))["weight"] for _ in range(2))
    assert (first != second).all()
    after = np.random.get_state()  # noqa: NPY002
    assert before[2:] == after[2:]
    np.testing.assert_array_equal(before[1], after[1])


def test_numbers_from_the_system_are_normal():
    drawn = np.sort(system_normal((3, 33_333)).ravel())
    # Kolmogorov and Smirnov: the largest distance of 99,999 numbers from their law exceeds 2.5/sqrt(n) once in 270,000.
    law = np.asarray([math.erfc(-value / math.sqrt(2)) / 2 for value in drawn])
    steps = np.arange(1, len(drawn) + 1) / len(drawn)
    assert np.abs(steps - law).max() < 2.5 / math.sqrt(len(drawn))
    assert np.isfinite(drawn).all()
    assert system_normal((0,)).shape == (0,)


def test_neighbouring_numbers_from_the_system_have_nothing_to_do_with_each_other():
    drawn = system_normal((2, 50_000))  # the two halves are made of the same pairs of uniform numbers
    for other in (drawn[1], np.roll(drawn[0], 1)):
        assert abs(np.corrcoef(drawn[0], other)[0, 1]) < 6 / math.sqrt(50_000)
        assert abs(np.corrcoef(drawn[0] ** 2, other**2)[0, 1]) < 6 / math.sqrt(50_000)


# --- a norm that follows the devices ---


@pytest.mark.parametrize("mode", ADAPTIVE)
@pytest.mark.parametrize("share", [0.5, 0.25, 0.75])
def test_the_norm_goes_up_where_more_than_the_share_are_clipped(mode, share, no_noise):
    """Of norms 5, 0.5, 10 and 0.1 two of four exceed 1."""
    run = Run(mode, clipping_norm=1.0, clipped_share=share, clipping_rate=0.2)
    run.start()
    assert run.private.clipping_norm == pytest.approx(math.exp(0.2 * (0.5 - share)))


@pytest.mark.parametrize("mode", ADAPTIVE)
def test_the_norm_comes_to_rest_at_its_share(mode, no_noise):
    """From far below and far above it gets to between the second and the third of the four norms."""
    for norm in (0.01, 100.0):
        run = Run(mode, clipping_norm=norm, clipping_rate=1.0)
        run.start(rounds=20)
        assert 0.4 < run.private.clipping_norm < 6.0


@pytest.mark.parametrize("mode", ADAPTIVE)
def test_noise_is_for_the_norm_that_the_changes_of_the_round_were_clipped_to(mode, monkeypatch):
    """With noise of one everywhere, the result tells by what it was multiplied."""
    monkeypatch.setattr(privacy, "system_normal", np.ones)
    run = Run(mode, clipping_norm=1.0, noise_multiplier=1.0, clipped_count_stddev=1000.0)
    got = run.start()
    mean = (0.6 + 0.3 + 0.0 + 0.06) / 4
    # z * C / n = 1 / 4 with C = 1; the noisy number of those clipped is 1002, which makes the next norm another.
    assert got["weight"][0] == pytest.approx(1 + mean + 0.25, rel=1e-5)
    assert run.private.described()["noise_stddev"] == pytest.approx(0.25, rel=1e-5)
    assert run.private.clipping_norm == pytest.approx(math.exp(0.2 * 0.5))


@pytest.mark.parametrize("mode", ADAPTIVE)
@pytest.mark.parametrize(("noise", "share"), [(1.0, 1.0), (-1.0, 0.0)])
def test_the_norm_of_a_few_devices_does_not_follow_their_noise_far(mode, noise, share, monkeypatch):
    """Two of four are clipped, and noise says it were about 250 or -250."""
    monkeypatch.setattr(privacy, "system_normal", lambda shape: np.full(shape, noise))
    run = Run(mode, clipping_norm=1.0, noise_multiplier=1.0, clipped_share=0.25, clipped_count_stddev=1000.0)
    run.start()
    assert run.private.clipping_norm == pytest.approx(math.exp(0.2 * (share - 0.25)))


@pytest.mark.parametrize("mode", ADAPTIVE)
def test_a_round_with_a_norm_that_follows_costs_what_its_noise_multiplier_says(mode):
    run = Run(mode, noise_multiplier=3.0)
    run.start(rounds=3)
    assert run.private.spent() == {"epsilon": epsilon_after(3.0, 3, delta=1e-5), "delta": 1e-5, "releases": 3}


def test_too_few_devices_for_the_noise_on_their_number_are_refused_with_what_to_set():
    with pytest.raises(ConfigError) as raised:
        Run("server-adaptive", noise_multiplier=1.0, clipped_count_stddev=0.0).start()
    assert str(raised.value).startswith("privacy.noise-multiplier: with 4 devices a round Flower refuses this")
    assert str(raised.value).endswith("set privacy.clipped-count-stddev=1 or more, or let more devices train")
    told = Run("server-adaptive", noise_multiplier=1.0, clipped_count_stddev=1.0)
    told.start()
    assert told.private.described()["noise_stddev"] < 1.16 / 4


# --- what is spent ---


@pytest.mark.parametrize("mode", MODES)
def test_every_round_is_written_down_before_its_noise_is_drawn(mode, monkeypatch):
    events = []

    def draw(shape):
        events.append("noise")
        return np.zeros(shape)

    monkeypatch.setattr(privacy, "system_normal", draw)
    run = Run(mode, spend=lambda state: events.append(state["releases"]))
    run.start(rounds=2)
    per_round = 3 if mode in ADAPTIVE else 2  # two arrays, and the number of those clipped
    assert events == [1, *["noise"] * per_round, 2, *["noise"] * per_round]


def test_a_round_that_cannot_be_written_down_has_no_noise_and_no_result(monkeypatch):
    def full(_state):
        raise RunError("cannot be written (disk full)")

    monkeypatch.setattr(privacy, "system_normal", lambda _shape: pytest.fail("noise was drawn"))
    run = Run(spend=full)
    with pytest.raises(RunError, match="disk full"):
        run.start()
    assert run.outcomes == []


def test_what_is_spent_is_what_the_accountant_says_and_can_be_written_as_json():
    run = Run(noise_multiplier=4.0)
    run.start(rounds=3)
    assert [state["releases"] for state in run.ledger] == [1, 2, 3]
    assert run.ledger[-1]["epsilon"] == run.private.spent()["epsilon"] == epsilon_after(4.0, 3, delta=1e-5)
    assert json.loads(json.dumps(run.ledger[-1], allow_nan=False)) == run.ledger[-1]
    described = run.private.described()
    assert (described["devices"], described["devices_per_round"], described["releases"]) == (4, 4, 3)
    assert described["noise_stddev"] == 4.0 * 1.0 / 4


@pytest.mark.parametrize("mode", MODES)
def test_the_run_ends_with_the_last_round_that_the_budget_allows(mode, caplog):
    budget = epsilon_after(2.0, 2, delta=1e-5)
    run = Run(mode, noise_multiplier=2.0, max_epsilon=budget)
    with caplog.at_level("WARNING", logger="flwr"):
        run.start(rounds=5)
    assert [outcome.server_round for outcome in run.outcomes] == [1, 2]
    assert run.private.spent()["epsilon"] == budget
    assert "The privacy budget is spent: 2 rounds cost epsilon" in caplog.text
    assert "round 3 would go above" in caplog.text


def test_a_budget_that_allows_nothing_ends_the_run_before_any_device_trains():
    run = Run(noise_multiplier=1.0, max_epsilon=0.5)
    with pytest.raises(PrivacyError, match=r"privacy.max-epsilon: the budget must allow at least one round, got 0.5"):
        run.start()
    assert run.ledger == []


def test_the_average_itself_begins_no_round_beyond_the_budget():
    run = saved(rounds=1, max_epsilon=epsilon_after(1.0, 1, delta=1e-5))
    with pytest.raises(PrivacyError, match="does not allow another round, got .*; 1 rounds have cost epsilon 4.729"):
        run.private.configure_train(2, start_arrays(), ConfigRecord(), LocalGrid(make_device(), NUM_DEVICES))


# --- a run that goes on ---


def saved(mode="server-fixed", rounds=2, **settings):
    run = Run(mode, **settings)
    run.start(rounds=rounds)
    return run


@pytest.mark.parametrize("mode", MODES)
def test_a_run_that_goes_on_has_spent_what_it_had_and_clips_to_the_same_norm(mode):
    before = saved(mode)
    state = json.loads(json.dumps(before.private.to_json()))
    after = Run(mode)
    after.private.restore(json.loads(json.dumps(before.ledger[-1])), state)
    assert after.private.spent() == before.private.spent()
    assert after.private.clipping_norm == before.private.clipping_norm
    assert after.private.devices == (0, 1, 2, 3)
    after.start(rounds=3, first_round=3)
    assert after.private.spent()["releases"] == 3


def test_a_round_that_was_written_down_and_lost_stays_spent():
    """The process ended after the ledger was written, before a checkpoint: round 3 is made again, and costs again."""
    before = saved(rounds=3)
    checkpoint = saved(rounds=2).private.to_json()
    after = Run(max_epsilon=epsilon_after(1.0, 3, delta=1e-5))
    with pytest.raises(RunError, match="does not match the current configuration"):
        after.private.restore(before.ledger[-1], checkpoint)  # the budget of these was another
    budget = epsilon_after(1.0, 3, delta=1e-5)
    before, earlier = saved(rounds=3, max_epsilon=budget), saved(rounds=2, max_epsilon=budget)
    after.private.restore(before.ledger[-1], earlier.private.to_json())
    assert after.private.spent()["releases"] == 3
    assert not after.private.affords_another()
    after.start(rounds=3, first_round=3)
    assert after.outcomes == []


def test_a_ledger_with_less_than_the_checkpoint_is_refused():
    before = saved(rounds=3)
    after = Run()
    with pytest.raises(RunError) as raised:
        after.private.restore(before.ledger[0], before.private.to_json())
    assert str(raised.value) == (
        "must have all that the last checkpoint has: 3 releases of 4 devices, got '1 of 4'; put back the file as the "
        "run wrote it"
    )


DAMAGE = {
    "no object": lambda state: [],
    "nothing in it": lambda state: {},
    "no accountant": lambda state: state | {"accountant": None},
    "an accountant of another delta": lambda state: change_config(state, "target_delta", 1e-3),
    "an accountant of other devices": lambda state: change_config(state, "population_size", 5),
    "less noise in a round": lambda state: change_event(state, "noise_multiplier", 9.0),
    "fewer devices in a round": lambda state: change_event(state, "sample_size", 2),
    "a round that was half": lambda state: change_composition(state, "count", 0.5),
    "a round that was not": lambda state: change_composition(state, "count", -1),
    "a norm of nothing": lambda state: state | {"clipping_norm": 0.0},
    "a norm that is none": lambda state: state | {"clipping_norm": "nan"},
    "devices without numbers": lambda state: state | {"devices": ["0", "1", "2", "3"]},
    "no devices": lambda state: state | {"devices": []},
}


def change_config(state, key, value):
    accountant = state["accountant"]
    return state | {"accountant": accountant | {"config": accountant["config"] | {key: value}}}


def change_composition(state, key, value):
    accountant = state["accountant"]
    return state | {"accountant": accountant | {"compositions": [accountant["compositions"][0] | {key: value}]}}


def change_event(state, key, value):
    return change_composition(state, "event", state["accountant"]["compositions"][0]["event"] | {key: value})


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_ledger_is_refused(damage):
    state = DAMAGE[damage](saved(rounds=1).ledger[-1])
    with pytest.raises(RunError, match="must hold what the run has spent, and does not .*a budget that nobody knows"):
        Run().private.restore(state, None)


# --- what is refused ---


def silent(device_number, server_round):
    """A grid's tampering: one device does not answer in one round."""

    def tamper(device, message, reply):
        is_asked = message.metadata.message_type == "train" and device == device_number
        return None if is_asked and message.content["config"]["server-round"] == server_round else reply

    return tamper


@pytest.mark.parametrize("mode", MODES)
def test_a_missing_reply_ends_the_run_and_nothing_is_spent_on_the_round(mode):
    run = Run(mode)
    with pytest.raises(RoundError) as raised:
        run.start(rounds=3, tamper=silent(2, 2))
    lines = str(raised.value).splitlines()
    assert lines[0] == (
        "privacy.dp: round 2 needs 4 usable replies of 4 devices and has 3; checkpoints of earlier rounds are kept; "
        "nothing was spent on this round"
    )
    assert "device 2, round 2: no reply came in time" in lines[1]
    assert [state["releases"] for state in run.ledger] == [1]


def test_a_round_without_a_reply_may_fail_and_be_followed_by_others_at_no_cost():
    run = Run(fedpt={"max_failed_rounds": 1})
    run.start(rounds=3, tamper=silent(2, 2))
    assert [outcome.server_round for outcome in run.outcomes] == [1, 3]
    assert run.private.spent()["releases"] == 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"metrics": {"train-loss": 1.0}}, "unknown metric, got 'train-loss'"),
        ({"metrics": {"num-tokens": 7}}, "unknown metric, got 'num-tokens'"),
        ({"metrics": {"num-examples": 2}}, "num-examples must be a whole number from 1 to the 1"),
        ({"metrics": {"norm_bit": 1}}, "unknown metric, got 'norm_bit'"),
        ({"changes": CHANGES | {1: (0.0, 0.0)}}, "a device's change must not be zero in a private run"),
        (
            {"changes": CHANGES | {1: (0.0, math.nan)}},
            "device 1, round 1: some of its values are not finite numbers; lower",
        ),
    ],
)
def test_a_reply_that_says_or_is_what_nothing_accounts_for_is_refused(settings, words):
    run = Run()
    with pytest.raises(RoundError) as raised:
        run.start(device=make_device(**settings))
    assert words in str(raised.value)
    assert run.ledger == []


@pytest.mark.parametrize("card", [{"num_examples": 240}, {"groups": {"boiler": 1}}])
def test_a_device_that_tells_what_it_holds_is_refused(card):
    run = Run(fedpt={"wait_timeout_s": 0.1})
    with pytest.raises(RoundError, match="must not say how many examples it has, or of which groups"):
        run.start(device=make_device(card=card))


@pytest.mark.parametrize(
    ("mode", "bits"),
    [("client-fixed", {}), ("client-adaptive", {"norm_bit": 0}), ("client-adaptive", {"norm_bit": 0.0})],
)
def test_a_device_that_does_not_clip_is_refused(mode, bits):
    run = Run(mode, clipping_norm=1.0)
    with pytest.raises(RoundError) as raised:
        run.start(device=make_device(clips=False, metrics=bits))
    assert "device 0, round 1: a device must clip its change to the norm 1 that it was sent; does it" in str(
        raised.value
    )
    assert "device 1, round 1" not in str(raised.value)
    assert run.ledger == []


def test_a_norm_that_is_lost_in_rounding_is_refused_before_anything_is_spent():
    run = Run(clipping_norm=1e-5)
    with pytest.raises(PrivacyError, match=r"1e-05 times the weights' norm of 2\.236: .*, got 1e-05; raise it"):
        run.start()
    assert run.ledger == []


@pytest.mark.parametrize(
    ("owner", "method", "modes"),
    [
        (privacy._SystemNoise, "_add_noise_to_aggregated_arrays", MODES),
        (privacy._Following, "_geometric_update", ["server-adaptive", "client-adaptive"]),
    ],
)
def test_a_flower_that_calls_its_methods_otherwise_ends_the_run(owner, method, modes, monkeypatch):
    monkeypatch.delattr(owner, method)
    for mode in modes:
        run = Run(mode)
        with pytest.raises(PrivacyError, match=r"adds noise in a way that is not accounted for, got 'flwr 1\."):
            run.start()
        assert not run.outcomes


def test_a_device_that_does_not_say_whether_it_clipped_is_refused():
    run = Run("client-adaptive")
    with pytest.raises(RoundError, match="a reply must say whether it was clipped"):
        run.start(device=make_device(clips=False, changes=dict.fromkeys(CHANGES, (0.1, 0.1))))


@pytest.mark.parametrize("mode", MODES)
def test_nothing_of_single_devices_is_in_the_outcome_of_a_round(mode):
    run = Run(mode)
    run.start()
    (outcome,) = run.outcomes
    assert outcome.train_loss is None
    ups = set()
    for device in outcome.devices:
        assert dict(device.metrics) == {"device": device.device, "server-round": 1, "num-examples": 1}
        assert device.update_norm is None
        ups.add(device.bytes_up)
    assert max(ups) - min(ups) <= 1  # its number takes a byte, or, where it is 0, none


def test_a_device_that_is_gone_ends_the_run_with_how_to_go_on():
    run = saved(rounds=1)
    grid = LocalGrid(make_device(), NUM_DEVICES, {"privacy.dp": "server-fixed"})
    grid.online.pop()
    with pytest.raises(RoundError, match="at least 4 devices with examples must be there"):
        run.fedpt.start(grid, start_arrays(), num_rounds=2, timeout=5, first_round=2)


def test_a_device_that_comes_later_has_no_part_in_the_run():
    run = Run()
    grid = LocalGrid(make_device(), NUM_DEVICES, {"privacy.dp": "server-fixed"})
    late = grid.online.pop()
    run.fedpt.after_aggregate = lambda outcome: run.outcomes.append(outcome) or grid.online.add(late)
    run.fedpt.start(grid, start_arrays(), num_rounds=3, timeout=5)
    assert [len(outcome.devices) for outcome in run.outcomes] == [3, 3, 3]
    assert len(run.private.devices) == 3


def test_a_device_that_comes_later_takes_no_place_of_one_that_is_waited_for(monkeypatch):
    """Between rounds device 3 goes and another comes; while the run waits, device 3 comes back."""
    run = Run(fedpt={"wait_timeout_s": 5.0})
    grid = LocalGrid(make_device(), NUM_DEVICES + 1, {"privacy.dp": "server-fixed"})
    node_of = {device: node for node, device in grid.device_of.items()}
    grid.online.discard(node_of[4])

    def swap(outcome):
        run.outcomes.append(outcome)
        if outcome.server_round == 1:
            grid.online.discard(node_of[3])
            grid.online.add(node_of[4])

    run.fedpt.after_aggregate = swap
    monkeypatch.setattr("fedpt_flwr.roster.time.sleep", lambda _seconds: grid.online.add(node_of[3]))
    run.fedpt.start(grid, start_arrays(), num_rounds=2, timeout=5)
    assert [[part.device for part in outcome.devices] for outcome in run.outcomes] == [[0, 1, 2, 3]] * 2


def test_other_devices_than_those_of_the_first_round_are_refused():
    run = saved(rounds=1)
    for devices, sampled in (((0, 1, 2), 3), ((0, 1, 2, 4), 4), ((0, 1, 2, 3), 2)):
        with pytest.raises(PrivacyError, match="goes on with the 4 devices that it began with, 4 a round"):
            run.private.begin(devices, sampled)


def test_half_of_the_devices_a_round_cost_all_of_them_as_much():
    run = Run(fedpt={"fraction_train": 0.5})
    run.start(rounds=2)
    assert run.private.spent()["epsilon"] == epsilon_after(1.0, 2, delta=1e-5)
    assert (run.private.sampled, len(run.private.devices)) == (2, 4)
    assert run.private.described()["noise_stddev"] == 1 / 2


def test_a_delta_that_would_allow_to_publish_one_device_is_refused():
    with pytest.raises(ConfigError) as raised:
        Run(delta=0.3).start()
    assert str(raised.value) == (
        "privacy.delta: delta must be below one over the number of devices, of which there are 4; a larger one allows "
        "to publish all that one of them holds, got 0.3; set privacy.delta=0.01"
    )


@pytest.mark.parametrize("weights", [(1, 2), (2, 2)])
def test_weights_other_than_one_and_missing_replies_are_refused_by_the_average_itself_too(weights):
    run = Run()
    run.private.begin([0, 1], 2)
    arrays = ArrayRecord({"weight": Array(np.zeros(2, np.float32))})
    replies = []
    for node, weight in zip(LocalGrid(make_device(), 2).get_node_ids(), weights, strict=True):
        message = Message(content=RecordDict(), message_type="train", dst_node_id=node)
        content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": weight})})
        replies.append(Message(content=content, reply_to=message))
    with pytest.raises(PrivacyError, match=r"every device must have the weight 1 \(num-examples\)"):
        run.private.aggregate_train(1, replies)
    with pytest.raises(PrivacyError, match="meant for 2 replies, and there are 1; nothing was spent"):
        run.private.aggregate_train(1, replies[:1])
    assert run.ledger == []


def test_devices_are_not_asked_to_evaluate():
    run = Run()
    assert list(run.private.configure_evaluate(1, start_arrays(), ConfigRecord(), None)) == []
    assert run.private.aggregate_evaluate(1, []) is None


# --- the device's part ---


def test_a_device_of_a_run_that_is_not_private_sends_its_change_as_it_is():
    for mode in ("off", "server-fixed", "server-adaptive"):
        grid = LocalGrid(make_device(), 1, {"privacy.dp": mode})
        (node,) = grid.get_node_ids()
        content = RecordDict({"arrays": start_arrays(), "config": ConfigRecord({"server-round": 1})})
        reply = grid.ask(Message(content=content, message_type="train", dst_node_id=node))
        np.testing.assert_allclose(reply.content["arrays"]["weight"].numpy(), [4.0])
        assert "norm_bit" not in reply.content["metrics"]


def test_a_device_that_declines_is_heard():
    def device(message, context):
        if message.metadata.message_type == "query":
            return make_device()(message, context)
        reply = Message(content=RecordDict({"refusal": ConfigRecord({"reason": "no power"})}), reply_to=message)
        return clip_update(message, context, lambda *_: reply)

    with pytest.raises(RoundError, match="no power"):
        Run("client-fixed").start(device=device)
