"""A process that works for this one: what hangs or breaks its GPU costs one job, and the next finds a fresh process."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable

import torch

START_SECONDS = 60


class Worker:
    """Calls functions in a process that has run `setup`, a context manager, before; starts it when it is needed."""

    def __init__(self, setup: Callable):
        self.setup, self.process = setup, None

    def __call__(self, function: Callable, *arguments, seconds: float):
        """The result of the function. Raises RuntimeError with its error, or if it takes longer than that."""
        try:
            if self.process is None:
                self._start()
            self.connection.send((function, arguments))
            result, error, alive = self._receive(seconds)
        except (EOFError, OSError, TimeoutError) as lost:
            self.close()
            raise RuntimeError(str(lost) or "its process died") from lost
        if not alive:
            self.close()
        if error is not None:
            raise RuntimeError(error)
        return result

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # CUDA survives no fork
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, self.setup), daemon=True)
        self.process.start()
        other.close()
        self._receive(START_SECONDS)

    def _receive(self, seconds: float):
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
    with setup():
        connection.send(None)  # ready
        while True:
            function, arguments = connection.recv()
            result, error, alive = None, None, True
            try:
                result = function(*arguments)
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
