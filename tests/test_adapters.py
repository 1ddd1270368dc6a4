"""``FedPT`` with adapters: exact means, devices of other ranks, and answers in 8 bits."""

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from local_grid import LocalGrid
from reference import products

from fedpt_flwr.config import StrategyConfig
from fedpt_flwr.errors import RoundError
from fedpt_flwr.inner import make_inner_strategy
from fedpt_flwr.lora import completed, is_right, leading
from fedpt_flwr.records import DeviceCard, sent_as, to_int8_reply, to_reply, to_tensors
from fedpt_flwr.strategy import FedPT

RANK = 4
SHAPES = {"up.lora_A.default.weight": (RANK, 9), "up.lora_B.default.weight": (14, RANK)}


def start_arrays():
    rng = np.random.default_rng(7)
    return ArrayRecord({name: Array(rng.normal(size=shape).astype(np.float32)) for name, shape in SHAPES.items()})


def step(device, server_round, name, shape):
    """What a device adds to an array in a round."""
    return np.random.default_rng([device, server_round, is_right(name)]).normal(size=shape).astype(np.float32)


def make_device(ranks=None, wire="float32", answers=None):
    """A device with an adapter of its own rank, which it says in its card; ``answers`` is what it sends instead."""
    ranks = ranks or {}

    def handle(message, context):
        device = context.node_config["partition-id"]
        if message.metadata.message_type == "query":
            rank = ranks.get(device, 0)
            card = DeviceCard(device=device, num_examples=10 * (device + 1), groups={}, code_hash="", lora_rank=rank)
            return Message(content=card.to_content(), reply_to=message)
        config, received = message.content["config"], message.content["arrays"]
        tuned = {
            name: values + torch.from_numpy(step(device, config["server-round"], name, tuple(values.shape)))
            for name, values in to_tensors(received, sent_as(wire)).items()
        }
        if wire == "int8":
            update, _ = to_int8_reply(tuned, received, {})
        else:
            update = to_reply(tuned, received, wire, place="")
        if answers:
            update = answers(update)
        metrics = {
            "num-examples": 10 * (device + 1),
            "train-loss": 1.0,
            "server-round": config["server-round"],
            "device": device,
        }
        return Message(content=RecordDict({"arrays": update, "metrics": MetricRecord(metrics)}), reply_to=message)

    return handle


def fedpt(aggregation, *, inner="FedAvg", **settings):
    return FedPT(
        make_inner_strategy(StrategyConfig(name=inner)),
        lora_rank=RANK,
        lora_aggregation=aggregation,
        **{"wait_timeout_s": 1.0, **settings},
    )


def run(strategy, grid, *, rounds=1):
    arrays = strategy.start(grid, initial_arrays=start_arrays(), num_rounds=rounds, timeout=5).arrays
    return {name: array.numpy() for name, array in arrays.items()}


def dense(arrays):
    return products(arrays)["up.lora.default.weight"]


def dense_mean(num_devices, ranks=None):
    """By hand: what the devices did to the matrix in round 1, weighted by their examples."""
    whole = {name: array.numpy() for name, array in start_arrays().items()}
    total = 0.0
    for device in range(num_devices):
        rank = (ranks or {}).get(device, RANK)
        held = {name: leading(name, values, rank) for name, values in whole.items()}
        tuned = {name: values + step(device, 1, name, values.shape) for name, values in held.items()}
        tuned = {name: completed(name, values, whole[name]) for name, values in tuned.items()}
        total = total + 10 * (device + 1) * dense(tuned)
    return total / sum(10 * (device + 1) for device in range(num_devices))


def best_of_rank(matrix, rank=RANK):
    left, sizes, right = np.linalg.svd(matrix)
    return left[:, :rank] * sizes[:rank] @ right[:rank]


@pytest.mark.parametrize(
    # Entries are up to 6.6; the largest errors are 5e-7, 0.003, 0.022 and 0.028, and far smaller of what is left out.
    ("wire", "tolerance"),
    [("float32", 1e-5), ("float16", 0.01), ("bfloat16", 0.05), ("int8", 0.05)],
)
def test_exact_aggregation_is_the_dense_mean_cut_to_the_rank(wire, tolerance):
    outcomes = []
    got = run(fedpt("exact", wire_dtype=wire, after_aggregate=outcomes.append), LocalGrid(make_device(wire=wire), 3))
    wanted = dense_mean(3)
    np.testing.assert_allclose(dense(got), best_of_rank(wanted), atol=tolerance)
    lost = np.linalg.norm(wanted - best_of_rank(wanted)) / np.linalg.norm(wanted)
    assert outcomes[0].left_out == pytest.approx(lost, abs=tolerance / 10)  # of 0.137


def test_averaged_apart_the_factors_give_something_else():
    outcomes = []
    got = run(fedpt("average", after_aggregate=outcomes.append), LocalGrid(make_device(), 3))
    assert np.abs(dense(got) - best_of_rank(dense_mean(3))).max() > 1
    assert outcomes[0].left_out is None


def test_devices_of_lower_rank_get_the_leading_directions_and_answer_with_as_many():
    ranks = {0: 1, 2: 3}
    grid = LocalGrid(make_device(ranks), 3)
    got = run(fedpt("exact"), grid)
    np.testing.assert_allclose(dense(got), best_of_rank(dense_mean(3, ranks)), atol=1e-5)
    trained = [message for message in grid.sent if message.metadata.message_type == "train"]
    for message in trained:
        rank = ranks.get(grid.device_of[message.metadata.dst_node_id], RANK)
        for name, array in message.content["arrays"].items():
            np.testing.assert_array_equal(array.numpy(), leading(name, start_arrays()[name].numpy(), rank))


@pytest.mark.parametrize("answered", [1, 3, RANK])
def test_an_answer_of_another_rank_than_was_announced_is_refused(answered):
    def another(update):
        return ArrayRecord(
            {name: Array(np.zeros((answered, 9) if is_right(name) else (14, answered), np.float32)) for name in update}
        )

    outcomes = []
    honest, other = make_device({1: 2}), make_device({1: 2}, answers=another)

    def handle(message, context):
        return (other if context.node_config["partition-id"] == 1 else honest)(message, context)

    run(fedpt("exact", after_aggregate=outcomes.append), LocalGrid(handle, 2))
    refused = [part.refused for part in outcomes[0].devices]
    assert refused[0] == ""
    assert f"must have shape (2, 9), got ({answered}, 9)" in refused[1]


@pytest.mark.parametrize(
    ("aggregation", "inner", "rank", "words"),
    [
        ("average", "FedAvg", 2, "all adapters must have one rank"),
        ("exact", "FedAvg", 5, "must be at most the run's tuning.lora-rank of 4"),
        ("frozen-a", "Krum", 2, "Krum compares the devices' arrays, which must then have one rank"),
    ],
)
def test_ranks_that_cannot_be_aggregated_are_refused_before_any_round(aggregation, inner, rank, words):
    with pytest.raises(RoundError, match="no device can take part") as raised:
        run(fedpt(aggregation, inner=inner), LocalGrid(make_device({0: rank}), 1))
    assert words in str(raised.value)


@pytest.mark.parametrize("inner", ["FedAdam", "FedAvgM"])
def test_with_frozen_a_ranks_and_moments_go_together(inner):
    got = run(fedpt("frozen-a", inner=inner), LocalGrid(make_device({0: 1}), 2), rounds=2)
    assert {name: values.shape for name, values in got.items()} == SHAPES
    assert all(np.isfinite(values).all() for values in got.values())


# --- what is told of 8 bits ---


def told(grid):
    """What each device was told in each round about what its answers lost."""
    found = {}
    for message in grid.sent:
        if message.metadata.message_type == "train":
            config = message.content["config"]
            device = grid.device_of[message.metadata.dst_node_id]
            found[config["server-round"], device] = config.get("residual-of")
    return found


def test_a_device_is_told_in_which_round_its_answer_was_taken_last():
    def tamper(device, message, reply):
        is_train = message.metadata.message_type == "train"
        return None if is_train and device == 1 and message.content["config"]["server-round"] == 2 else reply

    grid = LocalGrid(make_device(wire="int8"), 2, tamper=tamper)
    run(fedpt("average", wire_dtype="int8"), grid, rounds=4)
    assert told(grid) == {
        (1, 0): 0, (1, 1): 0, (2, 0): 1, (2, 1): 1, (3, 0): 2, (3, 1): 1, (4, 0): 3, (4, 1): 3,
    }  # fmt: skip


def test_a_round_that_failed_took_nothing():
    def tamper(device, message, reply):
        is_train = message.metadata.message_type == "train"
        return None if is_train and device == 1 and message.content["config"]["server-round"] == 1 else reply

    grid = LocalGrid(make_device(wire="int8"), 2, tamper=tamper)
    run(fedpt("average", wire_dtype="int8", min_replies=2, max_failed_rounds=1), grid, rounds=2)
    assert told(grid)[2, 0] == 0


def test_a_run_that_goes_on_says_what_it_said():
    grid = LocalGrid(make_device(wire="int8"), 2)
    strategy = fedpt("average", wire_dtype="int8", taken={0: 4, 1: 2})
    strategy.start(grid, initial_arrays=start_arrays(), num_rounds=5, timeout=5, first_round=5)
    assert told(grid) == {(5, 0): 4, (5, 1): 2}


@pytest.mark.parametrize(("aggregation", "wire"), [("exact", "int8"), ("average", "float32")])
def test_nothing_is_kept_where_directions_change_or_nothing_is_lost(aggregation, wire):
    grid = LocalGrid(make_device(wire=wire), 1)
    run(fedpt(aggregation, wire_dtype=wire), grid, rounds=2)
    assert set(told(grid).values()) == {None}
