"""`quality.png`: the Fréchet distance of a run as it goes on, beside those of its teacher and of real images."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

from fastdmd.files import write_atomically
from fastdmd.runs.folder import PLOT

Curve = Sequence[tuple[int, float]]  # images seen, distance


def draw(path: Path, curves: Mapping[str, Curve], levels: Mapping[str, float], *, title: str) -> None:
    """A line for each curve over images seen, a horizontal one for each level; logarithmic where no distance is 0."""
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
    write_atomically(path, lambda file: figure.savefig(file, format="png"))


def require() -> None:
    """Raises ValueError where nothing can be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(f"expected matplotlib for {PLOT}, got none; pip install matplotlib")
