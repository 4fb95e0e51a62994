"""Curves as SVG: where points are, where ticks are, and what is left out."""

import math
import re

import pytest

from fastdmd.report.charts import (
    BOTTOM,
    HEIGHT,
    INSET,
    LEFT,
    MOST_POINTS,
    RIGHT,
    TOP,
    WIDTH,
    Axis,
    chart,
    show,
    thinned,
)

LOW, HIGH = HEIGHT - BOTTOM - INSET, TOP + INSET  # places of the least and the greatest value


def points(svg, style=0):
    (path,) = re.findall(rf'<path class="line s{style}" d="([^"]*)"', svg)
    return [(kind, float(x), float(y)) for kind, x, y in re.findall(r"([ML])([\d.]+) ([\d.]+)", path)]


def test_points_are_where_their_values_are():
    svg = chart("Loss", {"loss": [(0, 1.0), (50, 3.0), (100, 2.0)]}).svg
    middle = (LEFT + WIDTH - RIGHT) / 2
    assert points(svg) == [("M", LEFT, LOW), ("L", middle, HIGH), ("L", WIDTH - RIGHT, (LOW + HIGH) / 2)]


def test_great_ranges_are_logarithmic_and_say_so():
    drawn = chart("Loss", {"loss": [(0, 0.01), (50, 0.1), (100, 1.0)]})
    assert [y for _, _, y in points(drawn.svg)] == [LOW, (LOW + HIGH) / 2, HIGH] and drawn.note == "Logarithmic axis."
    assert chart("Rate", {"rate": [(0, 0.01), (100, 1.0)]}, from_zero=True).note == ""


def test_a_curve_is_broken_where_nothing_is_known():
    drawn = chart("Loss", {"loss": [(0, 1.0), (1, None), (2, 2.0), (3, 3.0)], "none": [(0, None)]})
    assert [kind for kind, *_ in points(drawn.svg)] == ["M", "M", "L"]
    assert drawn.legend == [("loss", 0)]
    assert "loss from 1 at iteration 0 to 3 at 3" in drawn.svg
    assert chart("Loss", {"loss": [(0, None)]}) is None and chart("Loss", {}) is None


def test_one_point_and_equal_points_are_drawn():
    for values in ([(5, 2.0)], [(5, 0.0), (6, 0.0)], [(0, 1e-300), (0, 1e-300)], [(0, -5.0), (9, -5.0)]):
        svg = chart("Loss", {"loss": values}, marked=True).svg
        numbers = [float(number) for _, *pair in points(svg) for number in pair]
        assert all(0 <= number <= WIDTH for number in numbers) and svg.count("<circle") == len(values)


def test_levels_count_and_names_are_escaped():
    name = '<script>"&'
    svg = chart(name, {name: [(0, 1.0), (1, 2.0)], "b": [(0, 1.5)]}, levels={name: 4.0}, marked=True).svg
    assert "<script>" not in svg and "&lt;script&gt;&#34;&amp; 4</text>" in svg
    assert points(svg)[1][2] > HIGH  # the level is above all


def test_steps_are_whole_numbers():
    svg = chart("Distance", {"student": [(1, 3.0), (2, 2.0), (4, 1.0)]}, x_label="steps").svg
    assert re.findall(r'text-anchor="(?:middle|end)">([^<]*)</text>', svg)[-3:] == ["1", "2", "4"]


def test_many_points_become_means():
    many = [(x, float(x % 2)) for x in range(10 * MOST_POINTS)]
    few = thinned(many)
    assert len(few) == MOST_POINTS and few[0] == (9, 0.5) and few[-1] == (10 * MOST_POINTS - 1, 0.5)
    assert thinned([(x, None) for x in range(MOST_POINTS + 1)])[0] == (1, None)
    assert thinned(many[:5]) == many[:5]


@pytest.mark.parametrize(
    ("least", "greatest", "ticks"),
    [
        (0, 100, [0, 50, 100]),
        (0, 2400, [0, 1000, 2000]),
        (-0.3, 0.5, [-0.2, 0, 0.2, 0.4]),
        (3, 3, [2, 3, 4]),
        (0, 1e6, [0, 5e5, 1e6]),
    ],
)
def test_linear_ticks_are_round(least, greatest, ticks):
    assert Axis.linear(least, greatest, 0, 1).ticks == pytest.approx(ticks)


@pytest.mark.parametrize(
    ("least", "greatest", "ticks"),
    [
        (0.01, 1, [0.01, 0.1, 1]),
        (0.3, 0.9, [0.5]),
        (1.5, 30, [2, 5, 10, 20]),
        (1e-12, 1, [10.0**power for power in range(-12, 1, 2)]),
    ],
)
def test_logarithmic_ticks_are_powers(least, greatest, ticks):
    found = Axis.logarithmic(least, greatest, 0, 1)
    assert found.ticks == pytest.approx(ticks)
    assert found.place(math.sqrt(least * greatest)) == 0.5


def test_numbers_are_short():
    assert [show(value) for value in (0.17379, 2400, 12345, 7e5, 1.5e6, 2.5e9, -0.001, 0)] == [
        "0.1738", "2400", "12.35k", "700k", "1.5M", "2.5G", "-0.001", "0",
    ]  # fmt: skip
