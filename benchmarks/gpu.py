"""What only a GPU can show, one stage of under nine minutes at a time: `make gpu STAGE=tests|ops|step|train`.

    python -m benchmarks.gpu [tests|ops|step|train]

Needs Python, torch, nvcc and pytest (the package's dependencies for `train`). Builds the native libraries in place and
writes `benchmarks/results/<device>-<stage>.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.environment import ROOT, describe

STAGES = {
    "tests": ["-m", "pytest", "-m", "cuda", "-q", "-p", "no:cacheprovider", "tests"],
    "ops": ["-m", "benchmarks.bench_kernels", "--json", "{json}"],
    "step": ["-m", "benchmarks.bench_step", "--device", "cuda", "--suite", "--json", "{json}"],
    "train": ["-m", "fastdmd.train", "--device", "cuda", "--out", "{folder}/run"],
}
SECONDS = 530  # of a stage


def run_stage(stage: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        measured = Path(folder) / "measured.json"
        command = [sys.executable, *(part.format(folder=folder, json=measured) for part in STAGES[stage])]
        started = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            output, _ = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
        print(output)
        result = {
            **describe("cuda"), "stage": stage, "exit_code": process.returncode,
            "seconds": round(time.perf_counter() - started, 1), "output": output.splitlines()[-60:],
        }  # fmt: skip
        for path in (measured, Path(folder) / "run" / "summary.json"):
            if path.exists():
                result["measured"] = json.loads(path.read_text())
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", nargs="?", choices=list(STAGES), help="default: all")
    stage = parser.parse_args().stage
    stages = [stage] if stage else list(STAGES)
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu: error: expected a GPU, got a torch that finds none")
    environment = {**os.environ, "FASTDMD_NATIVE": "1"}
    subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=ROOT, env=environment, check=True)
    name = re.search(r"[A-Z]+\d+\w*", torch.cuda.get_device_name())
    device = name.group().lower() if name else "gpu"
    failed = []
    for stage in stages:
        result = run_stage(stage)
        path = ROOT / "benchmarks" / "results" / f"{device}-{stage}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"{stage}: exit code {result['exit_code']} after {result['seconds']} s, {path.relative_to(ROOT)}")
        failed += [stage] if result["exit_code"] else []
    sys.exit(f"benchmarks.gpu: error: failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
