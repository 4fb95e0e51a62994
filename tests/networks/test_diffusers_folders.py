"""Folders of diffusers: predictions of their own schedulers, every form of weights, and which of them are taken."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from fastdmd import sample, teachers
from fastdmd.networks.weights import load_network
from tests.helpers.diffusers_folders import WEIGHTS, diffusers_folder
from tests.helpers.tiny_runs import distill, refuses

pytestmark = pytest.mark.filterwarnings("ignore:.* does not denoise as")  # these networks are not trained


@pytest.mark.parametrize(
    ("prediction_type", "schedule"),
    [
        ("epsilon", {}),
        ("epsilon", {"beta_schedule": "scaled_linear", "beta_start": 0.001, "beta_end": 0.01}),
        ("v_prediction", {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 200}),
        ("v_prediction", {"rescale_betas_zero_snr": True}),
        ("sample", {"trained_betas": [0.01, 0.02, 0.1, 0.3]}),
    ],
)
def test_diffusers_networks_predict_what_their_scheduler_says(prediction_type, schedule, tmp_path):
    """D_x at every timestep's sigma is `pred_original_sample` of diffusers' own step."""
    network, scheduler = diffusers_folder(tmp_path, prediction_type, **schedule)
    denoiser = teachers.load(tmp_path)
    assert denoiser.image_shape == (3, 8, 8) and denoiser.num_classes == 0 and denoiser.dynamics == "edm"
    last = len(scheduler.alphas_cumprod) - 1 - bool(schedule.get("rescale_betas_zero_snr"))  # whose sigma is infinite
    for timestep in (0, 1, last // 2, last):
        abar = scheduler.alphas_cumprod[timestep]
        sigma = ((1 - abar) / abar).sqrt()
        x = torch.randn(1, 3, 8, 8) * (1 + sigma**2).sqrt()
        with torch.no_grad():
            output = network(x * abar.sqrt(), timestep).sample
            expected = scheduler.step(output, timestep, x * abar.sqrt()).pred_original_sample
            assert_close(denoiser(x, sigma[None]), expected, rtol=2e-3, atol=2e-3 * max(1, sigma.item()))


def test_a_diffusers_folder_is_distilled_and_its_generator_needs_no_code(tmp_path, capsys):
    diffusers_folder(tmp_path / "model", num_class_embeds=4)
    file = distill(
        tmp_path / "run", "--teacher", str(tmp_path / "model"), "--teacher-sigma-data", "0.4", "--num-samples", "0"
    )
    capsys.readouterr()
    assert str(tmp_path) not in json.dumps(load_network(file)[1]["network"])
    generator, teacher = load_network(file)[0], teachers.load(tmp_path / "model", sigma_data=0.4)
    assert generator.interface == teacher.interface and generator.num_classes == 4 and generator.sigma_data == 0.4
    assert any(not torch.equal(a, b) for a, b in zip(generator.parameters(), teacher.parameters(), strict=True))
    sample.main([str(file), "--num", "3", "--out", str(tmp_path / "s.npz"), "--device", "cpu"])
    assert np.load(tmp_path / "s.npz")["images"].shape == (3, 8, 8, 3)
    refuses(sample, [str(file), "--network", "package.module:name"], "expected no --network for", capsys)
    # Without a scheduler beside it, the flags say what it predicts.
    (tmp_path / "model" / "unet").rename(tmp_path / "bare")
    with pytest.raises(ValueError, match="expected --parameterization out of"):
        teachers.load(tmp_path / "bare")
    bare = teachers.load(tmp_path / "bare", parameterization="epsilon")
    assert bare.interface.stated["noise_schedule"] == "linear"
    x, sigma, labels = torch.randn(2, 3, 8, 8), torch.tensor([0.5, 5.0]), torch.tensor([3, 1])
    assert_close(bare(x, sigma, labels), teacher(x, sigma, labels), rtol=1e-4, atol=1e-4)


def expected_of(network, folder, **options):
    """That a folder gives this network."""
    got = teachers.load(folder, accelerate=False, **options)
    state = network.state_dict()
    assert all(torch.equal(tensor, state[name].float()) for name, tensor in got.network.state_dict().items())
    return got


def test_every_form_of_weights(tmp_path, capsys):
    network, _ = diffusers_folder(tmp_path)
    folder = tmp_path / "unet"
    (folder / f"{WEIGHTS}.safetensors").unlink()
    state = network.state_dict()
    old = {
        name.replace("to_q", "query")
        .replace("to_k", "key")
        .replace("to_v", "value")
        .replace("to_out.0", "proj_attn"): tensor
        for name, tensor in state.items()
    }
    assert old.keys() != state.keys()
    for save, notice in (
        (lambda: network.save_pretrained(folder), ""),
        (lambda: network.save_pretrained(folder, variant="ema"), f"took {WEIGHTS}.ema.safetensors"),
        (lambda: network.save_pretrained(folder, max_shard_size="20KB"), ""),
        (lambda: network.save_pretrained(folder, max_shard_size="20KB", variant="fp16"), "took .*index.fp16.json"),
        (lambda: network.save_pretrained(folder, safe_serialization=False), f"took {WEIGHTS}.bin"),
        (lambda: network.save_pretrained(folder, safe_serialization=False, variant="fp16"), "took .*.fp16.bin"),
        (
            lambda: network.save_pretrained(folder, safe_serialization=False, variant="fp16", max_shard_size="20KB"),
            "took .*.bin.index.fp16.json",
        ),
        (lambda: network.save_pretrained(folder, variant="non-ema"), "took .*.non-ema.safetensors"),
        (lambda: network.save_pretrained(folder, variant="non-ema", max_shard_size="20KB"), "index.non-ema.json"),
        (lambda: save_file(old, folder / f"{WEIGHTS}.safetensors"), ""),
        (lambda: torch.save(old, folder / f"{WEIGHTS}.bin"), f"took {WEIGHTS}.bin"),
    ):
        save()
        expected_of(network, tmp_path)
        error = capsys.readouterr().err
        assert (error == "") == (notice == "") and error.count("\n") <= 1
        assert re.search(notice, error)
        for file in folder.glob(f"{WEIGHTS}*"):
            file.unlink()
    network.half().save_pretrained(folder, variant="fp16")
    expected_of(network, tmp_path)


@pytest.mark.parametrize("named", ["unet", "unet/", "unet/../unet", "unet_ema", "."])
def test_a_scheduler_counts_wherever_the_network_is_named(named, tmp_path, monkeypatch):
    diffusers_folder(tmp_path, "v_prediction", beta_schedule="squaredcos_cap_v2")
    expected = teachers.load(tmp_path).interface
    assert expected.parameterization == "v" and expected.alphas_cumprod[-1] < 1e-4
    (tmp_path / "unet").rename(tmp_path / "unet_ema") if named == "unet_ema" else None
    assert teachers.load(f"{tmp_path}/{named}").interface == expected
    monkeypatch.chdir(tmp_path / named)
    assert teachers.load(Path(".")).interface == expected
    with pytest.raises(ValueError, match="expected no --noise-schedule with alphas_cumprod, got linear$"):
        teachers.load(".", noise_schedule="linear")
    with pytest.raises(ValueError, match="no noise schedule .* with --parameterization flow, got 1000 alphas_cumprod$"):
        teachers.load(".", parameterization="flow")


def test_the_average_is_what_is_taken(tmp_path, capsys):
    raw, _ = diffusers_folder(tmp_path)
    average, _ = diffusers_folder(tmp_path / "other", num_class_embeds=None)
    with torch.no_grad():
        average.conv_in.weight.add_(1)
    average.register_to_config(decay=0.99, optimization_step=7, power=0.75)  # as its EMAModel writes it
    average.save_pretrained(tmp_path / "unet_ema")
    taken = expected_of(average, tmp_path)
    assert capsys.readouterr().err == (
        f"{tmp_path}: took unet_ema, the average that one samples from, left unet; {tmp_path / 'unet'} names that\n"
    )
    assert "decay" not in taken.describe()["diffusers"] and len(taken.interface.alphas_cumprod) == 1000
    expected_of(raw, tmp_path / "unet", parameterization="epsilon")
    for file in (tmp_path / "unet").iterdir():
        file.unlink()
    (tmp_path / "unet").rmdir()
    expected_of(average, tmp_path)
    assert capsys.readouterr().err == ""
