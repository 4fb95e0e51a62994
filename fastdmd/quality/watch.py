"""Looks at every reading of a distillation, and tells each alarm when it begins."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fastdmd.distill.statistics import IMAGE_STATISTICS, ClassSums, image_statistics
from fastdmd.quality.alarms import RULES, Alarm, Reading
from fastdmd.quality.reference import Reference, class_figures
from fastdmd.saved import FIGURES, NUMBER, Rule, list_of, one_of, require

LONGEST_HISTORY = 1000  # readings that rules look back on, however long a run is
LEAST_POOLED = 96  # images of generator turns that a reading is of: fewer say little, and wait for more


class Watch:
    """Readings and alarms of one run.

    An alarm is told once, when its rule has held for some readings in a row, and again after as many without.
    `class_sums` are those of the generator turns, None without classes; nothing is looked at before `settled_at`
    iterations, which the learning rate takes to warm up. The generator's gradient is clipped to `max_grad_norm`.
    `follows_average`: the readings are of images as sampling makes them; those of the average are held against them.
    Of `num_steps` that the generator has, the images of one are looked at.
    """

    def __init__(
        self,
        reference: Reference,
        class_sums: ClassSums | None = None,
        *,
        settled_at: int = 0,
        max_grad_norm: float = math.inf,
        follows_average: bool = True,
        num_steps: int = 1,
    ):
        self.reference, self._class_sums, self._settled_at = reference, class_sums, settled_at
        self._max_grad_norm = max_grad_norm
        self._follows_average, self._num_steps = follows_average, num_steps
        self._history: deque[Reading] = deque(maxlen=LONGEST_HISTORY)
        self._pool: list[tuple[int, int, Reading]] = []  # images, images judged, and what is known of them
        self._seen = {rule.kind: 0 for rule in RULES}  # readings in a row that it held for; less than 0: did not
        self._told: set[str] = set()
        self._average: float | None = None  # spread of its images at the last snapshot, and of the generator's then
        self._spread_then: float | None = None

    def read(
        self, iteration: int, reading: Reading, num_images: int, num_judged: int = 0
    ) -> tuple[dict[str, float], list[Alarm]]:
        """Figures by class since the last ones, and the alarms that begin.

        `reading` is of `num_images` images of generator turns, of all steps, and of `num_judged` that a discriminator
        was asked of, if there is one.
        """
        figures = {} if self._average is None else {"average_spread": self._average}
        right = self.reference.classes
        if self._class_sums is not None and right is not None:
            if (found := self._class_sums.read(self.reference.least_images)) is not None:
                figures |= {name: value for name, value in class_figures(found, right).items() if math.isfinite(value)}
        grad_norm = reading.get("generator_grad_norm")
        times_clipped = None if grad_norm is None else grad_norm / self._max_grad_norm
        known = {"spread_then": self._spread_then, "times_clipped": times_clipped}
        self._pool.append((num_images // self._num_steps, num_judged, {**known, **reading, **figures}))
        if sum(num for num, *_ in self._pool) < LEAST_POOLED:
            return figures, []
        pooled = _mean(self._pool)
        self._pool.clear()
        if iteration <= self._settled_at:
            return figures, []
        alarms = self._judge(iteration, pooled)
        self._history.append(pooled)
        return figures, alarms

    def see_average(self, samples: Tensor) -> None:
        """Of the average of the weights, `[rows, columns, C, H, W]`: part of the next reading."""
        if not self._follows_average:
            return
        self._average = image_statistics(samples.flatten(0, 1))[IMAGE_STATISTICS.index("spread")].item()
        self._spread_then = self._history[-1].get("spread") if self._history else None

    def state_dict(self) -> dict[str, Any]:
        """Numbers and texts alone, some of which JSON has only as Python writes it: NaN and infinity."""
        return {
            "history": list(self._history),
            "pool": list(self._pool),
            "seen": dict(self._seen),
            "told": sorted(self._told),
            "average": self._average,
            "spread_then": self._spread_then,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError for what is none of it."""
        kinds = list(self._seen)
        pooled = Rule("numbers of images, and figures", lambda entry: len(entry) == 3 and FIGURES.allows(entry[2]))
        rules = {"history": list_of(FIGURES), "pool": list_of(pooled), "seen": FIGURES, "told": list_of(one_of(*kinds))}
        require("watch", state, {**rules, "average": NUMBER.or_none(), "spread_then": NUMBER.or_none()})
        require("watch.seen", state["seen"], dict.fromkeys(kinds, NUMBER))
        self._history = deque(state["history"], maxlen=LONGEST_HISTORY)
        self._pool = [(num_images, num_judged, known) for num_images, num_judged, known in state["pool"]]
        self._seen = dict(state["seen"])
        self._told = set(state["told"])
        self._average = state["average"]
        self._spread_then = state["spread_then"]

    def _judge(self, iteration: int, reading: Reading) -> list[Alarm]:
        begin = []
        for rule in RULES:
            seen, before = rule.look(reading, self._history, self.reference), self._seen[rule.kind]
            row = self._seen[rule.kind] = min(before, 0) - 1 if seen is None else max(before, 0) + 1
            if row <= -rule.num_readings:
                self._told.discard(rule.kind)
            if seen is not None and row >= rule.num_readings and rule.kind not in self._told:
                self._told.add(rule.kind)
                begin.append(Alarm(rule.kind, iteration, seen, rule.advice))
        return begin


def _mean(pool: list[tuple[int, int, Reading]]) -> dict[str, float | None]:
    """Over the images for which a figure is known; and how many were judged."""
    pool = [entry for entry in pool if entry[0]]
    mean: dict[str, float | None] = {}
    for name in {name: None for *_, reading in pool for name in reading}:
        known = [(num, value) for num, _, reading in pool if (value := reading.get(name)) is not None]
        total = sum(num for num, _ in known)
        mean[name] = sum(num * value for num, value in known) / total if total else None
    return {**mean, "num_judged": float(sum(num_judged for _, num_judged, _ in pool))}
