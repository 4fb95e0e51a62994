"""The gradient of a bias: on a GPU one launch, where torch.compile makes two of each sum."""

from __future__ import annotations

from torch import Tensor

from fastdmd.ops._math import wide_dtype
from fastdmd.ops._registry import define
from fastdmd.ops._validate import check_images, has_tangent


def bias_gradient(grad_y: Tensor) -> Tensor:
    """`sum over b, i, j of grad_y[b, :, i, j]`: the gradient of a bias that was added to every pixel of `y`.

    Args:
        grad_y: `[B, C, H, W]`, floating point; channels_last is where a GPU is fast.

    Returns `[C]`, of the dtype of `grad_y`, summed in float32, or float64, always in the same order. Differentiable, as
    often as you like. Raises TypeError or ValueError, naming what was expected and what came.
    """
    (grad_y,) = check_images("bias_gradient", grad_y=grad_y)
    if has_tangent(grad_y):  # torch differentiates its own in forward mode
        return reference(grad_y)
    return _bias_gradient(grad_y)


def reference(grad_y: Tensor) -> Tensor:
    return grad_y.sum(dim=(0, 2, 3), dtype=wide_dtype(grad_y)).to(grad_y.dtype)


def _fake(grad_y: Tensor) -> Tensor:
    return grad_y.new_empty(grad_y.shape[1])


def _setup_context(ctx, inputs, output) -> None:
    ctx.shape = inputs[0].shape


def _backward(ctx, saved: tuple[Tensor, ...], grad: Tensor) -> Tensor:
    return grad[:, None, None].expand(ctx.shape)


_bias_gradient = define(
    "bias_gradient(Tensor grad_y) -> Tensor",
    module="bias_gradient",
    reference=reference,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    only="a Triton kernel",
)
