"""The Triton kernels without a GPU: interpreted on CPU tensors, and compiled ahead of time for four of them."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastdmd import ops

triton = pytest.importorskip("triton", reason="Triton is not installed")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32), "sm_90": GPUTarget("cuda", 90, 32), "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}  # fmt: skip
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
INTERPRETED = (
    "budget or golden or special or philox or broken_gradient or torch_adamw or seed_call or far_apart or gradcheck"
    " or opcheck or compile or layouts or derivative"
)
TYPES = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16",
         torch.int64: "i64", torch.int32: "i32"}  # fmt: skip


def test_every_op_through_the_interpreter():
    """The tests of the ops once more, with Triton among the implementations and behind the public functions."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "FASTDMD_BACKEND": "triton"}
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider", "-k", INTERPRETED,
               str(Path(__file__).with_name("test_ops.py"))]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stdout[-4000:]
    assert run.stdout.count(".") > 500, run.stdout[-4000:]


def images(dtype, *, count=3, shape=(64, 3, 64, 64), channels_last=False):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return [torch.empty(shape, dtype=dtype).contiguous(memory_format=layout) for _ in range(count)]


def norm_arguments(dtype, channels, adaptive):
    (x,) = images(dtype, count=1, shape=(4, channels, 32, 32), channels_last=True)
    tables = torch.empty(4, 2 * channels, dtype=dtype).chunk(2, dim=1) if adaptive else (None, None)
    return x, torch.empty(channels), torch.empty(channels), *tables, 32


def launches(dtype):
    """Calls of the launchers, as a GPU would get them: name, module, arguments."""
    sigma, f32 = torch.empty(64), torch.float32
    x, a, b = images(dtype)
    yield "philox", "philox", (torch.empty(1000, 4, dtype=torch.int64), torch.empty(2, dtype=torch.int64))
    yield "add_noise", "add_noise", (x, sigma, a, sigma, torch.bfloat16)
    yield "add_noise_rng", "add_noise", (x, sigma, torch.empty(2, dtype=torch.int64), None, dtype)
    yield "dm_gradient", "dm_gradient", (x, a, b, 1e-6)
    yield "dm_loss", "dm_loss", (x, a, b, 1e-6)
    yield "dm_loss_raw", "dm_loss", (x, a, sigma, a, b, 0.5, 1e-6)
    yield "dm_loss of large samples", "dm_loss", (*images(dtype, shape=(2, 3, 256, 256)), 1e-6)
    yield "fake_loss", "fake_loss", (x, a, sigma, 0.5)
    yield "fake_loss_raw", "fake_loss", (x, a, b, sigma, 0.5)
    yield "scale_gradient", "fake_loss", (x, torch.empty(()), dtype)
    for channels in (192, 576):
        x, *rest = norm_arguments(dtype, channels, adaptive=channels == 192)
        moments = torch.empty(4, 32), torch.empty(4, 32)
        yield "group_norm_silu", "group_norm_silu", (x, *rest, 1e-5)
        yield "group_norm_silu_backward", "group_norm_silu", (x, x, *moments, *rest)
    flat, step = torch.empty(100_000), torch.empty(1, dtype=torch.int64)
    numbers = (0.9, 0.999, 1e-8, 0.01, 1.0, 0.999, 10.0, True)
    shadow = torch.empty(100_000, dtype=torch.bfloat16)
    yield (
        "adamw_ema_",
        "adamw_ema",
        (flat, flat.to(dtype), flat, flat, step, torch.empty((), dtype=f32), flat, shadow, *numbers),
    )


def record(monkeypatch, dtype):
    """The kernels that the launchers launch, with their arguments; nothing runs."""
    recorded = []

    def run(kernel, *arguments, grid, warmup, **options):
        recorded.append((kernel, arguments, options))

    with monkeypatch.context() as patch:
        patch.setattr(JITFunction, "run", run)
        for case, module, arguments in launches(dtype):
            launcher = getattr(importlib.import_module(f"fastdmd.kernels.{module}"), case.split()[0])
            start = len(recorded)
            launcher(*arguments)
            assert len(recorded) > start
            for kernel, *rest in recorded[start:]:
                yield f"{case}: {kernel.__name__}", kernel, *rest


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
        if is_tensor or value % 16 == 0:
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", TARGETS)
def test_ahead_of_time(name, dtype, monkeypatch, tmp_path):
    """Every kernel compiles for every target, spills nothing, and moves 16 bytes at a time."""
    target, cases = TARGETS[name], list(record(monkeypatch, dtype))
    assert {case.split(":")[0].split()[0] for case, *_ in cases} == set(ops.names())
    for case, *launch in cases:
        code = compile_for(target, *launch).asm
        if name == "gfx942":
            assert re.findall(r"\.vgpr_spill_count: +(\d+)", code["amdgcn"]) == ["0"], case
            wide_loads = re.search(r"(global|buffer)_load_dwordx4", code["amdgcn"])
        else:
            assert stack_bytes(code["cubin"], tmp_path) == 0, case
            wide_loads = re.search(r"ld\.global[.\w:]*\.(v4\.b32|v2\.b64)", code["ptx"])
        if not case.startswith("philox"):
            assert wide_loads, case
