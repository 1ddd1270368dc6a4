from __future__ import annotations

import asyncio
import json
import typing

import httpx
import jsonschema_rs
import pytest
import schemathesis
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai.types import Completion as OpenAICompletion
from openai.types import completion_create_params
from openai.types.chat import ChatCompletion as OpenAIChatCompletion
from openai.types.chat import ChatCompletionChunk as OpenAIChatCompletionChunk
from openai.types.chat import ChatCompletionMessage
from openai.types.chat import completion_create_params as chat_completion_create_params
from pydantic import ValidationError

from fedpt_flwr.service import schemas
from fedpt_flwr.service.schemas import ChatCompletionRequest, CompletionRequest, OpenAIError, check_model

HELLO = [{"role": "user", "content": "hello"}]


def legacy(**body):
    return CompletionRequest.model_validate({"prompt": "hello", **body})


def chat(**body):
    return ChatCompletionRequest.model_validate({"messages": HELLO, **body})


def refusal(ask, **body):
    """What a client is told, as an error object."""
    with pytest.raises(ValidationError) as caught:
        ask(**body)
    error = OpenAIError.from_validation(caught.value.errors())
    assert error.status == 400
    assert error.type == "invalid_request_error"
    json.dumps(error.body(), ensure_ascii=False).encode()
    return error


both = pytest.mark.parametrize("ask", [legacy, chat])


# --- what is understood -----------------------------------------------------------------------------------------------


@both
def test_what_is_left_out_has_openais_defaults(ask):
    body = ask()
    assert (body.model, body.stream, body.temperature, body.top_p, body.n) == ("proxy", False, 1.0, 1.0, 1)
    assert (body.seed, body.alpha, body.plausibility, body.details) == (None, None, None, False)
    assert (body.stop_strings, body.num_top, body.max_new_tokens, body.include_usage) == ((), None, None, False)


@pytest.mark.parametrize("request_class", [CompletionRequest, ChatCompletionRequest])
def test_null_is_as_good_as_nothing(request_class):
    required = {"prompt": "hello"} if request_class is CompletionRequest else {"messages": HELLO}
    nulls = dict.fromkeys(set(request_class.model_fields) - set(required))
    assert request_class.model_validate(required | nulls) == request_class.model_validate(required)


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([5, 0, 7], [[5, 0, 7]]),
        ([[5, 0], [7]], [[5, 0], [7]]),
        ([2**70], [[2**70]]),  # how large an id may be, a tokenizer knows
    ],
)
def test_a_prompt_is_a_text_or_token_ids_or_several_of_one_kind(prompt, prompts):
    assert legacy(prompt=prompt).prompts == prompts


@both
@pytest.mark.parametrize(
    ("stop", "strings"), [(";", (";",)), ([";", "\n"], (";", "\n")), (["x" * 200] * 16, ("x" * 200,) * 16)]
)
def test_stop_is_a_text_or_some(ask, stop, strings):
    assert ask(stop=stop).stop_strings == strings


@both
@pytest.mark.parametrize(
    ("parameter", "values"),
    [
        ("temperature", [0, 0.5, 2]),
        ("top_p", [1e-9, 1]),
        ("seed", [-(2**63), 0, 2**63, 10**40]),
        ("n", [1, 8]),
        ("alpha", [-10, 0, 1.5, 10]),
        ("plausibility", [0, 0.999]),
        ("model", ["large", "anything"]),
        ("details", [True]),
        ("stream", [True]),
    ],
)
def test_values_up_to_their_limits_are_taken(ask, parameter, values):
    for value in values:
        assert getattr(ask(**{parameter: value}), parameter) == value


def test_log_probabilities_are_a_number_of_rivals_in_either_spelling():
    assert legacy(logprobs=0).num_top == 0
    assert legacy(logprobs=20).num_top == 20
    assert chat(logprobs=True).num_top == 0
    assert chat(logprobs=True, top_logprobs=3).num_top == 3
    assert chat(logprobs=False).num_top is None


def test_the_longest_answer_has_two_names_in_a_chat():
    assert legacy(max_tokens=7).max_new_tokens == 7
    assert legacy(max_tokens=0, echo=True).max_new_tokens == 0
    assert chat(max_tokens=7).max_new_tokens == chat(max_completion_tokens=7).max_new_tokens == 7
    assert chat(max_tokens=7, max_completion_tokens=7).max_new_tokens == 7


@both
def test_a_stream_can_end_with_the_usage(ask):
    assert ask(stream=True, stream_options={"include_usage": True, "include_obfuscation": False}).include_usage
    assert not ask(stream=True, stream_options={}).include_usage


def test_a_message_is_a_text_or_parts_of_text():
    parts = [
        {"type": "text", "text": "a"},
        {"type": "text", "text": "b", "prompt_cache_breakpoint": {"mode": "explicit"}},
    ]
    messages = [{"role": "system", "content": "x", "name": "me"}, {"role": "user", "content": parts}]
    assert [message.text for message in chat(messages=messages).messages] == ["x", "a\nb"]


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant"])
def test_every_role_may_speak(role):
    assert chat(messages=[{"role": role, "content": ""}]).messages[0].role == role


def test_what_the_client_got_as_an_answer_it_can_send_back():
    answer = {"role": "assistant", "content": "hi", "refusal": None}
    sent = ChatCompletionMessage.model_validate(answer).model_dump()
    assert set(sent) > set(answer)
    assert chat(messages=[*HELLO, sent, *HELLO]).messages[1].text == "hi"


# --- what OpenAI has --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_class", "params"),
    [(CompletionRequest, completion_create_params), (ChatCompletionRequest, chat_completion_create_params)],
)
def test_all_that_the_official_client_can_send_is_known_and_nothing_else_but_our_own(request_class, params):
    sent = typing.get_type_hints(params.CompletionCreateParamsStreaming)
    ours = {"alpha", "plausibility", "details"}
    if request_class is CompletionRequest:
        ours |= {"full_logprobs", "return_tokens_as_token_ids"}
    assert set(request_class.model_fields) == set(sent) | ours


@pytest.mark.parametrize(
    ("parameter", "value"),
    [
        ("user", "me"),
        ("store", True),
        ("metadata", {"a": "b"}),
        ("service_tier", "auto"),
        ("safety_identifier", "me"),
        ("prompt_cache_key", "me"),
        ("prompt_cache_options", {"mode": "explicit"}),
        ("prompt_cache_retention", "24h"),
        ("parallel_tool_calls", False),
    ],
)
def test_what_makes_no_difference_is_accepted(parameter, value):
    chat(**{parameter: value})


NEUTRAL = [
    (legacy, "frequency_penalty", [0, 0.0], [0.1, -2, False, "0", [0]]),
    (legacy, "presence_penalty", [0], [2]),
    (legacy, "logit_bias", [{}], [{"50256": -100}, []]),
    (legacy, "suffix", [""], ["x", 0]),
    (legacy, "best_of", [1], [2, True, "1", 1.0, 0]),
    (chat, "frequency_penalty", [0], [1]),
    (chat, "audio", [], [{"voice": "alloy", "format": "mp3"}, {}]),
    (chat, "function_call", ["none", "auto"], [{"name": "f"}]),
    (chat, "functions", [[]], [[{"name": "f"}]]),
    (chat, "modalities", [["text"]], [["text", "audio"], [], ["audio"]]),
    (chat, "moderation", [], [{"model": "omni"}]),
    (chat, "prediction", [], [{"type": "content", "content": "x"}]),
    (chat, "reasoning_effort", ["none"], ["low", "high"]),
    (
        chat,
        "response_format",
        [{"type": "text"}],
        [{"type": "json_object"}, {"type": "json_schema", "json_schema": {}}],
    ),
    (chat, "tool_choice", ["none", "auto"], ["required", {"type": "function", "function": {"name": "f"}}]),
    (chat, "tools", [[]], [[{"type": "function"}]]),
    (chat, "verbosity", ["medium"], ["low"]),
    (chat, "web_search_options", [], [{}]),
]


@pytest.mark.parametrize(("ask", "parameter", "neutral", "others"), NEUTRAL)
def test_what_cannot_be_done_is_accepted_where_it_asks_for_nothing(ask, parameter, neutral, others):
    for value in [*neutral, None]:
        ask(**{parameter: value})
    for value in others:
        error = refusal(ask, **{parameter: value})
        assert error.param == parameter
        assert error.message.startswith(parameter)


def test_a_refusal_of_what_cannot_be_done_says_what_can():
    assert refusal(chat, response_format={"type": "json_object"}).message == (
        'response_format is not supported here: leave it out, or send {"type": "text"} or null, '
        'got {"type": "json_object"}'
    )
    assert refusal(chat, audio={}).message == "audio is not supported here: leave it out, or send null, got {}"
    assert refusal(legacy, best_of=3, n=2).message == (
        "best_of is not supported here: leave it out, or send n's value 2, got 3"
    )
    legacy(best_of=2, n=2)


# --- what is refused --------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(
    ("parameter", "value", "message"),
    [
        ("temperature", 2.1, "temperature must be a number from 0 to 2, got 2.1"),
        ("temperature", -1, "temperature must be a number from 0 to 2, got -1"),
        ("temperature", float("nan"), "temperature must be a number from 0 to 2, got NaN"),
        ("temperature", float("inf"), "temperature must be a number from 0 to 2, got Infinity"),
        ("temperature", "1", 'temperature must be a number from 0 to 2, got "1"'),
        ("temperature", True, "temperature must be a number from 0 to 2, got true"),
        ("temperature", 10**400, f"temperature must be a number from 0 to 2, got 1{'0' * 78}…"),
        ("top_p", 0, "top_p must be a number above 0 and at most 1, got 0"),
        ("top_p", 1.5, "top_p must be a number above 0 and at most 1, got 1.5"),
        ("alpha", 11, "alpha must be a number from -10 to 10, got 11"),
        ("alpha", float("-inf"), "alpha must be a number from -10 to 10, got -Infinity"),
        ("plausibility", 1, "plausibility must be a number from 0 to below 1, got 1"),
        ("seed", 1.0, "got 1.0"),
        ("seed", True, "got true"),
        ("seed", 1.5, "seed must be a whole number, got 1.5"),
        ("n", 0, "n must be a whole number from 1 to 8, got 0"),
        ("n", 9, "n must be a whole number from 1 to 8, got 9"),
        ("n", "2", 'n must be a whole number from 1 to 8, got "2"'),
        ("max_tokens", 1.5, "max_tokens must be a whole number from 1, got 1.5"),
        ("max_tokens", -1, "max_tokens must be a whole number from 1, got -1"),
        ("stream", 1, "stream must be true or false, got 1"),
        ("stream", "true", 'stream must be true or false, got "true"'),
        ("details", [], "details must be true or false, got []"),
        ("model", 7, "model must be text, got 7"),
        ("user", {}, "user must be text, got {}"),
        ("stop", "", 'stop must have 1 to 200 characters, got ""'),
        ("stop", [], "stop must be a text or a list of 1 to 16 texts, got []"),
        ("stop", ["a"] * 17, 'got ["a", "a", "a"'),
        ("stop", 5, "stop must be a text or a list of 1 to 16 texts, got 5"),
        ("stop", ["a", 5], 'stop must be a text or a list of 1 to 16 texts, got ["a", 5]'),
        ("stop", ["a", "x" * 201], f'stop[1] must have 1 to 200 characters, got "{"x" * 79}…"'),
        ("stop", ["a", "\udfff"], "stop[1] must be valid Unicode text (character 1 is half of a surrogate pair)"),
        ("stream_options", 1, "stream_options must be an object, got 1"),
        ("stream_options", {"include_usage": 1}, "stream_options.include_usage must be true or false, got 1"),
    ],
)
def test_a_wrong_value_is_refused_with_the_rule_and_the_value(ask, parameter, value, message):
    error = refusal(ask, **{parameter: value})
    assert message in error.message
    assert error.message.startswith(error.param)
    assert error.code == "invalid_value"


@pytest.mark.parametrize(
    ("prompt", "param", "message"),
    [
        ("", "prompt", 'prompt must not be empty, got ""'),
        ([], "prompt", "prompt must not be empty, got []"),
        ([[]], "prompt[0]", "prompt[0] must not be empty, got []"),
        (["a", ""], "prompt[1]", 'prompt[1] must not be empty, got ""'),
        (5, "prompt", "or a list of such lists, got 5"),
        ({}, "prompt", "or a list of such lists, got {}"),
        (["a", 5], "prompt", 'or a list of such lists, got ["a", 5]'),
        ([5, "a"], "prompt[1]", 'prompt[1] must be a token id, a whole number from 0, got "a"'),
        ([5, True], "prompt[1]", "prompt[1] must be a token id, a whole number from 0, got true"),
        ([5, 5.0], "prompt[1]", "prompt[1] must be a token id, a whole number from 0, got 5.0"),
        ([True, 5], "prompt", "or a list of such lists, got [true, 5]"),
        ([5.0], "prompt", "or a list of such lists, got [5.0]"),
        ([[5], "a"], "prompt", 'or a list of such lists, got [[5], "a"]'),
        ([5, -1], "prompt[1]", "prompt[1] must be a token id, a whole number from 0, got -1"),
        ([[5], [5, False]], "prompt[1][1]", "prompt[1][1] must be a token id, a whole number from 0, got false"),
        ([[5], [[5]]], "prompt[1][0]", "prompt[1][0] must be a token id, a whole number from 0, got [5]"),
        (["a"] * 65, "prompt", "prompt must hold at most 64 prompts, got 65"),
        ([[1]] * 65, "prompt", "prompt must hold at most 64 prompts, got 65"),
        ("a\ud800", "prompt", "prompt must be valid Unicode text (character 2 is half of a surrogate pair)"),
        (
            ["a", "\ud83d"],
            "prompt[1]",
            "prompt[1] must be valid Unicode text (character 1 is half of a surrogate pair)",
        ),
        (None, "prompt", "prompt must be given"),
    ],
)
def test_a_prompt_of_no_known_form_is_refused(prompt, param, message):
    error = refusal(legacy, prompt=prompt)
    assert error.param == param
    assert message in error.message


@pytest.mark.parametrize(
    ("messages", "param", "message"),
    [
        ([], "messages", "messages must be a list of 1 to 2048 messages, got []"),
        ("hello", "messages", 'messages must be a list of 1 to 2048 messages, got "hello"'),
        (HELLO * 2049, "messages", "messages must be a list of 1 to 2048 messages, got a list of 2049 items"),
        (None, "messages", "messages must be given"),
        (["hello"], "messages[0]", 'messages[0] must be an object, got "hello"'),
        ([*HELLO, {"role": "user"}], "messages[1].content", "messages[1].content must be given"),
        ([{"content": "x"}], "messages[0].role", "messages[0].role must be given"),
        (
            [{"role": "tool", "content": "x", "name": "y"}],
            "messages[0].role",
            'messages[0].role must be "system", "developer", "user" or "assistant", got "tool"',
        ),
        (
            [{"role": "tool", "content": "x", "tool_call_id": "y"}],
            "messages[0].tool_call_id",
            "messages[0].tool_call_id is not a parameter that is known here; did you mean tool_calls?",
        ),
        ([{"role": [], "content": "x"}], "messages[0].role", "got []"),
        (
            [{"role": "user", "content": 5}],
            "messages[0].content",
            'or a list of at least one {"type": "text", "text": "..."}, got 5',
        ),
        ([{"role": "user", "content": []}], "messages[0].content", "got []"),
        (
            [{"role": "user", "content": ["x"]}],
            "messages[0].content[0]",
            'messages[0].content[0] must be an object, got "x"',
        ),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}],
            "messages[0].content[0].type",
            'messages[0].content[0].type must be "text", because this service reads nothing else, got "image_url"',
        ),
        ([{"role": "user", "content": [{"text": "x"}]}], "messages[0].content[0].type", 'must be "text"'),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text", "must be given"),
        (
            [{"role": "user", "content": [{"type": "text", "text": 5}]}],
            "messages[0].content[0].text",
            "must be text, got 5",
        ),
        ([{"role": "user", "content": "a\ud800"}], "messages[0].content", "(character 2 is half of a surrogate pair)"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "\ud800"}]}],
            "messages[0].content[0].text",
            "(character 1",
        ),
        ([{"role": "assistant", "content": "x", "refusal": "no"}], "messages[0].refusal", "is not supported here"),
        (
            [{"role": "assistant", "content": "x", "tool_calls": [{}]}],
            "messages[0].tool_calls",
            "is not supported here",
        ),
        ([{"role": "assistant", "content": None}], "messages[0].content", "must be given"),
    ],
)
def test_a_message_of_no_known_form_is_refused(messages, param, message):
    error = refusal(chat, messages=messages)
    assert error.param == param
    assert message in error.message


@pytest.mark.parametrize(
    ("ask", "body", "param", "message"),
    [
        (
            legacy,
            {"max_tokens": 0},
            "max_tokens",
            "max_tokens must be at least 1, or 0 with echo to have a prompt scored, got 0",
        ),
        (chat, {"max_tokens": 0}, "max_tokens", "max_tokens must be a whole number from 1, got 0"),
        (chat, {"max_completion_tokens": 0}, "max_completion_tokens", "must be a whole number from 1, got 0"),
        (
            chat,
            {"max_tokens": 3, "max_completion_tokens": 4},
            "max_tokens",
            "max_tokens is another name of max_completion_tokens and must be the same (4), got 3",
        ),
        (legacy, {"logprobs": 21}, "logprobs", "logprobs must be a whole number from 0 to 20, got 21"),
        (legacy, {"logprobs": True}, "logprobs", "logprobs must be a whole number from 0 to 20, got true"),
        (chat, {"logprobs": 5}, "logprobs", "logprobs must be true or false, got 5"),
        (chat, {"logprobs": True, "top_logprobs": 21}, "top_logprobs", "from 0 to 20, got 21"),
        (chat, {"top_logprobs": 2}, "top_logprobs", "top_logprobs needs logprobs to be true"),
        (legacy, {"prompt": ["a"] * 33, "n": 2}, "n", "n times the number of prompts must be at most 64, got 66"),
        (
            legacy,
            {"model": "large", "details": True},
            "details",
            'details can only be asked of the model "proxy", got "large"',
        ),
        (chat, {"stream_options": {"include_usage": True}}, "stream_options", "stream_options needs stream to be true"),
        (chat, {"metadata": "x"}, "metadata", 'metadata must be an object, got "x"'),
    ],
)
def test_parameters_that_do_not_go_together_are_refused(ask, body, param, message):
    error = refusal(ask, **body)
    assert error.param == param
    assert message in error.message


@pytest.mark.parametrize(
    ("ask", "name", "message"),
    [
        (legacy, "temprature", "temprature is not a parameter that is known here; did you mean temperature?"),
        (legacy, "max_completion_tokens", "did you mean max_tokens?"),
        (legacy, "messages", "messages is not a parameter that is known here"),
        (chat, "prompt", "prompt is not a parameter that is known here"),
        (chat, "top_k", "did you mean top_p?"),
        (chat, "", '"" is not a parameter that is known here'),
        (chat, "a b", '"a b" is not a parameter that is known here'),
        (chat, "\ud800", "is not a parameter that is known here"),
        (chat, "x" * 100_000, f"{'x' * 79}… is not a parameter that is known here"),
    ],
)
def test_an_unknown_parameter_is_refused_by_name_with_the_nearest_known_one(ask, name, message):
    for value in (1, None):
        error = refusal(ask, **{name: value})
        assert message in error.message
        assert error.code == "unknown_parameter"


def test_an_unknown_parameter_inside_another_is_named_with_its_path():
    error = refusal(chat, stream=True, stream_options={"include_use": True})
    assert error.param == "stream_options.include_use"
    assert error.message == (
        "stream_options.include_use is not a parameter that is known here; did you mean include_usage?"
    )


def test_a_model_that_does_not_exist_is_not_found():
    for name in schemas.MODELS:
        check_model(name)
    with pytest.raises(OpenAIError) as caught:
        check_model("gpt-4")
    assert caught.value.status == 404
    assert caught.value.body() == {
        "error": {
            "message": 'the model "gpt-4" does not exist; the models here are proxy, large, tuned, untuned',
            "type": "invalid_request_error",
            "param": "model",
            "code": "model_not_found",
        }
    }
    legacy(model="gpt-4", details=True)  # so that the answer is 404 and not 400


@pytest.mark.parametrize("value", ["\ud800", "é😀", "x" * 10**6, float("nan"), [[[]]] * 5, {"a": 1}, 10**4000, None])
def test_an_error_can_always_be_sent(value):
    error = OpenAIError(404, str(refusal(legacy, prompt={"a": value})) + str(value), param=str(value))
    json.dumps(error.body(), ensure_ascii=False).encode()


def test_lists_without_end_are_not_shown():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    assert refusal(legacy, temperature=deep).message == "temperature must be a number from 0 to 2, got a list"
    while deep:  # or Python's own release of it would go as deep
        deep = deep.pop()


# --- behind FastAPI ---------------------------------------------------------------------------------------------------


def application():
    app = FastAPI()
    errors = {"4XX": {"model": schemas.ErrorBody}}
    ok = {"model": schemas.Completion, "content": schemas.event_stream(schemas.CompletionChunk)}
    chat_ok = {"model": schemas.ChatCompletion, "content": schemas.event_stream(schemas.ChatCompletionChunk)}

    @app.exception_handler(RequestValidationError)
    async def invalid(_, error):
        refused = OpenAIError.from_validation(error.errors())
        return JSONResponse(refused.body(), refused.status)

    @app.post("/v1/completions", responses={200: ok, **errors}, response_model=None)
    async def completions(body: CompletionRequest):
        return {"n": body.n}

    @app.post("/v1/chat/completions", responses={200: chat_ok, **errors}, response_model=None)
    async def chat_completions(body: ChatCompletionRequest):
        return {"n": body.n}

    @app.get("/v1/models")
    async def models() -> schemas.ModelList:
        return schemas.ModelList(data=[schemas.Model(id="proxy", created=5)])

    return app


APP = application()


def answer(method, path, content=None):
    async def ask():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(APP), base_url="http://test") as client:
            headers = {"content-type": "application/json"}
            return await client.request(method, path, content=content, headers=headers)

    return asyncio.run(ask())


@pytest.mark.parametrize(
    ("content", "message", "param"),
    [
        (b"", "the body must be a JSON object with the request's parameters", None),
        (b"{", "the body must be JSON (Expecting property name enclosed in double quotes at character 1)", None),
        (b"5", "the body must be a JSON object", None),
        (b"[]", "the body must be a JSON object", None),
        (b"null", "the body must be a JSON object", None),
        (b"{}", "prompt must be given", "prompt"),
        (b'{"prompt": "a", "n": 0}', "n must be a whole number from 1 to 8, got 0", "n"),
        (b'{"prompt": "a", "alpha": NaN}', "alpha must be a number from -10 to 10, got NaN", "alpha"),
        (b'{"prompt": "a", "alpha": 1e999}', "alpha must be a number from -10 to 10, got Infinity", "alpha"),
        (b'{"prompt": "\\ud800"}', "prompt must be valid Unicode text", "prompt"),
        (b'{"prompt": "a", "\\ud800": 1}', "is not a parameter", "\\ud800"),
        (b'{"prompt": "a", "stop": {"\\ud800": "\\ud800"}}', "stop must be a text", "stop"),
    ],
)
def test_through_fastapi_the_same_sentences_come(content, message, param):
    response = answer("POST", "/v1/completions", content)
    assert response.status_code == 400
    error = response.json()["error"]
    assert message in error["message"]
    if param != "\\ud800":
        assert error["param"] == param
    assert not error["message"].startswith("body")


def test_the_openapi_document_describes_requests_and_answers():
    document = answer("GET", "/openapi.json").json()
    named = document["components"]["schemas"]
    assert {"CompletionRequest", "ChatCompletionRequest", "Completion", "ChatCompletion", "ErrorBody"} <= set(named)
    assert "HTTPValidationError" not in named
    body = named["CompletionRequest"]
    assert body["additionalProperties"] is False
    assert body["required"] == ["prompt"]
    temperature = body["properties"]["temperature"]
    assert temperature["anyOf"] == [{"type": "number", "minimum": 0, "maximum": 2}, {"type": "null"}]
    assert temperature["description"] == "0: always the likeliest token."
    assert body["properties"]["plausibility"]["anyOf"][0] == {"type": "number", "minimum": 0, "exclusiveMaximum": 1}
    assert body["properties"]["model"]["anyOf"][0]["enum"] == list(schemas.MODELS)
    content = named["Message"]["properties"]["content"]["anyOf"]
    assert content[1] == {"type": "array", "items": {"$ref": "#/components/schemas/TextPart"}, "minItems": 1}
    answers = document["paths"]["/v1/chat/completions"]["post"]["responses"]["200"]["content"]
    assert answers["application/json"]["schema"] == {"$ref": "#/components/schemas/ChatCompletion"}
    last, piece = answers["text/event-stream"]["itemSchema"]["properties"]["data"]["anyOf"]
    assert last == {"const": "[DONE]"}
    chunk = piece["contentSchema"]
    assert chunk["properties"]["object"]["const"] == "chat.completion.chunk"
    assert "$ref" not in json.dumps(chunk)


def test_the_list_of_models_is_openais():
    assert answer("GET", "/v1/models").json() == {
        "object": "list",
        "data": [{"id": "proxy", "object": "model", "created": 5, "owned_by": "fedpt"}],
    }


# --- JSON schema ------------------------------------------------------------------------------------------------------


DOCUMENT = schemathesis.openapi.from_dict(APP.openapi())
TOGETHER = (  # rules that a schema cannot tell
    "needs stream to be true",
    "needs logprobs to be true",
    "is another name",
    "times the number of prompts",
    "can only be asked of the model",
    "or 0 with echo",
    "needs one prompt",
    "best_of is not supported",
    "surrogate",
)


def whole(value):
    """1.0 as 1: to JSON schema both are whole numbers, and here only one."""
    if isinstance(value, dict):
        return {name: whole(item) for name, item in value.items()}
    if isinstance(value, list):
        return [whole(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


@pytest.mark.parametrize(
    ("request_class", "path"),
    [(CompletionRequest, "/v1/completions"), (ChatCompletionRequest, "/v1/chat/completions")],
)
@settings(deadline=None, max_examples=100, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_what_the_schema_allows_is_accepted(request_class, path, data):
    body = whole(data.draw(DOCUMENT[path]["POST"].as_strategy()).body)
    try:
        request_class.model_validate(body)
    except ValidationError as caught:
        message = OpenAIError.from_validation(caught.errors()).message
        if not any(rule in message for rule in TOGETHER):
            pytest.fail(message)


@settings(deadline=None, max_examples=300)
@given(
    st.sampled_from(sorted(set(CompletionRequest.model_fields) | set(ChatCompletionRequest.model_fields))),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    ),
)
def test_what_the_schema_does_not_allow_is_refused_by_name(parameter, value):
    for ask, request_class, required in (
        (legacy, CompletionRequest, {"prompt": "hello"}),
        (chat, ChatCompletionRequest, {"messages": HELLO}),
    ):
        if parameter in request_class.model_fields:
            allowed = VALIDATORS[request_class].is_valid({**required, parameter: value})
            if not allowed and not (parameter == "model" and isinstance(value, str)):  # which is for `check_model`
                assert refusal(ask, **{parameter: value}).param.startswith(parameter)


VALIDATORS = {
    request_class: jsonschema_rs.validator_for(request_class.model_json_schema())
    for request_class in (CompletionRequest, ChatCompletionRequest)
}


# --- answers ----------------------------------------------------------------------------------------------------------

DETAIL = {
    "token": "a",
    "id": 5,
    "probability": 0.5,
    "large_probability": 0.25,
    "large_token": "b",
    "large_token_probability": 0.75,
    "changed": True,
}
HEAD = {"id": "x", "created": 5, "model": "proxy", "system_fingerprint": "v"}
USAGE = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
TOP = {"token": "a", "logprob": -0.5, "bytes": [97]}
CHAT_LOGPROBS = {"content": [{**TOP, "top_logprobs": [TOP, {**TOP, "bytes": None}]}], "refusal": None}
LEGACY_LOGPROBS = {
    "tokens": ["a", "b"],
    "token_logprobs": [None, -0.5],
    "top_logprobs": [None, {"b": -0.5}],
    "text_offset": [0, 1],
}
ANSWERS = [
    (
        schemas.Completion,
        OpenAICompletion,
        {
            **HEAD,
            "object": "text_completion",
            "choices": [
                {"index": 0, "text": "ab", "logprobs": LEGACY_LOGPROBS, "finish_reason": "stop", "fedpt": [DETAIL]},
                {"index": 1, "text": "", "logprobs": None, "finish_reason": "length"},
            ],
            "usage": USAGE,
        },
    ),
    (
        schemas.CompletionChunk,
        OpenAICompletion,
        {
            **HEAD,
            "object": "text_completion",
            "choices": [{"index": 0, "text": "a", "logprobs": None, "finish_reason": None}],
        },
    ),
    (
        schemas.CompletionChunk,
        OpenAICompletion,
        {**HEAD, "object": "text_completion", "choices": [], "usage": USAGE},
    ),
    (
        schemas.ChatCompletion,
        OpenAIChatCompletion,
        {
            **HEAD,
            "object": "chat.completion",
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": "a", "refusal": None},
                    "logprobs": CHAT_LOGPROBS,
                    "finish_reason": "stop",
                    "fedpt": [DETAIL],
                }
            ],
            "usage": USAGE,
        },
    ),
    (
        schemas.ChatCompletionChunk,
        OpenAIChatCompletionChunk,
        {
            **HEAD,
            "object": "chat.completion.chunk",
            "choices": [
                {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None},
                {"index": 1, "delta": {"content": "a"}, "logprobs": CHAT_LOGPROBS, "finish_reason": None},
                {"index": 2, "delta": {}, "logprobs": None, "finish_reason": "stop", "fedpt": []},
            ],
            "usage": None,
        },
    ),
]


@pytest.mark.parametrize(("model", "official", "body"), ANSWERS)
def test_answers_are_described_as_they_are_and_read_by_the_official_client(model, official, body):
    jsonschema_rs.validate(model.model_json_schema(mode="serialization"), body)
    assert model.model_validate(body).model_dump(exclude_unset=True) == body
    assert official.construct(**body).to_dict() == body  # as the client reads it


@pytest.mark.parametrize(("model", "official", "body"), ANSWERS)
def test_an_answer_without_one_of_its_parts_is_not_what_is_described(model, official, body):
    for name in set(body) - {"usage"}:
        with pytest.raises(jsonschema_rs.ValidationError):
            jsonschema_rs.validate(model.model_json_schema(), {key: body[key] for key in body if key != name})


def test_an_error_is_described_as_it_is():
    body = OpenAIError(429, "too many", type="rate_limit_exceeded", headers={"retry-after": "5"}).body()
    jsonschema_rs.validate(schemas.ErrorBody.model_json_schema(), body)
    assert body == {"error": {"message": "too many", "type": "rate_limit_exceeded", "param": None, "code": None}}
