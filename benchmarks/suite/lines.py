"""Pictures of lines, both axes logarithmic: panels side by side, as SVG that needs no script."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from markupsafe import Markup

from fastdmd.report.charts import Axis, show

Curve = Sequence[tuple[float, float]]  # positive x and y

WIDTH, HEIGHT, COLUMNS = 450, 300, 2  # of a panel, in units
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 48, 40  # its margins
LINE = 14  # of text
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


def picture(panels: Sequence[Panel]) -> str:
    """SVG. A colour is that of a name, in each panel. Raises ValueError for a panel without a point."""
    names = dict.fromkeys(name for panel in panels for name, curve in panel.curves.items() if curve)
    colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(names)}
    columns = min(COLUMNS, len(panels))
    parts = [
        Markup('<g transform="translate({} {})">{}</g>').format(
            WIDTH * (index % columns), HEIGHT * (index // columns), _panel(panel, colours)
        )
        for index, panel in enumerate(panels)
    ]
    width, height = WIDTH * columns, HEIGHT * -(-len(panels) // columns)
    svg = Markup('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {} {}" width="{}"><style>{}</style>{}{}</svg>\n')
    page = Markup('<rect class="page" width="100%" height="100%"/>')
    return str(svg.format(width, height, width, Markup(STYLE), page, Markup("\n").join(parts)))


def _panel(panel: Panel, colours: Mapping[str, str]) -> Markup:
    curves = {name: sorted(curve) for name, curve in panel.curves.items() if curve}
    if not curves:
        raise ValueError(f"benchmarks.lines: expected a point in {panel.title}, got none")
    xs = [x for curve in curves.values() for x, _ in curve]
    ys = [y for curve in curves.values() for _, y in curve] + list(panel.levels.values())
    across = _axis(xs, LEFT, WIDTH - RIGHT)
    up = _axis(ys, HEIGHT - BOTTOM, TOP)
    if len(whole := sorted(set(xs))) <= MOST_TICKS and all(float(x).is_integer() for x in whole):
        across = dataclasses.replace(across, ticks=whole)
    parts = [Markup('<text class="head" x="{}" y="16">{}</text>').format(LEFT, panel.title)]
    parts += [_across(tick, across) for tick in across.ticks]
    parts += [_up(tick, up) for tick in up.ticks]
    parts.append(
        Markup('<text x="{}" y="{}" text-anchor="end">{}</text>').format(WIDTH - RIGHT, HEIGHT - 8, panel.x_label)
    )
    for name, x in panel.marks.items():
        if across.least < x < across.greatest:
            parts.append(_mark(name, across.place(x)))
    for name, y in panel.levels.items():
        parts.append(_level(name, up.place(y)))
    for name, curve in curves.items():
        parts.append(_curve(name, [(across.place(x), up.place(y)) for x, y in curve], curve, colours[name]))
    parts.append(_legend([(name, colours[name]) for name in curves]))
    return Markup("").join(parts)


def _axis(values: Sequence[float], first: float, last: float) -> Axis:
    least, greatest = min(values), max(values)
    if greatest < 1.2 * least:  # nothing to spread over the whole axis
        least, greatest = least / 1.2, greatest * 1.2
    return Axis.logarithmic(least, greatest, first, last)


def _across(tick: float, across: Axis) -> Markup:
    place = across.place(tick)
    line = Markup('<path class="grid" d="M{} {}V{}"/>').format(place, TOP, HEIGHT - BOTTOM)
    label = Markup('<text class="tick" x="{}" y="{}" text-anchor="middle">{}</text>')
    return line + label.format(place, HEIGHT - BOTTOM + LINE, show(tick))


def _up(tick: float, up: Axis) -> Markup:
    place = up.place(tick)
    line = Markup('<path class="grid" d="M{} {}H{}"/>').format(LEFT, place, WIDTH - RIGHT)
    label = Markup('<text class="tick" x="{}" y="{}" text-anchor="end">{}</text>')
    return line + label.format(LEFT - 5, place + 3.5, show(tick))


def _mark(name: str, place: float) -> Markup:
    line = Markup('<path class="level" d="M{} {}V{}"/>').format(place, TOP, HEIGHT - BOTTOM)
    return line + Markup('<text class="tick" x="{}" y="{}">{}</text>').format(place + 3, HEIGHT - BOTTOM - 5, name)


def _level(name: str, place: float) -> Markup:
    line = Markup('<path class="level" d="M{} {}H{}"/>').format(LEFT, place, WIDTH - RIGHT)
    return line + Markup('<text class="tick" x="{}" y="{}">{}</text>').format(LEFT + 4, place - 4, name)


def _curve(name: str, places: Curve, curve: Curve, colour: str) -> Markup:
    path = "L".join(f"{x:g} {y:g}" for x, y in places)
    parts = [Markup('<path class="line" stroke="{}" d="M{}"/>').format(colour, path)]
    for (across, up), (x, y) in zip(places, curve, strict=True):
        dot = Markup('<circle fill="{}" cx="{}" cy="{}" r="2.6"><title>{}</title></circle>')
        parts.append(dot.format(colour, across, up, f"{name}: {show(y)} at {show(x)}"))
    return Markup("").join(parts)


def _legend(names: Sequence[tuple[str, str]]) -> Markup:
    """A line or two above the panel, as many names in each as there is room for."""
    parts, x, y = [], LEFT, 16 + LINE
    for name, colour in names:
        width = 24 + 6 * len(name)  # of letters of 11 pixels, roughly
        if x > LEFT and x + width > WIDTH:
            x, y = LEFT, y + LINE
        box = Markup('<rect x="{}" y="{}" width="10" height="3" fill="{}"/><text x="{}" y="{}">{}</text>')
        parts.append(box.format(x, y - 5, colour, x + 14, y, name))
        x += width
    return Markup("").join(parts)
