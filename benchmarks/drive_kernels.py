"""Calls every op through one implementation, a few times, and compares with the reference; what sanitizers watch.

    python -m benchmarks.drive_kernels [--backend native|triton] [--small | --large] [--op NAME] [--device cuda]

Inputs and reference values are made on the CPU, so that a GPU runs the project's kernels, copies, and little else:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer python -m benchmarks.drive_kernels  (benchmarks/sanitize.py)
    ncu --clock-control none python -m benchmarks.drive_kernels --large --op group_norm_silu

Exit code 1: a result is wrong, or a call failed; 2: the backend or the device is not there.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from fastdmd import ops

# What an implementation may add to the error of the reference in the same dtype, relative to the largest value.
TOLERANCES = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 4e-3, torch.float16: 5e-4}
NORMALS_TOLERANCE = 4e-6  # they are made in float32, whatever the dtype
INTERPRETER_SLACK = 8  # Triton's interpreter adds up one by one, and cuts to bfloat16 instead of rounding


@dataclasses.dataclass(frozen=True)
class Form:
    """Of the images that an op gets. Shifted ones start an element behind what a vector load could read."""

    shape: tuple[int, int, int, int]
    layout: torch.memory_format = torch.contiguous_format
    shifted: bool = False

    def __str__(self) -> str:
        return f"{self.shape} {str(self.layout)[6:]}{' shifted' if self.shifted else ''}"


CHANNELS_LAST = torch.channels_last
SMALL = [
    Form((3, 12, 7, 5)),
    Form((3, 12, 7, 5), CHANNELS_LAST),  # 105 and 420 elements: no vector fits
    Form((2, 16, 40, 40), CHANNELS_LAST),  # several blocks a sample; more than a block keeps in registers
    Form((2, 16, 8, 8), shifted=True),
    Form((0, 4, 8, 8)),
]
FORMS = [
    *SMALL,
    Form((2, 16, 40, 40)),
    Form((4, 16, 1, 1)),
    Form((3001, 4, 2, 2), CHANNELS_LAST),  # more samples than blocks that a GPU holds
    Form((70, 8, 64, 64), CHANNELS_LAST),  # more vectors than threads that it holds
]
LARGE = [Form((128, 96, 32, 32), CHANNELS_LAST)]  # as in training
LOW = (torch.bfloat16, torch.float16)


class Inputs:
    """Makes the arguments of the ops: the same values at every call, in the form and dtype, on the device asked for."""

    def __init__(self, form: Form, dtype: torch.dtype, device: torch.device | str):
        self.form, self.dtype, self.device = form, dtype, device
        self.B, self.C = form.shape[:2]
        self.numel = math.prod(form.shape)
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        self._generator = torch.Generator().manual_seed(1)

    def image(self, mean: float = 0.0) -> Tensor:
        normal = torch.randn(self.form.shape, generator=self._generator) + mean
        return self._place(normal.to(self.dtype).contiguous(memory_format=self.form.layout))

    def level(self) -> Tensor:
        return (torch.rand(self.B, generator=self._generator) * 3 + 0.05).to(self.device)

    def vector(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self._place(torch.randn(shape, generator=self._generator).to(dtype or self.dtype))

    def words(self, *shape: int) -> Tensor:
        return torch.randint(2**32, shape, generator=self._generator).to(self.device)

    def group_norm(self, adaptive: bool) -> tuple:
        tables = self.vector(self.B, 2 * self.C).chunk(2, dim=1) if adaptive else (None, None)
        offset = self.vector(self.B, self.C) if adaptive else None
        return self.image(mean=2.0), self.vector(self.C), self.vector(self.C), *tables, offset, 4

    def group_norm_backward(self, adaptive: bool, silu: bool = True) -> tuple:
        *arguments, num_groups = self.group_norm(adaptive)
        on_cpu = Inputs(self.form, self.dtype, "cpu").group_norm(adaptive)
        _, *moments = ops.implementations("group_norm_silu")["reference"](*on_cpu, 1e-5, silu)
        x, *parameters = arguments
        return self.image(), x, *(m.to(self.device) for m in moments), *parameters, num_groups, silu

    def adamw(self, *, copies: bool, infinite: bool = False) -> tuple:
        """`copies`: the average, and of a low precision the shadow, too."""
        param, exp_avg, exp_avg_sq, ema = (self.vector(self.numel, dtype=self.wide) for _ in range(4))
        grad, shadow = self.vector(self.numel), self.vector(self.numel)
        if infinite:
            grad[-1:] = math.inf
        step, learning_rate = (torch.tensor(value).to(self.device) for value in ([3], 1e-2))
        return (
            param,
            grad,
            exp_avg,
            exp_avg_sq.square_(),
            step,
            learning_rate,
            ema if copies else None,
            shadow if copies and self.dtype in LOW else None,
            0.9,
            0.999,
            1e-8,
            0.1,
            5.0 if copies else math.inf,
            0.99,
            10.0,
            copies,
        )

    def _place(self, tensor: Tensor) -> Tensor:
        if not self.form.shifted:
            return tensor.to(self.device)
        memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=self.device)
        return memory.as_strided(tensor.shape, tensor.stride(), 1).copy_(tensor)


CASES: dict[str, list[Callable[[Inputs], tuple]]] = {
    "philox": [lambda i: (i.words(i.numel, 4), i.words(2))],
    "add_noise": [
        lambda i: (i.image(), i.level(), i.image(), None, i.dtype),
        lambda i: (i.image(), i.level(), i.image(), i.level(), torch.bfloat16),
    ],
    "add_noise_rng": [
        lambda i: (i.image(), i.level(), ops.rng_key(2**62 + 3, stream=2**32 - 1, device=i.device), None, i.dtype),
        lambda i: (
            i.image(),
            i.level(),
            ops.rng_key(5, first_sample=2**32 - 1, device=i.device),
            i.level(),
            torch.bfloat16,
        ),
    ],
    "dm_gradient": [lambda i: (i.image(), i.image(), i.image(), 1e-6)],
    "dm_loss": [lambda i: (i.image(), i.image(), i.image(), 1e-6)],
    "dm_loss_raw": [lambda i: (i.image(), i.image(), i.level(), i.image(), i.image(), 0.5, 1e-6)],
    "denoising_loss": [lambda i: (i.image(), i.image(), i.level())],
    "fake_loss": [lambda i: (i.image(), i.image(), i.level(), 0.7)],
    "fake_loss_raw": [lambda i: (i.image(), i.image(), i.image(), i.level(), 0.7)],
    "scale_gradient": [lambda i: (i.image(), torch.tensor(0.7, dtype=i.wide).to(i.device), i.dtype)],
    "group_norm_silu": [
        lambda i: (*i.group_norm(adaptive=False), 1e-5, True),
        lambda i: (*i.group_norm(adaptive=True), 1e-5, True),
        lambda i: (*i.group_norm(adaptive=True), 1e-5, False),
    ],
    "group_norm_silu_backward": [
        lambda i: i.group_norm_backward(adaptive=False),
        lambda i: i.group_norm_backward(adaptive=True),
        lambda i: i.group_norm_backward(adaptive=True, silu=False),
    ],
    "bias_gradient": [lambda i: (i.image(),)],
    "adamw_ema_": [
        lambda i: i.adamw(copies=False),
        lambda i: i.adamw(copies=True),
        lambda i: i.adamw(copies=True, infinite=True),
    ],
}


class Outcome(NamedTuple):
    """Of all calls of an op. `worst`: the largest error as a share of what is allowed; `faults`: a line each."""

    num_calls: int
    worst: float
    faults: list[str]


def drive(
    op: str,
    implementation: Callable,
    forms: Iterable[Form],
    dtypes: Iterable[torch.dtype],
    device: torch.device,
    slack: float = 1.0,
) -> Outcome:
    """Calls an implementation of `op` with all its cases; raises what a call raises, and what it was called with."""
    num_calls, worst, faults = 0, 0.0, []
    for form in forms:
        for dtype in dtypes:
            for number, case in enumerate(CASES[op]):
                place = f"{op}, case {number}, {form}, {str(dtype)[6:]}"
                try:
                    shares = compare(op, implementation, lambda d, c=case, f=form, t=dtype: c(Inputs(f, t, d)), device)
                except Exception as error:
                    error.add_note(f"in {place}")
                    raise
                num_calls += 1
                for output, share in enumerate(shares):
                    worst = max(worst, share / slack) if share == share else math.inf
                    if not share <= slack:
                        faults.append(f"{place}: error of output {output} is {share:.3g} of what is allowed")
    return Outcome(num_calls, worst, faults)


def compare(
    op: str, implementation: Callable, make: Callable[[torch.device | str], tuple], device: torch.device
) -> list[float]:
    """The error of every output, and of every argument that the op writes, as a share of what is allowed."""
    reference = ops.implementations(op)["reference"]
    arguments = make("cpu")
    truth, same_dtype = call(op, reference, in_float64(make("cpu"))), call(op, reference, arguments)
    results = [result.cpu() for result in call(op, implementation, make(device))]
    if len(results) != len(truth):
        raise ValueError(f"expected {len(truth)} results, got {len(results)}")
    # The terms of this gradient may cancel; they are of the size of rstd.
    floor = arguments[3].max().item() if op == "group_norm_silu_backward" and arguments[3].numel() else 0.0
    shares = []
    for result, expected, exact in zip(results, same_dtype, truth, strict=True):
        if result.dtype != expected.dtype or result.shape != expected.shape:
            got = f"{result.dtype} {tuple(result.shape)}"
            raise ValueError(f"expected {expected.dtype} of shape {tuple(expected.shape)}, got {got}")
        if result.numel() and result.stride() != expected.stride():
            raise ValueError(f"expected strides {expected.stride()}, got {result.stride()}")
        if not result.is_floating_point():
            shares.append(0.0 if torch.equal(result, expected) else math.inf)
            continue
        tolerance = TOLERANCES[result.dtype]
        if op == "add_noise_rng":
            tolerance = max(tolerance, NORMALS_TOLERANCE)
        scale = max(floor, finite_max(exact))
        shares.append(share_of(error(result, exact), error(expected, exact) + tolerance * scale))
    return shares


def call(op: str, implementation: Callable, arguments: tuple) -> list[Tensor]:
    """The outputs, and the arguments that the op writes."""
    outputs = implementation(*arguments)
    schema = getattr(torch.ops.fastdmd, op).default._schema
    written = [a for a, s in zip(arguments, schema.arguments, strict=True) if s.alias_info and s.alias_info.is_write]
    return [*(outputs if isinstance(outputs, tuple) else (outputs,)), *(a for a in written if a is not None)]


def in_float64(arguments: tuple) -> tuple:
    return tuple(
        a.double()
        if isinstance(a, Tensor) and a.is_floating_point()
        else torch.float64
        if isinstance(a, torch.dtype)
        else a
        for a in arguments
    )


def error(result: Tensor, truth: Tensor) -> float:
    """The largest; 0 where both are infinite or both NaN, NaN where one of them alone is NaN."""
    same = (result == truth) | (result.isnan() & truth.isnan())
    return (result.double() - truth).abs().masked_fill(same, 0.0).max().item() if result.numel() else 0.0


def finite_max(x: Tensor) -> float:
    finite = x[x.isfinite()].abs()
    return finite.max().item() if finite.numel() else 0.0


def share_of(error: float, allowed: float) -> float:
    return error / allowed if allowed else (0.0 if error == 0 else math.inf)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("benchmarks.drive_kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="native", choices=["native", "triton"])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--small", action="store_true", help="few forms, float32 and bfloat16: few kernels to compile")
    size.add_argument("--large", action="store_true", help="images as in training, for a profiler")
    parser.add_argument("--op", choices=list(CASES), help="this one alone")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    reason = None
    if device.type == "cuda" and not torch.cuda.is_available():
        reason = "expected a GPU, got a torch that finds none"
    elif (absent := ops.unavailable("philox", device).get(options.backend)) is not None:
        reason = f"expected {options.backend} kernels for {device.type}, got none: {absent}"
    if reason is not None:
        print(f"benchmarks.drive_kernels: error: {reason}", file=sys.stderr)
        return 2
    forms = SMALL if options.small else LARGE if options.large else FORMS
    dtypes = list(TOLERANCES) if forms is FORMS else [torch.float32, torch.bfloat16]
    slack = INTERPRETER_SLACK if options.backend == "triton" and device.type == "cpu" else 1
    failed = 0
    for op in [options.op] if options.op else ops.names():
        implementation = ops.implementations(op, device).get(options.backend)
        if op not in CASES or implementation is None:  # of which one kind of device, or Triton, has kernels
            print(f"{op:<26}not called: {ops.unavailable(op, 'cuda')[options.backend]}")
            continue
        outcome = drive(op, implementation, forms, dtypes, device, slack)
        verdict = f"{len(outcome.faults)} WRONG" if outcome.faults else "ok"
        print(f"{op:<26}{outcome.num_calls:>4} calls, error at most {outcome.worst:.2f} of what is allowed: {verdict}")
        for fault in outcome.faults[:10]:
            print(f"  {fault}", flush=True)
        failed += bool(outcome.faults)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
