"""Times whole DMD2 cycles, a generator turn and its guidance turns, beside two other loops and the floor.

    python -m benchmarks.bench_step [--preset mnist] [--device cpu] [--batch-size 128] [--precision fp32] [--json FILE]

One network, one batch, one run, alternating: fastdmd, the textbook loop, with --compiled the fair compiled loop, and
the convolutions and matrix products of fastdmd's cycle alone (the floor). Medians; ratios are medians of the rounds'
ratios. Weights and data are random, so that it runs anywhere.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.environment import ROOT, describe
from benchmarks.fair import FairDMD2
from benchmarks.floor import Floor, Recorder
from benchmarks.textbook import textbook_like
from fastdmd import teachers, trainer
from fastdmd.cli import resolve_device
from fastdmd.config import TrainConfig
from fastdmd.presets import PRESETS
from fastdmd.unet import UNet

SUITE = [
    {"preset": "mnist", "batch_size": 128, "ratio": 10}, {"preset": "cifar10-cond", "batch_size": 16, "ratio": 5},
    {"preset": "cifar10-cond", "batch_size": 64, "ratio": 5}, {"preset": "imagenet64", "batch_size": 40, "ratio": 5},
]  # fmt: skip


class Loop:
    """One of the opponents, a cycle at a time."""

    def __init__(self, name: str, model, draws, ratio: int, device: torch.device):
        self.name, self.model, self.draws, self.ratio, self.device = name, model, draws, ratio, device
        self.step, self.seconds = 0, []

    def cycle(self) -> float:
        self.synchronize()
        started = time.perf_counter()
        for _ in range(self.ratio):
            self.model.iterate(self.step, self.draws if self.name == "fastdmd" else self.draws(self.step))
            self.step += 1
        self.synchronize()
        return time.perf_counter() - started

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def make_teacher(preset: str, device: torch.device) -> UNet:
    config = PRESETS[preset].network or teachers.load("mnist").config
    torch.manual_seed(0)
    network = UNet(config)
    with torch.no_grad():
        for parameter in network.parameters():  # what starts at zero would make some work trivial
            parameter.add_(0.02 * torch.randn_like(parameter))
    return network.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


def make_loop(name: str, arguments, device: torch.device) -> Loop:
    teacher = make_teacher(arguments.preset, device)
    config = TrainConfig(
        batch_size=arguments.batch_size, dfake_gen_update_ratio=arguments.ratio, lr_schedule="constant",
        precision=arguments.precision, execution=arguments.execution, generator_lr=1e-5, guidance_lr=1e-5,
    ).for_teacher(teacher)  # fmt: skip
    draws = trainer.make_draws(config, teacher, device)
    if name == "fastdmd":
        model = trainer.build(config, teacher)
    elif name == "textbook":
        model = textbook_like(config, teacher)
    else:
        model = textbook_like(config, teacher, FairDMD2, bfloat16=config.precision == "bf16")
    return Loop(name, model, draws, arguments.ratio, device)


@contextlib.contextmanager
def clocks(loop: Loop):
    """Seconds by part of an eager cycle: the model's functions, each under a clock."""
    seconds, model, undo = defaultdict(float), loop.model, []

    def timed(part, function):
        def call(*arguments, **options):
            loop.synchronize()
            started = time.perf_counter()
            result = function(*arguments, **options)
            loop.synchronize()
            seconds[part] += time.perf_counter() - started
            return result

        return call

    for owner, attribute, part in (
        (model, "_generator", "x_gen"), (model, "_teacher", "teacher"), (model, "_fake_score", "fake forward"),
        (model, "_backward", "backward"), (model.generator_optimizer, "update", "optimizer"),
        (model.guidance_optimizer, "update", "optimizer"),
    ):  # fmt: skip
        undo.append((owner, attribute, getattr(owner, attribute)))
        function = timed(part, getattr(owner, attribute))
        if attribute == "_fake_score":
            function.dynamics = model.fake_score.dynamics
        setattr(owner, attribute, function)
    yield seconds
    for owner, attribute, function in undo:
        setattr(owner, attribute, function)


def parts_of(arguments, device: torch.device) -> dict[str, float]:
    """Shares of an eager cycle by part; the median of three cycles each."""
    loop = make_loop("fastdmd", argparse.Namespace(**{**vars(arguments), "execution": "eager"}), device)
    loop.cycle()
    rounds = []
    for _ in range(3):
        with clocks(loop) as seconds:
            total = loop.cycle()
        rounds.append({**seconds, "rest": total - sum(seconds.values())})
    return {part: statistics.median(r[part] for r in rounds) for part in rounds[0]}


def peak_bytes(name: str, arguments) -> int:
    """Peak memory of one cycle of a loop, in a process of its own: resident on a CPU, allocated on a GPU."""
    command = [sys.executable, "-m", "benchmarks.bench_step", "--memory-of", name]
    for flag in ("preset", "device", "batch_size", "ratio", "precision", "execution"):
        command += [f"--{flag.replace('_', '-')}", str(getattr(arguments, flag))]
    return int(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()[-1])


def launches_per_turn(arguments, device: torch.device) -> dict[str, int] | None:
    """Kernels of each turn, eager or compiled as the run is; None on a CPU, which launches none."""
    if device.type != "cuda":
        return None
    loop = make_loop("fastdmd", arguments, device)
    for _ in range(3):
        loop.cycle()
    counts = {}
    for turn in ("_generator_turn", "_guidance_turn"):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            getattr(loop.model, turn)()
            loop.synchronize()
        counts[turn.strip("_")] = sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())
    return counts


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, the yardstick of utilisation."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    times = []
    for _ in range(6):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return 2 * n**3 / min(times)


def benchmark(arguments) -> dict:
    device = resolve_device(arguments.device)
    names = ["textbook", *(["compiled"] if arguments.compiled else []), "fastdmd"]
    memory = {name: peak_bytes(name, arguments) for name in names} if arguments.memory else {}
    loops = {name: make_loop(name, arguments, device) for name in names}
    counting = make_loop("fastdmd", argparse.Namespace(**{**vars(arguments), "execution": "eager"}), device)
    counting.cycle()
    with Recorder() as recorder:
        counting.cycle()
    with FlopCounterMode(display=False) as flops:
        counting.cycle()
    floor, floor_seconds = Floor(recorder.calls), []
    for loop in loops.values():
        for _ in range(2 if device.type == "cpu" else 4):  # compiles, captures, warms caches
            loop.cycle()
    for _ in range(arguments.rounds):
        for loop in loops.values():
            loop.seconds.append(loop.cycle())
        floor_seconds.append(floor.seconds())

    ours = loops["fastdmd"].seconds
    images = arguments.ratio * arguments.batch_size
    precision = loops["fastdmd"].model.generator_optimizer.parameters[0].dtype

    def ratio(name):
        if name not in loops:
            return None
        return statistics.median(a / b for a, b in zip(loops[name].seconds, ours, strict=True))

    return {
        **describe(device.type), "threads": torch.get_num_threads(),
        "settings": {k: v for k, v in vars(arguments).items() if k not in ("json", "memory_of", "suite")},
        "execution": loops["fastdmd"].model.execution, "compute_dtype": str(precision),
        "images_per_second": {name: images / statistics.median(loop.seconds) for name, loop in loops.items()},
        "ratio_to_textbook": ratio("textbook"), "ratio_to_compiled": ratio("compiled"),
        "time_over_floor": statistics.median(a / b for a, b in zip(ours, floor_seconds, strict=True)),
        "seconds_per_cycle": {**{n: loop.seconds for n, loop in loops.items()}, "floor": floor_seconds},
        "floor_layouts": {str(name): count for name, count in floor.layouts.items()},
        "flops_per_cycle": flops.get_total_flops(),
        "utilisation": flops.get_total_flops() / statistics.median(ours) / matmul_peak(device, precision),
        "launches_per_turn": launches_per_turn(arguments, device),
        "peak_bytes": memory, "seconds_by_part": parts_of(arguments, device),
    }  # fmt: skip


def table(result: dict) -> str:
    lines = [f"{name:<10}{rate:>10.1f} images/s" for name, rate in result["images_per_second"].items()]
    for key in ("ratio_to_textbook", "ratio_to_compiled", "time_over_floor", "utilisation"):
        if result[key] is not None:
            lines.append(f"{key:<22}{result[key]:>6.2f}")
    total = sum(result["seconds_by_part"].values())
    lines += [f"  {part:<14}{100 * s / total:>5.1f} %" for part, s in result["seconds_by_part"].items()]
    lines += [f"peak of {name:<10}{value / 1e6:>8.0f} MB" for name, value in result["peak_bytes"].items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="mnist", choices=["mnist", "cifar10-cond", "imagenet64"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--ratio", type=int, default=10, help="guidance turns per generator turn")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "tf32", "bf16"])
    parser.add_argument("--execution", default="auto", choices=["auto", "eager", "compiled", "captured"])
    parser.add_argument("--rounds", type=int, default=5, help="timed cycles of each loop")
    parser.add_argument("--compiled", action="store_true", help="the fair compiled loop too (minutes on a CPU)")
    parser.add_argument("--memory", action="store_true", help="peak memory too, each loop in a process of its own")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--suite", action="store_true", help="the settings of the GPU targets, one after the other")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        device = resolve_device(arguments.device)
        make_loop(arguments.memory_of, arguments, device).cycle()
        if device.type == "cuda":
            print(torch.cuda.max_memory_allocated(device))
        else:
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        return
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


if __name__ == "__main__":
    main()
