"""Ways to spoil an archive: what it holds, under checksums that are right, and its directory."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

BOMB_BYTES = 3 << 29  # of zeros, in a megabyte and a half
ZEROS = bytes(1 << 24)
Edit = Callable[[np.random.Generator, bytes], tuple[str, bytes]]


def edited(
    rng: np.random.Generator, data: bytes, edit: Edit, numbers: Sequence[int], values: Sequence[Any]
) -> tuple[str, bytes]:
    """A member inside, with the right checksum; its name, its compression; or the archive's directory."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    # TorchScript is code, which torch compiles and trusts: forged under right checksums, it can end the process.
    is_code = any("/code/" in name for name, _ in members)
    way = rng.integers(6 if is_code else 10)
    if way == 0:
        return _directory(rng, data, numbers)
    index = int(rng.integers(len(members)))
    name, content = members[index]
    method, how = zipfile.ZIP_STORED, f"zip {name.rpartition('.')[2][:4]}"
    if way == 1:
        how = "zip name"
        members[index] = str(values[rng.integers(len(values))])[:300].replace("\0", "0") or "x", content
    elif way == 2:
        how = "zip absent"
        del members[index]
    elif way == 3:
        how = "zip twice"
        members.append((name, content))
    elif way == 4:
        method = int(rng.choice([zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]))
        how = "zip compression"
    elif way == 5:
        how = "zip bomb"
        return how, bomb(members, index)
    else:
        inner, content = edit(rng, content)
        how = f"zip {inner}"
        members[index] = name, content
    return how, _packed(members, method)


def _packed(members: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name), content, compress_type=method)
    return file.getvalue()


def _directory(rng: np.random.Generator, data: bytes, numbers: Sequence[int]) -> tuple[str, bytes]:
    """A field of a member's entry, or of the end of the archive."""
    entries = [at for at in range(len(data) - 4) if data[at : at + 4] == b"PK\1\2"]
    ends = [at for at in range(len(data) - 4) if data[at : at + 4] == b"PK\5\6"]
    fields = ((8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (30, 2), (42, 4))
    at, choices = entries[rng.integers(len(entries))], fields
    if rng.random() < 0.3:
        at, choices = ends[-1], ((8, 2), (10, 2), (12, 4), (16, 4), (20, 2))
    offset, width = choices[rng.integers(len(choices))]
    value = (numbers[rng.integers(len(numbers))] % 256**width).to_bytes(width, "little")
    return "zip directory", data[: at + offset] + value + data[at + offset + width :]


def bomb(members: list[tuple[str, bytes]], index: int) -> bytes:
    """An archive of which one member becomes a GiB and a half of zeros."""
    name, content = members[index]
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    start = packer.compress(content) + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(bytes(1 << 24)) + packer.flush(zlib.Z_FULL_FLUSH)
    num_blocks = BOMB_BYTES >> 24
    stream = start + block * num_blocks + packer.flush()
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for number, (other, inside) in enumerate(members):
            archive.writestr(zipfile.ZipInfo(other), stream if number == index else inside)
    checksum = zlib.crc32(content)
    for _ in range(num_blocks):
        checksum = zlib.crc32(ZEROS, checksum)
    data = bytearray(file.getvalue())
    found = archive.infolist()[index]
    size = struct.pack("<III", checksum, len(stream), len(content) + (num_blocks << 24))
    entry = [at for at in range(len(data)) if data[at : at + 4] == b"PK\1\2"][index]
    data[entry + 10 : entry + 12] = data[found.header_offset + 8 : found.header_offset + 10] = b"\x08\0"
    data[entry + 16 : entry + 28] = data[found.header_offset + 14 : found.header_offset + 26] = size
    return bytes(data)
