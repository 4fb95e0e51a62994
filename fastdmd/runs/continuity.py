"""With which settings a run may go on, and with which defaults: those that it was begun with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from fastdmd.data.pairs import PairRecord
from fastdmd.runs.checkpoints import EARLIER_VERSIONS, CheckpointSettings
from fastdmd.runs.cli import to_json
from fastdmd.runs.config import PairsConfig
from fastdmd.settings import Settings, check, flags

Chosen = TypeVar("Chosen", bound=Settings)
Resolved = TypeVar("Resolved", bound=Settings)

# How the same numbers are computed; with --deterministic they stay, too.
ROUNDING = {"--execution", "--compile", "--accumulation-steps"}

# What may be another when a run goes on: what is written, how often, and what is measured at the end. All else stays,
# and with it every number of the training.
MAY_CHANGE = ROUNDING | {
    "--out",
    "--device",  # what it computes in stays
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
    "--nan-policy",  # of numbers that are not there
}
MAY_MOVE = {"--data", "--labels", "--pairs", "--feature-network", "--reference"}  # by their content they are known
UNTIL_MEASURED = {"--eval-samples"}  # later, distances are compared with earlier ones
OPEN_END = {"--iterations"}  # where no learning rate falls towards it
# All that decides a pair, besides the teacher.
PAIRS_KEEP = {"num", "batch_size", "teacher_steps", "label_emphasis", "seed", "device"}
# Of runs from before there was such a flag.
EARLIER = {"--deterministic": False, "--shard": False, "--gan-translation": 0.0}


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
    def deterministic(self) -> bool: ...

    @property
    def checkpoint(self) -> CheckpointSettings: ...


def with_defaults_of_run(
    chosen: Chosen, resolve: Callable[[Chosen], Resolved], recorded: Mapping[str, Any] | None
) -> Resolved:
    """The settings, resolved. What nobody gave is what the run was begun with, though it would follow otherwise from a
    flag that may change: `--eval-samples` from `--num-samples`, `--precision` from `--device`. Raises ValueError for a
    record of what no flag could have been."""
    config, kept = resolve(chosen), {}
    given, now = to_json(chosen), to_json(config)
    for place, flag in flags(chosen):
        then, fresh = _at(recorded or {}, place), _at(now, place)
        is_open = _at(given, place) in (None, "auto") and flag not in MAY_CHANGE
        if is_open and then != fresh and _is_alike(then, fresh):
            name = flag.removeprefix("--").replace("-", "_")
            kept[name] = tuple(then) if isinstance(then, list) else then
            room: Any = chosen.replace(**{name: kept[name]})
            for part in place[:-1]:
                room = getattr(room, part)
            check(room)
    return resolve(chosen.replace(**kept)) if kept else config


def _is_alike(then: Any, now: Any) -> bool:
    """Whether both are of one type; lists are of numbers, each of which has a bound."""
    if isinstance(then, list) and isinstance(now, list):
        return all(type(number) in (int, float) for number in then)
    return type(then) is type(now)


def roundings(config: RunConfig) -> dict[str, Any]:
    """The flags that decide how a number is rounded, and nothing else of it."""
    values = to_json(config)
    return {flag: _at(values, place) for place, flag in flags(config) if flag in ROUNDING}


def require_same_origin(origin: Mapping[str, Any], now: Mapping[str, Any], config: RunConfig) -> None:
    """Raises ValueError where a checkpoint is of another version, teacher, settings or contents than that of `now`."""
    if origin["version"] != now["version"]:
        raise ValueError(f"expected a checkpoint of fastdmd {now['version']}, got one of {origin['version']}")
    _require_same_teacher(origin["teacher"], now["teacher"])
    require_same_settings(config, origin["config"], is_measured=False)
    if config.deterministic:
        _require_same_machine(origin["versions"], now["versions"])
    then, current = origin["contents"], now["contents"]
    names = [name for name in {**then, **current} if then.get(name) != current.get(name)]
    if others := [f"{name} {then.get(name)}, got {current.get(name)}" for name in names]:
        raise ValueError(f"expected what the run was begun with: {'; '.join(others)}")


def _require_same_machine(then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises ValueError where numbers would be rounded in another way."""
    then = {**EARLIER_VERSIONS, **then}
    if others := [f"{name} {then.get(name)}, got {now[name]}" for name in now if now[name] != then.get(name)]:
        raise ValueError(f"expected with --deterministic what the run was begun with: {'; '.join(others)}")


def require_same_settings(
    config: RunConfig, recorded: Mapping[str, Any], *, is_measured: bool, may_move: bool = True
) -> None:
    may_change = MAY_CHANGE - ROUNDING if config.deterministic else set(MAY_CHANGE)
    if not is_measured:
        may_change |= UNTIL_MEASURED
    if config.has_open_end:
        may_change |= OPEN_END
    current = to_json(config)
    if may_move:
        may_change |= MAY_MOVE
        if "mnist" not in (current.get("teacher"), recorded.get("teacher")):  # beside which there are digits
            may_change.add("--teacher")  # by its weights it is known
    others = {}
    for place, flag in flags(config):
        now, then = _at(current, place), _at(recorded, place)
        then = EARLIER.get(flag) if then is None else then
        if flag not in may_change:
            others[flag] = then, now
    _require_equal(others)


def require_same_pairs(config: PairsConfig, then: PairRecord, now: PairRecord) -> None:
    """Raises ValueError, as for a run, where pairs were begun with other settings, or of another teacher."""
    _require_same_teacher(then.teacher, now.teacher)
    names = {place[0]: flag for place, flag in flags(config)}
    _require_equal(
        {flag: (getattr(then, name), getattr(now, name)) for name, flag in names.items() if name in PAIRS_KEEP}
    )


def _require_equal(settings: Mapping[str, tuple[Any, Any]]) -> None:
    """Then and now, by their flags."""
    if others := [f"{flag} {then}, got {now}" for flag, (then, now) in settings.items() if then != now]:
        raise ValueError(f"expected the settings that the run was begun with: {'; '.join(others)}")


def _require_same_teacher(then: str | None, now: str | None) -> None:
    if then != now:
        raise ValueError(
            f"expected the teacher that the run was begun with, {then}, got one of other weights or of another "
            f"network, {now}"
        )


def _at(config: Mapping[str, Any], place: Sequence[str]) -> Any:
    value: Any = config
    for name in place:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value
