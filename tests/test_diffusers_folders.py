"""Folders of diffusers: predictions of their own schedulers, every form of weights, one line for what is broken."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_teachers import distill, refuses
from torch.testing import assert_close

from fastdmd import sample, teachers
from fastdmd.networks import diffusers_unet
from fastdmd.networks.weights import load_network

pytestmark = pytest.mark.filterwarnings("ignore:.* does not denoise as")  # these networks are not trained
WEIGHTS = "diffusion_pytorch_model"


def diffusers_folder(path, prediction_type="epsilon", num_class_embeds=None, **schedule):
    diffusers = pytest.importorskip("diffusers", reason="the extra fastdmd[diffusers] is not installed")
    torch.manual_seed(0)
    network = diffusers.UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=num_class_embeds,
    )  # fmt: skip
    scheduler = diffusers.DDPMScheduler(prediction_type=prediction_type, clip_sample=False, **schedule)
    network.save_pretrained(path / "unet")
    scheduler.save_pretrained(path / "scheduler")
    return network.eval(), scheduler


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
    file = distill(tmp_path / "run", "--teacher", str(tmp_path / "model"), "--teacher-sigma-data", "0.4",
                   "--num-samples", "0")  # fmt: skip
    capsys.readouterr()
    assert str(tmp_path) not in json.dumps(load_network(file)[1]["network"])
    generator, teacher = load_network(file)[0], teachers.load(tmp_path / "model", sigma_data=0.4)
    assert generator.interface == teacher.interface and generator.num_classes == 4 and generator.sigma_data == 0.4
    assert any(not torch.equal(a, b) for a, b in zip(generator.parameters(), teacher.parameters(), strict=True))
    sample.main([str(file), "--num", "3", "--out", str(tmp_path / "s.npz"), "--device", "cpu"])
    assert np.load(tmp_path / "s.npz")["images"].shape == (3, 8, 8, 3)
    refuses(sample, [str(file), "--network", "foreign:build"], "expected no --network for", capsys)
    # Without a scheduler beside it, the flags say what it predicts.
    (tmp_path / "model" / "unet").rename(tmp_path / "bare")
    with pytest.raises(ValueError, match="expected --parameterization out of"):
        teachers.load(tmp_path / "bare")
    bare = teachers.load(tmp_path / "bare", parameterization="epsilon")
    assert bare.interface.stated["noise_schedule"] == "linear"
    x, sigma, labels = torch.randn(2, 3, 8, 8), torch.tensor([0.5, 5.0]), torch.tensor([3, 1])
    assert_close(bare(x, sigma, labels), teacher(x, sigma, labels), rtol=1e-4, atol=1e-4)


def test_diffusers_folders_that_cannot_be_taken(tmp_path):
    diffusers_folder(tmp_path / "model")
    (tmp_path / "empty").mkdir()

    def load_with(path, **changes):
        folder = tmp_path / "changed"
        source = tmp_path / "model"
        for name in ("unet/config.json", "scheduler/scheduler_config.json"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            content = json.loads((source / name).read_text())
            content = {**content, **changes} if name.startswith(path) else content
            content = {key: value for key, value in content.items() if value != "absent"}
            (folder / name).write_text(json.dumps(content))
        weights = "unet/diffusion_pytorch_model.safetensors"
        (folder / weights).write_bytes((source / weights).read_bytes())
        return teachers.load(folder)

    flow = load_with("scheduler", _class_name="FlowMatchEulerDiscreteScheduler")
    assert flow.dynamics == "flow" and flow.interface.time_scale == 1000
    for changes, message in (
        (("unet", {"_class_name": "UNet2DConditionModel"}), "expected a UNet2DModel, got UNet2DConditionModel in"),
        (("unet", {"time_embedding_type": "fourier"}), "expected time_embedding_type positional .* got fourier"),
        (("unet", {"class_embed_type": "timestep"}), "expected class_embed_type None, got timestep"),
        (("unet", {"sample_size": None}), "expected --image-shape for a network without"),
        (
            ("scheduler", {"_class_name": "CogVideoXDDIMScheduler"}),
            "got CogVideoXDDIMScheduler with epsilon in .*config",
        ),
        (("scheduler", {"_class_name": "absent"}), "expected a scheduler with betas that predicts .*, got None with"),
        (("scheduler", {"prediction_type": "flow_prediction"}), "expected a scheduler with betas that predicts"),
        (("scheduler", {"_class_name": "EDMEulerScheduler", "beta_schedule": "absent"}), "got EDMEulerScheduler with"),
    ):
        with pytest.raises(ValueError, match=message):
            load_with(changes[0], **changes[1])
    with pytest.raises(FileNotFoundError, match="expected a folder of diffusers, got .*empty without config.json"):
        teachers.load(tmp_path / "empty")


def test_diffusers_that_is_absent_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"expected the package diffusers \(pip install 'fastdmd\[diffusers\]'\)"):
        teachers.load(tmp_path)


def expected_of(network, folder, **options):
    """That a folder gives this network."""
    got = teachers.load(folder, **options)
    state = network.state_dict()
    assert all(torch.equal(tensor, state[name].float()) for name, tensor in got.network.state_dict().items())
    return got


def test_every_form_of_weights(tmp_path, capsys):
    network, _ = diffusers_folder(tmp_path)
    folder = tmp_path / "unet"
    (folder / f"{WEIGHTS}.safetensors").unlink()
    state = network.state_dict()
    old = {name.replace("to_q", "query").replace("to_k", "key").replace("to_v", "value")
           .replace("to_out.0", "proj_attn"): tensor for name, tensor in state.items()}  # fmt: skip
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


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # of diffusers, with a new numpy
def test_schedulers_with_other_inputs_of_the_network_are_refused(tmp_path):
    """What a scheduler of diffusers puts into its network decides, not whether it has betas."""
    diffusers_folder(tmp_path)
    import diffusers

    file = tmp_path / "scheduler" / "scheduler_config.json"
    for scheduler, expected in (
        (diffusers.EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"),
         "expected timestep_type discrete in .*scheduler_config.json, got 'continuous'"),
        (diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True), "expected use_flow_sigmas False in .*, got True"),
        (diffusers.CogVideoXDDIMScheduler(), "expected snr_shift_scale 1.0 in .*, got 3.0"),
        (diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "expected invert_sigmas False in .*, got True"),
        (diffusers.EDMEulerScheduler(), "expected a scheduler with betas .*, got EDMEulerScheduler"),
        (diffusers.EulerDiscreteScheduler(use_karras_sigmas=True, timestep_spacing="trailing"), None),
        (diffusers.LCMScheduler(), None),
        (diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), None),
    ):  # fmt: skip
        file.write_text(scheduler.to_json_string())
        if expected is None:
            teachers.load(tmp_path)
        else:
            with pytest.raises(ValueError, match=expected):
                teachers.load(tmp_path)
    for name in diffusers_unet.WITH_BETAS:
        scheduler = getattr(diffusers, f"{name}Scheduler")()
        options = diffusers_unet._of_scheduler(dict(scheduler.config) | {"_class_name": f"{name}Scheduler"}, file)
        assert_close(torch.tensor(options["alphas_cumprod"]).float(), scheduler.alphas_cumprod.float())


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


def test_folders_whose_tensors_do_not_fit(tmp_path):
    """Missing, left over, other: named, whatever diffusers would make of them."""
    diffusers_folder(tmp_path)
    file = tmp_path / "unet" / f"{WEIGHTS}.safetensors"
    state = load_file(file)
    nan = torch.full_like(state["conv_out.bias"], torch.nan)
    for change, message in (
        ({"conv_out.bias": None}, "tensors of UNet2DModel in .*, got it without conv_out.bias"),
        ({"conv_out.bias": None, "mid_block.attentions.0.to_q.weight": None}, "without mid_block.*to_q.weight, conv_o"),
        ({"conv_out.scale": torch.zeros(1)}, "got also conv_out.scale"),
        ({"conv_out.bias": torch.zeros(4)}, r"got conv_out.bias of shape \(4,\), not \(3,\)"),
        ({"conv_out.bias": torch.zeros(3, dtype=torch.int64)}, "got conv_out.bias of whole numbers, not floating"),
        ({"conv_out.bias": nan}, "expected finite weights in .*, got NaN in conv_out.bias"),
        ({"conv_in.weight": state["conv_in.weight"].half() * 1e6}, "got infinity in conv_in.weight"),
    ):
        changed = {name: tensor for name, tensor in (state | change).items() if tensor is not None}
        save_file(changed, file)
        with pytest.raises(ValueError, match=f"^fastdmd.weights: .*{message}") as error:
            teachers.load(tmp_path)
        assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_folders_that_hold_no_network_get_one_line(tmp_path, capsys):
    diffusers_folder(tmp_path)
    folder = tmp_path / "unet"
    config, scheduler = folder / "config.json", tmp_path / "scheduler" / "scheduler_config.json"
    good = {config: json.loads(config.read_text()), scheduler: json.loads(scheduler.read_text())}
    for file, content, message in (
        (config, "{", "expected JSON in .*config.json, got JSONDecodeError"),
        (config, "[" * 100_000, "expected JSON in .*config.json, got RecursionError"),
        (config, "[]", "expected a JSON object in .*config.json, got a list"),
        (config, "{}", "expected a UNet2DModel, got None in"),
        (config, {"block_out_channels": None}, "expected arguments that make a UNet2DModel .*, got TypeError"),
        (config, {"block_out_channels": "absent"}, "got ValueError: Must provide the same number"),
        (config, {"layers_per_block": 10**9}, "expected arguments of UNet2DModel up to 1048576"),
        (config, {"layers_per_block": 10**6}, "expected the tensors of 1000000 layers_per_block, got"),
        (config, {"block_out_channels": [10**6, 10**6]}, "up to|of shape .*, not .1000000"),
        (config, {"num_class_embeds": 10**12}, "up to 1048576"),
        (config, {"norm_num_groups": 5}, "got ValueError: num_channels"),
        (config, {"down_block_types": ["DownBlock2D", "NoBlock2D"]}, "got ValueError: NoBlock2D does not exist"),
        (config, {"sample_size": "large"}, "expected sample_size of one or two numbers in .*, got 'large'"),
        (config, {"sample_size": True}, "expected sample_size of one or two numbers in .*, got True"),
        (config, {"sample_size": [8]}, r"expected sample_size of one or two numbers in .*, got \[8\]"),
        (config, {"sample_size": [8, None]}, "expected sample_size of one or two numbers in .*, got"),
        (config, {"sample_size": 10**6}, "expected --image-shape of at most"),
        (scheduler, "{", "expected JSON in .*scheduler_config.json"),
        (scheduler, {"num_train_timesteps": 10**12}, "expected num_train_timesteps of 2 to .* got 1000000000000"),
        (scheduler, {"beta_schedule": "no"}, "scheduler_config.json that makes a scheduler in .*NotImplementedError"),
        (scheduler, {"beta_end": "x"}, "scheduler_config.json that makes a scheduler in .*, got TypeError"),
        (scheduler, {"trained_betas": [0.1, 2.0, 0.1]}, "expected alphas_cumprod that fall"),
    ):
        if isinstance(content, dict):
            content = {name: value for name, value in (good[file] | content).items() if value != "absent"}
            content = json.dumps(content)
        file.write_text(content)
        with pytest.raises(ValueError, match=message) as error:
            teachers.load(tmp_path)
        assert str(error.value).startswith("fastdmd.") and "\n" not in str(error.value)
        file.write_text(json.dumps(good[file]))
    (folder / f"{WEIGHTS}.safetensors").rename(folder / f"{WEIGHTS}.fp16.safetensors")
    (folder / f"{WEIGHTS}.non_ema.safetensors").write_bytes(b"")
    names = f"{WEIGHTS}.fp16.safetensors, {WEIGHTS}.non_ema.safetensors"
    with pytest.raises(ValueError, match=f"or one variant of it, in .*unet, got {names}$"):
        teachers.load(tmp_path)
    for name in names.split(", "):
        (folder / name).unlink()
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="or one variant of it, in .*unet, got model.safetensors$"):
        teachers.load(tmp_path)
    (folder / f"{WEIGHTS}.bin").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="what torch.save makes of tensors alone .* in .*bin, got"):
        teachers.load(tmp_path)
    assert capsys.readouterr().err == ""


def test_a_file_that_describes_a_huge_network_of_diffusers(tmp_path):
    """What a generator's file says of it is held to its tensors, too."""
    diffusers_folder(tmp_path)
    tensors, network = load_file(tmp_path / "unet" / f"{WEIGHTS}.safetensors"), teachers.load(tmp_path).describe()
    for changes, message in (({"layers_per_block": 10**5}, "the tensors of 100000 layers_per_block"),
                             ({"block_out_channels": [8, 10**5]}, r"not \(100000"), ({"act_fn": {}}, "got others"),
                             ({"num_class_embeds": 5}, "got it without class_embedding.weight")):  # fmt: skip
        described = network | {"diffusers": network["diffusers"] | changes}
        metadata = {"fastdmd": json.dumps({"kind": "teacher", "network": described})}
        save_file(tensors, tmp_path / "w.safetensors", metadata=metadata)
        with pytest.raises(ValueError, match=f"^fastdmd.* .*{message}"):
            load_network(tmp_path / "w.safetensors")
