"""How speed and memory of fastdmd's MNIST cycle go with batch, threads, width and resolution.

    python -m benchmarks.bench_scaling [--series batch,width,resolution] [--device cpu] [--precision fp32] [--json FILE]

A cycle is a generator turn and its guidance turns, of the default run's ratio, without the adversarial term, as
`benchmarks.bench_step` times it. Three series, of the embedded teacher's network: of its batch, by one and by two
threads (on a GPU until memory ends); of its width, all channels in proportion; of its resolution, where attention
stays at the coarsest feature maps. Each point has a process of its own, which tells its peak memory; its time is the
least of several cycles. Weights are random. FLOPs are those of an eager cycle, counted with torch's own convolutions:
`ops.conv3x3`, which does with fewer products, can be faster than a matrix product of as many.

With `--json` each point is written as it comes, and a point that the file has, of these sources and settings, is not
measured again. About six minutes on two cores.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import operator
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import loops
from benchmarks.environment import describe
from benchmarks.sources import source_hashes
from benchmarks.suite import registry
from benchmarks.suite.stored import write
from benchmarks.worker import Worker
from fastdmd import teachers
from fastdmd.networks.unet import UNet, UNetConfig
from fastdmd.networks.unet_blocks import Conv1x1, Conv3x3
from fastdmd.runs import distillation, machine, startup
from fastdmd.runs.cli import resolve_device
from fastdmd.runs.config import TrainConfig

RATIO = TrainConfig().dfake_gen_update_ratio
BATCH_SIZE = TrainConfig().batch_size  # of the series of width and resolution
BATCHES = {"cpu": 9, "cuda": 13}  # the last batch as a power of two; on a GPU, memory may end before
THREADS = (1, 2)
WIDTHS = (12, 24, 48, 96, 192)  # the embedded teacher has 48
RESOLUTIONS = (16, 28, 56, 112)
SERIES = ("batch", "width", "resolution")
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


@dataclasses.dataclass(frozen=True)
class Point:
    """What is measured in one process."""

    series: str
    batch_size: int
    threads: int  # 0 on a GPU
    model_channels: int
    image_size: int


def points(series: list[str], device: str) -> list[Point]:
    """All of these series, the smallest of each first."""
    channels, size = teachers.load("mnist").config.model_channels, teachers.load("mnist").config.image_size
    all_threads = THREADS if device == "cpu" else (0,)
    batches = [2**power for power in range(BATCHES[device] + 1)]
    found = {
        "batch": [Point("batch", batch, threads, channels, size) for threads in all_threads for batch in batches],
        "width": [Point("width", BATCH_SIZE, all_threads[-1], width, size) for width in WIDTHS],
        "resolution": [Point("resolution", BATCH_SIZE, all_threads[-1], channels, size) for size in RESOLUTIONS],
    }
    return [point for name in series for point in found[name]]


def make_network(model_channels: int, image_size: int) -> UNet:
    """The embedded teacher's of another width and resolution, with random weights."""
    config: UNetConfig = teachers.load("mnist").config
    coarser = config.image_size // config.attention_resolutions[0]
    torch.manual_seed(0)
    network = UNet(
        dataclasses.replace(
            config,
            model_channels=model_channels,
            image_size=image_size,
            attention_resolutions=(image_size // coarser,),
        )
    )
    with torch.no_grad():
        for parameter in network.parameters():  # what starts at zero would make some work trivial
            parameter.add_(0.02 * torch.randn_like(parameter))
    return network


class Cycle(loops.Cycles):
    """fastdmd's, of one point."""

    def __init__(self, point: Point, *, device: str, precision: str = "auto", execution: str = "auto"):
        self.device = resolve_device(device)
        # On a GPU it says nothing.
        self.rest_bytes = loops.resident_bytes() if self.device.type == "cpu" else 0
        network = make_network(point.model_channels, point.image_size)
        teacher = network.to(self.device, memory_format=torch.channels_last).eval().requires_grad_(False)
        config = (
            TrainConfig()
            .replace(
                batch_size=point.batch_size,
                clamp_images=False,  # as bench_step
                lr_schedule="constant",
                precision=precision,
                execution=execution,
                generator_lr=1e-5,
                fake_score_lr=1e-5,
            )
            .for_teacher(teacher)
        )
        machine.prepare(self.device, precision=config.compute.precision, batch_size=point.batch_size)
        if point.threads:
            torch.set_num_threads(point.threads)  # at batch 1, too, where a command takes one
        self.draws = distillation.make_draws(config, teacher, self.device)
        self.model = distillation.build(config, teacher)
        self.ratio, self.num_images = RATIO, RATIO * point.batch_size

    def measure(self, rounds: int, least_seconds: float) -> dict[str, Any]:
        """So many cycles at least, of so many seconds in all, after those that warm caches."""
        for _ in range(loops.WARM_UP):
            self.cycle()
        seconds: list[float] = []
        while len(seconds) < rounds or sum(seconds) < least_seconds:
            seconds.append(self.cycle())
        peak = self.peak_bytes()  # before the product takes more
        return {
            "seconds_per_cycle": seconds,
            "images_per_second": self.num_images / min(seconds),
            "peak_bytes": peak,
            "rest_bytes": self.rest_bytes,
            "parameters": sum(parameter.numel() for parameter in self.model.teacher.parameters()),
            "matmul_peak": loops.matmul_peak(self.device, self.model.generator_optimizer.parameters[0].dtype),
            "execution": self.model.executor.name,
        }

    def count_flops(self) -> float:
        """Of an image in a cycle, where every image of every iteration counts once; by torch's own convolutions."""
        for network in (self.model.teacher, self.model.generator, self.model.fake_score):
            for module in network.modules():
                if isinstance(module, (Conv1x1, Conv3x3)):
                    module.__class__ = torch.nn.Conv2d  # the counter knows no others
        self.cycle()
        with FlopCounterMode(display=False) as flops:
            self.cycle()
        return flops.get_total_flops() / self.num_images


@contextlib.contextmanager
def made(point: Point, **options: str) -> Iterator[Cycle]:
    """What a process of its own makes first."""
    yield Cycle(point, **options)


def in_a_process(point: Point, method: str, *arguments: Any, **options: str) -> Any:
    """What a method of its `Cycle` gives, in a process that does nothing else. Raises RuntimeError where it fails."""
    worker = Worker(functools.partial(made, point, **options))
    try:
        worker.start()
        return worker(operator.methodcaller(method, *arguments))
    finally:
        worker.close()


def flops_of_image(model_channels: int, image_size: int) -> float:
    """Of a network, on whatever device: counted on a CPU, of one image."""
    point = Point("batch", 1, 1, model_channels, image_size)
    return in_a_process(point, "count_flops", device="cpu", precision="fp32", execution="eager")


def caches(device: torch.device) -> dict[str, int]:
    """Bytes of caches, of the first core and what it shares, or of the GPU; empty where nothing tells."""
    if device.type == "cuda":
        return {"L2": torch.cuda.get_device_properties(device).L2_cache_size}
    found = {}
    for index in sorted(CACHES.glob("index*")):
        kind, level, size = ((index / name).read_text().strip() for name in ("type", "level", "size"))
        if kind != "Instruction" and size.endswith("K"):
            found[f"L{level}"] = int(size[:-1]) * 1024
    return found


def read(path: Path | None, alike: dict[str, Any]) -> list[dict[str, Any]]:
    """What a file has measured already; nothing where it says something else of sources and settings."""
    if path is None or not path.exists():
        return []
    stored = json.loads(path.read_text())
    if any(stored.get(name) != value for name, value in alike.items()):
        print(f"{path} is of other sources or settings: all is measured anew", flush=True)
        return []
    return stored["results"]


def benchmark(arguments: argparse.Namespace) -> dict[str, Any]:
    device = resolve_device(arguments.device)
    settings = {"precision": arguments.precision, "execution": arguments.execution, "ratio": RATIO}
    alike = {"sources": source_hashes(registry.sources_on_request("scaling", device.type)), "settings": settings}
    rows = read(arguments.json, alike)
    result = {**describe(device.type), "caches": caches(device), **alike, "results": rows}
    flops = functools.cache(flops_of_image)
    options = {"device": str(device), "precision": arguments.precision, "execution": arguments.execution}
    ended: set[tuple[str, int]] = set()  # series and threads for which memory has ended
    for point in points(arguments.series, device.type):
        own = dataclasses.asdict(point)
        if any(row.items() >= own.items() for row in rows) or (point.series, point.threads) in ended:
            continue
        try:
            measured = in_a_process(point, "measure", arguments.rounds, arguments.seconds, **options)
            rows.append(own | measured | {"flops_per_image": flops(point.model_channels, point.image_size)})
            print(line(rows[-1]), flush=True)
        except RuntimeError as error:  # out of memory, most likely
            ended.add((point.series, point.threads))
            print(f"{own}: {error}", flush=True)
        if arguments.json:
            write(arguments.json, result)
    return result


def line(row: dict[str, Any]) -> str:
    where = f"{row['series']:<11}batch {row['batch_size']:>4}, {row['model_channels']:>3} channels, "
    where += f"{row['image_size']:>3}², {row['threads']} threads"
    rate, used = row["images_per_second"], row["images_per_second"] * row["flops_per_image"]
    return f"{where}{rate:>10.1f} images/s{used / 1e9:>9.1f} GFLOP/s{row['peak_bytes'] / 1e6:>8.0f} MB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--series", default=",".join(SERIES), help="some of them, separated by commas (default: all)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "tf32", "bf16"])
    parser.add_argument("--execution", default="auto", choices=["auto", "eager", "compiled", "captured"])
    parser.add_argument("--rounds", type=int, default=3, help="timed cycles of each point, at least")
    parser.add_argument("--seconds", type=float, default=1.0, help="of timed cycles of each point, at least")
    parser.add_argument("--json", type=Path, help="where to keep the figures, and to find those of an earlier call")
    arguments = parser.parse_args()
    arguments.series = arguments.series.split(",")
    if unknown := [name for name in arguments.series if name not in SERIES]:
        parser.error(f"expected series out of {', '.join(SERIES)}, got {', '.join(unknown)}")
    if arguments.rounds < 1:
        parser.error(f"expected --rounds of at least 1, got {arguments.rounds}")
    try:
        resolve_device(arguments.device)
    except ValueError as error:
        parser.exit(2, f"benchmarks.bench_scaling: error: {error}\n")
    startup.settle_threads()  # of the processes that are begun here
    result = benchmark(arguments)
    if not result["results"]:
        parser.exit(1, "benchmarks.bench_scaling: error: expected figures, got none, see above\n")


if __name__ == "__main__":
    main()
