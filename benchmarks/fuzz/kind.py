"""What a kind of input is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of input, in a folder of its own; `named` is what a user would name of it."""

    name: str
    make: Callable[[Path], Any]  # writes a good one into the folder
    named: str  # a file or a folder in it, "" for the folder
    read: Callable[[Path], Any]  # what is named, to a value
    right: Callable[[Path], Any]
    is_command: bool = False  # `read` makes a line of an error by itself
    goes_on: bool = False  # what is accepted may be another one afterwards
    command: tuple[str, ...] = ()  # of the command line that reads it, with {} for what is named and {out} for a result
