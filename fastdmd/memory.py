"""How much memory is left or taken: what the system, the control groups of this process, or a GPU say."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch

ROOT = Path("/")
SMALLER = "a smaller --batch-size or more --accumulation-steps need less"
OUT_OF_MEMORY = re.compile(
    "out of memory|n[o']t allocate memory|unable to allocate|not enough memory|bad_alloc|STATUS_ALLOC_FAILED"
    # of our native ops, and of oneDNN's, where an allocation is all that can fail
    '|dispatcher\\( *"aten::(new_)?empty|could not create a (memory|primitive)',
    re.IGNORECASE,
)


def available_memory_bytes(root: Path = ROOT) -> int | None:
    """The least of what the system has free and what each control group around this process has left.

    Groups are read in both versions and at every level, since each bounds those below it. Files that the kernel only
    caches count as free. None where the system tells nothing.
    """
    amounts = [*_of_system(root), *_of_groups(root)]
    return max(0, min(amounts)) if amounts else None


def available_bytes(device: torch.device) -> int | None:
    """Free memory of the device, None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_memory_bytes()


def require_memory(num_bytes: float, device: torch.device, what: str, advice: str = SMALLER) -> None:
    """Raises ValueError where the device cannot hold so many bytes, before anything takes them."""
    available = available_bytes(device)
    if available is not None and num_bytes > available:
        raise ValueError(
            f"expected {what} to fit into memory, got {num_bytes / 1e9:.1f} GB at the least, with "
            f"{available / 1e9:.1f} GB free; {advice}"
        )


def half(batch_size: int, accumulation_steps: int | None = None, num_processes: int = 1, *, num_steps: int = 1) -> str:
    """What to try where a batch, of each process, did not fit and nothing else is known; `accumulation_steps`, where
    there are such. `num_steps` divide every part of a batch."""
    steps, most = accumulation_steps or 1, batch_size // num_steps
    if most // steps <= 1:
        what = "one image" if num_steps == 1 else f"an image of each of {num_steps} steps"
        return f"{what} at a time is all that --batch-size {batch_size * num_processes} leaves; use a larger device"
    smaller = f"try --batch-size {most // 2 // steps * steps * num_steps * num_processes}"
    if accumulation_steps is None:
        return smaller
    more = next(n for n in range(2 * steps, most + 1) if most % n == 0)
    return f"{smaller} or --accumulation-steps {more}"


def taken_bytes(device: torch.device) -> dict[str, int]:
    """By this process: `resident_bytes` of the system's memory now, and of a GPU's `gpu_peak_bytes`, the most so far;
    what is not known is left out."""
    taken: dict[str, int] = {}
    with contextlib.suppress(OSError, ValueError, IndexError, AttributeError):
        pages = int((ROOT / "proc/self/statm").read_text().split()[1])
        taken["resident_bytes"] = pages * os.sysconf("SC_PAGE_SIZE")
    if device.type == "cuda":
        taken["gpu_peak_bytes"] = torch.cuda.max_memory_allocated(device)
    return taken


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether this is what Python, numpy, torch, a GPU's libraries or the system raise then."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, (RuntimeError, OSError, ValueError)) and bool(OUT_OF_MEMORY.search(str(error)))


def _of_system(root: Path) -> Iterator[int]:
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        yield next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, IndexError):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            yield os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def _of_groups(root: Path) -> Iterator[int]:
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = (line.split(":", 2) + ["", ""])[:3]  # number:controllers:path
        if controllers == "":
            names = ("memory.max", "memory.current", "inactive_file")
            mounts = ["sys/fs/cgroup", "sys/fs/cgroup/unified"]
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            mounts = ["sys/fs/cgroup/memory"]
        else:
            continue
        # Inside a container the path may be the host's: then the container's own group is the mount itself.
        parts = [] if ".." in path.split("/") else path.strip("/").split("/")
        for mount in mounts:
            for depth in range(len(parts), -1, -1):
                yield from _left_in_group(root / mount / "/".join(parts[:depth]), *names)


def _left_in_group(group: Path, limit: str, usage: str, cached: str) -> Iterator[int]:
    with contextlib.suppress(OSError, ValueError):  # no such group, or no limit, which reads "max"
        limit_bytes = int((group / limit).read_text())
        used_bytes = int((group / usage).read_text())
        with contextlib.suppress(OSError, ValueError):
            fields = dict(line.split(maxsplit=1) for line in (group / "memory.stat").read_text().splitlines())
            used_bytes -= int(fields.get(cached, 0))
        yield limit_bytes - max(0, used_bytes)
