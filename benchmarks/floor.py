"""The time that the convolutions and matrix products of some code take alone: what no loop around them can beat."""

from __future__ import annotations

import time
from collections import Counter

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
HEAVY = {
    aten.convolution,
    aten.convolution_backward,
    aten.mm,
    aten.addmm,
    aten.bmm,
    aten.baddbmm,
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_flash_attention_for_cpu_backward,
    aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_flash_attention_backward,
    aten._scaled_dot_product_efficient_attention,
    aten._scaled_dot_product_efficient_attention_backward,
    aten._scaled_dot_product_cudnn_attention,
    aten._scaled_dot_product_cudnn_attention_backward,
}
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


class Recorder(TorchDispatchMode):
    """Counts the heavy calls made inside, by everything that their time depends on."""

    def __init__(self):
        super().__init__()
        self.calls: Counter = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in HEAVY:
            self.calls[func, describe(args), describe(tuple(sorted((kwargs or {}).items())))] += 1
        return func(*args, **(kwargs or {}))


def describe(value):
    """A hashable description of arguments, from which `make` builds others of the same form."""
    if isinstance(value, Tensor):
        return "tensor", tuple(value.shape), value.stride(), value.dtype, value.device.type
    if isinstance(value, (list, tuple)):
        return "list", tuple(map(describe, value))
    return "value", value


def make(description, layout: torch.memory_format | None):
    kind, *rest = description
    if kind == "value":
        return rest[0]
    if kind == "list":
        return [make(item, layout) for item in rest[0]]
    shape, stride, dtype, device = rest
    if layout is not None and len(shape) == 4:
        tensor = torch.empty(shape, dtype=dtype, device=device).contiguous(memory_format=layout)
    else:
        tensor = torch.empty_strided(shape, stride, dtype=dtype, device=device)
    return tensor.normal_() if dtype.is_floating_point else tensor.zero_()


class Floor:
    """The recorded calls with arguments of their own, convolutions in the layout that was the faster one here."""

    def __init__(self, calls: Counter):
        self.calls, self.layouts = [], Counter()
        for (func, args, kwargs), count in calls.items():
            candidates = {None: self._bind(func, args, kwargs, None)}
            if func.overloadpacket in (aten.convolution, aten.convolution_backward):
                candidates = {name: self._bind(func, args, kwargs, layout) for name, layout in LAYOUTS.items()}
            best = min(candidates, key=lambda name: min(seconds(candidates[name]) for _ in range(4)))
            self.calls.append((candidates[best], count))
            self.layouts[best] += count
        self._graph = None
        self._is_on_gpu = any("cuda" in str(args) for _, args, _ in calls)

    @staticmethod
    def _bind(func, args, kwargs, layout):
        args = make(args, layout)
        kwargs = {name: value for name, value in make(kwargs, layout)}
        return lambda: func(*args, **kwargs)

    @torch.no_grad()
    def seconds(self) -> float:
        """All calls, as often as they were recorded, one kind after the other; on a GPU as one graph."""
        if not self._is_on_gpu:
            return sum(seconds(call, count) for call, count in self.calls)
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                for call, count in self.calls:
                    for _ in range(count):
                        call()
        return seconds(self._graph.replay)


def seconds(call, count: int = 1) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(count):
        call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started
