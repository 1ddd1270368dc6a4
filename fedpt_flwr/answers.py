"""Devices' replies, one at a time and in an order that does not depend on when they came.

Flower's ``send_and_receive`` gives all replies of a round at once, so that memory grows with the number of devices.
Here messages are sent together and each reply is fetched when its turn has come; until then it lies with the
SuperLink. Over a network Flower also holds a reply twice while it puts it together from its pieces; here only one array
of it.
"""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable, Iterator, Mapping
from logging import WARNING
from typing import Any, TypeVar, cast

import httpx
from flwr.app import Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.common.logger import log
from flwr.serverapp import Grid

from fedpt_flwr.errors import DeviceError
from fedpt_flwr.records import refusal_reason

try:  # Flower's own grid in a deployment; not part of its public interface
    from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
    from flwr.proto.runtime_pb2 import PullAppMessagesRequest
    from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
    from flwr.supercore.inflatable.inflatable_utils import (
        ObjectPullError,
        inflate_object_from_contents,
        pull_objects,
    )
    from flwr.superlink.grid import HttpGrid

    _IN_PIECES: tuple[type, ...] = (HttpGrid,)
except ImportError:  # another version of Flower: its own way to fetch replies works, too
    _IN_PIECES = ()

MAX_REASONS = 5
"""Shown of what devices say when they all fail."""

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 3.0  # between two questions, the longest as in Flower
_PAUSES_AFTER_ERRORS_S = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
_DEPTH_OF_ARRAYS = 3  # message, records, record, array, chunk of an array

Q = TypeVar("Q")
T = TypeVar("T")


def answers(
    grid: Grid, messages: Mapping[int, Message], *, timeout_s: float, what: str
) -> Iterator[tuple[int, Message | None]]:
    """Send messages, and give the replies in the order of the messages, each when the one before has been taken.

    Args:
        grid: Connects to the devices. One with the attribute ``answers_at_once`` is not waited for.
        messages: By the device's number.
        timeout_s: Seconds from now on in which a reply may come. Later, what has come is still fetched.
        what: Names the messages in a warning, such as ``Round 3``.

    Yields:
        Each device's number, with its reply or None.
    """
    ids = list(grid.push_messages(list(messages.values())))
    at_once = getattr(grid, "answers_at_once", False)
    deadline = time.monotonic() + (0.0 if at_once else timeout_s)
    for (device, message), message_id in zip(messages.items(), ids, strict=True):
        # Without an id the SuperLink has not taken the message.
        yield device, _answer(grid, message, message_id, deadline, what) if message_id else None


def _answer(grid: Grid, message: Message, message_id: str, deadline: float, what: str) -> Message | None:
    pause_s = _FIRST_PAUSE_S
    while True:
        for reply in _pull(grid, message, message_id):
            if reply.metadata.reply_to_message_id == message_id:
                return reply
            log(WARNING, "%s: a reply to no message of this round is left out", what)
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            return None
        time.sleep(min(pause_s, left_s))
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def _patiently(ask: Callable[[Q], T], question: Q) -> T:
    """Ask the SuperLink, and some times again what it could not answer.

    While devices write large replies into its database, others' turn to write may not come within the five seconds
    that it waits for; then its answer is a 500, which Flower passes on at once. Nothing has happened by then.
    """
    for pause_s in _PAUSES_AFTER_ERRORS_S:
        try:
            return ask(question)
        except httpx.HTTPStatusError as error:
            if not error.response.is_server_error:
                raise
            log(WARNING, "the SuperLink answered %d; it is asked again", error.response.status_code)
            time.sleep(pause_s)
    return ask(question)


def _pull(grid: Grid, message: Message, message_id: str) -> list[Message]:
    """The reply to a message, if it has come."""
    if not isinstance(grid, _IN_PIECES):
        return list(grid.pull_messages([message_id]))
    client: Any = grid
    found = _patiently(client._runtime_client.PullMessages, PullAppMessagesRequest(message_ids=[message_id]))
    replies = []
    for head, tree in zip(found.messages_list, found.message_object_trees, strict=True):
        try:
            replies.append(_put_together(grid, tree, head.metadata.message_id))
        except ObjectPullError as error:  # its sender has gone before all of it was there
            reason = f"the reply did not arrive whole: {error}"
            replies.append(Message(Error(code=ErrorCode.MESSAGE_UNAVAILABLE, reason=reason), reply_to=message))
    return replies


def _put_together(grid: Any, tree: Any, reply_id: str) -> Message:
    """Fetch a reply array by array, so that no more than one of them is there in pieces as well."""
    run_id = grid.run.run_id
    fetch_once = make_pull_object_fn_protobuf(grid._runtime_client.PullObject, node=grid.node, run_id=run_id)
    fetch = functools.partial(_patiently, fetch_once)
    made: dict[str, Any] = {}

    def inflate(part: Any) -> Any:
        contents = pull_objects(list(_missing(part, made)), fetch)
        return inflate_object_from_contents(part.object_id, contents, objects=dict(made))

    for array in _at_depth(tree, _DEPTH_OF_ARRAYS):
        made[array.object_id] = inflate(array)
        # The HTTP client's responses are in cycles, and each holds a piece: young ones are cheap to find.
        gc.collect(1)
    reply = cast(Message, inflate(tree))
    _patiently(
        grid._runtime_client.ConfirmMessageReceived,
        ConfirmMessageReceivedRequest(node=grid.node, run_id=run_id, message_object_id=reply_id),
    )
    reply.metadata.__dict__["_message_id"] = reply_id
    return reply


def _missing(part: Any, made: Mapping[str, Any]) -> Iterator[str]:
    """Ids of a part and of all below it, but for what is made."""
    if part.object_id not in made:
        for child in part.children:
            yield from _missing(child, made)
        yield part.object_id


def _at_depth(part: Any, depth: int) -> Iterator[Any]:
    if depth == 0:
        yield part
        return
    for child in part.children:
        yield from _at_depth(child, depth - 1)


def content_of(reply: Message) -> RecordDict:
    """The content of a reply.

    Raises:
        DeviceError: The device failed, or declined.
    """
    if reply.has_error():
        raise DeviceError(f"the device failed: {last_line(reply.error.reason)}")
    reason = refusal_reason(reply.content)
    if reason is not None:
        raise DeviceError(reason)
    return reply.content


def last_line(reason: str | None) -> str:
    """The part of a remote traceback that says what happened."""
    lines = [line.strip() for line in (reason or "no reason given").replace("\\n", "\n").splitlines() if line.strip()]
    return lines[-1][:500]
