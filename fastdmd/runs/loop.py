"""The phases of every training, once: iterate, log, keep what is finite, measure, report."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from fastdmd import bars
from fastdmd.networks.user_code import reason
from fastdmd.quality import Evaluation, Measurement, table
from fastdmd.quality.watch import Watch
from fastdmd.ranks import ALONE, Ranks
from fastdmd.runs import closing, interrupts, randomness
from fastdmd.runs.agreement import Agreement
from fastdmd.runs.checkpoints import Checkpoints
from fastdmd.runs.course import Course
from fastdmd.runs.folder import SAMPLES, SUMMARY, RunFolder
from fastdmd.runs.log import Log, first_fault
from fastdmd.runs.machine import versions
from fastdmd.runs.pictures import SampleHistory
from fastdmd.runs.progress import ENDED_EARLY, Interrupted, Progress, stop_if_interrupted
from fastdmd.runs.record import Record
from fastdmd.runs.snapshots import Snapshots
from fastdmd.runs.training import LoopSettings, Resumable, Training
from fastdmd.saved import AMOUNT, MAPPING, require

# Of several processes: a scheduler may send a signal to all of a job, and torchrun passes on the one that it gets.
ECHO_SECONDS = 10.0


class Loop:
    """One training in one run folder, measured meanwhile as `course` wants it. To make it is the last part of the
    set-up: the first snapshot is in the folder, or what `checkpoints` have of a run that goes on is where it belongs.
    With them, `training` is `Resumable`, too.

    `watch` looks at what the log tells, for alarms; `record` is told what the folder is. Several `ranks` all run it;
    the first one writes and decides. Raises ValueError where the network gives NaN or infinity before it has learned
    anything, where no checkpoint is whole, and where ranks start from other weights.
    """

    def __init__(
        self,
        training: Training,
        settings: LoopSettings,
        folder: RunFolder,
        course: Course | None = None,
        watch: Watch | None = None,
        checkpoints: Checkpoints | None = None,
        record: Record | None = None,
        ranks: Ranks = ALONE,
    ):
        self._training, self._settings, self._folder = training, settings, folder
        self._course, self._checkpoints, self._ranks = course, checkpoints, ranks
        self._record = Record(folder) if record is None else record
        self._log = Log(training, settings, self._record, watch)
        self._history = SampleHistory(folder.path / SAMPLES)
        self._snapshots = Snapshots(training, self._history, self._record, self._log, ranks)
        self._progress = Progress()
        self._started = time.perf_counter()
        self._unwritten: str | None = None  # what the disk said last
        self._is_on_cpu = next(training.network.parameters()).device.type == "cpu"
        goes_on = checkpoints is not None and checkpoints.restore(self.load_state_dict)
        if not ranks.is_alone:
            ranks.require_equal("weights", lambda: f"{self._progress.iterations} {training.digest()}")
        self._record.start(self._progress.iterations)
        if goes_on:
            return
        randomness.part(ranks.rank, iteration=0)
        with ranks.reaching_all():
            fault = self._snapshots.take(0)
        if fault is not None:
            raise ValueError(f"fastdmd: expected a network to start from, got {fault}")

    def run(self, evaluation: Evaluation | None = None) -> dict:
        """Trains, saves, measures; returns the summary that it wrote.

        Its `outcome` is "complete", "interrupted" (by a signal: what was reached is saved) or "diverged" (the last
        snapshot whose weights and images were finite stays). Raises OSError where the result cannot be written, and
        whatever a network of the user's own or a lack of memory raises: then the outcome in the folder is "failed", and
        what was reached is saved.
        """
        progress = self._progress
        rows: dict[str, Measurement] = {}
        floor = evaluation.floor if evaluation else Measurement(None, None)
        with (
            self._folder,
            contextlib.closing(self._record),
            interrupts.deferred(0.0 if self._ranks.is_alone else ECHO_SECONDS) as received,
            interrupts.asked() as is_asked,
        ):
            agreement = Agreement(self._ranks, received, progress.iterations, self._wait)
            try:
                with self._ranks.reaching_all():  # networks in parts exchange them whenever they run
                    self._train(progress, agreement, is_asked)
                    closing.measure(
                        self._training, self._course, evaluation, progress, rows, agreement.signal, self._snapshots
                    )
            except (Exception, SystemExit) as error:
                progress.outcome, progress.reason = "failed", reason(error)
                if progress.iterations < self._settings.iterations:
                    with contextlib.suppress(Exception, SystemExit):  # the network may not run for this either
                        self._snapshots.take_alone(progress.iterations)
                with contextlib.suppress(OSError):
                    self._summarise(progress, rows, floor)
                raise
            summary = self._summarise(progress, rows, floor)
            self._record.result(progress.iterations, rows)
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
        self._folder.write_json(SUMMARY, summary)
        return summary

    def _train(self, progress: Progress, agreement: Agreement, is_asked: Callable[[], bool]) -> None:
        settings, checkpoints = self._settings, self._checkpoints

        def is_due() -> bool:
            if checkpoints is None:
                return False
            is_last = progress.iterations == settings.iterations
            return checkpoints.is_due(progress.iterations, is_last=is_last, is_asked=is_asked())

        self._log.start()
        with bars.bar(total=settings.iterations, initial=progress.iterations, unit="it") as bar:
            if progress.iterations > 0:
                self._attend(progress, agreement, bar)  # to what was due when the checkpoint was written
            while progress.iterations < settings.iterations and progress.goes_on:
                self._training.iterate(progress.iterations)
                progress.iterations += 1
                bar.update()
                if progress.iterations == 1:
                    self._wait()
                    progress.first_iteration_seconds = time.perf_counter() - self._started
                    bar.write(f"first iteration done after {progress.first_iteration_seconds:.1f} s")
                if agreement.look(progress.iterations, is_fixed=self._is_fixed, is_due=is_due):
                    assert checkpoints is not None
                    self._write_checkpoint(checkpoints, bar)
                self._attend(progress, agreement, bar)
        if progress.outcome != "diverged":
            self._training.finish()
            self._snapshot_or_end(progress)
        progress.train_seconds = time.perf_counter() - self._started - progress.evaluation_seconds

    def _wait(self) -> None:
        """For the device."""
        self._training.tallies[0].latest.tolist()

    def _due(self) -> tuple[bool, bool, bool]:
        """After this iteration: a line of the log, a snapshot, a measurement."""
        settings, iteration = self._settings, self._progress.iterations
        is_last = iteration == settings.iterations
        is_logged = is_last or iteration % settings.log_every == 0
        is_shown = not is_last and iteration % -(-settings.iterations // settings.snapshots) == 0
        return is_logged, is_shown, self._course is not None and self._course.is_due(iteration, is_last=is_last)

    def _is_fixed(self) -> bool:
        """Whether the settings name this iteration for anything."""
        of_checkpoint = self._checkpoints is not None and self._checkpoints.is_fixed(self._progress.iterations)
        return of_checkpoint or any(self._due())

    def _attend(self, progress: Progress, agreement: Agreement, bar: tqdm) -> None:
        """To what is due after an iteration, all of which comes after its checkpoint: a measurement, a line of the log,
        a snapshot. A run that a signal ends leaves a checkpoint from before that."""
        is_logged, is_shown, is_measured = self._due()
        number = agreement.seen()
        self._look(progress, must=is_logged or is_shown or is_measured or number is not None)
        if progress.goes_on and number is not None:
            progress.outcome, progress.signal = "interrupted", number
        if progress.goes_on and is_measured and self._course is not None:
            self._evaluate(self._course, progress, agreement, bar)
        if progress.outcome == "interrupted" and self._checkpoints is not None and not self._checkpoints.is_off:
            self._write_checkpoint(self._checkpoints, bar)
        keep = functools.partial(self._keep, bar=bar)
        if is_logged or not progress.goes_on:
            self._log.write(progress, bar, keep)
        if is_shown and progress.goes_on:
            keep(lambda: self._snapshot_or_end(progress))

    def _look(self, progress: Progress, *, must: bool) -> None:
        """Ends the run at the first fault with --nan-policy stop. A device that the host would have to wait for is
        asked where it `must` be, as are other processes; from the fault on it has let nothing move."""
        if must and not self._ranks.is_alone:
            self._training.exchange()
        must = must or (self._is_on_cpu and self._ranks.is_alone)
        if self._settings.nan_policy == "stop" and progress.outcome == "complete" and must:
            if (fault := first_fault(tally.fault() for tally in self._training.tallies)) is not None:
                broken = self._training.fault()  # what moved last made it, and all else comes from it
                progress.diverge(str(fault if broken is None else fault._replace(name=broken)))

    def _write_checkpoint(self, checkpoints: Checkpoints, bar: tqdm) -> None:
        """Of good numbers: else the run ends, before it takes the place of an older one."""
        progress = self._progress
        self._look(progress, must=True)
        if progress.outcome != "diverged" and (fault := self._training.fault()) is not None:
            progress.diverge(f"there is NaN or infinity in {fault}")
        if progress.outcome != "diverged":
            others = self._ranks.gather_to_first(randomness.state())[1:]
            if self._ranks.is_first or self._training.is_in_parts:
                state = functools.partial(self.state_dict, others)
                self._keep(lambda: checkpoints.write(progress.iterations, state), bar)

    def state_dict(self, random_of_others: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
        """After an iteration, before what is due then."""
        return {
            **{name: part.state_dict() for name, part in self._parts().items()},
            "seconds": time.perf_counter() - self._started,
            "random": randomness.state() | {"others": list(random_of_others)},
        }

    def load_state_dict(self, state: Mapping[str, Any], iteration: int) -> None:
        """From a state of this iteration. Raises ValueError for one that is none of it, or of another iteration."""
        parts = self._parts()
        require("run", state, {**dict.fromkeys(parts, MAPPING), "seconds": AMOUNT, "random": MAPPING})
        counts = {
            "progress.iterations": state["progress"].get("iterations"),
            "training.next": state["training"].get("next", iteration),
        }
        for name, count in counts.items():
            if type(count) is not int or count != iteration:
                raise ValueError(f"expected {name} to be {iteration}, which the checkpoint is of, got {count!r:.60}")
        if iteration > self._settings.iterations:
            raise ValueError(
                f"expected a checkpoint of {self._settings.iterations} iterations or less, got {iteration}"
            )
        for name, part in parts.items():
            part.load_state_dict(state[name])
        self._started = time.perf_counter() - state["seconds"]
        randomness.restore(state["random"], self._ranks, iteration)

    def _parts(self) -> dict[str, Resumable]:
        parts: dict[str, Any] = {"progress": self._progress, "log": self._log, "samples": self._history}
        parts["training"] = self._training
        return parts if self._course is None else {**parts, "course": self._course}

    def _evaluate(self, course: Course, progress: Progress, agreement: Agreement, bar: tqdm) -> None:
        """A measurement of `course`, after which the run may end."""
        before = time.perf_counter()
        try:
            course.evaluate(
                progress.iterations,
                before_batch=functools.partial(stop_if_interrupted, agreement.signal),
                keep=lambda write: self._keep(write, bar),
                say=bar.write,
                record=self._record,
            )
        except Interrupted:
            progress.outcome, progress.signal = "interrupted", agreement.signal()
        is_last = progress.iterations == self._settings.iterations
        if progress.goes_on and not is_last and (verdict := course.verdict) is not None:
            progress.reason = f"{ENDED_EARLY}: {verdict}"
            bar.write(progress.reason)
        seconds = time.perf_counter() - before
        progress.evaluation_seconds += seconds
        self._log.pause(seconds)

    def _snapshot_or_end(self, progress: Progress) -> None:
        if (fault := self._snapshots.take(progress.iterations)) is not None:
            progress.outcome, progress.reason = "diverged", f"there is {fault}"

    def _keep(self, write: Callable[[], None], bar: tqdm) -> None:
        """Training goes on where the disk does not: a later write may succeed, and the last one must."""
        try:
            write()
            self._unwritten = None
        except ConnectionError:  # of another process
            raise
        except OSError as error:
            if str(error) != self._unwritten:
                self._unwritten = str(error)
                bar.write(f"not written: {error}; training goes on")
