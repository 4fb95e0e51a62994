"""The folder of one run."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdmd import files
from fastdmd.runs import outputs
from fastdmd.runs.lock import locked, require_free

if TYPE_CHECKING:
    from typing_extensions import Self

GENERATOR = "generator.safetensors"  # the average that a run keeps, as it was last
BEST = "best.safetensors"  # as it was when it measured best
NETWORKS = "networks.safetensors"  # what a second stage starts from, see `stages`; optimizers are not in it
CONFIG = "config.json"
METRICS = "metrics.jsonl"  # which is locked, too, as long as somebody writes here
EVALUATIONS = "evaluation.jsonl"
PLOT = "quality.png"
RECORD = "record.json"  # what is kept of it elsewhere, see `record`
REPORT = "report.html"
EVENTS = "tensorboard"  # a folder of event files
SAMPLES = "samples.png"
SUMMARY = "summary.json"  # of a run that has ended
CHECKPOINTS = "checkpoints"
FOLDERS = (CHECKPOINTS, EVENTS)
NAMES = (
    CONFIG,
    METRICS,
    EVALUATIONS,
    SAMPLES,
    PLOT,
    RECORD,
    REPORT,
    SUMMARY,
    GENERATOR,
    BEST,
    NETWORKS,
    "teacher.safetensors",
)


def require_file(out: Path) -> None:
    """As `outputs.require_file`; raises FileExistsError for the name of a file that a run keeps, in its folder."""
    outputs.require_file(out)
    if out.name in NAMES and (out.parent / METRICS).is_file():
        raise FileExistsError(f"expected --out apart from the files of the run in {out.parent}, got {out}")


class RunFolder:
    """The folder of one run: settings, losses, figures, pictures, weights and `summary.json`, under `NAMES`.

    Raises FileExistsError if the folder already holds something of a run, OSError if it cannot be written; nothing that
    was there before is touched.
    """

    is_written = True  # by this process

    def __init__(self, path: Path, config: dict[str, Any]):
        require_new(path)
        self.path, self.config = path, config
        self._made = [folder for folder in (path, *path.parents) if not folder.exists()]  # deepest first
        with files.undone_on_failure(self._remove_made):
            path.mkdir(parents=True, exist_ok=True)
            self._lock = locked(path / METRICS)  # somebody else's files stay, should they have been quicker
        with files.undone_on_failure(self.discard):
            files.remove_partial(path)
            self.write_json(CONFIG, config)

    def discard(self) -> None:
        """Leaves the place as it was before."""
        for name in NAMES:
            (self.path / name).unlink(missing_ok=True)
        shutil.rmtree(self.path / EVENTS, ignore_errors=True)
        self.close()
        self._remove_made()

    def close(self) -> None:
        """From here on another process may write to it."""
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _remove_made(self) -> None:
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
        self.append(METRICS, [values])

    def append(self, name: str, lines: Iterable[Mapping[str, Any]]) -> None:
        """Lines of JSON, which has no NaN and no infinity: such a number is null. Raises as `log` does, and then the
        file is as it was: a disk that fills up takes a part of a line."""
        text = "".join(json.dumps(_as_json(line), allow_nan=False) + "\n" for line in lines)
        path = self.path / name
        before = path.stat().st_size if path.exists() else 0
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(text)
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(path, before)
            raise

    def reached(self) -> dict[str, dict[str, Any]]:
        """How far the files that grow have come, all of which the disk has by then: their bytes, and a checksum."""
        paths = [path for name in (METRICS, EVALUATIONS) if (path := self.path / name).exists()]
        for path in paths:
            files.flush(path)
        return {
            path.name: {"bytes": (length := path.stat().st_size), "sha256": files.digest(path, length)}
            for path in paths
        }

    def require(self, reached: Mapping[str, Mapping[str, Any]]) -> None:
        """Raises ValueError where a file does not begin with what it had when it had come so far."""
        if METRICS not in reached or not reached.keys() <= {METRICS, EVALUATIONS}:
            raise ValueError(f"expected what {METRICS} had come to, got {', '.join(reached) or 'nothing'}")
        for name, then in reached.items():
            path, length = self.path / name, then["bytes"]
            if (got := path.stat().st_size if path.exists() else 0) < length:
                raise ValueError(f"expected at least {length} bytes of {path}, got {got}")
            if files.digest(path, length) != then["sha256"]:
                raise ValueError(f"expected {path} to begin with what the run had logged, got something else")

    def go_back(self, reached: Mapping[str, Mapping[str, Any]], best: Path | None) -> None:
        """To when its files had come so far, and `best` was the best. Killed inside, it goes back once more."""
        files.remove_partial(self.path)
        files.remove_partial(self.path / CHECKPOINTS)
        for name in (METRICS, EVALUATIONS):
            if name in reached:
                os.truncate(self.path / name, reached[name]["bytes"])
            else:
                (self.path / name).unlink(missing_ok=True)
        own = self.path / BEST
        if best is None:
            own.unlink(missing_ok=True)
        elif not own.exists() or not own.samefile(best):  # of two names of one file, none replaces the other
            with files.replacing(own) as partial:
                files.copy(best, partial)
        self._start()

    def _start(self) -> None:
        """A run that has ended goes on, perhaps with other settings."""
        for name in (SUMMARY, REPORT):
            (self.path / name).unlink(missing_ok=True)
        self.write_json(CONFIG, self.config)


class SilentFolder(RunFolder):
    """The same for a process that writes nothing, as another one does."""

    is_written = False

    def __init__(self, path: Path, config: dict[str, Any]):
        self.path, self.config = path, config

    def discard(self) -> None: ...

    def close(self) -> None: ...

    def write_json(self, name: str, content: dict[str, Any]) -> None: ...

    def append(self, name: str, lines: Iterable[Mapping[str, Any]]) -> None: ...

    def go_back(self, reached: Mapping[str, Mapping[str, Any]], best: Path | None) -> None: ...


class ReopenedFolder(RunFolder):
    """The folder of a run that goes on: it stays as it is until it goes back, or begins where nothing was reached.

    Raises OSError where it cannot be written, or somebody else writes to it.
    """

    def __init__(self, path: Path, config: dict[str, Any]):
        outputs.require_folder(path)
        self.path, self.config = path, config
        self._lock = locked(path / METRICS)

    def begin(self) -> None:
        files.remove_partial(self.path)
        for name in {*NAMES} - {CONFIG, METRICS}:
            (self.path / name).unlink(missing_ok=True)
        shutil.rmtree(self.path / EVENTS, ignore_errors=True)
        os.truncate(self.path / METRICS, 0)
        self._start()

    def discard(self) -> None:
        """Nothing of what there is."""
        self.close()


def _as_json(line: Mapping[str, Any]) -> dict[str, Any]:
    is_known = {name: not isinstance(value, float) or math.isfinite(value) for name, value in line.items()}
    return {name: value if is_known[name] else None for name, value in line.items()}


def require_new(path: Path) -> None:
    """Raises OSError unless a run can be written there: in a folder without one, or where a folder can be made."""
    require_free(path / METRICS)  # of two that start at once, the slower one is told of the other
    if found := names_in(path):
        raise FileExistsError(
            f"fastdmd: expected a new folder for --out, got {path}, which already holds a run's {found[0]}; "
            "--resume auto goes on with a run"
        )
    outputs.require_folder(path)


def names_in(path: Path) -> list[str]:
    """What a folder holds of a run, or may hold of one."""
    return [name for name in (*NAMES, *FOLDERS) if (path / name).exists()]
