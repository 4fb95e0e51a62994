"""Runs the project's kernels under compute-sanitizer, one tool after the other; needs a GPU and the CUDA toolkit.

    python -m benchmarks.sanitize [--backend native|triton] [--tools memcheck racecheck synccheck] [--json FILE]

Without a tool first, which tells a wrong result from an illegal access. The caching allocator is off, so that an access
behind the end of a tensor is one behind the end of its allocation. Exit code 1: a tool found something, or could not
finish; 2: it is not there.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from benchmarks.drive_kernels import CASES
from benchmarks.environment import ROOT, describe

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
PLAIN = "none"  # the run without a tool
# racecheck has a summary of its own: "RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)".
SUMMARY = re.compile(r"^=+ (?:ERROR SUMMARY: (\d+) errors?$|RACECHECK SUMMARY: (\d+) hazards? displayed)", re.MULTILINE)


def find_sanitizer() -> str | None:
    """On the path, or in the toolkit that CUDA_HOME names."""
    toolkit = Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda")
    folders = [os.environ.get("PATH", os.defpath), str(toolkit / "bin"), str(toolkit / "compute-sanitizer")]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def fill_cache(driver: list[str], names: Iterable[str], seconds: float) -> None:
    """Has Triton compile about 150 variants of its kernels, the ops side by side; errors come again in `run`."""
    command, deadline = [sys.executable, *driver], time.perf_counter() + seconds
    processes = [
        subprocess.Popen([*command, "--op", name], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for name in names
    ]
    for process in processes:
        try:
            process.wait(max(0.1, deadline - time.perf_counter()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def run(tool: str, sanitizer: str, driver: list[str], seconds: float) -> dict:
    """One run of `driver` under a tool, or under none; ended after so many seconds.

    `errors` is what the tool's summary counts, None without one; `exit_code` is None if the time was over.
    """
    command = [sys.executable, *driver]
    if tool != PLAIN:
        # What torch and Triton ask of the driver in vain is no error; a launch that fails, they report themselves.
        quiet = ["--report-api-errors", "no"] if tool == "memcheck" else []
        command = [
            sanitizer,
            "--tool",
            tool,
            *quiet,
            "--target-processes",
            "application-only",
            "--error-exitcode",
            "99",
            "--print-limit",
            "20",
            *command,
        ]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONUNBUFFERED": "1"}
    started = time.perf_counter()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
        exit_code = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the tool and what it watches
        output, _ = process.communicate()
        exit_code = None
    return {
        "errors": None if tool == PLAIN else num_errors(output),
        "exit_code": exit_code,
        "seconds": round(time.perf_counter() - started, 1),
        "findings": [line for line in output.splitlines() if line.startswith("=========")][:100],
        "output": output.splitlines()[-40:],
    }


def num_errors(output: str) -> int | None:
    """Of all summaries in the output; None if there is none, as of a tool that broke off."""
    counts = [int(errors or hazards) for errors, hazards in SUMMARY.findall(output)]
    return sum(counts) if counts else None


def passed(tool: str, result: dict) -> bool:
    return result["exit_code"] == 0 and (tool == PLAIN or result["errors"] == 0)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("benchmarks.sanitize", description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="native", choices=["native", "triton"])
    parser.add_argument("--tools", nargs="+", default=list(TOOLS[:3]), choices=TOOLS)
    parser.add_argument("--small", action="store_true", help="fewer forms and dtypes; always so for Triton")
    parser.add_argument("--seconds", type=float, default=120, help="of each run, at most")
    parser.add_argument("--json", type=Path, help="where to write the findings")
    options = parser.parse_args(arguments)
    sanitizer = find_sanitizer()
    reason = None if torch.cuda.is_available() else "expected a GPU, got a torch that finds none"
    if sanitizer is None:
        reason = "expected compute-sanitizer on the path or in the toolkit of CUDA_HOME, got none"
    if reason is not None:
        print(f"benchmarks.sanitize: error: {reason}", file=sys.stderr)
        return 2
    driver = ["-m", "benchmarks.drive_kernels", "--backend", options.backend]
    if options.small or options.backend == "triton":
        driver.append("--small")
    if options.backend == "triton":
        fill_cache(driver, CASES, options.seconds)
    environment, results = describe("cuda"), {}
    for tool in (PLAIN, *options.tools):
        result = results[tool] = run(tool, sanitizer, driver, options.seconds)
        errors = "" if tool == PLAIN else f", errors: {result['errors']}"
        print(f"{tool:<10} exit code {result['exit_code']}{errors}, after {result['seconds']} s", flush=True)
        if not passed(tool, result):
            print("\n".join(result["findings"][:40] + result["output"][-20:]), flush=True)
        if options.json:  # after each: what a time limit leaves is whole
            content = {**environment, "backend": options.backend, "command": driver, "tools": results}
            options.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0 if all(passed(tool, result) for tool, result in results.items()) else 1


if __name__ == "__main__":
    sys.exit(main())
