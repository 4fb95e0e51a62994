"""What `bench_scaling` measured, told: its figures, where its curves bend and why, and their picture."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from benchmarks.suite.figures import digits
from benchmarks.suite.lines import Curve, Panel, picture
from benchmarks.suite.rows import Row

Found = Sequence[dict]  # rows of one series and number of threads, in the order of what changes in it

FLOAT_BYTES = {"fp32": 4, "tf32": 4, "bf16": 2}
CHANGES = {"batch": "batch_size", "width": "model_channels", "resolution": "image_size"}
NEAR_BEST = 0.9  # of the best rate


def of(result: dict, series: str, threads: int | None = None) -> Found:
    """One series, by default with the most threads that it was measured with."""
    own = [row for row in result["results"] if row["series"] == series]
    if threads is None:
        threads = max((row["threads"] for row in own), default=0)
    return sorted((row for row in own if row["threads"] == threads), key=lambda row: row[CHANGES[series]])


def all_threads(result: dict) -> list[int]:
    return sorted({row["threads"] for row in result["results"] if row["series"] == "batch"})


def peak(result: dict, threads: int) -> float:
    """FLOP/s of a large matrix product with so many threads: the best of those beside the points."""
    return max(row["matmul_peak"] for row in result["results"] if row["threads"] == threads)


def flops_per_second(row: dict) -> float:
    return row["images_per_second"] * row["flops_per_image"]


def rows(result: dict) -> list[Row]:
    """Images a second, beside the rate of a matrix product; and the memory of the largest batch."""
    found = []
    for row in result["results"]:
        threads = {0: "", 1: ", 1 thread"}.get(row["threads"], f", {row['threads']} threads")
        label = {
            "batch": f"batch {row['batch_size']}",
            "width": f"width {row['model_channels']}",
            "resolution": f"resolution {row['image_size']}",
        }[row["series"]]
        used = flops_per_second(row) / peak(result, row["threads"])
        rate = row["images_per_second"]
        found.append(Row(label + threads, rate, "images/s", True, ratio=used, yardstick="a matrix product"))
    for row in of(result, "batch"):
        found.append(Row(f"peak memory of batch {row['batch_size']}", row["peak_bytes"] / 1e9, "GB"))
    return found


def drawn(result: dict) -> str:
    """SVG: rate and memory over the batch, time over FLOPs of an image, and the part of a product's rate."""
    rates: dict[str, Curve] = {}
    for threads in all_threads(result):
        name = {0: "images/s", 1: "1 thread"}.get(threads, f"{threads} threads")
        rates[name] = [(row["batch_size"], row["images_per_second"]) for row in of(result, "batch", threads)]
    memory = [(row["batch_size"], row["peak_bytes"] / 1e6) for row in of(result, "batch")]
    costs, shares = {}, {}
    for series in ("width", "resolution"):
        own = of(result, series)
        costs[series] = [(row["flops_per_image"] / 1e9, 1e3 / row["images_per_second"]) for row in own]
        shares[series] = [
            (x, flops_per_second(row) / peak(result, row["threads"]))
            for (x, _), row in zip(costs[series], own, strict=True)
        ]
    batch = of(result, "batch")
    marks = {f"{name} is full": size for name, size in filled_at(result).items()} if batch else {}
    panels = [
        Panel("images/s over the batch", "images a batch", rates, marks=marks),
        Panel("peak memory over the batch, MB", "images a batch", {"peak memory": memory}),
        Panel("ms an image over its FLOPs", "GFLOP an image", costs),
        Panel("part of a matrix product's FLOP/s", "GFLOP an image", shares),
    ]
    return picture([panel for panel in panels if any(panel.curves.values())])


def map_bytes(result: dict, row: dict) -> int:
    """Of an image between two layers of the finest level: all channels, at half of its resolution."""
    size = FLOAT_BYTES.get(result["settings"]["precision"], 4 if row["threads"] else 2)
    return row["model_channels"] * (row["image_size"] // 2) ** 2 * size


def filled_at(result: dict) -> dict[str, float]:
    """Images whose maps between two layers fill each cache from L2 on; of L2 every thread's core has one."""
    row = of(result, "batch")[0]
    cores = {"L2": max(1, row["threads"])}
    return {
        name: size * cores.get(name, 1) / map_bytes(result, row)
        for name, size in result["caches"].items()
        if name != "L1"
    }


def told(result: dict) -> str:
    """Paragraphs: what each bend of the curves is, by the numbers that were measured."""
    parts = [part(result) for part in (_of_dispatch, _of_caches, _of_threads, _of_memory)]
    parts.append(_of_size(result, "width", "Width", "channels"))
    parts.append(_of_size(result, "resolution", "Resolution", "pixels a side"))
    return "\n\n".join(filter(None, parts))


def _of_dispatch(result: dict) -> str:
    found = of(result, "batch")
    if len(found) < 2:
        return ""
    ratio, first, best = result["settings"]["ratio"], found[0], _best(found)
    least_ms = 1e3 / best["images_per_second"]
    cycle_ms, arithmetic_ms = (ratio * first["batch_size"] * ms for ms in (1e3 / first["images_per_second"], least_ms))
    rest_ms = cycle_ms - arithmetic_ms
    half, near = (
        next(row["batch_size"] for row in found if row["images_per_second"] >= part * best["images_per_second"])
        for part in (0.5, NEAR_BEST)
    )
    return (
        f"**Where dispatch ends.** At best, at batch {best['batch_size']}, an image of an iteration takes "
        f"{digits(least_ms)} ms ({digits(flops_per_second(best) / 1e9)} GFLOP/s). A cycle of batch "
        f"{first['batch_size']}, {ratio} iterations, takes {digits(cycle_ms)} ms, of which {digits(rest_ms)} ms are "
        f"beyond that: calls, Python and the optimizer, {digits(rest_ms / ratio)} ms an iteration, whatever the batch. "
        f"Batch {half} is the first with half of the best rate, batch {near} the first with nine tenths: from there on "
        "arithmetic decides."
    )


def _of_caches(result: dict) -> str:
    found = of(result, "batch")
    if not found or not (filled := filled_at(result)):
        return ""
    sentences = [f"Between two layers an image is {digits(map_bytes(result, found[0]) / 1e3)} kB."]
    for name, images in filled.items():
        before = [row for row in found if row["batch_size"] <= images]
        after = [row for row in found if row["batch_size"] > images]
        full = f"{name} ({digits(result['caches'][name] / 2**20, 2)} MB) is full at batch {digits(images, 2)}"
        if not before or not after:
            sentences.append(f"{full}, which was not crossed.")
            continue
        inside, outside = before[-1]["images_per_second"], after[0]["images_per_second"]
        seen = "falls" if outside < 0.97 * inside else "rises" if outside > 1.03 * inside else "stays"
        sentences.append(
            f"{full}: from {before[-1]['batch_size']} to {after[0]['batch_size']} images the rate {seen}, "
            f"{digits(inside)} to {digits(outside)} images/s."
        )
    best, last = _best(found), found[-1]
    part = last["images_per_second"] / best["images_per_second"]
    sentences.append(f"Batch {last['batch_size']} has {part:.2f} of the best rate.")
    return f"**Where caches are left.** {' '.join(sentences)}"


def _of_threads(result: dict) -> str:
    counts = all_threads(result)
    if len(counts) < 2:
        return ""
    few, many = (
        {row["batch_size"]: row["images_per_second"] for row in of(result, "batch", threads)}
        for threads in (counts[0], counts[-1])
    )
    gains = {batch: many[batch] / few[batch] for batch in sorted(few.keys() & many.keys())}
    if not gains:
        return ""
    least, most, best = min(gains), max(gains), max(gains, key=lambda batch: gains[batch])
    return (
        f"**Threads.** {counts[-1]} threads are {gains[least]:.2f} times as fast as {counts[0]} at batch {least}, "
        f"{gains[most]:.2f} times at batch {most}, and at most {gains[best]:.2f} times, at batch {best}."
    )


def _of_memory(result: dict) -> str:
    found = of(result, "batch")
    if len(found) < 2:
        return ""
    first, before, last = found[0], found[-2], found[-1]
    image_bytes = (last["peak_bytes"] - before["peak_bytes"]) / (last["batch_size"] - before["batch_size"])
    rest = f", {digits(first['rest_bytes'] / 1e6)} MB of it before anything is built" if first["rest_bytes"] else ""
    return (
        f"**Memory.** Batch {first['batch_size']} takes {digits(first['peak_bytes'] / 1e6)} MB{rest}; from batch "
        f"{before['batch_size']} to {last['batch_size']} every image adds {digits(image_bytes / 1e6)} MB."
    )


def _of_size(result: dict, series: str, title: str, unit: str) -> str:
    found, key = of(result, series), CHANGES[series]
    if len(found) < 2:
        return ""
    steps = [
        f"from {small[key]} to {large[key]} {large['flops_per_image'] / small['flops_per_image']:.1f} and "
        f"{small['images_per_second'] / large['images_per_second']:.1f} times"
        for small, large in itertools.pairwise(found)
    ]
    first, last = (flops_per_second(row) / peak(result, row["threads"]) for row in (found[0], found[-1]))
    return (
        f"**{title}**, at batch {found[0]['batch_size']}. FLOPs and time of an image grow, in {unit}, "
        f"{', '.join(steps)}: {first:.2f} of a matrix product's rate at first, {last:.2f} at last."
    )


def _best(found: Found) -> dict:
    return max(found, key=lambda row: row["images_per_second"])
