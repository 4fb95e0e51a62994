"""On which of several GPUs a kernel runs: on that of its tensors, whichever is current."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


@functools.cache
def on_device_of_tensors(function: Callable) -> Callable:
    """`function` with the device of its first tensor current, as torch's own operations have it; Triton launches on the
    current device, and on its stream."""

    @functools.wraps(function)
    def launch(*arguments: Any) -> Any:
        device = next(one.device for one in arguments if isinstance(one, Tensor))
        if not torch.cuda.is_initialized() or device.index == torch.cuda.current_device():
            return function(*arguments)
        with torch.cuda.device(device):
            return function(*arguments)

    return launch
