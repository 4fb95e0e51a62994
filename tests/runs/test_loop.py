"""The loop of every training: what it does with NaN, broken weights, a failing disk and signals."""

import json
import math
import os
import re
import shutil
import signal

import pytest
import torch
from torch import nn

from fastdmd import files
from fastdmd.distill.tally import Tally
from fastdmd.networks import user_code
from fastdmd.quality import Measurement
from fastdmd.runs import cli
from fastdmd.runs.config import TrainConfig
from fastdmd.runs.folder import RunFolder
from fastdmd.runs.loop import Loop

CPU = torch.device("cpu")
NAN = float("nan")


class Scripted:
    """A training whose losses are written down, and whose network holds the number of its last good update."""

    is_in_parts = False

    def __init__(self, folder, losses, left_out=(), events=None):
        self.folder, self.losses, self.left_out, self.events = folder, losses, left_out, events or {}
        self.network = nn.Linear(1, 1, bias=False).requires_grad_(False)
        self.tallies = (Tally(("loss",), CPU),)
        self.network.weight.fill_(0)

    def iterate(self, iteration):
        self.tallies[0].guard.begin(iteration)
        share = self.left_out[iteration] if self.left_out else 0.0
        self.tallies[0].add(torch.tensor(self.losses[iteration]), left_out=torch.tensor(share))
        self.network.weight.fill_(iteration + 1)
        self.events.get(iteration + 1, lambda self: None)(self)

    def fault(self):
        return next((name for name, x in self.network.state_dict().items() if not x.isfinite().all()), None)

    def finish(self):
        pass

    def samples(self):
        return self.network.weight.expand(1, 2, 1, 4, 4) / 100

    def save(self, iteration, **information):
        content = json.dumps({"iteration": iteration, "weight": self.network.weight.item(), **information})
        files.write_atomically(self.folder.path / "weights.json", lambda file: file.write(content.encode()))

    def measurements(self):
        yield "generator", lambda noise, labels: noise, None


def run(path, losses, *, evaluation=None, settings=None, **options):
    """The summary, the lines of metrics.jsonl, and what the weight file holds."""
    folder = RunFolder(path, {})
    settings = settings or TrainConfig(iterations=len(losses), batch_size=10, log_every=5, snapshots=len(losses))
    summary = Loop(Scripted(folder, losses, **options), settings, folder).run(evaluation)
    texts = [(path / name).read_text() for name in ("summary.json", "metrics.jsonl", "weights.json")]
    written, *lines = (json.loads(text, parse_constant=pytest.fail) for text in (texts[0], *texts[1].splitlines()))
    assert written == json.loads(json.dumps(summary))
    return summary, lines, json.loads(texts[2])


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("error", [RuntimeError("of your own"), SystemExit(0), torch.OutOfMemoryError("CUDA")])
def test_a_run_that_fails_keeps_what_was_reached_and_says_why(tmp_path, capsys, error, again):
    def fail(self):
        if again:
            self.samples = lambda: fail(self)
        raise error

    path = tmp_path / "run"
    settings = TrainConfig(iterations=8, batch_size=10, log_every=5, snapshots=1)
    with pytest.raises(SystemExit) as exit_, cli.run_errors("fastdmd.train", "distilling"):
        run(path, [1.0] * 8, events={3: fail}, settings=settings)
    assert exit_.value.code == 1
    last_line = capsys.readouterr().err.strip().splitlines()[-1]
    expected = (
        "out of memory while distilling"
        if isinstance(error, torch.OutOfMemoryError)
        else (rf"expected your code to run, got {type(error).__name__}: .* \({__file__}, line \d+\), while distilling")
    )
    assert re.match(f"fastdmd.train: error: {expected}", last_line), last_line
    summary, weights = (json.loads((path / name).read_text()) for name in ("summary.json", "weights.json"))
    assert summary["outcome"] == "failed" and summary["reason"].startswith(type(error).__name__)
    assert (summary["iterations"], weights["iteration"]) == (2, 0 if again else 2)  # the third was not finished


def test_a_fault_of_ours_keeps_its_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr(user_code, "LIBRARIES", user_code.LIBRARIES | {os.path.dirname(__file__)})  # this file is ours
    events = {3: lambda self: self.missing}
    with pytest.raises(AttributeError, match="missing"), cli.run_errors("fastdmd.train", "distilling"):
        run(tmp_path / "run", [1.0] * 8, events=events)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["outcome"] == "failed"


def test_one_bad_update_costs_one_update(tmp_path, capsys):
    summary, lines, weights = run(tmp_path / "run", [1.0, 3.0, NAN, 1.0, 3.0, *[2.0] * 5])
    assert (summary["outcome"], summary["iterations"], summary["skipped_updates"]) == ("complete", 10, 1)
    assert [line["loss"] for line in lines] == [2.0, 2.0] and lines[0]["skipped_updates"] == 1
    assert "skipped_updates" not in lines[1] and weights["iteration"] == 10
    assert (lines[0]["not_finite"], lines[0]["not_finite_at"]) == ("loss", 3) and "not_finite" not in lines[1]
    said = capsys.readouterr().out
    assert "iteration 5: NaN or infinity in loss, iteration 3; updates skipped: 1" in said


@pytest.mark.parametrize("bad", [NAN, math.inf])
@pytest.mark.parametrize(("num_good", "ended_at"), [(0, 10), (3, 15), (88, 100), (95, None)])
def test_updates_that_stay_bad_end_the_run(tmp_path, bad, num_good, ended_at):
    """Ten in a row do, seen at the next line of the log."""
    summary, lines, _ = run(tmp_path / "run", [1.0] * num_good + [bad] * (100 - num_good))
    assert (summary["outcome"], summary["iterations"]) == (("diverged", ended_at) if ended_at else ("complete", 100))
    if ended_at:
        assert re.match("1[0-4] updates in a row left out: NaN or infinity in loss, iteration ", summary["reason"])
        assert lines[-1]["loss"] is None


@pytest.mark.parametrize("broken", [False, True])
def test_stop_ends_a_run_at_the_iteration_itself(tmp_path, broken):
    """On a CPU, whatever the interval of the log; weights that are broken are named before what comes of them."""
    events = {7: lambda self: self.network.weight.fill_(NAN)} if broken else {}
    settings = TrainConfig(iterations=20, batch_size=10, log_every=20, snapshots=4).replace(nan_policy="stop")
    losses = [NAN if step == 6 else 1.0 for step in range(20)]
    summary, lines, weights = run(tmp_path / "run", losses, settings=settings, events=events)
    assert (summary["outcome"], summary["iterations"]) == ("diverged", 7) and weights["iteration"] == 5
    assert summary["reason"] == f"NaN or infinity in {'weight' if broken else 'loss'}, iteration 7"
    assert [line["iteration"] for line in lines] == [7] and lines[0]["not_finite"] == "loss"


def test_numbers_that_json_lacks_are_null(tmp_path):
    """Of finite losses, whose sum float32 does not hold; and whatever else a line may have."""
    summary, lines, _ = run(tmp_path / "run", [3e38] * 5 + [2.0] * 5)
    assert [line["loss"] for line in lines] == [None, 2.0] and summary["outcome"] == "complete"
    folder = RunFolder(tmp_path / "other", {})
    values = {"a": NAN, "b": -math.inf, "c": 0.5, "d": 7, "e": None, "f": ["x"], "g": "inf", "h": True}
    folder.log(**values)
    text = (tmp_path / "other" / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {**values, "a": None, "b": None}


def test_a_short_run_of_bad_updates_alone_is_no_success(tmp_path):
    assert run(tmp_path / "run", [1.0, NAN, NAN, NAN])[0]["outcome"] == "diverged"


def test_a_teacher_that_breaks_is_said_and_ends_the_run_where_it_stays_so(tmp_path, capsys):
    summary, lines, _ = run(tmp_path / "few", [1.0] * 20, left_out=[0.3, 0.1] + [0.0] * 18)
    assert summary["outcome"] == "complete" and summary["left_out_images"] == lines[0]["left_out_images"] == 4
    assert "teacher or fake score; images left out: 4" in capsys.readouterr().out
    summary, lines, _ = run(tmp_path / "most", [0.0] * 100, left_out=[0.0] * 7 + [0.6] * 93)
    assert (summary["outcome"], summary["iterations"]) == ("diverged", 20)
    assert summary["reason"] == "13 updates in a row left out: NaN or infinity of teacher or fake score for most images"
    assert lines[0]["loss"] == 0 and lines[2]["loss"] is None and lines[2]["left_out_images"] == 30


@pytest.mark.parametrize("broken", [NAN, math.inf])
def test_broken_weights_never_replace_good_ones(tmp_path, broken):
    """Between two lines of the log, while the losses look fine."""
    events = {7: lambda self: self.network.weight.fill_(broken)}
    summary, _, weights = run(tmp_path / "run", [1.0] * 20, events=events)
    assert summary["outcome"] == "diverged" and "NaN or infinity in weight" in summary["reason"]
    assert weights == {"iteration": 6, "weight": 6}


def test_weights_that_give_broken_images_never_replace_good_ones(tmp_path):
    def break_samples(self):
        self.samples = lambda: torch.full((1, 2, 1, 4, 4), NAN)

    summary, _, weights = run(tmp_path / "run", [1.0] * 20, events={3: break_samples})
    assert summary["outcome"] == "diverged" and weights["iteration"] == 2


def test_weights_that_the_file_cannot_hold_end_the_run(tmp_path):
    def refuse(self):
        def save(iteration, **information):
            raise ValueError("expected weights that torch.float16 can hold, got 7e+04 in weight")

        self.save = save

    summary, _, weights = run(tmp_path / "run", [1.0] * 20, events={3: refuse})
    assert summary["outcome"] == "diverged" and "7e+04 in weight" in summary["reason"] and weights["iteration"] == 2


def test_a_network_that_is_broken_from_the_start_leaves_nothing(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("precious")
    for path in (tmp_path / "new" / "deeper" / "run", tmp_path / "mine"):
        folder = RunFolder(path, {})
        training = Scripted(folder, [1.0])
        training.network.weight.fill_(NAN)
        with pytest.raises(ValueError, match="a network to start from, got NaN or infinity in weight"):
            with folder.being_set_up():
                Loop(training, TrainConfig(), folder)
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "notes.txt"]


def test_a_folder_with_something_of_a_run_is_refused(tmp_path):
    for name in ("config.json", "samples.png", "generator.safetensors"):
        path = tmp_path / name
        path.mkdir()
        (path / name).write_text("earlier")
        with pytest.raises(FileExistsError, match=f"already holds a run's {name}"):
            RunFolder(path, {})
        assert [(file.name, file.read_text()) for file in path.iterdir()] == [(name, "earlier")]


def test_training_goes_on_where_the_disk_does_not(tmp_path, monkeypatch, capsys):
    """A disk that is full for a while costs the snapshots of that while; every file is whole at any time."""
    fsync = os.fsync

    def full(self):
        monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))

    def free(self):
        assert json.loads((tmp_path / "run" / "weights.json").read_text())["iteration"] == 3  # the last whole one
        monkeypatch.setattr(os, "fsync", fsync)

    settings = TrainConfig(iterations=10, batch_size=10, log_every=10, snapshots=10)
    summary, _, weights = run(tmp_path / "run", [1.0] * 10, events={4: full, 8: free}, settings=settings)
    assert summary["outcome"] == "complete" and weights["iteration"] == 10
    notice = f"not written: [Errno 28] No space left on device: '{tmp_path}/run/weights.json'; training goes on"
    assert capsys.readouterr().out.count(notice) == 1
    assert not list((tmp_path / "run").glob(".*"))


def test_a_result_that_cannot_be_written_is_one_line(tmp_path, capsys):
    gone = {4: lambda self: shutil.rmtree(self.folder.path)}
    with pytest.raises(SystemExit) as exit_, cli.run_errors("fastdmd.train", "training"):
        run(tmp_path / "run", [1.0] * 6, events=gone)
    output = capsys.readouterr()
    last_line = output.err.strip().splitlines()[-1]
    assert exit_.value.code == 1 and last_line.startswith("fastdmd.train: error: expected access to ")
    assert "weights.json" in last_line and "training goes on" in output.out and not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_what_was_reached(tmp_path, number):
    events = {7: lambda self: os.kill(os.getpid(), number)}
    before = signal.getsignal(number)
    signal.signal(number, lambda *_: pytest.fail("the signal passed the loop"))
    try:
        summary, lines, weights = run(tmp_path / "run", [1.0] * 20, events=events)
        assert signal.getsignal(number) is not before
    finally:
        signal.signal(number, before)
    assert (summary["outcome"], summary["iterations"], summary["signal"]) == ("interrupted", 7, number)
    assert weights["iteration"] == 7 and [line["iteration"] for line in lines] == [5, 7]
    with pytest.raises(SystemExit) as exit_:
        cli.leave("fastdmd.train", summary, 20)
    assert exit_.value.code == 128 + number


def test_a_signal_while_measuring_ends_the_measurement(tmp_path):
    class Evaluation:
        floor = Measurement(None, None)

        def measure(self, sampler, *, before_batch, **_):
            before_batch()
            os.kill(os.getpid(), signal.SIGTERM)
            before_batch()
            pytest.fail("sampling went on")

    summary, _, weights = run(tmp_path / "run", [1.0] * 4, evaluation=Evaluation())
    assert (summary["outcome"], summary["iterations"], summary["signal"]) == ("interrupted", 4, signal.SIGTERM)
    assert weights["iteration"] == 4 and summary["generator"]["frechet_distance"] is None


def test_what_was_measured_is_on_record_in_the_weight_file(tmp_path, capsys):
    class Evaluation:
        floor = Measurement(0.1, 1.0)

        def measure(self, sampler, **_):
            return Measurement(0.25, 0.5, 100.0, 1, 10)

        def record(self, row):
            return {"frechet_distance": row.frechet_distance}

    _, _, weights = run(tmp_path / "run", [1.0] * 4, evaluation=Evaluation())
    assert weights["iteration"] == 4 and weights["record"] == {"frechet_distance": 0.25}
    assert "0.250" in capsys.readouterr().out
