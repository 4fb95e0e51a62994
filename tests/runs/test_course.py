"""Quality inside a run: what is measured when, which weights are best, what ends it; training goes on as without."""

import dataclasses
import json
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fastdmd import files
from fastdmd.networks.weights import load_network
from fastdmd.quality import Measurement
from fastdmd.quality.settings import Monitor
from fastdmd.runs import quality_plot
from fastdmd.runs.candidates import Candidates
from fastdmd.runs.config import TrainConfig
from fastdmd.runs.course import Course
from fastdmd.runs.folder import RunFolder
from fastdmd.runs.loop import Loop
from fastdmd.runs.pictures import read_sheet
from tests.helpers.tiny_runs import refuses, run_train
from tests.runs.test_loop import Scripted

NAMES = ("short", "long")


@pytest.fixture(autouse=True)
def picture(request, monkeypatch):
    """Drawing takes a while; most runs here do without."""
    if "picture" in request.node.name:
        pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    else:
        monkeypatch.setattr(quality_plot, "draw", lambda *_, **__: None)
        monkeypatch.setattr(quality_plot, "require", lambda: None)


def row(distance):
    return Measurement(distance, None, num_images=7)


class Judge:
    """An evaluation whose distances are written down, by iteration and average; an exception among them is raised."""

    def __init__(self, distances, floor=0.1):
        self.distances, self.floor, self.has_distance = distances, row(floor), floor is not None
        self.notices, self.num_samples = ["a notice"], 50

    def measure(self, sampler, *, before_batch, **_):
        before_batch()
        found = sampler(self)
        if isinstance(found, Exception):
            raise found
        return row(found)

    def record(self, measured):
        return {"distance": measured.frechet_distance, "num_samples": self.num_samples}


class Watched(Scripted):
    """With two averages; the samplers tell the distance that the judge has for this iteration."""

    def __init__(self, folder, losses, **options):
        super().__init__(folder, losses, **options)
        self.candidates = Candidates({name: self.sampler(index) for index, name in enumerate(NAMES)})

    def sampler(self, index):
        def tell(judge):
            return judge.distances[int(self.network.weight)][index]

        tell.num_evaluations = 1
        return tell

    def save_best(self, iteration, **information):
        content = json.dumps({"iteration": iteration, "average": self.candidates.kept, **information})
        files.write_atomically(self.folder.path / "best.json", lambda file: file.write(content.encode()))

    def best_sampler(self):
        return lambda judge: json.loads((self.folder.path / "best.json").read_text())["record"]["distance"] + 0.01

    def measurements(self):
        yield "generator", self.candidates.sampler, None
        yield "teacher", lambda judge: 0.2, None


def run(path, distances, *, every=2, stop_after=0, num_iterations=8, judge=Judge, **options):
    """The summary, the lines of evaluation.jsonl, the best weights and the course."""
    folder, evaluation = RunFolder(path, {}), judge(distances)
    training = Watched(folder, [1.0] * num_iterations, **options)
    monitor = Monitor(eval_every=every, eval_samples=30, stop_after=stop_after)
    course = Course(training, monitor, evaluation, folder, batch_size=10)
    settings = TrainConfig(iterations=num_iterations, batch_size=10, log_every=5, snapshots=1)
    summary = Loop(training, settings, folder, course).run(evaluation)
    file = path / "evaluation.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    best = json.loads((path / "best.json").read_text()) if (path / "best.json").exists() else None
    return summary, lines, best, course


class Shown(Watched):
    """Whose samples tell which average they are of."""

    def samples(self):
        return torch.full((1, 11, 1, 4, 4), {"short": -0.5, "long": 0.5}[self.candidates.kept])


def test_samples_are_of_the_average_that_is_kept_in_the_end(tmp_path, monkeypatch):
    """Which is known after they were drawn: of more images, or of the first measurement there is."""
    monkeypatch.setattr("tests.runs.test_course.Watched", Shown)
    for name, distances, shown in (("other", {8: (2.0, 1.0)}, 0.5), ("same", {8: (1.0, 2.0)}, -0.5)):
        summary, *_ = run(tmp_path / name, distances, every=0)
        sheet = read_sheet(tmp_path / name / "samples.png")
        assert summary["average"] == {0.5: "long", -0.5: "short"}[shown] and list(sheet.iterations) == [0, 8]
        level = round((shown + 1) * 127.5)
        for picture in (sheet.history[0][-1], sheet.varied[0][0]):
            assert np.asarray(picture).min() == np.asarray(picture).max() == level
        assert np.asarray(sheet.history[0][0]).max() == round(0.5 * 127.5)  # as it was


def test_every_average_is_measured_and_the_best_is_kept(tmp_path, capsys):
    distances = {2: (3.0, 4.0), 4: (2.5, 1.5), 6: (2.0, 1.75), 8: (1.9, 1.8)}
    summary, lines, best, _ = run(tmp_path / "run", distances)
    assert [(line["iteration"], line["images"], line["average"], line["frechet_distance"]) for line in lines] == [
        (step, 10 * step, name, value)
        for step, values in distances.items()
        for name, value in zip(NAMES, values, strict=True)
    ]
    assert {*dataclasses.asdict(row(1.0))} <= lines[0].keys()
    # Of fewer images than the figures of the end.
    assert best == {"iteration": 4, "average": "long", "record": {"distance": 1.5, "num_samples": 30}}
    assert (summary["average"], summary["best_iteration"], summary["best_average"]) == ("long", 4, "long")
    assert [summary[name]["frechet_distance"] for name in ("generator", "best", "teacher")] == [1.8, 1.51, 0.2]
    assert (summary["iterations"], summary["outcome"], summary["reason"]) == (8, "complete", None)
    output = capsys.readouterr().out
    assert "iteration 4: Fréchet distance 1.5, long, the best so far\n" in output
    assert "iteration 6: Fréchet distance 1.75, long\n" in output and "average: long, best of 2\n" in output
    table = [line.split("  ")[0] for line in output.splitlines() if " 7 " in line or "  -  " in line]
    assert table[:4] == ["teacher", "generator, best at iteration 4", "generator, last", "floor: real images"]


def test_where_the_last_weights_are_the_best_there_is_one_row(tmp_path, capsys):
    """The last iteration is measured whether or not it is due, and its record is then that of the end."""
    distances = {3: (3.0, 2.0), 6: (2.0, 1.5), 8: (1.0, 1.25)}
    summary, lines, best, _ = run(tmp_path / "run", distances, every=3)
    assert [line["iteration"] for line in lines] == [3, 3, 6, 6, 8, 8]
    assert best == {"iteration": 8, "average": "short", "record": {"distance": 1.0, "num_samples": 50}}
    assert "best" not in summary and summary["best_iteration"] == 8 and summary["average"] == "short"
    assert "generator, last" not in capsys.readouterr().out


def test_without_measurements_meanwhile_the_choice_is_made_at_the_end(tmp_path, capsys):
    summary, lines, best, _ = run(tmp_path / "run", {8: (1.0, 0.5)}, every=0)
    assert lines == [] and best is None and not (tmp_path / "run" / "quality.png").exists()
    assert summary["average"] == "long" and summary["generator"]["frechet_distance"] == 0.5
    assert summary["best_iteration"] is None and "average: long, best of 2\n" in capsys.readouterr().out


@pytest.mark.parametrize(("stop_after", "ended_at"), [(1, 6), (2, 12), (3, 14), (4, 20), (0, 20)])
def test_a_run_ends_where_nothing_gets_better(tmp_path, stop_after, ended_at, capsys):
    values = [4, 3, 5, 2, 2, 2, 3, 1.5, 9, 9]
    distances = {2 * step: (value, value) for step, value in enumerate(values, start=1)}
    summary, lines, best, _ = run(tmp_path / "run", distances, stop_after=stop_after, num_iterations=20)
    assert (summary["outcome"], summary["iterations"], lines[-1]["iteration"]) == ("complete", ended_at, ended_at)
    assert best["iteration"] == {6: 4, 12: 8, 14: 8, 20: 16}[ended_at] == summary["best_iteration"]
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["iteration"] == ended_at
    weights = json.loads((tmp_path / "run" / "weights.json").read_text())
    assert weights["iteration"] == ended_at and weights["record"]["distance"] == values[ended_at // 2 - 1]
    if ended_at < 20:
        expected = f"ended early: no better Fréchet distance than {best['record']['distance']:.4g}, of iteration "
        assert summary["reason"].startswith(expected) and summary["reason"] in capsys.readouterr().out


def test_a_run_that_has_come_to_its_end_did_not_end_early(tmp_path):
    distances = {step: (step, step) for step in (2, 4, 6)}
    summary, *_ = run(tmp_path / "run", distances, stop_after=2, num_iterations=6)
    assert (summary["iterations"], summary["outcome"], summary["reason"]) == (6, "complete", None)


def test_images_that_are_not_finite_are_a_line(tmp_path, capsys):
    broken = ValueError("fastdmd.quality: expected finite images of the long, got NaN or infinity")
    distances = {2: (3.0, 2.0), 4: (2.5, broken), 6: (broken, broken), 8: (2.0, 1.0)}
    summary, lines, best, _ = run(tmp_path / "run", distances)
    assert summary["outcome"] == "complete" and best["iteration"] == 8
    faults = [(line["iteration"], line["average"]) for line in lines if line.get("fault") == str(broken)]
    assert faults == [(4, "long"), (6, "short"), (6, "long")]
    assert all("frechet_distance" not in line for line in lines if "fault" in line)
    assert f"iteration 4: long not measured: {broken}\n" in capsys.readouterr().out


def test_the_best_is_measured_where_the_last_is_not_finite(tmp_path):
    broken = ValueError("fastdmd.quality: expected finite images")
    summary, _, best, _ = run(tmp_path / "run", {2: (3.0, 2.0), 4: (broken, broken)}, num_iterations=4)
    assert best["iteration"] == summary["best_iteration"] == 2 and summary["generator"]["frechet_distance"] is None
    assert summary["best"]["frechet_distance"] == 2.01 and summary["teacher"]["frechet_distance"] == 0.2
    # Finite in a measurement meanwhile, of fewer images, and not in the last.
    distances = {2: (3.0, 2.0), 4: (1.0, 1.5)}

    class Fickle(Judge):
        def measure(self, sampler, *, name, **options):
            return super().measure((lambda _: broken) if name.startswith("generator") else sampler, **options)

    summary, _, best, _ = run(tmp_path / "other", distances, num_iterations=4, judge=Fickle)
    assert best["iteration"] == 4 and best["record"]["num_samples"] == 30 and "best" not in summary


def test_a_run_without_any_distance_ends_too(tmp_path):
    broken = ValueError("fastdmd.quality: expected finite images")
    summary, *_ = run(tmp_path / "run", {step: (broken, broken) for step in (2, 4, 6)}, stop_after=2)
    assert (summary["iterations"], summary["outcome"]) == (4, "complete")
    assert summary["reason"].startswith("ended early: no Fréchet distance in 2 measurements; generator, short not")
    assert summary["best_iteration"] is None and summary["generator"]["frechet_distance"] is None


def test_a_signal_ends_a_measurement_and_leaves_no_half_of_it(tmp_path):
    class Signalled(Judge):
        def measure(self, sampler, *, before_batch, **_):
            if sampler(self) == 1.5:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().measure(sampler, before_batch=before_batch)

    summary, lines, best, _ = run(tmp_path / "run", {2: (3.0, 4.0), 4: (2.0, 1.5)}, judge=Signalled)
    assert (summary["outcome"], summary["iterations"], summary["signal"]) == ("interrupted", 4, signal.SIGTERM)
    assert {line["iteration"] for line in lines} == {2} and best["iteration"] == 2
    assert json.loads((tmp_path / "run" / "weights.json").read_text())["iteration"] == 4


def test_what_is_called_best_is_on_the_disk(tmp_path, monkeypatch, capsys):
    """Weights that a full disk did not take are not the best: later ones, worse than they, may be."""
    fsync = os.fsync

    def full(self):
        monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))

    events = {4: full, 5: lambda self: monkeypatch.setattr(os, "fsync", fsync)}
    distances = {2: (3.0, 4.0), 4: (1.0, 1.1), 6: (2.0, 2.5), 8: (2.1, 2.2)}
    summary, lines, best, _ = run(tmp_path / "run", distances, events=events)
    assert "No space left on device" in capsys.readouterr().out and len(lines) == 8
    assert best["iteration"] == summary["best_iteration"] == 6


@pytest.mark.parametrize(("num_steps", "words"), [(1, "1 step"), (3, "3 steps")])
def test_the_title_of_the_drawing_says_of_how_many_steps(tmp_path, num_steps, words, monkeypatch):
    titles = []
    monkeypatch.setattr(quality_plot, "draw", lambda *_, title: titles.append(title))
    sampler = Watched.sampler

    def of_steps(self, index):
        found = sampler(self, index)
        found.num_evaluations = num_steps
        return found

    monkeypatch.setattr(Watched, "sampler", of_steps)
    run(tmp_path / "run", {2: (3.0, 4.0)}, num_iterations=2)
    assert {*titles} == {f"run: 30 samples of {words} a measurement"}


def test_measurements_meanwhile_need_a_distance(tmp_path):
    folder = RunFolder(tmp_path / "run", {})
    with pytest.raises(ValueError, match="expected a Fréchet distance for --eval-every, got a notice"):
        Course(Watched(folder, []), Monitor(eval_every=1, eval_samples=2), Judge({}, floor=None), folder, 1)


def test_the_least_distance_is_chosen():
    candidates = Candidates({"a": None, "b": None, "c": None})
    assert candidates.choose({"a": row(None), "c": row(None)}) == row(None) and candidates.kept == "a"
    assert candidates.choose({"a": row(2.0), "b": row(1.0), "c": row(1.0)}) == row(1.0) and candidates.kept == "b"
    assert candidates.choose({"a": row(3.0)}) == row(3.0) and candidates.choose({}) is None and candidates.kept == "a"


def test_the_picture_has_its_lines(tmp_path):
    """Each curve in a colour, levels in black."""
    curves = {"short": [(10, 3.0), (20, 1.0)], "long": [(10, 2.0), (20, 0.5)]}
    for name, drawn in (("two", curves), ("one", {"short": curves["short"]}), ("none", {})):
        quality_plot.draw(tmp_path / name, drawn, {"floor": 0.1}, title="title")
    pictures = {path.name: np.asarray(Image.open(path).convert("RGB")) for path in tmp_path.iterdir()}
    blue, orange = (31, 119, 180), (255, 127, 14)
    seen = {name: tuple((rgb == colour).all(2).any() for colour in (blue, orange)) for name, rgb in pictures.items()}
    assert seen == {"two": (True, True), "one": (True, False), "none": (False, False)}


def test_measurements_and_their_picture_change_nothing_that_is_trained(teacher_file, tmp_path):
    """Weights are those of a run without them, bit for bit; what is measured at the end is what was measured last."""
    averages = ["--ema-halflives", "5,1000"]
    watched, plain = tmp_path / "watched", tmp_path / "plain"
    summary = run_train(teacher_file, watched, *averages, "--eval-every", "3")
    run_train(teacher_file, plain, *averages, "--num-samples", "0")
    tensors = {out: load_file(out / "networks.safetensors") for out in (watched, plain)}
    assert tensors[watched].keys() == tensors[plain].keys()
    assert all(torch.equal(value, tensors[plain][name]) for name, value in tensors[watched].items())
    lines = [json.loads(line) for line in (watched / "evaluation.jsonl").read_text().splitlines()]
    assert [(line["iteration"], line["images"]) for line in lines] == [(3, 12), (3, 12), (4, 16), (4, 16)]
    last = {line["average"]: line["frechet_distance"] for line in lines[2:]}
    assert summary["generator"]["frechet_distance"] == last[summary["average"]] == min(last.values())
    for name, iteration in (("generator", 4), ("best", summary["best_iteration"])):
        network, metadata = load_network(watched / f"{name}.safetensors")
        assert metadata["iterations"] == iteration and metadata["average"] in last
    index = list(last).index(summary["average"])
    for name, value in load_network(watched / "generator.safetensors")[0].state_dict().items():
        assert torch.equal(value, tensors[watched][f"average.{index}.{name}"])
    assert Image.open(watched / "quality.png").size == (800, 500)
    config = json.loads((watched / "config.json").read_text())["monitor"]
    assert config == {"eval_every": 3, "eval_samples": 40, "stop_after": 0}


def test_what_cannot_be_measured_meanwhile_is_refused(teacher_file, tmp_path, capsys):
    from fastdmd import train

    for options, message in (
        (["--eval-every", "2", "--num-samples", "0"], "expected --eval-every 0 with --num-samples 0, got 2"),
        (["--stop-after", "2"], "expected --stop-after together with --eval-every, got 2"),
        (["--eval-samples", "20"], "expected --eval-samples together with --eval-every, got 20"),
        (["--eval-every", "2", "--eval-samples", "1"], "expected --eval-samples >= 2, got 1"),
        (["--ema-halflives", "10,10"], r"expected --ema-halflives as numbers of images, each once, got \(10.0, 10.0\)"),
    ):
        refuses(train, ["--teacher", str(teacher_file), "--out", str(tmp_path / "run"), *options], message, capsys)
        assert not (tmp_path / "run").exists()
