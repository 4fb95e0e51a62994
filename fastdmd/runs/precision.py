"""What a run computes in, `--precision`, and how it is executed, `--execution`; both with a default per device."""

from __future__ import annotations

import platform
import warnings

import torch

PRECISIONS = ("auto", "fp32", "tf32", "bf16")
EXECUTIONS = ("auto", "eager", "compiled", "captured")


def resolve_precision(name: str, device: torch.device) -> str:
    """`auto` is bf16 on a GPU and fp32 on a CPU. Raises ValueError for TF32 where there are no such units.

    Warns of bf16 on a CPU without its instructions. There oneDNN emulates it: convolutions of 16 to 96 channels, 14x14,
    were measured 1.5 to 3 times as slow as in float32 with AVX-512, 5 to 10 times with AVX2; with AVX512-BF16 twice as
    fast at every width.
    """
    if name == "auto":
        return "bf16" if device.type == "cuda" else "fp32"
    if name == "tf32" and device.type != "cuda":
        raise ValueError(f"expected --precision fp32 or bf16 on {device}, got tf32")
    if name == "bf16" and device.type == "cpu" and not has_bfloat16_arithmetic():
        warnings.warn("--precision bf16: this CPU only emulates it, which is slower than fp32", stacklevel=2)
    return name


def has_bfloat16_arithmetic() -> bool:
    """Of an x86 CPU; of others nothing is known here, and nothing said."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return True
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


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
