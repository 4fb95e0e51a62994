"""On which cores the threads of this process run: on all, or where others compute too, together on fewer.

Threads that share an operator wait for each other many hundred times a second. Beside another busy process each such
wait lasts until the scheduler runs the slower one again, and two threads on two cores are slower than one. Together on
the cores that are free they wait for nobody else. Their number, and with it every rounding, stays: results remain a
function of the seed.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Mapping

PERIOD_SECONDS = 1.0
# Cores that others may use before threads move together, and below which they spread again: one threshold would have
# them go to and fro.
BUSY, QUIET = 0.4, 0.2


def share() -> None:
    """Looks once a second at what others use, from a thread of its own; nothing where the system does not tell."""
    if hasattr(os, "sched_setaffinity") and len(os.sched_getaffinity(0)) > 1 and os.path.exists("/proc/stat"):
        threading.Thread(target=_watch, name="cores", daemon=True).start()


def choose(taken: list[int], busy: Mapping[int, float], own: float, num_threads: int) -> list[int]:
    """The cores to take next.

    Args:
        taken: those that are taken now.
        busy: of every core that may be taken, how busy it was, from 0 to 1, whoever it was.
        own: what this process used of them, in cores.
        num_threads: that wait for each other.
    """
    free = len(busy) - max(0.0, sum(busy.values()) - own)
    fitting = max(1, int(free + (BUSY if len(taken) == len(busy) else QUIET)))
    if num_threads <= fitting:
        return sorted(busy)
    count = -(-num_threads // -(-num_threads // fitting))  # as many threads on each core: the fullest one decides
    return taken if count == len(taken) else sorted(sorted(busy), key=busy.__getitem__)[:count]


def _watch() -> None:
    taken = allowed = sorted(os.sched_getaffinity(0))
    before, own_before, at_before = _busy_seconds(allowed), time.process_time(), time.monotonic()
    while True:
        time.sleep(PERIOD_SECONDS)
        now, own, at = _busy_seconds(allowed), time.process_time(), time.monotonic()
        seconds = at - at_before
        busy = {core: (now[core] - before[core]) / seconds for core in allowed}
        chosen = choose(taken, busy, (own - own_before) / seconds, _num_threads())
        before, own_before, at_before = now, own, at
        if chosen != taken:
            taken = chosen
            run_on(taken)


def run_on(cores: list[int]) -> None:
    """Moves every thread of this process; those that follow start where the one that starts them is."""
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):  # it has ended, or somebody else decides
            os.sched_setaffinity(int(thread), cores)


def _num_threads() -> int:
    """torch's, once it is there."""
    return getattr(sys.modules.get("torch"), "get_num_threads", os.cpu_count)() or 1


def _busy_seconds(cores: list[int]) -> dict[int, float]:
    """Of each core since the system started, whatever it ran."""
    seconds = dict.fromkeys(cores, 0.0)
    with open("/proc/stat") as file:
        for line in file:
            name, *ticks = line.split()
            if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in seconds:
                user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, ticks[:8])
                seconds[int(name[3:])] = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return seconds
