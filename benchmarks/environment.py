"""What a stored result says of where it comes from."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
from pathlib import Path

import torch

from benchmarks.sources import ROOT
from fastdmd import _native


def of_process(root: Path = ROOT, **variables: str) -> dict[str, str]:
    """Of a process that imports the fastdmd of `root` from any folder, and what this process finds besides."""
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, **variables, "PYTHONPATH": path}


def commit() -> str | None:
    """Of these sources: FASTDMD_COMMIT, for a copy which is no clone, or what git says."""
    found = os.environ.get("FASTDMD_COMMIT")
    if not found and (found := _output("git", "rev-parse", "--short", "HEAD")):
        found += "+changes" if _output("git", "status", "--porcelain") else ""
    return found


def gpu_name() -> str:
    """As names of results begin: `h100`."""
    name = re.search(r"[A-Z]+\d+\w*", torch.cuda.get_device_name())
    return name.group().lower() if name else "gpu"


def describe(device: str) -> dict:
    """Commit, device and versions; nothing that names a machine."""

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    if device == "cuda":
        name = torch.cuda.get_device_name()
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    else:
        name, driver = f"CPU, {torch.backends.cpu.get_cpu_capability()}", None
    return {
        "commit": commit(),
        "device": name,
        "driver": driver,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": version("triton"),
        "native": _native.build_facts() if _native.load("cpu") is None else None,
    }


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None
