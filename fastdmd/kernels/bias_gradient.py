"""Sums over all pixels of all samples, channel by channel: a program per tile of channels and chunk of pixels, one
launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdmd.kernels._common import TICKETS, arrive, narrow, ticket, wide, wide_dtype
from fastdmd.ops.bias_gradient import reference

TILE_CHANNELS = 64  # of a program, at least: 128 bytes of bfloat16
NUM_PROGRAMS = 256  # wanted: two for each multiprocessor of an H100; more would leave more for the last one to add up
BYTES, PARTIAL_BYTES = 32768, 65536  # of wide numbers, that a program adds up at once: enough loads are under way


@triton.jit
def rows(
    x_ptr,  # [num_rows, num_channels]
    first,
    num_rows,
    num_channels,
    channel,
    channel_mask,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The sum of `num_rows` rows from `first` on, [CHANNELS]; what other programs have stored, too."""
    sums = tl.zeros([ROWS, channel.shape[0]], WIDE)
    row = first + tl.arange(0, ROWS)
    here = x_ptr + row[:, None].to(tl.int64) * num_channels + channel[None, :]
    for start in range(0, num_rows, ROWS):
        mask = (start + tl.arange(0, ROWS) < num_rows)[:, None] & channel_mask[None, :]
        sums += tl.load(here, mask, 0.0, cache_modifier=".cg").to(WIDE)
        here += ROWS * num_channels
    return tl.sum(sums, axis=0)


@triton.jit
def bias_gradient_kernel(
    grad_y_ptr,  # [num_rows, num_channels]
    grad_bias_ptr,  # [num_channels]
    partial_ptr,  # [chunks, num_channels]
    tickets_ptr,  # [tiles]
    num_rows,
    num_channels,
    chunk_rows,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    PARTIALS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """A program sums a tile of channels in a chunk of rows; of each tile the last one adds up the chunks."""
    tile = tl.program_id(0)
    chunk = tl.program_id(1).to(tl.int64)
    channel = tile * CHANNELS + tl.arange(0, CHANNELS)
    channel_mask = channel < num_channels
    first = chunk * chunk_rows
    here = tl.minimum(num_rows - first, chunk_rows).to(tl.int32)
    sums = rows(grad_y_ptr, first, here, num_channels, channel, channel_mask, WIDE, ROWS)
    tl.store(partial_ptr + chunk * num_channels + channel, sums, channel_mask)
    if arrive(tickets_ptr + tile, tl.num_programs(1)):
        sums = rows(partial_ptr, 0, tl.num_programs(1), num_channels, channel, channel_mask, WIDE, PARTIALS)
        tl.store(grad_bias_ptr + channel, narrow(sums, grad_bias_ptr), channel_mask)


def bias_gradient(grad_y: Tensor) -> Tensor:  # [B, C, H, W] -> [C]
    if grad_y.numel() == 0:
        return grad_y.new_zeros(grad_y.shape[1])
    if not grad_y.is_contiguous(memory_format=torch.channels_last):
        return reference(grad_y)
    B, C, H, W = grad_y.shape
    num_rows = B * H * W
    channels = max(TILE_CHANNELS, triton.next_power_of_2(triton.cdiv(C, TICKETS)))
    tiles = triton.cdiv(C, channels)
    row_bytes = channels * wide_dtype(grad_y).itemsize
    at_once = max(1, BYTES // row_bytes)
    chunk_rows = triton.cdiv(triton.cdiv(num_rows, triton.cdiv(NUM_PROGRAMS, tiles)), at_once) * at_once
    chunks = triton.cdiv(num_rows, chunk_rows)
    grad_bias = grad_y.new_empty(C)
    bias_gradient_kernel[tiles, chunks](
        grad_y,
        grad_bias,
        grad_y.new_empty((chunks, C), dtype=wide_dtype(grad_y)),
        ticket(grad_y.device),
        num_rows,
        C,
        chunk_rows,
        WIDE=wide(grad_y),
        ROWS=at_once,
        PARTIALS=min(max(1, PARTIAL_BYTES // row_bytes), triton.next_power_of_2(chunks)),
        CHANNELS=channels,
        num_warps=8,
    )
    return grad_bias
