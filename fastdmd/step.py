"""One iteration of DMD2: a generator turn and a guidance turn on the networks they train."""

from __future__ import annotations

import copy
import dataclasses

import torch
from torch import Tensor, nn

from fastdmd import dmd2
from fastdmd.dmd2 import Draws
from fastdmd.optim import AdamWEMA


@dataclasses.dataclass(frozen=True)
class StepMetrics:
    """0-dim tensors on the device; the generator's are None where it did not move."""

    loss_fake: Tensor
    fake_grad_norm: Tensor
    loss_dm: Tensor | None = None
    generator_grad_norm: Tensor | None = None


class DMD2:
    """Teacher, generator and fake score, and the two turns that alternate (Yin et al. 2024, DMD2).

    Generator and fake score start as copies of the teacher, all in eval mode: dropout would be noise that the other
    networks do not see. `generator_options` and `guidance_options` go to
    `AdamWEMA`. The teacher never requires gradients, and no flag is toggled between turns: each turn
    differentiates only through the network that it trains.
    """

    def __init__(self, teacher: nn.Module, *, conditioning_sigma: float, sigma_data: float,
                 dfake_gen_update_ratio: int, generator_options: dict, guidance_options: dict):  # fmt: skip
        self.teacher = teacher.eval().requires_grad_(False)
        self.generator = copy.deepcopy(self.teacher).requires_grad_(True)
        self.fake_score = copy.deepcopy(self.teacher).requires_grad_(True)
        self.conditioning_sigma, self.sigma_data = conditioning_sigma, sigma_data
        self.dfake_gen_update_ratio = dfake_gen_update_ratio
        self.generator_optimizer = AdamWEMA(self.generator, **generator_options)
        self.guidance_optimizer = AdamWEMA(self.fake_score, **guidance_options)

    def iterate(self, step: int, draws: Draws) -> StepMetrics:
        """One x_gen serves both turns, so the guidance turn sees the generator as it was before its update."""
        if step % self.dfake_gen_update_ratio == 0:
            x_gen, loss_dm, generator_grad_norm = self.generator_turn(draws)
        else:
            loss_dm = generator_grad_norm = None
            with torch.no_grad():
                x_gen = self.generate(draws)
        loss_fake, fake_grad_norm = self.guidance_turn(x_gen, draws)
        return StepMetrics(loss_fake, fake_grad_norm, loss_dm, generator_grad_norm)

    def generate(self, draws: Draws) -> Tensor:
        return dmd2.generate(
            self.generator, draws.noise, draws.class_labels, conditioning_sigma=self.conditioning_sigma
        )

    def generator_turn(self, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
        """Moves the generator along the distribution-matching gradient; returns x_gen, loss, gradient norm."""
        x_gen = self.generate(draws)
        loss = dmd2.generator_loss(
            x_gen,
            self.teacher,
            self.fake_score,
            draws.class_labels,
            sigma=draws.dm_sigma,
            noise=draws.dm_noise,
        )
        loss.backward()
        return x_gen.detach(), loss.detach(), self.generator_optimizer.step()

    def guidance_turn(self, x_gen: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Lets the fake score follow the generator's distribution; returns loss and gradient norm."""
        loss = dmd2.denoising_loss(
            x_gen, self.fake_score, draws.class_labels, sigma=draws.fake_sigma, noise=draws.fake_noise,
            sigma_data=self.sigma_data,
        )  # fmt: skip
        loss.backward()
        return loss.detach(), self.guidance_optimizer.step()
