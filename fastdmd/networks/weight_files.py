"""Tensors by name in anybody's weight files: described before they are read, found under wrappers, compared."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fastdmd.networks.user_code import reason, user_code

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool, "C64": torch.complex64,
}  # fmt: skip
COMPILED = "_orig_mod."  # what torch.compile writes before the names inside; no module of anybody's is called so
MAX_DEPTH = 8  # dictionaries in dictionaries
MAX_NAMED = 5  # tensors that an error names
MAX_JSON_BYTES = 1 << 24  # of an index or a configuration; the largest in use has some 10 MB
MAX_INFLATION = 10  # of a compressed archive, which torch.save never writes; weights compress to half at best
PICKLED = (b"PK", b"\x80")  # how what torch.save writes begins


@dataclasses.dataclass
class WeightFile:
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
            raise _error(f"tensors with values in {self.path}", f"{_some(empty)} without")
        for path in dict.fromkeys(self.places[name] for name in names.values() if name in self.places):
            with safe_open(path, framework="pt", device="cpu") as file:
                found |= {o: file.get_tensor(name) for o, name in names.items() if self.places.get(name) == path}
        return found

    def renamed(self, rename: Callable[[str], str]) -> dict[str, str]:
        """Names in the file by what `rename` makes of them. Raises ValueError where that is one of two."""
        names = {rename(name): name for name in self.described}
        if len(names) < len(self.described):
            twice = next(name for name in self.described if names[rename(name)] != name)
            raise _error(f"every tensor once in {self.path}", f"{rename(twice)} twice")
        return names


def open_weights(path: Path) -> WeightFile:
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
        raise _error("a weight file", f"{path}, which is empty")
    if path.suffix.lower() == ".safetensors" or start[8:9] == b"{":
        return _open_safetensors(path)
    return WeightFile(path, _flat(_torch_load(path, start), path))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object, of 16 MiB at most. Raises ValueError for any other."""
    with open(path, "rb") as file:
        text = file.read(MAX_JSON_BYTES + 1)
    if len(text) > MAX_JSON_BYTES:
        raise _error(f"at most {MAX_JSON_BYTES >> 20} MiB of JSON in {path}", "more")
    try:
        content = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _error(f"JSON in {path}", reason(error)) from error
    if not isinstance(content, dict):
        raise _error(f"a JSON object in {path}", f"a {type(content).__name__}")
    return content


def find(weights: WeightFile, network: nn.Module, key: str | None = None) -> dict[str, str]:
    """Names in the file by the network's own, for all of its tensors.

    They may lie under one prefix: of a wrapper (`module.`, `model.`) or an entry (`state_dict`, `ema`), or of several;
    the notice says which was taken. `key` names the entry where several fit. A tensor that the network has under two
    names may be there under one. Raises ValueError with the candidates, or with what is missing, left over or other.
    """
    expected = tensors_of(network)
    ours = _without_wrappers(expected)
    names = weights.renamed(lambda name: name.replace(COMPILED, ""))
    inside = "" if key is None else key.removesuffix(".") + "."
    if inside:
        names = {name.removeprefix(inside): own for name, own in names.items() if name.startswith(inside)}
        if not names:
            entries = sorted({name.split(".")[0] for name in weights.described if "." in name})
            raise _error(f"--weights-key out of {_some(entries)} for {weights.path}", key)
    twins = _twins(network)
    hits = Counter(prefix for name in names for prefix in _prefixes(name) if name[len(prefix) :] in ours)
    needed = len({twins.get(name, name) for name in expected})
    whole = [prefix for prefix, count in hits.items() if needed <= count]
    if len(whole) > 1:
        entries = (f"{inside}{prefix}".rstrip(".") for prefix in whole)
        raise _error(f"--weights-key out of {_some(entries)} for {weights.path}", key or "none")
    prefix = whole[0] if whole else max(hits, key=lambda prefix: (hits[prefix], -len(prefix)), default="")
    under = {name[len(prefix) :]: own for name, own in names.items() if name.startswith(prefix)}
    found = {ours.get(name, name): own for name, own in under.items()}
    for name, twin in twins.items():
        for absent, present in ((name, twin), (twin, name)):
            if absent not in found and present in found:
                found[absent] = found[present]
    place = (inside + prefix).rstrip(".")
    subject = f"the tensors of {type(network).__name__} in {weights.path}" + (f" under {place}" if place else "")
    require_same(expected, {name: weights.described[own] for name, own in found.items()}, subject)
    if place:
        others = len(weights.described) - len(under)
        weights.notice = f"{weights.path}: took the {len(under)} tensors under {place}, left {others} others"
    return found


def tensors_of(network: nn.Module) -> dict[str, Tensor]:
    """The state of a network, without what it may hold that is no tensor."""
    return {name: value for name, value in network.state_dict().items() if isinstance(value, Tensor)}


def require_same(expected: Mapping[str, Tensor], got: Mapping[str, Tensor], subject: str) -> None:
    """Compares names, shapes and kinds of numbers. Raises ValueError that names the first that differ."""
    missing, left_over = [name for name in expected if name not in got], [name for name in got if name not in expected]
    other = []
    for name, want in expected.items():
        have = got.get(name, want)
        if want.shape != have.shape:
            other.append(f"{name} of shape {tuple(have.shape)}, not {tuple(want.shape)}")
        elif _kind(want) != _kind(have):
            other.append(f"{name} of {_kind(have)}, not {_kind(want)}")
    differences = [f"it without {_some(missing)}"] * bool(missing) + [f"also {_some(left_over)}"] * bool(left_over)
    if differences or other:
        raise _error(subject, "; ".join([*differences, *other[:MAX_NAMED]]))


def fill(network: nn.Module, weights: WeightFile, names: Mapping[str, str]) -> None:
    """Reads tensors into a network, by its own names, and prints the notice. Raises ValueError if one is not finite."""
    masks = infinite_buffers(network)
    with user_code("weights", f"{type(network).__name__} to take the tensors of {weights.path}"):
        network.load_state_dict(weights.read(names))
    require_finite(network, weights.path, masks)
    if weights.notice:
        print(weights.notice, file=sys.stderr)


def require_finite(network: nn.Module, source: object, masks: Container[str] = ()) -> None:
    """Raises ValueError for parameters and buffers that are not finite, naming the first.

    The buffers in `masks` may hold infinity, but no NaN.
    """
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if tensor.is_meta:
            raise _error(f"weights with values in {source}", f"{name} without, on the meta device")
        if tensor.is_floating_point():
            bad = tensor.isnan() if name in masks else ~tensor.isfinite()
            if num_bad := int(bad.sum()):
                kind = "NaN" if tensor.isnan().any() else "infinity"
                raise _error(f"finite weights in {source}", f"{kind} in {name} ({num_bad} of {tensor.numel()} numbers)")


def infinite_buffers(network: nn.Module) -> set[str]:
    """Buffers that the network's own code fills with infinity, as that of attention masks does."""
    buffers = dict(network.named_buffers())
    return {name for name, buffer in buffers.items() if buffer.is_floating_point() and buffer.isinf().any()}


def _open_safetensors(path: Path) -> WeightFile:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            described = {}
            for name in file.keys():
                part = file.get_slice(name)
                dtype = DTYPES.get(str(part.get_dtype()))
                if dtype is None:
                    raise _error(f"{name} in {path} of {', '.join(DTYPES)}", part.get_dtype())
                described[name] = torch.empty(part.get_shape(), dtype=dtype, device="meta")
            return WeightFile(path, described, dict.fromkeys(described, path), dict(file.metadata() or {}))
    except SafetensorError as error:
        raise _error("a safetensors file", f"{path}: {error}") from error


def _open_index(path: Path) -> WeightFile:
    """Several files of a folder, with `weight_map` of tensors' names to files' names; what else they hold, another copy
    of a tensor among it, is none of theirs."""
    places = read_json(path).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise _error(f"a weight_map of names to files in {path}", "none")
    whole = WeightFile(path, {})
    for name in sorted(set(places.values())):
        if Path(name).name != name or name.lower().endswith(".json"):
            raise _error(f"weight files beside {path} in its weight_map", name[:80])
        part = open_weights(path.parent / name)
        mapped = [tensor for tensor, place in places.items() if place == name]
        if absent := [tensor for tensor in mapped if tensor not in part.described]:
            raise _error(f"the tensors of {path} in {name}", f"no {_some(absent)}")
        whole.described |= {tensor: part.described[tensor] for tensor in mapped}
        whole.places |= {tensor: part.places[tensor] for tensor in mapped if tensor in part.places}
    return whole


def _torch_load(path: Path, start: bytes) -> Any:
    _require_no_inflation(path)
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
        else:
            got = reason(error).split(" In PyTorch 2.6")[0]
        raise _error(f"{expected} in {path}", got) from error


def _require_no_inflation(path: Path) -> None:
    """Raises ValueError for an archive whose tensors take many times its size, before they fill the memory."""
    try:
        with zipfile.ZipFile(path) as archive:
            num_bytes = sum(member.file_size for member in archive.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError):  # torch says what it is, or reads it
        return
    if num_bytes > MAX_INFLATION * (size := path.stat().st_size):
        raise _error(
            f"an archive of at most {MAX_INFLATION} times its own size in {path}", f"{num_bytes} bytes in {size}"
        )


def _flat(content: Any, path: Path) -> dict[str, Tensor]:
    """Tensors under names with dots. Each dictionary once: one that holds itself ends, and no two names are one."""
    if not isinstance(content, dict):
        raise _error(f"a state dict, tensors by name, in {path}", f"a {type(content).__name__}")
    tensors, seen = {}, set()

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
                    raise _error(f"every tensor once in {path}", f"{name} twice")
                tensors[name] = value

    walk(content, "", 1)
    if not tensors:
        entries = _some(map(str, content))
        raise _error(f"a state dict, tensors by name, in {path}", f"only {entries}" if entries else "an empty one")
    return tensors


def _without_wrappers(expected: Mapping[str, Tensor]) -> dict[str, str]:
    """The network's names by those that they would have if nothing wrapped it."""
    bare = {name.replace(COMPILED, ""): name for name in expected}
    while bare and all(name.startswith("module.") for name in bare):
        bare = {name.removeprefix("module."): own for name, own in bare.items()}
    return bare


def _twins(network: nn.Module) -> dict[str, str]:
    """The first name of each parameter that the network has under several, by the others."""
    first, twins = {}, {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            twins[name] = first[id(parameter)]
    return twins


def _prefixes(name: str) -> list[str]:
    return [""] + [name[: dot.end()] for dot in re.finditer(r"\.", name)]


def _kind(tensor: Tensor) -> str:
    if tensor.layout != torch.strided or tensor.is_quantized:
        return f"{tensor.layout} layout" if not tensor.is_quantized else f"{tensor.dtype}"
    if tensor.dtype == torch.bool or tensor.is_complex():
        return f"{tensor.dtype}"
    return "floating point" if tensor.is_floating_point() else "whole numbers"


def _some(names: Iterable[str]) -> str:
    names = [name[:120] for name in names]
    return ", ".join(names[:MAX_NAMED]) + (f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else "")


def _error(expected: str, got: object) -> ValueError:
    return ValueError(f"fastdmd.weights: expected {expected}, got {' '.join(str(got).split())}")
