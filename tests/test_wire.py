"""Whole federations with arrays of half the bytes, and with models that rest while devices train."""

import json

import numpy as np
import pytest
from federation import federate, final_arrays

import server_app

SHORT = {"num-server-rounds": 2, "distillation.mode": "off", "scoring.num-items": 2, "scoring.few-shot": 0}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return federate(tmp_path_factory.mktemp("whole"), 2, SHORT)


def bytes_of(run):
    rows = [json.loads(line) for line in (run / "costs.jsonl").read_text().splitlines()]
    return [row[key] for row in rows for key in ("bytes_down", "bytes_up") if "bytes_up" in row]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_run_with_half_the_bytes_ends_near_the_run_with_all(dtype, whole, tmp_path):
    run = federate(tmp_path, 2, SHORT | {"wire.dtype": dtype})
    for name, values in final_arrays(run).items():
        assert values.dtype == np.float32
        np.testing.assert_allclose(values, final_arrays(whole)[name], atol=0.02, err_msg=name)
    for half, full in zip(bytes_of(run), bytes_of(whole), strict=True):
        assert 0.5 * full < half < 0.52 * full


@pytest.mark.slow
def test_models_that_rest_while_devices_train_change_no_array(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(server_app, "WORTH_RESTING_BYTES", 0)
    run = federate(tmp_path, 2, SHORT)
    for name, values in final_arrays(run).items():
        np.testing.assert_array_equal(values, final_arrays(whole)[name], err_msg=name)
    rows, expected = (json.loads((folder / "results.json").read_text())["rows"] for folder in (run, whole))
    assert rows.keys() == expected.keys()
    for name in rows:
        assert rows[name]["loss"] == pytest.approx(expected[name]["loss"], rel=1e-5)
