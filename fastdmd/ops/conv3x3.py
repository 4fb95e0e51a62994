"""The 3x3 convolution of a UNet, on a CPU by Winograd's minimal filtering."""

from __future__ import annotations

import sys

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdmd.ops import _convolution
from fastdmd.ops._validate import laid_out

MIN_TILES = 8  # of 2x2 outputs
WEIGHTS_PER_TILE = 2**14  # at most, of 3x3
MAX_WEIGHTS = {torch.float32: sys.maxsize, torch.bfloat16: 2**17}  # of 3x3, by how torch's were timed with AVX512-BF16


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`conv2d(x, weight, bias, padding=1)` for 3x3 weights; on a CPU with a half to a quarter of the multiplications.

    Where `x` is float32 or bfloat16, on a CPU and not tiny, it or the weight channels_last, as the output is then, and
    both numbers of channels multiples of 16 and, in bfloat16, not large, output and gradients are Winograd's (Lavin &
    Gray 2016), computed in float32: F(4x4, 3x3), 36 instead of 144 multiplications, or of few pixels F(2x2, 3x3), 16
    instead of 36; of many images, for the m x n outputs that are left at an edge, (m + 2) (n + 2) instead of 9 m n.
    Everywhere else it is torch's own convolution. In float32, against float64 (root mean square, 16 to 256 channels),
    output and gradient of the input err 1.7 to 2.5 times as much as torch's by 4x4, 0.6 to 0.8 times by 2x2, that of
    the weight 1.3 to 2.8 times and 0.5 to 1.7 times, the less the more pixels: see docs/ops.md. What bfloat16 rounds to
    in the end is most of any error. A gradient that is to be differentiated itself is torch's.

    Args:
        x: features `[B, C, H, W]`, floating point.
        weight: `[C_out, C, 3, 3]`, of the dtype of `x`.
        bias: `[C_out]`, or None.

    Returns `[B, C_out, H, W]`. Differentiable in all arguments, as often as you like.
    Raises TypeError or ValueError, naming what was expected and what came.
    """
    _convolution.check("conv3x3", x, weight, bias, 3)
    if not _suits(x, weight, bias):
        return F.conv2d(x, weight, bias, padding=1)
    return _conv3x3(laid_out(x, torch.channels_last), weight, None if bias is None else bias.contiguous())


def _suits(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Few tiles of 2x2 outputs do not make up for the transformation of the weight."""
    if not _convolution.can_be_ours(x, weight, bias, tuple(MAX_WEIGHTS)):
        return False
    B, C, H, W = x.shape
    C_out, tiles = weight.shape[0], B * ((H + 1) // 2) * ((W + 1) // 2)
    return tiles >= max(MIN_TILES, C * C_out / WEIGHTS_PER_TILE) and C * C_out <= MAX_WEIGHTS[x.dtype]


reference, _conv3x3 = _convolution.define_convolution("conv3x3", padding=1)
