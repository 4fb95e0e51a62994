"""The generator's loss of score identity distillation: a pure function; all randomness comes in as arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdmd import ops
from fastdmd.diffusion import per_sample
from fastdmd.distill.losses import Denoise


def score_identity_loss(
    x_gen: Tensor,
    teacher: Denoise,
    fake_score: Denoise,
    class_labels: Tensor | None,
    *,
    sigma: Tensor,
    noise: Tensor | None = None,
    rng_key: Tensor | None = None,
    alpha: float,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """The loss `L_sid`, differentiable in `x_gen` alone, and the share of samples that it left out (Zhou et al. 2024).

    `L_sid = mean(weight * (delta * (D_fake - x_gen) + (1 - alpha) * delta^2))` with `delta = D_real - D_fake`, both at
    `x_t = x_gen + sigma * noise`, and `weight = 1 / max(mean|x_gen - D_real|, eps)` per sample, a constant in which the
    `sigma^-4` of two scores `(D - x_t) / sigma^2` is cancelled. It estimates `E|D_real - D|^2`, `D = E[x_gen | x_t]`:
        `E<delta, D_real - x_gen> = E<delta, D_real - D>`, as what depends on x_t alone sees of x_gen only D;
        `E<delta, D_real - D_fake>`, D_fake in place of D twice, is the same but biased: L_sid is the first - alpha it.

    The gradient reaches `x_gen` through both networks too, not their weights; its part `-weight * delta / numel` is
    that of `L_dm`. A sample whose loss or gradient is NaN or infinite counts as zero, as one that is right.

    `x_gen` and `noise` are `[B, C, H, W]`, `sigma` `[B]`, `class_labels` int64 `[B]` or None; instead of `noise` there
    may be `rng_key`, see `ops.add_noise`. Both results are 0-dim, on the device. There is no second derivative. Raises
    ValueError for a denoised image of another shape or dtype than `x_gen`, for a teacher without a gradient in the
    images, and ValueError or TypeError as `ops.add_noise` does.
    """
    with torch.enable_grad():
        x = x_gen.detach().requires_grad_(True)
        x_t = ops.add_noise(x, sigma, noise=noise, rng_key=rng_key)
        D_real = teacher(x_t, sigma, class_labels)
        D_fake = fake_score(x_t, sigma, class_labels)
        for name, D_x in (("D_real", D_real), ("D_fake", D_fake)):
            if D_x.shape != x.shape or D_x.dtype != x.dtype:
                expected, got = (f"{tensor.dtype} of {tuple(tensor.shape)}" for tensor in (x, D_x))
                raise ValueError(f"fastdmd.score_identity_loss: expected {name} {expected}, got {got}")
        if not D_real.requires_grad:
            raise ValueError(
                "fastdmd.score_identity_loss: expected a teacher with a gradient in the images that it denoises, got "
                "none: of no_grad, inference_mode or detach"
            )
        weight = 1 / (x - D_real).detach().abs().mean(dim=(1, 2, 3)).clamp(min=eps)
        delta = D_real - D_fake
        losses = weight * (delta * (D_fake - x + (1 - alpha) * delta)).mean(dim=(1, 2, 3))  # [B]
        # Here and now: of a sample that is broken, backward through the networks would be 0 * inf.
        (grad,) = torch.autograd.grad(losses.sum(), x)
    good = (losses.detach() + grad.sum(dim=(1, 2, 3))).isfinite()
    loss = torch.where(good, losses.detach(), 0).mean()
    grad = torch.where(per_sample(good), grad, 0) / len(x)
    return _WithGradient.apply(x_gen, loss, grad), 1 - good.float().mean()


class _WithGradient(torch.autograd.Function):
    """`loss`, 0-dim, whose derivative in `x` is `grad`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, grad: Tensor) -> Tensor:
        ctx.save_for_backward(grad)
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = ctx.saved_tensors
        return grad_loss.to(grad.dtype) * grad, None, None
