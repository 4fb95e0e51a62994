"""What tyro says of a command line that it cannot parse, a box of many lines, as one line."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import TypeVar

Parsed = TypeVar("Parsed")
RULE = "─"  # between the parts of a box, the first of which says what is wrong
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
    else:
        sys.stderr.write(said.getvalue())
        return result
    with _unwrapped(), contextlib.redirect_stderr(said := io.StringIO()), contextlib.suppress(SystemExit):
        parse()
    raise ValueError(f"expected arguments as --help lists them, got: {in_one_line(said.getvalue())}")


def in_one_line(box: str) -> str:
    """The first part of a box, and the first name that it suggests instead."""
    lines = [line.strip(" │") for line in box.splitlines() if line.startswith("│")]
    ends = [index for index, line in enumerate(lines) if line.startswith(RULE)]
    text = " ".join(lines[: ends[0] if ends else len(lines)])
    if suggested := [lines[index + 1] for index, line in enumerate(lines[:-1]) if line.startswith(SIMILAR)]:
        text += f" ({SIMILAR.lower()} {suggested[0]}?)"
    return re.sub(r"\[/?bold\]", "", " ".join(text.split()))[:MAX_SHOWN]


@contextlib.contextmanager
def _unwrapped() -> Iterator[None]:
    """Inside, no text is laid out in several lines."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "10000"
    try:
        yield
    finally:
        del os.environ["COLUMNS"]
        if before is not None:
            os.environ["COLUMNS"] = before
