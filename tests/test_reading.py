"""Bounds that hold before memory is taken: of archives, array headers, JSON, logs and what is no file."""

import io
import os
import tracemalloc
import zipfile

import numpy as np
import pytest

from fastdmd import reading

MIB = 2**20


@pytest.fixture
def peak():
    """Starts to count the bytes that Python takes; returns what says how many these were at most."""

    def start():
        tracemalloc.start()
        return lambda: tracemalloc.get_traced_memory()[1]

    yield start
    tracemalloc.stop()


def archive(path, compression=zipfile.ZIP_STORED, **members):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_what_is_no_file_is_not_opened(tmp_path, make):
    make(tmp_path / "a")
    for read in (reading.open_regular, reading.read_json, reading.last_line, reading.require_safetensors):
        with pytest.raises(ValueError, match=f"^expected a regular file, got {tmp_path}/a, a (pipe|folder|device)$"):
            read(tmp_path / "a")
    with pytest.raises(ValueError, match="^expected a regular file, got"), reading.open_zip(tmp_path / "a"):
        pass


def test_json(tmp_path, peak):
    path = tmp_path / "a.json"
    path.write_text('{"a": [1, null, "é"]}')
    assert reading.read_json(path) == {"a": [1, None, "é"]}
    with pytest.raises(ValueError, match="^more than 20 bytes$"):
        reading.read_json(path, 20)
    for text in (b"[" * 100_000, b'{"a":' * 100_000, b"\xff", b"", b"1" * 5000, b"{'a': 1}", b"[1,]"):
        path.write_bytes(text)
        with pytest.raises(ValueError) as error:
            reading.read_json(path)
        assert "\n" not in str(error.value) and len(str(error.value)) < 400
    with open(path, "wb") as file:
        file.truncate(2**33)
    taken = peak()
    with pytest.raises(ValueError, match="^more than 16777216 bytes$"):
        reading.read_json(path)
    assert taken() < 40 * MIB


def test_the_last_line_of_a_log(tmp_path, peak):
    path = tmp_path / "a.jsonl"
    for text, expected in (
        (b"", (0, b"")),
        (b"a", (1, b"a")),
        (b"a\n", (1, b"a")),
        (b"a\nbc\n", (2, b"bc")),
        (b"a\nb", (2, b"b")),
    ):
        path.write_bytes(text)
        assert reading.last_line(path) == expected
    path.write_bytes(b"".join(b"%d\n" % number for number in range(900_000)))
    assert reading.last_line(path) == (900_000, b"899999")
    path.write_bytes(b"first\n" + b"x" * 20 * MIB)
    taken = peak()
    num_lines, line = reading.last_line(path)
    assert (num_lines, len(line)) == (2, MIB) and taken() < 9 * MIB


def test_a_directory_of_too_many_members_is_not_read(tmp_path, monkeypatch):
    path = archive(tmp_path / "a.zip", **{f"{number}": b"" for number in range(200)})
    with reading.open_zip(path) as found:
        assert len(found.namelist()) == 200 and found.read("7") == b""
    monkeypatch.setattr(reading, "SPARE_BYTES", 0)
    with (
        pytest.raises(ValueError, match=r"^its directory has \d+ bytes; \d+ are read$"),
        reading.open_zip(path),
    ):
        pass


@pytest.mark.parametrize(
    ("compression", "refused"),
    [
        (zipfile.ZIP_STORED, None),
        (zipfile.ZIP_DEFLATED, None),
        (zipfile.ZIP_BZIP2, "bzip2"),
        (zipfile.ZIP_LZMA, "lzma"),
    ],
)
def test_members_that_no_piece_is_read_of(tmp_path, peak, compression, refused):
    """8 MiB of bzip2 or lzma would come at once, whatever is asked for."""
    path, taken = archive(tmp_path / "a.zip", compression, a=bytes(8 * MIB)), peak()
    with reading.open_zip(path) as found:
        if not refused:
            with reading.open_member(found, "a") as member:
                assert member.read(10) == bytes(10)
        else:
            with pytest.raises(ValueError, match=f"^a is compressed by {refused}; stored and deflated are read$"):
                reading.open_member(found, "a")
    assert taken() < MIB


def test_a_name_of_a_wrong_length_hides_no_member(tmp_path):
    path = archive(tmp_path / "a.zip", a=b"1", b=b"2")
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\1\2") + 28] += 47  # of the first name: it takes the second entry in
    path.write_bytes(content)
    assert zipfile.ZipFile(path).namelist() != ["a", "b"]
    with pytest.raises(ValueError, match="^its directory is damaged: 'aPK"), reading.open_zip(path):
        pass


def test_the_length_of_an_array_header_is_not_trusted(peak):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.zeros((2, 3), np.uint16))
    buffer.seek(0)
    assert reading.read_npy_header(buffer) == ((2, 3), False, np.dtype(np.uint16), 128)
    long = io.BytesIO(b"\x93NUMPY\x02\0" + (2**32 - 1).to_bytes(4, "little") + b"{" * 4 * MIB)
    taken = peak()
    with pytest.raises(ValueError):
        reading.read_npy_header(long)
    assert taken() < MIB


def test_headers_of_safetensors(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes((2).to_bytes(8, "little") + b"{}")
    reading.require_safetensors(path)
    for content, reason in (
        (b"", "it has 0 bytes"),
        (b"1234567", "it has 7 bytes"),
        ((3).to_bytes(8, "little") + b"{}", "its header would have 3 bytes, in a file of 10; 16777216 are read"),
        ((2**64 - 1).to_bytes(8, "little") + b"{}", f"its header would have {2**64 - 1} bytes, in a file of 10"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"^{reason}"):
            reading.require_safetensors(path)
    with open(path, "wb") as file:
        file.write((reading.MAX_JSON_BYTES + 1).to_bytes(8, "little"))
        file.truncate(2**30)
    with pytest.raises(ValueError, match="^its header would have 16777217 bytes, in a file of 1073741824"):
        reading.require_safetensors(path)
