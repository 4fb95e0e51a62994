"""How good a run is as it goes on: every average measured on the same noise, the best one kept, and when to stop."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from fastdmd.quality import Evaluation, Measurement
from fastdmd.quality.settings import Monitor
from fastdmd.runs import quality_plot
from fastdmd.runs.candidates import Candidates
from fastdmd.runs.folder import PLOT, RunFolder
from fastdmd.runs.record import Record
from fastdmd.sampling import Sampler
from fastdmd.saved import COUNT, MAPPING, NUMBER, Rule, list_of, one_of, require

Keep = Callable[[Callable[[], None]], None]  # writes now; where the disk does not take it, says so and goes on
Measure = Callable[[str, Sampler], Measurement | None]  # None where there is nothing to say but what was said


class Measured(Protocol):
    """What a course is of."""

    @property
    def candidates(self) -> Candidates: ...

    def save_best(self, iteration: int, **information: Any) -> None:
        """Writes what is kept at this moment to a file of its own."""

    def best_sampler(self) -> Sampler:
        """Of that file."""


@dataclasses.dataclass(frozen=True)
class Best:
    """The measurement with the least distance so far; its weights are on the disk."""

    iteration: int
    average: str
    frechet_distance: float


class Course:
    """The measurements of one run while it trains, and what follows from them: lines, picture, best weights, an end.

    They read the averages and touch nothing that is trained. With `--eval-every 0` none is due, and the choice among
    averages at the end is what remains. Raises ValueError where measurements are due and there is no Fréchet distance.
    """

    def __init__(
        self, training: Measured, monitor: Monitor, evaluation: Evaluation | None, folder: RunFolder, batch_size: int
    ):
        self._training, self._monitor, self._folder, self._batch_size = training, monitor, folder, batch_size
        self._curves: dict[str, list[tuple[int, float]]] = {name: [] for name in training.candidates.samplers}
        self._levels: dict[str, float] = {}
        self._num_worse = 0  # measurements since the best
        self.best: Best | None = None
        self._evaluation: Evaluation | None = None
        if monitor.eval_every:
            if evaluation is None or not evaluation.has_distance:
                got = "none" if evaluation is None else next(iter(evaluation.notices), "none")
                raise ValueError(f"expected a Fréchet distance for --eval-every, got {got}")
            quality_plot.require()
            self._evaluation = copy.copy(evaluation)  # with its reference, its features and its real images
            self._evaluation.num_samples = monitor.eval_samples
            self._add_level("real images", self._evaluation.floor)

    @property
    def kept(self) -> str:
        """The average that is the run's result, as far as it has been measured."""
        return self._training.candidates.kept

    def is_due(self, iteration: int, *, is_last: bool) -> bool:
        every = self._monitor.eval_every
        return every > 0 and (is_last or iteration % every == 0)

    def evaluate(
        self,
        iteration: int,
        *,
        before_batch: Callable[[], None],
        keep: Keep,
        say: Callable[[str], None],
        record: Record,
    ) -> None:
        """Measures every average, keeps the best, and writes; whatever `before_batch` raises ends it before that.

        An average whose images are not finite has a line that says so, and no figures.
        """
        assert self._evaluation is not None
        lines: list[dict[str, Any]] = []
        measured: dict[str, Measurement] = {}
        images = iteration * self._batch_size
        for name, sampler in self._training.candidates.samplers.items():
            line: dict[str, Any] = {"iteration": iteration, "images": images, "average": name}
            try:
                measured[name] = self._evaluation.measure(sampler, name=name, before_batch=before_batch)
                line |= dataclasses.asdict(measured[name])
            except ValueError as error:
                line |= {"fault": str(error)}
                say(f"iteration {iteration}: {name} not measured: {error}")
            lines.append(line)
        row = self._training.candidates.choose(measured)
        keep(lambda: record.measurements(lines))
        for name, found in measured.items():
            if found.frechet_distance is not None:
                self._curves[name].append((images, found.frechet_distance))
        keep(self._draw)
        before = self.best
        if row is not None and row.frechet_distance is not None:
            is_better = before is None or row.frechet_distance < before.frechet_distance
            told = f"Fréchet distance {row.frechet_distance:.4g}, {self._training.candidates.kept}"
            say(f"iteration {iteration}: {told}{', the best so far' * is_better}")
            if is_better:
                keep(functools.partial(self._save_best, iteration, row, self._evaluation))
        self._num_worse = self._num_worse + 1 if self.best is before else 0

    @property
    def verdict(self) -> str | None:
        """Why the run should end, if it should."""
        if not 0 < self._monitor.stop_after <= self._num_worse:
            return None
        if self.best is None:
            return f"no Fréchet distance in {self._num_worse} measurements"
        return (
            f"no better Fréchet distance than {self.best.frechet_distance:.4g}, of iteration {self.best.iteration}, in "
            f"{self._num_worse} measurements"
        )

    def state_dict(self) -> dict[str, Any]:
        """The weights of the best are a file of the run's folder."""
        best = None if self.best is None else dataclasses.asdict(self.best)
        return {"curves": self._curves, "num_worse": self._num_worse, "best": best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError for what is none of it."""
        point = Rule("a place and a distance", lambda value: len(value) == 2 and all(map(NUMBER.allows, value)))
        require("course", state, {"curves": MAPPING, "num_worse": COUNT, "best": MAPPING.or_none()})
        require("course.curves", state["curves"], dict.fromkeys(self._curves, list_of(point)))
        if state["best"] is not None:
            rules = {"iteration": COUNT, "average": one_of(*self._curves), "frechet_distance": NUMBER}
            require("course.best", state["best"], rules)
        self._curves = {
            name: [(images, distance) for images, distance in state["curves"][name]] for name in self._curves
        }
        self._num_worse = state["num_worse"]
        self.best = None if state["best"] is None else Best(**state["best"])

    # At the end.

    def choose(self, name: str, measure: Measure) -> Measurement | None:
        """Measures every average as the result of the run, keeps the best, and returns its measurement."""
        candidates, measured = self._training.candidates, {}
        num_averages = len(candidates.samplers)
        for average, sampler in candidates.samplers.items():
            row = measure(f"{name}, {average}" if num_averages > 1 else name, sampler)
            if row is not None:
                measured[average] = row
        kept = candidates.choose(measured)
        if num_averages > 1 and kept is not None and kept.frechet_distance is not None:
            print(f"average: {candidates.kept}, best of {num_averages}")
        return kept

    def measure_best(
        self, iteration: int, last: Measurement | None, evaluation: Evaluation, measure: Measure
    ) -> Measurement | None:
        """The measurement, as that of `last` was made, of the best weights, where they are not those of `iteration`.

        Where they are, what the run keeps is the best: of more images, the choice may be another. `last` is None where
        what the run keeps could not be measured.
        """
        if self.best is None:
            return None
        if self.best.iteration != iteration:
            return measure("best", self._training.best_sampler())
        if last is not None:
            self._save_best(iteration, last, evaluation)
        return None

    def finish(self, rows: Mapping[str, Measurement]) -> None:
        """Draws the teacher, which has been measured by now, too."""
        if self._evaluation is not None:
            if "teacher" in rows:
                self._add_level("teacher", rows["teacher"])
            self._draw()

    def titles(self, rows: Mapping[str, Measurement]) -> dict[str, str]:
        """What rows are called in the table, where their names do not say it."""
        if self.best is None or "best" not in rows:
            return {}
        return {"generator": "generator, last", "best": f"generator, best at iteration {self.best.iteration}"}

    def summary(self) -> dict[str, Any]:
        """For summary.json."""
        return {
            "average": self.kept,
            "best_iteration": None if self.best is None else self.best.iteration,
            "best_average": None if self.best is None else self.best.average,
        }

    def _save_best(self, iteration: int, row: Measurement, evaluation: Evaluation) -> None:
        assert row.frechet_distance is not None
        self._training.save_best(iteration, record=evaluation.record(row))
        self.best = Best(iteration, self._training.candidates.kept, row.frechet_distance)

    def _add_level(self, name: str, row: Measurement) -> None:
        if row.frechet_distance is not None:
            self._levels[f"{name}, {row.num_images} images"] = row.frechet_distance

    def _draw(self) -> None:
        if not self._folder.is_written:
            return
        num_steps = self._training.candidates.sampler.num_evaluations
        samples = f"{self._monitor.eval_samples} samples of {num_steps} step{'s' if num_steps > 1 else ''}"
        title = f"{self._folder.path.name}: {samples} a measurement"
        curves = {name: curve for name, curve in self._curves.items() if curve}
        quality_plot.draw(self._folder.path / PLOT, curves, self._levels, title=title)
