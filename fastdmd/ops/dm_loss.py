"""The distribution-matching loss, differentiable in the generator's output."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdmd.ops._validate import check_images, check_positive
from fastdmd.ops.dm_gradient import reference as dm_gradient_reference


def dm_loss(x_gen: Tensor, D_real: Tensor, D_fake: Tensor, *, eps: float = 1e-6) -> Tensor:
    """The distribution-matching loss `L_dm = 0.5 * mean(grad^2)` (Yin et al. 2024, DMD, section 3.2).

    `grad` is that of `dm_gradient`. Its derivative in `x_gen` is defined as `grad / numel`, the update that
    distribution matching asks for; the denoised images count as constants.

    Args:
        x_gen: generator output `[B, C, H, W]`, floating point.
        D_real: the teacher's denoised output, like `x_gen`.
        D_fake: the fake score's denoised output, like `x_gen`.
        eps: lower bound of the weight factor, in units of pixel values.

    Returns the loss, a scalar of the dtype of `x_gen` (float32 for half precision).
    Raises TypeError or ValueError, naming what was expected and what came.
    """
    check_images("dm_loss", x_gen=x_gen, D_real=D_real, D_fake=D_fake)
    check_positive("dm_loss", eps=eps)
    return _Reference.apply(x_gen, D_real, D_fake, eps)


class _Reference(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_gen: Tensor, D_real: Tensor, D_fake: Tensor, eps: float) -> Tensor:
        grad = dm_gradient_reference(x_gen, D_real, D_fake, eps)
        ctx.save_for_backward(grad)
        return 0.5 * grad.to(torch.promote_types(grad.dtype, torch.float32)).square().mean()

    @staticmethod
    def backward(ctx, grad_loss: Tensor):
        (grad,) = ctx.saved_tensors
        return grad * (grad_loss / max(1, grad.numel())).to(grad.dtype), None, None, None
