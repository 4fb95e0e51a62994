"""Datasets: the same pixels and labels from every format, batches by (seed, step), an error per defect."""

import gzip
import io
import json
import re
import struct
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from fastdmd import data, data_formats

LABELS = np.array([1, 0, 2, 1, 0, 2, 2], np.int64)
LABEL_COUNTS = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]  # of the MNIST test split
EMBEDDED_CRC = 0xE4CA5F57
FIRST_DRAWN = [0, 1, 1, 2, 2, 0, 2, 2]  # labels for seed 3, step 5: a run resumed later draws the same
MIB = 2**20


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


# Formats


def test_embedded_digits():
    digits = data.load()
    assert len(digits) == 10_000 and digits.image_shape == (1, 28, 28) and digits.num_classes == 10
    assert torch.bincount(digits.labels).tolist() == LABEL_COUNTS
    assert zlib.crc32(digits.images.numpy().tobytes()) == EMBEDDED_CRC
    assert digits.labels[:8].tolist() == [7, 2, 1, 0, 4, 1, 4, 9]
    assert digits.name == "embedded MNIST digits"
    assert torch.equal(data.load(split="test").images, digits.images)
    assert sum(file.stat().st_size for file in data.EMBEDDED.iterdir()) < 2 * MIB


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


# Batches


@pytest.fixture
def dataset(tmp_path) -> data.Dataset:
    return data.load(write_npz(tmp_path / "dataset.npz", images=pixels(3), labels=LABELS))


def test_batch_values(dataset):
    images, labels = dataset.batch(torch.tensor([5, 0, 5]))
    assert images.dtype == torch.float32 and labels.dtype == torch.int64
    np.testing.assert_array_equal(images.numpy(), pixels(3)[[5, 0, 5]] / np.float32(127.5) - np.float32(1))
    assert labels.tolist() == [2, 1, 2]
    assert dataset.require(num_classes=0).batch(torch.tensor([1]))[1] is None
    with pytest.raises(ValueError, match=r"expected int64 indices of shape \(B,\), got torch.int32 of shape \(3,\)"):
        dataset.batch(torch.zeros(3, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"expected int64 indices of shape \(B,\), got torch.int64 of shape \(\)"):
        dataset.batch(torch.tensor(3))


def test_range_and_roundtrip():
    levels = torch.arange(256, dtype=torch.uint8)
    levels_dataset = data.Dataset(levels.reshape(1, 1, 16, 16), None, "levels")
    images, labels = levels_dataset.batch(torch.tensor([0]))
    assert labels is None and images.min() == -1 and images.max() == 1
    assert torch.equal(data.to_uint8(images), levels_dataset.images)
    assert data.to_uint8(torch.tensor([-7.0, -1.0, 0.0, 1.0, 7.0])).tolist() == [0, 0, 128, 255, 255]
    assert data.to_uint8(torch.tensor([-0.5, 0.5], dtype=torch.bfloat16)).tolist() == [64, 191]


def test_random_batch_is_a_function_of_seed_and_step(dataset):
    def draw(seed, step, source=dataset):
        return source.random_batch(64, seed=seed, step=step)

    for first, second in zip(draw(3, 5), draw(3, 5), strict=True):
        assert torch.equal(first, second)
    draws = [tuple(draw(seed, step)[1].tolist()) for seed in (0, 1, 2**16, 2**32 - 1) for step in (0, 1, 2**32 - 1)]
    assert len(set(draws)) == len(draws)
    images, labels = draw(3, 5)
    found = [(images == image).flatten(1).all(1) for image in dataset.batch(torch.arange(len(LABELS)))[0]]
    assert labels.tolist() == LABELS[torch.stack(found).int().argmax(0).numpy()].tolist()  # images keep their labels
    assert labels[:8].tolist() == FIRST_DRAWN


def test_random_batch_is_uniform():
    places = data.Dataset(torch.zeros(10, 1, 1, 1, dtype=torch.uint8), torch.arange(10), "places")
    labels = torch.cat([places.random_batch(100, seed=0, step=step)[1] for step in range(200)])
    counts = torch.bincount(labels, minlength=10).double()
    assert ((counts - 2000).square() / 2000).sum() < 27.9  # chi-squared, 9 degrees of freedom: p = 0.001


@pytest.mark.parametrize("chunk_bytes", [1, 300, 2**24])
def test_mapped_file_gives_identical_batches(tmp_path, monkeypatch, chunk_bytes):
    monkeypatch.setattr(data_formats, "CHUNK_BYTES", chunk_bytes)
    maps = []
    memmap = np.memmap
    monkeypatch.setattr(data.np, "memmap", lambda *args, **named: maps.append(1) or memmap(*args, **named))
    write_idx(tmp_path / "idx", pixels(1), LABELS, compressed=True)
    write_npz(tmp_path / "a.npz", images=pixels(3).transpose(0, 2, 3, 1), labels=LABELS)
    write_zip(tmp_path / "a.zip", edm_files(pixels(3), LABELS))
    for source in (tmp_path / "idx", tmp_path / "a.npz", tmp_path / "a.zip"):
        held, mapped = data.load(source), data.load(source, memory_limit_bytes=0)
        check(mapped, held.images.numpy(), LABELS)
        for a, b in zip(held.random_batch(9, seed=1, step=2), mapped.random_batch(9, seed=1, step=2), strict=True):
            assert torch.equal(a, b)
    assert len(maps) == 3


def test_memory_limit_is_exact(tmp_path, monkeypatch):
    source = write_npz(tmp_path / "a.npz", images=pixels(1))
    monkeypatch.setattr(data.np, "memmap", lambda *args, **named: pytest.fail("mapped"))
    check(data.load(source, memory_limit_bytes=pixels(1).nbytes), pixels(1), None)
    with pytest.raises(pytest.fail.Exception, match="mapped"):
        data.load(source, memory_limit_bytes=pixels(1).nbytes - 1)


def test_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(data.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 5}))
    with pytest.raises(OSError, match=r"fastdmd.data: expected 252 bytes free in .*, got 5"):
        data.load(write_npz(tmp_path / "a.npz", images=pixels(1)), memory_limit_bytes=0)


def test_available_memory_is_plausible():
    assert 2**24 < data._available_memory_bytes() < 2**50


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_batches_equal_those_of_the_host(tmp_path, dataset, monkeypatch):
    on_device = data.load(tmp_path / "dataset.npz", device="cuda")
    assert on_device.images.is_cuda and on_device.labels.is_cuda
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * pixels(3).nbytes - 1, 0))
    on_host = data.load(tmp_path / "dataset.npz", device="cuda")
    assert not on_host.images.is_cuda
    expected_images, expected_labels = dataset.random_batch(50, seed=1, step=2)
    for source, device in ((on_device, None), (on_host, "cuda"), (on_device, "cpu")):
        images, labels = source.random_batch(50, seed=1, step=2, device=device)
        assert images.is_cuda == labels.is_cuda == (device != "cpu")
        assert torch.equal(labels.cpu(), expected_labels)
        assert torch.equal(data.to_uint8(images).cpu(), data.to_uint8(expected_images))
        torch.testing.assert_close(images.cpu(), expected_images, rtol=0, atol=2**-22)  # 2 ulp at 1


def test_require(dataset):
    assert dataset.require(image_shape=(3, 6, 6), num_classes=3) is dataset
    assert dataset.require(num_classes=10) is dataset and dataset.require() is dataset
    unconditional = dataset.require(num_classes=0)
    assert unconditional.labels is None and unconditional.images is dataset.images
    name = re.escape(dataset.name)
    with pytest.raises(ValueError, match=rf"images of shape \(1, 6, 6\), got \(3, 6, 6\) in {name}$"):
        dataset.require(image_shape=(1, 6, 6))
    with pytest.raises(ValueError, match=rf"labels from 0 to 1, got labels up to 2 in {name}$"):
        dataset.require(num_classes=2)
    with pytest.raises(ValueError, match=rf"labels from 0 to 9, got no labels in {name}$"):
        unconditional.require(num_classes=10)


# Defects


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
    refuses_bytes(images_file, content[:-1], "268 bytes for IDX shape (7, 6, 6)", "267")
    refuses_bytes(images_file, content + b"0", "268 bytes for IDX shape (7, 6, 6)", "269")
    refuses_bytes(images_file, content[:10], "an IDX header of 16 bytes", "10")
    refuses_bytes(images_file, b"", "IDX magic 0x00000803", "0x")
    refuses_bytes(images_file, idx(LABELS), "IDX magic 0x00000803", "0x00000801")
    refuses_bytes(labels_file, content, "IDX magic 0x00000801", "0x00000803")
    refuses_bytes(labels_file, idx(LABELS[:6]), "7 labels", "6")
    refuses_bytes(images_file, idx(np.zeros((0, 6, 6))), "at least one image", "none")
    refuses_bytes(images_file, idx(np.zeros((7, 0, 0))), "square grey or RGB images", "0x0 of 1 channels")
    refuses_bytes(images_file, idx(np.zeros((7, 4, 6))), "square grey or RGB images", "6x4 of 1 channels")
    huge = struct.pack(">4I", 0x0803, 2**32 - 1, 2**32 - 1, 2**32 - 1)
    refuses_bytes(images_file, huge, f"{16 + (2**32 - 1) ** 3} bytes for IDX shape (4294967295, ", "16")
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
    refuses_files({"a.png": good, "b.png": b"text"}, "a readable image file", "{path}/b.png: cannot identify")
    refuses_files({"a.png": good, "b.png": good[:-40]}, "a readable image file", "{path}/b.png: ")
    square, wide = "square images of one size", pixels(3)[0][:, :4]
    refuses_files({"a.png": png(wide), "b.png": good}, f"{square} (6x6)", "6x4 in {path}/a.png")
    refuses_files({"a.png": good, "b.png": png(wide)}, f"{square} (6x6)", "6x4 in {path}/b.png")
    refuses_files({"a.png": good, "b.png": png(wide[:, :, :4])}, f"{square} (6x6)", "4x4 in {path}/b.png")
    refuses_files({"a.png": good, "x/b.png": good}, "images all in the folder", "a.png among 2 images in {path}")
    refuses_files({"x/y/a.png": good}, "images all in the folder", "x/y/a.png among 1 images in {path}")
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
    for description in ([], {}, {"labels": 3}, {"labels": [0, 1]}, {"labels": [["a", "b", "c"]]}):
        refuses_json(description, "'labels', null or a list of [name, class]", "something else in ")
    refuses_json({"labels": [a]}, "one label for each of 2 images", f"none for {names[1]} in ")
    refuses_json({"labels": []}, "one label for each of 2 images", f"none for {names[0]} in ")
    refuses_json({"labels": [a, b, ["c.png", 0]]}, "one label for each of 2 images", "3 labels in ")
    refuses_json({"labels": [a, [names[1], -1]]}, "labels >= 0", "-1 in ")
    for label in ([0, 1], 0.5, "2", True, None, 2**63):
        refuses_json({"labels": [a, [names[1], label]]}, "an integer class", f"{label!r} for {names[1]} in ")
