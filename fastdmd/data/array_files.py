"""Readers of files that hold arrays: IDX and `.npz`."""

from __future__ import annotations

import contextlib
import gzip
import math
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

import numpy as np

from fastdmd.data.content import Content, decoding, mismatch
from fastdmd.data.labels import checked, warn_of_unread
from fastdmd.data.members import Members
from fastdmd.reading import MAX_DEFLATE, open_member, read_npy_header

CHUNK_BYTES = 2**24


def read_idx(stack: contextlib.ExitStack, members: Members, split: str) -> Content:
    """Content of `members.idx_files`, of `split` if they hold that."""
    any_split = {"train", "test", None}
    images = _choose_idx(members, "images", {split}) or _choose_idx(members, "images", any_split)
    if images is None:
        raise mismatch("an IDX file of images, such as train-images-idx3-ubyte", f"none in {members.path}")
    found_split = _idx_split(images)
    labels = _choose_idx(members, "labels", {found_split, None} if found_split else any_split)
    stream, (num_images, height, width) = _open_idx(stack, members, images, num_axes=3)

    def read_labels() -> np.ndarray | None:
        if labels is None:
            warn_of_unread([name for name in members.files if "idx1" in name.lower()], members.path)
            return None
        path = members.path / labels
        labels_stream, (num_labels,) = _open_idx(stack, members, labels, num_axes=1)
        _require_count(num_labels, num_images, path)
        (values,) = _chunks(labels_stream, (num_labels,), path, f"IDX shape ({num_labels},)", num_labels)
        return checked(values, path)

    shape = (num_images, 1, height, width)
    path = members.path / images
    chunks = _chunks(stream, shape, path, f"IDX shape {(num_images, height, width)}")
    return Content(shape, read_labels, chunks, path)


def read_npz(stack: contextlib.ExitStack, archive: zipfile.ZipFile, path: Path) -> Content:
    """Content of the arrays 'images' and, if they are asked for, 'labels'."""
    names = archive.namelist()
    if "images.npy" not in names:
        raise mismatch("an array 'images'", f"{', '.join(sorted(names))[:200]} in {path}")
    stream, shape, dtype = _open_npy(stack, archive, "images", path)
    if dtype != np.uint8:
        raise mismatch("'images' of dtype uint8", f"{dtype} in {path}")
    if len(shape) == 3:
        shape = (*shape, 1)
    if len(shape) != 4 or not {shape[1], shape[3]} & {1, 3}:
        raise mismatch("'images' of shape [N, H, W, C], [N, C, H, W] or [N, H, W]", f"{shape} in {path}")

    def read_labels() -> np.ndarray | None:
        if "labels.npy" not in names:
            warn_of_unread([name for name in names if name != "images.npy"], path)
            return None
        labels_stream, labels_shape, labels_dtype = _open_npy(stack, archive, "labels", path)
        if len(labels_shape) != 1 or labels_dtype.kind not in "iu":
            expected = "integer 'labels' of shape [N], one class for each image"
            raise mismatch(expected, f"{labels_dtype} of shape {labels_shape} in {path}")
        _require_count(labels_shape[0], shape[0], path)
        size_bytes = labels_shape[0] * labels_dtype.itemsize
        (labels,) = _chunks(labels_stream, (size_bytes,), path, "'labels'", size_bytes)
        return checked(labels.view(labels_dtype), path)

    axes = (0, 3, 1, 2) if shape[3] in (1, 3) else (0, 1, 2, 3)
    chunks = (chunk.transpose(axes) for chunk in _chunks(stream, shape, path, "'images'"))
    return Content(tuple(shape[axis] for axis in axes), read_labels, chunks, path)


def _require_count(num_labels: int, num_images: int, path: Path) -> None:
    if num_labels != num_images:
        raise mismatch(f"{num_images} labels", f"{num_labels} in {path}")


def _chunks(
    stream: IO[bytes], shape: tuple[int, ...], path: Path, name: str, chunk_bytes: int | None = None
) -> Iterator[np.ndarray]:
    """The rest of a stream as uint8 arrays of `shape`, except that their first axes only add up to its first.

    Raises ValueError if the stream is shorter or longer. `name` is what has this shape.
    """
    kind = ".npz" if path.suffix.lower() == ".npz" else "IDX"
    item_bytes = math.prod(shape[1:])
    num_chunk = max(1, (chunk_bytes or CHUNK_BYTES) // item_bytes)
    for start in range(0, shape[0], num_chunk):
        num_items = min(num_chunk, shape[0] - start)
        with decoding(kind, path):
            data = stream.read(num_items * item_bytes)
        if len(data) < num_items * item_bytes:
            got = start * item_bytes + len(data)
            raise mismatch(f"{math.prod(shape)} bytes for {name}", f"{got} in {path}")
        yield np.frombuffer(data, np.uint8).reshape(-1, *shape[1:])
    with decoding(kind, path):
        rest = len(stream.read(CHUNK_BYTES))  # at its end, a compressed stream checks itself
    if rest:
        raise mismatch(f"{math.prod(shape)} bytes for {name}", f"{math.prod(shape) + rest} in {path}")


def _idx_split(name: str) -> str | None:
    name = name.rpartition("/")[2].lower()
    if "train" in name:
        return "train"
    return "test" if "t10k" in name or "test" in name else None


def _choose_idx(members: Members, kind: str, splits: set[str | None]) -> str | None:
    """The one IDX file of `kind`, images or labels, of these splits; of a file and its `.gz`, the file."""
    found = {
        name.lower().removesuffix(".gz"): name
        for name in sorted(members.idx_files, reverse=True)
        if kind in name.rpartition("/")[2].lower() and _idx_split(name) in splits
    }
    if len(found) > 1:
        raise mismatch(f"one IDX file of {kind}", f"{', '.join(sorted(found.values()))} in {members.path}")
    return next(iter(found.values()), None)


def _open_idx(
    stack: contextlib.ExitStack, members: Members, name: str, *, num_axes: int
) -> tuple[IO[bytes], tuple[int, ...]]:
    """The stream after its header, and its shape, once the file is known to be able to hold that much."""
    path = members.path / name
    is_compressed = name.lower().endswith(".gz")
    with decoding("IDX", path):
        file = stack.enter_context(members.open(name))
    stream = cast(IO[bytes], stack.enter_context(gzip.open(file))) if is_compressed else file  # typeshed has it apart
    header_bytes = 4 + 4 * num_axes
    with decoding("IDX", path):
        header = stream.read(header_bytes)
    magic = 0x0800 + num_axes  # unsigned bytes, so many axes
    if int.from_bytes(header[:4], "big") != magic:
        raise mismatch(f"IDX magic 0x{magic:08x}", f"0x{header[:4].hex()} in {path}")
    if len(header) < header_bytes:
        raise mismatch(f"an IDX header of {header_bytes} bytes", f"{len(header)} in {path}")
    shape = struct.unpack(f">{num_axes}I", header[4:])
    stored_bytes = members.size(name)
    held_bytes = stored_bytes * MAX_DEFLATE if is_compressed else stored_bytes - header_bytes
    if math.prod(shape) > held_bytes or not is_compressed and math.prod(shape) < held_bytes:
        got = f"at most {held_bytes}" if is_compressed else held_bytes
        raise mismatch(f"{math.prod(shape)} bytes for IDX shape {shape}", f"{got} in {path}")
    return stream, shape


def _open_npy(
    stack: contextlib.ExitStack, archive: zipfile.ZipFile, name: str, path: Path
) -> tuple[IO[bytes], tuple[int, ...], np.dtype]:
    """The stream of an array after its header, its shape and its dtype."""
    member = f"{name}.npy"
    if archive.namelist().count(member) > 1:
        raise mismatch(f"one array '{name}'", f"several in {path}")
    with decoding(".npz", path):
        stream = stack.enter_context(open_member(archive, member))
        shape, is_fortran, dtype, header_bytes = read_npy_header(stream)
        stream.seek(header_bytes)
    if is_fortran:
        raise mismatch(f"'{name}' in C order, as np.ascontiguousarray makes it", f"Fortran order in {path}")
    size_bytes = archive.getinfo(member).file_size - header_bytes
    if size_bytes != math.prod(shape) * dtype.itemsize and not dtype.hasobject:
        expected = f"{math.prod(shape) * dtype.itemsize} bytes of '{name}'"
        raise mismatch(expected, f"{size_bytes} in {path}")
    return stream, shape, dtype
