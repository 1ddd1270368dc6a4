r"""The shapes in which people keep their records, and the examples that each becomes.

| ``data.format`` | a record | becomes |
| --- | --- | --- |
| ``template`` | any fields | the prompt that ``data.template`` writes, and the field ``data.answer-field`` |
| ``instruction`` | ``instruction``, perhaps ``input`` or ``context``, ``output`` or ``response`` | prompt and answer |
| ``completion`` | ``prompt``, ``completion`` | prompt and answer as they stand |
| ``chat`` | ``messages`` of ``role`` and ``content`` | one example for each turn of the assistant |
| ``text`` | ``text`` | no prompt: all of the text is learnt |
| ``classification`` | ``text``, ``label`` | prompt and answer |
| ``auto`` | one of the five above | whichever has the fields of the first record; then all must have them |

A turn of the assistant is learnt after the prompt that a service would give the model there: the tokenizer's chat
template with all turns before. So what others say is never learnt, and a template that leaves something of earlier
turns out does so in training as it does later. Nothing here reads files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import jinja2

from fedpt_flwr.errors import DataError
from fedpt_flwr.prompts import Example, Template, field_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Record = Mapping[str, Any]
Message = Mapping[str, str]
"""``role`` and ``content``."""

INSTRUCTIONS = ("system", "developer")
"""Roles that tell the assistant what to do, and wait for no answer."""

_ROLES = ("system", "developer", "user", "assistant")
_SHARED_GPT_ROLES = {"human": "user", "gpt": "assistant"}
_MAX_REASON_CHARS = 300


class Shape(Protocol):
    """How a record becomes examples."""

    @property
    def name(self) -> str:
        """One of ``data.format``, never ``auto``."""

    @property
    def request(self) -> Template:
        """What a text that somebody types is put into, to be a prompt such as the examples have."""

    def examples(self, record: Record, *, place: str | None = None) -> list[Example]:
        """The examples of a record, at least one, without their group.

        Raises:
            DataError: It is of another shape, or has no answer.
        """

    def prompt(self, record: Record, *, place: str | None = None) -> str:
        """The prompt of a record that needs no answer.

        Raises:
            DataError: It is of another shape.
        """


@dataclass(frozen=True, slots=True)
class TemplateShape:
    """Any fields, written by a template.

    Attributes:
        request: The template.
        answer_field: Field that holds the answer; empty: examples without answers.
    """

    request: Template
    answer_field: str
    name: str = "template"

    def examples(self, record: Record, *, place: str | None = None) -> list[Example]:
        """See :class:`Shape`."""
        answer = _answer(record, self.answer_field, place) if self.answer_field else ""
        return [Example(self.prompt(record, place=place), answer)]

    def prompt(self, record: Record, *, place: str | None = None) -> str:
        """See :class:`Shape`."""
        return self.request.render(record, place=place)


@dataclass(frozen=True, slots=True)
class FieldsShape:
    """Fields of fixed names.

    Attributes:
        name: The shape's.
        asked: Field of the prompt; empty: there is no prompt.
        answers: Names of the field that holds the answer, of which a record has one.
        request: The prompt.
        contexts: Names of a field that may be absent or empty.
        with_context: The prompt where there is one, with the place ``context`` for it.
    """

    name: str
    asked: str
    answers: tuple[str, ...]
    request: Template
    contexts: tuple[str, ...] = ()
    with_context: Template | None = None

    def examples(self, record: Record, *, place: str | None = None) -> list[Example]:
        """See :class:`Shape`."""
        prompt = self.prompt(record, place=place)
        there = [name for name in self.answers if name in record]
        if len(there) != 1:
            raise self._lacks(record, "exactly one", self.answers, place)
        return [Example(prompt, _answer(record, there[0], place))]

    def prompt(self, record: Record, *, place: str | None = None) -> str:
        """See :class:`Shape`."""
        if self.asked and self.asked not in record:
            raise self._lacks(record, "exactly one", (self.asked,), place)
        there = [name for name in self.contexts if record.get(name) not in (None, "")]
        if len(there) > 1:
            raise self._lacks(record, "at most one", self.contexts, place)
        if there and self.with_context is not None:
            context = field_text(record, there[0], place=place)
            if context.strip():
                return self.with_context.render({self.asked: record[self.asked], "context": context}, place=place)
        return self.request.render(record, place=place)

    def _lacks(self, record: Record, number: str, names: Sequence[str], place: str | None) -> DataError:
        one_of = "the field " if len(names) == 1 else f"{number} of the fields "
        return DataError(
            f"a record of the shape {self.name} must have {one_of}{' and '.join(map(repr, names))}",
            place=place,
            remedy=f"{_fields(record)}; mend the record, or set data.format to the shape that it has",
        )


INSTRUCTION = FieldsShape(
    name="instruction",
    asked="instruction",
    answers=("output", "response"),
    request=Template("Instruction:\n{instruction}\n\nResponse:\n"),
    contexts=("input", "context"),
    with_context=Template("Instruction:\n{instruction}\n\nContext:\n{context}\n\nResponse:\n"),
)
COMPLETION = FieldsShape(name="completion", asked="prompt", answers=("completion",), request=Template("{prompt}"))
TEXT = FieldsShape(name="text", asked="", answers=("text",), request=Template(""))
CLASSIFICATION = FieldsShape(
    name="classification", asked="text", answers=("label",), request=Template("Text:\n{text}\n\nLabel:\n")
)
CHAT_REQUEST = Template("User:\n{message}\n\nAssistant:\n")
"""How what a user says is written where the tokenizer has no chat template."""


@dataclass(frozen=True)
class ChatShape:
    """Conversations, written by the tokenizer's chat template; without one, as :func:`join_turns` writes them.

    Attributes:
        tokenizer: Whose chat template and end of sequence.
    """

    tokenizer: PreTrainedTokenizerBase
    name: str = "chat"
    request: Template = CHAT_REQUEST

    def examples(self, record: Record, *, place: str | None = None) -> list[Example]:
        """See :class:`Shape`."""
        messages = read_messages(record, place=place)
        answered = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if not answered:
            raise DataError(
                "a conversation must have a turn of the assistant, or there is nothing to learn",
                place=place,
                remedy="remove the record, or add what the assistant says",
            )
        return [self._example(messages, number, place) for number in answered]

    def prompt(self, record: Record, *, place: str | None = None) -> str:
        """All that is said before the assistant's last word, or all of it if that is not the last."""
        messages = read_messages(record, place=place)
        return self._written(messages[:-1] if messages[-1]["role"] == "assistant" else messages, place)

    def _written(self, messages: Sequence[Message], place: str | None) -> str:
        if not messages:
            raise DataError(
                "a conversation must not begin with the assistant, who answers what was said before",
                place=place,
                remedy="put a message of the system or the user before, or remove the first one",
            )
        if self.tokenizer.chat_template:
            return write_by_chat_template(messages, self.tokenizer, place=place)
        return join_turns(
            [
                (turn["role"], self.request.render({"message": turn["content"]}))
                if turn["role"] == "user"
                else (turn["role"], turn["content"])
                for turn in messages
            ]
        )

    def _example(self, messages: Sequence[Message], number: int, place: str | None) -> Example:
        """The assistant's turn with this index, after all that stands before it."""
        said = messages[number]["content"].strip()
        if not said:
            raise DataError(
                f"message {number + 1}, of the assistant, must not be empty",
                place=place,
                remedy="fill it in, or remove it with the message before",
            )
        before = self._written(messages[:number], place)
        if not self.tokenizer.chat_template:
            return Example(before, messages[number]["content"])
        whole = write_by_chat_template(messages[: number + 1], self.tokenizer, place=place, for_answer=False)
        begin = whole.find(said, len(before))
        if not whole.startswith(before) or begin < 0:
            raise DataError(
                f"the tokenizer's chat template must write message {number + 1} of the assistant after the prompt for "
                "it and as it stands",
                value=whole[-200:],
                place=place,
                remedy="use a chat template that does, or data.format='template'",
            )
        end = begin + len(said)
        # The tokenizer's own end of sequence is put behind every answer in any case.
        closing, eos = whole[end:].strip(), self.tokenizer.eos_token or ""
        return Example(before, whole[len(before) : end], ending=closing.removesuffix(eos) if eos else closing)


@dataclass(frozen=True)
class AutoShape:
    """Whatever shape the first record has.

    Attributes:
        tokenizer: For conversations; None: they are refused.
    """

    tokenizer: PreTrainedTokenizerBase | None

    def of(self, record: Record, *, place: str | None = None) -> Shape:
        """The shape that has this record's fields.

        Raises:
            DataError: There is none.
        """
        names = record.keys()
        if names & {"messages", "conversations"}:
            return chat_shape(self.tokenizer)
        if "instruction" in names and names & set(INSTRUCTION.answers):
            return INSTRUCTION
        if {"prompt", "completion"} <= names:
            return COMPLETION
        if {"text", "label"} <= names:
            return CLASSIFICATION
        if "text" in names:
            return TEXT
        raise DataError(
            "the shape of the records is not one that is known by its fields",
            place=place,
            remedy=f"{_fields(record)}; set data.format='template' with data.template and data.answer-field, or rename "
            "them to instruction and response, prompt and completion, messages, text and label, or text",
        )


def make_shape(
    data_format: str, *, template: Template, answer_field: str, tokenizer: PreTrainedTokenizerBase | None
) -> Shape | AutoShape:
    """The shape that ``data.format`` names.

    Args:
        data_format: One of ``data.format``.
        template: The run's template, for the format ``template``.
        answer_field: Field of the answer, for the same.
        tokenizer: For conversations.

    Raises:
        DataError: Conversations need a tokenizer, and none is given.
    """
    if data_format == "template":
        return TemplateShape(template, answer_field)
    if data_format == "auto":
        return AutoShape(tokenizer)
    if data_format == "chat":
        return chat_shape(tokenizer)
    return {shape.name: shape for shape in (INSTRUCTION, COMPLETION, TEXT, CLASSIFICATION)}[data_format]


def chat_shape(tokenizer: PreTrainedTokenizerBase | None) -> ChatShape:
    """The shape ``chat``.

    Raises:
        DataError: There is no tokenizer to write conversations with.
    """
    if tokenizer is None:
        raise DataError("conversations are written by the small model's tokenizer, which is not here")
    return ChatShape(tokenizer)


# --- conversations ----------------------------------------------------------------------------------------------------


def read_messages(record: Record, *, place: str | None = None) -> list[dict[str, str]]:
    """The messages of a record, as ``role`` and ``content``.

    ``messages`` of ``role`` and ``content``, or ``conversations`` of ``from`` (``human``, ``gpt``) and ``value``.

    Raises:
        DataError: Something is missing, has another type or an unknown role, or nobody says anything.
    """
    names = ("messages", "role", "content") if "messages" in record else ("conversations", "from", "value")
    given = record.get(names[0])
    if given is None:
        raise DataError(
            "a record of the shape chat must have the field 'messages', a list of role and content",
            place=place,
            remedy=f"{_fields(record)}; mend the record, or set data.format to the shape that it has",
        )
    if not isinstance(given, list) or not given:
        raise DataError(
            f"{names[0]} must be a list of at least one message",
            value=given,
            place=place,
            remedy=f'write [{{"{names[1]}": "user", "{names[2]}": "..."}}, ...]',
        )
    messages = []
    for number, message in enumerate(given, 1):
        if not isinstance(message, Mapping) or not {names[1], names[2]} <= message.keys():
            raise DataError(
                f"message {number} must have {names[1]} and {names[2]}", value=message, place=place, remedy="add them"
            )
        role = message[names[1]]
        role = _SHARED_GPT_ROLES.get(role, role) if isinstance(role, str) else role
        if role not in _ROLES:
            raise DataError(
                f"the role of message {number} must be one of {', '.join(_ROLES)}",
                value=role,
                place=place,
                remedy="rename it, or remove the record: calls of tools cannot be learnt",
            )
        if not isinstance(message[names[2]], str):
            raise DataError(
                f"the content of message {number} must be text",
                value=message[names[2]],
                place=place,
                remedy="remove the record: images and calls of tools cannot be learnt",
            )
        messages.append({"role": role, "content": field_text(message, names[2], place=place)})
    return messages


def write_by_chat_template(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    *,
    place: str | None = None,
    for_answer: bool = True,
    goes_on: bool = False,
) -> str:
    """A conversation as the tokenizer's chat template writes it, special tokens included.

    Args:
        messages: At least one; ``developer`` is called ``system`` where the template does not know the newer name.
        tokenizer: It has a chat template.
        place: Where the conversation comes from, for errors.
        for_answer: Add what stands before an answer of the assistant.
        goes_on: Leave the last message open, to be continued.

    Raises:
        DataError: The template refuses the conversation; the rule says why.
    """
    renamed = {} if "developer" in str(tokenizer.chat_template) else {"developer": "system"}
    try:
        return str(
            tokenizer.apply_chat_template(
                [{"role": renamed.get(turn["role"], turn["role"]), "content": turn["content"]} for turn in messages],
                tokenize=False,
                add_generation_prompt=for_answer and not goes_on,
                continue_final_message=goes_on,
            )
        )
    except (jinja2.TemplateError, ValueError, TypeError, LookupError) as error:  # whatever its author thought of
        reason = str(error).partition("\n")[0][:_MAX_REASON_CHARS]
        raise DataError(
            f"messages do not fit the model's chat template ({reason})",
            place=place,
            remedy="mend or remove the record, or give the tokenizer a chat template that takes it",
        ) from error


def join_turns(turns: Sequence[tuple[str, str]]) -> str:
    """A conversation without a chat template: instructions first, a blank line after each, then turn after turn.

    Args:
        turns: Roles, and texts as they are to be written; a prompt ends as prompts do.
    """
    said = [turn for turn in turns if turn[0] not in INSTRUCTIONS]
    text = "".join(f"{written}\n\n" for role, written in turns if role in INSTRUCTIONS)
    for (role, written), (following, _) in zip(said, [*said[1:], ("", "")], strict=True):
        text += written
        # A prompt is followed by its answer, and by an empty one where it was not answered.
        if following and (role, following) != ("user", "assistant"):
            text += "\n"
    return text


def _answer(record: Record, name: str, place: str | None) -> str:
    answer = field_text(record, name, place=place)
    if not answer.strip():
        raise DataError(
            f"the field {name!r} must hold an answer, got an empty one",
            place=place,
            remedy="fill it in, or remove the record",
        )
    return answer


def _fields(record: Record) -> str:
    return "its fields are " + (", ".join(repr(key) for key in record) or "none at all")
