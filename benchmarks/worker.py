"""A process that works for this one: what hangs or breaks its GPU costs one job, and the next finds a fresh process."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable

import torch

START_SECONDS = 60
LOST = (EOFError, OSError, TimeoutError)  # of a process that is no longer there, or no longer answers


class Worker:
    """Calls functions in a process that has entered `setup`, a context manager; starts it when it is needed.

    What `setup` gives, if anything, is the first argument of every function.
    """

    def __init__(self, setup: Callable):
        self.setup, self.process = setup, None

    def __call__(self, function: Callable, *arguments, seconds: float | None = None):
        """The result of the function. Raises RuntimeError with its error, or if it takes longer than that."""
        if self.process is None:
            self.start(START_SECONDS)
        try:
            self.connection.send((function, arguments))
            result, error, alive = self._receive(seconds)
        except LOST as lost:
            raise self._end(lost) from lost
        if not alive:
            self.close()
        if error is not None:
            raise RuntimeError(error)
        return result

    def start(self, seconds: float | None = None) -> None:
        """Returns when the process has entered `setup`. Raises RuntimeError where it does not."""
        context = multiprocessing.get_context("spawn")  # CUDA survives no fork
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, self.setup), daemon=True)
        self.process.start()
        other.close()
        try:
            self._receive(seconds)
        except LOST as lost:
            raise self._end(lost) from lost

    def _end(self, lost: Exception) -> RuntimeError:
        self.close()
        return RuntimeError(str(lost) or "its process died")

    def _receive(self, seconds: float | None):
        if not self.connection.poll(seconds):
            raise TimeoutError(f"took longer than {seconds:.0f} s")
        return self.connection.recv()

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.connection.close()
            self.process = None


def _serve(connection, setup: Callable) -> None:
    with setup() as given:
        connection.send(None)  # ready
        while True:
            function, arguments = connection.recv()
            result, error, alive = None, None, True
            try:
                result = function(*arguments) if given is None else function(given, *arguments)
            except Exception as raised:  # whatever it is, it is this job's result
                error, alive = f"{type(raised).__name__}: {str(raised).strip()[:300]}", _alive()
            connection.send((result, error, alive))


def _alive() -> bool:
    """Whether the GPU still takes work: after an illegal access a process has lost it."""
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
