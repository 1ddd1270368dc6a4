import datetime
import json
import math
import os
import platform
import resource
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from fedpt_flwr import runs
from fedpt_flwr.errors import RunError
from fedpt_flwr.runs import RunFolder, find_run, read_json, replace_link, runs_root, write_file, write_json

NOW = datetime.datetime(2026, 11, 20, 9, 5, 7, tzinfo=datetime.UTC)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def run(tmp_path):
    return RunFolder.create(tmp_path / "runs", 77, now=NOW)


# --- where runs lie ---


def test_the_root_is_what_the_config_says_then_the_environment_then_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FEDPT_HOME", str(tmp_path / "fedpt"))
    assert runs_root("/data/runs") == Path("/data/runs")
    assert runs_root() == tmp_path / "fedpt" / "runs"
    monkeypatch.setenv("FEDPT_HOME", "~/elsewhere")
    assert runs_root() == tmp_path / "elsewhere" / "runs"
    monkeypatch.delenv("FEDPT_HOME")
    assert runs_root() == tmp_path / ".fedpt" / "runs"


def test_a_relative_home_is_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDPT_HOME", "here")
    assert runs_root() == tmp_path / "here" / "runs"


def test_a_new_run_is_named_by_utc_time_and_flower_id(tmp_path):
    first = RunFolder.create(tmp_path, 5, now=NOW)
    assert first.path == tmp_path / "20261120T090507Z-5"
    assert first.path.is_dir()


def test_the_latest_run_is_the_newest_that_has_a_model(tmp_path):
    first, second = (RunFolder.create(tmp_path, number, now=NOW) for number in (5, 6))
    first.save_round(1, lambda folder: (folder / "proxy").mkdir(), keep=1)
    assert find_run(root=tmp_path) == first.path
    second.save_round(1, lambda folder: (folder / "proxy").mkdir(), keep=1)
    assert find_run(root=tmp_path) == second.path
    assert (tmp_path / "latest").readlink() == Path(second.path.name)


def test_a_run_is_never_made_in_the_folder_of_another(tmp_path):
    RunFolder.create(tmp_path, 5, now=NOW)
    with pytest.raises(RunError, match=r"20261120T090507Z-5: cannot be written \(File exists\)"):
        RunFolder.create(tmp_path, 5, now=NOW)


def test_a_root_that_is_a_file_is_reported_in_a_sentence(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(
        RunError, match=r"cannot be written \(Not a directory\); free some space or write .*set output-dir"
    ):
        RunFolder.create(tmp_path / "runs", 5, now=NOW)


# --- finding one ---


@pytest.fixture
def root(tmp_path):
    for name in ("20260101T000000Z-1", "20260101T000000Z-12", "20260202T000000Z-3"):
        (tmp_path / name).mkdir()
    (tmp_path / "20260303.txt").write_text("not a run")
    (tmp_path / "latest").symlink_to("20260101T000000Z-12")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("latest", "20260101T000000Z-12"),
        ("20260202T000000Z-3", "20260202T000000Z-3"),
        ("202602", "20260202T000000Z-3"),
        ("20260101T000000Z-1", "20260101T000000Z-1"),  # an id is itself, even where another one begins with it
        ("20260101T000000Z-12", "20260101T000000Z-12"),
    ],
)
def test_a_run_is_found_by_its_id_or_a_unique_beginning(root, name, found):
    assert find_run(name, root=root) == root / found


def test_a_run_is_found_by_its_folder_wherever_it_lies(root, tmp_path_factory, monkeypatch):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    assert find_run(str(elsewhere), root=root) == elsewhere
    monkeypatch.chdir(elsewhere)
    assert find_run(".", root=root) == elsewhere
    monkeypatch.setenv("HOME", str(elsewhere.parent))
    assert find_run(f"~/{elsewhere.name}", root=root) == elsewhere
    with pytest.raises(RunError, match="~nosuchuser/run"):
        find_run("~nosuchuser/run", root=root)


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("20260101", "20260101 is the beginning of more than one run in"),
        ("2027", "2027 is not a run in"),
        ("20260303", "20260303 is not a run in"),
        ("/no/such/folder", "/no/such/folder is not a run in"),
    ],
)
def test_a_name_of_none_or_several_runs_is_refused_with_those_that_there_are(root, name, rule):
    with pytest.raises(RunError) as raised:
        find_run(name, root=root)
    assert str(raised.value) == (
        f"{rule} {root}; the newest are: 20260101T000000Z-1, 20260101T000000Z-12, 20260202T000000Z-3"
    )


def test_where_there_is_no_run_the_error_says_how_to_make_one(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDPT_HOME", str(tmp_path / "none"))
    with pytest.raises(RunError, match=r"there is no run yet, got '.*none/runs'; make one with `flwr run"):
        find_run()
    with pytest.raises(RunError, match="abc is not a run in .*; the newest are: none"):
        find_run("abc")


def test_a_latest_run_that_was_removed_is_no_run(root):
    (root / "20260101T000000Z-12").rmdir()
    with pytest.raises(RunError, match="there is no run yet"):
        find_run("latest", root=root)


# --- files ---


def test_a_file_is_replaced_as_a_whole_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "deep" / "a.bin"
    write_file(path, b"first, and longer")
    write_file(path, b"second")
    assert path.read_bytes() == b"second"
    assert names(path.parent) == ["a.bin"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_reader_that_has_the_old_file_open_keeps_all_of_it(tmp_path):
    write_file(tmp_path / "a", b"old")
    with (tmp_path / "a").open("rb") as reader:
        write_file(tmp_path / "a", b"new")
        assert reader.read() == b"old"


def test_json_keeps_order_and_letters_and_comes_back_equal(tmp_path):
    value = {"z": 1, "a": [1.5, None, True], "text": "räder » \u2028", "inner": {"b": 0.1, "a": ""}}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    assert list(read_json(tmp_path / "a.json")) == ["z", "a", "text", "inner"]
    assert "räder »" in (tmp_path / "a.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_json_refuses_what_other_readers_would_not_accept(tmp_path, run, value):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"loss": value})
    run.append("metrics.jsonl", {"loss": 1.0})
    with pytest.raises(ValueError, match="not JSON compliant"):
        run.append("metrics.jsonl", {"loss": 2.0}, {"loss": value})
    assert not (tmp_path / "a.json").exists()
    assert run.read_lines("metrics.jsonl") == [{"loss": 1.0}]


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b'{"a": "\xff"}', b"\x00" * 10, b"[" * 100_000])
def test_a_damaged_json_file_is_reported_with_its_path(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(RunError, match=r"a\.json: cannot be read \(.*\); is the run complete\?"):
        read_json(tmp_path / "a.json")


def test_a_missing_json_file_is_reported_with_its_path(tmp_path):
    with pytest.raises(RunError, match=r"a\.json: cannot be read \(.*No such file"):
        read_json(tmp_path / "a.json")


def test_config_and_results_are_written_under_their_names(run):
    run.write_config({"seed": 1})
    run.write_results({"rows": {}})
    assert read_json(run.path / "config.json") == {"seed": 1}
    assert read_json(run.path / "results.json") == {"rows": {}}


# --- lines ---


def test_lines_are_added_in_order_and_come_back_equal(run):
    # U+2028 and U+0085 are line ends to Python, and not to JSON Lines.
    rows = [{"round": 1, "note": "a\nb\r\n"}, {"round": 2, "note": "x\u2028y\u0085z"}, {"round": 3, "note": "ä"}]
    run.append("metrics.jsonl", rows[0])
    run.append("metrics.jsonl", *rows[1:])
    run.append("metrics.jsonl")
    assert run.read_lines("metrics.jsonl") == rows
    assert (run.path / "metrics.jsonl").read_bytes().count(b"\n") == 3


def test_lines_of_a_file_that_is_not_there_are_none(run):
    assert run.read_lines("metrics.jsonl") == []


@pytest.mark.parametrize("line", ['{"a": ', "[" * 100_000])
def test_a_damaged_line_is_reported_with_its_file(run, line):
    run.append("metrics.jsonl", {"a": 1})
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write(line)
    with pytest.raises(RunError, match=r"metrics\.jsonl: cannot be read .*; is the run complete\?"):
        run.read_lines("metrics.jsonl")


# --- links and checkpoints ---


def test_a_link_is_replaced_and_leaves_no_temporary_name(tmp_path):
    replace_link(tmp_path / "link", "a")
    replace_link(tmp_path / "link", "b")
    assert (tmp_path / "link").readlink() == Path("b")
    assert names(tmp_path) == ["link"]


def test_what_an_interrupted_process_left_does_not_stop_a_link_from_being_replaced(tmp_path):
    (tmp_path / f".link.{os.getpid()}").symlink_to("half")
    replace_link(tmp_path / "link", "a")
    assert (tmp_path / "link").readlink() == Path("a")
    assert names(tmp_path) == ["link"]


def test_a_reader_never_sees_a_link_missing(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    replace_link(tmp_path / "link", "a")
    reader = subprocess.Popen(
        [sys.executable, "-c", READS_LINK, str(tmp_path / "link")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert reader.stdout.readline() == b"ready\n"
    number = 0
    while number < 5000 or not (tmp_path / "seen").exists():
        assert reader.poll() is None
        replace_link(tmp_path / "link", "ab"[number % 2])
        number += 1
    (tmp_path / "stop").touch()
    output, _ = reader.communicate(timeout=60)
    assert output == b"0\n"


READS_LINK = """
import os, pathlib, sys
link = pathlib.Path(sys.argv[1])
print("ready", flush=True)
seen = missing = 0
while not (link.parent / "stop").exists():
    seen += 1
    missing += not link.is_dir()
    if seen == 5000:
        (link.parent / "seen").touch()
print(missing)
"""


def checkpoint(text):
    def write(folder):
        (folder / "arrays").write_text(text)
        (folder / "round.json").write_text("{}")
        (folder / "proxy").mkdir()
        (folder / "proxy" / "weights").write_text(text)

    return write


def test_a_checkpoint_is_whole_and_the_link_proxy_points_at_it_relatively(run):
    target = run.save_round(1, checkpoint("one"), keep=3)
    assert target == run.path / "rounds" / "0001"
    assert (run.path / "proxy").readlink() == Path("rounds/0001/proxy")
    assert (run.path / "proxy" / "weights").read_text() == "one"
    moved = run.path.rename(run.path.with_name("moved"))
    assert (moved / "proxy" / "weights").read_text() == "one"


@pytest.mark.parametrize(("keep", "left"), [(1, [5]), (2, [4, 5]), (3, [3, 4, 5]), (9, [1, 2, 3, 4, 5])])
def test_only_the_newest_checkpoints_are_kept(run, keep, left):
    for server_round in range(1, 6):
        run.save_round(server_round, checkpoint(str(server_round)), keep=keep)
    assert run.rounds() == left
    assert names(run.path / "rounds") == [f"{server_round:04d}" for server_round in left]


def test_zero_keeps_all_checkpoints(run):
    for server_round in range(1, 6):
        run.save_round(server_round, checkpoint(""), keep=0)
    assert run.rounds() == [1, 2, 3, 4, 5]


def test_a_checkpoint_that_proxy_points_at_is_never_removed(run):
    # A run that goes on from round 2 although 7 and 8 lie there: the newest written is not the highest number.
    for server_round in (7, 8):
        run.save_round(server_round, checkpoint(""), keep=1)
    run.save_round(2, checkpoint("two"), keep=1)
    assert run.rounds() == [2, 8]
    assert (run.path / "proxy" / "weights").read_text() == "two"


def test_rounds_after_9999_are_in_order(run):
    for server_round in (9_999, 10_000):
        run.save_round(server_round, checkpoint(""), keep=1)
    assert run.rounds() == [10_000]


def test_a_round_that_is_saved_again_replaces_the_first(run):
    run.save_round(1, checkpoint("old"), keep=1)
    run.save_round(1, checkpoint("new"), keep=1)
    assert (run.path / "proxy" / "weights").read_text() == "new"
    assert names(run.path / "rounds") == ["0001"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("boom"), KeyboardInterrupt()])
def test_a_failing_write_leaves_the_earlier_checkpoint_and_the_link(run, error):
    run.save_round(1, checkpoint("one"), keep=1)

    def fails(folder):
        checkpoint("half")(folder)
        raise error

    with pytest.raises(RunError if isinstance(error, OSError) else type(error)) as raised:
        run.save_round(2, fails, keep=1)
    if isinstance(error, OSError):
        assert "rounds/0002: cannot be written (No space left on device); free some space" in str(raised.value)
    assert names(run.path / "rounds") == ["0001"]
    assert (run.path / "proxy" / "weights").read_text() == "one"


def test_what_an_interrupted_process_left_is_no_round_and_is_replaced(run):
    (run.path / "rounds" / ".0001.tmp" / "proxy").mkdir(parents=True)
    (run.path / "rounds" / ".0001.tmp" / "old").touch()
    assert run.rounds() == []
    run.save_round(1, checkpoint("one"), keep=1)
    assert names(run.path / "rounds" / "0001") == ["arrays", "lines.json", "proxy", "round.json"]
    assert names(run.path / "rounds") == ["0001"]


def test_a_run_without_checkpoints_has_no_rounds(run):
    assert run.rounds() == []


def test_only_whole_checkpoints_are_rounds(run):
    run.save_round(1, checkpoint("one"), keep=0)
    rounds = run.path / "rounds"
    (rounds / "0002" / "proxy").mkdir(parents=True)  # round.json is missing
    (rounds / ".0003.tmp").mkdir()
    (rounds / ".0003.tmp" / "round.json").write_text("{}")
    (rounds / "0004 copy").mkdir()
    (rounds / "0004 copy" / "round.json").write_text("{}")
    assert run.rounds() == [1]


def test_a_folder_is_whole_and_replaces_one_of_its_name(run):
    run.save_folder("device", checkpoint("old"))
    assert run.save_folder("device", checkpoint("new")) == run.path / "device"
    assert (run.path / "device" / "proxy" / "weights").read_text() == "new"

    def fails(folder):
        checkpoint("half")(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match=r"device: cannot be written \(No space left on device\)"):
        run.save_folder("device", fails)
    assert (run.path / "device" / "proxy" / "weights").read_text() == "new"
    assert names(run.path) == [".lock", "device"]


# --- one writer ---


def test_a_run_that_is_being_written_has_no_second_writer(run):
    run.write_config({})
    with pytest.raises(RunError) as refused:
        RunFolder.open(run.path)
    assert str(refused.value) == (
        f"{run.path}: a run has one writer at a time, got 'process {os.getpid()} on {platform.node()}'; "
        "wait until that process has ended, or end it"
    )
    run.close()
    with RunFolder.open(run.path) as second:
        assert second.path == run.path
        with pytest.raises(RunError, match="one writer"):
            RunFolder.open(run.path)
    RunFolder.open(run.path)


HOLDS_RUN = """
import pathlib, sys
from fedpt_flwr.runs import RunFolder
run = RunFolder.open(pathlib.Path(sys.argv[1]))
print("open", flush=True)
sys.stdin.read()
"""


def test_a_writer_that_is_killed_leaves_the_run_free(run):
    run.write_config({})
    run.close()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDS_RUN, str(run.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout.readline() == b"open\n"
    with pytest.raises(RunError, match=f"one writer at a time, got 'process {holder.pid} on"):
        RunFolder.open(run.path)
    holder.kill()
    holder.communicate(timeout=60)
    RunFolder.open(run.path).close()


def test_readers_need_no_lock_and_leave_no_file(run):
    run.write_config({"seed": 1})
    run.append("metrics.jsonl", {"round": 1})
    reader = RunFolder(run.path)
    assert reader.read_config() == {"seed": 1}
    assert reader.read_lines("metrics.jsonl") == [{"round": 1}]
    reader.close()
    assert find_run(run.path.name, root=run.path.parent) == run.path


@pytest.mark.parametrize("error", [OSError(37, "No locks available"), None], ids=["no locks", "no fcntl"])
def test_where_there_are_no_locks_a_run_goes_on_without(run, monkeypatch, error):
    def flock(*_):
        raise error

    if error is None:
        monkeypatch.setattr(runs, "fcntl", None)
    else:
        monkeypatch.setattr(runs.fcntl, "flock", flock)
    run.write_config({})
    RunFolder.open(run.path)


def test_a_folder_without_config_is_no_run_to_go_on_with(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(
            RunError, match="a run that can go on has a config.json, and there is none; name the folder"
        ):
            RunFolder.open(path)
    assert names(tmp_path) == []


def test_a_run_is_opened_under_its_own_name_wherever_a_link_leads(run):
    run.write_config({})
    run.save_round(1, checkpoint("one"), keep=1)
    run.close()
    again = RunFolder.open(run.path.parent / "latest")
    assert again.path == run.path
    again.save_round(2, checkpoint("two"), keep=1)
    assert (run.path.parent / "latest").readlink() == Path(run.path.name)


def test_the_newest_run_to_go_on_with_is_so_by_its_id_and_needs_no_checkpoint(tmp_path):
    with pytest.raises(RunError, match="there is no run to go on with, got .*; start a new one without resume"):
        runs.find_run_to_resume("latest", root=tmp_path)
    for name in ("20260101T000000Z-9", "20260102T000000Z-9", "20260102T000000Z-10", "zzz"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "20270101T000000Z-1").mkdir()
    (tmp_path / "latest").symlink_to("20260101T000000Z-9")
    assert runs.find_run_to_resume("latest", root=tmp_path).name == "20260102T000000Z-10"
    assert find_run("latest", root=tmp_path).name == "20260101T000000Z-9"
    assert runs.find_run_to_resume("20260101", root=tmp_path).name == "20260101T000000Z-9"


@pytest.mark.parametrize("find", [find_run, runs.find_run_to_resume])
def test_names_that_no_run_can_have_are_refused(find, tmp_path):
    with pytest.raises(RunError, match="a run is named by its id, a beginning of it, its folder, or latest, got ''"):
        find("", root=tmp_path)
    for name in ("x" * 300, f"/{'x' * 300}/"):
        with pytest.raises(RunError, match="is not a run in"):
            find(name, root=tmp_path)


# --- the config of a run that goes on ---


def test_the_flower_runs_that_wrote_a_run_are_kept_in_order(run):
    run.write_config({"seed": 1, "flower_run_ids": [77], "versions": {}})
    run.add_flower_run(2**63 + 1)
    run.add_flower_run(5)
    run.add_flower_run(5)
    assert run.read_config() == {"seed": 1, "flower_run_ids": [77, 2**63 + 1, 5], "versions": {}}
    run.write_config({"seed": 1})
    run.add_flower_run(6)
    assert run.read_config() == {"seed": 1, "flower_run_ids": [6]}


def test_a_config_that_is_no_object_is_reported(run):
    (run.path / "config.json").write_text("[1]")
    with pytest.raises(RunError, match=r"config\.json: must hold a JSON object, got \[1\]"):
        run.read_config()


# --- going on ---


def round_of(run, server_round, *, keep=0):
    """What a server writes in a round."""
    run.append("metrics.jsonl", {"round": server_round, "phase": "train", "note": "x\u2028y"})
    run.append("costs.jsonl", {"round": server_round, "device": 0}, {"round": server_round, "device": 1})
    run.append("metrics.jsonl", {"round": server_round, "phase": "validation"})
    run.save_round(server_round, checkpoint(f"round {server_round}"), keep=keep)


def end_of(run, last_round):
    """What it writes after the last."""
    run.append("costs.jsonl", {"round": last_round, "device": "server", "phase": "test"})
    run.append("examples.jsonl", {"text": "a"})
    run.save_folder("device", checkpoint("device"))
    run.append("answers.jsonl", {"text": "b"}, {"text": "c"})
    run.write_results({"rounds": last_round})


def contents(folder):
    """Every file and link, by its path, without the lock."""
    return {
        str(path.relative_to(folder)): str(path.readlink()) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.name != ".lock" and (path.is_symlink() or path.is_file())
    }


@pytest.mark.parametrize("last", [0, 1, 2, 3])
def test_rewinding_undoes_all_that_was_written_after_a_round(run, last):
    run.write_config({"seed": 1})
    before = contents(run.path)
    for server_round in (1, 2, 3):
        round_of(run, server_round)
        if server_round == last:
            before = contents(run.path)
    end_of(run, 3)
    run.rewind(last)
    after = contents(run.path)
    if last == 0:
        assert {after.pop(name) for name in ("metrics.jsonl", "costs.jsonl")} == {b""}
    assert after == before
    assert contents(run.path.parent)["latest"] == run.path.name


def test_rewinding_twice_is_rewinding_once(run):
    for server_round in (1, 2):
        round_of(run, server_round)
    run.rewind(2)
    before = contents(run.path)
    run.rewind(2)
    assert contents(run.path) == before


def test_a_line_that_was_being_written_is_cut(run):
    round_of(run, 1)
    before = contents(run.path)
    with (run.path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"round": 2, "phase": "tr')
    run.rewind(1)
    assert contents(run.path) == before


def test_what_was_left_under_temporary_names_is_removed_and_nothing_else(run):
    round_of(run, 1)
    (run.path / ".notes.txt").write_text("the user's")
    (run.path / "own.jsonl").write_text("the user's")
    before = contents(run.path)
    others = run.path.parent / ".latest.99"
    others.symlink_to("20260101T000000Z-1")
    (run.path.parent / ".latest.98").symlink_to(run.path.name)
    (run.path / ".proxy.4711").symlink_to("rounds/0002/proxy")
    (run.path / ".metrics.jsonl.ab_d3f9h").write_text("half")
    for folder in (".device.tmp", "rounds/.0002.tmp", "rounds/.0001.old", "rounds/0002"):
        (run.path / folder / "proxy").mkdir(parents=True)
    run.rewind(1)
    assert contents(run.path) == before
    assert not (run.path / ".device.tmp").exists()
    assert names(run.path / "rounds") == ["0001"]
    assert names(run.path.parent) == [".latest.99", run.path.name, "latest"]


@pytest.mark.parametrize("link", ["rounds/0001/proxy", "nowhere", None])
def test_links_that_point_elsewhere_are_put_right(run, link):
    for server_round in (1, 2):
        round_of(run, server_round)
    for path, target in ((run.path / "proxy", link), (run.path.parent / "latest", link and "another")):
        path.unlink()
        if target:
            path.symlink_to(target)
    run.rewind(2)
    assert (run.path / "proxy" / "weights").read_text() == "round 2"
    assert find_run(root=run.path.parent) == run.path


def test_a_round_without_checkpoint_cannot_be_gone_back_to(run):
    for server_round in (1, 2, 3):
        round_of(run, server_round, keep=2)
    before = contents(run.path)
    with pytest.raises(RunError, match="round 1 has no complete checkpoint; there are those of rounds: 2, 3"):
        run.rewind(1)
    assert contents(run.path) == before


@pytest.mark.parametrize("spoil", [lambda data: data[:-9], lambda data: b"x" + data, lambda data: None])
def test_lines_that_are_missing_are_reported_before_anything_is_removed(run, spoil):
    for server_round in (1, 2):
        round_of(run, server_round)
    end_of(run, 2)
    path = run.path / "metrics.jsonl"
    data = spoil(path.read_bytes())
    if data is None:
        path.unlink()
    else:
        path.write_bytes(data)
    before = contents(run.path)
    with pytest.raises(RunError, match=r"metrics\.jsonl: must begin with the \d+ bytes that were there when the last"):
        run.rewind(2)
    assert contents(run.path) == before


# --- killed at any moment ---


def written_run(root):
    """All that a run of three rounds writes."""
    run = RunFolder.create(root, 1, now=NOW)
    run.write_config({"seed": 1})
    gone_on_run(run, 0)


def gone_on_run(run, last):
    for server_round in range(last + 1, 4):
        round_of(run, server_round, keep=2)
        if server_round == 2:
            run.save_round(2, checkpoint("round 2"), keep=2)
    end_of(run, 3)


def rewound_run(root):
    run = RunFolder.open(next(root.glob("2*")))
    last = max(run.rounds(), default=0)
    run.rewind(last)
    return run, last


KILLS_AT_EVERY_CHANGE = """
import os, pathlib, signal, sys
sys.path.insert(0, sys.argv[1])
import test_runs

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink", "os.truncate", "os.chmod"}
left = None  # changes that this process may still make

def count(event, arguments):
    global left
    writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if left is not None and (writes or event in CHANGES):
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(count)
os.fsync = lambda handle: None  # what was written outlives a killed process in any case
task, folders = getattr(test_runs, sys.argv[2]), map(pathlib.Path, sys.argv[3:])
for number, folder in enumerate(folders):
    child = os.fork()
    if child == 0:
        left = number
        task(folder)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    print(status)
"""


def killed_at_every_change(task, folders):
    """Run a task of this module once a folder, killed before its first, its second, ... change of the file system."""
    program = [sys.executable, "-c", KILLS_AT_EVERY_CHANGE, str(Path(__file__).parent), task.__name__]
    done = subprocess.run([*program, *map(str, folders)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    statuses = [int(line) for line in done.stdout.split()]
    assert statuses[-1] == 0, "there are more changes than folders"
    assert statuses == sorted(statuses, reverse=True)
    return folders[: statuses.index(0)]


def assert_like_an_unbroken_run(root, expected):
    found = contents(root)
    # An old checkpoint is removed when the next is saved; after the last round nobody comes to do it.
    old = {name for name in found if "rounds/0001/" in name}
    assert {name: found[name] for name in found.keys() - old} == expected


@pytest.fixture
def unbroken(tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda handle: None)
    written_run(tmp_path / "unbroken")
    return contents(tmp_path / "unbroken")


def test_a_run_that_is_killed_at_any_moment_goes_on_to_the_same_folder(tmp_path, unbroken):
    killed = killed_at_every_change(written_run, [tmp_path / f"{number:03d}" for number in range(200)])
    assert len(killed) > 60
    lasts = []
    for root in killed:
        if not list(root.glob("2*/config.json")):  # killed so early that nothing is lost
            continue
        reader = RunFolder(next(root.glob("2*")))
        for server_round in reader.rounds():
            assert names(reader.round_path(server_round)) == ["arrays", "lines.json", "proxy", "round.json"]
            assert (reader.round_path(server_round) / "proxy" / "weights").read_text() == f"round {server_round}"
        run, last = rewound_run(root)
        gone_on_run(run, last)
        lasts.append(last)
        run.close()
        assert_like_an_unbroken_run(root, unbroken)
    assert lasts == sorted(lasts)
    assert {0, 1, 2, 3} == set(lasts)


def test_rewinding_that_is_killed_at_any_moment_can_be_done_again(tmp_path, unbroken):
    broken = tmp_path / "broken"
    written_run(broken)
    run = next(broken.glob("2*"))
    (run / "rounds" / "0003").rename(run / "rounds" / ".0003.tmp")  # killed before round 3 was complete, and
    (run / "rounds" / "0002").rename(run / "rounds" / ".0002.old")  # while another 2 was put in its place
    (run / ".proxy.4711").symlink_to("rounds/0003/proxy")
    (broken / ".latest.4711").symlink_to(run.name)
    folders = [tmp_path / f"{number:03d}" for number in range(60)]
    for folder in folders:
        shutil.copytree(broken, folder, symlinks=True)
    killed = killed_at_every_change(rewound_run, folders)
    assert len(killed) > 15
    for root in killed:
        again, last = rewound_run(root)
        assert last == 2
        gone_on_run(again, last)
        assert_like_an_unbroken_run(root, unbroken)


# --- a full disk ---

LIMIT = 20_000


def with_full_disk(folder, code):
    """Run ``code`` where no file may grow beyond ``LIMIT`` bytes; writing on fails as on a full disk."""
    program = f"""
import pathlib, resource, signal, sys
from fedpt_flwr.errors import RunError
from fedpt_flwr.runs import RunFolder, write_file, write_json
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({LIMIT}, {LIMIT}))
folder = pathlib.Path(sys.argv[1])
try:
{textwrap.indent(code, "    ")}
except RunError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


SENTENCE = (
    "cannot be written (File too large); free some space or write elsewhere (a run: set output-dir); "
    "what was written before is whole"
)


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="the system has no limit on file sizes")
def test_a_full_disk_leaves_every_earlier_file_line_and_checkpoint_as_it_was(tmp_path):
    write_file(tmp_path / "a.json", b"whole")
    run = RunFolder(tmp_path)
    rows = [{"n": number, "text": "x" * 90} for number in range(160)]
    run.append("metrics.jsonl", *rows)
    assert LIMIT - 3000 < (tmp_path / "metrics.jsonl").stat().st_size < LIMIT  # there is room for a part of a line
    run.save_round(1, checkpoint("one"), keep=1)
    said = with_full_disk(
        tmp_path,
        f"""
for attempt in (
    lambda: write_file(folder / "a.json", b"x" * {10 * LIMIT}),
    lambda: write_json(folder / "new.json", "x" * {10 * LIMIT}),
    lambda: RunFolder(folder).append("metrics.jsonl", {{"text": "y" * {2 * LIMIT}}}),
    lambda: RunFolder(folder).append("metrics.jsonl", {{"text": "y" * 3000}}),
    lambda: RunFolder(folder).append("metrics.jsonl", *[{{"n": n, "text": "z" * 90}} for n in range(200)]),
    lambda: RunFolder(folder).append("costs.jsonl", {{"text": "y" * {2 * LIMIT}}}),
    lambda: RunFolder(folder).save_round(2, lambda f: (f / "proxy").write_bytes(b"x" * {10 * LIMIT}), keep=1),
    lambda: RunFolder(folder).save_round(1, lambda f: (f / "proxy").write_bytes(b"x" * {10 * LIMIT}), keep=1),
    lambda: RunFolder(folder).save_round(2, lambda f: write_file(f / "w", b"x" * {10 * LIMIT}), keep=1),
):
    try:
        attempt()
        print("nothing was raised")
    except RunError as error:
        print(str(error).replace(str(folder), ""))
""",
    ).splitlines()
    places = ["a.json", "new.json", *3 * ["metrics.jsonl"], "costs.jsonl", "rounds/0002", "rounds/0001"]
    assert said[:8] == [f"/{place}: {SENTENCE}" for place in places]
    assert said[8].endswith(f"/w: {SENTENCE}")
    assert (tmp_path / "a.json").read_bytes() == b"whole"
    assert run.read_lines("metrics.jsonl") == rows
    assert run.read_lines("costs.jsonl") == []
    assert (tmp_path / "proxy" / "weights").read_text() == "one"
    assert names(tmp_path / "rounds") == ["0001"]
    assert names(tmp_path) == ["a.json", "costs.jsonl", "metrics.jsonl", "proxy", "rounds"]


def test_lines_can_be_added_again_after_a_failed_attempt(run):
    rows = [{"n": 1}, {"n": 2}]
    run.append("metrics.jsonl", rows[0])
    with_full_disk(run.path, f'RunFolder(folder).append("metrics.jsonl", {{"text": "y" * {2 * LIMIT}}})')
    run.append("metrics.jsonl", rows[1])
    assert [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()] == rows
