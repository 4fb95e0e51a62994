"""Checks that every op shares. They never look at values, so they never wait for a GPU."""

from __future__ import annotations

from torch import Tensor


def check_images(op: str, **tensors: Tensor) -> None:
    """All `[B, C, H, W]`, floating point, and alike in shape, dtype and device: the first one sets the standard."""
    (first_name, first), *others = tensors.items()
    if not isinstance(first, Tensor):
        raise TypeError(f"fastdmd.{op}: expected {first_name} to be a tensor, got {type(first).__name__}")
    if first.dim() != 4:
        raise ValueError(f"fastdmd.{op}: expected {first_name} of shape [B, C, H, W], got {tuple(first.shape)}")
    if not first.is_floating_point():
        raise TypeError(f"fastdmd.{op}: expected {first_name} to be floating point, got {first.dtype}")
    for name, tensor in others:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"fastdmd.{op}: expected {name} to be a tensor, got {type(tensor).__name__}")
        if tensor.shape != first.shape:
            raise ValueError(f"fastdmd.{op}: expected {name} of shape {tuple(first.shape)}, got {tuple(tensor.shape)}")
        if tensor.dtype != first.dtype:
            raise TypeError(f"fastdmd.{op}: expected {name} of dtype {first.dtype}, got {tensor.dtype}")
        if tensor.device != first.device:
            raise ValueError(f"fastdmd.{op}: expected {name} on {first.device}, got {tensor.device}")


def check_sigma(op: str, sigma: Tensor, x: Tensor) -> None:
    """`sigma` is floating point `[B]` on the device of `x` `[B, C, H, W]`."""
    if not isinstance(sigma, Tensor) or not sigma.is_floating_point():
        got = sigma.dtype if isinstance(sigma, Tensor) else type(sigma).__name__
        raise TypeError(f"fastdmd.{op}: expected sigma to be a floating point tensor, got {got}")
    if sigma.shape != x.shape[:1]:
        raise ValueError(f"fastdmd.{op}: expected sigma of shape {tuple(x.shape[:1])}, got {tuple(sigma.shape)}")
    if sigma.device != x.device:
        raise ValueError(f"fastdmd.{op}: expected sigma on {x.device}, got {sigma.device}")


def check_positive(op: str, **values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"fastdmd.{op}: expected {name} > 0, got {value}")
