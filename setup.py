"""Builds the optional native libraries with CMake; everything else about the package is in pyproject.toml.

FASTDMD_NATIVE=auto (default): build if torch, a C++ compiler and CMake are there, else install without.
FASTDMD_NATIVE=1: fail if they cannot be built. FASTDMD_NATIVE=0: do not try.
The CUDA library is built if torch has CUDA and nvcc is there.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
MODE = os.environ.get("FASTDMD_NATIVE", "auto")


class CMakeBuild(build_ext):
    def get_ext_filename(self, fullname):
        *package, name = fullname.split(".")
        return os.path.join(*package, f"lib{name}.so")

    def build_extension(self, extension):
        try:
            self.build_libraries(Path(self.get_ext_fullpath(extension.name)).resolve().parent)
        except (ImportError, OSError, RuntimeError, subprocess.CalledProcessError) as error:
            if MODE == "1":
                raise
            print(f"fastdmd: no native library, the ops will run in PyTorch: {error}", file=sys.stderr)

    def build_libraries(self, output: Path):
        import torch

        # The scripts of this environment may not be on the path.
        cmake = shutil.which("cmake", path=os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")]))
        if cmake is None:
            raise RuntimeError("CMake was not found")
        home = Path(torch.__file__).parent
        cuda = torch.version.cuda is not None and shutil.which("nvcc") is not None
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        include = [home / "include", home / "include" / "torch" / "csrc" / "api" / "include"]
        subprocess.run(
            [
                cmake, str(ROOT), f"-DFASTDMD_TORCH_INCLUDE={';'.join(map(str, include))}",
                f"-DFASTDMD_TORCH_LIB={home / 'lib'}", f"-DFASTDMD_OUTPUT={output}",
                f"-DFASTDMD_CUDA={'ON' if cuda else 'OFF'}",
            ],
            cwd=build, check=True,
        )  # fmt: skip
        subprocess.run([cmake, "--build", ".", "--parallel"], cwd=build, check=True)


# `optional`: where nothing was built, setuptools goes on without the file.
extensions = [] if MODE == "0" else [Extension("fastdmd.fastdmd_cpu", sources=[], optional=MODE != "1")]
setup(ext_modules=extensions, cmdclass={"build_ext": CMakeBuild})
