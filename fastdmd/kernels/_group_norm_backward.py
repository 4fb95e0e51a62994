"""The kernels of group_norm_silu's backward."""

from __future__ import annotations

import triton
import triton.language as tl

from fastdmd.kernels._common import narrow, quotient
from fastdmd.kernels._group_norm_tiles import (
    add_chunks,
    group_sums,
    load_offset,
    modulation,
    places,
    spread,
    store_row,
)


@triton.jit
def activation_backward(grad_y, m, SILU: tl.constexpr):
    """grad_m = grad_y * y'(m)."""
    if SILU:
        s = 1.0 / (1.0 + tl.exp(-m))
        grad_y = grad_y * (s + m * s * (1.0 - s))
    return grad_y


@triton.jit
def backward_kernel(
    grad_y_ptr,  # [B, C, H, W]
    x_ptr,  # [B, C, H, W]
    mean_ptr,  # [B, num_groups]
    rstd_ptr,  # [B, num_groups]
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    scale_ptr,  # [B, C], or None
    shift_ptr,  # [B, C], or None
    x_offset_ptr,  # [B, C] or [1, C], or None
    grad_x_ptr,  # [B, C, H, W]
    by_sample_ptr,  # [B, SUMMED, C], gradients of weight, bias and, if there is one, x_offset
    grad_scale_ptr,  # [B, C], if there is scale
    grad_shift_ptr,  # [B, C], if there is shift
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
    """A program has a tile of groups in a chunk of a sample's pixels: it sums (SUMS), and writes grad_x (RESULT)."""
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
    of_group = sample * num_groups + first_group + group
    x_offset = load_offset(x_offset_ptr, sample * x_offset_stride, channel, channel_mask, WIDE)
    centre = tl.load(mean_ptr + of_group, channel_mask, 0.0) - x_offset
    rstd = tl.load(rstd_ptr + of_group, channel_mask, 0.0)
    slope = rstd * weight * gain
    offset = bias * gain + shift

    if SUMS:
        sums = tl.zeros([PIXELS, CHANNELS], WIDE)
        sums_h = tl.zeros([PIXELS, CHANNELS], WIDE)
        sums_x = tl.zeros([PIXELS, CHANNELS], WIDE)
        here = place
        for start in range(0, last, PIXELS):
            mask = (start + pixel < num_pixels)[:, None] & channel_mask[None, :]
            centred = tl.load(x_ptr + here, mask, 0.0).to(WIDE) - centre[None, :]
            if x_offset_ptr is not None:
                sums_x += tl.where(mask, centred, 0.0)
            grad_y = tl.load(grad_y_ptr + here, mask, 0.0).to(WIDE)
            grad_m = tl.where(mask, activation_backward(grad_y, centred * slope[None, :] + offset[None, :], SILU), 0.0)
            sums += grad_m
            sums_h += grad_m * centred
            here += PIXELS * between
        A = tl.sum(sums, axis=0)
        Q = tl.sum(sums_h, axis=0) * rstd
        X = tl.sum(sums_x, axis=0)
        if not RESULT:
            row = SUMMED * (sample * CHUNKS + chunk)
            store_row(sums_ptr, row, num_channels, channel, channel_mask, A)
            store_row(sums_ptr, row + 1, num_channels, channel, channel_mask, Q)
            if x_offset_ptr is not None:
                store_row(sums_ptr, row + 2, num_channels, channel, channel_mask, X)
    else:
        A = add_chunks(sums_ptr, sample, 0, num_channels, channel, channel_mask, CHUNKS, SUMMED)
        Q = add_chunks(sums_ptr, sample, 1, num_channels, channel, channel_mask, CHUNKS, SUMMED)
        X = tl.zeros(channel.shape, WIDE)
        if x_offset_ptr is not None:
            X = add_chunks(sums_ptr, sample, 2, num_channels, channel, channel_mask, CHUNKS, SUMMED)
    if RESULT:
        once = channel_mask & (inside < tl.where(chunk == 0, CHANNELS, 0))
        store_row(by_sample_ptr, SUMMED * sample, num_channels, channel, once, gain * Q)
        store_row(by_sample_ptr, SUMMED * sample + 1, num_channels, channel, once, gain * A)
        if scale_ptr is not None:
            of_channel = sample * num_channels + channel
            tl.store(grad_scale_ptr + of_channel, narrow(weight * Q + bias * A, grad_scale_ptr), once)
            tl.store(grad_shift_ptr + of_channel, narrow(A, grad_shift_ptr), once)

        k = weight * gain
        size = tl.full([], group_size, WIDE) * num_pixels
        S1 = spread(quotient(group_sums(k * A, group, GROUPS), size), group, GROUPS)
        S2 = spread(quotient(group_sums(k * Q, group, GROUPS), size), group, GROUPS)
        if x_offset_ptr is not None:  # its gradient is the sum of grad_x, below
            of_x_offset = rstd * (k * A - num_pixels * S1 - X * (rstd * S2))
            store_row(by_sample_ptr, SUMMED * sample + 2, num_channels, channel, once, of_x_offset)
        here = place
        for start in range(0, last, PIXELS):
            mask = (start + pixel < num_pixels)[:, None] & channel_mask[None, :]
            centred = tl.load(x_ptr + here, mask, 0.0).to(WIDE) - centre[None, :]
            grad_y = tl.load(grad_y_ptr + here, mask, 0.0).to(WIDE)
            grad_m = activation_backward(grad_y, centred * slope[None, :] + offset[None, :], SILU)
            grad_x = rstd[None, :] * (k[None, :] * grad_m - S1[None, :] - centred * (rstd * S2)[None, :])
            tl.store(grad_x_ptr + here, narrow(grad_x, grad_x_ptr), mask)
            here += PIXELS * between


@triton.jit
def parameters_kernel(
    by_sample_ptr,  # [B, 2, C], gradients of weight and bias; or [B, 3, C], of x_offset too
    grad_weight_ptr,  # [C]
    grad_bias_ptr,  # [C]
    grad_x_offset_ptr,  # [1, C], or [B, C] if it is EACH sample's, or None
    num_samples,
    num_channels,
    EACH: tl.constexpr,
    WIDE: tl.constexpr,
    SAMPLES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """A program adds up the samples of CHANNELS channels, SAMPLES at a time."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    channel_mask = channel < num_channels
    of_weight = tl.zeros([SAMPLES, CHANNELS], WIDE)
    of_bias = tl.zeros([SAMPLES, CHANNELS], WIDE)
    of_x_offset = tl.zeros([SAMPLES, CHANNELS], WIDE)
    summed = 2 if grad_x_offset_ptr is None else 3
    for start in range(0, num_samples, SAMPLES):
        sample = start + tl.arange(0, SAMPLES)
        mask = (sample < num_samples)[:, None] & channel_mask[None, :]
        place = summed * sample[:, None].to(tl.int64) * num_channels + channel[None, :]
        of_weight += tl.load(by_sample_ptr + place, mask, 0.0)
        of_bias += tl.load(by_sample_ptr + place + num_channels, mask, 0.0)
        if grad_x_offset_ptr is not None:
            here = tl.load(by_sample_ptr + place + 2 * num_channels, mask, 0.0)
            of_x_offset += here
            if EACH:
                own = grad_x_offset_ptr + sample[:, None].to(tl.int64) * num_channels + channel[None, :]
                tl.store(own, narrow(here, grad_x_offset_ptr), mask)
    tl.store(grad_weight_ptr + channel, narrow(tl.sum(of_weight, axis=0), grad_weight_ptr), channel_mask)
    tl.store(grad_bias_ptr + channel, narrow(tl.sum(of_bias, axis=0), grad_bias_ptr), channel_mask)
    if grad_x_offset_ptr is not None and not EACH:
        tl.store(grad_x_offset_ptr + channel, narrow(tl.sum(of_x_offset, axis=0), grad_x_offset_ptr), channel_mask)
