"""The adversarial losses of DMD2, and what a discriminator's logit says of densities: pure functions of logits."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdmd.diffusion import per_sample
from fastdmd.ranks import ALONE, Ranks

Divergence = Literal["reverse-kl", "forward-kl", "jensen-shannon", "hellinger"]
MAX_RATIO = 100.0  # of densities, either way: what a discriminator says beyond is no measurement


def fooling_loss(logit_gen: Tensor) -> Tensor:
    """`mean(softplus(-logit_gen))`, what moves the generator (Yin et al. 2024, DMD2, section 4.3).

    `logit_gen` `[B]` is of generated images, 0-dim what it returns. Raises ValueError for another shape.
    """
    _check("fooling_loss", logit_gen=logit_gen)
    return F.softplus(-logit_gen).mean()


def discriminator_loss(logit_gen: Tensor, logit_real: Tensor) -> Tensor:
    """`mean(softplus(logit_gen)) + mean(softplus(-logit_real))` (Goodfellow et al. 2014, eq. 1; Yin et al. 2024).

    Least where `logit = ln(p_real / p_fake)`. Logits of generated and of real images, `[B]` each; 0-dim what it
    returns. Raises ValueError for another shape.
    """
    _check("discriminator_loss", logit_gen=logit_gen, logit_real=logit_real)
    return F.softplus(logit_gen).mean() + F.softplus(-logit_real).mean()


def approximate_r1(logit: Tensor, logit_near: Tensor) -> Tensor:
    """`mean((logit - logit_near)^2)`, of images and of the same with a little noise, `[B]` each (Lin et al. 2025).

    To first order the squared gradient of the logit times the variance of that noise, R1 (Mescheder et al. 2018)
    without a second derivative. 0-dim. Raises ValueError for another shape, and for two that differ.
    """
    _check("approximate_r1", logit=logit, logit_near=logit_near)
    if logit.shape != logit_near.shape:
        raise _error("approximate_r1", f"logit_near of shape {tuple(logit.shape)}", tuple(logit_near.shape))
    return (logit - logit_near).square().mean()


def density_ratio(logit: Tensor) -> Tensor:
    """`r = exp(logit)`, estimating `p_real / p_fake`, in [1/100, 100], `[B]`. Raises ValueError for other shapes."""
    _check("density_ratio", logit=logit)
    return logit.exp().clamp(1 / MAX_RATIO, MAX_RATIO)


def divergence_weight(logit: Tensor, divergence: Divergence, ranks: Ranks = ALONE) -> Tensor:
    """`h(r) / mean(h)`, `h(r) = f''(r) r^2`, `[B]`: times the gradient of distribution matching, that of f.

    The mean is over the logits of all `ranks`, one exchange of a number.
    `h` is 1 for `reverse-kl`, which is distribution matching itself, `r` for `forward-kl`, `r / (1 + r)` for
    `jensen-shannon`, `sqrt(r) / 4` for squared `hellinger`, with `r = density_ratio(logit)` (Xu et al. 2025, f-distill,
    table 1). Differentiable, though as a weight it counts as constant. Raises ValueError for another divergence or
    shape.
    """
    if divergence not in get_args(Divergence):
        raise _error("divergence_weight", f"divergence out of {', '.join(get_args(Divergence))}", divergence)
    _check("divergence_weight", logit=logit)
    r = density_ratio(logit)
    if divergence == "forward-kl":
        h = r
    elif divergence == "jensen-shannon":
        h = r / (1 + r)
    elif divergence == "hellinger":
        h = r.sqrt() / 4
    else:
        h = torch.ones_like(r)
    return h / ranks.mean_(h.mean())


def weigh_gradient(x: Tensor, weight: Tensor) -> Tensor:
    """`x` itself, `[B, C, H, W]`, whose gradient is multiplied by `weight`, `[B]`, a constant.

    Raises ValueError for a weight of another shape.
    """
    if weight.shape != x.shape[:1]:
        raise _error("weigh_gradient", f"weight of shape {tuple(x.shape[:1])}", tuple(weight.shape))
    return _WeighGradient.apply(x, weight)


class _WeighGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,), (weight,) = grads, ctx.saved_tensors
        return per_sample(weight).to(grad.dtype) * grad, None


def _check(name: str, **logits: Tensor) -> None:
    for argument, logit in logits.items():
        if logit.dim() != 1 or not logit.is_floating_point():
            raise _error(name, f"{argument} floating point of shape [B]", f"{logit.dtype} of {tuple(logit.shape)}")


def _error(name: str, expected: str, got: object) -> ValueError:
    return ValueError(f"fastdmd.{name}: expected {expected}, got {got}")
