"""What a command does before it imports torch, which takes seconds and reads the settings of its threads once."""

from __future__ import annotations

from fastdmd import interrupts


def prepare(command: str) -> None:
    """Signals end this process with one line from here on. For a command's own process alone."""
    interrupts.exit_on_signals(command)
