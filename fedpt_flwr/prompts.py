"""Between records and text: how a record becomes a prompt, and which part of a text counts as its answer.

A record is what a data set holds: a mapping of field names to values. This module knows nothing of files, tokenizers
or models.
"""

from __future__ import annotations

import math
import re
import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedpt_flwr.errors import DataError

_EXACT_FLOAT_LIMIT = 2.0**53
"""Below this every integral float is exactly one integer."""

# `-$1,234.50` in its parts. Zeros in front are refused, so that codes such as 007 stay text.
_NUMBER = re.compile(
    r"(?P<sign>[-+]?)\$?(?P<whole>0|[1-9][0-9]*|[1-9][0-9]{0,2}(?:,[0-9]{3})+|)(?:\.(?P<part>[0-9]*))?"
)
_SIGN_AFTER_DOLLAR = re.compile(r"\$([-+])")


@dataclass(frozen=True, slots=True)
class Example:
    """One thing to learn or to answer."""

    prompt: str
    """What a model is shown."""

    answer: str
    """What it should say next; empty where the record has no answer."""

    group: str = ""
    """What the example belongs to (a user, a site, a label): partitions are made by it."""

    ending: str = ""
    """What is said between the answer and the end of sequence, such as a chat template's end of a turn."""


@dataclass(frozen=True, slots=True)
class Template:
    r"""A text with places for a record's fields, such as ``Question: {question}\nAnswer:``.

    Braces that are meant as braces are written twice, ``{{`` and ``}}``. A placeholder is a field's name and nothing
    else: attributes, indices, conversions and format specifications are refused, because a template comes from a run
    config and must not reach into objects. A template without placeholders is allowed.

    Args:
        text: The template.

    Raises:
        DataError: ``text`` is not such a template.
    """

    text: str
    _parts: tuple[tuple[str, str | None], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_parts", _parse(self.text))

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the fields that are used, each once, in order of appearance."""
        return tuple(dict.fromkeys(name for _, name in self._parts if name is not None))

    @property
    def ending(self) -> str:
        """The template's own text after its last field; all of it where there are no fields."""
        num_before = max((number for number, (_, name) in enumerate(self._parts, 1) if name is not None), default=0)
        return "".join(literal for literal, _ in self._parts[num_before:])

    def render(self, record: Mapping[str, Any], *, place: str | None = None) -> str:
        """The text for one record; see `field_text` for how values are written.

        Args:
            record: Field names and values; fields that the template does not use are ignored.
            place: Where the record comes from, for errors.

        Raises:
            DataError: A field is missing, or its value is not text, a number or the like.
        """
        return "".join(
            literal if name is None else literal + field_text(record, name, place=place)
            for literal, name in self._parts
        )


def _parse(text: str) -> tuple[tuple[str, str | None], ...]:
    """Pairs of literal text and the field that follows it, None for no field."""
    try:
        parts = list(string.Formatter().parse(text))
    except ValueError as error:
        raise DataError(
            f"the template cannot be read ({error})",
            value=text,
            remedy="write braces that are meant as braces twice, as {{ and }}",
        ) from error
    for _, name, specification, conversion in parts:
        if name is not None and (not name or specification or conversion or re.search(r"[.\[\]{}]", name)):
            raise DataError(
                "a placeholder of a template must be a field's name in braces and nothing else",
                value=text,
                remedy="write {field} without . [ ! or :, and braces that are meant as braces twice, as {{ and }}",
            )
    return tuple((literal, name) for literal, name, _, _ in parts)


def field_text(record: Mapping[str, Any], name: str, *, place: str | None = None) -> str:
    """A record's field as text.

    Text stays as it is. Other values are written as ``str`` writes them, except that a float without a fraction is
    written as the integer it is: JSON does not tell 51 from 51.0, and a model should learn to say 51.

    Args:
        record: Field names and values.
        name: The field.
        place: Where the record comes from, for errors.

    Raises:
        DataError: The field is missing, None, not a number (NaN) or infinite, holds a list, an object or bytes, or is
            text that cannot be encoded as UTF-8.
    """
    if name not in record:
        raise DataError(
            f"the record has no field {name!r}",
            place=place,
            remedy="its fields are " + (", ".join(repr(key) for key in record) or "none at all"),
        )
    value = record[name]
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise DataError(
            f"the field {name!r} must have a value, got none", place=place, remedy="fill it in, or remove the record"
        )
    if isinstance(value, float) and math.isinf(value):
        raise DataError(
            f"the field {name!r} must be text or a finite number",
            value=value,
            place=place,
            remedy="mend or remove the record",
        )
    if isinstance(value, (Mapping, list, tuple, set, bytes)):
        raise DataError(
            f"the field {name!r} must be text or a number",
            value=value,
            place=place,
            remedy="name another field, or write the part that you need into a field of its own",
        )
    if isinstance(value, float) and value.is_integer() and abs(value) < _EXACT_FLOAT_LIMIT:
        return str(int(value))
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # JSON can spell half of a surrogate pair ("\ud800"); tokenizers fail on it with a message that names nothing.
        raise DataError(
            f"the field {name!r} must be valid Unicode text (character {error.start + 1} is half of a surrogate pair)",
            value=text,
            place=place,
            remedy="mend or remove the record",
        ) from error
    return text


def extract_answer(text: str, pattern: str) -> str | None:
    r"""The part of a text that is compared for exact match.

    Args:
        text: An answer of a data set, or what a model said.
        pattern: A regular expression, searched for in ``text``: its last match counts, and of that the first group if
            there is one, such as ``#### (.+)`` for GSM8K. Empty: the whole text.

    Returns:
        The part without white space around it; None if nothing matches, which is an invalid answer.

    Raises:
        DataError: ``pattern`` is not a regular expression.
    """
    if not pattern:
        return text.strip()
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise DataError(
            f"the answer pattern must be a regular expression ({error})",
            value=pattern,
            remedy=r"write characters such as ( [ * + ? that are meant literally with a \ before them",
        ) from error
    last = None
    for match in compiled.finditer(text):
        last = match
    if last is None:
        return None
    part: str | None = last.group(1 if compiled.groups else 0)
    return None if part is None else part.strip()


def normalise_answer(text: str) -> str:
    """An answer in the form in which answers are equal or not.

    White space is collapsed. If the whole text is a number, it gets one spelling: ``1,234`` becomes ``1234``, ``3.50``
    becomes ``3.5``, ``5.`` becomes ``5``, ``$18`` becomes ``18``, ``-0`` becomes ``0``. No other text can have that
    form, so two answers are compared as numbers only if both are. Signs, decimal points and letter case always count.
    """
    collapsed = " ".join(text.split())
    spelled = _SIGN_AFTER_DOLLAR.sub(r"\1$", collapsed.replace("\N{MINUS SIGN}", "-"))
    number = _NUMBER.fullmatch(spelled)
    if number is None or not (number["whole"] or number["part"]):
        return collapsed
    whole = number["whole"].replace(",", "") or "0"
    part = (number["part"] or "").rstrip("0")
    magnitude = f"{whole}.{part}" if part else whole
    return f"-{magnitude}" if number["sign"] == "-" and magnitude != "0" else magnitude
