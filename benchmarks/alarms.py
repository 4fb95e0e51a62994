"""Runs distillations that fail, each in its own way, and others that do not, and reports which alarm came when.

    python -m benchmarks.alarms [--json FILE] [--quick] [--seeds 1 2] [--only NAME ...]

Each is a short run of the embedded teacher (`benchmarks/failures.py`) with the alarms of `fastdmd.train` and a snapshot
every 32 iterations: failures once, with the first seed, healthy ones with every seed. A failure should raise an alarm
within two snapshots, where its run ends, a healthy run none. The limits of `quality/alarms.py` were chosen by runs with
seed 0. `--quick` runs one of each kind.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.failures import FAILURES, HEALTHY, Case
from benchmarks.short_runs import SETTINGS, SNAPSHOT, lines
from fastdmd.quality.alarms import Alarm
from fastdmd.runs import machine


def run(case: Case, seed: int, iterations: int, *, until_alarm: bool, **settings: Any) -> dict:
    """Which alarms came, and when; of a run that ends with the first of them if it is `until_alarm`."""
    started = time.perf_counter()
    alarms: list[Alarm] = []
    for line in lines(case, seed, iterations, **settings):
        alarms += line.alarms
        if until_alarm and alarms:
            break
    found = [{"iteration": alarm.iteration, "kind": alarm.kind} for alarm in alarms]
    return {"name": case.name, "seed": seed, "alarms": found, "seconds": round(time.perf_counter() - started, 1)}


def run_failure(case: Case, seed: int) -> dict:
    """Until an alarm comes, or two snapshots after the fault: right is one that comes, and not before it.

    Rates do not fall before it ends.
    """
    found = run(case, seed, case.at + 2 * SNAPSHOT, until_alarm=True, lr_schedule="constant")
    return {**found, "broken_at": case.at, "right": any(alarm["iteration"] > case.at for alarm in found["alarms"])}


def run_healthy(case: Case, seed: int) -> dict:
    """Right without an alarm."""
    found = run(case, seed, 5 * SNAPSHOT, until_alarm=False)
    return {**found, "right": not found["alarms"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where to write what came")
    parser.add_argument("--quick", action="store_true", help="one failure and one healthy run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2], help="of healthy runs; failures have the first")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="cases of these names")
    arguments = parser.parse_args()
    machine.prepare(torch.device("cpu"), precision="fp32", batch_size=SETTINGS["batch_size"])
    runs = [(case, arguments.seeds[0], True) for case in FAILURES]
    runs += [(case, seed, False) for seed in arguments.seeds for case in HEALTHY]
    if arguments.only:
        runs = [one for one in runs if one[0].name in arguments.only]
    if arguments.quick:
        runs = [next(one for one in runs if one[2]), next(one for one in runs if not one[2])]
    found: dict[str, list[dict]] = {"failures": [], "healthy": []}
    for case, seed, fails in runs:
        result = run_failure(case, seed) if fails else run_healthy(case, seed)
        found["failures" if fails else "healthy"].append(result)
        told = ", ".join(f"{alarm['kind']} at {alarm['iteration']}" for alarm in result["alarms"]) or "no alarm"
        print(f"{'right' if result['right'] else 'WRONG'}  {case.name}, seed {seed}: {told}", flush=True)
    for kind, results in found.items():
        print(f"{kind}: {sum(result['right'] for result in results)} of {len(results)} right")
    if arguments.json:
        from benchmarks.environment import describe

        arguments.json.write_text(json.dumps({**describe("cpu"), "settings": SETTINGS, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
