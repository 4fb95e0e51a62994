"""What the losses share: an op returns the loss and its gradient in one launch, and backward scales that gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdmd.ops._registry import define
from fastdmd.ops._validate import per_sample, wide_dtype


def preconditioning(sigma: Tensor, x: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    """EDM's `c_skip` and `c_out`, `[B, 1, 1, 1]` (Karras et al. 2022, table 1)."""
    sigma = per_sample(sigma, x)
    variance = sigma**2 + sigma_data**2
    return sigma_data**2 / variance, sigma * sigma_data / variance.sqrt()


def gradient_dtype(x: Tensor) -> torch.dtype:
    """Of a gradient that may leave the range of float16."""
    return torch.float32 if x.dtype == torch.float16 else x.dtype


def fake(x: Tensor, *_) -> tuple[Tensor, Tensor]:
    return x.new_empty((), dtype=wide_dtype(x)), torch.empty_like(x, dtype=gradient_dtype(x))


def setup_context(ctx, inputs, output) -> None:
    ctx.dtype, ctx.num_inputs = inputs[0].dtype, len(inputs)
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # nobody wants zeros for that


def backward(ctx, grad_loss: Tensor | None, _):
    """The derivative in the first input: `gradient * grad_loss`. The other inputs are constants."""
    if grad_loss is None:
        return (None,) * ctx.num_inputs
    (gradient,) = ctx.saved_tensors
    if type(grad_loss) is Tensor and grad_loss.device.type == "cpu" and gradient.dtype == ctx.dtype:
        if grad_loss.item() == 1:  # a CPU waits for nothing to look, and saves a third of the memory traffic
            return gradient, *[None] * (ctx.num_inputs - 1)
    return _scale_gradient(gradient, grad_loss, ctx.dtype), *[None] * (ctx.num_inputs - 1)


def _reference(grad: Tensor, grad_loss: Tensor, dtype: torch.dtype) -> Tensor:
    return (grad.to(wide_dtype(grad)) * grad_loss).to(dtype)


_scale_gradient = define(
    "scale_gradient(Tensor grad, Tensor grad_loss, ScalarType dtype) -> Tensor",
    module="fake_loss", reference=_reference,
    fake=lambda grad, grad_loss, dtype: torch.empty_like(grad, dtype=dtype),
)  # fmt: skip
