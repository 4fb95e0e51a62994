"""Philox4x32-10, and the standard normals that add_noise makes from it in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 256  # of a program


@triton.jit
def normals(
    key_ptr,  # [4]: seed, stream, iteration and first sample
    sample,  # [N], of which
    quad,  # [N]: elements 4 * quad to 4 * quad + 3, in the order (C, H, W)
):
    """Four standard normals for each [N, 4], by Box and Muller."""
    zero = tl.zeros_like(quad)
    x0, x1, x2, x3 = tl.philox(
        tl.load(key_ptr),
        quad.to(tl.uint32),
        (sample + tl.load(key_ptr + 3)).to(tl.uint32),
        (zero + tl.load(key_ptr + 2)).to(tl.uint32),
        (zero + tl.load(key_ptr + 1)).to(tl.uint32),
    )
    n0, n1 = box_muller(x0, x1)
    n2, n3 = box_muller(x2, x3)
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), [quad.shape[0], 4])


@triton.jit
def box_muller(a, b):
    """Two standard normals from two random words: the formula of csrc/formulas.h, u in (0, 1]."""
    u = (a >> 1).to(tl.int32).to(tl.float32) * 4.656612873077393e-10 + 2.3283064365386963e-10
    radius = tl.sqrt(-2.0 * tl.log(u))
    cosine, sine = cossinpi(b.to(tl.int32, bitcast=True).to(tl.float32) * 4.656612873077393e-10)
    return radius * cosine, radius * sine


@triton.jit
def cossinpi(t):
    """cos(pi t), sin(pi t) for t in [-1, 1]: the polynomials of csrc/formulas.h; tl.cos would take a stack."""
    q = tl.floor(2.0 * t + 0.5)
    r = t - 0.5 * q
    quarter = q.to(tl.int32)
    z = r * r
    s = ((-0.5992645293 * z + 2.5501640399) * z - 5.1677127800) * z + 3.1415926536
    s *= r
    c = (((0.2353306303 * z - 1.3352627689) * z + 4.0587121264) * z - 4.9348022005) * z + 1.0
    swap = (quarter & 1) != 0
    sine = tl.where(swap, c, s)
    cosine = tl.where(swap, s, c)
    return tl.where(((quarter + 1) & 2) != 0, -cosine, cosine), tl.where((quarter & 2) != 0, -sine, sine)


@triton.jit
def philox_kernel(
    counter_ptr,  # [num_rows, 4]
    key_ptr,  # [2]
    words_ptr,  # [num_rows, 4]
    num_rows,
    BLOCK: tl.constexpr,
):
    """A program makes the words of BLOCK rows."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = row < num_rows
    seed = (tl.load(key_ptr) & 0xFFFFFFFF) | (tl.load(key_ptr + 1) << 32)
    c0 = tl.load(counter_ptr + 4 * row, mask, 0).to(tl.uint32)
    c1 = tl.load(counter_ptr + 4 * row + 1, mask, 0).to(tl.uint32)
    c2 = tl.load(counter_ptr + 4 * row + 2, mask, 0).to(tl.uint32)
    c3 = tl.load(counter_ptr + 4 * row + 3, mask, 0).to(tl.uint32)
    x0, x1, x2, x3 = tl.philox(seed, c0, c1, c2, c3)
    tl.store(words_ptr + 4 * row, x0.to(tl.int64), mask)
    tl.store(words_ptr + 4 * row + 1, x1.to(tl.int64), mask)
    tl.store(words_ptr + 4 * row + 2, x2.to(tl.int64), mask)
    tl.store(words_ptr + 4 * row + 3, x3.to(tl.int64), mask)


def philox(
    counter: Tensor,  # [N, 4]
    key: Tensor,  # [2]
) -> Tensor:
    words = torch.empty_like(counter)
    num_rows = counter.shape[0]
    if num_rows:
        philox_kernel[(triton.cdiv(num_rows, ROWS),)](counter, key, words, num_rows, BLOCK=ROWS)
    return words
