"""Whole federations with arrays of half the bytes, and with models that rest while devices train."""

import json

import numpy as np
import pytest
from federation import federate, final_arrays

SHORT = {"num-server-rounds": 2, "distillation.mode": "off", "scoring.num-items": 2, "scoring.few-shot": 0}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return federate(tmp_path_factory.mktemp("whole"), 2, SHORT)


def bytes_of(run):
    rows = [json.loads(line) for line in (run / "costs.jsonl").read_text().splitlines()]
    return [row[key] for row in rows for key in ("bytes_down", "bytes_up") if "bytes_up" in row]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_a_run_with_half_the_bytes_ends_near_the_run_with_all(dtype, whole, tmp_path):
    run = federate(tmp_path, 2, SHORT | {"wire.dtype": dtype})
    for name, values in final_arrays(run).items():
        assert values.dtype == np.float32
        np.testing.assert_allclose(values, final_arrays(whole)[name], atol=0.02, err_msg=name)
    for half, full in zip(bytes_of(run), bytes_of(whole), strict=True):
        assert 0.5 * full < half < 0.52 * full


def test_8_bits_are_a_quarter_of_the_bytes_up_and_half_of_them_down(whole, tmp_path, monkeypatch):
    monkeypatch.setenv("FEDPT_HOME", str(tmp_path / "home"))
    run = federate(tmp_path / "runs", 2, SHORT | {"wire.dtype": "int8"})
    for name, values in final_arrays(run).items():
        np.testing.assert_allclose(values, final_arrays(whole)[name], atol=0.02, err_msg=name)
    for short, full, part in zip(bytes_of(run), bytes_of(whole), [0.5, 0.25] * 4, strict=True):
        assert part * full < short < (part + 0.03) * full
    kept = {path.name for path in (tmp_path / "home" / "devices").rglob("*") if path.is_file()}
    assert kept == {"0001.safetensors", "0002.safetensors"}


@pytest.mark.slow
def test_what_devices_kept_is_missed_and_not_needed(whole, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("FEDPT_HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "devices").write_text("a file in the way: nothing can be kept")
    run = federate(tmp_path / "runs", 2, SHORT | {"wire.dtype": "int8"})
    for name, values in final_arrays(run).items():
        np.testing.assert_allclose(values, final_arrays(whole)[name], atol=0.02, err_msg=name)
    assert "what this answer lost cannot be kept" in caplog.text
    assert "Device 0 has not what its answer of round 1 lost, and begins without" in caplog.text


@pytest.mark.slow
def test_models_that_rest_while_devices_train_change_no_array(whole, tmp_path, monkeypatch):
    monkeypatch.setattr("fedpt_flwr.server.WORTH_RESTING_BYTES", 0)
    run = federate(tmp_path, 2, SHORT)
    for name, values in final_arrays(run).items():
        np.testing.assert_array_equal(values, final_arrays(whole)[name], err_msg=name)
    rows, expected = (json.loads((folder / "results.json").read_text())["rows"] for folder in (run, whole))
    assert rows.keys() == expected.keys()
    for name in rows:
        assert rows[name]["loss"] == pytest.approx(expected[name]["loss"], rel=1e-5)
