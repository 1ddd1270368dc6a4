"""Dividing a data set: reproducible, and nothing in two parts."""

import json
import random
import tomllib
from collections import Counter
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from fedpt_flwr import cli
from fedpt_flwr.cli.making import prompt_fields
from fedpt_flwr.config import DataConfig, parse_run_config
from fedpt_flwr.errors import ConfigError, DataError
from fedpt_flwr.split import PARTS, SplitPlan, divide, write_division

SHARES = {"test": 0.2, "validation": 0.1, "public": 0.3}


def records(number=1000, sites=("a", "b", "c", "d")):
    return [
        {"site": sites[index % len(sites)], "question": f"What is {index}?", "answer": f"It is {index}."}
        for index in range(number)
    ]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def plan(tmp_path, rows, **settings):
    train = write(tmp_path / "all.jsonl", rows)
    return SplitPlan(
        **{"train": train, "shares": SHARES, "key_fields": ["question"], "group_field": "site", **settings}
    )


def questions(division, part):
    return {row["question"] for row in division.records[part]}


def test_every_record_is_in_one_part_and_the_parts_have_about_their_shares(tmp_path):
    division = divide(plan(tmp_path, records()))
    counts = {part: len(division.records[part]) for part in PARTS}
    assert sum(counts.values()) == len(set().union(*(questions(division, part) for part in PARTS))) == 1000
    # Four standard deviations of the number of 1000 keys that fall into a share of 0.3 are 4 * 14.5.
    for part, share in {**SHARES, "train": 0.4}.items():
        assert counts[part] == pytest.approx(1000 * share, abs=62)


def test_a_record_goes_where_its_key_says_whatever_else_there_is(tmp_path):
    whole = divide(plan(tmp_path, records()))
    shuffled = records()
    random.Random(1).shuffle(shuffled)
    some = divide(plan(tmp_path, shuffled[:300]))
    for part in PARTS:
        assert questions(some, part) <= questions(whole, part)


def test_what_is_public_stays_so_whatever_is_validated_and_tested(tmp_path):
    one, other = (divide(plan(tmp_path, records(), shares={**SHARES, **changed})) for changed in ({}, {"test": 0.01}))
    assert questions(one, "public") == questions(other, "public")


def test_the_first_items_of_a_part_are_a_fair_sample_of_a_sorted_source(tmp_path):
    by_site = sorted(records(), key=lambda row: row["site"])
    test = write(tmp_path / "test.jsonl", by_site[::5])
    division = divide(plan(tmp_path, by_site, given={"test": test}, shares={}))
    # Of 80 out of 200, a quarter of each of four sites: 20 with a standard deviation of 3.
    assert all(8 <= count <= 32 for count in Counter(row["site"] for row in division.records["test"][:80]).values())
    again = divide(plan(tmp_path, by_site[::-1], given={"test": test}, shares={}))
    assert division.records == again.records


def test_another_seed_is_another_division(tmp_path):
    first, second = (divide(plan(tmp_path, records(), seed=seed)) for seed in (0, 1))
    assert questions(first, "test") != questions(second, "test")


def test_equal_keys_stay_together_whatever_their_case_and_spaces(tmp_path):
    twins = [{**row, "question": f"  what IS\n{row['question'].split()[-1]}", "answer": "x"} for row in records(200)]
    division = divide(plan(tmp_path, records(200) + twins))
    keys = {part: {row["question"].split()[-1] for row in division.records[part]} for part in PARTS}
    assert all(not keys[one] & keys[other] for one in PARTS for other in PARTS if one != other)
    assert sum(map(len, division.records.values())) == 400


def test_a_public_group_is_neither_on_devices_nor_in_the_test(tmp_path):
    test = [{"site": site, "question": f"New {site}?", "answer": "x"} for site in "abc"]
    given = {"test": write(tmp_path / "test.jsonl", test)}
    shares = {"validation": 0.1}
    division = divide(plan(tmp_path, records(), given=given, shares=shares, public_groups=["b"]))
    assert {row["site"] for row in division.records["public"]} == {"b"}
    assert len(division.records["public"]) == 250
    assert all(row["site"] != "b" for part in ("test", "validation", "train") for row in division.records[part])
    assert division.dropped["test"] == 1


def test_a_key_of_the_test_is_in_no_other_part(tmp_path):
    test = write(tmp_path / "test.jsonl", [{"site": "a", "question": " what is 7? ", "answer": "y"}])
    public = write(tmp_path / "public.jsonl", [{"question": "What is 8?"}, {"question": "What is 7?"}])
    division = divide(plan(tmp_path, records(20), given={"test": test, "public": public}, shares={}))
    assert questions(division, "test") == {" what is 7? "}
    assert questions(division, "public") == {"What is 8?"}
    assert not {"What is 7?", "What is 8?"} & questions(division, "train")
    assert division.dropped == {"test": 0, "validation": 0, "public": 1, "train": 2}


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"shares": {"test": 1.0}}, "--test-share: must be at least 0 and below 1"),
        ({"shares": {"public": float("nan")}}, "--public-share: must be at least 0 and below 1, got nan"),
        (
            {"shares": {"test": 0.5, "public": 0.5}},
            r"--test-share and --public-share: the shares leave nothing for the devices, got \[0.5, 0.5\]; their sum",
        ),
        ({"given": {"test": "/t.jsonl"}}, "--test and --test-share: test is given as a file and as a share"),
        ({"key_fields": []}, "--key: at least one field must decide"),
        (
            {"public_groups": ["a"], "group_field": ""},
            "--public-group: public groups need the field .*; name it with --group-field, or",
        ),
    ],
)
def test_plans_that_make_no_sense_are_refused(tmp_path, settings, match):
    with pytest.raises(ConfigError, match=match):
        plan(tmp_path, records(5), **settings)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (
            {"public_groups": ["z"]},
            r"--public-group: there is no such group in 'site', got \['z'\]; there are a, b, c, d",
        ),
        ({"key_fields": ["query"]}, "record 1: the record has no field 'query'"),
        ({"shares": {"test": 1e-9}}, "nothing is left for test"),
    ],
)
def test_what_cannot_be_divided_is_said(tmp_path, settings, match):
    with pytest.raises(DataError, match=match):
        divide(plan(tmp_path, records(8), **settings))


def test_the_folder_holds_the_parts_and_a_config_that_leads_to_them(tmp_path):
    out, chosen = tmp_path / "out", plan(tmp_path, records(100))
    division = divide(chosen)
    described = write_division(out, chosen, division, run_config={"seed": 3, "data.template": "> {question}\n"})
    keys = tomllib.loads((out / "run-config.toml").read_text())
    assert (keys["seed"], keys["data.template"], keys["data.prompts"]) == (3, "> {question}\n", keys["data.public"])
    parse_run_config(keys)
    for part in PARTS:
        rows = [json.loads(line) for line in (out / f"{part}.jsonl").read_text().splitlines()]
        assert rows == division.records[part]
        assert keys[f"data.{part}"] == str(out / f"{part}.jsonl")
        assert described["parts"][part]["groups"] == dict(Counter(row["site"] for row in rows).most_common())
    before = (out / "split.json").read_bytes()
    with pytest.raises(DataError, match="holds something already.*add --overwrite"):
        write_division(out, chosen, division, run_config={})
    write_division(out, chosen, division, run_config={}, overwrite=True)
    assert (out / "split.json").read_bytes() == before


def test_other_folders_are_never_replaced(tmp_path):
    chosen = plan(tmp_path, records(100))
    with pytest.raises(DataError, match="holds something already"):
        write_division(tmp_path, chosen, divide(chosen), run_config={}, overwrite=True)


def test_the_command_takes_key_and_groups_from_the_tasks_config(tmp_path):
    source = write(tmp_path / "all.jsonl", records(200))
    config = tmp_path / "task.toml"
    config.write_text('"data.template" = "Q: {question}\\n"\n"data.group-field" = "site"\n')
    out = tmp_path / "out"
    arguments = ["split", "--config", str(config), "--train", source, "--test-share", "0.2", "--public-group", "c"]
    arguments += ["--pair", str(tmp_path / "pair"), "--out", str(out)]
    result = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert f"--run-config {out / 'run-config.toml'}" in result.output
    described = json.loads((out / "split.json").read_text())
    assert described["key_fields"] == ["question"]
    assert described["parts"]["public"]["groups"] == {"c": 50}
    keys = tomllib.loads((out / "run-config.toml").read_text())
    assert keys["model.large"] == str(tmp_path / "pair" / "large")
    assert "distillation.mode" not in keys


def test_where_nothing_is_public_the_config_distils_nothing_and_the_command_says_so(tmp_path):
    source, out = write(tmp_path / "all.jsonl", records(100)), tmp_path / "out"
    config = tmp_path / "task.toml"
    config.write_text(
        '"data.template" = "Q: {question}\\n"\n"data.group-field" = "site"\n"distillation.mode" = "carry"\n'
    )
    arguments = ["split", "--config", str(config), "--train", source, "--test-share", "0.2", "--out", str(out)]
    result = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert 'Nothing is public to distil on, so the run config has distillation.mode = "off"' in result.output
    parse_run_config(tomllib.loads((out / "run-config.toml").read_text()))


@pytest.mark.parametrize("name", ["nope", "nope.toml", "task.md"])
def test_a_tasks_config_that_is_no_toml_file_is_refused(name, tmp_path):
    (tmp_path / "task.md").write_text("# Task\n")
    arguments = ["split", "--config", str(tmp_path / name), "--train", "/all.jsonl", "--out", str(tmp_path / "out")]
    with pytest.raises(ConfigError, match="^--config: must be a TOML file that is there, got '.*/" + name):
        CliRunner().invoke(cli.app, arguments, catch_exceptions=False)


@pytest.mark.parametrize(
    ("data_format", "fields"),
    [
        ("instruction", (["instruction"], ["input", "context"])),
        ("completion", (["prompt"], [])),
        ("text", (["text"], [])),
        ("chat", ([], [])),
    ],
)
def test_a_shape_says_which_fields_are_the_prompt_unless_that_is_a_conversation(data_format, fields):
    assert prompt_fields(DataConfig(format=data_format)) == fields


def test_records_that_share_an_instruction_have_prompts_of_their_own(tmp_path):
    rows = [{"instruction": "Translate.", "input": f"word {i}", "output": "x"} for i in range(60)]
    rows += [{"instruction": "Translate.", "output": "x"}, {"instruction": "Sing.", "input": None, "output": "x"}]
    given = {
        "test": write(
            tmp_path / "test.jsonl",
            [
                {"instruction": "translate.", "context": " Word 7", "response": "y"},
                {"instruction": "Sing.", "input": " ", "output": "y"},
            ],
        )
    }
    source = write(tmp_path / "all.jsonl", rows)
    (tmp_path / "task.toml").write_text(
        '"data.format" = "instruction"\n"data.partitioner" = "iid"\n"data.group-field" = ""\n'
    )
    arguments = ["split", "--config", str(tmp_path / "task.toml"), "--train", source, "--test", given["test"]]
    result = CliRunner().invoke(cli.app, [*arguments, "--out", str(tmp_path / "out")], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    described = json.loads((tmp_path / "out" / "split.json").read_text())
    # The two prompts of the test are left out, and nothing else.
    assert sum(part["records"] for part in described["parts"].values()) == 62
    assert sum(part["dropped"] for part in described["parts"].values()) == 2
    assert described["parts"]["validation"]["records"] < 20


def test_values_that_json_does_not_have_are_written_as_text(tmp_path):
    days = [datetime(2024, 1, day, tzinfo=UTC) for day in range(1, 21)]
    table = pa.table({"question": [f"q{number}" for number in range(20)], "when": days})
    pq.write_table(table, tmp_path / "all.parquet")
    chosen = SplitPlan(train=str(tmp_path / "all.parquet"), key_fields=["question"], shares={"test": 0.3})
    write_division(tmp_path / "out", chosen, divide(chosen), run_config={})
    rows = [json.loads(line) for line in (tmp_path / "out" / "train.jsonl").read_text().splitlines()]
    assert all(row["when"].startswith("2024-01-") for row in rows)


def test_the_command_asks_for_a_key(tmp_path):
    arguments = ["split", "--train", write(tmp_path / "all.jsonl", records(9)), "--out", str(tmp_path / "out")]
    with pytest.raises(ConfigError, match="say which fields decide where a record goes"):
        CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
