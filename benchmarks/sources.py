"""What a stored result was measured of: hashes of the files that decide about it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


def source_hashes(patterns: Sequence[str], root: Path = ROOT) -> dict[str, str]:
    """SHA-256 of each file that they name, shortened. Raises FileNotFoundError for a pattern that names none."""
    hashes = {}
    for pattern in patterns:
        paths = sorted(path for path in root.glob(pattern) if path.is_file())
        if not paths:
            raise FileNotFoundError(f"benchmarks.sources: expected files named {pattern}, got none")
        hashes |= {path.relative_to(root).as_posix(): _hash(path) for path in paths}
    return hashes


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
