"""The CUDA kernels without a GPU: compiled for the CPU, through the tests of the ops; and that mistakes are caught."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.cuda_on_cpu import build

TESTS = Path(__file__).parents[1] / "ops"
SANITIZERS = os.environ.get("FASTDMD_SANITIZERS", "")  # make sanitize
# What runs kernels, not what torch makes of the ops around them.
WITH_KERNELS = (
    "budget or golden or special or philox or broken_gradient or torch_adamw or normals or its_key or far_apart"
    " or infinite or float16 or not_dense or penalties or hessian or empty_batches or pair_of_dtypes or not_aligned"
    " or inside_a_vector or many_channels or far_more_calls or an_offset"
)
MISTAKES = {  # file: (right, wrong)
    "fake_loss": ("is_first = k < samples.boundary;", "is_first = k <= samples.boundary;"),
    "add_noise": ("key.first_sample + uint32_t(sample)", "key.first_sample"),
    "dm_loss": ("if (vector < num_vectors) emit(", "if (vector + 1 < num_vectors) emit("),
    "philox": ("  const int64_t step", "  if (threadIdx.x == 3) return;\n  __syncthreads();\n  const int64_t step"),
}
CAUGHT = {  # by which tests of the ops, and how
    "memory.py::test_samples_that_end_inside_a_vector[fake_loss-float32-cpu]": r"AssertionError: error \d",
    "random.py::test_noise_is_a_function_of_its_key_and_place[(4, 3, 8, 6)-contiguous-cpu]":
        "AssertionError: Tensor-likes are not close",
    "accuracy.py::test_error_budget[dm_gradient-float32-(3, 4, 17, 23)-contiguous-cpu]": "AssertionError: error nan",
    "random.py::test_philox_gives_the_published_answers[cpu]":
        ".*of the 256 threads of a block 255 wait at a barrier, 0 wait at a shuffle and 1 have returned",
}  # fmt: skip
EMULATED = [(1, 80), (132, 90)]  # multiprocessors and compute capability: without clusters, and with
BARRIERS = [  # file, line
    (path.name, number) for path in sorted((build.CSRC / "cuda").iterdir())
    for number, line in enumerate(path.read_text().splitlines(), start=1) if "__syncthreads();" in line
]  # fmt: skip
UNTOUCHED = "accuracy.py::test_error_budget[scale_gradient-float32-(3, 4, 17, 23)-contiguous-cpu]"

pytestmark = pytest.mark.skipif(build.missing() is not None, reason=str(build.missing()))


def run(library, *arguments, **environment):
    """pytest on tests of the ops, with the emulated kernels beside the reference and behind the public functions."""
    if SANITIZERS:
        names = ("libasan.so", "libubsan.so", "libstdc++.so")
        found = [subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip() for name in names]
        environment |= {"LD_PRELOAD": " ".join(found), "ASAN_OPTIONS": "detect_leaks=0"}  # Python's own
    environment |= {"FASTDMD_EMULATED": str(library), "FASTDMD_BACKEND": "emulated", "FASTDMD_NATIVE": "0"}
    # Not captured: the report of a sanitizer ends the process.
    command = [sys.executable, "-m", "pytest", "-s", "-W", "ignore", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


@pytest.mark.parametrize(("multiprocessors", "capability"), EMULATED)
def test_every_kernel_through_the_tests_of_the_ops(multiprocessors, capability, tmp_path):
    """On a device so small that every block loops, and on a large one with clusters, in another order."""
    library = build.build(sanitizers=SANITIZERS)
    result = run(
        library, "-k", WITH_KERNELS, TESTS,
        FASTDMD_EMULATED_MULTIPROCESSORS=str(multiprocessors), FASTDMD_EMULATED_SEED=str(multiprocessors),
        FASTDMD_EMULATED_CAPABILITY=str(capability), FASTDMD_EMULATED_RECORD=str(tmp_path / "launched"),
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    kernels = build.kernels(library)
    launched = {int(place, 16) for place in (tmp_path / "launched").read_text().split()}
    assert len(kernels) > 50 and {kernels[place] for place in launched} == set(kernels.values())


def changed(folder, changes):
    """A copy of csrc with other text in some of the kernels' files."""
    csrc = shutil.copytree(build.CSRC, folder / "csrc")
    for name, (right, wrong) in changes.items():
        path = csrc / "cuda" / f"{name}.cu"
        source = path.read_text()
        assert right in source, f"{name}.cu has changed: another mistake has to be thought of"
        path.write_text(source.replace(right, wrong))
    return csrc


def test_mistakes_are_caught(tmp_path):
    """A wrong mask, a wrong counter, an output that is not written, a barrier that a thread does not reach."""
    csrc = changed(tmp_path, MISTAKES)
    library = build.build(csrc=csrc, names=tuple(MISTAKES), sanitizers=SANITIZERS, optimize="-O0")
    result = run(library, *(f"{TESTS}/test_{test}" for test in (UNTOUCHED, *CAUGHT)), COLUMNS="1000")
    assert re.search(r"^4 failed, 1 passed", result.stdout, re.MULTILINE), result.stdout[-4000:]
    for test, message in CAUGHT.items():
        assert re.search(rf"^FAILED .*{re.escape(test)} - {message}", result.stdout, re.MULTILINE), test


@pytest.mark.skipif(not SANITIZERS, reason="make sanitize alone takes these minutes")
@pytest.mark.parametrize(("name", "number"), BARRIERS)
def test_every_barrier_is_missed(name, number, tmp_path):
    csrc = shutil.copytree(build.CSRC, tmp_path / "csrc")
    lines = (csrc / "cuda" / name).read_text().splitlines()
    lines[number - 1] = lines[number - 1].replace("__syncthreads();", "")
    (csrc / "cuda" / name).write_text("\n".join(lines) + "\n")
    library = build.build(csrc=csrc, optimize="-O0")
    outputs = []
    for multiprocessors, capability in EMULATED:
        result = run(
            library, "-x", "-k", "budget or its_key or many_channels", TESTS,
            FASTDMD_EMULATED_MULTIPROCESSORS=str(multiprocessors), FASTDMD_EMULATED_CAPABILITY=str(capability),
        )  # fmt: skip
        if re.search(r"^1 failed", result.stdout, re.MULTILINE):
            return
        outputs.append(result.stdout[-2000:] + result.stderr[-2000:])
    pytest.fail("\n".join(outputs))


@pytest.mark.skipif("address" not in SANITIZERS, reason="make sanitize alone looks at every address")
def test_a_store_behind_the_end_is_caught(tmp_path):
    csrc = changed(tmp_path, {"add_noise": ("store(out + i, x_t, count);", "store(out + i, x_t);")})
    library = build.build(csrc=csrc, names=("add_noise",), sanitizers=SANITIZERS, optimize="-O0")
    result = run(library, f"{TESTS}/test_random.py", "-k", "its_key")
    assert result.returncode != 0 and "AddressSanitizer: heap-buffer-overflow" in result.stderr, result.stdout[-4000:]
