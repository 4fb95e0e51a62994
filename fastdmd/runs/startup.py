"""What a command does before it imports torch, which takes seconds and reads the settings of its threads once."""

from __future__ import annotations

import os
import signal

# Of OpenMP and of the runtimes that a torch may come with. Whoever sets one of them has decided.
THREAD_SETTINGS = (
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "OMP_DYNAMIC",
    "OMP_PROC_BIND",
    "OMP_PLACES",
    "GOMP_SPINCOUNT",
    "GOMP_CPU_AFFINITY",
    "KMP_BLOCKTIME",
    "KMP_AFFINITY",
)
SPIN_COUNT = 5000


def prepare(command: str) -> None:
    """Signals end this process with one line from here on, and its threads share the machine with other processes.

    For a command's own process alone. SIGUSR1, which asks for a checkpoint, asks too early: before anything else is
    imported it is ignored, where it would end the process.
    """
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    from fastdmd.runs import interrupts, terminal

    interrupts.exit_on_signals(terminal.typed(command))
    settle_threads()


def settle_threads() -> None:
    """A thread that waits for another soon gives up its core, which that one may be waiting for.

    GNU's OpenMP would spin for 0.1 s or more. The number of threads, and with it every rounding, stays.
    """
    if not any(name in os.environ for name in THREAD_SETTINGS):
        os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
