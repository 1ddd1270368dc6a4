import io
import json
import math
import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedpt_flwr import records
from fedpt_flwr.errors import DeviceError, ReplyError, WireError
from fedpt_flwr.records import (
    CONFIG,
    METRICS,
    DeviceCard,
    as_tensors,
    changes_of,
    check_arrays,
    check_code,
    check_metrics,
    code_hash,
    from_reply,
    message_bytes,
    refusal,
    refusal_reason,
    sent_as,
    to_array_record,
    to_int8_reply,
    to_reply,
    to_tensors,
    to_wire,
)

PLACE = "device 3, round 2"


# --- arrays, there and back ---


def test_tensors_come_back_as_they_were_sent():
    sent = {"w": torch.randn(3, 4), "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4)}
    arrived = to_tensors(to_array_record(sent))
    assert list(arrived) == list(sent)
    for name, tensor in sent.items():
        assert torch.equal(arrived[name], tensor)
        assert arrived[name].shape == tensor.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_float_type_travels_as_float32(dtype):
    sent = {"w": torch.tensor([1.5, -0.15625, 3.0], dtype=dtype)}
    record = to_array_record(sent)
    assert record["w"].dtype == "float32"
    assert torch.equal(to_tensors(record)["w"], torch.tensor([1.5, -0.15625, 3.0]))


def test_views_and_weights_with_gradients_are_sent_by_value():
    weight = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    assert torch.equal(to_tensors(to_array_record({"w": weight.T}))["w"], weight.detach().T)


def test_no_arrays_make_an_empty_record():
    assert to_tensors(to_array_record({})) == {}
    assert len(check_arrays(ArrayRecord(), ArrayRecord(), place=PLACE)) == 0


def test_tensors_that_were_read_can_be_changed_without_changing_the_record():
    record = to_array_record({"w": torch.zeros(2)})
    to_tensors(record)["w"].add_(1)
    assert torch.equal(to_tensors(record)["w"], torch.zeros(2))


def test_a_message_of_4_megabytes_has_at_most_2_percent_more_than_its_arrays():
    # 40 arrays of 160 x 160 float32: 4 096 000 bytes.
    record = to_array_record({f"model.layers.{n}.self_attn.q_proj.weight": torch.zeros(160, 160) for n in range(40)})
    content = RecordDict(
        {
            "arrays": record,
            METRICS: MetricRecord({f"metric-{number}": 1.0 for number in range(12)}),
            CONFIG: ConfigRecord({"server-round": 1}),
        }
    )
    assert 4_096_000 < message_bytes(content) <= 1.02 * 4_096_000


# --- half the bytes ---


HALVES = {"float16": (torch.float16, 11), "bfloat16": (torch.bfloat16, 8)}


def weights(seed=0):
    return {"w": torch.randn(64, 32, generator=torch.Generator().manual_seed(seed)), "s": torch.tensor(0.25)}


@pytest.mark.parametrize("dtype", HALVES)
def test_the_server_sends_what_torch_makes_of_its_arrays_in_that_type(dtype):
    sent = to_tensors(to_wire(to_array_record(weights()), dtype, place=PLACE), dtype)
    for name, values in weights().items():
        assert torch.equal(sent[name], values.to(HALVES[dtype][0]).float())


@pytest.mark.parametrize("dtype", ["float32", *HALVES])
def test_a_message_of_half_the_precision_has_half_the_bytes(dtype):
    arrays = {f"model.layers.{n}.weight": torch.zeros(160, 160) for n in range(80)}
    size = 80 * 160 * 160 * (4 if dtype == "float32" else 2)
    content = RecordDict({"arrays": to_wire(to_array_record(arrays), dtype, place=PLACE)})
    assert size < message_bytes(content) <= 1.02 * size


@pytest.mark.parametrize("dtype", HALVES)
def test_what_a_device_changed_is_rounded_and_not_the_arrays_themselves(dtype):
    """Its error is a part of the change: at most half a unit in the last of the type's bits."""
    server = to_array_record(weights())
    received = to_wire(server, dtype, place=PLACE)
    base = to_tensors(received, dtype)
    change = {name: 1e-3 * torch.ones_like(values) + 1e-4 * values for name, values in base.items()}
    reply = to_reply({name: base[name] + change[name] for name in base}, received, dtype, place=PLACE)
    reply = check_arrays(reply, server, place=PLACE, dtype=dtype)
    for name, values in from_reply(reply, server, dtype):
        # That much of the change, and what float32 rounds where the change is added on the device and on the server.
        bound = change[name].abs() * 2.0 ** -HALVES[dtype][1] + 4 * weights()[name].abs() * 2.0**-24 + 1e-7
        assert ((torch.from_numpy(np.array(values)) - weights()[name] - change[name]).abs() <= bound).all()


@pytest.mark.parametrize("dtype", HALVES)
def test_a_device_that_changes_nothing_leaves_the_server_its_exact_arrays(dtype):
    server = to_array_record(weights())
    received = to_wire(server, dtype, place=PLACE)
    reply = to_reply(to_tensors(received, dtype), received, dtype, place=PLACE)
    for name, values in from_reply(reply, server, dtype):
        assert torch.equal(torch.from_numpy(np.array(values)), weights()[name])


def test_a_number_that_float16_cannot_hold_is_refused_before_it_becomes_infinite():
    arrays = {"w": torch.tensor([1.0, 70000.0, -80000.0])}
    with pytest.raises(WireError) as raised:
        to_array_record(arrays, "float16", place=PLACE)
    assert str(raised.value) == (
        f"{PLACE}: array w: float16 holds numbers up to 65504, which 2 of 3 exceed, got 80000.0; "
        "set wire.dtype='float32' or 'bfloat16'"
    )
    assert torch.equal(to_tensors(to_array_record(arrays, "bfloat16"), "bfloat16")["w"], arrays["w"].bfloat16().float())


@pytest.mark.parametrize("dtype", ["float32", *HALVES])
def test_a_device_that_diverged_is_told_so_in_every_type(dtype):
    server = to_array_record({"w": torch.zeros(2)})
    reply = to_reply({"w": torch.tensor([1.0, math.nan])}, to_wire(server, dtype, place=PLACE), dtype, place=PLACE)
    with pytest.raises(ReplyError, match="some of its values are not finite numbers; lower train.learning-rate"):
        check_arrays(reply, server, place=PLACE, dtype=dtype)


def test_tensors_that_share_a_records_memory_hold_its_values():
    record = to_array_record(weights())
    for name, values in as_tensors(record).items():
        assert torch.equal(values, weights()[name])


# --- arrays that are refused ---


def sent_record():
    return ArrayRecord({"b": Array(np.zeros((2, 2), np.float32)), "a": Array(np.ones(3, np.float32))})


def reply_with(array):
    """A reply that is right but for its array ``b``."""
    return ArrayRecord({"b": array, "a": Array(np.ones(3, np.float32))})


def claimed(data, *, dtype="float32", shape=(2, 2), stype="numpy.ndarray"):
    """An array that claims to be what was asked for, whatever its bytes are."""
    return Array(dtype, shape, stype, data)


def npy(header, body=b"", version=(1, 0)):
    text = header if isinstance(header, str) else f"{header!r}"
    return b"\x93NUMPY" + bytes(version) + len(text).to_bytes(2, "little") + text.encode("latin1") + body


def saved(array, **settings):
    file = io.BytesIO()
    np.save(file, array, **settings)
    return file.getvalue()


def refused(record):
    with pytest.raises(ReplyError) as raised:
        check_arrays(record, sent_record(), place=PLACE)
    assert str(raised.value).startswith(PLACE)
    return str(raised.value)


def test_a_reply_of_what_was_sent_is_accepted_in_the_order_in_which_it_was_sent():
    record = ArrayRecord({"a": Array(np.full(3, 7, np.float32)), "b": Array(np.full((2, 2), 8, np.float32))})
    checked = check_arrays(record, sent_record(), place=PLACE)
    assert list(checked) == ["b", "a"]
    assert np.array_equal(checked["a"].numpy(), np.full(3, 7, np.float32))
    assert np.array_equal(checked["b"].numpy(), np.full((2, 2), 8, np.float32))


def test_a_check_changes_neither_what_arrived_nor_what_was_sent():
    record, sent = reply_with(Array(np.ones((2, 2), np.float32))), sent_record()
    before = {name: (array.dtype, array.shape, array.data) for name, array in [*record.items(), *sent.items()]}
    checked = check_arrays(record, sent, place=PLACE)
    assert checked is not record
    assert {name: (array.dtype, array.shape, array.data) for name, array in [*record.items(), *sent.items()]} == before


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.uint16])
def test_a_type_that_the_config_does_not_name_is_refused(dtype):
    text = refused(reply_with(Array(np.ones((2, 2), dtype))))
    assert f"array b: must be float32, as wire.dtype says, got '{np.dtype(dtype).name}'" in text


def test_half_precision_is_asked_for_by_its_name_and_nothing_else_is_taken():
    halves = ArrayRecord({"b": Array(np.ones((2, 2), np.float16)), "a": Array(np.ones(3, np.float16))})
    assert check_arrays(halves, sent_record(), place=PLACE, dtype="float16")["b"].dtype == "float16"
    with pytest.raises(ReplyError, match="array b: must be bfloat16, carried as uint16, as wire.dtype says, got 'flo"):
        check_arrays(halves, sent_record(), place=PLACE, dtype="bfloat16")
    with pytest.raises(ReplyError, match="must be float16, as wire.dtype says, got 'float32'"):
        check_arrays(sent_record(), sent_record(), place=PLACE, dtype="float16")


def int8_reply(changes, start=0.25, residual=None):
    """What arrives of changes to arrays that all were ``start``; with what is lost."""
    server = to_array_record({name: torch.full(change.shape, start) for name, change in changes.items()})
    received = to_wire(server, sent_as("int8"), place="")
    tuned = {name: start + change for name, change in changes.items()}
    return server, *to_int8_reply(tuned, received, residual or {})


def test_a_change_in_8_bits_is_added_to_what_the_server_did_not_round():
    changes = {"b": torch.randn(30, 40), "a": torch.tensor(0.5)}
    # 0.1 is none of float16's numbers: the device begins with another one, and its change is what counts.
    server, record, lost = int8_reply(changes, start=0.1)
    checked = check_arrays(record, server, place=PLACE, dtype="int8")
    got = dict(from_reply(checked, server, "int8"))
    for name, change in changes.items():
        assert got[name].shape == change.shape
        np.testing.assert_allclose(got[name] + lost[name], 0.1 + change.numpy(), atol=1e-4)
        assert np.abs(lost[name]).max() <= 0.51 * float(change.abs().max()) / 127 + 1e-7
    assert message_bytes(RecordDict({"arrays": record})) == records.array_bytes({"b": (30, 40), "a": ()}, "int8")


def test_what_a_change_lost_is_in_the_next_one():
    changes = {"w": torch.tensor([1.0, 0.003])}
    server, first, lost = int8_reply(changes)
    _, second, _ = int8_reply(changes, residual={"w": np.float32([0.0, 0.003])})
    assert dict(from_reply(first, server, "int8"))["w"][1] == 0.25
    assert lost["w"][1] == pytest.approx(0.003, rel=1e-4)
    assert dict(from_reply(second, server, "int8"))["w"][1] == pytest.approx(0.25 + 1 / 127, rel=1e-4)


def packed(scales, whole):
    return Array(np.concatenate([np.float32(scales).view(np.int8), np.int8(whole)]))


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (packed([1], [1, 2, 3]), "must have shape (8,), got (7,)"),
        (Array(np.zeros((2, 2), np.int8)), "must have shape (8,), got (2, 2)"),
        (Array(np.zeros(8, np.uint8)), "must be int8, as wire.dtype says, got 'uint8'"),
        (Array(np.zeros(8, np.float32)), "must be int8, as wire.dtype says, got 'float32'"),
        (packed([np.nan], [1, 2, 3, 4]), "some of its scales are not finite numbers of at least 0; lower train"),
        (packed([-1], [1, 2, 3, 4]), "some of its scales are not finite numbers of at least 0"),
        (packed([3e38], [1, 2, 3, 4]), "some of its scales are not finite numbers of at least 0"),
        (packed([1], [1, 2, 3, -128]), "its values must be from -127 to 127"),
    ],
)
def test_8_bits_that_are_made_up_are_refused(array, words):
    record = ArrayRecord({"b": array, "a": packed([0], [0, 0, 0])})
    with pytest.raises(ReplyError) as raised:
        check_arrays(record, sent_record(), place=PLACE, dtype="int8")
    assert str(raised.value).startswith(f"{PLACE}: array b: {words}")


def test_a_change_that_is_not_finite_is_found_where_it_arrives():
    server, record, _ = int8_reply({"w": torch.tensor([1.0, float("nan")])})
    with pytest.raises(ReplyError, match="scales are not finite numbers"):
        check_arrays(record, server, place=PLACE, dtype="int8")


def test_the_rank_of_a_device_is_part_of_its_card_and_of_its_shard():
    card = DeviceCard(device=1, num_examples=2, groups={}, code_hash="", lora_rank=4)
    assert DeviceCard.from_content(card.to_content(), place=PLACE) == card
    assert DeviceCard.from_shard(card.shard(), place=PLACE) == card
    assert "lora_rank" not in DeviceCard(device=1, num_examples=2, groups={}, code_hash="").shard()
    made_up = card.to_content()
    made_up[CONFIG]["lora-rank"] = -1
    with pytest.raises(ReplyError, match="must say its number"):
        DeviceCard.from_content(made_up, place=PLACE)


def test_an_array_in_columns_first_order_keeps_its_values():
    values = np.asfortranarray(np.arange(4, dtype=np.float32).reshape(2, 2))
    checked = check_arrays(reply_with(Array(values)), sent_record(), place=PLACE)["b"]
    assert np.array_equal(checked.numpy(), values)


def test_arrays_without_dimensions_are_checked_too():
    sent = ArrayRecord({"s": Array(np.array(1.0, np.float32))})
    two = ArrayRecord({"s": Array(np.array(2.0, np.float32))})
    assert check_arrays(two, sent, place=PLACE)["s"].numpy() == 2
    with pytest.raises(ReplyError, match=r"must have shape \(\), got \(1,\)"):
        check_arrays(ArrayRecord({"s": Array(np.ones(1, np.float32))}), sent, place=PLACE)


def test_a_missing_and_an_unknown_array_are_counted_and_named():
    record = ArrayRecord({"b": Array(np.zeros((2, 2), np.float32)), "evil": Array(np.zeros(1, np.float32))})
    assert refused(record) == (
        f"{PLACE}: a reply must hold the 2 arrays that were sent, got \"1 missing ['a'], 1 unknown ['evil']\"; "
        "was the device started with other tuning settings or another model.small?"
    )
    assert "2 missing" in refused(ArrayRecord())


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (Array(np.zeros((2, 3), np.float32)), r"array b: must have shape (2, 2), got (2, 3); was the device"),
        (Array(np.zeros((4,), np.float32)), "must have shape (2, 2), got (4,)"),
        (Array(np.zeros((2, 2), np.int64)), "must be float32, as wire.dtype says, got 'int64'"),
        (Array(np.zeros((2, 2), bool)), "must be float32, as wire.dtype says, got 'bool'"),
        (Array(np.zeros((2, 2), np.complex64)), "must be float32, as wire.dtype says, got 'complex64'"),
        (Array(np.array([[1, np.nan], [np.nan, 1]], np.float32)), "some of its values are not finite numbers"),
        (Array(np.array([[1, np.inf], [1, 1]], np.float32)), "some of its values are not finite numbers"),
        (Array(np.array([[1, -np.inf], [1, 1]], np.float32)), "some of its values are not finite numbers"),
        (claimed(saved(np.zeros(5000, np.float32))), "holds more bytes than its shape needs, got 20128"),
        (claimed(b""), "must be in NumPy's format, got b''"),
        (claimed(b"\x80\x04nonsense"), "must be in NumPy's format"),
        (claimed(b"PK\x03\x04nonsense"), "must be in NumPy's format"),
        (claimed(b"PK\x05\x06" + bytes(18)), "must be in NumPy's format"),
        (claimed(b"\x93NUMPY"), "cannot be decoded"),
        (claimed(b"\x93NUMPY\x09\x09"), "cannot be decoded"),
        (claimed(saved(np.zeros((2, 2), np.float32))[:-1]), "cannot be decoded"),
        (claimed(saved(np.zeros((2, 2), np.float32)), stype="torch"), "cannot be decoded"),
        (claimed(saved(np.zeros((3, 2), np.float32))), "must hold float32 of shape (2, 2), got ('float32', (3, 2))"),
        (claimed(saved(np.zeros((4,), np.float32))), "must hold float32 of shape (2, 2), got ('float32', (4,))"),
        (claimed(saved(np.zeros((2, 2), np.int32))), "must hold float32 of shape (2, 2), got ('int32', (2, 2))"),
        (claimed(saved(np.zeros((2, 2), ">f4"))), "must hold float32 of shape (2, 2), got ('>f4', (2, 2))"),
        (claimed(saved(np.zeros((2, 2), "S4"))), "must hold float32 of shape (2, 2), got ('|S4', (2, 2))"),
        (claimed(saved(np.zeros((2, 2), [("x", "f4")]))), "must hold float32 of shape (2, 2)"),
    ],
)
def test_an_array_that_is_not_what_was_asked_for_is_refused_with_its_name(array, words):
    text = refused(reply_with(array))
    assert text.startswith(f"{PLACE}: array b: ")
    assert words in text


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f4', ",
        "(" * 3000,
        "",
        "[]",
        "{'descr': (), 'fortran_order': False, 'shape': (2, 2), }",
        "{'descr': 'f4,(99,)f4', 'fortran_order': False, 'shape': (2, 2), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-2, -2), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (10**30,), }",
        f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({10**30},), }}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': 'abc', }",
        "__import__('os').abort()",
        "\xff\xfe",
    ],
)
def test_a_made_up_header_is_refused_however_decoding_fails(header):
    assert "array b: " in refused(reply_with(claimed(npy(header, bytes(16)))))


@pytest.mark.parametrize("size", [10**9, 10**11, 10**18])
def test_a_payload_that_claims_a_gigantic_shape_costs_no_memory(size):
    header = {"descr": "<f4", "fortran_order": False, "shape": (size,)}
    reply = reply_with(claimed(npy(header, bytes(16))))
    tracemalloc.start()  # sees what is asked for, used or not
    try:
        assert "array b: cannot be decoded" in refused(reply)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


class SetsFlag:
    flag = False

    @classmethod
    def set_flag(cls):
        cls.flag = True

    def __reduce__(self):
        return SetsFlag.set_flag, ()


def test_a_pickle_is_never_opened():
    objects = np.empty((2, 2), object)
    objects[:] = SetsFlag()
    as_npy, bare = saved(objects, allow_pickle=True), pickle.dumps(SetsFlag())
    np.load(io.BytesIO(as_npy), allow_pickle=True)
    assert SetsFlag.flag, "the payload must work, or this test says nothing"
    SetsFlag.flag = False
    for data in (as_npy, bare):
        refused(reply_with(claimed(data)))
        refused(reply_with(claimed(data, dtype="object")))
    assert not SetsFlag.flag


# --- what a device says of itself ---


def card_content(**changes):
    config = {"device": 3, "num-examples": 40, "groups": '{"lamps": 40}', "code-hash": "abc"}
    changed = {**config, **{key.replace("_", "-"): value for key, value in changes.items()}}
    return RecordDict({CONFIG: ConfigRecord({key: value for key, value in changed.items() if value is not None})})


@pytest.mark.parametrize("groups", [{}, {"lamps": 30, "räder, »x«": 10}])
def test_a_card_comes_back_as_it_was_sent(groups):
    card = DeviceCard(device=0, num_examples=40, groups=groups, code_hash="abc")
    assert DeviceCard.from_content(card.to_content(), place=PLACE) == card


@pytest.mark.parametrize(
    "changes",
    [
        {"device": None},
        {"device": -1},
        {"device": 1.0},
        {"device": True},
        {"device": "3"},
        {"device": [3]},
        {"num_examples": None},
        {"num_examples": -1},
        {"num_examples": 40.0},
        {"num_examples": False},
    ],
)
def test_a_card_without_a_number_or_a_count_is_refused(changes):
    with pytest.raises(ReplyError, match=f"{PLACE}: a device must say its number and its number of examples, got"):
        DeviceCard.from_content(card_content(**changes), place=PLACE)


def test_a_reply_without_a_card_is_refused():
    with pytest.raises(ReplyError, match="a device must say its number"):
        DeviceCard.from_content(RecordDict(), place=PLACE)


@pytest.mark.parametrize(
    "groups",
    [
        None,
        "",
        "no json",
        "[1]",
        "3",
        '{"a": "x"}',
        '{"a": null}',
        '{"a": NaN}',
        '{"a": Infinity}',
        '{"a": -1, "b": 3}',
        "[" * 100_000,
        b"",
        '{"\\ud800": 1}',
    ],
)
def test_groups_that_cannot_be_read_are_left_out(groups):
    assert DeviceCard.from_content(card_content(groups=groups), place=PLACE).groups == {}


def test_a_card_that_was_taken_can_be_read_again_from_the_runs_folder():
    card = DeviceCard.from_content(card_content(groups='{"a": -1}'), place=PLACE)
    shard = json.loads(json.dumps(card.shard()))
    assert DeviceCard.from_shard(shard, place="shards.json").shard() == card.shard()


def test_groups_beyond_a_thousand_are_left_out():
    groups = json.dumps({str(number): 1 for number in range(5000)})
    assert len(DeviceCard.from_content(card_content(groups=groups), place=PLACE).groups) == 1000


# --- metrics ---

GOOD_METRICS = {"device": 3, "server-round": 2, "num-examples": 40, "train-loss": 1.25, "seconds": 3}
CARD = DeviceCard(device=3, num_examples=50, groups={}, code_hash="")


def metrics_content(**changes):
    values = {**GOOD_METRICS, **{key.replace("_", "-"): value for key, value in changes.items()}}
    return RecordDict({METRICS: MetricRecord({key: value for key, value in values.items() if value is not None})})


def test_good_metrics_are_given_back_as_numbers():
    assert check_metrics(metrics_content(), server_round=2, card=CARD, place=PLACE) == GOOD_METRICS


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train_loss": math.nan}, "the metric train-loss must be a number from 0 to 1e+30, got nan"),
        ({"seconds": math.inf}, "the metric seconds must be a number from 0 to 1e+30, got inf"),
        ({"seconds": [1.0]}, r"the metric seconds must be a number from 0 to 1e+30, got [1.0]"),
        ({"seconds": 1e308}, "the metric seconds must be a number from 0 to 1e+30, got 1e+308"),
        ({"server_round": 1}, "the reply must be of round 2, got 1"),
        ({"server_round": None}, "the metric server-round must be there"),
        (
            {"num_examples": 0},
            "num-examples must be a whole number from 1 to the 50 that the device said it has, got 0",
        ),
        ({"num_examples": -5}, "the metric num-examples must be a number from 0 to 1e+30, got -5"),
        (
            {"num_examples": 51},
            "num-examples must be a whole number from 1 to the 50 that the device said it has, got 51",
        ),
        ({"device": 4}, "the reply must be of device 3, got 4"),
        ({"device": None}, "the metric device must be there"),
        ({"round": 1}, "unknown metric, got 'round'"),
        (
            {"num_examples": 40.0},
            "num-examples must be a whole number from 1 to the 50 that the device said it has, got 40.0",
        ),
        ({"num_examples": None}, "the metric num-examples must be there"),
        ({"train_loss": None}, "the metric train-loss must be there"),
    ],
)
def test_metrics_that_break_a_rule_are_refused(changes, words):
    with pytest.raises(ReplyError) as raised:
        check_metrics(metrics_content(**changes), server_round=2, card=CARD, place=PLACE)
    assert str(raised.value).startswith(f"{PLACE}: {words}")


@pytest.mark.parametrize("names", [[], ["other"], [METRICS, "other"]])
def test_there_must_be_exactly_one_record_of_metrics(names):
    content = RecordDict({name: MetricRecord(GOOD_METRICS) for name in names})
    with pytest.raises(ReplyError, match="a reply must hold one record of metrics"):
        check_metrics(content, server_round=2, card=CARD, place=PLACE)


# --- refusals and code ---


def test_a_refusal_carries_its_reason_and_other_replies_carry_none():
    assert refusal_reason(refusal("there is no data")) == "there is no data"
    assert refusal_reason(metrics_content()) is None
    assert refusal_reason(RecordDict()) is None


def test_a_reason_is_cut_to_2000_characters_and_may_be_missing():
    assert refusal_reason(refusal("x" * 10_000)) == "x" * 2000
    assert refusal_reason(RecordDict({"refusal": ConfigRecord()})) == "no reason given"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of two modules in the place of this one."""
    folder = tmp_path / "package"
    (folder / "part").mkdir(parents=True)
    (folder / "records.py").write_text("a = 1\n")
    (folder / "part" / "b.py").write_text("b = 1\n")
    (folder / "notes.txt").write_text("not code")
    monkeypatch.setattr(records, "__file__", str(folder / "records.py"))
    return folder


def test_a_code_hash_is_the_same_for_the_same_code_at_any_time(package):
    before = code_hash()
    for path in sorted(package.rglob("*.py"), reverse=True):
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content)
    (package / "notes.txt").write_text("changed")
    assert code_hash() == before
    assert len(before) == 16


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "part" / "b.py").write_text("b = 2\n"),
        lambda folder: (folder / "new.py").write_text(""),
        lambda folder: (folder / "part" / "b.py").unlink(),
        lambda folder: (folder / "part" / "b.py").rename(folder / "part" / "c.py"),
    ],
)
def test_a_code_hash_differs_when_a_module_changes_comes_goes_or_is_renamed(package, change):
    before = code_hash()
    change(package)
    assert code_hash() != before


def test_a_code_hash_covers_the_files_that_are_named(package, tmp_path):
    app = tmp_path / "client_app.py"
    app.write_text("x = 1\n")
    hashes = {code_hash(), code_hash(app)}
    app.write_text("x = 2\n")
    assert len(hashes | {code_hash(app)}) == 3


def test_the_same_code_may_work_together_and_other_code_is_told_what_to_do():
    check_code("abc", "abc")
    with pytest.raises(DeviceError, match=r"the server has abc, this device def; install the same version") as raised:
        check_code("abc", "def")
    assert raised.value.place == str(Path(records.__file__).parent)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_changes_are_what_tuning_added_to_what_was_received_by_name(dtype):
    server = to_array_record({"b": torch.linspace(-1, 1, 7), "a": torch.ones(2, 2)})
    received = to_wire(server, dtype, place=PLACE)
    tuned = {name: tensor + 0.25 for name, tensor in to_tensors(received, dtype).items()}
    found = dict(changes_of(tuned, received, dtype))
    assert list(found) == ["a", "b"]
    for name, change in found.items():
        assert change.dtype == np.float32
        np.testing.assert_allclose(change, np.full(server[name].shape, 0.25), rtol=0, atol=1e-7)


def test_metrics_that_must_not_be_told_are_refused_and_not_missed():
    card = DeviceCard(device=1, num_examples=5, groups={}, code_hash="")
    told = {"device": 1, "server-round": 2, "seconds": 1.0}
    names = {"required": ("device", "server-round"), "optional": ("seconds",)}
    found = check_metrics(RecordDict({"metrics": MetricRecord(told)}), server_round=2, card=card, place=PLACE, **names)
    assert found == told
    with pytest.raises(ReplyError, match="unknown metric, got 'train-loss'"):
        check_metrics(
            RecordDict({"metrics": MetricRecord({**told, "train-loss": 1.0})}),
            server_round=2,
            card=card,
            place=PLACE,
            **names,
        )
