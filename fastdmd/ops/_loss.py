"""What the losses share: an op returns the loss and its gradient in one launch, and backward scales that gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict

import torch
from torch import Tensor

from fastdmd.ops._math import gradient_dtype, per_sample, wide_dtype
from fastdmd.ops._observers import is_unobserved
from fastdmd.ops._registry import define, no_second_derivative
from fastdmd.ops._validate import has_tangent


def fake(x: Tensor, *_) -> tuple[Tensor, Tensor]:
    return x.new_empty((), dtype=wide_dtype(x)), torch.empty_like(x, dtype=gradient_dtype(x))


class Derivatives(TypedDict):
    setup_context: Callable
    backward: Callable


def derivatives(op: str, weight: Callable | None = None, position: int = 0) -> Derivatives:
    """`setup_context` and `backward` of a loss; the inputs but the first are constants.

    The gradient that is emitted beside the loss is an output of the graph, too: where backward itself is
    differentiated, what it was made from is. Its derivative is `2 / numel * weight(vector, *numbers)`, or none: the
    vector `[B]`, spread to `[B, 1, 1, 1]`, is the input at `position`, and the numbers are those behind it.
    """

    def setup_context(ctx, inputs, output) -> None:
        ctx.dtype = inputs[0].dtype
        ctx.num_inputs = len(inputs)
        ctx.numbers = inputs[position + 1 :]
        ctx.save_for_backward(output[1], None if weight is None else inputs[position])
        ctx.set_materialize_grads(False)  # nobody wants zeros for an output that has no use

    def backward(ctx, saved: tuple[Tensor, ...], grad_loss: Tensor | None, grad_gradient: Tensor | None):
        gradient, vector = saved
        grad = None if grad_loss is None else _scaled(gradient, grad_loss, ctx.dtype)
        if grad_gradient is not None:
            if weight is None:
                raise no_second_derivative(op)
            factor = 2 / max(1, gradient.numel()) * weight(per_sample(vector, gradient), *ctx.numbers)
            second = (factor * grad_gradient).to(ctx.dtype)
            grad = second if grad is None else grad + second
        return grad, *[None] * (ctx.num_inputs - 1)

    return {"setup_context": setup_context, "backward": backward}


def _scaled(gradient: Tensor, grad_loss: Tensor, dtype: torch.dtype) -> Tensor:
    if torch.is_grad_enabled() or has_tangent(grad_loss):
        return _reference(gradient, grad_loss, dtype)
    # A CPU waits for nothing to look at a value, and saves a third of the memory traffic. Unless backward may come
    # again: then what is saved stays ours. Who records operations, or asks for a batch of gradients, gets those that
    # hold for every value. What is saved is of the graph, and a gradient is not.
    if grad_loss.device.type == "cpu" and gradient.dtype == dtype and is_unobserved((grad_loss,)):
        if not torch._C._autograd._get_current_graph_task_keep_graph() and grad_loss.item() == 1:
            return gradient.detach()
    return _scale_gradient(gradient, grad_loss, dtype)


def _reference(grad: Tensor, grad_loss: Tensor, dtype: torch.dtype) -> Tensor:
    return (grad.to(wide_dtype(grad)) * grad_loss).to(dtype)


_scale_gradient = define(
    "scale_gradient(Tensor grad, Tensor grad_loss, ScalarType dtype) -> Tensor",
    module="fake_loss",
    reference=_reference,
    fake=lambda grad, grad_loss, dtype: torch.empty_like(grad, dtype=dtype),
)
