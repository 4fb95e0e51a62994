"""Image files of a folder or zip: which are read, as what, and the array that each becomes."""

from __future__ import annotations

import contextlib
import functools
import io
import warnings
import zlib
from collections.abc import Iterator
from typing import IO

import numpy as np
from PIL import Image, UnidentifiedImageError

from fastdmd.data import labels
from fastdmd.data.content import Content, Requirement, decoding, mismatch
from fastdmd.data.framing import Framing, from_picture
from fastdmd.data.members import SUFFIXES, Members
from fastdmd.reading import read_all

# By name: left to itself, Pillow goes by the content, and runs Ghostscript for an EPS file that is called .png.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")
MAX_FILE_BYTES = 2**28  # of one image, unpacked
MAX_PIXELS = 2**27  # of one image; transparent ones take 13 bytes each while they are laid on the background
PNG = b"\x89PNG\r\n\x1a\n"
BACKGROUND = "white"
ORIENTATION = 0x0112  # EXIF's tag; 1 is upright
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_images(members: Members, framing: Framing, label_choice: str | None, requirement: Requirement) -> Content:
    """Content of a folder or zip, once all headers are known to fit each other. Pixels follow when asked for."""
    if unread := members.unread:
        _warn(f"{len(unread)} files in {members.path} look like images and are not read", unread[0])
    members = members.unwrapped()
    images = members.images
    if not images:
        raise mismatch(f"IDX files or images ({', '.join(SUFFIXES)})", f"none in {members.path}")
    size, modes = _survey(members, images, framing)
    requirement.check_size(*size, members.path)
    is_grey = _all_grey(members, modes)
    shape = (len(images), 1 if is_grey else 3, size[1], size[0])

    def read_labels() -> np.ndarray | None:
        return labels.of_images(members, images, label_choice)

    pixels = _pixels(members, images, framing, size, "L" if is_grey else "RGB")
    return Content(shape, read_labels, pixels, members.path)


def _survey(members: Members, images: list[str], framing: Framing) -> tuple[tuple[int, int], dict[str, str]]:
    """Width and height of all images once framed, and the mode of each by its name; reads no pixels."""
    common: tuple[int, int] | None = None
    modes: dict[str, str] = {}
    small: list[str] = []
    for name in images:
        with _opened(members, name) as image:
            mode, (width, height) = image.mode, image.size
        path = members.path / name
        if mode[0] in "IF":
            raise mismatch("images of 8 bits a channel", f"mode {mode} in {path}")
        if width * height > MAX_PIXELS:
            raise mismatch(f"images of at most {MAX_PIXELS} pixels", f"{width}x{height} in {path}")
        modes[name] = mode
        size = framing.size_of(width, height, path)
        common = common or size
        if size != common or size[0] != size[1]:
            expected = f"square images of one size ({common[0]}x{common[0]}), or --resize N"
            raise mismatch(expected, f"{width}x{height} in {path}")
        if framing.resize is not None and min(width, height) < framing.resize:
            small.append(name)
    if small:
        _warn(f"{len(small)} images in {members.path} are smaller than --resize {framing.resize}: enlarged", small[0])
    assert common is not None  # there are images
    return common, modes


def _all_grey(members: Members, modes: dict[str, str]) -> bool:
    """Whether all images are grey: modes 1, L and LA, and a palette if all colours that the image uses are.

    The pixels of palettes are read, where nothing else decides.
    """
    if not set(modes.values()) <= {"1", "L", "LA", "P", "PA"}:
        return False
    for name in (name for name, mode in modes.items() if mode in ("P", "PA")):
        with _opened(members, name) as image:
            if not _has_grey_colours(_opaque(image)[0]):
                return False
    return True


def _pixels(
    members: Members, images: list[str], framing: Framing, size: tuple[int, int], mode: str
) -> Iterator[np.ndarray]:
    """Every image, uint8 `[1, C, H, W]`; warnings follow the last."""
    transparent, animated = [], []
    for name in images:
        with _opened(members, name, is_checked=True) as image:
            if getattr(image, "is_animated", False) and image.format != "MPO":  # which keeps previews beside a photo
                animated.append(name)
            picture, is_transparent = _opaque(image)
            if is_transparent:
                transparent.append(name)
            turn = _turn(image)
            picture = framing.apply((picture if turn is None else picture.transpose(turn)).convert(mode))
        if picture.size != size:  # the file is another one than when its header was read
            raise mismatch(
                f"an image of {size[0]}x{size[1]}", f"{picture.width}x{picture.height} in {members.path / name}"
            )
        yield from_picture(picture)
    if transparent:
        _warn(f"{len(transparent)} images in {members.path} have transparent pixels: on {BACKGROUND}", transparent[0])
    if animated:
        _warn(f"{len(animated)} files in {members.path} hold several images: the first is read", animated[0])


@contextlib.contextmanager
def _opened(members: Members, name: str, *, is_checked: bool = False) -> Iterator[Image.Image]:
    """Where it is checked, its bytes are read whole, and held against the checksums that an archive or a PNG has."""
    path = members.path / name
    with decoding("image", path), warnings.catch_warnings(), members.open(name) as stream:
        if (num_bytes := members.size(name)) > MAX_FILE_BYTES:  # all of which a header may ask for
            raise mismatch(f"images of at most {MAX_FILE_BYTES} bytes", f"{num_bytes} in {path}")
        warnings.simplefilter("ignore")  # of damaged metadata, and of pictures half as large as Pillow's limit
        file: IO[bytes] = stream
        if is_checked:
            data = read_all(stream, MAX_FILE_BYTES)
            _require_checksums(data)
            file = io.BytesIO(data)
        try:
            image = Image.open(file, formats=_formats())
        except UnidentifiedImageError as error:
            raise ValueError(f"it is none of {', '.join(_formats())}") from error
        with image:
            yield image


def _require_checksums(data: bytes) -> None:
    """Raises ValueError for pixels of a PNG that are not those that were written, of which Pillow makes some others."""
    if not data.startswith(PNG):
        return
    position = len(PNG)
    while (start := position + 8) <= len(data):
        kind, end = data[start - 4 : start], start + int.from_bytes(data[position : start - 4], "big")
        if kind == b"IDAT" and zlib.crc32(data[start - 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            raise ValueError("its pixels do not have the checksum that they were written with")
        position = end + 4


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _opaque(image: Image.Image) -> tuple[Image.Image, bool]:
    """The image as a viewer shows it, transparent pixels on the background, and whether there are any."""
    image.load()
    if image.mode not in ("LA", "PA", "RGBA") and "transparency" not in image.info:
        return image, False
    picture = image.convert("RGBA")
    if picture.getchannel("A").getextrema()[0] == 255:
        return picture, False
    return Image.alpha_composite(Image.new("RGBA", picture.size, BACKGROUND), picture), True


def _has_grey_colours(picture: Image.Image) -> bool:
    palette = picture.getpalette()
    if picture.mode == "P" and palette is not None:  # as many pixels as it has colours are enough
        used = [index for index, count in enumerate(picture.histogram()) if count]
        colours = Image.frombytes("P", (len(used), 1), bytes(used))
        colours.putpalette(palette)
        picture = colours
    red, green, blue = picture.convert("RGB").split()
    return red.tobytes() == green.tobytes() == blue.tobytes()


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What turns an image, its pixels loaded, upright by its EXIF; before, a TIFF's is still for Pillow to apply."""
    try:
        return UPRIGHT.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # damaged EXIF, of any kind: such a picture is shown as it is stored
        return None


def _warn(message: str, example: str) -> None:
    warnings.warn(f"fastdmd.data: {message}, such as {example}", stacklevel=2)
