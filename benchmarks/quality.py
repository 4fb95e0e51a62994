"""Distils MNIST once per variant and seed, and keeps what each result scores: recipes and ablations.

    python -m benchmarks.quality recipe|terms|steps [--seeds 0,1,2] [--variants NAME,...] [--json FILE]

Every run is `python -m fastdmd.train` with the flags of its variant, in a process of its own, one after the other. With
`--json` each result is written as it comes, and a run that the file has is not made again: it may be called as often as
needed. The table has the mean over the seeds and, behind it, the standard deviation between them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT, describe
from fastdmd.files import write_atomically

Flags = dict[str, Any]  # of `fastdmd.train`, without their dashes
GAN: Flags = {"gan-guidance-weight": 1e-2, "gan-generator-weight": 3e-3}
STUDIES: dict[str, dict[str, Flags]] = {
    "recipe": {
        "default": {},
        "not clamped": {"clamp-images": "False"},
        "beta1 0.9": {"beta1": 0.9},
        "ratio 1": {"dfake-gen-update-ratio": 1},
        "ratio 5": {"dfake-gen-update-ratio": 5},
        "generator's rate 3e-4": {"generator-lr": 3e-4},
        "generator's rate 1e-3": {"generator-lr": 1e-3},
        "fake score's rate 6e-4": {"guidance-lr": 6e-4},
        "batch 24": {"batch-size": 24},
        "batch 96": {"batch-size": 96},
        "sigma from 2 % to 80 %": {"max-step-percent": 0.8},
        "bfloat16": {"precision": "bf16"},
    },
    "terms": {
        "DMD2 without its adversarial term": {},
        "with it": GAN,
        "forward KL": {**GAN, "divergence": "forward-kl"},
        "Jensen-Shannon": {**GAN, "divergence": "jensen-shannon"},
        "Hellinger": {**GAN, "divergence": "hellinger"},
        "SiD": {"method": "sid"},
        "SiD, alpha 1.2": {"method": "sid", "sid-alpha": 1.2},
        "SiD with an adversarial term": {"method": "sid", **GAN},
    },
    "steps": {
        "1 step": {},
        "2 steps": {"generator-sigmas": "80,2.5"},
        "4 steps": {"generator-sigmas": "80,24.4,5.8,0.9"},
        "4 steps, noised data": {"generator-sigmas": "80,24.4,5.8,0.9", "generator-inputs": "noised-data"},
    },
}
FIGURES = (  # of a row: key, heading, factor, format
    ("frechet_distance", "Fréchet distance", 1, ".3f"),
    ("frechet_means", "of means", 1, ".3f"),
    ("frechet_covariances", "of covariances", 1, ".3f"),
    ("class_accuracy", "accuracy %", 100, ".2f"),
    ("precision", "precision %", 100, ".1f"),
    ("recall", "recall %", 100, ".1f"),
    ("train_seconds", "seconds", 1, ".0f"),
)


def run(flags: Flags, seed: int) -> dict:
    """The figures of the generator that comes of one distillation."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        options = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
        command = [sys.executable, "-m", "fastdmd.train", "--seed", str(seed), "--out", str(out), *options]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
        summary = json.loads((out / "summary.json").read_text())
    return {**summary["generator"], "train_seconds": summary["train_seconds"]}


def table(rows: list[dict]) -> str:
    """One line a variant, in the order of the rows."""
    lines = [f"{'':<28}{'runs':>6}" + "".join(f"{heading:>20}" for _, heading, *_ in FIGURES)]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        own = [row for row in rows if row["variant"] == variant]
        cells = []
        for key, _, factor, pattern in FIGURES:
            values = [row[key] * factor for row in own]
            spread = f" ± {statistics.stdev(values):{pattern}}" if len(values) > 1 else ""
            cells.append(f"{f'{statistics.mean(values):{pattern}}{spread}':>20}")
        lines.append(f"{variant:<28}{len(own):>6}" + "".join(cells))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--variants", help="some of the study's, separated by commas (default: all)")
    parser.add_argument("--json", type=Path, help="where to keep the figures, and to find those of earlier calls")
    arguments = parser.parse_args()
    variants = STUDIES[arguments.study]
    chosen = arguments.variants.split(",") if arguments.variants else list(variants)
    if unknown := [name for name in chosen if name not in variants]:
        parser.error(f"expected variants out of {', '.join(variants)}, got {', '.join(unknown)}")
    rows: list[dict] = []
    if arguments.json and arguments.json.exists():
        rows = json.loads(arguments.json.read_text())["rows"]
    for seed, variant in itertools.product(map(int, arguments.seeds.split(",")), chosen):
        wanted = {"variant": variant, "flags": variants[variant], "seed": seed}
        if any(row.items() >= wanted.items() for row in rows):
            continue
        rows.append(wanted | run(variants[variant], seed) | describe("cpu"))
        print(table(rows[-1:]), flush=True)
        if arguments.json:
            content = json.dumps({"study": arguments.study, "rows": rows}, indent=1) + "\n"
            write_atomically(arguments.json, lambda file, content=content: file.write(content.encode()))
    print(table([row for variant in chosen for row in rows if row["variant"] == variant]))


if __name__ == "__main__":
    main()
