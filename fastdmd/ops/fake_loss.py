"""The Karras-weighted denoising loss of the fake score."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdmd.ops._validate import check_images, check_positive, check_sigma


def fake_loss(D_fake: Tensor, x_gen: Tensor, sigma: Tensor, *, sigma_data: float = 0.5) -> Tensor:
    """How well the fake score denoises generated images (Karras et al. 2022, eq. 2 and table 1).

    `L_fake = mean(weight * (D_fake - x_gen)^2)` with `weight = sigma^-2 + sigma_data^-2`.

    Args:
        D_fake: the fake score's denoised output `[B, C, H, W]`, floating point.
        x_gen: the generated images that were noised, like `D_fake`; counts as a constant.
        sigma: noise level of each image `[B]`, > 0, in units of pixel values.
        sigma_data: standard deviation of the data, > 0.

    Returns the loss, a scalar of the dtype of `D_fake` (float32 for half precision), differentiable in `D_fake`.
    Raises TypeError or ValueError, naming what was expected and what came.
    """
    check_images("fake_loss", D_fake=D_fake, x_gen=x_gen)
    check_sigma("fake_loss", sigma, D_fake)
    check_positive("fake_loss", sigma_data=sigma_data)
    return reference(D_fake, x_gen, sigma, sigma_data)


def reference(D_fake: Tensor, x_gen: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
    wide = torch.promote_types(D_fake.dtype, torch.float32)
    weight = sigma.to(wide) ** -2 + sigma_data**-2
    error = D_fake.to(wide) - x_gen.detach().to(wide)
    return (weight[:, None, None, None] * error.square()).mean()
