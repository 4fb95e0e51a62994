"""Presets and dry runs: the published networks, what a run will cost, and what a user is told."""

import dataclasses
import json

import pytest
import torch

from fastdmd import memory, train
from fastdmd.distill import budget
from fastdmd.networks.discriminator import Discriminator
from fastdmd.networks.unet import UNet
from fastdmd.runs import distillation
from fastdmd.runs.config import TrainConfig
from fastdmd.runs.precision import Compute
from fastdmd.runs.presets import PRESETS
from tests.helpers.networks import make_network

CPU = torch.device("cpu")


def dry_run(capsys, *arguments):
    train.main([*arguments, "--dry-run"])
    return json.loads(capsys.readouterr().out)


def estimate(network, **changes):
    config = TrainConfig().replace(precision="fp32", **changes)
    return budget.estimate(network, lambda meta: distillation.build(config, meta), config.batch_size, CPU)


# Parameters and FLOPs of a forward pass as published; multiply-adds count twice.
@pytest.mark.parametrize(
    ("preset", "parameters", "flops"),
    [
        ("cifar10-cond", 55.7e6, 42e9),
        ("cifar10-uncond", 55.7e6, 42e9),
        ("imagenet64", 295.9e6, 219e9),
        ("afhqv2-64", 61.8e6, None),
        ("ffhq-64", 61.8e6, None),
    ],
)
def test_dry_run_of_presets(preset, parameters, flops, capsys):
    # A part of the batch takes as many operations as the whole.
    resolved = dry_run(capsys, "--preset", preset, "--batch-size", "8", "--accumulation-steps", "1")
    assert resolved["preset"] == preset and resolved["dfake_gen_update_ratio"] == 5
    assert resolved["noise"]["conditioning_sigma"] == 80.0 and resolved["optimizer"]["max_grad_norm"] == 10.0
    cost = resolved["budget"]
    assert cost["num_parameters"] == pytest.approx(parameters, rel=0.002)
    if flops:
        assert cost["forward_flops"] == pytest.approx(flops, rel=0.02)
    # 1 forward for x_gen and 3 for the fake score; every fifth, 2 for the generator's backward, teacher and fake.
    assert cost["iteration_flops"] == pytest.approx(8 * cost["forward_flops"] * (4 + 4 / 5), rel=0.02)
    # 4 of weights, 1 of gradients, 4 of moments, 4 bytes each
    assert 36 * cost["num_parameters"] < cost["state_bytes"] < 37 * cost["num_parameters"]
    assert cost["peak_bytes"] > cost["state_bytes"]


@pytest.mark.parametrize("arguments", [["--compile"], ["--execution", "compiled"]])
def test_what_is_to_be_compiled_is_counted_eagerly(arguments, capsys):
    resolved, eager = dry_run(capsys, *arguments), dry_run(capsys)
    assert (resolved["compute"]["execution"], eager["compute"]["execution"]) == ("compiled", "captured")
    assert resolved["budget"]["peak_bytes"] == eager["budget"]["peak_bytes"] > 0


def test_what_a_gpu_is_asked_for_is_counted_without_one(teacher):
    """Settings that are resolved stay so, on meta tensors too, which have no TF32."""
    config = TrainConfig().for_teacher(teacher, CPU)
    computes = (Compute(precision=name, execution="captured") for name in ("fp32", "tf32"))
    peaks = [train.budget_of(dataclasses.replace(config, compute=compute), teacher, CPU) for compute in computes]
    assert peaks[0].peak_bytes == peaks[1].peak_bytes > 0


def test_several_processes_average_over_their_whole_batch(teacher):
    """So half-lives may be as long as one process could have them."""
    config = TrainConfig(batch_size=280).replace(gan_guidance_weight=0, ema_halflives=(5e7,)).for_teacher(teacher, CPU)
    short = config.replace(ema_halflives=(5e3,))
    found, expected = (train.budget_of(each, teacher, CPU, 8) for each in (config, short))
    assert found.peak_bytes == expected.peak_bytes and (found.batch_size, found.num_processes) == (35, 8)


def test_imagenet_preset_is_the_published_one():
    config = PRESETS["imagenet64"].config
    optimizer = config.optimizer
    assert (config.batch_size, optimizer.generator_lr, optimizer.fake_score_lr) == (280, 2e-6, 2e-6)
    assert (optimizer.beta1, optimizer.beta2, optimizer.weight_decay) == (0.9, 0.999, 0.01)
    assert config.noise.step_range == (20, 980)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_consistent(name):
    preset = PRESETS[name]
    preset.config.check()
    assert preset.config.preset == name
    assert (preset.config.teacher is None) == (preset.teacher_file is not None) == (preset.network is not None)


def test_a_preset_names_the_teacher_it_is_for(teacher_file, tmp_path, capsys):
    for arguments, message in (
        ([], "expected --teacher, for --preset imagenet64 edm-imagenet-64x64-cond-adm.pkl, got none"),
        (
            ["--teacher", str(teacher_file)],
            "expected a teacher for 3x64x64 images of 1000 classes with --preset"
            " imagenet64, got one for 1x28x28 images of 10 classes",
        ),
    ):
        with pytest.raises(SystemExit) as stop:
            train.main(["--preset", "imagenet64", "--out", str(tmp_path / "run"), *arguments])
        assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_memory_grows_with_the_batch_and_shrinks_with_parts(teacher):
    small, large, parts = (estimate(teacher, batch_size=B, accumulation_steps=n) for B, n in ((8, 1), (32, 1), (32, 4)))
    activations = [b.peak_bytes - b.state_bytes for b in (small, large, parts)]
    assert activations[1] == pytest.approx(4 * activations[0], rel=0.1)
    assert activations[2] < 1.3 * activations[0]
    assert small.fits and small.advice() is None


def test_activations_are_those_that_autograd_keeps(teacher):
    """The peak holds at least what the forward pass saves for backward, and not much more than twice that."""
    network, saved = make_network().requires_grad_(True), {}
    x = torch.randn(32, 1, 28, 28)
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = network(x, torch.ones(32), torch.zeros(32, dtype=torch.int64)).sum()
    cost = estimate(teacher, batch_size=32)
    assert sum(saved.values()) < cost.peak_bytes - cost.state_bytes < 2.2 * sum(saved.values())
    loss.backward()


def test_a_run_that_does_not_fit(teacher_file, tmp_path, monkeypatch, capsys):
    state = estimate(make_network(), batch_size=64)
    between = (state.peak_bytes + state.state_bytes) // 2
    monkeypatch.setattr(budget, "available_bytes", lambda device: between)
    arguments = ["--teacher", str(teacher_file), "--batch-size", "64", "--precision", "fp32"]
    cost = dry_run(capsys, *arguments)["budget"]
    assert cost["fits"] is False and "try --batch-size" in cost["advice"]
    fitting = cost["largest_batch_size"]
    assert 16 < fitting < 64
    for changes in ({"batch_size": fitting}, {"batch_size": 64, "accumulation_steps": int(cost["advice"].split()[-1])}):
        assert estimate(make_network(), **changes).peak_bytes < 1.05 * between
    monkeypatch.setattr(budget, "available_bytes", lambda device: state.state_bytes // 2)
    with pytest.raises(SystemExit) as stop:
        train.main([*arguments, "--out", str(tmp_path / "run")])
    assert stop.value.code == 2 and "weights and optimizers alone take" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("batch_size", "largest", "num_steps", "advice"),
    [
        (64, 23, 1, "try --batch-size 23 or --accumulation-steps 4"),
        (64, 23, 4, "try --batch-size 20 or --accumulation-steps 4"),
        (
            60,
            23,
            3,
            "try --batch-size 21 or --accumulation-steps 4",
        ),  # three parts are 20 images, of which 3 is no part
    ],
)
def test_advice_is_of_batches_that_the_steps_divide(batch_size, largest, num_steps, advice):
    cost = budget.Budget(
        batch_size=batch_size,
        accumulation_steps=1,
        num_parameters=1,
        forward_flops=1,
        iteration_flops=1,
        state_bytes=1,
        peak_bytes=3,
        available_bytes=2,
        largest_batch_size=largest,
        num_steps=num_steps,
    )
    assert cost.smaller() == advice


def test_free_memory_is_told_or_unknown():
    available = memory.available_bytes(CPU)
    assert available is None or available > 1e6
    unknown = dataclasses.replace(estimate(make_network(), batch_size=4), available_bytes=None)
    assert unknown.fits is None and unknown.advice() is None


def test_meta_networks_are_published_ones():
    """The presets' networks can be made, on any device, from their configuration."""
    for preset in PRESETS.values():
        if preset.network is not None:
            with torch.device("meta"):
                assert UNet(preset.network).image_shape[0] == 3


def test_a_head_is_counted(teacher):
    """Its weights, moments and gradients, and the encoder's work on images of its own."""
    plain = estimate(teacher, batch_size=8)
    judged = estimate(teacher, batch_size=8, gan_guidance_weight=1e-2, gan_features="fake", gan_r1_weight=1.0)
    head = sum(p.numel() for p in Discriminator(teacher.feature_shape).parameters())
    images = 4 * 8 * 28 * 28
    assert 16 * head < judged.state_bytes - plain.state_bytes < 16 * head + 5 * images
    assert judged.iteration_flops > 1.5 * plain.iteration_flops and judged.peak_bytes > plain.peak_bytes
    assert judged.num_parameters == plain.num_parameters


def test_every_average_is_counted(teacher):
    """Of which each takes its weights, and what pads them."""
    one, three = (estimate(teacher, batch_size=8, ema_halflives=h) for h in ((100,), (100, 200, 300)))
    num_parameters, num_tensors = one.num_parameters, len(list(teacher.parameters()))
    further = three.state_bytes - one.state_bytes
    assert 2 * 4 * num_parameters <= further < 2 * 4 * (num_parameters + 16 * num_tensors) + 4096
    assert three.peak_bytes - one.peak_bytes >= 2 * 4 * num_parameters
