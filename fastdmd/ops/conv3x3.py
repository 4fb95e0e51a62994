"""The 3x3 convolution of a UNet, on a CPU by Winograd's minimal filtering."""

from __future__ import annotations

import sys

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from fastdmd.ops._registry import define
from fastdmd.ops._validate import check_images, check_tensor, check_vector, has_tangent, laid_out

MIN_TILES = 8  # of 2x2 outputs
WEIGHTS_PER_TILE = 2**14  # at most, of 3x3
MAX_WEIGHTS = {torch.float32: sys.maxsize, torch.bfloat16: 2**17}  # of 3x3, by how torch's were timed with AVX512-BF16
CHANNELS = 16  # both numbers of channels must be multiples of it
AUTOCAST = ("cpu", "cuda", "mps", "xpu")  # torch 2.11 cannot trace the question whether a device has it


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
    check_images("conv3x3", x=x)
    check_tensor("conv3x3", "weight", weight)
    if weight.dim() != 4 or weight.shape[1:] != (x.shape[1], 3, 3):
        raise ValueError(
            f"fastdmd.conv3x3: expected weight of shape [C_out, {x.shape[1]}, 3, 3], got {tuple(weight.shape)}"
        )
    if bias is not None:
        check_vector("conv3x3", "bias", bias, x, weight.shape[:1])
    casts = x.device.type in AUTOCAST and torch.is_autocast_enabled(x.device.type)
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is None:
            continue
        if parameter.dtype != x.dtype and not casts:
            raise TypeError(f"fastdmd.conv3x3: expected {name} of dtype {x.dtype}, got {parameter.dtype}")
        if parameter.device != x.device:
            raise ValueError(f"fastdmd.conv3x3: expected {name} on {x.device}, got {parameter.device}")
    if not _suits(x, weight, bias):
        return F.conv2d(x, weight, bias, padding=1)
    return _conv3x3(laid_out(x, torch.channels_last), weight, None if bias is None else bias.contiguous())


def _suits(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Few tiles of 2x2 outputs do not make up for the transformation of the weight.

    An exported program holds for any batch, so it may not depend on the number of tiles: it takes torch's convolution.
    So do forward mode and torch's counter of FLOPs, which know that one; a formula for the counter would import Triton.
    """
    if torch.compiler.is_exporting() or has_tangent(x, weight, bias) or _counts_flops():
        return False
    B, C, H, W = x.shape
    C_out, tiles = weight.shape[0], B * ((H + 1) // 2) * ((W + 1) // 2)
    tensors = [x, weight] if bias is None else [x, weight, bias]
    return (
        all(t.is_cpu and t.dtype == x.dtype for t in tensors)
        and x.dtype in MAX_WEIGHTS
        and not torch.is_autocast_enabled("cpu")
        and C % CHANNELS == C_out % CHANNELS == 0 < min(C, C_out)
        and tiles >= max(MIN_TILES, C * C_out / WEIGHTS_PER_TILE)
        and C * C_out <= MAX_WEIGHTS[x.dtype]
        and (x.is_contiguous(memory_format=torch.channels_last) or _decides(weight))
    )


def _decides(weight: Tensor) -> bool:
    """Whether torch's output would be channels_last for the weight's sake; transforms of torch.func want torch's."""
    is_last = weight.is_contiguous(memory_format=torch.channels_last)
    return is_last and not torch._C._are_functorch_transforms_active()


def _counts_flops() -> bool:
    counter = sys.modules.get("torch.utils.flop_counter")
    if counter is None or torch.compiler.is_compiling():
        return False
    return any(isinstance(mode, counter._FlopCounterMode) for mode in _get_current_dispatch_mode_stack())


def reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(x, weight, bias, padding=1)


def reference_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, of_input: bool, of_parameters: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grads = torch.ops.aten.convolution_backward(
        grad_y,
        x,
        weight,
        [weight.shape[0]],
        [1, 1],
        [1, 1],
        [1, 1],
        False,
        [0, 0],
        1,
        [of_input, of_parameters, of_parameters],
    )
    grad_x, grad_weight, grad_bias = (x.new_empty(0) if grad is None else grad for grad in grads)
    return grad_x, grad_weight, grad_bias


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    shape = x.shape[0], weight.shape[0], *x.shape[2:]
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _fake_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, of_input: bool, of_parameters: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grad_weight = torch.empty_like(weight) if of_parameters else weight.new_empty(0)
    grad_x = torch.empty_like(x) if of_input else x.new_empty(0)
    return grad_x, grad_weight, weight.new_empty(weight.shape[0] if of_parameters else 0)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, saved: tuple[Tensor, ...], grad_y: Tensor):
    x, weight = saved
    of_input, *of_parameters = ctx.needs_input_grad
    grad_y = laid_out(grad_y, torch.channels_last)
    # torch's own can be differentiated, backward or forward
    differentiated = torch.is_grad_enabled() or has_tangent(grad_y)
    compute = reference_backward if differentiated else _conv3x3_backward
    grad_x, grad_weight, grad_bias = compute(grad_y, x, weight, of_input, any(of_parameters))
    wanted = zip(ctx.needs_input_grad, (grad_x, grad_weight, grad_bias), strict=True)
    return tuple(grad if needed else None for needed, grad in wanted)


_conv3x3 = define(
    "conv3x3(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    module="conv3x3",
    reference=reference,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    cpu_only=True,
)
_conv3x3_backward = define(
    "conv3x3_backward(Tensor grad_y, Tensor x, Tensor weight, bool of_input, bool of_parameters)"
    " -> (Tensor, Tensor, Tensor)",
    module="conv3x3",
    reference=reference_backward,
    fake=_fake_backward,
    cpu_only=True,
)
