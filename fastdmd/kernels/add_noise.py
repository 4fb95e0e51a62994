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
    key_ptr,  # [4], if there is no noise: then samples are of whole quads, which lie in the order (C, H, W)
    sigma_ptr,  # [B]
    scale_ptr,  # [B], or None
    out_ptr,  # [numel]
    numel,
    sample_size,
    sigma_stride,
    scale_stride,
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
        inside = 4 * tl.arange(0, QUADS)
        sample = start // sample_size
        left = (sample + 1) * sample_size - start
        if LARGE:
            sample += (inside >= left).to(tl.int64)
        else:
            sample += (inside + (sample_size - left).to(tl.int32)) // sample_size
        noise = tl.reshape(normals(key_ptr, sample, (start - sample * sample_size + inside) // 4), [BLOCK]).to(WIDE)
    else:
        noise = tl.load(noise_ptr + offsets, mask, 0.0).to(WIDE)
    x_t = x + sigma * noise
    if scale_ptr is not None:
        scale, other, first = of_samples(scale_ptr, scale_stride, start, numel, sample_size, LARGE, WIDE, BLOCK)
        x_t *= tl.where(first, scale, other)
    tl.store(out_ptr + offsets, narrow(x_t, out_ptr), mask)


@triton.jit
def add_noise_quads_kernel(
    x_ptr,  # [B, sample_size]
    key_ptr,  # [4]
    sigma_ptr,  # [B]
    scale_ptr,  # [B], or None
    out_ptr,  # [B, sample_size]
    num_samples,
    sample_size,
    num_channels,
    sigma_stride,
    scale_stride,
    WIDE: tl.constexpr,
    QUADS: tl.constexpr,
):
    """A program noises the elements of QUADS quads of normals wherever they lie: num_channels alternate in memory.

    Of planes of whole quads, neighbours take those of the same four pixels, so that a warp finds its memory in a row.
    """
    num_quads = (sample_size + 3) // 4
    num_pixels = sample_size // num_channels
    t = tl.program_id(0).to(tl.int64) * QUADS + tl.arange(0, QUADS)
    sample = t // num_quads
    is_sample = sample < num_samples
    quad = t - sample * num_quads
    if num_pixels % 4 == 0:
        quad = quad % num_channels * (num_pixels // 4) + quad // num_channels
    element = 4 * quad[:, None] + tl.arange(0, 4)[None, :]  # [QUADS, 4]
    place = element % num_pixels * num_channels + element // num_pixels
    offsets = sample[:, None] * sample_size + place
    mask = is_sample[:, None] & (element < sample_size)
    sigma = tl.load(sigma_ptr + sample * sigma_stride, is_sample, 0.0).to(WIDE)
    x_t = tl.load(x_ptr + offsets, mask, 0.0).to(WIDE) + sigma[:, None] * normals(key_ptr, sample, quad).to(WIDE)
    if scale_ptr is not None:
        x_t *= tl.load(scale_ptr + sample * scale_stride, is_sample, 0.0).to(WIDE)[:, None]
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
    rng_key: Tensor,  # [4]
    scale: Tensor | None,  # [B]
    dtype: torch.dtype,
) -> Tensor:
    size = sample_size(x)
    if x.is_contiguous() and size % 4 == 0:
        return _launch(x, sigma, None, rng_key, scale, dtype)
    out = torch.empty_like(x, dtype=dtype)
    if x.numel():
        add_noise_quads_kernel[(triton.cdiv(x.shape[0] * triton.cdiv(size, 4), QUADS),)](
            x,
            rng_key,
            sigma,
            scale,
            out,
            x.shape[0],
            size,
            1 if x.is_contiguous() else x.shape[1],
            sigma.stride(0),
            0 if scale is None else scale.stride(0),
            WIDE=wide(x),
            QUADS=QUADS,
        )
    return out


def _launch(
    x: Tensor,  # [B, ...]
    sigma: Tensor,  # [B]
    noise: Tensor | None,  # [B, ...]
    rng_key: Tensor | None,  # [4]
    scale: Tensor | None,  # [B]
    dtype: torch.dtype,
) -> Tensor:
    out = torch.empty_like(x, dtype=dtype)
    if x.numel():
        add_noise_kernel[(triton.cdiv(x.numel(), 4 * QUADS),)](
            x,
            noise,
            rng_key,
            sigma,
            scale,
            out,
            x.numel(),
            sample_size(x),
            sigma.stride(0),
            0 if scale is None else scale.stride(0),
            LARGE=sample_size(x) >= 4 * QUADS,
            WIDE=wide(x),
            QUADS=QUADS,
        )
    return out
