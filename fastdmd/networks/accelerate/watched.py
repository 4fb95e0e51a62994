"""What a forward does while it is traced that no graph shows: questions, contexts, objects that keep something."""

from __future__ import annotations

import contextlib
import dis
import functools
import gc
import inspect
import sys
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, fx, nn

# What asks a value for its kind, to which a stand-in would answer another, or for modes, which may be others next time,
# and what a graph does not show.
MODES = (torch.is_grad_enabled, torch.is_inference_mode_enabled, torch.is_autocast_enabled, torch.get_default_dtype)
QUESTIONS = (isinstance, issubclass, hasattr, callable, id, print, *MODES)
HIDDEN: dict[CodeType, str] = {
    inspect.unwrap(function).__code__: name
    for name, function in {
        "torch.is_tensor": torch.is_tensor,
        "torch.utils.checkpoint": torch.utils.checkpoint.checkpoint,
        "torch.autograd.Function": torch.autograd.Function.apply.__func__,  # type: ignore[attr-defined]
    }.items()
}
LIBRARIES = {"torch", "fastdmd", *sys.stdlib_module_names}  # whose own questions mislead nobody
# Of Python's library, what answers the same every time; all else asks the world, as files, clocks and the environment.
PURE = frozenset(
    "builtins math cmath operator functools itertools collections numbers fractions types typing abc enum dataclasses "
    "contextlib copy re string textwrap warnings inspect _operator _functools _collections _abc".split()
)


class Untraceable(Exception):
    """Why a forward cannot be a graph, in a few words."""


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Raises Untraceable where the module's code calls one of QUESTIONS or HIDDEN, asks the world outside, enters a
    context, or calls an object that may keep what it gets."""
    found = []

    def notice(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code in HIDDEN:
            found.append(HIDDEN[frame.f_code])
        elif event == "c_call" and argument in QUESTIONS and _package(frame) not in LIBRARIES:
            found.append(argument.__name__)
        elif (asked := _asked_outside(frame, event, argument)) is not None:
            found.append(asked)
        elif event == "call" and (kept := _keeps(frame)) is not None:
            found.append(kept)
            raise Untraceable(f"it calls {kept}")  # before stand-ins come to it
        elif event == "call" and _package(frame) not in LIBRARIES and _tells_others(frame.f_code):
            found.append(f"{frame.f_code.co_name}, which sets a variable outside")
        elif event == "call" and frame.f_code.co_name == "__enter__" and _is_entered_by_somebody(frame.f_back):
            found.append(type(frame.f_locals.get("self")).__name__)

    before, collects = sys.getprofile(), gc.isenabled()
    gc.disable()  # whose callbacks, of anybody, would be taken for calls of the module
    sys.setprofile(notice)
    try:
        yield
    finally:
        sys.setprofile(before)
        if collects:
            gc.enable()
    if found:
        raise Untraceable(f"it calls {found[0]}")


def _asked_outside(frame: FrameType, event: str, argument: Any) -> str | None:
    """The function of Python's library that somebody's code calls, perhaps by way of others of it, and whose answer may
    be another next time."""
    caller: FrameType | None = frame
    package, name = _package(frame), frame.f_code.co_name
    if event == "c_call" and argument is sys.getrecursionlimit:  # inspect.signature does, and forgets it
        return None
    if event == "c_call":
        package, name = str(getattr(argument, "__module__", None)).split(".")[0], argument.__name__
    elif event != "call":
        return None
    if package not in sys.stdlib_module_names - PURE:
        return None
    while caller is not None and _package(caller) in sys.stdlib_module_names:
        caller = caller.f_back
    return f"{name} of {package}" if caller is not None and _package(caller) not in LIBRARIES else None


@functools.cache
def _tells_others(code: CodeType) -> bool:
    """Whether a function sets a global variable, or one of the function around it."""
    for instruction in dis.get_instructions(code):
        is_free = instruction.opname == "STORE_DEREF" and instruction.argval in code.co_freevars
        if is_free or instruction.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
            return True
    return False


def _keeps(frame: FrameType) -> str | None:
    """Somebody's object, no module, whose method is called and that has attributes: it may keep something there, or be
    told something later."""
    names = frame.f_code.co_varnames[: frame.f_code.co_argcount]
    if _package(frame) in LIBRARIES or not names:
        return None
    own = frame.f_locals.get(names[0])
    kinds = type(own).__mro__
    if isinstance(own, nn.Module | Tensor | fx.Proxy | type) or not any(frame.f_code.co_name in vars(k) for k in kinds):
        return None
    has_slots = any(vars(kind).get("__slots__") for kind in kinds if kind.__module__.split(".")[0] not in LIBRARIES)
    return f"a {type(own).__name__} with attributes" if has_slots or getattr(own, "__dict__", None) else None


def _is_entered_by_somebody(frame: FrameType | None) -> bool:
    """By `with`, or by a decorator of torch's around a function."""
    return frame is not None and (_package(frame) not in LIBRARIES or frame.f_code.co_name == "decorate_context")


def _package(frame: FrameType) -> str:
    return frame.f_globals.get("__name__", "").split(".")[0]
