"""Folders of diffusers that cannot be taken: one line for what is broken or means something else."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from fastdmd import teachers
from fastdmd.networks import diffusers_unet
from fastdmd.networks.weights import load_network
from tests.helpers.diffusers_folders import WEIGHTS, diffusers_folder

pytestmark = pytest.mark.filterwarnings("ignore:.* does not denoise as")  # these networks are not trained


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


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # of diffusers, with a new numpy
def test_schedulers_with_other_inputs_of_the_network_are_refused(tmp_path):
    """What a scheduler of diffusers puts into its network decides, not whether it has betas."""
    diffusers_folder(tmp_path)
    import diffusers

    file = tmp_path / "scheduler" / "scheduler_config.json"
    for scheduler, expected in (
        (
            diffusers.EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"),
            "expected timestep_type discrete in .*scheduler_config.json, got 'continuous'",
        ),
        (diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True), "expected use_flow_sigmas False in .*, got True"),
        (diffusers.CogVideoXDDIMScheduler(), "expected snr_shift_scale 1.0 in .*, got 3.0"),
        (diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "expected invert_sigmas False in .*, got True"),
        (diffusers.EDMEulerScheduler(), "expected a scheduler with betas .*, got EDMEulerScheduler"),
        (diffusers.EulerDiscreteScheduler(use_karras_sigmas=True, timestep_spacing="trailing"), None),
        (diffusers.LCMScheduler(), None),
        (diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), None),
    ):
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
    for changes, message in (
        ({"layers_per_block": 10**5}, "the tensors of 100000 layers_per_block"),
        ({"block_out_channels": [8, 10**5]}, r"not \(100000"),
        ({"act_fn": {}}, "got others"),
        ({"num_class_embeds": 5}, "got it without class_embedding.weight"),
    ):
        described = network | {"diffusers": network["diffusers"] | changes}
        metadata = {"fastdmd": json.dumps({"kind": "teacher", "network": described})}
        save_file(tensors, tmp_path / "w.safetensors", metadata=metadata)
        with pytest.raises(ValueError, match=f"^fastdmd.* .*{message}"):
            load_network(tmp_path / "w.safetensors")
