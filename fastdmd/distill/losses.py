"""The two losses of DMD2 (Yin et al. 2024): pure functions; all randomness comes in as arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from fastdmd import ops
from fastdmd.diffusion import Dynamics, velocity_preconditioning

Denoise = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # D(x, sigma, class_labels)


class TrainedDenoiser(Protocol):
    """Of a `Denoiser`, what a loss needs that trains it."""

    @property
    def dynamics(self) -> Dynamics: ...

    def __call__(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor: ...


def generator_loss(
    x_gen: Tensor,
    teacher: Denoise,
    fake_score: Denoise,
    class_labels: Tensor | None,
    *,
    sigma: Tensor,
    noise: Tensor | None = None,
    rng_key: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The distribution-matching loss `L_dm`, differentiable in `x_gen` alone, and the share of samples it left out.

    Noises `x_gen` `[B, C, H, W]` by `noise`, of its shape, or by that of `rng_key` (see `ops.add_noise`), at the levels
    `sigma` `[B]`, lets both networks denoise it, and compares (see `ops.dm_loss`, which takes a sample for which one of
    them gives NaN or infinity as one that is right); Yin et al. 2024, eq. 3. `class_labels` are int64 `[B]` or None.
    Both results are 0-dim, on the device. Raises ValueError or TypeError for shapes, dtypes and devices that do not fit
    each other.
    """
    with torch.no_grad():
        x_t = ops.add_noise(x_gen, sigma, noise=noise, rng_key=rng_key)
        D_real = teacher(x_t, sigma, class_labels)
        D_fake = fake_score(x_t, sigma, class_labels)
        left_out = 1 - (D_real + D_fake).sum(dim=(1, 2, 3), dtype=torch.float32).isfinite().float().mean()
    return ops.dm_loss(x_gen, D_real, D_fake), left_out


def denoising_loss(
    images: Tensor,
    denoiser: TrainedDenoiser,
    class_labels: Tensor | None,
    *,
    sigma: Tensor,
    noise: Tensor | None = None,
    rng_key: Tensor | None = None,
    sigma_data: float | None,
) -> Tensor:
    """`mean(weight * (D(images + sigma * noise, sigma, class_labels) - images)^2)`, differentiable in the weights of D.

    It trains teachers and, on generated images, the fake score (`L_fake`). The weight is EDM's, `sigma^-2 + sd^-2`
    (Karras et al. 2022, eq. 8), or for a velocity network `t^-2` with `t = sigma / (1 + sigma)`, which makes it the
    loss of flow matching, `mean((v - (noise - images))^2)`; with `sigma_data` None it is 1. The images count as
    constants. `images` and `noise` are `[B, C, H, W]`, `sigma` `[B]`, `class_labels` int64 `[B]` or None; instead of
    `noise` there may be `rng_key`, see `ops.add_noise`. The result is 0-dim. Raises ValueError or TypeError for shapes,
    dtypes and devices that do not fit each other.
    """
    images = images.detach()
    D_x = denoiser(ops.add_noise(images, sigma, noise=noise, rng_key=rng_key), sigma, class_labels)
    return denoised_loss(D_x, images, sigma, dynamics=denoiser.dynamics, sigma_data=sigma_data)


def denoised_loss(
    D_x: Tensor, images: Tensor, sigma: Tensor, *, dynamics: Dynamics, sigma_data: float | None
) -> Tensor:
    """`denoising_loss` of what was denoised, `D_x` and `images` `[B, C, H, W]`, `sigma` `[B]`; 0-dim.

    Differentiable in `D_x`. `dynamics` is "edm" or "flow", the denoiser's. Raises as `denoising_loss` does.
    """
    if sigma_data is None:
        return ops.denoising_loss(D_x, images, torch.ones_like(sigma))
    if dynamics == "flow":
        *_, t = velocity_preconditioning(sigma)
        return ops.denoising_loss(D_x, images, t**-2)
    return ops.fake_loss(D_x, images, sigma, sigma_data=sigma_data)
