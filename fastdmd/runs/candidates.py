"""What a run may keep as its result: samplers of several averages, and the choice among them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastdmd.quality import Measurement
from fastdmd.sampling import Sampler


class Candidates:
    """Samplers by the names of what they sample; the first is kept until they have been measured."""

    def __init__(self, samplers: Mapping[str, Sampler]):
        self.samplers = dict(samplers)
        self.kept = next(iter(self.samplers))

    @property
    def sampler(self) -> Sampler:
        """Of what is kept."""
        return self.samplers[self.kept]

    def choose(self, measured: Mapping[str, Measurement]) -> Measurement | None:
        """Keeps from now on what has the least Fréchet distance, the first of equals; returns its measurement.

        Without any distance what was kept stays, and its measurement, if there is one, is returned.
        """
        distances = {name: row.frechet_distance for name, row in measured.items() if row.frechet_distance is not None}
        if distances:
            self.kept = min(distances, key=distances.__getitem__)
        return measured.get(self.kept)

    def state_dict(self) -> dict[str, Any]:
        return {"kept": self.kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["kept"] not in self.samplers:
            raise ValueError(f"fastdmd: expected one of {', '.join(self.samplers)} to be kept, got {state['kept']}")
        self.kept = state["kept"]
