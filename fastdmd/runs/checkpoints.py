"""The checkpoints of a run: when one is due, how many are kept, and which one a run goes on from."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

from fastdmd import files
from fastdmd.memory import ran_out_of_memory
from fastdmd.ranks import ALONE, Ranks
from fastdmd.runs import checkpoint, terminal
from fastdmd.runs.folder import BEST, CHECKPOINTS, RunFolder
from fastdmd.settings import Settings, at_least, fail

# What a state that is none of this run's makes whoever takes it over raise.
FAULTS = (ValueError, TypeError, LookupError, AttributeError, RuntimeError, OverflowError, OSError)
EARLIER_VERSIONS = {"processes": 1}  # of runs from before there were several
BROKEN = ".broken"  # at the end of the name of a checkpoint that was left out; it goes when there is a new one


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointSettings(Settings):
    """How a run that is killed goes on."""

    checkpoint_every: str = "10m"
    """How often all that a run depends on is written: 10m, every ten minutes; 500, every 500 iterations; 0: never."""
    keep_last: Annotated[int, at_least(1, 10**6)] = 2
    """Of these checkpoints, the last so many are kept."""
    resume: str | None = None
    """Folder of a run that was ended or killed, to go on with it as if nothing had been; or `auto`: with that in --out
    if there is one, and with a new one if there is none."""

    def check(self) -> None:
        super().check()
        if not re.fullmatch("[0-9]{1,9}m?", self.checkpoint_every):
            fail(self, "checkpoint_every", "as minutes (10m), iterations (500) or 0")

    @property
    def iterations(self) -> int:
        """Between two checkpoints; 0: another rule holds."""
        return 0 if self.checkpoint_every.endswith("m") else int(self.checkpoint_every)

    @property
    def seconds(self) -> float:
        """Between two checkpoints; 0: another rule holds."""
        return 60.0 * int(self.checkpoint_every[:-1]) if self.checkpoint_every.endswith("m") else 0.0

    @property
    def is_off(self) -> bool:
        return not self.iterations and not self.seconds


class Checkpoints:
    """Those of one run. `origin` says what it is made from, as JSON has it; `require_same(origin)` raises ValueError
    for another one than a run may go on from. `ranks` write and read them together, where each has a part of networks.
    """

    def __init__(
        self,
        folder: RunFolder,
        settings: CheckpointSettings,
        origin: Mapping[str, Any],
        require_same: Callable[[Mapping[str, Any]], None],
        ranks: Ranks = ALONE,
    ):
        self._folder, self._settings = folder, settings
        self._origin, self._require_same, self._ranks = origin, require_same, ranks
        self._path = folder.path / CHECKPOINTS
        self._last: int | None = None  # iteration of the one on the disk
        self._written = time.monotonic()

    def is_due(self, iteration: int, *, is_last: bool, is_asked: bool) -> bool:
        """Whether after this iteration; at the last one, too, as the measurements that follow may take long. One that
        somebody asks for is due in any case."""
        if self._settings.is_off or is_asked:
            return is_asked
        seconds = self._settings.seconds
        is_time = seconds > 0 and time.monotonic() - self._written >= seconds
        return is_last or is_time or self.is_fixed(iteration)

    def is_fixed(self, iteration: int) -> bool:
        """Whether the settings name this iteration."""
        every = self._settings.iterations
        return every > 0 and iteration % every == 0

    @property
    def is_off(self) -> bool:
        return self._settings.is_off

    def write(self, iteration: int, state: Callable[[], Mapping[str, Any]]) -> None:
        """Writes the state of this iteration, then lets the oldest ones go. Raises OSError where the disk fails."""
        self._written = time.monotonic()  # of an attempt, too: where the disk is full, training is not to be held up
        if iteration == self._last:
            return
        self._ranks.from_first(self._make_room)
        best = self._folder.path / BEST
        reached = self._ranks.from_first(self._folder.reached)
        run = self._ranks.together(state)
        content = {"iteration": iteration, "origin": self._origin, "reached": reached, "run": run}
        checkpoint.write(self._path / f"{iteration:08d}", content, [best] if best.exists() else [], self._ranks)
        self._last = iteration
        if self._ranks.is_first:
            self._let_go(iteration)

    def _make_room(self) -> None:
        self._path.mkdir(exist_ok=True)
        files.flush(self._folder.path)

    def _let_go(self, iteration: int) -> None:
        own = [path for path in found(self._folder.path) if _iteration(path) <= iteration]
        for path in (*own[self._settings.keep_last :], *self._path.glob(f"*{BROKEN}")):
            with contextlib.suppress(OSError):  # what is too much is no reason to end
                files.remove_folder(path)

    def restore(self, load: Callable[[Mapping[str, Any], int], None]) -> bool:
        """Goes on from the newest one that is whole; False where there is none at all, and the run is to begin.

        What is newer and broken is left out, with a word. The folder becomes what it was at that moment. Raises
        ValueError where none is whole.
        """
        faults: dict[Path, Exception] = {}
        for path in found(self._folder.path):
            try:
                content = checkpoint.read(path, self._ranks)
                versions = self._ranks.together(functools.partial(self._take, content, path, load), FAULTS)
            except FAULTS as error:
                if ran_out_of_memory(error):
                    raise
                faults[path] = error
                continue
            if not self._folder.is_written:
                faults.clear()
            for broken, fault in faults.items():
                terminal.say(f"{broken} left out: {fault}; going on from {path.name}")
                aside = broken.with_name(f"{broken.name}{BROKEN}")
                with contextlib.suppress(OSError):
                    if aside.exists():
                        files.remove_folder(aside)
                    broken.rename(aside)
            self._tell_of_versions(versions)
            best = path / BEST
            self._folder.go_back(content["reached"], best if best.exists() else None)
            self._last = _iteration(path)
            return True
        if faults:
            path, fault = next(iter(faults.items()))
            if isinstance(fault, (ValueError, OSError)):
                raise fault
            raise ValueError(f"expected a checkpoint of such a run in {path}, got {type(fault).__name__}: {fault}")
        return False

    def _take(self, content: Mapping[str, Any], path: Path, load: Callable[[Mapping[str, Any], int], None]) -> dict:
        """Goes on from what was read there; returns the versions that it was begun with."""
        if content["iteration"] != _iteration(path):
            raise ValueError(f"expected a checkpoint of iteration {_iteration(path)} in {path}, got another's")
        self._require_same(content["origin"])
        self._folder.require(content["reached"])
        versions = dict(content["origin"]["versions"])
        load(content["run"], _iteration(path))
        return versions

    def _tell_of_versions(self, then: Mapping[str, Any]) -> None:
        now, then = self._origin["versions"], {**EARLIER_VERSIONS, **then}
        if others := [f"{name} {then.get(name)}, now {now[name]}" for name in now if now[name] != then.get(name)]:
            terminal.say(
                f"the run was begun with {'; '.join(others)}: from here on it may be another, by its roundings"
            )


def found(run: Path) -> list[Path]:
    """The checkpoints in the folder of a run, the newest first."""
    paths = [path for path in (run / CHECKPOINTS).glob("*") if re.fullmatch("[0-9]{8,}", path.name) and path.is_dir()]
    return sorted(paths, key=_iteration, reverse=True)


def _iteration(path: Path) -> int:
    return int(path.name)
