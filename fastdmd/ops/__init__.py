"""The operations of distribution matching distillation, usable alone: `from fastdmd import ops`.

Each file holds one op: the public function, then `reference`, the readable PyTorch that specifies it. Importing
this package loads torch and nothing else of fastdmd.
"""

from fastdmd.ops.add_noise import add_noise
from fastdmd.ops.dm_gradient import dm_gradient
from fastdmd.ops.dm_loss import dm_loss
from fastdmd.ops.fake_loss import fake_loss

__all__ = ["add_noise", "dm_gradient", "dm_loss", "fake_loss"]
