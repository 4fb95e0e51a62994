"""What reaches the disk is whole: written beside its place, flushed, and put there in one replacement."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from fastdmd import reading

SUMS = "SHA256SUMS"
MAX_SUMS_BYTES = 1 << 24  # a hundred thousand shards
PARTIAL = ".fastdmd-"  # how the name of what is half written begins

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
    partial = _beside(path)
    with undone_on_failure(lambda: partial.unlink(missing_ok=True)), _named(path, partial):
        yield partial
        os.replace(partial, path)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` that nobody uses: with the files that are put there it becomes `path`, which is new, when
    the disk has all of it. Raises as `write_atomically` does."""
    partial = _beside(path)
    with undone_on_failure(lambda: shutil.rmtree(partial)), _named(path, partial):
        partial.mkdir()
        yield partial
        for part in (*partial.iterdir(), partial):
            flush(part)
        os.rename(partial, path)
        flush(path.parent)


def remove_folder(path: Path) -> None:
    """Nobody sees half of it left. A file of that name goes, too."""
    partial = _beside(path)
    os.rename(path, partial)
    _remove(partial)


def remove_partial(folder: Path) -> None:
    """What processes that were killed have left half written there; for the only one that writes there."""
    for path in folder.glob(f"{PARTIAL}*"):
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def copy(source: Path, target: Path) -> None:
    """Under a second name where the disk knows such: it stays when another file takes the place of the source."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def flush(path: Path) -> None:
    """Waits until the disk has a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(path: Path, length: int | None = None) -> str:
    """SHA-256 of a file, or of so many bytes of its beginning, in hexadecimal."""
    sha256 = hashlib.sha256()
    with reading.open_regular(path) as file:
        left = os.fstat(file.fileno()).st_size if length is None else length
        while left > 0 and (chunk := file.read(min(left, 1 << 22))):
            sha256.update(chunk)
            left -= len(chunk)
    return sha256.hexdigest()


def sum_line(path: Path) -> str:
    """Of a file, as `sha256sum` writes it in its folder."""
    return f"{digest(path)}  {path.name}\n"


def read_sums(folder: Path) -> dict[str, str]:
    """The digests that a folder's `SHA256SUMS` has, by the names of their files; the last one of a name counts.

    Raises ValueError for names that lead out of the folder, OSError where there is no such file."""
    with reading.open_regular(folder / SUMS) as file:
        lines = reading.read_all(file, MAX_SUMS_BYTES).decode("utf-8").splitlines()
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    if others := [name for name in sums if Path(name).name != name]:
        raise ValueError(f"{SUMS} with {others[0]!r:.80}")
    return sums


def _beside(path: Path) -> Path:
    return path.with_name(f"{PARTIAL}{secrets.token_hex(8)}")


@contextlib.contextmanager
def _named(path: Path, partial: Path) -> Iterator[None]:
    """Errors name `path`, of which nobody knows another name."""
    try:
        yield
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
