"""What ops, kernels and networks agree on: EDM's preconditioning, and the dtypes that things are computed in."""

from __future__ import annotations

import torch
from torch import Tensor


def preconditioning(sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`c_skip, c_out, c_in, c_noise` of EDM, each of the shape of `sigma` (Karras et al. 2022, table 1).

    `c_skip = sd^2 / (sigma^2 + sd^2)`, `c_out = sigma * sd / sqrt(sigma^2 + sd^2)`,
    `c_in = 1 / sqrt(sigma^2 + sd^2)`, `c_noise = ln(sigma) / 4`; for an infinite sigma or `sd` their limits.
    """
    low = sigma.clamp(max=sigma_data)
    high = sigma.clamp(min=sigma_data)
    share = (1 + (low / high) ** 2).rsqrt()  # high / sqrt(sigma^2 + sd^2), without a square that overflows
    return 1 / (1 + (sigma / sigma_data) ** 2), low * share, share / high, sigma.log() / 4


def loss_weight(sigma: Tensor, sigma_data: float) -> Tensor:
    """EDM's weight of the denoising loss, `1 / c_out^2 = sigma^-2 + sigma_data^-2` (Karras et al. 2022, table 1)."""
    return sigma**-2 + sigma_data**-2


def wide_dtype(x: Tensor) -> torch.dtype:
    """What an op computes in: float32, or float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def gradient_dtype(x: Tensor) -> torch.dtype:
    """Of a gradient that may leave the range of float16."""
    return torch.float32 if x.dtype == torch.float16 else x.dtype


def per_sample(values: Tensor, x: Tensor | None = None) -> Tensor:
    """`[B]` -> `[B, 1, 1, 1]`, to broadcast over `[B, C, H, W]`; in the wide dtype of `x`, if that is given."""
    return (values if x is None else values.to(wide_dtype(x)))[:, None, None, None]
