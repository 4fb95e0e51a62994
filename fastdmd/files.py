"""What reaches the disk is whole: written beside its place, flushed, and put there in one replacement."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

_unfinished: set[Path] = set()


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """A reader sees the old file or the new one, never half of one, whatever happens in between.

    Whatever `write` or the disk raises passes through; the old file is whole then, and nothing lies beside it.
    """
    partial = path.with_name(path.name + ".partial")
    _unfinished.add(partial)
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        _unfinished.discard(partial)


def remove_unfinished() -> None:
    """For a process that is about to end in the middle of a write."""
    for partial in tuple(_unfinished):
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
