"""`--resume`: what a folder holds of a run, with which settings it may go on, and with which it may not."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastdmd import __version__, files
from fastdmd.networks.tensor_files import read_json
from fastdmd.networks.weights import iterations_of
from fastdmd.ranks import ALONE, Ranks
from fastdmd.reading import last_line, parse_json, require_regular
from fastdmd.runs import checkpoint, terminal
from fastdmd.runs.checkpoints import Checkpoints, CheckpointSettings, found
from fastdmd.runs.cli import to_json
from fastdmd.runs.continuity import RunConfig, require_same_origin, require_same_settings, roundings
from fastdmd.runs.folder import (
    CONFIG,
    EVALUATIONS,
    FOLDERS,
    METRICS,
    SUMMARY,
    ReopenedFolder,
    RunFolder,
    names_in,
    require_new,
)
from fastdmd.runs.lock import require_free
from fastdmd.runs.machine import versions
from fastdmd.runs.progress import ENDED_EARLY

AUTO = "auto"


def with_those_of_run(arguments: Sequence[str]) -> list[str]:
    """The arguments of a command; of `--resume RUN` those that the run was begun with, and then these.

    Raises ValueError where there is no run to ask, or `--out` is another folder.
    """
    folder = _value(arguments, "--resume")
    if folder in (None, AUTO):
        return list(arguments)
    given = [*arguments, "--out", folder, "--resume", AUTO]
    if (out := _value(arguments, "--out")) is not None and os.path.realpath(out) != os.path.realpath(folder):
        raise ValueError(f"expected no --out beside --resume {folder}, got {out}")
    fault: Exception = ValueError(f"expected --resume to be the folder of a run with a checkpoint, got {folder}")
    for path in found(Path(folder)):
        try:
            then = checkpoint.read_rest(path)["origin"]["arguments"]
            if not isinstance(then, list) or not all(isinstance(argument, str) for argument in then):
                raise ValueError(f"expected the arguments of a run in {path}, got {then!r:.80}")
            return [*then, *given]
        except (ValueError, KeyError, TypeError) as error:
            fault = error
    raise fault


@dataclasses.dataclass(frozen=True)
class Past:
    """What a folder holds of a run."""

    path: Path
    config: Mapping[str, Any] | None  # None: it was ended before that was written
    summary: Mapping[str, Any] | None
    checkpoints: Sequence[Path]

    @classmethod
    def of(cls, path: Path) -> Past | None:
        """None where there is nothing of a run. Raises OSError where a process writes to it."""
        if not names_in(path):
            return None
        require_free(path / METRICS)
        return cls.read(path)

    @classmethod
    def read(cls, path: Path) -> Past:
        """Raises ValueError where something is no part of a run."""
        for folder in (path / name for name in FOLDERS):
            if (folder.exists() or folder.is_symlink()) and not folder.is_dir():
                raise ValueError(f"expected a folder in {folder}, got something else, or a link to nothing")
        for name in names_in(path):
            if name not in FOLDERS:
                require_regular(path / name)
        return cls(path, _read(path / CONFIG), _read(path / SUMMARY), found(path))

    def require_same(self, config: RunConfig) -> None:
        """Raises ValueError for a setting that may not change, and where there is a run but nothing to go on from."""
        if self.config is None:
            if names_in(self.path) != [METRICS] or (self.path / METRICS).stat().st_size:  # not killed as it was made
                raise ValueError(f"expected a run's {CONFIG} in {self.path}, got {names_in(self.path)[0]} without")
            return
        require_same_settings(config, self.config, is_measured=(self.path / EVALUATIONS).exists())
        whole = [int(path.name) for path in self.checkpoints if (path / files.SUMS).exists()]
        if whole and config.iterations < whole[0]:
            raise ValueError(f"expected --iterations >= {whole[0]}, which the run has reached, got {config.iterations}")
        if not self.checkpoints and not self.is_complete(config):
            self._require_nothing_lost()

    def _require_nothing_lost(self) -> None:
        """Raises ValueError where a run has come further than one without a checkpoint can have; it would begin again,
        over its results."""
        iteration, seconds = self._reached()
        if iteration == 0:
            return
        assert self.config is not None
        kept = self.config.get("checkpoint")
        settings = None
        if kept is not None:  # which runs from before do not have
            try:
                settings = CheckpointSettings(**kept)
                settings.check()
            except (TypeError, ValueError, AttributeError) as error:
                raise ValueError(f"expected a run's settings in {self.path / CONFIG}, got {kept!s:.80}") from error
        if settings is None or settings.is_off:
            raise ValueError(f"expected a checkpoint in {self.path}, got a run with --checkpoint-every 0")
        is_past = 0 < settings.iterations <= iteration or 0 < settings.seconds <= seconds
        if is_past or (self.summary or {}).get("outcome") == "complete":
            raise ValueError(
                f"expected a checkpoint in {self.path}, got none of a run of {iteration} iterations; begin anew in "
                "another --out"
            )
        terminal.say(f"{self.path} has no checkpoint yet: the run begins again, with its first {iteration} iterations")

    def _reached(self) -> tuple[int, float]:
        """Iterations and seconds, at least, by its log, its weights and its summary: one may be lost, or not begun."""
        iteration, seconds = _logged(self.path / METRICS)
        if type(told := (self.summary or {}).get("iterations")) is int:
            iteration = max(iteration, told)
        began = (self.path / CONFIG).stat().st_mtime
        for path in (self.path / name for name in names_in(self.path) if name.endswith(".safetensors")):
            iteration, seconds = max(iteration, iterations_of(path)), max(seconds, path.stat().st_mtime - began)
        return iteration, seconds

    def is_complete(self, config: RunConfig) -> bool:
        """Whether there is nothing left to do for a run with these settings."""
        summary = self.summary or {}
        if summary.get("outcome") != "complete":
            return False
        reason, reached = summary.get("reason"), summary.get("iterations")
        was_ended = isinstance(reason, str) and reason.startswith(ENDED_EARLY)
        return was_ended or (isinstance(reached, int) and reached >= config.iterations)

    def has_nothing_left(self, config: RunConfig) -> bool:
        """Whether it is complete, which it then says. Raises ValueError for what it may not go on with.

        Nobody compares the contents of a run that is complete: its files have to have the names that they had.
        """
        self.require_same(config)
        if not self.is_complete(config):
            return False
        assert self.config is not None
        require_same_settings(config, self.config, is_measured=False, may_move=False)
        print(f"{self.path} holds a run that is complete; nothing is left to do")
        return True


def past_of(config: RunConfig) -> Past | None:
    """What is to go on; None for a new run. Raises OSError where `out` is not for one."""
    if config.out is None:
        return None
    past = None if config.checkpoint.resume is None else Past.of(config.out)
    if past is None:
        require_new(config.out)
    return past


def open_folder(config: RunConfig, past: Past | None) -> RunFolder:
    """New, or that of the run. Raises OSError where it cannot be written, or somebody writes to it."""
    assert config.out is not None
    if past is None:
        return RunFolder(config.out, to_json(config))
    folder = ReopenedFolder(config.out, to_json(config))
    try:
        if Past.read(config.out) != past:
            raise BlockingIOError(f"expected {config.out} to stay as it was, got changes by another process meanwhile")
        if not past.checkpoints:
            folder.begin()
    except BaseException:
        folder.close()
        raise
    return folder


def checkpoints_of(
    config: RunConfig,
    folder: RunFolder,
    arguments: Sequence[str],
    device: torch.device,
    contents: Mapping[str, Any],
    teacher: str | None = None,
    ranks: Ranks = ALONE,
) -> Checkpoints:
    """Those of a run with these arguments, contents and identity of its teacher, for which a checkpoint of another run
    is not whole."""
    origin = {
        "version": __version__,
        "arguments": _without_resume(arguments),
        "config": to_json(config),
        "teacher": teacher,
        "contents": contents,
        "versions": {**versions(device), **roundings(config), "processes": ranks.size},
    }
    require_same = functools.partial(require_same_origin, now=origin, config=config)
    compute = getattr(config, "compute", None)
    together = ranks if compute is not None and compute.shard else ALONE
    return Checkpoints(folder, config.checkpoint, origin, require_same, together)


def _read(path: Path) -> dict[str, Any] | None:
    return read_json(path) if path.exists() else None


def _logged(path: Path) -> tuple[int, float]:
    """Iteration and seconds of the last line of metrics.jsonl, zeros where there is none."""
    num_lines, text = last_line(path) if path.exists() else (0, b"")
    try:
        line = parse_json(text)
        return int(line["iteration"]), float(line["seconds"])
    except (KeyError, TypeError, ValueError, OverflowError):
        return num_lines, 0.0  # at least: a line that was cut


def _value(arguments: Sequence[str], flag: str) -> str | None:
    """That of the last one, as on any command line."""
    value = None
    for position, argument in enumerate(arguments):
        if argument == flag and position + 1 < len(arguments):
            value = arguments[position + 1]
        elif argument.startswith(f"{flag}="):
            value = argument.removeprefix(f"{flag}=")
    return value


def _without_resume(arguments: Sequence[str]) -> list[str]:
    left: list[str] = []
    is_value = False
    for argument in arguments:
        if not is_value and argument != "--resume" and not argument.startswith("--resume="):
            left.append(argument)
        is_value = not is_value and argument == "--resume"
    return left
