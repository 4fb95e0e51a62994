"""How both networks are optimized: rates, their schedules, and the averages of the generator's weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastdmd.optim.adamw_ema import EMA_WARMUP
from fastdmd.settings import Settings, above, arg, at_least, commas, fail, within

Rate = Annotated[float, above(0, 1e30)]  # what float32 holds, as is the norm that gradients are clipped to
WarmUp = Annotated[int, at_least(0, 10**9)]
WeightDecay = Annotated[float, at_least(0, 1e8)]
GREATEST_DECAY = 1 - 2**-20  # beyond, float32 corrects the first moments by a division by zero
Decay = Annotated[float, within(0, GREATEST_DECAY)]


@dataclasses.dataclass(frozen=True)
class Average:
    """One average of the generator's weights."""

    name: str  # how the user has put it
    decay: float  # per generator update


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerSettings(Settings):
    """AdamW of both networks, and the averages of the generator's weights."""

    generator_lr: Rate = 6e-4
    """Learning rate of the generator's AdamW."""
    fake_score_lr: Annotated[Rate, arg(name="guidance-lr", aliases=("--fake-score-lr",))] = 1.2e-3
    """Learning rate of the fake score's AdamW."""
    lr_schedule: Literal["constant", "cosine"] = "cosine"
    """After warm-up: constant, or to zero along a cosine."""
    warmup_iterations: WarmUp = 50
    """Iterations over which both learning rates rise."""
    beta1: Decay = 0.0
    """Decay of AdamW's first moment."""
    beta2: Decay = 0.999
    """Decay of AdamW's second moment."""
    weight_decay: WeightDecay = 0.01
    """Decoupled weight decay of AdamW."""
    max_grad_norm: Rate = 1.0
    """Gradients of either network are clipped to this global norm."""
    ema_decay: Decay = 0.993
    """Decay of the average of the generator's weights, per generator update. The average is the result."""
    ema_halflives: Annotated[tuple[float, ...] | None, above(0, 1e15), commas()] = None
    """Instead of --ema-decay: half-lives of averages, in images that generator updates see, separated by commas. There
    is an average of each, and the best of them is the result."""

    def check(self) -> None:
        super().check()
        halflives = self.ema_halflives
        if halflives is not None and (not halflives or len({*map(_named, halflives)}) < len(halflives)):
            fail(self, "ema_halflives", "as numbers of images, each once")

    def averages(self, batch_size: int) -> tuple[Average, ...]:
        """Those to be kept: after h images, `h / batch_size` updates, weights count half in that of half-life h.

        Raises ValueError for a half-life so long that float32 averages nothing.
        """
        if self.ema_halflives is None:
            return (Average(f"decay {self.ema_decay:.10g}", self.ema_decay),)
        averages = tuple(Average(_named(h), 0.5 ** (batch_size / h)) for h in self.ema_halflives)
        if max(average.decay for average in averages) > GREATEST_DECAY:  # where 1 - decay has no digits in float32
            most = batch_size / -math.log2(GREATEST_DECAY)
            fail(self, "ema_halflives", f"of at most {int(most)} images, with {batch_size} an update")
        return averages

    def of_generator(self, iterations: int, dfake_gen_update_ratio: int, batch_size: int) -> dict[str, Any]:
        """Options of `AdamWEMA` for a run of so many iterations, one in `dfake_gen_update_ratio` of them an update."""
        updates = -(-iterations // dfake_gen_update_ratio)
        warmup = -(-self.warmup_iterations // dfake_gen_update_ratio)
        decays = tuple(average.decay for average in self.averages(batch_size))
        return {**self._shared(updates, warmup), "learning_rate": self.generator_lr, "ema_decay": decays}

    def of_fake_score(self, iterations: int) -> dict[str, Any]:
        """Options of `AdamWEMA` for a run of so many iterations."""
        return {**self._shared(iterations, self.warmup_iterations), "learning_rate": self.fake_score_lr}

    def _shared(self, updates: int, warmup_steps: int) -> dict[str, Any]:
        return {
            "betas": (self.beta1, self.beta2),
            "weight_decay": self.weight_decay,
            "max_grad_norm": self.max_grad_norm,
            "warmup_steps": warmup_steps,
            "decay_steps": updates if self.lr_schedule == "cosine" else None,
        }


def _named(halflife: float) -> str:
    return f"half-life {halflife:.10g} images"


def averages_notice(averages: Sequence[Average], updates: int) -> str | None:
    """Of averages that a run of so many generator updates cannot tell apart, since it ends before their warm-up."""
    greatest = updates / (updates + EMA_WARMUP)
    if len(alike := [average.name for average in averages if average.decay >= greatest]) < 2:
        return None
    return (
        f"the averages of {', '.join(alike)} will be the same: the n-th generator update averages with "
        f"n / (n + {EMA_WARMUP:g}) at most, and there are {updates}"
    )


def warm_up_notice(iterations: int, warmup_iterations: int) -> str | None:
    """Of a run that ends before its warm-up does."""
    if warmup_iterations < iterations or warmup_iterations == 0:
        return None
    return (
        f"warm-up takes {warmup_iterations} iterations and the run ends after {iterations}: the learning rate asked "
        "for is never reached; --warmup-iterations changes that"
    )
