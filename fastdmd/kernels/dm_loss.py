"""grad = (p_real - p_fake) / mean|p_real|, non-finite entries 0, and its loss: a program per sample, one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdmd.kernels._common import (
    arrive,
    c_out,
    c_skip,
    finite_or_zero,
    gradient_dtype,
    narrow,
    sample_size,
    ticket,
    total,
    wide,
    wide_dtype,
)

# Elements of a sample that stay in registers between the two passes: with more, only one program would fit on a
# multiprocessor of an H100. Larger samples are read again, from cache.
KEPT = 8192


@triton.jit
def real_error(
    x,
    real_ptr,  # [sample_size]
    x_t_ptr,  # [sample_size], or None
    offsets,
    mask,
    skip,
    out,
    WIDE: tl.constexpr,
):
    """p_real = x_gen - D_real, and what the teacher gave."""
    real = tl.load(real_ptr + offsets, mask, 0.0).to(WIDE)
    if x_t_ptr is None:
        return x - real, real
    else:
        return x - (skip * tl.load(x_t_ptr + offsets, mask, 0.0).to(WIDE) + out * real), real


@triton.jit
def gradient(x, real, fake, out, w, mask, RAW: tl.constexpr):
    """(p_real - p_fake) / w; the skip terms of raw outputs cancel."""
    difference = out * (fake - real) if RAW else (x - real) - (x - fake)
    return tl.where(mask, finite_or_zero(difference / w), 0.0)


@triton.jit
def dm_kernel(
    x_gen_ptr,  # [num_samples, sample_size]
    real_ptr,  # [num_samples, sample_size]: D_real, or F_real if there is x_t
    fake_ptr,  # [num_samples, sample_size]: D_fake, or F_fake if there is x_t
    x_t_ptr,  # [num_samples, sample_size], or None
    sigma_ptr,  # [num_samples], if there is x_t
    grad_ptr,  # [num_samples, sample_size]
    partial_ptr,  # [num_samples], if there is loss
    loss_ptr,  # [1], or None
    ticket_ptr,  # [1], if there is loss
    sample_size,
    num_samples,
    sigma_stride,
    SIGMA_DATA: tl.constexpr,
    EPS: tl.constexpr,
    KEEP: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program has one sample: in registers if it may KEEP it, else BLOCK elements at a time, which it reads twice."""
    RAW: tl.constexpr = x_t_ptr is not None
    sample = tl.program_id(0).to(tl.int64)
    start = sample * sample_size
    x_gen_ptr += start
    real_ptr += start
    fake_ptr += start
    grad_ptr += start
    skip = 0.0
    out = 1.0
    if RAW:
        x_t_ptr += start
        sigma = tl.load(sigma_ptr + sample * sigma_stride).to(WIDE)
        sigma_data = tl.full([], SIGMA_DATA, WIDE)
        skip = c_skip(sigma, sigma_data)
        out = c_out(sigma, sigma_data)
    factor = 1.0
    if loss_ptr is not None:
        factor = 1.0 / (tl.cast(num_samples, WIDE) * sample_size)
    eps = tl.full([], EPS, WIDE)

    if KEEP:
        offsets = tl.arange(0, BLOCK)
        mask = offsets < sample_size
        x = tl.load(x_gen_ptr + offsets, mask, 0.0).to(WIDE)
        fake = tl.load(fake_ptr + offsets, mask, 0.0).to(WIDE)
        p_real, real = real_error(x, real_ptr, x_t_ptr, offsets, mask, skip, out, WIDE)
        w = tl.maximum(tl.sum(tl.abs(p_real)) / sample_size, eps, propagate_nan=tl.PropagateNan.ALL)
        grad = gradient(x, real, fake, out, w, mask, RAW)
        tl.store(grad_ptr + offsets, narrow(grad * factor, grad_ptr), mask)
        square = tl.sum(grad * grad)
    else:
        magnitudes = tl.zeros([BLOCK], WIDE)
        for first in range(0, sample_size, BLOCK):
            offsets = first + tl.arange(0, BLOCK)
            mask = offsets < sample_size
            x = tl.load(x_gen_ptr + offsets, mask, 0.0).to(WIDE)
            magnitudes += tl.abs(real_error(x, real_ptr, x_t_ptr, offsets, mask, skip, out, WIDE)[0])
        w = tl.maximum(tl.sum(magnitudes) / sample_size, eps, propagate_nan=tl.PropagateNan.ALL)
        squares = tl.zeros([BLOCK], WIDE)
        for first in range(0, sample_size, BLOCK):
            offsets = first + tl.arange(0, BLOCK)
            mask = offsets < sample_size
            x = tl.load(x_gen_ptr + offsets, mask, 0.0).to(WIDE)
            real = tl.load(real_ptr + offsets, mask, 0.0).to(WIDE)
            fake = tl.load(fake_ptr + offsets, mask, 0.0).to(WIDE)
            grad = gradient(x, real, fake, out, w, mask, RAW)
            tl.store(grad_ptr + offsets, narrow(grad * factor, grad_ptr), mask)
            squares += grad * grad
        square = tl.sum(squares)

    if loss_ptr is not None:
        tl.store(partial_ptr + sample, square)
        if arrive(ticket_ptr, num_samples):
            mean = total(partial_ptr, num_samples) * tl.cast(factor, tl.float64)
            tl.store(loss_ptr, (0.5 * mean).to(WIDE))


def dm_gradient(
    x_gen: Tensor,  # [B, ...]
    D_real: Tensor,  # [B, ...]
    D_fake: Tensor,  # [B, ...]
    eps: float,
) -> Tensor:
    grad = torch.empty_like(x_gen, dtype=gradient_dtype(x_gen))
    _launch(x_gen, D_real, D_fake, None, None, grad, None, 0.0, eps)
    return grad


def dm_loss(
    x_gen: Tensor,  # [B, ...]
    D_real: Tensor,  # [B, ...]
    D_fake: Tensor,  # [B, ...]
    eps: float,
) -> tuple[Tensor, Tensor]:
    return _with_loss(x_gen, D_real, D_fake, None, None, 0.0, eps)


def dm_loss_raw(
    x_gen: Tensor,  # [B, ...]
    x_t: Tensor,  # [B, ...]
    sigma: Tensor,  # [B]
    F_real: Tensor,  # [B, ...]
    F_fake: Tensor,  # [B, ...]
    sigma_data: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    return _with_loss(x_gen, F_real, F_fake, x_t, sigma, sigma_data, eps)


def _with_loss(
    x_gen: Tensor,  # [B, ...]
    real: Tensor,  # [B, ...]
    fake: Tensor,  # [B, ...]
    x_t: Tensor | None,  # [B, ...]
    sigma: Tensor | None,  # [B]
    sigma_data: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    grad = torch.empty_like(x_gen, dtype=gradient_dtype(x_gen))
    if x_gen.numel() == 0:
        return x_gen.new_full((), float("nan"), dtype=wide_dtype(x_gen)), grad
    loss = x_gen.new_empty((), dtype=wide_dtype(x_gen))
    _launch(x_gen, real, fake, x_t, sigma, grad, loss, sigma_data, eps)
    return loss, grad


def _launch(
    x_gen: Tensor,  # [B, ...]
    real: Tensor,  # [B, ...]
    fake: Tensor,  # [B, ...]
    x_t: Tensor | None,  # [B, ...]
    sigma: Tensor | None,  # [B]
    grad: Tensor,  # [B, ...]
    loss: Tensor | None,  # []
    sigma_data: float,
    eps: float,
) -> None:
    if x_gen.numel() == 0:
        return
    size = sample_size(x_gen)
    num_samples = x_gen.shape[0]
    keep = size <= KEPT and x_gen.dtype != torch.float64
    if keep:
        block = max(16, triton.next_power_of_2(size))
        num_warps = max(2, block // 1024)
    else:
        num_warps = 8 if size <= 1 << 16 else 16
        block = num_warps * (256 if x_gen.dtype == torch.float64 else 512)  # float64 would spill
    partials = None if loss is None else x_gen.new_empty(num_samples, dtype=loss.dtype)
    dm_kernel[(num_samples,)](
        x_gen,
        real,
        fake,
        x_t,
        sigma,
        grad,
        partials,
        loss,
        None if loss is None else ticket(x_gen.device),
        size,
        num_samples,
        0 if sigma is None else sigma.stride(0),
        SIGMA_DATA=sigma_data,
        EPS=eps,
        KEEP=keep,
        WIDE=wide(x_gen),
        BLOCK=block,
        num_warps=num_warps,
    )
