"""The files of a folder, and the values in them, as far as they are what they should be.

A value of another kind than expected counts as absent: files of other versions, or edited ones, must not stop a report.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedpt_flwr.report.wording import count_of

_LARGEST = 1e21  # what lies beyond is no measurement, and leaves no room in a plot


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads the files of a folder as far as they can be read, and notes what cannot.

    Attributes:
        folder: The folder.
        notes: A sentence for each damage found so far.
    """

    folder: Path
    notes: list[str] = field(default_factory=list)

    def mapping(self, name: str) -> dict[str, Any]:
        """A JSON file's object; empty if it is not there or damaged."""
        value = self._json(name)
        if value is not None and not isinstance(value, dict):
            self.notes.append(f"{name} does not hold an object, so nothing is taken from it.")
        return as_mapping(value)

    def items(self, name: str) -> list[dict[str, Any]]:
        """The objects in a JSON file's list; none if it is not there or damaged."""
        return as_mappings(self._json(name))

    def lines(self, name: str) -> list[dict[str, Any]]:
        """The objects of a JSON Lines file, without its damaged lines."""
        text = self._text(name)
        rows, damaged = [], []
        lines = text.rstrip("\n").split("\n") if text else []
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line) if line.strip() else None
            except (ValueError, RecursionError):
                row = False
            if isinstance(row, dict):
                rows.append(row)
            elif row is not None:
                damaged.append(number)
        if damaged == [len(lines)]:
            self.notes.append(f"The last line of {name} is cut short, as a killed run leaves it, and left out.")
        elif damaged:
            self.notes.append(
                f"{count_of(len(damaged), 'damaged line')} of {name} left out, the first is {damaged[0]}."
            )
        return rows

    def _json(self, name: str) -> Any:
        text = self._text(name)
        try:
            return None if text is None else json.loads(text)
        except (ValueError, RecursionError) as error:
            self.notes.append(f"{name} is damaged ({error}), so nothing is taken from it.")
            return None

    def _text(self, name: str) -> str | None:
        try:
            return (self.folder / name).read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return None
        except OSError as error:
            self.notes.append(f"{name} cannot be read ({error.strerror}).")
            return None


def as_mapping(value: Any) -> dict[str, Any]:
    """The value, if it is an object; else an empty one."""
    return value if isinstance(value, dict) else {}


def as_mappings(value: Any) -> list[dict[str, Any]]:
    """The objects in the value, if it is a list."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def as_number(value: Any) -> float | None:
    """The value, if it is a number that can be shown."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if -_LARGEST < value < _LARGEST else None  # false for NaN


def as_whole(value: Any) -> int | None:
    """The value, if it is a whole number."""
    number = as_number(value)
    return int(number) if number is not None and number == int(number) else None


def as_numbers(value: Any) -> tuple[float, ...]:
    """Those of a list's items that are numbers."""
    found = map(as_number, value) if isinstance(value, list) else ()
    return tuple(number for number in found if number is not None)


def as_interval(value: Any) -> tuple[float, float] | None:
    """The two ends of an interval."""
    ends = as_numbers(value)
    return (ends[0], ends[1]) if len(ends) == 2 and ends[0] <= ends[1] else None


def as_text(value: Any) -> str:
    """A value of JSON as a person would write it."""
    if isinstance(value, str):
        return value
    return "" if value is None else json.dumps(value, ensure_ascii=False)
