"""The folder of one run."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fastdmd import files
from fastdmd.runs import outputs

GENERATOR = "generator.safetensors"  # the average that a run keeps, as it was last
BEST = "best.safetensors"  # as it was when it measured best
NETWORKS = "networks.safetensors"  # what a second stage starts from, see `stages`; optimizers are not in it
EVALUATIONS = "evaluation.jsonl"
PLOT = "quality.png"
NAMES = (
    "config.json",
    "metrics.jsonl",
    EVALUATIONS,
    "samples.png",
    PLOT,
    "summary.json",
    GENERATOR,
    BEST,
    NETWORKS,
    "teacher.safetensors",
)


class RunFolder:
    """The folder of one run: settings, losses, figures, pictures, weights and `summary.json`, under `NAMES`.

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
        self.append("metrics.jsonl", [values])

    def append(self, name: str, lines: Iterable[Mapping[str, Any]]) -> None:
        """Lines of JSON, which has no NaN and no infinity: such a number is null. Raises as `log` does."""
        text = "".join(json.dumps(_as_json(line), allow_nan=False) + "\n" for line in lines)
        with open(self.path / name, "a", encoding="utf-8") as file:
            file.write(text)


def _as_json(line: Mapping[str, Any]) -> dict[str, Any]:
    is_known = {name: not isinstance(value, float) or math.isfinite(value) for name, value in line.items()}
    return {name: value if is_known[name] else None for name, value in line.items()}


def require_new(path: Path) -> None:
    """Raises OSError unless a run can be written there: in a folder without one, or where a folder can be made."""
    if found := [name for name in NAMES if (path / name).exists()]:
        raise FileExistsError(
            f"fastdmd: expected a new folder for --out, got {path}, which already holds a run's {found[0]}"
        )
    outputs.require_folder(path)
