"""The run configs of real tasks, and what they take for an answer."""

import tomllib
from pathlib import Path

import pytest

from fedpt_flwr.config import parse_run_config, settings
from fedpt_flwr.prompts import Template
from fedpt_flwr.scoring import judge_answers

EXAMPLES = Path(__file__).parents[1] / "examples"
TASKS = sorted(path.parent.name for path in EXAMPLES.glob("*/run-config.toml"))


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
