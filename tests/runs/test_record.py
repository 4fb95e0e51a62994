"""What a run tells its sinks: every point once, in values that are known; a sink that fails ends nothing."""

import json
import math
import sys
import types

import numpy as np
import pytest
from PIL import Image

from fastdmd import pretrain, train
from fastdmd.quality import Measurement
from fastdmd.runs import record as recording
from fastdmd.runs.folder import ReopenedFolder, RunFolder
from fastdmd.runs.record import Record, RecordSettings
from tests.helpers.tiny_runs import QUICK, refuses, run_train

PICTURE = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4))


def line(iteration, loss):
    return {"iteration": iteration, "loss_dm": loss, "fake_error_above_5": 0.5, "images_per_second": 7.0}


def events(folder):
    """What TensorBoard shows: values by tag, `(step, value)`, and pictures."""
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="no tensorboard")
    found = loader.EventAccumulator(str(folder / "tensorboard"), {loader.SCALARS: 0, loader.IMAGES: 0}).Reload()
    scalars = {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}
    return scalars, {tag: found.Images(tag) for tag in found.Tags()["images"]}


def test_tensorboard_has_every_point_once(tmp_path):
    """Killed after iteration 40, a run goes on from 20, as it would have gone: what was later is void."""
    pytest.importorskip("tensorboard", reason="no tensorboard")
    folder = RunFolder(tmp_path / "run", {"seed": 0})
    settings = RecordSettings(record="tensorboard")
    first = Record(folder, settings)  # never closed
    first.start(0)
    first.samples(0, lambda: PICTURE)
    for iteration in (10, 20, 30, 40):
        first.line(line(iteration, float(iteration)))
    first.samples(40, lambda: PICTURE)
    folder.close()
    folder = ReopenedFolder(tmp_path / "run", {"seed": 0})
    again = Record(folder, settings)
    again.start(20)
    for iteration in (20, 25, 30, 35):  # another --log-every
        again.line(line(iteration, iteration + 0.5))
    again.measurements([{"iteration": 35, "images": 70, "average": "decay 0.9", "frechet_distance": 2.5, "fault": "x"}])
    again.result(35, {"generator": Measurement(1.25, None)})
    again.samples(35, lambda: PICTURE)
    again.close()
    scalars, pictures = events(tmp_path / "run")
    assert scalars["losses/loss_dm"] == [(10, 10.0), (20, 20.5), (25, 25.5), (30, 30.5), (35, 35.5)]
    assert scalars["fake error/fake_error_above_5"] == [(step, 0.5) for step in (10, 20, 25, 30, 35)]
    assert scalars["quality/frechet_distance/decay 0.9"] == [(35, 2.5)]
    assert scalars["result/frechet_distance/generator"] == [(35, 1.25)]
    assert not any("fault" in tag or "class_accuracy" in tag for tag in scalars)
    assert [image.step for image in pictures["samples"]] == [0, 35]
    assert (pictures["samples"][0].width, pictures["samples"][0].height) == PICTURE.size


def test_lines_are_json_and_what_is_not_finite_is_no_point(tmp_path):
    told = []
    folder = RunFolder(tmp_path / "run", {})
    record = Record(folder)
    record._sinks = {"service": types.SimpleNamespace(rewinds=True, scalars=lambda *given: told.append(given))}
    record.line({"iteration": 5, "loss_dm": math.nan, "grad_norm": math.inf, "loss": 1, "alarms": ["collapse"]})
    text = (tmp_path / "run" / "metrics.jsonl").read_text()

    def refuse(constant):
        raise AssertionError(constant)

    logged = {"iteration": 5, "loss_dm": None, "grad_norm": None, "loss": 1, "alarms": ["collapse"]}
    assert json.loads(text, parse_constant=refuse) == logged
    assert told == [(5, {"losses/loss": 1.0, "health/alarms": 1.0})]


class Service:
    """A stand-in for wandb and trackio: what was begun and sent, and a network that may fail."""

    def __init__(self):
        self.begun, self.sent, self.finished, self.fails = [], [], 0, False

    def init(self, **given):
        self.begun.append(given)
        return self

    def log(self, values, step):
        if self.fails:
            raise ConnectionError("no route\nto host")
        self.sent.append((step, values))

    def finish(self):
        self.finished += 1

    Settings = staticmethod(lambda **given: given)
    Image = staticmethod(lambda picture: picture.size)


@pytest.fixture(params=["wandb", "trackio"])
def service(request, monkeypatch):
    stand_in = Service()
    monkeypatch.setitem(sys.modules, request.param, stand_in)
    monkeypatch.setattr(recording, "_is_installed", lambda name: name == request.param)
    return request.param, stand_in


def test_a_service_is_told_everything_once(tmp_path, service):
    """What it has cannot be taken back: a run that goes on tells only what is new, under the same name."""
    name, stand_in = service
    folder = RunFolder(tmp_path / "run", {"seed": 3})
    for start, last in ((0, 4), (2, 6)):
        record = Record(folder, RecordSettings(record=name))
        record.start(start)
        for iteration in range(max(start, 1), last + 1):
            record.line({"iteration": iteration, "loss_dm": float(iteration)})
        record.samples(last, lambda: PICTURE)
    record.close()
    losses = [(step, values["losses/loss_dm"]) for step, values in stand_in.sent if "losses/loss_dm" in values]
    assert losses == [(step, float(step)) for step in range(1, 7)]
    assert [(step, values) for step, values in stand_in.sent if "samples" in values] == [
        (step, {"samples": (4, 3)}) for step in (4, 6)
    ]
    first, second = stand_in.begun
    assert first == second and first["config"] == {"seed": 3} and first["resume"] == "allow"
    identity = json.loads((tmp_path / "run" / "record.json").read_text())["identity"]
    assert identity in (first.get("id", ""), first["name"].rpartition("-")[2]) and stand_in.finished == 1


def test_a_sink_that_fails_says_so_once(tmp_path, service, capsys):
    name, stand_in = service
    record = Record(RunFolder(tmp_path / "run", {}), RecordSettings(record=name))
    record.start(0)
    record.line({"iteration": 1, "loss_dm": 1.0})
    stand_in.fails = True
    for iteration in (2, 3):
        record.line({"iteration": iteration, "loss_dm": 1.0})
    record.close()
    (told,) = capsys.readouterr().out.splitlines()
    assert told.startswith(f"not recorded from here on by {name}: ConnectionError: no route to host")
    assert told.endswith("; training goes on")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(text)["iteration"] for text in lines] == [1, 2, 3] and len(stand_in.sent) == 1


def test_a_full_disk_ends_no_training(teacher_file, tmp_path, monkeypatch, capsys):
    """Event files alone are hit by it; all else is whole, and there is no traceback."""
    pytest.importorskip("tensorboard", reason="no tensorboard")
    from tensorboard.summary.writer.record_writer import RecordWriter

    flush = RecordWriter.flush
    written = []

    def full(self):
        written.append(self)
        if len(written) > 3:
            raise OSError(28, "No space left on device")
        flush(self)

    monkeypatch.setattr(RecordWriter, "flush", full)
    summary = run_train(teacher_file, tmp_path / "run", "--num-samples", "0", "--record", "tensorboard")
    found = capsys.readouterr()
    assert summary["outcome"] == "complete" and "Traceback" not in found.err
    told = [text for text in found.out.splitlines() if "not recorded" in text]
    assert len(told) == 1 and told[0].endswith("; training goes on")
    assert told[0].startswith("not recorded from here on by tensorboard: OSError: [Errno 28] No space left on device")


def test_a_run_is_recorded_as_it_is_logged(teacher_file, tmp_path):
    pytest.importorskip("tensorboard", reason="no tensorboard")
    run_train(teacher_file, tmp_path / "run", "--eval-every", "2", "--record", "auto")
    scalars, pictures = events(tmp_path / "run")
    lines = [json.loads(text) for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for name in ("loss_dm", "loss_fake"):
        assert scalars[f"losses/{name}"] == [(entry["iteration"], np.float32(entry[name])) for entry in lines]
    assert scalars["memory/resident_bytes"][0][1] == np.float32(lines[0]["resident_bytes"]) > 1e7
    distances = [json.loads(text) for text in (tmp_path / "run" / "evaluation.jsonl").read_text().splitlines()]
    tag = f"quality/frechet_distance/{distances[0]['average']}"
    of_this = [entry for entry in distances if entry["average"] == distances[0]["average"]]
    assert scalars[tag] == [(entry["iteration"], np.float32(entry["frechet_distance"])) for entry in of_this]
    result = json.loads((tmp_path / "run" / "summary.json").read_text())["generator"]["frechet_distance"]
    assert scalars["result/frechet_distance/generator"] == [(4, np.float32(result))]
    assert [image.step for image in pictures["samples"]] == [0, 2, 4]


@pytest.mark.parametrize("command", [train, pretrain])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("wandb", "expected wandb for --record wandb, got none; pip install wandb"),
        ("tensorboard,trackio", "expected trackio for --record tensorboard,trackio, got none; pip install trackio"),
        ("paper", "expected --record auto, none, or some of tensorboard,wandb,trackio, each once, got paper"),
        ("wandb,wandb", "expected --record auto, none, or some of .* got wandb,wandb"),
        ("wandb,", "expected --record auto, none, or some of .* got wandb,$"),
        ("auto,wandb", "expected --record auto, none, or some of .* got auto,wandb"),
    ],
)
def test_what_cannot_be_recorded_is_refused_before_any_work(command, value, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(recording, "_is_installed", lambda name: name == "tensorboard")
    refuses(command, ["--out", str(tmp_path / "run"), "--record", value], message, capsys)
    assert not (tmp_path / "run").exists()


def test_a_service_that_does_not_begin_leaves_nothing(teacher_file, tmp_path, service, monkeypatch, capsys):
    name, stand_in = service

    def refuse(**given):
        raise RuntimeError("no key\nfound")

    monkeypatch.setattr(stand_in, "init", refuse)
    arguments = ["--teacher", str(teacher_file), "--out", str(tmp_path / "run"), *QUICK, "--num-samples", "0"]
    refuses(train, [*arguments, "--record", name], f"expected {name} to begin to record, got RuntimeError: no", capsys)
    assert not (tmp_path / "run").exists()


def test_a_folder_of_its_name_is_no_package(tmp_path, monkeypatch):
    """Such as that of event files, where a command is called inside of a run."""
    (tmp_path / "trackio").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ValueError, match="expected trackio for --record trackio, got none"):
        RecordSettings(record="trackio").check()


def test_foreign_content_of_the_record_is_refused(tmp_path, service):
    """But where nobody asks for it."""
    name, _ = service
    folder = RunFolder(tmp_path / "run", {})
    for content in ('{"identity": 3, "sent": {}}', '{"identity": "a"}', '{"identity": "a", "sent": {"a": "b"}}', "[]"):
        (tmp_path / "run" / "record.json").write_text(content)
        with pytest.raises(ValueError, match="record.json"):
            Record(folder, RecordSettings(record=name)).start(0)
        Record(folder).start(0)
