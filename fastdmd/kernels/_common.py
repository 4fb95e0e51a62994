"""What the kernels share: dtypes, launch sizes, and a sum over the whole grid in the same launch."""

from __future__ import annotations

import concurrent.futures
import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdmd.ops._math import gradient_dtype as gradient_dtype
from fastdmd.ops._math import wide_dtype as wide_dtype

NUM_TICKETS, TICKETS = 4096, 4  # times four of 4 bytes
ADDED = tl.constexpr(1024)  # partial sums that a program adds up at a time

# By device and whether launches are captured.
_tickets: dict[tuple[torch.device, bool], itertools.cycle] = {}


def ticket(device: torch.device) -> Tensor:
    """Zeros on the device, int32 `[4]`, where the programs of one launch count themselves, all or those of each of up
    to four parts; the last one makes it 0 again.

    So no launch has to clear it. Launches take turns through 4096 of them, because some may run at the same time; those
    in a CUDA graph, which keeps theirs for all its replays, through 4096 others. They lie 16 bytes apart: Triton
    compiles a kernel anew for a pointer that is aligned differently.

    Raises RuntimeError where the first launch of a process on the device is captured: so would be the zeros.
    """
    captured = _is_captured(device)
    if (device, captured) not in _tickets:
        if captured:
            raise RuntimeError(
                "fastdmd.ops: expected an op to run once before a CUDA graph captures it, got its first call"
            )
        slots = _zeros(device).unbind()
        for of_captured, own in ((False, slots[:NUM_TICKETS]), (True, slots[NUM_TICKETS:])):
            _tickets[device, of_captured] = itertools.cycle(own)
    return next(_tickets[device, captured])


def _zeros(device: torch.device) -> Tensor:
    """From the host, so that they are there for every stream; on a GPU by a thread of its own, as memory that this one
    takes may be a graph's, which torch.compile warms up."""

    def make() -> Tensor:
        return torch.zeros(2 * NUM_TICKETS, TICKETS, dtype=torch.int32, device="cpu").to(device)

    if not torch.cuda.is_initialized():
        return make()
    with concurrent.futures.ThreadPoolExecutor(1) as other:
        return other.submit(make).result()


def _is_captured(device: torch.device) -> bool:
    return device.type == "cuda" and torch.backends.cuda.is_built() and torch.cuda.is_current_stream_capturing()


def wide(x: Tensor) -> tl.dtype:
    return tl.float64 if wide_dtype(x) == torch.float64 else tl.float32


def sample_size(x: Tensor) -> int:
    return x.numel() // x.shape[0] if x.shape[0] else 0


@triton.jit
def arrive(
    ticket_ptr,  # [1]
    num_programs,
):
    """True in the program that arrives last, which sees what the others stored before."""
    tl.debug_barrier()  # all warps have stored; before Triton 3.9 the addition, of one thread, waits for none
    last = tl.atomic_add(ticket_ptr, 1, sem="acq_rel") == num_programs - 1
    if last:
        tl.store(ticket_ptr, 0)
    return last


@triton.jit
def total(
    partial_ptr,  # [num_partials]
    num_partials,
):
    """Their sum, always in the same order."""
    sums = tl.zeros([ADDED], tl.float64)
    for start in range(0, num_partials, ADDED):
        offsets = start + tl.arange(0, ADDED)
        sums += tl.load(partial_ptr + offsets, offsets < num_partials, 0.0, cache_modifier=".cg").to(tl.float64)
    return tl.sum(sums)


@triton.jit
def of_samples(
    table_ptr,  # [B]
    stride,
    start,
    numel,
    sample_size,
    LARGE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What a table [B] says of BLOCK elements from `start` on: a value, another, and which elements take the first.

    Samples no smaller than a block are LARGE: it meets two of them at most. So the values are scalars, and what follows
    from them is not computed for every element. Else there is a value per element [BLOCK], given twice.
    """
    sample = start // sample_size
    left = (sample + 1) * sample_size - start
    inside = tl.arange(0, BLOCK)
    if LARGE:
        value = tl.load(table_ptr + sample * stride).to(WIDE)
        other = tl.load(table_ptr + (sample + 1) * stride, start + left < numel, 1.0).to(WIDE)
        return value, other, inside < tl.minimum(left, BLOCK).to(tl.int32)
    else:
        samples = sample + (inside + (sample_size - left).to(tl.int32)) // sample_size
        values = tl.load(table_ptr + samples * stride, start + inside < numel, 1.0).to(WIDE)
        return values, values, inside < BLOCK


@triton.jit
def quotient(x, y):
    """x / y, rounded to nearest; Triton's own division of float32 is two units in the last place off."""
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, tl.cast(y, tl.float32))


@triton.jit
def square_root(x):
    """Rounded to nearest, as Triton's own of float32 is not."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def finite_or_zero(x):
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def loss_weight(sigma, sigma_data):
    return 1.0 / (sigma * sigma) + 1.0 / (sigma_data * sigma_data)


@triton.jit
def c_skip(sigma, sigma_data):
    ratio = sigma / sigma_data
    return 1.0 / (1.0 + ratio * ratio)


@triton.jit
def c_out(sigma, sigma_data):
    return 1.0 / tl.sqrt(loss_weight(sigma, sigma_data))


@triton.jit
def narrow(x, ptr):
    """To the element type of `ptr`; to half precision from float32, as float64 knows no way there."""
    if x.dtype == tl.float64 and ptr.dtype.element_ty != tl.float64:
        x = x.to(tl.float32)
    return x.to(ptr.dtype.element_ty)
