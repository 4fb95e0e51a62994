"""The CUDA kernels compile against torch's stable ABI, keep their values in registers and move 16 bytes at a time."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

CUDA = Path(__file__).parents[2] / "csrc" / "cuda"
INCLUDE = Path(torch.__file__).parent / "include"
NVCC = shutil.which("nvcc")
ARCHITECTURES = ("80", "90")
FLAGS = ["-O3", "-std=c++20", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]

# The kernels of each file: those that move vectors, and the others.
KERNELS = {
    "philox": ((), ("philox_rows",)),
    "add_noise": (("add_noise_vectors",), ("add_noise_any", "add_noise_quads")),
    "dm_loss": (("dm_loss_vectors",), ("dm_loss_any",)),
    "fake_loss": (("fake_loss_vectors", "scale_gradient_vectors"), ("fake_loss_any", "scale_gradient_any")),
    "group_norm_silu": (
        (
            "group_norm_moments_vectors",
            "group_norm_apply_vectors",
            "group_norm_sums_vectors",
            "group_norm_backward_vectors",
            "group_norm_silu_vectors",
            "group_norm_silu_backward_vectors",
            "group_norm_tiles",
            "group_norm_backward_tiles",
            "group_norm_planes",
            "group_norm_backward_planes",
        ),
        ("group_norm_silu_any", "group_norm_silu_backward_any", "parameter_gradients"),
    ),
    "adamw_ema": (("grad_norm_vectors", "adamw_ema_vectors"), ("grad_norm_any", "adamw_ema_any")),
}
READ_ONLY = {"group_norm_moments_vectors", "group_norm_sums_vectors", "grad_norm_vectors"}  # they write sums

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """`compiled(name)`: what ptxas says about csrc/cuda/NAME.cu, and PTX by architecture. Every file once."""
    done = {}

    def compile_file(name: str) -> tuple[str, dict[str, str]]:
        if name not in done:
            folder = tmp_path_factory.mktemp(name)
            targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
            command = [
                NVCC,
                "-c",
                str(CUDA / f"{name}.cu"),
                "-o",
                str(folder / f"{name}.o"),
                *FLAGS,
                *targets,
                "-Xcompiler=-fPIC",
                "-Xptxas=-v",
                f"-isystem={INCLUDE}",
                "--keep",
                f"--keep-dir={folder}",
            ]
            result = subprocess.run(command, capture_output=True, text=True)
            assert result.returncode == 0, result.stderr[-4000:]
            assert (folder / f"{name}.o").stat().st_size > 0
            ptx = {a: next(folder.glob(f"{name}*compute_{a}*.ptx")).read_text() for a in ARCHITECTURES}
            done[name] = result.stderr, ptx
        return done[name]

    return compile_file


def kernel_of(symbol: str, name: str) -> str:
    """The kernel that a mangled symbol is an instance of: its name, after its length and before its arguments."""
    (kernel,) = [k for group in KERNELS[name] for k in group if re.search(f"{len(k)}{k}[IE]", symbol)]
    return kernel


def resources(report: str) -> list[tuple[str, str, int, int, int]]:
    """Symbol, architecture, stack frame, bytes spilled and registers of every kernel in a report of ptxas."""
    entries = re.findall(
        r"Compiling entry function '(\w+)' for 'sm_(\d+)'\n.*Function properties for \1\n"
        r" +(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n.*Used (\d+) registers",
        report,
    )
    return [(symbol, a, int(frame), int(stores) + int(loads), int(n)) for symbol, a, frame, stores, loads, n in entries]


def bodies(ptx: str) -> dict[str, str]:
    """The kernels of a PTX file by symbol."""
    return {m[1]: m[2] for m in re.finditer(r"\.entry (\w+)\((.*?)\n}\n", ptx, re.DOTALL)}


def test_every_source_is_listed():
    assert {path.stem for path in CUDA.glob("*.cu")} == set(KERNELS)


@needs_nvcc
@pytest.mark.parametrize("name", KERNELS)
def test_no_kernel_spills(compiled, name):
    report, _ = compiled(name)
    found = resources(report)
    assert len(found) == report.count("Compiling entry function")
    for a in ARCHITECTURES:
        assert {kernel_of(symbol, name) for symbol, of, *_ in found if of == a} == {k for g in KERNELS[name] for k in g}
    spilling = [entry for entry in found if entry[2] or entry[3]]
    assert spilling == []
    assert max(registers for *_, registers in found) <= 128  # 512 threads fit


@needs_nvcc
@pytest.mark.parametrize("name", [name for name in KERNELS if KERNELS[name][0]])
def test_vectors_are_16_bytes(compiled, name):
    _, ptx = compiled(name)
    for a in ARCHITECTURES:
        vectors = {s: body for s, body in bodies(ptx[a]).items() if kernel_of(s, name) in KERNELS[name][0]}
        assert {kernel_of(symbol, name) for symbol in vectors} == set(KERNELS[name][0])
        for symbol, body in vectors.items():
            into_registers, into_shared = r"ld\.global(\.nc)?\.v4\.[bfu]32", r"cp\.async\.cg\.shared\.global .*, 16"
            assert re.search(f"{into_registers}|{into_shared}", body), symbol
            if kernel_of(symbol, name) not in READ_ONLY:
                assert re.search(r"st\.global\.v4\.[bfu]32", body), symbol
