"""Ways to spoil a file without knowing what it is: its bytes, and what lies under its name."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.fuzz import fields

EXTREMES = (0, 1, 0x7F, 0xFF, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1)
HOLLOW_BYTES = 3 << 29  # of a file that is all holes
BYTES_SHARE, STRUCTURE_SHARE = 0.35, 0.15


def spoil(rng: np.random.Generator, folder: Path, named: str, others: list[Path]) -> str:
    """Spoils one file of an input, or the folder that is named; returns how, as `group: way`.

    `others` are good files of other formats.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = files[rng.integers(len(files))]
    share = rng.random()
    if share < BYTES_SHARE:
        name, change = _chosen(rng, BYTES)
        path.write_bytes(change(rng, path.read_bytes()))
        return f"bytes: {name}"
    if share < BYTES_SHARE + STRUCTURE_SHARE:
        name, put = _chosen(rng, STRUCTURES)
        if name == "named":
            path = folder / named
        put(rng, path, others)
        return f"structure: {name}"
    return f"fields: {fields.spoil(rng, path)}"


def _chosen(rng: np.random.Generator, ways: dict[str, Callable]) -> tuple[str, Callable]:
    name = list(ways)[rng.integers(len(ways))]
    return name, ways[name]


def _part(rng: np.random.Generator, data: bytes) -> tuple[int, int]:
    start = int(rng.integers(len(data) + 1))
    return start, min(len(data), start + int(rng.integers(1, 200)))


def _flip(rng: np.random.Generator, data: bytes) -> bytes:
    changed = bytearray(data)
    for position in rng.integers(len(data), size=rng.integers(1, 5)) if data else ():
        changed[position] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def _overwrite(rng: np.random.Generator, data: bytes) -> bytes:
    """A number of 1 to 8 bytes, of either order, that few expect."""
    num_bytes = int(rng.choice([1, 2, 4, 8]))
    order = "little" if rng.random() < 0.5 else "big"
    value = (EXTREMES[rng.integers(len(EXTREMES))] % 256**num_bytes).to_bytes(num_bytes, order)
    start = int(rng.integers(min(len(data), 200) if rng.random() < 0.5 and data else len(data) + 1))
    return data[:start] + value + data[start + num_bytes :]


def _insert(rng: np.random.Generator, data: bytes) -> bytes:
    start, _ = _part(rng, data)
    return data[:start] + rng.bytes(int(rng.integers(1, 50))) + data[start:]


def _without(rng: np.random.Generator, data: bytes) -> bytes:
    start, end = _part(rng, data)
    return data[:start] + data[end:]


def _zeros(rng: np.random.Generator, data: bytes) -> bytes:
    start, end = _part(rng, data)
    return data[:start] + bytes(end - start) + data[end:]


def _twice(rng: np.random.Generator, data: bytes) -> bytes:
    start, end = _part(rng, data)
    return data[:end] + data[start:end] * int(rng.integers(1, 20)) + data[end:]


BYTES: dict[str, Callable[[np.random.Generator, bytes], bytes]] = {
    "flips": _flip,
    "cut": lambda rng, data: data[: rng.integers(len(data))] if data else data,
    "insertion": _insert,
    "deletion": _without,
    "zeros": _zeros,
    "repetition": _twice,
    "number": _overwrite,
    "appended": lambda rng, data: data + rng.bytes(int(rng.integers(1, 300))),
    "prepended": lambda rng, data: rng.bytes(int(rng.integers(1, 300))) + data,
    "noise": lambda rng, data: rng.bytes(len(data)),
}


def _clear(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _put(make: Callable[[Path], object]) -> Callable:
    def put(rng: np.random.Generator, path: Path, others: list[Path]) -> None:
        _clear(path)
        make(path)

    return put


def _other(rng: np.random.Generator, path: Path, others: list[Path]) -> None:
    """A file of one format under the name of another."""
    _clear(path)
    shutil.copyfile(others[rng.integers(len(others))], path)


def _hollow(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(HOLLOW_BYTES)


def _socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the name of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(path.name)
    finally:
        os.chdir(here)


STRUCTURES: dict[str, Callable[[np.random.Generator, Path, list[Path]], None]] = {
    "gone": _put(lambda path: None),
    "empty": _put(Path.touch),
    "folder": _put(Path.mkdir),
    "pipe": _put(os.mkfifo),
    "socket": _put(_socket),
    "link to itself": _put(lambda path: path.symlink_to(path.name)),
    "link to nothing": _put(lambda path: path.symlink_to("nowhere")),
    "link to its folder": _put(lambda path: path.symlink_to("..")),
    "link to a device": _put(lambda path: path.symlink_to("/dev/zero")),
    "hollow": _put(_hollow),
    "other format": _other,
    "named": _put(Path.touch),
}
