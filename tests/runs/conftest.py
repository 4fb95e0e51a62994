"""Trainings in which something goes wrong before an iteration."""

import json

import pytest

from benchmarks.soak import prepare
from fastdmd import train
from fastdmd.runs import distillation, pretraining
from tests.helpers.kills import no_budget

SHORT = ["--iterations", "13", "--snapshots", "4", "--eval-every", "0", "--num-samples", "0"]  # snapshots at 4, 8, 12


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """`begin(spoil)` runs a training that calls `spoil(training, iteration)` before each iteration, and returns how it
    ended and what there is."""
    monkeypatch.setattr(train, "budget_of", no_budget)
    monkeypatch.chdir(tmp_path)
    arguments = [*prepare(tmp_path), *SHORT, "--out", "run"]

    def begin(spoil, *options, command=train, given=arguments):
        owner = distillation.Distillation if command is train else pretraining.Pretraining
        iterate = owner.iterate

        def spoiled(self, iteration):
            spoil(self, iteration)
            iterate(self, iteration)

        code = 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, "iterate", spoiled)
            try:
                command.main([*given, *options])
            except SystemExit as exit_:
                code = exit_.code
        run = tmp_path / "run"
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        checkpoints = sorted(path.name for path in run.glob("checkpoints/*"))
        return code, json.loads((run / "summary.json").read_text()), lines, checkpoints

    return begin
