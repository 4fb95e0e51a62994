"""The loop from a checkpoint on: whatever iteration it is of, the run ends as if nothing had been."""

import errno
import json
import os
import signal

import pytest
import torch

from fastdmd.distill.statistics import IMAGE_STATISTICS, ClassFigures, ClassSums
from fastdmd.distill.tally import Tally
from fastdmd.quality.reference import Reference
from fastdmd.quality.settings import Monitor
from fastdmd.quality.watch import Watch
from fastdmd.runs import checkpoint, quality_plot
from fastdmd.runs.checkpoints import Checkpoints, CheckpointSettings
from fastdmd.runs.config import TrainConfig
from fastdmd.runs.course import Course
from fastdmd.runs.folder import ReopenedFolder, RunFolder
from fastdmd.runs.loop import Loop
from tests.runs.test_course import Judge, Watched

NUM_ITERATIONS = 36
CPU = torch.device("cpu")
NAN = float("nan")
# Updates that come to nothing, seven in a row beyond a line of the log, and one; images that are left out.
LOSSES = [NAN if 10 <= index < 17 or index == 30 else 1.0 for index in range(NUM_ITERATIONS)]
LEFT_OUT = [0.25 if index % 5 == 0 else 0.0 for index in range(NUM_ITERATIONS)]
DISTANCES = {step: (4.0 + step % 9, 3.0 + step % 7) for step in range(NUM_ITERATIONS + 1)}
MEANS = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
CLASSES = ClassFigures(torch.tensor([1e6, 1e6], dtype=torch.float64), MEANS, 4.0)
REFERENCE = Reference(brightness=-0.7, contrast=0.5, spread=0.4, saturated=0.8, excess=0.01, classes=CLASSES)


class Remembered(Watched):
    """A training of everything that a loop looks at: tallies with statistics, classes, torch's own random numbers."""

    def __init__(self, folder, **options):
        super().__init__(folder, LOSSES, left_out=LEFT_OUT, **options)
        self.tallies = (Tally(("loss",), CPU, IMAGE_STATISTICS), Tally(("loss_fake",), CPU))
        self.class_sums = ClassSums((1, 1, 1), 2, CPU)

    def iterate(self, iteration):
        self.tallies[0].guard.begin(iteration)
        labels = torch.arange(20) % 2
        images = torch.rand(20, 1, 1, 1) * 2e-2 + labels.view(-1, 1, 1, 1)
        dark = -1.0 if 9 <= iteration % 18 else -0.7
        statistics = torch.tensor([[dark, 0.5, 0.4 + images.mean(), 0.8, 0.01], [1.0] * 5])
        loss = torch.tensor(LOSSES[iteration]) + torch.rand(())
        self.tallies[0].add(loss, left_out=torch.tensor(LEFT_OUT[iteration]), statistics=statistics)
        self.tallies[1].add(torch.tensor(float(iteration)))
        self.class_sums.add(images, labels)
        self.network.weight.fill_(iteration + 1)
        self.events.get(iteration + 1, lambda self: None)(self)

    def parts(self):
        return {"generator": self.tallies[0], "fake": self.tallies[1], "sums": self.class_sums, "kept": self.candidates}

    def state_dict(self):
        return {"weight": self.network.weight, **{name: part.state_dict() for name, part in self.parts().items()}}

    def load_state_dict(self, state):
        self.network.weight.copy_(state["weight"])
        for name, part in self.parts().items():
            part.load_state_dict(state[name])


def run(path, *, stop_after=0, every="1000", events=None):
    """What it leaves, but for times."""
    folder = ReopenedFolder(path, {}) if path.exists() else RunFolder(path, {})
    training = Remembered(folder, events=events)
    judge = Judge(DISTANCES)
    course = Course(
        training, Monitor(eval_every=4, eval_samples=30, stop_after=stop_after), judge, folder, batch_size=20
    )
    settings = TrainConfig(iterations=NUM_ITERATIONS, batch_size=20, log_every=3, snapshots=5)
    watch = Watch(REFERENCE, training.class_sums)
    checkpoints = Checkpoints(folder, CheckpointSettings(checkpoint_every=every), {"versions": {}}, lambda origin: None)
    Loop(training, settings, folder, course, watch, checkpoints).run(judge)
    left = {}
    for file in (*path.glob("*.jsonl"), path / "summary.json", path / "weights.json", *path.glob("best.json")):
        lines = file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]
        read = map(json.loads, lines)
        left[file.name] = [
            {key: value for key, value in line.items() if "second" not in key and "bytes" not in key} for line in read
        ]
    return left | {"samples": (path / "samples.png").read_bytes()}


@pytest.fixture(autouse=True)
def _no_picture(monkeypatch):
    monkeypatch.setattr(quality_plot, "draw", lambda *_, **__: None)
    monkeypatch.setattr(quality_plot, "require", lambda: None)


@pytest.mark.parametrize("stop_after", [0, 3])
def test_a_run_goes_on_from_any_iteration(tmp_path, stop_after):
    torch.manual_seed(0)
    whole = run(tmp_path / "whole", stop_after=stop_after)
    (summary,) = whole["summary.json"]
    assert summary["skipped_updates"] == (8 if stop_after == 0 else 7) and summary["left_out_images"] >= 20
    assert len(summary["alarms"]) >= 2 and summary["outcome"] == "complete"
    assert (summary["reason"] is None) == (stop_after == 0) and summary["best_iteration"] < summary["iterations"]
    for iteration in range(1, summary["iterations"] + 1, 2):
        torch.manual_seed(0)
        path = tmp_path / f"{iteration}"
        events = {iteration: lambda self: os.kill(os.getpid(), signal.SIGTERM)}
        (ended,) = run(path, stop_after=stop_after, events=events)["summary.json"]
        assert (ended["outcome"], ended["iterations"]) == ("interrupted", iteration)
        torch.manual_seed(1)
        assert run(path, stop_after=stop_after) == whole, iteration


def test_training_goes_on_where_no_checkpoint_can_be_written(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    whole = run(tmp_path / "whole")
    write, calls = checkpoint.write, []

    def full(path, *given):
        calls.append(path.name)
        if len(calls) in (2, 3):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, *given)

    monkeypatch.setattr(checkpoint, "write", full)
    torch.manual_seed(0)
    capsys.readouterr()
    assert run(tmp_path / "run", every="7") == whole
    assert calls == ["00000007", "00000014", "00000021", "00000028", "00000035", "00000036"]
    said = capsys.readouterr().out
    assert said.count("not written: [Errno 28] No space left on device") == 2 and "training goes on" in said
    assert [path.name for path in sorted((tmp_path / "run" / "checkpoints").iterdir())] == ["00000035", "00000036"]


def test_when_a_checkpoint_is_due(tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr("fastdmd.runs.checkpoints.time.monotonic", lambda: now)
    for every, asked, expected in (
        ("2m", (), [120, 240, 360, 400]),
        ("150", (), [150, 300, 400]),
        ("0", (), []),
        ("0m", (7,), [7]),
        ("300", (7, 300), [7, 300, 400]),
    ):
        now, due = 0.0, []
        folder = RunFolder(tmp_path / f"{every}{len(asked)}", {})
        checkpoints = Checkpoints(
            folder, CheckpointSettings(checkpoint_every=every, keep_last=1), {}, lambda origin: None
        )
        for iteration in range(1, 401):
            now += 1.0
            if checkpoints.is_due(iteration, is_last=iteration == 400, is_asked=iteration in asked):
                checkpoints.write(iteration, dict)
                due.append(iteration)
        assert due == expected, every
        assert [path.name for path in folder.path.glob("checkpoints/*")] == [f"{last:08d}" for last in due[-1:]]
