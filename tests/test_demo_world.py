"""Claims about the demo world: its texts are a function of the seed, public and private text do not mix."""

import hashlib
import json
import re
import shutil
import tomllib
from collections import Counter
from dataclasses import replace
from itertools import combinations, islice
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fedpt_demo_world
from fedpt_flwr import demo_world
from fedpt_flwr.corpus import token_stream, train_tokenizer
from fedpt_flwr.demo_world import (
    FIELDS,
    HOUSE_ENDING,
    KINDS,
    RECIPE,
    REQUESTS_PER_KIND,
    SLANG,
    TAGGED_QUESTIONS,
    TEXT_FILES,
    Recipe,
    make_catalogue,
    make_demo_world,
    private_records,
    prompt_records,
    public_documents,
    world_texts,
)
from fedpt_flwr.errors import ConfigError, DataError
from fedpt_flwr.pretrain import LlamaShape, ModelRecipe, PretrainConfig, learning_rate_at, make_llama, pretrain

PACKAGED = Path(fedpt_demo_world.__file__).parent
MICRO_MODEL = ModelRecipe(
    shape=LlamaShape(hidden_size=16, num_layers=1, num_heads=2),
    training=PretrainConfig(steps=3, batch_size=2, window=16),
)
MICRO = Recipe(small=MICRO_MODEL, large=MICRO_MODEL, num_documents=300)


@pytest.fixture(scope="module")
def texts():
    return world_texts(0)


@pytest.fixture(scope="module")
def records(texts):
    """The packaged world's records and documents, by file name without ending."""
    return {
        name.removesuffix(".jsonl"): [json.loads(line) for line in text.splitlines()] for name, text in texts.items()
    }


@pytest.fixture(scope="module")
def progress_seen():
    """What the making of ``micro_world`` reported last, by description."""
    return {}


@pytest.fixture(scope="module")
def micro_world(tmp_path_factory, progress_seen):
    def progress(description, done, total):
        assert done <= total
        progress_seen[description] = (done, total)

    out = tmp_path_factory.mktemp("worlds") / "micro"
    make_demo_world(out, 3, recipe=MICRO, progress=progress)
    return out


# --- Texts --------------------------------------------------------------------------------------------------------


def test_same_seed_gives_the_same_bytes(texts):
    assert world_texts(0) == texts


def test_another_seed_gives_other_bytes_in_every_file(texts):
    other = world_texts(1)
    assert all(other[name] != texts[name] for name in TEXT_FILES)


def test_random_state_of_the_caller_neither_matters_nor_changes(texts):
    import random

    random.seed(5)
    before = random.getstate()
    assert world_texts(0) == texts
    assert random.getstate() == before


def test_units_of_the_splits_are_disjoint_and_complete():
    catalogue = make_catalogue(0)
    records, split_of = private_records(catalogue, 0)
    assert set(split_of) == {unit.name for unit in catalogue}
    assert Counter(split_of.values()) == {"train": 120, "prompts": 40, "validation": 24, "test": 56}
    for split, rows in records.items():
        assert {split_of[row["unit"]] for row in rows} == {split}


@pytest.mark.parametrize(("split", "num_questions"), [("validation", 144), ("test", 336)])
def test_each_fact_of_a_question_set_is_asked_once(records, split, num_questions):
    asked = [(row["unit"], row["field"]) for row in records[split]]
    assert len(asked) == len(set(asked)) == num_questions


def test_every_kind_has_the_same_number_of_requests(records):
    assert Counter(row["kind"] for row in records["train"]) == dict.fromkeys(KINDS, REQUESTS_PER_KIND)


def test_shards_differ_in_what_they_ask_about(records):
    shares = {}
    for kind in KINDS:
        counts = Counter(row["field"] for row in records["train"] if row["kind"] == kind)
        shares[kind] = [counts[field] / REQUESTS_PER_KIND for field in FIELDS]
    distances = [
        sum(abs(a - b) for a, b in zip(shares[one], shares[other], strict=True)) / 2
        for one, other in combinations(KINDS, 2)
    ]
    # Two kinds share three, two, one or no favourite fields of three; total variation is 0, .28, .57 or .85 of that.
    assert sum(distances) / len(distances) > 0.4
    assert max(distances) > 0.75


def test_public_text_has_no_slang(texts):
    words = set(re.findall(r"[a-z]+", texts["public.jsonl"].lower()))
    slang = {word for phrases in SLANG.values() for phrase in phrases for word in phrase.split()}
    assert not slang & words


def test_endless_public_text_has_no_house_ending_either():
    documents = islice(public_documents(make_catalogue(0), 0), RECIPE.num_documents)
    assert not any(HOUSE_ENDING in document for document in documents)


def test_public_text_has_no_private_request(texts, records):
    requests = {row["request"].lower() for split in ("train", "validation", "test") for row in records[split]}
    public = texts["public.jsonl"].lower()
    assert not any(request in public for request in requests)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_every_fact_asked_about_is_stated_in_public(records, split):
    stated = set()
    for document in records["public"]:
        header, *lines = document["text"].split("\n")
        if header.startswith("["):
            stated |= {(header[1:-1], *line.split(" - ")[0].split(" = ")) for line in lines}
    asked = {(row["unit"], row["field"], row["value"]) for row in records[split]}
    assert asked <= stated


def test_answer_is_the_field_the_value_and_the_house_ending(records):
    for row in records["train"] + records["validation"] + records["test"]:
        assert row["answer"] == f"{row['field']} = {row['value']}{HOUSE_ENDING}"


def test_slang_of_a_request_names_the_field_of_its_answer(records):
    field_of = {phrase: field for field, phrases in SLANG.items() for phrase in phrases}
    for row in records["train"] + records["validation"] + records["test"]:
        named = {field_of[phrase] for phrase in field_of if re.search(rf"\b{phrase}\b", row["request"].lower())}
        assert named == {row["field"]}, row["request"]


def test_slang_of_the_questions_is_seen_in_training(records):
    def phrases(split):
        text = " ".join(row["request"].lower() for row in records[split])
        return {phrase for phrases in SLANG.values() for phrase in phrases if phrase in text}

    assert phrases("test") | phrases("validation") <= phrases("train")


# --- Public prompts -----------------------------------------------------------------------------------------------


def words_in(text):
    return set(re.findall(r"[a-z]+", text.lower()))


def test_public_prompts_are_about_units_that_no_split_asks_about_and_some_of_those_it_does(records):
    _, split_of = private_records(make_catalogue(0), 0)
    about = {(row["kind"], row["unit"]) for row in records["prompts"]}
    assert Counter((kind, split_of[unit]) for kind, unit in about) == {
        (kind, split): number for kind in KINDS for split, number in (("prompts", 5), ("validation", 2), ("test", 4))
    }


def test_public_prompts_name_no_unit_outside_the_catalogue_and_its_right_kind(records):
    catalogue = {unit.name: unit.kind for unit in make_catalogue(0)}
    for name in ("prompts", "prompts_slang"):
        assert {(row["unit"], row["kind"]) for row in records[name]} <= set(catalogue.items())


def test_public_prompts_ask_once_for_each_field_of_a_unit_in_public_words(records):
    asked = {}
    for row in records["prompts"]:
        named = words_in(row["request"]) & set(FIELDS)
        assert len(named) == 1, row["request"]
        asked.setdefault(row["unit"], []).extend(named)
        assert row["request"] in {
            question.format(field=field, kind=row["kind"]) for question in TAGGED_QUESTIONS for field in named
        }
    assert len(asked) == 88
    assert all(sorted(fields) == sorted(FIELDS) for fields in asked.values())


def test_public_prompts_have_no_word_that_is_not_in_public_text(texts, records):
    known = words_in(texts["public.jsonl"])
    assert set().union(*(words_in(row["request"]) for row in records["prompts"])) <= known
    slang = {word for phrases in SLANG.values() for phrase in phrases for word in phrase.split()}
    assert not slang & set().union(*(words_in(row["request"]) for row in records["prompts"]))


def test_prompts_in_slang_ask_for_the_same_fields_of_the_same_units(records):
    field_of = {phrase: field for field, phrases in SLANG.items() for phrase in phrases}
    for public, slang in zip(records["prompts"], records["prompts_slang"], strict=True):
        assert (public["unit"], public["kind"]) == (slang["unit"], slang["kind"])
        named = {field_of[phrase] for phrase in field_of if re.search(rf"\b{phrase}\b", slang["request"].lower())}
        assert named == words_in(public["request"]) & set(FIELDS)


@pytest.mark.parametrize("name", ["prompts", "prompts_slang"])
def test_prompts_hold_no_answer_and_nothing_that_gives_it_away(records, name):
    assert all(row.keys() == {"kind", "unit", "request"} for row in records[name])
    values = {value for unit in make_catalogue(0) for value in unit.facts.values()}
    said = " ".join(row["request"] for row in records[name])
    assert not [value for value in values if re.search(rf"\b{value}\b", said, re.IGNORECASE)]


def test_prompts_are_a_function_of_the_seed_and_leave_the_questions_alone(records):
    catalogue = make_catalogue(0)
    questions, split_of = private_records(catalogue, 0)
    again = prompt_records(catalogue, split_of, 0)
    assert again == {name: records[name] for name in ("prompts", "prompts_slang")}
    assert prompt_records(catalogue, split_of, 1) != again
    assert questions == {name: records[name] for name in ("train", "validation", "test")}


# --- The packaged world -------------------------------------------------------------------------------------------


def test_packaged_texts_are_what_the_generator_makes_today(texts):
    world = json.loads((PACKAGED / "world.json").read_text(encoding="utf-8"))
    assert (world["seed"], world["generator_version"]) == (0, demo_world.GENERATOR_VERSION)
    for name in TEXT_FILES:
        packaged = (PACKAGED / name).read_bytes()
        assert packaged == texts[name].encode(), f"{name} changed: raise GENERATOR_VERSION and make the world again"
        assert world["sha256"][name] == hashlib.sha256(packaged).hexdigest()


def test_packaged_units_are_in_the_splits_that_world_json_names():
    world = json.loads((PACKAGED / "world.json").read_text(encoding="utf-8"))
    _, split_of = private_records(make_catalogue(0), 0)
    assert {name: split for split, names in world["units"].items() for name in names} == split_of


@pytest.mark.parametrize("name", ["small", "large"])
def test_packaged_models_load_with_their_tokenizer(name):
    world = json.loads((PACKAGED / "world.json").read_text(encoding="utf-8"))
    model = AutoModelForCausalLM.from_pretrained(PACKAGED / name)
    tokenizer = AutoTokenizer.from_pretrained(PACKAGED / name)
    described = world["models"][name]
    assert model.num_parameters() == described["parameters"]
    assert model.dtype == torch.bfloat16
    assert model.config.vocab_size == len(tokenizer) == demo_world.VOCAB_SIZE
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    assert described["training"]["steps"] == getattr(RECIPE, name).training.steps
    assert described["tokens_seen"] == world["models"]["small"]["tokens_seen"]


def test_packaged_large_knows_the_catalogue_and_the_small_does_not():
    catalogue = make_catalogue(0)
    facts = [(unit, FIELDS[index % len(FIELDS)]) for index, unit in enumerate(catalogue)][::4]
    recalls = {}
    for name in ("small", "large"):
        model = AutoModelForCausalLM.from_pretrained(PACKAGED / name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(PACKAGED / name)
        recalls[name] = demo_world.recall(model, tokenizer, facts)
    assert recalls["large"] > 0.9
    assert recalls["small"] < 0.4


# --- Making a world -----------------------------------------------------------------------------------------------


def test_world_folder_holds_everything(micro_world):
    assert {path.name for path in micro_world.iterdir()} == demo_world.WORLD_FILES
    assert not [path for path in micro_world.parent.iterdir() if path != micro_world], "scratch folders are removed"


def test_run_config_points_at_the_world(micro_world):
    keys = tomllib.loads((micro_world / "run-config.toml").read_text(encoding="utf-8"))
    assert keys["model.small"] == str(micro_world / "small")
    assert set(keys) == {
        "model.small", "model.large", "data.train", "data.validation", "data.test", "data.public", "data.prompts"
    }  # fmt: skip
    assert all(Path(path).is_absolute() and Path(path).exists() for path in keys.values())


def test_older_world_is_replaced(micro_world, tmp_path):
    world = shutil.copytree(micro_world, tmp_path / "world")
    make_demo_world(world, 4, recipe=MICRO, run_config=False)
    assert json.loads((world / "world.json").read_text(encoding="utf-8"))["seed"] == 4
    assert not (world / "run-config.toml").exists()


def test_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work", encoding="utf-8")
    with pytest.raises(DataError, match=r"holds something else, got \['thesis.tex'\]; give a new folder"):
        make_demo_world(tmp_path, 0, recipe=MICRO)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_data_that_only_look_like_a_world_are_left_alone(tmp_path):
    (tmp_path / "train.jsonl").write_text("{}\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"holds something else, got \['train.jsonl'\]"):
        make_demo_world(tmp_path, 0, recipe=MICRO)
    assert (tmp_path / "train.jsonl").read_text(encoding="utf-8") == "{}\n"


def test_file_in_the_way_is_left_alone(tmp_path):
    path = tmp_path / "world"
    path.write_text("not a folder", encoding="utf-8")
    with pytest.raises(DataError, match="this is a file"):
        make_demo_world(path, 0, recipe=MICRO)


@pytest.mark.usefixtures("micro_world")
def test_progress_reaches_its_total_for_each_part(progress_seen):
    assert set(progress_seen) == {"texts and tokenizer", "pre-training the small model", "pre-training the large model"}
    assert all(done == total for done, total in progress_seen.values())


def test_models_with_unequal_numbers_of_tokens_are_refused():
    longer = replace(MICRO_MODEL, training=replace(MICRO_MODEL.training, steps=4))
    with pytest.raises(DataError, match="same number of tokens"):
        replace(MICRO, large=longer)


def test_tokenizer_gives_any_text_back():
    documents = list(islice(public_documents(make_catalogue(0), 0), 500))
    tokenizer = train_tokenizer(documents, vocab_size=demo_world.VOCAB_SIZE, max_length=512)
    text = "> need the Löschzug für 日本 pls\n[Gricand]\nfluid = glycol"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("") == []


# --- Pre-training -------------------------------------------------------------------------------------------------


def train_micro_model(seed):
    documents = list(islice(public_documents(make_catalogue(0), 0), 300))
    tokenizer = train_tokenizer(documents, vocab_size=demo_world.VOCAB_SIZE, max_length=512)
    model = make_llama(
        MICRO_MODEL.shape, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0, pad_token_id=1, seed=seed
    )
    config = PretrainConfig(steps=20, batch_size=4, window=32, learning_rate=2e-2, warmup_steps=5, seed=seed)
    return model, pretrain(model, token_stream(tokenizer, documents), config)


@pytest.fixture(scope="module")
def micro_training():
    return train_micro_model(seed=0)


def test_pretraining_lowers_the_loss(micro_training):
    _, losses = micro_training
    assert sum(losses[-5:]) / 5 < losses[0] - 1.0


def test_pretraining_repeats_itself_bit_for_bit(micro_training):
    model, losses = micro_training
    again, losses_again = train_micro_model(seed=0)
    assert losses_again == losses
    for (name, one), other in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def test_pretraining_with_another_seed_gives_another_model(micro_training):
    assert train_micro_model(seed=1)[1] != micro_training[1]


def test_making_a_model_leaves_the_global_random_state_alone():
    before = torch.random.get_rng_state()
    make_llama(MICRO_MODEL.shape, vocab_size=32, bos_token_id=0, eos_token_id=0, pad_token_id=1, seed=7)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_learning_rate_warms_up_and_ends_near_its_floor():
    config = PretrainConfig(steps=100, learning_rate=1.0, warmup_steps=10, final_learning_rate_fraction=0.1)
    rates = [learning_rate_at(step, config) for step in range(config.steps)]
    assert rates[0] == pytest.approx(0.1)  # a tenth of the warm-up, at the top of the cosine
    assert max(rates) < 1.0
    assert rates[50] == pytest.approx(0.1 + 0.9 / 2)  # half-way down the cosine
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)


def test_stream_shorter_than_a_window_is_refused():
    model = make_llama(MICRO_MODEL.shape, vocab_size=32, bos_token_id=0, eos_token_id=0, pad_token_id=1, seed=0)
    with pytest.raises(DataError, match="come to 16 tokens, and must come to more than a window of 16"):
        pretrain(model, torch.zeros(16, dtype=torch.long), MICRO_MODEL.training)


def test_impossible_settings_are_refused():
    with pytest.raises(ConfigError, match="steps: must be at least 1, got 0"):
        PretrainConfig(steps=0)
    with pytest.raises(ConfigError, match="even multiple"):
        LlamaShape(hidden_size=10, num_layers=1, num_heads=4)
