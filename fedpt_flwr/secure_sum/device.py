"""A device's side of a secure sum: it answers four questions, each once and in their order.

Between them it keeps what it drew and was sent in the state that Flower holds for it while a run lasts, in the memory
of its SuperNode. Where that is lost, the device has dropped out of the round, and nothing worse. The device itself
checks what protects it: the number of devices, the threshold, that all were told the same, that no round is summed
twice, and that it never gives both secrets of another device away. That no round is summed twice it knows from the same
state: a device whose SuperNode was restarted may be asked for another sum of the round.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray

from fedpt_flwr.errors import DeviceError
from fedpt_flwr.secure_sum import keys, shamir
from fedpt_flwr.secure_sum.session import (
    IN_TAIL,
    LOSS_LIMIT,
    MAX_DEVICES,
    RECORD,
    TAIL,
    TAIL_BITS,
    WORDS,
    Reader,
    Rules,
    Session,
    digest_of,
)

SECRET_KEY = "secure-sum-secret"  # noqa: S105 (the name of a key of the node config)
"""Names a file that all devices of a federation have and the server has not."""

_MIN_SECRET_BYTES = 16
SEALED_BYTES = 2 * shamir.SHARE_BYTES + keys.SEAL_BYTES
"""What a device seals for another: a share of each of its two secrets."""

_KEYS, _SHARES, _TRAIN, _DONE = "keys", "shares", "train", "done"  # what was answered last


def read_secret(node_config: Mapping[str, Any], *, place: str) -> bytes:
    """What the devices of a federation know and its server does not; empty where the node config names no such file.

    Raises:
        DeviceError: The file cannot be read, or is too short.
    """
    path = node_config.get(SECRET_KEY)
    if path is None:
        return b""
    where = f"{place}, node config, {SECRET_KEY}"
    try:
        text = Path(str(path)).read_bytes().strip()
    except OSError as error:  # the path is the device's own business
        raise DeviceError("the file that it names cannot be read", value=error.strerror, place=where) from error
    if len(text) < _MIN_SECRET_BYTES:
        raise DeviceError(
            f"the file that it names must hold at least {_MIN_SECRET_BYTES} bytes",
            value=len(text),
            place=where,
            remedy="make one with `openssl rand -hex 32` and copy it to all devices, not to the server",
        )
    return hashlib.sha256(text).digest()


@dataclasses.dataclass(frozen=True, slots=True)
class Device:
    """One device in one of the phases.

    Attributes:
        number: The device's.
        rules: Of its run config.
        state: What Flower keeps for it; written to.
        secret: See :func:`read_secret`.
    """

    number: int
    rules: Rules
    state: RecordDict
    secret: bytes = b""

    # --- the four answers ---

    def offer_keys(self, content: RecordDict) -> RecordDict:
        """The first answer: two public keys.

        Raises:
            DeviceError: This device has been in that round's sum already.
        """
        server_round = Reader.of(content, DeviceError, f"device {self.number}").number("round")
        last = self._kept().get("summed", 0)
        summed = last if isinstance(last, int) else 0
        if server_round <= summed:
            raise DeviceError(
                f"a device is in one sum a round, and has been in that of round {summed}; two sums over other devices "
                "would give away what it alone changed",
                value=server_round,
                place=f"device {self.number}",
                remedy="go on with the next round",
            )
        mask, share = keys.new_private_key(), keys.new_private_key()
        self._keep({"summed": summed, "phase": _KEYS, "round": server_round, "mask-key": mask, "share-key": share})
        public = ConfigRecord({"mask-key": keys.public_key(mask), "share-key": keys.public_key(share)})
        return RecordDict({RECORD: public})

    def share_secrets(self, content: RecordDict) -> RecordDict:
        """The second answer: shares of this device's two secrets, sealed for each of the others.

        Raises:
            DeviceError: Too few devices, too many, or not those keys.
        """
        reader, mine = self._next(content, after=_KEYS)
        session = Session.from_record(reader.record, self.rules, error=DeviceError, place=reader.place)
        mask, share = (mine.text(name, keys.KEY_BYTES) for name in ("mask-key", "share-key"))
        seed = os.urandom(shamir.SECRET_BYTES)
        self._check(session, mask, share)
        points = [session.point(device) for device in session.parties]
        of_mask, of_seed = (shamir.split(secret, session.threshold, points) for secret in (mask, seed))
        sealed, own = [], b""
        for device, *shares in zip(session.parties, of_mask, of_seed, strict=True):
            if device == self.number:
                own = b"".join(shares)
                continue
            sealed.append(self._seal(session, share, device, b"".join(shares)))
        self._keep({**mine.record, **session.to_record(), "phase": _SHARES, "seed": seed, "own-shares": own})
        return RecordDict({RECORD: ConfigRecord({"sealed": sealed})})

    def join(self, content: RecordDict) -> Sum:
        """Before the third answer: who else takes part, and their shares.

        Raises:
            DeviceError: Too few of them, or what they sealed cannot be opened.
        """
        reader, mine = self._next(content, after=_SHARES)
        session = Session.from_record(mine.record, self.rules, error=DeviceError, place=reader.place)
        others = reader.numbers("from")
        sealed = reader.texts("sealed", len(others), SEALED_BYTES)
        if others != sorted(set(others)) or not set(others) <= session.parties.keys() - {self.number}:
            raise DeviceError("shares must come from other devices of the round", value=others, place=reader.place)
        if len(others) + 1 < session.threshold:
            raise self._too_few(len(others) + 1, session, reader.place)
        private = mine.text("share-key", keys.KEY_BYTES)
        shares = {self.number: mine.text("own-shares", 2 * shamir.SHARE_BYTES)}
        for device, text in zip(others, sealed, strict=True):
            shares[device] = self._unseal(session, private, device, text, reader.place)
        self._keep({**mine.record, "from": sorted(shares), "shares": [shares[device] for device in sorted(shares)]})
        mask, seed = mine.text("mask-key", keys.KEY_BYTES), mine.text("seed", shamir.SECRET_BYTES)
        return Sum(self, session, mask, seed, tuple(others), reader.place)

    def reveal(self, content: RecordDict) -> RecordDict:
        """The fourth answer: one share of each device, whichever helps to open the sum.

        Raises:
            DeviceError: Too few devices stayed, or not those that took part.
        """
        reader, mine = self._next(content, after=_TRAIN)
        session = Session.from_record(mine.record, self.rules, error=DeviceError, place=reader.place)
        joined, stayed = mine.numbers("from"), reader.numbers("stayed")
        if stayed != sorted(set(stayed)) or not {self.number} <= set(stayed) <= set(joined):
            raise DeviceError("who stayed must have taken part, as this device did", value=stayed, place=reader.place)
        if len(stayed) < session.threshold:
            raise self._too_few(len(stayed), session, reader.place)
        size = shamir.SHARE_BYTES
        shares = mine.texts("shares", len(joined), 2 * size)
        parts = [both[size:] if device in stayed else both[:size] for device, both in zip(joined, shares, strict=True)]
        self._keep({"phase": _DONE, "summed": session.server_round})
        return RecordDict({RECORD: ConfigRecord({"shares": parts})})

    # --- what is kept ---

    def _kept(self) -> ConfigRecord:
        return self.state.config_records.get(RECORD, ConfigRecord())

    def _keep(self, values: Mapping[str, Any]) -> None:
        self.state.config_records[RECORD] = ConfigRecord(dict(values))

    def _next(self, content: RecordDict, *, after: str) -> tuple[Reader, Reader]:
        """Readers of the question and of what was kept, if the question is the one that must come now."""
        server_round = Reader.of(content, DeviceError, f"device {self.number}").number("round")
        place = f"device {self.number}, round {server_round}"
        kept = self._kept()
        if kept.get("phase") != after or kept.get("round") != server_round:
            raise DeviceError(
                f"its secure sum has lost its thread: this question follows the answer '{after}' of the same round",
                value=" of round ".join(str(kept.get(name, "none")) for name in ("phase", "round")),
                place=place,
                remedy="was its SuperNode restarted? It takes part again in the next round",
            )
        return Reader.of(content, DeviceError, place), Reader(kept, DeviceError, place)

    # --- what is checked ---

    def _check(self, session: Session, mask: bytes, share: bytes) -> None:
        place = f"device {self.number}, round {session.server_round}"
        # The server chooses who begins, and could begin many sums of few; the run config says how few.
        if not self.rules.at_least <= len(session.parties) <= MAX_DEVICES:
            raise DeviceError(
                f"a secure sum needs {self.rules.at_least} to {MAX_DEVICES} devices",
                value=len(session.parties),
                place=place,
                remedy="see min-replies and fraction-train",
            )
        own = session.parties.get(self.number)
        if own is None or (own.mask, own.share) != (keys.public_key(mask), keys.public_key(share)):
            raise DeviceError("the server must pass on the keys that this device offered", place=place)

    def _too_few(self, found: int, session: Session, place: str) -> DeviceError:
        return DeviceError(
            f"of {len(session.parties)} devices at least {session.threshold} must stay in a secure sum",
            value=found,
            place=place,
            remedy="see privacy.secure-sum-threshold and min-replies",
        )

    # --- shares on their way ---

    def _seal(self, session: Session, private: bytes, to: int, text: bytes) -> bytes:
        about = _about(session, self.number, to)
        try:
            return keys.seal(keys.agree(private, session.parties[to].share, about, self.secret), text, about)
        except ValueError as error:
            raise DeviceError("a device offered a key that is none", value=to, place=f"device {self.number}") from error

    def _unseal(self, session: Session, private: bytes, device: int, text: bytes, place: str) -> bytes:
        about = _about(session, device, self.number)
        try:
            return keys.unseal(keys.agree(private, session.parties[device].share, about, self.secret), text, about)
        except ValueError as error:
            raise DeviceError(
                f"what device {device} sealed for it cannot be opened",
                place=place,
                remedy=f"have all devices the same file {SECRET_KEY}, and does the server tell them all the same?",
            ) from error


def _about(session: Session, sender: int, receiver: int) -> bytes:
    return session.digest() + f"shares {sender} {receiver}".encode()


@dataclasses.dataclass(frozen=True, slots=True)
class Sum:
    """A round's sum that a device has joined and not yet answered to.

    Attributes:
        device: The device.
        session: The round.
        mask_key: Its private key for masks.
        seed: Of its own mask.
        others: Those with whom it shares masks.
        place: Who and when, for errors.
    """

    device: Device
    session: Session
    mask_key: bytes
    seed: bytes
    others: Sequence[int]
    place: str

    def answer(
        self,
        changes: Iterable[tuple[str, NDArray[np.float32]]],
        received: ArrayRecord,
        told: ConfigRecord,
        *,
        num_examples: int,
        train_loss: float,
    ) -> ArrayRecord:
        """The third answer: what this device changed, masked.

        Args:
            changes: Names and changes of all arrays, in the order of their names.
            received: The model that the server sent.
            told: What it said of how to train it.
            num_examples: That it trained on: its weight in the mean.
            train_loss: Nats per answer token.

        Raises:
            DeviceError: A change is not finite, or the weight is more than the server counted on.
        """
        session, ring = self.session, self.session.ring
        if not 0 < num_examples <= session.total_weight:
            raise DeviceError(
                "a device cannot have more examples than all have together",
                value=f"{num_examples} of {session.total_weight}",
                place=self.place,
            )
        share = num_examples / session.total_weight
        words = np.empty(sum(math.prod(array.shape) for array in received.values()), ring.dtype)
        begin = num_cut = 0
        for name, values in changes:
            self._check_finite(f"array {name}", values)
            encoded, cut = ring.encode(values.reshape(-1), share)
            words[begin : begin + encoded.size] = encoded
            begin, num_cut = begin + encoded.size, num_cut + cut
        loss = np.array([train_loss], np.float32)
        self._check_finite("the training loss", loss)
        largest = 2**TAIL_BITS // len(session.parties) - 1
        in_tail = {
            "devices": 1,
            "examples": num_examples,
            "loss": int(session.loss_ring.encode(np.minimum(loss, np.float32(LOSS_LIMIT)), share)[0][0]),
            "cut": min(num_cut, largest),
        }
        tail = np.array([in_tail[name] for name in IN_TAIL], f"<u{TAIL_BITS // 8}")
        self._mask(words, tail, digest_of(received, told))
        kept = self.device._kept()
        secrets = {name: value for name, value in kept.items() if name not in ("mask-key", "share-key", "seed")}
        self.device._keep({**secrets, "phase": _TRAIN, "summed": session.server_round})
        return ArrayRecord({WORDS: Array(words), TAIL: Array(tail)})

    def _mask(self, words: NDArray[Any], tail: NDArray[Any], model: bytes) -> None:
        session = self.session
        keys.add_mask(session.own_mask(self.seed, model), 1, words, tail)
        for other in self.others:
            try:
                key = session.pair_mask(self.mask_key, other, model)
            except ValueError as error:
                raise DeviceError("a device offered a key that is none", value=other, place=self.place) from error
            keys.add_mask(key, sign_of(self.device.number, other), words, tail)

    def _check_finite(self, what: str, values: NDArray[np.float32]) -> None:
        if not np.isfinite(values).all():
            raise DeviceError(
                "some of its values are not finite numbers",
                place=f"{self.place}: {what}",
                remedy="lower train.learning-rate on this device, or look at its data",
            )


def sign_of(device: int, other: int) -> int:
    """With which sign a device takes the mask that it has in common with another: they cancel in the sum."""
    return 1 if device < other else -1
