"""What there is to measure: by which command, of which sources, how long it takes."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks import inspect_step
from benchmarks.suite import reaching, rows, scaling
from benchmarks.suite.rows import Row


@dataclass(frozen=True)
class Benchmark:
    """One command that writes one JSON. `sources` are the files that decide about its figures, as narrow as is true."""

    name: str  # `cpu-...`, `inspect-...` or, on any GPU, `gpu-...`
    measures: str
    module: str
    arguments: tuple[str, ...]
    rows: Callable[[dict], list[Row]]
    sources: tuple[str, ...]
    minutes: float  # on two cores, or on a H100; roughly
    on_request: bool = False  # only where its whole name is given: a result may be of older sources, or none be there
    told: Callable[[dict], str] | None = None  # paragraphs in Markdown, of a result
    drawn: Callable[[dict], str] | None = None  # a picture in SVG, of a result

    @property
    def device(self) -> str:
        return "cuda" if self.name.startswith("gpu-") else "cpu"

    @property
    def command(self) -> list[str]:
        return ["-m", self.module, *self.arguments]

    def file_name(self, gpu: str) -> str:
        """Of its result; `gpu` names the card, as `h100`, and means nothing on a CPU."""
        return f"{self.name if self.device == 'cpu' else gpu + self.name.removeprefix('gpu')}.json"

    def owns(self, file_name: str) -> bool:
        """Is it the name of a result, on whatever card?"""
        card = file_name.split("-")[0]
        return file_name == self.file_name(card) and (self.device == "cpu" or card not in ("cpu", "inspect"))


OPS = ("fastdmd/ops/*.py", "fastdmd/_native.py", "CMakeLists.txt", "csrc/*.h", "csrc/ops.cpp", "csrc/cpu/*")
CYCLE = (
    "fastdmd/diffusion.py",
    "fastdmd/randomness.py",
    "fastdmd/ranks.py",
    "fastdmd/sampling.py",
    "fastdmd/networks/unet*.py",
    "fastdmd/optim/*.py",
    *(f"fastdmd/distill/{name}.py" for name in ("ahead", "buffers", "draws", "execution", "guard", "losses")),
    *(f"fastdmd/distill/{name}.py" for name in ("matching", "methods", "optimization", "recording", "scheduled")),
    *(f"fastdmd/distill/{name}.py" for name in ("starts", "statistics", "tally", "translation", "turns")),
    *(f"fastdmd/runs/{name}.py" for name in ("distillation", "machine", "precision", "presets")),
    *OPS,
)
STEP = (*(f"benchmarks/{name}.py" for name in ("bench_step", "loops", "textbook", "floor", "worker")), *CYCLE)
CUDA = ("fastdmd/kernels/*.py", "csrc/cuda/*")
SCALING = (
    *(f"benchmarks/{name}.py" for name in ("bench_scaling", "loops", "worker")),
    "fastdmd/runs/startup.py",
    *CYCLE,
)
TIME_TO_QUALITY = (
    *(f"benchmarks/{name}.py" for name in ("time_to_quality", "timed_run", "textbook", "worker")),
    "fastdmd/distill/adversarial.py",
    "fastdmd/distill/gan.py",
    "fastdmd/networks/discriminator.py",
    "fastdmd/quality/*.py",
    "fastdmd/runs/startup.py",
    *CYCLE,
)

CPU_STEPS = {  # preset, batch size: guidance turns, rounds, minutes
    ("mnist", 8): (10, 5, 0.5),
    ("mnist", 128): (10, 3, 2.5),
    ("cifar10-cond", 2): (1, 5, 1.5),
}
FOREIGN_STEPS = {  # likewise
    ("foreign", 8): (10, 3, 2),
    ("foreign", 64): (10, 2, 10),
    ("diffusers", 8): (10, 2, 5),
    ("diffusers", 64): (2, 2, 8),
}
PEAK_MEMORY = (("mnist", 128), ("cifar10-cond", 2))
GPU_STEPS = {  # name: preset, batch size, guidance turns
    "mnist": ("mnist", 128, 10),
    "cifar10-cond": ("cifar10-cond", 64, 5),
    "cifar10-cond-b16": ("cifar10-cond", 16, 5),
    "imagenet64": ("imagenet64", 40, 5),
}
PROFILES = ("mnist", "cifar10-cond", "imagenet64")


def _cpu_step(preset: str, batch_size: int, precision: str) -> Benchmark:
    ratio, num_rounds, minutes = CPU_STEPS[preset, batch_size]
    memory = ("--memory",) if precision == "fp32" and (preset, batch_size) in PEAK_MEMORY else ()
    return Benchmark(
        f"cpu-step-{preset}-b{batch_size}-{precision}",
        f"whole cycles of {preset}, batch {batch_size}, {precision}, beside the textbook loop and the floor",
        "benchmarks.bench_step",
        (*_cpu_options(preset, batch_size, ratio, num_rounds, precision), *memory),
        rows.of_step,
        STEP,
        minutes,
    )


def _cpu_options(preset: str, batch_size: int, ratio: int, num_rounds: int, precision: str) -> tuple[str, ...]:
    sizes = ("--batch-size", str(batch_size), "--ratio", str(ratio), "--rounds", str(num_rounds))
    return ("--device", "cpu", "--preset", preset, *sizes, "--precision", precision)


def _foreign_step(preset: str, batch_size: int) -> Benchmark:
    ratio, num_rounds, minutes = FOREIGN_STEPS[preset, batch_size]
    return Benchmark(
        f"cpu-{preset}-b{batch_size}",
        f"whole cycles of a network of others, batch {batch_size}, with fastdmd.accelerate and without",
        "benchmarks.bench_step",
        _cpu_options(preset, batch_size, ratio, num_rounds, "fp32"),
        rows.of_step,
        ("benchmarks/foreign_unet.py", "fastdmd/networks/accelerate/*.py", *STEP),
        minutes,
        on_request=True,
    )


def _fair_step(precision: str) -> Benchmark:
    return Benchmark(
        f"cpu-fair-{precision}",
        f"whole cycles of mnist, batch 128, {precision}, beside the fastest loops that PyTorch itself offers",
        "benchmarks.bench_step",
        (*_cpu_options("mnist", 128, 10, 3, precision), "--compiled"),
        rows.of_step,
        ("benchmarks/fair.py", *STEP),
        6,
        on_request=True,
    )


def _gpu_step(name: str) -> Benchmark:
    preset, batch_size, ratio = GPU_STEPS[name]
    sizes = ("--batch-size", str(batch_size), "--ratio", str(ratio))
    return Benchmark(
        f"gpu-step-{name}",
        f"whole cycles of {preset}, batch {batch_size}, beside the compiled loop and the textbook's",
        "benchmarks.bench_step",
        ("--device", "cuda", "--preset", preset, *sizes, "--compiled", "--memory"),
        rows.of_step,
        ("benchmarks/fair.py", *STEP, *CUDA),
        6,
    )


ON_REQUEST = {  # by the end of their names: what they measure, of which sources, and who makes rows, words and curves
    "time-to-quality": (
        "seconds of training to given Fréchet distances, beside the textbook loop",
        TIME_TO_QUALITY,
        reaching,
    ),
    "scaling": ("whole cycles of mnist over batch, threads, width and resolution", SCALING, scaling),
}


def sources_on_request(name: str, device: str) -> tuple[str, ...]:
    _, sources, _ = ON_REQUEST[name]
    return sources if device == "cpu" else (*sources, *CUDA)


def _on_request(name: str, module: str, device: str, minutes: float) -> Benchmark:
    measures, _, room = ON_REQUEST[name]
    return Benchmark(
        f"{'cpu' if device == 'cpu' else 'gpu'}-{name}",
        measures,
        module,
        ("--device", device),
        room.rows,
        sources_on_request(name, device),
        minutes,
        on_request=True,
        told=room.told,
        drawn=room.drawn,
    )


BENCHMARKS = (
    Benchmark(
        "cpu-ops",
        "every op, one thread, beside eager and compiled PyTorch and a copy of as many bytes",
        "benchmarks.bench_ops",
        (),
        rows.of_ops,
        ("benchmarks/bench_ops.py", "benchmarks/eager.py", *OPS),
        5,
    ),
    *(_cpu_step(*setting, precision) for setting in CPU_STEPS for precision in ("fp32", "bf16")),
    *(_foreign_step(*setting) for setting in FOREIGN_STEPS),
    *map(_fair_step, ("fp32", "bf16")),
    Benchmark(
        "cpu-busy",
        "a distillation of the embedded teacher, no adversarial term, beside a busy process per core, and alone",
        "benchmarks.bench_busy",
        (),
        rows.of_busy,
        ("benchmarks/bench_busy.py", "fastdmd/runs/startup.py"),  # of the same cycles, in different settings
        6,
    ),
    *(
        Benchmark(
            f"inspect-{preset}",
            f"what a turn of {preset} launches on an H100, read from generated code; nothing is timed",
            "benchmarks.inspect_step",
            ("--preset", preset),
            rows.of_inspection,
            inspect_step.SOURCES,
            minutes,
        )
        for preset, minutes in zip(inspect_step.BATCHES, (2, 4, 8), strict=True)
    ),
    Benchmark(
        "gpu-ops",
        "every kernel in CUDA graphs, against a copy of as many bytes",
        "benchmarks.bench_kernels",
        (),
        rows.of_kernels,
        (*(f"benchmarks/{name}.py" for name in ("bench_kernels", "kernel_cases", "gpu_timer", "eager")), *OPS, *CUDA),
        3,
    ),
    *map(_gpu_step, GPU_STEPS),
    *(
        Benchmark(
            f"gpu-profile-{preset}",
            f"many cycles of {preset}: speed, host syncs, memory, what the time goes to",
            "benchmarks.timeline",
            ("--preset", preset),
            rows.of_timeline,
            ("benchmarks/timeline.py", "benchmarks/gpu_trace.py", *STEP, *CUDA),
            4,
        )
        for preset in PROFILES
    ),
    _on_request("scaling", "benchmarks.bench_scaling", "cpu", 6),
    _on_request("scaling", "benchmarks.bench_scaling", "cuda", 20),
    _on_request("time-to-quality", "benchmarks.time_to_quality", "cpu", 360),
    _on_request("time-to-quality", "benchmarks.time_to_quality", "cuda", 120),
)


def chosen(names: Sequence[str], device: str) -> list[Benchmark]:
    """Those of a device, "cpu" or "cuda", that have a name, or in theirs a part, of `names`; all if there are none.
    What is measured on request has to be named whole.

    Raises ValueError, with what was perhaps meant, for a name of none of them.
    """
    own = [benchmark for benchmark in BENCHMARKS if benchmark.device == device]
    usual = [benchmark for benchmark in own if not benchmark.on_request]
    found = [] if names else usual
    for name in names:
        matches = [b for b in own if b.name == name] or [b for b in usual if name in b.name]
        if not matches:
            raise ValueError(f"expected benchmarks of {device}, got {name}{_hint(name, [b.name for b in own])}")
        found += [benchmark for benchmark in matches if benchmark not in found]
    return found


def _hint(name: str, own: Sequence[str]) -> str:
    named = [benchmark for benchmark in BENCHMARKS if name in benchmark.name]
    if whole := [benchmark.name for benchmark in named if benchmark.name in own]:
        return f": did you mean {whole[0]}?"
    if named:
        return f": {named[0].name} needs --device {named[0].device}"
    close = difflib.get_close_matches(name, own, 1, cutoff=0.5)
    return f": did you mean {close[0]}?" if close else f": --list names {', '.join(own)}"
