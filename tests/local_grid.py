"""The grid of one process, with devices that do what a test wants to go wrong."""

from collections.abc import Callable

from flwr.app import Message

from fedpt_flwr import grid


class LocalGrid(grid.LocalGrid):
    """A :class:`fedpt_flwr.grid.LocalGrid` that may be tampered with.

    Args:
        tamper: Called with (device, message, reply); returns the reply that is delivered, None for none.
        order: Sorts the replies before they are delivered.

    Attributes:
        sent: Every message from the server, oldest first.
    """

    def __init__(self, *args, tamper: Callable | None = None, order: Callable | None = None, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.tamper, self.order = tamper, order
        self.sent: list[Message] = []

    def ask(self, message):
        self.sent.append(message)
        reply = super().ask(message)
        return self.tamper(self.device_of[message.metadata.dst_node_id], message, reply) if self.tamper else reply

    def pull_messages(self, message_ids):
        replies = super().pull_messages(message_ids)
        return self.order(replies) if self.order else replies
