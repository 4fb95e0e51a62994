"""GroupNorm, optional scale and shift, and SiLU or not, in one pass: the glue between the convolutions of a UNet."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdmd.ops._math import wide_dtype
from fastdmd.ops._registry import define
from fastdmd.ops._validate import (
    check_images,
    check_positive,
    check_vector,
    has_tangent,
    laid_out,
    memory_format,
)


def group_norm_silu(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    num_groups: int = 32,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    offset: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """`y = silu(n * (1 + scale) + shift)` with `n = group_norm(x + offset) * weight + bias`.

    GroupNorm is that of Wu & He 2018, scale and shift those of Dhariwal & Nichol 2021.

    Args:
        x: features `[B, C, H, W]`, floating point, contiguous or channels_last without a copy.
        weight: `[C]`, floating point, of any of these dtypes. Default: ones.
        bias: `[C]`, floating point. Default: zeros.
        num_groups: divides C.
        scale: `[B, C]`, floating point, with `shift`: the adaptive scale of ADM. Default: none.
        shift: `[B, C]`, floating point.
        offset: `[B, C]`, or `[C]` for all samples, floating point: an embedding, or the bias of a convolution before,
            whose sum with `x` is then neither written nor rounded. Default: none.
        eps: added to the variance.

    Returns `y`, like `x`. Differentiable in all tensors, as often as you like; a gradient that is to be differentiated
    is computed by PyTorch's own operations.
    Raises TypeError or ValueError, naming what was expected and what came.
    """
    x, weight, bias = _check("group_norm_silu", x, weight, bias, num_groups, eps)
    if (scale is None) != (shift is None):
        got = "shift" if scale is None else "scale"
        raise ValueError(f"fastdmd.group_norm_silu: expected scale and shift together, got {got} alone")
    if scale is not None and shift is not None:
        check_vector("group_norm_silu", "scale", scale, x, x.shape[:2])
        check_vector("group_norm_silu", "shift", shift, x, x.shape[:2])
        scale, shift = _unit_stride(scale), _unit_stride(shift)
    if offset is not None:
        of_all = isinstance(offset, Tensor) and offset.dim() == 1
        check_vector("group_norm_silu", "offset", offset, x, x.shape[1:2] if of_all else x.shape[:2])
        offset = _unit_stride(offset[None] if of_all else offset)
    return _normalise(x, weight, bias, scale, shift, offset, num_groups, eps, True)


def group_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, num_groups: int = 32, eps: float = 1e-5
) -> Tensor:
    """`y = group_norm(x) * weight + bias` (Wu & He 2018) in the layout of `x`; arguments and errors as above.

    `torch.nn.functional.group_norm` brings channels_last CUDA tensors into another layout and back.
    """
    x, weight, bias = _check("group_norm", x, weight, bias, num_groups, eps)
    return _normalise(x, weight, bias, None, None, None, num_groups, eps, False)


def _normalise(x: Tensor, *arguments) -> Tensor:
    if has_tangent(x, *arguments[:5]):  # torch differentiates its own in forward mode, in this layout alone
        return reference(x.contiguous(), *arguments)[0].contiguous(memory_format=memory_format(x))
    return _group_norm_silu(x, *arguments)[0]


def _check(
    op: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, num_groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    (x,) = check_images(op, x=x)
    check_positive(op, eps=eps)
    if not isinstance(num_groups, (int, torch.SymInt)):
        raise TypeError(f"fastdmd.{op}: expected num_groups to be an int, got {type(num_groups).__name__}")
    if num_groups < 1 or x.shape[1] % num_groups != 0:
        raise ValueError(f"fastdmd.{op}: expected num_groups that divides C = {x.shape[1]}, got {num_groups}")
    if weight is None:
        weight = x.new_ones(x.shape[1], dtype=wide_dtype(x))
    if bias is None:
        bias = x.new_zeros(x.shape[1], dtype=wide_dtype(x))
    check_vector(op, "weight", weight, x, x.shape[1:2])
    check_vector(op, "bias", bias, x, x.shape[1:2])
    return x, weight.contiguous(), bias.contiguous()


def _unit_stride(table: Tensor) -> Tensor:
    """The chunk of a wider table stays where it is."""
    return table if table.stride(1) == 1 else table.contiguous()


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    offset: Tensor | None,
    num_groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = wide_dtype(x)
    x_wide = _moved(x, offset).contiguous() if x.is_cuda else _moved(x, offset)  # torch 2.11: no other layout there
    n, mean, rstd = torch.native_group_norm(x_wide, weight.to(wide), bias.to(wide), *_sizes(x), num_groups, eps)
    m = n if scale is None or shift is None else n * (1 + _table(scale, x)) + _table(shift, x)
    y = F.silu(m) if silu else m
    return y.to(x.dtype, memory_format=memory_format(x)), mean, rstd


def reference_backward(
    grad_y: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    offset: Tensor | None,
    num_groups: int,
    silu: bool,
) -> tuple[Tensor, ...]:
    wide = mean.dtype
    h = (_moved(x, offset) - _spread(mean, x)) * _spread(rstd, x)
    n = torch.addcmul(_table(bias[None], x), h, _table(weight[None], x))
    m = n
    gain = None
    if scale is not None and shift is not None:
        gain = 1 + _table(scale, x)
        m = n * gain + _table(shift, x)
    s = torch.sigmoid(m)
    grad_m = grad_y.to(wide) * (s + m * s * (1 - s) if silu else 1)
    grad_n = grad_m if gain is None else grad_m * gain
    grad_h = grad_n * _table(weight[None], x)
    apart = grad_h - _spread(_groups(grad_h, num_groups).mean(dim=2), x)
    apart = apart - h * _spread(_groups(grad_h * h, num_groups).mean(dim=2), x)
    grad_x = _spread(rstd, x) * apart
    grad_scale = grad_shift = grad_offset = m.new_empty(0)
    if scale is not None and shift is not None:
        grad_scale = (grad_m * n).sum(dim=(2, 3)).to(scale.dtype)
        grad_shift = grad_m.sum(dim=(2, 3)).to(shift.dtype)
    if offset is not None:
        grad_offset = grad_x.sum(dim=(2, 3)).sum_to_size(offset.shape).to(offset.dtype)
    return (
        grad_x.to(x.dtype, memory_format=memory_format(x)),
        (grad_n * h).sum(dim=(0, 2, 3)).to(weight.dtype),
        grad_n.sum(dim=(0, 2, 3)).to(bias.dtype),
        grad_scale,
        grad_shift,
        grad_offset,
    )


def _moved(x: Tensor, offset: Tensor | None) -> Tensor:
    """`x + offset`, wide."""
    wide = x.to(wide_dtype(x))
    return wide if offset is None else wide + _table(offset, x)


def _moments(x: Tensor, offset: Tensor | None, num_groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and `1 / sqrt(variance + eps)`, `[B, G]`, differentiable."""
    groups = _groups(_moved(x, offset), num_groups)
    return groups.mean(dim=2), (groups.var(dim=2, correction=0) + eps).rsqrt()


def _groups(x: Tensor, num_groups: int) -> Tensor:
    """`[B, C, H, W]` -> `[B, G, C / G * H * W]`."""
    B, C, pixels = _sizes(x)
    return x.reshape(B, num_groups, C // num_groups * pixels)


def _sizes(x: Tensor) -> tuple[int, int, int]:
    return x.shape[0], x.shape[1], x.shape[2] * x.shape[3]


def _spread(values: Tensor, x: Tensor) -> Tensor:
    """`[B, G]` -> `[B, C, 1, 1]`."""
    return values.repeat_interleave(x.shape[1] // values.shape[1], dim=1)[:, :, None, None]


def _table(values: Tensor, x: Tensor) -> Tensor:
    """`[B or 1, C]` -> `[B or 1, C, 1, 1]`, wide."""
    return values.to(wide_dtype(x))[:, :, None, None]


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    offset: Tensor | None,
    num_groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.new_empty((x.shape[0], num_groups), dtype=wide_dtype(x))
    return torch.empty_like(x), mean, torch.empty_like(mean)


def _fake_backward(
    grad_y: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    offset: Tensor | None,
    num_groups: int,
    silu: bool,
) -> tuple[Tensor, ...]:
    tables = [
        mean.new_empty(0) if table is None else mean.new_empty(table.shape, dtype=table.dtype)
        for table in (scale, shift, offset)
    ]
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias), *tables


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, scale, shift, offset, ctx.num_groups, ctx.eps, ctx.silu = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)  # nobody wants zeros for those
    ctx.save_for_backward(x, mean, rstd, weight, bias, scale, shift, offset)


def _backward(ctx, saved: tuple[Tensor, ...], grad_y: Tensor | None, *_):
    if grad_y is None:
        return (None,) * 9
    x, mean, rstd, *parameters = saved
    grad_y = laid_out(grad_y, memory_format(x))
    compute = _group_norm_silu_backward
    # PyTorch's own operations can be differentiated, backward or forward, and the moments depend on x.
    if torch.is_grad_enabled() or has_tangent(grad_y):
        compute = reference_backward
        mean, rstd = _moments(x, parameters[-1], ctx.num_groups, ctx.eps)
    grad_x, *grads = compute(grad_y, x, mean, rstd, *parameters, ctx.num_groups, ctx.silu)
    of_given = (None if given is None else grad for given, grad in zip(parameters, grads, strict=True))
    return grad_x, *of_given, None, None, None


_group_norm_silu = define(
    "group_norm_silu(Tensor x, Tensor weight, Tensor bias, Tensor? scale, Tensor? shift, Tensor? offset,"
    " int num_groups, float eps, bool silu) -> (Tensor, Tensor, Tensor)",
    module="group_norm_silu",
    reference=reference,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
_group_norm_silu_backward = define(
    "group_norm_silu_backward(Tensor grad_y, Tensor x, Tensor mean, Tensor rstd, Tensor weight, Tensor bias,"
    " Tensor? scale, Tensor? shift, Tensor? offset, int num_groups, bool silu)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    module="group_norm_silu",
    reference=reference_backward,
    fake=_fake_backward,
)
