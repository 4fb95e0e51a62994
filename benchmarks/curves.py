"""Draws what a run's figures look like when it is healthy, and in each way of going wrong: the pictures of
docs/training.md.

    python -m benchmarks.curves [--run RUN] [--json FILE] [--out docs/curves]

Short runs of the embedded teacher (`benchmarks/failures.py`), with two healthy ones in grey behind each; and the
figures of RUN, a finished `fastdmd.train`, from its metrics.jsonl. `--json` keeps what was drawn; from a file that
exists, pictures are drawn without short runs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import describe
from benchmarks.failures import FAILURES, HEALTHY, Case
from benchmarks.short_runs import SETTINGS, lines
from fastdmd.runs import machine

Curve = list[tuple[int, float]]
Curves = dict[str, Curve]  # by the name of a figure in metrics.jsonl

ITERATIONS = 256
SMOOTHED = 4  # readings that a point is the mean of: one of 8 iterations is of few images
GAN = {"gan_guidance_weight": 1e-2}
# What is drawn of each failure: the figures that tell it.
TOLD_BY = {
    "generator's rate x 30": ("loss_dm", "class_separation", "contrast", "fake_error_1_5"),
    "fake score's rate / 100": ("loss_fake", "fake_error_1_5", "disagreement_1_5", "class_spread"),
    "fake score's rate x 50": ("loss_fake", "fake_grad_norm", "fake_error_1_5", "generator_grad_norm"),
    "teacher x 2": ("brightness", "saturated", "contrast", "fake_error_1_5"),
    "teacher told one label": ("loss_dm", "class_separation", "classes_lost", "spread"),
    "adversarial weight 30, of images": ("generator_grad_norm", "loss_dm", "gan_right", "class_separation"),
    "generator deaf to noise": ("loss_dm", "class_spread", "spread", "fake_error_above_5"),
    "late: rates x 50": ("loss_dm", "loss_fake", "brightness", "spread"),
}
# What is drawn of a whole run, several figures in a panel.
PANELS = {
    "losses": ("loss_dm", "loss_fake"),
    "adversarial losses": ("loss_gan_generator", "loss_gan_guidance"),
    "gradient norms": ("generator_grad_norm", "fake_grad_norm"),
    "images": ("brightness", "contrast", "spread"),
    "fake score's error / teacher's": (
        "fake_error_below_0.2",
        "fake_error_0.2_1",
        "fake_error_1_5",
        "fake_error_above_5",
    ),
    "disagreement": ("disagreement_below_0.2", "disagreement_0.2_1", "disagreement_1_5", "disagreement_above_5"),
    "classes": ("class_separation", "gan_right"),
    "variety": ("class_spread",),
}
HEALTHY_COLOUR, COLOURS = "0.7", ("#c2410c", "#1d4ed8", "#15803d", "#7c3aed")


def curves_of(case: Case, seed: int) -> dict[str, Any]:
    """Of a short run: its curves, its alarms, and what the statistics of right images are."""
    found: Curves = {}
    told: list[dict[str, Any]] = []
    right: dict[str, float] = {}
    for line in lines(case, seed, ITERATIONS, lr_schedule="constant"):
        for name, value in line.figures.items():
            if value is not None:
                found.setdefault(name, []).append((line.iteration, value))
        told += [{"iteration": alarm.iteration, "kind": alarm.kind} for alarm in line.alarms]
        reference = line.reference
        right = {name: getattr(reference, name) for name in ("brightness", "contrast", "spread", "saturated")}
    return {"curves": found, "alarms": told, "right": right, "broken_at": case.at}


def smooth(curve: Curve, width: int) -> tuple[list[float], list[float]]:
    """Means of so many neighbours, ever the latest ones, where infinity and NaN are left out."""
    kept = [(x, y) for x, y in curve if y == y and abs(y) != float("inf")]
    parts = [kept[max(0, end - width) : end] for end in range(1, len(kept) + 1)]
    return [part[-1][0] for part in parts], [sum(y for _, y in part) / len(part) for part in parts]


def draw_failure(path: Path, failing: Mapping[str, Any], healthy: Sequence[Mapping[str, Any]], names: Sequence[str]):
    """A panel for each figure: healthy runs grey, the failing one in colour, its alarms where they came."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.4 * len(names), 2.2), layout="constrained")  # inches
    for place, name in enumerate(names, 1):
        axes = figure.add_subplot(1, len(names), place, title=name)
        for run in healthy:
            if name in run["curves"]:
                axes.plot(*smooth(run["curves"][name], SMOOTHED), color=HEALTHY_COLOUR, linewidth=1.5)
        if name in failing["curves"]:
            axes.plot(*smooth(failing["curves"][name], SMOOTHED), color=COLOURS[0], linewidth=2)
        if name in failing["right"]:
            axes.axhline(failing["right"][name], color="black", linestyle=":", linewidth=1)
        for alarm in failing["alarms"]:
            axes.axvline(alarm["iteration"], color=COLOURS[0], linestyle="--", linewidth=0.8)
        if failing["broken_at"]:
            axes.axvline(failing["broken_at"], color="black", linewidth=0.8)
        axes.title.set_fontsize(9)
        axes.tick_params(labelsize=7)
        axes.set_xlim(0, ITERATIONS)
    figure.savefig(path, format="svg", metadata={"Date": None})


def draw_run(path: Path, curves: Curves) -> None:
    """The panels of a whole run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")  # inches
    for place, (title, names) in enumerate(PANELS.items(), 1):
        axes = figure.add_subplot(2, -(-len(PANELS) // 2), place, title=title)
        for name, colour in zip(names, COLOURS, strict=False):
            if name in curves:
                axes.plot(*smooth(curves[name], 1), color=colour, linewidth=1.5, label=name)
        axes.title.set_fontsize(9)
        axes.tick_params(labelsize=7)
        axes.set_ylim(top=min(axes.get_ylim()[1], 3.5))  # the first readings are of noise, beyond all others
        axes.legend(fontsize=6, frameon=False)
    figure.savefig(path, format="svg", metadata={"Date": None})


def read_run(run: Path) -> Curves:
    """From metrics.jsonl."""
    found: Curves = {}
    for text in (run / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        for name, value in line.items():
            if isinstance(value, int | float):
                found.setdefault(name, []).append((line["iteration"], value))
    return found


def file_name(name: str) -> str:
    words = "".join(letter if letter.isalnum() else " " for letter in name.replace("'s", "")).split()
    return "-".join(words) + ".svg"


def gather(seed: int) -> dict[str, Any]:
    """Runs everything that is short."""
    machine.prepare(torch.device("cpu"), precision="fp32", batch_size=SETTINGS["batch_size"])
    cases = {case.name: case for case in FAILURES}
    healthy = [case for case in HEALTHY if case.name in ("default", "with the adversarial term")]
    found: dict[str, Any] = {"failures": {}, "healthy": {}}
    for case in (*healthy, *(cases[name] for name in TOLD_BY)):
        print(case.name, flush=True)
        found["failures" if case.name in TOLD_BY else "healthy"][case.name] = curves_of(case, seed)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="folder of a finished run, whose figures are drawn too")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/cpu-curves.json"))
    parser.add_argument("--out", type=Path, default=Path("docs/curves"))
    parser.add_argument("--again", action="store_true", help="run what is short again, though --json is there")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    stored: dict[str, Any] = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
    if arguments.again or "failures" not in stored:
        stored |= {**describe("cpu"), "settings": SETTINGS, "iterations": ITERATIONS, **gather(arguments.seed)}
    if arguments.run is not None:
        stored["run"] = read_run(arguments.run)
    arguments.json.write_text(json.dumps(stored) + "\n")
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, names in TOLD_BY.items():
        failing, healthy = stored["failures"][name], list(stored["healthy"].values())
        draw_failure(arguments.out / file_name(name), failing, healthy, names)
    if "run" in stored:
        draw_run(arguments.out / "healthy.svg", stored["run"])


if __name__ == "__main__":
    main()
