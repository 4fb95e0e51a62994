"""Which sources the native libraries are of: setup.py builds the digest into them, `_native` compares it."""

from __future__ import annotations

import hashlib
from pathlib import Path

SUFFIXES = {".h", ".cpp", ".cuh", ".cu"}


def digest(root: Path) -> str | None:
    """Of names and contents of what a checkout compiles; None where there are no sources, as beside a wheel, or they
    cannot be read."""
    lists = root / "CMakeLists.txt"
    found = hashlib.sha256()
    try:
        files = sorted(file for file in (root / "csrc").rglob("[!.]*") if file.suffix in SUFFIXES and file.is_file())
        if not files or not lists.is_file():
            return None
        for file in [lists, *files]:
            content = file.read_bytes()
            found.update(f"{file.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    except OSError:
        return None
    return found.hexdigest()[:16]
