r"""From the messages of a conversation to one prompt.

By the tokenizer's chat template, if it has one. Otherwise by the run's own prompt template, which is what its models
have learned: ``> {request}\n[{unit}]\n`` and then the answer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jinja2

from fedpt_flwr.errors import DataError
from fedpt_flwr.prompts import Template
from fedpt_flwr.service.schemas import Message, OpenAIError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_INSTRUCTIONS = ("system", "developer")
_MAX_REASON_CHARS = 300


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation as one text to continue."""

    text: str
    """Not empty."""

    has_special_tokens: bool
    """Whether the text has its special tokens already, as a chat template writes them: the tokenizer must add none."""


def render_chat(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, template: Template | None) -> Prompt:
    """Put a conversation into the form that the models know.

    Without a chat template, instructions (of the roles ``system`` and ``developer``) come first, with a blank line
    after each, then what the user and the assistant said in turn. Each of the user's messages is put into the run's
    template; its answer and a line break follow. If the assistant has the last word, its message is continued.

    Args:
        messages: At least one.
        tokenizer: Its chat template is used, if it has one.
        template: How the run makes prompts from records; None: the messages are the prompts.

    Raises:
        OpenAIError: The chat template refuses the conversation, nobody waits for an answer, or there is no text.
    """
    text = _by_chat_template(messages, tokenizer) if tokenizer.chat_template else _by_run_template(messages, template)
    if not text:
        raise OpenAIError(400, "messages must hold some text", param="messages", code="invalid_value")
    return Prompt(text, has_special_tokens=bool(tokenizer.chat_template))


def _by_chat_template(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> str:
    # Few templates know the newer name of the system's role.
    renamed = {} if "developer" in str(tokenizer.chat_template) else {"developer": "system"}
    goes_on = messages[-1].role == "assistant"
    try:
        return str(
            tokenizer.apply_chat_template(
                [{"role": renamed.get(message.role, message.role), "content": message.text} for message in messages],
                tokenize=False,
                add_generation_prompt=not goes_on,
                continue_final_message=goes_on,
            )
        )
    except (jinja2.TemplateError, ValueError, TypeError, LookupError) as error:  # whatever its author thought of
        reason = str(error).partition("\n")[0][:_MAX_REASON_CHARS]
        raise OpenAIError(
            400, f"messages do not fit the model's chat template ({reason})", param="messages", code="invalid_value"
        ) from error


def _by_run_template(messages: Sequence[Message], template: Template | None) -> str:
    if messages[-1].role in _INSTRUCTIONS:
        raise OpenAIError(
            400,
            "the last of messages must be the user's, or the assistant's to be continued, "
            f'got one of the role "{messages[-1].role}"',
            param=f"messages[{len(messages) - 1}].role",
            code="invalid_value",
        )
    instructions = [f"{message.text}\n\n" for message in messages if message.role in _INSTRUCTIONS]
    turns = [(number, message) for number, message in enumerate(messages) if message.role not in _INSTRUCTIONS]
    text = ""
    for (number, message), (_, following) in zip(turns, [*turns[1:], (None, None)], strict=True):
        text += _in_template(message.text, template, number) if message.role == "user" else message.text
        # A prompt is followed by its answer, and by an empty one where it was not answered.
        if following is not None and (message.role, following.role) != ("user", "assistant"):
            text += "\n"
    return "".join(instructions) + text


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
