"""Runs that are killed and gone on with, against runs that are left alone: every file must come out the same.

Each run is a process of its own. They are forked from one that has imported everything, because importing takes longer
than a run; it has no threads and has computed nothing, so a fork is as good as a new process.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fedpt_flwr.accounting import epsilon_after
from fedpt_flwr.runs import RunFolder

NUM_DEVICES = 4
NUM_ROUNDS = 3

FORKS_RUNS = """
import importlib, itertools, json, os, signal, sys
sys.path[:0] = sys.argv[1:]
import federation
from pathlib import Path
from fedpt_flwr import grid, proxy, runs, strategy

OWNERS = {"Path": Path, "LocalGrid": grid.LocalGrid, "ProxyModel": proxy.ProxyModel, "runs": runs}
OWNERS |= {"RunFolder": runs.RunFolder, "FedPT": strategy.FedPT}

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def write_half_a_line_and_die(run, name, *rows):
    with (run.path / name).open("a") as file:
        file.write(json.dumps(rows[0])[:-9])
    die()

def kill_at(function, number, torn):
    owner, name = function.split(".")
    original, calls = getattr(OWNERS[owner], name), itertools.count(1)

    def killing(*args, **kwargs):
        if next(calls) == number:
            (write_half_a_line_and_die if torn else die)(*args)
        return original(*args, **kwargs)

    setattr(OWNERS[owner], name, killing)

def run(job, number):
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    federation._run_ids = itertools.count(number)
    if job["kill"]:
        kill_at(*job["kill"])
    federation.federate(Path(job["root"]), job["num_devices"], job["config"])
    Path(job["modules"]).write_text(json.dumps(sorted(sys.modules)))

for number, line in enumerate(sys.stdin, start=1):
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        failed = 1
        try:
            run(job, number)
            failed = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", flush=True)
        finally:
            os._exit(failed)
    print(os.waitpid(child, 0)[1], flush=True)
    if number == 1:  # what the first run imported on its way, the others need not
        for name in json.loads(Path(job["modules"]).read_text()):
            try:
                importlib.import_module(name)
            except Exception:
                pass
"""


class Federations:
    """Runs federations in processes of their own, one at a time."""

    def __init__(self, folder):
        self.folder, self.log = folder, folder / "log"
        paths = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", FORKS_RUNS, *paths],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"FEDPT_HOME": str(folder / "home")},  # of what devices keep
        )

    def run(self, root, config, kill=None):
        """Run until the end, or until the process kills itself: it must if and only if it is told to."""
        status = self._status(root, config, kill)
        assert status == (signal.SIGKILL if kill else 0), self.log.read_text()

    def error(self, root, config, num_devices=NUM_DEVICES):
        """How a run fails that must."""
        assert os.waitstatus_to_exitcode(self._status(root, config, None, num_devices)) == 1, self.log.read_text()
        return self.log.read_text().splitlines()[-1]

    def _status(self, root, config, kill, num_devices=NUM_DEVICES):
        job = {
            "root": str(root),
            "config": config,
            "num_devices": num_devices,
            "kill": kill and [kill[0], kill[1], kill[2:] == ("torn",)],
            "log": str(self.log),
            "modules": str(self.folder / "modules.json"),
        }
        self.log.write_text("")
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(timeout=60)


@pytest.fixture(scope="module")
def federations(tmp_path_factory):
    found = Federations(tmp_path_factory.mktemp("federations"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The run config of a run that takes a second."""
    folder, world = tmp_path_factory.mktemp("data"), Path(__file__).parents[1] / "fedpt_demo_world"
    config = {
        "num-server-rounds": NUM_ROUNDS,
        "keep-rounds": 0,
        "train.max-steps": 1,
        "fraction-train": 0.5,
        "proxy.alpha": "auto",
        "distillation.mode": "off",
        "scoring.rows": "tuned,proxy",
        "scoring.num-items": 0,
        "scoring.few-shot": 0,
        "scoring.max-new-tokens": 2,
        "data.public": "",
        "wait-timeout-s": 2.0,
    }
    for name, count in (("train", 40), ("validation", 2), ("test", 2), ("prompts", 4)):
        lines = (world / f"{name}.jsonl").read_text().splitlines()
        (folder / f"{name}.jsonl").write_text("\n".join(lines[:: len(lines) // count]))
        config[f"data.{name}"] = str(folder / f"{name}.jsonl")
    return config


KINDS = {
    "FedAvg": {"strategy.name": "FedAvg"},
    "FedAdam": {"strategy.name": "FedAdam", "strategy.arguments": "eta = 0.001"},
    "FedAvgM": {"strategy.name": "FedAvgM", "strategy.arguments": "server-momentum = 0.9"},
    "Krum": {"strategy.name": "Krum", "fraction-train": 1.0},
    "lora": {"strategy.name": "FedAdam", "strategy.arguments": "eta = 0.001", "tuning.mode": "lora"},
    "exact": {"tuning.mode": "lora", "tuning.lora-aggregation": "exact"},
    "int8": {"wire.dtype": "int8"},
    "frozen int8": {"tuning.mode": "lora", "tuning.lora-aggregation": "frozen-a", "wire.dtype": "int8"},
    "keep one": {"keep-rounds": 1},
    "good enough": {"stop.metric": "loss", "stop.target": 1e9},  # after round 1
    "given alpha": {"proxy.alpha": 1.5},
    **{
        f"{mode} {name}": {
            "distillation.mode": mode,
            "distillation.steps": 2,
            "distillation.final-steps": 2,
            "distillation.batch-size": 2,
            "strategy.name": name,
            "strategy.arguments": arguments,
        }
        for mode in ("paper", "carry", "paired", "final")
        for name, arguments in (("FedAvg", ""), ("FedAvgM", "server-momentum = 0.9"))
    },
}
"""What is put on top of the tiny config; ``carry FedAvgM`` distils in mode ``carry`` and aggregates with FedAvgM."""


@pytest.fixture(scope="module")
def unbroken(federations, tiny, tmp_path_factory):
    """The folder of a run of a kind that is left alone; made once."""
    made = {}

    def make(kind):
        if kind not in made:
            root = tmp_path_factory.mktemp("unbroken")
            federations.run(root, tiny | KINDS[kind])
            made[kind] = only_run(root)
        return made[kind]

    return make


def only_run(root):
    (run,) = root.glob("2*")
    return run


def without_measurements(value):
    """What a run writes, without times and memory, which no two runs share.

    A run that goes on scores the large model again, whose answers the process before had kept; its tokens count twice.
    """
    if isinstance(value, list):
        return [without_measurements(item) for item in value]
    if isinstance(value, dict):
        kept = (name for name in value if not any(part in name for part in ("seconds", "memory", "large_tokens")))
        return {name: without_measurements(value[name]) for name in kept}
    return value


def read_lines(path):
    """The lines, but for what going on itself has cost."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [without_measurements(row) for row in rows if row.get("phase") != "resume"]


def files(folder):
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}


def assert_same_run(run, expected):
    assert files(run) == files(expected)
    for path in sorted(files(run)):
        if path.parts[0] in ("rounds", "device") and path.name != "lines.json":
            assert (run / path).read_bytes() == (expected / path).read_bytes(), path
        elif path.suffix == ".jsonl":
            assert read_lines(run / path) == read_lines(expected / path), path
    mine, other = (
        without_measurements(json.loads((folder / "results.json").read_text())) for folder in (run, expected)
    )
    assert mine == other
    assert (run / "proxy").readlink() == (expected / "proxy").readlink()
    assert (run.parent / "latest").readlink() == Path(run.name)


# Four devices introduce themselves, then two a round train. A round writes: costs and metrics of training, metrics and
# costs of the shift, metrics and costs of the validation. Round 1 makes the links, each later one changes `proxy`.
KILLS = {
    "in round 1 between two devices": [("LocalGrid.ask", 6)],
    "in round 2 between two devices": [("LocalGrid.ask", 8)],
    "while training": [("FedPT._take_in", 3)],
    "between two lines": [("RunFolder.append", 10)],
    "in a line": [("RunFolder.append", 11, "torn")],
    "before a checkpoint": [("RunFolder.save_round", 2)],
    "in a checkpoint": [("ProxyModel.save_pretrained", 2)],
    "before a round counts": [("Path.rename", 2)],
    "before the first links": [("runs.replace_link", 1)],
    "between the first links": [("runs.replace_link", 2)],
    "before a later link": [("runs.replace_link", 3)],
    "before old checkpoints are removed": [("RunFolder._remove_old_rounds", 2)],
    "before the next round": [("FedPT.configure_train", 3)],
    "before the test": [("RunFolder.rounds", 1)],
    "after the test": [("RunFolder.append", 6 * NUM_ROUNDS + 1)],
    "before the results": [("RunFolder.write_results", 1)],
    "at the end, twice": [("RunFolder.write_results", 1), ("RunFolder.rewind", 1)],
    "again and again": [
        ("RunFolder.append", 4),
        ("RunFolder.save_round", 2),
        ("runs.replace_link", 1),
        ("FedPT.configure_train", 1),
        ("Path.rename", 1),
        ("RunFolder.append", 6, "torn"),
        ("RunFolder.write_results", 1),
    ],
}
OFTEN = (
    ("FedAvg", "before a round counts"),
    ("good enough", "before the test"),
)


def assert_goes_on(kind, kills, federations, tiny, unbroken, root):
    config = tiny | KINDS[kind]
    expected = unbroken(kind)
    resume = {}
    for kill in kills:
        federations.run(root, config | resume, kill)
        resume = {"resume": "latest"}
    federations.run(root, config | resume)
    assert_same_run(only_run(root), expected)
    assert len(RunFolder(only_run(root)).read_config()["flower_run_ids"]) == len(kills) + 1


@pytest.mark.parametrize(("kind", "kill"), [OFTEN[0], pytest.param(*OFTEN[1], marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_to_the_same_files(kind, kill, federations, tiny, unbroken, tmp_path):
    assert_goes_on(kind, KILLS[kill], federations, tiny, unbroken, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kill", KILLS)
@pytest.mark.parametrize("kind", ["FedAvg", "FedAdam"])
def test_a_run_that_is_killed_anywhere_goes_on_to_the_same_files(kind, kill, federations, tiny, unbroken, tmp_path):
    if (kind, kill) in OFTEN:
        pytest.skip("runs with the other tests")
    assert_goes_on(kind, KILLS[kill], federations, tiny, unbroken, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("FedAvg", "FedAdam", "good enough")])
def test_a_run_of_any_kind_goes_on_to_the_same_files(kind, number, federations, tiny, unbroken, tmp_path):
    assert_goes_on(kind, [("FedPT._evaluate_on_devices", number)], federations, tiny, unbroken, tmp_path)


@pytest.mark.slow
def test_two_runs_that_are_left_alone_are_the_same(federations, tiny, unbroken, tmp_path):
    # Else the comparisons above would say nothing.
    federations.run(tmp_path, tiny | KINDS["FedAvg"])
    assert_same_run(only_run(tmp_path), unbroken("FedAvg"))
    other = unbroken("FedAdam")
    assert (other / "rounds/0002/arrays.safetensors").read_bytes() != (
        unbroken("FedAvg") / "rounds/0002/arrays.safetensors"
    ).read_bytes()


# --- a private run: its noise is never the same, what it has spent is ---

PRIVATE = {"privacy.dp": "server-fixed", "privacy.noise-multiplier": 4.0}


@pytest.fixture(autouse=True)
def _one_run_that_ends(request):
    """The process that forks takes from the first run what others need to import."""
    if "federations" in request.fixturenames:
        request.getfixturevalue("unbroken")("FedAvg")


def releases(folder):
    return json.loads((folder / "privacy.json").read_text())["releases"]


@pytest.mark.slow
def test_a_private_round_that_was_lost_after_it_was_spent_stays_spent(federations, tiny, tmp_path):
    """Killed between noise and checkpoint; the budget was for three rounds, and the run ends after two."""
    config = tiny | PRIVATE | {"privacy.max-epsilon": epsilon_after(4.0, NUM_ROUNDS, delta=1e-5)}
    federations.run(tmp_path, config, ("RunFolder.save_round", 2))
    run = only_run(tmp_path)
    assert (releases(run), releases(run / "rounds/0001")) == (2, 1)
    federations.run(tmp_path, config | {"resume": "latest"})
    assert (releases(run), releases(run / "rounds/0002")) == (3, 3)
    results = json.loads((run / "results.json").read_text())
    assert results["rounds"] == 2
    assert results["privacy"]["epsilon"] == epsilon_after(4.0, 3, delta=1e-5)
    before = (run / "results.json").stat().st_mtime_ns
    federations.run(tmp_path, config | {"resume": "latest"})  # there is nothing left to do, and nothing is done
    assert (run / "results.json").stat().st_mtime_ns == before


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["server-fixed", "client-fixed", "server-adaptive", "client-adaptive"])
def test_a_private_run_that_is_killed_again_and_again_spends_every_time(mode, federations, tiny, tmp_path):
    config = tiny | PRIVATE | {"privacy.dp": mode, "privacy.clipped-count-stddev": 20.0}
    resume = {}
    for kill in (("RunFolder.save_round", 1), ("RunFolder.save_round", 1), ("RunFolder.save_round", 2)):
        federations.run(tmp_path, config | resume, kill)
        resume = {"resume": "latest"}
    federations.run(tmp_path, config | resume)
    # Rounds that were begun: 1; 1; 1 and 2; 2 and 3.
    results = json.loads((only_run(tmp_path) / "results.json").read_text())
    assert results["rounds"] == NUM_ROUNDS
    assert results["privacy"]["releases"] == releases(only_run(tmp_path)) == 6
    assert results["privacy"]["epsilon"] == epsilon_after(4.0, 6, delta=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda ledger, _: ledger.unlink(), "cannot be read"),
        (lambda ledger, _: ledger.write_text("{}"), "a budget that nobody knows is spent"),
        (lambda ledger, _: ledger.write_text("{"), "cannot be read"),
        (lambda ledger, run: shutil.copy(run / "rounds/0001/privacy.json", ledger), "must have all that the last"),
        (lambda _, run: (run / "rounds/0002/privacy.json").unlink(), "rounds/0002 to go on after round 1"),
        (lambda ledger, run: (ledger.unlink(), shutil.rmtree(run / "rounds")), "cannot be read"),
    ],
)
def test_a_private_run_does_not_go_on_with_a_ledger_that_is_missing_or_older(
    damage, words, federations, tiny, tmp_path
):
    config = tiny | PRIVATE
    federations.run(tmp_path, config, ("FedPT.configure_train", 3))
    run = only_run(tmp_path)
    damage(run / "privacy.json", run)
    assert words in federations.error(tmp_path, config | {"resume": "latest"})


def copied(run, tmp_path):
    shutil.copytree(run.parent, tmp_path / "runs", symlinks=True)
    return tmp_path / "runs" / run.name


@pytest.fixture
def finished(unbroken, tmp_path):
    """A copy of a run that has ended."""
    return copied(unbroken("FedAvg"), tmp_path)


def resuming(run, tiny, **changes):
    return run.parent, tiny | KINDS["FedAvg"] | {"resume": run.name} | changes


def contents(folder):
    """Every file and link with its time of change, by path."""
    return {
        path.relative_to(folder): (
            path.lstat().st_mtime_ns,
            path.readlink() if path.is_symlink() else path.read_bytes(),
        )
        for path in folder.rglob("*")
        if path.name != ".lock" and (path.is_symlink() or path.is_file())
    }


@pytest.mark.parametrize("kind", ["FedAvg", "good enough"])
def test_a_finished_run_is_left_as_it_is_and_that_is_no_failure(kind, federations, tiny, unbroken, tmp_path):
    run = copied(unbroken(kind), tmp_path)
    (run / "report.html").write_text("<p>")
    before = contents(run)
    federations.run(run.parent, tiny | KINDS[kind] | {"resume": run.name})
    assert "and has its results: it is left as it is" in federations.log.read_text()
    assert contents(run) == before


def test_a_report_of_what_is_rewound_is_removed_with_it(finished, federations, tiny, unbroken):
    (finished / "results.json").unlink()
    for name in ("report.html", "plot-rounds-loss.png", "own.png"):
        (finished / name).write_text("x")
    federations.run(*resuming(finished, tiny))
    (finished / "own.png").unlink()
    assert_same_run(finished, unbroken("FedAvg"))


@pytest.fixture
def stopped(finished):
    """A run that was killed in round 3; that it has results, too, shows whether they are lost."""
    shutil.rmtree(finished / "rounds/0003")
    return finished


@pytest.mark.parametrize(
    ("number", "now"), [(1, "1 with 40 examples"), (3, "3 with 40 examples"), (5, "5 with 40 examples")]
)
def test_a_run_goes_on_with_as_many_devices_as_it_had(number, now, stopped, federations, tiny):
    before = contents(stopped)
    said = federations.error(*resuming(stopped, tiny), num_devices=number)
    assert said == (
        f"RunError: a resumed run goes on with the devices that it had: 4 with 40 examples; now there are {now}; "
        'start as many as before, in a simulation with --federation-config "num-supernodes=4"; to go on with others, '
        "and to other weights, remove shards.json from the run's folder"
    )
    assert contents(stopped) == before
    assert "Waiting" not in federations.log.read_text()


def test_a_run_waits_for_the_devices_that_it_had(stopped, federations, tiny, unbroken):
    shards = json.loads((stopped / "shards.json").read_text())
    more = [*shards, {"device": 9, "num_examples": 1, "groups": {}}]
    (stopped / "shards.json").write_text(json.dumps(more))
    said = federations.error(*resuming(stopped, tiny))
    assert "had: 5 with 41 examples; now there are 4 with 40 examples" in said
    assert "Waiting for devices: 4 of 5 are there" in federations.log.read_text()
    (stopped / "shards.json").unlink()
    federations.run(*resuming(stopped, tiny))
    assert_same_run(stopped, unbroken("FedAvg"))


@pytest.mark.slow
def test_the_newest_run_goes_on_although_an_older_one_has_the_newest_model(finished, federations, tiny, unbroken):
    config = tiny | KINDS["FedAvg"]
    federations.run(finished.parent, config, ("LocalGrid.ask", 6))
    (new,) = set(finished.parent.glob("2*")) - {finished}
    assert (finished.parent / "latest").resolve() == finished
    (finished.parent / "99990101T000000Z-5").mkdir()  # ended before it had a config: nothing to go on with
    federations.run(finished.parent, config | {"resume": "latest"})
    assert f"Resuming the run {new.name}" in federations.log.read_text()
    assert_same_run(new, unbroken("FedAvg"))


@pytest.mark.parametrize("shards", [{}, [[]], [{"device": 0, "num_examples": "4", "groups": {}}], [{"device": 0}]])
def test_shards_that_are_none_are_said_to_be(shards, stopped, federations, tiny):
    (stopped / "shards.json").write_text(json.dumps(shards))
    said = federations.error(*resuming(stopped, tiny))
    assert said.startswith(f"RunError: {stopped}/shards.json: must ")


def test_a_run_that_another_process_writes_is_left_alone(finished, federations, tiny, unbroken):
    with RunFolder.open(finished):
        said = federations.error(*resuming(finished, tiny))
    assert f"RunError: {finished}: a run has one writer at a time, got 'process {os.getpid()} on" in said
    assert_same_run(finished, unbroken("FedAvg"))


def test_a_run_with_another_config_is_refused_with_the_keys_that_differ(finished, federations, tiny, unbroken):
    said = federations.error(*resuming(finished, tiny, **{"seed": 3, "train.max-steps": 2}))
    assert said.startswith(f"ConfigError: {finished}: a resumed run must be the same run")
    assert "2 differ: seed (was 0, is 3), train.max-steps (was 1, is 2); give what config.json there says" in said
    assert_same_run(finished, unbroken("FedAvg"))
    assert len(RunFolder(finished).read_config()["flower_run_ids"]) == 1


def test_a_run_that_is_not_there_is_refused(finished, federations, tiny):
    said = federations.error(*resuming(finished, tiny, resume="nothing"))
    assert said.startswith(f"RunError: nothing is not a run in {finished.parent}; the newest are: {finished.name}")


# --- damaged checkpoints: refused in one sentence that names the file and the way out, and nothing is changed ---


def changed_arrays(path, change):
    arrays = dict(load_file(path))
    change(arrays, min(arrays))
    save_file(arrays, path)


def drop(arrays, name):
    del arrays[name]


def spoil(arrays, name):
    arrays[name] = np.full_like(arrays[name], np.nan)


def halve(arrays, name):
    arrays[name] = arrays[name].astype(np.float16)


def cut(arrays, name):
    arrays[name] = arrays[name][:1]


WRONG_ARRAYS = {
    drop: "1 missing",
    spoil: "must be finite numbers",
    halve: "must be float32 of shape",
    cut: "must be float32 of shape",
}
FILES_OF_MODES = [
    ("FedAvg", "arrays"),
    *(pytest.param("paired FedAvg", name, marks=pytest.mark.slow) for name in ("tuned", "untuned", "next-untuned")),
]


def stopped_copy(kind, unbroken, tmp_path):
    """A copy of a run of some kind as if it had been killed after round 2, but with all that is written at the end."""
    run = unbroken(kind)
    shutil.copytree(run.parent, tmp_path / "runs", symlinks=True)
    copy = tmp_path / "runs" / run.name
    shutil.rmtree(copy / "rounds/0003")
    return copy


def assert_refused(run, name, rule, federations, config):
    before = contents(run)
    said = federations.error(run.parent, config | {"resume": run.name})
    folder = run / "rounds/0002"
    assert said.startswith(f"RunError: {folder / name}: is damaged: "), said
    assert rule in said
    assert said.endswith(f"; remove {folder} to go on after round 1")
    assert contents(run) == before


@pytest.mark.parametrize(("kind", "name"), FILES_OF_MODES)
@pytest.mark.parametrize("change", [drop, spoil])
def test_weights_that_are_not_whole_are_refused(kind, name, change, federations, tiny, unbroken, tmp_path):
    run = stopped_copy(kind, unbroken, tmp_path)
    changed_arrays(run / f"rounds/0002/{name}.safetensors", change)
    assert_refused(run, f"{name}.safetensors", WRONG_ARRAYS[change], federations, tiny | KINDS[kind])


@pytest.mark.parametrize("change", [halve, cut])
def test_weights_of_another_type_or_shape_are_refused(change, federations, tiny, unbroken, tmp_path):
    run = stopped_copy("FedAvg", unbroken, tmp_path)
    changed_arrays(run / "rounds/0002/arrays.safetensors", change)
    assert_refused(run, "arrays.safetensors", WRONG_ARRAYS[change], federations, tiny | KINDS["FedAvg"])


def test_a_strategys_state_that_is_not_finite_is_refused(federations, tiny, unbroken, tmp_path):
    run = stopped_copy("FedAdam", unbroken, tmp_path)
    changed_arrays(run / "rounds/0002/inner.safetensors", spoil)
    assert_refused(run, "inner.safetensors", "must be finite numbers", federations, tiny | KINDS["FedAdam"])


@pytest.mark.parametrize(
    "sizes", [{}, [], {"metrics.jsonl": "1", "costs.jsonl": 2}, {"metrics.jsonl": -1, "costs.jsonl": 2}]
)
def test_a_checkpoint_that_does_not_know_its_lines_is_refused(sizes, federations, tiny, unbroken, tmp_path):
    run = stopped_copy("FedAvg", unbroken, tmp_path)
    (run / "rounds/0002/lines.json").write_text(json.dumps(sizes))
    rule = "it must give the lengths of metrics.jsonl and costs.jsonl in bytes"
    assert_refused(run, "lines.json", rule, federations, tiny | KINDS["FedAvg"])


@pytest.mark.parametrize("gone", ["proxy", "proxy/config.json", "proxy/tuned"])
def test_a_checkpoint_without_its_proxy_is_refused(gone, federations, tiny, unbroken, tmp_path):
    run = stopped_copy("FedAvg", unbroken, tmp_path)
    path = run / "rounds/0002" / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert_refused(run, "proxy", "a proxy", federations, tiny | KINDS["FedAvg"])


def test_without_the_damaged_round_a_run_goes_on_after_the_one_before(federations, tiny, unbroken, tmp_path):
    run = stopped_copy("paired FedAvg", unbroken, tmp_path)
    shutil.rmtree(run / "rounds/0002")
    federations.run(run.parent, tiny | KINDS["paired FedAvg"] | {"resume": "latest"})
    assert_same_run(run, unbroken("paired FedAvg"))


@pytest.mark.parametrize("line", [b'{"round": 1}', b"[1, 2]", b'{"phase": "shift"}', b'{"phase": "distillation"}'])
def test_a_line_of_metrics_that_lacks_something_is_said_to(line, stopped, federations, tiny):
    path, sizes = stopped / "metrics.jsonl", stopped / "rounds/0002/lines.json"
    path.write_bytes(line + b"\n")
    lengths = json.loads(sizes.read_text())
    sizes.write_text(json.dumps(lengths | {"metrics.jsonl": len(line) + 1}))
    before = contents(stopped)
    said = federations.error(*resuming(stopped, tiny))
    assert said.startswith(f"RunError: {path}: must hold what the run wrote, but a line of it lacks something")
    assert said.endswith("; put back the file as the run wrote it")
    assert contents(stopped) == before


@pytest.mark.parametrize("part", ["run_config", "fingerprints", "data_hashes"])
def test_a_config_of_another_kind_is_said_to_be(part, stopped, federations, tiny):
    path = stopped / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {part: []}))
    said = federations.error(*resuming(stopped, tiny))
    assert said.startswith(f"RunError: {stopped}: its config.json must hold an object {part}, got []; put back")
