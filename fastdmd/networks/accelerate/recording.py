"""What happens inside of a module as it runs: how each module is called, and which GroupNorm's output goes to SiLU."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fastdmd.networks.accelerate.tracing import Call
from fastdmd.networks.accelerate.trial import undisturbed
from fastdmd.networks.accelerate.watched import Untraceable


@dataclasses.dataclass
class Record:
    calls: dict[str, Call | Untraceable] = dataclasses.field(default_factory=dict)  # of forwards that may be traced
    activated: set[str] = dataclasses.field(default_factory=set)  # GroupNorms whose output SiLU takes as it is

    def note(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            call: Call | Untraceable = Call.of(args, kwargs)
        except Untraceable as error:
            call = error
        if self.calls.setdefault(name, call) != call:
            self.calls[name] = Untraceable("it is called in several ways")


def record(module: nn.Module, inputs: tuple[Any, ...]) -> Record:
    """Runs the module once, in eval mode and without gradients."""
    found, outputs = Record(), _Outputs()
    with contextlib.ExitStack() as stack:
        stack.enter_context(undisturbed(module))
        stack.enter_context(torch.no_grad())
        for name, part in module.named_modules():
            if has_own_forward(part):
                hook = functools.partial(lambda name, _, args, kwargs: found.note(name, args, kwargs), name)
                stack.callback(part.register_forward_pre_hook(hook, with_kwargs=True).remove)
            elif isinstance(part, nn.GroupNorm):
                keep = functools.partial(lambda name, _, args, output: outputs.keep(name, output), name)
                stack.callback(part.register_forward_hook(keep).remove)
        stack.enter_context(outputs)
        module(*(value.clone() if isinstance(value, Tensor) else value for value in inputs))
    found.activated = outputs.activated
    return found


def has_own_forward(module: nn.Module) -> bool:
    """Somebody's, which may say what follows what; as that of Sequential does."""
    is_own = not type(module).__module__.startswith(("torch.", "fastdmd.")) or type(module) is nn.Sequential
    return is_own and "forward" not in vars(module)


class _Outputs(TorchFunctionMode):
    """Those of norms, and which of them SiLU is taken of."""

    def __init__(self) -> None:
        super().__init__()
        self._names: dict[int, tuple[str, Tensor]] = {}  # with the tensor, or its id would be another's soon
        self.activated: set[str] = set()

    def keep(self, name: str, output: Tensor) -> None:
        self._names[id(output)] = name, output

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and func in (F.silu, torch.sigmoid, Tensor.sigmoid) and id(args[0]) in self._names:
            self.activated.add(self._names[id(args[0])][0])
        return func(*args, **(kwargs or {}))
