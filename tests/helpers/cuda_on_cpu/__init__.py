"""The CUDA kernels as C++ on CPU tensors: every thread a fiber, in shuffled order, so that mistakes show without a GPU.

`python tests/helpers/cuda_on_cpu [SANITIZERS]` prints the library, for FASTDMD_EMULATED, or runs the tests of the ops
under g++'s sanitizers.
"""

import fcntl
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[3]
CSRC, BUILD = ROOT / "csrc", ROOT / "build" / "cuda_on_cpu"
TORCH = Path(importlib.util.find_spec("torch").origin).parent
# Products and sums are fused as nvcc does it. The variables of CUDA's shared memory are trivial: nothing initialises
# those that are declared elsewhere.
FLAGS = [
    "-std=c++20", "-fPIC", "-w", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fno-extern-tls-init",
    "-fvisibility=hidden", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000",
    "-Dfastdmd_native=fastdmd_emulated", f"-I{HERE / 'include'}", f"-isystem{TORCH / 'include'}",
]  # fmt: skip


def missing() -> str | None:
    """Why nothing can be built here."""
    if shutil.which("g++") is None:
        return "g++ is not installed"
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"fibers are switched in assembly of x86-64, and this is {platform.machine()}"
    return None


def build(*, csrc: Path = CSRC, names: tuple[str, ...] = (), sanitizers: str = "", optimize: str = "-O2") -> Path:
    """The library of csrc/cuda/NAME.cu, by default of all of them. What has been compiled before is not again."""
    kernels = [csrc / "cuda" / f"{name}.cu" for name in names] or sorted((csrc / "cuda").glob("*.cu"))
    headers = sorted([*csrc.rglob("*.h"), *csrc.rglob("*.cuh"), *HERE.rglob("*.h")])
    common = b"".join(path.read_bytes() for path in headers) + (TORCH / "version.py").read_bytes()
    flags = [optimize, *FLAGS, *([f"-fsanitize={sanitizers}", "-fno-sanitize-recover", "-g1"] if sanitizers else [])]

    def compiled(path: Path) -> Path:
        key = hashlib.sha256(common + path.read_bytes() + " ".join(flags).encode()).hexdigest()[:16]
        command = ["g++", *flags, "-c", "-x", "c++", path]
        return _made(BUILD / f"{path.stem}_{key}.o", command)

    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may want the same
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            objects = list(threads.map(compiled, [*kernels, csrc / "ops.cpp", HERE / "emulator.cpp"]))
        key = hashlib.sha256(" ".join(path.name for path in objects).encode()).hexdigest()[:16]
        link = ["g++", "-shared", "-Wl,-Bsymbolic", "-Wl,--no-undefined"]
        link += [f"-fsanitize={sanitizers}"] if sanitizers else []
        link += [*objects, f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"]
        return _made(BUILD / f"libfastdmd_emulated_{key}.so", link)


def _made(path: Path, command: list) -> Path:
    """`path`, which `command` makes unless it is there; it appears when it is whole."""
    if not path.exists():
        result = subprocess.run([*command, "-o", f"{path}.part"], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-4000:]
        os.replace(f"{path}.part", path)
    return path
