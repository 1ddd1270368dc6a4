"""What one is told about data that cannot be used: every row of the table in docs/data.md, produced here."""

import json
from pathlib import Path

import pytest
from tiny import tiny_tokenizer

from fedpt_flwr.config import parse_run_config
from fedpt_flwr.errors import FedPTError
from fedpt_flwr.sources import answer_choices, device_shard

DOCS = Path(__file__).parents[1] / "docs" / "data.md"
STRICT_TURNS = (
    "{% for message in messages %}{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('user and assistant must take turns') }}{% endif %}[{{ message.role }}]{{ message.content }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


GOOD = {"instruction": "Say hi.", "response": "hi"}
TURN = {"role": "user", "content": "hi"}
SAID = {"role": "assistant", "content": "hello"}

# What is wrong, the file's name, its bytes, and keys of the run config.
WRONG = [
    ("a line that is no JSON", "notes.jsonl", lines(GOOD) + b"{instruction: 1}\n", {"data.format": "instruction"}),
    ("a list in a `.jsonl` file", "notes.jsonl", b'[{"text": "a"}]\n', {"data.format": "text"}),
    ("JSON Lines in a `.json` file", "notes.json", lines(GOOD, GOOD), {"data.format": "instruction"}),
    ("text that is not UTF-8", "notes.txt", b"good\nna\xefve\n", {"data.format": "text"}),
    ("a file of another kind", "notes.docx", b"PK", {"data.format": "text"}),
    ("an empty file", "notes.jsonl", b"\n", {"data.format": "text"}),
    ("a row with too many cells", "notes.csv", b"text,label\na,b\na,b,c\n", {"data.format": "text"}),
    ("a table without a header", "notes.csv", b"a,a\nb,c\n", {"data.format": "text"}),
    ("a field that is there twice", "notes.jsonl", b'{"text": "a"}\n{"text": "b", "text": "c"}\n', {
        "data.format": "text"}),
    ("a number without end", "notes.jsonl", b'{"text": 1e400}\n', {"data.format": "text"}),
    ("a record without its answer", "notes.jsonl", lines(GOOD, {"instruction": "x"}), {"data.format": "instruction"}),
    ("an answer that is blank", "notes.jsonl", lines(GOOD | {"response": " "}), {"data.format": "instruction"}),
    (
        "two fields that may be the answer",
        "notes.jsonl",
        lines(GOOD | {"output": "x"}),
        {"data.format": "instruction"},
    ),
    ("two contexts", "notes.jsonl", lines(GOOD | {"input": "a", "context": "b"}), {"data.format": "instruction"}),
    ("a field that is no text", "notes.jsonl", lines({"prompt": ["a"], "completion": "b"}), {
        "data.format": "completion"}),
    ("a value that is missing", "notes.jsonl", lines({"text": None}), {"data.format": "text"}),
    ("half a character", "notes.jsonl", b'{"text": "a\\ud800"}\n', {"data.format": "text"}),
    ("a record of another shape among others", "notes.jsonl", lines(GOOD, {"text": "a"}), {"data.format": "auto"}),
    ("a shape that is not known", "notes.jsonl", lines({"q": "a", "a": "b"}), {"data.format": "auto"}),
    ("a field that a template names and a record lacks", "notes.jsonl", lines({"q": "a", "a": "b"}), {
        "data.template": "{question}", "data.answer-field": "a"}),
    ("a template that reaches into a field", "notes.jsonl", lines({"q": "a"}), {"data.template": "{q.x}"}),
    ("a conversation that is no list", "notes.jsonl", lines({"messages": "hi"}), {"data.format": "chat"}),
    ("a conversation without `messages`", "notes.jsonl", lines({"turns": [TURN, SAID]}), {"data.format": "chat"}),
    ("a message without content", "notes.jsonl", lines({"messages": [{"role": "user"}]}), {"data.format": "chat"}),
    ("a message of an unknown role", "notes.jsonl", lines({"messages": [TURN, SAID | {"role": "tool"}]}), {
        "data.format": "chat"}),
    ("a picture in a message", "notes.jsonl", lines({"messages": [TURN | {"content": [{"type": "image"}]}, SAID]}), {
        "data.format": "chat"}),
    ("a conversation in which the assistant is silent", "notes.jsonl", lines({"messages": [TURN]}), {
        "data.format": "chat"}),
    ("a conversation that the assistant begins", "notes.jsonl", lines({"messages": [SAID, TURN, SAID]}), {
        "data.format": "chat"}),
    ("an assistant's turn that is empty", "notes.jsonl", lines({"messages": [TURN, SAID | {"content": ""}]}), {
        "data.format": "chat"}),
    ("turns that the model's chat template refuses", "notes.jsonl", lines({"messages": [TURN, TURN, SAID]}), {
        "data.format": "chat"}),
    ("too few records to hold some out", "notes.jsonl", lines(GOOD, GOOD), {"data.format": "instruction"}),
    ("labels without choices", "notes.jsonl", lines({"text": "a", "label": "b"}), {"data.format": "classification"}),
    ("choices of which there is one", "notes.jsonl", lines(*[{"text": "a", "label": "b"}] * 4), {
        "data.format": "classification", "data.choices": "train"}),
    ("a record without its group", "notes.jsonl", lines(GOOD), {
        "data.format": "instruction", "data.partitioner": "natural", "data.group-field": "site"}),
    ("a relative path", "", b"", {"data.train": "notes.jsonl"}),
    ("a path that leads nowhere", "", b"", {"data.train": "FOLDER/none.jsonl"}),
    ("a shape that there is not", "notes.jsonl", lines(GOOD), {"data.format": "alpaca"}),
]  # fmt: skip


def told(folder, name, content, keys):
    """What the error says, with the folder's own name left out."""
    if name:
        (folder / name).write_bytes(content)
    given = {
        "data.train": str(folder / name), "data.validation": "", "data.test": "", "data.partitioner": "iid",
        "data.public": "", "data.prompts": "", "distillation.mode": "off",
    } | {key: value.replace("FOLDER", str(folder)) for key, value in keys.items()}  # fmt: skip
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = STRICT_TURNS

    def use():
        data = parse_run_config(given).data
        device_shard(data, device=0, num_devices=1, seed=0, tokenizer=tokenizer)
        answer_choices(data)

    with pytest.raises(FedPTError) as caught:
        use()
    sentence = str(caught.value)
    assert "\n" not in sentence, sentence
    return sentence.replace(str(folder), "/data").replace(str(Path.cwd()), "/here")


def row(what, sentence):
    return f"| {what} | {sentence.replace('|', chr(92) + '|')} |"


@pytest.mark.parametrize(("what", "name", "content", "keys"), WRONG, ids=[case[0] for case in WRONG])
def test_what_is_wrong_is_said_as_the_table_in_the_docs_has_it(what, name, content, keys, tmp_path):
    assert row(what, told(tmp_path, name, content, keys)) in DOCS.read_text(encoding="utf-8").splitlines()


def test_the_table_in_the_docs_has_no_other_rows():
    table = DOCS.read_text(encoding="utf-8").partition("| what is wrong |")[2].partition("\n\n")[0]
    assert len(table.splitlines()) == len(WRONG) + 2
