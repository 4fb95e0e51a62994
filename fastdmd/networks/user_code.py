"""Networks in code of the user's own, by their import path `package.module:name`; only ever one that the user named."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import sys
import sysconfig
import textwrap
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

Code = str | nn.Module | Callable[[], nn.Module]  # package.module:name, a module, or what makes one
LIBRARIES = {str(Path(__file__).parents[1])} | {sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")}
MAX_REASON = 400  # characters
TORCHSCRIPT = "Traceback of TorchScript"  # whose messages hold a traceback of their own, and end with the cause


@contextlib.contextmanager
def user_code(function: str, expected: str) -> Iterator[None]:
    """Around code and configurations that are not ours: whatever they raise becomes a ValueError of one line.

    `fastdmd.<function>: expected <expected>, got <type>: <message> (<file>, line <n>)`, with the innermost line of a
    file that belongs to no library, and what was raised as its cause. `sys.exit` counts as raised; errors of ours,
    and KeyboardInterrupt, pass through. What it changes of the process's modes is undone, see `modes_kept`.
    """
    try:
        with modes_kept():
            yield
    except (Exception, SystemExit) as error:
        if isinstance(error, (ValueError, TypeError, OSError)) and str(error).startswith("fastdmd."):
            raise
        raise ValueError(f"fastdmd.{function}: expected {expected}, got {reason(error)}") from error


@contextlib.contextmanager
def modes_kept() -> Iterator[None]:
    """Gradients on or off, torch's default dtype and device and the filters of warnings are afterwards as before."""
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    try:
        with torch.set_grad_enabled(torch.is_grad_enabled()), warnings.catch_warnings():
            yield
    finally:
        torch.set_default_dtype(dtype)
        if torch.get_default_device() != device:
            torch.set_default_device(None)  # no mode at all, where there was none
        if torch.get_default_device() != device:
            torch.set_default_device(device)


def make_network(code: Code, function: str, name: str = "network") -> nn.Module:
    """The `torch.nn.Module` that `code` is, or that a class or function makes without arguments.

    `package.module:name` is imported, with a look into the working directory first, as `python -m` does. `function` is
    who asks and `name` what, for errors: ValueError if there is no such name or the code itself raises, TypeError if it
    gives something else.
    """
    found: Any = code
    if isinstance(code, str):
        name = code
        found = _imported(code, function)
    with user_code(function, f"{name} to make a Module without arguments"):
        network = found if isinstance(found, nn.Module) or not callable(found) else found()
    if not isinstance(network, nn.Module):
        raise TypeError(f"fastdmd.{function}: expected {name} to be a Module, got {type(network)}")
    return network


def _imported(source: str, function: str) -> Any:
    package, _, name = source.partition(":")
    if (folder := os.getcwd()) not in sys.path and "" not in sys.path:
        sys.path.insert(0, folder)
    with user_code(function, f"{source} to be importable"):
        return functools.reduce(getattr, name.split("."), importlib.import_module(package))


def reason(error: BaseException) -> str:
    """Type and message of an error on one line, and where the user's own code raised it."""
    try:
        message = error.msg if isinstance(error, SyntaxError) else str(error)
    except Exception:  # __str__ is code of the user's own, too
        message = ""
    text = f"{type(error).__name__}: {message}" if message else type(error).__name__
    if TORCHSCRIPT in message:
        text = message.strip().splitlines()[-1]
    place = place_in_user_code(error)
    return textwrap.shorten(text, MAX_REASON, placeholder=" ...") + (f" ({place})" if place else "")


def place_in_user_code(error: BaseException) -> str | None:
    """File and line where code that belongs to no library raised this, the innermost; None where none was running."""
    frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    if isinstance(error, SyntaxError):
        frames.append((error.filename or "", error.lineno or 0))
    own = [(file, line) for file, line in frames if os.path.isfile(file) and not _is_library(file)]
    return f"{own[-1][0]}, line {own[-1][1]}" if own else None


def _is_library(file: str) -> bool:
    return any(Path(file).is_relative_to(folder) for folder in LIBRARIES)
