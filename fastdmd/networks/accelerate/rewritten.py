"""A module with another forward: code that a graph has become, while the module is what it was when it was traced."""

from __future__ import annotations

import copyreg
import importlib
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from fastdmd.networks.accelerate.tracing import Call, is_untold

REWRITES = "_fastdmd_rewrites"  # {training: Rewrite}; none any more once the module was told something
# What PyTorch sets, FSDP2 and DistributedDataParallel included, and what changes no forward.
UNHEARD = {
    "training",
    REWRITES,
    "_is_fsdp_managed_module",
    "_fsdp_use_orig_params",
    "_ddp_params_and_buffers_to_ignore",
    *(name for name in dir(nn.Module()) if name.startswith("_")),
}
_CLASSES: dict[type, type] = {}  # by somebody's class ours with `Rewritten`


class Rewrite:
    """A forward for one way of calling a module, in one of its modes.

    It skips or inlines the descendants in `expected`, and so holds while these are exactly of their classes, without
    hooks or forwards of their own; those `inlined`, while they are told nothing else and are in its mode; and while
    the module, "", and what it goes through, as its lists, have the `children` that they had.
    """

    def __init__(
        self,
        source: str,
        names: Mapping[str, Any],
        call: Call,
        expected: Mapping[str, type[nn.Module]],
        inlined: frozenset[str],
        children: Mapping[str, tuple[str, ...]],
    ):
        self.source, self.names, self.call = source, dict(names), call
        if not isinstance(children, Mapping):  # of a pickle from when the module's own were all
            children = {"": tuple(children)}
        self.expected, self.inlined, self.children = dict(expected), inlined, dict(children)
        scope = dict(names)
        exec(compile(source, "<fastdmd.accelerate>", "exec"), scope)
        self.forward = scope["forward"]
        self._paths = [(name.split("."), kind, name in inlined) for name, kind in expected.items()]
        self._through = [(name.split(".") if name else [], own) for name, own in self.children.items()]

    def __reduce__(self) -> tuple[Any, ...]:
        modules = {name: value.__name__ for name, value in self.names.items() if isinstance(value, ModuleType)}
        others = {name: value for name, value in self.names.items() if name not in modules}
        return _remade, (self.source, others, modules, self.call, self.expected, self.inlined, self.children)

    def __deepcopy__(self, memo: dict[int, Any]) -> Rewrite:
        return self  # nothing in it changes

    def fits(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        for path, children in self._through:
            if (owner := _descendant(module, path)) is None or tuple(owner._modules) != children:
                return False
        for path, kind, is_inlined in self._paths:
            child = _descendant(module, path)
            if child is None or own_class(child) is not kind or not is_untold(child):
                return False
            if is_inlined and (vars(child).get(REWRITES) is None or child.training is not module.training):
                return False
        return self.call.fits(args, kwargs)


class Rewritten:
    """Before a module's own class: what it is called with goes to the rewrite that fits, or else to its own forward.

    Whatever the module is told afterwards, other weights and modes apart, ends its rewrites.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        rewrite = (vars(self).get(REWRITES) or {}).get(self.training)  # type: ignore[attr-defined]
        if rewrite is None or not rewrite.fits(self, args, kwargs):
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        return rewrite.forward(self, *rewrite.call.tensors(args, kwargs))

    def __setattr__(self, name: str, value: Any) -> None:
        before = getattr(self, name, None)
        super().__setattr__(name, value)
        is_alike = any(isinstance(before, kind) and isinstance(value, kind) for kind in (Tensor, nn.Module))
        if name not in UNHEARD and not is_alike:
            vars(self)[REWRITES] = None

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        vars(self)[REWRITES] = None

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        make, arguments, *rest = reduced
        if make is copyreg.__newobj__ and _is_plain(self):  # type: ignore[attr-defined]
            return _new, (own_class(self), *arguments[1:]), *rest
        return reduced


def _descendant(module: nn.Module, path: Sequence[str]) -> nn.Module | None:
    found: nn.Module | None = module
    for name in path:
        found = None if found is None else found._modules.get(name)
    return found


def rewrite(module: nn.Module, rewrites: Mapping[bool, Rewrite]) -> None:
    """Gives the module these, by mode, in place, in addition to those that it has."""
    own = vars(module)
    own[REWRITES] = {**(own.get(REWRITES) or {}), **rewrites}
    if not isinstance(module, Rewritten):
        module.__class__ = _rewritten(type(module))


def restore(module: nn.Module) -> None:
    """Its own class and forward again; nothing for a module that has them."""
    if _is_plain(module):
        del vars(module)[REWRITES]
        module.__class__ = own_class(module)
    elif isinstance(module, Rewritten):  # whose class somebody has changed since, as parametrizations do
        vars(module)[REWRITES] = None


def own_class(module: Any) -> type[nn.Module]:
    """The class that somebody gave it."""
    kinds = type(module).__mro__
    return kinds[kinds.index(Rewritten) + 1] if isinstance(module, Rewritten) else kinds[0]


def _is_plain(module: Any) -> bool:
    return isinstance(module, Rewritten) and type(module) is _rewritten(own_class(module))


def _rewritten(kind: type) -> Any:
    """`kind` with `Rewritten` before it, by the same name: `repr` and messages stay."""
    if kind not in _CLASSES:
        names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
        _CLASSES[kind] = type(kind.__name__, (Rewritten, kind), names)
    return _CLASSES[kind]


def _remade(source: str, names: dict[str, Any], modules: dict[str, str], *others: Any) -> Rewrite:
    imported = {name: importlib.import_module(module) for name, module in modules.items()}
    return Rewrite(source, names | imported, *others)


def _new(kind: type[nn.Module], *arguments: Any) -> nn.Module:
    made = _rewritten(kind)
    return made.__new__(made, *arguments)
