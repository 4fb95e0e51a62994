"""Pipes, devices, foreign names and long files in the folder of a run: a line, no wait, and nothing of it changes."""

import hashlib
import json
import os

import pytest
import torch

from fastdmd import train
from fastdmd.quality.settings import EvaluationSettings
from fastdmd.runs import checkpoint
from fastdmd.runs.contents import contents
from fastdmd.runs.folder import FOLDERS
from fastdmd.runs.resume import Past, with_those_of_run
from tests.helpers.tiny_runs import refuses


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "checkpoints" / "00000004"
    path.parent.mkdir()
    checkpoint.write(path, {"origin": {"arguments": ["--seed", "3"]}, "a": torch.ones(2)})
    return path


def renewed(path, name):
    """The checksum of what the file is now."""
    sums = path / "SHA256SUMS"
    lines = [line for line in sums.read_text().splitlines() if not line.endswith(name)]
    digest = hashlib.sha256((path / name).read_bytes()).hexdigest()
    sums.write_text("\n".join([*lines, f"{digest}  {name}"]) + "\n")


@pytest.mark.parametrize("name", ["state.json", "state.safetensors", "SHA256SUMS"])
@pytest.mark.parametrize(("kind", "make"), [("pipe", os.mkfifo), ("device", lambda p: os.symlink("/dev/zero", p))])
def test_what_is_no_file_in_a_checkpoint(written, name, kind, make):
    (written / name).unlink()
    make(written / name)
    with pytest.raises(ValueError, match=f"^expected a regular file, got {written}/{name}, a {kind}$"):
        checkpoint.read(written)


@pytest.mark.parametrize("name", ["../../x", "/dev/zero", "a/b", "", ".."])
def test_checksums_are_of_files_beside_them(written, name):
    with open(written / "SHA256SUMS", "a") as file:
        file.write(f"{'0' * 64}  {name}\n")
    message = f"a whole checkpoint in {written}, got ValueError: SHA256SUMS with '{name}'$"
    if "/" not in name:
        message = f"a regular file, got {written / name}, a folder$"
    with pytest.raises(ValueError, match=f"^expected {message}"):
        checkpoint.read(written)


def test_what_is_long(written):
    state = json.loads((written / "state.json").read_text())
    (written / "state.json").write_text(json.dumps(state) + " " * (1 << 26))
    renewed(written, "state.json")
    with pytest.raises(ValueError, match="got ValueError: more than 67108864 bytes$"):
        checkpoint.read(written)
    (written / "state.json").write_text('{"format": 1, "state": ' + "[" * 100_000)
    renewed(written, "state.json")
    with pytest.raises(ValueError, match="^expected a whole checkpoint in .*, got ValueError: RecursionError"):
        checkpoint.read(written)
    (written / "SHA256SUMS").write_text("0" * ((1 << 24) + 1))
    with pytest.raises(ValueError, match="got ValueError: more than 16777216 bytes$"):
        checkpoint.read(written)


@pytest.mark.parametrize("arguments", ["--seed", [1], None, {"a": 1}, [["--seed"]]])
def test_arguments_that_are_none(written, arguments, capsys):
    run = written.parents[1]
    assert with_those_of_run(["--resume", str(run)])[:2] == ["--seed", "3"]
    content = json.loads((written / "state.json").read_text())
    content["state"]["origin"]["arguments"] = arguments
    (written / "state.json").write_text(json.dumps(content))
    renewed(written, "state.json")
    refuses(train, ["--resume", str(run)], f"expected the arguments of a run in {written}, got ", capsys)


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "config.json", "summary.json", "evaluation.jsonl", "best.safetensors"]
)
def test_what_is_no_file_in_a_run(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=f"^expected a regular file, got {tmp_path}/{name}, a pipe$"):
        Past.of(tmp_path)


def test_folders_in_a_run(tmp_path):
    """Checkpoints, and what TensorBoard reads."""
    for name in FOLDERS:
        (tmp_path / name).mkdir()
    assert Past.of(tmp_path).checkpoints == []
    for name in FOLDERS:
        (tmp_path / name).rmdir()
        (tmp_path / name).write_text("")
        with pytest.raises(ValueError, match=f"^expected a folder in {tmp_path}/{name}, got something else"):
            Past.of(tmp_path)
        (tmp_path / name).unlink()


def test_a_reference_that_is_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.npz")
    with pytest.raises(ValueError, match=f"^expected a regular file, got {tmp_path}/a.npz, a pipe$"):
        contents(EvaluationSettings(num_samples=0, reference=str(tmp_path / "a.npz")), None)
