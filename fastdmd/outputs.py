"""Whether a result can be written where `--out` says, asked before anything long begins; nothing is left behind."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path


def require_file(path: Path) -> None:
    """Raises OSError unless `write_atomically` can write there: the name of a file, new or old, in a folder that takes
    one more. Devices, pipes and sockets are refused, since a file would take their place."""
    with _naming(path):
        if path.is_dir():
            raise IsADirectoryError(f"expected --out to be a file, got the folder {path}")
        if not path.parent.is_dir():
            raise FileNotFoundError(f"expected --out in an existing folder, got {path}")
        if path.exists() and not path.is_file():
            raise OSError(f"expected --out to be a file, got {path}, a device or a pipe")
        partial = path.with_name(path.name + ".partial")
        if not partial.exists():  # one that is there lies in a folder that takes files
            with open(partial, "xb"):
                pass
            partial.unlink()


def require_folder(path: Path) -> None:
    """Raises OSError unless files can be written there: in a folder, or where one can be made."""
    made: list[Path] = []
    with _naming(path):
        if path.exists() and not path.is_dir():
            raise FileExistsError(f"fastdmd: expected a folder for --out, got the file {path}")
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        try:
            for folder in reversed(missing):
                folder.mkdir()
                made.append(folder)
            with tempfile.NamedTemporaryFile(dir=path, prefix=".fastdmd-"):
                pass
        finally:
            for folder in reversed(made):
                with contextlib.suppress(OSError):  # somebody else's by now
                    folder.rmdir()


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors of the system say which file, and not always that of the user."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise type(error)(f"expected --out to be writable, got {path}: {error.strerror}") from error
