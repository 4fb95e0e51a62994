"""What comes at a moment, not at an iteration: a signal, a checkpoint that the clock or somebody asks for; of several
processes the same in all of them."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from fastdmd.ranks import Ranks
from fastdmd.runs.progress import Received

SECONDS = 1.0  # between two iterations at which processes agree, as far as their number tells


class Agreement:
    """Alone, a process looks after every iteration, from `iteration` on. Several tell each other, by their hosts alone:
    at iterations that the settings fix, and at others in between, about a second apart, which the first process names
    the time before. `wait` ends when the device has done what it was given, as a host may be far ahead of it.

    A signal that any of them has received counts, and the first one's clock.
    """

    def __init__(self, ranks: Ranks, received: Received, iteration: int, wait: Callable[[], object]):
        self._ranks, self._received, self._wait = ranks, received, wait
        self._next = iteration  # at which they agree
        self._last = iteration, time.monotonic()  # of the last time
        self._signal: int | None = None

    def look(self, iteration: int, *, is_fixed: Callable[[], bool], is_due: Callable[[], bool]) -> bool:
        """Whether after an iteration, which may be one that `is_fixed`, a checkpoint is due: for the first process."""
        if self._ranks.is_alone:
            return is_due()
        if iteration < self._next and not is_fixed():
            return False
        self._wait()
        before, began = self._last
        self._last = iteration, time.monotonic()
        seconds = (self._last[1] - began) / max(1, iteration - before)  # an iteration
        steps = int(min(max(1.0, SECONDS / max(seconds, 1e-6)), 1e6))
        found = self._ranks.gather(torch.tensor([self._received() or 0, is_due(), steps]))  # [ranks, 3]
        self._next = iteration + int(found[0, 2])
        self._signal = _first(found[:, 0])
        return bool(found[0, 1])

    def seen(self) -> int | None:
        """The signal that has come, when they looked last."""
        return self._received() if self._ranks.is_alone else self._signal

    def signal(self) -> int | None:
        """The one that has come by now; at a place that all of them reach."""
        own = self._received()
        return own if self._ranks.is_alone else _first(self._ranks.gather(torch.tensor([own or 0])))


def _first(numbers: torch.Tensor) -> int | None:
    return next((number for number in numbers.flatten().tolist() if number), None)
