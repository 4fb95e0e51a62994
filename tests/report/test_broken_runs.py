"""Runs that are unfinished, broken or anybody's: what is there is shown, what is missing named, nothing is executed."""

import json
import os
import sys

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from fastdmd import data
from fastdmd.report import __main__ as command
from fastdmd.report import ending, page, reading
from fastdmd.report.reading import read_run
from fastdmd.runs.config import TrainConfig
from fastdmd.runs.pictures import SampleHistory
from tests.helpers.networks import make_network
from tests.helpers.pages import Page
from tests.helpers.tiny_runs import refuses

CPU = torch.device("cpu")
BLACK = torch.full((10, 11, 1, 28, 28), -1.0)
LINE = {"iteration": 50, "loss_dm": 0.5, "loss_fake": 0.25, "images_per_second": 10.0, "alarms": ["collapse"]}


def report(run, *options):
    command.main([str(run), "--device", "cpu", *options])
    return Page((run / "report.html").read_text())


def missing(found):
    texts = found.texts("h2")
    return found.texts("li") if "What is missing" in texts else []


@pytest.fixture
def run(tmp_path):
    """That of a process which was killed: no summary, no samples."""
    path = tmp_path / "run"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"teacher": "mnist", "iterations": 100, "data": {"path": None}}))
    (path / "metrics.jsonl").write_text(json.dumps(LINE) + "\n" + json.dumps({**LINE, "iteration": 60}) + "\n")
    return path


def test_a_run_that_goes_on(run):
    found = report(run)
    assert found.texts("p", class_="big") == ["–", "–"]
    assert found.texts("p", class_="beside")[-1] == "60 of 100 iterations; unfinished"
    assert found.texts("p", class_="big words ill") == ["▲ 2 alarms"]
    assert any("collapse at iteration 50" in text for text in found.texts("li"))
    told = missing(found)
    assert "summary.json: there is none yet" in told and "samples.png: there is none" in told
    (label,) = (e["aria-label"] for e in found.all("svg", role="img") if e["aria-label"].startswith("Losses"))
    assert "loss dm from 0.5 at iteration 50 to 0.5 at 60" in label


def test_the_last_measurement_stands_in_for_the_end(run):
    measured = [
        {"iteration": step, "average": "a", "frechet_distance": value} for step, value in ((10, 3.0), (20, 2.5))
    ]
    fault = {"iteration": 30, "average": "a", "fault": "NaN"}
    (run / "evaluation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (*measured, fault)))
    assert report(run).texts("p", class_="beside")[0] == "not measured at the end; 2.500 at iteration 20"


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("config.json", b"{", "config.json: "),
        ("config.json", b"[]", "config.json: "),
        ("config.json", b'{"data": 3, "evaluation": [], "iterations": "x"}', "real images: "),
        ("summary.json", b"\xff\xfe", "summary.json: "),
        ("summary.json", b'{"generator": 3, "floor": [], "alarms": {}, "versions": 1, "iterations": NaN}', None),
        ("summary.json", b'{"generator": {"frechet_distance": "x", "evaluations": []}, "alarms": [1, {}]}', None),
        ("metrics.jsonl", b"", "metrics.jsonl has no lines yet"),
        ("metrics.jsonl", b'{"iteration": 5, "loss": 1}\n{"iteration": 6, "lo', "1 of 2 lines of metrics.jsonl, which"),
        (
            "metrics.jsonl",
            b'3\n[]\n{"loss": 1}\n{"iteration": -1}\n{"iteration": "a"}\n',
            "5 of 5 lines of metrics.jsonl",
        ),
        ("metrics.jsonl", b'{"iteration": 5, "loss": NaN, "spread": 1e999, "alarms": 7, "contrast": "x"}\n', None),
        ("metrics.jsonl", b'{"iteration": 5, "loss": ' + b"9" * 400 + b"}\n", None),
        ("metrics.jsonl", b"[" * 100_000 + b"\n", "1 of 1 lines of metrics.jsonl"),
        ("evaluation.jsonl", b'{"iteration": 5, "average": null, "frechet_distance": "x"}\n', None),
        ("samples.png", b"no picture", "samples.png: "),
    ],
)
def test_what_is_broken_is_named(run, name, content, told):
    if told == "real images: ":
        SampleHistory(run / "samples.png").add(BLACK, 4)
    (run / name).write_bytes(content)
    found = report(run)
    assert told is None or any(text.startswith(told) for text in missing(found)), missing(found)
    assert found.texts("h1") == ["run"]


def test_generators_of_as_many_evaluations(run):
    """Of which a file that is nobody's may tell."""
    rows = {"generator": {"frechet_distance": 2.0}, "generator, 1 step": {"images_per_second": 1.0}}
    rows |= {"generator, 2 steps": {"frechet_distance": 0.5, "evaluations": 2}}
    known = {name: {"evaluations": 1, **row} for name, row in rows.items()}
    (run / "summary.json").write_text(json.dumps({"outcome": "complete", "iterations": 100, **known}))
    (label,) = (e["aria-label"] for e in report(run).all("svg", role="img") if "against steps" in e["aria-label"])
    assert "student 0.5 at steps 2" in label


def test_no_teacher_beside_samples_of_other_noise(run):
    """Files of before Philox's noise do not say what theirs is."""
    SampleHistory(run / "samples.png").add(BLACK, 4)
    assert "Teacher" in report(run).texts("figcaption")
    with Image.open(run / "samples.png") as picture:
        notes = PngImagePlugin.PngInfo()
        notes.add_text("fastdmd", json.dumps({"iterations": [4]}))
        picture.save(run / "samples.png", pnginfo=notes)
    found = report(run)
    assert "Teacher" not in found.texts("figcaption")
    told = "images of the teacher: expected samples of noise of Philox4x32-10, got some of before"
    assert told in missing(found)


@pytest.mark.parametrize("name", ["config.json", "summary.json", "metrics.jsonl", "evaluation.jsonl", "samples.png"])
def test_what_never_ends_is_not_read(run, name):
    """A pipe that nobody writes to, and a device."""
    for make, kind in ((os.mkfifo, "a pipe"), (lambda path: path.symlink_to("/dev/zero"), "a device")):
        (run / name).unlink(missing_ok=True)
        make(run / name)
        told = missing(report(run))
        assert any(text.startswith(f"{name}: ") and text.endswith(f"{run / name}, {kind}") for text in told), told


def test_a_log_is_read_up_to_a_bound(run, monkeypatch):
    monkeypatch.setattr(reading, "MAX_LOG_BYTES", (run / "metrics.jsonl").stat().st_size)
    assert report(run).texts("p", class_="beside")[-1] == "60 of 100 iterations; unfinished"
    monkeypatch.setattr(reading, "MAX_LOG_BYTES", (run / "metrics.jsonl").stat().st_size - 1)
    assert any(text.startswith("metrics.jsonl: more than") for text in missing(report(run)))


def test_a_picture_that_is_none_of_a_run(run):
    for size in ((1, 1), (40, 40), (2000, 3)):
        Image.new("RGB", size).save(run / "samples.png")
        assert any(text.startswith("samples.png: expected the samples of a run") for text in missing(report(run)))


def test_names_and_texts_are_not_markup(run, tmp_path):
    evil = "<img src=x onerror=alert(1)>\"'&"
    summary = {"outcome": evil, "reason": evil, "iterations": 5, "versions": {evil: evil}}
    summary |= {"alarms": [{"kind": evil, "iteration": evil, "seen": evil, "advice": evil}]}
    summary |= {evil: {"frechet_distance": 1.0, "evaluations": 3}}
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "metrics.jsonl").write_text(json.dumps({"iteration": 5, f"loss{evil}": 1.0, f"loss_{evil}": 2.0}) + "\n")
    (run / "config.json").write_text(json.dumps({evil: evil, "teacher": evil}))
    renamed = tmp_path / "<b>run&"
    run.rename(renamed)
    found = report(renamed)
    assert found.texts("h1") == ["<b>run&"] and not found.all("img") and not found.all("b")
    assert any(evil in text for text in found.texts("li")) and evil in found.texts("dd")


def test_no_code_that_a_folder_names_is_run(run, tmp_path, monkeypatch):
    """But where the user says so."""
    (tmp_path / "theirs.py").write_text("raise SystemExit('executed')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    config = {"teacher": "theirs:build", "data": {"path": None}, "evaluation": {"feature_network": "theirs:features"}}
    (run / "config.json").write_text(json.dumps(config))
    SampleHistory(run / "samples.png").add(BLACK, 4)
    told = missing(report(run))
    assert any(
        "expected --run-code for theirs:build: code that a folder names runs only where" in text for text in told
    )
    assert any("expected --run-code for theirs:features" in text for text in told) and "theirs" not in sys.modules
    config |= {"teacher": "their.safetensors", "adapter": {"network": "theirs:build"}}
    config["evaluation"]["feature_network"] = "theirs.pt"
    (run / "config.json").write_text(json.dumps(config))
    told = missing(report(run))
    assert any("expected --run-code for theirs.pt: TorchScript that a folder names" in text for text in told)
    assert any("teacher: expected --run-code for theirs:build" in text for text in told) and "theirs" not in sys.modules
    (run / "config.json").write_text(json.dumps(config | {"teacher": "theirs:build", "adapter": {}}))
    told = missing(report(run, "--run-code"))
    assert any("teacher: " in text and "SystemExit: executed" in text for text in told)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "expected the folder of a run, got nowhere, which is none"),
        (["empty"], "expected the folder of a run, got empty without config.json, metrics.jsonl or summary.json"),
        (["file"], "expected the folder of a run, got file, which is none"),
        (["run", "empty"], "expected the folder of a run, got empty without"),
        (["run", "--out", "empty.html"], "expected --out to be a file, got the folder empty.html"),
        (["run", "--out", "run/metrics.jsonl"], "expected --out ending in .html, got run/metrics.jsonl"),
        (["run", "--out", "nowhere/page.html"], "expected --out in an existing folder"),
        (["run", "run/"], "expected different runs, got .*run twice"),
        (["run", "--device", "teapot"], "expected --device"),
        ([], "expected the folders of runs, got none"),
    ],
)
def test_what_is_no_run_is_refused(run, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.html").mkdir()
    (tmp_path / "file").touch()
    refuses(command, arguments, message, capsys)
    assert [*tmp_path.rglob("*.html")] == [tmp_path / "empty.html"]


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), RuntimeError("a fault")])
def test_a_report_that_fails_ends_no_run(run, monkeypatch, capsys, fault):
    def fail(*_):
        raise fault

    monkeypatch.setattr(page, "write_atomically", fail)
    ending.write(run, TrainConfig(), CPU, teacher=None, real=None, is_complete=True)
    assert capsys.readouterr().err.startswith(f"no report.html: {type(fault).__name__}: {fault}")
    assert not (run / "report.html").exists()


def test_a_run_that_was_ended_has_a_report_at_once(run, monkeypatch):
    """Without anything that takes time."""
    monkeypatch.setattr(ending, "study", None)
    (run / "summary.json").write_text(json.dumps({"outcome": "interrupted", "iterations": 60}))
    ending.write(run, TrainConfig(), CPU, teacher=None, real=None, is_complete=False)
    found = Page((run / "report.html").read_text())
    assert found.texts("p", class_="big words ill") == ["▲ interrupted"]
    assert missing(found)[-1].endswith(f"neighbours of samples: python -m fastdmd.report {run} makes them")


def test_no_process_alone_asks_a_teacher_that_several_share(run, monkeypatch):
    """It would wait for the others, who have left."""
    teacher, asked = make_network(), []
    teacher.register_forward_pre_hook(lambda *_: asked.append(1))
    SampleHistory(run / "samples.png").add(BLACK, 60)
    monkeypatch.setattr(ending, "is_cut", lambda network: network is teacher)
    ending.write(run, TrainConfig(), CPU, teacher=teacher, real=None, is_complete=True)
    found = missing(Page((run / "report.html").read_text()))
    assert not asked and any(
        f"which processes share: python -m fastdmd.report {run} makes them" in line for line in found
    )


def test_updates_that_were_lost_are_no_health(run):
    (run / "metrics.jsonl").write_text("")
    (run / "summary.json").write_text(json.dumps({"outcome": "complete", "iterations": 100, "skipped_updates": 3}))
    assert report(run).texts("p", class_="big words ill") == ["▲ 3 updates skipped"]
    (run / "summary.json").write_text(json.dumps({"outcome": "complete", "iterations": 100}))
    assert report(run).texts("p", class_="big words") == ["✓ no alarms"]


def test_copies_are_told(run):
    """Samples that are real images, and noise, where a run has its own."""
    digits = data.load()
    np.savez(run.parent / "data.npz", images=digits.images[:300])
    config = {"teacher": "nowhere.safetensors", "data": {"path": str(run.parent / "data.npz")}}
    (run / "config.json").write_text(json.dumps(config))
    copied, _ = digits.batch(torch.arange(3, 113))
    ratios = []
    for images in (copied, torch.rand(copied.shape, generator=torch.Generator().manual_seed(0))):
        SampleHistory(run / "samples.png").add(images.unflatten(0, (10, 11)), 4)
        (told,) = (text for text in report(run).texts("strong") if text.endswith(" times"))
        ratios.append(float(told.removesuffix(" times")))
    assert ratios[0] == 0 and ratios[1] > 2
    assert list(read_run(run).sheet.iterations) == [4]
