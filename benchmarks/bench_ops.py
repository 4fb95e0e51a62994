"""Times every implementation of every op beside eager PyTorch, the compiled eager code and a copy of the same bytes.

    python -m benchmarks.bench_ops [--json out.json] [-k dm_loss]

On a CPU, one thread, minima; each measurement is a pytest-benchmark test. The table gives nanoseconds per element,
percent of the copy bandwidth that was measured in the same run, and the ratio to eager; the JSON holds the same with
commit, device and versions. `benchmarks.bench_kernels` does that on a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from benchmarks import eager
from benchmarks.environment import describe
from fastdmd import ops

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BATCHES = [40, 160, 512]  # of images of 3 x 64 x 64: 2, 8 and 25 MB of float32
NUM_PARAMETERS = 2_000_000  # in 200 tensors


class Fused:
    """The functions of `benchmarks.eager` through the public ones."""

    def add_noise(x, sigma, state):
        return ops.add_noise(x, sigma, rng_state=state)

    denoising_loss, dm_loss, fake_loss = ops.denoising_loss, ops.dm_loss, ops.fake_loss

    def group_norm_silu(x, weight, bias):
        return ops.group_norm_silu(x, weight, bias, num_groups=16)


# Bytes an element must move, in units of the element size: reads and writes of forward and backward.
TRAFFIC = {
    "add_noise": 2,
    "denoising_loss": 3,
    "dm_loss": 4,
    "fake_loss": 3,
    "group_norm_silu": 2 + 3,
    "adamw_ema_": 10,
}


def image_arguments(op, dtype, batch):
    generator = torch.Generator().manual_seed(0)

    def image(channels=3, size=64):
        x = torch.randn(batch, channels, size, size, generator=generator)
        return x.to(dtype)

    sigma = torch.rand(batch, generator=generator) + 0.1
    if op == "add_noise":
        return (image(), sigma), 0
    if op == "dm_loss":
        return (image().requires_grad_(), image(), image()), 1
    if op in ("denoising_loss", "fake_loss"):
        return (image().requires_grad_(), image(), sigma), 1
    # A feature map of the same size in bytes: 48 channels at 16 x 16.
    x = image(48, 16).to(memory_format=torch.channels_last).requires_grad_()
    return (x, *(torch.randn(48).to(dtype).requires_grad_() for _ in range(2))), 3


def time_it(benchmark, call, *, elements, element_size, op, variant, dtype):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        call()  # compiles, chooses, allocates
        benchmark.extra_info.update(
            op=op, variant=variant, dtype=dtype, elements=elements, bytes=TRAFFIC.get(op, 2) * elements * element_size
        )
        benchmark.pedantic(call, rounds=15, iterations=max(1, int(2e6 / elements)), warmup_rounds=2)
    finally:
        torch.set_num_threads(threads)


def variants(op):
    return ["eager", "compiled", *ops.implementations(op)]


@pytest.fixture
def stack():
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("op", "variant"),
    [
        (op, variant)
        for op, registered in [
            ("copy", None),
            ("add_noise", "add_noise_rng"),
            ("denoising_loss", "denoising_loss"),
            ("dm_loss", "dm_loss"),
            ("fake_loss", "fake_loss"),
            ("group_norm_silu", "group_norm_silu"),
        ]
        for variant in (variants(registered) if registered else ["copy"])
    ],
)
def test_images(benchmark, op, variant, dtype, batch, stack):
    if op == "copy":
        x = torch.randn(batch, 3, 64, 64).to(DTYPES[dtype])
        y = torch.empty_like(x)
        call, elements = (lambda: y.copy_(x)), x.numel()
    else:
        arguments, differentiated = image_arguments(op, DTYPES[dtype], batch)
        elements = arguments[0].numel()
        if variant in ("eager", "compiled"):
            function = getattr(eager, op)
        else:
            stack.enter_context(ops.use_backend(variant))
            function = getattr(Fused, op)
            if op == "add_noise":
                arguments = (*arguments, ops.rng_state(0))
        if variant == "compiled":
            torch._dynamo.reset()
            function = torch.compile(function, dynamic=False)
        if differentiated:
            function = eager.with_gradient(function, differentiated)
        call = lambda: function(*arguments)  # noqa: E731
    size = torch.finfo(DTYPES[dtype]).bits // 8
    time_it(benchmark, call, elements=elements, element_size=size, op=op, variant=variant, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", ["eager", "native"])
@pytest.mark.parametrize(("C_in", "C_out", "size"), [(48, 48, 14), (96, 96, 14), (96, 96, 7), (192, 96, 7)])
@pytest.mark.parametrize("side", [1, 3])
def test_convolution(benchmark, side, C_in, C_out, size, variant, dtype):
    op = f"conv{side}x{side}"
    if variant not in ["eager", *ops.implementations(op)]:
        pytest.skip(ops.unavailable(op)[variant])
    if (variant, side, dtype) == ("native", 1, "bfloat16"):
        pytest.skip("conv1x1 is torch's in bfloat16")
    own = {"dtype": DTYPES[dtype], "memory_format": torch.channels_last}
    x = torch.randn(64, C_in, size, size).to(**own).requires_grad_()
    weight = torch.randn(C_out, C_in, side, side).to(**own).requires_grad_()
    bias = torch.randn(C_out, dtype=DTYPES[dtype], requires_grad=True)
    plain = functools.partial(F.conv2d, padding=side // 2)
    function = getattr(ops, op) if variant == "native" else lambda *arguments: plain(*arguments)
    call = eager.with_gradient(function, 3)
    time_it(
        benchmark,
        lambda: call(x, weight, bias),
        elements=x.numel(),
        element_size=x.element_size(),
        op=f"{op} {C_in}-{C_out} {size}",
        variant=variant,
        dtype=dtype,
    )


@pytest.mark.parametrize("variant", variants("adamw_ema_")[:1] + variants("adamw_ema_")[2:])
def test_optimizer(benchmark, variant, stack):
    n, num_tensors = NUM_PARAMETERS, 200
    param, grad, ema = (torch.randn(n) for _ in range(3))
    moments = torch.zeros(2, n)
    step, learning_rate = torch.zeros(1, dtype=torch.int64), torch.tensor(1e-4)
    if variant == "eager":
        adamw = eager.AdamW(param, grad, *moments, step, learning_rate, ema, None, num_tensors=num_tensors, fused=True)
        call = lambda: adamw(1.0)  # noqa: E731
    else:
        stack.enter_context(ops.use_backend(variant))

        def call():
            ops.adamw_ema_(param, grad, *moments, step, learning_rate, ema=ema, max_grad_norm=1.0)

    time_it(benchmark, call, elements=n, element_size=4, op="adamw_ema_", variant=variant, dtype="float32")


def table(results) -> str:
    """A line per op, dtype, size and variant."""
    copy = {}
    for r in results:
        if r["op"] == "copy":
            copy[r["dtype"], r["elements"]] = r["bytes"] / r["seconds"]
    eager = {(r["op"], r["dtype"], r["elements"]): r["seconds"] for r in results if r["variant"] == "eager"}
    heads = f"{'variant':<10}{'ns/element':>11}{'GB/s':>8}{'% of copy':>10}{'x eager':>9}"
    lines = [f"{'op':<18}{'dtype':<10}{'MB':>6}  {heads}"]
    for r in sorted(results, key=lambda r: (r["op"], r["dtype"], r["elements"], -r["seconds"])):
        rate = r["bytes"] / r["seconds"]
        bandwidths = [rate for (dtype, _), rate in copy.items() if dtype == r["dtype"]]
        bandwidth = copy.get((r["dtype"], r["elements"]), max(bandwidths, default=math.nan))
        ratio = eager.get((r["op"], r["dtype"], r["elements"]), math.nan) / r["seconds"]
        megabytes = r["elements"] * (4 if r["dtype"] == "float32" else 2) / 1e6
        lines.append(
            f"{r['op']:<18}{r['dtype']:<10}{megabytes:>6.0f}  {r['variant']:<10}"
            f"{r['seconds'] / r['elements'] * 1e9:>11.2f}{rate / 1e9:>8.1f}{100 * rate / bandwidth:>10.0f}{ratio:>9.2f}"
        )
    return "\n".join(lines)


class Report:
    """Prints the table when pytest is done, and writes the JSON."""

    def __init__(self, path: str | None):
        self.path = path

    def pytest_terminal_summary(self, terminalreporter, config):
        measured = [b for b in config._benchmarksession.benchmarks if b.stats.rounds]
        results = [{**b.extra_info, "seconds": b.stats.min, "median_seconds": b.stats.median} for b in measured]
        terminalreporter.write_line("\n" + table(results))
        if self.path:
            Path(self.path).write_text(json.dumps({**describe("cpu"), "threads": 1, "results": results}, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="where to write the figures")
    parser.add_argument("-k", default="", help="only what matches, as in pytest")
    arguments = parser.parse_args()
    options = [__file__, "-q", "-p", "no:cacheprovider", "-W", "ignore", "--benchmark-quiet", "-k", arguments.k]
    sys.exit(pytest.main(options, plugins=[Report(arguments.json)]))


if __name__ == "__main__":
    main()
