"""The deployment engine for real: TLS, authenticated nodes, each with data of its own, and everything that can fail."""

import contextlib
import csv
import itertools
import json
import os
import signal
import subprocess
import time

import numpy as np
import pytest
from deployment import Deployment, wait_until
from federation import federate, final_arrays
from pyarrow import Table, parquet

from fedpt_flwr.certs import make_certs
from fedpt_flwr.data import read_records
from fedpt_flwr.proxy import ProxyModel

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

OWN_DATA = {"data.partitioner": "node-local", "data.train": ""}


def write_own_data(folder):
    """A file for each device, each of another format, with words that are nowhere else."""
    folder.mkdir()
    records = [record | {"kind": f"secretkind{n % 2}"} for n, record in enumerate(read_records("demo:train")[:24])]
    for number, record in enumerate(records):
        record["request"] = f"confidential {number} {record['request']}"
        record["answer"] = f"classified {number} {record['answer']}"
    with (folder / "ward-a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]))
        writer.writeheader()
        writer.writerows(records[:12])
    parquet.write_table(Table.from_pylist(records[12:]), folder / "ward-b.parquet")
    return [folder / "ward-a.csv", folder / "ward-b.parquet"], records


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deployment")
    files, records = write_own_data(folder / "patients")
    deployment = Deployment(folder, files)
    deployment.records, deployment.data_files = records, files
    yield deployment
    deployment.stop()


def assert_same_arrays(expected, got):
    expected, got = final_arrays(expected), final_arrays(got)
    assert expected.keys() == got.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(values, got[name], err_msg=name)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same run in this process; tests/test_simulation.py holds that a simulation gives its arrays, bit for bit."""
    return federate(tmp_path_factory.mktemp("alone"), 2)


@pytest.fixture(scope="module")
def first(site):
    """A run while strangers try to get in: its folder, and the processes of the strangers by name."""
    strangers = start_strangers(site)
    run = site.run({})
    yield run, strangers
    for stranger in strangers.values():
        stranger.stop()


def start_strangers(site):
    """SuperNodes that do not belong: each should end by itself, and none should come in."""
    other = make_certs(site.folder / "other-certs", num_nodes=1).folder
    data, settings = site.data_files[0], {"port": site.port, "num_nodes": 9, "restart_s": None}
    return {
        "unregistered": site.start_node(2, data, name="unregistered", **settings),
        "another's key": site.start_node(3, data, name="another", key=site.key(0), **settings),
        "no key": site.start_node(4, data, name="keyless", key="", **settings),
        "another CA": site.start_node(
            5, data, name="other-ca", key=site.key(2), tls=["--root-certificates", other / "ca.crt"], **settings
        ),
        "no TLS": site.start_node(6, data, name="plain", key="", tls=["--insecure"], **settings),
        "executor without the secret": site.start(
            "thief",
            [
                "flower-superexec", "--root-certificates", site.certs / "ca.crt",
                "--runtime-api-address", f"127.0.0.1:{site.port}",
            ],
            restart_s=None,
        ),
    }  # fmt: skip


def test_a_deployment_ends_with_the_arrays_of_a_simulation(site, first, alone):
    assert_same_arrays(alone, first[0])


def test_nobody_gets_in_who_does_not_belong(site, first):
    strangers = dict(first[1])
    # Without TLS there is not even an answer: it goes on trying, as a node does whose SuperLink is away.
    plain, thief = strangers.pop("no TLS"), strangers.pop("executor without the secret")
    assert plain.exit_codes == []
    assert "Connection attempt failed" in plain.log
    assert "SuperNode ID" not in plain.log
    wait_until(lambda: thief.exit_codes, 30, "the executor without the secret gives up")
    assert not thief.children("flwr-serverapp")
    for name, stranger in strangers.items():
        wait_until(lambda stranger=stranger: stranger.exit_codes, 30, f"the node with {name} gives up")
        assert stranger.exit_codes == [1], name
        assert "Exit Code: 305" in stranger.log, name
        assert "SuperNode ID" not in stranger.log, name
    assert "Failed to activate SuperNode" in strangers["unregistered"].log
    assert "certificate verify failed" in strangers["another CA"].log
    assert site.online() == 2


def test_flwr_without_tls_or_with_another_ca_is_refused(site):
    other = make_certs(site.folder / "cli-certs").folder
    for name, ca in (("cli-plain", None), ("cli-other", other / "ca.crt")):
        result = site.try_flwr("list", "prod", home=site.connection(name, ca))
        assert result.returncode == 1, name
        assert "Connection to the SuperLink is unavailable" in result.stdout + result.stderr, name


TRAIN = "Receiving: train message"


def rows_of(run, device):
    """The refusals of a device's rounds, in their order; an empty one where its reply was used."""
    lines = [json.loads(line) for line in (run / "costs.jsonl").read_text().splitlines()]
    return [row.get("refused", "") for row in lines if row["device"] == device]


def test_a_superlink_that_comes_back_and_a_wire_that_is_cut_for_seconds_lose_nothing(site, alone):
    before = site.nodes[1].count(TRAIN)
    run_id = site.submit({})
    site.training(site.nodes[1], before + 1)
    site.superlink.kill()
    site.training(site.nodes[1], before + 2, timeout_s=180)
    site.relays[1].cut()
    time.sleep(8)
    site.relays[1].mend()
    assert_same_arrays(alone, site.complete(run_id))
    assert site.superlink.exit_codes == [-signal.SIGKILL]


def test_a_run_whose_serverapp_was_killed_is_resumed_to_the_same_arrays(site, alone):
    run_id = site.submit({})
    folder = site.run_folder(run_id)
    wait_until(lambda: (folder / "rounds/0001").exists(), 120, "round 1 is complete")
    for process in site.executor.children("flwr-serverapp"):
        os.kill(process, signal.SIGKILL)
    again = site.submit({"resume": folder.name})
    wait_until(lambda: site.is_finished(again), 240, "the resumed run ends")
    assert site.entry(again)["status"] == "finished:completed", site.log(again)
    assert_same_arrays(alone, folder)
    assert site.wait(run_id)["status"] == "finished:failed"


def test_a_device_that_hangs_past_the_deadline_costs_its_reply_only(site):
    before = site.nodes[1].count(TRAIN)
    run_id = site.submit({"round-timeout-s": 30.0, "min-replies": 1})
    hanging = site.training(site.nodes[1], before + 1)
    os.kill(hanging, signal.SIGSTOP)
    folder = site.run_folder(run_id)
    wait_until(lambda: (folder / "rounds/0001").exists(), 120, "round 1 goes on without it")
    os.kill(hanging, signal.SIGCONT)
    refused = rows_of(site.complete(run_id), 1)
    assert "no reply came in time" in refused[0]
    assert rows_of(folder, 0) == ["", ""]


def test_what_a_device_makes_up_is_refused_with_the_reason_and_changes_nothing(site, tmp_path):
    site.tamper_file.write_text("1 nan\n2 shape\n3 garbage\n4 raise\n")
    settings = {"num-server-rounds": 4, "min-replies": 1}
    run = site.run(settings)
    site.tamper_file.unlink()
    reasons = rows_of(run, 1)
    for reason, said in zip(
        reasons, ("not finite", "must have shape", "one record of arrays", "out of paper"), strict=True
    ):
        assert said in reason

    def silence(device, message, reply):
        return None if device == 1 and message.metadata.message_type == "train" else reply

    silent = federate(tmp_path, 2, settings, tamper=silence)
    assert_same_arrays(silent, run)


def test_a_supernode_that_is_killed_costs_its_reply_and_is_waited_for(site):
    before, ends = site.nodes[1].count(TRAIN), len(site.nodes[1].exit_codes)
    run_id = site.submit({"min-replies": 1, "round-timeout-s": 150.0})
    site.training(site.nodes[1], before + 1)
    site.nodes[1].kill()
    refused = rows_of(site.complete(run_id), 1)
    assert refused[0]
    assert refused[1] == ""
    # It is started at once, and refused until the SuperLink has noticed that it was gone.
    codes = site.nodes[1].exit_codes[ends:]
    assert codes[0] == -signal.SIGKILL
    assert set(codes[1:]) <= {1}


def test_a_device_whose_client_the_oom_killer_ends_is_left_out_and_comes_back(site):
    ends = len(site.nodes[1].exit_codes)
    site.tamper_file.write_text("1 die\n")
    refused = rows_of(site.run({"round-timeout-s": 200.0, "min-replies": 1}), 1)
    site.tamper_file.unlink()
    assert "ClientApp stopped responding" in refused[0]
    assert refused[1] == "", refused
    assert len(site.nodes[1].exit_codes) == ends  # the SuperNode itself went on


@pytest.fixture
def small_disk(tmp_path):
    """A disk of some megabytes, in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=32m", "fedpt-test", str(folder)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if mount.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mount.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(disk):
    """Take all the space that is left on a disk."""
    filler = disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return filler


def test_a_disk_that_fills_up_fails_the_run_with_a_sentence_and_it_goes_on_when_there_is_space(site, alone, small_disk):
    settings = {"output-dir": str(small_disk)}
    run_id = site.submit(settings)
    wait_until(lambda: list(small_disk.glob("*/rounds/0001")), 180, "round 1 is complete")
    filler = fill(small_disk)
    assert site.wait(run_id)["status"] == "finished:failed"
    said = [line for line in site.log(run_id).splitlines() if "FEDPT-RUN-FAILED" in line]
    assert "No space left on device" in said[-1]
    assert "what was written before is whole" in said[-1]
    (folder,) = small_disk.glob(f"*-{run_id}")
    assert [path.name for path in (folder / "rounds").iterdir()] == ["0001"]
    assert ProxyModel.from_pretrained(folder)
    filler.unlink()
    again = site.submit(settings | {"resume": folder.name})
    assert site.wait(again)["status"] == "finished:completed", site.log(again)
    assert_same_arrays(alone, folder)


NUM_BIG = 6000
MAX_DATA_MB = 2500
"""Far more than a ClientApp reserves for a moment while it imports its libraries (1520), and far less than a batch of
:data:`NUM_BIG` needs (1900 take 1260 to 1560 besides the 470 of the libraries)."""


@pytest.fixture
def unequal(tmp_path):
    """Three devices: one with limits, one that has too little memory and knows, one that has and does not."""
    files, _ = write_own_data(tmp_path / "data")
    files.append(tmp_path / "data" / "big.jsonl")
    big = itertools.islice(itertools.cycle(read_records("demo:train")), NUM_BIG)
    files[2].write_text("".join(json.dumps(record) + "\n" for record in big))
    node_settings = {
        0: {"limits": 'max-batch-size=5 max-steps=1 dtype="bfloat16" threads=2 memory-limit-mb=4000'},
        1: {"limits": "memory-limit-mb=300"},
        2: {"max_data_mb": MAX_DATA_MB},
    }
    deployment = Deployment(tmp_path / "site", files, node_settings)
    yield deployment
    deployment.stop()


def test_unequal_devices_do_what_they_can_or_say_why_not(unequal):
    run = unequal.run(OWN_DATA | {"train.batch-size": NUM_BIG, "min-replies": 1, "min-devices": 3})
    lines = [json.loads(line) for line in (run / "costs.jsonl").read_text().splitlines()]
    rows = {number: [row for row in lines if row["device"] == number] for number in range(3)}
    assert [len(part) for part in rows.values()] == [2, 2, 2]
    limits = {"max-batch-size": 5, "max-steps": 1, "dtype": "bfloat16", "threads": 2, "memory-limit-mb": 4000}
    for row in rows[0]:
        assert row["limits"] == limits
        assert (row["num_steps"], row["batch_size"], row["num_examples_seen"]) == (1, 5, 12)
        assert 0 < row["memory_growth_bytes"] < row["memory_estimate_bytes"] < 4e9
    for row in rows[1]:
        assert row["limits"] == {"memory-limit-mb": 300}
        assert row["refused"].startswith(f"device 1, round {row['round']}: training would take about ")
        assert "more than this device's memory-limit-mb, got 300" in row["refused"]
    for row in rows[2]:
        assert row["refused"].startswith("device 2: it ran out of memory; lower max-batch-size"), row
    assert "can't allocate memory" in unequal.nodes[2].log
    assert [node.exit_codes for node in unequal.nodes] == [[], [], []]
