"""What a command settles before torch is there, and how it leaves the choice to whoever made one."""

import os

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


def test_waiting_threads_soon_give_up_their_core(monkeypatch):
    for name in startup.THREAD_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GOMP_SPINCOUNT", "")  # so that it is restored afterwards
    monkeypatch.delenv("GOMP_SPINCOUNT")
    startup.settle_threads()
    assert os.environ.pop("GOMP_SPINCOUNT") == str(startup.SPIN_COUNT)
