"""A Flower grid in one process: it hands every message to the real ClientApp, one device after the other.

Messages are written to bytes and read again on both ways, as a network would; what a test wants to go wrong, it says.
"""

import uuid
from collections.abc import Callable

from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity


class LocalGrid(Grid):
    """Devices 0 to ``num_devices - 1``; Flower's node ids are scattered and in another order.

    Args:
        handle: ``(message, context) -> Message``, such as a ClientApp.
        num_devices: How many devices there are.
        run_config: Of every device's context.
        tamper: Called with (device, message, reply); returns the reply that is delivered, None for none.
        order: Sorts the replies before they are delivered.
        node_config: Called with a device's number; its node config.
    """

    def __init__(
        self,
        handle: Callable[[Message, Context], Message],
        num_devices: int,
        run_config: dict | None = None,
        *,
        tamper: Callable | None = None,
        order: Callable | None = None,
        node_config: Callable[[int], dict] | None = None,
    ) -> None:
        # Flower's processes have an identity, which messages are stamped with.
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
        self.handle, self.tamper, self.order = handle, tamper, order
        self.device_of = {(num_devices - device) * 7919 + 13: device for device in range(num_devices)}
        node_config = node_config or (lambda device: {"partition-id": device, "num-partitions": num_devices})
        self.contexts = {
            node: Context(
                run_id=1, node_id=node, node_config=node_config(device), state=RecordDict(), run_config=run_config or {}
            )
            for node, device in self.device_of.items()
        }
        self.online = set(self.device_of)
        self.sent: list[Message] = []

    def set_run(self, run) -> None: ...

    @property
    def run(self):
        return None

    def create_message(self, *args, **kwargs):
        raise AssertionError("deprecated")

    def get_node_ids(self):
        return sorted(self.online)

    def push_messages(self, messages):
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid.uuid4())
            self.sent.append(message)
            yield message.metadata.message_id

    def pull_messages(self, message_ids):
        wanted = set(message_ids)
        replies = []
        for message in [message for message in self.sent if message.metadata.message_id in wanted]:
            node = message.metadata.dst_node_id
            try:
                reply = self.handle(message, self.contexts[node])
            except Exception as error:
                reply = Message(Error(code=2, reason=f"{type(error)}:<'{error!r}'>"), reply_to=message)
            reply.metadata.__dict__["_message_id"] = str(uuid.uuid4())
            if self.tamper is not None:
                reply = self.tamper(self.device_of[node], message, reply)
            if reply is not None:
                replies.append(reply)
        return self.order(replies) if self.order else replies

    def send_and_receive(self, messages, *, timeout=None):
        return self.pull_messages(list(self.push_messages(messages)))
