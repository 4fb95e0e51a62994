"""Pictures of lines, both axes logarithmic: panels side by side, as SVG that needs no script."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup

from fastdmd.report.charts import Axis, show

Curve = Sequence[tuple[float, float]]  # positive x and y

WIDTH, HEIGHT, COLUMNS = 450, 300, 2  # of a panel, in units
LEFT, RIGHT, BOTTOM = 52, 14, 40  # its margins, but for the upper one
HEAD, LINE = 16, 14  # baseline of the title, and from there to each line of names
MOST_TICKS = 12  # that whole numbers get, one each
COLOURS = ("#4c78a8", "#e45756", "#54a24b", "#b279a2", "#f58518", "#9d755d")
STYLE = """
text { font: 11px sans-serif; fill: #24292f } .head { font-weight: bold } .tick { fill: #6e7781 }
.grid { stroke: #d0d7de } .level { stroke: #6e7781; stroke-dasharray: 2 3 } .page { fill: #ffffff }
.line { fill: none; stroke-width: 1.7; stroke-linejoin: round }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } .grid { stroke: #30363d } .page { fill: #0d1117 } }
"""


@dataclasses.dataclass(frozen=True)
class Panel:
    """What one picture shows; of a curve without points there is nothing, and no name."""

    title: str
    x_label: str
    curves: Mapping[str, Curve]
    levels: Mapping[str, float] = dataclasses.field(default_factory=dict)  # values of y, by their names
    marks: Mapping[str, float] = dataclasses.field(default_factory=dict)  # of x; those beyond the curves are left out


@dataclasses.dataclass(frozen=True)
class Frame:
    """Where the curves of a panel are, in its units."""

    top: int
    right: int
    bottom: int


def picture(panels: Sequence[Panel], width: int = WIDTH, height: int = HEIGHT) -> str:
    """SVG, each panel of this size. A colour is that of a name, in each. Raises ValueError for one without a point."""
    names = dict.fromkeys(name for panel in panels for name, curve in panel.curves.items() if curve)
    colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(names)}
    columns = min(COLUMNS, len(panels))
    parts = [
        Markup('<g transform="translate({} {})">{}</g>').format(
            width * (index % columns), height * (index // columns), _panel(panel, colours, width, height)
        )
        for index, panel in enumerate(panels)
    ]
    whole = width * columns, height * -(-len(panels) // columns)
    svg = Markup('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {} {}" width="{}"><style>{}</style>{}{}</svg>\n')
    page = Markup('<rect class="page" width="100%" height="100%"/>')
    return str(svg.format(*whole, whole[0], Markup(STYLE), page, Markup("\n").join(parts)))


def _panel(panel: Panel, colours: Mapping[str, str], width: int, height: int) -> Markup:
    curves = {name: sorted(curve) for name, curve in panel.curves.items() if curve}
    if not curves:
        raise ValueError(f"benchmarks.lines: expected a point in {panel.title}, got none")
    legend, last = _legend({name: colours[name] for name in curves}, width)
    frame = Frame(last + LINE, width - RIGHT, height - BOTTOM)
    xs = [x for curve in curves.values() for x, _ in curve]
    up = _axis([y for curve in curves.values() for _, y in curve] + [*panel.levels.values()], frame.bottom, frame.top)
    across = _axis(xs, LEFT, frame.right)
    if 2 <= len(whole := sorted(set(xs))) <= MOST_TICKS and all(float(x).is_integer() for x in whole):
        across = Axis(whole, whole[0], whole[-1], LEFT, frame.right, is_logarithmic=True)
    parts = [Markup('<text class="head" x="{}" y="{}">{}</text>').format(LEFT, HEAD, panel.title), legend]
    parts += [_across(tick, across, frame) for tick in across.ticks]
    parts += [_up(tick, up, frame) for tick in up.ticks]
    parts.append(
        Markup('<text x="{}" y="{}" text-anchor="end">{}</text>').format(frame.right, height - 8, panel.x_label)
    )
    parts += [
        _mark(name, across.place(x), frame) for name, x in panel.marks.items() if across.least < x < across.greatest
    ]
    parts += [_level(name, up.place(y), frame) for name, y in panel.levels.items()]
    for name, curve in curves.items():
        parts.append(_curve(name, [(across.place(x), up.place(y)) for x, y in curve], curve, colours[name]))
    return Markup("").join(parts)


def _axis(values: Sequence[float], first: float, last: float) -> Axis:
    """From the last of 1, 2, 5, 10, ... that is no greater than any value, to the first that is no less."""
    powers = range(math.floor(math.log10(min(values))), math.ceil(math.log10(max(values))) + 1)
    steps = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    least = max(step for step in steps if step <= min(values) * (1 + 1e-9))
    greatest = min(step for step in steps if step >= max(values) * (1 - 1e-9))
    if least == greatest:
        least, greatest = least / 2, greatest * 2
    return Axis.logarithmic(least, greatest, first, last)


def _across(tick: float, across: Axis, frame: Frame) -> Markup:
    place = across.place(tick)
    line = Markup('<path class="grid" d="M{} {}V{}"/>').format(place, frame.top, frame.bottom)
    label = Markup('<text class="tick" x="{}" y="{}" text-anchor="middle">{}</text>')
    return line + label.format(place, frame.bottom + LINE, show(tick))


def _up(tick: float, up: Axis, frame: Frame) -> Markup:
    place = up.place(tick)
    line = Markup('<path class="grid" d="M{} {}H{}"/>').format(LEFT, place, frame.right)
    label = Markup('<text class="tick" x="{}" y="{}" text-anchor="end">{}</text>')
    return line + label.format(LEFT - 5, place + 3.5, show(tick))


def _mark(name: str, place: float, frame: Frame) -> Markup:
    line = Markup('<path class="level" d="M{} {}V{}"/>').format(place, frame.top, frame.bottom)
    return line + Markup('<text class="tick" x="{}" y="{}">{}</text>').format(place + 3, frame.bottom - 5, name)


def _level(name: str, place: float, frame: Frame) -> Markup:
    line = Markup('<path class="level" d="M{} {}H{}"/>').format(LEFT, place, frame.right)
    return line + Markup('<text class="tick" x="{}" y="{}">{}</text>').format(LEFT + 4, place - 4, name)


def _curve(name: str, places: Curve, curve: Curve, colour: str) -> Markup:
    path = "L".join(f"{x:g} {y:g}" for x, y in places)
    parts = [Markup('<path class="line" stroke="{}" d="M{}"/>').format(colour, path)]
    for (across, up), (x, y) in zip(places, curve, strict=True):
        dot = Markup('<circle fill="{}" cx="{}" cy="{}" r="2.6"><title>{}</title></circle>')
        parts.append(dot.format(colour, across, up, f"{name}: {show(y)} at {show(x)}"))
    return Markup("").join(parts)


def _legend(colours: Mapping[str, str], width: int) -> tuple[Markup, int]:
    """Lines below the title, as many names in each as there is room for; and where the last one is."""
    parts, x, y = [], LEFT, HEAD + LINE
    for name, colour in colours.items():
        taken = 24 + 6 * len(name)  # by letters of 11 pixels, roughly
        if x > LEFT and x + taken > width:
            x, y = LEFT, y + LINE
        box = Markup('<rect x="{}" y="{}" width="10" height="3" fill="{}"/><text x="{}" y="{}">{}</text>')
        parts.append(box.format(x, y - 5, colour, x + 14, y, name))
        x += taken
    return Markup("").join(parts), y
