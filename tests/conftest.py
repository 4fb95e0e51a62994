"""What tests share: a small teacher, and where the golden values lie."""

import os
import signal
from pathlib import Path

# One process of pytest-xdist a core, each with one thread: threads of several would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

from fastdmd.networks.unet import UNet
from fastdmd.runs import machine
from tests.helpers.networks import make_network

# A shell's background jobs ignore Ctrl-C, and what they start would, too.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def teacher() -> UNet:
    return make_network()


@pytest.fixture
def teacher_file(tmp_path, teacher) -> Path:
    from fastdmd.networks.weights import save_network

    path = tmp_path / "teacher.safetensors"
    save_network(path, teacher, kind="teacher")
    return path


@pytest.fixture(scope="session")
def golden_losses() -> dict[str, torch.Tensor]:
    """Both turns of DMD2, from an independent implementation."""
    local = Path(__file__).parent / "golden" / "dmd2_losses.npz"
    return {name: torch.from_numpy(np.asarray(array)) for name, array in np.load(local).items()}


@pytest.fixture
def float32_units():
    """No TF32, which cuDNN would take by default and Triton would not: ten bits of difference."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    machine.set_float32_units("fp32")
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="torch finds no GPU"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """A machine for measurements may lack tyro, which commands alone need: their tests are skipped there."""
    try:
        return (yield)
    except ModuleNotFoundError as error:
        if error.name != "tyro":
            raise
        pytest.skip("tyro is not installed")
