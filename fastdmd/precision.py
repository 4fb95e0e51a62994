"""What a run computes in, `--precision`, and how it is executed, `--execution`; both with a default per device."""

from __future__ import annotations

import torch

PRECISIONS = ("auto", "fp32", "tf32", "bf16")
EXECUTIONS = ("auto", "eager", "compiled", "captured")


def resolve_precision(name: str, device: torch.device) -> str:
    """`auto` is bf16 on a GPU and fp32 on a CPU. Raises ValueError for TF32 where there are no such units."""
    if name == "auto":
        return "bf16" if device.type == "cuda" else "fp32"
    if name == "tf32" and device.type != "cuda":
        raise ValueError(f"expected --precision fp32 or bf16 on {device}, got tf32")
    return name


def resolve_execution(name: str, device: torch.device) -> str:
    """`auto` is captured on a GPU; on a CPU, where compiling takes minutes, eager."""
    if name == "auto":
        return "captured" if device.type == "cuda" else "eager"
    if name == "captured" and device.type != "cuda":
        raise ValueError(f"expected --execution eager or compiled on {device}, got captured")
    return name


def compute_dtype(precision: str) -> torch.dtype | None:
    """Of the networks; None leaves them as they are. Weights, moments and averages are float32 in any case."""
    return torch.bfloat16 if precision == "bf16" else None
