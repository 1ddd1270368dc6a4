"""Records in the shapes that people keep them in, and the examples that they become."""

import dataclasses
import json

import pytest
from tiny import tiny_tokenizer

from fedpt_flwr.config import DataConfig, parse_run_config
from fedpt_flwr.data import content_hash, load_records, tokenize_examples, tokenize_prompts
from fedpt_flwr.errors import ConfigError, DataError
from fedpt_flwr.prompts import Example, Template
from fedpt_flwr.service.chat import render_chat
from fedpt_flwr.service.schemas import ChatCompletionRequest
from fedpt_flwr.shapes import CHAT_REQUEST, AutoShape, make_shape
from fedpt_flwr.sources import (
    answer_choices,
    device_shard,
    held_out_items,
    local_shard,
    public_prompts,
    public_texts,
    scored_shape,
)

# One token a turn's border, as ChatML has: `>` opens and `</s>` closes.
CHATML = (
    "{% for message in messages %}>{{ message.role }}\n{{ message.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}>assistant\n{% endif %}"
)
CONVERSATION = [
    {"role": "system", "content": "be short"},
    {"role": "user", "content": "how"},
    {"role": "assistant", "content": "so"},
    {"role": "user", "content": "why"},
    {"role": "assistant", "content": "thus"},
]


def chat_tokenizer(chat_template=CHATML, **special):
    tokenizer = tiny_tokenizer(**special)
    tokenizer.chat_template = chat_template
    return tokenizer


def shape(name, tokenizer=None):
    return make_shape(name, template=Template("Q: {q}\n"), answer_field="a", tokenizer=tokenizer)


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


# --- fields of fixed names --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "record", "example"),
    [
        ("template", {"q": "2+2", "a": "4"}, Example("Q: 2+2\n", "4")),
        (
            "instruction",
            {"instruction": "Add.", "input": "2 2", "output": "4"},
            Example("Instruction:\nAdd.\n\nContext:\n2 2\n\nResponse:\n", "4"),
        ),
        (
            "instruction",
            {"instruction": "Say hi.", "context": "", "response": "hi", "category": "talk"},
            Example("Instruction:\nSay hi.\n\nResponse:\n", "hi"),
        ),
        (
            "instruction",
            {"instruction": "Say hi.", "input": None, "output": "hi"},
            Example("Instruction:\nSay hi.\n\nResponse:\n", "hi"),
        ),
        ("completion", {"prompt": "2+2=", "completion": "4"}, Example("2+2=", "4")),
        ("text", {"text": "all of it"}, Example("", "all of it")),
        ("classification", {"text": "my card", "label": "lost"}, Example("Text:\nmy card\n\nLabel:\n", "lost")),
        ("classification", {"text": "my card", "label": 3}, Example("Text:\nmy card\n\nLabel:\n", "3")),
    ],
)
def test_a_record_of_each_shape_becomes_one_example_and_auto_finds_the_shape(name, record, example):
    assert shape(name).examples(record) == [example]
    assert shape(name).prompt(record) == example.prompt
    if name != "template":
        assert shape("auto").of(record).examples(record) == [example]


def test_braces_in_a_record_are_not_read_as_places():
    record = {"instruction": "{context}", "input": "{instruction}", "output": "x"}
    assert shape("instruction").examples(record)[0].prompt == (
        "Instruction:\n{context}\n\nContext:\n{instruction}\n\nResponse:\n"
    )


@pytest.mark.parametrize("name", ["instruction", "completion", "classification"])
def test_public_prompts_need_no_answer(name):
    fields = {"instruction": "a", "prompt": "b", "text": "c"}
    assert shape(name).prompt(fields)


# --- conversations ----------------------------------------------------------------------------------------------------


def test_every_turn_of_the_assistant_is_learnt_once_after_all_that_was_said_before_it():
    first = ">system\nbe short</s>\n>user\nhow</s>\n>assistant\n"
    found = shape("chat", chat_tokenizer()).examples({"messages": CONVERSATION})
    assert found == [Example(first, "so"), Example(f"{first}so</s>\n>user\nwhy</s>\n>assistant\n", "thus")]


def test_only_what_the_assistant_says_has_labels_and_the_turns_together_are_the_whole_conversation():
    tokenizer = chat_tokenizer()
    examples = shape("chat", tokenizer).examples({"messages": CONVERSATION})
    tokenized, _ = tokenize_examples(examples, tokenizer, max_length=500)
    assert [tokenizer.decode(item.answer_ids) for item in tokenized] == ["so</s>", "thus</s>"]
    whole = tokenizer.apply_chat_template(CONVERSATION, tokenize=False).strip()
    assert tokenizer.decode(tokenized[-1].prompt_ids + tokenized[-1].answer_ids) == whole


def test_a_turn_that_ends_otherwise_than_a_text_is_learnt_with_its_own_end():
    ended = CHATML.replace("</s>", ";")
    tokenizer = chat_tokenizer(ended)
    examples = shape("chat", tokenizer).examples({"messages": CONVERSATION})
    assert [(item.answer, item.ending) for item in examples] == [("so", ";"), ("thus", ";")]
    tokenized, _ = tokenize_examples(examples, tokenizer, max_length=500)
    assert tokenizer.decode(tokenized[0].answer_ids) == "so;</s>"
    assert content_hash(examples) != content_hash([dataclasses.replace(item, ending="") for item in examples])


def test_an_answer_that_others_said_before_is_found_at_its_own_place():
    messages = [{"role": "user", "content": "say so"}, {"role": "assistant", "content": "so"}]
    assert shape("chat", chat_tokenizer()).examples({"messages": messages})[0].answer == "so"
    said = [{"role": "user", "content": "assistant"}, {"role": "assistant", "content": " assistant \n"}]
    assert shape("chat", chat_tokenizer()).examples({"messages": said})[0].answer.strip() == "assistant"


def test_conversations_of_from_and_value_are_the_same():
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    shared = [{"from": names[turn["role"]], "value": turn["content"]} for turn in CONVERSATION]
    of = shape("chat", chat_tokenizer())
    assert of.examples({"conversations": shared}) == of.examples({"messages": CONVERSATION})


@pytest.mark.parametrize("chat_template", [CHATML, "{{ bos_token }}" + CHATML, None])
def test_the_service_asks_with_the_very_tokens_that_the_devices_learn_after(chat_template):
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    tokenizer = chat_tokenizer(chat_template, **special)
    examples = shape("chat", tokenizer).examples({"messages": CONVERSATION})
    learnt, _ = tokenize_examples(examples, tokenizer, max_length=500)
    for asked, item in ((CONVERSATION[:2], learnt[0]), (CONVERSATION[:4], learnt[1])):
        messages = ChatCompletionRequest.model_validate({"messages": asked}).messages
        text = render_chat(messages, tokenizer, CHAT_REQUEST)
        assert tokenize_prompts([text], tokenizer, max_length=None) == [item.prompt_ids]
    assert learnt[0].prompt_ids.count(tokenizer.bos_token_id) == (chat_template or "").count("bos_token")


def test_a_beginning_of_sequence_that_a_chat_template_wrote_is_not_doubled():
    from tokenizers.processors import TemplateProcessing

    tokenizer = chat_tokenizer("{{ bos_token }}" + CHATML, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert tokenizer("a")["input_ids"][0] == 1
    prompts = tokenize_prompts(["<s>abc", "abc"], tokenizer, max_length=None)
    assert prompts[0] == prompts[1]


def test_a_run_without_conversations_is_asked_by_its_own_template_whatever_the_tokenizer_has():
    messages = ChatCompletionRequest.model_validate({"messages": [{"role": "user", "content": "how"}]}).messages
    assert render_chat(messages, None, shape("instruction").request) == "Instruction:\nhow\n\nResponse:\n"
    assert shape("instruction").examples({"instruction": "how", "output": "so"})[0].prompt == (
        "Instruction:\nhow\n\nResponse:\n"
    )


# --- a whole run's data -----------------------------------------------------------------------------------------------


@pytest.fixture
def chat_data(tmp_path):
    """Twenty conversations of three answers each."""
    turns = [
        {"role": role, "content": f"{role[0]}{{}}x{number}"} for number in range(3) for role in ("user", "assistant")
    ]
    records = [
        {"messages": [{**turn, "content": turn["content"].format(number)} for turn in turns], "who": "ab"[number % 2]}
        for number in range(20)
    ]
    return DataConfig(
        train=write(tmp_path / "train.jsonl", records),
        format="chat",
        validation="",
        test="",
        public="",
        prompts="",
        group_field="who",
        partitioner="iid",
        holdout_fraction=0.1,
    )


def conversations(examples):
    """Which conversation each answer is of: `a7x2` is the third of number 7."""
    return [int(example.answer[1:].split("x")[0]) for example in examples]


def test_the_turns_of_a_conversation_are_on_one_device_or_held_out_together(chat_data):
    tokenizer = chat_tokenizer()
    shards = [device_shard(chat_data, device=n, num_devices=4, seed=0, tokenizer=tokenizer) for n in range(4)]
    held = [held_out_items(chat_data, which, seed=0, tokenizer=tokenizer) for which in ("validation", "test")]
    owners = [conversations(shard) for shard in shards] + [conversations(items.examples) for items in held]
    assert sorted(number for owned in owners for number in owned) == sorted(list(range(20)) * 3)
    assert all(owned.count(number) == 3 for owned in owners for number in owned)
    assert {example.group for shard in shards for example in shard} == {"a", "b"}


def test_auto_takes_each_source_as_it_is_and_prompts_as_the_test(chat_data, tmp_path):
    tokenizer = chat_tokenizer()
    asked = [{"messages": CONVERSATION}, {"messages": CONVERSATION[:2]}]
    own = write(tmp_path / "own.jsonl", [{"instruction": "a", "output": "b"}])
    data = dataclasses.replace(chat_data, format="auto", prompts=write(tmp_path / "prompts.jsonl", asked))
    assert scored_shape(data, tokenizer=tokenizer).name == "chat"
    found = public_prompts(data, tokenizer=tokenizer).texts
    assert found == [
        tokenizer.apply_chat_template(CONVERSATION[:count], tokenize=False, add_generation_prompt=True)
        for count in (4, 2)
    ]
    assert local_shard(data, own, tokenizer=tokenizer) == [Example("Instruction:\na\n\nResponse:\n", "b")]


def test_an_empty_public_template_writes_public_records_as_the_devices_examples(tmp_path):
    records = [{"instruction": "a", "input": "c", "output": "b"}]
    data = DataConfig(format="instruction", public=write(tmp_path / "public.jsonl", records), public_template="")
    assert public_texts(data) == ["Instruction:\na\n\nContext:\nc\n\nResponse:\nb"]


def test_labels_are_the_choices_of_a_classification(tmp_path):
    test = write(tmp_path / "test.jsonl", [{"text": "x", "label": label} for label in ("b", "a", "b")])
    data = DataConfig(format="classification", test=test, choices="test")
    assert answer_choices(data) == ["b", "a"]
    (tmp_path / "labels.txt").write_text("one\ntwo\n")
    assert answer_choices(dataclasses.replace(data, choices=str(tmp_path / "labels.txt"))) == ["one", "two"]


def test_groups_of_a_devices_own_data_are_read_if_asked_for_and_may_be_missing(tmp_path):
    own = write(tmp_path / "own.jsonl", [{"text": "x", "site": "a"}, {"text": "y"}, {"text": "z", "site": ["b"]}])
    data = DataConfig(format="text", group_field="site", partitioner="node-local")
    assert [example.group for example in local_shard(data, own)] == ["", "", ""]
    assert [example.group for example in local_shard(data, own, with_groups=True)] == ["a", "", ""]


def test_conversations_in_parquet_are_read_as_in_json_lines(tmp_path):
    from datasets import Dataset

    Dataset.from_list([{"messages": CONVERSATION}]).to_parquet(tmp_path / "own.parquet")
    write(tmp_path / "own.jsonl", [{"messages": CONVERSATION}])
    of = shape("chat", chat_tokenizer())
    first, second = (load_records(str(tmp_path / name), of) for name in ("own.parquet", "own.jsonl"))
    assert [item.examples for item in first] == [item.examples for item in second]


def test_what_no_shape_has_is_refused_before_anything_is_read_wrongly():
    with pytest.raises(DataError, match="which is not here"):
        AutoShape(None).of({"messages": CONVERSATION})


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"data.format": "classification"}, "a classification needs the labels to choose from"),
        ({"data.format": "chat", "data.choices": "test"}, "the shape chat has no labels to choose from"),
        ({"data.format": "text", "data.choices": "test"}, "the shape text has no labels to choose from"),
    ],
)
def test_keys_that_make_no_sense_together_are_refused(keys, match):
    with pytest.raises(ConfigError, match=match):
        parse_run_config(keys)
