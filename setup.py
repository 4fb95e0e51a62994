"""Builds the optional native libraries with CMake; everything else about the package is in pyproject.toml.

FASTDMD_NATIVE=auto (default): build what torch, a C++ compiler and CMake allow, else install without. FASTDMD_NATIVE=1:
fail if they cannot be built. FASTDMD_NATIVE=0: do not try.
The CUDA library is built if torch has CUDA and nvcc is there, of the same major version. It has code for every GPU from
sm_80 that nvcc knows; CUDAARCHS, CMake's own variable, names others: `CUDAARCHS=90` builds for an H100 alone, quickly.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
MODE = os.environ.get("FASTDMD_NATIVE", "auto")
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
JOB_BYTES = 2 << 30  # what a compiler may need


def find(program: str, *folders: str) -> str | None:
    """Path of a program: in `folders`, which need not be there, in the scripts of this environment, or on the path."""
    return shutil.which(
        program, path=os.pathsep.join([*folders, sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    )


def cuda_options(version: str, nvcc: str) -> list[str]:
    """CMake's options for a torch of this CUDA version. Raises RuntimeError if nvcc's major version is another."""
    release = re.search(r"release (\d+)\.\d+", subprocess.check_output([nvcc, "--version"], text=True))
    if release is None or release[1] != version.split(".")[0]:
        found = release[0] if release else "one of unknown release"
        raise RuntimeError(f"expected an nvcc of CUDA {version.split('.')[0]}, as torch's, got {found} at {nvcc}")
    known = subprocess.check_output([nvcc, "--list-gpu-arch"], text=True).split()
    *older, newest = [a for a in ARCHITECTURES if f"compute_{a}" in known]
    # PTX of the newest too, for GPUs that come later.
    architectures = os.environ.get("CUDAARCHS") or ";".join([*(f"{a}-real" for a in older), str(newest)])
    return ["-DFASTDMD_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DCMAKE_CUDA_ARCHITECTURES={architectures}"]


def num_jobs() -> int:
    """As many as there are cores, and as memory holds; 1 on systems that do not say."""
    if not hasattr(os, "sched_getaffinity"):
        return 1
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(len(os.sched_getaffinity(0)), memory // JOB_BYTES))


class CMakeBuild(build_ext):
    def get_ext_filename(self, fullname):
        *package, name = fullname.split(".")
        return os.path.join(*package, f"lib{name}.so")

    def build_extension(self, extension):
        """Builds one library; each fails alone, and leaves nothing of an earlier build."""
        file = Path(self.get_ext_fullpath(extension.name)).resolve()
        file.unlink(missing_ok=True)
        name = extension.name.split(".")[1]
        try:
            self.build_library(name, file.parent)
        except (ImportError, OSError, RuntimeError, subprocess.CalledProcessError) as error:
            if MODE == "1":
                raise
            without = "native library, the ops will run in PyTorch" if name == "fastdmd_cpu" else "CUDA library"
            print(f"fastdmd: no {without}: {error}", file=sys.stderr)

    def copy_extensions_to_source(self):
        for extension in self.extensions:
            (ROOT / self.get_ext_filename(extension.name)).unlink(missing_ok=True)
        super().copy_extensions_to_source()

    def build_library(self, name: str, output: Path):
        import torch

        options = []
        if name == "fastdmd_cuda":
            if torch.version.cuda is None:
                return
            home = os.environ.get("CUDA_HOME")
            nvcc = find("nvcc", *([f"{home}/bin"] if home else [])) or find("nvcc", "/usr/local/cuda/bin")
            if nvcc is None:
                print("fastdmd: no CUDA library: torch has CUDA, but nvcc was not found", file=sys.stderr)
                return
            options = cuda_options(torch.version.cuda, nvcc)
        cmake = find("cmake")
        if cmake is None:
            raise RuntimeError("CMake was not found")
        ninja = find("ninja")
        if ninja is not None:
            options += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        home = Path(torch.__file__).parent
        include = [home / "include", home / "include" / "torch" / "csrc" / "api" / "include"]
        # A folder of CMake's keeps the generator that it began with.
        build = Path(self.build_temp).resolve() / f"{name}-{'make' if ninja is None else 'ninja'}"
        build.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            [
                cmake, str(ROOT), f"-DFASTDMD_TORCH_INCLUDE={';'.join(map(str, include))}",
                f"-DFASTDMD_TORCH_LIB={home / 'lib'}", f"-DFASTDMD_OUTPUT={output}", *options,
            ],
            cwd=build, check=True,
        )  # fmt: skip
        command = [cmake, "--build", ".", "--target", name, "--parallel", str(num_jobs())]
        subprocess.run(command, cwd=build, check=True)


# `optional`: where nothing was built, setuptools goes on without the file.
cpu = Extension("fastdmd.fastdmd_cpu", sources=[], optional=MODE != "1")
cuda = Extension("fastdmd.fastdmd_cuda", sources=[], optional=True)
setup(ext_modules=[] if MODE == "0" else [cpu, cuda], cmdclass={"build_ext": CMakeBuild})
