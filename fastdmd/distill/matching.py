"""What pulls the distribution of a generator to that of its teacher: a loss of images for each method."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Protocol

from torch import Tensor

from fastdmd.distill.draws import Draws
from fastdmd.distill.losses import Denoise, generator_loss
from fastdmd.distill.score_identity import score_identity_loss


class Matching(Protocol):
    """The part of a generator's loss that compares what teacher and fake score make of its images, noised.

    Denoises by the teacher before the fake score, so that one may run beside the other.
    """

    scalar: ClassVar[str]  # what the loss is called among those that a turn tells

    def __call__(self, x_gen: Tensor, draws: Draws, *, teacher: Denoise, fake_score: Denoise) -> tuple[Tensor, Tensor]:
        """The loss, differentiable in `x_gen` `[B, C, H, W]` alone, and the share of samples left out; 0-dim."""
        ...


@dataclasses.dataclass(frozen=True)
class DistributionMatching:
    """Of DMD2 (Yin et al. 2024): `L_dm`."""

    scalar: ClassVar[str] = "loss_dm"

    def __call__(self, x_gen: Tensor, draws: Draws, *, teacher: Denoise, fake_score: Denoise) -> tuple[Tensor, Tensor]:
        return generator_loss(
            x_gen,
            teacher,
            fake_score,
            draws.class_labels,
            sigma=draws.dm_sigma,
            noise=draws.dm_noise,
            rng_key=draws.dm_key,
        )


@dataclasses.dataclass(frozen=True)
class ScoreIdentity:
    """Of SiD (Zhou et al. 2024): `L_sid`."""

    scalar: ClassVar[str] = "loss_sid"
    alpha: float = 1.0

    def __call__(self, x_gen: Tensor, draws: Draws, *, teacher: Denoise, fake_score: Denoise) -> tuple[Tensor, Tensor]:
        return score_identity_loss(
            x_gen,
            teacher,
            fake_score,
            draws.class_labels,
            sigma=draws.dm_sigma,
            noise=draws.dm_noise,
            rng_key=draws.dm_key,
            alpha=self.alpha,
        )
