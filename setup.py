"""Builds what is native, all of it optional, with CMake; everything else about the package is in pyproject.toml.

FASTDMD_NATIVE=auto (default): build what torch, a C++ compiler and CMake allow, else install without. FASTDMD_NATIVE=1:
fail if they cannot be built. FASTDMD_NATIVE=0: do not try, and take away what was built in this folder before.
The kernels and the ops are libraries that any Python can load. The module `fastdmd._runtime` is for this Python alone:
pybind11 knows no stable ABI, and nanobind's begins with Python 3.12. So a wheel with it is tagged for its Python, one
without for every Python; a build in isolation has no pybind11 and makes the latter, where all else works the same.
The CUDA library is built if torch has CUDA and nvcc is there, of the same major version. It has code for every GPU from
sm_80 that nvcc knows; CUDAARCHS, CMake's own variable, names others: `CUDAARCHS=90` builds for an H100 alone, quickly.
"""

import functools
import hashlib
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
MODE = os.environ.get("FASTDMD_NATIVE") or "auto"
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
ARCHITECTURES_OPTION = "-DCMAKE_CUDA_ARCHITECTURES="
COMPILER_OPTION = "-DCMAKE_CUDA_COMPILER="
JOB_BYTES = 2 << 30  # what a compiler may need
# Each is a file, and a target of CMake's; in this order, as those that come later link or tell of those before.
PARTS = {
    "fastdmd_kernels": "native library, the ops will run in PyTorch",
    "fastdmd_cpu": "native ops, they will run in PyTorch",
    "fastdmd_cuda": "CUDA library",
    "_runtime": "module fastdmd._runtime",
}


def find(program: str, *folders: str) -> str | None:
    """Path of a program: in `folders`, which need not be there, in the scripts of this environment, or on the path."""
    return shutil.which(
        program, path=os.pathsep.join([*folders, sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    )


def torch_options() -> list[str]:
    import torch

    home = Path(torch.__file__).parent
    include = [home / "include", home / "include" / "torch" / "csrc" / "api" / "include"]
    return [f"-DFASTDMD_TORCH_INCLUDE={';'.join(map(str, include))}", f"-DFASTDMD_TORCH_LIB={home / 'lib'}"]


def cuda_options() -> list[str] | None:
    """CMake's options for the CUDA of torch; None without one, or without nvcc.

    Raises RuntimeError if nvcc's major version is another than torch's.
    """
    import torch

    version = torch.version.cuda
    if version is None:
        return None
    home = os.environ.get("CUDA_HOME")
    nvcc = find("nvcc", *([f"{home}/bin"] if home else [])) or find("nvcc", "/usr/local/cuda/bin")
    if nvcc is None:
        print("fastdmd: no CUDA library: torch has CUDA, but nvcc was not found", file=sys.stderr)
        return None
    release = re.search(r"release (\d+)\.\d+", subprocess.check_output([nvcc, "--version"], text=True))
    if release is None or release[1] != version.split(".")[0]:
        found = release[0] if release else "one of unknown release"
        raise RuntimeError(f"expected an nvcc of CUDA {version.split('.')[0]}, as torch's, got {found} at {nvcc}")
    known = subprocess.check_output([nvcc, "--list-gpu-arch"], text=True).split()
    *older, newest = [a for a in ARCHITECTURES if f"compute_{a}" in known]
    # PTX of the newest too, for GPUs that come later.
    architectures = os.environ.get("CUDAARCHS") or ";".join([*(f"{a}-real" for a in older), str(newest)])
    return [*torch_options(), "-DFASTDMD_CUDA=ON", COMPILER_OPTION + nvcc, ARCHITECTURES_OPTION + architectures]


def module_options(file_name: str, cuda_architectures: str) -> list[str] | None:
    """CMake's options for the module of this Python, a file of that name; None without pybind11 or Python's headers."""
    include = sysconfig.get_path("include")
    try:
        import pybind11

        missing = None if Path(include, "Python.h").exists() else f"Python.h was not found in {include}"
    except ImportError as error:
        missing = str(error)
    if missing is not None:
        print(f"fastdmd: no {PARTS['_runtime']}: {missing}", file=sys.stderr)
        return None
    return [
        f"-DFASTDMD_PYTHON_INCLUDE={include};{pybind11.get_include()}",
        f"-DFASTDMD_PYTHON_SUFFIX={file_name.removeprefix('_runtime')}",
        f"-DFASTDMD_CUDA_ARCHITECTURES={cuda_architectures.replace(';', ',')}",
    ]


@functools.cache
def digest() -> str:
    """Of the sources, for the libraries, which are told from those of other sources by it."""
    return runpy.run_path(str(ROOT / "fastdmd" / "_sources.py"))["digest"](ROOT) or ""


@functools.cache
def commit() -> str:
    """What the sources are, for the facts of the build: FASTDMD_COMMIT, or what git says of this folder, or nothing."""

    def git(*arguments: str) -> str:
        return subprocess.check_output(["git", *arguments], cwd=ROOT, text=True, stderr=subprocess.DEVNULL).strip()

    if given := os.environ.get("FASTDMD_COMMIT"):
        return given
    try:
        if git("rev-parse", "--show-prefix"):  # a folder inside somebody else's repository
            return ""
        changes = "+changes" if git("status", "--porcelain", "--untracked-files=no") else ""
        return git("rev-parse", "--short", "HEAD") + changes
    except (OSError, subprocess.CalledProcessError):
        return ""


def num_jobs() -> int:
    """As many as there are cores, and as memory holds; 1 on systems that do not say."""
    if not hasattr(os, "sched_getaffinity"):
        return 1
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(len(os.sched_getaffinity(0)), memory // JOB_BYTES))


def read_once(options: list[str]) -> str:
    """A name for what CMake reads in a new folder alone. In an old one, with another place, generator or CUDA compiler
    it fails or forgets its options, and other variables of the environment change nothing."""
    compilers = [option.removeprefix(COMPILER_OPTION) for option in options if option.startswith(COMPILER_OPTION)]
    releases = [subprocess.check_output([compiler, "--version"], text=True) for compiler in compilers]
    variables = [os.environ.get(name) for name in ("CXX", "CXXFLAGS", "LDFLAGS", "CUDAHOSTCXX", "CUDAFLAGS")]
    facts = [ROOT, "Ninja" in options, compilers, releases, variables]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:8]


class CMakeBuild(build_ext):
    cuda_architectures = ""  # of the CUDA library, once it is built

    def finalize_options(self):
        super().finalize_options()
        self.parallel = None  # CMake's jobs are

    def get_ext_filename(self, fullname):
        *package, name = fullname.split(".")
        return os.path.join(*package, f"lib{name}.so") if name != "_runtime" else super().get_ext_filename(fullname)

    def build_extension(self, extension):
        """Builds one part; each fails alone, and leaves nothing of an earlier build."""
        file = Path(self.get_ext_fullpath(extension.name)).resolve()
        file.unlink(missing_ok=True)
        name = extension.name.split(".")[1]
        try:
            self.build_part(name, file)
        except (ImportError, OSError, RuntimeError, subprocess.CalledProcessError) as error:
            if MODE == "1":
                raise
            print(f"fastdmd: no {PARTS[name]}: {error}", file=sys.stderr)

    def copy_extensions_to_source(self):
        for extension in self.extensions:
            (ROOT / self.get_ext_filename(extension.name)).unlink(missing_ok=True)
        super().copy_extensions_to_source()

    def build_part(self, name: str, file: Path):
        if name == "fastdmd_kernels":
            options = []
        elif name == "fastdmd_cpu":
            options = torch_options()
        elif name == "fastdmd_cuda":
            options = cuda_options()
        else:
            options = module_options(file.name, self.cuda_architectures)
        if options is None:
            return
        cmake = find("cmake")
        if cmake is None:
            raise RuntimeError("CMake was not found")
        ninja = find("ninja")
        if ninja is not None:
            options += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        # Those that link the kernels share a folder.
        kind = "cuda" if name == "fastdmd_cuda" else "cpu"
        build = Path(self.build_temp).resolve() / f"{kind}-{read_once(options)}"
        build.mkdir(parents=True, exist_ok=True)
        options += [f"-DFASTDMD_OUTPUT={file.parent}", f"-DFASTDMD_COMMIT={commit()}", f"-DFASTDMD_SOURCES={digest()}"]
        subprocess.run([cmake, str(ROOT), *options], cwd=build, check=True)
        command = [cmake, "--build", ".", "--target", name, "--parallel", str(num_jobs())]
        subprocess.run(command, cwd=build, check=True)
        if name == "fastdmd_cuda":
            (named,) = (option for option in options if option.startswith(ARCHITECTURES_OPTION))
            self.cuda_architectures = named.removeprefix(ARCHITECTURES_OPTION)


class Wheel(bdist_wheel):
    def get_tag(self):
        """By what lies in it; an editable one has no folder yet, and is of this Python."""
        python, abi, platform = super().get_tag()
        folder = Path(self.bdist_dir)
        if not folder.is_dir() or any(folder.glob("fastdmd/_runtime.*")):
            return python, abi, platform
        return "py3", "none", platform


if MODE not in ("auto", "0", "1"):
    sys.exit(f"fastdmd: error: expected FASTDMD_NATIVE out of auto, 0, 1, got {MODE!r}")
if MODE == "0" and {"--inplace", "-i", "develop", "editable_wheel"} & set(sys.argv):
    for built in (ROOT / "fastdmd").glob("*.so"):  # which would be loaded, as if nothing had been switched off
        built.unlink()
# `optional`: where nothing was built, setuptools goes on without the file.
REQUIRED = ("fastdmd_kernels", "fastdmd_cpu") if MODE == "1" else ()
extensions = [Extension(f"fastdmd.{name}", sources=[], optional=name not in REQUIRED) for name in PARTS]
setup(ext_modules=[] if MODE == "0" else extensions, cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel})
