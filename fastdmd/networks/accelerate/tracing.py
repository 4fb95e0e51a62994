"""A module's forward as a graph of what follows what, its children left whole: or the reason why it cannot be one."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import operator
import random
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from fastdmd.networks.accelerate.watched import Untraceable, watched

CONSTANTS = (type(None), bool, int, float, str)
# Of tensors that are made anew each time, or depend on the device of one that is given.
FACTORIES = ("arange", "linspace", "zeros", "ones", "full", "empty", "tensor", "eye", "rand", "randn", "randint")


@dataclasses.dataclass(frozen=True)
class Axes:
    """What stands for a tensor of so many."""

    num: int


@dataclasses.dataclass(frozen=True)
class Call:
    """How a module is called: of each argument the value, `Axes` for a tensor."""

    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """Raises Untraceable for arguments that are neither tensors nor plain values."""
        return cls(tuple(map(_described, args)), tuple((name, _described(value)) for name, value in kwargs.items()))

    def fits(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        if len(args) != len(self.args) or len(kwargs) != len(self.kwargs):
            return False
        if not all(_is_like(value, expected) for value, expected in zip(args, self.args, strict=True)):
            return False
        return all(name in kwargs and _is_like(kwargs[name], expected) for name, expected in self.kwargs)

    def tensors(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """Those of a call that fits, in the order of the placeholders."""
        named = [kwargs[name] for name, expected in self.kwargs if isinstance(expected, Axes)]
        return [value for value, expected in zip(args, self.args, strict=True) if isinstance(expected, Axes)] + named


def trace(module: nn.Module, call: Call, *, training: bool) -> tuple[fx.Graph, frozenset[str]]:
    """The graph of `module.forward` in one of its two modes, for such calls; and the children that are traced through.

    Those are modules without children whose class is not PyTorch's own, such as somebody's norm or activation, and
    Softmax; every other child is one node. What depends on values or shapes, keeps something in the module, draws
    numbers, or computes with tensors of its own making raises Untraceable.
    """
    for inline in (True, False):
        tracer = _Tracer(call, inline=inline)
        try:
            with _as_it_was(module, training), tracer.making_tensors(), watched(), _OnlyProxies():
                graph = tracer.trace(module)
            tracer.require_nothing_kept()
            return graph, frozenset(tracer.inlined)
        except Untraceable as error:
            reason = error
        except Exception as error:  # of anybody's code, given stand-ins for tensors
            reason = Untraceable(f"{type(error).__name__}: {error}".splitlines()[0][:120])
        if not tracer.inlined:
            break
    raise reason


class _Proxy(fx.Proxy):
    """A stand-in for a tensor, with the attributes of tensors alone, that knows how many axes an argument has."""

    num_axes: int | None = None

    @property
    def ndim(self) -> Any:
        return super().__getattr__("ndim") if self.num_axes is None else self.num_axes

    def dim(self) -> Any:
        return super().__getattr__("dim")() if self.num_axes is None else self.num_axes

    def __getattr__(self, name: str) -> Any:
        if not hasattr(Tensor, name):
            raise AttributeError(name)
        if name.endswith("_"):  # such as squeeze_
            self.num_axes = None
        return super().__getattr__(name)


def _in_place(function: Callable[..., Any]) -> Callable[..., fx.Proxy]:
    """`x += y` as what it is, where fx would make a new tensor."""
    return lambda one, other: one.tracer.create_proxy("call_function", function, (one, other), {})


for _function in (operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ipow):
    setattr(_Proxy, f"__{_function.__name__}__", _in_place(_function))


class _Tracer(fx.Tracer):
    trace_asserts = True
    proxy_buffer_attributes = True

    def __init__(self, call: Call, *, inline: bool):
        super().__init__()
        self.call, self.inline = call, inline
        self.inlined: set[str] = set()
        self._made: list[weakref.ref[fx.Proxy]] = []

    def create_args_for_root(self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None) -> Any:
        def argument(name: str, value: Any) -> Any:
            if not isinstance(value, Axes):
                return value
            proxy: Any = self.create_proxy("placeholder", name, (), {})
            proxy.num_axes = value.num
            return proxy

        args = [argument(f"argument_{i}", value) for i, value in enumerate(self.call.args)]
        kwargs = {name: argument(name, value) for name, value in self.call.kwargs}
        return lambda module: root_fn(module, *args, **kwargs), [self.root]

    @contextlib.contextmanager
    def making_tensors(self) -> Iterator[None]:
        """Inside, what makes tensors of torch is a node, too; torch itself refuses stand-ins for devices and dtypes."""
        own = {name: getattr(torch, name) for name in FACTORIES}
        try:
            for name, function in own.items():
                call = functools.partial(self._make, function)
                setattr(torch, name, call)
            yield
        finally:
            for name, function in own.items():
                setattr(torch, name, function)

    def _make(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Proxy:
        return self.create_proxy("call_function", function, args, kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        made = _Proxy(node, self)
        self._made.append(weakref.ref(made))
        return made

    def require_nothing_kept(self) -> None:
        """Raises Untraceable where a stand-in is still somewhere after the trace: in a list, dictionary or object that
        the forward puts what it computes into, which no graph would do. From lists and dictionaries it is removed."""
        for generation in (0, 2):  # what only each other knows, as iterators of stand-ins do: first of what is young
            if not any(made() is not None for made in self._made):
                return
            gc.collect(generation)
        kept = 0
        for made in self._made:
            if (proxy := made()) is not None:
                kept += 1
                _forget(proxy)
        if kept:
            raise Untraceable("it keeps something of what it computes")

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        if not self.inline or not is_inlined(module):
            return True
        self.inlined.add(qualified_name)
        return False

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter) and not any(a is b for b in self.root.buffers()):
            raise Untraceable("it computes with a tensor that is none of its parameters and buffers")
        return super().create_arg(a)


def _forget(proxy: fx.Proxy) -> None:
    for holder in gc.get_referrers(proxy):
        if isinstance(holder, list):
            holder[:] = [one for one in holder if one is not proxy]
        elif isinstance(holder, dict):
            for key in [key for key, one in holder.items() if one is proxy]:
                del holder[key]


def is_inlined(module: nn.Module) -> bool:
    """Whether it is code of somebody's own that holds no other module, or a Softmax, and nobody listens to it."""
    is_own = not type(module).__module__.startswith(("torch.", "fastdmd.")) or type(module) is nn.Softmax
    return is_own and not module._modules and is_untold(module)


def is_untold(module: nn.Module) -> bool:
    """Without hooks, of which a pass that it became a part of would have no use, and without a forward of its own."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return not any(hooks) and "forward" not in vars(module)


class _OnlyProxies(TorchFunctionMode):
    """Refuses what is computed of real tensors, such as random numbers or constants, and changes of modes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if fx.Proxy not in {base for kind in types for base in kind.__mro__}:
            name = getattr(func, "__name__", str(func))
            name = f"the property {func.__self__.__name__}" if name == "__get__" else name
            raise Untraceable(f"it calls {name} without a tensor of its input")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _as_it_was(module: nn.Module, training: bool) -> Iterator[None]:
    """In this mode, inside; raises Untraceable where the module keeps or draws something, which is undone."""
    states = {part: _contents(part) for part in module.modules()}
    numbers = random.getstate(), np.random.get_state(legacy=False)
    try:
        for part in states:
            vars(part)["training"] = training
        yield
    finally:
        for part, (was, _) in states.items():
            vars(part)["training"] = was["training"]
        changed = [part for part, state in states.items() if not _same(_contents(part), state)]
        for part in changed:
            own, (was, contents) = vars(part), states[part]
            own.clear()
            own.update(was)
            for value, held in zip(filter(_holds, was.values()), contents, strict=True):
                if _identities([_inside(value)]) != _identities([held]):
                    _refill(value, held)
        drawn = random.getstate(), np.random.get_state(legacy=False)
        random.setstate(numbers[0])
        np.random.set_state(numbers[1])
    if changed:
        raise Untraceable("it keeps something of what it computes")
    if str(drawn) != str(numbers):  # which hold arrays
        raise Untraceable("it draws random numbers itself")


def _contents(module: nn.Module) -> tuple[dict[str, Any], list[Any]]:
    own = dict(vars(module))
    return own, [_inside(value) for value in own.values() if _holds(value)]


def _inside(value: Any) -> list[Any]:
    return list(value.items()) if isinstance(value, dict) else list(value)


def _holds(value: Any) -> bool:
    return isinstance(value, list | dict | set)


def _refill(value: Any, held: list[Any]) -> None:
    if isinstance(value, list):
        value[:] = held
        return
    value.clear()
    for item in held:
        if isinstance(value, dict):
            value[item[0]] = item[1]
        else:
            value.add(item)


def _same(one: tuple[dict[str, Any], list[Any]], other: tuple[dict[str, Any], list[Any]]) -> bool:
    if one[0].keys() != other[0].keys() or any(value is not other[0][name] for name, value in one[0].items()):
        return False
    return _identities(one[1]) == _identities(other[1])


def _identities(values: list[Any]) -> list[list[Any]]:
    return [[tuple(map(id, item)) if isinstance(item, tuple) else id(item) for item in inside] for inside in values]


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Axes(value.dim())
    if type(value) not in CONSTANTS:
        raise Untraceable(f"it is called with a {type(value).__name__}")
    return value


def _is_like(value: Any, expected: Any) -> bool:
    if isinstance(expected, Axes):
        return isinstance(value, Tensor) and value.dim() == expected.num
    return type(value) is type(expected) and value == expected
