"""What the convolutions share: their checks, where they may be ours, and what torch must know of them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from fastdmd.ops._registry import define
from fastdmd.ops._validate import check_images, check_tensor, check_vector, has_tangent, laid_out

CHANNELS = 16  # both numbers of channels must be multiples of it
AUTOCAST = ("cpu", "cuda", "mps", "xpu")  # torch 2.11 cannot trace the question whether a device has it


def check(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, side: int) -> None:
    check_images(op, x=x)
    check_tensor(op, "weight", weight)
    if weight.dim() != 4 or weight.shape[1:] != (x.shape[1], side, side):
        raise ValueError(
            f"fastdmd.{op}: expected weight of shape [C_out, {x.shape[1]}, {side}, {side}], got {tuple(weight.shape)}"
        )
    if bias is not None:
        check_vector(op, "bias", bias, x, weight.shape[:1])
    casts = x.device.type in AUTOCAST and torch.is_autocast_enabled(x.device.type)
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is None:
            continue
        if parameter.dtype != x.dtype and not casts:
            raise TypeError(f"fastdmd.{op}: expected {name} of dtype {x.dtype}, got {parameter.dtype}")
        if parameter.device != x.device:
            raise ValueError(f"fastdmd.{op}: expected {name} on {x.device}, got {parameter.device}")


def can_be_ours(x: Tensor, weight: Tensor, bias: Tensor | None, dtypes: tuple[torch.dtype, ...]) -> bool:
    """Whether the native code takes these, and nobody asks for torch's own.

    An exported program holds for any batch, so it may not depend on the number of pixels: it takes torch's convolution.
    So do forward mode and torch's counter of FLOPs, which know that one; a formula for the counter would import Triton.
    """
    if torch.compiler.is_exporting() or has_tangent(x, weight, bias) or _counts_flops():
        return False
    tensors = [x, weight] if bias is None else [x, weight, bias]
    return (
        all(t.is_cpu and t.dtype == x.dtype for t in tensors)
        and x.dtype in dtypes
        and not torch.is_autocast_enabled("cpu")
        and x.shape[1] % CHANNELS == weight.shape[0] % CHANNELS == 0 < min(x.shape[1], weight.shape[0])
        and (x.is_contiguous(memory_format=torch.channels_last) or _decides(weight))
    )


def _decides(weight: Tensor) -> bool:
    """Whether torch's output would be channels_last for the weight's sake; transforms of torch.func want torch's."""
    is_last = weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    return is_last and not torch._C._are_functorch_transforms_active()


def _counts_flops() -> bool:
    counter = sys.modules.get("torch.utils.flop_counter")
    if counter is None or torch.compiler.is_compiling():
        return False
    return any(isinstance(mode, counter._FlopCounterMode) for mode in _get_current_dispatch_mode_stack())


def define_convolution(name: str, padding: int) -> tuple[Callable, Any]:
    """Registers the op of that name and its backward; its reference, and what calls it."""

    def reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, weight, bias, padding=padding)

    def reference_backward(
        grad_y: Tensor, x: Tensor, weight: Tensor, of_input: bool, of_parameters: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        grads = torch.ops.aten.convolution_backward(
            grad_y,
            x,
            weight,
            [weight.shape[0]],
            [1, 1],
            [padding, padding],
            [1, 1],
            False,
            [0, 0],
            1,
            [of_input, of_parameters, of_parameters],
        )
        grad_x, grad_weight, grad_bias = (x.new_empty(0) if grad is None else grad for grad in grads)
        return grad_x, grad_weight, grad_bias

    def fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        shape = x.shape[0], weight.shape[0], *x.shape[2:]
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)

    def fake_backward(
        grad_y: Tensor, x: Tensor, weight: Tensor, of_input: bool, of_parameters: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad_weight = torch.empty_like(weight) if of_parameters else weight.new_empty(0)
        grad_x = torch.empty_like(x) if of_input else x.new_empty(0)
        return grad_x, grad_weight, weight.new_empty(weight.shape[0] if of_parameters else 0)

    def setup_context(ctx, inputs, output) -> None:
        x, weight, bias = inputs
        ctx.save_for_backward(x, weight)

    def backward(ctx, saved: tuple[Tensor, ...], grad_y: Tensor):
        x, weight = saved
        of_input, *of_parameters = ctx.needs_input_grad
        grad_y, x = (laid_out(y, torch.channels_last) for y in (grad_y, x))  # hooks of saved tensors may lay out anew
        # torch's own can be differentiated, backward or forward
        differentiated = torch.is_grad_enabled() or has_tangent(grad_y)
        compute = reference_backward if differentiated else backward_op
        grad_x, grad_weight, grad_bias = compute(grad_y, x, weight, of_input, any(of_parameters))
        wanted = zip(ctx.needs_input_grad, (grad_x, grad_weight, grad_bias), strict=True)
        return tuple(grad if needed else None for needed, grad in wanted)

    op = define(
        f"{name}(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
        module=name,
        reference=reference,
        fake=fake,
        setup_context=setup_context,
        backward=backward,
        only="native code for CPUs",
    )
    backward_op = define(
        f"{name}_backward(Tensor grad_y, Tensor x, Tensor weight, bool of_input, bool of_parameters)"
        " -> (Tensor, Tensor, Tensor)",
        module=name,
        reference=reference_backward,
        fake=fake_backward,
        only="native code for CPUs",
    )
    return reference, op
