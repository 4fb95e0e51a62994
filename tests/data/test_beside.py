"""What lies beside a dataset or around it: named if it may have been meant, and never mistaken for the dataset."""

import io
import json
import os
import re
import warnings
import zipfile

import numpy as np
import pytest
from PIL import Image

from fastdmd import data
from fastdmd.data.signatures import NUM_BYTES, is_picture
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

A, B = pixels(1)[:2]
BOX = b"\0\0\0\x0c%s  \r\n\x87\n\0\0\0\x14"
PICTURES = {  # the first bytes of formats that Pillow need not write
    "heif": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "avif": b"\0\0\0\x1cftypavif\0\0\0\0", "jp2": BOX % b"jP",
    "jxl": b"\0\0\0\x0cJXL \r\n\x87\n", "jxl stream": b"\xff\x0a\xfa\x1f", "jxr": b"II\xbc\x01\x20\0\0\0", "mng":
    b"\x8aMNG\r\n\x1a\n", "jng": b"\x8bJNG\r\n\x1a\n", "svg": b'<?xml version="1.0"?>\n<!-- a -->\n<svg width="6">',
    "ras": b"\x59\xa6\x6a\x95\0\0\0\x06", "bigtiff": b"II+\0\x08\0\0\0", "pam": b"P7\nWIDTH 6\nHEIGHT 6\n", "psd":
    b"8BPS\0\1", "exr": b"v/1\x01\2\0\0\0", "fits": b"SIMPLE  =                    T", "dicom": bytes(128) + b"DICM",
}  # fmt: skip
OTHERS = (
    b"", b"\0", b"BMW is a make of cars", b"P3 is a process", b"Python notes", b"RIFF\0\0\0\0WAVEfmt ", b"<html><svg>",
    b'{"labels": []}', b"name,class\na,1\n", b"%PDF-1.4\n", b"\0\0\0\x18ftypisom\0\0\2\0", b"PK\3\4", bytes(512),
    b"\0\0\1\xba video", b"\0\1\0\0\0\x0e font", b"\x93NUMPY\1\0v\0", b"\x89HDF\r\n\x1a\n", b"GIF of the day",
    b"II. Act", idx(pixels(1)[:, 0])[:NUM_BYTES], idx(LABELS), b"\x1f\x8b\x08\0\0\0\0\0", "BM".encode("utf-16"),
)  # fmt: skip


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(buffer, kind)
    return buffer.getvalue()


def quietly(source, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return data.load(source, **options)


@pytest.mark.parametrize("name", PICTURES)
def test_first_bytes_of_pictures(name):
    assert is_picture(PICTURES[name][:NUM_BYTES])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "ICO", "DDS", "SGI", "PCX"])
def test_first_bytes_that_pillow_writes(kind):
    assert is_picture(encoded(kind)[:NUM_BYTES])


@pytest.mark.parametrize("start", OTHERS, ids=lambda start: repr(start[:12]))
def test_first_bytes_of_other_files(start):
    assert not is_picture(start)


@pytest.mark.parametrize("packed", [True, False], ids=["zip", "folder"])
@pytest.mark.parametrize(
    ("name", "content"),
    [("b.mpo", encoded("JPEG")), ("b.jif", encoded("JPEG")), ("b", encoded("PNG")), ("x.d/b", encoded("PNG")),
     ("b.jpg-large", encoded("JPEG")), ("b.png.bak", encoded("PNG")), ("b.hif", PICTURES["heif"]),
     ("b.img", encoded("WEBP")), ("b.j2c", b"\xff\x4f\xff\x51\0\x29"), ("b.tga", b"")],
)  # fmt: skip
def test_pictures_by_any_name_are_named(tmp_path, packed, name, content):
    files = {"a.png": png(A), name: content, "notes.txt": b"P3 is a process", "c.json": b"{}"}
    source = write_zip(tmp_path / "a.zip", files) if packed else write_folder(tmp_path / "a", files)
    with pytest.warns(UserWarning, match=f"1 files in .* look like images and are not read, such as {name}$"):
        np.testing.assert_array_equal(data.load(source).images, [A])


def test_what_cannot_be_opened_beside_images_is_no_error(tmp_path):
    path = write_zip(tmp_path / "a.zip", {"a.png": png(A), "b.bin": encoded("PNG")})
    content = bytearray(path.read_bytes())
    content[content.rindex(b"PK\1\2") + 8] = content[content.rindex(b"PK\3\4") + 6] = 1  # encrypted
    path.write_bytes(bytes(content))
    check(quietly(path), A[None], None)


@pytest.mark.parametrize("name", ["label", "y", "Labels", "y_train"])
def test_arrays_that_may_be_labels_are_named(tmp_path, name):
    source = write_npz(tmp_path / "a.npz", images=pixels(1), **{name: LABELS})
    with pytest.warns(UserWarning, match=rf"no labels for the images of .*a.npz; beside them, unread: {name}\.npy$"):
        check(data.load(source), pixels(1), None)
    check(quietly(source, labels="none"), pixels(1), None)
    source = write_npz(tmp_path / "b.npz", images=pixels(1), labels=LABELS, **{name: LABELS[::-1]})
    check(quietly(source), pixels(1), LABELS)


def test_idx_files_that_may_be_labels_are_named(tmp_path):
    source = write_idx(tmp_path / "a", pixels(1))
    (source / "train-label-idx1-ubyte").write_bytes(idx(LABELS))
    with pytest.warns(UserWarning, match="beside them, unread: train-label-idx1-ubyte$"):
        check(data.load(source), pixels(1), None)


COMPANY = {
    "._train-images-idx3-ubyte": b"fork", "train-images-idx3-ubyte.md5": b"abc", "train-labels-idx1-ubyte.txt": b"",
    "train-images-idx3-ubyte.gz.part": b"", "labels_idx.txt": b"", "images_idx/notes.txt": b"", "README": b"idx images",
}  # fmt: skip


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("packed", [True, False], ids=["zip", "folder"])
@pytest.mark.parametrize("around", ["", "MNIST/raw/"])
def test_idx_files_in_company(tmp_path, packed, around, compressed):
    write_idx(tmp_path / "idx", pixels(1), LABELS, compressed=compressed)
    files = {path.name: path.read_bytes() for path in (tmp_path / "idx").iterdir()} | COMPANY
    files = {f"{around}{name}": content for name, content in files.items()} | {"MNIST/processed/a.pt": b""}
    source = write_zip(tmp_path / "a.zip", files) if packed else write_folder(tmp_path / "a", files)
    check(quietly(source), pixels(1), LABELS)


def test_idx_files_in_folders_of_their_names(tmp_path):
    write_idx(tmp_path / "idx", pixels(1), LABELS)
    files = {f"{path.name}/{path.name}": path.read_bytes() for path in (tmp_path / "idx").iterdir()}
    check(quietly(write_folder(tmp_path / "a", files)), pixels(1), LABELS)
    files["other/train-images-idx3-ubyte"] = idx(pixels(1)[:, 0])
    refuses(
        write_folder(tmp_path / "a", files), "one IDX file of images", "other/train-images-idx3-ubyte, train-images"
    )


def test_images_in_company_of_idx_names(tmp_path):
    files = {"images_idx/a.png": png(A), "labels/b.png": png(B), "labels_idx.txt": b"a b", "images-idx.md": b""}
    dataset = quietly(write_folder(tmp_path / "a", files))
    check(data.Dataset(dataset.images, None, ""), np.stack([A, B]), None)
    assert dataset.labels.tolist() == [0, 1]
    source = write_idx(tmp_path / "b", pixels(1), LABELS)
    (source / "preview.png").write_bytes(png(A))
    with pytest.warns(UserWarning, match="1 images beside the IDX files in .* are not read, such as preview.png"):
        check(data.load(source), pixels(1), LABELS)


def test_sizes_of_idx_files_in_a_zip_are_not_believed(tmp_path):
    header = b"\0\0\x08\x03" + (2**31).to_bytes(4, "big") + (1024).to_bytes(4, "big") * 2
    path = write_zip(tmp_path / "a.zip", {"train-images-idx3-ubyte": header + bytes(100)})
    refuses(path, f"{2**51} bytes for IDX shape ({2**31}, 1024, 1024)", f"100 in {path}")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("train-images-idx3-ubyte", idx(pixels(1)[:, 0])[:-1])
    refuses(path, "252 bytes for IDX shape (7, 6, 6)", f"251 in {path}")


@pytest.mark.parametrize("packed", [True, False], ids=["zip", "folder"])
def test_folders_around_everything_beside_others(tmp_path, packed):
    files = {"w/x/1.png": png(A), "w/y/2.png": png(B), "empty/notes.txt": b"", "@eaDir/x/t.png": png(B),
             "w/x/@eaDir/1.png/T.jpg": b"", "$RECYCLE.BIN/a.png": b"", "lost+found/b.png": b""}  # fmt: skip
    source = write_zip(tmp_path / "a.zip", files) if packed else write_folder(tmp_path / "a", files)
    dataset = quietly(source)
    np.testing.assert_array_equal(dataset.images, [A, B])
    assert dataset.labels.tolist() == [0, 1]
    one = {"x/1.png": png(A), "y/notes.txt": b""}  # may be a class of two
    source = write_zip(tmp_path / "b.zip", one) if packed else write_folder(tmp_path / "b", one)
    refuses(source, "images in every class", f"none in {source}/y")


@pytest.mark.parametrize("around", ["w", "a/w", "{parent}/a/w", "./w"])
def test_tables_that_name_outer_folders(tmp_path, around):
    around = around.format(parent=tmp_path)
    labels = [[f"{around}/x/1.png", 1], [f"{around}/x/2.png", 0]]
    images = {"w/x/1.png": png(A), "w/x/2.png": png(B)}
    source = write_folder(tmp_path / "a", {"w/dataset.json": json.dumps({"labels": labels}).encode()} | images)
    assert quietly(source).labels.tolist() == [1, 0]
    table = tmp_path / "t.csv"
    table.write_text("".join(f"{name},{label}\n" for name, label in labels))
    os.remove(source / "w" / "dataset.json")
    images["w/y/3.png"] = png(A)
    table.write_text(table.read_text() + f"{around}/y/3,2\n")
    assert quietly(write_folder(source, images), labels=str(table)).labels.tolist() == [1, 0, 2]


def test_names_inside_go_before_outer_ones(tmp_path):
    """A class that is called as the dataset is."""
    files = {"a/1.png": png(A), "b/1.png": png(B), "dataset.json": json.dumps(
        {"labels": [["a/1.png", 1], ["a/b/1.png", 0]]}).encode()}  # fmt: skip
    assert quietly(write_folder(tmp_path / "a", files)).labels.tolist() == [1, 0]


def test_a_description_without_labels(tmp_path):
    source = write_folder(tmp_path / "a", {"x/a.png": png(A), "y/b.png": png(B), "dataset.json": b'{"name": "x"}'})
    with pytest.warns(UserWarning, match=f"no 'labels' in {re.escape(str(source))}/dataset.json: .* unlabelled"):
        check(data.load(source), np.stack([A, B]), None)
