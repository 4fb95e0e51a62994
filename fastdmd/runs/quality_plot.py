"""`quality.png`: the Fréchet distance of a run as it goes on, beside those of its teacher and of real images."""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastdmd.files import write_atomically
from fastdmd.runs.folder import PLOT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Curve = Sequence[tuple[int, float]]  # images seen, distance


def draw(path: Path, curves: Mapping[str, Curve], levels: Mapping[str, float], *, title: str) -> None:
    """A line for each curve over images seen, a horizontal one for each level; logarithmic where no distance is 0."""
    write_atomically(path, lambda file: _figure(curves, levels, title).savefig(file, format="png"))
    gc.collect()  # of its cycles: left to Python's own time, memory grew by 40 KB a plot


def _figure(curves: Mapping[str, Curve], levels: Mapping[str, float], title: str) -> Figure:
    # Half a second to import. A figure of its own, without pyplot, touches nothing that other threads may use.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")  # inches, 100 pixels each
    axes = figure.add_subplot(title=title, xlabel="images seen", ylabel="Fréchet distance")
    for name, curve in curves.items():
        axes.plot(*zip(*curve, strict=True), marker=".", label=name)
    for number, (name, level) in enumerate(levels.items()):
        axes.axhline(level, color="black", linestyle=("--", ":")[number % 2], label=name)
    distances = [distance for curve in curves.values() for _, distance in curve]
    if all(distance > 0 for distance in (*distances, *levels.values())):
        axes.set_yscale("log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return figure


def require() -> None:
    """Raises ValueError where nothing can be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(f"expected matplotlib for {PLOT}, got none; pip install matplotlib")
