"""EleutherAI's lm-evaluation-harness on a proxy, by the command of docs/tasks.md."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import generate_answers

from fedpt_flwr.data import TokenizedExample
from fedpt_flwr.losses import answer_losses
from fedpt_flwr.models import load_causal_lm, load_tokenizer
from fedpt_flwr.proxy import ProxyModel

ROOT = Path(__file__).parents[1]
COMMAND = "import fedpt_flwr.proxy; from lm_eval.__main__ import cli_evaluate; cli_evaluate()"

CHOICES = """
task: fedpt_choices
dataset_path: json
dataset_kwargs: {data_files: {test: choices.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: ["fluid = glycol", "light = red", "reset"]
doc_to_target: 0
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_norm}]
metadata: {version: 1.0}
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install -e '.[lm-eval]'"
    ),
]


@pytest.fixture(scope="module")
def proxy():
    """One whose three models all differ."""
    torch.manual_seed(0)
    tuned = load_causal_lm("demo:small")
    for weight in tuned.parameters():
        weight.data.add_(0.02 * torch.randn_like(weight))
    return ProxyModel(load_causal_lm("demo:large"), tuned, load_causal_lm("demo:small"), alpha=0.5)


@pytest.fixture(scope="module")
def samples(proxy, tmp_path_factory):
    """What lm-eval asked and got, by task; it ran in a folder with its data, without a network."""
    folder = tmp_path_factory.mktemp("lm-eval")
    tokenizer = load_tokenizer("demo:small")
    proxy.save_pretrained(folder / "proxy", large_ref="demo:large", untuned_ref="demo:small", tokenizer=tokenizer)
    (folder / "tasks").mkdir()
    shutil.copy(ROOT / "examples" / "lm-eval" / "demo-world.yaml", folder / "tasks")
    (folder / "tasks" / "choices.yaml").write_text(CHOICES)
    (folder / "fedpt_demo_world").mkdir()
    questions = (ROOT / "fedpt_demo_world" / "test.jsonl").read_text().splitlines()[::70]
    (folder / "fedpt_demo_world" / "test.jsonl").write_text("\n".join(questions) + "\n")
    prompts = ["[Skomund]\n", "> quick one: juice?\n[Skomund]\n", "The fluid, please.\n[Gricand]\n"]
    (folder / "choices.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    command = [sys.executable, "-c", COMMAND, "--model", "hf", "--model_args", f"pretrained={folder / 'proxy'}"]
    command += ["--tasks", "fedpt_requests,fedpt_choices", "--include_path", str(folder / "tasks"), "--device", "cpu"]
    command += ["--batch_size", "3", "--output_path", str(folder / "out"), "--log_samples"]
    home = {"HF_HOME": str(folder / "home"), "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **home, "PYTHONPATH": str(ROOT)}
    outcome = subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True, timeout=280)
    assert outcome.returncode == 0, outcome.stderr
    assert "fedpt_requests" in outcome.stdout
    found = {}
    for task in ("fedpt_requests", "fedpt_choices"):
        (path,) = (folder / "out").rglob(f"samples_{task}_*.jsonl")
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        found[task] = sorted(rows, key=lambda row: row["doc_id"])
    return found


def test_the_harness_writes_what_the_proxy_writes(samples, proxy):
    tokenizer = load_tokenizer("demo:small")
    rows = samples["fedpt_requests"]
    prompts = [tokenizer.encode(f"> {row['doc']['request']}\n[{row['doc']['unit']}]\n") for row in rows]
    answers, _ = generate_answers(proxy, prompts, tokenizer=tokenizer, max_new_tokens=32)
    assert [row["resps"][0][0] for row in rows] == [answer.split("\n")[0] for answer in answers]
    assert len(rows) == 5
    assert len(set(answers)) > 1


def test_the_harness_finds_the_likelihoods_that_the_proxy_gives(samples, proxy):
    tokenizer = load_tokenizer("demo:small")
    rows = samples["fedpt_choices"]
    pairs = [
        TokenizedExample(tokenizer.encode(row["doc"]["prompt"]), tokenizer.encode(choice))
        for row in rows
        for choice in ("fluid = glycol", "light = red", "reset")
    ]
    expected = (-answer_losses(proxy, pairs, pad_id=tokenizer.pad_token_id).nats).tolist()
    found = [float(response[0][0]) for row in rows for response in row["resps"]]
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-3)
