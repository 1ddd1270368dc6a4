"""What devices say of their shards before the first round, and who decides that."""

import json

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from local_grid import LocalGrid

import client_app
from fedpt_flwr.config import flat_values, parse_run_config

RECORDS = [{"text": f"note {number}", "ward": "ab"[number % 3 == 0]} for number in range(9)]


def told(tmp_path, config, node_config):
    """The content of a device's answer to the first question."""
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    flat = flat_values(parse_run_config({})) | {
        "data.format": "text", "data.group-field": "ward", "data.train": str(path), "data.validation": "",
        "data.test": "", "data.holdout-fraction": 0.1,
    } | config  # fmt: skip
    own = {"device-id": 0, "partition-id": 0, "num-partitions": 1, "data-path": str(path)} | node_config
    grid = LocalGrid(client_app.app, 1, flat, node_config=lambda _: own)
    question = RecordDict({"config": ConfigRecord({"code-hash": ""})})
    ids = grid.push_messages([Message(question, dst_node_id=next(iter(grid.get_node_ids())), message_type="query")])
    (reply,) = grid.pull_messages(ids)
    return reply.content


NODE_LOCAL = {"data.partitioner": "node-local", "data.validation": "/data/a.jsonl", "data.test": "/data/b.jsonl"}


@pytest.mark.parametrize(
    ("config", "node_config", "groups"),
    [
        (NODE_LOCAL, {}, {}),
        (NODE_LOCAL, {"disclose": "groups"}, {"a": 6, "b": 3}),
        (NODE_LOCAL | {"data.disclose": "size"}, {"disclose": "groups"}, {}),
        (NODE_LOCAL, {"disclose": "size"}, {}),
        ({"data.partitioner": "natural"}, {}, None),
        ({"data.partitioner": "natural"}, {"disclose": "size"}, {}),
        ({"data.partitioner": "natural", "data.disclose": "size"}, {}, {}),
    ],
)
def test_groups_are_said_where_both_the_run_and_the_device_allow_it(config, node_config, groups, tmp_path):
    card = told(tmp_path, config, node_config)["config"]
    found = json.loads(card["groups"])
    if groups is None:  # some of the nine are held out
        assert set(found) == {"a", "b"}
        assert sum(found.values()) == card["num-examples"]
    else:
        assert found == groups
    assert set(card) == {"device", "num-examples", "groups", "code-hash", "lora-rank"}


def test_another_word_in_the_node_config_is_refused(tmp_path):
    reason = told(tmp_path, NODE_LOCAL, {"disclose": "all"})["refusal"]["reason"]
    assert reason.startswith("device 0, node config, disclose: must be size or groups, got 'all'")
