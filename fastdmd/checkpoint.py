"""What is written to disk: weight files that carry their configuration, run folders, image grids."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import textwrap
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from fastdmd import __version__, diffusers_unet
from fastdmd.adapters import Adapted, AdapterOptions
from fastdmd.data import to_uint8
from fastdmd.imports import import_network, make_network
from fastdmd.unet import UNet, UNetConfig

METADATA_KEY = "fastdmd"
ASSETS = Path(__file__).parent / "assets"


def save_network(path: Path, network: UNet | Adapted, *, kind: str, dtype: torch.dtype = torch.float32,
                 **information: Any) -> None:  # fmt: skip
    """Writes weights and configuration to a safetensors file, in one atomic replacement.

    `kind` is "teacher" or "generator"; `dtype` is that of the weights in the file; `information` is anything JSON can
    hold and is read back by `load_network`. The file can be read by any safetensors reader; the tensors of an adapted
    network have the names that the network itself gives them.
    """
    if isinstance(network, Adapted):
        description, state = network.describe(), network.network.state_dict()
    elif isinstance(network, UNet):
        description, state = dataclasses.asdict(network.config), network.state_dict()
    else:
        raise TypeError(f"fastdmd.save_network: expected a UNet or an Adapted network, got a {type(network).__name__}")
    metadata = {
        "kind": kind,
        "network": description,
        "version": __version__,
        **information,
    }
    tensors = {name: _stored(value, dtype) for name, value in state.items()}
    content = save(tensors, metadata={METADATA_KEY: json.dumps(metadata, default=str)})
    write_atomically(path, lambda file: file.write(content))


def _stored(value: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous copy, as the format wants it also where weights are tied; numbers that count keep their dtype."""
    dtype = dtype if value.is_floating_point() else value.dtype
    return torch.empty(value.shape, dtype=dtype).copy_(value.detach())


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """A reader sees the old file or the new one, never half of one, whatever happens in between."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        write(file)
    os.replace(partial, path)


def load_network(path: str | Path, *, device: str | torch.device = "cpu",
                 network: str | nn.Module | Callable[[], nn.Module] | None = None
                 ) -> tuple[UNet | Adapted, dict[str, Any]]:  # fmt: skip
    """Reads a network written by `save_network`: the network in eval mode, and the metadata.

    A file holds no code, and the name of some is no reason to import it: a network that is neither fastdmd's nor of
    diffusers must be named again, as `network`: `package.module:name`, a module, or what makes one without arguments.

    A UNet is channels_last, which was measured faster for every width tried (16 to 192). Raises FileNotFoundError or
    ValueError with the path, what was expected and what came.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"fastdmd.load_network: expected a .safetensors file, got {path}, which does not exist")
    tensors, metadata = _read_safetensors(path)
    known = isinstance(metadata, dict) and "kind" in metadata and isinstance(metadata.get("network"), dict)
    if not known:
        raise ValueError(f"fastdmd.load_network: expected a file written by fastdmd, got {path} without its metadata")
    loaded = _rebuild(metadata["network"], network, path)
    _load_state(loaded.network if isinstance(loaded, Adapted) else loaded, tensors, path)
    loaded = loaded.float().to(device)
    if isinstance(loaded, UNet):
        loaded = loaded.to(memory_format=torch.channels_last)
    return loaded.eval().requires_grad_(False), metadata


def _rebuild(description: dict[str, Any], code: str | nn.Module | Callable[[], nn.Module] | None,
             path: Path) -> UNet | Adapted:  # fmt: skip
    """The network that `description`, from a weight file, stands for, with initial weights."""
    if "source" in description and code is None:
        raise ValueError(
            f"fastdmd.load_network: expected --network package.module:name for {path}, whose network is "
            f"{description['source']}, got none; code runs only where you name it"
        )
    if "source" not in description and code is not None:
        raise ValueError(f"fastdmd.load_network: expected no --network for {path}, which needs no code, got {code}")
    adapted = bool({"source", "diffusers"} & description.keys())
    known = {field.name for field in dataclasses.fields(AdapterOptions if adapted else UNetConfig)}
    options = description.get("options", {}) if adapted else description
    if unknown := set(options) - known:
        raise ValueError(f"fastdmd.load_network: expected a known network in {path}, got the fields {sorted(unknown)}")
    if not adapted:
        return UNet(UNetConfig(**options))
    if "diffusers" in description:
        return Adapted(diffusers_unet.build(description["diffusers"]), origin={"diffusers": description["diffusers"]},
                       **options)  # fmt: skip
    if isinstance(code, str):
        return Adapted(import_network(code, "load_network"), origin={"source": code}, **options)
    return Adapted(make_network(code, "load_network", "network"), **options)


def load_weights(network: nn.Module, path: Path) -> None:
    """Fills a network with the tensors of a `.safetensors` file, or of a `.pt` file, read without running its code.

    Raises FileNotFoundError or ValueError with the path, what was expected and what came.
    """
    if not path.is_file():
        raise FileNotFoundError(f"fastdmd.load_weights: expected a file, got {path}, which does not exist")
    if path.suffix == ".safetensors":
        state, _ = _read_safetensors(path)
    else:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, UnpicklingError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"fastdmd.load_weights: expected .safetensors, or .pt that holds tensors alone, got {path}: {reason}"
            ) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        got = f"the entries {sorted(map(str, state))[:5]}" if isinstance(state, dict) else f"a {type(state).__name__}"
        raise ValueError(f"fastdmd.load_weights: expected a state dict, tensors by name, got {got} in {path}")
    _load_state(network, state, path)


def _load_state(network: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        reason = textwrap.shorten(str(error), 400)  # it names every tensor
        raise ValueError(
            f"fastdmd.load_network: expected the tensors of {type(network).__name__} in {path}, got {reason}"
        ) from error


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], Any]:
    """The tensors, and fastdmd's metadata or None."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = json.loads((file.metadata() or {}).get(METADATA_KEY, "null"))
            return {name: file.get_tensor(name) for name in file.keys()}, metadata
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"fastdmd.load_network: expected a safetensors file, got {path}: {error}") from error


def versions(device: torch.device) -> dict[str, str | None]:
    """What a result depends on: package versions and the device's name."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "fastdmd": __version__, "torch": torch.__version__, "python": platform.python_version(),
        "cuda": torch.version.cuda, "device": name, "threads": torch.get_num_threads(),
    }  # fmt: skip


class RunFolder:
    """The folder of one run: `config.json`, `metrics.jsonl`, `samples.png`, weights and `summary.json`.

    Raises FileExistsError if the folder already holds a run, OSError if it cannot be written; nothing that was
    there before is touched.
    """

    def __init__(self, path: Path, config: dict[str, Any]):
        self.path = path
        if path.exists() and not path.is_dir():
            raise FileExistsError(f"fastdmd: expected a folder for --out, got the file {path}")
        if (path / "config.json").exists():
            raise FileExistsError(f"fastdmd: expected a new folder for --out, got {path}, which already holds a run")
        path.mkdir(parents=True, exist_ok=True)
        self.write_json("config.json", config)
        self._metrics = open(path / "metrics.jsonl", "w", buffering=1, encoding="utf-8")

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        text = json.dumps(content, indent=2, default=str) + "\n"
        write_atomically(self.path / name, lambda file: file.write(text.encode()))

    def log(self, **values: float) -> None:
        self._metrics.write(json.dumps(values) + "\n")

    def close(self) -> None:
        self._metrics.close()


def image_grid(images: Tensor, num_columns: int) -> Image.Image:
    """Images `[N, C, H, W]` in [-1, 1], row by row, as one picture with a pixel of space between them."""
    pixels = to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()  # [N, H, W, C]
    num_images, height, width, channels = pixels.shape
    num_rows = -(-num_images // num_columns)
    grid = np.full((num_rows * (height + 1) - 1, num_columns * (width + 1) - 1, channels), 96, np.uint8)
    for index, image in enumerate(pixels):
        top, left = index // num_columns * (height + 1), index % num_columns * (width + 1)
        grid[top : top + height, left : left + width] = image
    return Image.fromarray(grid.squeeze(2) if channels == 1 else grid)


class SampleHistory:
    """`samples.png`: one row per class; left, the same noise as training goes on; right, varied samples of now."""

    def __init__(self, path: Path, num_history: int = 8):
        self.path, self.num_history = path, num_history
        self.columns: list[Tensor] = []

    def add(self, samples: Tensor) -> None:  # [rows, columns, C, H, W]; column 0 keeps its noise from call to call
        samples = samples.cpu()
        self.columns.append(samples[:, 0])
        if len(self.columns) > 2 * self.num_history:  # thin out evenly, keep the first
            self.columns = self.columns[::2]
        gap = torch.full_like(samples[:, :1], -0.25)
        picture = torch.cat([torch.stack(self.columns, 1), gap, samples[:, 1:]], dim=1)
        grid = image_grid(picture.flatten(0, 1), picture.shape[1])
        grid = grid.resize((grid.width * 2, grid.height * 2), Image.Resampling.NEAREST)
        write_atomically(self.path, lambda file: grid.save(file, format="PNG"))
