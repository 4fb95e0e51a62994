"""What a run asks of its machine, process-wide: threads, memory that stays, units, a place for compiled code."""

from __future__ import annotations

import ctypes
import functools
import math
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from fastdmd import __version__, _native

CGROUP = Path("/sys/fs/cgroup/cpu.max")  # the CPU time of this container: microseconds of it, and in how many
MALLOC = {"mmap_threshold": 2**30, "trim_threshold": 2**31 - 1, "top_pad": 2**26}  # bytes
CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
CUBLAS_WORKSPACES = ":4096:8", ":16:8"  # of cuBLAS's notes on reproducibility
MALLOPT = {"mmap_threshold": -3, "trim_threshold": -1, "top_pad": -2}  # in glibc's malloc.h


def prepare(device: torch.device, *, precision: str = "fp32", batch_size: int | None = None) -> None:
    """What every command asks for before it computes; a library changes nothing of the process that it is in."""
    keep_compiled_code()
    if device.type == "cuda":
        set_float32_units(precision)
        # The first call of a shape measures; a captured turn's are eager. Another time it may take another algorithm.
        torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()
    if device.type == "cpu":
        keep_freed_memory()
        use_faster_products()
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(suitable_threads(torch.get_num_threads(), batch_size))


def be_deterministic() -> None:
    """Lets torch take algorithms alone that give the same bits again; one that has none raises RuntimeError.

    To be called before a GPU is used: cuBLAS reads its workspace's size once. Raises ValueError where the environment
    asks for one that it does not give the same bits with.
    """
    workspace = os.environ.setdefault(CUBLAS_WORKSPACE, CUBLAS_WORKSPACES[0])
    if workspace not in CUBLAS_WORKSPACES:
        expected = " or ".join(CUBLAS_WORKSPACES)
        raise ValueError(f"expected {CUBLAS_WORKSPACE} {expected} with --deterministic, got {workspace}")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    from torch._inductor import config  # takes its time

    config.deterministic = True  # no kernel is chosen by how long it takes


def suitable_threads(available: int, batch_size: int | None, cgroup: Path = CGROUP) -> int:
    """At most one thread per image, which is how the work is split, and per core that a container may use.

    torch counts the cores of the machine: in a container with two of sixty-four, threads would wait for each other.
    """
    try:
        quota, period = cgroup.read_text().split()
        allowed = math.inf if quota == "max" else math.ceil(int(quota) / int(period))
    except (OSError, ValueError):
        allowed = math.inf
    return int(max(1, min(available, batch_size or available, allowed)))


def keep_freed_memory() -> None:
    """Lets glibc keep what tensors free for the next ones, instead of giving it back to the system each time.

    Measured on two cores, 128 MNIST images: 200,000 to 500,000 page faults a cycle become 10, its time 0.94 of itself,
    peak memory 1.02. Does nothing where there is another C library.
    """
    try:
        _native.runtime().set_malloc(**MALLOC)
    except _native.Unavailable:
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
        if mallopt is not None:
            for name, value in MALLOC.items():
                mallopt(MALLOPT[name], value)


def use_faster_products() -> None:
    """Lets oneDNN, not MKL, multiply float32 matrices, where that loses no digits.

    Measured on an AMD CPU with AVX-512, for which MKL takes AVX2: 410 against 197 GFLOP/s on two cores. oneDNN is asked
    by allowing it bfloat16 inside. Only on AMX units does it use that, so there, and wherever a product shows it, MKL
    stays.
    """
    if torch.cpu._is_amx_tile_supported():
        return
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # which torch sets as it is imported
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    fine = torch.full((64, 64), 1 + 2**-20)
    if not torch.equal(fine @ torch.eye(64), fine):
        matmul.fp32_precision = before


def keep_compiled_code() -> None:
    """Lets compiled networks outlive the machine's temporary folder, so that the next run starts sooner."""
    folder = compiled_code_folder()
    if folder is not None and not os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)


def compiled_code_folder() -> Path | None:
    """In the user's cache or, if there is none that can be written, the temporary folder; None without that, too.

    A user that is a number alone (`docker run -u 12345`) has no home, and Python raises where it is asked for one; or
    has that of somebody else, or `/`.
    """
    for parent in (_cache_home, _temporary_folder):
        if (found := parent()) is not None and _can_be_made(found):
            return found / "inductor"
    return None


def _cache_home() -> Path | None:
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if named.is_absolute():  # others are to be ignored, says the specification
        return named / "fastdmd"
    try:
        return Path.home() / ".cache" / "fastdmd"
    except RuntimeError:
        return None


def _temporary_folder() -> Path | None:
    try:
        return Path(tempfile.gettempdir()) / f"fastdmd-{os.getuid() if hasattr(os, 'getuid') else 'user'}"
    except OSError:
        return None


def _can_be_made(folder: Path) -> bool:
    """Whether it is a folder, or could be, of one's own."""
    existing = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


def set_float32_units(precision: str) -> None:
    """Lets float32 convolutions and matrix products run on TF32 units, or forbids it."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"


@functools.cache
def commit() -> str | None:
    """Of fastdmd's own sources, `-dirty` at its end if they were changed; None where they are no checkout of git."""
    sources = Path(__file__).parents[2]
    if not (sources / ".git").exists():
        return None
    git = ["git", "--no-optional-locks", "-C", str(sources)]
    command = [*git, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def arithmetic(device: torch.device) -> dict[str, str | int | None]:
    """What decides the last digit of what every process of a run computes for itself: the norm of a gradient that all
    have, and the update. Where it is not the same, weights go apart."""
    of_ops = {name: os.environ.get(name) for name in ("FASTDMD_BACKEND", "FASTDMD_NATIVE")}
    found: dict[str, str | int | None] = {"fastdmd": __version__, "torch": torch.__version__, **of_ops}
    if device.type == "cuda":
        return found | {"device": torch.cuda.get_device_name(device)}
    return found | {"threads": torch.get_num_threads(), "instructions": torch.backends.cpu.get_cpu_capability()}


def versions(device: torch.device) -> dict[str, str | int | None]:
    """What a result depends on: package versions and the device's name."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "fastdmd": __version__,
        "commit": commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "device": name,
        "threads": torch.get_num_threads(),
    }
