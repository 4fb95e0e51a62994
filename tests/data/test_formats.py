"""Every format gives the same pixels and labels."""

import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from fastdmd import data
from fastdmd.data import dataset
from tests.helpers.small_datasets import (
    LABELS,
    MIB,
    check,
    class_files,
    edm_files,
    pixels,
    png,
    refuses,
    write_folder,
    write_idx,
    write_npz,
    write_zip,
)

LABEL_COUNTS = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]  # of the MNIST test split
EMBEDDED_CRC = 0xE4CA5F57


def test_embedded_digits():
    digits = data.load()
    assert len(digits) == 10_000 and digits.image_shape == (1, 28, 28) and digits.num_classes == 10
    assert torch.bincount(digits.labels).tolist() == LABEL_COUNTS
    assert zlib.crc32(digits.images.numpy().tobytes()) == EMBEDDED_CRC
    assert digits.labels[:8].tolist() == [7, 2, 1, 0, 4, 1, 4, 9]
    assert digits.name == "embedded MNIST digits"
    assert torch.equal(data.load(split="test").images, digits.images)
    assert sum(file.stat().st_size for file in dataset.EMBEDDED.iterdir()) < 2 * MIB


@pytest.mark.parametrize("labels", [LABELS, None], ids=["labelled", "unlabelled"])
@pytest.mark.parametrize("separator", ["-", "."])
@pytest.mark.parametrize("compressed", [True, False])
def test_idx(tmp_path, compressed, separator, labels):
    write_idx(tmp_path, pixels(1), labels, compressed=compressed, separator=separator)
    check(data.load(tmp_path), pixels(1), labels)


def test_idx_split(tmp_path):
    train, test = pixels(1, seed=1), pixels(1, seed=2)[:5]
    write_idx(tmp_path, train, LABELS)
    check(data.load(tmp_path, split="test"), train, LABELS)  # the only one there
    write_idx(tmp_path, test, LABELS[:5], prefix="t10k-", compressed=True)
    check(data.load(tmp_path), train, LABELS)
    check(data.load(str(tmp_path), split="test"), test, LABELS[:5])
    write_idx(tmp_path, test[::-1], LABELS[:5], prefix="t10k-")  # goes before its .gz
    check(data.load(tmp_path, split="test"), test[::-1], LABELS[:5])
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    with pytest.warns(UserWarning, match="beside them, unread: t10k-labels-idx1-ubyte, t10k-labels-idx1-ubyte.gz$"):
        check(data.load(tmp_path), train, None)  # the labels of the other split are not taken


def test_idx_of_other_names(tmp_path):
    check(data.load(write_idx(tmp_path / "a", pixels(1), LABELS, prefix="")), pixels(1), LABELS)
    write_idx(tmp_path / "b", pixels(1), LABELS, prefix="emnist-digits-test-")
    check(data.load(tmp_path / "b"), pixels(1), LABELS)
    write_idx(tmp_path / "b", pixels(1), prefix="emnist-letters-test-")
    refuses(tmp_path / "b", "one IDX file of images", "emnist-digits-test-images-idx3-ubyte, emnist-letters")


@pytest.mark.parametrize("labels", [LABELS, None], ids=["labelled", "unlabelled"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("layout", ["NHWC", "NCHW", "NHW"])
def test_npz(tmp_path, layout, channels, labels):
    images = pixels(channels)
    stored = {"NHWC": images.transpose(0, 2, 3, 1), "NCHW": images, "NHW": images[:, 0]}[layout]
    arrays = {"images": stored} if labels is None else {"images": stored, "labels": labels.astype(">i2")}
    np.savez_compressed(tmp_path / "digits.npz", **arrays)
    check(data.load(tmp_path / "digits.npz"), images[:, : 1 if layout == "NHW" else channels], labels)


def test_npz_of_3x3_is_channels_last(tmp_path):
    images = pixels(3, size=3)
    check(data.load(write_npz(tmp_path / "a.npz", images=images)), images.transpose(0, 3, 1, 2), None)


@pytest.mark.parametrize("labels", [LABELS, None], ids=["labelled", "unlabelled"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("packed", [True, False], ids=["zip", "folder"])
def test_edm_dataset(tmp_path, packed, channels, labels):
    files = edm_files(pixels(channels), labels)
    source = write_zip(tmp_path / "a.zip", files) if packed else write_folder(tmp_path, files)
    check(data.load(source), pixels(channels), labels)
    assert data.load(source).name == str(source)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("packed", [True, False], ids=["zip", "folder"])
def test_class_subfolders(tmp_path, packed, channels):
    images, order = pixels(channels), np.argsort(LABELS, kind="stable")
    files = class_files(images, LABELS) | {
        ".hidden/a.png": b"",
        "__MACOSX/ant/._0.png": b"",
        "notes.txt": b"",
    }
    source = write_zip(tmp_path / "a.zip", files) if packed else write_folder(tmp_path, files)
    check(data.load(source), images[order], LABELS[order])


@pytest.mark.parametrize("packed", [True, False], ids=["zip", "folder"])
def test_flat_images_are_unlabelled(tmp_path, packed):
    files = {f"{index}.PNG": png(image) for index, image in enumerate(pixels(3))}
    (tmp_path / "empty").mkdir()
    source = write_zip(tmp_path / "a.zip", files) if packed else write_folder(tmp_path, files)
    check(data.load(source), pixels(3), None)


@pytest.mark.parametrize("suffix", ["bmp", "webp", "jpg", "jpeg"])
def test_other_image_files(tmp_path, suffix):
    quality = {"lossless": True} if suffix == "webp" else {}
    Image.fromarray(np.full((4, 4, 3), 200, np.uint8)).save(tmp_path / f"a.{suffix}", **quality)
    check(data.load(tmp_path), np.full((1, 3, 4, 4), 200), None)


def test_image_modes(tmp_path):
    grey, colour = pixels(1)[0], np.where(pixels(3)[1] < 128, 0, 255).astype(np.uint8)
    black_and_white = np.where(grey < 128, 0, 255).astype(np.uint8)
    write_folder(tmp_path, {"a.png": png(grey), "b.png": png(black_and_white, "1")})
    check(data.load(tmp_path), np.stack([grey, black_and_white]), None)
    write_folder(tmp_path, {"c.png": png(colour), "d.png": png(colour, "P"), "e.png": png(colour, "RGBA")})
    as_rgb = [np.repeat(image, 3, 0) for image in (grey, black_and_white)]
    check(data.load(tmp_path), np.stack([*as_rgb, colour, colour, colour]), None)
    Image.fromarray(np.zeros((6, 6), np.uint16)).save(tmp_path / "f.png")
    refuses(tmp_path, "images of 8 bits a channel", f"mode I;16 in {tmp_path / 'f.png'}")


def test_arrays_that_are_enlarged_are_warned_of(tmp_path):
    images = np.full((3, 4, 6, 1), 255, np.uint8)
    np.savez(tmp_path / "small.npz", images=images)
    with pytest.warns(UserWarning, match=r"the images of \S+small.npz are smaller than --resize 8: enlarged$"):
        enlarged = data.load(tmp_path / "small.npz", resize=8)
    assert enlarged.images.shape == (3, 1, 8, 8) and enlarged.images.eq(255).all()
