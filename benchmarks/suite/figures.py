"""How numbers are written in prose and tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable


def digits(value: float, count: int = 3) -> str:
    """A number with so many digits: 0.63, 31.7, 40,400."""
    rounded = float(f"{value:.{count - 1}e}")
    places = max(0, count - 1 - math.floor(math.log10(abs(rounded))))
    return f"{rounded:,.{places}f}"


def span(values: Iterable[float], form: Callable[[float], str]) -> str:
    """From the least to the greatest, or what both are."""
    ordered = sorted(values)
    return " to ".join(dict.fromkeys([form(ordered[0]), form(ordered[-1])]))
