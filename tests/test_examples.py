"""The run configs of real tasks, and what they take for an answer."""

import json
import re
import tomllib
from pathlib import Path

import lookalikes
import pytest
from federation import federate
from typer.testing import CliRunner

from fedpt_flwr.cli import app
from fedpt_flwr.config import parse_run_config, settings
from fedpt_flwr.prompts import Template
from fedpt_flwr.scoring import judge_answers

EXAMPLES = Path(__file__).parents[1] / "examples"
MODELS = ("gpt2", "qwen2.5-dolly", "smollm2-gsm8k")
"""Examples with models and data of the hub; the others are tasks, whose paths `fedpt split` adds."""
TASKS = sorted(path.parent.name for path in EXAMPLES.glob("*/run-config.toml") if path.parent.name not in MODELS)


def keys_of(task):
    return tomllib.loads((EXAMPLES / task / "run-config.toml").read_text(encoding="utf-8"))


def test_there_are_the_four_tasks():
    assert TASKS == ["banking77", "clinc150", "gsm8k", "medquad"]


@pytest.mark.parametrize("task", TASKS)
def test_every_key_is_one_of_the_app_and_parses_as_it_stands(task):
    keys = keys_of(task)
    config = parse_run_config(keys)
    known = settings()
    assert [key for key in keys if known[key].path and key != "data.choices"] == [], "paths are the user's"
    fields = Template(config.data.template).fields
    assert set(fields) < set(Template(config.data.public_template).fields)
    assert config.data.public_template.startswith(config.data.template), "few-shot examples look like the prompts"


@pytest.mark.parametrize("task", TASKS)
def test_the_docs_have_the_command_that_divides_the_data(task):
    assert f"--config examples/{task}/run-config.toml" in (EXAMPLES.parent / "docs" / "tasks.md").read_text(
        encoding="utf-8"
    )


PATTERN = keys_of("gsm8k")["data.answer-pattern"]


@pytest.mark.parametrize(
    ("answer", "reference", "right", "invalid"),
    [
        ("#### 0", "#### 0", 1, 0),  # a check that asks for "truth" of the number fails here
        ("It is -0.", "#### 0", 1, 0),
        ("so x = -5", "#### -5", 1, 0),
        ("so x = 5", "#### -5", 0, 0),
        ("so x = -5", "#### 5", 0, 0),
        ("x is \N{MINUS SIGN}5", "#### -5", 1, 0),
        ("10-5", "#### 5", 1, 0),  # that is a difference, not a negative number
        ("(3)-5", "#### 5", 1, 0),
        ("It costs 1,234 in all", "#### 1234", 1, 0),
        ("1234", "#### 1,234", 1, 0),
        ("1,234,567.80", "#### 1234567.8", 1, 0),
        ("1,23", "#### 23", 1, 0),  # no thousands: two numbers
        ("3.50", "#### 3.5", 1, 0),
        ("3.50", "#### 35", 0, 0),  # a point is no ornament
        ("She has 5.", "#### 5", 1, 0),
        ("$18", "#### 18", 1, 0),
        ("-$18.00", "#### -18", 1, 0),
        ("18 dollars", "#### 18", 1, 0),
        ("16 - 3 = 13, and 13 + 5 = 18\n#### 18", "16+2=<<16+2=18>>18\n#### 18", 1, 0),
        ("#### 18 and then 19", "#### 18", 0, 0),  # the last number counts
        ("25%", "#### 25", 1, 0),
        ("none", "#### 18", 0, 1),
        ("", "#### 18", 0, 1),
        ("I do not know.", "#### 0", 0, 1),
        ("$", "#### 18", 0, 1),
        ("eighteen", "#### 18", 0, 1),
    ],
)
def test_the_last_number_is_the_answer_to_a_sum(answer, reference, right, invalid):
    judged = judge_answers([answer], [reference], answer_pattern=PATTERN)
    assert (judged["exact_match"].item(), judged["invalid_rate"].item()) == (right, invalid)


# --- models of the hub ---


def lookalike_paths(example, folder):
    """The paths that take the place of the hub ids: models and data of the same form, and nothing else."""
    make = {"gpt2": lookalikes.gpt2, "qwen2.5-dolly": lookalikes.qwen, "smollm2-gsm8k": lookalikes.smollm}[example]
    is_sums = example == "smollm2-gsm8k"
    train = lookalikes.write_records(folder / "train.jsonl", lookalikes.gsm8k() if is_sums else lookalikes.dolly())
    paths = {**make(folder), "data.train": train}
    return paths | (
        {"data.test": lookalikes.write_records(folder / "test.jsonl", lookalikes.gsm8k(8))} if is_sums else {}
    )


@pytest.mark.parametrize("example", MODELS)
def test_an_example_with_models_of_the_hub_parses_and_its_readme_has_its_commands(example):
    keys = keys_of(example)
    config = parse_run_config(keys)
    assert re.fullmatch(r"[\w-]+/[\w.-]+", config.model.small)
    assert re.fullmatch(r"[\w-]+/[\w.-]+(:main)?", config.data.train)
    readme = (EXAMPLES / example / "README.md").read_text(encoding="utf-8")
    for command in ("fedpt plan", "fedpt check-config", "flwr run"):
        assert command in readme, command
    assert f"examples/{example}/run-config.toml" in readme


@pytest.mark.parametrize("example", MODELS)
def test_on_look_alikes_everything_fits_together_before_a_run(example, tmp_path):
    flat = keys_of(example) | lookalike_paths(example, tmp_path)
    config = tmp_path / "run-config.toml"
    config.write_text("".join(f"{json.dumps(key)} = {json.dumps(value)}\n" for key, value in flat.items()))
    result = CliRunner().invoke(app, ["check-config", "--run-config", str(config), "--devices", "8"])
    assert result.exit_code == 0, result.output


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")  # transformers' new name
@pytest.mark.parametrize("example", MODELS)
def test_on_look_alikes_an_example_runs_with_nothing_changed_but_paths(example, tmp_path, monkeypatch):
    monkeypatch.setenv("FEDPT_HOME", str(tmp_path / "home"))
    paths = lookalike_paths(example, tmp_path)
    assert all(key in keys_of(example) for key in paths)
    monkeypatch.setattr("federation.QUICK", {})
    run = federate(tmp_path / "runs", 2, keys_of(example) | paths)
    results = json.loads((run / "results.json").read_text())
    config = json.loads((run / "config.json").read_text())["run_config"]
    given = keys_of(example)
    assert {key for key in given if config[key] != given[key]} == set(paths)
    assert set(results["rows"]) >= {"large", "untuned", "tuned", "proxy"}
    assert results["rows"]["tuned"]["loss"] < results["rows"]["untuned"]["loss"]
    shards = json.loads((run / "shards.json").read_text())
    assert len(shards) == 2
    assert json.loads((run / "proxy" / "prompt.json").read_text())["format"] == given["data.format"]
