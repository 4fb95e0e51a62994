"""How far a run came, how that is shown beside the bar, and the signal that ends it in the middle of a measurement."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from fastdmd.quality.alarms import Alarm
from fastdmd.saved import AMOUNT, COUNT, MAPPING, list_of, require

ENDED_EARLY = "ended early"  # how the reason of a complete run begins that did not reach its last iteration

Received = Callable[[], int | None]  # the signal that has come


@dataclasses.dataclass
class Progress:
    """How far a run came. `outcome` is "complete", "interrupted", "diverged" or "failed", and `reason` says why, or why
    a complete one ended before its last iteration."""

    iterations: int = 0
    outcome: str = "complete"
    reason: str | None = None
    skipped_updates: int = 0  # for NaN or infinity in a loss or gradient
    left_out_images: int = 0  # of distribution matching, for NaN or infinity of the teacher or the fake score
    train_seconds: float = 0.0  # without those of measurements meanwhile
    evaluation_seconds: float = 0.0
    first_iteration_seconds: float | None = None
    signal: int | None = None
    alarms: list[Alarm] = dataclasses.field(default_factory=list)

    @property
    def goes_on(self) -> bool:
        return self.outcome == "complete" and self.reason is None

    def diverge(self, reason: str) -> None:
        self.outcome, self.reason = "diverged", reason

    def state_dict(self) -> dict[str, Any]:
        """What a run that goes on has behind it; not how a part of it ended."""
        left = ("outcome", "reason", "signal", "train_seconds")
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in left}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError for what is none of it."""
        counts = dict.fromkeys(("iterations", "skipped_updates", "left_out_images"), COUNT)
        seconds = {"evaluation_seconds": AMOUNT, "first_iteration_seconds": AMOUNT.or_none()}
        require("progress", state, {**counts, **seconds, "alarms": list_of(MAPPING)})
        vars(self).update(state, alarms=[Alarm(**alarm) for alarm in state["alarms"]])


class Interrupted(Exception):
    """A signal came while a network was measured."""


def stop_if_interrupted(received: Received) -> None:
    if received() is not None:
        raise Interrupted


def show(bar: tqdm, line: dict[str, Any], alarms: Sequence[Alarm] = ()) -> None:
    """Losses and speed beside the bar; what should not happen, on a line of its own."""
    shown = {name: value for name, value in line.items() if "loss" in name and value is not None}
    shown["images/s"] = line["images_per_second"]
    bar.set_postfix({name: f"{value:.4g}" for name, value in shown.items()}, refresh=False)
    if "skipped_updates" in line:
        first = f" in {line['not_finite']}, iteration {line['not_finite_at']}" if "not_finite" in line else ""
        bar.write(f"iteration {line['iteration']}: NaN or infinity{first}; updates skipped: {line['skipped_updates']}")
    if "left_out_images" in line:
        bar.write(
            f"iteration {line['iteration']}: NaN or infinity of teacher or fake score; images left out: "
            f"{line['left_out_images']}"
        )
    for alarm in alarms:
        bar.write(str(alarm))
