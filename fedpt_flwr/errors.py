"""The errors that fedpt-flwr raises on purpose.

    FedPTError
    ├── ConfigError          one or several keys of a run config are wrong
    ├── DataError            a data source cannot be read or used
    ├── ModelError           a model or tokenizer cannot be loaded or used
    │   ├── VocabularyMismatch
    │   └── RemoteError      a large model behind an API cannot be asked, or does not answer as it must
    ├── DeviceError          a device cannot take part
    ├── ReplyError           a device's reply is refused
    │   └── ChangeError      the numbers in it are wrong
    ├── WireError            arrays do not fit the type in which they are to be sent
    ├── RoundError           a round cannot be completed
    ├── PrivacyError         something is not covered by what epsilon says
    ├── RunError             a run folder cannot be written or read
    └── CertificateError     keys or certificates cannot be made or used

Each one answers four questions in one sentence: which rule, which value, where, what to do. Nothing here knows Flower
or torch, so every module may import it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

_MAX_VALUE_CHARS = 200


class FedPTError(Exception):
    """An error that a user can cause and mend.

    Args:
        rule: What must hold, as a sentence without a full stop.
        value: What was found instead, or None if there is nothing to show.
        place: Where: a key, a file and line, a device and round.
        remedy: What to do about it.
        problems: What it consists of, where it is made of several; each gets its own line.
    """

    def __init__(
        self,
        rule: str,
        *,
        value: Any = None,
        place: str | None = None,
        remedy: str | None = None,
        problems: Sequence[object] = (),
    ) -> None:
        super().__init__(rule)  # only `rule` in args, so that the error survives pickling between processes
        self.rule = rule
        self.value = value
        self.place = place
        self.remedy = remedy
        self.problems = tuple(problems)

    def __str__(self) -> str:
        text = f"{self.place}: {self.rule}" if self.place else self.rule
        if self.value is not None:
            shown = repr(self.value)
            if len(shown) > _MAX_VALUE_CHARS:
                shown = shown[: _MAX_VALUE_CHARS - 1] + "…"
            text += f", got {shown}"
        if self.remedy:
            text += f"; {self.remedy}"
        return "\n".join([text, *(f"  - {problem}" for problem in self.problems)])


@contextmanager
def naming(place: str) -> Iterator[None]:
    """Give an error that names no place this one, such as the key of the run config that led there."""
    try:
        yield
    except FedPTError as error:
        error.place = error.place or place
        raise


class ConfigError(FedPTError):
    """One or several keys of a run config are wrong; all of them are in ``problems``."""

    @classmethod
    def of(cls, problems: Sequence[FedPTError]) -> FedPTError:
        """One error for all the problems found; a single one stands for itself."""
        if len(problems) == 1:
            return problems[0]
        return cls(f"{len(problems)} settings of the run config are wrong", problems=problems)


class DataError(FedPTError):
    """A data source cannot be read, or does not hold what the run config says."""


class ModelError(FedPTError):
    """A model or a tokenizer cannot be loaded, placed or used."""


class VocabularyMismatch(ModelError):
    """Models that must share one vocabulary do not."""


class RemoteError(ModelError):
    """A large model behind an API cannot be asked, or does not answer as it must."""


class DeviceError(FedPTError):
    """A device cannot take part in a round, or in the run."""


class ReplyError(FedPTError):
    """A device's reply breaks the wire format and is refused."""


class ChangeError(ReplyError):
    """A device's change is in the right form, and its numbers cannot be used; which these are depends on its data."""


class WireError(FedPTError):
    """Arrays do not fit the type in which they are to be sent."""


class RoundError(FedPTError):
    """A round had too few usable replies, or too few devices to begin with."""


class PrivacyError(FedPTError):
    """A private run cannot go on, because epsilon would say nothing about what comes next."""


class RunError(FedPTError):
    """A run folder cannot be written, read or found."""


class CertificateError(FedPTError):
    """Keys or certificates of a deployment cannot be made, read or added to."""
