"""What setup.py builds and leaves out, with the real CMake but a torch, an nvcc and sources made up."""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("setuptools", reason="setuptools is not installed")
ROOT = Path(__file__).parents[2]
CMAKE = shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
pytestmark = pytest.mark.skipif(CMAKE is None, reason="CMake is not installed")

# What is built are files that hold what they are told of the architectures; a file `broken_NAME` fails a build.
LISTS = """
cmake_minimum_required(VERSION 3.18)
project(made_up LANGUAGES NONE)
foreach(name fastdmd_kernels fastdmd_cpu fastdmd_cuda _runtime)
  if(name STREQUAL _runtime)
    set(file ${name}${FASTDMD_PYTHON_SUFFIX})
    set(told ${FASTDMD_CUDA_ARCHITECTURES})
  else()
    set(file lib${name}.so)
    set(told ${CMAKE_CUDA_ARCHITECTURES})
  endif()
  add_custom_target(${name} COMMAND test ! -e ${CMAKE_SOURCE_DIR}/broken_${name}
                    COMMAND ${CMAKE_COMMAND} -E make_directory ${FASTDMD_OUTPUT}
                    COMMAND echo "\\"${told}\\"" > ${FASTDMD_OUTPUT}/${file} VERBATIM)
endforeach()
"""
NVCC = """#!/bin/sh
case $1 in
  --version) echo "Cuda compilation tools, release {release}, V{release}.88" ;;
  --list-gpu-arch) printf 'compute_%s\\n' 75 80 86 87 89 90 ;;
esac
"""
FILES = {name: f"fastdmd/lib{name}.so" for name in ("fastdmd_kernels", "fastdmd_cpu", "fastdmd_cuda")}
FILES["_runtime"] = f"fastdmd/_runtime{sysconfig.get_config_var('EXT_SUFFIX')}"
ALL = set(FILES.values())


@pytest.fixture
def build(tmp_path, monkeypatch):
    """`build(...)`: the exit code, stderr, and what is native in the package, of `setup.py build_ext --inplace`."""
    (tmp_path / "fastdmd").mkdir()
    (tmp_path / "fastdmd" / "__init__.py").touch()
    for name in ("setup.py", "fastdmd/_sources.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "CMakeLists.txt").write_text(LISTS)
    for name in ("CUDAARCHS", "FASTDMD_NATIVE"):
        monkeypatch.delenv(name, raising=False)

    def run(
        torch_cuda: str | None,
        release: str,
        broken=(),
        pybind11="get_include = str",
        folder=tmp_path,
        command=("build_ext", "--inplace"),
        **environment: str,
    ):
        (tmp_path / "pybind11.py").write_text(pybind11)
        (tmp_path / "torch").mkdir(exist_ok=True)
        (tmp_path / "torch" / "__init__.py").write_text(f"class version:\n    cuda = {torch_cuda!r}\n")
        nvcc = tmp_path / "toolkit" / "bin" / "nvcc"
        nvcc.parent.mkdir(parents=True, exist_ok=True)
        nvcc.write_text(NVCC.format(release=release))
        nvcc.chmod(0o755)
        for name in FILES:
            (tmp_path / f"broken_{name}").unlink(missing_ok=True)
        for name in broken:
            (tmp_path / f"broken_{name}").touch()
        done = subprocess.run(
            [sys.executable, "-B", "setup.py", "-q", *command],
            cwd=folder,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(tmp_path), "CUDA_HOME": str(tmp_path / "toolkit"), **environment},
        )
        return done.returncode, done.stderr, {str(p.relative_to(tmp_path)) for p in tmp_path.glob("fastdmd/*.so")}

    run.folder = tmp_path
    return run


def test_everything_is_built(build):
    for environment, architectures in (({}, "80-real;86-real;89-real;90"), ({"CUDAARCHS": "90"}, "90")):
        code, errors, files = build("12.8", "12.9", **environment)
        assert (code, files) == (0, ALL), errors
        for name, told in (("fastdmd_cuda", architectures), ("_runtime", architectures.replace(";", ","))):
            assert (build.folder / FILES[name]).read_text().strip().strip('"') == told


def test_one_part_fails_alone(build):
    """And nothing of an earlier build passes for a part of this one."""
    assert build("13.0", "13.0")[2] == ALL
    cpu, cuda, module = "fastdmd_cpu", "fastdmd_cuda", "_runtime"
    said = {cpu: "native ops, they will run in PyTorch", cuda: "CUDA library", module: "module fastdmd._runtime"}
    for release, broken, lost, message in (
        ("13.0", (cpu, module), (cpu, module), "non-zero exit status"),
        ("13.0", (cuda,), (cuda,), "non-zero exit"),
        ("12.9", (), (cuda,), "expected an nvcc of CUDA 13, as torch's, got release 12.9 at"),
    ):
        code, errors, files = build("13.0", release, broken)
        assert (code, files) == (0, ALL - {FILES[name] for name in lost}), errors
        assert message in errors and all(f"fastdmd: no {said[name]}: " in errors for name in lost)
        if cuda in lost:  # the module tells of no library that is not there
            assert (build.folder / FILES[module]).read_text().strip().strip('"') == ""


@pytest.mark.parametrize(
    "broken, release, message",
    [
        ("fastdmd_kernels", "13.0", "non-zero exit status"),
        ("_runtime", "13.0", "non-zero exit status"),
        ("", "12.9", "expected an nvcc of CUDA 13, as torch's, got release 12.9 at"),
    ],
)
def test_a_build_that_is_asked_for_may_not_fail(build, broken, release, message):
    code, errors, _ = build("13.0", release, (broken,), FASTDMD_NATIVE="1")
    assert code != 0 and message in errors


def test_what_needs_something_that_is_not_there_is_left_out(build):
    assert build("13.0", "13.0")[2] == ALL
    code, errors, files = build(None, "13.0", pybind11="raise ImportError('it is away')", FASTDMD_NATIVE="1")
    assert (code, files) == (0, {FILES["fastdmd_kernels"], FILES["fastdmd_cpu"]})
    assert "fastdmd: no module fastdmd._runtime: it is away" in errors and "CUDA" not in errors


def test_what_was_built_before_it_was_switched_off_goes(build):
    assert build("13.0", "13.0")[2] == ALL
    assert build("13.0", "13.0", FASTDMD_NATIVE="0")[::2] == (0, set())


def test_nothing_is_built_where_it_is_switched_off(build):
    assert build("13.0", "13.0", FASTDMD_NATIVE="0")[::2] == (0, set())


@pytest.mark.parametrize("mode", ["2", "yes", "AUTO"])
def test_a_mode_that_means_nothing_ends_the_build(build, mode):
    """As at run time."""
    code, errors, files = build("13.0", "13.0", FASTDMD_NATIVE=mode)
    assert (code, files) == (1, set())
    assert errors == f"fastdmd: error: expected FASTDMD_NATIVE out of auto, 0, 1, got {mode!r}\n"


def test_a_wheel_is_tagged_for_what_lies_in_it(build):
    """With the module for this Python, with libraries alone for any, with nothing native for any machine, too."""
    (build.folder / "setup.cfg").write_text("[metadata]\nname = made_up\n[options]\npackages = fastdmd\n")
    machine = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    for tag, native, options in (
        (f"{python}-{python}-{machine}", ALL, {}),
        (f"py3-none-{machine}", ALL - {FILES["_runtime"]}, {"pybind11": "raise ImportError('it is away')"}),
        ("py3-none-any", set(), {"FASTDMD_NATIVE": "0"}),
    ):
        code, errors, _ = build("13.0", "13.0", command=("bdist_wheel",), **options)
        assert code == 0, errors
        (wheel,) = (build.folder / "dist").glob("*.whl")
        assert wheel.name == f"made_up-0.0.0-{tag}.whl"
        with zipfile.ZipFile(wheel) as archive:
            assert {name for name in archive.namelist() if name.endswith(".so")} == native
        for folder in ("dist", "build"):
            shutil.rmtree(build.folder / folder)
    code, errors, files = build("13.0", "13.0", command=("editable_wheel", "--dist-dir", "dist"))
    assert (code, files) == (0, ALL), errors
    assert [wheel.name.count(f"-{python}-{python}-") for wheel in (build.folder / "dist").glob("*.whl")] == [1]


def folders_of_cmake(root):
    return {path.parent.name for path in root.glob("build/*/*/CMakeCache.txt")}


def test_sources_that_moved_with_what_was_built_are_built_again(build):
    assert build("13.0", "13.0")[2] == ALL
    moved = shutil.copytree(build.folder, build.folder / "moved")
    for path in moved.glob("fastdmd/*.so"):
        path.unlink()
    code, errors, _ = build("13.0", "13.0", folder=moved, FASTDMD_NATIVE="1")
    assert code == 0 and {str(path.relative_to(moved)) for path in moved.glob("fastdmd/*.so")} == ALL, errors


@pytest.mark.parametrize("environment", [{"CUDA_HOME": "{0}/other"}, {"CUDAHOSTCXX": "g++"}, {"release": "13.1"}])
def test_another_compiler_gets_another_folder(build, environment):
    """In the folder of the first, CMake would forget every option (of nvcc), or keep the first."""
    assert build("13.0", "13.0")[2] == ALL == build("13.0", "13.0")[2]
    before = folders_of_cmake(build.folder)
    assert len(before) == 2
    shutil.copytree(build.folder / "toolkit", build.folder / "other")
    environment = {name: value.format(build.folder) for name, value in environment.items()}
    assert build("13.0", **{"release": "13.0", **environment})[2] == ALL
    new = folders_of_cmake(build.folder) - before
    assert {name.split("-")[0] for name in new} == ({"cpu", "cuda"} if "CUDAHOSTCXX" in environment else {"cuda"})


# Stands in the compiler's place: notes the source, or else the library, and makes the files that are waited for.
LAUNCHER = """#!/bin/sh
while [ $# -gt 0 ]; do
  case $1 in -o) made=$2 ;; -MF) depends=$2 ;; *.cpp) source=$1 ;; esac
  shift
done
from=${source:-$made}
echo "${from##*/}" >> "$NOTES"
touch "$made"
test -z "$depends" || echo "$made: $source" > "$depends"
"""


def test_a_kernel_that_changed_is_compiled_once_per_instruction_set(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    shutil.copy(ROOT / "CMakeLists.txt", tmp_path)
    launcher, notes = tmp_path / "launcher", tmp_path / "notes"
    launcher.write_text(LAUNCHER)
    launcher.chmod(0o755)
    monkeypatch.setenv("NOTES", str(notes))
    options = [f"-DCMAKE_CXX_{tool}_LAUNCHER={launcher}" for tool in ("COMPILER", "LINKER")]
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    subprocess.run([CMAKE, "-S", tmp_path, "-B", tmp_path / "build", *options, *generator], check=True)

    def build() -> list[str]:
        notes.write_text("")
        subprocess.run([CMAKE, "--build", tmp_path / "build", "--target", "fastdmd_kernels"], check=True)
        return sorted(notes.read_text().split())

    num_sets = 3 if platform.machine() in ("x86_64", "AMD64") else 1
    everything = build()
    library = "libfastdmd_kernels.so"
    assert {everything.count(name) for name in ("facts.cpp", "instruction_set.cpp", library)} == {1}
    assert everything.count("dm_loss.cpp") == everything.count("conv3x3.cpp") == num_sets
    assert build() == []
    (tmp_path / "csrc" / "cpu" / "dm_loss.cpp").touch()
    assert build() == ["dm_loss.cpp"] * num_sets + [library]
