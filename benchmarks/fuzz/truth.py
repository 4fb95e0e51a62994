"""The same files read another way: by the formats' descriptions and the standard library, without fastdmd's readers."""

from __future__ import annotations

import collections
import csv
import gzip
import io
import json
import pickle
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SUFFIXES = (".png", ".jpg", ".webp", ".bmp", ".gif", ".tif", ".ppm")
DTYPES = {
    "F64": "f8", "F32": "f4", "F16": "f2", "I64": "i8", "I32": "i4", "I16": "i2", "I8": "i1", "U8": "u1", "BOOL": "?"
}  # fmt: skip
STORAGES = {"FloatStorage": "f4", "DoubleStorage": "f8", "HalfStorage": "f2", "LongStorage": "i8", "IntStorage": "i4"}


def npz_dataset(path: Path) -> dict[str, Any]:
    found = npz(path)
    images = found["images"]
    labels = found["labels"].astype(np.int64) if "labels" in found else None
    images = images[..., None] if images.ndim == 3 else images
    return {"images": images.transpose(0, 3, 1, 2) if images.shape[3] in (1, 3) else images, "labels": labels}


def idx_dataset(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"images": None, "labels": None}
    for path in sorted(filter(Path.is_file, folder.iterdir()), reverse=True):  # of a file and its .gz the file
        kind = next((kind for kind in found if kind in path.name), None)
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        if kind is None:
            continue
        num_axes = content[3]
        shape = struct.unpack(f">{num_axes}I", content[4 : 4 + 4 * num_axes])
        found[kind] = np.frombuffer(content[4 + 4 * num_axes :], np.uint8).reshape(shape)
    labels = None if found["labels"] is None else found["labels"].astype(np.int64)
    return {"images": found["images"][:, None], "labels": labels}


def picture_dataset(path: Path, table: Path | None = None) -> dict[str, Any]:
    """Classes of a CSV, of a dataset.json, or of subfolders."""
    files = _files(path)
    names = sorted(name for name in files if name.lower().endswith(SUFFIXES))
    description = next((files[name] for name in files if name.lower() == "dataset.json"), None)
    if table is not None:
        rows = [row for row in csv.reader(io.StringIO(table.read_text("utf-8-sig"), newline="")) if any(row)]
        classes = {name.strip(): label.strip() for name, label in rows}
        labels = [int(classes[name]) for name in names]
    elif description is not None:
        given = json.loads(description).get("labels")
        classes = None if given is None else dict(given)
        labels = None if classes is None else [classes[name] for name in names]
    else:
        folders = sorted({name.split("/")[0] for name in names if "/" in name})
        labels = [folders.index(name.split("/")[0]) for name in names] if folders else None
    pictures = [_picture(files[name]) for name in names]
    is_grey = all(picture.mode in ("1", "L", "LA") for picture in pictures)
    arrays = [np.asarray(picture.convert("L" if is_grey else "RGB")) for picture in pictures]
    images = np.stack([array[None] if is_grey else array.transpose(2, 0, 1) for array in arrays])
    return {"images": images, "labels": None if labels is None else np.array(labels, np.int64)}


def _files(path: Path) -> dict[str, bytes]:
    if path.is_dir():
        found = {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    else:
        with zipfile.ZipFile(path) as archive:
            found = {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}
    found = {name.replace("\\", "/"): content for name, content in found.items()}
    return {name: content for name, content in found.items() if not any(p.startswith(".") for p in name.split("/"))}


def _picture(content: bytes) -> Image.Image:
    if content.startswith(b"\x89PNG"):
        _require_pixels(content)
    picture = Image.open(io.BytesIO(content))
    picture.load()
    return picture


def _require_pixels(content: bytes) -> None:
    """Raises zlib.error unless a PNG has all of its pixels, with the checksum that its stream has of them."""
    position, stream = 8, b""
    while (start := position + 8) <= len(content):
        end = start + int.from_bytes(content[position : start - 4], "big")
        if content[start - 4 : start] == b"IDAT":
            stream += content[start:end]
        position = end + 4
    zlib.decompress(stream)


def safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        data = content[start + first : start + last]
        tensors[name] = np.frombuffer(data, np.dtype(DTYPES[entry["dtype"]])).reshape(entry["shape"])
    return tensors, metadata


def statistics(path: Path) -> dict[str, Any]:
    found = npz(path)
    sigma = found["sigma"].astype(np.float64)
    count = int(found["num_images"]) if "num_images" in found else None
    return {"mean": found["mu"].astype(np.float64), "covariance": (sigma + sigma.T) / 2, "num_images": count}


def npz(path: Path) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(path) as archive:
        members = {name: io.BytesIO(archive.read(name)) for name in archive.namelist() if name.endswith(".npy")}
    return {name[:-4]: np.lib.format.read_array(file, allow_pickle=False) for name, file in members.items()}


class Plain(pickle.Unpickler):
    """What torch and EDM pickle, as arrays and dictionaries; knows a handful of names, all of which are its own."""

    def __init__(self, file: Any, storages: dict[str, bytes] | None = None):
        super().__init__(file)
        self.storages = storages
        self.keys: dict[str, str] = {}  # dtypes of the storages that are referred to

    def find_class(self, module: str, name: str) -> Any:
        known = {
            "OrderedDict": collections.OrderedDict, "EasyDict": dict, "_rebuild_tensor_v2": self.tensor,
            "_rebuild_parameter": lambda data, *_: data, "_reconstruct_persistent_obj": Module.of, "ModuleDict": Module,
            "_load_from_bytes": legacy, "scalar": lambda *_: None, "dtype": Module, **{n: n for n in STORAGES},
        }  # fmt: skip
        if name not in known:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return known[name]

    def persistent_load(self, description: Any) -> Any:
        _, kind, key, _, num_elements, *_ = description
        self.keys[key] = STORAGES[kind]
        if self.storages is None:
            return np.zeros(0, STORAGES[kind])
        return np.frombuffer(self.storages[key], STORAGES[kind], count=num_elements)

    def tensor(self, storage: np.ndarray, offset: int, size: tuple, stride: tuple, *_: Any) -> np.ndarray:
        if self.storages is None and len(storage) == 0:
            return storage
        last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
        if min((*size, *stride, offset), default=0) < 0 or (0 not in size and last >= len(storage)):
            raise pickle.UnpicklingError("a tensor beyond its storage")
        strides = [step * storage.itemsize for step in stride]
        return np.lib.stride_tricks.as_strided(storage[offset:], size, strides).copy()


class Module:
    def __init__(self, *_: Any, state: Any = None):
        self.state = state

    def __setstate__(self, state: Any) -> None:
        self.state = state

    @classmethod
    def of(cls, meta: dict) -> Module:
        return cls(state=meta["state"])


def torch_archive(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        names = {name.partition("/")[2]: name for name in archive.namelist()}
        storages = {name[5:]: archive.read(own) for name, own in names.items() if name.startswith("data/")}
        return Plain(io.BytesIO(archive.read(names["data.pkl"])), storages).load()


def legacy(source: Path | bytes) -> Any:
    """What torch wrote before its archives: five pickles, then the storages, each after its number of elements."""
    file = io.BytesIO(source if isinstance(source, bytes) else source.read_bytes())
    for _ in range(3):
        pickle.Unpickler(file).load()
    start = file.tell()
    first = Plain(file)
    first.load()
    storages = {}
    for key in Plain(file).load():
        num_bytes = int.from_bytes(file.read(8), "little") * np.dtype(first.keys[key]).itemsize
        storages[key] = file.read(num_bytes)
    file.seek(start)
    return Plain(file, storages).load()


def edm(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Arguments and tensors of the network in a pickle of EDM."""
    found = Plain(io.BytesIO(path.read_bytes()), {}).load()
    network = found["ema"] if isinstance(found, dict) else found
    tensors = {}

    def walk(module: Module, prefix: str) -> None:
        for kind in ("_parameters", "_buffers"):
            tensors.update({prefix + name: value for name, value in module.state[kind].items() if value is not None})
        for name, inner in module.state["_modules"].items():
            walk(inner, f"{prefix}{name}.")

    walk(network, "")
    return network.state["_init_kwargs"], tensors
