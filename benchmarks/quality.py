"""Distils MNIST once per variant and seed, and keeps what each result scores: recipes and ablations.

    python -m benchmarks.quality STUDY [--seeds 0,1,2] [--variants NAME,...] [--json FILE] [-- FLAGS OF train]

Every run is `python -m fastdmd.train` with the flags of its variant, in a process of its own, one after the other. With
`--json` each result is written as it comes, and a run that the file has is not made again: it may be called as often as
needed. The table has the mean over the seeds and, behind it, the standard deviation between them.
"""

from __future__ import annotations

import argparse
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
STUDIES: dict[str, dict[str, Flags]] = {}
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
    for seed in map(int, arguments.seeds.split(",")):
        for variant in chosen:
            if any((row["variant"], row["seed"], row["flags"]) == (variant, seed, variants[variant]) for row in rows):
                continue
            row = {"variant": variant, "seed": seed, "flags": variants[variant], **run(variants[variant], seed)}
            rows.append({**row, **describe("cpu")})
            print(table(rows[-1:]), flush=True)
            if arguments.json:
                content = json.dumps({"study": arguments.study, "rows": rows}, indent=1) + "\n"
                write_atomically(arguments.json, lambda file, content=content: file.write(content.encode()))
    order = {name: place for place, name in enumerate(variants)}
    print(table(sorted((row for row in rows if row["variant"] in order), key=lambda row: order[row["variant"]])))


if __name__ == "__main__":
    main()
