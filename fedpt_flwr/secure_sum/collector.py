"""The server's side of a secure sum: what it asks, what it takes, and how it opens the sum.

It holds the sum of the masked answers so far, never two of them. What it opens are the masks of the sum: the own masks
of those that answered and, of those that went away in between, the masks that they had in common with those.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sized

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray

from fedpt_flwr.errors import ReplyError, RoundError
from fedpt_flwr.records import check_words
from fedpt_flwr.secure_sum import keys, shamir
from fedpt_flwr.secure_sum.device import SEALED_BYTES, sign_of
from fedpt_flwr.secure_sum.ring import Words
from fedpt_flwr.secure_sum.session import (
    IN_TAIL,
    KEYS,
    MAX_DEVICES,
    REVEAL,
    SHARES,
    TAIL,
    WORDS,
    PublicKeys,
    Reader,
    Rules,
    Session,
    digest_of,
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OpenedSum:
    """What a round's sum says.

    Attributes:
        changes: Mean change of every array over the devices' examples, float64, by name.
        num_devices: Whose changes are in it.
        num_examples: Theirs.
        train_loss: Mean over these examples, nats per answer token.
        num_cut: Values of single devices that were cut to the range.
        error: How far a mean may be from that of the devices' own numbers, but for those that were cut.
    """

    changes: Mapping[str, NDArray[np.float64]]
    num_devices: int
    num_examples: int
    train_loss: float
    num_cut: int
    error: float


class Collector:
    """Collects one round's answers.

    Args:
        server_round: From 1.
        weights: Examples of every device that was drawn, by its number.
        rules: The run's.
        sent: What the devices are sent to train, as it is on the wire.
        told: What they are told of how to train it.

    Attributes:
        offered: Public keys by device, of those that have answered the first question.
        shared: Sealed shares by device and receiver, of those that have answered the second.
        stayed: Devices whose answers are in the sum.
    """

    def __init__(
        self,
        server_round: int,
        weights: Mapping[int, int],
        rules: Rules,
        sent: ArrayRecord,
        told: ConfigRecord,
    ) -> None:
        self.server_round = server_round
        self.offered: dict[int, PublicKeys] = {}
        self.shared: dict[int, dict[int, bytes]] = {}
        self.stayed: list[int] = []
        self._weights, self._rules = weights, rules
        self._shapes = {name: tuple(sent[name].shape) for name in sorted(sent)}
        self._model = digest_of(sent, told)
        self._session: Session | None = None
        self._total: dict[str, Words] = {}
        self._revealed: dict[int, list[bytes]] = {}

    @property
    def session(self) -> Session:
        """The round's, once all keys are there."""
        if self._session is None:
            parties = dict(sorted(self.offered.items()))
            self._session = Session(
                server_round=self.server_round,
                total_weight=sum(self._weights[device] for device in parties),
                parties=parties,
                rules=self._rules,
            )
        return self._session

    # --- the four questions ---

    def question(self, phase: str, device: int) -> ConfigRecord:
        """What a device is asked in one of the phases :data:`KEYS`, :data:`SHARES`, ``train`` and :data:`REVEAL`."""
        number = {"round": self.server_round}
        if phase == KEYS:
            return ConfigRecord(number)  # type: ignore[arg-type]
        if phase == SHARES:
            return self.session.to_record()
        if phase == REVEAL:
            return ConfigRecord({**number, "stayed": list(self.stayed)})
        others = [other for other in sorted(self.shared) if other != device]
        return ConfigRecord({**number, "from": others, "sealed": [self.shared[other][device] for other in others]})

    def take(self, phase: str, device: int, content: RecordDict, *, place: str) -> None:
        """Take a device's answer.

        Args:
            phase: As of :meth:`question`.
            device: Its number.
            content: Of the reply, which is not trusted.
            place: Who and when, for the error.

        Raises:
            ReplyError: It is none; nothing of it is used.
        """
        if phase == KEYS:
            self._take_keys(device, Reader.of(content, ReplyError, place))
        elif phase == SHARES:
            self._take_shares(device, Reader.of(content, ReplyError, place))
        elif phase == REVEAL:
            reader = Reader.of(content, ReplyError, place)
            self._revealed[device] = reader.texts("shares", len(self.shared), shamir.SHARE_BYTES)
        else:
            self._take_masked(device, content, place)

    def _take_keys(self, device: int, reader: Reader) -> None:
        found = PublicKeys(*(reader.text(name, keys.KEY_BYTES) for name in ("mask-key", "share-key")))
        taken = {key for other in self.offered.values() for key in (other.mask, other.share)}
        if found.mask == found.share or taken & {found.mask, found.share}:
            raise ReplyError("a device's keys must be its own", place=reader.place)
        self.offered[device] = found

    def _take_shares(self, device: int, reader: Reader) -> None:
        others = [other for other in self.session.parties if other != device]
        sealed = reader.texts("sealed", len(others), SEALED_BYTES)
        self.shared[device] = dict(zip(others, sealed, strict=True))

    def _take_masked(self, device: int, content: RecordDict, place: str) -> None:
        if len(content.array_records) != 1:
            raise ReplyError("a reply must hold one record of arrays", value=sorted(content), place=place)
        (record,) = content.array_records.values()
        sizes = {WORDS: sum(math.prod(shape) for shape in self._shapes.values()), TAIL: len(IN_TAIL)}
        types = {WORDS: self.session.ring.dtype, TAIL: self.session.loss_ring.dtype}
        found = check_words(record, sizes, types, place=place)
        for name, words in found.items():
            if name in self._total:
                self._total[name] += words
            else:
                self._total[name] = words.copy()
        self.stayed.append(device)

    def check_enough(self, phase: str) -> None:
        """Check that enough devices have answered in a phase for the next.

        Raises:
            RoundError: Too few, or too many for a sum.
        """
        by_phase: dict[str, Sized] = {KEYS: self.offered, SHARES: self.shared, REVEAL: self._revealed}
        answered = by_phase.get(phase, self.stayed)
        begun = len(self.offered)
        needed = self._rules.threshold(begun)
        if len(answered) < needed:
            raise RoundError(
                f"round {self.server_round}: a secure sum that {begun} devices begin needs {needed} of them to its "
                f"end, and {len(answered)} answered {_WHAT.get(phase, 'with their change')}",
                place="privacy.secure-sum-threshold and min-replies",
                remedy="nothing of the others was opened; checkpoints of earlier rounds are kept",
            )
        if begun > MAX_DEVICES:
            raise RoundError(
                f"a secure sum has at most {MAX_DEVICES} devices, because each talks to each",
                value=begun,
                place="privacy.secure-sum",
                remedy="lower fraction-train",
            )

    # --- the sum ---

    def open(self) -> OpenedSum:
        """Take the masks off the sum.

        Raises:
            RoundError: They do not come off: a device gave shares that are none.
        """
        session, words, tail = self.session, self._total[WORDS], self._total[TAIL]
        joined = sorted(self.shared)
        helpers = sorted(self._revealed)[: session.threshold]
        weights = shamir.weights_at_zero([session.point(helper) for helper in helpers])
        for index, device in enumerate(joined):
            shares = {session.point(helper): self._revealed[helper][index] for helper in helpers}
            try:
                secret = shamir.join(weights, shares)
            except ValueError as error:
                raise self._wrong_shares(device) from error
            if device in self.stayed:
                keys.add_mask(session.own_mask(secret, self._model), -1, words, tail)
                continue
            if keys.public_key(secret) != session.parties[device].mask:
                raise self._wrong_shares(device)
            for other in self.stayed:  # they took it with the other sign than the device would have
                mask = session.pair_mask(secret, other, self._model)
                keys.add_mask(mask, sign_of(device, other), words, tail)
        return self._read(words, tail)

    def _wrong_shares(self, device: int | None) -> RoundError:
        whose = "the sum" if device is None else f"device {device}"
        return RoundError(
            f"round {self.server_round}: the shares that devices gave do not open the masks of {whose}",
            place="privacy.secure-sum",
            remedy="a device or its connection changes what it is told; without it the next round will do",
        )

    def _read(self, words: Words, tail: Words) -> OpenedSum:
        """The numbers that an opened sum stands for, after what can be checked of it."""
        session, found = self.session, dict(zip(IN_TAIL, tail, strict=True))
        announced = sum(self._weights[device] for device in self.stayed)
        num_examples = int(found["examples"])
        if int(found["devices"]) != len(self.stayed):
            raise self._wrong_shares(None)
        if not len(self.stayed) <= num_examples <= announced:
            raise RoundError(
                f"round {self.server_round}: {len(self.stayed)} devices must have trained on as many examples at "
                f"least, and on no more than the {announced} that they said they have",
                value=num_examples,
                place="privacy.secure-sum",
                remedy="one of them does not tell the truth; which one, a sum does not say",
            )
        share = num_examples / session.total_weight
        changes, begin = {}, 0
        for name, shape in self._shapes.items():
            size = math.prod(shape)
            changes[name] = session.ring.decode(words[begin : begin + size], share).reshape(shape)
            begin += size
        loss = float(session.loss_ring.decode(tail[IN_TAIL.index("loss") :][:1], share)[0])
        bound = session.ring.error(len(self.stayed), share)
        largest = max((float(np.abs(part).max(initial=0.0)) for part in changes.values()), default=0.0)
        if largest > session.ring.limit + bound or loss < -session.loss_ring.error(len(self.stayed), share):
            raise RoundError(
                f"round {self.server_round}: the mean of changes of at most {session.ring.limit:g} cannot be larger, "
                "nor a loss below 0",
                value=f"{largest:g}, loss {loss:g}",
                place="privacy.secure-sum",
                remedy="a device sends numbers that are none of its own making; which one, a sum does not say",
            )
        return OpenedSum(
            changes=changes,
            num_devices=len(self.stayed),
            num_examples=num_examples,
            train_loss=max(loss, 0.0),
            num_cut=int(found["cut"]),
            error=bound,
        )


_WHAT = {KEYS: "with their keys", SHARES: "with shares of their secrets", REVEAL: "with the shares that open it"}


def changed(arrays: ArrayRecord, opened: OpenedSum) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """The mean of the devices' arrays: what the server holds, and their mean change; rounded once."""
    for name, change in opened.changes.items():
        yield name, (arrays[name].numpy() + change).astype(np.float32)
