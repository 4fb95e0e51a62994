"""What the sdist holds, and that a library for many machines asks none for instructions that it may lack."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import fastdmd

ROOT = Path(__file__).parents[2]
LEFT_OUT = {".gitignore", ".ci/run", ".github/workflows/ci.yml"}  # of the repository alone


def test_the_sdist_has_all_sources(tmp_path):
    pytest.importorskip("setuptools", reason="setuptools is not installed")
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("not a repository")
    listed = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True).split()
    sources = {name for name in listed if (ROOT / name).exists()}
    for name in sources:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "fastdmd" / "libfastdmd_cpu.so").touch()  # of an earlier build
    code = "from setuptools.build_meta import build_sdist; build_sdist('.')"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames() if not archive.getmember(name).isdir()}
    made = {"PKG-INFO", "setup.cfg"} | {name for name in names if name.startswith("fastdmd.egg-info/")}
    assert len(sources) > 300 and names - made == sources - LEFT_OUT


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="reads instructions of x86-64")
@pytest.mark.parametrize("name", ["libfastdmd_kernels.so", "libfastdmd_cpu.so"])
def test_wide_instructions_stay_where_they_are_asked_for(name):
    """Those of AVX-512 and AVX2 in functions of their namespaces alone: code that is shared, such as a template of the
    standard library, would end a program on a machine without them."""
    library = Path(fastdmd.__file__).parent / name
    if not library.exists() or not shutil.which("objdump"):
        pytest.skip("not built, or no objdump")
    command = ["objdump", "--disassemble", "--no-show-raw-insn", "--no-addresses", "--demangle", str(library)]
    found: dict[str, set[str]] = {"zmm": set(), "ymm": set()}
    function = ""
    for line in subprocess.check_output(command, text=True).splitlines():
        if line.startswith("<"):
            function = line
        for register in re.findall(r"%([yz]mm)\d", line):
            found[register].add(function)
    assert bool(found["zmm"]) == bool(found["ymm"]) == (name == "libfastdmd_kernels.so")
    # Some names of lambdas no demangler can read: there a namespace is its length and its name.
    assert all(re.search("fastdmd::avx512::|7fastdmd6avx512", function) for function in found["zmm"])
    assert all(re.search("fastdmd::avx|7fastdmd(4avx2|6avx512)", function) for function in found["ymm"])
