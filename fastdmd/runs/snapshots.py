"""Weights and samples of a run as it goes on, as long as both are good numbers."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fastdmd.ranks import Ranks
from fastdmd.runs.log import Log
from fastdmd.runs.pictures import SampleHistory, image_grid
from fastdmd.runs.record import Record
from fastdmd.runs.training import Training


class Snapshots:
    """What the folder of a run has of its network between checkpoints: the weights that it keeps, and their samples,
    of which the record and the log are told. All ranks take them together; the first one writes."""

    def __init__(self, training: Training, history: SampleHistory, record: Record, log: Log, ranks: Ranks):
        self._training, self._history, self._record, self._log = training, history, record, log
        self._ranks = ranks

    def take(self, iteration: int) -> str | None:
        """Writes one, unless the network is broken: then it returns how, to all processes."""
        if not self._training.is_in_parts:
            return self._ranks.from_first(lambda: self._take(iteration, self._show))
        return self._take(iteration, lambda *shown: self._ranks.from_first(lambda: self._show(*shown)))

    def take_alone(self, iteration: int) -> None:
        """By the first process, where it has all that one is made of, whatever has become of the others."""
        if self._ranks.is_first and not self._training.is_in_parts:
            self._take(iteration, self._show)

    def show(self, iteration: int) -> None:
        """Samples alone, in the place of those of this iteration: another average is kept since."""
        samples = self._training.samples()
        self._ranks.from_first(lambda: self._show(samples, iteration))

    def _take(self, iteration: int, show: Callable[[Tensor, int], None]) -> str | None:
        if (fault := self._training.fault()) is not None:
            return f"NaN or infinity in {fault}"
        samples = self._training.samples()
        if not samples.isfinite().all():
            return "NaN or infinity in its samples"
        try:
            self._training.save(iteration)
        except ValueError as error:  # weights beyond what the file's precision holds
            return str(error)
        show(samples, iteration)
        return None

    def _show(self, samples: Tensor, iteration: int) -> None:
        self._history.add(samples, iteration)
        self._record.samples(iteration, lambda: image_grid(samples.flatten(0, 1), samples.shape[1]))
        self._log.see_average(samples)
