"""GroupNorm, scale and shift, SiLU or not, and its backward: a program per sample and tile of groups, any group size.

Where those are too few to fill a GPU the pixels are split into chunks too, and there are two launches: one stores the
sums of each chunk, one adds them up and writes the result.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

from fastdmd.kernels._common import narrow, quotient, square_root, wide, wide_dtype
from fastdmd.kernels._group_norm_backward import backward_kernel, parameters_kernel
from fastdmd.kernels._group_norm_tiles import (
    add_chunks,
    group_sums,
    load_offset,
    modulation,
    places,
    spread,
    store_row,
)

TILE_CHANNELS = 64  # of a program, at least a group: 128 bytes of bfloat16 in channels_last
NUM_PROGRAMS = 512  # wanted: four for each multiprocessor of an H100, so that enough loads are under way
SUMMED_SAMPLES, SUMMED_CHANNELS = 64, 16  # that a program loads at once: few channels, so that there are more programs


@triton.jit
def forward_kernel(
    x_ptr,  # [B, C, H, W]
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    scale_ptr,  # [B, C], or None
    shift_ptr,  # [B, C], or None
    x_offset_ptr,  # [B, C] or [1, C], or None
    y_ptr,  # [B, C, H, W]
    mean_ptr,  # [B, num_groups]
    rstd_ptr,  # [B, num_groups]
    sums_ptr,  # [B, CHUNKS, SUMMED, C], or None if a chunk is a sample
    num_channels,
    num_groups,
    group_size,
    groups_per_tile,
    tile_channels,
    num_pixels,
    chunk_pixels,
    scale_stride,
    shift_stride,
    x_offset_stride,
    EPS: tl.constexpr,
    SILU: tl.constexpr,
    SUMMED: tl.constexpr,
    SUMS: tl.constexpr,
    RESULT: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """A program has a tile of groups in a chunk of a sample's pixels: it sums (SUMS), and writes y (RESULT)."""
    sample = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    chunk = tl.program_id(2)
    first_group = tile * groups_per_tile
    first_channel = tile * tile_channels
    inside = tl.arange(0, CHANNELS)
    channel = first_channel + inside
    group = inside // group_size
    channel_mask = (inside < tile_channels) & (channel < num_channels)
    pixel = chunk * chunk_pixels + tl.arange(0, PIXELS)
    last = tl.minimum(num_pixels - chunk * chunk_pixels, chunk_pixels)
    place, between = places(sample, channel, pixel, num_channels, num_pixels, CHANNELS_LAST)

    # Moments around the mean of the first pixels of each channel, so that no digits are lost to a large mean, or to a
    # value that makes up the variance and happens to be the first.
    leading = tl.arange(0, PIXELS)
    leading_place, _ = places(sample, channel, leading, num_channels, num_pixels, CHANNELS_LAST)
    leading_mask = (leading < num_pixels)[:, None] & channel_mask[None, :]
    origin = tl.sum(tl.load(x_ptr + leading_place, leading_mask, 0.0).to(WIDE), axis=0) / tl.minimum(num_pixels, PIXELS)
    if SUMS:
        first = tl.zeros([PIXELS, CHANNELS], WIDE)
        second = tl.zeros([PIXELS, CHANNELS], WIDE)
        here = place
        for start in range(0, last, PIXELS):
            mask = (start + pixel < num_pixels)[:, None] & channel_mask[None, :]
            x = tl.load(x_ptr + here, mask, 0.0).to(WIDE)
            centred = tl.where(mask, x - origin[None, :], 0.0)
            first += centred
            second += centred * centred
            here += PIXELS * between
        moment1 = tl.sum(first, axis=0)
        moment2 = tl.sum(second, axis=0)
        if not RESULT:
            row = SUMMED * (sample * CHUNKS + chunk)
            store_row(sums_ptr, row, num_channels, channel, channel_mask, moment1)
            store_row(sums_ptr, row + 1, num_channels, channel, channel_mask, moment2)
    else:
        moment1 = add_chunks(sums_ptr, sample, 0, num_channels, channel, channel_mask, CHUNKS, SUMMED)
        moment2 = add_chunks(sums_ptr, sample, 1, num_channels, channel, channel_mask, CHUNKS, SUMMED)
    if RESULT:
        channel_mean = moment1 / num_pixels  # around origin
        squares = tl.maximum(moment2 - num_pixels * channel_mean * channel_mean, 0.0, tl.PropagateNan.ALL)
        x_offset = load_offset(x_offset_ptr, sample * x_offset_stride, channel, channel_mask, WIDE)
        channel_mean = tl.where(channel_mask, channel_mean + origin + x_offset, 0.0)
        mean = quotient(group_sums(channel_mean, group, GROUPS), group_size)
        apart = tl.where(channel_mask, channel_mean - spread(mean, group, GROUPS), 0.0)
        squares = group_sums(squares + num_pixels * apart * apart, group, GROUPS)
        variance = quotient(squares, tl.full([], group_size, WIDE) * num_pixels)
        rstd = quotient(tl.full(variance.shape, 1.0, WIDE), square_root(variance + EPS))
        groups = tl.arange(0, GROUPS)
        group_mask = (groups < tl.where(chunk == 0, groups_per_tile, 0)) & (first_group + groups < num_groups)
        tl.store(mean_ptr + sample * num_groups + first_group + groups, mean, group_mask)
        tl.store(rstd_ptr + sample * num_groups + first_group + groups, rstd, group_mask)

        weight, bias, gain, shift = modulation(
            weight_ptr,
            bias_ptr,
            scale_ptr,
            shift_ptr,
            sample * scale_stride,
            sample * shift_stride,
            channel,
            channel_mask,
            WIDE,
        )
        centre = spread(mean, group, GROUPS) - x_offset
        slope = spread(rstd, group, GROUPS) * weight * gain
        offset = bias * gain + shift
        here = place
        for start in range(0, last, PIXELS):
            mask = (start + pixel < num_pixels)[:, None] & channel_mask[None, :]
            x = tl.load(x_ptr + here, mask, 0.0).to(WIDE)
            m = (x - centre[None, :]) * slope[None, :] + offset[None, :]
            if SILU:
                m = m / (1.0 + tl.exp(-m))
            tl.store(y_ptr + here, narrow(m, y_ptr), mask)
            here += PIXELS * between


def _launch(
    kernel: JITFunction,
    arguments: tuple[Tensor | None, ...],
    x: Tensor,  # [B, C, H, W]
    tables: tuple[Tensor | None, ...],  # each [B, C], the last one [1, C], too
    *,
    num_groups: int,
    num_elements: int,
    summed: int = 2,  # values of a chunk, for each of its channels
    **constants: float | bool,
) -> None:
    """Whole groups to a program: about TILE_CHANNELS channels, and a multiple of 16 where the groups allow it."""
    B, C, H, W = x.shape
    if x.numel() == 0:
        return
    group_size = C // num_groups
    aligned = 16 // math.gcd(16, group_size)  # groups that make a multiple of 16 channels
    groups = min(num_groups, max(1, TILE_CHANNELS // (group_size * aligned)) * aligned)
    tiles = triton.cdiv(num_groups, groups)
    channels = triton.next_power_of_2(groups * group_size)
    pixels = max(1, min(triton.next_power_of_2(H * W), num_elements // channels))
    chunks = 1
    while B * tiles * chunks < NUM_PROGRAMS and H * W >= 8 * chunks * pixels and chunks < 32:
        chunks *= 2
    sums = x.new_empty((B, chunks, summed, C), dtype=wide_dtype(x)) if chunks > 1 else None
    launches = ((True, False), (False, True)) if chunks > 1 else ((True, True),)
    for with_sums, with_result in launches:
        kernel[B, tiles, chunks](
            *arguments,
            sums,
            C,
            num_groups,
            group_size,
            groups,
            groups * group_size,
            H * W,
            triton.cdiv(H * W, chunks * pixels) * pixels,
            *(0 if table is None or table.shape[0] == 1 else table.stride(0) for table in tables),
            SUMMED=summed,
            SUMS=with_sums,
            RESULT=with_result,
            CHUNKS=chunks,
            CHANNELS_LAST=not x.is_contiguous(),
            WIDE=wide(x),
            PIXELS=pixels,
            CHANNELS=channels,
            GROUPS=triton.next_power_of_2(groups),
            num_warps=8 if pixels * channels >= 2048 else 4,
            **constants,
        )


def group_norm_silu(
    x: Tensor,  # [B, C, H, W]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    scale: Tensor | None,  # [B, C]
    shift: Tensor | None,  # [B, C]
    offset: Tensor | None,  # [B, C] or [1, C]
    num_groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.empty_like(x)
    mean, rstd = (x.new_empty((x.shape[0], num_groups), dtype=wide_dtype(x)) for _ in range(2))
    tables = (scale, shift, offset)
    num_elements = 8192 // x.element_size()
    _launch(
        forward_kernel,
        (x, weight, bias, *tables, y, mean, rstd),
        x,
        tables,
        num_groups=num_groups,
        num_elements=num_elements,
        EPS=eps,
        SILU=silu,
    )
    return y, mean, rstd


def group_norm_silu_backward(
    grad_y: Tensor,  # [B, C, H, W]
    x: Tensor,  # [B, C, H, W]
    mean: Tensor,  # [B, num_groups]
    rstd: Tensor,  # [B, num_groups]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    scale: Tensor | None,  # [B, C]
    shift: Tensor | None,  # [B, C]
    offset: Tensor | None,  # [B, C] or [1, C]
    num_groups: int,
    silu: bool,
) -> tuple[Tensor, ...]:
    B, C = x.shape[:2]
    tables = (scale, shift, offset)
    grads = [
        torch.empty_like(x),
        torch.empty_like(weight),
        torch.empty_like(bias),
        *(x.new_empty(0, dtype=mean.dtype) if t is None else x.new_empty(t.shape, dtype=t.dtype) for t in tables),
    ]
    if x.numel() == 0:
        return tuple(grad.zero_() for grad in grads)
    grad_x, grad_weight, grad_bias, *grad_tables = grads
    summed = 2 if offset is None else 3  # of weight, bias and offset
    by_sample = x.new_empty((B, summed, C), dtype=mean.dtype)
    arguments = (grad_y, x, mean, rstd, weight, bias, *tables, grad_x, by_sample, *grad_tables[:2])
    _launch(
        backward_kernel,
        arguments,
        x,
        tables,
        num_groups=num_groups,
        num_elements=2048 if offset is None or x.element_size() < 4 else 1024,  # more would spill
        summed=summed,
        SILU=silu,
    )
    parameters_kernel[(triton.cdiv(C, SUMMED_CHANNELS),)](
        by_sample,
        grad_weight,
        grad_bias,
        None if offset is None else grad_tables[2],
        B,
        C,
        EACH=offset is not None and offset.shape[0] > 1,
        WIDE=wide(x),
        SAMPLES=SUMMED_SAMPLES,
        CHANNELS=SUMMED_CHANNELS,
    )
    return grad_x, grad_weight, grad_bias, *grad_tables
