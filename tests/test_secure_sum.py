"""The protocol of a secure sum by its parts, and then devices and server with nothing between them."""

import copy
import itertools
import random
import re

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpt_flwr.config import SECURE_SUM_WIDTHS
from fedpt_flwr.errors import DeviceError, ReplyError, RoundError
from fedpt_flwr.secure_sum import keys, shamir
from fedpt_flwr.secure_sum.collector import Collector, changed
from fedpt_flwr.secure_sum.device import SECRET_KEY, Device, read_secret
from fedpt_flwr.secure_sum.ring import Ring
from fedpt_flwr.secure_sum.session import KEYS, LOSS_LIMIT, RECORD, REVEAL, SHARES, TAIL, WORDS, Rules

TRAIN = "train"
PHASES = (KEYS, SHARES, TRAIN, REVEAL)

# --- secrets in shares ---


def join(shares):
    return shamir.join(shamir.weights_at_zero(list(shares)), shares)


SECRETS = st.binary(min_size=32, max_size=32)


def is_prime(number, bases=40):
    """Miller and Rabin's test: wrong for a composite number with probability 4 ** -bases."""
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    draw = random.Random(0)
    for _ in range(bases):
        power = pow(draw.randrange(2, number - 1), odd, number)
        if power not in (1, number - 1) and all(
            (power := power * power % number) != number - 1 for _ in range(twos - 1)
        ):
            return False
    return True


def test_the_field_is_one_and_holds_every_secret():
    assert is_prime(shamir.PRIME)
    assert shamir.PRIME >= 2 ** (8 * shamir.SECRET_BYTES)
    assert shamir.PRIME < 2 ** (8 * shamir.SHARE_BYTES)


@st.composite
def sharings(draw):
    """A secret, its threshold, and the points of its shares."""
    points = draw(st.lists(st.integers(1, 10**6), min_size=1, max_size=12, unique=True))
    return draw(SECRETS), draw(st.integers(1, len(points))), points


@settings(deadline=None, max_examples=30)
@given(sharings(), st.randoms())
def test_any_shares_of_enough_give_the_secret_back(sharing, draw):
    secret, threshold, points = sharing
    shares = dict(zip(points, shamir.split(secret, threshold, points), strict=True))
    number = draw.randint(threshold, len(points))
    assert join({point: shares[point] for point in draw.sample(points, number)}) == secret


@settings(deadline=None, max_examples=30)
@given(SECRETS, SECRETS, st.integers(2, 6))
def test_one_share_too_few_is_as_good_with_every_other_secret(secret, other, threshold):
    """With the value at 0 of any secret, these shares lie on one polynomial of the right degree: they rule none out."""
    points = list(range(1, threshold + 1))
    known = dict(zip(points[:-1], shamir.split(secret, threshold, points)[:-1], strict=True))
    # The value at the last point that would make the secret another: solve join for it.
    weights = shamir.weights_at_zero(points)
    rest = sum(weights[point] * int.from_bytes(share, "big") for point, share in known.items())
    last = (int.from_bytes(other, "big") - rest) * pow(weights[points[-1]], -1, shamir.PRIME) % shamir.PRIME
    assert join(known | {points[-1]: last.to_bytes(shamir.SHARE_BYTES, "big")}) == other


def test_a_secret_shared_by_hand():
    # f(x) = 7 + 3x: f(1) = 10, f(2) = 13; the value at 0 is 2 f(1) - f(2) = 7
    shares = {point: value.to_bytes(33, "big") for point, value in ((1, 10), (2, 13))}
    assert join(shares) == (7).to_bytes(32, "big")


def test_two_sharings_of_one_secret_have_nothing_in_common():
    secret, points = bytes(32), [1, 2, 3]
    assert not set(shamir.split(secret, 2, points)) & set(shamir.split(secret, 2, points))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((b"short", 1, [1]), "a secret has 32 bytes"),
        ((bytes(32), 3, [1, 2]), "threshold must be from 1 to the 2 shares"),
        ((bytes(32), 0, [1]), "threshold"),
        ((bytes(32), 1, [1, 1]), "different"),
        ((bytes(32), 1, [0, 1]), "above 0"),
    ],
)
def test_a_sharing_that_is_none_is_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        shamir.split(*arguments)


@pytest.mark.parametrize("share", [b"", bytes(32), shamir.PRIME.to_bytes(33, "big"), (2**256 + 5).to_bytes(33, "big")])
def test_shares_that_are_none_are_refused(share):
    with pytest.raises(ValueError, match=r"is none|not shares of one secret"):
        join({1: share})


# --- numbers in the ring ---


@st.composite
def weighted_numbers(draw):
    """A ring, and the same number of values in its range from each of some devices with their weights."""
    weights = draw(st.lists(st.integers(1, 10**6), min_size=1, max_size=9))
    ring = Ring(
        draw(st.sampled_from(SECURE_SUM_WIDTHS)), draw(st.sampled_from([2**-10, 0.25, 1.0, 300.0])), len(weights)
    )
    values = st.lists(st.floats(-ring.limit, ring.limit, width=32), min_size=3, max_size=3)
    return ring, weights, [np.float32(draw(values)) for _ in weights]


@settings(deadline=None, max_examples=60)
@given(weighted_numbers(), st.data())
def test_a_mean_from_the_ring_is_off_by_half_a_step_for_each_device_at_most(numbers, data):
    ring, weights, values = numbers
    there = data.draw(st.lists(st.sampled_from(range(len(weights))), min_size=1, unique=True))
    total, whole, here = np.zeros(3, ring.dtype), sum(weights), sum(weights[device] for device in there)
    for device in there:
        total += ring.encode(values[device], weights[device] / whole)[0]
    expected = sum(weights[device] * values[device].astype(np.float64) for device in there) / here
    bound = ring.error(len(there), here / whole) * (1 + 1e-9) + 1e-12 * ring.limit
    np.testing.assert_allclose(ring.decode(total, here / whole), expected, rtol=0, atol=bound)


@pytest.mark.parametrize("bits", SECURE_SUM_WIDTHS)
@pytest.mark.parametrize("num_devices", [3, 64, 256])
def test_no_sum_wraps_round_even_of_the_largest_numbers_rounded_away_from_0(bits, num_devices):
    ring = Ring(bits, 1.0, num_devices)
    for sign in (1, -1):
        words, cut = ring.encode(np.float32([sign]), 1 / num_devices)
        assert cut == 0
        mean = ring.decode(np.asarray(words * ring.dtype.type(num_devices)), 1.0)
        assert abs(mean[0] - sign) <= ring.error(num_devices, 1.0)


def test_numbers_beyond_the_range_are_cut_and_counted():
    words, cut = Ring(32, 0.5, 3).encode(np.float32([0.5, 0.6, -9, 0.1]), 1.0)
    assert cut == 2
    np.testing.assert_allclose(Ring(32, 0.5, 3).decode(words, 1.0), [0.5, 0.5, -0.5, 0.1], atol=1e-8)


def test_the_error_by_hand():
    # 16 bits, range 1, 4 devices: step 1 / (2**15 - 1 - 2); two devices of half the weight: 2 * step / 2 / 0.5
    assert Ring(16, 1.0, 4).error(2, 0.5) == pytest.approx(2 / 32765)


# --- keys and masks ---


def test_two_devices_agree_on_a_key_for_each_purpose_and_secret():
    one, two = keys.new_private_key(), keys.new_private_key()
    mine = keys.agree(one, keys.public_key(two), b"a", b"s")
    assert mine == keys.agree(two, keys.public_key(one), b"a", b"s")
    assert (
        len({mine, keys.agree(one, keys.public_key(two), b"b", b"s"), keys.agree(one, keys.public_key(two), b"a")}) == 3
    )


def test_a_public_key_that_gives_no_secret_is_refused():
    with pytest.raises(ValueError, match="shared key"):
        keys.agree(keys.new_private_key(), bytes(32), b"")


def test_what_is_sealed_opens_with_its_key_and_purpose_alone():
    key, text = bytes(range(32)), b"a share"
    sealed = keys.seal(key, text, b"about")
    assert len(sealed) == len(text) + keys.SEAL_BYTES
    assert keys.unseal(key, sealed, b"about") == text
    changed = sealed[:-1] + bytes([sealed[-1] ^ 1])
    for wrong in ((bytes(32), sealed, b"about"), (key, sealed, b"else"), (key, changed, b"about")):
        with pytest.raises(ValueError, match="another key"):
            keys.unseal(*wrong)


def test_a_mask_is_the_stream_of_chacha20():
    words = np.zeros(4, "<u4")
    keys.add_mask(bytes(32), 1, words)
    # RFC 8439, appendix A.1, test vector 1: key and nonce 0, block 0.
    assert words.tobytes().hex() == "76b8e0ada0f13d90405d6ae55386bd28"


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_a_mask_is_the_same_in_pieces_and_comes_off(dtype, monkeypatch):
    whole, start = np.arange(1000).astype(dtype), np.arange(1000).astype(dtype)
    tail = np.zeros(4, "<u4")
    keys.add_mask(b"k" * 32, 1, whole, tail)
    assert (whole != start).mean() > 0.99
    monkeypatch.setattr(keys, "_PIECE_BYTES", 64)
    keys.add_mask(b"k" * 32, -1, whole, tail)
    np.testing.assert_array_equal(whole, start)
    np.testing.assert_array_equal(tail, 0)


# --- devices and server, with nothing between them ---

RULES = Rules(0.7, 1.0, 32)
TOLD = ConfigRecord({"server-round": 1, "code-hash": "ab", "proximal-mu": 0.1})


def model(value=0.0):
    return ArrayRecord({"b": Array(np.full((2, 3), value, np.float32)), "a": Array(np.full(5, value, np.float32))})


def changes_of(device, server_round=1):
    draw = np.random.default_rng([device, server_round])
    return {"a": draw.uniform(-0.3, 0.3, 5).astype(np.float32), "b": draw.uniform(-0.3, 0.3, (2, 3)).astype(np.float32)}


class Round:
    """A round of devices that tell the server what they should, unless a test says otherwise.

    Args:
        num_devices: Numbered from 0; device ``n`` has ``n + 1`` examples and a loss of ``n``.
        drop: Devices that fall silent, by phase.
        tell: Called with (phase, device, question); what the device is asked instead.
        answer: Called with (phase, device, content); what the server gets instead.
    """

    def __init__(
        self, num_devices=5, *, rules=RULES, drop=None, tell=None, answer=None, secrets=None, sent=None, told=None
    ):
        self.sent = sent or {device: model() for device in range(num_devices)}
        self.devices = {
            device: Device(device, rules, RecordDict(), (secrets or {}).get(device, b""))
            for device in range(num_devices)
        }
        self.weights = {device: device + 1 for device in self.devices}
        self.told = told or dict.fromkeys(self.devices, TOLD)
        self.collector = Collector(1, self.weights, rules, self.sent[0], self.told[0])
        self.drop, self.tell, self.answer = drop or {}, tell or (lambda *a: a[2]), answer or (lambda *a: a[2])
        self.changes = {device: changes_of(device) for device in self.devices}
        self.server_saw: list[RecordDict] = []
        self.refused: dict[int, str] = {}

    def run(self):
        here = list(self.devices)
        for phase in PHASES:
            here = [device for device in here if device not in self.drop.get(phase, ())]
            here = [device for device in here if self.ask(phase, device)]
            self.collector.check_enough(phase)
        return self.collector.open()

    def ask(self, phase, device):
        question = self.tell(phase, device, copy.deepcopy(self.collector.question(phase, device)))
        try:
            content = self.respond(phase, device, RecordDict({RECORD: question}))
        except DeviceError as error:
            self.refused[device] = str(error)
            return False
        content = self.answer(phase, device, content)
        self.server_saw.append(content)
        self.collector.take(phase, device, content, place=f"device {device}, round 1")
        return True

    def respond(self, phase, number, content):
        device = self.devices[number]
        if phase != TRAIN:
            act = {KEYS: device.offer_keys, SHARES: device.share_secrets, REVEAL: device.reveal}[phase]
            return act(content)
        answered = device.join(content).answer(
            sorted(self.changes[number].items()),
            self.sent[number],
            self.told[number],
            num_examples=self.weights[number],
            train_loss=float(number),
        )
        return RecordDict({"arrays": answered})

    def mean(self, there):
        whole = sum(self.weights[device] for device in there)
        return {
            name: sum(self.weights[n] * self.changes[n][name].astype(np.float64) for n in there) / whole
            for name in ("a", "b")
        }


def assert_is_mean(opened, expected, there):
    assert opened.num_devices == len(there)
    assert opened.num_examples == sum(device + 1 for device in there)
    loss = sum((device + 1) * device for device in there) / opened.num_examples
    assert opened.train_loss == pytest.approx(loss, abs=LOSS_LIMIT * 1e-6)
    for name, values in expected.items():
        assert opened.changes[name].shape == values.shape
        np.testing.assert_allclose(opened.changes[name], values, rtol=0, atol=opened.error)


@pytest.mark.parametrize("bits", SECURE_SUM_WIDTHS)
@pytest.mark.parametrize(
    "drop",
    [
        {},
        {KEYS: [0]},
        {SHARES: [3]},
        {TRAIN: [1]},
        {REVEAL: [2]},
        {KEYS: [7], SHARES: [6], TRAIN: [1]},
        {TRAIN: [0, 7]},
        {TRAIN: [4], REVEAL: [7]},
    ],
    ids=str,
)
def test_the_sum_is_that_of_those_who_answered_whoever_drops_out_when(drop, bits):
    summing = Round(8, rules=Rules(0.7, 0.5, bits), drop=drop)
    gone = set(itertools.chain(*(devices for phase, devices in drop.items() if phase != REVEAL)))
    there = [device for device in range(8) if device not in gone]
    opened = summing.run()
    assert opened.error < (1e-3 if bits == 16 else 1e-8)
    assert_is_mean(opened, summing.mean(there), there)


@pytest.mark.parametrize("phase", PHASES)
def test_with_one_device_fewer_than_the_threshold_nothing_is_opened(phase):
    gone = [1, 4, 6]  # of 8 six must stay
    summing = Round(8, drop={phase: gone})
    if phase == KEYS:  # they have not begun: of the other five four must stay
        assert_is_mean(summing.run(), summing.mean([0, 2, 3, 5, 7]), [0, 2, 3, 5, 7])
        return
    with pytest.raises(RoundError, match=r"that 8 devices begin needs 6 of them to its end, and 5 answered"):
        summing.run()


@pytest.mark.parametrize(
    ("num_devices", "threshold"), [(3, 3), (4, 3), (5, 4), (8, 6), (10, 7), (30, 21), (64, 45), (256, 180)]
)
def test_so_many_must_stay(num_devices, threshold):
    assert RULES.threshold(num_devices) == threshold
    assert 2 * Rules(0.500001, 1.0, 32).threshold(num_devices) > num_devices
    assert Rules(1.0, 1.0, 32).threshold(num_devices) == num_devices


@pytest.mark.parametrize(("num_devices", "threshold"), [(3, 5), (5, 5), (6, 5), (8, 6)])
def test_no_fewer_must_stay_than_a_round_needs_whatever_the_server_begins_with(num_devices, threshold):
    assert Rules(0.7, 1.0, 32, 5).threshold(num_devices) == threshold


def test_a_device_helps_to_open_no_sum_of_fewer_than_a_round_needs():
    rules = Rules(0.7, 1.0, 32, 5)  # of 6 devices 5 would do by their share
    with pytest.raises(RoundError, match="that 4 devices begin needs 5 of them to its end"):
        Round(4, rules=rules).run()
    summing = Round(6, rules=rules, tell=only(2, REVEAL, lambda question: question.update({"stayed": [0, 1, 2, 3]})))
    summing.run()
    assert "of 6 devices at least 5 must stay in a secure sum, got 4" in summing.refused[2]


def test_two_devices_are_too_few():
    with pytest.raises(RoundError, match="that 2 devices begin needs 3 of them to its end, and 2 answered with their"):
        Round(2).run()


def test_sums_do_not_depend_on_the_keys_that_were_drawn():
    first, second = Round(5), Round(5)
    opened, again = first.run().changes, second.run().changes
    assert opened.keys() == again.keys()
    for name, values in opened.items():
        np.testing.assert_array_equal(values, again[name])
    masked = [next(c for c in part.server_saw if c.array_records)["arrays"][WORDS].numpy() for part in (first, second)]
    assert (masked[0] != masked[1]).all()


def test_the_server_gets_the_new_arrays_by_adding_what_was_changed():
    summing = Round(4)
    opened = summing.run()
    got = dict(changed(model(0.5), opened))
    for name, values in summing.mean(range(4)).items():
        assert got[name].dtype == np.float32
        np.testing.assert_allclose(got[name], 0.5 + values, rtol=0, atol=opened.error + 2**-25)


def test_a_masked_answer_is_noise_and_the_sum_is_too_until_its_masks_are_opened():
    """Each bit of the words is as often 1 as 0; the chance that an honest one fails here is below 1e-9."""
    big = {"a": np.full(20_000, 0.25, np.float32)}
    sent = {device: ArrayRecord({"a": Array(np.zeros(20_000, np.float32))}) for device in range(3)}
    summing = Round(3, sent=sent)
    summing.changes = dict.fromkeys(range(3), big)
    summing.run()
    masked = [content["arrays"][WORDS].numpy() for content in summing.server_saw if content.array_records]
    assert len(masked) == 3
    for words in (*masked, np.sum(masked, axis=0, dtype=masked[0].dtype)):
        bits = np.unpackbits(words.view(np.uint8).reshape(-1, 4), axis=1)
        np.testing.assert_allclose(bits.mean(axis=0), 0.5, atol=0.025)


def test_values_beyond_the_range_are_counted_over_all_devices():
    summing = Round(3, rules=Rules(0.7, 0.1, 32))
    expected = sum(int((np.abs(part) > np.float32(0.1)).sum()) for c in summing.changes.values() for part in c.values())
    assert summing.run().num_cut == expected > 0


# --- what a device refuses ---


def only(device, phase, change):
    """Tell one device something else in one phase."""

    def tell(told_phase, told_device, question):
        if (told_phase, told_device) == (phase, device):
            change(question)
        return question

    return tell


def swap_keys(question):
    """What a server would do that takes the place of device 0 before device 2."""
    question["share-keys"] = [keys.public_key(keys.new_private_key()), *question["share-keys"][1:]]


def drop_own(question):
    question["mask-keys"] = [*question["mask-keys"][:2], bytes(range(32)), *question["mask-keys"][3:]]


def without_devices(count):
    def change(question):
        for name in ("devices", "mask-keys", "share-keys"):
            question[name] = question[name][:count]

    return change


REFUSALS = {
    "its own key changed": (SHARES, drop_own, "must pass on the keys that this device offered"),
    "two devices": (SHARES, without_devices(2), r"needs 3 to 256 devices, got 2; see min-replies"),
    "no device": (SHARES, without_devices(0), "needs 3 to 256 devices, got 0"),
    "a key twice": (
        SHARES,
        lambda q: q.update({"mask-keys": [q["mask-keys"][1], *q["mask-keys"][1:]]}),
        "every key another",
    ),
    "a list of numbers that is none": (SHARES, lambda q: q.update({"devices": 5}), "must be at most 256 whole numbers"),
    "keys that are none": (SHARES, lambda q: q.update({"mask-keys": [b"x"] * 5}), "must be 32 bytes"),
    "another round": (SHARES, lambda q: q.update({"round": 2}), "has lost its thread"),
    "shares of nobody": (TRAIN, lambda q: q.update({"from": [], "sealed": []}), "of 5 devices at least 4 must stay"),
    "shares of a stranger": (TRAIN, lambda q: q.update({"from": [0, 1, 3, 9]}), "from other devices of the round"),
    "shares of itself": (TRAIN, lambda q: q.update({"from": [0, 1, 2, 3]}), "from other devices of the round"),
    "shares of another": (
        TRAIN,
        lambda q: q.update({"sealed": q["sealed"][::-1]}),
        r"what device 0 sealed for it cannot be opened; have all devices the same file secure-sum-secret",
    ),
    "too few that stayed": (REVEAL, lambda q: q.update({"stayed": [1, 2, 3]}), "at least 4 must stay in a secure sum"),
    "others that stayed": (REVEAL, lambda q: q.update({"stayed": [1, 2, 3, 4, 9]}), "must have taken part"),
    "without it": (REVEAL, lambda q: q.update({"stayed": [0, 1, 3, 4]}), "must have taken part, as this device did"),
    "nothing": (REVEAL, lambda q: q.clear(), "round of the record secure-sum must be a whole number"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_device_refuses(name):
    phase, change, said = REFUSALS[name]
    summing = Round(5, tell=only(2, phase, change))
    opened = summing.run()
    assert re.search(said, summing.refused[2])
    there = [0, 1, 2, 3, 4] if phase == REVEAL else [0, 1, 3, 4]
    assert_is_mean(opened, summing.mean(there), there)


def test_devices_that_were_told_different_keys_do_not_open_each_others_shares():
    """A server that stands between device 2 and the others gets nothing: no device sends its change."""
    summing = Round(5, tell=only(2, SHARES, swap_keys))
    with pytest.raises(RoundError, match="0 answered with their change"):
        summing.run()
    assert all("cannot be opened" in summing.refused[device] for device in range(5))
    assert not any(content.array_records for content in summing.server_saw)


def test_devices_that_were_sent_different_models_have_masks_that_do_not_cancel():
    sent = {device: model(float(device == 2)) for device in range(5)}
    with pytest.raises(RoundError, match="do not open the masks of the sum"):
        Round(5, sent=sent).run()


@pytest.mark.parametrize(
    "other", [{"server-round": 2}, {"proximal-mu": 0.2}, {"proximal-mu": None}, {"new": 1}], ids=str
)
def test_devices_that_were_told_to_train_in_different_ways_have_masks_that_do_not_cancel(other):
    changed = {name: value for name, value in ({**TOLD} | other).items() if value is not None}
    told = dict.fromkeys(range(5), TOLD) | {2: ConfigRecord(changed)}
    with pytest.raises(RoundError, match="do not open the masks of the sum"):
        Round(5, told=told).run()


def test_a_device_with_another_secret_stops_the_round_before_anybody_has_sent_anything_and_is_named():
    secrets = dict.fromkeys(range(4), b"s" * 32)
    summing = Round(4, secrets=secrets | {3: b""})
    with pytest.raises(RoundError):
        summing.run()
    assert all("what device 3 sealed for it cannot be opened" in summing.refused[device] for device in range(3))
    assert not any(content.array_records for content in summing.server_saw)
    assert_is_mean(Round(4, secrets=secrets).run(), Round(4).mean(range(4)), range(4))


def test_a_device_is_in_one_sum_a_round_and_answers_each_question_once():
    summing = Round(3)
    summing.run()
    device = summing.devices[1]
    again = RecordDict({RECORD: ConfigRecord({"round": 1})})
    with pytest.raises(DeviceError, match=r"has been in that of round 1; two sums over other devices would give away"):
        device.offer_keys(again)
    with pytest.raises(DeviceError, match="has lost its thread"):
        device.reveal(RecordDict({RECORD: summing.collector.question(REVEAL, 1)}))
    assert set(device.state.config_records[RECORD]) == {"phase", "summed"}  # no secret is kept
    device.offer_keys(RecordDict({RECORD: ConfigRecord({"round": 2})}))


def test_a_device_cannot_be_asked_for_its_keys_again_after_it_has_answered_with_its_change():
    summing = Round(3, drop={REVEAL: [0, 1, 2]})
    with pytest.raises(RoundError, match="0 answered with the shares that open it"):
        summing.run()
    with pytest.raises(DeviceError, match="a device is in one sum a round"):
        summing.devices[0].offer_keys(RecordDict({RECORD: ConfigRecord({"round": 1})}))


def test_a_device_that_lost_its_memory_is_out_of_the_round():
    def forget(phase, device, question):
        if (phase, device) == (TRAIN, 2):
            summing.devices[2].state.config_records.clear()
        return question

    summing = Round(5, tell=forget)
    there = [0, 1, 3, 4]
    assert_is_mean(summing.run(), summing.mean(there), there)
    assert "was its SuperNode restarted? It takes part again in the next round" in summing.refused[2]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_change_that_is_no_number_never_leaves_its_device(value):
    summing = Round(5)
    summing.changes[3]["a"][1] = value
    there = [0, 1, 2, 4]
    assert_is_mean(summing.run(), summing.mean(there), there)
    assert "device 3, round 1: array a: some of its values are not finite numbers" in summing.refused[3]


def test_a_device_with_more_examples_than_all_together_refuses():
    summing = Round(5)
    summing.collector._weights = dict.fromkeys(range(5), 1)
    summing.weights[2] = 6
    with pytest.raises(RoundError, match="no more than the 4"):
        summing.run()
    assert "cannot have more examples than all have together, got '6 of 5'" in summing.refused[2]


def test_a_secret_is_read_from_the_file_that_the_node_config_names(tmp_path):
    path = tmp_path / "devices.secret"
    place = "device 1"
    assert read_secret({}, place=place) == b""
    with pytest.raises(
        DeviceError, match="device 1, node config, secure-sum-secret: the file .* cannot be read"
    ) as error:
        read_secret({SECRET_KEY: str(path)}, place=place)
    assert str(path) not in str(error.value)
    path.write_text("short\n")
    with pytest.raises(DeviceError, match=r"at least 16 bytes, got 5; make one with `openssl rand -hex 32`"):
        read_secret({SECRET_KEY: str(path)}, place=place)
    path.write_text("0123456789abcdef\n")
    first = read_secret({SECRET_KEY: str(path)}, place=place)
    path.write_text("0123456789abcdef")
    assert read_secret({SECRET_KEY: str(path)}, place=place) == first != b""


# --- what the server refuses ---


def with_record(**values):
    return lambda content: RecordDict({**content, RECORD: ConfigRecord({**content.config_records[RECORD], **values})})


def with_arrays(**values):
    return lambda content: RecordDict({"arrays": ArrayRecord({**content["arrays"], **values})})


BAD_ANSWERS = {
    "no record": (KEYS, lambda content: RecordDict({}), "must hold a record secure-sum"),
    "a short key": (KEYS, with_record(**{"mask-key": b"x"}), "mask-key of the record secure-sum must be 32 bytes"),
    "no key": (KEYS, with_record(**{"mask-key": 5}), "must be 32 bytes, got 'int'"),
    "too few shares": (SHARES, with_record(sealed=[b"x"]), "must be 4 texts of 94 bytes"),
    "no arrays": (TRAIN, lambda content: RecordDict({}), "one record of arrays"),
    "other arrays": (TRAIN, lambda content: RecordDict({"arrays": model()}), "must hold the arrays words, tail"),
    "other words": (TRAIN, with_arrays(words=Array(np.zeros(10, "<u4"))), "must be 11 numbers of type uint32"),
    "floats": (TRAIN, with_arrays(words=Array(np.zeros(11, np.float32))), "must be 11 numbers of type uint32, got"),
    "what cannot be decoded": (
        TRAIN,
        with_arrays(words=Array("uint32", (11,), "numpy.ndarray", b"\x93NUMPY\x01\x00...")),
        "cannot be decoded",
    ),
    "too many bytes": (
        TRAIN,
        with_arrays(words=Array("uint32", (11,), "numpy.ndarray", bytes(9999))),
        "more bytes than its shape needs",
    ),
    "another shape than it claims": (
        TRAIN,
        with_arrays(words=Array("uint32", (11,), "numpy.ndarray", Array(np.zeros(12, "<u4")).data)),
        "must hold 11 numbers",
    ),
    "shares of too few": (REVEAL, with_record(shares=[b"x" * 33]), "must be 5 texts of 33 bytes"),
}


@pytest.mark.parametrize("name", BAD_ANSWERS)
def test_the_server_refuses(name):
    phase, spoil, said = BAD_ANSWERS[name]
    spoiled = lambda told, device, content: spoil(content) if (told, device) == (phase, 2) else content  # noqa: E731
    summing = Round(5, answer=spoiled)
    with pytest.raises(ReplyError, match=said) as error:
        summing.run()
    assert "device 2, round 1" in str(error.value)


def test_the_server_refuses_a_key_that_another_device_offered():
    stolen = {}

    def answer(phase, device, content):
        if phase == KEYS:
            return stolen.setdefault("keys", content)
        return content

    with pytest.raises(ReplyError, match="a device's keys must be its own"):
        Round(3, answer=answer).run()


def wrong_shares(device):
    def answer(phase, told, content):
        if (phase, told) != (REVEAL, device):
            return content
        return with_record(shares=[bytes(33)] * len(content[RECORD]["shares"]))(content)

    return answer


@pytest.mark.parametrize("drop", [{}, {TRAIN: [4]}])
def test_shares_that_are_made_up_open_nothing(drop):
    with pytest.raises(RoundError, match="the shares that devices gave do not open the masks of"):
        Round(5, drop=drop, answer=wrong_shares(0)).run()


def added(position, number, part=WORDS):
    """A device that adds a number to its masked answer, as one that means harm can."""

    def answer(phase, device, content):
        if (phase, device) == (TRAIN, 2):
            words = content["arrays"][part].numpy().copy()
            words[position : position + 1] += words.dtype.type(number)  # wraps round
            content["arrays"][part] = Array(words)
        return content

    return answer


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (added(0, 1, TAIL), "do not open the masks of the sum"),
        (added(1, 100, TAIL), "on no more than the 15 that they said they have, got 115"),
        (added(1, 2**32 - 14, TAIL), "5 devices must have trained on as many examples at least"),
        (added(2, 2**31, TAIL), "nor a loss below 0"),
    ],
)
def test_what_can_be_checked_of_a_sum_is(answer, said):
    with pytest.raises(RoundError, match=said):
        Round(5, answer=answer).run()


def test_a_mean_beyond_the_range_is_refused():
    """Of four of five devices the whole range of the ring is more than theirs can give."""
    with pytest.raises(RoundError, match="the mean of changes of at most 1 cannot be larger"):
        Round(5, drop={TRAIN: [4]}, answer=added(3, 2**31 - 1)).run()
