"""Of a checkpoint, the tensors of which each process has a part: written and read by all, with
`torch.distributed.checkpoint`.

.metadata, __0_0.distcp, ...   of each process a file; another number of processes reads them, too
"""

from __future__ import annotations

import errno
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdmd.files import SUMS, read_sums, sum_line
from fastdmd.ranks import Ranks
from fastdmd.shards import unfilled

METADATA = ".metadata"
NAMES = {  # what it is made of
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "TensorStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "float32", "float64"},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},
}
PART = "$part"  # with shape and dtype, the key of what stands for such a tensor in state.json
DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.float64)}


def is_part(value: Tensor) -> bool:
    return hasattr(value, "to_local")


def described(place: str, value: Tensor) -> dict[str, Any]:
    """What JSON says of one."""
    return {PART: place, "shape": list(value.shape), "dtype": str(value.dtype)}


def empty(entry: Mapping[str, Any], ranks: Ranks) -> Tensor:
    """Memory for what JSON describes. Raises ValueError or TypeError for what is no description."""
    shape, dtype = entry["shape"], DTYPES.get(entry["dtype"])
    if dtype is None or not shape or not all(type(size) is int and size > 0 for size in shape):
        raise ValueError(f"expected shape and dtype of a tensor, got {entry!s:.100}")
    return unfilled(shape, dtype, ranks.group)


def write(folder: Path, parts: Mapping[str, Tensor], ranks: Ranks) -> list[str]:
    """Writes all parts into a folder that is there; returns, of all processes, the lines of checksums.

    Raises OSError, in all of them.
    """
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint import CheckpointException, FileSystemWriter

    try:
        with ranks.reaching_all():
            checkpoint.save(dict(parts), storage_writer=FileSystemWriter(folder), process_group=ranks.group)
    except CheckpointException as error:
        raise OSError(errno.EIO, _first(error), str(folder)) from error

    def sums() -> list[str]:
        names = [METADATA] * ranks.is_first + [path.name for path in folder.glob(f"__{ranks.rank}_*")]
        return [sum_line(folder / name) for name in names]

    return [line for lines in ranks.gather_objects(ranks.together(sums)) for line in lines]


def read(folder: Path, parts: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Fills these tensors with what `write` has written of as many, in however many processes. Raises ValueError, in
    all of them, where it has not, and for a file without a checksum, which whoever calls this has compared."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint import CheckpointException, FileSystemReader

    class Reader(FileSystemReader):
        """torch's, but for a pickle that it would let call anything."""

        def read_metadata(self, *_: Any, **__: Any) -> Any:
            known = read_sums(folder).keys()  # by their checksums, at which somebody has looked
            if METADATA not in known:
                raise ValueError(f"expected {METADATA} in {SUMS}, got none")
            with (folder / METADATA).open("rb") as file:
                metadata = _Metadata(file).load()
            if others := {own.relative_path for own in metadata.storage_data.values()} - known:
                raise ValueError(f"expected parts that {SUMS} names, got {min(others):.100}")
            metadata.storage_meta.load_id = self.load_id
            return metadata

    try:
        with ranks.reaching_all():
            checkpoint.load(dict(parts), storage_reader=Reader(folder), process_group=ranks.group)
    except CheckpointException as error:
        raise ValueError(_first(error)) from error


class _Metadata(pickle.Unpickler):
    """Makes what torch writes there, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in NAMES.get(module, ()):
            raise ValueError(f"expected shapes and places of tensors in {METADATA}, got {module}.{name}")
        return super().find_class(module, name)


def _first(error: Any) -> str:
    """Of what processes say, that of the first which has a fault, on one line."""
    failures = error.failures
    fault = failures[min(failures)][0]
    return f"{type(fault).__name__}: {' '.join(str(fault).split()):.200}"
