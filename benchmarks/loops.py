"""The loops that are timed: fastdmd's, its opponents, and the floor beneath them, a cycle at a time."""

from __future__ import annotations

import argparse
import contextlib
import resource
import statistics
import time
from collections import defaultdict
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.fair import FairDMD2
from benchmarks.floor import Floor, Recorder
from benchmarks.foreign_unet import build, build_diffusers
from benchmarks.textbook import textbook_like
from fastdmd import teachers
from fastdmd.diffusion import DenoisingNetwork
from fastdmd.distill import execution as execution_module
from fastdmd.networks.adapted import Adapted
from fastdmd.networks.unet import UNet
from fastdmd.networks.unet_blocks import Conv1x1, Conv3x3
from fastdmd.runs import distillation, machine
from fastdmd.runs.cli import resolve_device
from fastdmd.runs.config import TrainConfig
from fastdmd.runs.presets import PRESETS
from fastdmd.teachers.trial import accelerate_network

WARM_UP = 5  # cycles: code is compiled, caches fill, and turns are captured, on a CPU at the fourth call of each
FOREIGN = {"foreign": build, "diffusers": build_diffusers}  # networks of others, by what stands for a preset
FOREIGN_OPTIONS = {
    "foreign": {"parameterization": "epsilon"},
    "diffusers": {"parameterization": "epsilon", "image_shape": (3, 32, 32), "num_classes": 0},
}


def resident_bytes() -> int:
    """The most that was resident of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Cycles:
    """Of a model with its draws: `ratio` iterations at a time, timed, and what they take. Who inherits sets the
    attributes."""

    device: torch.device
    model: Any
    draws: Any
    ratio: int
    step = 0

    def iterate(self) -> None:
        self.model.iterate(self.step, self.draws)

    def cycle(self) -> float:
        """Its seconds."""
        self.synchronize()
        started = time.perf_counter()
        for _ in range(self.ratio):
            self.iterate()
            self.step += 1
        self.synchronize()
        return time.perf_counter() - started

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def peak_bytes(self) -> int:
        """Of this process: resident on a CPU; on a GPU what another cycle takes, with the memory of its graphs."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            self.cycle()
            return torch.cuda.max_memory_reserved(self.device)
        return resident_bytes()


class Loop(Cycles):
    """One of the opponents, a cycle at a time: "textbook", "compiled" and "uncompiled", see `benchmarks.fair`, or
    "fastdmd", in its own way of execution.

    Of somebody's network the others, and "unaccelerated", which is fastdmd otherwise, have what it came with.
    """

    def __init__(self, name: str, arguments: argparse.Namespace, execution: str | None = None):
        self.device = device = resolve_device(arguments.device)
        teacher = make_teacher(arguments.preset, device)
        if name == "fastdmd" and teacher.foreign_name:
            print(f"  {teacher.foreign_name}: {accelerate_network(teacher)}", flush=True)
        self.config = config = (
            TrainConfig()
            .replace(
                batch_size=arguments.batch_size,
                dfake_gen_update_ratio=arguments.ratio,
                clamp_images=False,  # as the other loops
                lr_schedule="constant",
                precision=arguments.precision,
                execution=execution or arguments.execution,
                generator_lr=1e-5,
                fake_score_lr=1e-5,
            )
            .for_teacher(teacher)
        )
        self.name, self.ratio = name, arguments.ratio
        self.draws = distillation.make_draws(config, teacher, device)
        self.is_ours = name in ("fastdmd", "unaccelerated")
        if self.is_ours:
            machine.prepare(device, precision=config.compute.precision, batch_size=config.batch_size)
            execution_module.COMPILE_MODE = arguments.compile_mode
            self.model = distillation.build(config, teacher)
        elif name == "textbook":
            self.model = textbook_like(config, teacher)
        else:
            torch.backends.cudnn.benchmark = True  # as ours; the textbook loop has what PyTorch starts with
            options = {"bfloat16": config.compute.precision == "bf16", "compiled": name == "compiled"}
            self.model = textbook_like(config, teacher, FairDMD2, **options)

    def iterate(self) -> None:
        self.model.iterate(self.step, self.draws if self.is_ours else self.draws(self.step))

    def facts(self) -> dict:
        return {}


class FloorLoop:
    """The heavy calls of an eager cycle of fastdmd, alone."""

    def __init__(self, arguments: argparse.Namespace):
        loop = Loop("fastdmd", arguments, execution="eager")
        for network in (loop.model.teacher, loop.model.generator, loop.model.fake_score):
            for module in network.modules():
                if isinstance(module, (Conv1x1, Conv3x3)):
                    module.__class__ = torch.nn.Conv2d  # the floor is that of torch's own convolutions
        loop.cycle()
        with Recorder() as recorder:
            loop.cycle()
        with FlopCounterMode(display=False) as flops:
            loop.cycle()
        self.floor, self.num_flops = Floor(recorder.calls), flops.get_total_flops()
        self.matmul_peak = matmul_peak(loop.device, loop.model.generator_optimizer.parameters[0].dtype)

    def cycle(self) -> float:
        return self.floor.seconds()

    def facts(self) -> dict:
        layouts = {str(name): count for name, count in self.floor.layouts.items()}
        return {"flops": self.num_flops, "matmul_peak": self.matmul_peak, "layouts": layouts}


class FastLoop(Loop):
    """Ours, which also tells about itself."""

    def __init__(self, arguments: argparse.Namespace):
        super().__init__("fastdmd", arguments)
        self.arguments = arguments

    def facts(self) -> dict:
        return {
            "execution": self.model.executor.name,
            "threads": torch.get_num_threads(),
            "compute_dtype": str(self.model.generator_optimizer.parameters[0].dtype),
            "launches_per_turn": self.launches_per_turn(),
            "seconds_by_part": self.parts(),
            "seconds_by_op": self.ops(),
        }

    def parts(self) -> dict[str, float]:
        """Seconds of an eager cycle by part; the medians of three cycles."""
        loop = self if self.model.executor.name == "eager" else Loop("fastdmd", self.arguments, execution="eager")
        loop.cycle()
        rounds = []
        for _ in range(3):
            with clocks(loop) as seconds:
                total = loop.cycle()
            rounds.append({**seconds, "rest": total - sum(seconds.values())})
        return {part: statistics.median(r[part] for r in rounds) for part in rounds[0]}

    def ops(self, count: int = 16) -> dict[str, float]:
        """Seconds of a cycle in the ops or kernels that take most of it, as it is executed; the profiler included."""
        kind = "CUDA" if self.device.type == "cuda" else "CPU"
        with torch.profiler.profile(activities=[getattr(torch.profiler.ProfilerActivity, kind)]) as profile:
            self.cycle()
        field = f"self_{'device' if kind == 'CUDA' else 'cpu'}_time_total"  # microseconds
        seconds = {event.key: getattr(event, field) / 1e6 for event in profile.key_averages()}
        return dict(sorted(seconds.items(), key=lambda item: -item[1])[:count])

    def launches_per_turn(self) -> dict[str, int] | None:
        """Kernels of each turn, as it is executed; None on a CPU, which launches none."""
        if self.device.type != "cuda":
            return None
        counts = {}
        for turn in ("generator_turn", "guidance_turn"):
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                getattr(self.model, turn)()
                self.synchronize()
            counts[turn] = sum(e.device_type == torch.autograd.DeviceType.CUDA for e in profile.events())
        return counts


def make(name: str, arguments: argparse.Namespace) -> Loop | FloorLoop:
    if name == "floor":
        return FloorLoop(arguments)
    return FastLoop(arguments) if name == "fastdmd" else Loop(name, arguments)


@contextlib.contextmanager
def made(name: str, arguments: argparse.Namespace):
    """What a process of its own makes first, and the loop that is asked there."""
    yield make(name, arguments)


def make_teacher(preset: str, device: torch.device) -> DenoisingNetwork:
    if preset in FOREIGN:
        network = Adapted(FOREIGN[preset](), **FOREIGN_OPTIONS[preset])
        return network.to(device).eval().requires_grad_(False)
    config = PRESETS[preset].network or teachers.load("mnist").config
    torch.manual_seed(0)
    network = UNet(config)
    with torch.no_grad():
        for parameter in network.parameters():  # what starts at zero would make some work trivial
            parameter.add_(0.02 * torch.randn_like(parameter))
    return network.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


@contextlib.contextmanager
def clocks(loop: Loop):
    """Seconds by part of an eager cycle: what networks and optimizers offer, each under a clock."""
    seconds, model = defaultdict(float), loop.model

    def timed(part, function):
        def call(*arguments, **options):
            loop.synchronize()
            started = time.perf_counter()
            result = function(*arguments, **options)
            loop.synchronize()
            seconds[part] += time.perf_counter() - started
            return result

        return call

    clocked = (
        (model.generator, "forward", "x_gen"),
        (model.teacher, "forward", "teacher"),
        (model.fake_score, "forward", "fake forward"),
        (model.generator_optimizer, "backward", "backward"),
        (model.guidance_optimizer, "backward", "backward"),
        (model.generator_optimizer, "update", "optimizer"),
        (model.guidance_optimizer, "update", "optimizer"),
    )
    for owner, name, part in clocked:
        setattr(owner, name, timed(part, getattr(owner, name)))
    try:
        yield seconds
    finally:
        for owner, name, _ in clocked:
            delattr(owner, name)  # the class has it


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
