"""The curves of a run, and of several beside each other."""

from __future__ import annotations

from collections.abc import Sequence

from fastdmd.report.charts import Chart, chart
from fastdmd.report.reading import Run, number
from fastdmd.runs.series import PARTS, group, level

TITLES = {  # by group
    "losses": "Losses",
    "gradient norms": "Gradient norms",
    "disagreement": "Fake score and teacher disagree",
    "fake error": "Fake score’s error, in the teacher’s",
    "images": "What images look like",
    "classes": "Classes, how many",
    "spread of classes": "Spread within and between classes",
    "discriminator": "Discriminator: share told right",
    "speed": "Images a second",
    "memory": "Memory, bytes",
}
MACHINE = ("speed", "memory")  # whose axes begin at zero
COMPARED = {  # numbers of the log
    "loss_dm": "Loss of distribution matching",
    "loss_fake": "Loss of the fake score",
    "loss": "Loss",
    "spread": "Spread of images",
    "images_per_second": "Images a second",
    "resident_bytes": "Memory, bytes",
}


def quality(run: Run) -> list[Chart]:
    """The Fréchet distance through a run, and against the steps of a student of several."""
    levels = _levels(run)
    nums = sorted({num for line in run.measurements if (num := number(line.get("num_images")))})
    note = f"Of {', '.join(f'{num:,.0f}' for num in nums)} samples a measurement." if nums else ""
    steps = {
        evaluations: run.distance(name)
        for name, row in run.rows.items()
        if name.startswith("generator") and (evaluations := number(row.get("evaluations"))) is not None
    }
    points: list[tuple[float, float | None]] = [(evaluations, steps[evaluations]) for evaluations in sorted(steps)]
    found = [
        chart("Fréchet distance as training goes on", run.distances(), levels=levels, note=note, marked=True),
        chart("Fréchet distance against steps", {"student": points}, levels=levels, x_label="steps", marked=True)
        if len(points) > 1
        else None,
    ]
    return _known(found)


def training(run: Run) -> list[Chart]:
    return _known([_of_group(run, name) for name in (*PARTS.values(), "images") if name not in MACHINE])


def machine(run: Run) -> list[Chart]:
    return _known([_of_group(run, name) for name in MACHINE])


def comparison(runs: Sequence[Run]) -> list[Chart]:
    distances = chart("Fréchet distance", {run.name: _least(run) for run in runs}, marked=True)
    others = [
        chart(title, {run.name: run.curve(name) for run in runs}, from_zero=group(name) in MACHINE)
        for name, title in COMPARED.items()
    ]
    return _known([distances, *others])


def _levels(run: Run) -> dict[str, float]:
    """What the result is to be held against, and of how many images: the fewer, the greater is a distance."""
    levels = {}
    for name, words in (("teacher", "teacher"), ("floor", "real images")):
        if name != run.result and (distance := run.distance(name)) is not None:
            num = number((run.floor if name == "floor" else run.rows[name]).get("num_images"))
            levels[words if not num else f"{words} ({num:,.0f})"] = distance
    return levels


def _of_group(run: Run, wanted: str) -> Chart | None:
    names = list(dict.fromkeys(name for line in run.log for name in line if group(name) == wanted))
    curves = {level(name).replace("_", " "): run.curve(name) for name in names}
    return chart(TITLES[wanted], curves, from_zero=wanted in MACHINE)


def _least(run: Run) -> list[tuple[float, float | None]]:
    """Of all averages, at each iteration."""
    least: dict[float, float] = {}
    for points in run.distances().values():
        for iteration, distance in points:
            if distance is not None:
                least[iteration] = min(distance, least.get(iteration, distance))
    return list(sorted(least.items()))


def _known(charts: Sequence[Chart | None]) -> list[Chart]:
    return [one for one in charts if one is not None]
