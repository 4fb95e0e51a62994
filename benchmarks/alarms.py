"""Runs distillations that fail, each in its own way, and others that do not, and reports which alarm came when.

    python -m benchmarks.alarms [--json FILE] [--quick] [--seeds 1 2] [--only NAME ...]

Each is a run of the embedded teacher (`benchmarks/failures.py`) with the loop and the alarms of `fastdmd.train`, short,
a snapshot every 32 iterations: failures once, with the first seed, healthy ones with every seed. A failure should raise an
alarm within two snapshots, where its run ends, a healthy run none. The limits of `quality/alarms.py` were chosen by runs
with seed 0. `--quick` runs one of each kind.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.failures import FAILURES, HEALTHY, Case
from fastdmd import teachers
from fastdmd.runs import distillation, machine
from fastdmd.runs.config import ResolvedTrainConfig, TrainConfig
from fastdmd.runs.folder import RunFolder
from fastdmd.runs.loop import Loop

SNAPSHOT = 32  # iterations
SETTINGS = {"iterations": 5 * SNAPSHOT, "batch_size": 24, "warmup_iterations": 20, "log_every": 8, "snapshots": 5}


class Faulty(distillation.Distillation):
    """A distillation to which something is done."""

    def __init__(self, case: Case, config: ResolvedTrainConfig, folder: RunFolder):
        teacher = teachers.load("mnist")
        super().__init__(config, teacher, folder, real=distillation.real_images(config, teacher, None))
        self.case = case

    def iterate(self, iteration: int) -> None:
        if iteration == self.case.at and self.case.fault is not None:
            self.case.fault(self.model)
        super().iterate(iteration)


def failing(case: Case) -> dict:
    """Settings of a run that ends two snapshots after it breaks, with rates that do not fall before."""
    iterations = case.at + 2 * SNAPSHOT
    return {"iterations": iterations, "snapshots": iterations // SNAPSHOT, "lr_schedule": "constant"}


def run(case: Case, seed: int, **settings: Any) -> dict:
    """Which alarms came, and when."""
    started = time.perf_counter()
    config = TrainConfig(seed=seed).replace(**SETTINGS | settings | case.options).for_teacher(teachers.load("mnist"))
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        run_folder = RunFolder(Path(folder) / "run", {})
        training = Faulty(case, config, run_folder)
        summary = Loop(training, config, run_folder, distillation.make_watch(config, training.model, None)).run()
    return {
        "name": case.name,
        "seed": seed,
        "outcome": summary["outcome"],
        "alarms": [{"iteration": alarm["iteration"], "kind": alarm["kind"]} for alarm in summary["alarms"]],
        "seconds": round(time.perf_counter() - started, 1),
    }


def judged_failure(case: Case, found: dict) -> dict:
    """With whether an alarm came within two snapshots of the fault."""
    since = [alarm["iteration"] - case.at for alarm in found["alarms"]]
    return {**found, "broken_at": case.at, "right": any(0 < number <= 2 * SNAPSHOT for number in since)}


def judged_healthy(found: dict) -> dict:
    """With whether it came to its end without an alarm."""
    return {**found, "right": not found["alarms"] and found["outcome"] == "complete"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where to write what came")
    parser.add_argument("--quick", action="store_true", help="one failure and one healthy run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2], help="of healthy runs; failures have the first")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="cases of these names")
    arguments = parser.parse_args()
    machine.prepare(distillation.torch.device("cpu"), precision="fp32", batch_size=SETTINGS["batch_size"])
    runs = [(case, arguments.seeds[0], True) for case in FAILURES]
    runs += [(case, seed, False) for seed in arguments.seeds for case in HEALTHY]
    if arguments.only:
        runs = [one for one in runs if one[0].name in arguments.only]
    if arguments.quick:
        runs = [next(one for one in runs if one[2]), next(one for one in runs if not one[2])]
    found: dict[str, list[dict]] = {"failures": [], "healthy": []}
    for case, seed, fails in runs:
        result = judged_failure(case, run(case, seed, **failing(case))) if fails else judged_healthy(run(case, seed))
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
