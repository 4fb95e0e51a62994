"""What the fields of settings carry: bounds, as `Annotated[int, at_least(1, 10**9)]`, and how they become flags."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, NoReturn, get_args, get_type_hints

if TYPE_CHECKING:
    from typing_extensions import Self

try:
    from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes, Positional, Suppress, arg
    from tyro.constructors import PrimitiveConstructorSpec
except ModuleNotFoundError:  # commands alone need it; what they configure is also used without them
    PrimitiveConstructorSpec = None  # type: ignore[assignment, misc]
    FlagCreatePairsOff = OmitArgPrefixes = Positional = Suppress = None

    class arg(NamedTuple):  # type: ignore[no-redef]
        name: str | None = None  # `check` reads it
        aliases: tuple[str, ...] = ()


__all__ = [
    "Bounds",
    "Input",
    "OmitArgPrefixes",
    "Positional",
    "Settings",
    "Suppress",
    "Switch",
    "above",
    "arg",
    "at_least",
    "check",
    "commas",
    "fail",
    "flags",
    "inputs",
    "within",
]

Switch = Annotated[bool, FlagCreatePairsOff]  # a flag without a value, and without a --no-flag beside it


class Input:
    """Marks a field that names what is read: `Annotated[str, Input]`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What a user can turn of one room; rooms nest in the configuration of a command."""

    def check(self) -> None:
        """Raises ValueError for a value that cannot be, naming the flag, what was expected and what came."""
        check(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Raises ValueError for a pickle with other fields: those that it lacks would be defaults, unnoticed."""
        if others := state.keys() ^ {field.name for field in dataclasses.fields(self)}:
            raise ValueError(
                f"fastdmd.{type(self).__name__}: expected settings of this version, got a pickle that differs in "
                f"{', '.join(sorted(others))}"
            )
        vars(self).update(state)

    def replace(self, **changes: Any) -> Self:
        """With other values, by the names of their flags, in whatever room: `config.replace(data="d", beta1=0.5)`.

        A room whole, by the name of its field: `config.replace(data=DataSettings(path="d"), beta1=0.5)`. Raises
        TypeError for a name that is neither.
        """
        left = dict(changes)
        replaced = _replaced(self, left)
        if left:
            raise TypeError(f"fastdmd.{type(self).__name__}: expected names of its settings, got {', '.join(left)}")
        return replaced


def inputs(settings: Any) -> Iterator[str | Path]:
    """The values of all fields marked as `Input`, in every room, where there are any."""
    hints = get_type_hints(type(settings), include_extras=True)
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            yield from inputs(value)
        elif value is not None and Input in _metadata(hints[field.name]):
            yield value


def flags(settings: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Every field, by the names that lead to it from room to room, and its flag."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            yield from flags(value, (*place, field.name))
        else:
            yield (*place, field.name), f"--{_flag(settings, field.name)}"


def fail(settings: Any, name: str, expected: str) -> NoReturn:
    """Raises ValueError for the field `name`, under its flag."""
    raise ValueError(f"expected --{_flag(settings, name)} {expected}, got {getattr(settings, name)}")


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


def commas() -> Any:
    """For a tuple of numbers, or None: one text on the command line, `80,24.4,5.8`."""
    if PrimitiveConstructorSpec is None:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="FLOAT,FLOAT,...",
        instance_from_str=lambda words: None if words == ["None"] else tuple(map(float, words[0].split(","))),
        is_instance=lambda value: value is None or isinstance(value, tuple),
        str_from_instance=lambda value: ["None" if value is None else ",".join(map(str, value))],
    )


def check(settings: Any) -> None:
    """Raises ValueError for a field of a dataclass out of its bounds, naming the flag, what was expected and what came.

    None is in all bounds; the elements of a tuple have those of their field. Without any, numbers are finite; texts
    are not empty. Fields that are dataclasses are checked in their turn.
    """
    hints = get_type_hints(type(settings), include_extras=True)
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if isinstance(value, Settings):
            value.check()
            continue
        if dataclasses.is_dataclass(value):
            check(value)
            continue
        bounds = next((entry for entry in _metadata(hints[field.name]) if isinstance(entry, Bounds)), None)
        for item in value if isinstance(value, tuple) else (value,):
            expected = _fault(item, bounds)
            if expected is not None:
                raise ValueError(f"expected --{_flag(settings, field.name)} {expected}, got {value!r}")


def _replaced(settings: Any, changes: dict[str, Any]) -> Any:
    """Takes those of the changes that it knows."""
    values = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            if dataclasses.is_dataclass(changes.get(field.name)):
                value = changes.pop(field.name)
            values[field.name] = _replaced(value, changes)
            continue
        for flag in _flags(settings, field.name):
            if flag in changes:
                values[field.name] = changes.pop(flag)
    return dataclasses.replace(settings, **values)


def _flag(settings: Any, name: str) -> str:
    """The name of a field as a flag, which its annotation may say."""
    return _flags(settings, name)[0].replace("_", "-")


def _flags(settings: Any, name: str) -> list[str]:
    """All of its names, as identifiers."""
    metadata = list(_metadata(get_type_hints(type(settings), include_extras=True)[name]))
    named = next((found for entry in metadata if (found := getattr(entry, "name", None))), name)
    aliases = next((found for entry in metadata if (found := getattr(entry, "aliases", None))), ())
    return [flag.lstrip("-").replace("-", "_") for flag in (named, *aliases)]


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
