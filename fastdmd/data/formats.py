"""Which reader a dataset is for, and what its images must be whoever reads them."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator
from pathlib import Path

from fastdmd.data import members
from fastdmd.data.array_files import read_idx, read_npz
from fastdmd.data.content import Content, Requirement, decoding, mismatch
from fastdmd.data.framing import Framing
from fastdmd.data.image_files import read_images
from fastdmd.data.labels import require_choice
from fastdmd.reading import open_zip


@contextlib.contextmanager
def open_content(
    path: Path, split: str, labels: str | None, framing: Framing, requirement: Requirement
) -> Iterator[Content]:
    """The checked content of a dataset; its labels and chunks can be read while the context is open.

    The arguments are those of `fastdmd.data.load`; so are the errors.
    """
    require_choice(labels)
    if not path.exists():
        raise FileNotFoundError(f"fastdmd.data: expected a dataset, got {path}, which does not exist")
    suffix = path.suffix.lower()
    if not path.is_dir() and suffix not in (".npz", ".zip"):
        raise mismatch("a folder, .npz or .zip", path)
    with contextlib.ExitStack() as stack:
        archive = None
        if not path.is_dir():
            if not path.is_file():
                raise mismatch("a regular file", path)
            with decoding(suffix, path):
                archive = stack.enter_context(open_zip(path))
        if archive is not None and suffix == ".npz":
            content = _framed(read_npz(stack, archive, path), labels, framing)
        else:
            files = members.of_folder(path) if archive is None else members.of_zip(path, archive)
            if files.idx_files:
                if beside := files.images:
                    message = f"{len(beside)} images beside the IDX files in {path} are not read, such as {beside[0]}"
                    warnings.warn(f"fastdmd.data: {message}", stacklevel=2)
                content = _framed(read_idx(stack, files, split), labels, framing)
            else:
                content = read_images(files, framing, labels, requirement)
        num_images, channels, height, width = content.shape
        if num_images < 1:
            raise mismatch("at least one image", f"none in {content.path}")
        if height != width or height < 1 or channels not in (1, 3):
            got = f"{width}x{height} of {channels} channels in {content.path}"
            raise mismatch("square grey or RGB images, or --resize N", got)
        requirement.check_shape(content.shape[1:], content.path)
        yield content


def _framed(content: Content, labels: str | None, framing: Framing) -> Content:
    """Content of arrays, whose images have no names."""
    if labels not in (None, "none"):
        raise mismatch(f"a folder or zip of images for --labels {labels}", content.path)
    if labels == "none":
        content = dataclasses.replace(content, read_labels=lambda: None)
    if framing == Framing():
        return content
    num_images, channels, height, width = content.shape
    size = framing.size_of(width, height, content.path)
    if framing.resize is not None and min(width, height) < framing.resize:
        message = f"fastdmd.data: the images of {content.path} are smaller than --resize {framing.resize}: enlarged"
        warnings.warn(message, stacklevel=2)
    chunks = framing.apply_chunks(content.chunks)
    return dataclasses.replace(content, shape=(num_images, channels, *size), chunks=chunks)
