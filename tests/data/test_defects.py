"""An error for every defect a dataset can have: what was expected, what came, and in which file."""

import gzip
import io
import json
import struct

import numpy as np
import pytest

from fastdmd import data
from tests.helpers.small_datasets import (
    LABELS,
    check,
    idx,
    pixels,
    png,
    refuses,
    write_folder,
    write_idx,
    write_npz,
    write_zip,
)


def test_sources_that_are_none(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"^fastdmd\.data: expected a dataset, got .*absent, which does not exist"
    ):
        data.load(tmp_path / "absent")
    refuses(tmp_path, "IDX files or images (.png", f"none in {tmp_path}")
    (tmp_path / "a.txt").write_text("text")
    refuses(tmp_path / "a.txt", "a folder, .npz or .zip", str(tmp_path / "a.txt"))
    refuses(None, "split 'train' or 'test'", "'validation'", split="validation")


@pytest.mark.parametrize("compressed", [True, False])
def test_broken_idx(tmp_path, compressed):
    suffix = ".gz" if compressed else ""
    images_file, labels_file = (tmp_path / f"train-{n}-ubyte{suffix}" for n in ("images-idx3", "labels-idx1"))

    def refuses_bytes(file, content, expected, got):
        whole = file.read_bytes()
        file.write_bytes(gzip.compress(content) if compressed else content)
        refuses(tmp_path, expected, f"{got} in {file}")
        file.write_bytes(whole)

    write_idx(tmp_path, pixels(1), LABELS, compressed=compressed)
    content = idx(pixels(1)[:, 0])
    refuses_bytes(images_file, content[:-1], "252 bytes for IDX shape (7, 6, 6)", "251")
    refuses_bytes(images_file, content + b"0", "252 bytes for IDX shape (7, 6, 6)", "253")
    refuses_bytes(labels_file, idx(LABELS)[:-1], "7 bytes for IDX shape (7,)", "6")
    refuses_bytes(labels_file, idx(LABELS) + b"0", "7 bytes for IDX shape (7,)", "8")
    refuses_bytes(images_file, content[:10], "an IDX header of 16 bytes", "10")
    refuses_bytes(images_file, b"", "IDX magic 0x00000803", "0x")
    refuses_bytes(images_file, idx(LABELS), "IDX magic 0x00000803", "0x00000801")
    refuses_bytes(labels_file, content, "IDX magic 0x00000801", "0x00000803")
    refuses_bytes(labels_file, idx(LABELS[:6]), "7 labels", "6")
    refuses_bytes(images_file, idx(np.zeros((0, 6, 6))), "at least one image", "none")
    refuses_bytes(images_file, idx(np.zeros((7, 0, 0))), "square grey or RGB images", "0x0 of 1 channels")
    refuses_bytes(images_file, idx(np.zeros((7, 4, 6))), "square grey or RGB images", "6x4 of 1 channels")
    huge = struct.pack(">4I", 0x0803, 2**32 - 1, 2**32 - 1, 2**32 - 1)
    most = f"at most {len(gzip.compress(huge)) * 1032}" if compressed else "0"
    refuses_bytes(images_file, huge, f"{(2**32 - 1) ** 3} bytes for IDX shape (4294967295, ", most)
    check(data.load(tmp_path), pixels(1), LABELS)
    images_file.unlink()
    refuses(tmp_path, "an IDX file of images", f"none in {tmp_path}")


DAMAGE = {
    "cut in the middle": lambda content: content[: len(content) // 2],
    "cut at the end": lambda content: content[:-3],
    "no gzip header": lambda content: b"no gzip" + content,
    "wrong checksum": lambda content: content[:40] + bytes(60) + content[100:],
    "no deflate stream": lambda content: content[:10] + b"\xff" * 50,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_broken_gzip(tmp_path, damage):
    write_idx(tmp_path, pixels(1), LABELS, compressed=True)
    file = tmp_path / "train-images-idx3-ubyte.gz"
    file.write_bytes(damage(file.read_bytes()))
    refuses(tmp_path, "a readable IDX file", f"{file}: ")


def npy(header_shape: tuple, dtype: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    header = {"descr": dtype, "fortran_order": False, "shape": header_shape}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue() + content


def test_broken_npz(tmp_path):
    path = tmp_path / "a.npz"

    def refuses_arrays(expected, got, **arrays):
        refuses(write_npz(path, **arrays), expected, got)

    images = pixels(3)
    refuses_arrays("an array 'images'", f"labels.npy, x.npy in {path}", x=images, labels=LABELS)
    refuses_arrays("'images' of dtype uint8", f"float64 in {path}", images=images / 255)
    refuses_arrays("'images' of dtype uint8", f"int64 in {path}", images=images.astype(np.int64))
    refuses_arrays("'images' of dtype uint8", f"object in {path}", images=np.array([images, None], object))
    refuses_arrays("'images' of shape [N, H, W, C]", f"(7, 108) in {path}", images=images.reshape(7, -1))
    refuses_arrays("'images' of shape [N, H, W, C]", f"(7, 6, 6, 4) in {path}", images=np.zeros((7, 6, 6, 4), np.uint8))
    refuses_arrays("square grey or RGB images", f"4x6 of 1 channels in {path}", images=images[:, 0, :, :4].copy())
    refuses_arrays("at least one image", f"none in {path}", images=images[:0])
    refuses_arrays("'images' in C order", f"Fortran order in {path}", images=np.asfortranarray(images))
    refuses_arrays("7 labels", f"6 in {path}", images=images, labels=LABELS[:6])
    refuses_arrays("labels >= 0", f"-1 in {path}", images=images, labels=LABELS - 1)
    for labels, got in (
        (np.eye(3, dtype=np.int64)[LABELS], "int64 of shape (7, 3)"),
        (LABELS.astype(np.float32), "float32 of shape (7,)"),
        (np.array([*LABELS[:6], None]), "object of shape (7,)"),
    ):
        refuses_arrays("integer 'labels' of shape [N]", f"{got} in {path}", images=images, labels=labels)

    def refuses_members(expected, got, **members):
        refuses(write_zip(path, {f"{name}.npy": content for name, content in members.items()}), expected, got)

    huge = npy((2**40, 6, 6, 3), "|u1", bytes(108))
    refuses_members(f"{2**40 * 108} bytes of 'images'", f"108 in {path}", images=huge)
    refuses_members("a readable .npz file", f"{path}: ", images=b"not an array")
    refuses_members("at least one image", f"none in {path}", images=npy((-1, 6, -6, 3), "|u1", bytes(108)))
    path.write_bytes(b"not a zip")
    refuses(path, "a readable .npz file", f"{path}: File is not a zip file")


def flip_byte(path, needle: bytes, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[content.index(needle) + offset] ^= 255
    path.write_bytes(bytes(content))


def test_damaged_members(tmp_path):
    npz = write_npz(tmp_path / "a.npz", images=pixels(3))
    flip_byte(npz, pixels(3)[3].tobytes(), 5)
    refuses(npz, "a readable .npz file", f"{npz}: Bad CRC-32")
    image = png(pixels(3)[0])
    archive = write_zip(tmp_path / "a.zip", {"a.png": image, "b.png": png(pixels(3)[1])})
    flip_byte(archive, image, len(image) // 2)
    refuses(archive, "a readable image file", f"{archive / 'a.png'}: ")
    archive.write_bytes(archive.read_bytes()[:-30])
    refuses(archive, "a readable .zip file", f"{archive}: File is not a zip file")


@pytest.mark.parametrize("packed", [True, False], ids=["zip", "folder"])
def test_broken_image_files(tmp_path, packed):
    good = png(pixels(3)[0])
    rows = iter(range(100))

    def refuses_files(files, expected, got):
        name = f"{next(rows)}"
        path = tmp_path / (f"{name}.zip" if packed else name)
        path = write_zip(path, files) if packed else write_folder(path, files)
        refuses(path, expected, got.format(path=path))

    refuses_files({"notes.txt": b""}, "IDX files or images (.png", "none in {path}")
    refuses_files({"a.png": good, "b.png": b"text"}, "a readable image file", "{path}/b.png: it is none of PNG, JPEG")
    refuses_files({"a.png": good, "b.png": good[:-40]}, "a readable image file", "{path}/b.png: ")
    square, wide = "square images of one size", pixels(3)[0][:, :4]
    refuses_files({"a.png": png(wide), "b.png": good}, f"{square} (6x6)", "6x4 in {path}/a.png")
    refuses_files({"a.png": good, "b.png": png(wide)}, f"{square} (6x6)", "6x4 in {path}/b.png")
    refuses_files({"a.png": good, "b.png": png(wide[:, :, :4])}, f"{square} (6x6)", "4x4 in {path}/b.png")
    refuses_files({"a.png": good, "x/b.png": good}, "images all in the folder", "a.png among 2 images in {path}")
    refuses_files(
        {"x/y/a.png": good, "z/b.png": good}, "images all in the folder", "x/y/a.png among 2 images in {path}"
    )
    refuses_files({"x/a.png": good, "y/z.txt": b""}, "images in every class subfolder", "none in {path}/y")


@pytest.mark.parametrize("packed", [True, False], ids=["zip", "folder"])
def test_broken_json(tmp_path, packed):
    names = ["00000/a.png", "00000/b.png"]
    rows = iter(range(100))

    def refuses_json(description, expected, got):
        text = description if isinstance(description, bytes) else json.dumps(description).encode()
        files = {"dataset.json": text} | {name: png(pixels(3)[0]) for name in names}
        path = tmp_path / f"{next(rows)}"
        path = write_zip(path.with_suffix(".zip"), files) if packed else write_folder(path, files)
        refuses(path, expected, f"{got}{path / 'dataset.json'}")

    a, b = ([name, 0] for name in names)
    refuses_json(b"{", "a readable JSON file", "")
    refuses_json(b"\xff\xfe", "a readable JSON file", "")
    for description in ([], {"labels": 3}, {"labels": [0, 1]}, {"labels": [["a", "b", "c"]]}):
        refuses_json(description, "'labels', null or a list of [name, class]", "something else in ")
    refuses_json({"labels": [a]}, "one label for each of 2 images", f"none for {names[1]} in ")
    refuses_json({"labels": []}, "one label for each of 2 images", f"none for {names[0]} in ")
    refuses_json({"labels": [a, b, [names[0], 1]]}, "one class for each image", f"0 and 1 for {names[0]} in ")
    refuses_json(b'{"labels":' + 10_000 * b"[", "a readable JSON file", "")
    refuses_json({"labels": [a, [names[1], -1]]}, "labels >= 0", "-1 in ")
    for label in (2**63, -(2**63) - 1, 2**64, 10**8):
        refuses_json({"labels": [a, [names[1], label]]}, "labels from 0 to 99999", f"{label} in ")
    for label in ([0, 1], 0.5, "2", True, None):
        refuses_json({"labels": [a, [names[1], label]]}, "an integer class", f"{label!r} for {names[1]} in ")
