"""Networks in code of the user's own, by their import path `package.module:name`; only ever one that the user named."""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable

from torch import nn


def import_network(source: str, function: str) -> nn.Module:
    """The `torch.nn.Module` that `package.module:name` is, or that the class or function of that name makes.

    Looks into the working directory first, as `python -m` does. `function` is who asks, for errors: ValueError if
    there is no such name, TypeError if it gives something else. What the imported code raises itself passes through.
    """
    package, _, name = source.partition(":")
    if (folder := os.getcwd()) not in sys.path and "" not in sys.path:
        sys.path.insert(0, folder)
    try:
        found = functools.reduce(getattr, name.split("."), importlib.import_module(package))
    except (ImportError, AttributeError) as error:
        raise ValueError(f"fastdmd.{function}: expected {source} to be importable, got {error}") from error
    return make_network(found, function, source)


def make_network(found: nn.Module | Callable[[], nn.Module], function: str, name: str) -> nn.Module:
    """A module itself, or what a class or function makes without arguments. Raises TypeError for anything else."""
    network = found if isinstance(found, nn.Module) or not callable(found) else found()
    if not isinstance(network, nn.Module):
        raise TypeError(f"fastdmd.{function}: expected {name} to be a Module, got {type(network)}")
    return network
