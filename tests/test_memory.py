"""Memory that is left, from the files in which Linux tells it."""

import mmap
import re

import pytest
import torch

from fastdmd import memory
from fastdmd.memory import available_memory_bytes

GIB = 2**30
V1_UNLIMITED = 9223372036854771712


@pytest.fixture
def machine(tmp_path):
    """Writes files below a root that stands for `/`; the system itself has 8 GiB free."""

    def write(files: dict[str, object], groups: str = "0::/\n"):
        texts = {"proc/meminfo": f"MemTotal: 1 kB\nMemAvailable:  {8 * GIB // 1024} kB\n", "proc/self/cgroup": groups}
        for name, content in {**texts, **files}.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(str(content))
        return tmp_path

    return write


def group(folder: str, limit: object, usage: int, cached: int = 0) -> dict[str, object]:
    folder = f"sys/fs/cgroup/{folder}".rstrip("/")
    stat = f"anon 5\ninactive_file {cached}"
    return {f"{folder}/memory.max": limit, f"{folder}/memory.current": usage, f"{folder}/memory.stat": stat}


def group_v1(folder: str, limit: object, usage: int, cached: int = 0) -> dict[str, object]:
    folder = f"sys/fs/cgroup/memory/{folder}".rstrip("/")
    stat = f"inactive_file 1\ntotal_inactive_file {cached}"
    files = {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": usage, "memory.stat": stat}
    return {f"{folder}/{name}": content for name, content in files.items()}


def test_the_system_alone(machine):
    assert available_memory_bytes(machine({})) == 8 * GIB
    assert available_memory_bytes(machine(group("", "max", 5 * GIB))) == 8 * GIB


@pytest.mark.parametrize("make", [group, group_v1])
def test_what_a_group_has_left(machine, make):
    groups = "0::/job\n" if make is group else "5:cpu,cpuacct:/other\n4:memory:/job\n0::/\n"
    assert available_memory_bytes(machine(make("job", 4 * GIB, 3 * GIB), groups)) == GIB
    assert available_memory_bytes(machine(make("job", 4 * GIB, 3 * GIB, cached=2 * GIB), groups)) == 3 * GIB
    assert available_memory_bytes(machine(make("job", 4 * GIB, 5 * GIB), groups)) == 0
    assert available_memory_bytes(machine(make("job", 100 * GIB, 0), groups)) == 8 * GIB
    unlimited = "max" if make is group else V1_UNLIMITED
    assert available_memory_bytes(machine(make("job", unlimited, 7 * GIB), groups)) == 8 * GIB


@pytest.mark.parametrize("make", [group, group_v1])
def test_groups_around_it_count_too(machine, make):
    groups = "0::/a/b/c\n" if make is group else "4:memory:/a/b/c\n"
    unlimited = "max" if make is group else V1_UNLIMITED
    files = make("a/b/c", unlimited, GIB) | make("a/b", 6 * GIB, 2 * GIB) | make("a", 3 * GIB, 2 * GIB)
    assert available_memory_bytes(machine(files, groups)) == GIB
    assert available_memory_bytes(machine(make("a/b", GIB, GIB // 2), groups)) == GIB // 2


@pytest.mark.parametrize("path", ["/docker/0123", "/../../outside", "/"])
def test_a_container_that_sees_only_its_own_group(machine, path):
    """The path that the host gives leads nowhere inside; the mount itself is the group."""
    assert available_memory_bytes(machine(group("", 2 * GIB, GIB), f"0::{path}\n")) == GIB


def test_hybrid_mounts(machine):
    files = {name.replace("cgroup/job", "cgroup/unified/job"): text for name, text in group("job", GIB, 0).items()}
    assert available_memory_bytes(machine(files, "1:name=systemd:/\n0::/job\n")) == GIB


def test_other_systems(tmp_path, monkeypatch):
    pages = {"SC_PAGE_SIZE": 4096, "SC_AVPHYS_PAGES": 1000}
    monkeypatch.setattr("os.sysconf", pages.__getitem__)
    assert available_memory_bytes(tmp_path) == 4096 * 1000
    monkeypatch.setattr("os.sysconf", lambda name: (_ for _ in ()).throw(ValueError(name)))
    assert available_memory_bytes(tmp_path) is None


def test_this_machine_and_the_budget_agree(monkeypatch):
    assert 2**24 < available_memory_bytes() < 2**50
    monkeypatch.setattr(memory, "available_memory_bytes", lambda: 12345)
    assert memory.available_bytes(torch.device("cpu")) == 12345


@pytest.mark.parametrize("batch_size, steps, num_processes", [(40, 1, 8), (280, 7, 4), (12, 2, 3)])
def test_advice_to_several_processes_can_be_taken(batch_size, steps, num_processes):
    advice = memory.half(batch_size // num_processes, steps, num_processes)
    smaller, more = map(int, re.findall(r"[0-9]+", advice))
    assert smaller % (num_processes * steps) == 0 < smaller < batch_size
    assert batch_size % (num_processes * more) == 0 and more > steps


def test_advice_where_a_process_has_less_than_an_image():
    """Which is refused elsewhere."""
    assert memory.half(0, 1, 8).startswith("one image at a time") and memory.half(5, 8, 8).startswith("one image")


def test_taken_bytes_grow_with_what_is_taken(monkeypatch, tmp_path):
    before = memory.taken_bytes(torch.device("cpu"))
    with mmap.mmap(-1, 2**27) as block:  # of the system, not of what malloc has kept
        block[::4096] = bytes(2**27 // 4096)
        after = memory.taken_bytes(torch.device("cpu"))
    assert {*before} == {"resident_bytes"} and after["resident_bytes"] - before["resident_bytes"] > 2**26
    monkeypatch.setattr(memory, "ROOT", tmp_path)  # a system that does not tell
    assert memory.taken_bytes(torch.device("cpu")) == {}
