"""The kit of packages for a machine without a network."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from benchmarks import kit


def wheel(folder, name, version="1.0"):
    """A package of one module that says where it comes from."""
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as file:
        file.writestr(f"{name}.py", "origin = 'kit'")
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")


def test_the_kit_gives_what_is_missing_and_no_more(stage, tmp_path, monkeypatch):
    monkeypatch.setattr(kit, "FOLDER", tmp_path / "kit")
    monkeypatch.setattr(kit, "PACKAGES", {"numpy": "numpy", "only_in_the_kit": "only_in_the_kit"})
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    assert kit.install(tmp_path / "without") == []  # no kit, nothing to do
    assert stage("-c", "pass", needs=("only_in_the_kit",))["outcome"].startswith("not started")
    kit.FOLDER.mkdir()
    wheel(kit.FOLDER, "only_in_the_kit")
    assert kit.install(tmp_path / "site") == ["only_in_the_kit"]
    assert not (tmp_path / "site" / "numpy").exists()
    code = "import only_in_the_kit, os; print(only_in_the_kit.origin, os.environ['PYTHONPATH'].endswith(':/elsewhere'))"
    assert stage("-c", code, needs=("only_in_the_kit",))["output"] == ["kit True"]


def test_a_kit_is_whole_or_as_it_was(tmp_path, monkeypatch):
    """`pip download` fails for the third Python: the earlier kit stays, and nothing lies beside it."""
    monkeypatch.setattr(kit, "ROOT", tmp_path)
    monkeypatch.setattr(kit, "FOLDER", tmp_path / ".gpu-kit")
    calls, fails = [], True

    def run(command, check):
        calls.append(command)
        if fails and len(calls) == 3:
            raise subprocess.CalledProcessError(1, command)
        folder = Path(next(part for part in command if part.startswith("--dest=")).removeprefix("--dest="))
        folder.mkdir(exist_ok=True)
        wheel(folder, f"package{len(calls)}")

    monkeypatch.setattr(subprocess, "run", run)
    kit.FOLDER.mkdir()
    (kit.FOLDER / "earlier.whl").write_text("")
    with pytest.raises(SystemExit, match="^benchmarks.kit: error: expected pip to find every wheel, got its exit code"):
        kit.main([])
    assert [path.name for path in tmp_path.iterdir()] == [".gpu-kit"]
    assert [path.name for path in kit.FOLDER.iterdir()] == ["earlier.whl"]
    calls.clear()
    fails = False
    kit.main([])
    assert [path.name for path in tmp_path.iterdir()] == [".gpu-kit"] and len(list(kit.FOLDER.iterdir())) == 3
    assert [part for part in calls[0] if part.startswith("--python-version")] == ["--python-version=3.10"]
    assert {"tyro", "pillow", "exceptiongroup"} <= set(calls[2])
