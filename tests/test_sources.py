import dataclasses
import json
from collections import Counter

import pytest

from fedpt_flwr import data as data_module
from fedpt_flwr.config import DataConfig
from fedpt_flwr.errors import ConfigError, DataError
from fedpt_flwr.prompts import Example
from fedpt_flwr.sources import Prompts, device_shard, held_out_items, local_shard, public_prompts, public_texts

SEED = 3


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def record(number, **changes):
    return {
        "q": f"q{number}",
        "a": f"a{number}",
        "user": "abcde"[number % 5],
        "v": number,
        "n": f"n{number}",
        **changes,
    }


@pytest.fixture
def data(tmp_path):
    """Forty examples of five users, and nothing else."""
    return DataConfig(
        train=write(tmp_path / "train.jsonl", [record(number) for number in range(40)]),
        validation="",
        test="",
        public="",
        template="{q}?",
        answer_field="a",
        group_field="user",
        value_field="v",
        name_field="n",
        prompts="",
        cover_field="user",
        partitioner="iid",
        holdout_fraction=0.1,
    )


def prompts(examples):
    return [example.prompt for example in examples]


def shards(data, num_devices, seed=SEED):
    return [device_shard(data, device=device, num_devices=num_devices, seed=seed) for device in range(num_devices)]


EVERYTHING = {f"q{number}?" for number in range(40)}

# --- devices ---


@pytest.mark.parametrize(("partitioner", "num_devices"), [("iid", 7), ("dirichlet", 4), ("natural", 5), ("natural", 2)])
@pytest.mark.parametrize("held_out", [(), ("test",), ("test", "validation")])
def test_every_example_is_on_one_device_or_held_out_and_never_both(data, tmp_path, partitioner, num_devices, held_out):
    own = write(tmp_path / "own.jsonl", [record(number) for number in range(100, 110)])
    sources = {which: "" if which in held_out else own for which in ("test", "validation")}
    data = dataclasses.replace(data, partitioner=partitioner, **sources)
    dealt = [prompt for shard in shards(data, num_devices) for prompt in prompts(shard)]
    kept_back = [prompt for which in held_out for prompt in prompts(held_out_items(data, which, seed=SEED).examples)]
    assert Counter(dealt + kept_back) == Counter(EVERYTHING)
    assert len(kept_back) == 4 * len(held_out)


def test_a_device_gets_the_same_examples_whenever_it_asks(data):
    assert shards(data, 4) == shards(data, 4)
    assert shards(data, 4) != shards(data, 4, seed=SEED + 1)


def test_a_shard_is_not_shared_with_whoever_asks_next(data):
    device_shard(data, device=0, num_devices=4, seed=SEED).clear()
    assert len(device_shard(data, device=0, num_devices=4, seed=SEED)) == 8


def test_examples_are_made_by_the_template_from_the_fields_that_are_named(data):
    by_prompt = {example.prompt: example for shard in shards(data, 2) for example in shard}
    # The order of partition and hold-out decides where an example is, not what it is; iid needs no groups, and has them
    # for the report of the shards.
    assert all(
        example == Example(prompt, prompt.replace("q", "a").rstrip("?"), "abcde"[int(prompt[1:-1]) % 5])
        for prompt, example in by_prompt.items()
    )


def test_natural_shards_are_whole_groups_in_the_order_of_their_names(data):
    dealt = shards(dataclasses.replace(data, partitioner="natural"), 5)
    assert [{example.group for example in shard} for shard in dealt] == [{"a"}, {"b"}, {"c"}, {"d"}, {"e"}]


def test_more_devices_than_groups_are_refused(data):
    with pytest.raises(DataError, match="there are 6 devices and only 5 groups"):
        device_shard(dataclasses.replace(data, partitioner="natural"), device=0, num_devices=6, seed=SEED)


def test_a_group_field_that_records_lack_is_named_with_file_and_line(data):
    lacking = dataclasses.replace(data, partitioner="natural", group_field="house")
    with pytest.raises(DataError, match=r"train\.jsonl.*1.*no field 'house'; its fields are 'q', 'a', 'user'"):
        device_shard(lacking, device=0, num_devices=2, seed=SEED)


def test_records_without_the_group_field_do_where_no_group_is_needed(data):
    assert len(shards(dataclasses.replace(data, group_field="house"), 2)) == 2


def test_a_device_with_data_of_its_own_reads_its_file_or_folder(data, tmp_path):
    folder = tmp_path / "node"
    folder.mkdir()
    own = write(folder / "own.jsonl", [record(1), {"q": "only this", "a": "needed"}])
    data = dataclasses.replace(data, partitioner="node-local", train="")
    expected = [Example("q1?", "a1"), Example("only this?", "needed")]
    assert local_shard(data, own) == local_shard(data, str(folder)) == expected


def test_plain_text_is_learnt_without_a_template(data, tmp_path):
    (tmp_path / "own.txt").write_text("one\ntwo\n")
    plain = dataclasses.replace(data, template="", answer_field="text")
    assert local_shard(plain, str(tmp_path / "own.txt")) == [Example("", "one"), Example("", "two")]


def test_data_of_a_devices_own_that_is_not_there_is_reported_with_its_path(data, tmp_path):
    with pytest.raises(DataError, match=r"none\.jsonl: there is no such file or folder"):
        local_shard(data, str(tmp_path / "none.jsonl"))


# --- the server ---


@pytest.mark.parametrize(("fraction", "each"), [(0.1, 4), (0.25, 10), (0.49, 20), (0.001, 1)])
def test_validation_and_test_each_get_their_share_of_all_the_training_data(data, fraction, each):
    data = dataclasses.replace(data, holdout_fraction=fraction)
    sizes = [len(held_out_items(data, which, seed=SEED).examples) for which in ("validation", "test")]
    # 0.49 of 40 is 20 after rounding; after the test half, validation must leave one example for the devices.
    assert sizes == [min(each, 19 if fraction == 0.49 else each), each]
    assert sum(len(shard) for shard in shards(data, 1)) == 40 - sum(sizes)


def test_the_same_items_are_held_out_for_the_same_seed_and_others_for_another(data):
    first, same, other = (prompts(held_out_items(data, "test", seed=seed).examples) for seed in (3, 3, 4))
    assert first == same != other


def test_test_items_are_the_same_whether_or_not_there_is_a_validation_file(data, tmp_path):
    own = write(tmp_path / "own.jsonl", [record(number) for number in range(100, 110)])
    with_file = dataclasses.replace(data, validation=own)
    assert held_out_items(data, "test", seed=SEED) == held_out_items(with_file, "test", seed=SEED)


def test_a_source_of_its_own_is_taken_as_it_is_with_values_and_fields(data, tmp_path):
    own = write(tmp_path / "own.jsonl", [record(7, v=1.5), record(8)])
    items = held_out_items(dataclasses.replace(data, test=own), "test", seed=SEED)
    assert items.examples == [Example("q7?", "a7"), Example("q8?", "a8")]
    assert (items.values, items.fields) == (["1.5", "8"], ["n7", "n8"])


@pytest.mark.parametrize("own", [True, False])
def test_held_out_items_are_read_once(data, tmp_path, monkeypatch, own):
    if own:
        data = dataclasses.replace(data, test=write(tmp_path / "own.jsonl", [record(7)]))
    read, seen = data_module._read, []
    monkeypatch.setattr(data_module, "_read", lambda source, split: seen.append(source) or read(source, split))
    held_out_items(data, "test", seed=SEED)
    assert seen == [data.test or data.train]


def test_values_and_fields_of_held_out_items_belong_to_their_examples(data):
    items = held_out_items(data, "validation", seed=SEED)
    numbers = [prompt[1:-1] for prompt in prompts(items.examples)]
    assert (items.values, items.fields) == (numbers, [f"n{number}" for number in numbers])


@pytest.mark.parametrize("lacking", [{"v": None}, {"v": ""}])
def test_values_that_not_every_record_has_are_not_measured(data, tmp_path, lacking):
    own = write(tmp_path / "own.jsonl", [record(7), record(8, **lacking)])
    items = held_out_items(dataclasses.replace(data, test=own), "test", seed=SEED)
    assert (items.values, items.fields) == (None, ["n7", "n8"])


def test_a_value_of_zero_is_a_value(data, tmp_path):
    own = write(tmp_path / "own.jsonl", [record(7, v=0)])
    assert held_out_items(dataclasses.replace(data, test=own), "test", seed=SEED).values == ["0"]


@pytest.mark.parametrize("name", ["", "absent"])
def test_columns_without_a_name_or_in_no_record_are_not_measured(data, name):
    items = held_out_items(dataclasses.replace(data, value_field=name, name_field=name), "test", seed=SEED)
    assert (items.values, items.fields) == (None, None)


def test_the_first_items_keep_their_columns_and_zero_means_all(data):
    items = held_out_items(data, "test", seed=SEED)
    assert items.first(0) == items.first(99) == items
    two = items.first(2)
    assert (two.examples, two.values, two.fields) == (items.examples[:2], items.values[:2], items.fields[:2])
    without = dataclasses.replace(items, values=None, fields=None, topics=None).first(2)
    assert (len(without.examples), without.values, without.fields, without.topics) == (2, None, None, None)


def test_some_items_keep_their_columns_in_the_order_asked_for(data):
    items = held_out_items(data, "test", seed=SEED)
    some = items.only([3, 0])
    assert some.examples == [items.examples[3], items.examples[0]]
    for column in ("values", "fields", "topics"):
        whole = getattr(items, column)
        assert getattr(some, column) == [whole[3], whole[0]]


def test_what_an_item_is_about_is_said_by_the_cover_field(data):
    items = held_out_items(data, "test", seed=SEED)
    assert items.topics == ["abcde"[int(prompt[1:-1]) % 5] for prompt in prompts(items.examples)]
    for name in ("", "absent"):
        assert held_out_items(dataclasses.replace(data, cover_field=name), "test", seed=SEED).topics is None


@pytest.mark.parametrize("number", [1, 2])
def test_too_little_data_to_hold_some_out_is_refused_with_what_to_do(data, tmp_path, number):
    few = dataclasses.replace(data, train=write(tmp_path / "few.jsonl", [record(n) for n in range(number)]))
    sentence = (
        rf"few\.jsonl: at least 3 records .* for data\.test and data\.validation, but there are {number}; give more"
    )
    with pytest.raises(DataError, match=sentence):
        held_out_items(few, "validation", seed=SEED)


def test_training_data_that_is_not_there_is_reported_with_its_path(data, tmp_path):
    missing = dataclasses.replace(data, train=str(tmp_path / "none.jsonl"))
    for ask in (lambda: shards(missing, 2), lambda: held_out_items(missing, "test", seed=SEED)):
        with pytest.raises(DataError, match=r"none\.jsonl: there is no such file or folder"):
            ask()


# --- public texts ---


def test_public_texts_are_made_by_their_own_template(data, tmp_path):
    public = write(tmp_path / "public.jsonl", [{"t": "one", "x": 1.0}, {"t": "two", "x": 2}])
    assert public_texts(dataclasses.replace(data, public=public, public_template="{t}: {x}")) == ["one: 1", "two: 2"]
    assert public_texts(data) == []


def test_a_public_record_that_lacks_a_field_is_named(data, tmp_path):
    public = write(tmp_path / "public.jsonl", [{"text": "one"}, {"other": "two"}])
    with pytest.raises(
        DataError, match=r"public\.jsonl, record 2: the record has no field 'text'; its fields are 'other'"
    ):
        public_texts(dataclasses.replace(data, public=public))


@pytest.mark.parametrize("template", ["{text", "{text.upper}", "{}"])
def test_a_public_template_that_is_none_is_refused(data, tmp_path, template):
    public = write(tmp_path / "public.jsonl", [{"text": "one"}])
    with pytest.raises(ConfigError, match=r"^data\.public-template: "):
        public_texts(dataclasses.replace(data, public=public, public_template=template))


# --- public prompts ---


def with_prompts(data, tmp_path, records, **changes):
    return dataclasses.replace(data, prompts=write(tmp_path / "prompts.jsonl", records), **changes)


def test_public_prompts_are_written_as_the_devices_are_and_need_no_answers(data, tmp_path):
    asked = [{"q": "one", "user": "x"}, {"q": "two", "user": "y"}, {"q": "three", "user": "x"}]
    found = public_prompts(with_prompts(data, tmp_path, asked))
    assert found == Prompts(texts=["one?", "two?", "three?"], topics=frozenset({"x", "y"}))


def test_without_public_prompts_there_are_none(data):
    assert public_prompts(data) is None


@pytest.mark.parametrize(
    ("asked", "cover_field"),
    [
        ([{"q": "one", "user": "x"}], ""),
        ([{"q": "one", "user": "x"}], "absent"),
        ([{"q": "one", "user": "x"}, {"q": "two"}], "user"),  # not every record says
        ([{"q": "one", "user": ""}], "user"),
    ],
)
def test_prompts_whose_records_do_not_say_it_are_about_nothing_in_particular(data, tmp_path, asked, cover_field):
    found = public_prompts(with_prompts(data, tmp_path, asked, cover_field=cover_field))
    assert found.texts == [f"{record['q']}?" for record in asked]
    assert found.topics == frozenset()


def test_topics_of_prompts_and_items_are_the_same_texts(data, tmp_path):
    """A number in one file is the number in the other."""
    own = write(tmp_path / "own.jsonl", [record(7, user=3), record(8, user=4)])
    data = with_prompts(data, tmp_path, [{"q": "one", "user": 3}], test=own)
    items, found = held_out_items(data, "test", seed=SEED), public_prompts(data)
    assert [topic in found.topics for topic in items.topics] == [True, False]


def test_a_prompt_that_lacks_a_field_is_named(data, tmp_path):
    with pytest.raises(DataError, match=r"prompts\.jsonl, record 2: the record has no field 'q'; its fields are 'x'"):
        public_prompts(with_prompts(data, tmp_path, [{"q": "one"}, {"x": "two"}]))


def test_public_prompts_that_are_not_there_are_reported_with_their_path(data, tmp_path):
    with pytest.raises(DataError, match=r"none\.jsonl: there is no such file or folder"):
        public_prompts(dataclasses.replace(data, prompts=str(tmp_path / "none.jsonl")))


def test_a_file_without_prompts_is_refused(data, tmp_path):
    with pytest.raises(DataError, match=r"prompts\.jsonl"):
        public_prompts(with_prompts(data, tmp_path, []))


def test_the_packaged_prompts_are_about_units_and_some_of_the_test_questions_are_about_these():
    data = DataConfig()
    found, items = public_prompts(data), held_out_items(data, "test", seed=0)
    covered = [topic in found.topics for topic in items.topics]
    assert (covered.count(True), covered.count(False)) == (
        192,
        144,
    )  # four of seven units of eight kinds, six facts each
    assert all(text.startswith("> ") and text.endswith("]\n") for text in found.texts)
