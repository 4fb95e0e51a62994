"""The normalised distribution-matching gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdmd.ops._math import gradient_dtype, wide_dtype
from fastdmd.ops._registry import define
from fastdmd.ops._validate import check_images, check_no_tangent, check_positive


def dm_gradient(x_gen: Tensor, D_real: Tensor, D_fake: Tensor, *, eps: float = 1e-6) -> Tensor:
    """The direction in which the generator's distribution is wrong (Yin et al. 2024, DMD, eq. 7-8).

    `grad = ((x_gen - D_real) - (x_gen - D_fake)) / w`, where `w = mean |x_gen - D_real|` over C, H, W of each
    sample, clamped from below at `eps`. Entries that are not finite become 0, so one broken sample of the teacher
    cannot spoil a batch.

    Args:
        x_gen: generator output `[B, C, H, W]`, floating point.
        D_real: the teacher's denoised output, like `x_gen`.
        D_fake: the fake score's denoised output, like `x_gen`.
        eps: lower bound of the weight factor `w`, in units of pixel values.

    Returns `grad`, like `x_gen` but float32 for float16, whose range it may leave; without a graph.
    Raises TypeError or ValueError, naming what was expected and what came.
    """
    tensors = check_images("dm_gradient", x_gen=x_gen, D_real=D_real, D_fake=D_fake)
    check_positive("dm_gradient", eps=eps)
    check_no_tangent("dm_gradient", *tensors)
    with torch.no_grad():
        return _dm_gradient(*tensors, eps)


def reference(x_gen: Tensor, D_real: Tensor, D_fake: Tensor, eps: float) -> Tensor:
    return wide_gradient(x_gen, D_real, D_fake, eps).to(gradient_dtype(x_gen))


def wide_gradient(x_gen: Tensor, D_real: Tensor, D_fake: Tensor, eps: float) -> Tensor:
    wide = wide_dtype(x_gen)
    p_real = x_gen.to(wide) - D_real.to(wide)
    p_fake = x_gen.to(wide) - D_fake.to(wide)
    w = p_real.abs().mean(dim=(1, 2, 3), keepdim=True).clamp(min=eps)
    grad = (p_real - p_fake) / w
    return torch.where(grad.isfinite(), grad, 0)


_dm_gradient = define(
    "dm_gradient(Tensor x_gen, Tensor D_real, Tensor D_fake, float eps) -> Tensor",
    module="dm_gradient",
    reference=reference,
    fake=lambda x_gen, D_real, D_fake, eps: torch.empty_like(x_gen, dtype=gradient_dtype(x_gen)),
)
