"""What each block of the README says, of what stored results hold."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks.suite.figures import digits, span
from benchmarks.suite.report import table

Read = Callable[[str], dict]  # a result by its name


def reader(folder: Path) -> Read:
    return lambda name: json.loads((folder / f"{name}.json").read_text())


def of(name: str, result: dict) -> str:
    """Where figures come from."""
    return f"[{name}](benchmarks/results/{name}.json), commit {result['commit']}"


OPS = {
    "add_noise": "`add_noise`, its noise made on the fly",
    "dm_loss": "`dm_loss` and its gradient",
    "fake_loss": "`fake_loss` and its gradient",
    "group_norm_silu": "`group_norm_silu`, forward and backward",
    "conv1x1": "`conv1x1`, forward and backward",
    "conv3x3": "`conv3x3`, forward and backward",
    "adamw_ema_": "`adamw_ema_`, with clipping and averaging",
}


def ops(read: Read) -> str:
    result = read("cpu-ops")
    seconds: dict[tuple, dict[str, float]] = {}
    for r in result["results"]:
        case = r["op"].split()[0], r["dtype"], r["op"], r["elements"]
        seconds.setdefault(case, {})[r["variant"]] = r["seconds"]
    measured = {case: found for case, found in seconds.items() if "native" in found}
    cells = []
    for op, name in OPS.items():
        line = [name]
        for dtype in ("float32", "bfloat16"):
            own = {case: found for case, found in measured.items() if case[:2] == (op, dtype)}
            per_element = [found["native"] / case[3] * 1e9 for case, found in own.items()]
            line.append(span(per_element, lambda value: digits(value, 2)) if own else "")
            line.append(_ratios("eager", own.values()))
            line.append(_ratios("compiled", own.values()))
        cells += [line] if any(line[1:]) else []
    heads = ["op"]
    for dtype in ("float32", "bfloat16"):
        heads += [f"{dtype}, ns an element", "× eager", "× compiled"]
    measured_on = f"On one thread of a {result['device']}, 2 to 25 MB of float32 ({of('cpu-ops', result)}):"
    return f"{measured_on}\n\n{table(heads, cells)}"


def _ratios(variant: str, found: Iterable[dict[str, float]]) -> str:
    ratios = [seconds[variant] / seconds["native"] for seconds in found if variant in seconds]
    return span(ratios, lambda ratio: f"{ratio:.1f}") if ratios else ""


CYCLES = (("MNIST", "mnist-b128"), ("MNIST", "mnist-b8"), ("CIFAR-10", "cifar10-cond-b2"))


def cycles(read: Read) -> str:
    cells, commits, gains = [], [], {}
    for network, name in CYCLES:
        single, half = (read(f"cpu-step-{name}-{precision}") for precision in ("fp32", "bf16"))
        commits += [single["commit"], half["commit"]]
        settings, held = single["settings"], single["peak_bytes"]
        memory = f"{held['fastdmd'] / 1e9:.2f} GB ({held['textbook'] / 1e9:.2f} GB)" if held else ""
        times = [f"{result['ratio_to_textbook']:.2f}×" for result in (single, half)]
        cells.append([network, str(settings["batch_size"]), str(settings["ratio"]), *times, memory])
        rates = [result["images_per_second"]["fastdmd"] for result in (half, single)]
        gains.setdefault(network, []).append(rates[0] / rates[1])
    heads = ["network", "batch", "guidance turns", "float32", "bfloat16", "peak memory, float32 (textbook)"]
    of_commits = f"Files `cpu-step-*` in [results](benchmarks/results), commit {', '.join(dict.fromkeys(commits))}."
    gained = ", ".join(f"{span(own, lambda gain: f'{gain:.2f}')} on {network}" for network, own in gains.items())
    half = f"Images a second of fastdmd in bfloat16 are those in float32 times {gained}."
    return f"{table(heads, cells)}\n\n{of_commits} {half} {_parts(read('cpu-step-mnist-b128-fp32'))}"


FAMILIES = {"convolutions": "conv", "GroupNorm and SiLU": "group_norm", "attention": "bmm|attention|softmax"}


def _parts(result: dict) -> str:
    """What the cycle's time goes to."""
    cycle = statistics.median(result["seconds_per_cycle"]["fastdmd"])
    seconds = {family: 0.0 for family in FAMILIES}
    for name, taken in result["seconds_by_op"].items():
        for family, pattern in FAMILIES.items():
            seconds[family] += taken if re.search(pattern, name) else 0.0
    seconds["the optimizer"] = result["seconds_by_part"]["optimizer"]
    shares = ", ".join(f"{_percent(taken / cycle)} {family}" for family, taken in seconds.items())
    return (
        f"At batch {result['settings']['batch_size']} the float32 cycle takes {result['time_over_floor']:.2f} of the"
        " time that PyTorch's convolutions and matrix products take in it alone: `ops.conv3x3` needs 36"
        f" multiplications where they need 144. Of it are {shares}."
    )


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.01 else f"{100 * share:.1g} %"


def busy(read: Read) -> str:
    result = read("cpu-busy")
    beside, alone = result["ratio_to_one_thread_busy"], result["ratio_to_openmp_quiet"]
    return (
        f"Beside a busy process per core ({of('cpu-busy', result)}) the threads of a command reached"
        f" {beside['chosen']:.2f} of the rate of one thread, with OpenMP's own waiting {beside['as OpenMP does']:.2f};"
        f" alone {alone['chosen']:.2f} of the rate with that waiting."
    )


GPU_CYCLES = ("h200-step-mnist", "h100-step-cifar10-cond", "h200-step-imagenet64")
NETWORKS = {"mnist": "MNIST", "cifar10-cond": "CIFAR-10", "imagenet64": "ImageNet-64"}
LOOPS = {
    "fastdmd": "fastdmd, captured, bfloat16",
    "compiled": "`torch.compile`, bfloat16 autocast, channels_last, fused AdamW",
    "textbook": "textbook, float32",
}


def gpu_cycles(read: Read) -> str:
    results = {name: read(name) for name in GPU_CYCLES}
    heads = ["loop"]
    for name, result in results.items():
        settings = result["settings"]
        sizes = f"batch {settings['batch_size']}, ratio {settings['ratio']}"
        heads.append(f"{NETWORKS[settings['preset']]}, {sizes}, {name.split('-')[0].upper()}")
    cells = [[loop, *(_cycle(result, name) for result in results.values())] for name, loop in LOOPS.items()]
    for name, loop in list(LOOPS.items())[1:]:
        ratios = [_ratios_of_cycles(result, name) for result in results.values()]
        cells.append([f"fastdmd beside {loop.split(',')[0]}", *ratios])
    commits = ["commit", *(f"[{result['commit']}](benchmarks/results/{name}.json)" for name, result in results.items())]
    return table(heads, [*cells, commits])


def _cycle(result: dict, loop: str) -> str:
    """Time and rate; of a loop that was timed in two processes both."""
    found = [_median(v) for name, v in result["seconds_per_cycle"].items() if name.split(",")[0] == loop]
    images = result["settings"]["batch_size"] * result["settings"]["ratio"]
    rates = span((images / seconds for seconds in found), digits)
    return f"{span((1e3 * seconds for seconds in found), digits)} ms, {rates} images/s"


def _ratios_of_cycles(result: dict, loop: str) -> str:
    seconds = {name: _median(taken) for name, taken in result["seconds_per_cycle"].items()}
    ratios = [taken / seconds["fastdmd"] for name, taken in seconds.items() if name.split(",")[0] == loop]
    return f"{span(ratios, digits)}×"


def _median(seconds: float | Sequence[float]) -> float:
    return statistics.median(seconds) if isinstance(seconds, list) else seconds


PROFILES = ("h200-profile-mnist", "h100-profile-mnist", "h100-profile-cifar10-cond", "h100-profile-imagenet64")


def profiles(read: Read) -> str:
    results = {name: read(name) for name in PROFILES}
    heads = ["of a cycle's time"]
    for name, result in results.items():
        heads.append(f"{NETWORKS[result['settings']['preset']]}, {name.split('-')[0].upper()}")
    families = dict.fromkeys(family for result in results.values() for family in result["cycle"]["families"])
    cells = [[family, *(_share(result, family) for result in results.values())] for family in families]
    facts: dict[str, Callable[[dict], str]] = {
        "of the rate of a large matrix product": lambda r: _percent(r["utilisation"]["of a large matrix product"]),
        "of the nominal rate": lambda r: _percent(r["utilisation"]["of nominal"]),
        "the GPU was idle": lambda r: _percent(r["idle_share_without_profiler"]),
        "the host waited for the device": lambda r: (
            f"{r['steady']['host_syncs']} times in {r['steady']['iterations']:,}"
        ),
        "memory reserved": lambda r: f"{digits(r['steady']['memory']['peak_reserved_bytes'] / 1e9)} GB",
        "first iteration": lambda r: f"{r['first_iteration_seconds']:.0f} s",
    }
    cells += [[name, *(fact(result) for result in results.values())] for name, fact in facts.items()]
    commits = [f"[{result['commit']}](benchmarks/results/{name}.json)" for name, result in results.items()]
    return table(heads, [*cells, ["commit", *commits]])


def _share(result: dict, family: str) -> str:
    found = result["cycle"]["families"].get(family)
    return _percent(found["share"]) if found else ""


KERNELS = {
    "add_noise": "`add_noise`, noise given",
    "add_noise_rng": "`add_noise`, noise drawn inside",
    "dm_loss": "`dm_loss` and its gradient",
    "fake_loss": "`fake_loss` and its gradient",
    "adamw_ema_": "`adamw_ema_`, gradients of this dtype",
    "group_norm_silu": "GroupNorm and SiLU, channels_last, {} to {} channels",
    "group_norm_silu_backward": "its backward",
}
KERNEL_BYTES = (61e6, 67e6)  # of a tensor: 64 MB, which no cache holds


def kernels(read: Read) -> str:
    result = read("h200-ops")
    cells = [kernel(op, name, result["results"], result["commit"]) for op, name in KERNELS.items()]
    rate, device = result["copy"]["bytes_per_second"] / 1e12, result["device"].removeprefix("NVIDIA ")
    heads = ["op", "float32", "bfloat16", "PyTorch, float32", "PyTorch, bfloat16", "commit"]
    link = "[h200-ops](benchmarks/results/h200-ops.json)"
    return (
        f"Kernels on tensors of 64 MB on an {device} ({link}), percent of the rate of a copy ({rate:.2f} TB/s, read and"
        " written; bytes counted once), the better one of Triton and CUDA C++, beside PyTorch's own operations:\n\n"
        f"{table(heads, cells)}"
    )


def kernel(op: str, name: str, results: Sequence[dict], commit: str) -> list[str]:
    """A line of the table; `commit` is that of results which name none."""
    layout = "channels_last" if op.startswith("group_norm") else "contiguous"
    best: dict[tuple, float] = {}  # by dtype, whose it is and shape
    commits, channels = set(), set()
    for r in results:
        itemsize = 2 if r["dtype"] == "bfloat16" and op != "adamw_ema_" else 4
        if (
            r["op"] != op
            or r["layout"] != layout
            or not KERNEL_BYTES[0] < math.prod(r["shape"]) * itemsize < KERNEL_BYTES[1]
        ):
            continue
        is_ours = r["implementation"] in ("triton", "native")
        if "seconds" in r and (is_ours or r["implementation"] == "eager"):
            key = r["dtype"], is_ours, tuple(r["shape"])
            best[key] = max(best.get(key, 0.0), r["percent_of_copy"])
            commits |= {r.get("commit", commit)}
            channels |= {r["shape"][1]} if len(r["shape"]) > 1 else set()
    line = [name.format(min(channels, default=0), max(channels, default=0))]
    for is_ours in (True, False):
        for dtype in ("float32", "bfloat16"):
            percents = [percent for key, percent in best.items() if key[:2] == (dtype, is_ours)]
            line.append(span(percents, lambda percent: f"{percent:.0f}") if percents else "")
    return [*line, ", ".join(sorted(commits))]
