"""Whether a result can be written where `--out` says, asked before anything long begins; nothing is left behind."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path


def require_apart(out: Path, inputs: Iterable[str | Path]) -> None:
    """Raises ValueError where `out` is one of the inputs, lies in a folder that is one, or holds it.

    An input is a path, or the code `package.module:name`; what is no path of anything has nothing to lose.
    """
    real_out = Path(os.path.realpath(out))
    for given in inputs:
        text = str(given)
        package, colon, _ = text.partition(":")
        code = [f"{package.replace('.', os.sep)}{end}" for end in (".py", f"{os.sep}__init__.py")] if colon else []
        for path in map(Path, (text, *code)):
            if not os.path.exists(path):
                continue
            real = Path(os.path.realpath(path))
            within_folder = path.is_dir() and (real in real_out.parents or real_out in real.parents)
            if real == real_out or within_folder or (out.exists() and os.path.samefile(out, path)):
                raise ValueError(f"expected --out apart from what the command reads, got {out} beside {text}")


def require_file(path: Path) -> None:
    """Raises OSError unless `write_atomically` can write there: the name of a file, new or old, in a folder that takes
    one more. Devices, pipes and sockets are refused, since a file would take their place."""
    _require_no_home(path)
    with _naming(path):
        if path.is_dir():
            raise IsADirectoryError(f"expected --out to be a file, got the folder {path}")
        if not path.parent.is_dir():
            raise FileNotFoundError(f"expected --out in an existing folder, got {path}")
        with contextlib.suppress(FileNotFoundError):
            os.lstat(path)  # refuses a name that cannot be, which `exists` may not
        if path.exists() and not path.is_file():
            raise OSError(f"expected --out to be a file, got {path}, a device or a pipe")
        _try_folder(path.parent)


def require_folder(path: Path) -> None:
    """Raises OSError unless files can be written there: in a folder, or where one can be made."""
    made: list[Path] = []
    _require_no_home(path)
    with _naming(path):
        if path.exists() and not path.is_dir():
            raise FileExistsError(f"fastdmd: expected a folder for --out, got the file {path}")
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        try:
            for folder in reversed(missing):
                folder.mkdir()
                made.append(folder)
            _try_folder(path)
        finally:
            for folder in reversed(made):
                with contextlib.suppress(OSError):  # somebody else's by now
                    folder.rmdir()


def _require_no_home(path: Path) -> None:
    """A shell replaces `~` after a blank, and leaves it after `=`."""
    if os.path.expanduser(path) != str(path):
        raise FileNotFoundError(f"expected --out without ~, which the shell has left as it is, got {path}")


def _try_folder(folder: Path) -> None:
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".fastdmd-"):
        pass


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors of the system say which file, and not always that of the user."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        named = type(error)(f"expected --out to be writable, got {path}: {error.strerror}")
        named.errno = error.errno
        raise named from error
