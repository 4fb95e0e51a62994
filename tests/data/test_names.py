"""Names in archives and folders, whatever system wrote them; and what decoders raise for broken bytes."""

import json
import os
import zipfile

import numpy as np
import pytest

from fastdmd import data
from fastdmd.data.content import decoding
from tests.helpers.small_datasets import pixels, png, refuses, write_folder, write_npz, write_zip

A, B = pixels(1)[:2]


def archive(path, *members: tuple[str, bytes], compression: int = zipfile.ZIP_STORED):
    """A zip whose members are called exactly so."""
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in members:
            info = zipfile.ZipInfo("x")
            info.filename, info.compress_type = name, compression
            file.writestr(info, content)
    return path


def description(*labels: tuple[str, int]) -> bytes:
    return json.dumps({"labels": labels}).encode()


def loads(source, labels) -> None:
    """A is the first image, B the second."""
    dataset = data.load(source)
    np.testing.assert_array_equal(dataset.images, [A, B])
    assert (None if dataset.labels is None else dataset.labels.tolist()) == labels


@pytest.mark.parametrize(
    ("first", "second", "labels"),
    [
        ("x\\a.png", "y\\a.png", [0, 1]),
        ("./x/a.png", "./y/a.png", [0, 1]),
        ("a\\x/1.png", "a/y\\1.png", [0, 1]),
        ("/x//a.png", "/y/./a.png", [0, 1]),
        ("C:\\Users\\me\\x\\a.png", "C:\\Users\\me\\y\\a.png", [0, 1]),
        ("a/b/x/1.png", "a/b/y/2.png", [0, 1]),
        ("a/b/1.png", "a/b/2.png", None),
        ("imgs/1.PNG", "imgs/2.Png", None),
        ("e\u0301/1.png", "\u00ea/2.png", [0, 1]),
    ],
)
def test_names_of_images(tmp_path, first, second, labels):
    loads(archive(tmp_path / "a.zip", (first, png(A)), (second, png(B))), labels)
    if ":" not in first and not first.startswith("/"):
        loads(write_folder(tmp_path / "a", {first: png(A), second: png(B)}), labels)


@pytest.mark.parametrize(
    ("wrapper", "in_description", "in_archive"),
    [
        ("", "00000/{}.png", "00000\\{}.png"),
        ("", "00000\\{}.png", "00000/{}.png"),
        ("", "./{}.png", "{}.png"),
        ("my/", "00000/{}.png", "00000/{}.png"),
        ("my\\set\\", "{}.png", "{}.png"),
        ("", "\u00e9{}.png", "e\u0301{}.png"),
        ("", "e\u0301{}.png", "\u00e9{}.png"),
        ("", "IMG{}.PNG", "img{}.png"),
        ("./", "img{}.png", "IMG{}.png"),
    ],
)
def test_names_in_a_description(tmp_path, wrapper, in_description, in_archive):
    labels = description((in_description.format(1), 0), (in_description.format(0), 1))
    members = {"dataset.json": labels, in_archive.format(0): png(A), in_archive.format(1): png(B)}
    loads(archive(tmp_path / "a.zip", *((wrapper + name, content) for name, content in members.items())), [1, 0])


def test_what_lies_beside_does_not_count(tmp_path):
    images = (("set/x/1.png", png(A)), ("set/y/2.png", png(B)))
    rest = (
        ("README.txt", b""),
        ("__MACOSX/set/x/._1.png", b""),
        ("__macosx/a.png", b""),
        ("set/", b""),
        ("set/.DS_Store", b""),
        (".git/a.png", b""),
        ("set/x/Thumbs.db", b""),
    )
    loads(archive(tmp_path / "a.zip", *images, *rest), [0, 1])
    deep = "a/" * 3000
    loads(archive(tmp_path / "b.zip", (f"{deep}1.png", png(A)), (f"{deep}2.png", png(B))), None)


def test_wrappers_end_where_something_lies_beside_them(tmp_path):
    path = tmp_path / "a.zip"
    refuses(archive(path, ("x/1.png", png(A)), ("y/notes.txt", b"")), "images in every class", f"none in {path}/y")
    archive(path, ("w/x/1.png", png(A)), ("w/y/notes.txt", b""))
    refuses(path, "images in every class", f"none in {path}/w/y")
    archive(path, ("x/1.png", png(A)), ("2.png", png(B)))
    refuses(path, "images all in the folder itself", f"2.png among 2 images in {path}")
    archive(
        path, ("dataset.json", description(("w/1.png", 1), ("w/2.png", 0))), ("w/1.png", png(A)), ("w/2.png", png(B))
    )
    loads(path, [1, 0])


def test_descriptions_that_know_more_images(tmp_path):
    labels = description(("a.png", 1), ("b.png", 0), ("gone.png", 0), ("lost.png", 1))
    files = {"dataset.json": labels, "a.png": png(A), "b.png": png(B)}
    for source in (write_zip(tmp_path / "a.zip", files), write_folder(tmp_path / "a", files)):
        with pytest.warns(UserWarning, match="2 names in .*dataset.json are of no image, such as gone.png"):
            loads(source, [1, 0])


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_names_that_cannot_be(tmp_path):
    path = tmp_path / "a.zip"
    for first, second in (
        ("x/1.png", "x/1.png"),
        ("x/1.png", "x\\1.png"),
        ("\u00e9.png", "e\u0301.png"),
        ("a.png", "./a.png"),
    ):
        refuses(archive(path, (first, png(A)), (second, png(B))), "every name once", "")
    for name in ("../1.png", "x/../../1.png", "x\\..\\1.png"):
        refuses(archive(path, (name, png(A))), "names that stay inside", f"{name} in {path}")
    refuses(archive(path, ("x\n\x1b[2J.png", b"")), "a readable image file", f"{path}/x??[2J.png: ")
    npz = write_npz(tmp_path / "a.npz", images=pixels(1))
    with zipfile.ZipFile(npz, "a") as file:
        file.writestr("images.npy", b"")
    refuses(npz, "one array 'images'", f"several in {npz}")


def test_members_that_cannot_be_decoded(tmp_path):
    path = tmp_path / "a.zip"

    def refuses_patch(local: int, central: int, value: int, reason: str):
        """One byte of both headers of a member changed."""
        content = bytearray(archive(path, ("a.png", png(A))).read_bytes())
        content[local] = content[content.index(b"PK\1\2") + central] = value
        path.write_bytes(bytes(content))
        refuses(path, "a readable image file", f"{path}/a.png: {reason}")

    refuses_patch(6, 8, 1, "File 'a.png' is encrypted")
    refuses_patch(8, 10, 93, "a.png is compressed by 93; stored and deflated are read")
    for compression in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        noise = png(np.random.default_rng(0).integers(0, 256, (1, 64, 64), np.uint8))
        content = bytearray(archive(path, ("a.png", noise), compression=compression).read_bytes())
        content[60:200] = bytes(range(140))
        path.write_bytes(bytes(content))
        refuses(path, "a readable image file", f"{path}/a.png: ")


@pytest.mark.parametrize(
    "header",
    [
        b"{'descr': '|u1', 'fortran_order': False, 'shape': (1,",
        b"(" * 300,
        b"'''",
        b"x" * 11_000,
        b"\xff",
        b"",
        b"{'descr': '|u1'}",
        b"{'descr': 'teapot', 'fortran_order': False, 'shape': (1, 2, 2, 1)}",
        b"[" * 9000,
    ],
    ids=lambda header: repr(header[:12]),
)
@pytest.mark.parametrize("version", [1, 2])
def test_array_headers_that_are_none(tmp_path, header, version):
    length = len(header).to_bytes(2 if version == 1 else 4, "little")
    path = write_zip(
        tmp_path / "a.npz", {"images.npy": b"\x93NUMPY" + bytes([version, 0]) + length + header + bytes(4)}
    )
    refuses(path, "a readable .npz file", f"{path}: ")
    huge = b"\x93NUMPY\2\0\xff\xff\xff\xff" + bytes(100)  # not even read
    refuses(write_zip(path, {"images.npy": huge}), "a readable .npz file", f"{path}: ")


def test_every_exception_of_a_decoder_is_one_line(tmp_path):
    for error in (KeyError("a"), MemoryError(), RecursionError("deep\n" * 500), ArithmeticError(""), AssertionError()):
        with pytest.raises(
            ValueError, match=rf"^fastdmd\.data: expected a readable X file, got {tmp_path}: .{{1,300}}$"
        ):
            with decoding("X", tmp_path):
                raise error
    for error in (KeyboardInterrupt, SystemExit):
        with pytest.raises(error), decoding("X", tmp_path):
            raise error


def test_folders_that_cannot_be_looked_into(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "a", {"x/a.png": png(A), "y/b.png": png(B)})
    scandir = os.scandir

    def forbidden(path):
        if os.path.basename(os.path.normpath(path)) == "y":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbidden)
    refuses(folder, "folders that can be read", f"{folder}/y: Permission denied")
