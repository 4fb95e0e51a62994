"""What is read of anybody's files: regular ones alone, and no more of them at once than a bound that stands before.

Errors are ValueErrors that say why, in a few words; whoever reads says which file it is, and what was expected.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np

MAX_JSON_BYTES = 1 << 24  # of an index, a configuration or a header; the largest in use has some 10 MB
MAX_NPY_HEADER_BYTES = 1 << 14  # numpy refuses those of more than 10,000 characters
MAX_LINE_BYTES = 1 << 20  # of a log
MAX_DEFLATE = 1032  # bytes that one byte of a deflate stream can become
DIRECTORY_BYTES = 16  # that a byte of an archive's directory becomes in memory; 46 and a name describe a member
SPARE_BYTES = 1 << 30  # that a directory may take in memory beyond the size of its archive
ENTRY = "PK\1\2"  # begins one of the directory, each of which describes a member
# Others unpack a whole read at once, whatever it becomes: 40 bytes of bzip2 are a megabyte.
COMPRESSIONS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}


def open_regular(path: Path) -> BinaryIO:
    """Opens a file. Raises ValueError for a folder, a pipe, which would wait for its other end, and a device, which may
    never end; OSError for what is not there or cannot be opened."""
    require_regular(path)
    return open(path, "rb")


def require_regular(path: Path) -> None:
    """Raises as `open_regular` does."""
    kind = stat.S_IFMT(os.stat(path).st_mode)
    if kind != stat.S_IFREG:
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        raise ValueError(f"expected a regular file, got {path}, {kinds.get(kind, 'a device')}")


def read_all(stream: IO[bytes], limit_bytes: int) -> bytes:
    """The rest of a stream, whatever size it declares. Raises ValueError if it is longer than `limit_bytes`."""
    data = stream.read(limit_bytes + 1)
    if len(data) > limit_bytes:
        raise ValueError(f"more than {limit_bytes} bytes")
    return data


def read_json(path: Path, limit_bytes: int = MAX_JSON_BYTES) -> Any:
    """What a JSON file holds, in memory 25 times its size at most. Raises ValueError for any other, for a longer one
    before it is read."""
    with open_regular(path) as file:
        return parse_json(read_all(file, limit_bytes))


def parse_json(text: bytes | str) -> Any:
    """Raises ValueError, one line long, for text that is no JSON, or nested too deep for Python."""
    try:
        return json.loads(text if isinstance(text, str) else text.decode("utf-8"))
    except RecursionError:
        raise ValueError("RecursionError: nested too deep") from None
    except ValueError as error:
        raise ValueError(f"{type(error).__name__}: {error}"[:300]) from None


def last_line(path: Path) -> tuple[int, bytes]:
    """How many lines a file has, and its last one, or the last MiB of that; the file may be of any size."""
    num_lines, last = 0, b""
    with open_regular(path) as file:
        while chunk := file.read(MAX_LINE_BYTES):
            num_lines += chunk.count(b"\n")
            last = (last + chunk)[-2 * MAX_LINE_BYTES :]
    lines = last.splitlines() or [b""]
    return num_lines + (not last.endswith(b"\n") and last != b""), lines[-1][-MAX_LINE_BYTES:]


def require_safetensors(path: Path) -> None:
    """Raises ValueError unless a file begins as safetensors does, with a header that it holds and that is bounded; the
    library would take 100 MB of it, a million tensors."""
    with open_regular(path) as file:
        length = int.from_bytes(start := file.read(8), "little")
        num_bytes = os.fstat(file.fileno()).st_size
    if len(start) < 8:
        raise ValueError(f"it has {num_bytes} bytes")
    if length > min(MAX_JSON_BYTES, num_bytes - 8):
        raise ValueError(f"its header would have {length} bytes, in a file of {num_bytes}; {MAX_JSON_BYTES} are read")


class _Archive(io.BufferedReader):
    """A file of which one read takes `most_bytes` at most, where that is given."""

    most_bytes: int | None = None

    def read(self, size: int | None = -1, /) -> bytes:
        if self.most_bytes is not None and size is not None and size > self.most_bytes:
            raise ValueError(f"its directory has {size} bytes; {self.most_bytes} are read")
        return super().read(size)


@contextlib.contextmanager
def open_zip(path: Path) -> Iterator[zipfile.ZipFile]:
    """An archive. Raises ValueError where its directory would take more memory than its size and a GiB, before it is
    read, and where a name of a wrong length hides the entries that follow it; and whatever zipfile raises for what is
    none."""
    require_regular(path)
    with _Archive(io.FileIO(path)) as file:
        file.most_bytes = (os.fstat(file.fileno()).st_size + SPARE_BYTES) // DIRECTORY_BYTES
        with zipfile.ZipFile(file) as archive:
            file.most_bytes = None
            if broken := next((info for info in archive.infolist() if ENTRY in info.orig_filename), None):
                raise ValueError(f"its directory is damaged: {broken.orig_filename[:60]!r}")
            yield archive


def open_member(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    """A member, which gives what it declares at most, in pieces of what is asked for. Raises ValueError for one that is
    compressed in another way than those that can be read in pieces."""
    kind = archive.getinfo(name).compress_type
    if kind not in COMPRESSIONS:
        known = zipfile.compressor_names.get(kind, kind)  # type: ignore[attr-defined]
        raise ValueError(f"{name} is compressed by {known}; stored and deflated are read")
    return archive.open(name)


def read_npy_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Shape, whether in Fortran order, dtype, and the length of the header of an array; none of its values is used.

    Raises ValueError for an unknown format. The length that the header itself declares is not trusted.
    """
    start = io.BytesIO(stream.read(MAX_NPY_HEADER_BYTES))
    version = np.lib.format.read_magic(start)
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read_header is None:
        raise ValueError(f".npy format {version}")
    shape, is_fortran, dtype = read_header(start)
    return tuple(map(int, shape)), is_fortran, dtype, start.tell()  # numpy lets a header say True
