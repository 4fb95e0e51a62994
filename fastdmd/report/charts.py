"""Curves as SVG that needs no script: its colours are the page's, in light and in the dark."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup

Points = Sequence[tuple[float, float | None]]

WIDTH, HEIGHT = 360, 210  # of the drawing, in units; a phone is 375 pixels wide
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 24  # margins
INSET = 6  # of the least and the greatest value
MOST_POINTS = 240  # of a curve: more are averaged
NUM_STYLES = 6  # that style.css has, .s0 to .s5
ITERATION = "iteration"
LOGARITHMIC_FROM = 20  # times as great as the least: from there on the axis is logarithmic


@dataclasses.dataclass(frozen=True)
class Chart:
    """A picture and what stands beneath it."""

    title: str
    svg: Markup
    legend: Sequence[tuple[str, int]]  # names of the curves, and their styles; empty where there is but one
    note: str = ""


def chart(
    title: str,
    curves: Mapping[str, Points],
    *,
    levels: Mapping[str, float] | None = None,
    x_label: str = ITERATION,
    note: str = "",
    marked: bool = False,
    from_zero: bool = False,
) -> Chart | None:
    """A line for each curve, a dashed horizontal one for each level; None where there is no point to draw.

    `marked`: each point is a dot that tells its value. The axis is logarithmic where values differ by much, but where
    it begins `from_zero`.
    """
    levels = levels or {}
    styles = {name: index % NUM_STYLES for index, name in enumerate(curves)}  # the same in each chart of a page
    is_named = len(curves) > 1
    curves = {name: points for name, points in curves.items() if any(y is not None for _, y in points)}
    if not curves:
        return None
    ys = [y for points in curves.values() for _, y in points if y is not None] + list(levels.values())
    xs = [x for points in curves.values() for x, _ in points]
    across = Axis.linear(0.0 if x_label == ITERATION else min(xs), max(xs), LEFT, WIDTH - RIGHT)
    if x_label != ITERATION:  # a few whole numbers
        across = dataclasses.replace(across, ticks=sorted(set(xs)))
    ys += [0.0] * from_zero
    is_logarithmic = min(ys) > 0 and max(ys) / min(ys) >= LOGARITHMIC_FROM
    up = (Axis.logarithmic if is_logarithmic else Axis.linear)(
        min(ys), max(ys), HEIGHT - BOTTOM - INSET * (not from_zero), TOP + INSET
    )
    parts = [_frame(across, up)]
    for name, level in levels.items():
        parts.append(_level(name, level, up))
    for name, points in curves.items():
        parts.append(_line(points, across, up, styles[name]))
        if marked:
            parts.extend(_dot(name, x, y, across, up, styles[name]) for x, y in points if y is not None)
    described = "; ".join(_described(name, points, x_label) for name, points in curves.items())
    described += "".join(f"; {name} at {show(level)}" for name, level in levels.items())
    svg = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, f"{title}: {described}", Markup("").join(parts)
    )
    legend = [(name, styles[name]) for name in curves] if is_named else []
    return Chart(title, svg, legend, " ".join([note, "Logarithmic axis."] if is_logarithmic else [note]).strip())


@dataclasses.dataclass(frozen=True)
class Axis:
    """From values to places, and where its ticks are."""

    ticks: Sequence[float]
    least: float
    greatest: float
    first: float  # place of the least
    last: float
    is_logarithmic: bool = False

    @classmethod
    def linear(cls, least: float, greatest: float, first: float, last: float) -> Axis:
        """With ticks at 1, 2 or 5 times a power of ten."""
        if least == greatest:
            room = abs(least) / 2 or 0.5
            least, greatest = least - room, greatest + room
        rough = (greatest - least) / 4
        power = 10.0 ** math.floor(math.log10(rough))
        step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
        ticks = [step * count for count in range(math.ceil(least / step), math.floor(greatest / step) + 1)]
        return cls(ticks, least, greatest, first, last)

    @classmethod
    def logarithmic(cls, least: float, greatest: float, first: float, last: float) -> Axis:
        """Of positive values, with ticks at powers of ten; as many as are readable."""
        powers = range(math.floor(math.log10(least)), math.ceil(math.log10(greatest)) + 1)
        every = max(1, len(powers) // 5)
        ticks = [10.0**power for power in powers if power % every == 0 and least <= 10.0**power <= greatest]
        if len(ticks) < 2:
            ticks = [f * 10.0**power for power in powers for f in (1, 2, 5) if least <= f * 10.0**power <= greatest]
        return cls(ticks, least, greatest, first, last, is_logarithmic=True)

    def place(self, value: float) -> float:
        low, high = (math.log(v) if self.is_logarithmic else v for v in (self.least, self.greatest))
        share = ((math.log(value) if self.is_logarithmic else value) - low) / (high - low)
        return round(self.first + share * (self.last - self.first), 1)


def show(value: float) -> str:
    """A number as a reader wants it: four digits, thousands as k, millions as M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            unit = 1e3 if letter == "k" else size
            return f"{value / unit:.4g}{letter}"
    return f"{value:.4g}"


def _frame(across: Axis, up: Axis) -> Markup:
    lines = [
        Markup('<path class="grid" d="M{} {}H{}"/><text class="tick" x="{}" y="{}" text-anchor="end">{}</text>').format(
            LEFT, up.place(tick), WIDTH - RIGHT, LEFT - 5, up.place(tick) + 3.5, show(tick)
        )
        for tick in up.ticks
    ]
    for tick in across.ticks:
        place = across.place(tick)
        anchor = "end" if place > WIDTH - RIGHT - 16 else "middle"
        lines.append(
            Markup('<text class="tick" x="{}" y="{}" text-anchor="{}">{}</text>').format(
                place, HEIGHT - BOTTOM + 14, anchor, show(tick)
            )
        )
    lines.append(Markup('<path class="axis" d="M{} {}H{}"/>').format(LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT))
    return Markup("").join(lines)


def _level(name: str, level: float, up: Axis) -> Markup:
    y = up.place(level)
    return Markup(
        '<path class="level" d="M{} {}H{}"/><text class="name" x="{}" y="{}" text-anchor="end">{}</text>'
    ).format(LEFT, y, WIDTH - RIGHT, WIDTH - RIGHT, y - 4 if y > TOP + 12 else y + 12, f"{name} {show(level)}")


def _line(points: Points, across: Axis, up: Axis, style: int) -> Markup:
    """Broken where a value is not known."""
    commands = []
    is_down = False
    for x, y in thinned(points):
        if y is None:
            is_down = False
            continue
        commands.append(f"{'L' if is_down else 'M'}{across.place(x):g} {up.place(y):g}")
        is_down = True
    return Markup('<path class="line s{}" d="{}"/>').format(style, "".join(commands))


def _dot(name: str, x: float, y: float, across: Axis, up: Axis, style: int) -> Markup:
    circle = Markup('<circle class="dot s{}" cx="{}" cy="{}" r="2.6"><title>{}</title></circle>')
    return circle.format(style, across.place(x), up.place(y), f"{name}: {show(y)} at {show(x)}")


def thinned(points: Points) -> Points:
    """At most MOST_POINTS: means of as many neighbours each as there have to be."""
    size = -(-len(points) // MOST_POINTS)
    if size <= 1:
        return points
    means: list[tuple[float, float | None]] = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        known = [y for _, y in part if y is not None]
        means.append((part[-1][0], sum(known) / len(known) if known else None))
    return means


def _described(name: str, points: Points, x_label: str) -> str:
    known = [(x, y) for x, y in points if y is not None]
    (first, begin), (last, end) = known[0], known[-1]
    if len(known) == 1:
        return f"{name} {show(begin)} at {x_label} {show(first)}"
    return f"{name} from {show(begin)} at {x_label} {show(first)} to {show(end)} at {show(last)}"
