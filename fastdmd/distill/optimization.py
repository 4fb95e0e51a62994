"""How both networks are optimized: rates, their schedules, and the average of the generator's weights."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from fastdmd.settings import Settings, above, arg, at_least, within

Rate = Annotated[float, above(0, 1e30)]  # what float32 holds, as is the norm that gradients are clipped to
WarmUp = Annotated[int, at_least(0, 10**9)]
WeightDecay = Annotated[float, at_least(0, 1e8)]
Decay = Annotated[float, within(0, 1 - 2**-20)]  # beyond, float32 corrects the first moments by a division by zero


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerSettings(Settings):
    """AdamW of both networks, and the average of the generator's weights."""

    generator_lr: Rate = 6e-4
    """Learning rate of the generator's AdamW."""
    fake_score_lr: Annotated[Rate, arg(name="guidance-lr", aliases=("--fake-score-lr",))] = 1.2e-3
    """Learning rate of the fake score's AdamW."""
    lr_schedule: Literal["constant", "cosine"] = "cosine"
    """After warm-up: constant, or to zero along a cosine."""
    warmup_iterations: WarmUp = 50
    """Iterations over which both learning rates rise."""
    beta1: Decay = 0.9
    """Decay of AdamW's first moment."""
    beta2: Decay = 0.999
    """Decay of AdamW's second moment."""
    weight_decay: WeightDecay = 0.01
    """Decoupled weight decay of AdamW."""
    max_grad_norm: Rate = 1.0
    """Gradients of either network are clipped to this global norm."""
    ema_decay: Decay = 0.98
    """Decay of the average of the generator's weights, per generator update. The average is the result."""

    def of_generator(self, iterations: int, dfake_gen_update_ratio: int) -> dict[str, Any]:
        """Options of `AdamWEMA` for a run of so many iterations, one in `dfake_gen_update_ratio` of them an update."""
        updates = -(-iterations // dfake_gen_update_ratio)
        warmup = -(-self.warmup_iterations // dfake_gen_update_ratio)
        return {**self._shared(updates, warmup), "learning_rate": self.generator_lr, "ema_decay": self.ema_decay}

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


def warm_up_notice(iterations: int, warmup_iterations: int) -> str | None:
    """Of a run that ends before its warm-up does."""
    if warmup_iterations < iterations or warmup_iterations == 0:
        return None
    return (
        f"warm-up takes {warmup_iterations} iterations and the run ends after {iterations}: the learning rate asked "
        "for is never reached; --warmup-iterations changes that"
    )
