"""The weighted denoising loss: with a weight of the caller's, or, for the fake score, with EDM's."""

from __future__ import annotations

from torch import Tensor

from fastdmd.ops import _loss
from fastdmd.ops._math import gradient_dtype, loss_weight, per_sample, preconditioning, wide_dtype
from fastdmd.ops._registry import define
from fastdmd.ops._validate import check_constant, check_images, check_no_tangent, check_positive


def denoising_loss(D_x: Tensor, images: Tensor, weight: Tensor) -> Tensor:
    """How well a network denoises images: `mean(weight * (D_x - images)^2)` (Karras et al. 2022, eq. 2).

    Args:
        D_x: denoised images `[B, C, H, W]`, floating point.
        images: what was noised, like `D_x`; counts as a constant.
        weight: of each image `[B]`, such as `t^-2` in flow matching; a constant. EDM's is that of `fake_loss`.

    Returns the loss, a scalar (float64 for float64, else float32), twice differentiable in `D_x`.
    Raises TypeError or ValueError, naming what was expected and what came; NotImplementedError for forward mode.
    """
    D_x, images = check_images("denoising_loss", D_x=D_x, images=images)
    check_constant("denoising_loss", "weight", weight, D_x)
    check_no_tangent("denoising_loss", D_x, images, weight)
    return _denoising_loss(D_x, images, weight)[0]


def fake_loss(D_fake: Tensor, x_gen: Tensor, sigma: Tensor, *, sigma_data: float = 0.5) -> Tensor:
    """How well the fake score denoises generated images (Karras et al. 2022, eq. 2 and table 1).

    `L_fake = mean(weight * (D_fake - x_gen)^2)` with `weight = sigma^-2 + sigma_data^-2`.

    Args:
        D_fake: the fake score's denoised output `[B, C, H, W]`, floating point.
        x_gen: the generated images that were noised, like `D_fake`; counts as a constant.
        sigma: noise level of each image `[B]`, > 0, in units of pixel values; a constant.
        sigma_data: standard deviation of the data, > 0; infinity: no second term.

    Returns the loss, a scalar (float64 for float64, else float32), twice differentiable in `D_fake`.
    Raises TypeError or ValueError, naming what was expected and what came; NotImplementedError for forward mode.
    """
    D_fake, x_gen = check_images("fake_loss", D_fake=D_fake, x_gen=x_gen)
    check_constant("fake_loss", "sigma", sigma, D_fake)
    check_positive("fake_loss", sigma_data=sigma_data)
    check_no_tangent("fake_loss", D_fake, x_gen, sigma)
    return _fake_loss(D_fake, x_gen, sigma, sigma_data)[0]


def fake_loss_raw(F_fake: Tensor, x_gen: Tensor, x_t: Tensor, sigma: Tensor, *, sigma_data: float = 0.5) -> Tensor:
    """`fake_loss` from the raw network output: `mean((F_fake - (x_gen - c_skip * x_t) / c_out)^2)`.

    The same number, as `weight * c_out^2 = 1` (Karras et al. 2022, eq. 8), and no weight that explodes at small
    sigma.

    Args:
        F_fake: the fake score's raw output `[B, C, H, W]`, floating point.
        x_gen: the generated images that were noised, like `F_fake`; counts as a constant.
        x_t: what the fake score denoised, `x_gen + sigma * noise`, like `F_fake`; counts as a constant.
        sigma: noise level of each image `[B]`, > 0, in units of pixel values; a constant.
        sigma_data: standard deviation of the data, > 0; infinity: `c_skip = 1` and `c_out = sigma`.

    Returns the loss, a scalar (float64 for float64, else float32), twice differentiable in `F_fake`.
    Raises TypeError or ValueError, naming what was expected and what came; NotImplementedError for forward mode.
    """
    F_fake, x_gen, x_t = check_images("fake_loss_raw", F_fake=F_fake, x_gen=x_gen, x_t=x_t)
    check_constant("fake_loss_raw", "sigma", sigma, F_fake)
    check_positive("fake_loss_raw", sigma_data=sigma_data)
    check_no_tangent("fake_loss_raw", F_fake, x_gen, x_t, sigma)
    return _fake_loss_raw(F_fake, x_gen, x_t, sigma, sigma_data)[0]


def reference(D_x: Tensor, images: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    weight = per_sample(weight, D_x)
    error = D_x.to(weight.dtype) - images.to(weight.dtype)
    grad = 2 / max(1, error.numel()) * weight * error
    return (weight * error.square()).mean(), grad.to(gradient_dtype(D_x))


def reference_fake(D_fake: Tensor, x_gen: Tensor, sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    return reference(D_fake, x_gen, loss_weight(sigma.to(wide_dtype(D_fake)), sigma_data))


def reference_raw(
    F_fake: Tensor, x_gen: Tensor, x_t: Tensor, sigma: Tensor, sigma_data: float
) -> tuple[Tensor, Tensor]:
    c_skip, c_out, *_ = preconditioning(per_sample(sigma, F_fake), sigma_data)
    error = F_fake.to(c_out.dtype) - (x_gen.to(c_out.dtype) - c_skip * x_t) / c_out
    return error.square().mean(), (2 / max(1, error.numel()) * error).to(gradient_dtype(F_fake))


_denoising_loss = define(
    "denoising_loss(Tensor D_x, Tensor images, Tensor weight) -> (Tensor, Tensor)",
    module="fake_loss",
    reference=reference,
    fake=_loss.fake,
    **_loss.derivatives("denoising_loss", weight=lambda weight: weight, position=2),
)
_fake_loss = define(
    "fake_loss(Tensor D_fake, Tensor x_gen, Tensor sigma, float sigma_data) -> (Tensor, Tensor)",
    module="fake_loss",
    reference=reference_fake,
    fake=_loss.fake,
    **_loss.derivatives("fake_loss", weight=loss_weight, position=2),
)
_fake_loss_raw = define(
    "fake_loss_raw(Tensor F_fake, Tensor x_gen, Tensor x_t, Tensor sigma, float sigma_data) -> (Tensor, Tensor)",
    module="fake_loss",
    reference=reference_raw,
    fake=_loss.fake,
    **_loss.derivatives("fake_loss_raw", weight=lambda sigma, sigma_data: 1, position=3),
)
