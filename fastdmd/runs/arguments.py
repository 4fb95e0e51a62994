"""What tyro says of a command line that it cannot parse, a box of many lines, as one line."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Callable
from typing import TypeVar

Parsed = TypeVar("Parsed")
COLOURS = re.compile(r"\x1b\[[0-9;]*m|\[/?bold\]")
SIMILAR = "Perhaps you meant"
MAX_SHOWN = 400  # characters


def parsed(parse: Callable[[], Parsed]) -> Parsed:
    """What `parse` returns. Raises ValueError, one line long, where it finds arguments wrong and exits with 2."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            result = parse()
    except SystemExit as stop:
        if stop.code != 2:
            sys.stderr.write(said.getvalue())
            raise
        text = in_one_line(said.getvalue())
        raise ValueError(f"expected arguments as --help lists them, got: {text}") from stop
    sys.stderr.write(said.getvalue())
    return result


def in_one_line(box: str) -> str:
    """The first part of a box, which says what is wrong, and the first name that it suggests instead.

    Parts end with a rule. Where the terminal knows no other characters, the box has a title with a rule instead of a
    frame.
    """
    has_frame = "╭" in box
    lines = [line.strip(" │|") for line in COLOURS.sub("", box).splitlines() if not line.startswith(("╭", "╰"))]
    if not has_frame:
        lines = lines[2:]
    ends = [index for index, line in enumerate(lines) if line and not line.strip("─-")]
    text = " ".join(lines[: ends[0] if ends else len(lines)])
    if suggested := [lines[index + 1] for index, line in enumerate(lines[:-1]) if line.startswith(SIMILAR)]:
        text += f" ({SIMILAR.lower()} {suggested[0]}?)"
    return " ".join(text.split())[:MAX_SHOWN]
