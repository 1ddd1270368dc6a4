"""From token ids to text, piece by piece: what of an answer can be shown now, and where a stop string ends it.

A token is not a text. Its bytes may be half of a character, and sentencepiece-like tokenizers drop the space before a
token that comes first. So the text of new tokens is read off a window that begins a few tokens earlier, as vLLM and
text-generation-inference do. Nothing here knows models or HTTP.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What decoders write for bytes that are no character, or not yet."""

_MAX_PENDING = 3
"""Bytes, and so tokens or replacement characters, that a character of UTF-8 can lack its last byte for."""

_LONGEST_CONTEXT = 8
"""Tokens; two characters of four bytes, each byte a token."""

_WINDOW = 16
"""Tokens from which on a window begins anew with its end.

Three replacement characters that are held back come from at most nine bytes, and a window that begins inside a
character misreads at most three: with so many tokens the two never meet.
"""


class TextStream:
    """The text of one answer, while its tokens come.

    Whatever is given out is final. Held back is what the next tokens may change: the beginning of a character, and what
    may be the beginning of a stop string. Where two stop strings overlap, the one that is complete first counts, and of
    two that end together the longer one; so the text does not depend on how it falls into tokens.

    Args:
        tokenizer: Its special tokens are no text.
        prompt_ids: What the answer follows: context for the first tokens, and never given out.
        stop: Texts that end the answer and are no part of it; none of them empty.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._window = _context(tokenizer, prompt_ids)
        self._decoded = decode(tokenizer, self._window)
        self._num_given = len(self._decoded)  # characters of the window's text that went on to the stop strings
        self._num_pending = 0  # tokens since the text last ended in a whole character
        self._stops = _Stops(stop) if stop else None
        self._parts: list[str] = []

    @property
    def text(self) -> str:
        """All that was given out so far."""
        return "".join(self._parts)

    @property
    def stopped(self) -> bool:
        """Whether a stop string is complete: there will be no more text."""
        return self._stops is not None and self._stops.found

    def push(self, token_id: int) -> str:
        """Take in the next token.

        Returns:
            What can be given out now; may be empty.
        """
        if self.stopped:
            return ""
        self._window.append(token_id)
        decoded = decode(self._tokenizer, self._window)
        if decoded == self._decoded and not decode(self._tokenizer, [token_id, token_id]):
            self._window.pop()  # a special token: the bytes before and after it are neighbours
            return ""
        self._decoded = decoded
        if decoded.endswith(_REPLACEMENT):
            self._num_pending += 1
            # More tokens than a character has bytes: some of that is no beginning of a character and stays as it is.
            stable = len(decoded) - _MAX_PENDING
            if self._num_pending <= _MAX_PENDING:
                stable = len(decoded.rstrip(_REPLACEMENT))
        else:
            self._num_pending = 0
            stable = len(decoded)
        stable = max(stable, self._num_given)
        piece = decoded[self._num_given : stable]
        self._num_given = stable
        if len(self._window) > _WINDOW:
            self._shorten()
        if self._stops is not None:
            piece = self._stops.push(piece)
        self._parts.append(piece)
        return piece

    def finish(self) -> str:
        """Say that no token follows.

        Returns:
            What was held back.
        """
        if self.stopped:
            return ""
        piece = self._decoded[self._num_given :]
        self._num_given = len(self._decoded)
        if self._stops is not None:
            piece = self._stops.push(piece) + self._stops.rest()
        self._parts.append(piece)
        return piece

    def _shorten(self) -> None:
        """Begin the window anew, with as little as shows that something came before."""
        held = len(self._decoded) - self._num_given
        if not self._num_pending:
            self._window = _context(self._tokenizer, self._window) or self._window[-_LONGEST_CONTEXT:]
        elif len(self._window) > 2 * _WINDOW:  # bytes that are no characters, for as long as the window is
            self._window = self._window[-_WINDOW:]
        else:
            return
        self._decoded = decode(self._tokenizer, self._window)
        self._num_given = max(0, len(self._decoded) - held)


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
    """Tokens as text, with all their spaces."""
    # The clean-up of spaces would rewrite " ." as ".", and with it what has been given out.
    return str(
        tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
    )


def _context(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> list[int]:
    """The fewest tokens that can stand for a text: some of its last, that make whole characters.

    If the text ends inside a character, the tokens of that character are left out: they are not the answer's.
    """
    for end in range(len(token_ids), max(-1, len(token_ids) - _MAX_PENDING - 1), -1):
        for begin in range(end - 1, max(-1, end - _LONGEST_CONTEXT - 1), -1):
            context = list(token_ids[begin:end])
            text = decode(tokenizer, context)
            if text and _REPLACEMENT not in text:
                return context
    return []


class _Stops:
    """Looks for stop strings in a text that comes in pieces, by Knuth, Morris and Pratt: in time linear in the text.

    Args:
        stops: What to look for.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.found = False
        self._stops = [(stop, _borders(stop)) for stop in stops]
        self._matched = [0] * len(stops)  # for each, how much of its beginning the text ends with
        self._held = ""

    def push(self, piece: str) -> str:
        """Take in a piece; what of the text so far can be no part of a stop string, and was not returned before."""
        text = self._held + piece
        for position in range(len(self._held), len(text)):
            character = text[position]
            longest = 0
            for number, (stop, borders) in enumerate(self._stops):
                matched = self._matched[number]
                while matched and stop[matched] != character:
                    matched = borders[matched]
                if stop[matched] == character:
                    matched += 1
                self._matched[number] = matched
                if matched == len(stop):
                    longest = max(longest, matched)
            if longest:
                self.found = True
                self._held = ""
                return text[: position + 1 - longest]
        length = len(text) - max(self._matched)
        self._held = text[length:]
        return text[:length]

    def rest(self) -> str:
        """What was held back, if it has turned out to be no stop string."""
        rest, self._held = self._held, ""
        return rest


def _borders(text: str) -> list[int]:
    """For each length, of the beginning of that length: how much of ``text``'s beginning it ends with, itself apart."""
    borders = [0, 0]
    for character in text[1:]:
        length = borders[-1]
        while length and text[length] != character:
            length = borders[length]
        borders.append(length + 1 if text[length] == character else 0)
    return borders


# --- one token by itself ----------------------------------------------------------------------------------------------


def token_text(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    """What a token adds to a text, with its leading space, and with the name of a special token.

    Part of a character is shown as the replacement character; :func:`token_bytes` says more.
    """
    once, twice = (decode(tokenizer, [token_id] * count, skip_special_tokens=False) for count in (1, 2))
    if _REPLACEMENT in once:  # next to each other, parts of characters may read as characters
        return once
    return (twice[len(once) :] if twice.startswith(once) else "") or once


def token_bytes(tokenizer: PreTrainedTokenizerBase, token_id: int) -> list[int] | None:
    """A token's bytes in UTF-8, which may be part of a character; None where the tokenizer does not tell them."""
    text = token_text(tokenizer, token_id)
    if _REPLACEMENT not in text:
        return list(text.encode())
    token = str(tokenizer.convert_ids_to_tokens(token_id))
    if byte := re.fullmatch("<0x([0-9A-F]{2})>", token):
        found = bytes.fromhex(byte[1])
    elif all(character in _BYTES for character in token):
        found = bytes(_BYTES[character] for character in token)
    else:
        found = token.encode(errors="replace")
    # Whichever alphabet the tokenizer has: those are its bytes if they read as the token does.
    return list(found) if found.decode(errors="replace") == text else None


def _byte_alphabet() -> dict[str, int]:
    """The characters that stand for bytes in the vocabulary of GPT-2 and of all that came after it."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + number): byte for number, byte in enumerate(hidden)}


_BYTES = _byte_alphabet()
