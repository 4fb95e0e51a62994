"""A module with another forward: code that a graph has become, while the module is what it was when it was traced."""

from __future__ import annotations

import copyreg
import functools
import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from fastdmd.networks.accelerate.tracing import Call, is_listened_to

REWRITES = "_fastdmd_rewrites"  # {training: Rewrite}


class Rewrite:
    """A forward for one way of calling a module, in one of its modes.

    It skips or inlines the descendants in `expected`, and so holds while these are of their classes, without hooks,
    and while the module has the `children` that it had.
    """

    def __init__(
        self,
        source: str,
        names: Mapping[str, Any],
        call: Call,
        expected: Mapping[str, type[nn.Module]],
        children: tuple[str, ...],
    ):
        self.source, self.names, self.call = source, dict(names), call
        self.expected, self.children = dict(expected), children
        scope = dict(names)
        exec(compile(source, "<fastdmd.accelerate>", "exec"), scope)
        self.forward = scope["forward"]
        self._paths = [(name.split("."), kind) for name, kind in expected.items()]

    def __reduce__(self) -> tuple[Any, ...]:
        modules = {name: value.__name__ for name, value in self.names.items() if isinstance(value, ModuleType)}
        others = {name: value for name, value in self.names.items() if name not in modules}
        return _remade, (self.source, others, modules, self.call, self.expected, self.children)

    def __deepcopy__(self, memo: dict[int, Any]) -> Rewrite:
        return self  # nothing in it changes

    def fits(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if tuple(module._modules) != self.children:
            return False
        for path, kind in self._paths:
            child: Any = module
            for name in path:
                child = child._modules.get(name)
                if child is None:
                    return False
            if not isinstance(child, kind) or is_listened_to(child):
                return False
        return self.call.fits(args, kwargs)


class Rewritten:
    """Before a module's own class: what it is called with goes to the rewrite that fits, or else to its own forward.

    Whatever the module is told afterwards, other weights and modes apart, ends its rewrites.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        rewrite = vars(self).get(REWRITES, {}).get(self.training)  # type: ignore[attr-defined]
        if rewrite is None or not rewrite.fits(self, args, kwargs):
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        return rewrite.forward(self, *rewrite.call.tensors(args, kwargs))

    def __setattr__(self, name: str, value: Any) -> None:
        before = getattr(self, name, None)
        super().__setattr__(name, value)
        is_alike = any(isinstance(before, kind) and isinstance(value, kind) for kind in (Tensor, nn.Module))
        if name != "training" and not name.startswith("_") and not is_alike:
            vars(self)[REWRITES] = {}

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        vars(self)[REWRITES] = {}

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        make, arguments, *rest = reduced
        if make is copyreg.__newobj__:  # type: ignore[attr-defined]
            return _new, (own_class(self), *arguments[1:]), *rest  # type: ignore[arg-type]
        return reduced


def rewrite(module: nn.Module, rewrites: Mapping[bool, Rewrite]) -> None:
    """Gives the module these, by mode, in place."""
    vars(module)[REWRITES] = dict(rewrites)
    module.__class__ = _rewritten(type(module))  # type: ignore[arg-type]


def restore(module: nn.Module) -> None:
    """Its own class and forward again; nothing for a module that has them."""
    if isinstance(module, Rewritten):
        vars(module).pop(REWRITES, None)
        module.__class__ = own_class(module)  # type: ignore[assignment]


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class that somebody gave it."""
    kind = type(module)
    return kind.__mro__[2] if isinstance(module, Rewritten) else kind


@functools.cache
def _rewritten(kind: type[nn.Module]) -> type[nn.Module]:
    """`kind` with `Rewritten` before it, by the same name: `repr` and messages stay."""
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (Rewritten, kind), names)


def _remade(source: str, names: dict[str, Any], modules: dict[str, str], *others: Any) -> Rewrite:
    imported = {name: importlib.import_module(module) for name, module in modules.items()}
    return Rewrite(source, names | imported, *others)


def _new(kind: type[nn.Module], *arguments: Any) -> nn.Module:
    made: type[nn.Module] = _rewritten(kind)  # type: ignore[arg-type]
    return made.__new__(made, *arguments)
