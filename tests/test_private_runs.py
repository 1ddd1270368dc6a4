"""Private runs of the real ServerApp and ClientApp: what they leave, and what they do not."""

import json
import logging
import shutil

import federation
import pytest

from fedpt_flwr.accounting import epsilon_after
from fedpt_flwr.config import StrategyConfig, parse_run_config
from fedpt_flwr.errors import ConfigError, RoundError
from fedpt_flwr.inner import make_inner_strategy
from fedpt_flwr.report.run import run_page
from fedpt_flwr.results import privacy_line
from fedpt_flwr.runs import RunFolder
from fedpt_flwr.server import make_private

PLAIN = {"distillation.mode": "off", "scoring.few-shot": 0, "scoring.rows": "tuned", "train.max-steps": 1}
PRIVATE = PLAIN | {"privacy.dp": "client-adaptive", "privacy.clipped-count-stddev": 10.0}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two rounds of three devices that clip to a norm that follows them."""
    return federation.federate(tmp_path_factory.mktemp("runs"), 3, PRIVATE)


def lines(run, name):
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def test_epsilon_is_in_the_metrics_the_results_and_the_ledger(run):
    rows = [row for row in lines(run, "metrics.jsonl") if row["phase"] == "privacy"]
    assert [row["epsilon"] for row in rows] == [epsilon_after(1.0, rounds, delta=1e-5) for rounds in (1, 2)]
    results = json.loads((run / "results.json").read_text())
    ledger = json.loads((run / "privacy.json").read_text())
    assert results["privacy"]["epsilon"] == ledger["epsilon"] == rows[-1]["epsilon"]
    assert results["privacy"]["dp"] == "client-adaptive"
    assert ledger == json.loads((run / "rounds/0002/privacy.json").read_text()) | {
        "clipping_norm": ledger["clipping_norm"]  # written before the round was over, the checkpoint's after it
    }
    assert privacy_line(results["privacy"]) == (
        "Privacy of each device: epsilon 7.077 at delta 1e-05 after 2 noisy means (client-adaptive, noise multiplier "
        "1, 3 of 3 devices a round)"
    )


def test_nothing_in_the_folder_tells_what_a_single_device_holds(run):
    assert [(shard["num_examples"], shard["groups"]) for shard in json.loads((run / "shards.json").read_text())] == [
        (1, {})
    ] * 3
    rows = [row for row in lines(run, "costs.jsonl") if row["device"] != "server"]
    assert len(rows) == 2 * 3
    for row in rows:
        assert set(row) == {"device", "num_examples", "round", "bytes_down", "bytes_up"}
        assert row["num_examples"] == 1
    assert all("train_loss" not in row for row in lines(run, "metrics.jsonl"))
    assert json.loads((run / "rounds/0002/round.json").read_text())["train_loss"] is None


def test_half_a_line_of_a_process_that_was_killed_does_not_keep_a_run_from_going_on(run, tmp_path):
    copy = shutil.copytree(run.parent, tmp_path / "runs", symlinks=True) / run.name
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"round": 3, "pha')
    before = (copy / "results.json").read_bytes()
    federation.federate(copy.parent, 3, PRIVATE | {"resume": run.name})
    assert (copy / "results.json").read_bytes() == before


def test_a_strategy_without_a_plain_mean_never_makes_a_run_without_noise(tmp_path):
    """The run config is refused before; this is what stands behind it."""
    config = parse_run_config(PRIVATE)
    inner = make_inner_strategy(StrategyConfig(name="FedMedian"))
    with RunFolder.create(tmp_path, 1) as folder, pytest.raises(ConfigError, match="plain mean of equal weights alone"):
        make_private(inner, config, folder)


def test_the_report_says_what_was_spent_and_not_who_holds_what(run):
    page = run_page(run)
    sections = {section.id: section for section in page.sections}
    said = sections["privacy"].blocks[0].text
    assert said.startswith("Epsilon 7.08 at delta 1e-05")
    assert "2 noisy means of client-adaptive, noise multiplier 1.0, 3 of 3 devices a round" in said
    assert [row[0] for row in sections["privacy"].blocks[-1].rows] == ["1", "2"]
    (block,) = sections["shards"].blocks
    assert "keep to themselves" in block.text


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"privacy.dp": "server-fixed", "wire.dtype": "int8"},
        {"privacy.dp": "server-fixed", "tuning.mode": "lora", "tuning.lora-aggregation": "frozen-a"},
        {"privacy.dp": "client-fixed", "tuning.mode": "lora", "distillation.mode": "carry", "distillation.steps": 1},
        {"privacy.dp": "server-adaptive", "privacy.clipped-count-stddev": 10.0, "strategy.name": "FedProx"},
        {"privacy.dp": "client-fixed", "fraction-train": 0.5, "distillation.mode": "paper", "distillation.steps": 1},
    ],
)
def test_private_runs_go_with_every_other_part(settings, tmp_path):
    run = federation.federate(tmp_path, 4, PLAIN | settings)
    results = json.loads((run / "results.json").read_text())
    assert results["privacy"]["epsilon"] == epsilon_after(1.0, 2, delta=1e-5)


@pytest.mark.slow
def test_a_device_that_fails_ends_a_private_run_and_says_nothing_of_its_data(tmp_path, caplog):
    """Its memory limit is too small, by how much depends on its examples, and so that is not told."""

    def node_config(device):
        limit = {"memory-limit-mb": 1} if device == 1 else {}
        return {"partition-id": device, "num-partitions": 3, **limit}

    with caplog.at_level(logging.ERROR, logger="flwr"), pytest.raises(RoundError) as raised:
        federation.federate(tmp_path, 3, PLAIN | {"privacy.dp": "server-fixed"}, node_config=node_config)
    text = str(raised.value)
    assert "privacy.dp: round 1 needs 3 usable replies of 3 devices and has 2" in text
    assert "device 1: it declines (DeviceError); the log of its ClientApp says why" in text
    assert not any(char.isdigit() for char in text.splitlines()[1].replace("device 1", ""))
    assert "FEDPT-RUN-FAILED" in caplog.text


@pytest.mark.slow
def test_a_budget_that_is_too_small_ends_the_run_before_any_model_is_loaded(tmp_path, caplog):
    flat = PLAIN | {"privacy.dp": "server-fixed", "privacy.max-epsilon": 1.0, "model.large": "/no/such/model"}
    with pytest.raises(ConfigError, match="one costs epsilon 4.729, got 1.0; set privacy.noise-multiplier="):
        federation.federate(tmp_path, 2, flat)
