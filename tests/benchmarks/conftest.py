"""A stage of `benchmarks.gpu` without a GPU."""

import json

import pytest

from benchmarks import environment, gpu


@pytest.fixture
def stage(monkeypatch, tmp_path):
    """`stage(arguments of Python)` runs them as a stage, on a machine without a GPU; the result and its file."""
    monkeypatch.setattr(gpu, "describe", lambda device: environment.describe("cpu"))
    monkeypatch.setattr(gpu, "SNAPSHOT_SECONDS", 0.1)

    def run(*command, seconds=30.0, needs=()):
        monkeypatch.setitem(gpu.STAGES, "ours", gpu.Stage(list(command), needs))
        path = tmp_path / "stored.json"
        result = gpu.run_stage("ours", seconds, [], path)
        assert json.loads(path.read_text()) == result and result["stage"] == "ours"
        assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".fastdmd")] == []
        return result

    return run
