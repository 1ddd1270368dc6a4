"""The grid of one process, with devices that do what a test wants to go wrong."""

from collections.abc import Callable

from flwr.app import Message

from fedpt_flwr import grid


class LocalGrid(grid.LocalGrid):
    """A :class:`fedpt_flwr.grid.LocalGrid` that may be tampered with.

    Args:
        tamper: Called with (device, message, reply); returns the reply that is delivered, None for none.
        order: Sorts the replies that are fetched together; the app's own loop fetches them one by one.
        at_once: Sorts the ids of the messages that are sent together: the devices work in this order, before anybody
            asks for a reply. None: a device works when its reply is fetched.

    Attributes:
        sent: Every message from the server, oldest first.
    """

    def __init__(
        self,
        *args,
        tamper: Callable | None = None,
        order: Callable | None = None,
        at_once: Callable | None = None,
        **kwargs,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.tamper, self.order, self.at_once = tamper, order, at_once
        self.replies: dict[str, list[Message]] = {}
        self.sent: list[Message] = []

    def ask(self, message):
        self.sent.append(message)
        reply = super().ask(message)
        return self.tamper(self.device_of[message.metadata.dst_node_id], message, reply) if self.tamper else reply

    def push_messages(self, messages):
        ids = super().push_messages(messages)
        if self.at_once:
            for message_id in self.at_once(ids):
                self.replies[message_id] = super().pull_messages([message_id])
        return ids

    def pull_messages(self, message_ids):
        ids = list(message_ids)
        replies = [reply for message_id in ids for reply in self.replies.pop(message_id, [])]
        replies += super().pull_messages(ids)
        return self.order(replies) if self.order else replies
