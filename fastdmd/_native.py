"""The compiled libraries: where they are, loading them, and why one is not there."""

from __future__ import annotations

import ctypes
import functools
import os
import warnings
from pathlib import Path

import torch

LIBRARIES = {"cpu": "libfastdmd_cpu.so", "cuda": "libfastdmd_cuda.so"}
MISSING = {"cpu": "no compiler was found", "cuda": "no nvcc of torch's CUDA version was found"}
MODES = ("auto", "0", "1")  # of FASTDMD_NATIVE; 1 is for the build, which it lets fail


class Unavailable(RuntimeError):
    """Says why an implementation is not there."""


@functools.cache
def load(device_type: str) -> str | None:
    """Loads the library for `device_type`, once. Returns None, or the reason why there is none.

    A library that is there but does not load is a fault of the installation: it warns with the cause. Raises ValueError
    for a FASTDMD_NATIVE that means nothing.
    """
    if device_type not in LIBRARIES:
        return f"there is no native library for {device_type}"
    if (mode := os.environ.get("FASTDMD_NATIVE") or "auto") not in MODES:
        raise ValueError(f"fastdmd: expected FASTDMD_NATIVE out of {', '.join(MODES)}, got {mode!r}")
    if mode == "0":
        return "switched off by FASTDMD_NATIVE=0"
    if device_type == "cuda":
        if torch.version.cuda is None:
            return "this torch is built without CUDA"
        if (reason := load("cpu")) is not None:  # it defines the schemas
            return reason
    path = Path(__file__).parent / LIBRARIES[device_type]
    if not path.exists():
        return f"not built: {MISSING[device_type]} at installation, or FASTDMD_NATIVE=0 was set"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        reason = f"{path.name} is there but does not load: {error.__cause__ or error}"
        warnings.warn(f"fastdmd: {reason}", RuntimeWarning, stacklevel=2)
        return reason
    return None


@functools.cache
def load_emulated() -> str | None:
    """The same for the CUDA kernels compiled for CPUs, in the file that FASTDMD_EMULATED names: the tests build it."""
    path = os.environ.get("FASTDMD_EMULATED")
    if not path:
        return "FASTDMD_EMULATED names no library of CUDA kernels compiled for CPUs, which the tests build"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"FASTDMD_EMULATED={path} does not load: {error.__cause__ or error}"
    return None


def build_facts() -> str:
    """Compiler and target of the CPU library, and the instruction set that it chose on this machine."""
    library = ctypes.CDLL(str(Path(__file__).parent / LIBRARIES["cpu"]))
    library.fastdmd_build_facts.restype = ctypes.c_char_p
    return library.fastdmd_build_facts().decode()
