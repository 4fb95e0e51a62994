"""One process writes a run: a lock that the kernel frees when that process ends, however it does."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import BinaryIO

from fastdmd.reading import require_regular

try:
    import fcntl
except ModuleNotFoundError:  # a system without such locks
    fcntl = None  # type: ignore[assignment]

NUM_TRIES = 4  # before the last one: who only asks whether a file is locked has it for a moment
WAIT_SECONDS = 0.02


def locked(path: Path) -> BinaryIO:
    """The file, made where there is none, and locked until it is closed.

    Raises BlockingIOError, naming its folder and, where the system tells, the process, where another one has the lock.
    Where system or file system know none, nobody is kept out.
    """
    file = open(path, "ab")
    for is_last in (*[False] * NUM_TRIES, True):
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if is_last:
                owner = _owner(file)
                file.close()
                raise BlockingIOError(
                    f"fastdmd: expected a run folder that nobody writes to, got {path.parent}, where another run writes"
                    f"{'' if owner is None else f', of process {owner}'}"
                ) from None
            time.sleep(WAIT_SECONDS)
        except OSError:  # some file systems of networks
            break
    return file


def require_free(path: Path) -> None:
    """Raises BlockingIOError, as `locked` does, where another process has locked a file that there may be; ValueError
    for what is none."""
    if path.exists() and os.access(path, os.W_OK):  # who writes to it could
        require_regular(path)  # to open a pipe would wait for its other end
        locked(path).close()


def _owner(file: BinaryIO) -> int | None:
    """The process that has locked it, as Linux tells; None where it does not."""
    try:
        lines = Path("/proc/locks").read_text().splitlines()
        inode = os.fstat(file.fileno()).st_ino
    except OSError:
        return None
    for words in map(str.split, lines):  # 1: FLOCK ADVISORY WRITE 1234 fe:00:56789 0 EOF
        if words[1:2] == ["FLOCK"] and words[5:] and words[5].rpartition(":")[2] == str(inode):
            return int(words[4])
    return None
