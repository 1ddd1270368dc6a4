"""The deployment engine for real: TLS, authenticated nodes, each with data of its own, and everything that can fail."""

import csv
import json
import os
import re
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from deployment import Deployment, wait_until
from federation import federate, final_arrays
from pyarrow import Table, parquet

from fedpt_flwr.certs import make_certs
from fedpt_flwr.data import read_records

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

OWN_DATA = {"data.partitioner": "node-local", "data.train": ""}


def write_own_data(folder):
    """A file for each device, of another format each, with words that are nowhere else."""
    folder.mkdir()
    records = [record | {"kind": f"secretkind{n % 2}"} for n, record in enumerate(read_records("demo:train")[:36])]
    for number, record in enumerate(records):
        record["request"] = f"confidential {number} {record['request']}"
        record["answer"] = f"classified {number} {record['answer']}"
    (folder / "ward-a.jsonl").write_text("\n".join(map(json.dumps, records[:12])))
    with (folder / "ward-b.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]))
        writer.writeheader()
        writer.writerows(records[12:24])
    parquet.write_table(Table.from_pylist(records[24:]), folder / "ward-c.parquet")
    return [folder / "ward-a.jsonl", folder / "ward-b.csv", folder / "ward-c.parquet"], records


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deployment")
    files, records = write_own_data(folder / "patients")
    deployment = Deployment(folder, files)
    deployment.records = records
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
    torch.set_num_threads(1)
    return federate(tmp_path_factory.mktemp("alone"), 3)


def test_a_deployment_ends_with_the_arrays_of_a_simulation(site, alone):
    assert_same_arrays(alone, site.run({}))
    # So the relays do see what devices send: here the demo world's group names.
    assert all(b'"heater"' in relay.text() or b"groups" in relay.text() for relay in site.relays)
