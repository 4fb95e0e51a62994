"""What the folder of a run tells, whole or broken: what is there, and what is missing."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastdmd.networks.tensor_files import read_json
from fastdmd.reading import open_regular, parse_json, read_all
from fastdmd.runs.folder import CONFIG, EVALUATIONS, METRICS, SAMPLES, SUMMARY, names_in
from fastdmd.runs.pictures import Sheet, read_sheet

Line = Mapping[str, Any]
MAX_LOG_BYTES = 1 << 28  # of metrics.jsonl: 300,000 lines
ALARM = ("kind", "iteration", "seen", "advice")


@dataclasses.dataclass(frozen=True)
class Run:
    """What there is of one run."""

    name: str
    config: Mapping[str, Any]  # empty where there is none
    summary: Mapping[str, Any] | None
    log: Sequence[Line]  # of metrics.jsonl, in the order of their iterations
    measurements: Sequence[Line]  # of evaluation.jsonl
    sheet: Sheet | None
    missing: list[str]  # a line each

    @property
    def is_distillation(self) -> bool:
        return "objective" not in self.config

    @property
    def num_iterations(self) -> int:
        """So far."""
        known = [number(line["iteration"]) for line in self.log] + [number((self.summary or {}).get("iterations"))]
        return int(max((value for value in known if value is not None), default=0))

    @property
    def rows(self) -> dict[str, Mapping[str, Any]]:
        """What was measured at the end, by name, but for real images; those of which nothing is known are left out."""
        found = {name: row for name, row in (self.summary or {}).items() if isinstance(row, dict) and name != "floor"}
        return {
            name: row
            for name, row in found.items()
            if any(number(row.get(field)) is not None for field in ("images_per_second", "frechet_distance"))
        }

    @property
    def floor(self) -> Mapping[str, Any]:
        """What real images score; empty where it is not known."""
        found = (self.summary or {}).get("floor")
        return found if isinstance(found, dict) else {}

    @property
    def result(self) -> str:
        """The name of the row that the run is about."""
        if not self.is_distillation:
            return "teacher"
        return "best" if "best" in self.rows and "generator" not in self.rows else "generator"

    @property
    def alarms(self) -> list[dict[str, str]]:
        """`kind`, `iteration`, `seen` and `advice` of each: of the summary or, while there is none, of the log, which
        knows the first two alone."""
        if self.summary is not None and isinstance(found := self.summary.get("alarms"), list):
            known = [alarm for alarm in found if isinstance(alarm, dict)]
        else:
            told = [(line["iteration"], line["alarms"]) for line in self.log if isinstance(line.get("alarms"), list)]
            known = [{"kind": kind, "iteration": iteration} for iteration, kinds in told for kind in kinds]
        return [{name: str(alarm.get(name, "")) for name in ALARM} for alarm in known]

    def distance(self, name: str) -> float | None:
        """The Fréchet distance of a row, or of the floor."""
        return number((self.floor if name == "floor" else self.rows.get(name, {})).get("frechet_distance"))

    def curve(self, name: str) -> list[tuple[float, float | None]]:
        """`(iteration, value)` of a number in the log; None where it was not finite."""
        return [(line["iteration"], number(line[name])) for line in self.log if name in line]

    def distances(self) -> dict[str, list[tuple[float, float | None]]]:
        """`(iteration, Fréchet distance)` of measurements, by average."""
        curves: dict[str, list[tuple[float, float | None]]] = {}
        for line in self.measurements:
            point = (line["iteration"], number(line.get("frechet_distance")))
            curves.setdefault(str(line.get("average", "average")), []).append(point)
        return curves


def read_run(path: Path) -> Run:
    """Raises OSError or ValueError where there is nothing of a run."""
    if not path.is_dir():
        raise FileNotFoundError(f"expected the folder of a run, got {path}, which is none")
    if not {CONFIG, METRICS, SUMMARY} & {*names_in(path)}:
        raise ValueError(f"expected the folder of a run, got {path} without {CONFIG}, {METRICS} or {SUMMARY}")
    missing: list[str] = []
    config = _object(path / CONFIG, missing)
    summary = _object(path / SUMMARY, missing)
    log = _lines(path / METRICS, missing)
    measurements = _lines(path / EVALUATIONS, missing) if (path / EVALUATIONS).exists() else []
    sheet = None
    try:
        sheet = read_sheet(path / SAMPLES)
    except (OSError, ValueError) as error:
        missing.append(_without(path / SAMPLES, error))
    return Run(path.resolve().name, config or {}, summary, log, measurements, sheet, missing)


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Several, whose names tell them apart. Raises as `read_run` does, and ValueError for one that is there twice."""
    whole = [path.resolve() for path in paths]
    if len(set(whole)) < len(whole):
        twice = next(path for path in whole if whole.count(path) > 1)
        raise ValueError(f"expected different runs, got {twice} twice")
    depth = 1
    while len({path.parts[-depth:] for path in whole}) < len(whole):
        depth += 1
    return [
        dataclasses.replace(read_run(path), name="/".join(real.parts[-depth:]))
        for path, real in zip(paths, whole, strict=True)
    ]


def number(value: Any) -> float | None:
    """None for what is no finite number."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300
    return float(value) if is_number and math.isfinite(value) else None


def _object(path: Path, missing: list[str]) -> dict[str, Any] | None:
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        missing.append(_without(path, error))
        return None


def _lines(path: Path, missing: list[str]) -> list[Line]:
    """Those that are whole, in the order of their iterations."""
    try:
        with open_regular(path) as file:
            texts = read_all(file, MAX_LOG_BYTES).splitlines()
    except (OSError, ValueError) as error:
        missing.append(_without(path, error))
        return []
    found = [line for text in texts if (line := _line(text)) is not None]
    if len(found) < len(texts):
        missing.append(f"{len(texts) - len(found)} of {len(texts)} lines of {path.name}, which are broken")
    if not found:
        missing.append(f"{path.name} has no lines yet")
    return sorted(found, key=lambda line: line["iteration"])


def _line(text: bytes) -> Line | None:
    try:
        line = parse_json(text)
        is_whole = isinstance(line, dict) and type(line["iteration"]) is int and 0 <= line["iteration"] < 2**53
    except (ValueError, KeyError):
        return None
    return line if is_whole else None


def _without(path: Path, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return f"{path.name}: there is none{' yet' * (path.name == SUMMARY)}"
    return f"{path.name}: {error}"
