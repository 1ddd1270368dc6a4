"""What is installed, bundled and imported."""

import importlib.util
import itertools
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def modules():
    has_triton = importlib.util.find_spec("triton") is not None  # comes with builds of torch for GPUs
    for path in sorted((ROOT / "fedpt_flwr").rglob("*.py")):
        if path.stem == "fused" and not has_triton:
            continue
        yield ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    yield from ("client_app", "server_app")


@pytest.mark.slow
def test_modules_import_in_a_strange_folder_without_output_or_files(tmp_path):
    """One process for all: each import is a statement of its own, with warnings of our own modules as errors."""
    code = "import sys, warnings\nwarnings.filterwarnings('error', module=r'fedpt_flwr|client_app|server_app')\n"
    code += f"sys.path.insert(0, {str(ROOT)!r})\n" + "\n".join(f"import {name}" for name in modules())
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_the_package_itself_is_imported_at_once():
    code = "import sys, fedpt_flwr; print({'torch', 'flwr'} & set(sys.modules), 'ProxyModel' in dir(fedpt_flwr))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "set() True\n"


def test_uv_excludes_every_direct_dependency():
    """Otherwise `flwr run` asks a registry, and installs another torch beside the one that pip chose."""
    project = PROJECT["project"]
    extras = itertools.chain.from_iterable(project["optional-dependencies"].values())
    wanted = [*project["dependencies"], *extras]
    names = {re.match(r"[\w-]+", dependency).group() for dependency in wanted} - {project["name"]}
    assert set(PROJECT["tool"]["uv"]["exclude-dependencies"]) == names


def test_no_federations_section_that_flower_would_move_out_of_the_file():
    assert "federations" not in PROJECT["tool"]["flwr"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    out = tmp_path_factory.mktemp("bundle")
    command = [str(Path(sys.executable).with_name("flwr")), "build", "--app", str(ROOT)]
    result = subprocess.run(command, cwd=out, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return next(out.glob("*.fab"))


def test_the_bundle_holds_the_code_and_neither_tests_nor_data(bundle):
    assert bundle.stat().st_size < 3_000_000  # Flower takes 10 MB
    names = set(zipfile.ZipFile(bundle).namelist())
    for path in (ROOT / "fedpt_flwr").rglob("*.py"):
        assert str(path.relative_to(ROOT)) in names
    assert {"client_app.py", "server_app.py", "pyproject.toml", "LICENSE"} <= names
    assert not [name for name in names if name.startswith(("tests/", "fedpt_demo_world/", "docs/"))]


@pytest.mark.slow
def test_the_bundles_code_has_the_hash_of_the_checkout(bundle, tmp_path):
    """A device that runs the bundle and a server that runs the checkout agree that they run the same code."""
    zipfile.ZipFile(bundle).extractall(tmp_path)
    code = "from pathlib import Path; from fedpt_flwr.records import code_hash; print(code_hash(Path('client_app.py')))"
    hashes = {
        subprocess.run([sys.executable, "-c", code], cwd=where, capture_output=True, text=True, check=True).stdout
        for where in (ROOT, tmp_path)
    }
    assert len(hashes) == 1
