"""out = scale * (x + sigma * noise), with the noise read, or made in registers by Philox."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdmd.kernels._common import narrow, of_samples, sample_size, wide
from fastdmd.kernels.philox import normals

QUADS = 512  # of elements, a program


@triton.jit
def add_noise_kernel(
    x_ptr,  # [numel], of which a sample has sample_size
    noise_ptr,  # [numel], or None
    rng_ptr,  # [2], seed and offset, if there is no noise
    sigma_ptr,  # [B]
    scale_ptr,  # [B], or None
    out_ptr,  # [numel]
    numel,
    sample_size,
    sigma_stride,
    scale_stride,
    num_programs,
    LARGE: tl.constexpr,
    WIDE: tl.constexpr,
    QUADS: tl.constexpr,
):
    """A program noises 4 * QUADS elements, whatever samples they are of."""
    BLOCK: tl.constexpr = 4 * QUADS
    pid = tl.program_id(0).to(tl.int64)
    start = pid * BLOCK
    offsets = start + tl.arange(0, BLOCK)
    mask = offsets < numel
    sigma, other, first = of_samples(sigma_ptr, sigma_stride, start, numel, sample_size, LARGE, WIDE, BLOCK)
    x = tl.load(x_ptr + offsets, mask, 0.0).to(WIDE)
    sigma = tl.where(first, sigma, other)
    if noise_ptr is None:
        # Every program takes a ticket from the low word of the offset; the last one leaves it 0, one call further.
        # Relaxed: no program needs to see what another one wrote.
        call_size = tl.full([], 1, tl.int64) << 32
        taken = tl.atomic_add(rng_ptr + 1, 1, sem="relaxed")
        if taken % call_size == num_programs - 1:
            tl.atomic_add(rng_ptr + 1, call_size - num_programs, sem="relaxed")
        n0, n1, n2, n3 = normals(pid * QUADS + tl.arange(0, QUADS), tl.load(rng_ptr), taken >> 32)
        noise = tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), [BLOCK]).to(WIDE)
    else:
        noise = tl.load(noise_ptr + offsets, mask, 0.0).to(WIDE)
    x_t = x + sigma * noise
    if scale_ptr is not None:
        scale, other, first = of_samples(scale_ptr, scale_stride, start, numel, sample_size, LARGE, WIDE, BLOCK)
        x_t *= tl.where(first, scale, other)
    tl.store(out_ptr + offsets, narrow(x_t, out_ptr), mask)


def add_noise(
    x: Tensor,  # [B, ...]
    sigma: Tensor,  # [B]
    noise: Tensor,  # [B, ...]
    scale: Tensor | None,  # [B]
    dtype: torch.dtype,
) -> Tensor:
    return _launch(x, sigma, noise, None, scale, dtype)


def add_noise_rng(
    x: Tensor,  # [B, ...]
    sigma: Tensor,  # [B]
    rng_state: Tensor,  # [2]
    scale: Tensor | None,  # [B]
    dtype: torch.dtype,
) -> Tensor:
    if x.numel() == 0:
        rng_state[1] += 1 << 32
    return _launch(x, sigma, None, rng_state, scale, dtype)


def _launch(
    x: Tensor,  # [B, ...]
    sigma: Tensor,  # [B]
    noise: Tensor | None,  # [B, ...]
    rng_state: Tensor | None,  # [2]
    scale: Tensor | None,  # [B]
    dtype: torch.dtype,
) -> Tensor:
    out = torch.empty_like(x, dtype=dtype)
    if x.numel():
        num_programs = triton.cdiv(x.numel(), 4 * QUADS)
        add_noise_kernel[(num_programs,)](
            x,
            noise,
            rng_state,
            sigma,
            scale,
            out,
            x.numel(),
            sample_size(x),
            sigma.stride(0),
            0 if scale is None else scale.stride(0),
            num_programs,
            LARGE=sample_size(x) >= 4 * QUADS,
            WIDE=wide(x),
            QUADS=QUADS,
        )
    return out
