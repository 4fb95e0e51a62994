"""`--resume`: what a folder holds of a run, with which settings it may go on, and with which it may not."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from fastdmd import __version__
from fastdmd.diffusion import DenoisingNetwork
from fastdmd.networks.identity import identity
from fastdmd.networks.tensor_files import read_json
from fastdmd.runs import checkpoint, terminal
from fastdmd.runs.checkpoints import Checkpoints, CheckpointSettings, found
from fastdmd.runs.cli import to_json
from fastdmd.runs.folder import (
    CHECKPOINTS,
    CONFIG,
    EVALUATIONS,
    METRICS,
    SUMMARY,
    ReopenedFolder,
    RunFolder,
    names_in,
    require_new,
)
from fastdmd.runs.lock import locked
from fastdmd.runs.machine import versions
from fastdmd.runs.progress import ENDED_EARLY
from fastdmd.settings import flags

AUTO = "auto"

# What may be another when a run goes on: what is written, how often, and what is measured at the end. All else stays,
# and with it every number of the training.
MAY_CHANGE = {
    "--out",
    "--device",  # what it computes in and how stay
    "--log-every",
    "--snapshots",
    "--checkpoint-every",
    "--keep-last",
    "--resume",
    "--num-samples",
    "--measure-teacher",
    "--eval-every",
    "--stop-after",
    "--record",
    "--report",
    "--verbose",
    "--dry-run",
}
MAY_MOVE = {"--data", "--labels", "--pairs", "--feature-network", "--reference"}  # by their content they are known
UNTIL_MEASURED = {"--eval-samples"}  # later, distances are compared with earlier ones
OPEN_END = {"--iterations"}  # where no learning rate falls towards it


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
            return [*checkpoint.read_rest(path)["origin"]["arguments"], *given]
        except (ValueError, KeyError) as error:
            fault = error
    raise fault


class RunConfig(Protocol):
    """What a run that goes on has to know of its configuration."""

    @property
    def out(self) -> Path | None: ...

    @property
    def iterations(self) -> int: ...

    @property
    def has_open_end(self) -> bool:
        """Whether more iterations would be the same up to here."""

    @property
    def checkpoint(self) -> CheckpointSettings: ...


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
        if (path / METRICS).exists():
            locked(path / METRICS).close()
        return cls.read(path)

    @classmethod
    def read(cls, path: Path) -> Past:
        """Raises ValueError where something is no part of a run."""
        folder = path / CHECKPOINTS
        if (folder.exists() or folder.is_symlink()) and not folder.is_dir():
            raise ValueError(f"expected a folder of checkpoints in {folder}, got something else, or a link to nothing")
        return cls(path, _read(path / CONFIG), _read(path / SUMMARY), found(path))

    def require_same(self, config: RunConfig) -> None:
        """Raises ValueError for a setting that may not change, and where there is a run but nothing to go on from."""
        if self.config is None:
            if names_in(self.path) != [METRICS] or (self.path / METRICS).stat().st_size:  # not killed as it was made
                raise ValueError(f"expected a run's {CONFIG} in {self.path}, got {names_in(self.path)[0]} without")
            return
        _require_same_settings(config, self.config, is_measured=(self.path / EVALUATIONS).exists())
        whole = [int(path.name) for path in self.checkpoints if (path / checkpoint.SUMS).exists()]
        if whole and config.iterations < whole[0]:
            raise ValueError(f"expected --iterations >= {whole[0]}, which the run has reached, got {config.iterations}")
        if not self.checkpoints and not self.is_complete(config):
            self._require_nothing_lost()

    def _require_nothing_lost(self) -> None:
        """Raises ValueError where a run has come further than one without a checkpoint can have; it would begin again,
        over its results."""
        iteration, seconds = _logged(self.path / METRICS)
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
        _require_same_settings(config, self.config, is_measured=False, may_move=False)
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
    teacher: DenoisingNetwork | None = None,
) -> Checkpoints:
    """Those of a run with these arguments and contents, for which a checkpoint of another run is not whole."""
    origin = {
        "version": __version__,
        "arguments": _without_resume(arguments),
        "config": to_json(config),
        "teacher": None if teacher is None else identity(teacher),
        "contents": contents,
        "versions": versions(device),
    }
    require_same = functools.partial(_require_same_origin, now=origin, config=config)
    return Checkpoints(folder, config.checkpoint, origin, require_same)


def _require_same_origin(origin: Mapping[str, Any], now: Mapping[str, Any], config: RunConfig) -> None:
    """Raises ValueError where a checkpoint is of another version, teacher, settings or contents than that of `now`."""
    if origin["version"] != now["version"]:
        raise ValueError(f"expected a checkpoint of fastdmd {now['version']}, got one of {origin['version']}")
    if origin["teacher"] != now["teacher"]:
        raise ValueError(
            f"expected the teacher that the run was begun with, {origin['teacher']}, got one of other weights or of "
            f"another network, {now['teacher']}"
        )
    _require_same_settings(config, origin["config"], is_measured=False)
    then, current = origin["contents"], now["contents"]
    names = [name for name in {**then, **current} if then.get(name) != current.get(name)]
    if others := [f"{name} {then.get(name)}, got {current.get(name)}" for name in names]:
        raise ValueError(f"expected what the run was begun with: {'; '.join(others)}")


def _require_same_settings(
    config: RunConfig, recorded: Mapping[str, Any], *, is_measured: bool, may_move: bool = True
) -> None:
    may_change = set(MAY_CHANGE)
    if not is_measured:
        may_change |= UNTIL_MEASURED
    if config.has_open_end:
        may_change |= OPEN_END
    current = to_json(config)
    if may_move:
        may_change |= MAY_MOVE
        if "mnist" not in (current.get("teacher"), recorded.get("teacher")):  # beside which there are digits
            may_change.add("--teacher")  # by its weights it is known
    others = []
    for place, flag in flags(config):
        now, then = _at(current, place), _at(recorded, place)
        if now != then and flag not in may_change:
            others.append(f"{flag} {then}, got {now}")
    if others:
        raise ValueError(f"expected the settings that the run was begun with: {'; '.join(others)}")


def _at(config: Mapping[str, Any], place: Sequence[str]) -> Any:
    value: Any = config
    for name in place:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _read(path: Path) -> dict[str, Any] | None:
    return read_json(path) if path.exists() else None


def _logged(path: Path) -> tuple[int, float]:
    """Iteration and seconds of the last line of metrics.jsonl, zeros where there is none."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    try:
        line = json.loads(lines[-1])
        return int(line["iteration"]), float(line["seconds"])
    except (IndexError, KeyError, TypeError, ValueError, OverflowError, RecursionError):
        return len(lines), 0.0  # at least: a line that was cut


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
