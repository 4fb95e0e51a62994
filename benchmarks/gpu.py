"""What only a GPU can show, one stage of under nine minutes at a time: `make gpu STAGE=tests|ops|step|...`.

    python -m benchmarks.gpu [STAGE] [--seconds 530] [--arguments ...]

Needs Python, torch, nvcc and pytest (the package's dependencies for `train`). Builds the native libraries in place and
writes `benchmarks/results/<device>-<stage>.json`, whatever becomes of the stage.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.environment import ROOT, describe
from fastdmd import _native

STAGES = {
    "tests": ["-m", "pytest", "-m", "cuda", "-p", "no:cacheprovider", "-rfE", "--tb=short", "tests"],
    "ops": ["-m", "benchmarks.bench_kernels", "--json", "{json}"],
    "sanitize": ["-m", "benchmarks.sanitize", "--json", "{json}"],
    "step": ["-m", "benchmarks.bench_step", "--device", "cuda", "--suite", "--json", "{json}"],
    "profile": ["-m", "benchmarks.timeline", "--json", "{json}"],
    "train": ["-m", "fastdmd.train", "--device", "cuda", "--out", "{folder}/run"],
}
SECONDS = 530  # of a stage


def command(stage: str, folder: str, extra: list[str]) -> list[str]:
    parts = [part.format(folder=folder, json=f"{folder}/measured.json") for part in STAGES[stage]]
    if stage == "tests" and importlib.util.find_spec("xdist"):  # most of the time is compilation
        parts += ["--numprocesses", str(max(1, (os.cpu_count() or 2) * 3 // 4)), "--dist", "worksteal"]
    return [sys.executable, *parts, *extra]


def run_stage(stage: str, seconds: float, extra: list[str]) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        started, lines = time.perf_counter(), Path(folder) / "output"
        with lines.open("w") as output:
            process = subprocess.Popen(
                command(stage, folder, extra), cwd=ROOT, stdout=output, stderr=subprocess.STDOUT,
                start_new_session=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )  # fmt: skip
            try:
                process.wait(timeout=seconds)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # what it started too
                process.wait()
        text = lines.read_text(errors="replace")
        print(text, flush=True)
        result = {
            **describe("cuda"), "stage": stage, "exit_code": process.returncode,
            "seconds": round(time.perf_counter() - started, 1), "output": text.splitlines()[-60:],
        }  # fmt: skip
        for path in (Path(folder) / "measured.json", Path(folder) / "run" / "summary.json"):
            if path.exists():
                result["measured"] = json.loads(path.read_text())
        return result


def build() -> None:
    """Both libraries, in place; exits where one is missing then."""
    environment = {**os.environ, "FASTDMD_NATIVE": "1"}
    built = subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=ROOT, env=environment)
    reason = "its build failed, see above" if built.returncode else _native.load("cuda")
    if reason is not None:
        sys.exit(f"benchmarks.gpu: error: expected the native CUDA library, got none: {reason}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", nargs="?", choices=list(STAGES), help="default: all")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="limit of a stage")
    parser.add_argument("--arguments", nargs=argparse.REMAINDER, default=[], help="for the stage's own command")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu: error: expected a GPU, got a torch that finds none")
    build()
    name = re.search(r"[A-Z]+\d+\w*", torch.cuda.get_device_name())
    device = name.group().lower() if name else "gpu"
    failed = []
    for stage in [options.stage] if options.stage else list(STAGES):
        result = run_stage(stage, options.seconds, options.arguments)
        path = ROOT / "benchmarks" / "results" / f"{device}-{stage}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"{stage}: exit code {result['exit_code']} after {result['seconds']} s, {path.relative_to(ROOT)}")
        failed += [stage] if result["exit_code"] else []
    sys.exit(f"benchmarks.gpu: error: failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
