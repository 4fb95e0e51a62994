"""What reaches the disk is whole: written beside its place, flushed, and put there in one replacement."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

_undo: list[Callable[[], None]] = []  # of what is half done at this moment


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """A reader sees the old file or the new one, never half of one, whatever happens in between.

    Whatever `write` or the disk raises passes through; the old file is whole then, and nothing lies beside it.
    """
    partial = path.with_name(path.name + ".partial")
    with undone_on_failure(lambda: partial.unlink(missing_ok=True)):
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)


@contextlib.contextmanager
def undone_on_failure(undo: Callable[[], Any]) -> Iterator[None]:
    """Calls `undo` where what is inside raises, or where `undo_all` ends it."""

    def without_errors() -> None:
        with contextlib.suppress(OSError):
            undo()

    _undo.append(without_errors)
    try:
        yield
    except BaseException:
        without_errors()
        raise
    finally:
        _undo.remove(without_errors)


def undo_all() -> None:
    """For a process that is about to end in the middle of something."""
    for undo in reversed(_undo):
        undo()
