"""What is written to disk: weight files that carry their configuration, run folders, image grids."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fastdmd import __version__
from fastdmd.data import to_uint8
from fastdmd.unet import UNet, UNetConfig

METADATA_KEY = "fastdmd"
ASSETS = Path(__file__).parent / "assets"


def save_network(path: Path, network: UNet, *, kind: str, dtype: torch.dtype = torch.float32,
                 **information: Any) -> None:  # fmt: skip
    """Writes weights and configuration to a safetensors file, in one atomic replacement.

    `kind` is "teacher" or "generator"; `dtype` is that of the weights in the file; `information` is anything JSON can
    hold and is read back by `load_network`. The file can be read by any safetensors reader.
    """
    metadata = {
        "kind": kind,
        "network": dataclasses.asdict(network.config),
        "version": __version__,
        **information,
    }
    tensors = {name: value.detach().to("cpu", dtype).contiguous() for name, value in network.state_dict().items()}
    content = save(tensors, metadata={METADATA_KEY: json.dumps(metadata, default=str)})
    write_atomically(path, lambda file: file.write(content))


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """A reader sees the old file or the new one, never half of one, whatever happens in between."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        write(file)
    os.replace(partial, path)


def load_network(path: str | Path, *, device: str | torch.device = "cpu") -> tuple[UNet, dict[str, Any]]:
    """Reads a network written by `save_network`: the network in eval mode, and the metadata.

    The network is channels_last, which was measured faster for every width tried (16 to 192). Raises
    FileNotFoundError or ValueError with the path, what was expected and what came.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"fastdmd.load_network: expected a .safetensors file, got {path}, which does not exist")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = json.loads((file.metadata() or {}).get(METADATA_KEY, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"fastdmd.load_network: expected a safetensors file, got {path}: {error}") from error
    if not isinstance(metadata, dict) or not {"kind", "network"} <= metadata.keys():
        raise ValueError(f"fastdmd.load_network: expected a file written by fastdmd, got {path} without its metadata")
    known = {field.name for field in dataclasses.fields(UNetConfig)}
    if unknown := set(metadata["network"]) - known:
        raise ValueError(f"fastdmd.load_network: expected a known network in {path}, got the fields {sorted(unknown)}")
    network = UNet(UNetConfig(**metadata["network"]))
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"fastdmd.load_network: expected the tensors of its configuration in {path}, got {reason}"
        ) from error
    network = network.float().to(device=device, memory_format=torch.channels_last)
    return network.eval().requires_grad_(False), metadata


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
