"""Small datasets in every format, and what loading one should give."""

import gzip
import io
import json
import re
import struct
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from fastdmd import data
from fastdmd.data.pairs import PairRecord

LABELS = np.array([1, 0, 2, 1, 0, 2, 2], np.int64)
MIB = 2**20
TINY_PAIRS = PairRecord(
    teacher="0123456789abcdef",
    image_shape=(1, 4, 4),
    num_classes=3,
    sigma=80.0,
    teacher_steps=2,
    num=7,
    batch_size=3,
    seed=5,
    device="cpu",
)


def pixels(channels: int, size: int = 6, seed: int = 0) -> np.ndarray:
    """Random images [7, channels, size, size]."""
    return np.random.default_rng(seed).integers(0, 256, (len(LABELS), channels, size, size), np.uint8)


def png(image: np.ndarray, mode: str | None = None) -> bytes:
    """A PNG of an image [C, H, W]."""
    picture = Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))
    buffer = io.BytesIO()
    (picture.convert(mode) if mode else picture).save(buffer, "PNG")
    return buffer.getvalue()


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">{array.ndim + 1}I", 0x0800 + array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def write_idx(folder, images, labels=None, *, prefix="train-", separator="-", compressed=False):
    folder.mkdir(exist_ok=True)
    files = {f"{prefix}images{separator}idx3-ubyte": idx(images[:, 0])}
    if labels is not None:
        files[f"{prefix}labels{separator}idx1-ubyte"] = idx(labels)
    for name, content in files.items():
        if compressed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)
    return folder


def write_npz(path, **arrays):
    np.savez(path, **arrays)
    return path


def write_folder(folder, files: dict[str, bytes]):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def write_zip(path, files: dict[str, bytes]):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def edm_files(images, labels=None) -> dict[str, bytes]:
    """An EDM dataset; the labels are not in the order of the names."""
    names = [f"{index // 4:05d}/img{index:08d}.png" for index in range(len(images))]
    pairs = None if labels is None else [[n, int(k)] for n, k in zip(names, labels, strict=True)][::-1]
    files = {"dataset.json": json.dumps({"labels": pairs}).encode()}
    return files | {name: png(image) for name, image in zip(names, images, strict=True)}


def class_files(images, labels) -> dict[str, bytes]:
    """Class subfolders; sorted names give the images in the order of `np.argsort(labels, kind="stable")`."""
    classes = ["ant", "bee", "cat"]
    return {f"{classes[k]}/{i}.png": png(x) for i, (x, k) in enumerate(zip(images, labels, strict=True))}


def check(dataset, images, labels) -> None:
    assert dataset.images.dtype == torch.uint8
    np.testing.assert_array_equal(dataset.images.numpy(), images)
    assert dataset.image_shape == images.shape[1:] and len(dataset) == len(images)
    if labels is None:
        assert dataset.labels is None and dataset.num_classes == 0
    else:
        assert dataset.labels.dtype == torch.int64 and dataset.num_classes == 3
        assert dataset.labels.tolist() == labels.tolist()


def refuses(source, expected: str, got: str, **arguments) -> None:
    pattern = rf"^fastdmd\.data: expected {re.escape(expected)}.*, got {re.escape(got)}[^\n]*$"
    with pytest.raises(ValueError, match=pattern):
        data.load(source, **arguments)
