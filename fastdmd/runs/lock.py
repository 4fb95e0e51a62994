"""One process writes a run: a lock that the kernel frees when that process ends, however it does."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ModuleNotFoundError:  # a system without such locks
    fcntl = None  # type: ignore[assignment]


def locked(path: Path) -> BinaryIO:
    """The file, made where there is none, and locked until it is closed.

    Raises BlockingIOError, naming its folder, where another process has the lock. Where system or file system know
    none, nobody is kept out.
    """
    file = open(path, "ab")
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise BlockingIOError(
            f"fastdmd: expected a run folder that nobody writes to, got {path.parent}, where a run goes on"
        ) from None
    except OSError:  # some file systems of networks
        pass
    return file
