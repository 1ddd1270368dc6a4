"""`fedpt compare`: the grid of one process, cells, their summary, and going on after a kill."""

import io
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from federation import QUICK, federate, final_arrays
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from rich.console import Console
from typer.testing import CliRunner

import server_app
from fedpt_flwr import cli
from fedpt_flwr.cli import console as console_of_commands
from fedpt_flwr.cli import progress
from fedpt_flwr.compare import (
    FEDPT,
    KINDS,
    LARGE,
    LARGE_LORA,
    Ablation,
    Cell,
    Comparison,
    Plan,
    Progress,
    default_jobs,
    summarise,
)
from fedpt_flwr.compare.footprint import first_task_apart
from fedpt_flwr.compare.kinds import UNTOUCHED
from fedpt_flwr.compare.plan import choose_cell
from fedpt_flwr.compare.summary import summary_text
from fedpt_flwr.config import flat_values, parse_run_config
from fedpt_flwr.errors import ConfigError, FedPTError, RunError
from fedpt_flwr.grid import LocalGrid, run_locally
from fedpt_flwr.models import load_causal_lm, tunable_arrays
from fedpt_flwr.report import find_folder, make_report
from fedpt_flwr.runs import find_run, write_json

APP = Path(__file__).parents[1]
TINY = QUICK | {"scoring.round-items": 0, "scoring.few-shot": 0, "distillation.mode": "off"}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A flat run config with few validation items, since all of them are scored."""
    lines = (APP / "fedpt_demo_world" / "validation.jsonl").read_text().splitlines(keepends=True)
    path = tmp_path_factory.mktemp("data") / "validation.jsonl"
    path.write_text("".join(lines[:6]))
    return flat_values(parse_run_config({})) | TINY | {"data.validation": str(path)}


def make_plan(config, **changes):
    settings = {
        "worlds": {"demo": config},
        "kinds": (UNTOUCHED, FEDPT, LARGE),
        "modes": ("off",),
        "seeds": (0, 1),
        "num_devices": 2,
        "learning_rates": {LARGE: (2e-4, 1e-3), LARGE_LORA: (3e-3,)},
    }
    return Plan(**settings | changes)


@pytest.fixture(scope="module")
def done(config, tmp_path_factory):
    """The folder of a comparison of six cells, and what was told of them; it was interrupted after two cells."""
    folder = tmp_path_factory.mktemp("comparisons") / "one"
    told = []

    def interrupt(progress):
        told.append(progress)
        if len(told) == 2:
            raise KeyboardInterrupt

    begun = Comparison(make_plan(config), folder, app=APP)
    with pytest.raises(KeyboardInterrupt):
        begun.run(jobs=1, keep_runs=True, on_cell=interrupt)
    begun.close()
    assert multiprocessing.active_children() == []
    comparison = Comparison(make_plan(config), folder, app=APP)
    assert comparison.num_found == 2
    comparison.run(jobs=1, keep_runs=True, on_cell=told.append)
    assert comparison.errors() == {}
    comparison.close()
    return folder, told


def result_of(folder, name):
    return json.loads((folder / "cells" / f"{name}.json").read_text())


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


# --- the grid of one process ---


def echo_grid(handle):
    grid = LocalGrid(handle, 2)
    arrays = ArrayRecord({"weight": Array(np.arange(3, dtype=np.float32))})
    content = RecordDict({"arrays": arrays, "config": ConfigRecord({"round": 1})})
    return grid, [Message(content, dst_node_id=node, message_type="train") for node in grid.get_node_ids()]


def test_messages_arrive_as_copies_with_the_same_values_and_ids():
    received = []

    def handle(message, context):
        received.append(message)
        content = RecordDict({"arrays": message.content["arrays"], "config": ConfigRecord(dict(context.node_config))})
        message.content["config"]["round"] = 99  # what a device does to its copy stays there
        return Message(content, reply_to=message)

    grid, messages = echo_grid(handle)
    replies = list(grid.send_and_receive(messages))
    assert [reply.metadata.reply_to_message_id for reply in replies] == [m.metadata.message_id for m in messages]
    assert len({message.metadata.message_id for message in messages}) == 2
    assert [reply.content["config"]["partition-id"] for reply in replies] == [1, 0]  # node ids are in another order
    for message, got, reply in zip(messages, received, replies, strict=True):
        assert got is not message
        assert message.content["config"]["round"] == 1
        np.testing.assert_array_equal(reply.content["arrays"]["weight"].numpy(), np.arange(3))


def test_an_exception_on_a_device_becomes_its_reply():
    def handle(message, context):
        raise ValueError("no disk left")

    grid, messages = echo_grid(handle)
    replies = list(grid.send_and_receive(messages))
    assert ["no disk left" in reply.error.reason for reply in replies] == [True, True]
    assert list(grid.pull_messages([message.metadata.message_id for message in messages])) == []  # answered once


# --- what is compared ---


def test_direct_kinds_put_the_large_model_in_the_small_ones_place_and_change_nothing_else(config):
    plan = make_plan(
        config | {"proxy.alpha": "auto", "stop.metric": "loss", "stop.patience": 1, "scoring.round-items": 2}
    )
    as_given = plan.run_config(Cell(world="demo", kind=FEDPT, seed=1, mode="carry"))
    direct = plan.run_config(Cell(world="demo", kind=LARGE, seed=1, learning_rate=0.5))
    adapter = plan.run_config(Cell(world="demo", kind=LARGE_LORA, seed=1, learning_rate=0.5))
    assert (as_given["seed"], as_given["distillation.mode"], as_given["proxy.alpha"]) == (1, "carry", "auto")
    differing = {key: value for key, value in direct.items() if value != as_given[key]}
    assert differing == {
        "model.small": "demo:large",
        "train.learning-rate": 0.5,
        "proxy.alpha": 1.0,
        "distillation.mode": "off",
        "stop.metric": "",
        "stop.patience": 0,
        "scoring.rows": "tuned",
    }
    assert {key: value for key, value in adapter.items() if value != direct[key]} == {"tuning.mode": "lora"}


def test_an_adapter_may_be_tuned_on_a_model_in_a_shorter_type_but_all_weights_may_not(config):
    plan = make_plan(config | {"model.large-dtype": "bfloat16"})
    cells = [Cell(world="demo", kind=kind, seed=0, learning_rate=0.1) for kind in (LARGE, LARGE_LORA)]
    assert [plan.run_config(cell)["model.small-dtype"] for cell in cells] == ["float32", "bfloat16"]


def validated(exact_match, **loss):
    """A result without any test row: a choice that looks at one would fail."""
    return {"validation_rows": {LARGE: {"exact_match": exact_match, **loss}}}


@pytest.mark.parametrize(
    ("results", "chosen"),
    [
        ([validated(0.2, loss=0.1), validated(0.3, loss=9.0), validated(0.1, loss=0.1)], 1),
        ([validated(0.3, loss=0.5), validated(0.3, loss=0.4), validated(0.2, loss=0.1)], 1),
        (
            [validated(0.0, loss=0.5), validated(0.0), validated(0.0, loss=0.9)],
            0,
        ),  # a loss that is not finite is absent
        ([None, validated(0.0, loss=2.0), None], 1),
        ([None, None, None], None),
    ],
)
def test_the_learning_rate_is_chosen_by_validation_exact_match_then_loss(results, chosen, config):
    plan = make_plan(config, learning_rates={LARGE: (1e-4, 2e-4, 3e-4)})
    candidates = plan.candidates("demo", LARGE)
    settled = {cell.name: result for cell, result in zip(candidates, results, strict=True)}
    assert choose_cell(candidates, settled) == (None if chosen is None else candidates[chosen])


def test_other_seeds_wait_until_every_candidate_has_ended(config):
    plan = make_plan(config, kinds=(LARGE,), seeds=(3, 4, 5))
    first, second = plan.candidates("demo", LARGE)
    assert plan.cells({}) == [first, second]
    assert plan.cells({first.name: validated(0.5)}) == [first, second]
    settled = {first.name: validated(0.5), second.name: validated(0.6)}
    assert [(cell.seed, cell.learning_rate) for cell in plan.cells(settled)] == [
        (3, 2e-4),
        (3, 1e-3),
        (4, 1e-3),
        (5, 1e-3),
    ]
    assert plan.num_cells == 4
    assert plan.cells({first.name: None, second.name: None}) == [first, second]


def test_a_single_learning_rate_needs_no_choice(config):
    plan = make_plan(config, kinds=(LARGE_LORA,), seeds=(0, 1))
    assert [cell.seed for cell in plan.cells({})] == [0, 1]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"kinds": ("fedpt", "direct")}, r"--kinds: must be some of untouched, .*fedpt, .*direct"),
        ({"modes": ()}, "--modes: must name at least one"),
        ({"seeds": (1, 1)}, "--seeds: must not name anything twice"),
        ({"kinds": ("direct",)}, r"^--kinds: must be some of .*, got \['direct'\]$"),  # and nothing about its rates
        ({"kinds": ("direct",), "seeds": ()}, r"^2 options are wrong\n  - --kinds: .*\n  - --seeds: "),
        ({"learning_rates": {}}, "^--large-learning-rates: must name at least one"),
        ({"learning_rates": {LARGE: (0.1, 0.10000000001)}}, "names of worlds and learning rates must differ"),
        ({"learning_rates": {LARGE: (0.1, -1.0)}}, "^--large-learning-rates: must be finite numbers greater than 0"),
        ({"learning_rates": {LARGE: (float("nan"),)}}, "^--large-learning-rates: must be finite numbers greater"),
        ({"seeds": (0, -1), "kinds": (LARGE,)}, "^--seeds: must be from 0"),
        (
            {"ablations": (Ablation.parse("train.max-steps=9"),), "ablation_seeds": (-1,)},
            "^--ablation-seeds: must be from 0",
        ),
        ({"ablations": (Ablation.parse("train.max-steps=9"),) * 2}, "^--ablate: must not name anything twice"),
        ({"num_devices": 1}, r"^min-devices: must not exceed the 1 devices of a federation \(--devices\), got 2; give"),
        ({"set": {"seed": 4}}, "^seed: a comparison sets this key itself, got 4"),
        ({"set": {"output-dir": "/tmp/x"}}, "output-dir: a comparison sets this key itself"),
        ({"set": {"data.partitioner": "node-local"}}, "deals out data.train itself"),
        ({"set": {"trian.epochs": 1}}, "did you mean train.epochs"),
    ],
)
def test_a_plan_that_cannot_be_run_says_why_before_anything_runs(changes, match, config):
    changes = {"worlds": {"demo": config | changes.pop("set", {})}} | changes
    with pytest.raises(ConfigError, match=match):
        make_plan(config, **changes)


def test_of_several_worlds_the_wrong_one_is_named(config):
    with pytest.raises(ConfigError, match="^world b, train.batch-size: must be at least 1, got 0"):
        make_plan(config, worlds={"a": config, "b": config | {"train.batch-size": 0}})


def test_workers_leave_each_other_room_for_their_threads(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    assert default_jobs([{}]) == 8
    assert default_jobs([{}, {"threads.device": 3}]) == 2
    assert default_jobs([{"threads.server": 99}]) == 1


# --- cells ---


@pytest.mark.slow
def test_every_cell_leaves_one_file_and_is_told_of_once(done):
    folder, told = done
    names = [
        "demo-fedpt-off-seed0",
        "demo-fedpt-off-seed1",
        "demo-large_federated-lr0.0002-seed0",
        "demo-large_federated-lr0.001-seed0",
    ]
    assert sorted(path.stem for path in (folder / "cells").iterdir())[:4] == names
    assert [(part.done, part.total, part.error) for part in told] == [(n, 6, "") for n in range(1, 7)]
    assert {part.name for part in told} == {path.stem for path in (folder / "cells").iterdir()}
    assert {path.stem for path in (folder / "logs").iterdir()} == {part.name for part in told}
    assert "Run folder" in (folder / "logs" / "demo-fedpt-off-seed0.log").read_text()
    assert not (folder / "work").exists()


@pytest.mark.slow
def test_a_cell_says_what_it_is_and_what_came_of_it(done, config):
    folder, _ = done
    cell = result_of(folder, "demo-fedpt-off-seed1")
    assert (cell["kind"], cell["world"], cell["seed"], cell["mode"], cell["learning_rate"]) == (
        FEDPT, "demo", 1, "off", None
    )  # fmt: skip
    assert list(cell["rows"]) == ["tuned", "proxy"]
    assert cell["rows"]["proxy"]["n"] == 4
    assert {name: row["n"] for name, row in cell["validation_rows"].items()} == {"tuned": 6, "proxy": 6}
    assert {"proxy_minus_tuned", "alpha", "plausibility", "costs", "seconds", "code_hash"} <= cell.keys()
    expected = {key: value for key, value in config.items() if key not in ("output-dir", "resume")} | {"seed": 1}
    assert cell["run_config"] == expected | {"scoring.rows": "tuned,proxy"}


@pytest.mark.slow
def test_a_cell_equals_the_same_federation_without_workers(done, config, tmp_path):
    """Not the first one of its worker: what ran there before must not matter."""
    folder, told = done
    assert told[-2].name == "demo-fedpt-off-seed1"
    alone = federate(tmp_path, 2, config | {"seed": 1, "output-dir": str(tmp_path), "scoring.rows": "tuned,proxy"})
    kept = folder / "runs" / "demo-fedpt-off-seed1"
    assert_same(final_arrays(alone), final_arrays(kept))
    assert result_of(folder, kept.name)["rows"] == json.loads((alone / "results.json").read_text())["rows"]


@pytest.mark.slow
def test_large_federated_tunes_and_scores_the_large_model_itself(done):
    folder, _ = done
    name = "demo-large_federated-lr0.001-seed0"
    large = load_causal_lm("demo:large").requires_grad_(True)
    before = {name: weight.numpy() for name, weight in tunable_arrays(large).items()}
    after = final_arrays(folder / "runs" / name)
    assert {name: weight.shape for name, weight in after.items()} == {n: w.shape for n, w in before.items()}
    assert all(not np.array_equal(after[name], before[name]) for name in before)
    cell = result_of(folder, name)
    assert list(cell["rows"]) == list(cell["validation_rows"]) == [LARGE]
    untouched = result_of(folder, "demo-untouched-seed0")
    assert cell["rows"][LARGE]["loss"] < untouched["rows"]["large"]["loss"] - 1
    assert cell["validation_rows"][LARGE]["loss"] < untouched["validation_rows"]["large"]["loss"] - 1
    bytes_of_large = sum(4 * weight.size for weight in before.values())
    assert cell["costs"]["bytes_up_per_device_and_round"] == pytest.approx(bytes_of_large, rel=0.02)
    assert "alpha" not in cell  # there is no proxy


@pytest.mark.slow
def test_the_learning_rate_that_validates_best_is_used_with_the_other_seed(done):
    folder, _ = done
    tried = {rate: result_of(folder, f"demo-large_federated-lr{rate:g}-seed0") for rate in (2e-4, 1e-3)}
    merit = {
        rate: (cell["validation_rows"][LARGE]["exact_match"], -cell["validation_rows"][LARGE]["loss"])
        for rate, cell in tried.items()
    }
    best = max(merit, key=merit.get)
    others = [path.stem for path in (folder / "cells").glob("*large_federated*seed1.json")]
    assert others == [f"demo-large_federated-lr{best:g}-seed1"]


# --- going on ---


def copy_of(done, tmp_path):
    return shutil.copytree(done[0], tmp_path / "copy", ignore=shutil.ignore_patterns("runs"))


@pytest.mark.slow
def test_a_finished_comparison_runs_nothing_again(done, config, tmp_path, monkeypatch):
    folder = copy_of(done, tmp_path)
    monkeypatch.setattr("fedpt_flwr.compare.workers.Worker", None)
    again = Comparison(make_plan(config), folder, app=APP)
    assert (again.num_found, again.num_outdated) == (6, 0)
    again.run(jobs=2)
    assert again.errors() == {}


@pytest.mark.slow
def test_only_what_is_missing_or_of_another_config_or_code_is_run_again(done, config, tmp_path):
    folder = copy_of(done, tmp_path)
    (folder / "cells" / "demo-fedpt-off-seed0.json").unlink()
    other_code, other_config = (folder / "cells" / f"{name}.json" for name in (
        "demo-fedpt-off-seed1", "demo-large_federated-lr0.0002-seed0"
    ))  # fmt: skip
    other_code.write_text(json.dumps(json.loads(other_code.read_text()) | {"code_hash": "0" * 16}))
    cell = json.loads(other_config.read_text())
    cell["run_config"]["train.max-steps"] += 1
    other_config.write_text(json.dumps(cell))
    again = Comparison(make_plan(config), folder, app=APP)
    # A candidate is missing, so the learning rate is open again, and with it the other seed.
    assert set(again.settled) == {"demo-large_federated-lr0.001-seed0", "demo-untouched-seed0"}
    assert again.num_outdated == 2


def test_cells_of_other_data_behind_the_same_path_are_run_again(config, tmp_path):
    def comparison():
        made = Comparison(plan, tmp_path / "one", app=APP)
        made.close()
        return made

    data = tmp_path / "validation.jsonl"
    data.write_bytes(Path(config["data.validation"]).read_bytes())
    plan = make_plan(config | {"data.validation": str(data)}, kinds=(FEDPT,))
    begun = comparison()
    for cell in plan.cells({}):
        task = begun._task(cell, apart=False)
        kept = {
            "rows": {"proxy": {}},
            "validation_rows": {},
            "costs": {},
            "seconds": 1.0,
            "code_hash": begun._code_hash,
        }
        kept |= {"run_config": dict(task.run_config), "inputs": dict(task.inputs)}
        write_json(tmp_path / "one" / "cells" / f"{cell.name}.json", kept)
    again = comparison()
    assert (again.num_found, again.num_outdated) == (2, 0)
    data.write_text(data.read_text().replace("a", "e", 1))
    again = comparison()
    assert (again.num_found, again.num_outdated) == (0, 2)


@pytest.mark.slow
def test_another_grid_is_refused_with_the_keys_that_differ(done, config):
    folder, _ = done
    worlds = {"demo": config | {"train.max-steps": 3}}
    with pytest.raises(ConfigError, match="holds another comparison; 2 of its settings differ") as caught:
        Comparison(make_plan(config, seeds=(0, 1, 2), worlds=worlds), folder, app=APP)
    assert "seeds (was [0, 1], is [0, 1, 2])" in str(caught.value)
    assert "worlds.demo.train.max-steps (was 2, is 3)" in str(caught.value)


def test_a_folder_of_something_else_is_left_alone(config, tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(RunError, match="must be a new folder or that of a comparison"):
        Comparison(make_plan(config), tmp_path, app=APP)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.slow
def test_a_comparison_has_one_writer_at_a_time(done, config, tmp_path):
    folder = copy_of(done, tmp_path)
    first = Comparison(make_plan(config), folder, app=APP)
    with pytest.raises(RunError, match="another process works on this comparison"):
        Comparison(make_plan(config), folder, app=APP)
    first.close()
    Comparison(make_plan(config), folder, app=APP).close()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_kind_gives_its_rows_and_what_the_summary_needs(config, tmp_path):
    """All kinds with one seed, and one ablation."""
    settings = config | {"scoring.few-shot": 2, "scoring.round-items": 2, "proxy.alpha": "auto"}
    rates = {kind: part.rates[:1] for kind, part in KINDS.items() if part.needs_rate}
    plan = make_plan(
        settings,
        kinds=tuple(KINDS),
        modes=("final", "carry"),
        learning_rates=rates,
        seeds=(1,),
        ablations=(Ablation.parse("devices=3"),),
    )
    folder = tmp_path / "one"
    comparison = Comparison(plan, folder, app=APP)
    comparison.run(jobs=1)
    summary = comparison.summary(title="t", command="c")
    comparison.close()
    assert summary["errors"] == {}
    assert summary["cells"] == {"done": plan.num_cells, "all": plan.num_cells}
    rows = {row["row"] for row in summary["rows"]}
    assert rows == {row for kind in KINDS.values() for row in kind.rows.values() if not row.endswith("covered")}
    assert {(row["mode"], row["against"]) for row in summary["differences"]} == {
        (mode, rival) for mode in ("final", "carry") for rival in ("tuned", LARGE, LARGE_LORA)
    }
    costs = {(row["kind"], row["mode"]): row for row in summary["costs"]}
    assert costs[FEDPT, "final"]["device_state_bytes"] < 0.06 * costs[LARGE, None]["device_state_bytes"]
    assert "bytes_up_per_device_and_round" not in costs["large_central", None]
    assert {row["row"] for row in summary["calibration"]} >= {"large", "untuned", "tuned", "proxy", LARGE}
    local = result_of(folder, "demo-tuned_local-seed1")
    each = local["by_device"]["tuned_local"]
    assert len(each) == 2
    assert local["rows"]["tuned_local"]["exact_match"] == pytest.approx(sum(each) / 2)
    assert [part["is_base"] for part in summary["ablations"]] == [False]
    untouched = result_of(folder, "demo-untouched-seed1")
    (point,) = untouched["curve"]
    assert set(point["rows"]) == {"large", "untuned"}  # where the gap of a course begins
    assert not {row["row"] for row in summary["curves"]} & {"large", "untuned", "untuned_few_shot"}
    for target in summary["cost_to_target"]:
        assert ("why" in target) == (
            result_of(folder, "demo-large_federated-lr0.0002-seed1")["curve"][-1]["rows"][LARGE]["exact_match"]
            <= point["rows"]["large"]["exact_match"]
        )
    assert {row["row"] for row in summary["cost_to_target"]} >= {"tuned", "proxy", LARGE}
    assert set(summary["counted"]) == {path.stem for path in (folder / "cells").iterdir()}
    json.dumps(summary, allow_nan=False)
    (folder / "summary.json").write_text(json.dumps(summary))
    assert "large_federated_lora" in reported(folder)


@pytest.mark.slow
def test_a_training_task_in_a_process_of_its_own_gives_the_same_update_and_its_memory(config, tmp_path):
    """The reply is the one that this process would have given, bit for bit."""
    import client_app

    flat = config | {"num-server-rounds": 1, "min-devices": 1, "scoring.rows": "tuned"}
    runs = {}
    for name, handle in (("here", client_app.app), ("apart", first_task_apart(client_app.app, APP))):
        root = tmp_path / name
        torch.set_num_threads(1)
        run_locally(server_app.app, handle, flat | {"output-dir": str(root)}, num_devices=2, only_device=1)
        runs[name] = find_run(root=root)
    assert_same(final_arrays(runs["here"]), final_arrays(runs["apart"]))
    lines = [json.loads(line) for line in (runs["apart"] / "costs.jsonl").read_text().splitlines()]
    (device,) = [line for line in lines if line["device"] != "server"]
    assert device["device"] == 1
    if sys.platform == "linux":
        assert 0 < device["memory_growth_bytes"] < device["peak_memory_bytes"]


@pytest.mark.slow
def test_a_cell_that_fails_is_recorded_and_the_others_go_on(config, tmp_path):
    worlds = {"bad": config | {"data.train": "/no/such.jsonl"}, "good": config}
    plan = make_plan(config, worlds=worlds, kinds=(FEDPT,), seeds=(0,))
    folder = tmp_path / "one"
    told = []
    comparison = Comparison(plan, folder, app=APP)
    comparison.run(jobs=1, on_cell=told.append)
    assert [(part.name, bool(part.error)) for part in told] == [
        ("bad-fedpt-off-seed0", True),
        ("good-fedpt-off-seed0", False),
    ]
    assert [path.stem for path in (folder / "cells").iterdir()] == ["good-fedpt-off-seed0"]
    error = json.loads((folder / "errors" / "bad-fedpt-off-seed0.json").read_text())
    assert "/no/such.jsonl" in error["error"]
    assert "FEDPT-RUN-FAILED" in Path(error["log"]).read_text()
    summary = comparison.summary(title="t", command="c")
    assert {row["world"] for row in summary["rows"]} == {"good"}
    assert list(summary["errors"]) == ["bad-fedpt-off-seed0"]
    comparison.close()


@pytest.mark.slow
def test_a_worker_that_dies_costs_its_cell_alone(config, tmp_path):
    app = tmp_path / "app"
    app.mkdir()
    (app / "client_app.py").write_text("import os\nos.kill(os.getpid(), 9)\n")
    (app / "server_app.py").write_text("")
    comparison = Comparison(make_plan(config, kinds=(FEDPT,), seeds=(0, 1)), tmp_path / "one", app=app)
    comparison.run(jobs=1)
    errors = comparison.errors()
    assert list(errors) == ["demo-fedpt-off-seed0", "demo-fedpt-off-seed1"]
    assert all("ended by SIGKILL; is there enough memory" in error for error in errors.values())
    comparison.close()


def test_what_cannot_run_is_said_of_its_world_and_once(tmp_path):
    """A kind that does not need what is missing may run without it."""
    worlds = []
    for label, said in (("a", "demo:prompts"), ("b", "demo:nope")):
        (tmp_path / label).mkdir()
        (tmp_path / label / "run-config.toml").write_text(f'"data.prompts" = "{said}"\n')
        worlds += ["--world", str(tmp_path / label / "run-config.toml")]
    arguments = ["compare", "--app", str(APP), "--out", str(tmp_path / "out"), *worlds]
    with pytest.raises(FedPTError, match=r"^world b, demo:nope: the demo world has no data set 'nope'[^\n]*$"):
        CliRunner().invoke(cli.app, [*arguments, "--kinds", "fedpt,tuned_kd"], catch_exceptions=False)
    (tmp_path / "out").touch()
    with pytest.raises(RunError, match="must be a new folder or that of a comparison"):  # which is looked at later
        CliRunner().invoke(cli.app, [*arguments, "--kinds", "large_federated"], catch_exceptions=False)


def test_a_folder_of_which_nothing_is_known_is_refused_with_what_to_do(config, tmp_path):
    (tmp_path / "grid.json").write_text("{")
    with pytest.raises(
        RunError, match=r"grid.json: cannot be read \(.*\); give another --out: what this comparison was"
    ):
        Comparison(make_plan(config), tmp_path, app=APP)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_names_what_runs_and_says_a_failure_at_once(is_terminal, monkeypatch):
    console = Console(file=io.StringIO(), force_terminal=is_terminal, width=120)
    monkeypatch.setattr(progress, "ERR", console)
    monkeypatch.setattr(console_of_commands, "ERR", console)
    with progress.cell_progress(0, 2) as (begin, end):
        begin("demo-fedpt-seed0")
        end(Progress(name="demo-fedpt-seed0", error="no disk\nat all", done=1, total=2, seconds=3.0))
        begin("demo-fedpt-seed1")
        shown = console.file.getvalue()
        end(Progress(name="demo-fedpt-seed1", error="", done=2, total=2, seconds=4.0))
    assert "[1/2] demo-fedpt-seed0: failed: no disk\n" in shown
    lines = [line for line in console.file.getvalue().splitlines() if "seed1" in line]
    if is_terminal:
        assert "demo-fedpt-seed1" in lines[-1]
        assert "4 s" not in "".join(lines)
    else:
        assert lines == ["demo-fedpt-seed1 begins", "[2/2] demo-fedpt-seed1: 4 s"]


def test_an_interrupted_command_says_how_to_go_on(config, tmp_path, monkeypatch):
    def interrupted(comparison, **_):
        comparison.close()
        raise KeyboardInterrupt

    monkeypatch.setattr(Comparison, "run", interrupted)
    out = tmp_path / "out"
    arguments = ["compare", "--app", str(APP), "--out", str(out), "--kinds", "fedpt,large_federated"]
    arguments += ["--modes", "final", "--learning-rates", "fedpt=0.003", "--large-learning-rates", "2e-4,4e-4"]
    result = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert result.exit_code == 130
    assert f"the same command with --out {out} goes on" in result.stderr.replace("\n", " ")
    assert "7 cells of 7 are missing: the comparison is not complete." in reported(out)
    (out / "summary.json").unlink()  # as an older version leaves it
    with pytest.raises(RunError, match=rf"{out}: this comparison has no summary.json yet; .* --out {out}` goes on"):
        make_report(find_folder(str(out)))
    damaged = out / "cells" / "demo-fedpt-final-lr0.003-seed0.json"
    damaged.parent.mkdir()
    damaged.write_text("[]")
    result = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert result.stderr.count(f"{damaged} is damaged, so the cell is run again\n") == 1
    assert "other code" not in result.stderr


def reported(folder):
    """The report of a comparison."""
    return make_report(find_folder(str(folder))).read_text()


@pytest.mark.slow
@pytest.mark.parametrize("spoil", ["[]", "{}", "x", '{"rows": [], "validation_rows": {}, "costs": {}}'])
def test_a_damaged_cell_is_run_again_and_said_to_be(spoil, done, config, tmp_path):
    folder = copy_of(done, tmp_path)
    cell = folder / "cells" / "demo-fedpt-off-seed1.json"
    cell.write_text(spoil)
    (folder / ".summary.json.ab12_xyz").write_text("{")  # killed while it was written
    comparison = Comparison(make_plan(config), folder, app=APP)
    assert (comparison.num_found, comparison.num_outdated, comparison.damaged) == (5, 0, [cell])
    assert not list(folder.glob(".summary*"))
    comparison.close()


@pytest.mark.slow
def test_a_comparison_that_is_not_complete_has_a_summary_and_a_report(done, config, tmp_path):
    folder = copy_of(done, tmp_path)
    for cell in (folder / "cells").glob("demo-large_federated-*"):
        cell.unlink()
    comparison = Comparison(make_plan(config), folder, app=APP)
    summary = comparison.summary(title="t", command="c")
    comparison.close()
    assert (summary["cells"], summary["errors"]) == ({"done": 3, "all": 6}, {})
    assert {row["row"] for row in summary["rows"]} >= {"large", "proxy"}
    (folder / "summary.json").write_text(json.dumps(summary))
    assert "3 cells of 6 are missing" in reported(folder)


# --- the command ---


PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}


class Command:
    """`fedpt compare` in a process of its own."""

    def __init__(self, folder, config, *options):
        keys = (*TINY, "train.learning-rate")  # not the one that was chosen for the demo world
        lines = [f'"{key}" = {json.dumps(config[key])}' for key in keys]
        (folder / "config.toml").write_text("\n".join(lines))
        self.out = folder / "out"
        self.words = [
            sys.executable, "-m", "fedpt_flwr.cli", "compare", "--app", str(APP), "--out", str(self.out),
            "-c", str(folder / "config.toml"), "--devices", "2", *options,
        ]  # fmt: skip

    def start(self, *options):
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen([*self.words, *options], env=environment, text=True, **PIPES)

    def start_and_wait_for(self, num_cells):
        """The process as soon as there are so many cells, and the ids of its workers."""
        process = self.start()
        while len(list(self.out.glob("cells/*.json"))) < num_cells:
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        return process, [int(child) for child in children]


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")
def test_a_killed_comparison_leaves_whole_cells_and_no_workers_and_goes_on(config, tmp_path):
    command = Command(tmp_path, config, "--kinds", "fedpt", "--seeds", "0,1,2", "--jobs", "2")
    process, workers = command.start_and_wait_for(1)
    process.kill()
    process.communicate()
    assert len(workers) >= 2
    deadline = time.monotonic() + 30
    while any(map(is_running, workers)):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.02)
    whole = {path: (json.loads(path.read_text()), path.stat().st_mtime_ns) for path in command.out.glob("cells/*")}
    assert 1 <= len(whole) < 3
    assert "missing: the comparison is not complete" in reported(command.out)
    (command.out / "report.html").unlink()
    for plot in command.out.glob("plot-*.png"):
        plot.unlink()
    shutil.rmtree(command.out / "tables")

    process = command.start("--jobs", "1")  # how many there are at once is no part of what is compared
    shown, said = process.communicate(timeout=200)
    assert process.returncode == 0, said
    assert f"3 federations, {len(whole)} of them done before" in said
    assert f"[{len(whole) + 1}/3] demo-fedpt-off-seed" in said
    assert all(path.stat().st_mtime_ns == written for path, (_, written) in whole.items())
    assert {path.name for path in command.out.iterdir()} == {".lock", "cells", "grid.json", "logs", "summary.json"}
    summary = json.loads((command.out / "summary.json").read_text())
    assert [row["n_seeds"] for row in summary["rows"]] == [3, 3]
    assert summary["command"].startswith("fedpt compare --app ")
    assert "proxy" in shown


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--app", "/"], "pyproject.toml: cannot be read .*--app"),
        (["--kinds", "direct"], "--kinds: must be some of untouched"),
        (["--kinds", ""], "--kinds: must name at least one"),
        (["--modes", ""], "--modes: must name at least one"),
        (["--ablate-kinds", "fedpt"], "--ablate-kinds: says nothing without --ablate, got 'fedpt'; say what"),
        (["--ablate", "devices=2", "--ablation-seeds", ""], "--ablation-seeds: must name at least one"),
        (["--ablation-seeds", "7"], "--ablation-seeds: says nothing without --ablate"),
        (["--tune", "--tuning", "x.json"], "--tuning: says nothing beside --tune, .*, got 'x.json'; leave one of both"),
        (["--tune", "--ablate", "devices=2"], "--ablate: says nothing beside --tune"),
        (["--tune", "--kinds", "untouched"], "--kinds: none of these has a learning rate to choose, got .*; name some"),
        (["--learning-rates", "central="], "--learning-rates: must name at least one, got 'central='"),
        (["--learning-rates", "central"], "--learning-rates: must begin with one of .* and ="),
        (["--learning-rates", "central=1", "--learning-rates", "central=2"], "rates of a kind once, got 'central=2'"),
        (
            ["--learning-rates", "large_federated=1", "--large-learning-rates", "2"],
            "--large-learning-rates: must give the learning rates of a kind once",
        ),
        (["--kinds", "fedpt", "--learning-rates", "central=1"], "--learning-rates: must be of a kind that is compared"),
        (["--kinds", "fedpt", "--large-learning-rates", "1"], "--large-learning-rates: must be of a kind that is comp"),
        (["--kinds", "fedpt", "-c", "data.train='/no/such.jsonl'"], "^/no/such.jsonl: there is no such file"),
        (["--kinds", "fedpt", "--devices", "9"], "^data.train: .* there are 9 devices and only 8 groups"),
        (["--kinds", "fedpt", "-c", "model.large='/no/model'"], "^model.large: .*'/no/model'"),
        (
            ["--kinds", "fedpt", "--ablate", "data.prompts=demo:prompts,demo:no"],
            "^--ablate data.prompts=demo:no, demo:no",
        ),
        (["--learning-rates", "untouched=0.1"], "--learning-rates: must begin with one of tuned_local, "),
        (["--ablate", "proxy.alpha"], "--ablate: must be a key with its values"),
        (["--ablate", "proxy.alfa=1"], "--ablate, proxy.alfa: is not a key of this app; did you mean proxy.alpha"),
        (["--ablate", "seed=1,2"], "--ablate: a comparison sets this key itself"),
        (["--ablate", "devices=0"], "--ablate, devices: must be a whole number of at least 1"),
        (["--ablate", "devices=2", "--ablate-kinds", "x"], "--ablate-kinds: must be some of"),
        (["--large-learning-rates", "0,-1"], "--large-learning-rates: must be finite numbers greater than 0"),
        (["--large-lora-learning-rates", "x"], "--large-lora-learning-rates: must be numbers separated by commas"),
        (["--devices", "1"], "min-devices: must not exceed the 1 devices"),
        (["--seeds", "a"], "--seeds: must be numbers separated by commas, got 'a'"),
        (["--world", "elsewhere"], "--world: must be a TOML file of a run config, or demo, got 'elsewhere'"),
        (["--world", "/a/x/c.toml", "--world", "/b/x/c.toml"], "two worlds must lie in folders of different names"),
        (["--world", "demo", "--world", "demo"], "different names, got 'demo'"),
        (["--world", "/a/x/c.toml"], "--world: cannot be read .*No such file"),
        (["-c", "nope"], "must be key=value pairs"),
    ],
)
def test_bad_options_are_one_clear_sentence(options, match, tmp_path):
    arguments = ["compare", "--out", str(tmp_path / "out"), "--app", str(APP), *options]
    with pytest.raises(FedPTError, match=match):
        CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_worlds_file_goes_before_what_is_given_for_all(done, config, tmp_path):
    """Refused as another grid, which shows what each world would have been told."""
    folder = copy_of(done, tmp_path)
    for label, steps in (("a", 5), ("b", 6)):
        (tmp_path / label).mkdir()
        (tmp_path / label / "run-config.toml").write_text(
            f'"train.max-steps" = {steps}\n"train.batch-size" = {steps}\n'
        )
    worlds = [word for label in "ab" for word in ("--world", str(tmp_path / label / "run-config.toml"))]
    arguments = ["compare", "--app", str(APP), "--out", str(folder), *worlds, "-c", "train.batch-size=7"]
    with pytest.raises(FedPTError) as caught:
        CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    told = str(caught.value)
    for said in ("a.train.max-steps (was 'absent', is 5)", "b.train.max-steps (was 'absent', is 6)"):
        assert f"worlds.{said}" in told
    assert told.count("train.batch-size (was 'absent', is 7)") == 2
    assert "learning_rates.large_federated_lora (was 'absent', is [0.001, 0.003, 0.01])" in told


# --- the summary ---


def fedpt_result(seed, proxy, large=0.1, loss=0.5):
    rows = {"large": {"exact_match": large, "loss": 7.0}, "proxy": {"exact_match": proxy}}
    if loss is not None:
        rows["proxy"]["loss"] = loss
    costs = {
        "seconds": 9.0,
        "bytes_up_per_device_and_round": 100.0 + seed,
        "device_seconds_per_round": 2.0,
        "device_peak_memory_bytes": 5,
        "server_large_tokens": 10 * (seed + 1),
        "server_large_tokens_test": 4,
    }
    return {"seed": seed, "rows": rows, "costs": costs, "seconds": 11.0}


def direct_result(seed, exact_match, validation):
    costs = {"seconds": 9.0, "bytes_up_per_device_and_round": 800.0, "server_large_tokens": 7}
    return {
        "seed": seed,
        "rows": {LARGE: {"exact_match": exact_match, "loss": 0.2}},
        "validation_rows": {LARGE: {"exact_match": validation, "loss": 0.3}},
        "costs": costs,
        "seconds": 12.0,
    }


@pytest.fixture
def settled(config):
    """Two worlds, two seeds: in world b tuning the large model gains nothing with seed 1."""
    plan = make_plan(config, worlds={"a": config, "b": config})
    return plan, {
        "a-fedpt-off-seed0": fedpt_result(0, 0.7),
        "a-fedpt-off-seed1": fedpt_result(1, 0.9, loss=0.7),
        "a-large_federated-lr0.0002-seed0": direct_result(0, 0.2, 0.4),
        "a-large_federated-lr0.001-seed0": direct_result(0, 0.9, 0.8),
        "a-large_federated-lr0.001-seed1": direct_result(1, 1.1, 0.8),
        "b-fedpt-off-seed0": fedpt_result(0, 0.6),
        "b-fedpt-off-seed1": fedpt_result(1, 0.5, loss=None),
        "b-large_federated-lr0.0002-seed0": direct_result(0, 0.6, 0.9),
        "b-large_federated-lr0.001-seed0": None,
        "b-large_federated-lr0.0002-seed1": direct_result(1, 0.1, 0.9),
    }


def rows_by_place(part, *keys):
    return {tuple(row[key] for key in keys): row for row in part}


def test_the_summary_has_the_hand_computed_means(settled):
    rows = rows_by_place(summarise(*settled)["rows"], "world", "mode", "row")
    assert list(rows)[:3] == [("a", "off", "large"), ("a", "off", "proxy"), ("a", None, LARGE)]
    proxy = rows["a", "off", "proxy"]
    assert (proxy["n_seeds"], proxy["seeds"]) == (2, [0, 1])
    # Standard deviation of 0.7 and 0.9: sqrt(0.02); 12.7062 * sqrt(0.02) / sqrt(2) = 1.27062.
    assert proxy["exact_match"]["mean"] == pytest.approx(0.8)
    assert proxy["exact_match"]["ci95"] == pytest.approx([0.8 - 1.27062, 0.8 + 1.27062], abs=1e-5)
    assert proxy["exact_match"]["values"] == [0.7, 0.9]
    assert proxy["loss"]["mean"] == pytest.approx(0.6)
    assert rows["a", None, LARGE]["exact_match"]["values"] == [0.9, 1.1]  # of the chosen learning rate alone


def test_a_loss_that_is_not_there_leaves_no_mean_to_flatter(settled):
    loss = rows_by_place(summarise(*settled)["rows"], "world", "mode", "row")["b", "off", "proxy"]["loss"]
    assert loss == {"mean": None, "ci95": None, "values": [0.5, None]}


def test_the_gap_closed_is_taken_seed_by_seed_and_then_world_by_world(settled):
    plan, results = settled
    gaps = rows_by_place(summarise(plan, results)["gap_closed"], "world", "mode")
    # Seed 0: (0.7 - 0.1) / (0.9 - 0.1) = 0.75; seed 1: (0.9 - 0.1) / (1.1 - 0.1) = 0.8.
    assert gaps["a", "off"]["values"] == pytest.approx([0.75, 0.8])
    assert gaps["a", "off"]["mean"] == pytest.approx(0.775)
    # (0.6 - 0.1) / (0.6 - 0.1) = 1; with seed 1 the reference is no better than the large model.
    assert gaps["b", "off"]["values"] == [pytest.approx(1.0), None]
    assert gaps["b", "off"]["mean"] is None
    why = "no share: with seed 1 large_federated gains nothing over large (10.0 % before, 10.0 % after)"
    assert gaps["b", "off"]["why"] == why
    assert f"Gap closed, b, off: {why}" in summary_text(summarise(plan, results))
    assert "why" not in gaps["a", "off"]
    assert gaps["all", "off"] == {
        "world": "all", "mode": "off", "row": "proxy", "reference": LARGE, "measure": "exact_match",
        "mean": None, "ci95": None, "values": [pytest.approx(0.775), None],
        "why": "no share: in world b there is none",
    }  # fmt: skip
    results["b-large_federated-lr0.0002-seed1"] = direct_result(1, 0.9, 0.9)  # (0.5 - 0.1) / (0.9 - 0.1) = 0.5
    everywhere = rows_by_place(summarise(plan, results)["gap_closed"], "world", "mode")["all", "off"]
    # World means 0.775 and 0.75, their standard deviation 0.025 / sqrt(2): 12.7062 * 0.025 / 2 = 0.158828.
    assert everywhere["mean"] == pytest.approx(0.7625)
    assert everywhere["ci95"] == pytest.approx([0.7625 - 0.158828, 0.7625 + 0.158828], abs=1e-5)


def test_free_text_is_compared_by_rouge_l_too(settled):
    plan, results = settled
    items = {"keys": ["x", "y"], "tokens": [3, 5]}
    for cell in results.values():
        for row, scores in (cell or {"rows": {}})["rows"].items():
            scores["rouge_l"] = value = {"proxy": 0.5, "large": 0.25}.get(row, 0.75)
            columns = {"exact_match": [0, 0], "rouge_l": [value, value], "loss": [None, None]}
            cell.setdefault("items", items | {"rows": {}})["rows"][row] = columns
    summary = summarise(plan, results)
    gaps = rows_by_place(summary["gap_closed"], "world", "reference", "measure")
    assert gaps["a", LARGE, "rouge_l"]["values"] == pytest.approx([0.5, 0.5])
    assert gaps["a", LARGE, "rouge_l"]["ci95_items"] == pytest.approx([0.5, 0.5])
    differences = rows_by_place(summary["differences"], "world", "against", "measure")
    assert differences["a", LARGE, "rouge_l"]["value"] == pytest.approx(-0.25)
    assert ("a", LARGE, "loss") not in differences  # nobody has one
    text = summary_text(summary)
    assert "ROUGE-L %" in text
    assert re.search(r"^a +off +proxy +large_federated +rouge_l +50 ", text, re.MULTILINE)


def test_a_seed_without_its_reference_closes_no_gap(settled):
    plan, results = settled
    del results["a-large_federated-lr0.001-seed1"]
    gap = rows_by_place(summarise(plan, results)["gap_closed"], "world", "mode")["a", "off"]
    assert (gap["seeds"], gap["values"], gap["ci95"]) == ([0], [pytest.approx(0.75)], None)


def test_all_learning_rates_that_were_tried_are_listed_with_their_validation_scores(settled):
    rates = [
        (row["world"], row["learning_rate"], row["exact_match"], row["loss"], row["chosen"])
        for row in summarise(*settled)["learning_rates"]
    ]
    assert rates == [
        ("a", 2e-4, 0.4, 0.3, False),
        ("a", 1e-3, 0.8, 0.3, True),
        ("b", 2e-4, 0.9, 0.3, True),
        ("b", 1e-3, None, None, False),
    ]


def test_where_nothing_ran_no_learning_rate_is_chosen(config):
    plan = make_plan(config, kinds=(LARGE_LORA,))
    failed = {cell.name: None for cell in plan.cells({})}
    assert [row["chosen"] for row in summarise(plan, failed)["learning_rates"]] == [False]


def test_costs_are_means_and_a_large_model_beside_the_tuned_one_is_none_of_them(settled):
    costs = rows_by_place(summarise(*settled)["costs"], "world", "mode", "row")
    proxy, direct = costs["a", "off", "proxy"], costs["a", None, LARGE]
    assert proxy["bytes_up_per_device_and_round"] == 100.5
    assert (proxy["server_large_tokens"], proxy["server_large_tokens_test"]) == (15.0, 4.0)
    assert proxy["worker_peak_memory_bytes"] == 5
    assert direct["bytes_up_per_device_and_round"] == 800
    assert "server_large_tokens" not in direct


def test_the_summary_names_the_cells_that_count(settled):
    plan, results = settled
    counted = summarise(plan, results)["counted"]
    tried = {"a-large_federated-lr0.0002-seed0", "b-large_federated-lr0.001-seed0"}
    assert counted == sorted(results.keys() - tried)
    varied = make_plan(plan.worlds["a"], worlds=plan.worlds, ablations=(Ablation.parse("train.max-steps=9"),))
    name = "a-fedpt-off-train.max-steps_9-seed0"
    assert summarise(varied, results | {name: fedpt_result(0, 0.7)})["counted"] == sorted([*counted, name])


def test_the_summary_is_fit_for_json_and_for_a_terminal(settled):
    summary = summarise(*settled)
    json.dumps(summary, allow_nan=False)
    text = summary_text(summary)
    assert "a      off   proxy            2      80 [-47.06, 207.1]" in text
    assert text.isascii()
    assert "of two seeds they say little" in text


# --- against Flower's own simulation ---


@pytest.fixture
def flower(tmp_path):
    """Flower with a home and a port of its own."""
    import test_simulation

    home = tmp_path / "flower"
    home.mkdir()
    flower = test_simulation.Flower(home)
    yield flower
    flower.stop()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_cell_gives_what_flwr_run_gives_bit_for_bit(flower, config, tmp_path):
    log, entry = flower.run(3, {key: value for key, value in config.items() if key in TINY})
    assert entry["status"] == "finished:completed", log
    plan = make_plan(config, kinds=(FEDPT,), seeds=(1, 0), num_devices=3)
    comparison = Comparison(plan, tmp_path / "one", app=APP)
    comparison.run(jobs=1, keep_runs=True)
    comparison.close()
    simulated = (flower.home / "fedpt" / "runs" / "latest").resolve()
    kept = tmp_path / "one" / "runs" / "demo-fedpt-off-seed0"
    assert_same(final_arrays(simulated), final_arrays(kept))
    found, expected = (json.loads((run / "results.json").read_text())["rows"] for run in (kept, simulated))
    # Large and untuned are rows of their own cell.
    assert found == {name: expected[name] for name in ("tuned", "proxy")}


def test_a_message_that_the_grid_makes_reaches_its_device():
    """Flower's older way to make messages, which some strategies may still use."""
    grid = LocalGrid(lambda message, _: Message(message.content, reply_to=message), 2)
    content = RecordDict({"config": ConfigRecord({"word": "hello"})})
    for node in grid.get_node_ids():
        message = grid.create_message(content, "train", node, "1")
        (reply,) = grid.send_and_receive([message])
        assert reply.metadata.src_node_id == node
        assert reply.content["config"]["word"] == "hello"
