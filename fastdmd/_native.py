"""The compiled libraries: where they are, loading them, and why one is not there."""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import warnings
from pathlib import Path
from types import ModuleType

import torch

from fastdmd import _sources

LIBRARIES = {"cpu": "libfastdmd_cpu.so", "cuda": "libfastdmd_cuda.so"}
KERNELS = "libfastdmd_kernels.so"  # what the CPU library and the module `_runtime` link
MISSING = {"cpu": "no compiler or no CMake was found", "cuda": "no nvcc of torch's CUDA version was found"}
NO_RUNTIME = "not built for this Python: a compiler, CMake, pybind11 or Python's headers were not found at installation"
SWITCHED_OFF = "switched off by FASTDMD_NATIVE=0"
MODES = ("auto", "0", "1")  # of FASTDMD_NATIVE; 1 is for the build, which it lets fail


class Unavailable(RuntimeError):
    """Says why an implementation is not there."""


@functools.cache
def load(device_type: str) -> str | None:
    """Loads the library for `device_type`, once. Returns None, or the reason why there is none.

    A library that is there but does not load is a fault of the installation: it warns with the cause, as it does of
    libraries that are older or newer than the sources beside them. Raises ValueError for a FASTDMD_NATIVE that means
    nothing.
    """
    if device_type not in LIBRARIES:
        return f"there is no native library for {device_type}"
    if _switched_off():
        return SWITCHED_OFF
    if device_type == "cuda":
        if torch.version.cuda is None:
            return "this torch is built without CUDA"
        if (reason := load("cpu")) is not None:  # it defines the schemas
            return reason
    path = Path(__file__).parent / LIBRARIES[device_type]
    if not path.exists():
        return f"not built: {MISSING[device_type]} at installation, the build failed, or FASTDMD_NATIVE=0 was set"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        reason = f"{path.name} is there but does not load: {error.__cause__ or error}"
        warnings.warn(f"fastdmd: {reason}", RuntimeWarning, stacklevel=2)
        return reason
    if device_type == "cpu":
        _compare_with_sources(Path(__file__).parents[1])
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


@functools.cache
def runtime() -> ModuleType:
    """The module `fastdmd._runtime`. Raises Unavailable where there is none for this Python.

    One that is there but does not load warns with its cause.
    """
    if _switched_off():
        raise Unavailable(SWITCHED_OFF)
    try:
        return importlib.import_module("fastdmd._runtime")
    except ModuleNotFoundError:
        raise Unavailable(NO_RUNTIME) from None
    except ImportError as error:
        warnings.warn(f"fastdmd: _runtime is there but does not load: {error}", RuntimeWarning, stacklevel=2)
        raise Unavailable(f"it is there but does not load: {error}") from error


def build_facts() -> str:
    """Compiler and target of the CPU library, and the instruction set that it runs with, in words."""
    try:
        facts = runtime().build_facts()
    except Unavailable:
        library = ctypes.CDLL(str(Path(__file__).parent / KERNELS))
        library.fastdmd_build_facts.restype = ctypes.c_char_p
        return library.fastdmd_build_facts().decode()
    source = f" from {facts['commit']}" if facts["commit"] else ""
    cuda = f", CUDA for {', '.join(facts['cuda_architectures'])}" if facts["cuda_architectures"] else ""
    return (
        f"compiled by {facts['compiler']}{source}, stable ABI of torch {facts['torch_abi']}{cuda}, "
        f"running {runtime().instruction_set()}"
    )


def _compare_with_sources(root: Path) -> None:
    """Warns where a checkout has changed since its libraries were built, as by `git pull`: they compute as before."""
    if (now := _sources.digest(root)) is None:
        return
    library = ctypes.CDLL(str(Path(__file__).parent / KERNELS))
    if hasattr(library, "fastdmd_sources"):
        library.fastdmd_sources.restype = ctypes.c_char_p
        if library.fastdmd_sources().decode() in (now, ""):  # "": built by CMake alone
            return
    warnings.warn(
        f"fastdmd: the native libraries were built from other sources than {root / 'csrc'} has now; "
        f"`pip install --no-build-isolation -e {root}` builds them anew",
        RuntimeWarning,
        stacklevel=3,
    )


def _switched_off() -> bool:
    if (mode := os.environ.get("FASTDMD_NATIVE") or "auto") not in MODES:
        raise ValueError(f"fastdmd: expected FASTDMD_NATIVE out of {', '.join(MODES)}, got {mode!r}")
    return mode == "0"
