"""How many seconds of training it takes until a one-step student has a given Fréchet distance: fastdmd, and the
textbook loop beside it.

    python -m benchmarks.time_to_quality [--seeds 0,1,2] [--minutes 20] [--recipes NAME ...] [--schedules 100,...,2700]
        [--samples 5000] [--device cpu] [--precision auto] [--json FILE]

Recipes, all of the embedded teacher:

- `fastdmd, default`: the preset `mnist`, with its adversarial term and images clamped.
- `fastdmd, without adversarial term`: the same without one.
- `fastdmd, the textbook's recipe`: without clamping, too.
- `textbook, the same recipe`: the loop of benchmarks/textbook.py with the default's batch, ratio, rates, schedule,
  average and teacher. It has no adversarial term and does not clamp, so the one before is its equal; but for rounding
  they learn the same.
- `textbook, published settings`: the same loop with those of the published re-implementation, the preset
  `mnist-reference`: batch 128, ratio 10, constant rates of 2e-4, and an average with decay 0.999.

A cosine schedule has its quality only at its end. So recipes with one are run whole, each of `--schedules` from its
start, and the time to a distance is that of the first whose end is there: what somebody would have to wait who knew
how long a run it takes. (The longest is measured on its way, too, which shows how far it is then.) At a constant rate
one run is measured at growing intervals, and every measurement counts.

The clock is stopped while a student is measured, and while networks are loaded and built; compilation and capture,
which belong to the first iterations, count. A student is the average of the weights; each is measured in the same way,
from the same noise, in the features of the embedded classifier. Every run has a process of its own, and ends after
`--minutes` of training; a schedule that would take longer by the rate of the one before is not begun.

With `--json` each measurement is written as it comes, and a run that the file has is not made again: it may be called
as often as needed, with further seeds, schedules or minutes. About two hours a seed on two cores.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import operator
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import timed_run
from benchmarks.environment import commit, describe
from benchmarks.sources import source_hashes
from benchmarks.suite import reaching, registry
from benchmarks.suite.stored import write
from benchmarks.timed_run import LOOK_EVERY, Recipe
from benchmarks.worker import Worker
from fastdmd.runs import startup
from fastdmd.runs.cli import resolve_device
from fastdmd.runs.presets import PRESETS

PLAIN = {"gan_guidance_weight": 0.0}
RECIPES = {
    "fastdmd, default": Recipe("fastdmd", "mnist"),
    "fastdmd, without adversarial term": Recipe("fastdmd", "mnist", PLAIN),
    "fastdmd, the textbook's recipe": Recipe("fastdmd", "mnist", {**PLAIN, "clamp_images": False}),
    reaching.YARDSTICK: Recipe("textbook", "mnist", {**PLAIN, "clamp_images": False}),
    "textbook, published settings": Recipe("textbook", "mnist-reference"),
}
SCHEDULES = (100, 200, 400, 800, 1600, PRESETS["mnist"].config.iterations)
OPEN_END = 1_000_000  # iterations of a run at a constant rate: more than any limit leaves time for
FIRST, GROWTH = 25, 2**0.5  # iterations of the first measurement at a constant rate, and from one to the next
LEAST_MINUTES = 0.01


def grid(iterations: int, growth: float) -> Iterator[int]:
    """When a run is measured, growing intervals up to its end."""
    at = float(FIRST)
    while round(at) < iterations:
        yield round(at)
        at *= growth
    yield iterations


def plan(name: str, schedules: list[int]) -> list[tuple[int, list[int]]]:
    """Runs of a recipe: their iterations, and those that they are measured at."""
    if RECIPES[name].is_constant:
        return [(OPEN_END, list(grid(OPEN_END, GROWTH)))]
    longest = max(schedules)
    on_the_way = [iterations for iterations in schedules if iterations < longest]
    return [(own, [*on_the_way, own] if own == longest else [own]) for own in sorted(schedules)]


class Results:
    """What a file keeps: runs, each with the measurements that were made of it."""

    def __init__(self, path: Path | None, settings: dict[str, Any], command: list[str], worker_device: str):
        """Raises ValueError for a file of other settings."""
        self.path, self.settings, self.command = path, settings, command
        self.worker_device = worker_device  # which one of a kind
        self.teacher: dict[str, Any] | None = None
        self.runs: list[dict[str, Any]] = []
        self.device = str(settings["device"])
        self.sources = source_hashes(registry.sources_on_request("time-to-quality", self.device))
        if path is not None and path.exists():
            stored = json.loads(path.read_text())
            if stored.get("settings") != settings:
                raise ValueError(f"expected {path} to be of {settings}, got {stored.get('settings')}")
            self.teacher, self.runs = stored["teacher"], stored["results"]

    def ended(self, recipe: str, seed: int, iterations: int, minutes: float) -> dict[str, Any] | None:
        """A run that need not be made again: it is over, or ended by a limit that was no less."""
        for run in self.runs:
            if (run["recipe"], run["seed"], run["iterations"]) == (recipe, seed, iterations):
                is_over = run["ended"] == "whole" or run["ended"].startswith("failed")
                if is_over or (run["ended"] == "limit" and run["minutes"] >= minutes):
                    return run
        return None

    def begin(self, **run: Any) -> dict[str, Any]:
        """A new run, in the place of one that was broken off."""
        key = ("recipe", "seed", "iterations")
        self.runs = [other for other in self.runs if any(other[name] != run[name] for name in key)]
        run |= {"points": [], "ended": "", "commit": commit(), "sources": digest(self.sources)}
        self.runs.append(run)
        return run

    def content(self) -> dict[str, Any]:
        """The sources are named where all runs are of today's."""
        content = {**describe(self.device), "settings": self.settings, "teacher": self.teacher, "command": self.command}
        if all(run["sources"] == digest(self.sources) for run in self.runs):
            content["sources"] = self.sources
        return content | {"results": self.runs}

    def write(self) -> None:
        if self.path is not None:
            write(self.path, self.content())


def digest(sources: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(sources).encode()).hexdigest()[:16]


def in_a_process(*arguments: Any, **options: Any) -> Worker:
    """A worker that holds one `TimedRun`, to be closed."""
    worker = Worker(functools.partial(timed_run.made, *arguments, **options))
    worker.start()
    return worker


def train(run: dict[str, Any], at: list[int], results: Results) -> None:
    """Trains and measures one run, and writes each measurement."""
    options = results.settings | {"device": results.worker_device}
    worker, limit = None, run["minutes"] * 60
    try:
        worker = in_a_process(RECIPES[run["recipe"]], run["iterations"], run["seed"], **options)
        run |= worker(operator.methodcaller("facts"))
        for to in at:
            point = worker(operator.methodcaller("advance", to, limit))
            is_late = point["iteration"] < to
            if not is_late or run["is_constant"]:
                point |= worker(operator.methodcaller("measure"))
                run["points"].append(point)
                print(line(run, point), flush=True)
            if is_late:
                run["ended"] = "limit"
                return
            results.write()
        run["ended"] = "whole"
    except RuntimeError as error:
        if worker is not None and worker.process is not None:  # it has diverged, and would again
            run["ended"] = f"failed: {error}"
        print(f"{run['recipe']}, seed {run['seed']}: {error}", flush=True)
    finally:
        if worker is not None:
            worker.close()
        results.write()


def line(run: dict[str, Any], point: dict[str, Any]) -> str:
    whole = "" if run["is_constant"] else f" of {run['iterations']}"
    return (
        f"{run['recipe']:<34} seed {run['seed']}, iteration {point['iteration']}{whole}: "
        f"{point['seconds']:.1f} s, Fréchet distance {point['frechet_distance']:.3f}"
    )


def would_be_late(before: dict[str, Any] | None, iterations: int, minutes: float) -> bool:
    """Whether a schedule takes longer than the limit, by the rate of a shorter one; or that one did already."""
    if before is None:
        return False
    if before["ended"] == "limit" or not before["points"]:
        return True
    last = before["points"][-1]
    begun, begun_seconds = (LOOK_EVERY, last["first_seconds"]) if last["iteration"] > LOOK_EVERY else (0, 0.0)
    rate = (last["iteration"] - begun) / (last["seconds"] - begun_seconds)
    return begun_seconds + (iterations - begun) / rate > minutes * 60


def benchmark(arguments: argparse.Namespace, results: Results) -> None:
    if results.teacher is None:
        options = results.settings | {"device": results.worker_device}
        worker = in_a_process(RECIPES["fastdmd, default"], 1, 0, **options)
        try:
            results.teacher = worker(operator.methodcaller("measure_teacher"))
        finally:
            worker.close()
        results.write()
    print(f"teacher: Fréchet distance {results.teacher['frechet_distance']:.3f}", flush=True)
    for seed in arguments.seeds:
        for name in arguments.recipes:
            before: dict[str, Any] | None = None
            for iterations, at in plan(name, arguments.schedules):
                run = results.ended(name, seed, iterations, arguments.minutes)
                if run is None:
                    if would_be_late(before, iterations, arguments.minutes):
                        print(f"{name}, seed {seed}: {iterations} iterations would take too long", flush=True)
                        break
                    own = {"recipe": name, "seed": seed, "iterations": iterations, "minutes": arguments.minutes}
                    run = results.begin(**own, is_constant=RECIPES[name].is_constant)
                    train(run, at, results)
                before = run


def numbers(text: str, name: str, least: int) -> list[int]:
    """Whole numbers separated by commas, each once. Raises ValueError."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < least or len(set(found)) < len(found):
        raise ValueError(f"expected --{name} as whole numbers from {least}, separated by commas, got {text}")
    return found


def parse() -> tuple[argparse.Namespace, Results]:
    """What is asked, and what the file has of it. Exits with code 2 for what means nothing."""
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--minutes", type=float, default=20.0, help="of training, of every run")
    parser.add_argument("--recipes", nargs="+", metavar="NAME", help=f"some of: {'; '.join(RECIPES)} (default: all)")
    parser.add_argument("--schedules", default=",".join(map(str, SCHEDULES)), help="iterations of whole schedules")
    parser.add_argument("--samples", type=int, default=5000, help="of each measurement")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "tf32", "bf16"])
    parser.add_argument("--json", type=Path, help="where to keep the figures, and to find those of earlier calls")
    arguments = parser.parse_args()
    try:
        arguments.seeds = numbers(arguments.seeds, "seeds", 0)
        arguments.schedules = numbers(arguments.schedules, "schedules", 2)
        arguments.recipes = arguments.recipes or list(RECIPES)
        if unknown := [name for name in arguments.recipes if name not in RECIPES]:
            raise ValueError(f"expected recipes out of {'; '.join(RECIPES)}, got {'; '.join(unknown)}")
        if not arguments.minutes >= LEAST_MINUTES:
            raise ValueError(f"expected --minutes of at least {LEAST_MINUTES:g}, got {arguments.minutes:g}")
        if arguments.samples < 2:
            raise ValueError(f"expected --samples of at least 2, got {arguments.samples}")
        own = resolve_device(arguments.device)
        device = own.type
        settings = {"device": device, "num_samples": arguments.samples, "precision": arguments.precision}
        command = ["-m", "benchmarks.time_to_quality", "--device", device]
        return arguments, Results(arguments.json, settings, command, str(own))
    except (ValueError, KeyError) as error:
        parser.exit(2, f"benchmarks.time_to_quality: error: {error}\n")


def main() -> None:
    arguments, results = parse()
    startup.settle_threads()  # of the processes that are begun here, as a command's are
    benchmark(arguments, results)
    print(reaching.told(results.content()))
    if lost := sum(not run["ended"] for run in results.runs):
        raise SystemExit(f"benchmarks.time_to_quality: error: {lost} runs broke off, see above; call it again for them")


if __name__ == "__main__":
    main()
