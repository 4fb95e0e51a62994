"""`fastdmd.pairs`, and runs of `fastdmd.train` by other methods than DMD2."""

import copy
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastdmd import pairs, quality, teachers, train
from fastdmd.data.pairs import load_pairs
from fastdmd.distill.method_settings import MethodSettings
from fastdmd.networks.identity import identity
from fastdmd.networks.unet import UNet
from fastdmd.networks.weights import save_network
from fastdmd.runs.config import TrainConfig
from fastdmd.runs.distillation import teacher_pairs
from fastdmd.sampling import HeunSampler
from tests.helpers.tiny_runs import QUICK, refuses, run_train

ROOT = Path(__file__).parents[2]
SHAPE = {"image_shape": (1, 28, 28), "num_classes": 10, "sigma": 80.0}
TINY = ["--num", "7", "--batch-size", "3", "--teacher-steps", "2", "--device", "cpu"]


def run_pairs(teacher_file, out, *options):
    pairs.main(["--teacher", str(teacher_file), "--out", str(out), *TINY, *options])
    return out


def contents(path):
    return {file.name: file.read_bytes() for file in path.iterdir() if file.name != "pairs.lock"}


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_pairs_are_those_of_heuns_method(teacher_file, tmp_path, capsys):
    out = run_pairs(teacher_file, tmp_path / "pairs", "--seed", "3")
    assert capsys.readouterr().out == f"{out}: 7 pairs\n"
    teacher = teachers.load(str(teacher_file))
    found = load_pairs(out, teacher=identity(teacher), image_shape=(1, 28, 28), num_classes=10, sigma=80.0)
    assert found.labels.tolist() == [0, 1, 2, 3, 4, 5, 6]
    for start in (0, 3, 6):
        part = slice(start, start + 3)
        assert torch.equal(HeunSampler(teacher, 2)(found.noise[part], found.labels[part]), found.images[part])
    assert found.images.std() > 0.1


def test_pairs_are_of_the_teacher_that_is_distilled(teacher_file, tmp_path, capsys):
    """Its labels emphasized alike; so are the embedded teacher's by default."""
    out = run_pairs(teacher_file, tmp_path / "pairs", "--label-emphasis", "1.3")
    plain = run_pairs(teacher_file, tmp_path / "plain")
    teacher = teachers.load(str(teacher_file))
    config = TrainConfig(label_emphasis=1.3, method=MethodSettings(regression_weight=1.0, pairs=str(out)))
    found = teacher_pairs(config.for_teacher(teacher), teacher)
    teacher.emphasize_labels(1.3)
    part = slice(0, 3)
    assert torch.equal(HeunSampler(teacher, 2)(found.noise[part], found.labels[part]), found.images[part])
    assert not torch.equal(found.images[part], load_file(plain / "pairs-00000.safetensors")["images"])

    capsys.readouterr()
    arguments = ["--teacher", str(teacher_file), "--pairs", str(out), "--regression-weight", "1", *QUICK]
    refuses(train, arguments, "expected images of the teacher with --label-emphasis 1.0 in .*pairs, got 1.3", capsys)
    embedded = run_pairs("mnist", tmp_path / "embedded", "--num", "1")
    assert json.loads((embedded / "pairs.json").read_text())["label_emphasis"] == 0.923


def test_a_teacher_of_shapes_alone_takes_pairs_of_any(teacher, teacher_file, tmp_path):
    """As that of a dry run of a preset; but not those of other shapes."""
    out = run_pairs(teacher_file, tmp_path / "pairs")
    settings = TrainConfig(method=MethodSettings(regression_weight=1.0, pairs=str(out)))
    shapes = copy.deepcopy(teacher).to("meta")
    found = teacher_pairs(settings.for_teacher(teacher), shapes)
    assert len(found) == 7 and torch.equal(found.images, teacher_pairs(settings.for_teacher(teacher), teacher).images)
    with torch.device("meta"):
        other = UNet(dataclasses.replace(teacher.config, image_size=16, attention_resolutions=(4,)))
    with pytest.raises(ValueError, match="expected images of shape \\(1, 16, 16\\) in .*, got \\(1, 28, 28\\)"):
        teacher_pairs(settings.for_teacher(other), other)


def test_what_is_missing_is_made_again_to_the_bit(teacher_file, tmp_path, monkeypatch):
    """After an end in the middle, and of files that are gone or not whole; others are not touched."""
    whole = contents(run_pairs(teacher_file, tmp_path / "whole"))
    assert len(whole) == 5
    sample, made = quality.sample, []

    def ends(sampler, noise, labels):
        if len(made) == 2:
            raise MemoryError
        made.append(labels.tolist())
        return sample(sampler, noise, labels)

    out = tmp_path / "pairs"
    monkeypatch.setattr(quality, "sample", ends)
    with pytest.raises(SystemExit) as stop:
        run_pairs(teacher_file, out)
    assert stop.value.code == 1 and made == [[0, 1, 2], [3, 4, 5]]
    assert sorted(contents(out)) == ["SHA256SUMS", "pairs-00000.safetensors", "pairs-00001.safetensors", "pairs.json"]
    made.clear()
    assert contents(run_pairs(teacher_file, out)) == whole and made == [[6]]
    made.clear()
    (out / "pairs-00000.safetensors").unlink()
    (out / "pairs-00002.safetensors").write_bytes(whole["pairs-00002.safetensors"][:-4])
    kept = (out / "pairs-00001.safetensors").stat().st_mtime_ns
    assert contents(run_pairs(teacher_file, out)) == whole and made == [[0, 1, 2], [6]]
    assert (out / "pairs-00001.safetensors").stat().st_mtime_ns == kept
    made.clear()
    assert contents(run_pairs(teacher_file, out)) == whole and made == []
    tensors = load_file(out / "pairs-00001.safetensors")  # whole, and not what was written
    save_file({**tensors, "images": tensors["images"] + 1}, out / "pairs-00001.safetensors")
    with pytest.raises(ValueError, match="expected .*pairs-00001.safetensors as it was written, got another than SHA"):
        load_pairs(out, teacher=identity(teachers.load(str(teacher_file))), **SHAPE)
    assert contents(run_pairs(teacher_file, out)) == whole and made == [[3, 4, 5]]


def test_a_signal_ends_it_and_leaves_whole_files(tmp_path):
    """Here in the second batch of somebody's code, which then is slow."""
    pytest.importorskip("tyro", reason="tyro is not installed")
    (tmp_path / "slow.py").write_text(
        "import pathlib, time, torch\n"
        "class Net(torch.nn.Conv2d):\n"
        "    image_shape, num_classes = (1, 8, 8), 0\n"
        "    def __init__(self):\n"
        "        super().__init__(1, 1, 3, padding=1)\n"
        "    def forward(self, x, sigma):\n"
        "        if pathlib.Path('out/pairs-00000.safetensors').exists():\n"
        "            pathlib.Path('there').touch()\n"
        "            time.sleep(60)\n"
        "        return super().forward(x)\n"
    )
    teacher = ["--teacher", "slow:Net", "--parameterization", "x0", "--out", "out"]
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "fastdmd.pairs", *teacher, *TINY],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    while not (tmp_path / "there").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output, error = process.communicate(timeout=60)
    assert (process.returncode, output) == (143, "")
    assert error.splitlines()[-1] == "fastdmd.pairs: ended by SIGTERM"
    assert sorted(contents(tmp_path / "out")) == ["SHA256SUMS", "pairs-00000.safetensors", "pairs.json"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seed", "1"], "expected the settings that the run was begun with: --seed 0, got 1$"),
        (["--teacher-steps", "3", "--batch-size", "2"], "begun with: --batch-size 3, got 2; --teacher-steps 2, got 3$"),
        (["--num", "8"], "expected the settings that the run was begun with: --num 7, got 8$"),
        (
            ["--teacher", "mnist"],
            "expected the teacher that the run was begun with, [0-9a-f]{16}, got one of other wei",
        ),
    ],
)
def test_the_folder_of_another_command_is_left_alone(options, message, teacher_file, tmp_path, capsys):
    out = run_pairs(teacher_file, tmp_path / "pairs")
    before = contents(out)
    capsys.readouterr()
    refuses(pairs, ["--teacher", str(teacher_file), "--out", str(out), *TINY, *options], message, capsys)
    assert contents(out) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num", "0"], "expected --num >= 1, got 0"),
        (["--teacher", "nowhere.safetensors"], "nowhere.safetensors, which does not exist"),
        (["--out", lambda path: path.write_text("a file")], "expected a folder for --out, got the file"),
        (["--out", "/proc/pairs"], "expected --out to be writable, got /proc/pairs: "),
        (["--device", "teapot"], "expected --device auto, cpu or a CUDA device"),
    ],
)
def test_mistakes(options, message, teacher_file, tmp_path, capsys):
    name, value = options
    if callable(value):
        value(tmp_path / "input")
        value = str(tmp_path / "input")
    arguments = ["--teacher", str(teacher_file), "--out", str(tmp_path / "pairs"), *TINY, name, value]
    refuses(pairs, arguments, message, capsys)
    assert not (tmp_path / "pairs").exists()


def test_a_generator_is_no_teacher(teacher, tmp_path, capsys):
    generator = tmp_path / "generator.safetensors"
    save_network(generator, teacher, kind="generator", conditioning_sigma=80.0)
    arguments = ["--teacher", str(generator), "--out", str(tmp_path / "pairs"), *TINY]
    refuses(pairs, arguments, "expected --teacher to be a teacher, got a generator in", capsys)
    assert not (tmp_path / "pairs").exists()


class Broken(torch.nn.Conv2d):
    """Finite where it is tried, and not where images begin."""

    image_shape, num_classes = (1, 8, 8), 0

    def __init__(self):
        super().__init__(1, 1, 3, padding=1)

    def forward(self, x, sigma):
        return torch.where(sigma.view(-1, 1, 1, 1) > 50, torch.nan, 0) + super().forward(x)


@pytest.mark.filterwarnings("ignore:Broken")
def test_images_that_are_not_finite_are_not_written(tmp_path, capsys):
    options = ["--teacher", f"{__name__}:Broken", "--parameterization", "x0", "--teacher-sigma-data", "0.5"]
    with pytest.raises(SystemExit) as stop:
        pairs.main(["--out", str(tmp_path / "pairs"), *TINY, *options])
    assert stop.value.code == 1
    assert "expected finite images of the teacher, got NaN or infinity in 3" in capsys.readouterr().err
    assert sorted(contents(tmp_path / "pairs")) == ["SHA256SUMS", "pairs.json"]


def test_a_run_with_a_regression(teacher_file, tmp_path):
    """Its losses are logged and its settings recorded."""
    out = run_pairs(teacher_file, tmp_path / "pairs")
    options = ["--regression-weight", "0.25", "--pairs", str(out), "--num-samples", "0"]
    assert run_train(teacher_file, tmp_path / "run", *options)["outcome"] == "complete"
    assert all(line["loss_regression"] > 1e-3 and "loss_dm" in line for line in lines(tmp_path / "run"))
    config = json.loads((tmp_path / "run" / "config.json").read_text())["method"]
    assert config == {
        "name": "dmd2",
        "sid_alpha": 1.0,
        "fake_loss_weight": "as-trained",
        "regression_weight": 0.25,
        "pairs": str(out),
    }


def test_a_run_of_sid_with_everything_beside_it(tmp_path):
    """Of the embedded teacher, its digits for the adversarial term, and its own pairs."""
    out = run_pairs("mnist", tmp_path / "pairs")
    terms = ["--gan-guidance-weight", "1e-2", "--gan-generator-weight", "3e-3", "--regression-weight", "1"]
    options = ["--sid-alpha", "1.2", "--max-step-percent", "0.8", "--pairs", str(out), "--num-samples", "0"]
    train.main(["--out", str(tmp_path / "run"), *QUICK, "--method", "sid", *terms, *options])
    last = lines(tmp_path / "run")[-1]
    assert last["loss_sid"] != 0 and last["loss_gan_generator"] > 0 and last["loss_regression"] > 0
    assert "loss_dm" not in last and "skipped_updates" not in last


def test_what_a_run_refuses_of_methods_and_pairs(teacher_file, tmp_path, capsys):
    out = run_pairs(teacher_file, tmp_path / "pairs")
    (out / "pairs-00001.safetensors").unlink()
    capsys.readouterr()
    arguments = ["--teacher", str(teacher_file), "--out", str(tmp_path / "run"), *QUICK]
    weight = ["--regression-weight", "1"]
    for options, message in (
        (["--sid-alpha", "1.2"], "expected --sid-alpha together with --method sid, got 1.2"),
        (weight, "expected --pairs with images of the teacher for --regression-weight, got none"),
        (["--pairs", str(out)], "expected --pairs together with --regression-weight"),
        ([*weight, "--pairs", str(ROOT / "docs")], "expected a folder of fastdmd.pairs, got .*, without pairs.json"),
        ([*weight, "--pairs", str(out)], "expected 3 files of pairs in .*, got none .* pairs-00001.safetensors"),
        (
            [*weight, "--pairs", str(out), "--conditioning-sigma", "40"],
            "expected noise scaled with .* 40.0 .*, got 80.0",
        ),
        ([*weight, "--pairs", str(out), "--teacher", "mnist"], "expected images of the teacher [0-9a-f]{16} in"),
        ([*weight, "--pairs", str(out), "--out", str(out / "run")], "expected --out apart from what the command reads"),
    ):
        refuses(train, [*arguments, *options], message, capsys)
    assert not (tmp_path / "run").exists() and not (out / "run").exists()


class Detached(torch.nn.Conv2d):
    """Trains, and does not say how what it gives depends on its images."""

    image_shape, num_classes = (1, 8, 8), 0

    def __init__(self):
        super().__init__(1, 1, 3, padding=1)

    def forward(self, x, sigma):
        return super().forward(x.detach())


@pytest.mark.filterwarnings("ignore:Detached")
def test_sid_needs_networks_with_a_derivative(tmp_path, capsys):
    options = ["--teacher", f"{__name__}:Detached", "--parameterization", "x0", "--teacher-sigma-data", "0.5"]
    arguments = ["--out", str(tmp_path / "run"), *QUICK, *options, "--num-samples", "0"]
    message = "expected a gradient of Detached's denoised images in the images, got none"
    refuses(train, [*arguments, "--method", "sid"], message, capsys)
    assert not (tmp_path / "run").exists()
    train.main([*arguments, "--iterations", "2"])
