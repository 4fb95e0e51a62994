"""Times whole DMD2 cycles, a generator turn and its guidance turns, beside two other loops and the floor.

    python -m benchmarks.bench_step [--preset mnist] [--device cpu] [--batch-size 128] [--precision fp32] [--json FILE]
    python -m benchmarks.bench_step --preset foreign --batch-size 8

One network, one batch, one run: fastdmd, the textbook loop, with --compiled the fair compiled loop, on a CPU also that
without compilation, and the convolutions and matrix products of fastdmd's cycle alone (the floor). Of a network of
somebody else, a textbook's (`foreign`) or `diffusers`', also fastdmd without `fastdmd.accelerate`, and no floor.
Medians; ratios are medians of the rounds' ratios. Weights and data are random, so that it runs anywhere. Each has a
process of its own, so that what one asks of threads, memory and arithmetic (`fastdmd.runs.machine`) is no other's. On a
CPU they alternate; on a GPU, whose memory may not hold them all, each is made, timed and closed before the next.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import operator
import statistics
import time
from pathlib import Path

from benchmarks import loops
from benchmarks.environment import describe
from benchmarks.worker import Worker
from fastdmd.distill import execution
from fastdmd.runs.cli import resolve_device

SUITE = [
    {"preset": "mnist", "batch_size": 128, "ratio": 10},
    {"preset": "cifar10-cond", "batch_size": 64, "ratio": 5},
    {"preset": "cifar10-cond", "batch_size": 16, "ratio": 5},
    {"preset": "imagenet64", "batch_size": 40, "ratio": 5},
]


def peak_bytes(name: str, arguments: argparse.Namespace) -> int:
    """In a process of its own, of the cycles that warm it up."""
    with opened(name, arguments) as ask:
        for _ in range(loops.WARM_UP):
            ask("cycle")
        return ask("peak_bytes")


@contextlib.contextmanager
def opened(name: str, arguments: argparse.Namespace):
    """A loop in a process of its own, as a function that calls the method of a name there."""
    worker = Worker(functools.partial(loops.made, name, arguments))
    try:
        worker.start()  # or it would disturb what is timed beside
        yield lambda method: worker(operator.methodcaller(method))
    finally:
        worker.close()


def alternate(names: list[str], arguments: argparse.Namespace) -> tuple[dict, dict, dict]:
    """Seconds of each loop's cycles, a cycle of each in turn; peak bytes; what each tells about itself."""
    memory = {name: peak_bytes(name, arguments) for name in names if name != "floor"} if arguments.memory else {}
    with contextlib.ExitStack() as stack:
        asks = {name: stack.enter_context(opened(name, arguments)) for name in names}
        for ask in asks.values():
            for _ in range(loops.WARM_UP):
                ask("cycle")
        seconds = {name: [] for name in names}
        for _ in range(arguments.rounds):
            for name, ask in asks.items():
                time.sleep(0.1)  # until the threads of the one before no longer wait for work
                seconds[name].append(ask("cycle"))
        return seconds, memory, {name: ask("facts") for name, ask in asks.items()}


def one_by_one(names: list[str], arguments: argparse.Namespace) -> tuple[dict, dict, dict]:
    """The same, each with the device to itself. One that fails is left out, and says why."""
    seconds, memory, facts = {}, {}, {}
    for name in names:
        try:
            with opened(name, arguments) as ask:
                first = [ask("cycle") for _ in range(loops.WARM_UP)]
                seconds[name] = [ask("cycle") for _ in range(arguments.rounds)]
                print(f"  {name}: {statistics.median(seconds[name]):.4f} s a cycle, first {first[0]:.1f} s", flush=True)
                if arguments.memory and name != "floor":
                    memory[name] = ask("peak_bytes")
                facts[name] = {**ask("facts"), "first_cycles": first}
        except RuntimeError as error:
            facts[name] = {**facts.get(name, {}), "failed": str(error)}
            print(f"  {name}: {error}", flush=True)
    return seconds, memory, facts


def benchmark(arguments: argparse.Namespace) -> dict:
    device = resolve_device(arguments.device)
    last = ["unaccelerated", "fastdmd"] if arguments.preset in loops.FOREIGN else ["fastdmd", "floor"]
    fair = ["compiled", "uncompiled"] if device.type == "cpu" else ["compiled"]
    names = ["textbook", *(fair if arguments.compiled else []), *last]
    measure = alternate if device.type == "cpu" else one_by_one
    seconds, memory, facts = measure([name for name in names if name not in arguments.without], arguments)
    floor = facts.get("floor", {})
    failed = {name: fact.pop("failed") for name, fact in facts.items() if "failed" in fact}

    def ratio(one: str, other: str) -> float | None:
        if one not in seconds or other not in seconds:
            return None
        return statistics.median(a / b for a, b in zip(seconds[one], seconds[other], strict=True))

    def utilisation() -> float | None:
        if "fastdmd" not in seconds or "flops" not in floor:
            return None
        return floor["flops"] / statistics.median(seconds["fastdmd"]) / floor["matmul_peak"]

    images = arguments.ratio * arguments.batch_size
    return {
        **describe(device.type),
        "settings": {k: v for k, v in vars(arguments).items() if k not in ("json", "suite")},
        "images_per_second": {k: images / statistics.median(v) for k, v in seconds.items() if k != "floor"},
        "ratio_to_textbook": ratio("textbook", "fastdmd"),
        "ratio_to_compiled": ratio("compiled", "fastdmd"),
        "ratio_to_uncompiled": ratio("uncompiled", "fastdmd"),
        "ratio_to_unaccelerated": ratio("unaccelerated", "fastdmd"),
        "time_over_floor": ratio("fastdmd", "floor"),
        "seconds_per_cycle": seconds,
        "first_cycles": {name: fact.pop("first_cycles") for name, fact in facts.items() if "first_cycles" in fact},
        "floor_layouts": floor.get("layouts"),
        "flops_per_cycle": floor.get("flops"),
        "matmul_peak": floor.get("matmul_peak"),
        "utilisation": utilisation(),
        "peak_bytes": memory,
        "failed": failed,
        **facts.get("fastdmd", {}),
    }


def table(result: dict) -> str:
    lines = [f"{name:<14}{rate:>10.1f} images/s" for name, rate in result["images_per_second"].items()]
    ratios = [key for key in result if key.startswith("ratio_to_")]
    for key in (*ratios, "time_over_floor", "utilisation"):
        if result[key] is not None:
            lines.append(f"{key:<24}{result[key]:>6.2f}")
    for kind in ("seconds_by_part", "seconds_by_op"):
        if kind not in result:
            continue
        total = sum(result["seconds_by_part"].values())
        lines += [f"  {name[:44]:<46}{100 * seconds / total:>5.1f} %" for name, seconds in result[kind].items()]
    lines += [f"peak of {name:<14}{value / 1e6:>8.0f} MB" for name, value in result["peak_bytes"].items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="mnist", choices=["mnist", "cifar10-cond", "imagenet64", *loops.FOREIGN])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--ratio", type=int, default=10, help="guidance turns per generator turn")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "tf32", "bf16"])
    parser.add_argument("--execution", default="auto", choices=["auto", "eager", "compiled", "captured"])
    parser.add_argument("--compile-mode", default=execution.COMPILE_MODE, help="of torch.compile, for fastdmd on a GPU")
    parser.add_argument("--rounds", type=int, default=5, help="timed cycles of each loop")
    parser.add_argument("--compiled", action="store_true", help="the fair loops too (minutes on a CPU)")
    parser.add_argument(
        "--without",
        nargs="*",
        default=[],
        choices=["textbook", "fastdmd", "floor"],
        metavar="LOOP",
        help="leave out textbook, fastdmd or floor",
    )
    parser.add_argument("--memory", action="store_true", help="peak memory too, each loop in a process of its own")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--suite", action="store_true", help="the settings of the GPU targets, one after the other")
    arguments = parser.parse_args()
    try:
        resolve_device(arguments.device)
    except ValueError as error:
        parser.exit(2, f"benchmarks.bench_step: error: {error}\n")
    settings = [vars(arguments)]
    if arguments.suite:
        settings = [{**vars(arguments), "compiled": True, "memory": True, **changes} for changes in SUITE]
    results = []
    for setting in settings:
        results.append(benchmark(argparse.Namespace(**setting)))
        print({name: setting[name] for name in ("preset", "batch_size", "ratio", "precision")})
        print(table(results[-1]), flush=True)
        if arguments.json:  # after each: what a time limit leaves is whole
            content = results if arguments.suite else results[0]
            arguments.json.write_text(json.dumps(content, indent=1, default=str) + "\n")
    if any(result["failed"] for result in results):
        parser.exit(1, "benchmarks.bench_step: error: not all loops could be timed, see above\n")


if __name__ == "__main__":
    main()
