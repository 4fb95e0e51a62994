"""Ways to spoil a file that know its format: lengths, shapes, names, numbers, and what a checksum then says of them."""

from __future__ import annotations

import ast
import gzip
import hashlib
import json
import pickle
import pickletools
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fuzz import archives
from benchmarks.fuzz.sandbox import CANARY, PAYLOAD

NUMBERS = (0, -1, 1, 2, 3, 255, 2**31, 2**32, 2**53, 2**62, 2**63, 2**64, 10**30)
VALUES: tuple[Any, ...] = (
    *NUMBERS, None, True, False, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "x", "\u0000", "é\n\u202e",
    "x" * 5000, "../up", "/dev/zero", f"{CANARY}_module:Network", [], [[]], {}, {"a": 1}, [0] * 2000, "1", "NaN",
    [1, "a", None],
)  # fmt: skip
DEEP = 100_000  # brackets in brackets
DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL", "C64", "F8_E4M3", "F4", "U64", "X", "", 7, None)
NPY_DTYPES = "|u1 <f8 <f4 <i8 <u8 >f8 |O <U9 <c16 <f16 V8 <M8[s] |b1 <f2 u1,u1 x".split()


def spoil(rng: np.random.Generator, path: Path) -> str:
    """Spoils a file by its format, which its first bytes tell; returns how."""
    data = path.read_bytes()
    name, changed = edited(rng, data)
    path.write_bytes(changed)
    if path.name in ("state.json", "state.safetensors") and rng.random() < 0.7:  # with checksums that are right
        sums = path.parent / "SHA256SUMS"
        lines = sums.read_text().splitlines()
        new = f"{hashlib.sha256(changed).hexdigest()}  {path.name}"
        sums.write_text("\n".join([line for line in lines if not line.endswith(path.name)] + [new]) + "\n")
        name += ", checksum renewed"
    return name


def edited(rng: np.random.Generator, data: bytes) -> tuple[str, bytes]:
    if data.startswith(b"PK\3\4"):
        return archives.edited(rng, data, edited, NUMBERS, VALUES)
    if data.startswith(b"\x1f\x8b"):
        name, inner = edited(rng, gzip.decompress(data))
        return f"gz {name}", gzip.compress(inner, mtime=0)
    for start, edit in STARTS:
        if data[start[0] : start[0] + len(start[1])] == start[1]:
            return edit(rng, data)
    return _text(rng, data)


def json_edit(rng: np.random.Generator, content: Any) -> Any:
    """Another value in one place, or one that is gone, or twice there."""
    if isinstance(content, dict) and content and rng.random() < 0.85:
        changed = dict(content)
        key = list(changed)[rng.integers(len(changed))]
        way = rng.random()
        if way < 0.1:
            del changed[key]
        elif way < 0.2:
            changed[str(VALUES[rng.integers(len(VALUES))])[:50]] = changed.pop(key)
        else:
            changed[key] = json_edit(rng, changed[key])
        return changed
    if isinstance(content, list) and content and rng.random() < 0.7:
        changed = list(content)
        index = int(rng.integers(len(changed)))
        way = rng.random()
        if way < 0.2:
            del changed[index]
        elif way < 0.3:
            changed.insert(index, changed[index])
        else:
            changed[index] = json_edit(rng, changed[index])
        return changed
    return VALUES[rng.integers(len(VALUES))]


def _json(rng: np.random.Generator, data: bytes) -> tuple[str, bytes]:
    if rng.random() < 0.1:
        return "deep json", b'{"a":' + b"[" * DEEP + b"]" * DEEP + b"}"
    try:
        content = json.loads(data)
    except ValueError:  # a log, of a value each line
        return _text(rng, data)
    return "json", json.dumps(json_edit(rng, content)).encode("utf-8", "surrogatepass")


def _safetensors(rng: np.random.Generator, data: bytes) -> tuple[str, bytes]:
    length = int.from_bytes(data[:8], "little")
    header, tensors = json.loads(data[8 : 8 + length]), data[8 + length :]
    way = rng.random()
    if way < 0.1:
        return "safetensors length", struct.pack("<Q", NUMBERS[rng.integers(len(NUMBERS))] % 2**64) + data[8:]
    if way < 0.15:
        header |= {f"more.{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(2000)}
    elif way < 0.55 and "__metadata__" in header:
        found = {name: _nested(text) for name, text in header["__metadata__"].items()}
        edited_metadata = json_edit(rng, found)
        if isinstance(edited_metadata, dict):
            edited_metadata = {name: json.dumps(value) for name, value in edited_metadata.items()}
        header["__metadata__"] = edited_metadata
    else:
        name = [name for name in header if name != "__metadata__"]
        entry = dict(header[name[rng.integers(len(name))]])
        what = ("dtype", "shape", "data_offsets")[rng.integers(3)]
        choices = DTYPES if what == "dtype" else (json_edit(rng, entry[what]), [0, 2**63], [2**62, 4, 0], [2] * 70)
        entry[what] = choices[rng.integers(len(choices))]
        header[name[rng.integers(len(name))]] = entry
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return "safetensors header", struct.pack("<Q", len(text)) + text + tensors


def _nested(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _npy(rng: np.random.Generator, data: bytes) -> tuple[str, bytes]:
    length = int.from_bytes(data[8:10], "little")
    header = ast.literal_eval(data[10 : 10 + length].decode("latin1"))
    values = data[10 + length :]
    way = rng.integers(6)
    if way == 0:
        header["descr"] = NPY_DTYPES[rng.integers(len(NPY_DTYPES))]
    elif way == 1:
        header["fortran_order"] = VALUES[rng.integers(len(VALUES))]
    elif way == 2:
        header["shape"] = VALUES[rng.integers(len(VALUES))]
    elif way == 3 and header["shape"]:
        shape = list(header["shape"])
        shape[rng.integers(len(shape))] = NUMBERS[rng.integers(len(NUMBERS))]
        header["shape"] = tuple(shape)
    elif way == 4:
        return "npy length", data[:8] + struct.pack("<H", int(rng.integers(2**16))) + data[10:]
    else:
        version = bytes([int(rng.integers(5)), int(rng.integers(2))])
        return "npy version", data[:6] + version + struct.pack("<I", 2**32 - 1 - int(rng.integers(9))) + data[10:]
    text = repr(header).encode("utf-8")[: 2**16 - 1]
    return "npy header", data[:8] + struct.pack("<H", len(text)) + text + values


def _idx(rng: np.random.Generator, data: bytes) -> tuple[str, bytes]:
    number = struct.pack(">I", NUMBERS[rng.integers(len(NUMBERS))] % 2**32)
    place = 4 * int(rng.integers(1 + data[3]))
    return "idx header", data[:place] + number + data[place + 4 :]


def _png(rng: np.random.Generator, data: bytes) -> tuple[str, bytes]:
    """Sizes and kinds with checksums that are right; a chunk's length; pixels with a checksum that is not."""
    way = rng.integers(4)
    if way == 0:
        size = struct.pack(">II", *(int(value) for value in rng.choice([0, 1, 7, 8, 10_000, 100_000, 2**31], 2)))
        return "png size", _with_header(data, size + data[24:29])
    if way == 1:
        return "png kind", _with_header(data, data[16:24] + bytes(rng.integers(0, 20, 5).tolist()))
    start = data.index(b"IDAT")
    if way == 2:
        length = struct.pack(">I", NUMBERS[rng.integers(len(NUMBERS))] % 2**32)
        return "png length", data[: start - 4] + length + data[start:]
    position = start + 4 + int(rng.integers(len(data) - start - 16))
    return "png pixels", data[:position] + bytes([data[position] ^ 16]) + data[position + 1 :]


def _with_header(data: bytes, header: bytes) -> bytes:
    return data[:16] + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + data[33:]


def _pickle(rng: np.random.Generator, data: bytes) -> tuple[str, bytes]:
    """Between two operations: a call of the system's, a global, a number; or an operation that is another one."""
    places = []
    try:
        for opcode, _, position in pickletools.genops(data):
            places.append((position, opcode))
    except ValueError:
        pass
    position, _ = places[rng.integers(len(places))]
    way = rng.integers(4)
    code = pickle.BINUNICODE + struct.pack("<I", len(PAYLOAD)) + PAYLOAD.encode()
    calls = (
        b"cbuiltins\nexec\n" + code + pickle.TUPLE1 + pickle.REDUCE,
        b"cposix\nsystem\n" + code + pickle.TUPLE1 + pickle.REDUCE,
        b"(ibuiltins\nexec\n",
        b"cnumpy.core.multiarray\n_reconstruct\n",
        b"ctorch.storage\n_load_from_bytes\n",
    )
    if way == 0:
        return "pickle call", data[:position] + calls[rng.integers(len(calls))] + data[position:]
    if way == 1:
        numbers = [(at, op) for at, op in places if op.name in ("BININT", "BININT1", "BININT2")]
        at, opcode = numbers[rng.integers(len(numbers))] if numbers else places[0]
        width = {"BININT": 4, "BININT1": 1, "BININT2": 2}.get(opcode.name, 0)
        value = NUMBERS[rng.integers(len(NUMBERS))].to_bytes(16, "little", signed=True)
        return "pickle number", data[:at] + pickle.LONG1 + b"\x10" + value + data[at + 1 + width :]
    if way == 2:
        return "pickle operation", data[:position] + bytes([int(rng.integers(256))]) + data[position + 1 :]
    return "pickle stop", data[:position] + pickle.STOP + data[position:]


def _text(rng: np.random.Generator, data: bytes) -> tuple[str, bytes]:
    """Lines and cells of a table."""
    lines = data.split(b"\n")
    index = int(rng.integers(len(lines)))
    cells = lines[index].split(b",")
    value = str(VALUES[rng.integers(len(VALUES))]).encode("utf-8", "replace")
    way = rng.integers(4)
    if way == 0:
        lines.insert(index, lines[index])
    elif way == 1:
        del lines[index]
    else:
        cells[rng.integers(len(cells))] = value
        lines[index] = b",".join(cells)
    return "text", b"\n".join(lines)


Edit = Callable[[np.random.Generator, bytes], tuple[str, bytes]]
STARTS: tuple[tuple[tuple[int, bytes], Edit], ...] = (
    ((0, b"\x89PNG"), _png),
    ((0, b"\x93NUMPY"), _npy),
    ((0, b"\0\0\x08"), _idx),
    ((8, b"{"), _safetensors),
    ((0, b"\x80"), _pickle),
    ((0, b"{"), _json),
)
