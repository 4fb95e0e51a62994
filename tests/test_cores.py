"""Which cores a process takes beside others, and how commands leave the choice to whoever made one."""

import os
import subprocess
import sys

import pytest

from fastdmd import cores, startup

ALL = [0, 1]


@pytest.mark.parametrize(
    ("taken", "busy", "own", "num_threads", "expected"),
    [
        (ALL, {0: 1.0, 1: 1.0}, 2.0, 2, ALL),  # alone
        (ALL, {0: 1.0, 1: 1.0}, 1.7, 2, ALL),  # beside something small
        (ALL, {0: 1.0, 1: 0.8}, 1.3, 2, [1]),  # beside one busy process, which shares a core
        (ALL, {0: 1.0, 1: 0.9}, 0.9, 2, [1]),  # a busy process per core: together on the freer one
        (ALL, {0: 1.0, 1: 1.0}, 1.0, 1, ALL),  # one thread waits for nobody
        ([1], {0: 1.0, 1: 1.0}, 0.5, 2, [1]),  # still busy
        ([0], {0: 1.0, 1: 1.0}, 0.5, 2, [0]),  # stays where it is
        ([1], {0: 0.3, 1: 1.0}, 1.0, 2, [1]),  # others use a third of a core
        ([1], {0: 0.1, 1: 1.0}, 1.0, 2, ALL),  # quiet again
        ([1], {0: 0.0, 1: 0.1}, 0.1, 2, ALL),  # idle
        (ALL, {0: 1.0, 1: 1.0}, 2.1, 2, ALL),  # ticks are coarser than process times
        ([0, 1, 2, 3], dict.fromkeys(range(4), 1.0), 3.0, 4, [0, 1]),  # three cores would serve no better than two
        ([0, 1, 2, 3], {0: 1.0, 1: 0.5, 2: 1.0, 3: 0.6}, 1.1, 4, [1, 3]),
        ([0, 1, 2, 3], dict.fromkeys(range(4), 1.0), 3.0, 3, [0, 1, 2, 3]),  # three threads fit beside it
    ],
)  # fmt: skip
def test_choice_of_cores(taken, busy, own, num_threads, expected):
    assert cores.choose(taken, busy, own, num_threads) == expected


def test_the_choice_keeps_still_at_what_it_leads_to():
    """Beside a busy process per core, spread and together: neither view leads back to the other."""
    assert cores.choose(ALL, {0: 1.0, 1: 1.0}, 1.0, 2) == [0]
    for own in (0.5, 0.67):  # of the one core, beside one or two others
        assert cores.choose([0], {0: 1.0, 1: 1.0}, own, 2) == [0]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system has no affinities")
def test_every_thread_moves():
    code = """
import os, threading, torch
from fastdmd import cores
torch.set_num_threads(2)
torch.randn(512, 512) @ torch.randn(512, 512)  # starts torch's threads
threading.Thread(target=threading.Event().wait, daemon=True).start()
core = sorted(os.sched_getaffinity(0))[-1]
cores.run_on([core])
affinities = [os.sched_getaffinity(int(thread)) for thread in os.listdir("/proc/self/task")]
assert len(affinities) >= 3 and affinities == [{core}] * len(affinities), affinities
assert torch.get_num_threads() == 2
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", startup.THREAD_SETTINGS)
def test_who_has_decided_about_threads_is_left_alone(name, monkeypatch):
    shared = []
    monkeypatch.setattr(cores, "share", lambda: shared.append(True))
    for other in startup.THREAD_SETTINGS:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "1")
    before = dict(os.environ)
    startup.settle_threads()
    assert dict(os.environ) == before and not shared
    monkeypatch.delenv(name)
    startup.settle_threads()
    assert os.environ["GOMP_SPINCOUNT"] == str(startup.SPIN_COUNT) and shared
    monkeypatch.delenv("GOMP_SPINCOUNT")


def test_busy_seconds_are_those_of_the_cores():
    """More than this process used, and no more than there has been."""
    busy = cores._busy_seconds([0])
    with open("/proc/uptime") as file:
        uptime = float(file.read().split()[0])
    assert busy.keys() == {0} and 0 < busy[0] < uptime + 1
