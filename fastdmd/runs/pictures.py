"""Samples as pictures: a grid of images, and `samples.png`, their history through a run, to be written and read."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from fastdmd import ops
from fastdmd.data import to_uint8
from fastdmd.diffusion import Denoiser
from fastdmd.files import write_atomically
from fastdmd.quality import sample
from fastdmd.randomness import RANDOM_NUMBERS, Stream, normals
from fastdmd.reading import open_regular, parse_json
from fastdmd.sampling import Sampler, step_normals
from fastdmd.saved import COUNT, Rule, list_of, require

NUM_ROWS = 10  # of samples.png, at most: one row per class
NUM_COLUMNS = 11  # the first repeats its noise through the run
LINE = 96  # level of the lines between images
SCALE = 2  # pixels of samples.png a side for each of an image
NOTES = "fastdmd"  # the name of a text in samples.png


def image_grid(images: Tensor, num_columns: int) -> Image.Image:
    """Images `[N, C, H, W]` in [-1, 1], row by row, as one picture with a pixel of space between them.

    One channel is grey and three are RGB. Any other number is of no colour, as in a latent space: the channels of an
    image stand side by side, in grey.
    """
    if images.shape[1] not in (1, 3):
        images = images.movedim(1, 2).flatten(2)[:, None]  # [N, 1, H, C * W]
    pixels = to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()  # [N, H, W, C]
    num_images, height, width, channels = pixels.shape
    num_rows = -(-num_images // num_columns)
    grid = np.full((num_rows * (height + 1) - 1, num_columns * (width + 1) - 1, channels), LINE, np.uint8)
    for index, image in enumerate(pixels):
        top, left = index // num_columns * (height + 1), index % num_columns * (width + 1)
        grid[top : top + height, left : left + width] = image
    return Image.fromarray(grid.squeeze(2) if channels == 1 else grid)


class SampleSheet:
    """Noise and labels of samples.png, the same throughout a run: rows of NUM_COLUMNS images, a class each."""

    def __init__(self, network: Denoiser, seed: int, device: torch.device):
        self._seed = seed
        num_rows = min(NUM_ROWS, network.num_classes or NUM_ROWS)
        rng_key = ops.rng_key(seed, stream=Stream.PICTURE_NOISE, device=device)
        self.noise = normals((num_rows * NUM_COLUMNS, *network.image_shape), rng_key)
        self.class_labels: Tensor | None = None
        if network.num_classes:
            self.class_labels = torch.arange(num_rows, device=device).repeat_interleave(NUM_COLUMNS)

    def of(self, sampler: Sampler) -> Tensor:
        """The images that a sampler makes of them, `[rows, columns, C, H, W]`, for `SampleHistory`."""
        rng_key = ops.rng_key(self._seed, stream=Stream.PICTURE_STEP_NOISE, device=self.noise.device)
        step_noise = step_normals(sampler.num_step_noises, self.noise.shape, rng_key)
        return sample(sampler, self.noise, self.class_labels, step_noise).unflatten(0, (-1, NUM_COLUMNS))


class SampleHistory:
    """`samples.png`: one row per class; left, the same noise as training goes on; right, varied samples of now."""

    def __init__(self, path: Path, num_history: int = 8):
        self.path, self.num_history = path, num_history
        self.columns: list[Tensor] = []
        self.iterations: list[int] = []  # of the columns

    def add(self, samples: Tensor, iteration: int) -> None:
        """Samples `[rows, columns, C, H, W]`, of which column 0 keeps its noise from call to call; in the place of the
        last ones, if these are of the same iteration."""
        samples = samples.cpu()
        if self.iterations[-1:] == [iteration]:
            self.columns.pop()
            self.iterations.pop()
        self.columns.append(samples[:, 0])
        self.iterations.append(iteration)
        if len(self.columns) > 2 * self.num_history:  # thin out evenly, keep the first
            self.columns = self.columns[::2]
            self.iterations = self.iterations[::2]
        gap = torch.full_like(samples[:, :1], -0.25)
        picture = torch.cat([torch.stack(self.columns, 1), gap, samples[:, 1:]], dim=1)
        grid = image_grid(picture.flatten(0, 1), picture.shape[1])
        grid = grid.resize((grid.width * SCALE, grid.height * SCALE), Image.Resampling.NEAREST)
        notes = PngImagePlugin.PngInfo()
        notes.add_text(NOTES, json.dumps({"iterations": self.iterations, "random_numbers": RANDOM_NUMBERS}))
        write_atomically(self.path, lambda file: grid.save(file, format="PNG", pnginfo=notes))

    def state_dict(self) -> dict[str, Any]:
        return {"columns": self.columns, "iterations": self.iterations}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError for what are no columns, or not of as many iterations."""
        columns = Rule(
            "images [rows, C, H, W] of one shape, float32 and finite",
            lambda found: (
                isinstance(found, list)
                and all(isinstance(x, Tensor) and x.dtype == torch.float32 and x.isfinite().all() for x in found)
                and all(x.dim() == 4 and x.shape == found[0].shape for x in found)
            ),
        )
        require("samples", state, {"columns": columns, "iterations": list_of(COUNT)})
        if len(state["iterations"]) != len(state["columns"]):
            expected, got = len(state["columns"]), len(state["iterations"])
            raise ValueError(f"expected samples.iterations of {expected} columns, got {got}")
        self.columns = list(state["columns"])
        self.iterations = list(state["iterations"])


@dataclasses.dataclass(frozen=True)
class Sheet:
    """What `samples.png` shows, image by image."""

    iterations: Sequence[int]  # of the history, in order; empty where the file does not say, as older ones do not
    history: Sequence[Sequence[Image.Image]]  # [rows][iterations], the same noise
    varied: Sequence[Sequence[Image.Image]]  # [rows][NUM_COLUMNS - 1], of the last of these iterations
    is_of_sheet_noise: bool = True  # that of `SampleSheet`; older files have other noise


def read_sheet(path: Path) -> Sheet:
    """Raises OSError or ValueError where the file is no such picture."""
    try:
        with open_regular(path) as file, Image.open(file) as picture:
            notes = parse_json(getattr(picture, "text", {}).get(NOTES, "{}"))
            grid = picture.reduce(SCALE)
    except Image.DecompressionBombError as error:
        raise ValueError(f"expected the samples of a run in {path}, got too large a picture") from error
    rows = _cells(grid)
    notes = notes if isinstance(notes, dict) else {}
    iterations = notes.get("iterations", [])
    num_history = len(rows[0]) - NUM_COLUMNS  # a gap between them
    is_whole = num_history >= 1 and isinstance(iterations, list) and {*map(type, iterations)} <= {int}
    if not is_whole or len(iterations) not in (0, num_history):
        raise ValueError(f"expected the samples of a run in {path}, got {len(rows[0])} columns")
    history, varied = [row[:num_history] for row in rows], [row[num_history + 1 :] for row in rows]
    return Sheet(iterations, history, varied, notes.get("random_numbers") == RANDOM_NUMBERS)


def _cells(grid: Image.Image) -> list[list[Image.Image]]:
    """The images of an `image_grid`, row by row, told apart by the lines between them."""
    pixels = np.asarray(grid.convert("RGB"))
    height, width = (_first(np.all(pixels == LINE, axis=(axis, 2))) for axis in (1, 0))
    return [
        [grid.crop((left, top, left + width, top + height)) for left in range(0, grid.width, width + 1)]
        for top in range(0, grid.height, height + 1)
    ]


def _first(lines: np.ndarray) -> int:
    """Where the first line is; of none, where all ends."""
    return int(lines.argmax()) if lines.any() else len(lines)
