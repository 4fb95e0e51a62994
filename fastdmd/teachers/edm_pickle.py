"""EDM's published pickles, read without executing anything in them."""

from __future__ import annotations

import dataclasses
import io
import math
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from fastdmd.teachers import inert_pickle
from fastdmd.teachers.inert_pickle import Global, Inert, Refused, shown

MAX_OPERATIONS = 1_000_000  # of the tiny network of the tests: 22,000, some 100 a layer; of a tensor's own pickles: 80
MAX_TENSOR_OPERATIONS = 1_000
MAX_DEPTH = 8  # modules in modules; EDM has five
MAX_DIMENSIONS = 8
MAX_NAME = 100  # characters of a module's or tensor's own name

# The format that `torch.save` had before it wrote zip files, in which a storage is pickled.
MAGIC_NUMBER, PROTOCOL_VERSION = 0x1950A86A20F9469CFC6C, 1001
STORAGES = {
    ("torch", "FloatStorage"): torch.float32,
    ("torch", "DoubleStorage"): torch.float64,
    ("torch", "HalfStorage"): torch.float16,
    ("torch", "BFloat16Storage"): torch.bfloat16,
}


def load_pickle(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The arguments of the constructor and the tensors, under EDM's names, of the network in a pickle of EDM.

    The file holds a dictionary with the network as `"ema"`, as published, or the network alone. It is data here: the
    source code inside stays text, globals are names that a short list must know, and no function that the file names is
    called. Memory: what the file holds, its tensors once more, which is checked before each is made to be no more than
    the file holds, and at most a million small Python objects.

    Raises FileNotFoundError, or ValueError with one line that names the file and what is wrong with it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"fastdmd.teachers: expected an EDM network, got {path}, which is not a file")
    try:
        with open(path, "rb") as file:
            if file.read(1) != b"\x80":
                raise Refused("a file that is no pickle")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                network = _network(cast(BinaryIO, content), len(content))  # it reads as one
        return _arguments(network), dict(_tensors(network))
    except Refused as error:
        raise ValueError(f"fastdmd.teachers: expected an EDM network in {path}, got {error}") from error


def _network(content: BinaryIO, num_bytes: int) -> Inert:
    tensors = _TensorReader(num_bytes)
    builders = {
        ("torch_utils.persistence", "_reconstruct_persistent_obj"): _persistent_object,
        ("torch.nn.modules.container", "ModuleDict"): lambda arguments: Inert("ModuleDict"),
        ("torch._utils", "_rebuild_parameter"): _parameter,
        ("torch._utils", "_rebuild_tensor_v2"): tensors.view,
        ("torch.storage", "_load_from_bytes"): tensors.storage,
        ("collections", "OrderedDict"): _empty_dict,
        ("dnnlib.util", "EasyDict"): _empty_dict,
        # Constants such as sqrt(0.5), which the layers keep and nobody here needs.
        ("numpy", "dtype"): lambda arguments: Inert("dtype"),
        ("numpy.core.multiarray", "scalar"): lambda arguments: Inert("scalar"),
        ("numpy._core.multiarray", "scalar"): lambda arguments: Inert("scalar"),
    }
    found = inert_pickle.read(content, builders, max_operations=MAX_OPERATIONS)
    if type(found) is dict:
        if "ema" not in found:
            raise Refused('a dictionary without "ema"')
        found = found["ema"]
    if type(found) is not Inert:
        raise Refused(f"{shown(found)} in its place")
    if found.class_name != "EDMPrecond":
        raise Refused(f"a {found.class_name}, not an EDMPrecond")
    return found


def _arguments(network: Inert) -> dict[str, Any]:
    state = _state(network)
    arguments = state.get("_init_kwargs")
    if type(arguments) is not dict:
        raise Refused("a network without the arguments of its constructor")
    unnamed = state.get("_init_args", ())
    if type(unnamed) is not tuple or unnamed:
        raise Refused("a network whose constructor took arguments without names")
    return arguments


def _tensors(network: Inert) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers with their full names."""
    seen = set()

    def walk(module: Inert, prefix: str, depth: int) -> Iterator[tuple[str, Tensor]]:
        if id(module) in seen or depth > MAX_DEPTH:  # a cycle, or one that would be walked exponentially often
            raise Refused(f"the module {prefix[:-1]} in two places, or in more than {MAX_DEPTH} others")
        seen.add(id(module))
        state = _state(module)
        members: dict[str, Tensor | Inert | None] = {}
        for kind, expected in (("_parameters", Tensor), ("_buffers", Tensor), ("_modules", Inert)):
            table = state.get(kind)
            if type(table) is not dict:
                raise Refused(f"a module without {kind}")
            for name, member in table.items():
                if not _is_name(name):
                    raise Refused(f"the name {shown(name)} in {kind}")
                if member is not None and type(member) is not expected or name in members:
                    raise Refused(f"{shown(member)} as the member {prefix}{name}")
                members[name] = member
        for name, member in members.items():
            if isinstance(member, Inert):
                yield from walk(member, f"{prefix}{name}.", depth + 1)
            elif member is not None:
                yield prefix + name, member

    return walk(network, "", 1)


def _state(module: Inert) -> dict[str, Any]:
    if type(module.state) is not dict:
        raise Refused(f"a {module.class_name} without a state")
    return module.state


def _persistent_object(arguments: tuple) -> Inert:
    """An object of EDM's, whose module's source code the pickle carries along: nobody looks at that."""
    match arguments:
        case ({"class_name": str(class_name), "state": dict(state)},) if _is_name(class_name):
            return Inert(class_name, state)
    raise Refused("an object of EDM's without its class and state")


def _parameter(arguments: tuple) -> Tensor:
    match arguments:
        case (Tensor() as tensor, bool(), dict()):  # requires_grad, hooks
            return tensor
    raise Refused("a parameter without its tensor")


def _empty_dict(arguments: tuple) -> dict[str, Any]:
    if arguments:
        raise Refused("a dictionary made in an unexpected way")
    return {}


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class _StorageType:
    """What stands in a pickled storage for its elements."""

    dtype: torch.dtype
    num_elements: int


def _storage_type(description: Any) -> _StorageType:
    match description:
        case ("storage", Global() as kind, str(), str(), int(num_elements), None):  # a key, the device it was on
            return _StorageType(STORAGES[kind.module, kind.name], num_elements)
    raise Refused("a storage without its type")


def _is_name(text: str) -> bool:
    return 0 < len(text) <= MAX_NAME and text.isascii() and text.replace("_", "a").isalnum()


class _TensorReader:
    """Makes tensors of at most `max_bytes` in all: as storages, and once more as views of them."""

    def __init__(self, max_bytes: int):
        self.storage_bytes_left = self.view_bytes_left = max_bytes

    def storage(self, arguments: tuple) -> Tensor:
        """A storage, as a tensor of one dimension, from its pickled form: five pickles, a count, the elements."""
        match arguments:
            case (bytes(content),):
                self.storage_bytes_left -= len(content)
            case _:
                raise Refused("a storage without its bytes")
        if self.storage_bytes_left < 0:
            raise Refused("storages of more bytes than the file")
        file = io.BytesIO(content)

        def next_pickle(builders: inert_pickle.Builders, **options: Any) -> Any:
            return inert_pickle.read(file, builders, max_operations=MAX_TENSOR_OPERATIONS, **options)

        magic_number, version, system = next_pickle({}), next_pickle({}), next_pickle({})
        if magic_number != MAGIC_NUMBER or version != PROTOCOL_VERSION:
            raise Refused("a storage in another format than that of torch before its zip files")
        if type(system) is not dict or system.get("little_endian") is not True:
            raise Refused("a storage that is not little-endian")
        storage = next_pickle(dict.fromkeys(STORAGES), persistent=_storage_type)
        next_pickle({})  # the keys of the storages that follow: one
        if type(storage) is not _StorageType:
            raise Refused("a storage without its type")
        num_elements = int.from_bytes(file.read(8), "little", signed=True)
        data = bytearray(file.read())
        num_bytes = num_elements * storage.dtype.itemsize
        if num_elements < 1 or num_elements != storage.num_elements or num_bytes != len(data):
            raise Refused(f"a storage of {len(data)} bytes, which do not fit its {storage.num_elements} elements")
        return torch.frombuffer(data, dtype=storage.dtype)

    def view(self, arguments: tuple) -> Tensor:
        """A tensor inside its storage."""
        match arguments:
            case (Tensor() as storage, int(offset), tuple(size), tuple(stride), bool(), dict()):
                pass
            case _:
                raise Refused("a tensor without its storage, size and stride")
        numbers = (offset, *size, *stride)
        if not len(size) == len(stride) <= MAX_DIMENSIONS or not all(type(number) is int for number in numbers):
            raise Refused("a tensor of a size and stride that do not fit")
        limit = storage.numel()
        last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
        if min(size, default=1) < 1 or min(numbers) < 0 or max(numbers) > limit or not last < limit >= math.prod(size):
            raise Refused("a tensor that reaches beyond its storage")
        self.view_bytes_left -= math.prod(size) * storage.itemsize
        if self.view_bytes_left < 0:
            raise Refused("tensors of more bytes than the file")
        return storage.as_strided(size, stride, offset)
