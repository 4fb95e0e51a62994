"""What a command settles before torch is there, and how it leaves the choice to whoever made one."""

import os
import signal
import subprocess
import sys

import pytest

from fastdmd.runs import startup


@pytest.mark.parametrize("name", startup.THREAD_SETTINGS)
def test_who_has_decided_about_threads_is_left_alone(name, monkeypatch):
    for other in startup.THREAD_SETTINGS:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "1")
    before = dict(os.environ)
    startup.settle_threads()
    assert dict(os.environ) == before


EARLY = """
import builtins, os, signal
from fastdmd.runs import startup
original, sent = builtins.__import__, []

def sending(name, globals=None, locals=None, fromlist=(), level=0):
    if name.startswith("fastdmd"):
        sent.append(name)
        os.kill(os.getpid(), signal.SIGUSR1)
    return original(name, globals, locals, fromlist, level)

builtins.__import__ = sending
startup.prepare("fastdmd.train")
print(len(sent) > 1)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="no such signal")
def test_a_signal_that_asks_too_early_ends_nothing():
    """Before the first import of what a command is made of."""
    result = subprocess.run([sys.executable, "-c", EARLY], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "True\n"), result.stderr


def test_waiting_threads_soon_give_up_their_core(monkeypatch):
    for name in startup.THREAD_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GOMP_SPINCOUNT", "")  # so that it is restored afterwards
    monkeypatch.delenv("GOMP_SPINCOUNT")
    startup.settle_threads()
    assert os.environ.pop("GOMP_SPINCOUNT") == str(startup.SPIN_COUNT)
