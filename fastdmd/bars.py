"""How far something has come and when it will be done: a bar that moves or, where nothing can, a line now and then."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

LINE_SECONDS = 30.0  # between lines in a file or a pipe; of a bar that does not stay, until there is one
UP = "\x1b[A"  # how tqdm comes back from a bar inside of another


def bar(steps: Iterable[Any] | None = None, **options: Any) -> tqdm:
    """tqdm's, as wide as the terminal, on stderr; in a file or a pipe without its carriage returns, in whole lines."""
    if sys.stderr.isatty() or "ipykernel" in sys.modules:  # a notebook moves, too, and says that it is no terminal
        return tqdm(steps, dynamic_ncols=True, **options)
    rarely = {"mininterval": LINE_SECONDS, "maxinterval": LINE_SECONDS}
    if not options.get("leave", True):
        rarely["delay"] = LINE_SECONDS
    return tqdm(steps, file=_Lines(sys.stderr), **rarely, **options)


class _Lines:
    """A text stream on which each state of a bar is a line of its own."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        if state := text.replace(UP, "").strip():
            self._stream.write(f"{state}\n")
        return len(text)
