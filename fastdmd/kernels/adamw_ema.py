"""AdamW, moving average and low-precision copy on flat buffers: one launch for the norm, one for the update."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdmd.kernels._common import arrive, narrow, ticket, total, wide

NORM_BLOCK = 8192
BLOCK = 2048
NUM_SCALARS = 6  # grad factor, decay factor, step size, 1 / sqrt(bias2), ema weight, moves


@triton.jit
def norm_kernel(
    grad_ptr,  # [numel]
    partial_ptr,  # [num_programs]
    norm_ptr,  # [1]
    scalars_ptr,  # [NUM_SCALARS]
    step_ptr,  # [1]
    learning_rate_ptr,  # [1]
    ticket_ptr,  # [1]
    numel,
    num_programs,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    WEIGHT_DECAY: tl.constexpr,
    MAX_GRAD_NORM: tl.constexpr,
    EMA_DECAY: tl.constexpr,
    EMA_WARMUP: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program sums the squares of BLOCK elements; the last to arrive makes of all sums the scalars of the update."""
    pid = tl.program_id(0).to(tl.int64)
    offsets = pid * BLOCK + tl.arange(0, BLOCK)
    grad = tl.load(grad_ptr + offsets, offsets < numel, 0.0).to(WIDE)
    tl.store(partial_ptr + pid, tl.sum(grad * grad))
    if arrive(ticket_ptr, num_programs):
        norm = tl.sqrt(total(partial_ptr, num_programs))
        tl.store(norm_ptr, norm.to(WIDE))
        finite = norm.to(WIDE).to(tl.float64) < float("inf")  # false for NaN
        step = tl.load(step_ptr)
        t = (step + 1).to(tl.float64)
        learning_rate = tl.load(learning_rate_ptr).to(tl.float64)
        clip = tl.full([], MAX_GRAD_NORM, tl.float64) / (norm + 1e-6)
        decay = tl.minimum(t / (t + EMA_WARMUP), tl.full([], EMA_DECAY, tl.float64))
        bias1 = 1.0 - tl.exp2(t * tl.log2(tl.full([], BETA1, tl.float64)))
        bias2 = 1.0 - tl.exp2(t * tl.log2(tl.full([], BETA2, tl.float64)))
        tl.store(scalars_ptr, tl.minimum(clip, 1.0))
        tl.store(scalars_ptr + 1, 1.0 - learning_rate * WEIGHT_DECAY)
        tl.store(scalars_ptr + 2, learning_rate / bias1)
        tl.store(scalars_ptr + 3, 1.0 / tl.sqrt(bias2))
        tl.store(scalars_ptr + 4, 1.0 - decay)
        tl.store(scalars_ptr + 5, tl.where(finite, 1.0, 0.0))
        tl.store(step_ptr, tl.where(finite, step + 1, step))


@triton.jit
def update_kernel(
    param_ptr,  # [numel]
    grad_ptr,  # [numel]
    exp_avg_ptr,  # [numel]
    exp_avg_sq_ptr,  # [numel]
    ema_ptr,  # [numel], or None
    shadow_ptr,  # [numel], or None
    scalars_ptr,  # [NUM_SCALARS], of norm_kernel
    numel,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
    ZERO_GRAD: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program updates BLOCK elements of every buffer."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < numel
    moves = offsets < tl.where(tl.load(scalars_ptr + 5) > 0, numel, 0)
    g = tl.load(grad_ptr + offsets, mask, 0.0).to(WIDE) * tl.load(scalars_ptr).to(WIDE)
    one = tl.full([], 1.0, tl.float64)
    exp_avg = BETA1 * tl.load(exp_avg_ptr + offsets, mask, 0.0) + (one - BETA1).to(WIDE) * g
    exp_avg_sq = BETA2 * tl.load(exp_avg_sq_ptr + offsets, mask, 0.0) + (one - BETA2).to(WIDE) * g * g
    step_size = tl.load(scalars_ptr + 2).to(WIDE)
    inverse_sqrt_bias2 = tl.load(scalars_ptr + 3).to(WIDE)
    param = tl.load(param_ptr + offsets, mask, 0.0) * tl.load(scalars_ptr + 1).to(WIDE)
    param -= step_size * exp_avg / (tl.sqrt(exp_avg_sq) * inverse_sqrt_bias2 + EPS)
    tl.store(exp_avg_ptr + offsets, exp_avg, moves)
    tl.store(exp_avg_sq_ptr + offsets, exp_avg_sq, moves)
    tl.store(param_ptr + offsets, param, moves)
    if ema_ptr is not None:
        ema = tl.load(ema_ptr + offsets, mask, 0.0)
        tl.store(ema_ptr + offsets, ema + tl.load(scalars_ptr + 4).to(WIDE) * (param - ema), moves)
    if shadow_ptr is not None:
        tl.store(shadow_ptr + offsets, narrow(param, shadow_ptr), moves)
    if ZERO_GRAD:
        tl.store(grad_ptr + offsets, tl.zeros([BLOCK], grad_ptr.dtype.element_ty), mask)


def adamw_ema_(
    param: Tensor,  # [numel]
    grad: Tensor,  # [numel]
    exp_avg: Tensor,  # [numel]
    exp_avg_sq: Tensor,  # [numel]
    step: Tensor,  # [1]
    learning_rate: Tensor,  # []
    ema: Tensor | None,  # [numel]
    shadow: Tensor | None,  # [numel]
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    max_grad_norm: float,
    ema_decay: float,
    ema_warmup: float,
    zero_grad: bool,
) -> Tensor:
    numel = param.numel()
    grad_norm = param.new_empty(())
    num_programs = max(1, triton.cdiv(numel, NORM_BLOCK))
    partials = param.new_empty(num_programs)
    scalars = param.new_empty(NUM_SCALARS, dtype=torch.float64)
    norm_kernel[(num_programs,)](
        grad,
        partials,
        grad_norm,
        scalars,
        step,
        learning_rate,
        ticket(param.device),
        numel,
        num_programs,
        BETA1=beta1,
        BETA2=beta2,
        WEIGHT_DECAY=weight_decay,
        MAX_GRAD_NORM=max_grad_norm,
        EMA_DECAY=ema_decay,
        EMA_WARMUP=ema_warmup,
        WIDE=wide(param),
        BLOCK=NORM_BLOCK,
        num_warps=8,
    )
    block = BLOCK // 2 if param.dtype == torch.float64 else BLOCK  # more would spill
    update_kernel[(max(1, triton.cdiv(numel, block)),)](
        param,
        grad,
        exp_avg,
        exp_avg_sq,
        ema,
        shadow,
        scalars,
        numel,
        BETA1=beta1,
        BETA2=beta2,
        EPS=eps,
        ZERO_GRAD=zero_grad,
        WIDE=wide(param),
        BLOCK=block,
    )
    return grad_norm
