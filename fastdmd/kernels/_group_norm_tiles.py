"""What the two kernels of group_norm_silu share: where a tile of channels and pixels lies, and sums over its groups."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def group_sums(values, group, GROUPS: tl.constexpr):
    """Per-channel values [C] -> per-group sums [GROUPS], for groups of any size."""
    return tl.sum(tl.where(group[:, None] == tl.arange(0, GROUPS)[None, :], values[:, None], 0.0), axis=0)


@triton.jit
def spread(values, group, GROUPS: tl.constexpr):
    """Per-group values [GROUPS] -> per channel [C]."""
    return tl.sum(tl.where(group[:, None] == tl.arange(0, GROUPS)[None, :], values[None, :], 0.0), axis=1)


@triton.jit
def modulation(
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    scale_ptr,  # [B, C], or None
    shift_ptr,  # [B, C], or None
    scale_row,
    shift_row,
    channel,
    mask,
    WIDE: tl.constexpr,
):
    """Weight, bias, 1 + scale and shift of the channels."""
    weight = tl.load(weight_ptr + channel, mask, 0.0).to(WIDE)
    bias = tl.load(bias_ptr + channel, mask, 0.0).to(WIDE)
    gain = tl.full(channel.shape, 1.0, WIDE)
    shift = tl.zeros(channel.shape, WIDE)
    if scale_ptr is not None:
        gain += tl.load(scale_ptr + scale_row + channel, mask, 0.0).to(WIDE)
        shift += tl.load(shift_ptr + shift_row + channel, mask, 0.0).to(WIDE)
    return weight, bias, gain, shift


@triton.jit
def load_offset(x_offset_ptr, row, channel, mask, WIDE: tl.constexpr):
    """What is added to x of these channels: of `[B, C]` or `[1, C]`, or zeros for None."""
    if x_offset_ptr is not None:
        return tl.load(x_offset_ptr + row + channel, mask, 0.0).to(WIDE)
    else:
        return tl.zeros(channel.shape, WIDE)


@triton.jit
def places(sample, channel, pixel, num_channels, num_pixels, CHANNELS_LAST: tl.constexpr):
    """Offsets of these pixels and channels in memory, [PIXELS, CHANNELS], and between neighbouring pixels."""
    base = sample * num_channels * num_pixels
    if CHANNELS_LAST:
        return base + pixel[:, None].to(tl.int64) * num_channels + channel[None, :], num_channels
    else:
        return base + channel[None, :].to(tl.int64) * num_pixels + pixel[:, None], 1


@triton.jit
def store_row(ptr, row, num_channels, channel, mask, values):
    """Values per channel, in a row of `num_channels`."""
    tl.store(ptr + row * num_channels + channel, values, mask)


@triton.jit
def add_chunks(
    sums_ptr,  # [B, CHUNKS, SUMMED, C]
    sample,
    index,
    num_channels,
    channel,
    mask,
    CHUNKS: tl.constexpr,
    SUMMED: tl.constexpr,
):
    """Sum number `index` per channel of a sample, its chunks always added in the same order."""
    row = SUMMED * (sample * CHUNKS + tl.arange(0, CHUNKS))[:, None] + index
    return tl.sum(tl.load(sums_ptr + row * num_channels + channel[None, :], mask[None, :], 0.0), axis=0)
