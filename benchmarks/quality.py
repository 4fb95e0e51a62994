"""Distils MNIST once per variant and seed, and keeps what each result scores: recipes and ablations.

    python -m benchmarks.quality recipe|terms|steps|long|best [--seeds 0,1,2] [--variants NAME ...] [--iterations 800]
        [--data PATH] [--device cpu] [--precision auto] [--jobs 2] [--json FILE]

Every run is `python -m fastdmd.train` with the flags of its variant, a third as long as by default, and `python -m
fastdmd.evaluate` of what it leaves, on the same noise for every seed, in processes of their own; `--jobs` says how many
runs at once. With `--json` each result is written as it comes, and a run that the file has of this kind of device is
not made again: it may be called as often as needed. `--data` has other real images than the embedded digits for the
adversarial term; what comes of it is measured against those all the same. The table has the mean over the seeds and,
behind it, the standard deviation between them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import ROOT, describe
from fastdmd.files import write_atomically

Flags = dict[str, Any]  # of `fastdmd.train`, without their dashes
LONG: Flags = {"batch-size": 96, "divergence": "jensen-shannon"}
BEST: Flags = {"preset": "mnist-best"}
STUDIES: dict[str, dict[str, Flags]] = {
    "recipe": {
        "default": {},
        "not clamped": {"clamp-images": "False"},
        "beta1 0.9": {"beta1": 0.9},
        "all of the emphasis": {"label-emphasis": 1},
        "adversarial weight 0.01": {"gan-generator-weight": 0.01},
        "adversarial weight 0.05": {"gan-generator-weight": 0.05},
        "adversarial weight 0.1": {"gan-generator-weight": 0.1},
        "discriminator's rate 3e-3": {"gan-lr": 3e-3},
        "judged at all levels": {"gan-max-sigma": 80},
        "approximate R1 4": {"gan-r1-weight": 4},
        "generator's rate 3e-4": {"generator-lr": 3e-4},
        "generator's rate 1e-3": {"generator-lr": 1e-3},
        "fake score's rate 6e-4": {"guidance-lr": 6e-4},
        "batch 48": {"batch-size": 48},
        "batch 96": {"batch-size": 96},
        "sigma from 2 % to 80 %": {"max-step-percent": 0.8},
        "average's decay 0.98": {"ema-decay": 0.98},
        "bfloat16": {"precision": "bf16"},
    },
    "terms": {
        "default": {},
        "no adversarial term": {"gan-guidance-weight": 0},
        "DMD2's adversarial term": {"gan-features": "fake"},
        "forward KL": {"divergence": "forward-kl"},
        "Jensen-Shannon": {"divergence": "jensen-shannon"},
        "Hellinger": {"divergence": "hellinger"},
        "SiD": {"method": "sid"},
        "SiD, no adversarial term": {"method": "sid", "gan-guidance-weight": 0},
        "ratio 1": {"dfake-gen-update-ratio": 1},
        "ratio 5": {"dfake-gen-update-ratio": 5},
        "ratio 10": {"dfake-gen-update-ratio": 10},
        "no weight in the fake loss": {"fake-loss-weight": "none"},
        "no average": {"ema-decay": 0},
    },
    "steps": {
        "1 step": {},
        "2 steps": {"generator-sigmas": "80,2.5"},
        "4 steps": {"generator-sigmas": "80,24.4,5.8,0.9"},
        "4 steps, noised data": {"generator-sigmas": "80,24.4,5.8,0.9", "generator-inputs": "noised-data"},
    },
    "long": {  # of batches of 96, for --iterations 7200
        "Jensen-Shannon, emphasis 1.00": LONG | {"label-emphasis": 0.77},
        "Jensen-Shannon, emphasis 0.91": LONG | {"label-emphasis": 0.7},
        "Jensen-Shannon, emphasis 1.10": LONG | {"label-emphasis": 0.85},
        "Jensen-Shannon, emphasis 1.00, weight 0.15": LONG | {"label-emphasis": 0.77, "gan-generator-weight": 0.15},
        "forward KL, emphasis 1.10": LONG | {"divergence": "forward-kl", "label-emphasis": 0.85},
        "Hellinger, emphasis 1.00": LONG | {"divergence": "hellinger", "label-emphasis": 0.77},
        "reverse KL, emphasis 0.85": LONG | {"divergence": "reverse-kl", "label-emphasis": 0.65},
        "Jensen-Shannon, emphasis 1.00, ratio 5": LONG | {"label-emphasis": 0.77, "dfake-gen-update-ratio": 5},
        "SiD, alpha 1.2": {"batch-size": 96, "method": "sid", "sid-alpha": 1.2},
    },
    "best": {  # of batches of 192, for --iterations 2700
        "mnist-best": BEST,
        "moved by two pixels": BEST | {"gan-translation": 0.07},
        "by two pixels, adversarial weight 0.05": BEST | {"gan-translation": 0.07, "gan-generator-weight": 0.05},
        "adversarial weight 0.05": BEST | {"gan-generator-weight": 0.05},
        "not moved, 2,000 iterations": BEST | {"gan-translation": 0, "iterations": 2000},
        "not moved": BEST | {"gan-translation": 0},
        "not moved, approximate R1 1": BEST | {"gan-translation": 0, "gan-r1-weight": 1},
        "no adversarial term": BEST | {"gan-translation": 0, "gan-guidance-weight": 0},
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


def run(flags: Flags, seed: int, device: str, num_threads: int) -> dict:
    """The figures of the generator that comes of one distillation."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        options = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
        options += ["--seed", str(seed), "--num-samples", "0", "--out", str(out)]  # nothing of the teacher's is wanted
        figures = Path(folder) / "figures.json"
        for command in (
            ["fastdmd.train", *options, "--device", device],
            ["fastdmd.evaluate", str(out / "generator.safetensors"), "--out", str(figures), "--device", device],
        ):
            environment = os.environ | {"OMP_NUM_THREADS": str(num_threads)}
            command = [sys.executable, "-m", *command]
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-2000:]}")
        found, summary = (json.loads(file.read_text()) for file in (figures, out / "summary.json"))
    return {**found["generator"], "train_seconds": summary["train_seconds"]}


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
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="some of the study's (default: all)")
    parser.add_argument("--iterations", type=int, default=800, help="of every run")
    parser.add_argument("--data", type=Path, help="real images of every run")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="auto", help="of every run that its variant says nothing of")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, which share the threads and the GPU")
    parser.add_argument("--json", type=Path, help="where to keep the figures, and to find those of earlier calls")
    arguments = parser.parse_args()
    variants = STUDIES[arguments.study]
    chosen = arguments.variants or list(variants)
    if unknown := [name for name in chosen if name not in variants]:
        parser.error(f"expected variants out of {', '.join(variants)}, got {', '.join(unknown)}")
    stored: dict[str, Any] = {"study": arguments.study, "rows": []}
    if arguments.json and arguments.json.exists():
        stored = json.loads(arguments.json.read_text())
    rows = stored["rows"]
    common: Flags = {"iterations": arguments.iterations}
    if arguments.precision != "auto":
        common["precision"] = arguments.precision
    if arguments.data:
        common["data"] = str(arguments.data)
    device = describe(arguments.device)["device"]
    num_threads = max(1, torch.get_num_threads() // arguments.jobs)
    wanted = [
        {"variant": variant, "flags": common | variants[variant], "seed": seed, "device": device}
        for seed, variant in itertools.product(map(int, arguments.seeds.split(",")), chosen)
    ]
    missing = [one for one in wanted if not any(row.items() >= one.items() for row in rows)]
    jobs, num_failed = ThreadPoolExecutor(arguments.jobs), 0
    try:
        runs = {jobs.submit(run, one["flags"], one["seed"], arguments.device, num_threads): one for one in missing}
        for done in as_completed(runs):
            if (error := done.exception()) is not None:
                num_failed += 1
                print(error, file=sys.stderr, flush=True)
                continue
            rows.append(runs[done] | done.result() | {"threads": num_threads} | describe(arguments.device))
            print(table(rows[-1:]), flush=True)
            if arguments.json:
                content = json.dumps(stored, indent=1) + "\n"
                write_atomically(arguments.json, lambda file, content=content: file.write(content.encode()))
    finally:
        jobs.shutdown(cancel_futures=True)
    print(table([row for one in wanted for row in rows if row.items() >= one.items()]))
    if num_failed:
        raise SystemExit(f"{num_failed} of {len(missing)} runs failed")


if __name__ == "__main__":
    main()
