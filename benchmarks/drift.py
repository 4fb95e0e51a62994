"""Memory and throughput of a training that goes on for long: lines through what was seen of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np

SETTLED = 0.25  # of the time, in which caches fill: what was seen then counts for no line
MOST_GROWTH = 0.05  # of the memory, in all of the time after that
LEAST_MINUTES = 10.0  # in less, the first measurement and the first picture look like growth, and nothing is judged
EVERY_SECONDS = 1.0


def watch(process: subprocess.Popen, folder: Path, minutes: float) -> str | None:
    """Ends the training in `folder`/long/run after so many minutes, prints what it came to; returns what is wrong."""
    memory: list[tuple[float, float]] = []  # seconds, MB
    began = time.monotonic()
    while (seconds := time.monotonic() - began) < 60 * minutes and process.poll() is None:
        memory.append((seconds, resident_bytes(process.pid) / 1e6))
        time.sleep(EVERY_SECONDS)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate()
    if process.returncode != 128 + signal.SIGTERM:
        return f"the long training: {process.returncode}: {error}"
    log = [json.loads(line) for line in (folder / "long" / "run" / "metrics.jsonl").read_text().splitlines()]
    rates = [(line["seconds"], line["images_per_second"]) for line in log]
    print(f"{minutes:g} minutes, {log[-1]['iteration']} iterations:")
    growth = tell("memory", memory, "MB")
    tell("throughput", rates, "images/s")
    is_judged = minutes >= LEAST_MINUTES and growth > MOST_GROWTH
    return f"memory grew by {growth:.1%}, more than {MOST_GROWTH:.0%}" if is_judged else None


def resident_bytes(process: int) -> int:
    """Of a process on Linux; 0 of one that has ended."""
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (FileNotFoundError, ProcessLookupError):
        return 0


def tell(name: str, points: list[tuple[float, float]], unit: str) -> float:
    """Prints the line through points of (seconds, value) when all has settled; returns its growth in that time, as a
    share of the mean, if that is beyond chance, else 0."""
    seconds, values = np.array([point for point in points if point[0] >= SETTLED * points[-1][0]]).T
    slope, error = line_through(seconds, values)
    span, mean = seconds[-1] - seconds[0], values.mean()
    print(
        f"{name:>12}: mean {mean:.1f} {unit}, {3600 * slope:+.2f} +- {3600 * error:.2f} {unit} an hour ({len(values)})"
    )
    return slope * span / mean if slope > 3 * error else 0.0


def line_through(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """The slope of least squares and its standard error, of three points or more."""
    x, y = x - x.mean(), y - y.mean()
    slope = (x @ y) / (x @ x)
    return float(slope), float(np.sqrt(np.square(y - slope * x).sum() / (len(x) - 2) / (x @ x)))
