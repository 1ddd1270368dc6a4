"""A secure sum over a Flower grid: four questions to the devices of a round, one after the other.

Who does not answer one of them is out of the round. In the first two nobody has lost anything by that; afterwards the
others open the sum without it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from logging import INFO, WARNING

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid

from fedpt_flwr.answers import MAX_REASONS, answers
from fedpt_flwr.errors import DeviceError, ReplyError, RoundError
from fedpt_flwr.limits import parse_limits
from fedpt_flwr.records import (
    ARRAYS,
    CONFIG,
    COST_METRICS,
    LIMITS,
    REQUIRED_METRICS,
    DeviceCard,
    check_metrics,
    message_bytes,
)
from fedpt_flwr.secure_sum.collector import Collector, OpenedSum
from fedpt_flwr.secure_sum.session import KEYS, RECORD, REVEAL, SHARES, Rules

TRAIN = "train"
SUMMED_METRICS = ("num-examples", "train-loss", "train-loss-last", "num-examples-seen", "batch-size")
"""Metrics that no device tells of itself: the first two are in the sum, the others are left out."""

_ASKED = {KEYS: "its keys", SHARES: "shares of its secrets", TRAIN: "its change", REVEAL: "shares that open the sum"}


@dataclasses.dataclass(slots=True)
class Part:
    """One device's part in a round's sum, as far as the server sees it.

    Attributes:
        bytes_down: Of all messages to it, as serialised.
        bytes_up: Of all its replies.
        metrics: What it reported of its costs.
        refused: Why its change is not in the sum; empty if it is.
        limits: What its node config limits, by key.
    """

    bytes_down: int = 0
    bytes_up: int = 0
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    refused: str = ""
    limits: Mapping[str, int | float | str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(slots=True, kw_only=True)
class SecureRound:
    """One round.

    Attributes:
        grid: Connects to the devices.
        sent: The train messages by device number, as they would be sent without a secure sum.
        cards: What devices said of themselves, by number.
        rules: The run's.
        server_round: From 1.
        read: Gives the content of a reply, or raises DeviceError where the device failed or declined.
        parts: By device number.
    """

    grid: Grid
    sent: Mapping[int, Message]
    cards: Mapping[int, DeviceCard]
    rules: Rules
    server_round: int
    read: Callable[[Message], RecordDict]
    parts: dict[int, Part] = dataclasses.field(default_factory=dict)

    def run(self, *, timeout_s: float, answer_timeout_s: float) -> OpenedSum:
        """Ask everything, and open the sum.

        Args:
            timeout_s: Seconds that devices may train.
            answer_timeout_s: Seconds that they may take for each of the other answers.

        Raises:
            RoundError: Too few devices stayed, or the sum cannot be opened. Nothing of it is known then.
        """
        self.parts = {device: Part() for device in self.sent}
        collector = Collector(
            self.server_round,
            {device: self.cards[device].num_examples for device in self.sent},
            self.rules,
            *_sent_to_all(self.sent),
        )
        here: Sequence[int] = list(self.sent)
        for phase in (KEYS, SHARES, TRAIN, REVEAL):
            here = self._ask(collector, phase, here, timeout_s if phase == TRAIN else answer_timeout_s)
            try:
                collector.check_enough(phase)
            except RoundError as error:
                reasons = list(dict.fromkeys(part.refused for part in self.parts.values() if part.refused))
                error.problems = tuple(reasons[:MAX_REASONS])
                raise
        opened = collector.open()
        self._log(opened)
        return opened

    def _ask(self, collector: Collector, phase: str, devices: Sequence[int], timeout_s: float) -> list[int]:
        """Put one question to these devices; those that answered it well."""
        messages = {device: self._message(collector, phase, device) for device in devices}
        for device, message in messages.items():
            self.parts[device].bytes_down += message_bytes(message.content)
        answered = []
        for device, reply in answers(self.grid, messages, timeout_s=timeout_s, what=f"Round {self.server_round}"):
            reason = self._take(collector, phase, device, reply)
            del reply  # before the next one is fetched
            if not reason:
                answered.append(device)
            elif phase == REVEAL:  # its change is in the sum already
                log(WARNING, "Round %d: device %d does not help to open the sum: %s", self.server_round, device, reason)
            else:
                self.parts[device].refused = reason
        return answered

    def _message(self, collector: Collector, phase: str, device: int) -> Message:
        train, question = self.sent[device], collector.question(phase, device)
        if phase == TRAIN:
            train.content = RecordDict({**train.content, RECORD: question})
            return train
        return Message(RecordDict({RECORD: question}), train.metadata.dst_node_id, phase)

    def _take(self, collector: Collector, phase: str, device: int, reply: Message | None) -> str:
        """Take an answer; why it is none, or empty."""
        place, part = f"device {device}, round {self.server_round}", self.parts[device]
        try:
            if reply is None:
                remedy = "see round-timeout-s" if phase == TRAIN else "see wait-timeout-s"
                raise ReplyError(f"no reply with {_ASKED[phase]} came in time", place=place, remedy=remedy)
            if not reply.has_error() and LIMITS in reply.content.config_records:
                part.limits = parse_limits(reply.content.config_records[LIMITS], place=place).to_flat()
            content = self.read(reply)
            part.bytes_up += message_bytes(content)
            metrics: Mapping[str, float] = {}
            if phase == TRAIN:
                card = self.cards[device]
                metrics = check_metrics(
                    content,
                    server_round=self.server_round,
                    card=card,
                    place=place,
                    required=_told(REQUIRED_METRICS),
                    optional=_told(COST_METRICS),
                )
            collector.take(phase, device, content, place=place)
            part.metrics = metrics or part.metrics
        except (ReplyError, DeviceError) as error:
            return str(error)
        finally:
            if reply is not None and reply.has_content():
                for record in reply.content.array_records.values():  # a RecordDict is in a cycle with views of itself
                    record.clear()
        return ""

    def _log(self, opened: OpenedSum) -> None:
        log(
            INFO,
            "Round %d: the sum of %d of %d devices is open; its means are exact to %.1e",
            self.server_round,
            opened.num_devices,
            len(self.sent),
            opened.error,
        )
        sizes = [change.size for change in opened.changes.values()]
        usual = sum(float(np.abs(change).sum()) for change in opened.changes.values()) / max(sum(sizes), 1)
        if opened.error > usual:
            log(
                WARNING,
                "Round %d: its means, off by up to %.1e, are %.1e on average and may be nothing but rounding; lower "
                "privacy.secure-sum-range, or set privacy.secure-sum-bits=32",
                self.server_round,
                opened.error,
                usual,
            )
        if opened.num_cut:
            log(
                WARNING,
                "Round %d: %d of %d changes of single weights were cut to %g; raise privacy.secure-sum-range",
                self.server_round,
                opened.num_cut,
                opened.num_devices * sum(sizes),
                self.rules.limit,
            )


def _told(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in names if name not in SUMMED_METRICS)


def _sent_to_all(sent: Mapping[int, Message]) -> tuple[ArrayRecord, ConfigRecord]:
    """What all devices are sent to train, and told of how: the same for each, or their masks would not cancel."""
    arrays = [message.content.array_records[ARRAYS] for message in sent.values()]
    told = [message.content.config_records[CONFIG] for message in sent.values()]
    if any(record is not arrays[0] and record != arrays[0] for record in arrays[1:]):
        raise RoundError(
            "in a secure sum all devices must be sent the same arrays",
            place="privacy.secure-sum",
            remedy="have some of them a lora-rank in their node configs? Leave it out",
        )
    if any(record != told[0] for record in told[1:]):
        raise RoundError(
            "in a secure sum all devices must be told the same of how to train",
            value=sorted({name for record in told for name in record if record[name] != told[0].get(name)}),
            place="privacy.secure-sum",
            remedy="take a strategy that does not set up each device differently",
        )
    return arrays[0], told[0]
