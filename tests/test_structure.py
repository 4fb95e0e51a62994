"""The house rules that a reader relies on: what is public, what an import costs, names that modules had before.

Which way imports point is in pyproject.toml, for import-linter, which `make lint` runs.
"""

import subprocess
import sys
from pathlib import Path

from fastdmd._former_names import MOVED

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fastdmd"


def test_the_public_names():
    """All of them are there, and none is loaded before it is asked for."""
    code = """
import sys, fastdmd
assert "torch" not in sys.modules
assert [name for name in sys.modules if name.startswith("fastdmd.")] == ["fastdmd._former_names"]
assert set(fastdmd.__all__) <= set(dir(fastdmd))
for name in fastdmd.__all__:
    assert getattr(fastdmd, name) is not None
try:
    fastdmd.nothing
except AttributeError as error:
    print(error)
from fastdmd import *
print(load_teacher("mnist").num_classes, load_teacher.__module__, Generator.__name__, ops.dm_loss.__name__)
"""
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines == ["module 'fastdmd' has no attribute 'nothing'", "10 fastdmd.teachers.sources Generator dm_loss"]
    assert (PACKAGE / "py.typed").exists()


def test_ops_come_alone():
    """`from fastdmd import ops` loads torch and nothing that another trainer has no use for, or not yet."""
    code = "import sys; from fastdmd import ops; print(' '.join(sorted(sys.modules)))"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    mine = {name for name in modules if name.startswith("fastdmd.")}
    assert mine and all(name.startswith(("fastdmd.ops", "fastdmd._")) for name in mine)
    assert not {"PIL", "tyro", "safetensors"} & set(modules)
    assert not {"torch._dynamo", "torch._inductor", "triton", "sympy"} & set(modules)


def test_former_names_are_the_same_modules():
    code = """
import importlib, sys, warnings
from fastdmd._former_names import MOVED
for name, home in MOVED.items():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DeprecationWarning)
        exec(f"from fastdmd import {name} as former")
    today = importlib.import_module(f"fastdmd.{home}")
    assert former is today and former.__spec__.name == today.__name__ and sys.modules[f"fastdmd.{name}"] is today, name
    print(*(warning.message for warning in caught if "fastdmd" in str(warning.message)))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    told = [f"fastdmd.{name} is fastdmd.{home} now" for name, home in MOVED.items()]
    assert told and run.stdout.splitlines() == told


def test_files_stay_rooms():
    files = [path for name in ("fastdmd", "tests", "benchmarks") for path in (ROOT / name).rglob("*.py")]
    assert len(files) > 200
    assert {str(path): n for path in files if (n := len(path.read_text().splitlines())) > 320} == {}


def test_the_tests_mirror_the_package():
    """A folder for each of its folders, all of them packages: two files of one name do not clash. A folder that pytest
    or ruff leaves out, as they do `build` and `dist`, would be tests that nobody runs."""
    folders = {path.parent for path in (ROOT / "tests").rglob("test_*.py")}
    assert all((folder / "__init__.py").exists() for folder in folders)
    mirrored = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert mirrored and mirrored <= {folder.name for folder in folders}
    assert not {"build", "dist", "venv"} & {folder.name for folder in folders}
