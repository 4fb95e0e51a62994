"""The commands with a generator of several steps: what they write, sample and measure, and what they refuse."""

import json
import re

import numpy as np
import pytest
import torch

from fastdmd import evaluate, load_generator, ops, sample, train
from fastdmd.networks.weights import load_network, save_network
from fastdmd.randomness import Stream, normals
from fastdmd.runs import distillation
from fastdmd.runs.config import TrainConfig
from tests.helpers.networks import make_network
from tests.helpers.tiny_runs import QUICK, digits, refuses, run_train

SIGMAS = (80.0, 6.5, 0.75)
SIX = ["--batch-size", "6"]
SEVERAL = ["--generator-sigmas", "80,6.5,.75", *SIX]
ROWS = {"generator": 3, "generator, 2 steps": 2, "generator, 1 step": 1}


def arrays(weights, out, *options):
    sample.main([str(weights), "--num", "7", "--labels", "3,5", "--out", str(out), "--device", "cpu", *options])
    return np.load(out)["images"].astype(int)


def figures(measured):
    return {name: {k: v for k, v in measured[name].items() if k != "images_per_second"} for name in ROWS}


@pytest.fixture
def data(tmp_path):
    np.savez(tmp_path / "data.npz", **dict(zip(("images", "labels"), digits(), strict=True)))
    return ["--data", str(tmp_path / "data.npz")]


def test_a_run_of_several_steps(teacher_file, data, tmp_path, capsys):
    """Its figures by the number of steps, which `evaluate` repeats; what the file says; the same for a seed."""
    summary = run_train(teacher_file, tmp_path / "run", *SEVERAL, *data)
    assert {name: summary[name]["evaluations"] for name in ROWS} == ROWS
    assert len({summary[name]["frechet_distance"] for name in ROWS}) == 3
    lines = capsys.readouterr().out.splitlines()
    shown = [line[:24].strip() for line in lines if re.match(r"(teacher|generator|floor).{23} *\d* .*\d", line)]
    assert shown == ["teacher", "generator, 1 step", "generator, 2 steps", "generator", "floor: real images"]

    noise = json.loads((tmp_path / "run" / "config.json").read_text())["noise"]
    assert noise["generator_sigmas"] == list(SIGMAS) and noise["conditioning_sigma"] == 80.0
    weights = tmp_path / "run" / "generator.safetensors"
    metadata = load_network(weights)[1]
    assert metadata["generator_sigmas"] == list(SIGMAS) and "conditioning_sigma" not in metadata
    assert load_generator(weights).sigmas == SIGMAS

    torch.manual_seed(123)
    out = tmp_path / "figures.json"
    evaluate.main([str(weights), "--num-samples", "40", "--device", "cpu", "--out", str(out), *data])
    assert figures(json.loads(out.read_text())) == figures(summary)
    run_train(teacher_file, tmp_path / "again", *SEVERAL, "--num-samples", "0")
    pictures = [(tmp_path / name / "samples.png").read_bytes() for name in ("run", "again")]
    assert pictures[0] == pictures[1]


def test_samples_are_of_their_number_and_seed(tmp_path):
    """Whatever the batch, however many there are, and whatever was drawn elsewhere; as the levels say."""
    weights, network = tmp_path / "g.safetensors", make_network()
    save_network(weights, network, kind="generator", generator_sigmas=list(SIGMAS))
    images = arrays(weights, tmp_path / "a.npz")
    torch.manual_seed(5)
    for options in (["--batch-size", "3"], ["--batch-size", "1"], []):
        assert np.abs(images - arrays(weights, tmp_path / "b.npz", *options)).max() <= 1  # rounding
    assert np.abs(images - arrays(weights, tmp_path / "c.npz", "--seed", "1")).max() > 10

    generator, labels = load_generator(weights), torch.tensor([3, 5] * 4)[:7]
    noise = normals((7, 1, 28, 28), ops.rng_key(0, stream=Stream.EVALUATION_NOISE))
    step_noise = normals((7, 2, 28, 28), ops.rng_key(0, stream=Stream.EVALUATION_STEP_NOISE))[:, :, None]
    x = 80 * noise
    for sigma, added in zip(SIGMAS, (*step_noise.unbind(1), None), strict=True):
        x_0 = network(x, torch.full((7,), sigma), labels)
        x = x_0 if added is None else x_0 + SIGMAS[SIGMAS.index(sigma) + 1] * added
    expected = ((x + 1) * 127.5).clamp(0, 255)
    assert (expected[:, 0] - torch.from_numpy(images[..., 0])).abs().max() < 1 and expected.std() > 20
    torch.testing.assert_close(generator(noise, labels, step_noise=step_noise), x, rtol=1e-4, atol=1e-4)


def test_noised_data(teacher_file, data, tmp_path, capsys):
    """The embedded teacher has its digits; others need --data. What training has seen of the figures is told."""
    noised = [*SEVERAL, "--generator-inputs", "noised-data"]
    run_train(teacher_file, tmp_path / "run", *noised, *data, "--num-samples", "20")
    told = capsys.readouterr()
    assert "The generator trained on" in told.out and "with which these figures compare" in told.out
    assert "7 of the teacher's 10 classes have no image" in told.err
    assert "beyond its first step the generator learns nothing of them" in told.err
    config = TrainConfig().replace(generator_sigmas=SIGMAS, generator_inputs="noised-data")
    assert distillation.real_images(config, make_network(), None).name == "embedded MNIST digits"
    np.savez(tmp_path / "bare.npz", images=digits()[0])
    arguments = ["--teacher", str(teacher_file), "--out", str(tmp_path / "no"), *QUICK, *noised]
    refuses(train, arguments, "expected --data with real images for --generator-inputs noised-data, got none", capsys)
    refuses(train, [*arguments, "--data", str(tmp_path / "bare.npz")], "expected .*labels.*bare.npz", capsys)
    assert not (tmp_path / "no").exists()


def test_a_dry_run_counts_the_steps(teacher_file, capsys):
    flops = []
    for options in (["--generator-sigmas", "80", *SIX], SEVERAL, ["--conditioning-sigma", "80", *SEVERAL]):
        train.main(["--dry-run", "--device", "cpu", "--teacher", str(teacher_file), *options])
        resolved = json.loads(capsys.readouterr().out)
        assert resolved["noise"]["generator_sigmas"] == ([80.0] if len(flops) == 0 else list(SIGMAS))
        flops.append(resolved["budget"]["iteration_flops"])
    assert flops[1] - flops[0] == pytest.approx(resolved["batch_size"] * resolved["budget"]["forward_flops"], rel=1e-3)
    assert flops[1] == flops[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--generator-sigmas", "80,80"], r"expected --generator-sigmas as noise levels, the highest first, got"),
        (["--generator-sigmas", "2,80"], r"the highest first, got \(2.0, 80.0\)"),
        (["--generator-sigmas=-1"], r"expected --generator-sigmas > 0 and finite, got \(-1.0,\)"),
        (["--generator-sigmas", "80,nan"], r"expected --generator-sigmas > 0 and finite, got \(80.0, nan\)"),
        (["--generator-sigmas", "1e10,1"], "expected --generator-sigmas <= 10.9, got"),
        ([*SEVERAL, "--conditioning-sigma", "40"], "--conditioning-sigma 80.0, with which --generator-sigmas begin"),
        ([*SEVERAL, "--batch-size", "8"], "expected --batch-size that the 3 steps of --generator-sigmas divide, got 8"),
        (["--generator-inputs", "noised-data"], "--generator-inputs together with several --generator-sigmas, got"),
        (
            ["--generator-inputs", "noised-data", "--generator-sigmas", "80"],
            "--generator-inputs together with several --generator-sigmas, got noised-data",
        ),
    ],
)
def test_mistakes(options, message, teacher_file, tmp_path, capsys):
    refuses(train, ["--teacher", str(teacher_file), "--out", str(tmp_path / "run"), *QUICK, *options], message, capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore:Network")  # which nobody has trained
@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--generator-sigmas", "200,2", r"<= 157.\d+, the end of the teacher's noise schedule, got \(200.0, 2.0\)"),
        ("--conditioning-sigma", "200", r"<= 157.\d+, the end of the teacher's noise schedule, got 200.0"),
    ],
)
def test_levels_beyond_the_teacher_are_refused(flag, value, message, tmp_path, capsys):
    teacher = ["--teacher", "tests.helpers.foreign:build", "--parameterization", "epsilon"]
    arguments = [*teacher, "--out", str(tmp_path / "run"), *QUICK, flag, value]
    refuses(train, arguments, f"expected {flag} {message}", capsys)
    assert not (tmp_path / "run").exists()
