"""What a stored result says of where it comes from."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
from pathlib import Path

import torch

from fastdmd import _native

ROOT = Path(__file__).parents[1]


def of_process(**variables: str) -> dict[str, str]:
    """Of a process that imports this fastdmd from any folder, and what this process finds besides."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, **variables, "PYTHONPATH": path}


def describe(device: str) -> dict:
    """Commit, device and versions; nothing that names a machine."""

    def output(*command: str) -> str | None:
        try:
            return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() or None
        except (OSError, subprocess.CalledProcessError):
            return None

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    commit = os.environ.get("FASTDMD_COMMIT")  # that of a copy which is no clone
    if not commit and (commit := output("git", "rev-parse", "--short", "HEAD")):
        commit += "+changes" if output("git", "status", "--porcelain") else ""
    if device == "cuda":
        name = torch.cuda.get_device_name()
        driver = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    else:
        name, driver = f"CPU, {torch.backends.cpu.get_cpu_capability()}", None
    return {
        "commit": commit,
        "device": name,
        "driver": driver,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": version("triton"),
        "native": _native.build_facts() if _native.load("cpu") is None else None,
    }
