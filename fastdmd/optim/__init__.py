"""AdamW and the average of weights on flat buffers, as a `torch.optim.Optimizer`."""

from fastdmd.optim.adamw_ema import AdamWEMA

__all__ = ["AdamWEMA"]
