"""The operations of distribution matching distillation, usable alone: `from fastdmd import ops`.

Each file holds one op: the public function, then `reference`, the readable PyTorch that specifies it, then what torch
must know. `implementations` tells who else computes it. Importing this package loads torch and nothing heavier.
"""

from fastdmd.ops._registry import implementations, names, require_environment, unavailable, use_backend
from fastdmd.ops.adamw_ema import adamw_ema_
from fastdmd.ops.add_noise import add_noise
from fastdmd.ops.bias_gradient import bias_gradient
from fastdmd.ops.conv1x1 import conv1x1
from fastdmd.ops.conv3x3 import conv3x3
from fastdmd.ops.dm_gradient import dm_gradient
from fastdmd.ops.dm_loss import dm_loss, dm_loss_raw
from fastdmd.ops.fake_loss import denoising_loss, fake_loss, fake_loss_raw
from fastdmd.ops.group_norm_silu import group_norm, group_norm_silu
from fastdmd.ops.philox import philox, rng_key, rng_state

__all__ = [
    "adamw_ema_",
    "add_noise",
    "bias_gradient",
    "conv1x1",
    "conv3x3",
    "denoising_loss",
    "dm_gradient",
    "dm_loss",
    "dm_loss_raw",
    "fake_loss",
    "fake_loss_raw",
    "group_norm",
    "group_norm_silu",
    "implementations",
    "names",
    "philox",
    "require_environment",
    "rng_key",
    "rng_state",
    "unavailable",
    "use_backend",
]
