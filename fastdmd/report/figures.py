"""What a run comes to in words and numbers: how good, beside the teacher; how fast; whether it is healthy."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastdmd.report.charts import show
from fastdmd.report.reading import Run, number

FIGURES = (  # of a measurement: field, title, factor, format
    ("evaluations", "evaluations", 1, ".0f"),
    ("frechet_distance", "Fréchet distance", 1, ".3f"),
    ("frechet_means", "of means", 1, ".3f"),
    ("frechet_covariances", "of covariances", 1, ".3f"),
    ("precision", "precision", 1, ".1%"),
    ("recall", "recall", 1, ".1%"),
    ("kernel_distance", "kernel distance × 1000", 1000, ""),
    ("class_accuracy", "class accuracy", 1, ".2%"),
    ("classifier_score", "classifier score", 1, ".2f"),
    ("class_variance", "variance within classes", 1, ".2f"),
    ("images_per_second", "images/s", 1, ",.0f"),
    ("num_images", "images", 1, ",.0f"),
)
SPEED = ("images_per_second", "evaluations")
COMPARED = ("frechet_distance", "precision", "recall", "class_accuracy", "images_per_second")
HIDDEN = ("record", "checkpoint", "verbose", "dry_run")  # of a configuration, as they say nothing of the result


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of texts under a heading each; the first cell of a row is its name."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Headline:
    """What a reader sees first. Texts are None where nothing is known."""

    distance: str | None
    beside: str  # the distance, in a sentence with others
    rate: str | None
    rate_beside: str
    health: str
    health_beside: str
    is_healthy: bool


def headline(run: Run) -> Headline:
    distance, teacher_distance, floor = (run.distance(name) for name in (run.result, "teacher", "floor"))
    rate, evaluations = (number(run.rows.get(run.result, {}).get(name)) for name in SPEED)
    teacher_rate, teacher_evaluations = (number(run.rows.get("teacher", {}).get(name)) for name in SPEED)
    others = []
    if teacher_distance is not None and run.is_distillation:
        steps = "" if teacher_evaluations is None else f" in {teacher_evaluations:.0f} evaluations"
        others.append(f"teacher {teacher_distance:.3f}{steps}")
    if floor is not None:
        others.append(f"real images {floor:.3f}")
    if distance is None:
        others.insert(0, _last_measured(run))
    rate_beside = "not measured"
    if evaluations is not None:
        rate_beside = f"{evaluations:.0f} evaluation{'s' * (evaluations != 1)} an image"
    if rate is not None and teacher_rate and run.is_distillation:
        rate_beside += f", {rate / teacher_rate:.2g} times the teacher's rate"
    health, health_beside, is_healthy = _health(run)
    return Headline(
        None if distance is None else f"{distance:.3f}",
        ", ".join(others),
        None if rate is None else f"{rate:,.0f}",
        rate_beside,
        health,
        health_beside,
        is_healthy,
    )


def bars(run: Run) -> list[tuple[str, str, float]]:
    """Names, Fréchet distances, and these as shares of the greatest: the result, then what it is to be held against."""
    if run.distance(run.result) is None:
        return []
    names = {run.result: "student" if run.is_distillation else "teacher", "teacher": "teacher", "floor": "real images"}
    found = {words: distance for name, words in names.items() if (distance := run.distance(name)) is not None}
    greatest = max(found.values()) or 1.0
    return [(name, f"{distance:.3f}", distance / greatest) for name, distance in found.items()]


def title(run: Run, name: str) -> str:
    """What a row of the summary is called."""
    if not run.is_distillation or name == "teacher":
        return "teacher"
    if name == "best":
        return f"student, best at iteration {(run.summary or {}).get('best_iteration')}"
    if name == "generator":
        return "student, last" if "best" in run.rows else "student"
    return name.replace("generator", "student")


def measured(run: Run) -> Table | None:
    """A row for each figure, a column for whatever was measured, real images last."""
    rows = {title(run, name): row for name, row in run.rows.items()}
    if not rows:
        return None
    if run.distance("floor") is not None:
        rows["real images"] = run.floor
    lines = []
    for field, name, factor, pattern in FIGURES:
        cells = [_cell(row.get(field), factor, pattern) for row in rows.values()]
        if any(cell != "–" for cell in cells):
            lines.append([name, *cells])
    return Table(["", *rows], lines)


def settings(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Every setting, by the names that lead to it from room to room, as a text."""
    return list(_flat({name: value for name, value in config.items() if name not in HIDDEN}))


def machine(run: Run) -> list[tuple[str, str]]:
    """Versions, device, commit, and times."""
    summary = run.summary or {}
    versions = summary.get("versions")
    found = [(name, str(value)) for name, value in (versions if isinstance(versions, dict) else {}).items() if value]
    for name, words in (
        ("seconds", "whole run"),
        ("train_seconds", "training"),
        ("evaluation_seconds", "measurements meanwhile"),
        ("first_iteration_seconds", "first iteration"),
    ):
        if value := number(summary.get(name)):
            found.append((words, duration(value)))
    return found


def differences(runs: Sequence[Run]) -> Table | None:
    """Settings in which runs differ, a column a run."""
    all_settings = [dict(settings(run.config)) for run in runs]
    names = list(dict.fromkeys(name for own in all_settings for name in own if name != "out"))
    rows = [[name, *(own.get(name, "–") for own in all_settings)] for name in names]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    return Table(["", *(run.name for run in runs)], rows) if rows else None


def comparison(runs: Sequence[Run]) -> Table:
    """A row for each run."""
    chosen = [figure for figure in FIGURES if figure[0] in COMPARED]
    rows = []
    for run in runs:
        row = run.rows.get(run.result, {})
        cells = [_cell(row.get(field), factor, pattern) for field, _, factor, pattern in chosen]
        seconds = number((run.summary or {}).get("train_seconds"))
        health, _, _ = _health(run)
        rows.append([run.name, *cells, f"{run.num_iterations:,}", duration(seconds) if seconds else "–", health])
    return Table(["run", *(name for _, name, *_ in chosen), "iterations", "training", "health"], rows)


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, _ = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def _health(run: Run) -> tuple[str, str, bool]:
    summary, planned = run.summary, number(run.config.get("iterations"))
    reached = f"{run.num_iterations:,}" + ("" if planned is None else f" of {planned:,.0f}") + " iterations"
    num_alarms = len(run.alarms)
    alarms = f"{num_alarms} alarm{'s' * (num_alarms > 1)}" if num_alarms else "no alarms"
    if summary is None:
        return alarms + " so far" * (not num_alarms), f"{reached}; unfinished", not num_alarms
    lost = [
        f"{count:,.0f} {words}"
        for name, words in (("skipped_updates", "updates skipped"), ("left_out_images", "images left out"))
        if (count := number(summary.get(name)))
    ]
    reason = summary.get("reason")
    beside = "; ".join([reached, *lost, *([str(reason)] if reason else [])])
    outcome = str(summary.get("outcome", "unknown"))
    if outcome != "complete":
        return outcome, beside, False
    if lost and not num_alarms:
        return lost[0], beside, False
    return alarms, beside, not num_alarms


def _last_measured(run: Run) -> str:
    for line in reversed(run.measurements):
        if (distance := number(line.get("frechet_distance"))) is not None:
            return f"not measured at the end; {distance:.3f} at iteration {line['iteration']:,}"
    return "not measured"


def _cell(value: Any, factor: float, pattern: str) -> str:
    known = number(value)
    if known is None:
        return "–"
    return format(known * factor, pattern) if pattern else show(known * factor)


def _flat(config: Mapping[str, Any], room: str = "") -> Iterator[tuple[str, str]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{room}{name}.")
        elif isinstance(value, list) and len(value) > 20:
            yield f"{room}{name}", f"{len(value)} values"
        else:
            yield f"{room}{name}", ", ".join(map(_text, value)) if isinstance(value, list) else _text(value)


def _text(value: Any) -> str:
    return format(value, ".9g") if isinstance(value, float) else str(value)
