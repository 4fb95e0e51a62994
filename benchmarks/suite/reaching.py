"""What `time_to_quality` measured, told: seconds of training to each Fréchet distance, and their picture."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from benchmarks.suite.figures import digits
from benchmarks.suite.lines import Curve, Panel, picture
from benchmarks.suite.rows import Row

Point = tuple[float, float]  # seconds, Fréchet distance

TARGETS = (1.0, 1.2, 1.5, 2.0, 3.0, 5.0, 10.0)  # times the teacher's distance
DRAWN = (1.0, 1.2, 2.0, 5.0)  # of them, as levels of the picture
YARDSTICK = "textbook, the same recipe"


def named(target: float) -> str:
    return "the teacher's" if target == 1 else f"{target:g} × the teacher's"


def candidates(runs: Sequence[dict]) -> list[Point]:
    """Of one recipe and seed: the points that count, by their seconds.

    Every point of a run at a constant rate; of runs whose rate falls to zero the end alone, each of a whole schedule:
    what comes before is no student that a run of that length would leave.
    """
    points = [
        (point["seconds"], point["frechet_distance"])
        for run in runs
        for point in run["points"]
        if run["is_constant"] or point["iteration"] == run["iterations"]
    ]
    return sorted(points)


def reached(points: Sequence[Point], distance: float) -> float | None:
    """Seconds of the first point of at most this distance; None where there is none."""
    return next((seconds for seconds, found in sorted(points) if found <= distance), None)


def recipes(result: dict) -> list[str]:
    return list(dict.fromkeys(run["recipe"] for run in result["results"]))


def seeds(result: dict, recipe: str) -> list[int]:
    return sorted({run["seed"] for run in result["results"] if run["recipe"] == recipe})


def seconds_to(result: dict, recipe: str, target: float) -> list[float | None]:
    """Of every seed, to so many times the teacher's distance."""
    distance = target * result["teacher"]["frechet_distance"]
    of_seeds = (
        [run for run in result["results"] if run["recipe"] == recipe and run["seed"] == seed]
        for seed in seeds(result, recipe)
    )
    return [reached(candidates(runs), distance) for runs in of_seeds]


def rows(result: dict) -> list[Row]:
    """Medians over the seeds, where all of them come that far."""
    found = []
    for target in TARGETS:
        medians = {name: _median(seconds_to(result, name, target)) for name in recipes(result)}
        yardstick = medians.get(YARDSTICK)
        for name, seconds in medians.items():
            if seconds is not None:
                ratio = yardstick / seconds if yardstick else None
                found.append(Row(f"{name}: to {named(target)}", seconds, "s", ratio=ratio, yardstick=YARDSTICK))
    return found


def told(result: dict) -> str:
    """A table of all, and what it is of."""
    teacher, samples = result["teacher"]["frechet_distance"], result["settings"]["num_samples"]
    said = (
        f"Seconds of training, medians over the seeds, from the least to the greatest in brackets, until the one-step "
        f"student has so many times its teacher's Fréchet distance, {digits(teacher)} of {samples:,} samples. Of runs "
        "with a cosine schedule, whole ones of several lengths, ends count alone; of those at a constant rate every "
        "measurement. The textbook loop has no adversarial term and does not clamp: beside the default is the same "
        "without one, and without both."
    )
    heads = ["", *(named(target) for target in TARGETS)]
    cells = [[name, *(_cell(seconds_to(result, name, target)) for target in TARGETS)] for name in recipes(result)]
    lines = ["|" + "|".join(f" {cell} " if cell else " " for cell in line) + "|" for line in (heads, *cells)]
    table = "\n".join([lines[0], "|" + "---|" * len(heads), *lines[1:]])
    return "\n\n".join(filter(None, [said, table, _before_the_end(result)]))


def drawn(result: dict) -> str:
    """SVG: the distance over seconds of training, medians over the seeds."""
    teacher = result["teacher"]["frechet_distance"]
    curves = {name: curve(result, name) for name in recipes(result)}
    levels = {named(target): target * teacher for target in DRAWN}
    return picture([Panel("Fréchet distance over seconds of training", "seconds", curves, levels=levels)], 760, 440)


def curve(result: dict, recipe: str) -> Curve:
    """Medians over the seeds, of the points that count, at each iteration."""
    own = [run for run in result["results"] if run["recipe"] == recipe]
    found: dict[int, list[Point]] = {}
    for run in own:
        for point in run["points"]:
            if run["is_constant"] or point["iteration"] == run["iterations"]:
                found.setdefault(point["iteration"], []).append((point["seconds"], point["frechet_distance"]))
    return [
        (statistics.median(seconds for seconds, _ in points), statistics.median(distance for _, distance in points))
        for _, points in sorted(found.items())
    ]


def _before_the_end(result: dict) -> str:
    """How far a longer schedule is where a shorter one ends, of the recipe that is first."""
    own = [run for run in result["results"] if run["recipe"] == recipes(result)[0] and not run["is_constant"]]
    if not own:
        return ""
    longest = max(run["iterations"] for run in own)
    begun, ended = {}, {}
    for run in own:
        for point in run["points"]:
            kept = begun if run["iterations"] == longest else ended
            if point["iteration"] != longest and (kept is begun or point["iteration"] == run["iterations"]):
                kept.setdefault(point["iteration"], []).append(point["frechet_distance"])
    if not (both := sorted(begun.keys() & ended.keys())):
        return ""
    at = both[-1]
    return (
        f"A cosine schedule has its quality at its end: of {own[0]['recipe']}, {longest} iterations have "
        f"{digits(statistics.median(begun[at]))} after {at}, where a whole schedule of {at} has "
        f"{digits(statistics.median(ended[at]))}."
    )


def _median(found: Sequence[float | None]) -> float | None:
    return statistics.median(found) if found and None not in found else None


def _cell(found: Sequence[float | None]) -> str:
    known = [seconds for seconds in found if seconds is not None]
    if not known:
        return "not reached"
    text = digits(statistics.median(known))
    if len(known) < len(found):
        return f"{text}, {len(known)} of {len(found)} seeds"
    return text if len(known) == 1 else f"{text} ({digits(min(known))} to {digits(max(known))})"
