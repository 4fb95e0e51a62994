"""Times the default distillation on a CPU that others use too: one busy process per core beside it, and none.

    python -m benchmarks.bench_busy [--seconds 8] [--rounds 3] [--competitors N] [--json FILE]

In alternation, each in a process of its own: threads as a command chooses them (`fastdmd.runs.startup`), one thread,
and threads that OpenMP is left alone with. Medians of images/s, quiet and busy; ratios are medians of the rounds'
ratios. `--policy NAME=VALUE,...` times another choice of environment variables as well.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from fastdmd.runs import startup

POLICIES = {"chosen": None, "one thread": {"OMP_NUM_THREADS": "1"}, "as OpenMP does": {"OMP_DYNAMIC": "false"}}
WARMUP_ITERATIONS = 4


def measure(seconds: float) -> dict:
    """Images per second of the default distillation in this process; its settings of threads come before torch."""
    startup.settle_threads()
    import torch

    from fastdmd import teachers
    from fastdmd.runs import distillation, machine
    from fastdmd.runs.config import TrainConfig

    device, teacher = torch.device("cpu"), teachers.load("mnist")
    config = TrainConfig().for_teacher(teacher)
    machine.prepare(device, precision=config.compute.precision, batch_size=config.batch_size)
    model, draws = distillation.build(config, teacher), distillation.make_draws(config, teacher, device)
    step, started, num_images = 0, time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        model.iterate(step, draws)
        step += 1
        num_images += config.batch_size
        if step == WARMUP_ITERATIONS:
            started, num_images = time.perf_counter(), 0
    return {"images_per_second": num_images / (time.perf_counter() - started), "threads": torch.get_num_threads()}


@contextlib.contextmanager
def competitors(count: int) -> Iterator[None]:
    """So many processes that never wait; each is ended by its id."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def run(policy: dict[str, str] | None, seconds: float) -> dict:
    """`measure` in a process with these settings; None: with none, so that it chooses."""
    environment = {name: value for name, value in os.environ.items() if name not in startup.THREAD_SETTINGS}
    command = [sys.executable, "-m", "benchmarks.bench_busy", "--measure", "--seconds", str(seconds)]
    done = subprocess.run(command, env={**environment, **(policy or {})}, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def benchmark(arguments: argparse.Namespace, policies: dict[str, dict[str, str] | None]) -> dict:
    rates = {}
    for situation, count in (("quiet", 0), ("busy", arguments.competitors)):
        rates[situation] = {name: [] for name in policies}
        for _ in range(arguments.rounds):
            for name, policy in policies.items():
                with competitors(count):
                    rates[situation][name].append(run(policy, arguments.seconds)["images_per_second"])

    def ratio(situation: str, one: str, other: str) -> float:
        pairs = zip(rates[situation][one], rates[situation][other], strict=True)
        return statistics.median(a / b for a, b in pairs)

    return {
        "competitors": arguments.competitors,
        "cores": os.cpu_count(),
        "images_per_second": {
            situation: {name: statistics.median(values) for name, values in found.items()}
            for situation, found in rates.items()
        },
        "ratio_to_one_thread_busy": {name: ratio("busy", name, "one thread") for name in policies},
        "ratio_to_openmp_quiet": {name: ratio("quiet", name, "as OpenMP does") for name in policies},
        "all": rates,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--competitors", type=int, default=os.cpu_count(), help="busy processes (default: one a core)")
    parser.add_argument("--policy", action="append", default=[], help="NAME=VALUE,... : another choice to time")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.seconds)))
        return
    others = {text: dict(pair.split("=", 1) for pair in text.split(",")) for text in arguments.policy}
    result = benchmark(arguments, POLICIES | others)
    for situation, found in result["images_per_second"].items():
        print(situation, {name: round(rate, 1) for name, rate in found.items()})
    for key in ("ratio_to_one_thread_busy", "ratio_to_openmp_quiet"):
        print(key, {name: round(value, 3) for name, value in result[key].items()})
    if arguments.json:
        from benchmarks.environment import describe

        arguments.json.write_text(json.dumps({**describe("cpu"), **result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
