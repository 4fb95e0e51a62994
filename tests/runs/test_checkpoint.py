"""A checkpoint on the disk: what is read is what was written, or a line says what is wrong."""

import json
import math
import os
import subprocess

import pytest
import torch

from fastdmd.runs import checkpoint

STATE = {
    "weights": {"a.b": torch.arange(6, dtype=torch.bfloat16).view(2, 3).t(), "empty": torch.zeros(2, 0)},
    "columns": [torch.tensor([1, 2]), torch.tensor(0.1)],
    "numbers": [0.1, math.nan, -math.inf, None, 7, True, "text"],
}


@pytest.fixture
def written(tmp_path):
    (tmp_path / "best.safetensors").write_text("best")
    checkpoint.write(tmp_path / "state", STATE, [tmp_path / "best.safetensors"])
    return tmp_path / "state"


def test_what_is_read_was_written(written):
    found = checkpoint.read(written)
    weights = found["weights"]
    assert weights["a.b"].dtype == torch.bfloat16 and torch.equal(weights["a.b"], STATE["weights"]["a.b"])
    assert weights["empty"].shape == (2, 0)
    assert all(map(torch.equal, found["columns"], STATE["columns"]))
    assert repr(found["numbers"]) == repr(STATE["numbers"])
    assert checkpoint.read_rest(written)["numbers"][0] == 0.1
    assert os.path.samefile(written / "best.safetensors", written.parent / "best.safetensors")
    assert [path.name for path in sorted(written.parent.iterdir())] == ["best.safetensors", "state"]
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=written, check=True)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def other_format(path):
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "format": 1}))
    lines = (path.parent / "SHA256SUMS").read_text().splitlines()
    sums = subprocess.run(["sha256sum", path.name], cwd=path.parent, capture_output=True, text=True, check=True).stdout
    (path.parent / "SHA256SUMS").write_text("\n".join([line for line in lines if "json" not in line]) + f"\n{sums}")


FAULTS = {
    "tensors cut": ("state.safetensors", cut, "got another state.safetensors than its SHA256SUMS says"),
    "tensors flipped": ("state.safetensors", flip, "got another state.safetensors than its SHA256SUMS says"),
    "rest flipped": ("state.json", flip, "got another state.json than its SHA256SUMS says"),
    "rest missing": ("state.json", os.remove, "got it without state.json"),
    "best cut": ("best.safetensors", cut, "got another best.safetensors than its SHA256SUMS says"),
    "sums missing": ("SHA256SUMS", os.remove, "got it without SHA256SUMS"),
    "sums empty": ("SHA256SUMS", lambda path: path.write_text(""), "got SHA256SUMS without state.json"),
    "sums no text": ("SHA256SUMS", lambda path: path.write_bytes(b"\xff\n"), "got UnicodeDecodeError"),
    "another format": (
        "state.json",
        other_format,
        "a checkpoint of format 2, of Philox's numbers, in .*, got 1",
    ),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_what_is_not_whole_is_refused(written, kind):
    name, spoil, message = FAULTS[kind]
    spoil(written / name)
    with pytest.raises(ValueError, match=f"^expected a (whole )?checkpoint .*{message.split('.*')[-1]}") as error:
        checkpoint.read(written)
    assert "\n" not in str(error.value) and str(written) in str(error.value)


def test_a_disk_that_is_full_leaves_nothing(tmp_path, monkeypatch):
    calls = []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/state'"):
        checkpoint.write(tmp_path / "state", STATE)
    assert list(tmp_path.iterdir()) == []
