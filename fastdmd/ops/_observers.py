"""Whether anything looks on where an op is called, so that it has to pass through torch's dispatcher."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

DEVICES = ("cpu", "cuda")  # whose tensors the ops compute themselves
PLAIN = (Tensor, nn.Parameter)  # any other class may override how torch calls an op


def is_unobserved(arguments: tuple) -> bool:
    """Whether no compiler, mode, transform, tracer or profiler, and nothing of the tensors, changes what a call means.

    The public functions have seen to it that all tensors are on one device.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
        or arguments[0].device.type not in DEVICES
    ):
        return False
    keys = _plain_keys(arguments[0].device.type)
    return all(
        type(one) in PLAIN and torch._C._dispatch_keys(one).raw_repr() in keys
        for one in arguments
        if isinstance(one, Tensor)
    )


@functools.cache
def _plain_keys(device_type: str) -> frozenset[int]:
    """Dispatch keys of tensors that are what their memory holds: not those of a lazy negation, of a batch of vmap's, of
    zeros without memory, which torch resolves before it calls a kernel."""
    found = set()
    for mode in (False, True):
        with torch.inference_mode(mode):
            found.add(torch._C._dispatch_keys(torch.empty(0, device=device_type)).raw_repr())
    return frozenset(found)
