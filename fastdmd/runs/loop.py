"""The phases of every training, once: iterate, log, keep what is finite, measure, report."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from torch import Tensor, nn
from tqdm import tqdm

from fastdmd.distill.tally import Reading, Tally
from fastdmd.networks.user_code import reason
from fastdmd.quality import Evaluation, Measurement, table
from fastdmd.quality.alarms import Alarm
from fastdmd.quality.watch import Watch
from fastdmd.runs import interrupts
from fastdmd.runs.course import Course
from fastdmd.runs.folder import RunFolder
from fastdmd.runs.machine import versions
from fastdmd.runs.pictures import SampleHistory
from fastdmd.runs.progress import Interrupted, Progress, Received, show, stop_if_interrupted
from fastdmd.sampling import Sampler

BAD_IN_A_ROW = 10  # turns that end a run; fewer where all of it has few


class LoopSettings(Protocol):
    """What the loop reads of a configuration."""

    @property
    def iterations(self) -> int: ...

    @property
    def batch_size(self) -> int: ...

    @property
    def log_every(self) -> int: ...

    @property
    def snapshots(self) -> int: ...


class Training(Protocol):
    """What the loop is given: one step of it, and what to keep, to show and to measure."""

    @property
    def network(self) -> nn.Module:
        """The one that is kept, shown and measured."""

    @property
    def tallies(self) -> Sequence[Tally]:
        """Of its kinds of turns."""

    def iterate(self, iteration: int) -> None: ...

    def finish(self) -> None:
        """What is left to do to the network when no iteration follows."""

    def samples(self) -> Tensor:
        """For samples.png: `[rows, columns, C, H, W]`; column 0 keeps its noise from call to call."""

    def save(self, iteration: int, **information: Any) -> None: ...

    def measurements(self) -> Iterable[tuple[str, Sampler, dict | None]]:
        """Rows of the table, `network` first: name, sampler, what is on record of it."""


class Loop:
    """One training in one run folder, measured meanwhile as `course` wants it. To make it is the last part of the
    set-up: the first snapshot is in the folder.

    `watch` looks at what the log tells, for alarms. Raises ValueError where the network gives NaN or infinity before it
    has learned anything.
    """

    def __init__(
        self,
        training: Training,
        settings: LoopSettings,
        folder: RunFolder,
        course: Course | None = None,
        watch: Watch | None = None,
    ):
        self._training, self._settings, self._folder = training, settings, folder
        self._course, self._watch = course, watch
        self._history = SampleHistory(folder.path / "samples.png")
        self._started = time.perf_counter()
        self._unwritten: str | None = None  # what the disk said last
        if (fault := self._snapshot(0)) is not None:
            raise ValueError(f"fastdmd: expected a network to start from, got {fault}")

    def run(self, evaluation: Evaluation | None = None) -> dict:
        """Trains, saves, measures; returns the summary that it wrote.

        Its `outcome` is "complete", "interrupted" (by a signal: what was reached is saved) or "diverged" (the last
        snapshot whose weights and images were finite stays). Raises OSError where the result cannot be written, and
        whatever a network of the user's own or a lack of memory raises: then the outcome in the folder is "failed", and
        what was reached is saved.
        """
        progress = Progress()
        rows: dict[str, Measurement] = {}
        floor = evaluation.floor if evaluation else Measurement(None, None)
        with interrupts.deferred() as received:
            try:
                self._train(progress, received)
                self._measure(evaluation, progress, rows, received)
            except (Exception, SystemExit) as error:
                progress.outcome, progress.reason = "failed", reason(error)
                if progress.iterations < self._settings.iterations:
                    with contextlib.suppress(Exception, SystemExit):  # the network may not run for this either
                        self._snapshot(progress.iterations)
                with contextlib.suppress(OSError):
                    self._summarise(progress, rows, floor)
                raise
            summary = self._summarise(progress, rows, floor)
        if evaluation is not None and progress.outcome == "complete":
            titles = {} if self._course is None else self._course.titles(rows)
            shown = {titles.get(name, name): row for name, row in reversed(rows.items())}
            print(table({**shown, "floor: real images": floor}))
        return summary

    def _summarise(self, progress: Progress, rows: dict[str, Measurement], floor: Measurement) -> dict:
        names = dict.fromkeys([*(name for name, *_ in self._training.measurements()), *rows])
        summary = {
            **{name: dataclasses.asdict(rows.get(name, Measurement(None, None))) for name in names},
            "floor": dataclasses.asdict(floor),
            **({} if self._course is None else self._course.summary()),
            **dataclasses.asdict(progress),
            "seconds": time.perf_counter() - self._started,
            "versions": versions(next(self._training.network.parameters()).device),
        }
        self._folder.write_json("summary.json", summary)
        return summary

    def _train(self, progress: Progress, received: Received) -> None:
        settings, logged_at = self._settings, 0
        snapshot_every = -(-settings.iterations // settings.snapshots)
        started = logged = time.perf_counter()
        with tqdm(total=settings.iterations, unit="it", dynamic_ncols=True) as bar:
            while progress.iterations < settings.iterations and progress.goes_on:
                self._training.iterate(progress.iterations)
                progress.iterations += 1
                bar.update()
                iteration, is_last = progress.iterations, progress.iterations == settings.iterations
                if iteration == 1:
                    self._training.tallies[0].latest.tolist()  # waits for the device
                    progress.first_iteration_seconds = time.perf_counter() - self._started
                    bar.write(f"first iteration done after {progress.first_iteration_seconds:.1f} s")
                if (number := received()) is not None:
                    progress.outcome, progress.signal = "interrupted", number
                elif self._course is not None and self._course.is_due(iteration, is_last=is_last):
                    seconds = self._evaluate(self._course, progress, received, bar)
                    started += seconds
                    logged += seconds
                if iteration % settings.log_every == 0 or is_last or not progress.goes_on:
                    readings = [tally.read() for tally in self._training.tallies]
                    num_images, now = (iteration - logged_at) * settings.batch_size, time.perf_counter()
                    line = self._line(readings, progress)
                    alarms = self._look(readings, line, progress)
                    line |= {"seconds": now - started, "images_per_second": num_images / (now - logged)}
                    self._keep(functools.partial(self._folder.log, **line), bar)
                    show(bar, line, alarms)
                    self._judge(readings, progress, iteration - logged_at)
                    logged_at, logged = iteration, now
                if iteration % snapshot_every == 0 and not is_last and progress.goes_on:
                    self._keep(lambda: self._snapshot_or_end(progress), bar)
        if progress.outcome != "diverged":
            self._training.finish()
            self._snapshot_or_end(progress)
        progress.train_seconds = time.perf_counter() - self._started - progress.evaluation_seconds

    def _evaluate(self, course: Course, progress: Progress, received: Received, bar: tqdm) -> float:
        """A measurement of `course`, after which the run may end; the seconds that it took."""
        before = time.perf_counter()
        try:
            course.evaluate(
                progress.iterations,
                before_batch=functools.partial(stop_if_interrupted, received),
                keep=lambda write: self._keep(write, bar),
                say=bar.write,
            )
        except Interrupted:
            progress.outcome, progress.signal = "interrupted", received()
        is_last = progress.iterations == self._settings.iterations
        if progress.goes_on and not is_last and (verdict := course.verdict) is not None:
            progress.reason = f"ended early: {verdict}"
            bar.write(progress.reason)
        seconds = time.perf_counter() - before
        progress.evaluation_seconds += seconds
        return seconds

    def _measure(
        self,
        evaluation: Evaluation | None,
        progress: Progress,
        rows: dict[str, Measurement],
        received: Received,
    ) -> None:
        course = self._course
        if progress.outcome != "complete" or evaluation is None:
            return

        def measure(name: str, sampler: Sampler, record: dict | None = None) -> Measurement | None:
            before_batch = functools.partial(stop_if_interrupted, received)
            try:
                return evaluation.measure(sampler, name=name, record=record, before_batch=before_batch)
            except ValueError as error:  # images that are not finite, among ten thousand
                fault = f"{name} not measured: {error}"
                progress.reason = fault if progress.reason is None else f"{progress.reason}; {fault}"
                print(fault)
                return None

        try:
            (name, sampler, record), *_ = self._training.measurements()
            row = measure(name, sampler, record) if course is None else course.choose(name, measure)
            if row is not None:
                rows[name] = row
                self._training.save(progress.iterations, record=evaluation.record(row))
            if course is not None and (best := course.measure_best(progress.iterations, row, evaluation, measure)):
                rows["best"] = best
            _, *others = self._training.measurements()  # of the average that is kept by now
            for other, sampler, record in others:
                if (row := measure(other, sampler, record)) is not None:
                    rows[other] = row
            if course is not None:
                course.finish(rows)
        except Interrupted:
            progress.outcome, progress.signal = "interrupted", received()

    def _line(self, readings: list[Reading], progress: Progress) -> dict[str, Any]:
        """For metrics.jsonl; what never happens is not mentioned."""
        line: dict[str, Any] = {"iteration": progress.iterations}
        for reading in readings:
            if reading.num_good + reading.num_bad:
                line |= reading.means
        skipped = sum(reading.num_bad for reading in readings)
        left_out = round(sum(reading.left_out for reading in readings) * self._settings.batch_size)
        progress.skipped_updates += skipped
        progress.left_out_images += left_out
        counts = {"skipped_updates": skipped, "left_out_images": left_out}
        return line | {name: count for name, count in counts.items() if count}

    def _look(self, readings: list[Reading], line: dict[str, Any], progress: Progress) -> list[Alarm]:
        """The alarms that begin, which the line then holds, too; the first tally is that of the watched images, the
        second that of the turns in which a discriminator judges as many real and generated ones."""
        if self._watch is None:
            return []
        num_images, num_judged = (
            num_turns * self._settings.batch_size for num_turns in (readings[0].num_watched, 2 * readings[1].num_good)
        )
        figures, alarms = self._watch.read(progress.iterations, line, num_images, num_judged)
        line |= figures | ({"alarms": [alarm.kind for alarm in alarms]} if alarms else {})
        progress.alarms += alarms
        return alarms

    def _judge(self, readings: list[Reading], progress: Progress, num_iterations: int) -> None:
        """Ends a run whose last turns of a kind all came to nothing; the readings are of so many iterations."""
        for reading in readings:
            num_turns = (reading.num_good + reading.num_bad) * self._settings.iterations // num_iterations  # of the run
            if reading.num_bad_in_a_row >= min(BAD_IN_A_ROW, max(2, num_turns // 2)):
                progress.outcome = "diverged"
                what = "the losses are not finite"
                if any(other.left_out for other in readings):
                    what = "the teacher or the fake score gives NaN or infinity for most images"
                progress.reason = f"{what}, {reading.num_bad_in_a_row} updates in a row"
                return

    def _snapshot_or_end(self, progress: Progress) -> None:
        if (fault := self._snapshot(progress.iterations)) is not None:
            progress.outcome, progress.reason = "diverged", f"there is {fault}"

    def _snapshot(self, iteration: int) -> str | None:
        """Writes weights and samples, unless the network is broken: then it returns how."""
        for name, tensor in self._training.network.state_dict().items():
            if not tensor.isfinite().all():
                return f"NaN or infinity in {name}"
        samples = self._training.samples()
        if not samples.isfinite().all():
            return "NaN or infinity in its samples"
        try:
            self._training.save(iteration)
        except ValueError as error:  # weights beyond what the file's precision holds
            return str(error)
        self._history.add(samples)
        if self._watch is not None:
            self._watch.see_average(samples)
        return None

    def _keep(self, write: Callable[[], None], bar: tqdm) -> None:
        """Training goes on where the disk does not: a later write may succeed, and the last one must."""
        try:
            write()
            self._unwritten = None
        except OSError as error:
            if str(error) != self._unwritten:
                self._unwritten = str(error)
                bar.write(f"not written: {error}; training goes on")
