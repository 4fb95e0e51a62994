"""Where the time of captured DMD2 cycles goes on a GPU: kernels, idle gaps, host syncs, memory, the first calls.

    python -m benchmarks.timeline [--preset mnist] [--batch-size 128] [--ratio 10] [--iterations 1000] [--json FILE]

Weights and data are random, as in benchmarks/bench_step.py. Speed, syncs and memory are those of iterations that nobody
watches; one more cycle is recorded by the profiler, whose cost makes its gaps longer than they are. Exit code 1: the
host waited for the device, or memory grew; 2: the device is not there. On a CPU, only what needs no CUDA.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.bench_step import SUITE
from benchmarks.environment import describe
from benchmarks.gpu_trace import read_trace, summarize
from benchmarks.loops import Loop, matmul_peak
from fastdmd.distill import execution

DEFAULTS = {setting["preset"]: setting for setting in SUITE}
TURNS = ("generator", "guidance", "generation")
MAX_WARMUP_CYCLES = 8
NOMINAL_FLOPS = 989e12  # per second, of an H100 SXM in bfloat16, dense
SYNC_WARNING = "called a synchronizing CUDA operation"


def iterate(loop: Loop) -> None:
    loop.model.iterate(loop.step, loop.draws)
    loop.step += 1


def warm_up(loop: Loop) -> list[dict]:
    """Whole cycles until every turn is captured, and one more; each iteration with its seconds and what it captured.

    Iteration 0 compiles and tunes the networks. Raises RuntimeError if turns stay without a graph.
    """
    wanted = set(TURNS[: 2 if loop.ratio == 1 else 3]) if loop.model.executor.name == "captured" else set()
    records, complete = [], False
    for _ in range(MAX_WARMUP_CYCLES):
        was_complete = complete
        for _ in range(loop.ratio):
            before, started = loop.model.captured_turns, time.perf_counter()
            iterate(loop)
            loop.synchronize()
            seconds = time.perf_counter() - started
            names = sorted(loop.model.captured_turns - before)
            records.append({"iteration": loop.step - 1, "seconds": seconds, "captured": names})
        complete = wanted <= loop.model.captured_turns
        if was_complete and complete:
            return records
    got = sorted(loop.model.captured_turns)
    raise RuntimeError(f"expected all turns captured after {loop.step} iterations, got {got} alone")


@contextlib.contextmanager
def host_syncs(device: torch.device) -> Iterator[Counter]:
    """Counts the calls inside that make the host wait for the GPU, by the line of Python that they come from.

    torch knows of those that it makes itself: `.item()`, copies to and from memory that is not pinned, `nonzero`.
    """
    found: Counter = Counter()
    if device.type != "cuda":
        yield found
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found.update(f"{Path(w.filename).name}:{w.lineno}" for w in caught if SYNC_WARNING in str(w.message))


def steady(loop: Loop, num_iterations: int) -> dict:
    """Whole cycles, at least so many iterations, in one go: seconds, host syncs, and memory after every cycle."""
    num_cycles = -(-num_iterations // loop.ratio)
    on_gpu, allocated = loop.device.type == "cuda", []
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(loop.device)
    loop.synchronize()
    with host_syncs(loop.device) as syncs:
        started = time.perf_counter()
        for _ in range(num_cycles):
            for _ in range(loop.ratio):
                iterate(loop)
            if on_gpu:
                allocated.append(torch.cuda.memory_allocated(loop.device))  # counted on the host
        queued = time.perf_counter() - started
    loop.synchronize()
    seconds = time.perf_counter() - started
    images = num_cycles * loop.ratio * loop.config.batch_size
    return {
        "iterations": num_cycles * loop.ratio,
        "seconds": seconds,
        "seconds_on_the_host": queued,
        "seconds_per_cycle": seconds / num_cycles,
        "images_per_second": images / seconds,
        "host_syncs": sum(syncs.values()) if on_gpu else None,
        "host_syncs_by_line": dict(syncs.most_common(10)),
        "memory": memory(loop.device, allocated) if on_gpu else None,
    }


def memory(device: torch.device, allocated: list[int]) -> dict:
    """Bytes allocated after each of the cycles, and at most; bytes reserved, those of CUDA graphs apart."""
    reserved: Counter = Counter()
    for segment in torch.cuda.memory_snapshot():
        in_graph = tuple(segment["segment_pool_id"]) != (0, 0)
        reserved["graphs" if in_graph else "others"] += segment["total_size"]
    return {
        "allocated_bytes": {
            "first": allocated[0],
            "last": allocated[-1],
            "least": min(allocated),
            "most": max(allocated),
        },
        "grows": allocated[-1] > allocated[0],
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(device),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(device),
        "reserved_bytes": dict(reserved),
    }


def recorded_cycle(loop: Loop) -> dict:
    """What the GPU did in one cycle. Raises RuntimeError if the profiler saw no kernel."""
    for _ in range(2):  # the first one starts the profiler of the driver, for seconds
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            loop.cycle()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        activities, runtime_calls = read_trace(path)
    if not any(activity.kind == "kernel" for activity in activities):
        raise RuntimeError("expected kernels in the profiler's trace of a cycle, got none")
    return {**summarize(activities), "runtime_calls": dict(runtime_calls.most_common(20))}


def cycle_flops(arguments: argparse.Namespace) -> int:
    """Of the convolutions, matrix products and attention of an eager cycle."""
    loop = Loop("fastdmd", arguments, execution="eager")
    with FlopCounterMode(display=False) as flops:
        loop.cycle()
    return flops.get_total_flops()


def watch(loop: Loop, num_iterations: int, result: dict, save: Callable[[dict], None]) -> None:
    """Adds what the loop does; `save` gets what is known after each part, in case that a time limit comes."""
    on_gpu = loop.device.type == "cuda"
    records = warm_up(loop)
    result["first_iteration_seconds"] = records[0]["seconds"]
    result["capture_seconds"] = {name: r["seconds"] for r in records for name in r["captured"]}  # of the iteration
    result["warm_up"] = records
    if on_gpu:
        result["peak_allocated_bytes_of_warm_up"] = torch.cuda.max_memory_allocated(loop.device)
    save(result)
    result["steady"] = steady(loop, num_iterations)
    save(result)
    if on_gpu:
        result["cycle"] = recorded_cycle(loop)
        seconds = result["steady"]["seconds_per_cycle"]
        result["idle_share_without_profiler"] = 1 - result["cycle"]["busy_us"] / 1e6 / seconds
        save(result)


def faults(result: dict) -> list[str]:
    """What a captured loop must not do."""
    found, steady = [], result["steady"]
    if steady["host_syncs"]:
        found.append(f"expected no host sync, got {steady['host_syncs']}: {steady['host_syncs_by_line']}")
    if steady["memory"] and steady["memory"]["grows"]:
        found.append(f"expected flat memory, got bytes allocated {steady['memory']['allocated_bytes']}")
    return found


def table(result: dict) -> str:
    steady, cycle = result["steady"], result.get("cycle")
    captures = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in result["capture_seconds"].items())
    lines = [
        f"{steady['images_per_second']:.1f} images/s over {steady['iterations']} iterations, {result['execution']}",
        f"set up {result['set_up_seconds']:.1f} s, first iteration {result['first_iteration_seconds']:.1f} s"
        + (f", iterations that capture: {captures}" if captures else ""),
        f"{result['flops_per_cycle'] / 1e12:.2f} TFLOP a cycle in {steady['seconds_per_cycle'] * 1e3:.2f} ms: "
        + ", ".join(f"{100 * share:.1f} % {of}" for of, share in result["utilisation"].items() if share is not None),
    ]
    if steady["memory"]:
        held = steady["memory"]
        reserved = ", ".join(f"{value / 1e6:.0f} MB {name}" for name, value in held["reserved_bytes"].items())
        lines.append(
            f"host syncs {steady['host_syncs']}; allocated {held['allocated_bytes']}, peak"
            f" {held['peak_allocated_bytes'] / 1e6:.0f} MB; reserved {reserved}"
        )
    if cycle:
        lines += [
            f"recorded cycle: {cycle['span_us'] / 1e3:.2f} ms, busy {cycle['busy_us'] / 1e3:.2f} ms, idle"
            f" {100 * cycle['idle_share']:.1f} %; idle without the profiler"
            f" {100 * result['idle_share_without_profiler']:.1f} %",
            f"counts: {cycle['counts']}; copies: {cycle['copies']}",
            f"host calls: {cycle['runtime_calls']}",
        ]
        for kind in ("families", "kernels"):
            lines += [
                f"  {name[:72]:<74}{row['us'] / 1e3:>9.3f} ms{100 * row['share']:>6.1f} %{row['count']:>6}"
                for name, row in cycle[kind].items()
            ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("benchmarks.timeline", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="mnist", choices=list(DEFAULTS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch-size", type=int, help="default: 128, 64 and 40 images")
    parser.add_argument("--ratio", type=int, help="guidance turns per generator turn; default: 10, 5 and 5")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "tf32", "bf16"])
    parser.add_argument("--execution", default="auto", choices=["auto", "eager", "compiled", "captured"])
    parser.add_argument("--compile-mode", default=execution.COMPILE_MODE, help="of torch.compile, on a GPU")
    parser.add_argument("--iterations", type=int, default=1000)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args(arguments)
    for name in ("batch_size", "ratio"):
        if getattr(options, name) is None:
            setattr(options, name, DEFAULTS[options.preset][name])

    def save(result: dict) -> None:
        if options.json:
            options.json.write_text(json.dumps(result, indent=1, default=str) + "\n")

    try:
        for name in ("batch_size", "ratio", "iterations"):
            if getattr(options, name) < 1:
                raise ValueError(f"expected --{name.replace('_', '-')} of at least 1, got {getattr(options, name)}")
        if options.json and not options.json.parent.is_dir():
            raise ValueError(f"expected --json in a folder that is there, got {options.json}")
        started = time.perf_counter()
        loop = Loop("fastdmd", options)
    except ValueError as error:
        print(f"benchmarks.timeline: error: {error}", file=sys.stderr)
        return 2
    device, dtype = loop.device, loop.model.generator_optimizer.parameters[0].dtype
    result = {
        **describe(device.type),
        "settings": {k: v for k, v in vars(options).items() if k != "json"},
        "execution": loop.model.executor.name,
        "compute_dtype": str(dtype),
        "set_up_seconds": time.perf_counter() - started,
    }
    watch(loop, options.iterations, result, save)
    del loop  # its memory is for the next
    result["flops_per_cycle"], result["matmul_peak"] = cycle_flops(options), matmul_peak(device, dtype)
    rate = result["flops_per_cycle"] / result["steady"]["seconds_per_cycle"]
    nominal = rate / NOMINAL_FLOPS if re.search("H[12]00", result["device"]) else None
    result["utilisation"] = {"of a large matrix product": rate / result["matmul_peak"], "of nominal": nominal}
    save(result)
    print(table(result))
    found = faults(result)
    for fault in found:
        print(f"benchmarks.timeline: error: {fault}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
