"""The log of a run: a line of metrics.jsonl per interval, the alarms in it, and whether training came to nothing."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor
from tqdm import tqdm

from fastdmd.distill.guard import Fault
from fastdmd.distill.tally import Reading
from fastdmd.memory import taken_bytes
from fastdmd.quality.alarms import Alarm
from fastdmd.quality.watch import Watch
from fastdmd.runs.progress import Progress, show
from fastdmd.runs.record import Record
from fastdmd.runs.training import LoopSettings, Training
from fastdmd.saved import AMOUNT, COUNT, MAPPING, one_of, require

BAD_IN_A_ROW = 10  # turns that end a run; fewer where all of it has few

Keep = Callable[[Callable[[], None]], None]  # writes now; where the disk does not take it, says so and goes on


class Log:
    """Reads the tallies of a training; `watch` looks at what they tell, for alarms."""

    def __init__(self, training: Training, settings: LoopSettings, record: Record, watch: Watch | None):
        self._training, self._settings, self._record, self._watch = training, settings, record, watch
        self._device = next(training.network.parameters()).device
        self._iteration = 0  # of the last line
        self._seconds = self._since = 0.0  # of training, in all and since the last line, when the clocks start
        self._started = self._written = time.perf_counter()

    def start(self) -> None:
        """The clocks."""
        now = time.perf_counter()
        self._started, self._written = now - self._seconds, now - self._since

    def pause(self, seconds: float) -> None:
        """So many were no training."""
        self._started += seconds
        self._written += seconds

    def write(self, progress: Progress, bar: tqdm, keep: Keep) -> None:
        """A line of the iterations since the last one, which may end the run."""
        readings = [tally.read() for tally in self._training.tallies]
        num_iterations, now = progress.iterations - self._iteration, time.perf_counter()
        line = self._line(readings, progress)
        alarms = self._look(readings, line, progress)
        if (fault := first_fault(reading.fault for reading in readings)) is not None:
            line |= {"not_finite": fault.name, "not_finite_at": fault.iteration}
        images_per_second = num_iterations * self._settings.batch_size / (now - self._written)
        line |= {"seconds": now - self._started, "images_per_second": images_per_second, **taken_bytes(self._device)}
        keep(functools.partial(self._record.line, line))
        show(bar, line, alarms)
        self._judge(readings, progress, num_iterations)
        self._iteration, self._written = progress.iterations, now

    def see_average(self, samples: Tensor) -> None:
        """Samples of a snapshot, of which the watch wants to know."""
        if self._watch is not None:
            self._watch.see_average(samples)

    def state_dict(self) -> dict[str, Any]:
        now = time.perf_counter()
        return {
            "iteration": self._iteration,
            "seconds": now - self._started,
            "since": now - self._written,
            "watch": None if self._watch is None else self._watch.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        watch = one_of(None) if self._watch is None else MAPPING
        require("log", state, {"iteration": COUNT, "seconds": AMOUNT, "since": AMOUNT, "watch": watch})
        self._iteration = state["iteration"]
        self._seconds, self._since = state["seconds"], state["since"]
        if self._watch is not None:
            self._watch.load_state_dict(state["watch"])

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
        if not progress.goes_on:
            return
        if any(reading.num_bad for reading in readings) and (fault := self._training.fault()) is not None:
            progress.diverge(f"NaN or infinity in {fault}")  # which no update mends
            return
        for reading in readings:
            num_turns = (reading.num_good + reading.num_bad) * self._settings.iterations // num_iterations  # of the run
            if reading.num_bad_in_a_row >= min(BAD_IN_A_ROW, max(2, num_turns // 2)):
                what = reading.fault or "NaN or infinity of teacher or fake score for most images"
                progress.diverge(f"{reading.num_bad_in_a_row} updates in a row left out: {what}")
                return


def first_fault(faults: Iterable[Fault | None]) -> Fault | None:
    """The earliest; of those of one iteration the first."""
    return min((fault for fault in faults if fault is not None), key=lambda fault: fault.iteration, default=None)
