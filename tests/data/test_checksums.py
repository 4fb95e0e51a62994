"""Bytes that are not those that were written: refused where an archive or a PNG tells, whatever a decoder makes."""

import gzip
import zipfile
import zlib

import numpy as np
import pytest

from fastdmd import data
from fastdmd.data import image_files, members
from tests.helpers.small_datasets import MIB, pixels, png, refuses, write_folder, write_idx, write_zip

IMAGES = pixels(1, 16)


def flipped(content: bytes, position: int) -> bytes:
    return content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]


def checksum_of_zlib_right(content: bytes) -> bytes:
    """A PNG of other pixels whose stream is whole, under the checksum of the one before."""
    start = content.index(b"IDAT") + 4
    length = int.from_bytes(content[start - 8 : start - 4], "big")
    rows = bytearray(zlib.decompress(content[start : start + length]))
    rows[5] ^= 255
    stream = zlib.compress(bytes(rows))
    return content[: start - 8] + len(stream).to_bytes(4, "big") + b"IDAT" + stream + content[start + length :]


@pytest.mark.parametrize("is_zip", [True, False])
def test_pixels_of_a_png(tmp_path, is_zip):
    files = {f"{index}.png": png(image) for index, image in enumerate(IMAGES)}
    path = tmp_path / ("a.zip" if is_zip else "a")
    write = write_zip if is_zip else write_folder
    assert np.array_equal(data.load(write(path, files)).images.numpy(), IMAGES)
    reason = f"{path}/3.png: its pixels do not have the checksum that they were written with"
    start = files["3.png"].index(b"IDAT") + 4
    for content in (
        checksum_of_zlib_right(files["3.png"]),  # which Pillow shows
        *(flipped(files["3.png"], position) for position in range(start, start + 40, 7)),
    ):
        refuses(write(path, files | {"3.png": content}), "a readable image file", reason)


def test_a_png_without_its_end_has_all_of_its_pixels(tmp_path):
    content = png(IMAGES[0])
    for kept in (content[:-12], content[:-8], content[:-1]):
        path = write_folder(tmp_path / "a", {"a.png": kept})
        assert np.array_equal(data.load(path).images.numpy(), IMAGES[:1])
    refuses(write_folder(tmp_path / "a", {"a.png": content[:-14]}), "a readable image file", f"{path}/a.png: ")


def test_members_of_an_archive(tmp_path):
    """A BMP has no checksum: the archive has. Pillow stops before the end, where zipfile compares."""
    from PIL import Image

    Image.fromarray(IMAGES[0, 0]).save(tmp_path / "a.bmp")
    path = write_zip(tmp_path / "a.zip", {"a.bmp": (tmp_path / "a.bmp").read_bytes()})
    assert np.array_equal(data.load(path).images.numpy(), IMAGES[:1])
    content = path.read_bytes()
    position = content.index(IMAGES[0, 0, 15].tobytes())
    path.write_bytes(flipped(content, position))
    refuses(path, "a readable image file", f"{path}/a.bmp: Bad CRC-32 for file 'a.bmp'")


def test_gzip(tmp_path):
    folder = write_idx(tmp_path / "a", IMAGES, np.arange(7) % 3, compressed=True)
    assert np.array_equal(data.load(folder).images.numpy(), IMAGES)
    path = folder / "train-images-idx3-ubyte.gz"
    good = gzip.decompress(path.read_bytes())
    content = path.read_bytes()
    path.write_bytes(content[:-8] + (zlib.crc32(good) ^ 1).to_bytes(4, "little") + content[-4:])
    refuses(folder, "a readable IDX file", f"{path}: CRC check failed")


def test_images_and_folders_are_bounded(tmp_path, monkeypatch):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", png(IMAGES[0]) + bytes(2 * MIB))
    assert data.load(path).image_shape == (1, 16, 16)
    monkeypatch.setattr(image_files, "MAX_FILE_BYTES", 2 * MIB)
    refuses(path, f"images of at most {2 * MIB} bytes", f"{2 * MIB + len(png(IMAGES[0]))} in {path}/a.png")
    folder = write_folder(tmp_path / "a", {f"{index}.png": png(IMAGES[0]) for index in range(3)})
    assert len(data.load(folder)) == 3
    monkeypatch.setattr(members, "MAX_FILES", 2)
    refuses(folder, "at most 2 files", f"more in {folder}")
