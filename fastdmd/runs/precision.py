"""What a run computes in, `--precision`, and how it is executed, `--execution`; both with a default per device."""

from __future__ import annotations

import dataclasses
import platform
import warnings
from typing import Annotated, Literal

import torch

from fastdmd.diffusion import Denoiser
from fastdmd.distill.execution import Execution
from fastdmd.settings import Settings, Switch, at_least, fail

Precision = Literal["fp32", "tf32", "bf16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComputeSettings(Settings):
    """What networks compute in, and how turns run."""

    precision: Literal["auto", Precision] = "auto"
    """What the networks compute in; weights are kept in float32. auto: bf16 on a GPU, fp32 on a CPU."""
    execution: Literal["auto", Execution] = "auto"
    """How turns run. auto: captured, on a GPU compiled networks and a CUDA graph per turn, on a CPU the operations that
    a turn came to, in a row, for the same bits as eager; on a CPU eager with a network of others."""
    compile: Switch = False
    """Short for --execution compiled."""
    accumulation_steps: Annotated[int, at_least(1, 10**6)] = 1
    """Parts that a batch is processed in: less memory, the same gradient."""
    shard: Switch = False
    """Let each of several processes have a part of every network, average and moment, for what outgrows a GPU. Turns
    run eagerly, and networks are gathered each time that they run."""

    def check(self) -> None:
        super().check()
        if self.compile and self.execution not in ("auto", "compiled"):
            fail(self, "execution", "compiled with --compile")
        if self.shard and (self.compile or self.execution not in ("auto", "eager")):
            fail(self, "shard", "with --execution eager alone")

    def for_teacher(self, teacher: Denoiser, device: torch.device) -> Compute:
        """With the defaults of the device filled in. Raises ValueError for what it cannot do with that network."""
        return Compute(
            precision=resolve_precision(self.precision, device),
            execution="compiled" if self.compile else resolve_execution(self._execution, device, teacher.foreign_name),
            compile=self.compile,
            accumulation_steps=self.accumulation_steps,
            shard=self.shard,
        )

    @property
    def _execution(self) -> Literal["auto", Execution]:
        return "eager" if self.shard else self.execution


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compute(ComputeSettings):
    """`ComputeSettings` with nothing left open."""

    precision: Precision = dataclasses.field()
    execution: Execution = dataclasses.field()

    def for_teacher(self, teacher: Denoiser, device: torch.device) -> Compute:
        """Itself: `compile` has had its say, and meta tensors, on which memory is counted, are no device of a run."""
        return self

    @property
    def dtype(self) -> torch.dtype | None:
        """What the networks compute in; None leaves them as they are. Weights, moments and averages are float32."""
        return torch.bfloat16 if self.precision == "bf16" else None


def resolve_precision(name: Literal["auto", Precision], device: torch.device) -> Precision:
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


def resolve_execution(name: Literal["auto", Execution], device: torch.device, foreign_name: str = "") -> Execution:
    """`auto` is captured. On a CPU networks of others, by their name, are not, as they may keep state in Python: `auto`
    is eager there, and ValueError for captured."""
    if device.type == "cpu" and foreign_name and name in ("auto", "captured"):
        if name == "captured":
            raise ValueError(f"expected --execution eager or compiled with {foreign_name} on {device}, got captured")
        return "eager"
    return "captured" if name == "auto" else name
