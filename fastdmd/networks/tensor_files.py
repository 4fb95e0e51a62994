"""Tensors by name in anybody's weight files: described before any is read; no code in them is run."""

from __future__ import annotations

import dataclasses
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastdmd import reading
from fastdmd.memory import ran_out_of_memory
from fastdmd.networks.user_code import reason

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
MAX_DEPTH = 8  # dictionaries in dictionaries
MAX_NAMED = 5  # tensors that an error names
MAX_TENSORS = 100_000
MAX_INFLATION = 10  # of a compressed archive, which torch.save never writes; weights compress to half at best
CHUNK_BYTES = 1 << 22
ENOUGH_BYTES = 1 << 30  # of a file whose tensors may exceed the memory of some machines
ARCHIVE = b"PK\3\4"
PICKLED = (b"PK", b"\x80")  # how what torch.save writes begins


@dataclasses.dataclass
class TensorFile:
    """The tensors of a file, or of several that an index names: shapes and dtypes by name, values when asked for."""

    path: Path
    described: dict[str, Tensor]  # without values where the file is safetensors
    places: dict[str, Path] = dataclasses.field(default_factory=dict)  # where those without values are
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)
    notice: str = ""  # a line for stderr once they are taken

    def read(self, names: Mapping[str, str]) -> dict[str, Tensor]:
        """Tensors by the keys of `names`, whose values are names in the file."""
        found = {ours: self.described[name] for ours, name in names.items() if name not in self.places}
        if empty := [name for name, tensor in found.items() if tensor.is_meta]:
            raise refusal(f"tensors with values in {self.path}", f"{listed(empty)} without")
        for path in dict.fromkeys(self.places[name] for name in names.values() if name in self.places):
            with safe_open(path, framework="pt", device="cpu") as file:
                found |= {o: file.get_tensor(name) for o, name in names.items() if self.places.get(name) == path}
        return found

    def renamed(self, rename: Callable[[str], str]) -> dict[str, str]:
        """Names in the file by what `rename` makes of them. Raises ValueError where that is one of two."""
        names = {rename(name): name for name in self.described}
        if len(names) < len(self.described):
            twice = next(name for name in self.described if names[rename(name)] != name)
            raise refusal(f"every tensor once in {self.path}", f"{rename(twice)} twice")
        return names


def open_tensors(path: Path) -> TensorFile:
    """Opens safetensors, an `.index.json` of several, or what `torch.save` wrote; no code in them is run.

    Dictionaries in dictionaries become names with dots; what is no tensor by name is left out. Raises
    FileNotFoundError or ValueError with the path, what was expected and what came.
    """
    if not path.is_file():
        missing = "which is no file" if path.exists() else "which does not exist"
        raise FileNotFoundError(f"fastdmd.weights: expected a weight file, got {path}, {missing}")
    if path.suffix.lower() == ".json":
        return _open_index(path)
    with open(path, "rb") as file:
        start = file.read(16)
    if not start:
        raise refusal("a weight file", f"{path}, which is empty")
    if path.suffix.lower() == ".safetensors" or start[8:9] == b"{":
        return _open_safetensors(path)
    return TensorFile(path, _flat(_torch_load(path, start), path))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object, of 16 MiB at most. Raises ValueError for any other."""
    try:
        content = reading.read_json(path)
    except ValueError as error:
        raise refusal(f"JSON in {path}", error) from error
    if not isinstance(content, dict):
        raise refusal(f"a JSON object in {path}", f"a {type(content).__name__}")
    return content


def _open_safetensors(path: Path) -> TensorFile:
    try:
        reading.require_safetensors(path)
        with safe_open(path, framework="pt", device="cpu") as file:
            described = {}
            names = file.keys()
            if len(names) > MAX_TENSORS:
                raise refusal(f"at most {MAX_TENSORS} tensors in {path}", len(names))
            for name in names:
                part = file.get_slice(name)
                dtype = DTYPES.get(str(part.get_dtype()))
                if dtype is None:
                    raise refusal(f"{name} in {path} of {', '.join(DTYPES)}", part.get_dtype())
                described[name] = torch.empty(part.get_shape(), dtype=dtype, device="meta")
            return TensorFile(path, described, dict.fromkeys(described, path), dict(file.metadata() or {}))
    except (SafetensorError, ValueError, TypeError, RuntimeError) as error:  # torch's, of sizes that are none
        if str(error).startswith("fastdmd."):
            raise
        first_line = str(error).partition("\n")[0]  # torch adds where in its C++ that was
        raise refusal("a safetensors file", f"{path}: {first_line:.300}") from error


def _open_index(path: Path) -> TensorFile:
    """Several files of a folder, with `weight_map` of tensors' names to files' names; what else they hold, another copy
    of a tensor among it, is none of theirs."""
    places = read_json(path).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise refusal(f"a weight_map of names to files in {path}", "none")
    whole = TensorFile(path, {})
    for name in sorted(set(places.values())):
        if Path(name).name != name or name.lower().endswith(".json"):
            raise refusal(f"weight files beside {path} in its weight_map", name[:80])
        part = open_tensors(path.parent / name)
        mapped = [tensor for tensor, place in places.items() if place == name]
        if absent := [tensor for tensor in mapped if tensor not in part.described]:
            raise refusal(f"the tensors of {path} in {name}", f"no {listed(absent)}")
        whole.described |= {tensor: part.described[tensor] for tensor in mapped}
        whole.places |= {tensor: part.places[tensor] for tensor in mapped if tensor in part.places}
    return whole


def _torch_load(path: Path, start: bytes) -> Any:
    if start.startswith(ARCHIVE):
        require_whole_archive(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch's unpickler meets broken files with errors of every type
        expected = "safetensors, or what torch.save makes of tensors alone (a state_dict)"
        if code := re.search(r"GLOBAL (\S+)", str(error)):
            got = f"a {code[1]} in it, whose code would have to run"
        elif "TorchScript" in str(error):
            got = "a TorchScript archive"
        elif not start.startswith(PICKLED) and ".tar" not in str(error):
            got = f"a file that begins with {start!r}"
        elif ran_out_of_memory(error) and path.stat().st_size < ENOUGH_BYTES:
            got = "tensors of many times the file's size"
        else:
            got = reason(error).split(" In PyTorch 2.6")[0]
        raise refusal(f"{expected} in {path}", got) from error


def require_whole_archive(path: Path) -> None:
    """Raises ValueError for an archive whose members take many times its size, before they fill the memory, and for one
    whose bytes are not those that were written, by the checksums that it holds and torch does not compare."""
    try:
        with reading.open_zip(path) as archive:
            num_bytes = sum(member.file_size for member in archive.infolist())
            if num_bytes > MAX_INFLATION * (size := path.stat().st_size):
                expected = f"an archive of at most {MAX_INFLATION} times its own size in {path}"
                raise refusal(expected, f"{num_bytes} bytes in {size}")
            if len(names := archive.namelist()) > len({*names}):  # of which readers take the one or the other
                raise refusal(f"every member once in {path}", "some twice")
            for name in names:
                with reading.open_member(archive, name) as member:
                    while member.read(CHUNK_BYTES):
                        pass
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, NotImplementedError, RuntimeError) as error:
        if str(error).startswith("fastdmd."):
            raise
        raise refusal(f"an archive as torch writes it, whole, in {path}", reason(error)) from error


def _flat(content: Any, path: Path) -> dict[str, Tensor]:
    """Tensors under names with dots. Each dictionary once: one that holds itself ends, and no two names are one."""
    if not isinstance(content, dict):
        raise refusal(f"a state dict, tensors by name, in {path}", f"a {type(content).__name__}")
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()

    def walk(entries: dict, prefix: str, depth: int) -> None:
        if id(entries) in seen or depth > MAX_DEPTH:
            return
        seen.add(id(entries))
        for key, value in entries.items():
            name = f"{prefix}{key}"
            if isinstance(value, dict):
                walk(value, f"{name}.", depth + 1)
            elif isinstance(value, Tensor):
                if name in tensors:
                    raise refusal(f"every tensor once in {path}", f"{name} twice")
                tensors[name] = value

    walk(content, "", 1)
    if not tensors:
        entries = listed(map(str, content))
        raise refusal(f"a state dict, tensors by name, in {path}", f"only {entries}" if entries else "an empty one")
    return tensors


def listed(names: Iterable[str]) -> str:
    """The first few, and how many more there are."""
    short = [name[:120] for name in names]
    return ", ".join(short[:MAX_NAMED]) + (f" and {len(short) - MAX_NAMED} more" if len(short) > MAX_NAMED else "")


def refusal(expected: str, got: object) -> ValueError:
    """The error to raise for a weight file, on one line."""
    return ValueError(f"fastdmd.weights: expected {expected}, got {' '.join(str(got).split())}")
