import os
import time

import numpy as np
import pytest
from safetensors.numpy import save

from fedpt_flwr.errors import RunError
from fedpt_flwr.residual import Residuals

RUN, OTHER = "0123456789abcdef", "f" * 16
SHAPES = {"w": (2, 3), "scale": ()}


def residual(value):
    return {"w": np.full((2, 3), value, np.float32), "scale": np.array(value, np.float32)}


def files(root):
    return sorted(str(path.relative_to(root)) for path in root.rglob("*.safetensors"))


def test_what_a_round_lost_is_found_again_by_its_number_alone(tmp_path):
    Residuals(RUN, 3, root=tmp_path).write(1, residual(0.5), keep=0)
    again = Residuals(RUN, 3, root=tmp_path)
    assert {name: float(values.max()) for name, values in again.read(1, SHAPES).items()} == {"w": 0.5, "scale": 0.5}
    assert again.read(0, SHAPES) == again.read(2, SHAPES) == {}
    assert Residuals(RUN, 4, root=tmp_path).read(1, SHAPES) == Residuals(OTHER, 3, root=tmp_path).read(1, SHAPES) == {}


def test_only_what_can_be_asked_for_again_is_kept(tmp_path):
    kept = Residuals(RUN, 0, root=tmp_path)
    kept.write(1, residual(1), keep=0)
    kept.write(2, residual(2), keep=1)  # round 2 may be repeated, from what round 1 lost
    assert files(tmp_path) == [f"{RUN}/0/0001.safetensors", f"{RUN}/0/0002.safetensors"]
    kept.write(2, residual(3), keep=1)
    kept.write(5, residual(5), keep=2)
    assert files(tmp_path) == [f"{RUN}/0/0002.safetensors", f"{RUN}/0/0005.safetensors"]
    assert kept.read(2, SHAPES)["scale"] == 3


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x04nonsense",
        save({"w": np.zeros((2, 3), np.float32)}),
        save({"w": np.zeros((3, 2), np.float32), "scale": np.array(0, np.float32)}),
        save({"w": np.zeros((2, 3), np.float64), "scale": np.array(0, np.float32)}),
        save({"w": np.full((2, 3), np.nan, np.float32), "scale": np.array(0, np.float32)}),
    ],
    ids=["empty", "pickle", "an array is missing", "another shape", "another type", "not finite"],
)
def test_a_damaged_file_is_as_good_as_none(data, tmp_path):
    kept = Residuals(RUN, 0, root=tmp_path)
    kept.write(1, residual(1), keep=0)
    (tmp_path / RUN / "0" / "0001.safetensors").write_bytes(data)
    assert kept.read(1, SHAPES) == {}


@pytest.mark.parametrize("name", ["", "..", "../../etc", "0123456789ABCDEF", "0" * 17, "0" * 16 + "\n"])
def test_a_name_out_of_a_message_becomes_no_path(name, tmp_path):
    with pytest.raises(RunError, match="16 hexadecimal digits"):
        Residuals(name, 0, root=tmp_path)


def test_runs_that_have_not_gone_on_for_a_month_are_removed_and_nothing_else(tmp_path):
    Residuals(RUN, 0, root=tmp_path).write(1, residual(1), keep=0)
    (tmp_path / "somebody-elses" / "folder").mkdir(parents=True)
    month_ago = time.time() - 31 * 24 * 3600
    for folder in (tmp_path / RUN / "0", tmp_path / "somebody-elses" / "folder"):
        os.utime(folder, (month_ago, month_ago))
    Residuals(OTHER, 0, root=tmp_path).write(1, residual(1), keep=0)
    assert files(tmp_path) == [f"{OTHER}/0/0001.safetensors"]
    assert (tmp_path / "somebody-elses" / "folder").is_dir()


def test_they_lie_beside_the_runs_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDPT_HOME", str(tmp_path))
    Residuals(RUN, 7).write(12, residual(1), keep=0)
    assert files(tmp_path) == [f"devices/{RUN}/7/0012.safetensors"]


def test_a_disk_that_cannot_be_written_is_said_in_a_sentence(tmp_path):
    (tmp_path / RUN).write_text("a file in the way")
    with pytest.raises(RunError, match="cannot be written"):
        Residuals(RUN, 0, root=tmp_path).write(1, residual(1), keep=0)
