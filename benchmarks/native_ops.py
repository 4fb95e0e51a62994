"""Loads both native libraries and lists what they have, op by op; needs a torch built for CUDA, and no GPU.

    python -m benchmarks.native_ops

Exit code 1: a library is not there, does not load, or lacks an op.
"""

from __future__ import annotations

import argparse
import sys

import torch

from fastdmd import _native, ops


def kernels(name: str) -> list[str]:
    """The kinds of device for which a library has this op; none if no library declares it."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    if not torch._C._dispatch_has_kernel(f"fastdmd_native::{name}"):
        return []
    return [kind for kind in ("cpu", "cuda") if has(f"fastdmd_native::{name}", kind.upper())]


def faults() -> list[str]:
    """What is missing, a line each; the CUDA library need not have what a GPU leaves to torch."""
    missing = [f"the {kind} library: {reason}" for kind in _native.LIBRARIES if (reason := _native.load(kind))]
    for name in () if missing else ops.names():
        left_to_torch = "CPUs alone" in ops.unavailable(name, "cuda").get("native", "")
        expected = ["cpu"] if left_to_torch else ["cpu", "cuda"]
        found = kernels(name)
        print(f"{name:<26}{', '.join(found)}")
        if found != expected:
            missing.append(f"{name}: expected native code for {', '.join(expected)}, got {', '.join(found) or 'none'}")
    return missing


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.native_ops", description=__doc__.splitlines()[0])
    parser.parse_args(arguments)
    print(f"torch {torch.__version__}, CUDA {torch.version.cuda}")
    missing = faults()
    for fault in missing:
        print(f"benchmarks.native_ops: error: {fault}", file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
