from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets.arrow_writer import ArrowWriter
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from fedpt_flwr.data import (
    IGNORED_LABEL,
    TokenizedExample,
    batches,
    collate,
    collate_prompts,
    content_hash,
    load_records,
    read_records,
    split_holdout,
    tokenize_examples,
    tokenize_prompts,
)
from fedpt_flwr.errors import ConfigError, DataError, ModelError
from fedpt_flwr.paths import expanded
from fedpt_flwr.prompts import Example, Template
from fedpt_flwr.shapes import TemplateShape

RECORDS = [{"q": "one, two", "a": "3\n4"}, {"q": 'say "hé"', "a": "\u2028"}]

# --- records ---


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def as_csv(records, separator):
    rows = [list(records[0]), *(record.values() for record in records)]
    return "\r\n".join(separator.join('"' + cell.replace('"', '""') + '"' for cell in row) for row in rows) + "\r\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("f.jsonl", "\n".join(json.dumps(record, ensure_ascii=False) for record in RECORDS)),
        ("crlf.jsonl", "\r\n\r\n".join(json.dumps(record) for record in RECORDS) + "\r\n"),
        ("bom.jsonl", b"\xef\xbb\xbf" + "\n".join(json.dumps(record) for record in RECORDS).encode()),
        ("F.JSONL", "\n".join(json.dumps(record) for record in RECORDS)),
        ("f.json", json.dumps(RECORDS, indent=1)),
        ("data.json", json.dumps({"version": 1, "data": RECORDS})),
        ("f.csv", as_csv(RECORDS, ",")),
        ("bom.csv", "\ufeff" + as_csv(RECORDS, ",")),
        ("f.tsv", as_csv(RECORDS, "\t")),
    ],
)
def test_text_formats_give_the_records_that_were_written(tmp_path, name, content):
    assert read_records(write(tmp_path / name, content)) == RECORDS


def test_parquet_gives_the_records_that_were_written(tmp_path):
    records = [{"q": "x", "n": 1, "s": [1.5]}, {"q": "y", "n": None, "s": []}]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "f.parquet")
    assert read_records(str(tmp_path / "f.parquet")) == records


def test_class_labels_of_parquet_files_are_given_by_name(tmp_path):
    features = datasets.Features({"label": datasets.ClassLabel(names=["no", "yes"])})
    table = pa.table({"label": [1, 0, -1, None]}, schema=features.arrow_schema)
    pq.write_table(table, tmp_path / "f.parquet")
    assert [record["label"] for record in read_records(str(tmp_path / "f.parquet"))] == ["yes", "no", None, None]


def test_a_label_without_a_name_is_refused(tmp_path):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    table = pa.table({"text": ["a"], "label": [5]}).replace_schema_metadata(features.arrow_schema.metadata)
    pq.write_table(table, tmp_path / "f.parquet")
    with pytest.raises(DataError, match=r"f\.parquet: a label in 'label' must be below 2, .* got 5"):
        read_records(str(tmp_path / "f.parquet"))


def test_columns_of_kinds_that_datasets_does_not_know_do_no_harm(tmp_path):
    columns = {
        "text": pa.array(["a"]),
        "map": pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())),
        "fixed": pa.array([b"abcd"], pa.binary(4)),
        "uuid": pa.ExtensionArray.from_storage(pa.uuid(), pa.array([bytes(16)], pa.binary(16))),
    }
    pq.write_table(pa.table(columns), tmp_path / "f.parquet")
    assert [record["text"] for record in read_records(str(tmp_path / "f.parquet"))] == ["a"]
    described = {b"huggingface": b'{"info": {"features": {"text": {"_type": "Unknown"}}}}'}
    pq.write_table(pa.table({"text": ["a"]}).replace_schema_metadata(described), tmp_path / "f.parquet")
    with pytest.raises(DataError, match=r"description of its columns cannot be read \(Feature type 'Unknown'"):
        read_records(str(tmp_path / "f.parquet"))


def test_text_gives_one_record_for_each_line_that_is_not_blank(tmp_path):
    assert read_records(write(tmp_path / "f.txt", " first \r\n\r\n \nse\u2028cond")) == [
        {"text": " first "},
        {"text": "se\u2028cond"},
    ]


def test_a_folder_is_read_in_the_order_of_file_names(tmp_path):
    for name in ("b", "a", "c"):
        write(tmp_path / f"{name}.txt", name)
    write(tmp_path / "README.md", "not data")
    (tmp_path / "more.txt").mkdir()
    assert [record["text"] for record in read_records(str(tmp_path))] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("f.jsonl", '{"a": 1}\n\n{"a": }\n', r"line 3: broken JSON at column 7 \(Expecting value\), got '{\"a\": }'"),
        ("f.jsonl", '{"a": 1}\n[1]', r"line 2: a line must be a JSON object, got \[1\]; .* into a \.json file"),
        ("f.jsonl", '[\n{"a": 1}\n]', r"line 1: broken JSON at column 2 .* a list belongs into a \.json file"),
        ("f.jsonl", b'{"a": 1}\n{"a": "\xff"}', r"line 2: the text must be UTF-8 \(invalid start byte at byte 8 of"),
        ("f.jsonl", '{"a": 1}'.encode("utf-16"), r"line 1: the text must be UTF-8 .*; save the file as UTF-8"),
        ("f.txt", b"ok\nok\ncaf\xe9 ", r"f\.txt, line 3: .* UTF-8 \(.* at byte 4 of the line\), got b'\\xe9 '"),
        ("f.json", '[\n{"a": 1},\n{"a" 2}]', r"f\.json: broken JSON at line 3, column 6 \(Expecting .*, got '2}\]'"),
        ("f.json", '{"a": 1}\n{"a": 2}', r"JSON at line 2, column 1 \(Extra data\).*; JSON Lines belong into a \."),
        ("f.json", '{"a": 1}', r"f\.json: the file must hold a list of objects, or {\"data\": \[\.\.\.\]}, got"),
        ("f.json", '[{"a": 1, "b": {"c": 1, "c": 2}}]', r"f\.json: an object .* must have each field once, got 'c'"),
        ("f.json", '[{"a": 1}, 2]', r"f\.json, record 2: a record must be a JSON object, got 2"),
        ("f.csv", 'q,a\n1,"2\n3"\n4\n', r"line 4: the row has 1 cell, but the header has 2, got '4'; put cells"),
        ("f.csv", "q,a\n1,2,3\n", r"line 2: the row has 3 cells, but the header has 2, got '1,2,3'"),
        ("f.csv", "q,,a\n1,2,3\n", r"line 1: the first row must be a header: a different name .*, got \['q', ''"),
        ("f.csv", "q,q\n1,2\n", r"line 1: the first row must be a header"),
        ("f.csv", 'q,a\n1,2\n3,"4\n5', r"line 3: the row cannot be read \(unexpected end of data\); mend its"),
        ("f.parquet", "no", r"f\.parquet: not a Parquet file that can be read \(.*\); write or copy it again"),
        ("f.parquet", "", r"f\.parquet: not a Parquet file that can be read"),
        *((f"f.{kind}", "", r"the file holds no records") for kind in ("jsonl", "json", "csv", "tsv", "txt")),
        ("f.json", "[]", "the file holds no records"),
        ("f.csv", "q,a\n", "the file holds no records"),
        ("f.jsonl", " \n\n", "the file holds no records"),
        ("f.xml", "<a/>", r"f\.xml: a data file must end in \.jsonl, \.json, \.csv, \.tsv, \.parquet, \.txt"),
    ],
)  # fmt: skip
def test_a_bad_file_is_named_with_the_line_and_what_is_wrong(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message) as caught:
        read_records(write(tmp_path / name, content))
    assert str(tmp_path) in str(caught.value)


def test_a_cell_may_be_as_long_as_it_likes(tmp_path):
    assert read_records(write(tmp_path / "f.csv", "q,a\n" + "x" * 200_000 + ",1\n"))[0]["q"] == "x" * 200_000


def test_json_beyond_the_limits_of_python_is_refused_with_its_line(tmp_path):
    with pytest.raises(DataError, match=r"line 2: JSON that cannot be read \(maximum recursion"):
        read_records(write(tmp_path / "f.jsonl", "{}\n" + "[" * 100_000))
    with pytest.raises(DataError, match=r"line 2: JSON that cannot be read \(Exceeds the limit"):
        read_records(write(tmp_path / "f.jsonl", '{}\n{"a": ' + "9" * 5000 + "}"))


@pytest.mark.parametrize("name", ["f.jsonl", "f.parquet", "folder", "f.xml"])
def test_a_missing_path_is_named(tmp_path, name):
    with pytest.raises(DataError, match=rf"{name}: there is no such file or folder; check the path"):
        read_records(str(tmp_path / name))


@contextmanager
def unprivileged():
    """Root may read everything, so what may not be read is tried as nobody."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("name", ["f.jsonl", "f.parquet", "folder"])
def test_a_path_that_may_not_be_read_is_named(tmp_path, name):
    path = tmp_path / name
    path.mkdir() if name == "folder" else path.touch()
    path.chmod(0)
    with (
        unprivileged(),
        pytest.raises(DataError, match=rf"{name}: reading is not permitted; let the user that runs this process"),
    ):
        read_records(str(path))
    path.chmod(0o700)  # for whoever clears the folder away


def test_a_path_through_a_file_is_reported_as_the_system_says_it(tmp_path):
    file = write(tmp_path / "f.jsonl", "{}")
    with pytest.raises(DataError, match=r"x\.jsonl: cannot be read \(Not a directory\)"):
        read_records(f"{file}/x.jsonl")


def test_an_empty_folder_is_refused_with_what_it_needs(tmp_path):
    write(tmp_path / "README.md", "")
    with pytest.raises(DataError, match=r"the folder holds no data files; it needs \.jsonl, "):
        read_records(str(tmp_path))


def test_a_folder_of_several_kinds_is_refused_with_its_files(tmp_path):
    write(tmp_path / "a.jsonl", "{}")
    write(tmp_path / "b.txt", "x")
    with pytest.raises(DataError, match=r"must be of one kind, got 'a\.jsonl, b\.txt'; name one file"):
        read_records(str(tmp_path))


def test_a_folder_of_several_splits_is_refused_so_that_no_test_data_is_learnt(tmp_path):
    for name in ("train-00000.jsonl", "train-00001.jsonl"):
        write(tmp_path / name, "{}")
    assert len(read_records(str(tmp_path))) == 2
    write(tmp_path / "test.jsonl", "{}")
    with pytest.raises(DataError, match=r"holds different splits, which must not be mixed, got 'test\.jsonl, train-0"):
        read_records(str(tmp_path))


@pytest.mark.parametrize(
    ("names", "mixed"),
    [
        (("gsm8k_train.jsonl", "gsm8k_test.jsonl"), True),
        (("a-TRAIN-0.jsonl", "a.dev.jsonl"), True),
        (("train-part1.jsonl", "x_train2.jsonl"), False),
        (("latest.jsonl", "contest.jsonl", "trains.jsonl", "devices.jsonl"), False),
    ],
)
def test_a_split_is_known_wherever_its_name_stands_as_a_word(tmp_path, names, mixed):
    for name in names:
        write(tmp_path / name, "{}")
    if mixed:
        with pytest.raises(DataError, match="holds different splits"):
            read_records(str(tmp_path))
    else:
        assert len(read_records(str(tmp_path))) == len(names)


@pytest.mark.parametrize("source", ["data/f.jsonl", "f.csv", "./folder", "~/f.txt", "~nosuchuser/f", "../f.parquet"])
def test_a_relative_path_is_refused_with_the_absolute_one(source):
    absolute = expanded(source).resolve()
    with pytest.raises(DataError, match=rf"must be absolute, because Flower's .*, got '{source}'; write {absolute} if"):
        read_records(source)


def test_a_folder_that_looks_like_a_hub_id_is_refused_as_a_relative_path(tmp_path, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=f"must be absolute, .*; write {tmp_path}/owner/name"):
        read_records("owner/name")


@pytest.mark.parametrize("source", ["", "gsm8k", "a b/c", "owner/name:", "https://example.org/x", "a/b/c", "x" * 300])
def test_what_is_no_source_is_refused_with_what_a_source_is(source):
    with pytest.raises(
        DataError, match=r"must be demo:NAME, an absolute path, or a hub id \(owner/name or owner/name:c"
    ):
        read_records(source)


# --- the hub and the demo world: settings that hold from import on, so another process ---

READ_EACH = """
import json, sys
from fedpt_flwr.data import read_records
from fedpt_flwr.errors import DataError

said = {}
for argument in sys.argv[1:]:
    source, split = argument.split("|")
    if split == "not installed":
        sys.modules["fedpt_demo_world"] = None
    try:
        said[argument] = read_records(source, split=split)
    except DataError as error:
        said[argument] = str(error)
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """What `read_records` gives, or the error says, for each `source|split` in a small world of its own."""
    folder = tmp_path_factory.mktemp("offline")
    package = folder / "fedpt_demo_world"
    package.mkdir()
    write(package / "__init__.py", "")
    write(package / "train.jsonl", '{"request": "how far"}')
    write(package / "public.jsonl", '{"text"}')
    cached = folder / "datasets" / "someone___sites" / "default" / "0.0.0" / "0"
    cached.mkdir(parents=True)
    features = datasets.Features({"q": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    with ArrowWriter(features=features, path=str(cached / "sites-train.arrow")) as writer:
        writer.write({"q": "a", "label": 1})
        writer.write({"q": "b", "label": 0})
        num_examples, num_bytes = writer.finalize()
    split = {"name": "train", "num_bytes": num_bytes, "num_examples": num_examples, "dataset_name": "sites"}
    datasets.DatasetInfo(
        features=features, dataset_name="sites", config_name="default", version="0.0.0", splits={"train": split}
    ).write_to_directory(str(cached))
    arguments = [
        *("demo:train|train", "demo:public|train", "demo:nothing|train", "demo:../train|train"),
        *("owner/name|train", "owner/name:config|train"),
        *("someone/sites|train", "someone/sites:default|train[:1]", "someone/sites|test", "someone/sites:other|train"),
        "demo:train|not installed",
    ]
    paths = [str(folder), str(Path(__file__).parents[1])]
    done = subprocess.run(
        [sys.executable, "-P", "-c", READ_EACH, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HOME": str(folder), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def test_demo_data_is_read_from_the_installed_package(offline):
    assert offline["demo:train|train"] == [{"request": "how far"}]
    assert "fedpt_demo_world/public.jsonl, line 1: broken JSON" in offline["demo:public|train"]


@pytest.mark.parametrize("name", ["nothing", "../train"])
def test_unknown_demo_data_is_refused_with_what_there_is(offline, name):
    assert offline[f"demo:{name}|train"] == (
        f"demo:{name}: the demo world has no data set '{name}'; it has demo:public, demo:train"
    )


def test_a_missing_demo_world_is_refused_with_what_to_install(offline):
    said = offline["demo:train|not installed"]
    assert said.startswith("demo:train: the package fedpt_demo_world is not installed; install the project")
    assert "`pip install -e .`" in said


@pytest.mark.parametrize("source", ["owner/name", "owner/name:config"])
def test_a_hub_id_offline_says_so_and_what_to_do(offline, source):
    assert offline[f"{source}|train"] == (
        f"{source}: the hub cannot be reached (HF_HUB_OFFLINE is set), and the data set is not in this machine's "
        "cache; load it once where there is a connection, or give the absolute path of a local file"
    )


def test_hub_data_in_the_cache_are_read_offline_with_labels_by_name(offline):
    assert offline["someone/sites|train"] == [{"q": "a", "label": "yes"}, {"q": "b", "label": "no"}]
    assert offline["someone/sites:default|train[:1]"] == [{"q": "a", "label": "yes"}]


def test_a_split_or_config_that_a_hub_data_set_lacks_is_refused_with_those_it_has(offline):
    assert offline["someone/sites|test"].startswith(
        "someone/sites: the data set cannot be loaded with the split 'test'"
    )
    assert "['train']" in offline["someone/sites|test"]
    assert offline["someone/sites:other|train"].startswith("someone/sites:other: the data set cannot be loaded")
    assert "['default']" in offline["someone/sites:other|train"]


# --- examples ---


def load_examples(source, *, template, answer_field, group_field=""):
    shape = TemplateShape(Template(template), answer_field)
    return [example for item in load_records(source, shape, group_field=group_field) for example in item.examples]


def test_examples_have_prompt_answer_and_group(tmp_path):
    source = write(tmp_path / "f.jsonl", '{"q": "2+2", "a": 4.0, "site": "x"}')
    assert load_examples(source, template="Q: {q}\n", answer_field="a", group_field="site") == [
        Example("Q: 2+2\n", "4", "x")
    ]
    assert load_examples(source, template="{q}", answer_field="") == [Example("2+2", "", "")]


def test_examples_come_with_the_records_that_they_were_made_of(tmp_path):
    records = [{"q": "x", "a": "1", "more": [1]}, {"q": "y", "a": "2"}]
    source = write(tmp_path / "f.json", json.dumps(records))
    loaded = load_records(source, TemplateShape(Template("{q}"), "a"))
    assert [item.record for item in loaded] == records
    assert [item.examples for item in loaded] == [(Example("x", "1"),), (Example("y", "2"),)]


def test_lines_of_plain_text_are_answers_to_an_empty_template(tmp_path):
    source = write(tmp_path / "f.txt", "first\nsecond\n")
    assert load_examples(source, template="", answer_field="text") == [Example("", "first"), Example("", "second")]


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("f.jsonl", '{"q": "x", "a": "y"}\n\n{"q": "x"}', r"f\.jsonl, line 3"),
        ("f.json", '[{"q": "x", "a": "y"}, {"q": "x"}]', r"f\.json, record 2"),
    ],
)
def test_a_missing_answer_field_is_named_with_its_place_and_the_fields_there_are(tmp_path, name, content, place):
    with pytest.raises(DataError, match=rf"{place}: the record has no field 'a'; its fields are 'q'$"):
        load_examples(write(tmp_path / name, content), template="{q}", answer_field="a")


def test_a_missing_field_of_the_template_or_group_is_named_too(tmp_path):
    source = write(tmp_path / "f.csv", 'q,a\n"x\nx",y\n')
    with pytest.raises(DataError, match=r"f\.csv, line 2: the record has no field 'question'; its fields are 'q', 'a'"):
        load_examples(source, template="{question}", answer_field="a")
    with pytest.raises(DataError, match=r"f\.csv, line 2: the record has no field 'site'"):
        load_examples(source, template="{q}", answer_field="a", group_field="site")


def test_an_empty_answer_is_refused_with_its_place(tmp_path):
    source = write(tmp_path / "f.csv", "q,a\nx,y\nx, \n")
    with pytest.raises(
        DataError, match=r"f\.csv, line 3: the field 'a' must hold an answer, got an empty one; fill it in"
    ):
        load_examples(source, template="{q}", answer_field="a")


@pytest.mark.parametrize(("num_examples", "fraction", "num_held_out"), [(10, 0.2, 2), (2, 0.01, 1), (3, 0.99, 2)])
def test_held_out_and_kept_examples_are_disjoint_complete_and_never_none(num_examples, fraction, num_held_out):
    kept, held_out = split_holdout(num_examples, fraction, seed=5)
    assert len(held_out) == num_held_out
    assert sorted(kept + held_out) == list(range(num_examples))
    assert (kept, held_out) == (sorted(kept), sorted(held_out))
    assert (kept, held_out) == split_holdout(num_examples, fraction, seed=5)


def test_another_seed_holds_out_others():
    assert split_holdout(100, 0.1, seed=0) != split_holdout(100, 0.1, seed=1)


def test_what_cannot_be_held_out_is_refused():
    with pytest.raises(DataError, match=r"at least two examples are needed .* there are 1; give more data"):
        split_holdout(1, 0.5, seed=0)
    for fraction in (0.0, 1.0, float("nan")):
        with pytest.raises(ConfigError, match="held out must be between 0 and 1, got"):
            split_holdout(10, fraction, seed=0)


def test_a_hash_tells_contents_and_order_but_not_the_order_of_fields():
    assert content_hash([{"a": 1, "b": "x"}]) == content_hash([{"b": "x", "a": 1}])
    assert content_hash([Example("p", "a", "g")]) == content_hash([Example("p", "a", "g")])
    different = [
        [],
        [{}],
        [{"a": 1}],
        [{"a": "1"}],
        [{"a": 1}, {"a": 2}],
        [{"a": 2}, {"a": 1}],
        [Example("pa", "")],
        [Example("p", "a")],
        [Example("p", "a", "g")],
    ]
    assert len({content_hash(items) for items in different}) == len(different)
    # sha256 of '{"a": 1}\n', by sha256sum
    assert content_hash([{"a": 1}]) == "e8c628edc9968ef0c668f54e0ba2636b35503357eb1aca0ddc828aeace432f67"


# --- tokens ---


@pytest.fixture(scope="module")
def tokenizers():
    """A byte-level BPE tokenizer without a token for the beginning (as GPT-2's) and one with (as Llama's)."""
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    plain.train_from_iterator(["the question is the answer"] * 3, trainer)
    with_bos = Tokenizer.from_str(plain.to_str())
    with_bos.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return {
        name: PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
        for name, backend in (("plain", plain), ("bos", with_bos))
    }


BOS, EOS = 0, 1


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(("name", "start"), [("plain", []), ("bos", [BOS])])
def test_an_example_is_prompt_then_answer_then_end_of_sequence(tokenizers, name, start):
    tokenizer = tokenizers[name]
    examples = [Example("the question: ", "the answer"), Example("?", "é\n")]
    tokenized, report = tokenize_examples(examples, tokenizer, max_length=64)
    for example, found in zip(examples, tokenized, strict=True):
        assert found.prompt_ids == start + ids(tokenizer, example.prompt)
        assert found.answer_ids == [*ids(tokenizer, example.answer), EOS]
        assert (
            tokenizer.decode(found.prompt_ids[len(start) :] + found.answer_ids[:-1]) == example.prompt + example.answer
        )
    assert (report.num_examples, report.num_prompts_cut, report.num_answers_cut, report.num_dropped) == (2, 0, 0, 0)


@pytest.mark.parametrize("name", ["plain", "bos"])
def test_no_prompt_token_has_a_label_and_some_answer_token_has(tokenizers, name):
    tokenized, _ = tokenize_examples(
        [Example("a question", "yes"), Example("b", "no way")], tokenizers[name], max_length=8
    )
    for side in ("right", "left"):
        batch = collate(tokenized, pad_id=EOS, side=side)
        for row, example in enumerate(tokenized):
            tokens = batch["attention_mask"][row].bool()
            labels = batch["labels"][row]
            assert batch["input_ids"][row][tokens].tolist() == example.prompt_ids + example.answer_ids
            assert (labels[tokens][: len(example.prompt_ids)] == IGNORED_LABEL).all()
            assert labels[tokens][len(example.prompt_ids) :].tolist() == example.answer_ids
            assert (labels[~tokens] == IGNORED_LABEL).all()  # the pad id is the end's id here, and yet not learnt


def test_the_prompt_loses_its_beginning_first_but_keeps_the_beginning_of_sequence(tokenizers):
    # With 1 for <s> and 3 for x, y and </s>, 6 leaves room for 2 of the prompt; bytes: one token a character.
    (found,), report = tokenize_examples([Example("ABCDE", "XY")], tokenizers["bos"], max_length=6)
    assert found == TokenizedExample([BOS, *ids(tokenizers["bos"], "DE")], [*ids(tokenizers["bos"], "XY"), EOS])
    assert (report.num_prompts_cut, report.num_answers_cut, report.num_dropped) == (1, 0, 0)


def test_then_the_answer_loses_its_end_and_half_of_the_room_stays_the_prompts(tokenizers):
    (found,), report = tokenize_examples([Example("ABCDE", "VWXYZ")], tokenizers["bos"], max_length=6)
    assert found == TokenizedExample([BOS, *ids(tokenizers["bos"], "DE")], ids(tokenizers["bos"], "VWX"))
    assert (report.num_prompts_cut, report.num_answers_cut, report.num_dropped) == (1, 1, 0)
    (found,), report = tokenize_examples([Example("A", "XYZ")], tokenizers["plain"], max_length=3)
    assert found == TokenizedExample(ids(tokenizers["plain"], "A"), ids(tokenizers["plain"], "XY"))
    assert (report.num_prompts_cut, report.num_answers_cut, report.num_dropped) == (0, 1, 0)


@pytest.mark.parametrize("name", ["plain", "bos"])
@pytest.mark.parametrize("num_prompt", [0, 1, 4, 8, 40])
@pytest.mark.parametrize("num_answer", [1, 4, 8, 40])
@pytest.mark.parametrize("max_length", [2, 3, 9, 10])
def test_no_answer_however_long_leaves_less_than_half_of_the_room_to_its_prompt(
    tokenizers, name, num_prompt, num_answer, max_length
):
    example = Example("P" * num_prompt, "A" * num_answer)
    (whole,), _ = tokenize_examples([example], tokenizers[name], max_length=200)
    (found,), _ = tokenize_examples([example], tokenizers[name], max_length=max_length)
    assert len(found.prompt_ids) >= min(len(whole.prompt_ids), max_length // 2)
    everything = len(whole.prompt_ids) + len(whole.answer_ids)
    assert len(found.prompt_ids) + len(found.answer_ids) == min(everything, max_length)
    assert found.answer_ids == whole.answer_ids[: len(found.answer_ids)]
    assert found.prompt_ids[:1] == ([BOS] if name == "bos" else whole.prompt_ids[:1])


def test_an_empty_prompt_becomes_the_beginning_of_sequence_or_else_the_end(tokenizers):
    none = PreTrainedTokenizerFast(tokenizer_object=tokenizers["plain"].backend_tokenizer, eos_token="</s>")
    for tokenizer, first in ((tokenizers["plain"], BOS), (tokenizers["bos"], BOS), (none, EOS)):
        (found,), report = tokenize_examples([Example("", "XY")], tokenizer, max_length=8)
        assert found == TokenizedExample([first], [*ids(tokenizer, "XY"), EOS])
        assert tokenize_prompts([""], tokenizer, max_length=8) == [[first]]
        assert report.num_prompts_cut == 0
        # The answer's first token is learnt: it is predicted from that token.
        assert collate([found], pad_id=0)["labels"].tolist() == [[IGNORED_LABEL, *found.answer_ids]]


def test_an_empty_prompt_is_refused_where_no_token_could_stand_for_it(tokenizers):
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizers["plain"].backend_tokenizer)
    with pytest.raises(DataError, match="prompt 2: a prompt must not be empty with a tokenizer that has neither a beg"):
        tokenize_prompts(["a", ""], bare, max_length=8)


def test_a_whole_example_of_just_the_greatest_length_is_left_alone(tokenizers):
    (found,), report = tokenize_examples([Example("AB", "X")], tokenizers["bos"], max_length=5)
    assert found == TokenizedExample([BOS, *ids(tokenizers["bos"], "AB")], [*ids(tokenizers["bos"], "X"), EOS])
    assert (report.num_prompts_cut, report.num_answers_cut) == (0, 0)


def test_examples_without_an_answer_are_dropped_and_counted(tokenizers):
    examples = [Example("a", ""), Example("b", "X"), Example("c", " \n")]
    tokenized, report = tokenize_examples(examples, tokenizers["plain"], max_length=8)
    assert [example.answer_ids for example in tokenized] == [[*ids(tokenizers["plain"], "X"), EOS]]
    assert (report.num_examples, report.num_dropped, report.dropped) == (3, 2, (0, 2))
    assert tokenize_examples([], tokenizers["plain"], max_length=8)[0] == []


def test_many_examples_are_tokenised_as_each_alone(tokenizers):
    examples = [Example(f"number {index}", f"{index * index}") for index in range(1500)]  # more than go together
    tokenized, _ = tokenize_examples(examples, tokenizers["bos"], max_length=16)
    for index in (0, 1023, 1024, 1499):
        assert [tokenized[index]] == tokenize_examples([examples[index]], tokenizers["bos"], max_length=16)[0]


def test_a_tokenizer_without_an_end_is_refused_with_what_to_set(tokenizers):
    endless = PreTrainedTokenizerFast(tokenizer_object=tokenizers["plain"].backend_tokenizer)
    with pytest.raises(ModelError, match="needs an end-of-sequence token, or the model never learns to stop; set `eos"):
        tokenize_examples([Example("a", "b")], endless, max_length=8)


def test_prompts_are_tokenised_as_before_an_answer(tokenizers):
    texts = ["the question: ", "", "ABCDEFG"]
    examples = [Example(text, "X") for text in texts]
    for tokenizer in tokenizers.values():
        tokenized, _ = tokenize_examples(examples, tokenizer, max_length=64)
        assert tokenize_prompts(texts, tokenizer, max_length=62) == [example.prompt_ids for example in tokenized]
    assert tokenize_prompts(["ABCDEFG"], tokenizers["bos"], max_length=3) == [[BOS, *ids(tokenizers["bos"], "FG")]]
    assert tokenize_prompts(["A" * 99], tokenizers["bos"], max_length=None) == [
        [BOS, *ids(tokenizers["bos"], "A" * 99)]
    ]


def test_a_length_that_holds_no_prompt_and_answer_is_refused(tokenizers):
    with pytest.raises(ConfigError, match="greatest length must be at least 2 tokens, got 1"):
        tokenize_examples([Example("a", "b")], tokenizers["plain"], max_length=1)
    with pytest.raises(ConfigError, match="greatest length must be at least 2 tokens, got 0"):
        tokenize_prompts(["a"], tokenizers["plain"], max_length=0)


# --- batches ---


def test_a_batch_by_hand():
    batch = collate([TokenizedExample([5, 6], [7, 1]), TokenizedExample([], [8])], pad_id=0)
    expected = {
        "input_ids": [[5, 6, 7, 1], [8, 0, 0, 0]],
        "attention_mask": [[1, 1, 1, 1], [1, 0, 0, 0]],
        "labels": [[-100, -100, 7, 1], [8, -100, -100, -100]],
    }
    assert {name: tensor.tolist() for name, tensor in batch.items()} == expected
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_prompts_are_padded_on_the_left():
    batch = collate_prompts([[5, 6], [7]], pad_id=0)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6], [0, 7]],
        "attention_mask": [[1, 1], [0, 1]],
    }


def test_another_side_is_refused():
    with pytest.raises(ConfigError, match="side of the padding must be right or left, got 'top'"):
        collate([TokenizedExample([], [8])], pad_id=0, side="top")


def test_each_epoch_has_every_example_once_and_ends_with_a_short_batch():
    drawn = list(batches(5, 2, 7, np.random.default_rng(0)))
    assert [len(batch) for batch in drawn] == [2, 2, 1, 2, 2, 1, 2]
    first, second = sum(drawn[:3], []), sum(drawn[3:6], [])  # noqa: RUF017
    assert sorted(first) == sorted(second) == [0, 1, 2, 3, 4]
    assert first != second


def test_batches_depend_on_the_generator_alone():
    drawn = [list(batches(50, 8, 20, np.random.default_rng(seed))) for seed in (3, 3, 4)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_batch_greater_than_the_data_holds_each_example_once():
    assert [sorted(batch) for batch in batches(3, 8, 2, np.random.default_rng(0))] == [[0, 1, 2], [0, 1, 2]]


def test_no_steps_are_no_batches():
    assert list(batches(3, 2, 0, np.random.default_rng(0))) == []


def test_batches_of_nothing_are_refused_at_once():
    with pytest.raises(DataError, match="at least one example to make batches of; give the device some data"):
        batches(0, 2, 1, np.random.default_rng(0))
    with pytest.raises(ConfigError, match="batch size must be at least 1, got 0"):
        batches(3, 0, 1, np.random.default_rng(0))
