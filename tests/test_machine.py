"""What a run asks of its machine."""

import os
import subprocess
import sys

import pytest
import torch

from fastdmd import machine


@pytest.mark.parametrize(
    "available, batch_size, quota, expected",
    [(2, 48, "max 100000", 2), (64, 48, "max 100000", 48), (64, 128, "200000 100000", 2), (64, 128, "150000 100000", 2),
     (8, 1, None, 1), (8, 128, "nonsense", 8), (8, 128, "1000 100000", 1)],
)  # fmt: skip
def test_threads_suit_batch_and_container(available, batch_size, quota, expected, tmp_path):
    if quota is not None:
        (tmp_path / "cpu.max").write_text(quota + "\n")
    assert machine.suitable_threads(available, batch_size, tmp_path / "cpu.max") == expected


PREPARE = """
import torch
from fastdmd import machine
torch.set_num_threads(2)
machine.prepare(torch.device("cpu"), precision="fp32", batch_size=1)
print(torch.get_num_threads())
"""


@pytest.mark.parametrize("chosen, expected", [(None, 1), ("2", 2)])
def test_threads_that_a_user_chose_stay(chosen, expected):
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    environment |= {} if chosen is None else {"OMP_NUM_THREADS": chosen}
    result = subprocess.run([sys.executable, "-c", PREPARE], env=environment, capture_output=True, text=True)
    assert result.stdout.split() == [str(expected)], result.stderr


FAULTS = """
import resource, sys, torch
from fastdmd import machine
if sys.argv[1] == "keep":
    machine.keep_freed_memory()

def turn():  # what a turn does: much is allocated, all of it freed
    tensors = [torch.ones(16_000_000) for _ in range(3)]

for _ in range(6):
    turn()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    turn()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux" or os.confstr("CS_GNU_LIBC_VERSION") is None, reason="glibc alone has it")
def test_freed_memory_stays():
    def faults(argument):
        command = [sys.executable, "-c", FAULTS, argument]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert 3 * faults("keep") < faults("leave")  # blocks of more than 32 MB come and go


def test_units_follow_the_precision():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        for precision in ("tf32", "fp32", "bf16"):
            machine.set_float32_units(precision)
            assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == (precision == "tf32")
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
