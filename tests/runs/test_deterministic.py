"""`--deterministic`: what is asked of torch, what is refused, and what a run records of it."""

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file
from torch._inductor import config

from benchmarks.soak import prepare
from fastdmd.runs import cli, machine
from tests.helpers.kills import training
from tests.helpers.tiny_runs import distill

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


@pytest.fixture(autouse=True)
def _as_before():
    """What `--deterministic` sets is the process's own."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark, config.deterministic, torch.are_deterministic_algorithms_enabled()
    yield
    cudnn.deterministic, cudnn.benchmark, config.deterministic, are_enabled = before
    torch.use_deterministic_algorithms(are_enabled)


@pytest.mark.parametrize("chosen", [None, ":16:8"])
def test_what_is_asked_of_torch(chosen, monkeypatch):
    monkeypatch.setenv(WORKSPACE, chosen or "")  # so that it is restored
    if chosen is None:
        monkeypatch.delenv(WORKSPACE)
    cli.resolve_device("cpu", deterministic=True)
    assert os.environ[WORKSPACE] == (chosen or ":4096:8")
    assert torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.deterministic and config.deterministic
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    monkeypatch.setattr(machine, "set_float32_units", lambda precision: None)
    monkeypatch.setattr(machine, "keep_compiled_code", lambda: None)
    torch.backends.cudnn.benchmark = True
    machine.prepare(torch.device("cuda"))
    assert not torch.backends.cudnn.benchmark  # which would take what is faster this time


def test_a_workspace_that_cannot_is_refused(monkeypatch):
    monkeypatch.setenv(WORKSPACE, ":8:1")
    with pytest.raises(ValueError, match=f"expected {WORKSPACE} :4096:8 or :16:8 with --deterministic, got :8:1$"):
        cli.resolve_device("cpu", deterministic=True)
    assert not torch.are_deterministic_algorithms_enabled()


def test_an_operation_that_has_none_is_one_line(capsys):
    torch.use_deterministic_algorithms(True)
    with pytest.raises(SystemExit) as exit_, cli.run_errors("fastdmd.train", "distilling"):
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))
    error = capsys.readouterr().err
    expected = "expected operations that --deterministic allows, got put_, while distilling"
    assert exit_.value.code == 1 and error == f"fastdmd.train: error: {expected}\n"


def test_a_run_records_it_and_goes_on_with_it_alone(tmp_path):
    short = ["--iterations", "5", "--snapshots", "1", "--eval-every", "0", "--num-samples", "0"]
    arguments = [*prepare(tmp_path), *short]
    code, error = training(tmp_path / "plain", arguments)
    assert code == 0, error
    flag, auto = "--deterministic", ["--resume", "auto"]
    code, error = training(tmp_path / "run", [*arguments, flag, *auto], sends={3: signal.SIGKILL})
    assert code == -signal.SIGKILL, error
    assert json.loads((tmp_path / "run" / "run" / "config.json").read_text())["deterministic"] is True
    code, error = training(tmp_path / "run", [*arguments, *auto])
    assert code == 2 and error.endswith("settings that the run was begun with: --deterministic True, got False\n")
    code, error = training(tmp_path / "run", [*arguments, flag, *auto, "--accumulation-steps", "2"])
    assert code == 2 and error.endswith("begun with: --accumulation-steps 1, got 2\n")
    code, error = training(tmp_path / "run", [*arguments, flag, *auto])
    assert code == 0, error
    one, two = (load_file(tmp_path / name / "run" / "networks.safetensors") for name in ("plain", "run"))
    assert len(one) > 100 and all(torch.equal(value, two[name]) for name, value in one.items())  # on a CPU as without


NOISY = """
import torch

class Noisy(torch.nn.Conv2d):
    image_shape, num_classes, sigma_data = (1, 8, 8), 0, 0.5

    def __init__(self):
        super().__init__(1, 1, 3, padding=1)

    def forward(self, x, sigma):
        x = x / (1 + sigma**2).sqrt()[:, None, None, None]
        return super().forward(x) + 0.1 * torch.randn_like(x)
"""


@pytest.mark.parametrize("seed", [3, 4])
def test_what_draws_from_torch_is_a_function_of_the_seed(tmp_path, monkeypatch, seed):
    """Whatever the process has drawn before: initial weights of a network of one's own, and noise inside of it."""
    (tmp_path / "noisy.py").write_text(NOISY)
    monkeypatch.syspath_prepend(tmp_path)
    teacher = ["--teacher", "noisy:Noisy", "--parameterization", "x0", "--num-samples", "0", "--seed"]
    files = []
    for name, before, own in (("one", 1, seed), ("two", 2, seed), ("other", 1, seed + 1)):
        torch.manual_seed(before)
        files.append(load_file(distill(tmp_path / name, *teacher, str(own))))
    one, two, other = (file["weight"] for file in files)
    assert torch.equal(one, two) and not torch.equal(one, other)
