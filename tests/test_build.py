"""What setup.py builds and leaves out, with the real CMake but a torch, an nvcc and sources made up."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("setuptools", reason="setuptools is not installed")
CMAKE = shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
pytestmark = pytest.mark.skipif(CMAKE is None, reason="CMake is not installed")

# The libraries are files that hold the architectures; `broken` in their name's folder fails a build.
LISTS = """
cmake_minimum_required(VERSION 3.18)
project(made_up LANGUAGES NONE)
foreach(name fastdmd_cpu fastdmd_cuda)
  add_custom_target(${name} COMMAND test ! -e ${CMAKE_SOURCE_DIR}/broken_${name}
                    COMMAND ${CMAKE_COMMAND} -E make_directory ${FASTDMD_OUTPUT}
                    COMMAND echo "\\"${CMAKE_CUDA_ARCHITECTURES}\\"" > ${FASTDMD_OUTPUT}/lib${name}.so VERBATIM)
endforeach()
"""
NVCC = """#!/bin/sh
case $1 in
  --version) echo "Cuda compilation tools, release {release}, V{release}.88" ;;
  --list-gpu-arch) printf 'compute_%s\\n' 75 80 86 87 89 90 ;;
esac
"""
CUDA_LIBRARY = "fastdmd/libfastdmd_cuda.so"
BOTH = {"fastdmd/libfastdmd_cpu.so", CUDA_LIBRARY}


@pytest.fixture
def build(tmp_path, monkeypatch):
    """`build(...)`: the exit code, stderr, and the libraries in the package, of `setup.py build_ext --inplace`."""
    (tmp_path / "fastdmd").mkdir()
    (tmp_path / "fastdmd" / "__init__.py").touch()
    shutil.copy(Path(__file__).parents[1] / "setup.py", tmp_path)
    (tmp_path / "CMakeLists.txt").write_text(LISTS)
    for name in ("CUDAARCHS", "FASTDMD_NATIVE"):
        monkeypatch.delenv(name, raising=False)

    def run(torch_cuda: str | None, release: str, broken: tuple[str, ...] = (), **environment: str):
        (tmp_path / "torch").mkdir(exist_ok=True)
        (tmp_path / "torch" / "__init__.py").write_text(f"class version:\n    cuda = {torch_cuda!r}\n")
        nvcc = tmp_path / "toolkit" / "bin" / "nvcc"
        nvcc.parent.mkdir(parents=True, exist_ok=True)
        nvcc.write_text(NVCC.format(release=release))
        nvcc.chmod(0o755)
        for name in ("fastdmd_cpu", "fastdmd_cuda"):
            (tmp_path / f"broken_{name}").unlink(missing_ok=True)
            if name in broken:
                (tmp_path / f"broken_{name}").touch()
        done = subprocess.run(
            [sys.executable, "-B", "setup.py", "-q", "build_ext", "--inplace"], cwd=tmp_path, capture_output=True,
            text=True, env={**os.environ, "PYTHONPATH": str(tmp_path), "CUDA_HOME": str(tmp_path / "toolkit"),
                            **environment},
        )  # fmt: skip
        return done.returncode, done.stderr, {str(p.relative_to(tmp_path)) for p in tmp_path.glob("fastdmd/*.so")}

    run.folder = tmp_path
    return run


def test_both_libraries_are_built(build):
    for environment, architectures in (({}, "80-real;86-real;89-real;90"), ({"CUDAARCHS": "90"}, "90")):
        code, errors, libraries = build("12.8", "12.9", **environment)
        assert (code, libraries) == (0, BOTH), errors
        assert (build.folder / CUDA_LIBRARY).read_text().strip().strip('"') == architectures


@pytest.mark.parametrize("mode", ["auto", "1"])
def test_one_library_fails_alone(build, mode):
    """And nothing of an earlier build passes for a part of this one."""
    assert build("13.0", "13.0")[2] == BOTH
    for broken, release, left, message in (
        ("fastdmd_cuda", "13.0", "fastdmd_cpu", "non-zero exit status"),
        ("fastdmd_cpu", "13.0", "fastdmd_cuda", "non-zero exit status"),
        ("", "12.9", "fastdmd_cpu", "expected an nvcc of CUDA 13, as torch's, got release 12.9 at"),
    ):
        code, errors, libraries = build("13.0", release, (broken,), FASTDMD_NATIVE=mode)
        assert message in errors
        if mode == "1":
            assert code != 0
        else:
            assert code == 0 and libraries == {f"fastdmd/lib{left}.so"}
            assert "fastdmd: no " + ("native library" if left == "fastdmd_cuda" else "CUDA library") in errors


def test_a_torch_without_cuda_has_one_library(build):
    code, errors, libraries = build(None, "13.0", FASTDMD_NATIVE="1")
    assert (code, libraries) == (0, BOTH - {CUDA_LIBRARY}) and "CUDA" not in errors
