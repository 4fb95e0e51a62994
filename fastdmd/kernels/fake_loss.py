"""The weighted denoising loss with its gradient, in one launch; and the scaling that is a loss's backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdmd.kernels._common import (
    arrive,
    c_skip,
    gradient_dtype,
    loss_weight,
    narrow,
    of_samples,
    sample_size,
    ticket,
    total,
    wide,
    wide_dtype,
)

BLOCK = 4096
NUM_WARPS = 8


@triton.jit
def fake_loss_kernel(
    output_ptr,  # [B * sample_size]: D_x, or F_x if x_t is given
    images_ptr,  # [B * sample_size]
    x_t_ptr,  # [B * sample_size], or None
    level_ptr,  # [B]: the weights, or sigma if there is SIGMA_DATA
    grad_ptr,  # [B * sample_size], the derivative of the loss in output
    partial_ptr,  # [num_programs]
    loss_ptr,  # [1]
    ticket_ptr,  # [1]
    numel,
    sample_size,
    level_stride,
    num_programs,
    SIGMA_DATA: tl.constexpr,
    LARGE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program owns BLOCK elements: their gradient, and a part of the sum that the last one to arrive completes."""
    pid = tl.program_id(0).to(tl.int64)
    start = pid * BLOCK
    offsets = start + tl.arange(0, BLOCK)
    mask = offsets < numel
    level, other, first = of_samples(level_ptr, level_stride, start, numel, sample_size, LARGE, WIDE, BLOCK)
    output = tl.load(output_ptr + offsets, mask, 0.0).to(WIDE)
    target = tl.load(images_ptr + offsets, mask, 0.0).to(WIDE)
    if SIGMA_DATA is not None:
        sigma_data = tl.full([], SIGMA_DATA, WIDE)
    if x_t_ptr is not None:
        x_t = tl.load(x_t_ptr + offsets, mask, 0.0).to(WIDE)
        skip = tl.where(first, c_skip(level, sigma_data), c_skip(other, sigma_data))
        inverse = tl.sqrt(tl.where(first, loss_weight(level, sigma_data), loss_weight(other, sigma_data)))
        error = tl.where(mask, output - (target - skip * x_t) * inverse, 0.0)
        weighted = error
    else:
        if SIGMA_DATA is not None:
            level = loss_weight(level, sigma_data)
            other = loss_weight(other, sigma_data)
        weight = tl.where(first, level, other)
        error = output - target
        weighted = weight * error
    grad = weighted * (2.0 / tl.cast(numel, WIDE))
    tl.store(grad_ptr + offsets, narrow(grad, grad_ptr), mask)
    tl.store(partial_ptr + pid, tl.sum(weighted * error))
    if arrive(ticket_ptr, num_programs):
        mean = total(partial_ptr, num_programs) * (1.0 / tl.cast(numel, WIDE)).to(tl.float64)
        tl.store(loss_ptr, mean.to(WIDE))


@triton.jit
def scale_gradient_kernel(
    grad_ptr,  # [numel]
    grad_loss_ptr,  # [1]
    out_ptr,  # [numel]
    numel,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program owns BLOCK elements."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < numel
    grad = tl.load(grad_ptr + offsets, mask, 0.0).to(WIDE) * tl.load(grad_loss_ptr).to(WIDE)
    tl.store(out_ptr + offsets, narrow(grad, out_ptr), mask)


def denoising_loss(
    D_x: Tensor,  # [B, ...]
    images: Tensor,  # [B, ...]
    weight: Tensor,  # [B]
) -> tuple[Tensor, Tensor]:
    return _launch(D_x, images, None, weight, None)


def fake_loss(
    D_fake: Tensor,  # [B, ...]
    x_gen: Tensor,  # [B, ...]
    sigma: Tensor,  # [B]
    sigma_data: float,
) -> tuple[Tensor, Tensor]:
    return _launch(D_fake, x_gen, None, sigma, sigma_data)


def fake_loss_raw(
    F_fake: Tensor,  # [B, ...]
    x_gen: Tensor,  # [B, ...]
    x_t: Tensor,  # [B, ...]
    sigma: Tensor,  # [B]
    sigma_data: float,
) -> tuple[Tensor, Tensor]:
    return _launch(F_fake, x_gen, x_t, sigma, sigma_data)


def _launch(
    output: Tensor,  # [B, ...]
    images: Tensor,  # [B, ...]
    x_t: Tensor | None,  # [B, ...]
    levels: Tensor,  # [B]: the weights, or sigma if there is sigma_data
    sigma_data: float | None,
) -> tuple[Tensor, Tensor]:
    grad = torch.empty_like(output, dtype=gradient_dtype(output))
    if output.numel() == 0:
        return output.new_full((), float("nan"), dtype=wide_dtype(output)), grad
    loss = output.new_empty((), dtype=wide_dtype(output))
    size = sample_size(output)
    block = BLOCK if size >= BLOCK else BLOCK // 2  # a sigma for every element takes registers
    num_programs = triton.cdiv(output.numel(), block)
    partials = output.new_empty(num_programs, dtype=loss.dtype)
    fake_loss_kernel[(num_programs,)](
        output,
        images,
        x_t,
        levels,
        grad,
        partials,
        loss,
        ticket(output.device),
        output.numel(),
        size,
        levels.stride(0),
        num_programs,
        SIGMA_DATA=sigma_data,
        LARGE=size >= block,
        WIDE=wide(output),
        BLOCK=block,
        num_warps=NUM_WARPS,
    )
    return loss, grad


def scale_gradient(grad: Tensor, grad_loss: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty_like(grad, dtype=dtype)
    if grad.numel():
        scale_gradient_kernel[(triton.cdiv(grad.numel(), BLOCK),)](
            grad, grad_loss, out, grad.numel(), WIDE=wide(grad), BLOCK=BLOCK, num_warps=NUM_WARPS
        )
    return out
