"""A real training, killed at random moments as often as asked, and held against one that nobody killed.

    python -m benchmarks.soak [--kills 100] [--minutes 0] [--seed 0] [--device cpu] [--out FOLDER]

Each process is `python -m fastdmd.train ... --resume auto` on a tiny network, with an adversarial term, two averages
and measurements meanwhile. It gets SIGKILL at a moment between its start and the time that a whole run takes, one time
in three inside of a checkpoint, and the same command is run again; where it ends by itself, the next training begins.
Each has to leave, to the bit and but for times, what the one without kills has left. Exit code 1, and the folder stays,
where one does not. On a GPU they run with `--deterministic`.

`--minutes` lets one training go on for that long, with measurements, snapshots and checkpoints, and fits lines to its
memory and its throughput: what grows or slows down shows. Exit code 1 where, in ten minutes or more, memory grows by
more than a twentieth.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from benchmarks import drift
from benchmarks.environment import of_process
from fastdmd.networks.unet import UNet, UNetConfig
from fastdmd.networks.weights import save_network

AIMED = 3  # of so many kills one is inside of a checkpoint, where the process comes to that
LEFT_OUT = {  # times, memory, and the settings that decide when a checkpoint is written
    "seconds",
    "train_seconds",
    "evaluation_seconds",
    "first_iteration_seconds",
    "images_per_second",
    "resident_bytes",
    "checkpoint",
}
FLAGS = {
    "iterations": 40,
    "batch-size": 8,
    "dfake-gen-update-ratio": 3,
    "warmup-iterations": 0,
    "log-every": 3,
    "snapshots": 7,
    "num-samples": 40,
    "teacher-steps": 2,
    "eval-every": 4,
    "ema-halflives": "2,40",
    "gan-guidance-weight": 1e-2,
    "gan-generator-weight": 3e-3,
    "beta1": 0.9,
    "generator-lr": 1e-2,
    "guidance-lr": 1e-2,
    "checkpoint-every": 2,
    "record": "none",
}


LONG = [  # what differs in a training that goes on for long
    text
    for name, value in {
        "iterations": 10**7,
        "snapshots": 10**5,
        "log-every": 20,
        "eval-every": 200,
        "checkpoint-every": 100,
        "lr-schedule": "constant",
        "generator-lr": 1e-6,
        "guidance-lr": 1e-6,
    }.items()
    for text in (f"--{name}", str(value))
]


def differences(run: Path, other: Path) -> list[str]:
    """What two runs have left that is not the same, but for times."""
    names = {path.name for folder in (run, other) for path in folder.iterdir()} - {"checkpoints"}
    return sorted(name for name in names if content(run / name) != content(other / name))


def content(path: Path) -> Any:
    """What a file holds that has to be the same; None where there is none."""
    if not path.exists():
        return None
    if path.suffix == ".safetensors":
        with safe_open(path, framework="np") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}
            metadata = _timeless(json.loads(file.metadata()["fastdmd"]))
        return {name: (array.shape, array.tobytes()) for name, array in arrays.items()}, metadata
    if path.suffix in (".json", ".jsonl"):
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        return [_timeless(json.loads(line)) for line in lines]
    return path.read_bytes()


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _timeless(inner) for name, inner in value.items() if name not in LEFT_OUT}
    return [_timeless(inner) for inner in value] if isinstance(value, list) else value


def prepare(folder: Path, device: str = "cpu") -> list[str]:
    """Writes what a training is made of; returns its arguments, but for `--out`."""
    shape = {"image_size": 28, "num_classes": 10, "patch_size": 2}
    config = UNetConfig(**shape, model_channels=8, channel_multipliers=(1, 2), num_blocks=1, attention_resolutions=(7,))
    torch.manual_seed(0)
    save_network(folder / "teacher.safetensors", UNet(config), kind="teacher")
    rng = np.random.default_rng(0)
    np.savez(folder / "data.npz", images=rng.integers(0, 256, (60, 1, 28, 28), np.uint8), labels=np.arange(60) % 10)
    named = {"teacher": folder / "teacher.safetensors", "data": folder / "data.npz", "device": device, **FLAGS}
    arguments = [text for name, value in named.items() for text in (f"--{name}", str(value))]
    return arguments if device == "cpu" else [*arguments, "--deterministic"]


def start(arguments: list[str], folder: Path, *options: str) -> subprocess.Popen:
    """In a folder of its own, so that all runs have one name."""
    command = [sys.executable, "-W", "ignore", "-m", "fastdmd.train", *arguments, "--no-report"]
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        [*command, "--out", "run", *options],
        cwd=folder,
        env=of_process(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def end_of(process: subprocess.Popen, run: Path, seconds: float | None, *, aims: bool) -> str | None:
    """What the process said if it ended by itself, else None: it was killed after so many seconds, None of them: never;
    where it `aims`, as soon as a checkpoint is half written."""
    before, began = checkpoints_begun(run), time.monotonic()
    while seconds is not None and process.poll() is None:
        if time.monotonic() - began >= seconds or (aims and checkpoints_begun(run) - before):
            process.kill()
            process.communicate()
            return None
        time.sleep(0.001 if aims else min(0.05, seconds))
    return process.communicate()[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=0, help="of a training that nobody kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    folder = options.out or Path(tempfile.mkdtemp(prefix="fastdmd-soak-"))
    folder.mkdir(parents=True, exist_ok=True)
    arguments, rng = prepare(folder.resolve(), options.device), random.Random(options.seed)
    if options.device != "cpu":  # what is compiled is kept; a killed training lasts no longer than one that finds it
        start(arguments, folder / "compiling").communicate()
    began = time.monotonic()
    whole = start(arguments, folder / "whole")
    _, error = whole.communicate()
    if whole.returncode != 0:
        sys.exit(f"the run without kills: {error}")
    longest = time.monotonic() - began
    kills = trainings = 0
    reached: collections.Counter[str] = collections.Counter()
    while kills < options.kills:
        trainings += 1
        place = folder / f"training-{trainings}"
        is_over = False
        while not is_over:
            before = state_of(place / "run")
            process = start(arguments, place, "--resume", "auto")
            aims = kills % AIMED == AIMED - 1
            seconds = None if kills >= options.kills else longest if aims else rng.uniform(0, longest)
            if (error := end_of(process, place / "run", seconds, aims=aims)) is None:
                kills += 1
                reached[where(place / "run", before)] += 1
                continue
            is_over = True
            if process.returncode != 0:
                sys.exit(f"training {trainings}, after {kills} kills, in {place}: {process.returncode}: {error}")
        if others := differences(folder / "whole" / "run", place / "run"):
            sys.exit(f"training {trainings}, after {kills} kills, in {place}: other {', '.join(others)}")
        print(f"training {trainings} as without kills, after {kills}", flush=True)
    print(f"{kills} kills in {trainings} trainings, each of which left what the one without kills has left:")
    files = sorted(path.name for path in (folder / "whole" / "run").iterdir() if path.is_file())
    print(f"to the bit, but for times, {', '.join(files)}")
    for name in PHASES:
        print(f"{reached[name]:6d} {name}")
    if options.minutes and (fault := drift.watch(start(arguments + LONG, folder / "long"), folder, options.minutes)):
        sys.exit(fault)
    if options.out is None:
        shutil.rmtree(folder)


PHASES = (
    "as it started, before it touched anything",
    "before the first checkpoint",
    "inside a checkpoint",
    "inside another file",
    "between two files, with a checkpoint there",
    "after the end",
)


def state_of(run: Path) -> dict[Path, int]:
    """The files and folders of a run, and when they were written last."""
    found: dict[Path, int] = {}
    for path in run.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            found[path] = path.lstat().st_mtime_ns
    return found


def checkpoints_begun(run: Path) -> set[Path]:
    """Those that are half written."""
    return set(run.glob("checkpoints/.fastdmd-*"))


def where(run: Path, before: dict[Path, int]) -> str:
    """When a kill came, out of `PHASES`, from what it has left and what there was before."""
    after = state_of(run)
    if after == before:
        return PHASES[0]
    new = {path for path in after.keys() - before.keys() if path.name.startswith(".fastdmd-")}
    if new & checkpoints_begun(run):
        return PHASES[2]
    if new:
        return PHASES[3]
    if run / "summary.json" in after:
        return PHASES[5]
    return PHASES[4] if any(run.glob("checkpoints/[0-9]*")) else PHASES[1]


if __name__ == "__main__":
    main()
