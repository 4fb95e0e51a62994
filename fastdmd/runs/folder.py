"""The folder of one run."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastdmd import files
from fastdmd.runs import outputs

NAMES = ("config.json", "metrics.jsonl", "samples.png", "summary.json", "generator.safetensors", "teacher.safetensors")


class RunFolder:
    """The folder of one run: `config.json`, `metrics.jsonl`, `samples.png`, weights and `summary.json`.

    Raises FileExistsError if the folder already holds something of a run, OSError if it cannot be written; nothing that
    was there before is touched.
    """

    def __init__(self, path: Path, config: dict[str, Any]):
        require_new(path)
        self.path = path
        self._made = [folder for folder in (path, *path.parents) if not folder.exists()]  # deepest first
        with files.undone_on_failure(self.discard):
            path.mkdir(parents=True, exist_ok=True)
            self.write_json("config.json", config)
            (path / "metrics.jsonl").touch()

    def discard(self) -> None:
        """Leaves the place as it was before."""
        for name in NAMES:
            (self.path / name).unlink(missing_ok=True)
        for folder in self._made:
            folder.rmdir()  # fails, as it should, where somebody has put something else

    @contextlib.contextmanager
    def being_set_up(self) -> Iterator[None]:
        """What fails or is ended inside leaves nothing behind."""
        with files.undone_on_failure(self.discard):
            yield

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        text = json.dumps(content, indent=2, default=str, allow_nan=False) + "\n"
        files.write_atomically(self.path / name, lambda file: file.write(text.encode()))

    def log(self, **values: Any) -> None:
        """A line of metrics.jsonl. Raises OSError where it cannot be written, in a folder that is gone too."""
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(values, allow_nan=False) + "\n")


def require_new(path: Path) -> None:
    """Raises OSError unless a run can be written there: in a folder without one, or where a folder can be made."""
    if found := [name for name in NAMES if (path / name).exists()]:
        raise FileExistsError(
            f"fastdmd: expected a new folder for --out, got {path}, which already holds a run's {found[0]}"
        )
    outputs.require_folder(path)
