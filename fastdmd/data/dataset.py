"""Datasets of uint8 images held whole, and batches of them as functions of seed, step and sample."""

from __future__ import annotations

import dataclasses
import functools
import math
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastdmd.data.content import Requirement, mismatch
from fastdmd.data.formats import open_content
from fastdmd.data.framing import Framing
from fastdmd.memory import available_memory_bytes
from fastdmd.randomness import Stream, integers

EMBEDDED = Path(__file__).parents[1] / "assets" / "mnist"


def load(
    source: str | Path | None = None,
    *,
    split: str = "train",
    labels: str | None = None,
    resize: int | None = None,
    crop: int | None = None,
    image_shape: tuple[int, int, int] | None = None,
    num_classes: int | None = None,
    labels_optional: bool = False,
    device: torch.device | str = "cpu",
    memory_limit_bytes: int | None = None,
) -> Dataset:
    """Reads a dataset whole, and checks it: headers first, then counts and labels, then pixels.

    Args:
        source: one of
            None: the embedded MNIST test split, 10,000 digits;
            a folder or zip of IDX files, plain or `.gz`, of images and perhaps labels, in whichever subfolders;
            a `.npz` with uint8 `images` `[N, H, W, C]`, `[N, C, H, W]` or `[N, H, W]`, and perhaps integer
            `labels` `[N]`;
            a folder of images, unlabelled, or labelled by their subfolder's place among the sorted names;
            a zip of the same. A `dataset.json` as EDM writes it overrules subfolders, and a folder around
            everything counts for nothing.
            Images are square and of one size, unless `resize` or `crop` makes them so; they are turned upright as
            their EXIF says. Transparent pixels are laid on white, with a warning. Unless all are grey (modes L, 1 and
            LA, and palettes of which only greys are used), all become RGB.
        split: "train" or "test": the half of an IDX folder to read, where it holds both.
        labels: instead of those, "prefix": what stands before the first underscore of a file's name, numbered like
            subfolders; the path of a CSV with lines `name,class`; or "none".
        resize: the shorter side becomes so many pixels (Lanczos, antialiased), and the centre square is kept.
        crop: of that, or without `resize` of the image as it is, the centre square of so many pixels is kept.
        image_shape, num_classes: as `Dataset.require` asks for them, but before pixels are read.
        labels_optional: `num_classes` accepts a dataset without labels.
        device: a CUDA device to move the dataset to, if it fits in half of the free memory there; otherwise,
            and for any other device, it stays on the host.
        memory_limit_bytes: images that decode to more than this are mapped from an unnamed temporary file (in
            TMPDIR) instead of held in memory. Default: half of the memory available, or 4 GiB where that is unknown.

    Raises FileNotFoundError if `source` does not exist, OSError if the temporary file does not fit its disk,
    and ValueError with the file, what was expected and what came, if `source` is not such a dataset. Warns of classes
    without an image, of files that look like images, or may hold labels, and are not read, and of names with labels
    and no image.
    """
    if split not in ("train", "test"):
        raise mismatch("split 'train' or 'test'", repr(split))
    if memory_limit_bytes is None:
        available_bytes = available_memory_bytes()
        memory_limit_bytes = 2**32 if available_bytes is None else available_bytes // 2
    framing = Framing(resize, crop)
    requirement = Requirement(image_shape=image_shape, num_classes=num_classes, labels_optional=labels_optional)
    name = "embedded MNIST digits" if source is None else str(source)
    path = EMBEDDED if source is None else Path(source)
    with open_content(path, split, labels, framing, requirement) as content:
        classes = requirement.labels(content.read_labels(), content.path)
        images = _allocate(content.shape, memory_limit_bytes)
        _fill(images, content.chunks)
    device = torch.device(device)
    fits = device.type == "cuda" and images.nbytes <= torch.cuda.mem_get_info(device)[0] // 2
    place = device if fits else torch.device("cpu")
    return Dataset(
        torch.from_numpy(images).to(place),
        None if classes is None else torch.from_numpy(classes).to(place),
        f"{name} ({framing})" if str(framing) else name,
    )


def to_uint8(images: Tensor) -> Tensor:
    """`round((x + 1) * 127.5)`, clamped to 0..255: float images in [-1, 1] of any shape to uint8."""
    return ((images.to(torch.float32) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Images, and labels if there are any, on the host or on an accelerator. Made by `load`."""

    images: Tensor  # [N, C, H, W] uint8, C in {1, 3}, H == W
    labels: Tensor | None  # [N] int64, >= 0
    name: str  # the source, for messages

    def __len__(self) -> int:
        return len(self.images)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        _, C, H, W = self.images.shape
        return C, H, W

    @functools.cached_property
    def num_classes(self) -> int:
        """The largest label plus one; 0 without labels."""
        return 0 if self.labels is None else int(self.labels.max()) + 1

    def batch(self, indices: Tensor, device: torch.device | str | None = None) -> tuple[Tensor, Tensor | None]:
        """Images `x / 127.5 - 1` `[B, C, H, W]`, float32, and labels `[B]`, int64, or None.

        The images cross to `device` (default: where they are) as uint8 and are normalised there. `indices` is
        int64 `[B]`, on any device, each in [0, N). Raises ValueError for another shape or dtype.
        """
        if indices.ndim != 1 or indices.dtype != torch.int64:
            raise mismatch("int64 indices of shape (B,)", f"{indices.dtype} of shape {tuple(indices.shape)}")
        device = self.images.device if device is None else torch.device(device)
        indices = _move(indices, self.images.device)
        images = _move(self.images.index_select(0, indices), device).to(torch.float32).div_(127.5).sub_(1)
        return images, None if self.labels is None else _move(self.labels.index_select(0, indices), device)

    def random_batch(
        self,
        batch_size: int,
        *,
        seed: int,
        step: int,
        device: torch.device | str | None = None,
        stream: Stream = Stream.REAL_IMAGE,
        first_sample: int = 0,
    ) -> tuple[Tensor, Tensor | None]:
        """`batch` of indices drawn with replacement, those of samples from `first_sample` on.

        Each is a function of (seed, step, stream, sample), the same on every device.
        """
        indices = integers(
            0, len(self), batch_size, seed=seed, stream=stream, iteration=step, first_sample=first_sample
        )
        return self.batch(indices, device)

    def require(
        self, *, image_shape: tuple[int, int, int] | None = None, num_classes: int | None = None, least_images: int = 1
    ) -> Dataset:
        """This dataset as a network of `image_shape` (C, H, W) and `num_classes` takes it; None accepts any.

        For `num_classes` 0, an unconditional network, the labels are dropped. Raises ValueError if the images
        differ in shape or are fewer than `least_images`, or if labels are missing or not all below `num_classes`.
        """
        if len(self) < least_images:
            raise mismatch(f"at least {least_images} images to measure against", f"{len(self)} in {self.name}")
        requirement = Requirement(image_shape=image_shape, num_classes=num_classes)
        requirement.check_shape(self.image_shape, self.name)
        labels = requirement.labels(self.labels, self.name)
        return self if labels is self.labels else dataclasses.replace(self, labels=labels)


def _allocate(shape: tuple[int, ...], memory_limit_bytes: int) -> np.ndarray:
    size_bytes = math.prod(shape)
    if size_bytes <= memory_limit_bytes:
        return np.empty(shape, np.uint8)
    folder = tempfile.gettempdir()
    free_bytes = shutil.disk_usage(folder).free
    if size_bytes > free_bytes:  # else the first write past the end of the disk is a SIGBUS
        raise OSError(f"fastdmd.data: expected {size_bytes} bytes free in {folder}, got {free_bytes}")
    with tempfile.TemporaryFile() as file:  # has no name; lives until its mapping goes
        return np.memmap(file, np.uint8, mode="w+", shape=shape)


def _fill(images: np.ndarray, chunks: Iterator[np.ndarray]) -> None:
    num_filled = 0
    for chunk in chunks:
        images[num_filled : num_filled + len(chunk)] = chunk
        num_filled += len(chunk)
    assert num_filled == len(images)


def _move(tensor: Tensor, device: torch.device) -> Tensor:
    # A copy to the host must have arrived before it is read; one from the host need not hold up the host.
    return tensor.to(device, non_blocking=device.type == "cuda")
