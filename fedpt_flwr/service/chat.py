r"""From the messages of a conversation to one prompt.

As the run wrote its examples, which is what its models have learned: by the tokenizer's chat template if the examples
were conversations, else by the run's own prompt template, ``> {request}\n[{unit}]\n`` and then the answer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fedpt_flwr.errors import DataError
from fedpt_flwr.prompts import Template
from fedpt_flwr.service.schemas import Message, OpenAIError
from fedpt_flwr.shapes import INSTRUCTIONS, join_turns, write_by_chat_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def render_chat(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase | None, template: Template | None
) -> str:
    """Put a conversation into the form that the models know, as one text to continue.

    Without a chat template, instructions (of the roles ``system`` and ``developer``) come first, with a blank line
    after each, then what the user and the assistant said in turn. Each of the user's messages is put into the run's
    template; its answer and a line break follow. If the assistant has the last word, its message is continued.

    Args:
        messages: At least one.
        tokenizer: Its chat template is used, if it has one; None: the run's examples were not written by that.
        template: How the run makes prompts from records; None: the messages are the prompts.

    Returns:
        A text that is not empty.

    Raises:
        OpenAIError: The chat template refuses the conversation, nobody waits for an answer, or there is no text.
    """
    if tokenizer is not None and tokenizer.chat_template:
        text = _by_chat_template(messages, tokenizer)
    else:
        text = _by_run_template(messages, template)
    if not text:
        raise OpenAIError(400, "messages must hold some text", param="messages", code="invalid_value")
    return text


def _by_chat_template(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> str:
    turns = [{"role": message.role, "content": message.text} for message in messages]
    try:
        return write_by_chat_template(turns, tokenizer, goes_on=messages[-1].role == "assistant")
    except DataError as error:
        raise OpenAIError(400, error.rule, param="messages", code="invalid_value") from error


def _by_run_template(messages: Sequence[Message], template: Template | None) -> str:
    if messages[-1].role in INSTRUCTIONS:
        raise OpenAIError(
            400,
            "the last of messages must be the user's, or the assistant's to be continued, "
            f'got one of the role "{messages[-1].role}"',
            param=f"messages[{len(messages) - 1}].role",
            code="invalid_value",
        )
    return join_turns(
        [
            (turn.role, _in_template(turn.text, template, number) if turn.role == "user" else turn.text)
            for number, turn in enumerate(messages)
        ]
    )


def _in_template(text: str, template: Template | None, number: int) -> str:
    """A user's message as a prompt."""
    if template is None or not template.fields:
        return text
    record = _record(text)
    if record is not None and set(record) == set(template.fields):
        try:
            return template.render(record)
        except DataError as error:
            place = f"messages[{number}].content"
            raise OpenAIError(400, f"{place}: {error}", param=place, code="invalid_value") from error
    if len(template.fields) == 1:
        return template.render({template.fields[0]: text})
    # Somebody who writes a prompt of several fields by hand may well have left out the line break at its end.
    ending = template.ending
    given = next(length for length in range(len(ending), -1, -1) if text.endswith(ending[:length]))
    return text + ending[given:]


def _record(text: str) -> dict[str, Any] | None:
    """The JSON object that a text is, if it is one."""
    if not text.lstrip().startswith("{"):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
