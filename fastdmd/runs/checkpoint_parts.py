"""Of a checkpoint, the tensors of which each process has a part: written and read by all, with
`torch.distributed.checkpoint`.

.metadata, __0_0.distcp, ...   of each process a file; another number of processes reads them, too
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdmd.files import sum_line
from fastdmd.ranks import Ranks
from fastdmd.shards import unfilled

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
    own: list[str] = []
    fault: OSError | None = None
    try:
        names = [".metadata"] * ranks.is_first + [path.name for path in folder.glob(f"__{ranks.rank}_*")]
        own = [sum_line(folder / name) for name in names]
    except OSError as error:
        fault = error
    found = ranks.gather_objects((own, fault))
    for _, other in found:
        if other is not None:
            raise other
    return [line for lines, _ in found for line in lines]


def read(folder: Path, parts: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Fills these tensors with what `write` has written of as many, in however many processes. Raises ValueError, in
    all of them, where it has not."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint import CheckpointException, FileSystemReader

    try:
        with ranks.reaching_all():
            checkpoint.load(dict(parts), storage_reader=FileSystemReader(folder), process_group=ranks.group)
    except CheckpointException as error:
        raise ValueError(_first(error)) from error


def _first(error: Any) -> str:
    """Of what processes say, that of the first which has a fault, on one line."""
    failures = error.failures
    fault = failures[min(failures)][0]
    return f"{type(fault).__name__}: {' '.join(str(fault).split()):.200}"
