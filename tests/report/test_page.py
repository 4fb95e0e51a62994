"""`report.html` of tiny runs, value for value against what they are of."""

import json
import re
import shutil

import numpy as np
import pytest
import torch

from fastdmd import data, pretrain, train
from fastdmd.data import to_uint8
from fastdmd.report import __main__ as command
from fastdmd.report.charts import show
from fastdmd.runs.pictures import NUM_COLUMNS, SampleSheet, read_sheet
from fastdmd.sampling import HeunSampler
from tests.helpers.kills import no_budget
from tests.helpers.networks import make_network
from tests.helpers.pages import Page
from tests.helpers.tiny_runs import run_train

TWO_STEPS = ["--iterations", "8", "--eval-every", "4", "--report", "--generator-sigmas", "80,5"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of two steps with measurements meanwhile, which wrote a report at its end."""
    from fastdmd.networks.weights import save_network

    folder = tmp_path_factory.mktemp("whole")
    save_network(folder / "teacher.safetensors", make_network(), kind="teacher")
    few_digits(folder / "data.npz")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "budget_of", no_budget)
        summary = run_train(
            folder / "teacher.safetensors", folder / "run", *TWO_STEPS, "--data", str(folder / "data.npz")
        )
    return folder / "run", summary, Page((folder / "run" / "report.html").read_text())


def few_digits(path):
    some = data.load()
    np.savez(path, images=some.images[:60], labels=some.labels[:60])


def lines(path):
    return [json.loads(text) for text in path.read_text().splitlines()]


def test_what_a_reader_sees_first(whole):
    _, summary, page = whole
    student, teacher, floor = summary["generator"], summary["teacher"], summary["floor"]
    big = [" ".join(e["text"].split()) for e in page.all("p") if e.get("class", "").startswith("big")]
    distance, rate, health = big
    assert distance == f"{student['frechet_distance']:.3f}" and rate == f"{student['images_per_second']:,.0f}"
    beside = page.texts("p", class_="beside")
    assert beside[0] == (
        f"teacher {teacher['frechet_distance']:.3f} in 3 evaluations, real images {floor['frechet_distance']:.3f}"
    )
    ratio = student["images_per_second"] / teacher["images_per_second"]
    assert beside[1] == f"2 evaluations an image, {ratio:.2g} times the teacher's rate"
    assert beside[2] == "8 of 8 iterations"
    assert health == (
        "✓ no alarms"
        if not summary["alarms"]
        else f"▲ {len(summary['alarms'])} alarm{'s' * (len(summary['alarms']) > 1)}"
    )
    assert page.texts("h1") == ["run"] and page.texts("title")[0] == "run: fastdmd"


def test_every_figure_of_every_row(whole):
    _, summary, page = whole
    table = page.table("All that was measured at the end")
    rows = {
        "student, last" if "best" in summary else "student": summary["generator"],
        "student, 1 step": summary["generator, 1 step"],
        "teacher": summary["teacher"],
        "real images": summary["floor"],
    }
    assert {*table["Fréchet distance"]} >= {*rows}
    for name, row in rows.items():
        assert table["Fréchet distance"][name] == f"{row['frechet_distance']:.3f}"
        assert table["precision"][name] == f"{row['precision']:.1%}"
        assert table["kernel distance × 1000"][name] == show(1000 * row["kernel_distance"])
        assert table["class accuracy"][name] == f"{row['class_accuracy']:.2%}"


def test_curves_say_what_they_show(whole):
    run, summary, page = whole
    told = [element["aria-label"] for element in page.all("svg", role="img")]
    log = lines(run / "metrics.jsonl")
    for title, names in {
        "Losses": ("loss_dm", "loss_fake"),
        "Gradient norms": ("generator_grad_norm", "fake_grad_norm"),
        "What images look like": ("brightness", "contrast", "spread"),
        "Images a second": ("images_per_second",),
        "Memory, bytes": ("resident_bytes",),
    }.items():
        (label,) = (text for text in told if text.startswith(f"{title}: "))
        for name in names:
            (begin, first), *_, (end, last) = ((line["iteration"], line[name]) for line in log if name in line)
            assert f"{name.replace('_', ' ')} from {show(first)} at iteration {begin} to {show(last)} at {end}" in label
    measured = lines(run / "evaluation.jsonl")
    (label,) = (text for text in told if text.startswith("Fréchet distance as training goes on: "))
    assert f"{measured[0]['average']} from {show(measured[0]['frechet_distance'])} at iteration 4" in label
    assert f"teacher (40) at {show(summary['teacher']['frechet_distance'])}" in label
    assert any(text.startswith("Of 40 samples a measurement.") for text in page.texts("p", class_="note"))
    (label,) = (text for text in told if text.startswith("Fréchet distance against steps: "))
    fewer, all_steps = (show(summary[name]["frechet_distance"]) for name in ("generator, 1 step", "generator"))
    assert f"student from {fewer} at steps 1 to {all_steps} at 2" in label
    # And the noise levels, each with its own name.
    (label,) = (text for text in told if text.startswith("Fake score and teacher disagree: "))
    assert "sigma above 5 from" in label


def test_pictures_are_of_the_samples(whole):
    run, _, page = whole
    pictures, sheet = page.pictures(), read_sheet(run / "samples.png")
    assert list(sheet.iterations) == [0, 4, 8] and len(sheet.varied[0]) == NUM_COLUMNS - 1
    student = np.asarray(pictures["Samples of the student, 10 rows of 5"].convert("L"))
    assert student.shape == (10 * 29 - 1, 5 * 29 - 1)
    assert np.array_equal(student[29:57, :28], np.asarray(sheet.varied[1][0]))
    strip = np.asarray(pictures["After 8 iterations"].convert("L"))
    assert np.array_equal(strip[:28], np.asarray(sheet.history[0][2]))
    assert [text for text in page.texts("figcaption") if text in ("0", "4", "8")] == ["0", "4", "8"]


def test_the_teacher_starts_from_the_noise_of_the_student(whole):
    _, _, page = whole
    network = make_network()
    drawn = SampleSheet(network, 0, torch.device("cpu"))
    place = 3 * NUM_COLUMNS + 2  # row 3, the second of the columns that vary
    image = HeunSampler(network, 2)(drawn.noise[place : place + 1], torch.tensor([3]), step_noise=None)
    shown = page.pictures()["Samples of the teacher from the same noise, in the same places"].convert("L")
    found = np.asarray(shown)[3 * 29 : 3 * 29 + 28, 29 : 29 + 28].astype(int)
    assert np.abs(found - to_uint8(image)[0, 0].numpy()).max() <= 1


def test_samples_stand_beside_the_real_images_nearest_to_them(whole):
    run, _, page = whole
    assert any("100 samples, in features, beside all 60 images of" in text for text in page.texts("p"))
    shown = [np.asarray(p) for alt, p in page.pictures().items() if alt.startswith("A sample, and beneath it the real")]
    sheet, real = read_sheet(run / "samples.png"), [image[0].numpy() for image in data.load().images[:60]]
    assert shown and all(picture.shape == (4 * 29 - 1, 28) for picture in shown)
    samples = [np.asarray(image) for row in sheet.varied for image in row]
    for picture in shown:
        assert any(np.array_equal(picture[:28], sample) for sample in samples)
        assert all(any(np.array_equal(picture[top : top + 28], one) for one in real) for top in (29, 58, 87))


def test_a_page_needs_nothing_else_and_reads_without_sight(whole):
    run, _, page = whole
    text = (run / "report.html").read_text()
    assert not page.all("script") and not re.search(r"https?:|url\(|@import|<iframe", text)
    assert all(element["src"].startswith("data:") for element in page.all("img"))
    assert all(element["href"] == "data:," for element in page.all("link"))
    levels = [int(element["tag"][1]) for element in page.elements if re.fullmatch("h[1-6]", element["tag"])]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
    assert all(element.get("aria-label") or element.get("aria-hidden") for element in page.all("svg"))
    assert all(element.get("scope") for element in page.all("th")) and page.all("html", lang="en")


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_text_stands_out(whole, mode):
    """WCAG 2: 4.5 to 1 for text, in both."""
    text = (whole[0] / "report.html").read_text()
    roots = re.findall(r":root \{([^}]*)\}", text)
    colours = dict(re.findall(r"--(\w+): (#\w{6})", roots[mode == "dark"]))

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    paper = luminance(colours["paper"])
    for name in ("ink", "soft", "accent"):
        low, high = sorted([paper, luminance(colours[name])])
        assert (high + 0.05) / (low + 0.05) >= 4.5, name


def test_configuration_versions_and_the_commit(whole):
    _, summary, page = whole
    pairs = dict(zip(page.texts("dt"), page.texts("dd"), strict=True))
    assert pairs["torch"] == summary["versions"]["torch"] == torch.__version__
    assert pairs["batch_size"] == "4" and pairs["noise.generator_sigmas"] == "80, 5"
    assert pairs.get("commit") == summary["versions"]["commit"]


def test_a_teacher_is_reported_too(tmp_path, capsys):
    arguments = ["--iterations", "2", "--batch-size", "4", "--warmup-iterations", "0", "--log-every", "1"]
    arguments += ["--model-channels", "8", "--num-samples", "40", "--teacher-steps", "2", "--device", "cpu"]
    few_digits(tmp_path / "data.npz")
    pretrain.main(
        [*arguments, "--data", str(tmp_path / "data.npz"), "--record", "none", "--out", str(tmp_path / "run")]
    )
    assert (
        capsys.readouterr().out.splitlines()[-1].endswith("teacher.safetensors, samples.png, summary.json, report.html")
    )
    page = Page((tmp_path / "run" / "report.html").read_text())
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert page.texts("p", class_="kind") == ["pretraining of a teacher"]
    assert page.texts("p", class_="big")[0] == f"{summary['teacher']['frechet_distance']:.3f}"
    assert [*page.table("All that was measured at the end")["precision"]] == ["teacher", "real images"]
    assert "Are they copies?" in page.texts("h2") and "What is missing" not in page.texts("h2")


def test_a_report_made_later_is_the_same(whole, tmp_path, capsys):
    """From what the configuration names: the same pictures and figures, whatever the moment."""
    run, _, page = whole
    command.main([str(run), "--out", str(tmp_path / "later.html"), "--device", "cpu"])
    assert capsys.readouterr().out == f"{tmp_path / 'later.html'}\n"
    assert (tmp_path / "later.html").read_text() == (run / "report.html").read_text()


def test_several_runs_are_compared(whole, tmp_path, capsys):
    run, summary, _ = whole
    shutil.copytree(run, tmp_path / "other")
    config = json.loads((run / "config.json").read_text())
    changed = {**config, "seed": 1, "optimizer": {**config["optimizer"], "fake_score_lr": 3e-4}}
    (tmp_path / "other" / "config.json").write_text(json.dumps(changed))
    other = {**summary, "iterations": 6, "generator": {**summary["generator"], "frechet_distance": 1.25}}
    (tmp_path / "other" / "summary.json").write_text(json.dumps(other))
    log = lines(run / "metrics.jsonl")[:3]
    log[0]["loss_fake"] = 0.125
    (tmp_path / "other" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    command.main([str(run), str(tmp_path / "other"), "--out", str(tmp_path / "both.html")])
    page = Page((tmp_path / "both.html").read_text())
    table = page.table("One row for each run")
    for name, figures, iterations in (("run", summary, "8"), ("other", other, "6")):
        assert table[name]["Fréchet distance"] == f"{figures['generator']['frechet_distance']:.3f}"
        assert table[name]["iterations"] == iterations
    differ = page.table("All others are the same")
    assert differ == {
        "seed": {"run": "0", "other": "1"},
        "optimizer.fake_score_lr": {"run": show(config["optimizer"]["fake_score_lr"]), "other": "0.0003"},
    }
    assert {"Samples of run", "Samples of other"} <= {*page.pictures()}
    (label,) = (e["aria-label"] for e in page.all("svg", role="img") if e["aria-label"].startswith("Loss of the fake"))
    assert "other from 0.125 at iteration 2" in label and "run from" in label


def test_runs_of_one_name_are_told_apart(whole, tmp_path):
    run, _, _ = whole
    shutil.copytree(run, tmp_path / "b" / "run")
    command.main([str(run), str(tmp_path / "b" / "run"), "--out", str(tmp_path / "both.html")])
    page = Page((tmp_path / "both.html").read_text())
    names = [f"{run.parent.name}/run", "b/run"]
    assert [*page.table("One row for each run")] == names
    (label,) = (e["aria-label"] for e in page.all("svg", role="img") if e["aria-label"].startswith("Loss of the fake"))
    assert all(f"{name} from" in label for name in names)
