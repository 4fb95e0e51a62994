"""Diffusion noising: an image plus noise at a given level."""

from __future__ import annotations

from torch import Tensor

from fastdmd.ops._validate import check_images, check_sigma


def add_noise(x: Tensor, sigma: Tensor, *, noise: Tensor) -> Tensor:
    """Noises images to the level `sigma`: `x_t = x + sigma * noise` (Karras et al. 2022, section 2).

    Args:
        x: images `[B, C, H, W]`, floating point.
        sigma: noise level of each image `[B]`, in units of pixel values.
        noise: standard normal `[B, C, H, W]`, of the dtype and device of `x`.

    Returns `x_t`, like `x`. Differentiable in `x` and `noise`.
    Raises TypeError or ValueError, naming what was expected and what came.
    """
    check_images("add_noise", x=x, noise=noise)
    check_sigma("add_noise", sigma, x)
    return reference(x, sigma, noise)


def reference(x: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    return x + sigma.to(x.dtype)[:, None, None, None] * noise
