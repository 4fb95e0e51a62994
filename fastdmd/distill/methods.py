"""Which losses a turn adds up: the one place where a method of distillation lives."""

from __future__ import annotations

import dataclasses
from typing import Protocol

from torch import Tensor

from fastdmd.diffusion import Denoiser
from fastdmd.distill.draws import Draws
from fastdmd.distill.losses import Denoise, denoising_loss, generator_loss


@dataclasses.dataclass(frozen=True)
class Terms:
    """What a turn differentiates, and what it tells; 0-dim tensors on the device."""

    total: Tensor
    scalars: dict[str, Tensor]  # in the order of the method's names
    left_out: Tensor | None = None  # the share of samples that it leaves out

    def detach(self) -> Terms:
        return Terms(self.total.detach(), {name: value.detach() for name, value in self.scalars.items()}, self.left_out)


class Method(Protocol):
    """The losses of both turns, from images of the generator, and the names of the scalars that they tell.

    A generator turn calls the teacher before the fake score, so that one may run beside the other.
    """

    @property
    def generator_scalars(self) -> tuple[str, ...]: ...

    @property
    def guidance_scalars(self) -> tuple[str, ...]: ...

    def generator_terms(self, x_gen: Tensor, draws: Draws, *, teacher: Denoise, fake_score: Denoise) -> Terms:
        """Differentiable in `x_gen` alone."""
        ...

    def guidance_terms(self, x_gen: Tensor, draws: Draws, *, teacher: Denoise, fake_score: Denoiser) -> Terms:
        """Differentiable in the fake score's weights; `x_gen` counts as constant."""
        ...


@dataclasses.dataclass(frozen=True)
class DistributionMatching:
    """DMD2 (Yin et al. 2024): `L_dm` moves the generator, `L_fake` lets the fake score follow it."""

    sigma_data: float  # in the weight of `L_fake`

    generator_scalars = ("loss_dm",)
    guidance_scalars = ("loss_fake",)

    def generator_terms(self, x_gen: Tensor, draws: Draws, *, teacher: Denoise, fake_score: Denoise) -> Terms:
        loss, left_out = generator_loss(
            x_gen, teacher, fake_score, draws.class_labels, sigma=draws.dm_sigma, noise=draws.dm_noise
        )
        return Terms(loss, {"loss_dm": loss}, left_out)

    def guidance_terms(self, x_gen: Tensor, draws: Draws, *, teacher: Denoise, fake_score: Denoiser) -> Terms:
        loss = denoising_loss(
            x_gen,
            fake_score,
            draws.class_labels,
            sigma=draws.fake_sigma,
            noise=draws.fake_noise,
            sigma_data=self.sigma_data,
        )
        return Terms(loss, {"loss_fake": loss})
