"""The other commands, end to end on tiny networks, and how they work together."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from fastdmd import evaluate, ops, pretrain, sample, train
from fastdmd.networks.weights import load_network, save_network
from fastdmd.randomness import Stream, normals
from tests.helpers.networks import make_network
from tests.helpers.tiny_runs import QUIET, run_train


def test_dry_run_prints_the_resolved_configuration_and_writes_nothing(teacher_file, tmp_path, capsys):
    train.main(
        [
            "--teacher",
            str(teacher_file),
            "--preset",
            "mnist-reference",
            "--seed",
            "9",
            "--dry-run",
            "--out",
            str(tmp_path / "run"),
        ]
    )
    resolved = json.loads(capsys.readouterr().out)
    assert resolved["dfake_gen_update_ratio"] == 10 and resolved["seed"] == 9
    assert resolved["optimizer"]["generator_lr"] == 2e-4
    assert resolved["budget"]["num_parameters"] == sum(p.numel() for p in make_network().parameters())
    assert not (tmp_path / "run").exists()


def test_sample_writes_pictures_and_arrays(teacher_file, tmp_path):
    generator = tmp_path / "generator.safetensors"
    save_network(generator, make_network(), kind="generator", conditioning_sigma=80.0)
    arrays = {}
    for name, options in {"a": [], "b": ["--batch-size", "3"], "c": ["--seed", "1"], "d": ["--labels", "3"]}.items():
        out = tmp_path / f"{name}.npz"
        sample.main([str(generator), "--num", "8", "--labels", "3,5", "--out", str(out), "--device", "cpu", *options])
        arrays[name] = np.load(out)
    assert arrays["a"]["images"].shape == (8, 28, 28, 1) and arrays["a"]["images"].dtype == np.uint8
    assert arrays["a"]["labels"].tolist() == [3, 5] * 4 and arrays["d"]["labels"].tolist() == [3] * 8
    difference = arrays["a"]["images"].astype(int) - arrays["b"]["images"]
    assert np.abs(difference).max() <= 1  # the batch size changes rounding, nothing else
    assert np.abs(arrays["a"]["images"].astype(int) - arrays["c"]["images"]).max() > 10
    assert np.array_equal(arrays["a"]["images"][::2], arrays["d"]["images"][::2])
    assert not np.array_equal(arrays["a"]["images"][1::2], arrays["d"]["images"][1::2])

    sample.main([str(teacher_file), "--num", "5", "--out", str(tmp_path / "t.png"), "--teacher-steps", "2"])
    assert Image.open(tmp_path / "t.png").size == (29 * 3 - 1, 29 * 2 - 1)
    network = torch.tensor(arrays["a"]["images"][0, :, :, 0] / 127.5 - 1)
    expected = make_network()(sample_noise(8) * 80, torch.full((8,), 80.0), torch.tensor([3, 5] * 4))
    assert (expected[0, 0].clamp(-1, 1) - network).abs().max() < 1 / 127


def sample_noise(num):
    return normals((num, 1, 28, 28), ops.rng_key(0, stream=Stream.EVALUATION_NOISE))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--labels", "3,10"], "expected --labels from 0 to 9, separated by commas, got 3,10"),
        (["--labels", "x"], "expected --labels from 0 to 9, separated by commas, got x"),
        (["--labels", "9" * 5000], "expected --labels from 0 to 9, separated by commas, got 9999"),
        (["--labels", "0" * 5000], "expected --labels from 0 to 9, separated by commas, got 0000"),
        (["--num", "0"], "expected --num >= 1, got 0"),
        (["--out", "samples.gif"], "expected --out ending in .png or .npz, got samples.gif"),
        (["--out", "no/such/folder/samples.png"], "expected --out in an existing folder"),
    ],
)
def test_sample_refuses(options, message, teacher_file, capsys):
    with pytest.raises(SystemExit) as exit_:
        sample.main([str(teacher_file), *options])
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and error.count("\n") == 1 and message in error


def test_sample_keeps_latents_as_they_are_and_refuses_broken_images(tmp_path, monkeypatch, capsys):
    (tmp_path / "latent.py").write_text("""
import torch

class Net(torch.nn.Module):
    image_shape, num_classes, limit = (4, 8, 8), 0, 1000

    def __init__(self):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(3.0))

    def forward(self, x, sigma):
        return self.gain * x.sign() / (sigma < self.limit)[:, None, None, None]

class Limited(Net):
    limit = 79
""")
    monkeypatch.syspath_prepend(tmp_path)
    options = ["--parameterization", "x0", "--num", "2", "--out", str(tmp_path / "a.npz"), "--teacher-steps", "2"]
    with pytest.raises(SystemExit) as exit_:
        sample.main(["latent:Limited", *options])  # from sigma 80
    assert exit_.value.code == 2 and not (tmp_path / "a.npz").exists()
    assert "expected finite images of latent:Limited, got NaN or infinity in 2 of them" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit_:
        evaluate.main(["latent:Limited", *options[:2], "--num-samples", "4", "--teacher-steps", "2"])  # speed alone
    assert exit_.value.code == 1 and "expected finite images of the teacher, got NaN" in capsys.readouterr().err
    sample.main(["latent:Net", *options])
    latents = np.load(tmp_path / "a.npz")["latents"]
    assert latents.shape == (2, 4, 8, 8) and latents.dtype == np.float32 and np.unique(latents).tolist() == [-3, 3]


def test_evaluate_repeats_the_figures_of_the_run(teacher_file, tmp_path, capsys):
    summary = run_train(teacher_file, tmp_path / "run")
    evaluate.main(
        [str(tmp_path / "run" / "generator.safetensors"), "--num-samples", "40", "--out", str(tmp_path / "q.json")]
    )
    figures = json.loads((tmp_path / "q.json").read_text())
    for name in ("frechet_distance", "class_accuracy", "evaluations"):
        assert figures["generator"][name] == pytest.approx(summary["generator"][name], rel=1e-5)
        assert figures["floor"][name] == summary["floor"][name]
    assert "floor: real images" in capsys.readouterr().out


def test_pretrain_learns_and_train_takes_its_teacher(tmp_path):
    out = tmp_path / "teacher"
    pretrain.main(
        [
            *QUIET,
            "--out",
            str(out),
            "--iterations",
            "60",
            "--batch-size",
            "8",
            "--model-channels",
            "8",
            "--warmup-iterations",
            "5",
            "--learning-rate",
            "5e-3",
            "--log-every",
            "20",
            "--snapshots",
            "1",
            "--num-samples",
            "20",
            "--teacher-steps",
            "2",
            "--device",
            "cpu",
            "--weights-dtype",
            "float16",
            "--label-emphasis",
            "1.3",
        ]
    )
    losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 3 and losses[-1] < 0.8 * losses[0]
    network, metadata = load_network(out / "teacher.safetensors")
    assert metadata["kind"] == "teacher" and metadata["config"]["learning_rate"] == 5e-3
    summary = json.loads((out / "summary.json").read_text())
    assert metadata["record"]["quality"] == summary["teacher"] and not summary["teacher"]["recorded"]
    assert network.config.model_channels == 8 and network.config.num_classes == 10

    num_parameters = sum(p.numel() for p in network.parameters())
    assert 2 * num_parameters < (out / "teacher.safetensors").stat().st_size < 3 * num_parameters

    # What pretrain recorded is used where the measurement would be the same, and only there.
    known = run_train(out / "teacher.safetensors", tmp_path / "known", "--num-samples", "20")["teacher"]
    repeated = run_train(
        out / "teacher.safetensors", tmp_path / "repeated", "--num-samples", "20", "--measure-teacher"
    )["teacher"]
    assert known["recorded"] and not repeated["recorded"]
    assert known["frechet_distance"] == summary["teacher"]["frechet_distance"]
    assert repeated["frechet_distance"] == pytest.approx(known["frechet_distance"], rel=1e-5)
    for changed in (["--num-samples", "30"], ["--seed", "1"], ["--teacher-steps", "3"]):
        options = ["--num-samples", "20", *changed]
        assert not run_train(out / "teacher.safetensors", tmp_path / changed[0], *options)["teacher"]["recorded"]


def test_commands_work_from_anywhere(tmp_path):
    """Installed, with the embedded teacher, in a folder that knows nothing of the project."""
    pytest.importorskip("tyro", reason="tyro is not installed")
    command = [sys.executable, "-m", "fastdmd.sample", "mnist", "--num", "1", "--teacher-steps", "2"]
    result = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": ""}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert Image.open(tmp_path / "samples.png").size == (28, 28)
