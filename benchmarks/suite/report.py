"""What was measured, as a page in Markdown and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from markupsafe import Markup

from benchmarks.suite.compare import Comparison
from benchmarks.suite.rows import Row, is_measured
from benchmarks.suite.stored import Stored
from fastdmd.report.charts import Axis, show

Comparisons = Mapping[str, Comparison]  # by the name of the result

WIDTH, LABELS, MARGIN, ROW, HEAD = 900, 430, 60, 15, 40  # of the picture, in units
STYLE = """
text { font: 11px sans-serif; fill: #24292f } .head { font-weight: bold } .tick { fill: #6e7781 }
.bar { fill: #4c78a8 } .grid { stroke: #d0d7de } .one { stroke: #6e7781 } .before { stroke: #e45756; stroke-width: 2 }
.page { fill: #ffffff }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } .grid { stroke: #30363d } .page { fill: #0d1117 } }
"""


def markdown(results: Sequence[Stored], comparisons: Comparisons, drawn: str | None = None) -> str:
    """A section for each result, a line for each figure, and what is told of it; `drawn` is the file of the
    picture, beside which those of `curves` lie."""
    parts = ["# Benchmarks", "Made by `python -m benchmarks`. `×` says how many times as good a figure is."]
    parts += [f"![The same as bars, from 1 to how many times as good]({drawn})"] if drawn else []
    for stored in results:
        comparison = comparisons.get(stored.path.stem)
        extra = " ".join(stored.extra)
        measures = stored.benchmark.measures + (f", with {extra}" if extra else "")
        parts.append(f"## {stored.path.stem}\n\nOf {measures}; {stored.came_from}.")
        yardsticks = dict.fromkeys(row.yardstick for row in stored.rows if row.ratio is not None)
        heads = ["", "measured", f"× {' or '.join(yardsticks)}" if yardsticks else ""]
        parts.append(table([*heads, *([f"× {comparison.other}"] if comparison else [])], lines(stored, comparison)))
        if drawn and stored.benchmark.drawn:
            parts.append(f"![Curves of {stored.path.stem}]({stored.path.stem}.svg)")
        parts += [stored.benchmark.told(stored.result)] if stored.benchmark.told else []
    return "\n\n".join(parts) + "\n"


def curves(results: Sequence[Stored]) -> dict[str, str]:
    """SVG by the name of its file, of each result that is drawn in a picture of its own."""
    return {f"{one.path.stem}.svg": one.benchmark.drawn(one.result) for one in results if one.benchmark.drawn}


def lines(stored: Stored, comparison: Comparison | None) -> list[list[str]]:
    cells = []
    for row in stored.rows:
        ratio = f"{row.ratio:.2f}" if is_measured(row.ratio) else ""
        times = [f"{comparison.times[row.label]:.2f}" if row.label in comparison.times else ""] if comparison else []
        cells.append([row.label, f"{show(row.value)} {row.unit}".strip(), ratio, *times])
    for label in comparison.missing if comparison else ():
        cells.append([label, "none", "", "gone"])
    return cells


def table(heads: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    head, *body = ["|" + "|".join(f" {cell} " if cell else " " for cell in line) + "|" for line in (heads, *cells)]
    return "\n".join([head, "|" + "---|" * len(heads), *body])


def picture(results: Sequence[Stored], comparisons: Comparisons) -> str:
    """SVG: a bar for each figure from 1 to its ratio, on a logarithmic axis; a mark where it was before. Without what
    has a picture of its own."""
    barred = [stored for stored in results if not stored.benchmark.drawn]
    bars = [(stored, [row for row in stored.rows if is_measured(row.ratio)]) for stored in barred]
    names = {stored.path.stem for stored in barred}
    before = {name: comparison.before for name, comparison in comparisons.items() if name in names}
    ratios = [1.0, *(row.ratio for _, rows in bars for row in rows)]
    ratios += [row.ratio for rows in before.values() for row in rows.values() if is_measured(row.ratio)]
    across = Axis.logarithmic(min(*ratios, 0.9), max(*ratios, 1.1), LABELS, WIDTH - MARGIN)
    parts, y = [], 0
    for stored, rows in bars:
        if not rows:
            continue
        y += HEAD
        yardsticks = " or ".join(dict.fromkeys(row.yardstick for row in rows))
        head = f"{stored.path.stem}: times as good as {yardsticks} ({stored.came_from})"
        parts.append(Markup('<text class="head" x="8" y="{}">{}</text>').format(y, head))
        for row in rows:
            y += ROW
            parts.append(_bar(row, before.get(stored.path.stem, {}).get(row.label), across, y))
    return _page(parts, across, y + HEAD)


def _bar(row: Row, before: Row | None, across: Axis, y: int) -> Markup:
    left, right = sorted((across.place(1.0), across.place(row.ratio)))
    part = Markup(
        '<text x="{}" y="{}" text-anchor="end">{}</text><rect class="bar" x="{}" y="{}" width="{:g}" height="{}"/>'
        '<text x="{}" y="{}">{}</text>'
    ).format(LABELS - 8, y, row.label, left, y - 9, round(right - left, 1), ROW - 4, right + 5, y, f"{row.ratio:.2f}")
    if before is None or not is_measured(before.ratio):
        return part
    return part + Markup('<path class="before" d="M{} {}v{}"/>').format(across.place(before.ratio), y - 11, ROW - 1)


def _page(parts: Sequence[Markup], across: Axis, height: int) -> str:
    grid = [Markup('<path class="one" d="M{} {}V{}"/>').format(across.place(1.0), 20, height - 20)]
    for tick in across.ticks:
        place = across.place(tick)
        label = Markup('<text class="tick" x="{}" y="{}" text-anchor="middle">{}</text>')
        grid.append(Markup('<path class="grid" d="M{} 20V{}"/>').format(place, height - 20))
        grid.append(label.format(place, height - 6, show(tick)))
    svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {} {}" width="{}"><style>{}</style>{}</svg>\n'
    page = Markup('<rect class="page" width="100%" height="100%"/>') + Markup("\n").join([*grid, *parts])
    return str(Markup(svg).format(WIDTH, height, WIDTH, Markup(STYLE), page))
