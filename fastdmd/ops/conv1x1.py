"""The 1x1 convolution of a UNet, on a CPU as one product of matrices."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdmd.ops import _convolution
from fastdmd.ops._validate import laid_out

DTYPES = (torch.float32,)  # in bfloat16 torch's has the units for it


def conv1x1(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`conv2d(x, weight, bias)` for 1x1 weights: `y[b, :, p] = weight x[b, :, p] + bias` of each pixel.

    Where `x` is float32, on a CPU, it or the weight channels_last and nothing else, as the output is then, and both
    numbers of channels multiples of 16, output and gradients are our own products, which err as torch's do. Everywhere
    else it is torch's own convolution. A gradient that is to be differentiated itself is torch's.

    Args:
        x: features `[B, C, H, W]`, floating point.
        weight: `[C_out, C, 1, 1]`, of the dtype of `x`.
        bias: `[C_out]`, or None.

    Returns `[B, C_out, H, W]`. Differentiable in all arguments, as often as you like.
    Raises TypeError or ValueError, naming what was expected and what came.
    """
    _convolution.check("conv1x1", x, weight, bias, 1)
    if not _convolution.can_be_ours(x, weight, bias, DTYPES):
        return F.conv2d(x, weight, bias)
    return _conv1x1(laid_out(x, torch.channels_last), _dense(weight), None if bias is None else bias.contiguous())


def _dense(weight: Tensor) -> Tensor:
    """Its rows of C one after the other; what it is in memory, almost always."""
    return weight if weight.stride()[:2] == (weight.shape[1], 1) else weight.contiguous()


reference, _conv1x1 = _convolution.define_convolution("conv1x1", padding=0)
