"""Image files become what a viewer shows: which are read, upright, in grey or colour, opaque, square."""

import io
import os
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from fastdmd import data
from fastdmd.data import image_files
from tests.helpers.small_datasets import pixels, png, refuses, write_folder, write_npz, write_zip

GREY, COLOUR = pixels(1)[0], pixels(3)[0]  # [C, 6, 6]
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 6\n%%EndComments\nshowpage\n"


def picture(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def load_one(tmp_path, content: bytes | dict[str, bytes], suffix: str = "png", **options) -> np.ndarray:
    """The images of a folder with one file, or with those named."""
    files = content if isinstance(content, dict) else {f"a.{suffix}": content}
    folder = write_folder(tmp_path / f"{len(list(tmp_path.iterdir()))}", files)
    return data.load(folder, **options).images.numpy()


@pytest.fixture
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("packed", [True, False], ids=["zip", "folder"])
@pytest.mark.parametrize("content", [EPS, b"\xc5\xd0\xd3\xc6" + EPS, b"\xd7\xcd\xc6\x9a" + bytes(60), b"8BPS\0\1"])
def test_no_format_but_those_by_name_is_opened(tmp_path, monkeypatch, packed, content):
    """EPS would start Ghostscript."""
    monkeypatch.setattr("subprocess.Popen", lambda *args, **named: pytest.fail("started a program"))
    for suffix in ("png", "jpg", "tif", "webp"):
        files = {f"a.{suffix}": content}
        path = tmp_path / f"{suffix}.zip"
        source = write_zip(path, files) if packed else write_folder(tmp_path / suffix, files)
        refuses(source, "a readable image file", f"{source}/a.{suffix}: it is none of PNG, JPEG, ")


@pytest.mark.parametrize(
    ("suffix", "kind"),
    [
        ("tif", "TIFF"),
        ("TIFF", "TIFF"),
        ("gif", "GIF"),
        ("pgm", "PPM"),
        ("pnm", "PPM"),
        ("apng", "PNG"),
        ("bmp", "BMP"),
        ("png", "BMP"),
        ("jpg", "PNG"),
    ],
)
def test_lossless_files_of_all_suffixes(tmp_path, suffix, kind, no_warnings):
    np.testing.assert_array_equal(load_one(tmp_path, encoded(picture(GREY), kind), suffix)[0], GREY)


def test_lossy_files_of_all_suffixes(tmp_path, no_warnings):
    flat = Image.new("RGB", (16, 16), (200, 100, 50))
    for suffix, kind in (("jfif", "JPEG"), ("jpe", "JPEG"), ("webp", "WEBP"), ("avif", "AVIF"), ("ppm", "PPM")):
        if kind in image_files._formats():
            values = load_one(tmp_path, encoded(flat, kind), suffix)[0].reshape(3, -1).T.astype(int)
            assert np.abs(values - (200, 100, 50)).max() <= 3, kind


def test_images_that_are_left_out_are_named(tmp_path):
    files = {"a.png": png(GREY), "b.heic": b"", "c.PSD": b"", "notes.txt": b"", ".d.heic": b""}
    with pytest.warns(UserWarning, match="2 files in .* look like images and are not read, such as b.heic"):
        np.testing.assert_array_equal(load_one(tmp_path, files), [GREY])
    with pytest.warns(UserWarning, match="such as x/b.svg"):
        load_one(tmp_path, {"x/a.png": png(GREY), "x/b.svg": b""})
    with (
        pytest.warns(UserWarning, match="such as b.jp2"),
        pytest.raises(ValueError, match=r"images \(.png, .*got none"),
    ):
        load_one(tmp_path, {"b.jp2": b"", "c.exr": b""})


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_stand_upright(tmp_path, kind, orientation, no_warnings):
    """Whatever a camera stores, EXIF's tag says which corner of it is the top left one."""
    upright = np.kron(np.array([[10, 80], [160, 240]], np.uint8), np.ones((16, 16), np.uint8))  # survives JPEG
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(Image.fromarray(np.ascontiguousarray(stored)).convert("RGB"), kind, exif=exif)
    loaded = load_one(tmp_path, content, {"JPEG": "jpg"}.get(kind, kind.lower()))
    assert np.abs(loaded[0].astype(int) - upright).max() <= 3


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12"]
)
def test_damaged_exif_leaves_the_image_as_it_is(tmp_path, exif, no_warnings):
    np.testing.assert_array_equal(load_one(tmp_path, encoded(picture(GREY), "PNG", exif=exif))[0], GREY)


def palette(colours: list[tuple[int, int, int]], indices: np.ndarray, **options) -> bytes:
    image = Image.fromarray(indices.astype(np.uint8), "P")
    image.putpalette([value for colour in colours for value in colour])
    return encoded(image, "PNG", **options)


@pytest.mark.filterwarnings("ignore:'mode' parameter:DeprecationWarning")
def test_grey_stays_grey(tmp_path, no_warnings):
    opaque = np.full_like(GREY[0], 255)
    with_alpha = encoded(Image.fromarray(np.dstack([GREY[0], opaque])), "PNG")
    indices = GREY[0] % 3
    greys = [(30, 30, 30), (7, 7, 7), (255, 255, 255), (255, 0, 0)]  # the last is used by no pixel
    files = {
        "a.png": with_alpha,
        "b.png": palette(greys, indices),
        "c.png": png(GREY),
        "d.gif": encoded(picture(GREY), "GIF"),
    }
    expected = np.stack([GREY[0], np.array([30, 7, 255])[indices], GREY[0], GREY[0]])[:, None]
    np.testing.assert_array_equal(load_one(tmp_path, files), expected)
    # One colour anywhere, and all are in colour.
    for name, content in {"z.png": png(COLOUR), "0.png": palette(greys, indices + 1)}.items():
        loaded = load_one(tmp_path, files | {name: content})
        assert loaded.shape == (5, 3, 6, 6)
        rest = loaded[:-1] if name == "z.png" else loaded[1:]
        np.testing.assert_array_equal(rest, np.repeat(expected, 3, axis=1))


def on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    alpha = alpha / 255
    return colour * alpha + 255 * (1 - alpha)


def test_transparent_pixels_are_laid_on_white(tmp_path):
    alpha = np.array([0, 255, 128, 10, 250, 77], np.uint8).repeat(6).reshape(6, 6)
    colour = encoded(Image.fromarray(np.dstack([*COLOUR, alpha])), "PNG")
    grey = encoded(Image.fromarray(np.dstack([GREY[0], alpha])), "PNG")
    message = "1 images in .* have transparent pixels: on white, such as a.png"
    with pytest.warns(UserWarning, match=message):
        loaded = load_one(tmp_path, {"a.png": colour, "b.png": png(COLOUR)})
    assert np.abs(loaded[0] - on_white(COLOUR, alpha)).max() <= 1 and (loaded[1] == COLOUR).all()
    assert (loaded[0][:, :2] == np.where(alpha[:2], COLOUR[:, :2], 255)).all()
    with pytest.warns(UserWarning, match=message):
        loaded = load_one(tmp_path, grey)
    assert loaded.shape == (1, 1, 6, 6) and np.abs(loaded[0] - on_white(GREY, alpha)).max() <= 1


@pytest.mark.filterwarnings("ignore:'mode' parameter:DeprecationWarning")
def test_transparent_colours_of_all_kinds(tmp_path):
    indices = GREY[0] % 3
    keyed = palette([(255, 0, 255), (7, 7, 7), (90, 90, 90)], indices, transparency=0)  # magenta, which is not shown
    level = int(GREY[0, 0, 0])
    black = Image.fromarray(np.zeros((6, 6), np.uint8)).convert("1")
    cases = {
        "palette": (keyed, "png", np.array([255, 7, 90])[indices][None]),
        "grey level": (encoded(picture(GREY), "PNG", transparency=level), "png", np.where(GREY == level, 255, GREY)),
        "bit": (encoded(black, "PNG", transparency=0), "png", np.full_like(GREY, 255)),
        "colour": (
            encoded(picture(COLOUR), "PNG", transparency=tuple(map(int, COLOUR[:, 0, 0]))),
            "png",
            np.where((COLOUR == COLOUR[:, :1, :1]).all(0), 255, COLOUR),
        ),
        "GIF": (encoded(picture(GREY), "GIF", transparency=level), "gif", np.where(GREY == level, 255, GREY)),
    }
    for name, (content, suffix, expected) in cases.items():
        with pytest.warns(UserWarning, match="transparent pixels"):
            np.testing.assert_array_equal(load_one(tmp_path, content, suffix)[0], expected, err_msg=name)


def test_of_several_images_in_a_file_the_first_is_read(tmp_path):
    first, second = picture(GREY), picture(255 - GREY)
    for kind in ("GIF", "TIFF", "PNG"):
        content = encoded(first, kind, save_all=True, append_images=[second])
        with pytest.warns(UserWarning, match="1 files in .* hold several images: the first is read, such as a."):
            np.testing.assert_array_equal(load_one(tmp_path, content, kind.lower())[0], GREY)
    photo, preview = Image.new("RGB", (16, 16), (200, 100, 50)), Image.new("RGB", (16, 16))
    content = encoded(photo, "MPO", save_all=True, append_images=[preview])  # as cameras write .jpg files
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.abs(load_one(tmp_path, content, "jpg")[0, :, 8, 8].astype(int) - (200, 100, 50)).max() <= 3


def test_all_headers_are_read_before_any_pixels(tmp_path, monkeypatch):
    monkeypatch.setattr(image_files, "_pixels", lambda *args: pytest.fail("pixels"))
    wide = png(COLOUR[:, :, :4])
    for files in ({"a.png": png(COLOUR), "b.png": wide}, {"a.png": png(COLOUR), "b.png": b""}):
        with pytest.raises(ValueError, match="b.png"):
            load_one(tmp_path, files)


def test_sizes_that_headers_declare_are_bounded(tmp_path):
    content = bytearray(png(COLOUR))
    content[16:24] = (2**30).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    with pytest.raises(ValueError, match=r"a readable image file, got .*a.png: Image size .* exceeds limit"):
        load_one(tmp_path, bytes(content))


def test_what_is_no_file_is_refused_at_once(tmp_path):
    for make in (os.mkfifo, lambda path: os.symlink(tmp_path / "nowhere", path), lambda path: os.symlink(path, path)):
        folder = write_folder(tmp_path / f"{len(list(tmp_path.iterdir()))}", {"a.png": png(GREY)})
        make(folder / "b.png")
        make(folder / "notes")  # nobody asks for it
        refuses(folder, "a regular file", f"{folder}/b.png")
        make(pipe := tmp_path / f"{folder.name}.npz")
        with pytest.raises((ValueError, FileNotFoundError), match="expected a (regular file|dataset), got .*npz"):
            data.load(pipe)
    folder = write_folder(tmp_path / "idx", {})
    folder.mkdir()
    os.mkfifo(folder / "train-images-idx3-ubyte")
    refuses(folder, "a regular file", f"{folder}/train-images-idx3-ubyte")


def test_links_that_lead_back(tmp_path):
    for name, target in {"parent": "..", "self": ".", "root": "/", "sibling": "../y"}.items():
        folder = write_folder(tmp_path / name, {"x/a.png": png(GREY), "y/a.png": png(GREY)})
        os.symlink(target, folder / "x" / "link")
        refuses(folder, "every folder once", str(folder))
    folder = write_folder(tmp_path / "fine", {"x/a.png": png(GREY)})
    os.symlink(write_folder(tmp_path / "elsewhere", {"b.png": png(GREY)}), folder / "y")
    assert data.load(folder).labels.tolist() == [0, 1]


def resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(picture(image).resize(size, Image.Resampling.LANCZOS))


def test_resize_is_of_the_shorter_side_then_the_centre(tmp_path):
    square, rows = np.random.default_rng(1).integers(0, 256, (2, 1, 24, 24), np.uint8)
    np.testing.assert_array_equal(load_one(tmp_path, png(square), resize=8)[0, 0], resized(square, (8, 8)))
    # A wide image, all of whose columns are alike: the centre is as high as the square one.
    wide, high = np.repeat(rows[:, :, :1], 40, 2), np.repeat(rows[:, :1], 40, 1)
    files = {"a.png": png(wide), "b.png": png(high), "c.png": png(np.repeat(rows[:, :, :1], 24, 2))}
    loaded = load_one(tmp_path, files, resize=8)
    assert loaded.shape == (3, 1, 8, 8) and (loaded[0] == loaded[2]).all()
    np.testing.assert_array_equal(loaded[1, 0], resized(np.repeat(rows[:, :1], 24, 1), (8, 8)))
    # The centre: a bright band in the middle of a dark strip fills it.
    band = np.zeros((1, 24, 72), np.uint8)
    band[:, :, 24:48] = 200
    np.testing.assert_array_equal(load_one(tmp_path, png(band), resize=8)[0, 0, :, 3:5], 200)
    assert load_one(tmp_path, png(band), resize=8)[0, 0, 4].min() > 150
    # What is finer than the new pixels becomes their mean, instead of a moiré.
    stripes = np.tile(np.array([0, 255], np.uint8), (1, 24, 12))
    assert np.abs(load_one(tmp_path, png(stripes), resize=6)[0].astype(int) - 127).max() <= 20


def test_crop_keeps_pixels(tmp_path):
    image = np.random.default_rng(1).integers(0, 256, (3, 9, 14), np.uint8)
    np.testing.assert_array_equal(load_one(tmp_path, png(image), crop=5)[0], image[:, 2:7, 4:9])
    np.testing.assert_array_equal(load_one(tmp_path, png(image), crop=9)[0], image[:, :, 2:11])
    square = image[:, :, :9]
    whole = resized(square, (6, 6)).transpose(2, 0, 1)
    difference = load_one(tmp_path, png(square), resize=6, crop=4)[0].astype(int) - whole[:, 1:5, 1:5]
    assert np.abs(difference).max() <= 25 and np.abs(difference).mean() < 4  # the filter sees no pixel beyond the cut
    np.testing.assert_array_equal(load_one(tmp_path, png(image[:, :, 2:11]), resize=9), image[None, :, :, 2:11])


def test_arrays_are_framed_as_well(tmp_path):
    images = np.random.default_rng(1).integers(0, 256, (4, 3, 9, 14), np.uint8)
    source = write_npz(tmp_path / "a.npz", images=images.transpose(0, 2, 3, 1), labels=np.array([1, 0, 1, 0]))
    np.testing.assert_array_equal(data.load(source, crop=5).images, images[:, :, 2:7, 4:9])
    dataset = data.load(source, resize=4)
    assert dataset.name == f"{source} (shorter side resized to 4 (Lanczos), centre 4x4 cut out)"
    assert dataset.labels.tolist() == [1, 0, 1, 0]
    expected = load_one(tmp_path, {f"{i}.png": png(image) for i, image in enumerate(images)}, resize=4)
    np.testing.assert_array_equal(dataset.images, expected)
    refuses(source, "square grey or RGB images, or --resize N", f"14x9 of 3 channels in {source}")


def test_framing_that_cannot_be(tmp_path):
    source = write_folder(tmp_path / "a", {"a.png": png(COLOUR), "b.png": png(COLOUR[:, :5])})
    refuses(source, "square images of one size (6x6), or --resize N", f"6x5 in {source}/b.png")
    refuses(source, "images of at least --crop 6 pixels a side, or --resize", f"6x5 in {source}/b.png", crop=6)
    refuses(source, "--crop of at most --resize 4", "5", resize=4, crop=5)
    refuses(source, "--resize from 1 to 16384", "0", resize=0)
    refuses(source, "--crop from 1 to 16384", str(10**12), crop=10**12)
    with pytest.warns(UserWarning, match="1 images in .* are smaller than --resize 6: enlarged, such as b.png"):
        assert data.load(source, resize=6).image_shape == (3, 6, 6)
