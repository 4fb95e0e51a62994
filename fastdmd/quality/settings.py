"""How samples are measured."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from fastdmd.settings import Input, Settings, at_least, fail

FEWER_SAMPLES = 5000  # of a measurement while training goes on: half the images, half the time
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class MonitorSettings(Settings):
    """How the quality of a run is measured while training goes on."""

    eval_every: Annotated[int, at_least(0, 10**9)] = 0
    """Iterations between measurements of every average, for evaluation.jsonl, quality.png and best.safetensors; 0: only
    at the end."""
    eval_samples: Annotated[int, at_least(2, 10**7)] | None = None
    """Images sampled for each of these measurements. Default: --num-samples, 5000 at most."""
    stop_after: Annotated[int, at_least(0, 10**6)] = 0
    """Measurements in a row without a better Fréchet distance that end the run; 0: none do."""

    def check(self) -> None:
        super().check()
        for field in dataclasses.fields(self):  # what is filled in below is nobody's wish
            if field.default not in (dataclasses.MISSING, getattr(self, field.name)) and self.eval_every == 0:
                fail(self, field.name, "together with --eval-every")

    def of(self, num_samples: int) -> Monitor:
        """With the default that depends on those of the end filled in."""
        fewer = min(num_samples, FEWER_SAMPLES)
        return Monitor(**vars(self) | {"eval_samples": self.eval_samples or fewer})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Monitor(MonitorSettings):
    """`MonitorSettings` with nothing left open."""

    eval_samples: int = dataclasses.field()
