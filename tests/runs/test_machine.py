"""What a run asks of its machine."""

import os
import subprocess
import sys

import pytest
import torch

from fastdmd.runs import machine


@pytest.mark.parametrize(
    "available, batch_size, quota, expected",
    [
        (2, 48, "max 100000", 2),
        (64, 48, "max 100000", 48),
        (64, 128, "200000 100000", 2),
        (64, 128, "150000 100000", 2),
        (8, 1, None, 1),
        (8, 128, "nonsense", 8),
        (8, 128, "1000 100000", 1),
    ],
)
def test_threads_suit_batch_and_container(available, batch_size, quota, expected, tmp_path):
    if quota is not None:
        (tmp_path / "cpu.max").write_text(quota + "\n")
    assert machine.suitable_threads(available, batch_size, tmp_path / "cpu.max") == expected


PREPARE = """
import torch
from fastdmd.runs import machine
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
from fastdmd.runs import machine
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
    def faults(argument, native):
        command = [sys.executable, "-c", FAULTS, argument]
        environment = {**os.environ, "FASTDMD_NATIVE": native}
        return int(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)

    leave = faults("leave", "auto")  # blocks of more than 32 MB come and go
    for native in ("auto", "0"):  # through fastdmd._runtime, if it is there, and without it
        assert 3 * faults("keep", native) < leave


def test_units_follow_the_precision():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        for precision in ("tf32", "fp32", "bf16"):
            machine.set_float32_units(precision)
            assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == (precision == "tf32")
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


PREPARE_GPU = """
import torch
from fastdmd.runs import machine
before = torch.backends.cudnn.benchmark
machine.prepare(torch.device("cpu"))
assert torch.backends.cudnn.benchmark == before == False
for precision in ("tf32", "bf16"):
    machine.prepare(torch.device("cuda"), precision=precision)
    print(torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)
"""


def test_a_gpu_measures_its_convolutions_and_has_the_units_asked_for():
    result = subprocess.run([sys.executable, "-c", PREPARE_GPU], capture_output=True, text=True)
    assert result.stdout.splitlines() == ["True True True", "True False False"], result.stderr


def test_compiled_code_has_a_place_for_any_user(tmp_path, monkeypatch):
    """`docker run -u 12345`: no home, somebody else's, or one that cannot be written; then the temporary folder."""

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    (tmp_path / "file").write_text("")
    monkeypatch.setattr(machine.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    temporary = tmp_path / "tmp" / f"fastdmd-{os.getuid()}" / "inductor"
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert machine.compiled_code_folder() == tmp_path / ".cache" / "fastdmd" / "inductor"
    for useless in ("", "relative/folder"):
        monkeypatch.setenv("XDG_CACHE_HOME", useless)
        assert machine.compiled_code_folder() == tmp_path / ".cache" / "fastdmd" / "inductor"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert machine.compiled_code_folder() == tmp_path / "cache" / "fastdmd" / "inductor"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert machine.compiled_code_folder() == temporary
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(machine.Path, "home", no_home)
    assert machine.compiled_code_folder() == temporary

    def no_temporary_folder():
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(machine.tempfile, "gettempdir", no_temporary_folder)
    assert machine.compiled_code_folder() is None
    for before in ("", "/mine"):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", before)
        machine.keep_compiled_code()
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == before
    assert sorted(os.listdir(tmp_path)) == ["file", "tmp"]  # asked for, not made


NAMELESS = """
import os
from fastdmd.runs import machine
os.setgid(12345)
os.setuid(12345)
for environment in ({}, {"HOME": "/"}, {"HOME": "/root"}, {"HOME": "/nonexistent", "TMPDIR": "/root"}):
    for name in ("HOME", "USER", "LOGNAME", "XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR"):
        os.environ.pop(name, None)
    os.environ.update(environment)
    machine.keep_compiled_code()
    print(os.environ.get("TORCHINDUCTOR_CACHE_DIR"))
"""


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="only root becomes somebody else")
def test_a_user_who_is_a_number_alone():
    result = subprocess.run([sys.executable, "-c", NAMELESS], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    folders = result.stdout.splitlines()
    assert len(folders) == 4 and all(folder.endswith("/fastdmd-12345/inductor") for folder in folders)
    assert not any(folder.startswith("/root") for folder in folders)


def test_the_commit_is_that_of_the_sources(monkeypatch, tmp_path):
    def commit_of(folder):
        monkeypatch.setattr(machine, "__file__", str(folder / "fastdmd" / "runs" / "machine.py"))
        machine.commit.cache_clear()
        return machine.commit()

    assert commit_of(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "one"], ["tag", "v1"]):
        subprocess.run([*git, *words], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
    assert commit_of(tmp_path) == head[:12]
    monkeypatch.setenv("PATH", "")
    assert commit_of(tmp_path) is None
    machine.commit.cache_clear()
