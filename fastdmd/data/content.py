"""What all readers of datasets share: what they give, how they open a file, and one error for bytes that are broken."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

CONTROL = dict.fromkeys((*range(32), *range(127, 160)), "?")  # characters that would steer a terminal
MAX_REASON = 300  # characters; a format may quote the whole file in its error


@dataclasses.dataclass(frozen=True)
class Content:
    """What a file holds, known from its headers, before labels and pixels are read."""

    shape: tuple[int, ...]  # [N, C, H, W]
    read_labels: Callable[[], np.ndarray | None]  # int64 [N], checked; None: there are none
    chunks: Iterator[np.ndarray]  # uint8 [n, C, H, W] each, N in all
    path: Path  # of the images, for messages


@dataclasses.dataclass(frozen=True, kw_only=True)
class Requirement:
    """What a network takes; None accepts any. All of it can be asked before pixels are read."""

    image_shape: tuple[int, int, int] | None = None  # (C, H, W)
    num_classes: int | None = None  # labels lie below; 0, an unconditional network: they are dropped
    labels_optional: bool = False

    def check_size(self, width: int, height: int, name: object) -> None:
        """Raises ValueError for images of another size, whatever their channels."""
        if self.image_shape is not None and tuple(self.image_shape[1:]) != (height, width):
            raise mismatch(f"images of shape {tuple(self.image_shape)}", f"{width}x{height} in {name}")

    def check_shape(self, shape: tuple[int, ...], name: object) -> None:
        """Raises ValueError for images of another shape (C, H, W)."""
        if self.image_shape is not None and tuple(self.image_shape) != shape:
            raise mismatch(f"images of shape {tuple(self.image_shape)}", f"{shape} in {name}")

    def labels(self, labels: Any, name: object) -> Any:
        """What is left of labels `[N]`, an array, a tensor or None. Raises ValueError for missing or large ones."""
        if self.num_classes == 0 or (labels is None and self.labels_optional):
            return None
        largest = -1 if labels is None else int(labels.max())
        if self.num_classes is not None and not 0 <= largest < self.num_classes:
            got = "no labels" if labels is None else f"labels up to {largest}"
            raise mismatch(f"labels from 0 to {self.num_classes - 1}", f"{got} in {name}")
        return labels


class Mismatch(ValueError):
    """An error that already says what was expected of a dataset and what came."""


def mismatch(expected: object, got: object) -> Mismatch:
    """The error to raise for a dataset; one line, whatever characters its names hold."""
    return Mismatch(f"fastdmd.data: expected {expected}, got {got}".translate(CONTROL))


@contextlib.contextmanager
def decoding(kind: str, path: Path) -> Iterator[None]:
    """Makes one ValueError of whatever a decoder raises for broken bytes.

    Every exception: decoders raise what they happen to meet, from struct.error and LZMAError to RecursionError.
    """
    try:
        yield
    except Mismatch:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:MAX_REASON] or type(error).__name__
        raise mismatch(f"a readable {kind} file", f"{path}: {reason}") from error


def open_regular(path: Path) -> IO[bytes]:
    """Opens a file; a pipe, which would wait for a writer, a device or a dangling link is an error instead."""
    if not path.is_file():
        raise mismatch("a regular file", path)
    return open(path, "rb")
