"""Readers of dataset files: IDX, `.npz`, folders and zips of images."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import io
import json
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
HIDDEN = (".", "__MACOSX")
CHUNK_BYTES = 2**24


@dataclasses.dataclass(frozen=True)
class Content:
    """What a file holds, before its images are decoded."""

    shape: tuple[int, ...]  # [N, C, H, W]
    labels: np.ndarray | None  # [N], any integer dtype
    chunks: Iterator[np.ndarray]  # uint8 [n, C, H, W] each, N in all
    path: Path  # of the images, for messages
    labels_path: Path | None


@contextlib.contextmanager
def open_content(path: Path, split: str) -> Iterator[Content]:
    """The checked content of a dataset; its chunks can be read while the context is open.

    `path` and `split` are those of `fastdmd.data.load`; so are the errors.
    """
    if not path.exists():
        raise FileNotFoundError(f"fastdmd.data: expected a dataset, got {path}, which does not exist")
    suffix = path.suffix.lower()
    if not path.is_dir() and suffix not in (".npz", ".zip"):
        raise mismatch("a folder, .npz or .zip", path)
    with contextlib.ExitStack() as stack:
        if not path.is_dir():
            with _decoding(suffix, path):
                archive = stack.enter_context(zipfile.ZipFile(path))
            if suffix == ".npz":
                content = _read_npz(stack, archive, path)
            else:
                content = _read_images(path, archive.namelist(), archive.open)
        elif idx_files := _idx_files(path):
            content = _read_idx(stack, path, idx_files, split)
        else:
            content = _read_images(path, _walk(path), lambda name: open(path / name, "rb"))
        _check(content)
        yield content


def mismatch(expected: object, got: object) -> ValueError:
    """The error to raise for a dataset."""
    return ValueError(f"fastdmd.data: expected {expected}, got {got}")


@contextlib.contextmanager
def _decoding(kind: str, path: Path) -> Iterator[None]:
    """Makes one ValueError of what gzip, zipfile, numpy, json and Pillow raise for broken bytes."""
    broken = (EOFError, OSError, RuntimeError, SyntaxError, ValueError, struct.error, zlib.error)
    try:
        yield
    except (*broken, zipfile.BadZipFile, Image.DecompressionBombError) as error:
        raise mismatch(f"a readable {kind} file", f"{path}: {' '.join(str(error).split())}") from error


def _check(content: Content) -> None:
    num_images, channels, height, width = content.shape
    if num_images < 1:
        raise mismatch("at least one image", f"none in {content.path}")
    if height != width or height < 1 or channels not in (1, 3):
        raise mismatch("square grey or RGB images", f"{width}x{height} of {channels} channels in {content.path}")
    labels = content.labels
    if labels is not None and len(labels) != num_images:
        raise mismatch(f"{num_images} labels", f"{len(labels)} in {content.labels_path}")
    if labels is not None and labels.min() < 0:
        raise mismatch("labels >= 0", f"{labels.min()} in {content.labels_path}")


def _chunks(stream: IO[bytes], shape: tuple[int, ...], path: Path) -> Iterator[np.ndarray]:
    """The rest of a stream as arrays of `shape`, except that their first axes only add up to its first."""
    image_bytes = math.prod(shape[1:])
    num_chunk = max(1, CHUNK_BYTES // image_bytes)
    for start in range(0, shape[0], num_chunk):
        size_bytes = min(num_chunk, shape[0] - start) * image_bytes
        with _decoding(path.suffix or "IDX", path):
            data = stream.read(size_bytes)
            if len(data) < size_bytes:
                raise EOFError("it ends early")
        yield np.frombuffer(data, np.uint8).reshape(-1, *shape[1:])


def _idx_files(folder: Path) -> dict[str, Path]:
    """IDX files by their lower-case name without `.gz`; of a file and its `.gz`, the file."""
    files = {}
    for path in sorted(folder.iterdir(), reverse=True):
        name = path.name.lower().removesuffix(".gz")
        if ("images" in name or "labels" in name) and "idx" in name and not name.endswith(IMAGE_SUFFIXES):
            files[name] = path
    return files


def _read_idx(stack: contextlib.ExitStack, folder: Path, files: dict[str, Path], split: str) -> Content:
    any_split = {"train", "test", None}
    path = _choose_idx(folder, files, "images", {split}) or _choose_idx(folder, files, "images", any_split)
    if path is None:
        raise mismatch("an IDX file of images, such as train-images-idx3-ubyte", f"none in {folder}")
    found_split = _idx_split(path.name.lower())
    labels_path = _choose_idx(folder, files, "labels", {found_split, None} if found_split else any_split)
    stream, (num_images, height, width) = _open_idx(stack, path, num_axes=3)
    labels = None
    if labels_path is not None:
        labels_stream, _ = _open_idx(stack, labels_path, num_axes=1)
        labels = np.frombuffer(labels_stream.read(), np.uint8)
    shape = (num_images, 1, height, width)
    return Content(shape, labels, _chunks(stream, shape, path), path, labels_path)


def _idx_split(name: str) -> str | None:
    if "train" in name:
        return "train"
    return "test" if "t10k" in name or "test" in name else None


def _choose_idx(folder: Path, files: dict[str, Path], kind: str, splits: set[str | None]) -> Path | None:
    found = [path for name, path in files.items() if kind in name and _idx_split(name) in splits]
    if len(found) > 1:
        names = ", ".join(sorted(path.name for path in found))
        raise mismatch(f"one IDX file of {kind}", f"{names} in {folder}")
    return found[0] if found else None


def _open_idx(stack: contextlib.ExitStack, path: Path, *, num_axes: int) -> tuple[IO[bytes], tuple[int, ...]]:
    """The stream after its header, and its shape, once the header's count is known to be the file's."""
    header_bytes = 4 + 4 * num_axes
    stream = stack.enter_context(gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb"))
    with _decoding("IDX", path):
        header = stream.read(header_bytes)
        size_bytes = stream.seek(0, io.SEEK_END)  # gzip decompresses to its end, and checks itself
        stream.seek(header_bytes)
    magic = 0x0800 + num_axes  # unsigned bytes, so many axes
    if int.from_bytes(header[:4], "big") != magic:
        raise mismatch(f"IDX magic 0x{magic:08x}", f"0x{header[:4].hex()} in {path}")
    if len(header) < header_bytes:
        raise mismatch(f"an IDX header of {header_bytes} bytes", f"{len(header)} in {path}")
    shape = struct.unpack(f">{num_axes}I", header[4:])
    if size_bytes != header_bytes + math.prod(shape):
        expected = f"{header_bytes + math.prod(shape)} bytes for IDX shape {shape}"
        raise mismatch(expected, f"{size_bytes} in {path}")
    return stream, shape


def _read_npz(stack: contextlib.ExitStack, archive: zipfile.ZipFile, path: Path) -> Content:
    names = archive.namelist()
    if "images.npy" not in names:
        raise mismatch("an array 'images'", f"{', '.join(sorted(names)) or 'nothing'} in {path}")
    stream, shape, dtype = _open_npy(stack, archive, "images", path)
    if dtype != np.uint8:
        raise mismatch("'images' of dtype uint8", f"{dtype} in {path}")
    if len(shape) == 3:
        shape = (*shape, 1)
    if len(shape) != 4 or not {shape[1], shape[3]} & {1, 3}:
        raise mismatch("'images' of shape [N, H, W, C], [N, C, H, W] or [N, H, W]", f"{shape} in {path}")
    labels = None
    if "labels.npy" in names:
        labels_stream, labels_shape, labels_dtype = _open_npy(stack, archive, "labels", path)
        if len(labels_shape) != 1 or labels_dtype.kind not in "iu":
            expected = "integer 'labels' of shape [N], one class for each image"
            raise mismatch(expected, f"{labels_dtype} of shape {labels_shape} in {path}")
        with _decoding(".npz", path):
            labels = np.frombuffer(labels_stream.read(), labels_dtype)
    axes = (0, 3, 1, 2) if shape[3] in (1, 3) else (0, 1, 2, 3)
    chunks = (chunk.transpose(axes) for chunk in _chunks(stream, shape, path))
    return Content(tuple(shape[axis] for axis in axes), labels, chunks, path, path)


def _open_npy(
    stack: contextlib.ExitStack, archive: zipfile.ZipFile, name: str, path: Path
) -> tuple[IO[bytes], tuple[int, ...], np.dtype]:
    """The stream of an array after its header, its shape and its dtype."""
    with _decoding(".npz", path):
        stream = stack.enter_context(archive.open(f"{name}.npy"))
        version = np.lib.format.read_magic(stream)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }.get(version)
        if read_header is None:
            raise ValueError(f"'{name}' is in .npy format {version}")
        shape, is_fortran, dtype = read_header(stream)
    if is_fortran:
        raise mismatch(f"'{name}' in C order, as np.ascontiguousarray makes it", f"Fortran order in {path}")
    size_bytes = archive.getinfo(f"{name}.npy").file_size - stream.tell()
    if size_bytes != math.prod(shape) * dtype.itemsize and not dtype.hasobject:
        expected = f"{math.prod(shape) * dtype.itemsize} bytes of '{name}'"
        raise mismatch(expected, f"{size_bytes} in {path}")
    return stream, shape, dtype


def _walk(folder: Path) -> list[str]:
    """Everything below a folder, as a zip of it would name it."""
    names = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        prefix = Path(parent).relative_to(folder)
        names += [(prefix / name).as_posix() + "/" for name in folders]
        names += [(prefix / name).as_posix() for name in files]
    return names


def _read_images(path: Path, names: list[str], open_member: Callable[[str], IO[bytes]]) -> Content:
    """Content of a folder or zip; `names` are relative to it, those of folders end with a slash."""
    names = sorted({name for name in names if not any(part.startswith(HIDDEN) for part in name.split("/"))})
    images = [name for name in names if name.lower().endswith(IMAGE_SUFFIXES)]
    if not images:
        raise mismatch(f"IDX files or images ({', '.join(IMAGE_SUFFIXES)})", f"none in {path}")
    labels_path = path / "dataset.json"
    if labels_path.name in names:
        with _decoding("JSON", labels_path), open_member(labels_path.name) as file:
            description = json.load(file)
        labels = _json_labels(description, images, labels_path)
    else:
        labels = _subfolder_labels(images, names, path)

    def open_image(name: str, *, decoded: bool) -> Image.Image:
        with _decoding("image", path / name), open_member(name) as file, Image.open(file) as image:
            if decoded:
                image.load()
        return image

    def chunks() -> Iterator[np.ndarray]:
        for name in images:
            image = open_image(name, decoded=True)
            if image.size != (size, size):
                got = f"{image.width}x{image.height} in {path / name}"
                raise mismatch(f"square images of one size ({size}x{size})", got)
            if image.mode[0] in "IF":
                raise mismatch("images of 8 bits a channel", f"mode {image.mode} in {path / name}")
            yield np.asarray(image.convert(mode)).reshape(1, size, size, -1).transpose(0, 3, 1, 2)

    size = open_image(images[0], decoded=False).width
    modes = (open_image(name, decoded=False).mode for name in images)
    all_grey = all(mode in ("1", "L") for mode in modes)  # reads no further than the first in colour
    mode, num_channels = ("L", 1) if all_grey else ("RGB", 3)
    return Content((len(images), num_channels, size, size), labels, chunks(), path, labels_path)


def _json_labels(description: object, images: list[str], path: Path) -> np.ndarray | None:
    """Labels as EDM writes them: {"labels": [["00000/img00000000.png", 6], ...]}, or null for none."""
    labels = description.get("labels", ()) if isinstance(description, dict) else ()
    if labels is None:
        return None
    if not (isinstance(labels, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in labels)):
        raise mismatch("'labels', null or a list of [name, class]", f"something else in {path}")
    for name, label in labels:
        if type(label) is not int or label >= 2**63:
            raise mismatch("an integer class for each image", f"{label!r} for {name} in {path}")
    by_name = {str(name): label for name, label in labels}
    missing = [name for name in images if name not in by_name]
    if missing or len(labels) != len(images):
        got = f"none for {missing[0]}" if missing else f"{len(labels)} labels"
        raise mismatch(f"one label for each of {len(images)} images", f"{got} in {path}")
    return np.array([by_name[name] for name in images])


def _subfolder_labels(images: list[str], names: list[str], path: Path) -> np.ndarray | None:
    """The place of each image's folder among the sorted folders; None if the images lie in no subfolder."""
    folders = [name.rpartition("/")[0] for name in images]
    if not any(folders):
        return None
    for name, folder in zip(images, folders, strict=True):
        if not folder or "/" in folder:
            expected = "images all in the folder itself, or all directly in class subfolders"
            raise mismatch(expected, f"{name} among {len(images)} images in {path}")
    classes = sorted({name.split("/")[0] for name in names if "/" in name})
    empty = sorted(set(classes) - set(folders))
    if empty:  # whether it counts as a class would be a guess
        raise mismatch("images in every class subfolder", f"none in {path / empty[0]}")
    place = {name: index for index, name in enumerate(classes)}
    return np.array([place[folder] for folder in folders])
