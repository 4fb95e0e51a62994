"""What gives the same bits again, on this machine's CPU: small runs, each compared with one that differs in one thing.

    python -m benchmarks.reproducibility [--only WORD]

Prints a line for each: the same bits, or how far the weights of generator and fake score have gone apart after
`ITERATIONS`, relative to how far they have moved. docs/reproducibility.md has them.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from benchmarks.environment import of_process
from benchmarks.soak import prepare

ITERATIONS = 12
TRAIN = {"iterations": ITERATIONS, "eval-every": 0, "num-samples": 0, "snapshots": 2, "checkpoint-every": 1000}
BASE_ENVIRONMENT = {"OMP_NUM_THREADS": "1"}

# What differs from the run that the others are compared with: flags, environment.
RUNS: dict[str, tuple[Mapping[str, object], Mapping[str, str]]] = {
    "the same command again": ({}, {}),
    "--deterministic": ({"deterministic": None}, {}),
    "other --log-every, --snapshots, --checkpoint-every": (
        {"log-every": 5, "snapshots": 6, "checkpoint-every": 3},
        {},
    ),
    "measured meanwhile (--eval-every)": ({"eval-every": 4, "num-samples": 40}, {}),
    "killed and gone on with (--resume auto)": ({"checkpoint-every": 2, "resume": "auto"}, {"KILL": "1"}),
    "two threads": ({}, {"OMP_NUM_THREADS": "2"}),
    "--accumulation-steps 2": ({"accumulation-steps": 2}, {}),
    "--execution compiled": ({"execution": "compiled"}, {}),
    "--precision bf16": ({"precision": "bf16"}, {}),
    "FASTDMD_BACKEND=reference": ({}, {"FASTDMD_BACKEND": "reference"}),
    "ATEN_CPU_CAPABILITY=avx2, ONEDNN_MAX_CPU_ISA=AVX2": (
        {},
        {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    ),
}


def command(module: str, arguments: list[str], folder: Path, variables: Mapping[str, str]) -> subprocess.Popen:
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", f"fastdmd.{module}", *arguments],
        cwd=folder,
        env=of_process(**BASE_ENVIRONMENT | variables),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> None:
    _, error = process.communicate()
    if process.returncode != 0:
        sys.exit(error)


def train(folder: Path, given: list[str], flags: Mapping[str, object], environment: Mapping[str, str]) -> Path:
    """The folder of a run that has ended."""
    own = [
        text for name, value in {**TRAIN, **flags}.items() for text in (f"--{name}", str(value)) if value is not None
    ]
    own += [f"--{name}" for name, value in flags.items() if value is None]
    arguments = [*given, *own, "--out", "run"]
    if "KILL" in environment:
        process = command("train", arguments, folder, environment)
        while process.poll() is None and not list(folder.glob("run/checkpoints/0*")):
            pass
        process.send_signal(signal.SIGKILL)
        process.communicate()
    finish(command("train", arguments, folder, environment))
    return folder / "run"


def apart(run: Path, other: Path, start: Path) -> str:
    """How far two runs are from each other."""
    one, two, begun = (
        load_file(run / "networks.safetensors"),
        load_file(other / "networks.safetensors"),
        load_file(start),
    )
    assert one.keys() == two.keys() and len(one) > 100
    if all(torch.equal(value, two[name]) for name, value in one.items()):
        return "the same bits"
    names = [name for name in one if name.partition(".")[2] in begun]
    difference = sum((one[name] - two[name]).double().square().sum() for name in names)
    moved = sum((one[name] - begun[name.partition(".")[2]]).double().square().sum() for name in names)
    return f"{float((difference / moved).sqrt()):.0e}"


def sampled(folder: Path, weights: Path, *options: str) -> np.ndarray:
    """Images, uint8."""
    finish(command("sample", [str(weights), "--num", "20", "--out", "x.npz", "--device", "cpu", *options], folder, {}))
    return np.load(folder / "x.npz")["images"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="of the lines with this word")
    only = parser.parse_args().only
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        given = prepare(folder)
        base = train(folder / "base", given, {}, {})
        for number, (name, (flags, environment)) in enumerate(RUNS.items()):
            if only in name:
                run = train(folder / str(number), given, flags, environment)
                print(f"| `train`: {name} | {apart(base, run, folder / 'teacher.safetensors')} |", flush=True)
        if only in "sample":
            images = sampled(folder, base / "generator.safetensors")
            for options in ((), ("--batch-size", "3"), ("--deterministic",)):
                other = sampled(folder, base / "generator.safetensors", *options)
                most = int(np.abs(images.astype(int) - other.astype(int)).max())
                what = "the same bits" if most == 0 else f"up to {most} of 255"
                print(f"| `sample`: {' '.join(options) or 'the same command again'} | {what} |", flush=True)


if __name__ == "__main__":
    main()
