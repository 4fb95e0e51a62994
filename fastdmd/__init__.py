"""fastdmd: distil a diffusion model into a one-step generator with DMD2."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastdmd import _former_names

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fastdmd import ops
    from fastdmd.distill import DMD2
    from fastdmd.networks.accelerate import accelerate, unaccelerate
    from fastdmd.optim import AdamWEMA
    from fastdmd.runs.config import TrainConfig
    from fastdmd.sampling import Generator, HeunSampler
    from fastdmd.teachers import load as load_teacher
    from fastdmd.teachers import load_generator

__all__ = [
    "DMD2",
    "AdamWEMA",
    "Generator",
    "HeunSampler",
    "TrainConfig",
    "__version__",
    "accelerate",
    "load_generator",
    "load_teacher",
    "ops",
    "unaccelerate",
]
_HOMES = {
    "DMD2": "distill",
    "AdamWEMA": "optim",
    "Generator": "sampling",
    "HeunSampler": "sampling",
    "TrainConfig": "runs.config",
    "accelerate": "networks.accelerate",
    "load_generator": "teachers",
    "load_teacher": "teachers",
    "unaccelerate": "networks.accelerate",
}

_former_names.install()


def __getattr__(name: str) -> Any:
    """Public names load at first use: `from fastdmd import ops` costs nothing else."""
    if name == "ops":
        return importlib.import_module("fastdmd.ops")
    if name not in _HOMES:
        raise AttributeError(f"module 'fastdmd' has no attribute {name!r}")
    home = importlib.import_module(f"fastdmd.{_HOMES[name]}")
    return getattr(home, "load" if name == "load_teacher" else name)


def __dir__() -> list[str]:
    return sorted(__all__)
