"""What the JSON of each benchmark comes to: a row for each figure, with one beside it that two machines can compare."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """A figure; `ratio` says how many times as good it is as `yardstick`, which was measured in the same run."""

    label: str
    value: float
    unit: str
    more_is_better: bool = False
    ratio: float | None = None
    yardstick: str = ""
    is_counted: bool = False  # and not timed: the same on every machine

    def merit(self, *, same_machine: bool) -> float | None:
        """What is compared, more of it is better: the figure, or its ratio. None where there is nothing to compare."""
        if not same_machine and not self.is_counted:
            return self.ratio
        if self.more_is_better or not self.value:  # a zero is no measurement
            return self.value
        return 1 / self.value


def of_ops(result: dict) -> list[Row]:
    """`bench_ops`: the native implementations beside eager PyTorch."""
    results = result["results"]
    eager = {(r["op"], r["dtype"], r["elements"]): r["seconds"] for r in results if r["variant"] == "eager"}
    rows = []
    for r in results:
        if r["variant"] == "native":
            megabytes = r["elements"] * (4 if r["dtype"] == "float32" else 2) / 1e6
            ratio = eager[r["op"], r["dtype"], r["elements"]] / r["seconds"]
            label = f"{r['op']}, {r['dtype']}, {megabytes:.2g} MB"
            rows.append(Row(label, r["seconds"] / r["elements"] * 1e9, "ns/element", ratio=ratio, yardstick="eager"))
    return rows


def of_step(result: dict) -> list[Row]:
    """`bench_step`: fastdmd's cycle beside those of the other loops."""
    rate = result["images_per_second"]["fastdmd"]
    rows = []
    for name in ("textbook", "uncompiled", "compiled", "unaccelerated"):
        ratio = result.get(f"ratio_to_{name}")
        if isinstance(ratio, float):
            beside = "" if name == "textbook" else f", beside {name}"
            rows.append(Row(f"whole cycles{beside}", rate, "images/s", True, ratio=ratio, yardstick=name))
    if held := result.get("peak_bytes"):
        ours, textbook = held["fastdmd"], held.get("textbook")
        rows.append(Row("peak memory", ours / 1e9, "GB", ratio=textbook and textbook / ours, yardstick="textbook"))
    return rows


def of_busy(result: dict) -> list[Row]:
    """`bench_busy`: the threads that a command chooses."""
    rates = {situation: found["chosen"] for situation, found in result["images_per_second"].items()}
    busy, quiet = result["ratio_to_one_thread_busy"]["chosen"], result["ratio_to_openmp_quiet"]["chosen"]
    beside = "beside busy processes"
    return [
        Row(beside, rates["busy"], "images/s", more_is_better=True, ratio=busy, yardstick="one thread"),
        Row("alone", rates["quiet"], "images/s", more_is_better=True, ratio=quiet, yardstick="OpenMP's own waiting"),
    ]


def of_inspection(result: dict) -> list[Row]:
    """`inspect_step`: what a turn launches and moves."""
    rows = []
    for turn, summary in result["turns"].items():
        rows += [
            Row(f"{turn}, launches", summary["launches"], "", is_counted=True),
            Row(f"{turn}, outside of libraries", summary["bytes_outside_libraries"] / 1e9, "GB", is_counted=True),
            Row(f"{turn}, arithmetic", summary["flops"] / 1e12, "TFLOP", is_counted=True),
        ]
    return rows


def of_kernels(result: dict) -> list[Row]:
    """`bench_kernels`: ours, against a copy of as many bytes."""
    rows = []
    for r in result["results"]:
        if r["implementation"] in ("triton", "native") and "seconds" in r:
            shape, percent = "x".join(map(str, r["shape"])), r["percent_of_copy"]
            order = ", channels_last" if r["layout"] == "channels_last" else ""
            label = f"{r['op']} {r['implementation']}, {r['dtype']}, {shape}{order}"
            ratio = percent and percent / 100
            rows.append(Row(label, r["seconds"] * 1e6, "us", ratio=ratio, yardstick="a copy"))
    return rows


def of_timeline(result: dict) -> list[Row]:
    """`timeline`: what a cycle comes to over many iterations, beside the rate of a large matrix product."""
    steady, used = result["steady"], result["utilisation"]["of a large matrix product"]
    rate, peak = steady["images_per_second"], steady["memory"]["peak_reserved_bytes"]
    return [
        Row("many cycles", rate, "images/s", more_is_better=True, ratio=used, yardstick="a matrix product"),
        Row("peak memory", peak / 1e9, "GB"),
    ]


def is_measured(number: float | None) -> bool:
    """A merit that says something: not NaN, not infinite, and above zero."""
    return number is not None and math.isfinite(number) and number > 0
