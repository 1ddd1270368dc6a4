from __future__ import annotations

import json

import pytest
from tiny import tiny_tokenizer

from fedpt_flwr.prompts import Template
from fedpt_flwr.service.chat import render_chat
from fedpt_flwr.service.schemas import ChatCompletionRequest, OpenAIError

RUN = Template("> {request}\n[{unit}]\n")
ONE = Template("Question: {question}\nAnswer:")

CHATML = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
STRICT = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'system' %}{{ raise_exception('no system role here') }}{% endif %}"
    "[{{ message.role }}] {{ message.content }}\n{% endfor %}"
)


def messages(*turns):
    """From ``("user", "hello")`` and so on, as a request would bring them."""
    body = {"messages": [{"role": role, "content": content} for role, content in turns]}
    return ChatCompletionRequest.model_validate(body).messages


def render(*turns, template=RUN, chat_template=None):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = chat_template
    return render_chat(messages(*turns), tokenizer, template)


def refusal(*turns, **options):
    with pytest.raises(OpenAIError) as caught:
        render(*turns, **options)
    assert caught.value.status == 400
    assert caught.value.code == "invalid_value"
    return caught.value


# --- the run's template -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "said", "prompt"),
    [
        (RUN, '{"request": "how far", "unit": "km"}', "> how far\n[km]\n"),
        (RUN, ' {"unit": 5.0, "request": "a {unit}"}\n', "> a {unit}\n[5]\n"),
        (ONE, '{"question": "why"}', "Question: why\nAnswer:"),
        (ONE, "why", "Question: why\nAnswer:"),
        (ONE, "{why}", "Question: {why}\nAnswer:"),
        (ONE, '{"query": "why"}', 'Question: {"query": "why"}\nAnswer:'),
        (ONE, '{"question": "why", "more": 1}', 'Question: {"question": "why", "more": 1}\nAnswer:'),
        (ONE, '["question"]', 'Question: ["question"]\nAnswer:'),
        (RUN, "> how far\n[km]\n", "> how far\n[km]\n"),
        (RUN, "> how far\n[km]", "> how far\n[km]\n"),
        (RUN, "> how far\n[km", "> how far\n[km]\n"),
        (RUN, '{"request": "how far"}', '{"request": "how far"}]\n'),
        (RUN, "{" * 5, "{{{{{]\n"),
        (RUN, '{"a":' * 100_000, '{"a":' * 100_000 + "]\n"),
        (Template("{a} and {b}"), "x", "x"),
        (Template("Go on."), "x", "x"),
        (Template("Go on."), "{}", "{}"),
        (None, "x", "x"),
        (None, '{"request": "x"}', '{"request": "x"}'),
        (ONE, "", "Question: \nAnswer:"),
    ],
)
def test_what_a_user_says_becomes_a_prompt_of_the_run(template, said, prompt):
    assert render(("user", said), template=template) == prompt


def test_every_prompt_of_the_run_stays_as_it_is():
    prompt = RUN.render({"request": "how far", "unit": "km"})
    assert render(("user", prompt)) == prompt


@pytest.mark.parametrize(
    ("turns", "prompt"),
    [
        ([("user", "a"), ("assistant", "b"), ("user", "c")], "<a>b\n<c>"),
        ([("user", "a"), ("assistant", "b")], "<a>b"),  # goes on
        ([("user", "a"), ("assistant", "")], "<a>"),
        ([("user", "a"), ("user", "b")], "<a>\n<b>"),
        ([("user", "a"), ("assistant", "b"), ("assistant", "c")], "<a>b\nc"),
        ([("assistant", "a"), ("user", "b")], "a\n<b>"),
        ([("system", "s"), ("user", "a")], "s\n\n<a>"),
        (
            [("developer", "s"), ("user", "a"), ("assistant", "b"), ("system", "t"), ("user", "c")],
            "s\n\nt\n\n<a>b\n<c>",
        ),
        ([("user", "a"), ("system", "s"), ("user", "b")], "s\n\n<a>\n<b>"),
        ([("user", [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])], "<a\nb>"),
    ],
)
def test_a_conversation_is_its_turns_in_order_with_the_instructions_in_front(turns, prompt):
    assert render(*turns, template=Template("<{text}>")) == prompt
    assert render(*turns, template=None) == prompt.replace("<", "").replace(">", "")


def test_a_conversation_looks_as_the_runs_examples_do():
    record = json.dumps({"request": "how far", "unit": "km"})
    assert render(("user", record), ("assistant", "5"), ("user", "> how long\n[h]\n")) == (
        "> how far\n[km]\n5\n> how long\n[h]\n"
    )


@pytest.mark.parametrize("role", ["system", "developer"])
def test_somebody_must_wait_for_an_answer(role):
    error = refusal(("user", "a"), (role, "b"))
    assert error.param == "messages[1].role"
    assert error.message == (
        f"the last of messages must be the user's, or the assistant's to be continued, got one of the role \"{role}\""
    )


@pytest.mark.parametrize(
    ("turns", "template"), [([("user", "")], None), ([("assistant", "")], RUN), ([("user", "")], Template("{a}"))]
)
def test_a_conversation_without_text_is_refused(turns, template):
    error = refusal(*turns, template=template)
    assert (error.param, error.message) == ("messages", "messages must hold some text")


@pytest.mark.parametrize(
    ("value", "rule"),
    [
        (None, "the field 'unit' must have a value"),
        ([1], "the field 'unit' must be text or a number"),
        (float("nan"), "the field 'unit' must have a value"),
        ("\ud800", "the field 'unit' must be valid Unicode text"),
    ],
)
def test_a_record_with_a_field_that_is_no_text_is_refused_with_its_place(value, rule):
    said = json.dumps({"request": "x", "unit": value})
    error = refusal(("user", "first"), ("assistant", "yes"), ("user", said))
    assert error.param == "messages[2].content"
    assert error.message.startswith("messages[2].content: ")
    assert rule in error.message
    json.dumps(error.body(), ensure_ascii=False).encode()


# --- a chat template --------------------------------------------------------------------------------------------------


def test_a_chat_template_is_used_instead_of_the_runs():
    assert render(("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), chat_template=CHATML) == (
        "<|system|>s<|end|>\n<|user|>a<|end|>\n<|assistant|>b<|end|>\n<|user|>c<|end|>\n<|assistant|>"
    )


def test_the_assistants_last_word_is_continued():
    assert render(("user", "a"), ("assistant", "b "), chat_template=CHATML) == ("<|user|>a<|end|>\n<|assistant|>b ")


def test_a_developer_is_the_system_where_a_template_knows_no_developers():
    assert render(("developer", "s"), ("user", "a"), chat_template=CHATML).startswith("<|system|>s")
    knowing = CHATML + "{# developer #}"
    assert render(("developer", "s"), ("user", "a"), chat_template=knowing).startswith("<|developer|>s")


def test_parts_of_a_message_reach_a_chat_template_as_one_text():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert render(("user", parts), chat_template=CHATML).startswith("<|user|>a\nb<|end|>")


@pytest.mark.parametrize(
    ("turns", "chat_template", "reason"),
    [
        ([("system", "s"), ("user", "a")], STRICT, "no system role here"),
        ([("user", "a")], "{{ messages[5].content.x }}", "has no element 5"),
        ([("user", "a")], "{{ 'a' + 1 }}", "concatenate"),
        ([("user", "a")], "{% if %}", "Expected an expression"),
        ([("user", "a"), ("assistant", "b")], "{{ messages[0].content }}", "final message does not appear"),
    ],
)
def test_a_conversation_that_a_chat_template_refuses_is_refused_with_its_reason(turns, chat_template, reason):
    error = refusal(*turns, chat_template=chat_template)
    assert error.param == "messages"
    assert error.message.startswith("messages do not fit the model's chat template (")
    assert reason in error.message
    assert "\n" not in error.message


def test_a_chat_template_that_writes_nothing_is_refused():
    assert refusal(("user", "a"), chat_template="{# nothing #}").message == "messages must hold some text"
