"""Ctrl-C, and the signals that a scheduler, a container or a closed terminal sends before it kills."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from fastdmd import files

ASKS = getattr(signal, "SIGUSR1", None)  # for a checkpoint
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def exit_on_signals(command: str) -> None:
    """From here on a signal ends the process at once, with one line and exit code 128 + its number.

    Nothing is raised: an exception that arrives inside a destructor or a callback is printed and forgotten, and the
    process would go on. What is half written goes.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        files.undo_all()
        with contextlib.suppress(OSError, ValueError, RuntimeError):  # of streams that are closed, or being written to
            print(f"\n{command}: ended by {signal.Signals(number).name}", file=sys.stderr, flush=True)
        os._exit(128 + number)

    for number in _heeded():
        signal.signal(number, leave)


@contextlib.contextmanager
def deferred(echo_seconds: float = 0.0) -> Iterator[Callable[[], int | None]]:
    """Inside, the first signal is only noted: the yielded function returns its number, None before.

    A second one does what it did outside, but for one that comes within `echo_seconds` of the first. In another thread
    than the main one, which alone can have handlers, none is ever noted.
    """
    received: list[int] = []
    ends: list[float] = []  # of the echo

    def note(number: int, frame: FrameType | None) -> None:
        if not received:
            received.append(number)
            ends.append(time.monotonic() + echo_seconds)
            if not echo_seconds:
                restore()
        elif time.monotonic() >= ends[0]:
            restore()
            os.kill(os.getpid(), number)

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    previous = {number: signal.signal(number, note) for number in _heeded()}
    try:
        yield lambda: received[0] if received else None
    finally:
        restore()


@contextlib.contextmanager
def asked() -> Iterator[Callable[[], bool]]:
    """Inside, the yielded function says whether SIGUSR1, which asks for a checkpoint, has come since it was called."""
    received: list[int] = []

    def take() -> bool:
        is_asked = bool(received)
        received.clear()
        return is_asked

    if ASKS is None or threading.current_thread() is not threading.main_thread():
        yield take
        return
    previous = signal.signal(ASKS, lambda number, frame: received.append(number))
    try:
        yield take
    finally:
        signal.signal(ASKS, previous)


def _heeded() -> list[signal.Signals]:
    """All but those that whoever started this process chose to ignore, as nohup does."""
    if threading.current_thread() is not threading.main_thread():
        return []
    return [number for number in SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)]
