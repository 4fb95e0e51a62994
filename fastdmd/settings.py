"""What the fields of settings carry: bounds, as `Annotated[int, at_least(1, 10**9)]`, and how they become flags."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple, get_args, get_type_hints

try:
    from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes, Positional, Suppress, arg
except ModuleNotFoundError:  # commands alone need it; what they configure is also used without them
    FlagCreatePairsOff = OmitArgPrefixes = Positional = Suppress = None

    class arg(NamedTuple):
        name: str  # `check` reads it


__all__ = [
    "Bounds", "FlagCreatePairsOff", "OmitArgPrefixes", "Positional", "Suppress", "above", "arg", "at_least", "check",
    "within",
]  # fmt: skip


class Bounds(NamedTuple):
    """The values that a number may have, and what is expected of one that lies outside."""

    least: float
    greatest: float
    too_small: str
    too_great: str
    not_finite: str
    above: bool = False  # the least value itself is out
    below: bool = False  # the greatest one

    def fault(self, value: float) -> str | None:
        """What is expected instead of this value; None for a good one."""
        if isinstance(value, float) and not math.isfinite(value):
            return self.not_finite
        if value < self.least or (self.above and value == self.least):
            return self.too_small
        if value > self.greatest or (self.below and value == self.greatest):
            return self.too_great
        return None


def at_least(least: float, greatest: float) -> Bounds:
    """For counts. `greatest` is where a value stops making sense."""
    text = f">= {_show(least)}"
    return Bounds(least, greatest, text, f"<= {_show(greatest)}", f"{text} and finite")


def above(least: float, greatest: float) -> Bounds:
    """For what cannot be zero."""
    text = f"> {_show(least)} and finite"
    return Bounds(least, greatest, text, f"<= {_show(greatest)}", text, above=True)


def within(least: float, greatest: float, *, below: bool = False) -> Bounds:
    """`[least, greatest]`, or `[least, greatest)`."""
    text = f"in [{_show(least)}, {_show(greatest)}{')' if below else ']'}"
    return Bounds(least, greatest, text, text, text, below=below)


def check(settings: Any) -> None:
    """Raises ValueError for a field of a dataclass out of its bounds, naming the flag, what was expected and what came.

    None is in all bounds; the elements of a tuple have those of their field. Without any, numbers are finite; texts
    are not empty. Fields that are dataclasses are checked in their turn.
    """
    hints = get_type_hints(type(settings), include_extras=True)
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            check(value)
            continue
        metadata = list(_metadata(hints[field.name]))
        bounds = next((entry for entry in metadata if isinstance(entry, Bounds)), None)
        name = next((name for entry in metadata if (name := getattr(entry, "name", None))), field.name)
        for item in value if isinstance(value, tuple) else (value,):
            expected = _fault(item, bounds)
            if expected is not None:
                raise ValueError(f"expected --{name.replace('_', '-')} {expected}, got {value!r}")


def _metadata(hint: Any) -> Iterator[Any]:
    """Of an `Annotated` type, or of those in a union."""
    yield from getattr(hint, "__metadata__", ())
    for member in get_args(hint):
        yield from getattr(member, "__metadata__", ())


def _fault(value: Any, bounds: Bounds | None) -> str | None:
    if isinstance(value, str):
        return None if value else "not to be empty"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if bounds is not None:
        return bounds.fault(value)
    return None if isinstance(value, int) or math.isfinite(value) else "to be finite"


def _show(value: float) -> str:
    """`10^9`, `2^32`; anything else as it is written."""
    for base in (10, 2):
        power = round(math.log(value, base)) if value >= 10_000 else 0
        if power and base**power == value:
            return f"{base}^{power}"
    return f"{value:g}"
