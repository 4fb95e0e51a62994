"""Times every kernel on a GPU beside eager and compiled PyTorch, against a copy of as many bytes.

    python -m benchmarks.bench_kernels --json FILE [-k group_norm_silu] [--seconds 90]

A row is an op, an implementation, a dtype and a shape: the seconds of a call inside of a CUDA graph, over inputs that
no cache holds (`benchmarks.gpu_timer`); the bytes it must move (`kernel_cases.bytes_moved`); their rate, also as a part
of that of a copy of 256 MB (read and written); how far its results are from the reference's, relative L2. What raises,
hangs or comes too late for `--seconds` is a row that says so. Everything is compiled before, in parallel.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import functools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks import gpu_timer
from benchmarks.environment import describe
from benchmarks.kernel_cases import Case, arguments, bind, bytes_moved, cases, reference, relative_error, results
from benchmarks.worker import Worker

UNCACHED_BYTES = 300_000_000  # of the input sets together: six times the second-level cache of an H100
GRAPH_BYTES = 1_200_000_000  # that the calls of a graph move together: 0.4 ms, so that starting it costs nothing
MAX_CALLS = 256
COMPILE_SECONDS, JOB_SECONDS = 30, 20  # until everything is compiled; of a row
RANDOM = {("add_noise_rng", "eager"), ("add_noise_rng", "compiled")}  # draw other noise than the reference


@contextlib.contextmanager
def on_a_stream():
    """A stream that graphs can be captured on, and no autograd: for a process that measures."""
    with torch.cuda.stream(torch.cuda.Stream()), torch.no_grad():
        yield


def measure(case: Case, implementation: str, device: str = "cuda") -> dict:
    """A row, but what depends on other rows."""
    given = arguments(case, device)
    expected = results(case.op, given, reference(case.op)(*given))
    moved = bytes_moved(case.op, given, expected)
    given = arguments(case, device)
    found = results(case.op, given, bind(case, implementation, given, device)())
    error = None if (case.op, implementation) in RANDOM else relative_error(found, expected)
    del given, found, expected
    num_calls, num_sets = plan(moved)
    calls = [bind(case, implementation, arguments(case, device, seed), device) for seed in range(num_sets)]
    timed = gpu_timer.time_calls([calls[i % num_sets] for i in range(num_calls)])
    return {**timed, "bytes": moved, "input_sets": num_sets, "error_of_result": error}


def plan(moved: int) -> tuple[int, int]:
    """How many calls a graph makes, and on how many input sets."""
    num_calls = min(MAX_CALLS, max(4, math.ceil(GRAPH_BYTES / moved)))
    return num_calls, min(num_calls, math.ceil(UNCACHED_BYTES / moved))


def prepare(case: Case, implementation: str, device: str = "cuda") -> None:
    """Compiles what `measure` will find in the caches of Triton and Inductor."""
    bind(case, implementation, arguments(case, device), device)()
    torch.cuda.synchronize()


def measure_copy() -> dict:
    """256 MB by `copy_`, which is the driver's, and by a kernel of torch that reads and writes as much."""
    source = torch.randn(64_000_000, device="cuda")
    target = torch.empty_like(source)
    timed = gpu_timer.time_calls([functools.partial(target.copy_, source)] * 4)
    kernel = gpu_timer.time_calls([functools.partial(torch.neg, source, out=target)] * 4)
    rates = [2 * target.nbytes / result["seconds"] for result in (timed, kernel)]
    return {**timed, "bytes_per_second": rates[0], "kernel_bytes_per_second": rates[1]}


def measure_matmul(n: int = 8192) -> dict:
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    timed = gpu_timer.time_calls([functools.partial(torch.mm, a, b)] * 4)
    return {**timed, "flops_per_second": 2 * n**3 / timed["seconds"]}


def compile_all(jobs: Sequence[tuple[Case, str]], num_workers: int, seconds: float) -> None:
    """In processes of their own, whose errors are left for the rows to tell. What takes longer is given up."""
    end = time.monotonic() + seconds

    def run(part: Sequence[tuple[Case, str]]) -> None:
        worker = Worker(on_a_stream)
        for job in part:
            if time.monotonic() < end:
                with contextlib.suppress(RuntimeError):
                    worker(prepare, *job, seconds=max(1, end - time.monotonic()))
        worker.close()

    with concurrent.futures.ThreadPoolExecutor(num_workers) as threads:
        list(threads.map(run, [jobs[i::num_workers] for i in range(num_workers)]))


class Report:
    """What has been measured, written after every case."""

    def __init__(self, path: str | None, facts: dict):
        self.path, self.facts, self.rows = path, facts, []

    def add(self, case: Case, implementation: str, measured: dict) -> None:
        row = {
            "op": case.op,
            "implementation": implementation,
            "dtype": case.dtype,
            "shape": list(case.shape),
            "layout": "channels_last" if case.channels_last else "contiguous",
            **measured,
        }
        if "seconds" in row:
            row["gigabytes_per_second"] = row["bytes"] / row["seconds"] / 1e9
            copy = self.facts.get("copy", {}).get("bytes_per_second")
            row["percent_of_copy"] = copy and 1e11 * row["gigabytes_per_second"] / copy
        self.rows.append(row)

    def write(self) -> None:
        if self.path:
            Path(self.path).write_text(json.dumps({**self.facts, "results": self.rows}, indent=1) + "\n")


def table(rows: Sequence[dict]) -> str:
    """A line a case: percent of the copy bandwidth by implementation; of ours time, launches, errors; then failures."""
    names = ("eager", "foreach", "compiled", "triton", "native")
    by_case: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        key = row["op"], row["dtype"], "x".join(map(str, row["shape"])), row["layout"]
        by_case.setdefault(key, {})[row["implementation"]] = row
    heads = "".join(f"{name:>9}" for name in names)
    lines = [f"{'% of copy':<25}{'dtype':<9}{'shape':<16}{'':<3}{heads}  us    launches    error"]
    for (op, dtype, shape, layout), found in by_case.items():
        cells = "".join(f"{_percent(found.get(name)):>9}" for name in names)
        ours = [found.get(name, {}) for name in names[-2:]]
        seconds = min((row["seconds"] for row in ours if "seconds" in row), default=math.nan)
        launches = "/".join(f"{row.get('launches') or math.nan:g}" for row in ours)
        errors = [row["error_of_result"] for row in ours if row.get("error_of_result") is not None]
        error = max(errors, key=lambda e: (math.isnan(e), e), default=math.nan)
        order = "cl" if layout == "channels_last" else ""
        lines.append(f"{op:<25}{dtype:<9}{shape:<16}{order:<3}{cells}{seconds * 1e6:>7.1f} {launches:>7} {error:>8.0e}")
    failed: dict[str, list[str]] = {}
    for row in rows:
        if "failed" in row:
            name = f"{row['implementation']} {row['op']} {row['dtype']} {'x'.join(map(str, row['shape']))}"
            failed.setdefault(row["failed"], []).append(name)
    for reason, names in list(failed.items())[:12]:
        lines.append(f"failed {len(names)}, {names[0]}: {reason}"[:160])
    return "\n".join(lines)


def _percent(row: dict | None) -> str:
    if row is None:
        return ""
    return f"{row['percent_of_copy'] or math.nan:.0f}" if "seconds" in row else "failed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="where to write the figures")
    parser.add_argument("-k", default="", help="only cases with this in `op dtype shape layout`")
    parser.add_argument("--seconds", type=float, default=90, help="after which nothing more is measured")
    options = parser.parse_args()
    end = time.monotonic() + options.seconds
    chosen = [case for case in cases() if options.k in str(case)]
    if not chosen:
        sys.exit(f"benchmarks.bench_kernels: error: expected -k to match a case, got {options.k}")
    if not torch.cuda.is_available():
        sys.exit("benchmarks.bench_kernels: error: expected a GPU, got a torch that finds none")
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # these processes are many already
    os.environ["OMP_NUM_THREADS"] = "1"
    jobs = [(case, name) for case in chosen for name in case.implementations if name in ("triton", "compiled")]
    compile_all(jobs, max(1, min(12, (os.cpu_count() or 2) - 2)), min(COMPILE_SECONDS, options.seconds / 2))
    print(f"compiled, {end - time.monotonic():.0f} s left", flush=True)

    report, worker = Report(options.json, describe("cuda")), Worker(on_a_stream)

    def fact(name: str, function: Callable) -> None:
        report.facts[name] = _attempt(worker, end, function)
        print(name, report.facts[name], flush=True)

    fact("copy", measure_copy)
    fact("matmul", measure_matmul)
    for compiled in (False, True):  # these take longest, and come last
        for case in chosen:
            names = [name for name in case.implementations if (name == "compiled") == compiled]
            for implementation in names:
                report.add(case, implementation, _attempt(worker, end, measure, case, implementation))
            if names:
                report.write()
                print(f"{end - time.monotonic():4.0f} s left: {case} {', '.join(names)}", flush=True)
    fact("copy_afterwards", measure_copy)
    worker.close()
    report.write()
    print(table(report.rows))


def _attempt(worker: Worker, end: float, function: Callable, *arguments) -> dict:
    """What the function measures, or why it did not."""
    left = end - time.monotonic()
    if left < 1:
        return {"failed": "the time was over"}
    try:
        measured = worker(function, *arguments, seconds=min(JOB_SECONDS, left))
    except RuntimeError as error:
        return {"failed": str(error)}
    if measured["method"] != "graph":
        worker.close()  # a capture that failed leaves torch's allocator waiting for its end
    return measured


if __name__ == "__main__":
    main()
