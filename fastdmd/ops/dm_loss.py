"""The distribution-matching loss, differentiable in the generator's output."""

from __future__ import annotations

from torch import Tensor

from fastdmd.ops import _loss
from fastdmd.ops._math import gradient_dtype, per_sample, preconditioning
from fastdmd.ops._registry import define
from fastdmd.ops._validate import check_constant, check_images, check_no_tangent, check_positive
from fastdmd.ops.dm_gradient import wide_gradient


def dm_loss(x_gen: Tensor, D_real: Tensor, D_fake: Tensor, *, eps: float = 1e-6) -> Tensor:
    """The distribution-matching loss `L_dm = 0.5 * mean(grad^2)` (Yin et al. 2024, DMD, section 3.2).

    `grad` is that of `dm_gradient`. The derivative in `x_gen` is defined as `grad / numel`, the update that
    distribution matching asks for; the denoised images count as constants. There is no second derivative.

    Args:
        x_gen: generator output `[B, C, H, W]`, floating point.
        D_real: the teacher's denoised output, like `x_gen`.
        D_fake: the fake score's denoised output, like `x_gen`.
        eps: lower bound of the weight factor, in units of pixel values.

    Returns the loss, a scalar: float64 for float64, else float32.
    Raises TypeError or ValueError, naming what was expected and what came; NotImplementedError for other derivatives.
    """
    tensors = check_images("dm_loss", x_gen=x_gen, D_real=D_real, D_fake=D_fake)
    check_positive("dm_loss", eps=eps)
    check_no_tangent("dm_loss", *tensors)
    return _dm_loss(*tensors, eps)[0]


def dm_loss_raw(
    x_gen: Tensor,
    x_t: Tensor,
    sigma: Tensor,
    F_real: Tensor,
    F_fake: Tensor,
    *,
    sigma_data: float = 0.5,
    eps: float = 1e-6,
) -> Tensor:
    """`dm_loss` from raw network outputs: `D = c_skip * x_t + c_out * F` in the same pass (Karras et al. 2022, eq. 7).

    The skip terms cancel in `D_real - D_fake`, so small differences survive at small sigma.

    Args:
        x_gen: generator output `[B, C, H, W]`, floating point.
        x_t: what both networks denoised, `x_gen + sigma * noise`, like `x_gen`.
        sigma: noise level of each image `[B]`, > 0, in units of pixel values.
        F_real: the teacher's raw output, like `x_gen`.
        F_fake: the fake score's raw output, like `x_gen`.
        sigma_data: standard deviation of the data in the preconditioning of both, > 0; infinity: `D = x_t + sigma * F`.
        eps: lower bound of the weight factor, in units of pixel values.

    Returns the loss, a scalar: float64 for float64, else float32.
    Raises TypeError or ValueError, naming what was expected and what came; NotImplementedError for other derivatives.
    """
    x_gen, x_t, F_real, F_fake = check_images("dm_loss_raw", x_gen=x_gen, x_t=x_t, F_real=F_real, F_fake=F_fake)
    check_constant("dm_loss_raw", "sigma", sigma, x_gen)
    check_positive("dm_loss_raw", sigma_data=sigma_data, eps=eps)
    check_no_tangent("dm_loss_raw", x_gen, x_t, sigma, F_real, F_fake)
    return _dm_loss_raw(x_gen, x_t, sigma, F_real, F_fake, sigma_data, eps)[0]


def reference(x_gen: Tensor, D_real: Tensor, D_fake: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    grad = wide_gradient(x_gen, D_real, D_fake, eps)
    return 0.5 * grad.square().mean(), (grad / max(1, grad.numel())).to(gradient_dtype(x_gen))


def reference_raw(
    x_gen: Tensor, x_t: Tensor, sigma: Tensor, F_real: Tensor, F_fake: Tensor, sigma_data: float, eps: float
) -> tuple[Tensor, Tensor]:
    c_skip, c_out, *_ = preconditioning(per_sample(sigma, x_gen), sigma_data)
    D_real, D_fake = c_skip * x_t + c_out * F_real, c_skip * x_t + c_out * F_fake
    loss, grad = reference(x_gen.to(c_out.dtype), D_real, D_fake, eps)
    return loss, grad.to(gradient_dtype(x_gen))


_dm_loss = define(
    "dm_loss(Tensor x_gen, Tensor D_real, Tensor D_fake, float eps) -> (Tensor, Tensor)",
    module="dm_loss",
    reference=reference,
    fake=_loss.fake,
    **_loss.derivatives("dm_loss"),
)
_dm_loss_raw = define(
    "dm_loss_raw(Tensor x_gen, Tensor x_t, Tensor sigma, Tensor F_real, Tensor F_fake, float sigma_data, float eps)"
    " -> (Tensor, Tensor)",
    module="dm_loss",
    reference=reference_raw,
    fake=_loss.fake,
    **_loss.derivatives("dm_loss_raw"),
)
