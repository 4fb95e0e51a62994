"""Times whole DMD2 cycles, a generator turn and its guidance turns, beside two other loops and the floor.

    python -m benchmarks.bench_step [--preset mnist] [--device cpu] [--batch-size 128] [--precision fp32] [--json FILE]

One network, one batch, one run: fastdmd, the textbook loop, with --compiled the fair compiled loop, and the
convolutions and matrix products of fastdmd's cycle alone (the floor). Medians; ratios are medians of the rounds'
ratios. Weights and data are random, so that it runs anywhere. Each has a process of its own, so that what one asks of
threads, memory and arithmetic (`fastdmd.machine`) is no other's. On a CPU they alternate; on a GPU, whose memory may
not hold them all, each is made, timed and closed before the next.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import resource
import statistics
import time
from collections import defaultdict
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.environment import describe
from benchmarks.fair import FairDMD2
from benchmarks.floor import Floor, Recorder
from benchmarks.textbook import textbook_like
from fastdmd import machine, step, teachers, trainer
from fastdmd.cli import resolve_device
from fastdmd.config import TrainConfig
from fastdmd.presets import PRESETS
from fastdmd.unet import UNet
from fastdmd.unet_blocks import Conv3x3

SUITE = [
    {"preset": "mnist", "batch_size": 128, "ratio": 10}, {"preset": "cifar10-cond", "batch_size": 64, "ratio": 5},
    {"preset": "cifar10-cond", "batch_size": 16, "ratio": 5}, {"preset": "imagenet64", "batch_size": 40, "ratio": 5},
]  # fmt: skip


class Loop:
    """One of the opponents, a cycle at a time: "textbook", "compiled", or "fastdmd", in its own way of execution."""

    def __init__(self, name: str, arguments: argparse.Namespace, execution: str | None = None):
        self.device = device = resolve_device(arguments.device)
        teacher = make_teacher(arguments.preset, device)
        self.config = config = TrainConfig(
            batch_size=arguments.batch_size, dfake_gen_update_ratio=arguments.ratio, lr_schedule="constant",
            precision=arguments.precision, execution=execution or arguments.execution, generator_lr=1e-5,
            guidance_lr=1e-5,
        ).for_teacher(teacher)  # fmt: skip
        self.name, self.ratio, self.step = name, arguments.ratio, 0
        self.draws = trainer.make_draws(config, teacher, device)
        if name == "fastdmd":
            machine.prepare(device, precision=config.precision, batch_size=config.batch_size)
            step.COMPILE_MODE = arguments.compile_mode
            self.model = trainer.build(config, teacher)
        elif name == "textbook":
            self.model = textbook_like(config, teacher)
        else:
            torch.backends.cudnn.benchmark = True  # as ours; the textbook loop has what PyTorch starts with
            self.model = textbook_like(config, teacher, FairDMD2, bfloat16=config.precision == "bf16")

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

    def peak_bytes(self) -> int:
        """Of this process: resident on a CPU; on a GPU what another cycle takes, with the memory of its graphs."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            self.cycle()
            return torch.cuda.max_memory_reserved(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def facts(self) -> dict:
        return {}


class FloorLoop:
    """The heavy calls of an eager cycle of fastdmd, alone."""

    def __init__(self, arguments: argparse.Namespace):
        loop = Loop("fastdmd", arguments, execution="eager")
        for network in (loop.model.teacher, loop.model.generator, loop.model.fake_score):
            for module in network.modules():
                if isinstance(module, Conv3x3):
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
            "execution": self.model.execution, "threads": torch.get_num_threads(),
            "compute_dtype": str(self.model.generator_optimizer.parameters[0].dtype),
            "launches_per_turn": self.launches_per_turn(), "seconds_by_part": self.parts(),
            "seconds_by_op": self.ops(),
        }  # fmt: skip

    def parts(self) -> dict[str, float]:
        """Seconds of an eager cycle by part; the medians of three cycles."""
        loop = self if self.model.execution == "eager" else Loop("fastdmd", self.arguments, execution="eager")
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


class Remote:
    """A loop in a process of its own, with the same methods."""

    def __init__(self, name: str, arguments: argparse.Namespace):
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, name, arguments), daemon=True)
        self._process.start()
        theirs.close()
        self._connection.recv()  # until it is there, or it would disturb the making of the next

    def __getattr__(self, method: str):
        def call():
            self._connection.send(method)
            return self._connection.recv()

        return call

    def close(self) -> None:
        self._connection.close()
        self._process.join()


def serve(connection, name: str, arguments: argparse.Namespace) -> None:
    loop = make(name, arguments)
    connection.send("ready")
    with contextlib.suppress(EOFError):
        while True:
            connection.send(getattr(loop, connection.recv())())


def make_teacher(preset: str, device: torch.device) -> UNet:
    config = PRESETS[preset].network or teachers.load("mnist").config
    torch.manual_seed(0)
    network = UNet(config)
    with torch.no_grad():
        for parameter in network.parameters():  # what starts at zero would make some work trivial
            parameter.add_(0.02 * torch.randn_like(parameter))
    return network.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


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


def peak_bytes(name: str, arguments: argparse.Namespace) -> int:
    """Of one cycle in a process of its own."""
    with opened(name, arguments) as loop:
        loop.cycle()
        return loop.peak_bytes()


@contextlib.contextmanager
def opened(name: str, arguments: argparse.Namespace):
    loop = Remote(name, arguments)
    try:
        yield loop
    finally:
        loop.close()


def alternate(names: list[str], arguments: argparse.Namespace) -> tuple[dict, dict, dict]:
    """Seconds of each loop's cycles, a cycle of each in turn; peak bytes; what each tells about itself."""
    memory = {name: peak_bytes(name, arguments) for name in names if name != "floor"} if arguments.memory else {}
    with contextlib.ExitStack() as stack:
        loops = {name: stack.enter_context(opened(name, arguments)) for name in names}
        for loop in loops.values():
            loop.cycle(), loop.cycle()  # compiles, warms caches
        seconds = {name: [] for name in names}
        for _ in range(arguments.rounds):
            for name, loop in loops.items():
                time.sleep(0.1)  # until the threads of the one before no longer wait for work
                seconds[name].append(loop.cycle())
        return seconds, memory, {name: loop.facts() for name, loop in loops.items()}


def one_by_one(names: list[str], arguments: argparse.Namespace) -> tuple[dict, dict, dict]:
    """The same, each with the device to itself. One that fails is left out, and says why."""
    seconds, memory, facts = {}, {}, {}
    for name in names:
        try:
            with opened(name, arguments) as loop:
                first = [loop.cycle() for _ in range(4)]  # compiles, chooses, captures
                seconds[name] = [loop.cycle() for _ in range(arguments.rounds)]
                print(f"  {name}: {statistics.median(seconds[name]):.4f} s a cycle, first {first[0]:.1f} s", flush=True)
                if arguments.memory and name != "floor":
                    memory[name] = loop.peak_bytes()
                facts[name] = {**loop.facts(), "first_cycles": first}
        except EOFError:
            print(f"  {name}: its process ended with an error, see above", flush=True)
    return seconds, memory, facts


def benchmark(arguments: argparse.Namespace) -> dict:
    device = resolve_device(arguments.device)
    names = ["textbook", *(["compiled"] if arguments.compiled else []), "fastdmd", "floor"]
    measure = alternate if device.type == "cpu" else one_by_one
    seconds, memory, facts = measure([name for name in names if name not in arguments.without], arguments)
    floor = facts.get("floor", {})

    def ratio(one: str, other: str) -> float | None:
        if one not in seconds or other not in seconds:
            return None
        return statistics.median(a / b for a, b in zip(seconds[one], seconds[other], strict=True))

    def utilisation() -> float | None:
        if not {"fastdmd", "floor"} <= seconds.keys():
            return None
        return floor["flops"] / statistics.median(seconds["fastdmd"]) / floor["matmul_peak"]

    images = arguments.ratio * arguments.batch_size
    return {
        **describe(device.type),
        "settings": {k: v for k, v in vars(arguments).items() if k not in ("json", "suite")},
        "images_per_second": {k: images / statistics.median(v) for k, v in seconds.items() if k != "floor"},
        "ratio_to_textbook": ratio("textbook", "fastdmd"), "ratio_to_compiled": ratio("compiled", "fastdmd"),
        "time_over_floor": ratio("fastdmd", "floor"), "seconds_per_cycle": seconds,
        "first_cycles": {name: fact.pop("first_cycles") for name, fact in facts.items() if "first_cycles" in fact},
        "floor_layouts": floor.get("layouts"), "flops_per_cycle": floor.get("flops"),
        "matmul_peak": floor.get("matmul_peak"), "utilisation": utilisation(), "peak_bytes": memory,
        **facts.get("fastdmd", {}),
    }  # fmt: skip


def table(result: dict) -> str:
    lines = [f"{name:<10}{rate:>10.1f} images/s" for name, rate in result["images_per_second"].items()]
    for key in ("ratio_to_textbook", "ratio_to_compiled", "time_over_floor", "utilisation"):
        if result[key] is not None:
            lines.append(f"{key:<22}{result[key]:>6.2f}")
    for kind in ("seconds_by_part", "seconds_by_op"):
        if kind not in result:
            continue
        total = sum(result["seconds_by_part"].values())
        lines += [f"  {name[:44]:<46}{100 * seconds / total:>5.1f} %" for name, seconds in result[kind].items()]
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
    parser.add_argument("--compile-mode", default=step.COMPILE_MODE, help="of torch.compile, for fastdmd on a GPU")
    parser.add_argument("--rounds", type=int, default=5, help="timed cycles of each loop")
    parser.add_argument("--compiled", action="store_true", help="the fair compiled loop too (minutes on a CPU)")
    parser.add_argument("--without", nargs="*", default=[], choices=["textbook", "fastdmd", "floor"], metavar="LOOP",
                        help="leave out textbook, fastdmd or floor")  # fmt: skip
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


if __name__ == "__main__":
    main()
