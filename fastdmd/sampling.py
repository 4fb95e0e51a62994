"""Images from noise: a generator's, in a step or a few, and a teacher's, by Heun's method."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Protocol

import torch
from torch import Tensor

from fastdmd.diffusion import Denoiser, karras_sigmas

SAMPLING_STREAM = 2  # random_generator's stream for evaluation, apart from those of training


class Sampler(Protocol):
    """`sampler(noise, class_labels) -> images`: standard normal `[B, C, H, W]`, int64 `[B]` or None, `[B, C, H, W]`."""

    @property
    def network(self) -> Denoiser: ...

    @property
    def num_evaluations(self) -> int: ...  # of the network, for an image

    def __call__(self, noise: Tensor, class_labels: Tensor | None) -> Tensor: ...


@dataclasses.dataclass(frozen=True)
class Generator:
    """A network and the noise levels that it makes images from, the highest first; differentiable.

    `x = D(sigma_1 * noise, sigma_1)`, and from each further level `x = D(x + sigma_k * fresh_noise, sigma_k)` (Yin et
    al. 2024, DMD2, section 4.4). Fresh noise is from `random`, or from torch's own generator. Raises ValueError for
    levels that are none, not finite and positive, or not in this order.
    """

    network: Denoiser
    sigmas: tuple[float, ...]

    def __post_init__(self) -> None:
        levels = self.sigmas if isinstance(self.sigmas, tuple) else ()
        descends = all(a > b for a, b in itertools.pairwise(levels))
        if not levels or not descends or not all(0 < sigma < math.inf for sigma in levels):
            raise ValueError(
                f"fastdmd.Generator: expected a tuple of positive noise levels, the highest first, got {self.sigmas}"
            )

    @property
    def num_evaluations(self) -> int:
        return len(self.sigmas)

    def __call__(
        self, noise: Tensor, class_labels: Tensor | None = None, *, random: torch.Generator | None = None
    ) -> Tensor:
        """Images `[B, C, H, W]` of standard normal `noise` of that shape and `class_labels`, int64 `[B]` or None."""
        x = _denoise(self.network, noise * self.sigmas[0], self.sigmas[0], class_labels)
        for sigma in self.sigmas[1:]:
            fresh_noise = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=random)
            x = _denoise(self.network, x + sigma * fresh_noise, sigma, class_labels)
        return x


@dataclasses.dataclass(frozen=True)
class HeunSampler:
    """Heun's second-order method (Karras et al. 2022, algorithm 1) over `num_steps` levels of `karras_sigmas`.

    Starts at the network's own highest level, and at 80 at most. Raises ValueError for less than one step,
    and as `karras_sigmas` does for other levels.
    """

    network: Denoiser
    num_steps: int = 18
    sigma_min: float = 0.002
    rho: float = 7.0

    @property
    def num_evaluations(self) -> int:
        return 2 * self.num_steps - 1  # the last step, to no noise, is one of Euler

    @property
    def sigma_max(self) -> float:
        return min(80.0, getattr(self.network, "sigma_max", math.inf))

    def levels(self) -> list[float]:
        """The noise levels, the highest first and 0 last."""
        if self.num_steps < 1:
            raise ValueError(f"fastdmd.HeunSampler: expected num_steps >= 1, got {self.num_steps}")
        if self.num_steps == 1:
            return [self.sigma_max, 0.0]
        sigmas = karras_sigmas(self.num_steps, sigma_min=self.sigma_min, sigma_max=self.sigma_max, rho=self.rho)
        return [*sigmas.flip(0).tolist(), 0.0]

    @torch.no_grad()
    def __call__(self, noise: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Images `[B, C, H, W]` of standard normal `noise` of that shape and `class_labels`, int64 `[B]` or None."""
        levels = self.levels()
        x = noise * levels[0]
        for level, next_level in zip(levels[:-1], levels[1:], strict=True):
            slope = (x - _denoise(self.network, x, level, class_labels)) / level
            x_next = x + (next_level - level) * slope
            if next_level > 0:
                slope_next = (x_next - _denoise(self.network, x_next, next_level, class_labels)) / next_level
                x_next = x + (next_level - level) * 0.5 * (slope + slope_next)
            x = x_next
        return x


def balanced_labels(num_images: int, num_classes: int, device: torch.device | str = "cpu") -> Tensor | None:
    """`0, 1, ..., num_classes - 1, 0, 1, ...`: as many of each class as can be; None without classes."""
    return torch.arange(num_images, device=device) % num_classes if num_classes else None


def _denoise(network: Denoiser, x: Tensor, sigma: float, class_labels: Tensor | None) -> Tensor:
    return network(x, x.new_full(x.shape[:1], sigma), class_labels)
