import gc
import weakref
from collections import Counter
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import PullObjectResponse
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import PullAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.superlink.grid import HttpGrid
from local_grid import LocalGrid

from fedpt_flwr.answers import answers

MEBIBYTE = 2**20


class SuperLink:
    """What a SuperLink answers to a ServerApp that fetches a reply; ``gone`` are objects that never arrived."""

    def __init__(self):
        self.replies, self.objects, self.gone, self.fetched, self.confirmed = {}, {}, set(), [], []

    def has(self, reply, *, to):
        reply.metadata.__dict__["_message_id"] = reply.object_id
        self.replies[to] = reply
        self.objects |= {object_id: part.deflate() for object_id, part in get_all_nested_objects(reply).items()}

    def PullMessages(self, request):  # noqa: N802
        there = [self.replies.pop(name) for name in request.message_ids if name in self.replies]
        heads = [message_to_proto(remove_content_from_message(reply)) for reply in there]
        return PullAppMessagesResponse(messages_list=heads, message_object_trees=[get_object_tree(r) for r in there])

    def PullObject(self, request):  # noqa: N802
        self.fetched.append(request.object_id)
        content = self.objects[request.object_id]
        found = request.object_id not in self.gone
        return PullObjectResponse(object_found=found, object_available=True, object_content=content)

    def ConfirmMessageReceived(self, request):  # noqa: N802
        self.confirmed.append(request.message_object_id)


class Wire(HttpGrid):
    """Flower's grid of a deployment, connected to a :class:`SuperLink`."""

    def __init__(self, superlink):
        self._client, self.node = superlink, Node(node_id=1)
        self.run_info = SimpleNamespace(run_id=1)

    @property
    def run(self):
        return self.run_info

    def push_messages(self, messages):
        return [message.metadata.message_id for message in messages]


def messages(*devices):
    LocalGrid(None, 0)  # messages are stamped with an identity
    made = {}
    for device in devices:
        made[device] = Message(RecordDict(), dst_node_id=device, message_type="train")
        made[device].metadata.__dict__["_message_id"] = f"message {device}"
    return made


def content(seed):
    """Arrays of several chunks and of one, two that are the same, and other records."""
    big = np.random.default_rng(seed).normal(size=(3, MEBIBYTE)).astype(np.float32)
    arrays = {"big": big, "zeros": np.zeros(3 * MEBIBYTE, np.float32), "a": np.ones(3), "same as a": np.ones(3)}
    return RecordDict(
        {
            "arrays": ArrayRecord({name: Array(values) for name, values in arrays.items()}),
            "metrics": MetricRecord({"seed": seed}),
            "config": ConfigRecord({"text": "x"}),
        }
    )


def test_a_reply_that_is_put_together_array_by_array_is_the_reply_that_was_sent():
    sent, superlink = messages(0, 1), SuperLink()
    for device, message in sent.items():
        superlink.has(Message(content(device), reply_to=message), to=f"message {device}")
    names = {device: superlink.replies[f"message {device}"].metadata.message_id for device in sent}
    got = dict(answers(Wire(superlink), sent, timeout_s=0, what="Round 1"))
    for device, reply in got.items():
        assert reply.content == content(device)
        assert reply.metadata.reply_to_message_id == f"message {device}"
        assert reply.metadata.message_id == names[device]
    assert superlink.confirmed == list(names.values())


def test_nothing_is_fetched_twice_and_the_next_reply_only_when_it_is_asked_for():
    sent, superlink = messages(0, 1), SuperLink()
    for device, message in sent.items():
        superlink.has(Message(content(device), reply_to=message), to=f"message {device}")
    came = answers(Wire(superlink), sent, timeout_s=0, what="Round 1")
    next(came)
    assert "message 1" in superlink.replies
    assert len(superlink.fetched) == len(set(superlink.fetched))


def test_an_error_that_the_superlink_made_is_given_as_it_is():
    sent, superlink = messages(0), SuperLink()
    superlink.has(Message(Error(code=5, reason="Node Unavailable"), reply_to=sent[0]), to="message 0")
    ((_, reply),) = answers(Wire(superlink), sent, timeout_s=0, what="Round 1")
    assert (reply.error.code, reply.error.reason) == (5, "Node Unavailable")


def test_a_reply_of_which_a_part_never_arrived_is_an_error_and_the_next_one_counts():
    sent, superlink = messages(0, 1), SuperLink()
    for device, message in sent.items():
        superlink.has(Message(content(device), reply_to=message), to=f"message {device}")
    superlink.gone = set(get_all_nested_objects(superlink.replies["message 0"])) - set(
        get_all_nested_objects(superlink.replies["message 1"])
    )
    got = dict(answers(Wire(superlink), sent, timeout_s=0, what="Round 1"))
    assert "the reply did not arrive whole" in got[0].error.reason
    assert got[1].content == content(1)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_replies_come_in_the_order_of_the_messages_and_absent_ones_as_none(order):
    sent, superlink = messages(*order), SuperLink()
    superlink.has(Message(RecordDict(), reply_to=sent[1]), to="message 1")
    got = list(answers(Wire(superlink), sent, timeout_s=0, what="Round 1"))
    assert [device for device, _ in got] == list(order)
    assert [device for device, reply in got if reply is not None] == [1]


def test_a_reply_that_comes_within_the_time_is_waited_for():
    sent, superlink = messages(0), SuperLink()

    class Late(Wire):
        asked = 0

        @property
        def _runtime_client(self):
            Late.asked += 1
            if Late.asked == 3:
                superlink.has(Message(RecordDict(), reply_to=sent[0]), to="message 0")
            return self._client

    ((_, reply),) = answers(Late(superlink), sent, timeout_s=60, what="Round 1")
    assert reply is not None


@pytest.mark.parametrize(("status", "num_failures"), [(500, 2), (500, 100), (404, 1)])
def test_what_the_superlink_fails_to_answer_is_asked_again_for_a_while(status, num_failures, monkeypatch):
    monkeypatch.setattr("fedpt_flwr.answers._PAUSES_AFTER_ERRORS_S", (0.0,) * 3)
    sent = messages(0)

    class Locked(SuperLink):
        """Whose database is locked when it is asked for the first pieces, and for the reply as such."""

        def __init__(self):
            super().__init__()
            self.failures = Counter()

        def fail(self, what):
            self.failures[what] += 1
            if self.failures[what] <= num_failures:
                response = httpx.Response(status, request=httpx.Request("POST", "http://superlink"))
                raise httpx.HTTPStatusError(str(status), request=response.request, response=response)

        def PullMessages(self, request):  # noqa: N802
            self.fail("messages")
            return super().PullMessages(request)

        def PullObject(self, request):  # noqa: N802
            self.fail("objects")
            return super().PullObject(request)

        def ConfirmMessageReceived(self, request):  # noqa: N802
            self.fail("confirmation")
            return super().ConfirmMessageReceived(request)

    superlink = Locked()
    superlink.has(Message(content(0), reply_to=sent[0]), to="message 0")
    came = answers(Wire(superlink), sent, timeout_s=0, what="Round 1")
    if status == 500 and num_failures < 3:
        ((_, reply),) = came
        assert reply.content == content(0)
        assert superlink.failures.keys() == {"messages", "objects", "confirmation"}
    else:
        with pytest.raises(httpx.HTTPStatusError, match=str(status)):
            list(came)
        assert superlink.failures["messages"] == (4 if status == 500 else 1)


def test_a_message_that_the_superlink_did_not_take_has_no_reply():
    class Full(Wire):
        def push_messages(self, messages):
            return [None for _ in messages]

    assert list(answers(Full(SuperLink()), messages(0), timeout_s=60, what="Round 1")) == [(0, None)]


def test_a_reply_is_gone_as_soon_as_it_is_let_go():
    sent, superlink = messages(0), SuperLink()
    superlink.has(Message(content(0), reply_to=sent[0]), to="message 0")
    gc.disable()
    try:
        ((_, reply),) = answers(Wire(superlink), sent, timeout_s=0, what="Round 1")
        arrays = weakref.ref(reply.content["arrays"]["big"])
        del reply
        assert arrays() is None
    finally:
        gc.enable()
