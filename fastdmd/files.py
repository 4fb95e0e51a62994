"""What reaches the disk is whole: written beside its place, flushed, and put there in one replacement."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

_undo: list[Callable[[], None]] = []  # of what is half done at this moment


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """A reader sees the old file or the new one, never half of one, whatever happens in between.

    Whatever `write` or the disk raises passes through, the latter naming `path`; the old file is whole then, and
    nothing lies beside it.
    """
    with replacing(path) as partial, open(partial, "xb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` that nobody uses: the file that is made there takes the place of `path` at the end."""
    partial = path.with_name(f".fastdmd-{secrets.token_hex(8)}")
    with undone_on_failure(lambda: partial.unlink(missing_ok=True)):
        try:
            yield partial
            os.replace(partial, path)
        except OSError as error:
            if error.errno is not None and error.filename in (None, str(partial)):
                raise OSError(error.errno, error.strerror, str(path)) from error
            raise


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
