"""The distribution-matching gradient without its loss: the kernel of dm_loss."""

from fastdmd.kernels.dm_loss import dm_gradient

__all__ = ["dm_gradient"]
