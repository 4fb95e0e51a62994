"""Networks of the library diffusers, an optional dependency: `UNet2DModel` from a folder or from its configuration."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdmd.networks.states import fill, require_same
from fastdmd.networks.tensor_files import open_tensors, read_json
from fastdmd.networks.user_code import user_code

PREDICTION_TYPES = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}
FLOW = "FlowMatchEulerDiscreteScheduler"
# Schedulers whose network takes alpha x and a timestep of their betas; what else they have concerns sampling alone, but
# for the settings of INTERFACE, in which any other value changes what the network takes.
WITH_BETAS = tuple(
    "DDIMInverse DDIMParallel DDIM DDPMParallel DDPM DEISMultistep DPMSolverMultistepInverse DPMSolverMultistep "
    "DPMSolverSinglestep EulerAncestralDiscrete EulerDiscrete HeunDiscrete KDPM2AncestralDiscrete KDPM2Discrete LCM "
    "LMSDiscrete PNDM RePaint SASolver TCD UniPCMultistep".split()
)
INTERFACE = {"timestep_type": "discrete", "use_flow_sigmas": False, "snr_shift_scale": 1.0, "invert_sigmas": False}
WEIGHTS = "diffusion_pytorch_model"
AVERAGED = "unet_ema"  # which the training scripts of diffusers save beside unet
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # of attention, until 2023
MAX_NUMBER, MAX_LENGTH = 1 << 20, 64  # of the arguments: no product of some overflows, no loop takes long


def load_folder(path: Path) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    """The network of a folder, the arguments that make it again, and the options of its adapter.

    The folder holds `config.json` and weights, itself or in `unet`; of `unet` and `unet_ema` the average is taken.
    Weights are `diffusion_pytorch_model.safetensors`, whole or in parts; else its only variant (`.fp16.safetensors`);
    else `.bin`, or its only variant, read without running its code. `scheduler`, in the folder or beside that of the
    network, tells what it predicts and at which noise levels; without, the options lack the parameterization. stderr
    says what was taken where there was a choice.
    """
    folder, which = _network_folder(path)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"fastdmd.teachers: expected a folder of diffusers, got {folder} without config.json")
    config = read_json(folder / "config.json")
    arguments = _arguments(config)
    if config.get("_class_name") != "UNet2DModel":
        raise ValueError(f"fastdmd.teachers: expected a UNet2DModel, got {config.get('_class_name')} in {folder}")
    options = _of_network(arguments, folder)
    for place in (path, Path(os.path.abspath(folder)).parent):  # that of a pipeline, also where its unet is named
        scheduler = place / "scheduler" / "scheduler_config.json"
        if scheduler.is_file():
            options |= _of_scheduler(read_json(scheduler), scheduler)
            break
    file, variant = _weights_file(folder)
    weights = open_tensors(file)
    weights.notice = ". ".join(filter(None, (which, variant)))
    names = weights.renamed(_new_name)
    network = build(arguments, {name: weights.described[own] for name, own in names.items()}, file)
    fill(network, weights, names)
    config_made: Any = network.config
    return network, {name: value for name, value in config_made.items() if not name.startswith("_")}, options


def build(arguments: Mapping[str, Any], described: Mapping[str, Tensor], path: Path) -> nn.Module:
    """The network with these arguments of its constructor, initialised anew, for tensors that `path` holds.

    Raises ValueError for arguments that cannot be, and for other tensors than its own, before it takes memory.
    """
    make = _library().UNet2DModel
    if not isinstance(arguments, dict) or not _within_bounds(list(arguments.values())):
        raise ValueError(
            f"fastdmd.teachers: expected arguments of UNet2DModel up to {MAX_NUMBER} for {path}, got others"
        )
    arguments = _arguments(arguments)
    layers, num_tensors = arguments.get("layers_per_block"), len(described)
    if isinstance(layers, int) and layers > num_tensors:
        raise ValueError(
            f"fastdmd.teachers: expected the tensors of {layers} layers_per_block, got {num_tensors} in {path}"
        )
    with user_code("teachers", f"arguments that make a UNet2DModel for {path}"):
        with torch.device("meta"):
            expected = make(**arguments).state_dict()
        require_same(expected, described, f"the tensors of UNet2DModel in {path}")
        return make(**arguments)


def _network_folder(path: Path) -> tuple[Path, str]:
    """The folder of the network, and a notice where there are two."""
    averaged, raw = path / AVERAGED, path / "unet"
    if averaged.is_dir() and raw.is_dir():
        return averaged, f"{path}: took {AVERAGED}, the average that one samples from, left unet; {raw} names that"
    return next((folder for folder in (averaged, raw) if folder.is_dir()), path), ""


def _weights_file(folder: Path) -> tuple[Path, str]:
    """The weights, and a notice where they are not the usual ones. Raises ValueError with the files if none can be told
    to be the network's."""
    for name in (f"{WEIGHTS}.safetensors", f"{WEIGHTS}.safetensors.index.json"):
        if (folder / name).is_file():
            return folder / name, ""
    suffixes = (".safetensors", ".bin", ".json")
    others = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in suffixes)
    binary = [name for name in (f"{WEIGHTS}.bin", f"{WEIGHTS}.bin.index.json") if name in others][:1]
    taken = _variants(others, "safetensors") or binary or _variants(others, "bin")
    if len(taken) != 1:
        got = ", ".join(name for name in others if name != "config.json") or "none"
        expected = f"{WEIGHTS}.safetensors, or one variant of it,"
        raise ValueError(f"fastdmd.teachers: expected {expected} in {folder}, got {got}")
    return folder / taken[0], f"{folder}: took {taken[0]}"


def _variants(names: list[str], kind: str) -> list[str]:
    """Those of a variant (fp16, non-ema), whole or the index of its parts."""
    variant = r"(?!\S*-\d+-of-\d)[\w-]+"
    pattern = rf"{WEIGHTS}\.({variant}\.{kind}|{kind}\.index\.{variant}\.json)"
    return [name for name in names if re.fullmatch(pattern, name)]


def _library():
    try:
        import diffusers
    except ImportError as error:
        raise ValueError(
            f"fastdmd.teachers: expected the package diffusers (pip install 'fastdmd[diffusers]'), got: {error}"
        ) from error
    with user_code("teachers", "a package diffusers that works"):
        diffusers.UNet2DModel  # noqa: B018 - imported at first use
    return diffusers


def _arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the constructor; a configuration also tells versions, or how an average was made."""
    known = inspect.signature(_library().UNet2DModel.__init__).parameters
    return {name: value for name, value in config.items() if name in known}


def _within_bounds(value: Any, depth: int = 0) -> bool:
    if isinstance(value, list | tuple):
        return depth < 3 and len(value) <= MAX_LENGTH and all(_within_bounds(item, depth + 1) for item in value)
    return value is None or isinstance(value, str) or isinstance(value, int | float) and abs(value) <= MAX_NUMBER


def _new_name(name: str) -> str:
    def renamed(found: re.Match) -> str:
        return f"{found[1]}.{OLD_NAMES.get(found[2], found[2])}."

    return re.sub(r"(\.attentions\.\d+)\.(\w+)\.(?=weight$|bias$)", renamed, name)


def _of_network(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    if config.get("time_embedding_type") == "fourier":  # divides its output by sigma, and takes x as it is
        raise ValueError("fastdmd.teachers: expected time_embedding_type positional or learned, got fourier")
    if config.get("class_embed_type") is not None:
        raise ValueError(f"fastdmd.teachers: expected class_embed_type None, got {config['class_embed_type']}")
    size, num_classes = config.get("sample_size"), config.get("num_class_embeds") or 0
    options = {"num_classes": num_classes, "labels": "int" if num_classes else "none"}
    if size is not None:
        sizes = (size, size) if type(size) is int else size
        if not isinstance(sizes, (list, tuple)) or len(sizes) != 2 or any(type(number) is not int for number in sizes):
            raise ValueError(
                f"fastdmd.teachers: expected sample_size of one or two numbers in {folder}, got {size!r:.80}"
            )
        height, width = sizes
        options["image_shape"] = (config.get("in_channels", 3), height, width)
    return options


def _of_scheduler(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """What a scheduler's configuration says of the network; the products of alpha as diffusers computes them."""
    length = config.get("num_train_timesteps", 1000)
    if not isinstance(length, int) or not 2 <= length <= MAX_NUMBER:
        raise ValueError(f"fastdmd.teachers: expected num_train_timesteps of 2 to {MAX_NUMBER} in {path}, got {length}")
    name = config.get("_class_name")
    for setting, usual in INTERFACE.items():
        if config.get(setting, usual) not in (usual, None):
            raise ValueError(
                f"fastdmd.teachers: expected {setting} {usual} in {path}, got {config[setting]!r:.80}, with which the "
                "network takes other inputs"
            )
    if name == FLOW:
        return {"parameterization": "flow", "time_scale": float(length)}
    prediction = config.get("prediction_type", "epsilon")
    known = name in [f"{kind}Scheduler" for kind in WITH_BETAS] and "beta_schedule" in config
    if not known or prediction not in tuple(PREDICTION_TYPES):
        raise ValueError(
            f"fastdmd.teachers: expected a scheduler with betas that predicts {', '.join(PREDICTION_TYPES)}, "
            f"got {name!s:.80} with {prediction!s:.80} in {path}"
        )
    betas = (
        "num_train_timesteps",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "trained_betas",
        "rescale_betas_zero_snr",
    )
    with user_code("teachers", f"a scheduler_config.json that makes a scheduler in {path}"):
        scheduler = _library().DDPMScheduler(**{name: config[name] for name in betas if name in config})
        return {
            "parameterization": PREDICTION_TYPES[prediction],
            "alphas_cumprod": tuple(scheduler.alphas_cumprod.double().tolist()),
        }
