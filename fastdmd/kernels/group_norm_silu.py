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

from fastdmd.kernels._common import narrow, wide, wide_dtype

TILE_CHANNELS = 64  # of a program, at least a group: 128 bytes of bfloat16 in channels_last
NUM_PROGRAMS = 512  # wanted: four for each multiprocessor of an H100, so that enough loads are under way


@triton.jit
def group_sums(values, group, GROUPS: tl.constexpr):
    """Per-channel values [C] -> per-group sums [GROUPS], for groups of any size."""
    return tl.sum(tl.where(group[:, None] == tl.arange(0, GROUPS)[None, :], values[:, None], 0.0), axis=0)


@triton.jit
def spread(values, group, GROUPS: tl.constexpr):
    """Per-group values [GROUPS] -> per channel [C]."""
    return tl.sum(tl.where(group[:, None] == tl.arange(0, GROUPS)[None, :], values[None, :], 0.0), axis=1)


@triton.jit
def modulation(weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_row, shift_row, channel, mask, WIDE: tl.constexpr):
    """Weight, bias, 1 + scale and shift of the channels."""
    weight = tl.load(weight_ptr + channel, mask, 0.0).to(WIDE)
    bias = tl.load(bias_ptr + channel, mask, 0.0).to(WIDE)
    gain, shift = tl.full(channel.shape, 1.0, WIDE), tl.zeros(channel.shape, WIDE)
    if scale_ptr is not None:
        gain += tl.load(scale_ptr + scale_row + channel, mask, 0.0).to(WIDE)
        shift += tl.load(shift_ptr + shift_row + channel, mask, 0.0).to(WIDE)
    return weight, bias, gain, shift


@triton.jit
def places(sample, channel, pixel, num_channels, num_pixels, CHANNELS_LAST: tl.constexpr):
    """Offsets of these pixels and channels in memory, [PIXELS, CHANNELS], and between neighbouring pixels."""
    base = sample * num_channels * num_pixels
    if CHANNELS_LAST:
        return base + pixel[:, None].to(tl.int64) * num_channels + channel[None, :], num_channels
    else:
        return base + channel[None, :].to(tl.int64) * num_pixels + pixel[:, None], 1


@triton.jit
def store_sums(sums_ptr, row, num_channels, channel, mask, first, second):
    """Two sums per channel of a chunk; sums_ptr is [B, CHUNKS, 2, C]."""
    tl.store(sums_ptr + 2 * row * num_channels + channel, first, mask)
    tl.store(sums_ptr + (2 * row + 1) * num_channels + channel, second, mask)


@triton.jit
def add_chunks(sums_ptr, sample, num_channels, channel, mask, CHUNKS: tl.constexpr):
    """The two sums per channel of a sample, always added in the same order."""
    row = 2 * (sample * CHUNKS + tl.arange(0, CHUNKS))[:, None]
    first = tl.load(sums_ptr + row * num_channels + channel[None, :], mask[None, :], 0.0)
    second = tl.load(sums_ptr + (row + 1) * num_channels + channel[None, :], mask[None, :], 0.0)
    return tl.sum(first, axis=0), tl.sum(second, axis=0)


@triton.jit
def forward_kernel(x_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, y_ptr, mean_ptr, rstd_ptr, sums_ptr,
                   num_channels, num_groups, group_size, groups_per_tile, tile_channels, num_pixels, chunk_pixels,
                   scale_stride, shift_stride, EPS: tl.constexpr, SILU: tl.constexpr, SUMS: tl.constexpr,
                   RESULT: tl.constexpr, CHUNKS: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr,
                   PIXELS: tl.constexpr, CHANNELS: tl.constexpr, GROUPS: tl.constexpr):  # fmt: skip
    sample, tile, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    first_group, first_channel = tile * groups_per_tile, tile * tile_channels
    inside = tl.arange(0, CHANNELS)
    channel, group = first_channel + inside, inside // group_size
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
        first, second = tl.zeros([PIXELS, CHANNELS], WIDE), tl.zeros([PIXELS, CHANNELS], WIDE)
        here = place
        for start in range(0, last, PIXELS):
            mask = (start + pixel < num_pixels)[:, None] & channel_mask[None, :]
            x = tl.load(x_ptr + here, mask, 0.0).to(WIDE)
            centred = tl.where(mask, x - origin[None, :], 0.0)
            first += centred
            second += centred * centred
            here += PIXELS * between
        moment1, moment2 = tl.sum(first, axis=0), tl.sum(second, axis=0)
        if not RESULT:
            store_sums(sums_ptr, sample * CHUNKS + chunk, num_channels, channel, channel_mask, moment1, moment2)
    else:
        moment1, moment2 = add_chunks(sums_ptr, sample, num_channels, channel, channel_mask, CHUNKS)
    if RESULT:
        channel_mean = moment1 / num_pixels  # around origin
        squares = tl.maximum(moment2 - num_pixels * channel_mean * channel_mean, 0.0, tl.PropagateNan.ALL)
        channel_mean = tl.where(channel_mask, channel_mean + origin, 0.0)
        mean = group_sums(channel_mean, group, GROUPS) / group_size
        apart = tl.where(channel_mask, channel_mean - spread(mean, group, GROUPS), 0.0)
        variance = group_sums(squares + num_pixels * apart * apart, group, GROUPS) / (group_size * num_pixels)
        rstd = 1.0 / tl.sqrt(variance + EPS)
        groups = tl.arange(0, GROUPS)
        group_mask = (groups < tl.where(chunk == 0, groups_per_tile, 0)) & (first_group + groups < num_groups)
        tl.store(mean_ptr + sample * num_groups + first_group + groups, mean, group_mask)
        tl.store(rstd_ptr + sample * num_groups + first_group + groups, rstd, group_mask)

        weight, bias, gain, shift = modulation(
            weight_ptr, bias_ptr, scale_ptr, shift_ptr, sample * scale_stride, sample * shift_stride, channel,
            channel_mask, WIDE,
        )  # fmt: skip
        centre, slope = spread(mean, group, GROUPS), spread(rstd, group, GROUPS) * weight * gain
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


@triton.jit
def activation_backward(grad_y, m, SILU: tl.constexpr):
    if SILU:
        s = 1.0 / (1.0 + tl.exp(-m))
        grad_y = grad_y * (s + m * s * (1.0 - s))
    return grad_y


@triton.jit
def backward_kernel(grad_y_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, grad_x_ptr,
                    grad_affine_ptr, grad_scale_ptr, grad_shift_ptr, sums_ptr, num_channels, num_groups, group_size,
                    groups_per_tile, tile_channels, num_pixels, chunk_pixels, scale_stride, shift_stride,
                    SILU: tl.constexpr, SUMS: tl.constexpr, RESULT: tl.constexpr, CHUNKS: tl.constexpr,
                    CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
                    GROUPS: tl.constexpr):  # fmt: skip
    sample, tile, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    first_group, first_channel = tile * groups_per_tile, tile * tile_channels
    inside = tl.arange(0, CHANNELS)
    channel, group = first_channel + inside, inside // group_size
    channel_mask = (inside < tile_channels) & (channel < num_channels)
    pixel = chunk * chunk_pixels + tl.arange(0, PIXELS)
    last = tl.minimum(num_pixels - chunk * chunk_pixels, chunk_pixels)
    place, between = places(sample, channel, pixel, num_channels, num_pixels, CHANNELS_LAST)
    weight, bias, gain, shift = modulation(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, sample * scale_stride, sample * shift_stride, channel,
        channel_mask, WIDE,
    )  # fmt: skip
    of_group = sample * num_groups + first_group + group
    centre = tl.load(mean_ptr + of_group, channel_mask, 0.0)
    rstd = tl.load(rstd_ptr + of_group, channel_mask, 0.0)
    slope, offset = rstd * weight * gain, bias * gain + shift

    if SUMS:
        sums, sums_h = tl.zeros([PIXELS, CHANNELS], WIDE), tl.zeros([PIXELS, CHANNELS], WIDE)
        here = place
        for start in range(0, last, PIXELS):
            mask = (start + pixel < num_pixels)[:, None] & channel_mask[None, :]
            centred = tl.load(x_ptr + here, mask, 0.0).to(WIDE) - centre[None, :]
            grad_y = tl.load(grad_y_ptr + here, mask, 0.0).to(WIDE)
            grad_m = tl.where(mask, activation_backward(grad_y, centred * slope[None, :] + offset[None, :], SILU), 0.0)
            sums += grad_m
            sums_h += grad_m * centred
            here += PIXELS * between
        A, Q = tl.sum(sums, axis=0), tl.sum(sums_h, axis=0) * rstd
        if not RESULT:
            store_sums(sums_ptr, sample * CHUNKS + chunk, num_channels, channel, channel_mask, A, Q)
    else:
        A, Q = add_chunks(sums_ptr, sample, num_channels, channel, channel_mask, CHUNKS)
    if RESULT:
        once = channel_mask & (inside < tl.where(chunk == 0, CHANNELS, 0))
        store_sums(grad_affine_ptr, sample, num_channels, channel, once, gain * Q, gain * A)
        if scale_ptr is not None:
            of_channel = sample * num_channels + channel
            tl.store(grad_scale_ptr + of_channel, narrow(weight * Q + bias * A, grad_scale_ptr), once)
            tl.store(grad_shift_ptr + of_channel, narrow(A, grad_shift_ptr), once)

        k = weight * gain
        size = group_size * num_pixels
        S1 = spread(group_sums(k * A, group, GROUPS), group, GROUPS) / size
        S2 = spread(group_sums(k * Q, group, GROUPS), group, GROUPS) / size
        here = place
        for start in range(0, last, PIXELS):
            mask = (start + pixel < num_pixels)[:, None] & channel_mask[None, :]
            centred = tl.load(x_ptr + here, mask, 0.0).to(WIDE) - centre[None, :]
            grad_y = tl.load(grad_y_ptr + here, mask, 0.0).to(WIDE)
            grad_m = activation_backward(grad_y, centred * slope[None, :] + offset[None, :], SILU)
            grad_x = rstd[None, :] * (k[None, :] * grad_m - S1[None, :] - centred * (rstd * S2)[None, :])
            tl.store(grad_x_ptr + here, narrow(grad_x, grad_x_ptr), mask)
            here += PIXELS * between


def _launch(kernel, x: Tensor, arguments: tuple, num_groups: int, scale: Tensor | None, shift: Tensor | None,
            elements: int, **constants) -> None:  # fmt: skip
    """Whole groups to a program: about TILE_CHANNELS channels, and a multiple of 16 where the groups allow it."""
    B, C, H, W = x.shape
    if x.numel() == 0:
        return
    group_size = C // num_groups
    aligned = 16 // math.gcd(16, group_size)  # groups that make a multiple of 16 channels
    groups = min(num_groups, max(1, TILE_CHANNELS // (group_size * aligned)) * aligned)
    channels, tiles = triton.next_power_of_2(groups * group_size), triton.cdiv(num_groups, groups)
    pixels = max(1, min(triton.next_power_of_2(H * W), elements // channels))
    chunks = 1
    while B * tiles * chunks < NUM_PROGRAMS and H * W >= 8 * chunks * pixels and chunks < 32:
        chunks *= 2
    chunk_pixels = triton.cdiv(H * W, chunks * pixels) * pixels
    sums = x.new_empty((B, chunks, 2, C), dtype=wide_dtype(x)) if chunks > 1 else None
    for part in ({"SUMS": True, "RESULT": False}, {"SUMS": False, "RESULT": True}) if chunks > 1 else (
        {"SUMS": True, "RESULT": True},
    ):  # fmt: skip
        kernel[B, tiles, chunks](
            *arguments, sums, C, num_groups, group_size, groups, groups * group_size, H * W, chunk_pixels,
            0 if scale is None else scale.stride(0), 0 if shift is None else shift.stride(0), **part, **constants,
            CHUNKS=chunks, CHANNELS_LAST=not x.is_contiguous(), WIDE=wide(x), PIXELS=pixels, CHANNELS=channels,
            GROUPS=triton.next_power_of_2(groups), num_warps=8 if pixels * channels >= 2048 else 4,
        )  # fmt: skip


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None,
                    num_groups: int, eps: float, silu: bool) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    y = torch.empty_like(x)
    mean, rstd = (x.new_empty((x.shape[0], num_groups), dtype=wide_dtype(x)) for _ in range(2))
    arguments = (x, weight, bias, scale, shift, y, mean, rstd)
    _launch(forward_kernel, x, arguments, num_groups, scale, shift, elements=8192 // x.element_size(), EPS=eps,
            SILU=silu)  # fmt: skip
    return y, mean, rstd


def group_norm_silu_backward(grad_y: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor,
                             scale: Tensor | None, shift: Tensor | None, num_groups: int, silu: bool
                             ) -> tuple[Tensor, ...]:  # fmt: skip
    B, C = x.shape[:2]
    grad_x = torch.empty_like(x)
    grad_affine = x.new_empty((B, 2, C), dtype=mean.dtype)  # of weight and bias, by sample
    tables = [x.new_empty((0,) if t is None else (B, C), dtype=mean.dtype if t is None else t.dtype)
              for t in (scale, shift)]  # fmt: skip
    arguments = (grad_y, x, mean, rstd, weight, bias, scale, shift, grad_x, grad_affine, *tables)
    _launch(backward_kernel, x, arguments, num_groups, scale, shift, elements=2048, SILU=silu)  # more would spill
    grad_weight, grad_bias = grad_affine[:, 0].sum(0), grad_affine[:, 1].sum(0)  # two tensors: outputs may not alias
    return grad_x, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype), *tables
