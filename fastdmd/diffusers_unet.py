"""Networks of the library diffusers, an optional dependency: `UNet2DModel` from a folder or from its configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

PREDICTION_TYPES = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}


def load_folder(path: Path) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    """The network of a folder, the arguments that make it again, and the options of its adapter.

    The folder holds `config.json` and weights in safetensors, itself or in `unet`. Beside `unet`, `scheduler` tells
    what the network predicts and at which noise levels; without, the options lack the parameterization.
    """
    library = _library()
    folder = path / "unet" if (path / "unet").is_dir() else path
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"fastdmd.teachers: expected a folder of diffusers, got {path} without config.json")
    config = json.loads((folder / "config.json").read_text())
    if config.get("_class_name") != "UNet2DModel":
        raise ValueError(f"fastdmd.teachers: expected a UNet2DModel, got {config.get('_class_name')} in {folder}")
    options = _of_network(config)
    scheduler = path / "scheduler" / "scheduler_config.json"
    if scheduler.is_file():
        options |= _of_scheduler(json.loads(scheduler.read_text()), path)
    try:
        network = library.UNet2DModel.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, low_cpu_mem_usage=False
        )
    except RuntimeError as error:  # tensors of other shapes
        raise ValueError(
            f"fastdmd.teachers: expected the tensors of its config.json in {folder}, got {error}"
        ) from error
    return network, {name: value for name, value in network.config.items() if not name.startswith("_")}, options


def build(arguments: Mapping[str, Any]) -> nn.Module:
    """The network with these arguments of its constructor, initialised anew."""
    return _library().UNet2DModel(**arguments)


def _library():
    try:
        import diffusers
    except ImportError as error:
        raise ValueError(
            f"fastdmd.teachers: expected the package diffusers (pip install 'fastdmd[diffusers]'), got: {error}"
        ) from error
    return diffusers


def _of_network(config: Mapping[str, Any]) -> dict[str, Any]:
    if config.get("time_embedding_type") == "fourier":  # divides its output by sigma, and takes x as it is
        raise ValueError("fastdmd.teachers: expected time_embedding_type positional or learned, got fourier")
    if config.get("class_embed_type") is not None:
        raise ValueError(f"fastdmd.teachers: expected class_embed_type None, got {config['class_embed_type']}")
    size, num_classes = config.get("sample_size"), config.get("num_class_embeds") or 0
    options = {"num_classes": num_classes, "labels": "int" if num_classes else "none"}
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        options["image_shape"] = (config.get("in_channels", 3), height, width)
    return options


def _of_scheduler(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """What a scheduler's configuration says of the network; the products of alpha as diffusers computes them."""
    if config.get("_class_name") == "FlowMatchEulerDiscreteScheduler":
        return {"parameterization": "flow", "time_scale": float(config["num_train_timesteps"])}
    prediction = config.get("prediction_type", "epsilon")
    if "beta_schedule" not in config or prediction not in PREDICTION_TYPES:
        raise ValueError(
            f"fastdmd.teachers: expected a scheduler with betas that predicts {', '.join(PREDICTION_TYPES)}, "
            f"got {config.get('_class_name')} with {prediction} in {path}"
        )
    betas = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas",
             "rescale_betas_zero_snr")  # fmt: skip
    scheduler = _library().DDPMScheduler(**{name: config[name] for name in betas if name in config})
    return {
        "parameterization": PREDICTION_TYPES[prediction],
        "alphas_cumprod": tuple(scheduler.alphas_cumprod.double().tolist()),
    }
