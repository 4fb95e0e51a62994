"""Drop-ins of PyTorch's own layers: what our ops take they compute, everything else stays PyTorch's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdmd import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DEVICES = ("cpu", "cuda", "meta")


class Conv3x3(nn.Conv2d):
    """A convolution that was seen to be a 3x3 one; as long as it is one, that of our op."""

    def forward(self, x: Tensor) -> Tensor:
        if not is_plain_3x3(self):
            return super().forward(x)
        return conv2d(x, self.weight, self.bias, padding=1)


class GroupNorm(nn.GroupNorm):
    """GroupNorm, and at the places where a rewritten forward says so what follows it."""

    def forward(
        self,
        x: Tensor,
        *,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        silu: bool = False,
        rounded: bool = False,
    ) -> Tensor:
        return group_norm(
            x,
            self.num_groups,
            self.weight,
            self.bias,
            self.eps,
            scale=scale,
            shift=shift,
            silu=silu,
            rounded=rounded,
        )


def is_plain_3x3(module: nn.Conv2d) -> bool:
    return (
        module.kernel_size == (3, 3)
        and module.stride == (1, 1)
        and module.padding in ((1, 1), "same")
        and module.dilation == (1, 1)
        and module.groups == 1
        and module.padding_mode == "zeros"
        and "_conv_forward" not in vars(module)  # which somebody has replaced, for another padding
    )


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """`F.conv2d`; by `ops.conv3x3` where it is one."""
    is_3x3 = isinstance(weight, Tensor) and weight.dim() == 4 and weight.shape[2:] == (3, 3)
    is_plain = _pair(stride) == _pair(dilation) == (1, 1) and groups == 1
    is_same = not isinstance(padding, str) and _pair(padding) == (1, 1)
    if (
        is_3x3
        and is_plain
        and (is_same or padding == "same")
        and _is_image(input)
        and weight.shape[1] == input.shape[1]
    ):
        parameters = [weight] if bias is None else [weight, bias]
        if all(p.dtype == input.dtype and p.device == input.device for p in parameters):
            return ops.conv3x3(input, weight, bias)
    return F.conv2d(input, weight, bias, stride, padding, dilation, groups)


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = False,
    rounded: bool = False,
) -> Tensor:
    """`F.group_norm`; if asked to `* (1 + scale) + shift`, then SiLU: all in one pass where it is of `[B, C, H, W]`.

    `[B, C, N]` is taken, too. Under autocast of a GPU the result is float32, as PyTorch's, but for one that is to be
    `rounded`, as the convolution that it goes to would round it.
    """
    tables = [table for table in (scale, shift) if table is not None]
    if not _is_normalised(input, num_groups, weight, bias, eps) or not all(_is_table(t, input) for t in tables):
        dtype = input.dtype if weight is None else weight.dtype
        y = F.group_norm(input.to(dtype), num_groups, weight, bias, eps).to(input.dtype)
        if scale is not None and shift is not None:
            y = y * (1 + scale) + shift
        return F.silu(y) if silu else y
    x = input.unsqueeze(-1) if input.dim() == 3 else input
    if x.is_cuda and torch.is_autocast_enabled("cuda") and not rounded:
        x = x.float()
    if not silu:
        y = ops.group_norm(x, weight, bias, num_groups=num_groups, eps=eps)
    else:
        own = {name: t[:, :, 0, 0] for name, t in (("scale", scale), ("shift", shift)) if t is not None}
        y = ops.group_norm_silu(x, weight, bias, num_groups=num_groups, eps=eps, **own)
    return y.squeeze(-1) if input.dim() == 3 else y


def channels_last(x: Tensor) -> Tensor:
    """`x.contiguous()` for convolutions, as a copy in channels_last, or `x` itself if it is laid out as both.

    What our ops do not take at all is contiguous, as it was.
    """
    if not _is_image(x):
        return x.contiguous()
    layout = torch.channels_last
    return x.contiguous(memory_format=layout) if x.is_contiguous() else x.clone(memory_format=layout)


def _is_image(x: Tensor) -> bool:
    """Whether our ops take it at all: `[B, C, H, W]`, outside of `torch.func`, whose transforms they do not know."""
    return (
        isinstance(x, Tensor)
        and x.dim() == 4
        and x.dtype in DTYPES
        and x.device.type in DEVICES
        and not torch._C._are_functorch_transforms_active()
    )


def _is_normalised(x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> bool:
    shaped = x.unsqueeze(-1) if isinstance(x, Tensor) and x.dim() == 3 else x
    if not _is_image(shaped) or not eps > 0 or x.shape[1] % num_groups != 0:
        return False
    return all(p is None or p.shape == x.shape[1:2] and p.device == x.device for p in (weight, bias))


def _is_table(table: Tensor, x: Tensor) -> bool:
    is_of_channels = isinstance(table, Tensor) and x.dim() == 4 and table.shape == (*x.shape[:2], 1, 1)
    return is_of_channels and table.dtype == x.dtype


def _pair(value: int | Sequence[int]) -> tuple[int, ...]:
    return (value, value) if isinstance(value, int) else tuple(value)
