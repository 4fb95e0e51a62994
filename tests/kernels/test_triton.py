"""The Triton kernels without a GPU: interpreted on CPU tensors, and compiled ahead of time for four of them."""

import importlib
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from packaging.version import Version

from fastdmd import ops

triton = pytest.importorskip("triton", reason="Triton is not installed")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# The assembler of Triton 3.6 puts two registers aside, once, in a kernel for sm_100 and in one of float64 for sm_90.
OLD = Version(triton.__version__) < Version("3.9")
SPILLED = 8 if OLD else 0
needs_interpreter = pytest.mark.skipif(
    OLD and Version(np.__version__) >= Version("2.4"), reason="the interpreter of Triton 3.6 needs an older NumPy"
)
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
INTERPRETED = (
    "budget or golden or special or philox or broken_gradient or torch_adamw or its_key or far_apart or gradcheck"
    " or opcheck or compile or layouts or derivative or penalties or hessian or infinite or range_of_float16"
    " or not_dense or draw or recomputation or lazy or batched or looks_on or pair_of_dtypes"
)
# What the interpreter would take minutes for, and shows elsewhere: float16 is bfloat16's code, 4096 channels are cut as
# 2048 are, and other implementations of an op are tested without it.
LEFT_OUT = (
    "budget and (-float16- or [float16-) or every_cut and 4096 or fits_nowhere and contiguous"
    " or gradcheck and (native] or reference])"
)
# What a launcher runs once more after the first call: the tickets are zero again, a ring of two comes round, and
# chunks of a sample change nothing but rounding.
IN_THE_INTERPRETER = """
import torch
from fastdmd.kernels import _common, bias_gradient, dm_loss, fake_loss, group_norm_silu
torch.manual_seed(0)
_common.NUM_TICKETS = 2
images, sigma = torch.randn(3, 5, 3, 9, 9), torch.rand(5) + 0.1
for _ in range(5):
    losses = [dm_loss.dm_loss(*images, 1e-6)[0], fake_loss.fake_loss(*images[:2], sigma, 0.5)[0]]
    w = (images[0] - images[1]).abs().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(losses[0], 0.5 * ((images[2] - images[1]) / w).square().mean())
    weight = (sigma**-2 + 4)[:, None, None, None]
    torch.testing.assert_close(losses[1], (weight * (images[0] - images[1]).square()).mean())
    rows = images[0].reshape(1, -1, 9, 27).contiguous(memory_format=torch.channels_last)  # of 5 channels
    for bias_gradient.NUM_PROGRAMS, bias_gradient.BYTES in ((1, 32768), (7, 512), (256, 256)):
        torch.testing.assert_close(bias_gradient.bias_gradient(rows), rows.sum((0, 2, 3)))
    wide = torch.randn(3, 259, 5, 5).contiguous(memory_format=torch.channels_last)  # of three tiles, and a ticket each
    torch.testing.assert_close(bias_gradient.bias_gradient(wide), wide.sum((0, 2, 3)))
tickets = [_common.ticket(images.device) for _ in range(3)]
assert [t.data_ptr() % 16 for t in tickets] == [0, 0, 0] and tickets[0].data_ptr() != tickets[1].data_ptr()
assert all(t.eq(0).all() for t in tickets)

# A captured launch keeps its ticket, so no other takes one of those.
_common._is_captured = lambda device: True
recorded = [_common.ticket(images.device) for _ in range(3)]
assert recorded[0].data_ptr() == recorded[2].data_ptr() and all(t.eq(0).all() for t in recorded)
assert len({t.data_ptr() for t in tickets + recorded}) == 4 and recorded[0].data_ptr() % 16 == 0
try:
    _common.ticket(torch.device("meta"))
except RuntimeError as error:
    assert "expected an op to run once before a CUDA graph captures it" in str(error)
else:
    raise AssertionError("the zeros of the tickets would have been captured")
_common._is_captured = lambda device: False

x, weight, bias = 1000 + torch.randn(2, 6, 67, 71), torch.randn(6), torch.randn(6)
group_norm_silu.TILE_CHANNELS = 2
results = []
for group_norm_silu.NUM_PROGRAMS in (1, 512):
    parameters = weight, bias, None, None, weight[None], 3
    outputs = group_norm_silu.group_norm_silu(x, *parameters, 1e-5, True)
    grads = group_norm_silu.group_norm_silu_backward(x.sin(), x, *outputs[1:], *parameters, True)
    results.append([*outputs, *grads[:3]])
assert not torch.equal(results[0][2], results[1][2])  # rounded differently, so added up differently
for one, many, tolerance in zip(*results, (5e-6, 2e-7, 5e-6, 5e-6, 5e-6, 5e-6)):
    assert (many - one).abs().max() <= tolerance * one.abs().max()
"""
TYPES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
}


@needs_interpreter
def test_every_op_through_the_interpreter():
    """The tests of the ops once more, with Triton among the implementations and behind the public functions."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "FASTDMD_BACKEND": "triton"}
    ops_tests = str(Path(__file__).parents[1] / "ops")
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider"]
    command += ["-k", f"({INTERPRETED}) and not ({LEFT_OUT})"]
    run = subprocess.run([*command, ops_tests], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stdout[-4000:]
    assert run.stdout.count(".") > 500, run.stdout[-4000:]


@needs_interpreter
def test_tickets_and_chunks_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, "-c", IN_THE_INTERPRETER], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-4000:]


def images(dtype, *, count=3, shape=(64, 3, 64, 64), channels_last=False):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return [torch.empty(shape, dtype=dtype).contiguous(memory_format=layout) for _ in range(count)]


def norm_arguments(dtype, channels, adaptive, batch):
    (x,) = images(dtype, count=1, shape=(batch, channels, 32, 32), channels_last=True)
    tables = torch.empty(batch, 2 * channels, dtype=dtype).chunk(2, dim=1) if adaptive else (None, None)
    offset = torch.empty(1 if adaptive else batch, channels)
    return x, torch.empty(channels), torch.empty(channels), *tables, offset, 32


def launches(dtype):
    """Calls of the launchers, as a GPU would get them: name, module, arguments."""
    sigma, f32 = torch.empty(64), torch.float32
    x, a, b = images(dtype)
    yield "philox", "philox", (torch.empty(1000, 4, dtype=torch.int64), torch.empty(2, dtype=torch.int64))
    yield "add_noise", "add_noise", (x, sigma, a, sigma, torch.bfloat16)
    yield "add_noise_rng", "add_noise", (x, sigma, torch.empty(4, dtype=torch.int64), None, dtype)
    yield "dm_gradient", "dm_gradient", (x, a, b, 1e-6)
    yield "dm_loss", "dm_loss", (x, a, b, 1e-6)
    yield "dm_loss_raw", "dm_loss", (x, a, sigma, a, b, 0.5, 1e-6)
    yield "dm_loss of large samples", "dm_loss", (*images(dtype, shape=(2, 3, 256, 256)), 1e-6)
    yield "denoising_loss", "fake_loss", (x, a, sigma)
    yield "fake_loss", "fake_loss", (x, a, sigma, 0.5)
    yield "fake_loss_raw", "fake_loss", (x, a, b, sigma, 0.5)
    yield "scale_gradient", "fake_loss", (x, torch.empty(()), dtype)
    # Few samples: two launches; many: one.
    for channels, batch in ((192, 4), (576, 4), (192, 256), (576, 256)):
        x, *rest = norm_arguments(dtype, channels, adaptive=channels == 192, batch=batch)
        moments = torch.empty(batch, 32), torch.empty(batch, 32)
        yield "group_norm_silu", "group_norm_silu", (x, *rest, 1e-5, True)
        yield "group_norm_silu_backward", "group_norm_silu", (x, x, *moments, *rest, True)
    for channels in (192, 2304):  # tiles of 64 and of 1024
        yield "bias_gradient", "bias_gradient", images(dtype, count=1, shape=(8, channels, 32, 32), channels_last=True)
    flat, step = torch.empty(100_000), torch.empty(1, dtype=torch.int64)
    numbers = (0.9, 0.999, 1e-8, 0.01, 1.0, 0.999, 10.0, True)
    shadow = torch.empty(100_000, dtype=torch.bfloat16)
    yield (
        "adamw_ema_",
        "adamw_ema",
        (flat, flat.to(dtype), flat, flat, step, torch.empty((), dtype=f32), flat, shadow, *numbers),
    )


def names_with_kernels():
    """All ops but those that a GPU leaves to torch."""
    return {name for name in ops.names() if not name.startswith("conv")}


def edges():
    """Launches that Triton specialises otherwise: sizes that are 1 or odd, a sample read twice, float64, no tables."""
    for dtype, shape in (
        (torch.float32, (1, 1, 1, 1)),
        (torch.bfloat16, (1, 3, 32, 32)),
        (torch.float16, (2, 1, 1, 1)),
        (torch.float64, (3, 4, 17, 23)),
        (torch.float64, (1, 3, 256, 256)),
        (torch.float32, (1, 4, 150, 99)),
    ):
        x, a, b = images(dtype, shape=shape)
        B, C = shape[:2]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        sigma, vector, moments = torch.empty(B, dtype=torch.bfloat16), torch.empty(C, dtype=dtype), torch.empty(B, 1)
        yield "add_noise", "add_noise", (x, sigma, a, sigma.double(), torch.float16)
        yield "add_noise_rng", "add_noise", (x, sigma, torch.empty(4, dtype=torch.int64), None, dtype)
        yield "dm_gradient", "dm_gradient", (x, a, b, 1e-6)
        yield "dm_loss", "dm_loss", (x, a, b, 1e-6)
        yield "dm_loss_raw", "dm_loss", (x, a, sigma, a, b, 0.5, 1e-6)
        yield "denoising_loss", "fake_loss", (x, a, sigma)
        yield "fake_loss", "fake_loss", (x, a, sigma, 0.5)
        yield "fake_loss_raw", "fake_loss", (x, a, b, sigma, 0.5)
        yield "scale_gradient", "fake_loss", (x, torch.empty((), dtype=wide), torch.float16)
        parameters = (vector, vector, None, None, None, 1)
        yield "group_norm_silu", "group_norm_silu", (x, *parameters, 1e-5, False)
        moments = moments.to(wide)
        yield "group_norm_silu_backward", "group_norm_silu", (x, x, moments, moments, *parameters, False)
        yield "bias_gradient", "bias_gradient", (x.contiguous(memory_format=torch.channels_last),)
    numbers = (0.9, 0.999, 1e-8, 0.0, math.inf, 0.999, 0.0, False)
    for flat, shadow in ((torch.empty(1), None), (torch.empty(4099, dtype=torch.float64), torch.float16)):
        step, rate = torch.empty(1, dtype=torch.int64), torch.empty(())
        tables = (None, None) if shadow is None else (flat, flat.to(shadow))
        yield "adamw_ema_", "adamw_ema", (flat, flat.bfloat16(), flat, flat, step, rate, *tables, *numbers)
    yield "philox", "philox", (torch.empty(1, 4, dtype=torch.int64), torch.empty(2, dtype=torch.int64))


def record(monkeypatch, calls):
    """The kernels that the launchers launch, with their arguments and those of the launcher; nothing runs."""
    recorded = []

    def run(kernel, *arguments, grid, warmup, **options):
        recorded.append((kernel, arguments, options))

    with monkeypatch.context() as patch:
        patch.setattr(JITFunction, "run", run)
        for case, module, arguments in calls:
            launcher = getattr(importlib.import_module(f"fastdmd.kernels.{module}"), case.split()[0])
            start = len(recorded)
            launcher(*arguments)
            assert len(recorded) > start
            for kernel, *rest in recorded[start:]:
                yield f"{case}: {kernel.__name__}", arguments, kernel, *rest


def compile_for(target, kernel, arguments, options):
    """What Triton makes of a launch: its own specialisation of types, of ones, and of multiples of 16."""
    values = dict(zip(kernel.arg_names, arguments, strict=False))
    values |= {name: options[name] for name in kernel.arg_names if name in options}
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[parameter.name] = "constexpr"
            constants[index,] = value
            continue
        is_tensor = isinstance(value, torch.Tensor)
        signature[parameter.name] = f"*{TYPES[value.dtype]}" if is_tensor else "i32" if value < 2**31 else "i64"
        if (value.data_ptr() if is_tensor else value) % 16 == 0:
            attributes[index,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    compile_options = {name: value for name, value in options.items() if name not in kernel.arg_names}
    return triton.compile(source, target=target, options=compile_options)


def stack_bytes(cubin, folder):
    """Stack and local memory of a kernel; registers that spill go there."""
    (folder / "kernel.cubin").write_bytes(cubin)
    command = [CUOBJDUMP, "--dump-resource-usage", str(folder / "kernel.cubin")]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    stack, local = re.search(r"STACK:(\d+) .*LOCAL:(\d+)", usage).groups()
    return int(stack) + int(local)


def wide_loads_of(code, kernel, arguments, options, inputs):
    """How many loads of 16 bytes a thread needs for the large inputs that this kernel reads."""
    constants = {name: options[name] for name in ("BLOCK", "QUADS", "PIXELS", "ROWS", "CHANNELS") if name in options}
    elements = 4 * constants["QUADS"] if "QUADS" in constants else math.prod(constants.values())
    threads = code.metadata.num_warps * code.metadata.target.warp_size
    read = [
        value
        for name, value in zip(kernel.arg_names, arguments, strict=False)
        if isinstance(value, torch.Tensor)
        and value.numel() > 10_000
        and name != "shadow_ptr"
        and any(value is given for given in inputs)
    ]
    return sum(elements * value.element_size() // (16 * threads) for value in read)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", TARGETS)
def test_ahead_of_time(name, dtype, monkeypatch, tmp_path):
    """Every kernel compiles for every target, spills nothing, and reads its images 16 bytes at a time."""
    target, cases = TARGETS[name], list(record(monkeypatch, launches(dtype)))
    assert {case.split(":")[0].split()[0] for case, *_ in cases} == names_with_kernels()
    for case, inputs, *launch in cases:
        compiled = compile_for(target, *launch)
        code, expected = compiled.asm, wide_loads_of(compiled, *launch, inputs)
        if name == "gfx942":
            assert re.findall(r"\.vgpr_spill_count: +(\d+)", code["amdgcn"]) == ["0"], case
            wide_loads = re.findall(r"(global|buffer)_load_dwordx4", code["amdgcn"])
        else:
            assert stack_bytes(code["cubin"], tmp_path) <= SPILLED, case
            wide_loads = re.findall(r"ld\.global[.\w:]*\.(v4\.b32|v2\.b64)", code["ptx"])
        assert len(wide_loads) >= expected, (case, len(wide_loads), expected)
        without_images = case.startswith("philox") or case.endswith("parameters_kernel")
        assert expected or without_images or name == "gfx942"  # whose 64 threads a warp share the elements


def test_ahead_of_time_at_the_edges(monkeypatch, tmp_path):
    cases = list(record(monkeypatch, edges()))
    assert {case.split(":")[0] for case, *_ in cases} == names_with_kernels()
    for case, inputs, *launch in cases:
        code = compile_for(TARGETS["sm_90"], *launch).asm
        assert stack_bytes(code["cubin"], tmp_path) <= SPILLED, (case, inputs[0].shape, inputs[0].dtype)
