"""A federation in one process: a Flower grid that hands every message to the real ClientApp.

Messages are written to bytes and read again on both ways, piece by piece as Flower's own network code does, so what
works here has been through the wire format. Devices answer one after the other. What is missing is the network:
nothing is late, so timeouts are not watched over, and nobody drops out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from logging import ERROR
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.common.logger import log
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from fedpt_flwr.config import Scalar

Handler = Callable[[Message, Context], Message]

_SERVER, _RUN, _TASK = 1, 1, 1  # ids; there is one of each


class LocalGrid(Grid):
    """Devices 0 to ``num_devices - 1``; as on a network, node ids are scattered and in another order.

    Args:
        handle: ``(message, context) -> Message``, such as a ClientApp.
        num_devices: How many devices there are.
        run_config: Of every device's context.
        node_config: Called with a device's number; its node config. None: what a simulation gives.

    Attributes:
        device_of: Devices' numbers by node id.
        contexts: Each node's context, which lasts for the whole run.
        online: Ids of the nodes that can be seen.
    """

    answers_at_once = True
    """A reply comes with the first question for it, or never."""

    def __init__(
        self,
        handle: Handler,
        num_devices: int,
        run_config: Mapping[str, Scalar] | None = None,
        *,
        node_config: Callable[[int], dict[str, Any]] | None = None,
    ) -> None:
        _identify(_SERVER)
        self.handle = handle
        self.device_of = {(num_devices - device) * 7919 + 13: device for device in range(num_devices)}
        node_config = node_config or (lambda device: {"partition-id": device, "num-partitions": num_devices})
        self.contexts = {
            node: Context(
                run_id=_RUN,
                node_id=node,
                node_config=node_config(device),
                state=RecordDict(),
                run_config=dict(run_config or {}),
            )
            for node, device in self.device_of.items()
        }
        self.online = set(self.device_of)
        self._waiting: dict[str, Message] = {}

    def set_run(self, run: Any) -> None:
        """Nothing depends on it."""

    @property
    def run(self) -> Any:
        """Unknown."""
        return None

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Flower's older way to make messages."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Ids of the nodes that can be seen."""
        return sorted(self.online)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Take messages for the devices.

        Returns:
            Their ids.
        """
        return [self._push(message) for message in messages]

    def _push(self, message: Message) -> str:
        message_id = _stamp(message)
        self._waiting[message_id] = message
        return message_id

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies to these messages; the devices work on them now. A message is answered once."""
        waiting = [self._waiting.pop(message_id) for message_id in message_ids if message_id in self._waiting]
        replies = [self.ask(message) for message in waiting]
        return [reply for reply in replies if reply is not None]

    def ask(self, message: Message) -> Message | None:
        """One device's reply; an exception there becomes an error message, as in Flower."""
        received = _through_bytes(message)
        try:
            reply = self.handle(received, self.contexts[message.metadata.dst_node_id])
        except Exception as error:
            log(ERROR, "ClientApp raised an exception", exc_info=error)
            reason = f"{type(error)}:<'{error!r}'>"
            reply = Message(Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=reason), reply_to=received)
        _stamp(reply)
        return _through_bytes(reply)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:  # noqa: ARG002
        """Push messages and pull their replies; ``timeout`` is not watched over."""
        return self.pull_messages(list(self.push_messages(messages)))


def run_locally(
    server: Callable[[Grid, Context], None],
    handle: Handler,
    run_config: Mapping[str, Scalar],
    *,
    num_devices: int,
    only_device: int | None = None,
    run_id: int = _RUN,
) -> None:
    """Run a whole federation in this process.

    Args:
        server: A ServerApp.
        handle: A ClientApp.
        run_config: All keys, as Flower hands them to both.
        num_devices: Devices that the data is dealt out to.
        only_device: The one of them that is there; None: all are.
        run_id: What the server is told as its run's id.
    """
    grid = LocalGrid(handle, num_devices, run_config)
    if only_device is not None:
        grid.online = {node for node, device in grid.device_of.items() if device == only_device}
    server(
        grid,
        Context(run_id=run_id, node_id=_SERVER, node_config={}, state=RecordDict(), run_config=dict(run_config)),
    )


def _identify(node: int) -> None:
    """Messages are stamped with the identity of the process that makes them, and refuse to be made without one."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = _TASK, _RUN, node


def device_context(node: int, node_config: Mapping[str, Any], run_config: Mapping[str, Scalar]) -> Context:
    """A device's context, for a process that plays one device alone.

    Args:
        node: Its id.
        node_config: What it was started with.
        run_config: All keys.
    """
    _identify(node)
    return Context(
        run_id=_RUN,
        node_id=node,
        node_config=dict(node_config),
        state=RecordDict(),
        run_config=dict(run_config),
    )


def to_bytes(message: Message) -> bytes:
    """A message as it can be handed to another process."""
    data: bytes = message_to_proto(message).SerializeToString()
    return data


def from_bytes(data: bytes) -> Message:
    """The inverse of :func:`to_bytes`."""
    return message_from_proto(ProtoMessage.FromString(data))


def _stamp(message: Message) -> str:
    """Give a message its id: as in Flower the hash of what it holds."""
    message_id = message.object_id
    message.metadata.__dict__["_message_id"] = message_id
    return message_id


def _through_bytes(message: Message) -> Message:
    """What arrives of a message on the other side of a network."""
    received: Message = _inflated(message)
    received.metadata.__dict__["_message_id"] = message.metadata.message_id  # the id travels beside the message
    return received


def _inflated(part: Any) -> Any:
    """A copy of a message or a part of one, made from the bytes of it and of its parts."""
    children = {name: _inflated(child) for name, child in (part.children or {}).items()}
    return type(part).inflate(part.deflate(), children)
