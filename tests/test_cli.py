import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from federation import federate
from typer.testing import CliRunner

from fedpt_flwr import cli
from fedpt_flwr.cli.console import ERR, OUT, note, say
from fedpt_flwr.cli.loading import load_proxy
from fedpt_flwr.errors import FedPTError
from fedpt_flwr.models import load_causal_lm, resolve_model

APP = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A FEDPT_HOME with one run of the demo world."""
    home = tmp_path_factory.mktemp("home")
    federate(home / "runs", 2, {"num-server-rounds": 1, "scoring.round-items": 0})
    return home


@pytest.fixture
def fedpt(home, monkeypatch):
    """Run a command; what it wrote. Its errors come as exceptions, as ``main`` gets them."""
    monkeypatch.setenv("FEDPT_HOME", str(home))

    def run(*arguments, given=None):
        result = CliRunner().invoke(cli.app, arguments, input=given, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    return run


COMMANDS = (
    "generate", "score", "serve", "report", "check-config", "compare", "attack", "plan", "demo-world", "split",
    "pretrain", "certs",
)  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, fedpt):
    text = fedpt(command, "--help")
    assert "Usage" in text
    assert len(text.splitlines()) > 10


def test_help_tells_what_an_argument_is(fedpt):
    assert "Or use --example" in " ".join(fedpt("generate", "--help").replace("│", " ").split())


def test_help_lists_every_command(fedpt):
    assert set(typer.main.get_command(cli.app).commands) == set(COMMANDS)
    text = fedpt("--help")
    assert all(command in text for command in COMMANDS)


def test_compare_shows_three_models_and_the_right_answer(fedpt, home):
    first = json.loads((APP / "fedpt_demo_world" / "test.jsonl").read_text().splitlines()[0])
    text = fedpt("generate", "--example", "1", "--compare", "--max-new-tokens", "4")
    for row in ("prompt", "large", "tuned", "proxy", "right answer"):
        assert row in text
    assert first["unit"] in text
    assert first["answer"] in text


def test_a_prompt_may_come_as_text_or_on_standard_input(fedpt):
    typed = fedpt("generate", r"> anything\n[Unit]\n", "--max-new-tokens", "5")
    piped = fedpt("generate", "-", "--max-new-tokens", "5", given="> anything\n[Unit]\n")
    assert typed == piped
    assert typed.strip()


def test_alpha_0_answers_as_the_large_model(fedpt):
    prompt = [r"[Unit]\n", "--max-new-tokens", "8"]
    of_large = fedpt("generate", *prompt, "--model", "large")
    assert fedpt("generate", *prompt, "--alpha", "0") == of_large
    assert fedpt("generate", *prompt, "--alpha", "10") != of_large


@pytest.mark.slow
def test_a_seed_makes_sampling_repeatable(fedpt):
    sampled = ["generate", r"[Unit]\n", "--max-new-tokens", "12", "--temperature", "1.5"]
    assert fedpt(*sampled, "--seed", "1") == fedpt(*sampled, "--seed", "1")
    assert len({fedpt(*sampled, "--seed", str(seed)) for seed in range(4)}) > 1


def test_score_prints_the_table_and_writes_json(fedpt, tmp_path):
    text = fedpt("score", "--items", "3", "--json", str(tmp_path / "scores.json"))
    for row in ("large", "untuned", "tuned", "proxy", "large_few_shot"):
        assert row in text
    results = json.loads((tmp_path / "scores.json").read_text())
    assert results["rows"]["proxy"]["n"] == 3
    assert "The proxy" in text


def test_score_gives_what_the_run_wrote(fedpt, home, tmp_path):
    fedpt("score", "--items", "4", "--json", str(tmp_path / "scores.json"))
    again = json.loads((tmp_path / "scores.json").read_text())["rows"]
    written = json.loads((home / "runs" / "latest" / "results.json").read_text())["rows"]
    for name, row in written.items():
        assert again[name]["exact_match"] == row["exact_match"]
        assert again[name]["loss"] == pytest.approx(row["loss"], rel=1e-5)


@pytest.fixture(scope="module")
def paired(tmp_path_factory):
    """A run whose proxy's untuned model has learnt as well."""
    told = {"distillation.mode": "paired", "distillation.learning-rate": 0.01, "distillation.steps": 8}
    return federate(tmp_path_factory.mktemp("paired"), 2, told)


def test_score_of_a_pair_gives_what_the_run_wrote(fedpt, paired, tmp_path):
    fedpt("score", str(paired), "--items", "4", "--json", str(tmp_path / "scores.json"))
    again = json.loads((tmp_path / "scores.json").read_text())["rows"]
    written = json.loads((paired / "results.json").read_text())["rows"]
    assert again.keys() == written.keys()
    for name, row in written.items():
        assert again[name]["exact_match"] == row["exact_match"], name
        assert again[name]["loss"] == pytest.approx(row["loss"], rel=1e-5), name


def test_untuned_is_the_model_of_round_0_for_a_pair_too(fedpt, paired, home):
    asked = ["generate", r"[Unit]\n", "--max-new-tokens", "12", "--model", "untuned", "--run"]
    assert fedpt(*asked, str(paired)) == fedpt(*asked, "latest")
    twin, _ = load_proxy(paired, None, "cpu", None, None)
    assert not torch.equal(twin.untuned.lm_head.weight, load_causal_lm("demo:small").lm_head.weight)


def test_another_small_model_than_the_runs_is_not_scored_as_its_untuned_one(fedpt, paired, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(paired, copy, symlinks=True)
    recorded = json.loads((copy / "config.json").read_text())
    recorded["run_config"]["model.small"] = "demo:large"
    (copy / "config.json").write_text(json.dumps(recorded))
    with pytest.raises(FedPTError, match="demo:large is not the small model that this run began with"):
        fedpt("score", str(copy), "--items", "1")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["generate"], "give either a prompt or --example"),
        (["generate", "x", "--example", "1"], "give either a prompt or --example"),
        (["generate", "x", "--run", "nope"], "nope is not a run in .*; the newest are"),
        (["generate", "--example", "99999"], "the run has 336 test items, got 99999"),
        (["generate", "x", "--model", "expert"], "must be one of proxy, large, tuned, untuned, got 'expert'"),
        (["generate", "x", "--alpha", "nan"], "finite"),
        (["generate", ""], "must not be empty"),
        (["generate", "x", "--temperature", "nan"], "--temperature: must be a number from 0 to 2, got nan"),
        (["generate", "x", "--temperature", "2.5"], "--temperature: must be a number from 0 to 2, got 2.5"),
        (
            ["generate", "x", "--max-new-tokens", "1000000000"],
            "--max-new-tokens: must leave room for a prompt in the models' context of 512 tokens, got 1000000000",
        ),
        (["score", "--json", "/nowhere/x.json"], "--json: there is no such folder, got '/nowhere'; make it, or"),
        (["score", "--json", "/"], "--json: is a folder, got '/'; name a file in it"),
        (["score", "--plausibility", "2"], "plausibility"),
        (["score", "nope"], "nope is not a run"),
        (["score", "--large", "/nope"], "must be a folder that exists"),
        (["check-config", "--app", "/"], "pyproject.toml: cannot be read"),
        (["check-config", "--app", str(APP), "--devices", "9"], "dirichlet"),
        (["check-config", "--app", str(APP), "--devices", "1"], "min-devices: a run would wait in vain .*, got 2"),
        (["check-config", "--app", str(APP), "-c", "nope"], "must be key=value pairs"),
        (
            ["check-config", "--app", str(APP), "-c", "privacy.dp='server-fixed' privacy.max-epsilon=1.0"],
            "privacy.max-epsilon: the budget must allow at least one round, and one costs epsilon 4.729",
        ),
        (
            ["check-config", "--app", str(APP), "-c", "privacy.dp='server-fixed' privacy.delta=0.3 min-devices=4"],
            "privacy.delta: delta must be below one over the number of devices, of which there are 4",
        ),
        (
            ["check-config", "--app", str(APP), "--devices", "8", "-c", "privacy.dp='server-adaptive'"],
            "privacy.noise-multiplier: with 8 devices a round Flower refuses this",
        ),
        (
            ["check-config", "--app", str(APP), "-c", "privacy.secure-sum=true min-devices=300 data.partitioner='iid'"],
            "privacy.secure-sum: a secure sum has at most 256 devices, because each talks to each, got 300; lower",
        ),
    ],
)
def test_bad_input_is_one_clear_sentence(arguments, match, fedpt):
    with pytest.raises(FedPTError, match=match):
        fedpt(*arguments)


@pytest.mark.parametrize("console", [OUT, ERR])
def test_no_text_of_ours_becomes_a_picture(console):
    with console.capture() as captured:
        (say if console is OUT else note)("demo:train:")
        console.print("demo:train:", markup=False)
    assert captured.get().split() == ["demo:train:"] * 2


def test_check_config_accepts_the_defaults(fedpt):
    assert "The run config is fine" in fedpt("check-config", "--app", str(APP))


def test_check_config_says_what_the_rounds_of_a_private_run_cost(fedpt):
    config = ("check-config", "--app", str(APP), "-c", "privacy.dp='server-fixed' privacy.max-epsilon=8.0")
    said = fedpt(*config)
    assert "8 rounds at noise multiplier 1 cost each device epsilon 16.51 at delta 1e-05" in said
    assert "The budget of epsilon 8 allows 2 rounds in all" in said


def test_check_config_takes_as_many_devices_as_a_run_waits_for(fedpt):
    assert "The run config is fine" in fedpt("check-config", "--app", str(APP), "-c", "min-devices=8")


def test_check_config_says_everything_that_is_wrong_without_a_run(fedpt):
    overrides = "model.large='/nope' strategy.name='Best' data.test='/nope.jsonl' data.public='/gone.jsonl' seed=-1"
    with pytest.raises(FedPTError) as caught:
        fedpt("check-config", "--app", str(APP), "-c", overrides)
    assert len(caught.value.problems) == 5
    text = str(caught.value)
    for part in ("/nope", "must be one of", "/nope.jsonl", "/gone.jsonl", "seed"):
        assert part in text


def test_check_config_looks_at_models_without_their_weights(tmp_path):
    small = tmp_path / "small"
    shutil.copytree(resolve_model("demo:small"), small, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(config | {"vocab_size": 99}))
    file = tmp_path / "run.toml"
    file.write_text(
        f"model.small = '{small}'\nmodel.large-device-map = 'auto'\nmodel.large-max-memory = '{{\"cpu\": \"much\"}}'\n"
        "tuning.mode = 'lora'\ntuning.lora-targets = 'embed_tokens'\ntrain.max-length = 99999\ndata.choices = 'test'\n"
        f"data.validation = '{tmp_path / 'other.jsonl'}'\n"
    )
    (tmp_path / "other.jsonl").write_text('{"request": "?", "unit": "?", "answer": "?"}\n')
    with pytest.raises(FedPTError) as caught:
        CliRunner().invoke(cli.app, ["check-config", "--app", str(APP), "-c", str(file)], catch_exceptions=False)
    said = str(caught.value)
    for part in (
        "model.small: the small model scores 99 ids, fewer than the tokenizer's",
        "tuning.lora-targets: lora targets must be linear modules of the small model, got 'embed_tokens'",
        "train.max-length: must not exceed the",
        "model.large-max-memory: a bound on memory gives a device",
        "data.validation, item 1: its answer must be one of the",
    ):
        assert part in said, said


def test_another_app_is_not_called_fine(fedpt, tmp_path):
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'other'\n")
    with pytest.raises(FedPTError, match="must be the one of this app"):
        fedpt("check-config", "--app", str(tmp_path))


def test_a_run_without_a_model_names_one_that_has_one(fedpt, home):
    failed = home / "runs" / "29990101T000000Z-1"
    failed.mkdir()
    good = (home / "runs" / "latest").resolve().name
    shutil.copy(home / "runs" / good / "config.json", failed)
    with pytest.raises(FedPTError, match=f"ended before its first round .* the newest that has one is {good}"):
        fedpt("score", failed.name)
    failed.joinpath("config.json").unlink()
    failed.rmdir()


def test_a_folder_that_is_no_run_is_said_to_be_none(fedpt, home, tmp_path):
    with pytest.raises(FedPTError, match="config.json: must hold a run's config; name the run's own folder"):
        fedpt("score", str(home / "runs" / "latest" / "proxy"))
    with pytest.raises(FedPTError, match=f"must be the folder of a run, with a config.json, got '{tmp_path}'"):
        fedpt("score", str(tmp_path))


def test_a_prompt_that_is_too_long_loses_its_beginning_and_one_is_told(fedpt):
    text = fedpt("generate", "amber " * 300 + "> need the filter", "--max-new-tokens", "500")
    # The context has 512 tokens, so 12 are left for the prompt.
    result = CliRunner().invoke(cli.app, ["generate", "amber " * 300 + "> need the filter", "--max-new-tokens", "500"])
    assert result.stdout == text
    said = " ".join(result.stderr.split())
    assert re.search(r"The prompt's first \d+ tokens are left out: with 500 of the answer, 12 have room", said)
    assert "left out" not in CliRunner().invoke(cli.app, ["generate", "> need the filter"]).stderr


@pytest.mark.parametrize(
    ("option", "value"),
    [("--seed", str(2**63)), ("--seed", "-1"), ("--alpha", "1e9"), ("--alpha", "-11")],
)
def test_numbers_out_of_range_are_refused_with_status_2(fedpt, option, value):
    result = CliRunner().invoke(cli.app, ["generate", "x", option, value])
    assert result.exit_code == 2
    assert "is not in the range" in " ".join(result.output.replace("│", " ").split())


def test_the_console_script_ends_with_a_sentence_and_status_1(tmp_path):
    command = [sys.executable, "-m", "fedpt_flwr.cli", "score", "nope"]
    result = subprocess.run(
        command, capture_output=True, text=True, env={"FEDPT_HOME": str(tmp_path), "PATH": "/usr/bin"}, check=False
    )
    assert result.returncode == 1
    assert result.stderr.strip() == f"fedpt: nope is not a run in {tmp_path}/runs; the newest are: none"
    assert result.stdout == ""


def test_unknown_options_are_refused_with_status_2():
    result = CliRunner().invoke(cli.app, ["score", "--nope"])
    assert result.exit_code == 2
    assert "No such option" in result.output
