"""What a dataset may cost before it is refused: headers decide before pixels, and small files stay small."""

import json
import struct
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from fastdmd import data, pretrain
from fastdmd.data import image_files, labels
from fastdmd.data.settings import DataSettings
from tests.helpers.small_datasets import LABELS, pixels, png, refuses, write_folder, write_idx, write_npz, write_zip

GREY = pixels(1)[0]


def palette(width: int, height: int) -> bytes:
    """A PNG of one colour of a palette."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">2I5B", width, height, 8, 3, 0, 0, 0)
    rows = zlib.compress(bytes((width + 1) * height))
    chunks = [(b"IHDR", header), (b"PLTE", bytes([9, 8, 7])), (b"IDAT", rows), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in chunks)


@pytest.fixture
def no_pixels(monkeypatch):
    """Fails where pixels are decoded or copied."""
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    monkeypatch.setattr("fastdmd.data.dataset._fill", lambda *args: pytest.fail("filled"))


@pytest.mark.parametrize("name", ["0.png", "b.png"])
def test_sizes_are_compared_before_palettes(tmp_path, no_pixels, name):
    source = write_folder(tmp_path / "a", {"a.png": png(GREY), name: palette(40, 40)})
    sizes = ("6x6", "40x40") if name == "b.png" else ("40x40", "6x6")
    refuses(source, f"square images of one size ({sizes[0]})", f"{sizes[1]} in {source}/")


@pytest.mark.parametrize("options", [{}, {"resize": 6}, {"crop": 6}])
def test_pixels_of_an_image_are_bounded(tmp_path, no_pixels, monkeypatch, options):
    monkeypatch.setattr(image_files, "MAX_PIXELS", 1599)
    source = write_folder(tmp_path / "a", {"a.png": palette(40, 40), "b.png": palette(40, 40)})
    refuses(source, "images of at most 1599 pixels", f"40x40 in {source}/a.png", **options)


def test_one_image_in_colour_spares_the_palettes(tmp_path, monkeypatch):
    monkeypatch.setattr(image_files, "_has_grey_colours", lambda *args: pytest.fail("looked"))
    files = {"a.png": palette(6, 6), "b.png": png(pixels(3)[0])}
    images = data.load(write_folder(tmp_path / "a", files)).images
    np.testing.assert_array_equal(images[0], np.broadcast_to(np.array([9, 8, 7])[:, None, None], (3, 6, 6)))
    np.testing.assert_array_equal(images[1], pixels(3)[0])


def test_colours_that_a_palette_uses_are_those_of_all_its_pixels():
    indices = np.random.default_rng(0).integers(0, 256, (40, 40), np.uint8)
    greys = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, 1)
    for used in (True, False):
        image = Image.fromarray(np.where(indices == 77, 0 if not used else 77, indices).astype(np.uint8), "L")
        picture = Image.frombytes("P", image.size, image.tobytes())
        colours = greys.copy()
        colours[77] = (1, 2, 3)
        picture.putpalette(colours.tobytes())
        assert image_files._has_grey_colours(picture) is not used


def sources(tmp_path):
    files = {f"{k}/{i}.png": png(image) for i, (image, k) in enumerate(zip(pixels(1), LABELS, strict=True))}
    return {
        "folder": write_folder(tmp_path / "a", files),
        "zip": write_zip(tmp_path / "a.zip", files),
        "npz": write_npz(tmp_path / "a.npz", images=pixels(1), labels=LABELS),
        "idx": write_idx(tmp_path / "idx", pixels(1), LABELS),
    }


@pytest.mark.parametrize("kind", ["folder", "zip", "npz", "idx"])
def test_what_is_required_comes_before_pixels(tmp_path, monkeypatch, kind):
    source = sources(tmp_path)[kind]
    dataset = data.load(source, image_shape=(1, 6, 6), num_classes=3)
    assert sorted(dataset.labels.tolist()) == sorted(LABELS.tolist())
    assert data.load(source, num_classes=0).labels is None
    unlabelled = data.load(source, labels="none", num_classes=3, labels_optional=True)
    assert unlabelled.labels is None and unlabelled.image_shape == (1, 6, 6)
    monkeypatch.setattr("fastdmd.data.dataset._fill", lambda *args: pytest.fail("filled"))
    with pytest.raises(pytest.fail.Exception, match="filled"):
        data.load(source, image_shape=(1, 6, 6), num_classes=3)
    refuses(source, "images of shape (3, 6, 6)", "(1, 6, 6) in", image_shape=(3, 6, 6))
    refuses(source, "images of shape (1, 28, 28)", "", image_shape=(1, 28, 28))
    refuses(source, "labels from 0 to 1", "labels up to 2 in", num_classes=2, labels_optional=True)
    refuses(source, "labels from 0 to 2", "no labels in", num_classes=3, labels="none")


def test_another_size_is_told_before_palettes_are_read(tmp_path, no_pixels):
    source = write_folder(tmp_path / "a", {"a.png": palette(40, 40)})
    refuses(source, "images of shape (1, 28, 28)", f"40x40 in {source}", image_shape=(1, 28, 28))


def test_commands_ask_before_pixels(tmp_path, teacher_file, monkeypatch, capsys):
    monkeypatch.setattr("fastdmd.data.dataset._fill", lambda *args: pytest.fail("filled"))
    source = str(sources(tmp_path)["npz"])
    with pytest.raises(SystemExit) as exit_:
        pretrain.main(["--init", str(teacher_file), "--data", source, "--device", "cpu", "--dry-run"])
    assert exit_.value.code == 2 and "expected images of shape (1, 28, 28), got (1, 6, 6)" in capsys.readouterr().err
    network = type("Network", (), {"image_shape": (1, 28, 28), "num_classes": 10})
    with pytest.raises(ValueError, match=r"expected images of shape \(1, 28, 28\), got \(1, 6, 6\) in .*a.npz"):
        DataSettings(path=source).load_named(network)


def test_descriptions_are_bounded_by_the_number_of_images(tmp_path, monkeypatch):
    monkeypatch.setattr(labels, "TEXT_BYTES", (160, 20))
    monkeypatch.setattr(labels, "TEXT_VALUES", (10, 3))
    path = tmp_path / "a.zip"

    def write(text: str | bytes, num_images: int = 1):
        files = {"dataset.json": text} | {f"{i}.png": png(GREY) for i in range(num_images)}
        return write_zip(path, files)

    for junk in ("[]", "{}", '""', "1", "[[[1]]]", '{"a":[]}'):
        refuses(
            write(f'{{"labels":[{",".join([junk] * 14)}]}}'), "a readable JSON file", f"{path}/dataset.json: it has "
        )
    refuses(write(b" " * 181), "a readable JSON file", f"{path}/dataset.json: more than 180 bytes")
    text = json.dumps({"labels": [[f"{i}.png", i] for i in range(5)]}, separators=(",", ":"))  # 17 values
    assert data.load(write(text, num_images=5)).labels.tolist() == [0, 1, 2, 3, 4]
    refuses(write(text, num_images=1), "a readable JSON file", f"{path}/dataset.json: it has 17 values, for 1 images")
    table = tmp_path / "t.csv"
    for text in ("0,0\n" * 8, "0;\n" * 8, "\n" * 14):
        table.write_text(text)
        refuses(write(b""), "a readable CSV file", f"{table}: it has ", labels=str(table))


def test_a_small_zip_cannot_hold_millions_of_labels(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("dataset.json", b'{"labels":[' + b"[]," * 2_200_000 + b"[]]}")
        file.writestr("a.png", png(GREY))
    assert path.stat().st_size < 20_000
    refuses(path, "a readable JSON file", f"{path}/dataset.json: it has 4400004 values, for 1 images")
