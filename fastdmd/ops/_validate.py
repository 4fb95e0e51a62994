"""Checks and layouts that every op shares. They never look at values, so they never wait for a GPU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

BATCHED = torch._C._parse_dispatch_key("Batched")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_images(op: str, **tensors: Tensor) -> list[Tensor]:
    """All `[B, C, H, W]`, floating point, and alike in shape, dtype and device: the first one sets the standard.

    Returns them dense and in one memory order, that of the first (channels_last or contiguous): only what
    differs is copied.
    """
    (first_name, first), *others = tensors.items()
    check_tensor(op, first_name, first)
    if first.dim() != 4:
        raise ValueError(f"fastdmd.{op}: expected {first_name} of shape [B, C, H, W], got {tuple(first.shape)}")
    if first.dtype not in DTYPES:
        raise TypeError(f"fastdmd.{op}: expected {first_name} to be floating point, got {first.dtype}")
    for name, tensor in others:
        check_tensor(op, name, tensor)
        if tensor.shape != first.shape:
            raise ValueError(f"fastdmd.{op}: expected {name} of shape {tuple(first.shape)}, got {tuple(tensor.shape)}")
        if tensor.dtype != first.dtype:
            raise TypeError(f"fastdmd.{op}: expected {name} of dtype {first.dtype}, got {tensor.dtype}")
        if tensor.device != first.device:
            raise ValueError(f"fastdmd.{op}: expected {name} on {first.device}, got {tensor.device}")
    layout = memory_format(first)
    return [tensor.contiguous(memory_format=layout) for tensor in tensors.values()]


def check_tensor(op: str, name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"fastdmd.{op}: expected {name} to be a tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided or tensor.is_nested:
        got = "nested" if tensor.is_nested else tensor.layout
        raise TypeError(f"fastdmd.{op}: expected {name} to be a dense tensor, got a {got} one")


def has_tangent(*tensors: Tensor | None) -> bool:
    """Whether one is differentiated in forward mode: torch.library would drop its tangent in silence."""
    return forward_ad._current_level >= 0 and any(
        tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors
    )


def check_no_tangent(op: str, *tensors: Tensor | None) -> None:
    if has_tangent(*tensors):
        raise NotImplementedError(f"fastdmd.{op}: expected derivatives by backward, got forward mode, which it lacks")


def memory_format(x: Tensor) -> torch.memory_format:
    """channels_last where `x` is that and nothing else, or contiguous."""
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


def laid_out(grad: Tensor, layout: torch.memory_format) -> Tensor:
    """Dense in this order; also under `is_grads_batched=True`, whose vmap does not know channels_last."""
    # torch's stubs let a key that is parsed be None.
    if layout == torch.channels_last and torch._C._dispatch_keys(grad).has(BATCHED):  # type: ignore[arg-type]
        return grad.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    return grad.contiguous(memory_format=layout)


def check_vector(op: str, name: str, vector: Tensor, x: Tensor, shape: tuple[int, ...]) -> None:
    """`vector` is floating point, of `shape`, on the device of `x`."""
    if not isinstance(vector, Tensor) or vector.dtype not in DTYPES:
        got = vector.dtype if isinstance(vector, Tensor) else type(vector).__name__
        raise TypeError(f"fastdmd.{op}: expected {name} to be a floating point tensor, got {got}")
    check_tensor(op, name, vector)
    if vector.shape != shape:
        raise ValueError(f"fastdmd.{op}: expected {name} of shape {tuple(shape)}, got {tuple(vector.shape)}")
    if vector.device != x.device:
        raise ValueError(f"fastdmd.{op}: expected {name} on {x.device}, got {vector.device}")


def check_constant(op: str, name: str, vector: Tensor, x: Tensor) -> None:
    """`vector` is floating point `[B]` on the device of `x` `[B, C, H, W]`, and nobody waits for its gradient."""
    check_vector(op, name, vector, x, x.shape[:1])
    if vector.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"fastdmd.{op}: expected {name} to be a constant, got one that requires a gradient: detach it")


def check_positive(op: str, **values: float) -> None:
    for name, value in values.items():
        if not isinstance(value, (float, int, torch.SymFloat, torch.SymInt)):
            raise TypeError(f"fastdmd.{op}: expected {name} to be a number, got {type(value).__name__}")
        if not value > 0:
            raise ValueError(f"fastdmd.{op}: expected {name} > 0, got {value}")
