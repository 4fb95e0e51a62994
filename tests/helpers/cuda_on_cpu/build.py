"""The CUDA kernels as C++ on CPU tensors: every thread a fiber, in shuffled order, so that mistakes show without a GPU.

`FASTDMD_EMULATED=$(python tests/helpers/cuda_on_cpu/build.py) python -m fastdmd.ops --all` lists them. The emulator
reads FASTDMD_EMULATED_MULTIPROCESSORS (132), FASTDMD_EMULATED_CAPABILITY (90; below there are no clusters),
FASTDMD_EMULATED_SEED of the order (0) and FASTDMD_EMULATED_RECORD, a file to note the kernels in that are launched.
"""

import fcntl
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[3]
CSRC, BUILD = ROOT / "csrc", ROOT / "build" / "cuda_on_cpu"
KEPT_SECONDS = 24 * 60 * 60  # what has not been used for so long is of other sources
TORCH = Path(importlib.util.find_spec("torch").origin).parent
# Products and sums are fused as nvcc does it; shared memory that is declared elsewhere has no initialiser to call.
FLAGS = [
    "-std=c++20",
    "-fPIC",
    "-w",
    "-march=native",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-extern-tls-init",
    "-fvisibility=hidden",
    "-DUSE_CUDA",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
    "-Dfastdmd_native=fastdmd_emulated",
    f"-I{HERE / 'include'}",
    f"-isystem{TORCH / 'include'}",
]


def missing() -> str | None:
    """Why nothing can be built here."""
    if shutil.which("g++") is None:
        return "g++ is not installed"
    if (system := (platform.system(), platform.machine())) != ("Linux", "x86_64"):
        return f"the emulator is for Linux on x86-64, and this is {' on '.join(system)}"
    return None


def build(*, csrc: Path = CSRC, names: tuple[str, ...] = (), sanitizers: str = "", optimize: str = "-O2") -> Path:
    """The library of csrc/cuda/NAME.cu, by default of all of them. What has been compiled before is not again."""
    sources = [csrc / "cuda" / f"{name}.cu" for name in names] or sorted((csrc / "cuda").glob("*.cu"))
    headers = sorted([*csrc.rglob("*.h"), *csrc.rglob("*.cuh"), *HERE.rglob("*.h")])
    # The compiler's own account of its version and of this processor.
    compiler = subprocess.run(["g++", "-march=native", "-E", "-v", "-x", "c++", os.devnull], capture_output=True).stderr
    common = compiler + b"".join(path.read_bytes() for path in [*headers, TORCH / "version.py"])
    sanitize = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover", "-g1"] if sanitizers else []

    def compiled(path: Path) -> Path:
        flags = [optimize if path in sources else "-O2", *FLAGS, *sanitize]
        key = " ".join(flags).encode() + common + path.read_bytes()
        return _made(f"{path.stem}_%s.o", key, ["g++", *flags, "-c", "-x", "c++", path])

    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock, ThreadPoolExecutor(os.cpu_count()) as threads:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may want the same
        objects = list(threads.map(compiled, [*sources, csrc / "ops.cpp", HERE / "emulator.cpp"]))
        link = ["g++", "-shared", "-Wl,-Bsymbolic", *sanitize, *objects, f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"]
        library = _made("libfastdmd_emulated_%s.so", " ".join(map(str, objects)).encode(), link)
        for path in BUILD.iterdir():
            if time.time() - path.stat().st_mtime > KEPT_SECONDS:
                path.unlink()
        return library


def _made(name: str, key: bytes, command: list) -> Path:
    """The file that `command` makes, unless it is there; it appears when it is whole."""
    path = BUILD / (name % hashlib.sha256(key).hexdigest()[:16])
    if not path.exists():
        result = subprocess.run([*command, "-o", f"{path}.part"], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-4000:]
        os.replace(f"{path}.part", path)
    path.touch()
    return path


def kernels(library: Path) -> dict[int, str]:
    """The kernels of a library by their place in it: what is called with one struct, by value, as a launch does."""
    listed = subprocess.run(["nm", "--demangle", library], capture_output=True, text=True, check=True).stdout
    mine = r"fastdmd::\(anonymous namespace\)::"
    found = re.findall(rf"^(\w+) \w (?:void )?{mine}(\w+(?:<[^()]*>)?)\({mine}\w+\)$", listed, re.MULTILINE)
    return {int(place, 16): name for place, name in found}


if __name__ == "__main__":
    print(build())
