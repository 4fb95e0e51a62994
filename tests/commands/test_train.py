"""`python -m fastdmd.train`, end to end on tiny runs: what it writes, and that it repeats itself."""

import dataclasses
import json
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fastdmd.networks.weights import load_network, save_network
from tests.helpers.networks import SMALL, make_network
from tests.helpers.small_datasets import class_files, edm_files, write_folder, write_idx, write_npz, write_zip
from tests.helpers.tiny_runs import QUICK, digits, run_train


def test_run_folder_holds_what_it_should(teacher_file, tmp_path, capsys):
    out = tmp_path / "run"
    summary = run_train(teacher_file, out)
    assert sorted(path.name for path in out.iterdir()) == [
        "checkpoints",
        "config.json",
        "generator.safetensors",
        "metrics.jsonl",
        "networks.safetensors",
        "samples.png",
        "summary.json",
    ]
    assert summary["outcome"] == "complete" and summary["iterations"] == 4
    assert summary["generator"]["evaluations"] == 1 and summary["teacher"]["evaluations"] == 3
    for row in ("teacher", "generator"):
        assert summary[row]["frechet_distance"] > summary["floor"]["frechet_distance"] > 0
        assert 0 <= summary[row]["class_accuracy"] <= 1 and summary[row]["images_per_second"] > 0
        assert summary[row]["num_images"] == 40
    assert summary["floor"]["class_accuracy"] > 0.99
    assert summary["versions"]["torch"] == torch.__version__ and summary["seconds"] > 0

    config = json.loads((out / "config.json").read_text())
    assert config["iterations"] == 4 and config["teacher"] == str(teacher_file) and config["noise"]["rho"] == 7.0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [2, 4]
    assert all(np.isfinite(list(line.values())).all() and line["loss_fake"] > 0 for line in lines)
    assert lines[0]["loss_dm"] == 0 < lines[1]["loss_dm"]  # the fake score starts as the teacher

    rows, columns = 10, 3 + 1 + 10  # three snapshots, a gap, ten varied samples; each 28 + 1 pixels, doubled
    assert Image.open(out / "samples.png").size == (2 * (29 * columns - 1), 2 * (29 * rows - 1))
    table = capsys.readouterr().out
    for row in ("teacher", "generator", "floor: real images"):
        assert re.search(rf"^{row}\s.*\d", table, re.MULTILINE)


def test_generator_is_the_average_and_differs_from_the_teacher(teacher_file, tmp_path):
    run_train(teacher_file, tmp_path / "run", "--num-samples", "0")
    generator, metadata = load_network(tmp_path / "run" / "generator.safetensors")
    assert metadata["kind"] == "generator" and metadata["conditioning_sigma"] == 80.0
    assert metadata["iterations"] == 4 and metadata["config"]["batch_size"] == 4
    moved = [
        (a - b).abs().max().item() for a, b in zip(generator.parameters(), make_network().parameters(), strict=True)
    ]
    assert min(moved) > 0


def test_same_seed_same_result(teacher_file, tmp_path):
    runs = {name: tmp_path / name for name in ("first", "again", "other")}
    for name, out in runs.items():
        run_train(teacher_file, out, "--num-samples", "0", "--seed", "7" if name == "other" else "3")
    weights = {name: load_file(out / "generator.safetensors") for name, out in runs.items()}
    assert all(torch.equal(weights["first"][key], weights["again"][key]) for key in weights["first"])
    assert not all(torch.equal(weights["first"][key], weights["other"][key]) for key in weights["first"])
    losses = [
        [json.loads(line)["loss_fake"] for line in (out / "metrics.jsonl").read_text().splitlines()]
        for out in runs.values()
    ]
    assert losses[0] == losses[1] != losses[2]
    pictures = [(out / "samples.png").read_bytes() for out in runs.values()]
    assert pictures[0] == pictures[1] != pictures[2]


WRITERS = {
    "idx": lambda path, images, labels: write_idx(path, images, labels, compressed=True),
    "npz": lambda path, images, labels: write_npz(path.with_suffix(".npz"), images=images, labels=labels),
    "folder": lambda path, images, labels: write_folder(path, class_files(images, labels)),
    "zip": lambda path, images, labels: write_zip(path.with_suffix(".zip"), edm_files(images, labels)),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_every_kind_of_data_gives_the_same_figures(write, teacher_file, tmp_path):
    source = write(tmp_path / "data", *digits())
    summary = run_train(teacher_file, tmp_path / "run", "--data", str(source))
    expected = dict(zip(("images", "labels"), digits(), strict=True))
    np.savez(tmp_path / "expected.npz", **expected)
    expected = run_train(teacher_file, tmp_path / "expected", "--data", str(tmp_path / "expected.npz"))
    for row in ("teacher", "generator"):
        assert summary[row]["frechet_distance"] == pytest.approx(expected[row]["frechet_distance"], rel=1e-6)
        assert summary[row]["class_accuracy"] == expected[row]["class_accuracy"]
    assert summary["floor"]["num_images"] == 20  # one half against the other


def test_data_need_no_labels(teacher_file, tmp_path):
    images, _ = digits()
    np.savez(tmp_path / "unlabelled.npz", images=images)
    summary = run_train(teacher_file, tmp_path / "run", "--data", str(tmp_path / "unlabelled.npz"))
    assert summary["floor"]["frechet_distance"] > 0 and summary["floor"]["class_accuracy"] is None
    assert summary["generator"]["class_accuracy"] is not None  # its labels are those it was asked for


def test_other_images_need_their_own_feature_network(tmp_path, capsys, monkeypatch):
    config = dataclasses.replace(SMALL, image_size=16, image_channels=3, num_classes=0)
    teacher_file = tmp_path / "rgb.safetensors"
    save_network(teacher_file, make_network(config), kind="teacher")
    images = np.random.default_rng(0).integers(0, 256, (60, 16, 16, 3), np.uint8)
    np.savez(tmp_path / "rgb.npz", images=images)
    summary = run_train(teacher_file, tmp_path / "run", "--data", str(tmp_path / "rgb.npz"))
    assert "no Fréchet distance: the embedded feature network sees 1×28×28 images" in capsys.readouterr().err
    assert summary["generator"]["frechet_distance"] is None and summary["generator"]["images_per_second"] > 0

    (tmp_path / "my_features.py").write_text(
        "import torch\nclass Mean(torch.nn.Module):\n    def forward(self, x):\n        return x.mean((2, 3))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    options = ["--data", str(tmp_path / "rgb.npz"), "--feature-network", "my_features:Mean"]
    summary = run_train(teacher_file, tmp_path / "measured", *options)
    assert summary["generator"]["frechet_distance"] > summary["floor"]["frechet_distance"] > 0
    assert summary["generator"]["class_accuracy"] is None

    features = (images / 127.5 - 1).mean((1, 2))
    np.savez(tmp_path / "reference.npz", mu=features.mean(0), sigma=np.cov(features, rowvar=False))
    options += ["--reference", str(tmp_path / "reference.npz")]
    again = run_train(teacher_file, tmp_path / "referenced", *options)
    expected = summary["generator"]["frechet_distance"]
    assert again["generator"]["frechet_distance"] == pytest.approx(expected, rel=1e-4)


def test_a_generator_is_no_teacher(tmp_path, capsys):
    save_network(tmp_path / "g.safetensors", make_network(), kind="generator", conditioning_sigma=80.0)
    with pytest.raises(SystemExit):
        run_train(tmp_path / "g.safetensors", tmp_path / "run")
    assert "expected --teacher to be a teacher, got a generator in" in capsys.readouterr().err


def test_ctrl_c_saves_what_was_reached(teacher_file, tmp_path):
    pytest.importorskip("tyro", reason="tyro is not installed")
    out = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "fastdmd.train",
        "--teacher",
        str(teacher_file),
        "--out",
        str(out),
        *QUICK,
        "--data",
        str(tmp_path / "digits.npz"),
        "--gan-guidance-weight",
        "1e-2",
        "--iterations",
        "1000000",
        "--snapshots",
        "1",
    ]
    images, labels = digits()
    np.savez(tmp_path / "digits.npz", images=images, labels=labels)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (out / "metrics.jsonl").exists() or len((out / "metrics.jsonl").read_text().splitlines()) < 3:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in error
    summary = json.loads((out / "summary.json").read_text())
    assert summary["outcome"] == "interrupted" and 6 <= summary["iterations"] < 1000000
    assert summary["generator"]["frechet_distance"] is None
    assert f"interrupted after {summary['iterations']} of 1000000 iterations" in output
    assert "with which these figures compare" not in output  # there are none
    _, metadata = load_network(out / "generator.safetensors")
    assert metadata["iterations"] == summary["iterations"]
    assert Image.open(out / "samples.png").width > 0


def test_divergence_ends_the_run_and_keeps_the_last_snapshot(teacher_file, tmp_path, capsys):
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as exit_:
        run_train(teacher_file, out, "--generator-lr", "1e30", "--weight-decay", "1e8", "--iterations", "8")
    assert "NaN or infinity in its samples; the last good snapshot is kept" in exit_.value.code
    assert json.loads((out / "summary.json").read_text())["outcome"] == "diverged"
    generator, metadata = load_network(out / "generator.safetensors")
    assert metadata["iterations"] == 0 and all(p.isfinite().all() for p in generator.parameters())
