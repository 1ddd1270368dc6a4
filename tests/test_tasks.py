"""From a file to a table: divide, pre-train, run, score again."""

import json
import random
import tomllib
from pathlib import Path

import pytest
from federation import federate
from typer.testing import CliRunner

from fedpt_flwr import cli
from fedpt_flwr.runs import read_json

EXAMPLES = Path(__file__).parents[1] / "examples"
LABELS = ("card_arrival", "card_lost", "top_up_failed", "refund")

pytestmark = pytest.mark.slow


def invoke(*arguments):
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A small data set of the form of banking77, divided, and a tiny pair that read its public part."""
    root = tmp_path_factory.mktemp("task")
    rng = random.Random(0)
    rows = []
    for number in range(400):
        label = rng.choice(LABELS)
        words = " ".join(rng.choices(("please", "help", "my", "now", "why", "today"), k=3))
        rows.append({"text": f"{words} {label.replace('_', ' ')} {number}", "label": label})
    (root / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    invoke("split", "--config", EXAMPLES / "banking77" / "run-config.toml", "--train", root / "all.jsonl",
           "--test-share", 0.1, "--public-share", 0.3, "--pair", root / "pair", "--out", root / "data")  # fmt: skip
    invoke("pretrain", "--text", f"{root}/data/public.jsonl::{{text}}\\n{{label}}", "--small", "8x1x2",
           "--large", "16x2x2", "--vocab-size", 320, "--window", 32, "--tokens", 0.02, "--threads", 1,
           "--device", "cpu", "--out", root / "pair")  # fmt: skip
    return root


@pytest.fixture(scope="module")
def run(prepared):
    keys = tomllib.loads((prepared / "data" / "run-config.toml").read_text())
    # Fewer rounds, steps and items than the example asks for; `auto` has the choices scored for every alpha.
    return federate(
        prepared / "runs",
        3,
        {**keys, **QUICKER},
    )


QUICKER = {
    "num-server-rounds": 2,
    "train.max-steps": 3,
    "scoring.num-items": 20,
    "scoring.round-items": 5,
    "proxy.alpha": "auto",
    "distillation.final-steps": 3,
    "distillation.final-num-prompts": 8,
}


def test_a_run_chooses_among_the_labels_in_every_row(run):
    results = read_json(run / "results.json")
    assert {"large", "untuned", "tuned", "proxy", "large_few_shot", "device"} <= results["rows"].keys()
    for name, row in results["rows"].items():
        assert (row["n"], row["num_invalid"]) == (20, 0), name
        assert 0 <= row["exact_match"] <= 1
    answers = [json.loads(line) for line in (run / "answers.jsonl").read_text().splitlines()]
    assert {said["answer"] for row in answers for said in row["models"].values()} <= set(LABELS)
    assert [point["plausibility"] for point in results["shift"]["curve"]] == [0.0] * len(results["shift"]["curve"])


def test_scoring_again_gives_what_the_run_wrote(run, tmp_path):
    invoke("score", run, "--json", tmp_path / "scores.json")
    again, written = read_json(tmp_path / "scores.json")["rows"], read_json(run / "results.json")["rows"]
    for name, row in written.items():
        assert again[name]["exact_match"] == row["exact_match"], name
        assert again[name]["loss"] == pytest.approx(row["loss"], rel=1e-5), name
