"""Several processes under torchrun: killed at random and started again, or held against one process.

    python -m benchmarks.ranks [--kills 20] [--processes 4] [--seed 0] [--out FOLDER]
    python -m benchmarks.ranks --overhead [--processes 2] [--iterations 200] [TRAIN_FLAG ...]

The first: a tiny training, as `benchmarks.soak` has it, of so many processes; one of them, at random, gets SIGKILL at a
random moment, torchrun ends the others and starts all anew, which go on with the last checkpoint. Trainings follow each
other until there were so many kills; each has to leave, to the bit and but for times, what one without kills has left.

The second: images per second of N processes, each with its part of the batch, over N times those of one process with
such a part alone, and over the sum of N that run at the same time and know nothing of each other: these share memory
and caches, so the rest is what talking costs. Only on a machine with a GPU, or a core and nothing else to do, for each.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.environment import of_process
from benchmarks.soak import differences, prepare

QUIET = "--num-samples 0 --eval-every 0 --checkpoint-every 0 --record none --no-report --snapshots 1".split()


def torchrun(arguments: Sequence[str], folder: Path, size: int, max_restarts: int = 0) -> subprocess.Popen:
    """`fastdmd.train ... --out run` in a folder, by so many processes of this machine."""
    folder.mkdir(parents=True, exist_ok=True)
    launcher = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    launcher += ["--nproc-per-node", str(size), "--max-restarts", str(max_restarts), "--monitor-interval", "0.2"]
    return subprocess.Popen(
        [*launcher, "-m", "fastdmd.train", *arguments, "--out", "run"],
        cwd=folder,
        env={**of_process(), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=open(folder / "stderr", "ab"),
    )


def processes_of(launcher: subprocess.Popen) -> list[int]:
    """Those that torchrun has started, of which each leads a session of its own."""
    try:
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        return [int(child) for child in children if os.getsid(int(child)) == int(child)]
    except (OSError, ProcessLookupError):
        return []


def killed(
    arguments: Sequence[str], folder: Path, size: int, waits: Sequence[Callable[[Path], bool]], rng: random.Random
) -> int:
    """How many kills a training has had, one process each time that the next of `waits`, asked of its run, is over."""
    launcher = torchrun([*arguments, "--resume", "auto"], folder, size, max_restarts=len(waits))
    kills = 0
    for is_over in waits:
        while launcher.poll() is None and not is_over(folder / "run"):
            time.sleep(0.02)
        if not (alive := processes_of(launcher)) or launcher.poll() is not None:
            break
        os.kill(rng.choice(alive), signal.SIGKILL)
        kills += 1
        while launcher.poll() is None and not set(processes_of(launcher)) - {*alive}:
            time.sleep(0.02)  # until there are others
    if launcher.wait() != 0:
        raise SystemExit(f"after {kills} kills, in {folder}: {(folder / 'stderr').read_text()[-3000:]}")
    return kills


def soak(folder: Path, num_kills: int, size: int, seed: int) -> None:
    arguments, rng = [*prepare(folder.resolve()), "--no-report"], random.Random(seed)
    began = time.monotonic()
    if torchrun(arguments, folder / "whole", size).wait() != 0:
        raise SystemExit(f"the run without kills: {(folder / 'whole' / 'stderr').read_text()[-3000:]}")
    longest, kills, trainings = time.monotonic() - began, 0, 0
    while kills < num_kills:
        trainings += 1
        place = folder / f"training-{trainings}"

        def after(seconds: float) -> Callable[[Path], bool]:
            start: list[float] = []

            def is_over(run: Path) -> bool:
                start.append(time.monotonic())
                return start[-1] - start[0] >= seconds

            return is_over

        waits = [after(rng.uniform(0, longest)) for _ in range(min(3, num_kills - kills))]
        kills += killed(arguments, place, size, waits, rng)
        if others := differences(folder / "whole" / "run", place / "run"):
            raise SystemExit(f"training {trainings}, after {kills} kills, in {place}: other {', '.join(others)}")
        print(f"training {trainings} as without kills, after {kills}", flush=True)
    print(f"{kills} kills in {trainings} trainings of {size} processes, each of which left what one without has left")


def images_per_second(arguments: Sequence[str], folder: Path, size: int, trainings: int = 1) -> float:
    """Of so many trainings at once, of so many processes each."""
    folders = [folder / str(place) for place in range(trainings)]
    launchers = [torchrun(arguments, place, size) for place in folders]
    total = 0.0
    for launcher, place in zip(launchers, folders, strict=True):
        if launcher.wait() != 0:
            raise SystemExit((place / "stderr").read_text()[-3000:])
        lines = (place / "run" / "metrics.jsonl").read_text().splitlines()
        # The first one warms up; in the last one others may have ended.
        total += statistics.median(json.loads(line)["images_per_second"] for line in lines[1:-1] or lines[-1:])
    return total


def overhead(folder: Path, size: int, iterations: int, flags: Sequence[str]) -> None:
    shared = ["--iterations", str(iterations), "--log-every", str(max(1, iterations // 5)), *QUIET, *flags]
    part = ["--batch-size", "24"]
    one = images_per_second([*shared, *part], folder / "one", 1)
    apart = images_per_second([*shared, *part], folder / "apart", 1, trainings=size)
    several = images_per_second([*shared, "--batch-size", str(24 * size)], folder / "several", size)
    print(
        f"{several:.1f} images/s of {size} processes: {several / size / one:.1%} of {size} times one's {one:.1f}, "
        f"{several / apart:.1%} of the {apart:.1f} of {size} that know nothing of each other"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--overhead", action="store_true")
    parser.add_argument("--iterations", type=int, default=200)
    options, flags = parser.parse_known_args()
    folder = options.out or Path(tempfile.mkdtemp(prefix="fastdmd-ranks-"))
    folder.mkdir(parents=True, exist_ok=True)
    if options.overhead:
        overhead(folder, options.processes or 2, options.iterations, flags)
    else:
        soak(folder, options.kills, options.processes or 4, options.seed)


if __name__ == "__main__":
    main()
