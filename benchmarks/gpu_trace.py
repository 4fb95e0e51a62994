"""What a GPU did, out of a trace of torch's profiler: time with work and without, kernels by name and by family."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

KINDS = {"kernel": "kernel", "gpu_memcpy": "memcpy", "gpu_memset": "memset"}
LIBRARIES = "gemm|conv|xmma|cutlass|nvjet|[wd]grad|fprop|winograd|splitK|cublas|cudnn"
# The first pattern that a name has decides. Inductor names a kernel after what it fuses, so it comes first.
FAMILIES = {
    "fused by Inductor": r"^triton_(?!tem_)",
    "optimizer": r"adamw_ema|grad_norm_(vectors|any)|^(norm|update)_kernel",
    "norms": r"group_norm_|parameter_gradients|^(forward|backward)_kernel|RowwiseMoments|GroupNorm|layer_norm",
    "noise and losses": r"add_noise|dm_loss|^dm_kernel|fake_loss|scale_gradient|philox_(rows|kernel)",
    "attention": r"flash|fmha|sdpa|attention",
    "copies and casts": r"^Mem(cpy|set)|nchwToNhwc|nhwcToNchw|copy_kernel|CatArray|FillFunctor",
    "convolutions and matrix products": rf"^triton_tem_|{LIBRARIES}",
}


class Activity(NamedTuple):
    """Something that a stream of the GPU was busy with. Times are in microseconds."""

    start: float
    end: float
    kind: str  # "kernel", "memcpy" or "memset"
    name: str
    stream: int


def read_trace(path: Path) -> tuple[list[Activity], Counter]:
    """The activities in a Chrome trace, in order of their start, and how often the host called what of CUDA."""
    activities, runtime_calls = [], Counter()
    for event in json.loads(path.read_text())["traceEvents"]:
        category, name = event.get("cat"), event.get("name", "")
        if event.get("ph") != "X":
            continue
        if category in ("cuda_runtime", "cuda_driver"):
            runtime_calls[name] += 1
        elif category in KINDS:
            start = float(event["ts"])
            stream = event.get("args", {}).get("stream", -1)
            activities.append(Activity(start, start + float(event["dur"]), KINDS[category], name, stream))
    return sorted(activities), runtime_calls


def union(intervals: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The same points of time in intervals `(start, end)` that are in order and do not touch."""
    merged: list[tuple[float, float]] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((start, end))
    return merged


def length(intervals: Iterable[tuple[float, float]]) -> float:
    return sum(end - start for start, end in intervals)


def summarize(activities: list[Activity], num_kernels: int = 15, num_gaps: int = 10) -> dict:
    """Of at least one activity, all streams together.

    `span_us` is from the first start to the last end, `busy_us` when at least one stream works; the rest is idle.
    `share`s are of the sum of all durations, which is `overlap` times what is busy.
    """
    busy = union((a.start, a.end) for a in activities)
    span, busy_us = busy[-1][1] - busy[0][0], length(busy)
    kernel_us = length(union((a.start, a.end) for a in activities if a.kind == "kernel"))
    total = length((a.start, a.end) for a in activities)
    return {
        "span_us": span,
        "busy_us": busy_us,
        "busy_with_kernels_us": kernel_us,
        "idle_share": 1 - busy_us / span if span else 0.0,
        "overlap": total / busy_us if busy_us else 1.0,
        "streams": len({a.stream for a in activities}),
        "counts": {kind: sum(a.kind == kind for a in activities) for kind in KINDS.values()},
        "copies": dict(Counter(a.name for a in activities if a.kind == "memcpy")),
        "host_to_device": sum("HtoD" in a.name for a in activities),
        "families": ranked((family(a.name), a) for a in activities),
        "kernels": dict(list(ranked((a.name[:200], a) for a in activities).items())[:num_kernels]),
        "gaps": gaps(activities, busy)[:num_gaps],
    }


def family(name: str) -> str:
    return next((family for family, pattern in FAMILIES.items() if re.search(pattern, name)), "torch's own and others")


def ranked(named: Iterable[tuple[str, Activity]]) -> dict[str, dict]:
    """Time, share of it and number of activities of a name, those that take most of it first."""
    groups: dict[str, list[float]] = defaultdict(list)
    for name, activity in named:
        groups[name].append(activity.end - activity.start)
    total = sum(map(sum, groups.values())) or 1.0
    rows = {name: {"us": sum(us), "share": sum(us) / total, "count": len(us)} for name, us in groups.items()}
    return dict(sorted(rows.items(), key=lambda item: -item[1]["us"]))


def gaps(activities: list[Activity], busy: list[tuple[float, float]]) -> list[dict]:
    """When no stream worked, the longest first, with the names of what ended before and what began after."""
    ending = {a.end: a.name for a in activities}
    beginning = {a.start: a.name for a in activities}
    rows = [
        {"us": start - end, "after": ending[end][:100], "before": beginning[start][:100]}
        for (_, end), (start, _) in zip(busy, busy[1:], strict=False)
    ]
    return sorted(rows, key=lambda row: -row["us"])
