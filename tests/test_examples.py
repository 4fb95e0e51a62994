"""The examples run as their own words say, each for a moment, and what they end with is right.

Those of a foreign network and of the shapes have tests beside what they show: tests/teachers, tests/data,
tests/test_own_teacher.py.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fastdmd
from examples import captured_step, compiled_loop, plain_loop, toy
from fastdmd import ops

ROOT = Path(__file__).parents[1]
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # with the tools of this environment
CMAKE = shutil.which("cmake", path=PATH)


@pytest.fixture(autouse=True)
def one_thread():
    """Networks as small as these wait for threads more than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_they_are_short():
    files = [path for path in (ROOT / "examples").rglob("*") if path.suffix in (".py", ".sh", ".cpp", ".txt")]
    lines = {path.name: len(path.read_text().splitlines()) for path in files}
    assert len(lines) == 11 and [name for name, n in lines.items() if n > 100] == ["shapes.py"]  # a whole data set


def test_the_teacher_is_exact():
    """The mean of many images, weighted by how likely each is what x shows."""
    torch.manual_seed(0)
    images = toy.PATTERNS[torch.arange(20_000) % 2] + toy.DEVIATION * torch.randn(20_000, 1, 8, 8)
    for sigma, tolerance in ((1.0, 0.1), (5.0, 0.03)):
        x = images[:2] + sigma * torch.randn(2, 1, 8, 8)
        closeness = -(x[:, None] - images).square().sum((2, 3, 4)) / (2 * sigma**2)  # [2, N]
        expected = torch.einsum("bn,nchw->bchw", closeness.softmax(dim=1), images)
        torch.testing.assert_close(toy.Teacher()(x, torch.full((2,), sigma)), expected, atol=tolerance, rtol=0)


def test_a_plain_loop():
    plain_loop.main()  # asserts that good images of both patterns come out


def test_a_compiled_loop():
    """As eager code computes it; with Inductor that is for those who run the example: it takes minutes."""
    compiled_loop.main(iterations=6, backend="aot_eager")
    with pytest.raises(AssertionError, match="not close"):
        wrong = plain_loop.distil(toy.pretrained(1), 4)[1]
        torch.testing.assert_close(torch.tensor(wrong), torch.zeros(4), rtol=1e-3, atol=0)


def test_a_captured_step():
    losses = captured_step.main(iterations=60)
    assert np.isfinite(losses).all() and np.mean(losses[-20:]) < np.mean(losses[:20])


def test_a_training_script_of_diffusers(tmp_path):
    pytest.importorskip("diffusers")
    from examples import diffusers_training

    diffusers_training.main(tmp_path / "generator", 80, 50)  # asserts that images come nearer to the patterns
    assert {path.name for path in (tmp_path / "generator").iterdir()} >= {"config.json"}


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_a_foreign_teacher_by_commands(tmp_path):
    pytest.importorskip("tyro", reason="tyro is not installed")
    command = ["bash", "examples/foreign_teacher.sh", str(tmp_path), "20", "4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PATH": PATH})
    assert done.returncode == 0, done.stderr
    samples = np.load(tmp_path / "samples.npz")
    assert samples["images"].shape == (20, 28, 28, 1) and samples["labels"].tolist() == [3, 5] * 10


@pytest.mark.skipif(not CMAKE or not shutil.which("c++"), reason="needs CMake and a C++ compiler")
def test_a_program_in_cpp(tmp_path):
    """The same noise, loss and gradient as the ops'."""
    package = Path(fastdmd.__file__).parent
    if not (package / "libfastdmd_kernels.so").exists():
        pytest.skip("the kernels are not built")
    options = [f"-DFASTDMD={package}", "-DCMAKE_BUILD_TYPE=Release"]
    for command in (["-S", ROOT / "examples" / "cpp", "-B", tmp_path, *options], ["--build", tmp_path]):
        subprocess.run([CMAKE, *command], check=True, capture_output=True)
    done = subprocess.run([tmp_path / "distribution_matching"], capture_output=True, text=True)
    assert done.returncode == 0, done
    _, *numbers = done.stdout.split()

    x_gen = torch.sin(0.01 * torch.arange(2 * 3072, dtype=torch.float64)).float().view(2, 3, 32, 32).requires_grad_()
    with torch.no_grad():
        x_t = ops.add_noise(x_gen, torch.tensor([0.5, 2.0]), rng_key=ops.rng_key(7))
    loss = ops.dm_loss(x_gen, 0.5 * x_t, 0.75 * x_t)
    loss.backward()
    expected = torch.stack([x_t.flatten()[-1], loss.detach(), x_gen.grad.flatten()[-1]])
    torch.testing.assert_close(torch.tensor([float(number) for number in numbers]), expected)
