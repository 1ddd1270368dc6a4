"""Who takes part: connected nodes say who they are, and who may not take part is told why.

Devices have numbers of their own, which stay when Flower gives a node another id. A run that goes on waits for the
devices that it had.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from logging import INFO, WARNING

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.common.constant import ErrorCode
from flwr.common.logger import log
from flwr.serverapp import Grid

from fedpt_flwr.answers import MAX_REASONS, content_of, last_line
from fedpt_flwr.errors import DeviceError, ReplyError, RoundError, RunError
from fedpt_flwr.heterogeneity import measure_shards
from fedpt_flwr.records import CONFIG, DeviceCard, check_code

MAX_LISTED = 20
"""Devices shown one by one in the log."""

_NEWCOMER_TIMEOUT_S = 30.0  # for devices that come after the first round: the others are waiting
_ASK_AGAIN_S = 90.0  # a question, or its answer, is lost where a SuperNode ends with it
# Errors that the SuperLink makes when a question, its answer or the node is gone: the device has said nothing.
_LOST = (ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE, ErrorCode.NODE_UNAVAILABLE)


class Roster:
    """The devices of a run.

    Args:
        wait_timeout_s: Seconds to wait for devices to connect, and for their answer to the first question.
        code_hash: Devices that run other code are refused; empty: any code is accepted.
        expected: Devices that a run had before it was stopped, by number, with their shards: it goes on with exactly
            these. None: with any.
        check: Called with the card of each device; raises a DeviceError or ReplyError if it cannot take part.

    Attributes:
        devices: The cards of those that may take part, by Flower's node id.
    """

    def __init__(
        self,
        *,
        wait_timeout_s: float,
        code_hash: str,
        expected: Mapping[int, DeviceCard] | None,
        check: Callable[[DeviceCard], None],
    ) -> None:
        self.wait_timeout_s = wait_timeout_s
        self.code_hash = code_hash
        self.expected = expected
        self.devices: dict[int, DeviceCard] = {}
        self._declined: dict[int, str] = {}
        self._check = check

    def meet(self, grid: Grid, min_devices: int, among: Collection[int] = ()) -> dict[int, DeviceCard]:
        """Wait until enough devices are connected and have said who they are.

        Args:
            grid: Connects to them.
            min_devices: With examples; the first time a run that goes on waits for those that it had instead.
            among: Numbers of the devices that count; empty: all do.

        Returns:
            The connected devices' cards by Flower's node id, one node for each number.

        Raises:
            RoundError: Too few within the deadline, or, the first time, two devices with one number; says who
                declined and why.
            RunError: The first time: they are not those that are expected.
        """
        first = not self.devices
        deadline = time.monotonic() + self.wait_timeout_s
        asked: dict[int, float] = {}  # when, in this call: who stays silent is asked again after a while
        reported = -1
        while True:
            connected = sorted(grid.get_node_ids())
            self._declined = {node: why for node, why in self._declined.items() if node in connected}
            now = time.monotonic()
            unknown = [
                node
                for node in connected
                if node not in (*self.devices, *self._declined) and now - asked.get(node, -math.inf) >= _ASK_AGAIN_S
            ]
            if unknown:
                asked |= dict.fromkeys(unknown, now)
                longest_s = _ASK_AGAIN_S if first else _NEWCOMER_TIMEOUT_S
                self._ask(grid, unknown, max(1.0, min(deadline - now, longest_s)))
            present = self._one_node_a_number(connected, refuse=first)
            usable = sum(card.num_examples > 0 and (not among or card.device in among) for card in present.values())
            wanted, there = min_devices, usable
            if first and self.expected is not None:
                self._refuse_other_devices(present)
                wanted, there = len(self.expected), len(present)
            if there >= wanted:
                return present
            hopeless = len(self._declined) == len(connected) >= min_devices
            if time.monotonic() >= deadline or hopeless:
                is_resumed = first and self.expected is not None and present
                raise self._others(present) if is_resumed else self._too_few(min_devices, usable, present, connected)
            if there != reported:
                who = self._who_is_there(present, connected)
                log(INFO, "Waiting for devices: %d of %d are there (%s)", there, wanted, who)
                reported = there
            time.sleep(1.0)

    def _ask(self, grid: Grid, nodes: Sequence[int], timeout_s: float) -> None:
        question = RecordDict({CONFIG: ConfigRecord({"code-hash": self.code_hash})})
        messages = [Message(content=question, message_type=MessageType.QUERY, dst_node_id=node) for node in nodes]
        replies = grid.send_and_receive(messages, timeout=timeout_s)
        asked = {message.metadata.message_id: message.metadata.dst_node_id for message in messages}
        for reply in replies:
            node = asked.get(reply.metadata.reply_to_message_id)  # an error made by the SuperLink names no node
            if node is None:
                continue
            if reply.has_error() and reply.error.code in _LOST:
                log(WARNING, "The answer of node %d was lost: %s", node, last_line(reply.error.reason))
                continue
            try:
                content = content_of(reply)
                card = DeviceCard.from_content(content, place=f"node {node}")
                if self.code_hash:
                    check_code(self.code_hash, card.code_hash)
                self._check(card)
            except (ReplyError, DeviceError) as error:
                if str(error) not in self._declined.values():
                    log(WARNING, "A device cannot take part: %s", error)
                self._declined[node] = str(error)
                continue
            self.devices[node] = card
            if card.num_examples == 0:
                log(WARNING, "Device %d has no examples and is left out", card.device)

    def _one_node_a_number(self, connected: Sequence[int], *, refuse: bool) -> dict[int, DeviceCard]:
        """Cards of the connected nodes; of two with one number, that of the one met first.

        A device that was restarted under a new node id takes part again as soon as Flower has given up the old one.
        """
        node_of: dict[int, int] = {}
        for node, card in self.devices.items():
            if node not in connected:
                continue
            if card.device in node_of and refuse:
                both = f"{node_of[card.device]} and {node}"
                raise RoundError(
                    f"device numbers must be unique, but nodes {both} both say {card.device}",
                    remedy="give each SuperNode its own partition-id or device-id in --node-config",
                )
            if card.device in node_of:
                log(WARNING, "Device %d is there twice; node %d is left out", card.device, node)
            node_of.setdefault(card.device, node)
        return {node: self.devices[node] for node in node_of.values()}

    def _refuse_other_devices(self, present: Mapping[int, DeviceCard]) -> None:
        """Refuse devices with other shards at once; some that are expected may still come."""
        expected = {} if self.expected is None else {device: card.shard() for device, card in self.expected.items()}
        if any(expected.get(card.device) != card.shard() for card in present.values()):
            raise self._others(present)

    def _others(self, present: Mapping[int, DeviceCard]) -> RunError:
        had = (self.expected or {}).values()
        return RunError(
            f"a resumed run goes on with the devices that it had: {_counted(had)}; now there are "
            f"{_counted(present.values())}",
            remedy=f'start as many as before, in a simulation with --federation-config "num-supernodes={len(had)}"; to '
            "go on with others, and to other weights, remove shards.json from the run's folder",
            problems=list(dict.fromkeys(self._declined.values()))[:MAX_REASONS],
        )

    def _too_few(
        self, min_devices: int, usable: int, present: Mapping[int, DeviceCard], connected: Sequence[int]
    ) -> RoundError:
        reasons = list(dict.fromkeys(self._declined.values()))
        if not present and len(reasons) == 1:
            return RoundError(f"no device can take part: {reasons[0]}")
        remedy = "start more devices, or lower min-devices"
        if any(node not in (*self.devices, *self._declined) for node in connected):
            remedy = "raise wait-timeout-s if nodes that are connected need longer to answer; else " + remedy
        return RoundError(
            f"at least {min_devices} devices with examples must be there within {self.wait_timeout_s:g} s; "
            f"{usable} are, {min_devices - usable} missing ({self._who_is_there(present, connected)})",
            place="min-devices",
            remedy="see why they decline" if reasons else remedy,
            problems=reasons[:MAX_REASONS],
        )

    def _who_is_there(self, present: Mapping[int, DeviceCard], connected: Sequence[int]) -> str:
        """The devices that can train, and all others that have been seen, each with what keeps them from it."""
        there = {card.device for card in present.values()}
        empty = {card.device for card in present.values() if card.num_examples == 0}
        silent = [node for node in connected if node not in (*self.devices, *self._declined)]
        groups: list[tuple[str, Sequence[object]]] = [
            ("there", sorted(there - empty) or ["none"]),
            ("seen before and gone", sorted({card.device for card in self.devices.values()} - there)),
            ("without examples", sorted(empty)),
            ("connected nodes that do not answer", silent),
            ("nodes that decline", sorted(self._declined)),
        ]
        return "; ".join(f"{what}: {listed(who)}" for what, who in groups if who)

    def log_shards(self, *, are_told: bool) -> None:
        """Log the table of shards (device, number of examples, how unlike all others, groups) and what sums it up."""
        cards = sorted(self.devices.values(), key=lambda card: card.device)
        if not are_told:
            log(INFO, "Shards: %d devices; how much of what they hold, they keep to themselves", len(cards))
            return
        log(INFO, "Shards: %d devices, %d examples", len(cards), sum(card.num_examples for card in cards))
        found = measure_shards([card.num_examples for card in cards], [card.groups for card in cards])
        for card, distance in zip(cards[:MAX_LISTED], found.distances, strict=False):
            groups = sorted(card.groups.items(), key=lambda item: (-item[1], item[0]))
            shown = ", ".join(f"{name} {count}" for name, count in groups[:6])
            more = f", and {len(groups) - 6} more groups" if len(groups) > 6 else ""
            unlike = "" if distance is None else f"differs by {distance:.2f}  "
            log(INFO, "\tdevice %3d  %7d examples  %s%s%s", card.device, card.num_examples, unlike, shown, more)
        if len(cards) > MAX_LISTED:
            log(INFO, "\tand %d more devices; all are in shards.json", len(cards) - MAX_LISTED)
        for sentence in found.sentences():
            log(INFO, "\t%s", sentence)


def _counted(cards: Collection[DeviceCard]) -> str:
    return f"{len(cards)} with {sum(card.num_examples for card in cards)} examples"


def listed(devices: Sequence[object]) -> str:
    """The first of them, and how many more there are."""
    shown = ", ".join(map(str, devices[:MAX_LISTED]))
    return shown if len(devices) <= MAX_LISTED else f"{shown} and {len(devices) - MAX_LISTED} more"
