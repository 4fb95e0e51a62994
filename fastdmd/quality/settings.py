"""How samples are measured."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from fastdmd.settings import Input, Settings, at_least, fail

HeunSteps = Annotated[int, at_least(1, 10**4)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationSettings(Settings):
    """How the samples of a network are measured."""

    num_samples: Annotated[int, at_least(0, 10**7)] = 10_000
    """Images sampled for each figure; 0 measures nothing."""
    feature_network: Annotated[str | None, Input] = None
    """TorchScript (Inception's too) or package.module:name for the metrics. Default: the embedded digit classifier."""
    reference: Annotated[str | None, Input] = None
    """EDM reference statistics (.npz with mu, sigma). Default: those of the data."""
    teacher_steps: HeunSteps = 18
    """Heun steps of a teacher; N steps are 2 N - 1 evaluations. A generator has its own."""

    def check(self) -> None:
        super().check()
        if self.num_samples == 1:
            fail(self, "num_samples", ">= 2, or 0 for no metrics")
