"""What all devices of a round's sum must agree on: who takes part, with which keys, and how numbers are read.

A hash of all of it goes into every key and every seal. A server that tells two devices different things gets seals that
do not open, and masks that do not cancel.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from fedpt_flwr.config import SECURE_SUM_DEVICES, RunConfig
from fedpt_flwr.errors import FedPTError
from fedpt_flwr.secure_sum.keys import KEY_BYTES, agree, derive
from fedpt_flwr.secure_sum.ring import Ring

RECORD = "secure-sum"
"""Name of the protocol's record in every message."""

KEYS, SHARES, REVEAL = "query.sum_keys", "query.sum_shares", "query.sum_reveal"
"""Types of the messages of the three phases beside ``train``."""

WORDS, TAIL = "words", "tail"
"""The two arrays of a masked answer: the change of all weights, and what follows."""

IN_TAIL = ("devices", "examples", "loss", "cut")
"""Words of the tail, 32 bits each: 1; the examples trained on; their share of the loss; how many values were cut."""

TAIL_BITS = 32
LOSS_LIMIT = 64.0
"""Largest training loss that a sum can carry, nats per answer token."""

MAX_DEVICES = 256
"""Every device talks to every other, through the server."""

_LABEL = b"fedpt secure sum 1"


@dataclasses.dataclass(frozen=True, slots=True)
class Rules:
    """What a run says of its sums.

    Attributes:
        stay: Share of a round's devices that must stay to its end, above one half.
        limit: Largest change of a weight in a round.
        bits: Of a word on the wire.
        at_least: Devices that must stay, however few began.
    """

    stay: float
    limit: float
    bits: int
    at_least: int = SECURE_SUM_DEVICES

    @classmethod
    def of(cls, config: RunConfig) -> Rules:
        """As the run config has them."""
        privacy, at_least = config.privacy, max(SECURE_SUM_DEVICES, config.min_replies)
        return cls(privacy.secure_sum_threshold, privacy.secure_sum_range, privacy.secure_sum_bits, at_least)

    def threshold(self, num_devices: int) -> int:
        """How many of so many devices must stay; more than there are, if they are too few to begin.

        More than half, so that no two groups of devices that have nobody in common can both open something.
        """
        return max(self.at_least, num_devices // 2 + 1, math.ceil(self.stay * num_devices - 1e-9))


@dataclasses.dataclass(frozen=True, slots=True)
class PublicKeys:
    """A device's keys of one round: with one it agrees on masks, with the other it is sent shares."""

    mask: bytes
    share: bytes


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """One round's sum.

    Attributes:
        server_round: From 1.
        total_weight: Examples of all these devices, as they said when they introduced themselves.
        parties: Public keys by device number, in the order of the numbers.
        rules: The run's.
    """

    server_round: int
    total_weight: int
    parties: dict[int, PublicKeys]
    rules: Rules

    @property
    def threshold(self) -> int:
        """How many devices must stay."""
        return self.rules.threshold(len(self.parties))

    @property
    def ring(self) -> Ring:
        """How changes of weights are read."""
        return Ring(self.rules.bits, self.rules.limit, len(self.parties))

    @property
    def loss_ring(self) -> Ring:
        """How the training loss is read."""
        return Ring(TAIL_BITS, LOSS_LIMIT, len(self.parties))

    def digest(self) -> bytes:
        """A hash of everything that the devices must have in common, 32 bytes."""
        rules = self.rules
        numbers = (self.server_round, self.total_weight, self.threshold, rules.bits, rules.limit.hex())
        digest = hashlib.sha256(_LABEL + repr(numbers).encode())
        for device, keys in self.parties.items():
            digest.update(repr(device).encode() + b":" + keys.mask + keys.share)  # the keys are of one length
        return digest.digest()

    def point(self, device: int) -> int:
        """Where a device's shares are read: not at 0, where the secret is."""
        return device + 1

    def pair_mask(self, private: bytes, other: int, model: bytes) -> bytes:
        """The key of the mask that a device has in common with another.

        Args:
            private: One's own private key for masks.
            other: Number of the other.
            model: Hash of what both were sent to train, see :func:`digest_of`.

        Raises:
            ValueError: The other's public key is none.
        """
        return agree(private, self.parties[other].mask, b"pair mask" + self.digest() + model)

    def own_mask(self, seed: bytes, model: bytes) -> bytes:
        """The key of the mask that a device has for itself."""
        return derive(seed, b"own mask" + self.digest() + model)

    def to_record(self) -> ConfigRecord:
        """As the server sends it and a device keeps it."""
        return ConfigRecord(
            {
                "round": self.server_round,
                "total-weight": self.total_weight,
                "devices": list(self.parties),
                "mask-keys": [keys.mask for keys in self.parties.values()],
                "share-keys": [keys.share for keys in self.parties.values()],
            }
        )

    @classmethod
    def from_record(cls, record: ConfigRecord, rules: Rules, *, error: type[FedPTError], place: str) -> Session:
        """Read and check what :meth:`to_record` made.

        Raises:
            FedPTError: Of the type ``error``: something is missing or has another type.
        """
        reader = Reader(record, error, place)
        devices = reader.numbers("devices")
        mask, share = (reader.texts(name, len(devices), KEY_BYTES) for name in ("mask-keys", "share-keys"))
        if devices != sorted(set(devices)) or len({*mask, *share}) != 2 * len(devices):
            raise error("devices must be in order, and every key another", value=devices, place=place)
        return cls(
            server_round=reader.number("round"),
            total_weight=reader.number("total-weight"),
            parties={device: PublicKeys(*keys) for device, *keys in zip(devices, mask, share, strict=True)},
            rules=rules,
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Reader:
    """Reads a record that came over the wire.

    Attributes:
        record: The record.
        error: What is raised where it is not as it must be.
        place: Who and when, for the error.
    """

    record: ConfigRecord
    error: type[FedPTError]
    place: str

    @classmethod
    def of(cls, content: RecordDict, error: type[FedPTError], place: str) -> Reader:
        """A reader of the protocol's record of a message.

        Raises:
            FedPTError: There is none.
        """
        if RECORD not in content.config_records:
            raise error(f"the message must hold a record {RECORD}", value=sorted(content), place=place)
        return cls(content.config_records[RECORD], error, place)

    def number(self, name: str) -> int:
        """A whole number of at least 0."""
        value = self.record.get(name)
        if not _is_number(value):
            raise self._wrong(name, "a whole number of at least 0", value)
        return int(value)  # type: ignore[arg-type]

    def numbers(self, name: str) -> list[int]:
        """A list of whole numbers of at least 0."""
        value = self.record.get(name)
        if not isinstance(value, list) or not all(map(_is_number, value)) or len(value) > MAX_DEVICES:
            raise self._wrong(name, f"at most {MAX_DEVICES} whole numbers of at least 0", value)
        return [int(part) for part in value]

    def text(self, name: str, length: int) -> bytes:
        """Some bytes."""
        return _checked_text(self, name, self.record.get(name), length)

    def texts(self, name: str, count: int, length: int) -> list[bytes]:
        """A list of so many texts of so many bytes."""
        value = self.record.get(name)
        if not isinstance(value, list) or len(value) != count:
            raise self._wrong(name, f"{count} texts of {length} bytes", type(value).__name__)
        return [_checked_text(self, name, part, length) for part in value]

    def _wrong(self, name: str, rule: str, value: Any) -> FedPTError:
        return self.error(f"{name} of the record {RECORD} must be {rule}", value=value, place=self.place)


def _checked_text(reader: Reader, name: str, value: Any, length: int) -> bytes:
    if not isinstance(value, bytes) or len(value) != length:
        raise reader._wrong(name, f"{length} bytes", type(value).__name__)
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def digest_of(arrays: ArrayRecord, told: ConfigRecord) -> bytes:
    """A hash of what devices are sent to train, and of how: those that are told different things share no masks.

    Otherwise a server could send the others a model that they cannot change (Pasquini et al. 2022, arXiv:2111.07380),
    or a round whose learning rate is 0, and would have one device's change in the sum.

    Args:
        arrays: The model.
        told: All that the train message says beside it: round, proximal term, fingerprints.
    """
    digest = hashlib.sha256(_LABEL)
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(repr((name, array.dtype, tuple(array.shape), len(array.data))).encode() + array.data)
    digest.update(repr(sorted(told.items())).encode())
    return digest.digest()
