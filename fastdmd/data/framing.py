"""Images of any size made square: resized by their shorter side, and their centre cut out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from fastdmd.data.content import mismatch

MAX_SIZE = 2**14


@dataclasses.dataclass(frozen=True)
class Framing:
    """Shorter side to `resize` pixels, if given; of that the centre, `crop` pixels square (default: `resize`).

    Both None leaves images as they are, which must then be square.
    """

    resize: int | None = None
    crop: int | None = None

    def __post_init__(self) -> None:
        for name, size in (("resize", self.resize), ("crop", self.crop)):
            if size is not None and not 1 <= size <= MAX_SIZE:
                raise mismatch(f"--{name} from 1 to {MAX_SIZE}", size)
        if self.resize is not None and self.crop is not None and self.crop > self.resize:
            raise mismatch(f"--crop of at most --resize {self.resize}", self.crop)

    def __str__(self) -> str:
        size = self.crop or self.resize
        resized = f"shorter side resized to {self.resize} (Lanczos), " if self.resize else ""
        return f"{resized}centre {size}x{size} cut out" if size else ""

    def size_of(self, width: int, height: int, path: Path) -> tuple[int, int]:
        """The size that an image of this size comes out with. Raises ValueError if it is smaller than `crop`."""
        size = self.crop or self.resize
        if size is None:
            return width, height
        if self.resize is None and min(width, height) < size:
            raise mismatch(
                f"images of at least --crop {size} pixels a side, or --resize", f"{width}x{height} in {path}"
            )
        if min(width, height) < 1:
            raise mismatch("images with pixels", f"{width}x{height} in {path}")
        return size, size

    def apply(self, image: Image.Image) -> Image.Image:
        """An image of mode L or RGB, framed. Filtered over as many pixels as become one, so nothing aliases."""
        size = self.crop or self.resize
        if size is None:
            return image
        width, height = image.size
        side = size * min(width, height) / self.resize if self.resize else size  # of the part that is kept
        left, top = (width - side) / 2, (height - side) / 2
        if side == size:
            return image.crop((int(left), int(top), int(left) + size, int(top) + size))
        return image.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))

    def apply_chunks(self, chunks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """Arrays uint8 `[n, C, H, W]`, image by image; C is 1 or 3."""
        for chunk in chunks:
            for image in chunk.transpose(0, 2, 3, 1):  # [H, W, C]
                picture = Image.fromarray(np.ascontiguousarray(image[..., 0] if image.shape[2] == 1 else image))
                yield from_picture(self.apply(picture))


def from_picture(picture: Image.Image) -> np.ndarray:
    """A picture of mode L or RGB as uint8 `[1, C, H, W]`."""
    return np.asarray(picture).reshape(1, picture.height, picture.width, -1).transpose(0, 3, 1, 2)
