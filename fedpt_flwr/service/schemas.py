"""What the bodies of requests and answers may hold, and the error object that says what is wrong with one.

Every parameter that OpenAI's own client can send is known here. Those that the service has no use for are accepted;
those that it cannot do are accepted only where they ask for nothing. Whatever else is wrong ends in one sentence:
which parameter, which rule, which value. Nothing here knows models, tokenizers or the server.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    PlainValidator,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    WrapValidator,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue, SkipJsonSchema
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

MODELS = ("proxy", "large", "tuned", "untuned")
"""What can be asked for as ``model``."""

MAX_PROMPTS = 64
"""Texts that one request may ask for: prompts, and prompts times ``n``."""

_MAX_STOPS = 16
_MAX_STOP_CHARS = 200
_MAX_MESSAGES = 2048
_MAX_SHOWN_CHARS = 80
_MAX_SHOWN_ITEMS = 20


# --- errors -----------------------------------------------------------------------------------------------------------


class OpenAIError(Exception):
    """A request that is not answered, as OpenAI's clients expect to be told.

    Args:
        status: Of HTTP.
        message: One sentence for whoever sent the request.
        type: What kind of error it is; OpenAI's names.
        param: The parameter that is to blame.
        code: A name for programs.
        headers: To be sent along.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        # Half of a surrogate pair, which JSON can spell and UTF-8 cannot, must not make an error of the error.
        self.message = _encodable(message)
        self.type = type
        self.param = None if param is None else _encodable(param)
        self.code = code
        self.headers = headers

    def body(self) -> dict[str, Any]:
        """The error object."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    @classmethod
    def from_validation(cls, errors: Sequence[Mapping[str, Any]]) -> OpenAIError:
        """From what pydantic or FastAPI found wrong: the first of it.

        Args:
            errors: At least one, as of ``ValidationError.errors()``.
        """
        error = errors[0]
        kind, context = error["type"], error.get("ctx", {})
        if kind == "json_invalid":
            reason = str(context.get("error", "")).rstrip(".")
            position = f" at character {error['loc'][-1]}" if isinstance(error["loc"][-1], int) else ""
            return cls(400, f"the body must be JSON ({reason}{position})")
        path = [*error["loc"][error["loc"][:1] == ("body",) :], *context.get("path", ())]
        if not path:
            return cls(400, "the body must be a JSON object with the request's parameters, under a JSON content type")
        param = _dotted(path)
        if kind == "missing":
            return cls(400, f"{param} must be given", param=param, code="missing_required_parameter")
        if kind == _SENTENCE:
            return cls(400, f"{param} {context['rule']}", param=param, code=context["code"])
        rule = context["rule"] if kind == _RULE else f"is not valid ({error['msg']})"
        shown = context["value"] if "value" in context else _shown(error.get("input"))
        return cls(400, f"{param} {rule}, got {shown}", param=param, code="invalid_value")


def check_model(name: str) -> None:
    """Refuse models that do not exist.

    Raises:
        OpenAIError: ``name`` is none of :data:`MODELS`.
    """
    if name not in MODELS:
        raise OpenAIError(
            404,
            f"the model {_shown(name)} does not exist; the models here are {', '.join(MODELS)}",
            param="model",
            code="model_not_found",
        )


_RULE, _SENTENCE = "fedpt_rule", "fedpt_sentence"


def _broken(rule: str, *path: str | int, **value: Any) -> PydanticCustomError:
    """An error that says ``PARAMETER rule, got VALUE``.

    Args:
        rule: What the parameter must be or do.
        path: Where in the value that is being looked at; for a whole request the name of the parameter.
        value: The ``value`` that is shown, where it is not the one that is being looked at.
    """
    shown = {name: _encodable(_shown(value[name])) for name in value}  # pydantic cannot hand on what has no UTF-8
    return PydanticCustomError(_RULE, "{rule}", {"rule": rule, "path": path, **shown})


def _refused(rule: str, *path: str, code: str = "invalid_value") -> PydanticCustomError:
    """An error that says ``PARAMETER rule`` and shows no value."""
    return PydanticCustomError(_SENTENCE, "{rule}", {"rule": rule, "path": path, "code": code})


def _dotted(path: Sequence[str | int]) -> str:
    """``("messages", 0, "content")`` as ``messages[0].content``."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{_name(part)}" for part in path)
    return "".join(parts).removeprefix(".")


def _name(parameter: str) -> str:
    return _short(parameter) if parameter.isidentifier() else _shown(parameter)


def _shown(value: Any) -> str:
    """A value as JSON, and short."""
    if isinstance(value, str):
        return json.dumps(_short(value), ensure_ascii=False)
    if isinstance(value, list | dict) and len(value) > _MAX_SHOWN_ITEMS:
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)} items"
    try:
        return _short(json.dumps(value, ensure_ascii=False, default=repr))
    except (ValueError, RecursionError):  # a number of thousands of digits, or lists in lists without end
        return f"a {type(value).__name__}"


def _short(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN_CHARS else text[: _MAX_SHOWN_CHARS - 1] + "…"


def _encodable(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()


# --- kinds of values --------------------------------------------------------------------------------------------------


def _must(rule: str) -> WrapValidator:
    """One sentence for whatever may be wrong with a value."""

    def check(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise _broken(rule) from None

    return WrapValidator(check)


class _Neutral:
    """A parameter of OpenAI's that is not supported: only values under which it does nothing are accepted.

    Args:
        accepted: Those values; null is another.
    """

    def __init__(self, *accepted: Any) -> None:
        self._accepted = accepted
        choices = [*(json.dumps(value) for value in accepted), "null"]
        self._rule = f"is not supported here: leave it out, or send {' or '.join(choices)}"

    def _check(self, value: Any) -> Any:
        # False equals 0, but not here.
        if isinstance(value, bool) or value not in self._accepted:
            raise _broken(self._rule)
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"enum": list(self._accepted)} if self._accepted else {"type": "null"}


def _check_text(text: str, *path: int) -> str:
    """Refuse text that no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        rule = f"must be valid Unicode text (character {error.start + 1} is half of a surrogate pair)"
        raise _broken(rule, *path, value=text) from error
    return text


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise _broken("must be text")
    return _check_text(value)


def _prompt(value: Any) -> str | list[str] | list[int] | list[list[int]]:
    if not isinstance(value, str | list):
        raise _broken(_PROMPT_RULE)
    if not value:
        raise _broken("must not be empty")
    if isinstance(value, str):
        return _check_text(value)
    if type(value[0]) is int:
        return _token_ids(value)
    if set(map(type, value)) not in ({str}, {list}):
        raise _broken(_PROMPT_RULE)
    if len(value) > MAX_PROMPTS:
        raise _broken(f"must hold at most {MAX_PROMPTS} prompts", value=len(value))
    for number, prompt in enumerate(value):
        if not prompt:
            raise _broken("must not be empty", number, value=prompt)
        if isinstance(prompt, str):
            _check_text(prompt, number)
        else:
            _token_ids(prompt, number)
    return value


_PROMPT_RULE = "must be a text, a list of texts, a list of token ids or a list of such lists"


def _token_ids(value: list[Any], *path: int) -> list[int]:
    # In C, because there may be a million of them.
    if set(map(type, value)) != {int} or min(value) < 0:
        number = next(number for number, item in enumerate(value) if type(item) is not int or item < 0)
        raise _broken("must be a token id, a whole number from 0", *path, number, value=value[number])
    return value


def _stop(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not 1 <= len(stops) <= _MAX_STOPS or set(map(type, stops)) != {str}:
        raise _broken(f"must be a text or a list of 1 to {_MAX_STOPS} texts")
    for number, stop in enumerate(stops):
        path = () if isinstance(value, str) else (number,)
        if not 1 <= len(stop) <= _MAX_STOP_CHARS:
            raise _broken(f"must have 1 to {_MAX_STOP_CHARS} characters", *path, value=stop)
        _check_text(stop, *path)
    return tuple(stops)


_TOKEN_IDS_SCHEMA = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1, "maxItems": MAX_PROMPTS},
        _TOKEN_IDS_SCHEMA,
        {"type": "array", "items": _TOKEN_IDS_SCHEMA, "minItems": 1, "maxItems": MAX_PROMPTS},
    ]
}
_ONE_STOP_SCHEMA = {"type": "string", "minLength": 1, "maxLength": _MAX_STOP_CHARS}
_STOP_SCHEMA = {
    "anyOf": [
        _ONE_STOP_SCHEMA,
        {"type": "array", "items": _ONE_STOP_SCHEMA, "minItems": 1, "maxItems": _MAX_STOPS},
    ]
}

Text = Annotated[str, PlainValidator(_text), WithJsonSchema({"type": "string"})]
Flag = Annotated[bool, _must("must be true or false")]
Object = Annotated[dict[str, Any], _must("must be an object")]
Prompt = Annotated[
    str | list[str] | list[int] | list[list[int]], PlainValidator(_prompt), WithJsonSchema(_PROMPT_SCHEMA)
]
Stop = Annotated[tuple[str, ...], PlainValidator(_stop), WithJsonSchema(_STOP_SCHEMA)]


def _with_null(schema: dict[str, Any]) -> None:
    """Say in a request's schema that null stands for what is left out."""
    for name, value in schema["properties"].items():
        if name in schema.get("required", ()) or value.get("type") == "null":
            continue
        about = {key: value.pop(key) for key in ("title", "description", "default") if key in value}
        branches = value["anyOf"] if list(value) == ["anyOf"] else [value]
        branches = [branch for branch in branches if branch != {"type": "null"}]
        schema["properties"][name] = {"anyOf": [*branches, {"type": "null"}], **about}


class _Part(BaseModel):
    """An object of a request: no other parameters, no other types, and null is as good as nothing."""

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        json_schema_extra=_with_null,
    )

    @model_validator(mode="before")
    @classmethod
    def _known(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            raise _broken("must be an object")
        for name in values:
            if name not in cls.model_fields:
                near = difflib.get_close_matches(name[:100], cls.model_fields, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise _refused(f"is not a parameter that is known here{hint}", name, code="unknown_parameter")
        return {name: value for name, value in values.items() if value is not None}


# --- requests ---------------------------------------------------------------------------------------------------------


class StreamOptions(_Part):
    """How to stream."""

    include_usage: Flag = False
    """Say at the end how many tokens there were."""
    include_obfuscation: Flag = True
    """Accepted; there is none."""


class _Request(_Part):
    """What both ways to ask have in common."""

    model: Annotated[str, PlainValidator(_text), WithJsonSchema({"type": "string", "enum": list(MODELS)})] = "proxy"
    """``proxy`` is the large model with the shift; ``large``, ``tuned`` and ``untuned`` are what it is made of."""
    stream: Flag = False
    """Answer by server-sent events, as the text comes."""
    stream_options: StreamOptions | None = None
    """Only with ``stream``."""
    stop: Stop | None = None
    """Texts that end the answer; they are not part of it."""
    temperature: Annotated[float, Field(ge=0, le=2), _must("must be a number from 0 to 2")] = 1.0
    """0: always the likeliest token."""
    top_p: Annotated[float, Field(gt=0, le=1), _must("must be a number above 0 and at most 1")] = 1.0
    """Choose among the likeliest tokens that together have this probability."""
    seed: Annotated[int | None, _must("must be a whole number")] = None
    """The same seed gives the same text; choice i of several gets seed + i. Counts modulo 2**64. Null: a random one."""
    n: Annotated[int, Field(ge=1, le=8), _must("must be a whole number from 1 to 8")] = 1
    """Answers for each prompt."""
    alpha: Annotated[float | None, Field(ge=-10, le=10), _must("must be a number from -10 to 10")] = None
    """Strength of the shift. Null: the run's."""
    plausibility: Annotated[float | None, Field(ge=0, lt=1), _must("must be a number from 0 to below 1")] = None
    """The proxy drops tokens that tuned finds less likely than this share of its best. Null: the run's."""
    details: Flag = False
    """Say for each token what the large model thinks of it; only with the model ``proxy``."""
    user: Text | None = None
    """Accepted and ignored."""
    frequency_penalty: Annotated[Any, _Neutral(0)] = None
    """Not supported."""
    presence_penalty: Annotated[Any, _Neutral(0)] = None
    """Not supported."""
    logit_bias: Annotated[Any, _Neutral({})] = None
    """Not supported."""

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Texts that end an answer."""
        return self.stop or ()

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the counts of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise _refused("needs stream to be true", "stream_options")
        if self.details and self.model in MODELS[1:]:
            raise _broken('can only be asked of the model "proxy"', "details", value=self.model)
        return self


class CompletionRequest(_Request):
    """Texts to continue, for ``/v1/completions``."""

    prompt: Prompt
    """A text, its token ids, or a list of either."""
    max_tokens: Annotated[int | None, Field(ge=0), _must("must be a whole number from 1")] = None
    """Longest answer in tokens; 0 only to have a prompt scored, by ``echo`` or ``full_logprobs``. Null: 16."""
    logprobs: Annotated[int | None, Field(ge=0, le=20), _must("must be a whole number from 0 to 20")] = None
    """Alternatives whose log-probabilities are given with each token's own. Null: none at all."""
    echo: Flag = False
    """Begin the answer with the prompt."""
    full_logprobs: Annotated[int | None, Field(ge=1), _must("must be a whole number from 1")] = None
    """Give the log-probabilities of all tokens after each of the prompt's last so many tokens."""
    return_tokens_as_token_ids: Flag = False
    """Call a token ``token_id:42`` in log-probabilities, as texts may be those of several."""
    best_of: Annotated[int | None, Field(ge=1, le=8), _must("must be a whole number from 1 to 8")] = None
    """Not supported, other than as the same as ``n``."""
    suffix: Annotated[Any, _Neutral("")] = None
    """Not supported."""

    @property
    def prompts(self) -> Sequence[str | Sequence[int]]:
        """Each prompt, as text or as token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if isinstance(self.prompt[0], int) else self.prompt

    @property
    def num_top(self) -> int | None:
        """Alternatives to report with each token; None: no log-probabilities."""
        return self.logprobs

    @property
    def max_new_tokens(self) -> int | None:
        """Longest answer in tokens, if the request says."""
        return self.max_tokens

    @model_validator(mode="after")
    def _fits_prompts(self) -> Self:
        if self.max_tokens == 0 and not self.echo and self.full_logprobs is None:
            raise _broken("must be at least 1, or 0 with echo to have a prompt scored", "max_tokens", value=0)
        if self.full_logprobs is not None and (self.stream or len(self.prompts) > 1):
            raise _refused("needs one prompt, and stream to be false", "full_logprobs")
        if self.best_of not in (None, self.n):
            raise _broken(
                f"is not supported here: leave it out, or send n's value {self.n}", "best_of", value=self.best_of
            )
        if (texts := len(self.prompts) * self.n) > MAX_PROMPTS:
            raise _broken(f"times the number of prompts must be at most {MAX_PROMPTS}", "n", value=texts)
        return self


class TextPart(_Part):
    """A piece of a message."""

    type: Literal["text"]
    """Other kinds cannot be read here."""
    text: Text
    """What was said."""
    prompt_cache_breakpoint: Object | None = None
    """Accepted and ignored."""

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("type") != "text":
            raise _broken('must be "text", because this service reads nothing else', "type", value=values.get("type"))
        return values


class _OrText:
    """A text instead of a list of parts is one part."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_wrap_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"anyOf": [{"type": "string"}, handler(schema)]}

    def _check(self, value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        if isinstance(value, str):
            return [TextPart(type="text", text=_check_text(value))]
        if not isinstance(value, list) or not value:
            raise _broken('must be a text, or a list of at least one {"type": "text", "text": "..."}')
        return handler(value)


class Message(_Part):
    """What somebody said."""

    role: Annotated[
        Literal["system", "developer", "user", "assistant"],
        _must('must be "system", "developer", "user" or "assistant"'),
    ]
    """Who; what tools say cannot be read here."""
    content: Annotated[list[TextPart], Field(min_length=1), _OrText()]
    """A text, or several."""
    name: Text | None = None
    """Accepted and ignored."""
    type: Annotated[Any, _Neutral("text", "message")] = None
    """Accepted and ignored: some clients say what kind of thing a message is."""
    refusal: Annotated[Any, _Neutral("")] = None
    """Not supported."""
    annotations: Annotated[Any, _Neutral([])] = None
    """Not supported."""
    audio: Annotated[Any, _Neutral()] = None
    """Not supported."""
    tool_calls: Annotated[Any, _Neutral([])] = None
    """Not supported."""
    function_call: Annotated[Any, _Neutral()] = None
    """Not supported."""

    @property
    def text(self) -> str:
        """What was said; several parts begin a line each."""
        return "\n".join(part.text for part in self.content)


def _check_messages(value: Any) -> Any:
    if not isinstance(value, list) or not 1 <= len(value) <= _MAX_MESSAGES:
        raise _broken(f"must be a list of 1 to {_MAX_MESSAGES} messages")
    return value


class ChatCompletionRequest(_Request):
    """A conversation to go on with, for ``/v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=_MAX_MESSAGES), BeforeValidator(_check_messages)]
    """What was said so far. If the assistant has the last word, its message is continued."""
    max_tokens: Annotated[int | None, Field(ge=1), _must("must be a whole number from 1")] = None
    """Longest answer in tokens, by its older name."""
    max_completion_tokens: Annotated[int | None, Field(ge=1), _must("must be a whole number from 1")] = None
    """Longest answer in tokens. Null: as long as the context and the service allow."""
    logprobs: Flag = False
    """Give each token's log-probability."""
    top_logprobs: Annotated[int | None, Field(ge=0, le=20), _must("must be a whole number from 0 to 20")] = None
    """Alternatives whose log-probabilities are given, too; only with ``logprobs``."""
    store: Flag | None = None
    """Accepted and ignored."""
    metadata: Object | None = None
    """Accepted and ignored."""
    parallel_tool_calls: Flag | None = None
    """Accepted and ignored."""
    prompt_cache_key: Text | None = None
    """Accepted and ignored."""
    prompt_cache_options: Object | None = None
    """Accepted and ignored."""
    prompt_cache_retention: Text | None = None
    """Accepted and ignored."""
    safety_identifier: Text | None = None
    """Accepted and ignored."""
    service_tier: Text | None = None
    """Accepted and ignored."""
    audio: Annotated[Any, _Neutral()] = None
    """Not supported."""
    function_call: Annotated[Any, _Neutral("none", "auto")] = None
    """Not supported."""
    functions: Annotated[Any, _Neutral([])] = None
    """Not supported."""
    modalities: Annotated[Any, _Neutral(["text"])] = None
    """Not supported."""
    moderation: Annotated[Any, _Neutral()] = None
    """Not supported."""
    prediction: Annotated[Any, _Neutral()] = None
    """Not supported."""
    reasoning_effort: Annotated[Any, _Neutral("none")] = None
    """Not supported."""
    response_format: Annotated[Any, _Neutral({"type": "text"})] = None
    """Not supported."""
    tool_choice: Annotated[Any, _Neutral("none", "auto")] = None
    """Not supported."""
    tools: Annotated[Any, _Neutral([])] = None
    """Not supported."""
    verbosity: Annotated[Any, _Neutral("medium")] = None
    """Not supported."""
    web_search_options: Annotated[Any, _Neutral()] = None
    """Not supported."""

    @property
    def num_top(self) -> int | None:
        """Alternatives to report with each token; None: no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def max_new_tokens(self) -> int | None:
        """Longest answer in tokens, if the request says."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @model_validator(mode="after")
    def _fits_itself(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise _refused("needs logprobs to be true", "top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise _broken(
                f"is another name of max_completion_tokens and must be the same ({_shown(self.max_completion_tokens)})",
                "max_tokens",
                value=self.max_tokens,
            )
        return self


# --- answers ----------------------------------------------------------------------------------------------------------
# They are made as plain dictionaries, one for each token of a stream; these models say what is in them.


class _Answer(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)


class Usage(_Answer):
    """Numbers of tokens."""

    prompt_tokens: int
    """Of all prompts, each once."""
    completion_tokens: int
    """Of all answers, with those that ended them."""
    total_tokens: int


class TokenDetails(_Answer):
    """What the proxy and the large model think of a token; given where ``details`` was asked for."""

    token: str
    id: int
    probability: float
    """Under the proxy, at temperature 1."""
    large_probability: float
    """Under the large model."""
    large_token: str
    """The large model's likeliest."""
    large_token_probability: float
    changed: bool
    """Whether the token is not the large model's likeliest."""


class LegacyLogprobs(_Answer):
    """Log-probabilities in nats; all lists have one item for each token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    """A prompt's first token has none."""
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]
    """In characters, from the beginning of the choice's text."""


class FullLogprobs(_Answer):
    """Log-probabilities of all tokens, in nats."""

    positions: int
    """Tokens of the prompt, from its end, after each of which they are given."""
    vocab_size: int
    dtype: Literal["float32"]
    data: str
    """Base64 of little-endian numbers, token by token at each position; -inf where a token cannot come."""


class LargeSource(_Answer):
    """Where the large model is, if not here."""

    shows: str
    """``all`` log-probabilities, or the ``top`` so many."""
    hidden: Literal["none", "restricted", "filled"]
    """What was done with tokens that it does not show: ruled out, or their probability shared out as untuned would."""


class CompletionChoice(_Answer):
    """One of the texts."""

    index: int
    text: str
    logprobs: LegacyLogprobs | None
    finish_reason: Literal["stop", "length"]
    fedpt: list[TokenDetails] | SkipJsonSchema[None] = None
    full_logprobs: FullLogprobs | SkipJsonSchema[None] = None


class CompletionChunkChoice(CompletionChoice):
    """The next piece of one of the texts."""

    finish_reason: Literal["stop", "length"] | None  # type: ignore[assignment]


class Completion(_Answer):
    """What ``/v1/completions`` answers."""

    id: str
    object: Literal["text_completion"]
    created: int
    """In seconds since 1970."""
    model: str
    system_fingerprint: str
    """The version of the proxy: run, round and a digest of its weights."""
    choices: list[CompletionChoice]
    """The answers to the first prompt, then those to the second, and so on."""
    usage: Usage
    fedpt_large: LargeSource | SkipJsonSchema[None] = None


class CompletionChunk(Completion):
    """An event of a stream of ``/v1/completions``."""

    choices: list[CompletionChunkChoice]  # type: ignore[assignment]
    """One; none in the event with the usage."""
    usage: Usage | None = None  # type: ignore[assignment]
    """With ``include_usage``: null but in the last event."""


class TokenLogprob(_Answer):
    """A token and its log-probability in nats."""

    token: str
    logprob: float
    bytes: list[int] | None
    """In UTF-8; a token may be part of a character."""


class ChosenLogprob(TokenLogprob):
    """The token that was chosen, and the likeliest."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(_Answer):
    """Log-probabilities of a message's tokens."""

    content: list[ChosenLogprob]
    refusal: None


class AnswerMessage(_Answer):
    """What the model said."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(_Answer):
    """One of the answers."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]
    fedpt: list[TokenDetails] | SkipJsonSchema[None] = None


class ChatCompletion(_Answer):
    """What ``/v1/chat/completions`` answers."""

    id: str
    object: Literal["chat.completion"]
    created: int
    """In seconds since 1970."""
    model: str
    system_fingerprint: str
    """The version of the proxy: run, round and a digest of its weights."""
    choices: list[ChatChoice]
    usage: Usage
    fedpt_large: LargeSource | SkipJsonSchema[None] = None


class Delta(_Answer):
    """The next piece of a message."""

    role: Literal["assistant"] | SkipJsonSchema[None] = None
    content: str | SkipJsonSchema[None] = None


class ChatChunkChoice(_Answer):
    """The next piece of one of the answers."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    fedpt: list[TokenDetails] | SkipJsonSchema[None] = None


class ChatCompletionChunk(_Answer):
    """An event of a stream of ``/v1/chat/completions``."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    """In seconds since 1970."""
    model: str
    system_fingerprint: str
    """The version of the proxy: run, round and a digest of its weights."""
    choices: list[ChatChunkChoice]
    """One; none in the event with the usage."""
    usage: Usage | None = None
    """With ``include_usage``: null but in the last event."""
    fedpt_large: LargeSource | SkipJsonSchema[None] = None


class Model(_Answer):
    """A model that can be asked."""

    id: str
    object: Literal["model"] = "model"
    created: int
    """In seconds since 1970."""
    owned_by: str = "fedpt"


class ModelList(_Answer):
    """All of them."""

    object: Literal["list"] = "list"
    data: list[Model]


class ErrorDetails(_Answer):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(_Answer):
    """What is answered where a request is refused or fails."""

    error: ErrorDetails


def event_stream(chunk: type[BaseModel]) -> dict[str, Any]:
    """The content of a streamed answer, as FastAPI writes it into an OpenAPI document for streams of its own.

    Args:
        chunk: What the data of each event hold, but for the last, which is ``[DONE]``.
    """
    whole = chunk.model_json_schema(mode="serialization")
    definitions = whole.pop("$defs", {})

    def inline(schema: Any) -> Any:
        if isinstance(schema, list):
            return [inline(item) for item in schema]
        if not isinstance(schema, dict):
            return schema
        reference = schema.get("$ref", "").removeprefix("#/$defs/")
        named = inline(definitions[reference]) if reference else {}
        return named | {key: inline(value) for key, value in schema.items() if key != "$ref"}

    piece = {"type": "string", "contentMediaType": "application/json", "contentSchema": inline(whole)}
    data = {"anyOf": [{"const": "[DONE]"}, piece]}
    return {"text/event-stream": {"itemSchema": {"type": "object", "properties": {"data": data}, "required": ["data"]}}}
