"""When processes agree: about once a second, by the time that iterations take."""

import pytest
import torch

from fastdmd.runs import agreement
from fastdmd.runs.agreement import Agreement


class Clock:
    """Of seconds that a test lets pass; processes that tell each other nothing else than what this one says."""

    is_alone = False

    def __init__(self):
        self.now = 100.0
        self.looks = 0

    def monotonic(self):
        return self.now

    def gather(self, told):
        self.looks += 1
        return torch.stack([told, told])


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(agreement, "time", clock)
    return clock


def looks(clock, iteration, seconds, number=60, wait=lambda: None):
    """The iterations at which processes agree, of so many from `iteration` on that take so long each."""
    found, own = [], Agreement(clock, lambda: None, iteration, wait)
    for now in range(iteration + 1, iteration + number + 1):
        clock.now += seconds
        before = clock.looks
        own.look(now, is_fixed=lambda: False, is_due=lambda: False)
        found += [now] * (clock.looks - before)
    return found


@pytest.mark.parametrize("iteration", [0, 5000])
def test_about_a_second_apart_in_a_run_that_goes_on_too(clock, iteration):
    """One that began at 5000 has not made 5000 iterations in its first moment."""
    assert [found - iteration for found in looks(clock, iteration, 0.0625)] == [1, 17, 33, 49]


def test_a_host_that_is_ahead_of_its_device_counts_the_time_of_both(clock):
    """Launches take no time; the device takes half a second for each of them."""
    launched = [0]

    def wait():
        clock.now += 0.5 * launched[0]
        launched[0] = 0

    own = Agreement(clock, lambda: None, 0, wait)
    found = []
    for now in range(1, 9):
        launched[0] += 1
        before = clock.looks
        own.look(now, is_fixed=lambda: False, is_due=lambda: False)
        found += [now] * (clock.looks - before)
    assert found == [1, 3, 5, 7]
