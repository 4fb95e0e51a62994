"""Which code computes an op: PyTorch reference, Triton or native library; and how torch learns of it."""

from __future__ import annotations

import contextlib
import contextvars
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from fastdmd import _native
from fastdmd.ops._devices import on_device_of_tensors
from fastdmd.ops._observers import is_unobserved

ORDER = {"cpu": ("native", "reference"), "cuda": ("triton", "native", "reference")}
BACKENDS = ("reference", "triton", "native", "emulated")

# Ops whose native kernels come first on a GPU as well, because they were measured to be faster than Triton's.
NATIVE_FIRST = frozenset({"group_norm_silu", "group_norm_silu_backward"})

Only = Literal["native code for CPUs", "a Triton kernel"]

_LIBRARY = torch.library.Library("fastdmd", "DEF")
_OPS: dict[str, tuple[str, Callable]] = {}  # name: (module, reference)
_ONLY: dict[str, Only] = {}  # ops that all others leave to torch
_CHOSEN: dict[tuple[str, str], Callable] = {}  # (name, device type): implementation, filled at the first call
# The same of the `use_backend` blocks around the code that runs, the innermost last.
_BLOCKS: contextvars.ContextVar[tuple[Mapping, ...]] = contextvars.ContextVar("fastdmd_backends", default=())


def define(
    schema: str,
    *,
    module: str,
    reference: Callable,
    fake: Callable,
    backward: Callable | None = None,
    setup_context: Callable | None = None,
    only: Only | None = None,
) -> Any:
    """Registers an op with `torch.library` and returns what calls it.

    `reference` is its default implementation, on every device. CPU and CUDA choose at the first call; `kernels/MODULE`
    has the Triton function and `csrc/*/MODULE` the native one, all of the op's own name and with the same arguments.
    `only` one of them may be all there is. Without `backward`, asking for a derivative is an error.
    """
    name = schema.split("(")[0]
    _OPS[name] = (module, reference)
    if only is not None:
        _ONLY[name] = only
    op = compose(schema, function=reference, fake=fake)
    arguments = op._schema.arguments
    written = [i for i, argument in enumerate(arguments) if argument.alias_info and argument.alias_info.is_write]
    for device_type in ORDER:
        _LIBRARY.impl(name, _chooser(name, device_type, written), device_type.upper())
    if written:  # torch does not differentiate these
        return op
    remember, recall = _in_blocks(name, backward, setup_context)
    torch.library.register_autograd(f"fastdmd::{name}", recall, setup_context=remember, lib=_LIBRARY)
    return _caller(name, op, remember, recall)


def compose(schema: str, *, function: Callable, fake: Callable) -> Any:
    """Registers an op that has one implementation alone, made of others, and no derivative."""
    name = schema.split("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastdmd::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.fastdmd, name).default


def _in_blocks(name: str, backward: Callable | None, setup_context: Callable | None) -> tuple[Callable, Callable]:
    """The backward of an op, `backward(ctx, saved_tensors, *grads)`, runs in the `use_backend` blocks of its forward:
    what remembers them there, `(ctx, inputs, output)`, and what recalls them, `(ctx, *grads)`.

    It may be called after the block, and on a GPU it runs in a thread of its own.
    """

    def remember(ctx, inputs, output) -> None:
        ctx.blocks = _BLOCKS.get()
        if setup_context is not None:
            setup_context(ctx, inputs, output)

    def recall(ctx, *grads):
        if backward is None:
            raise no_second_derivative(name)
        before = _BLOCKS.set(ctx.blocks)
        try:
            saved = ctx.saved_tensors  # their hooks are code of others, and may record graphs: a checkpoint's recompute
            return backward(ctx, saved, *grads)
        finally:
            _BLOCKS.reset(before)

    return remember, recall


def _caller(name: str, op: Any, remember: Callable, recall: Callable) -> Callable:
    """Calls an op, the first of whose arguments is a tensor: where nobody but eager autograd looks on, past torch's
    dispatcher. Its layers in Python take 15 to 25 us of a forward and backward call, as long as a small op.
    """

    def forward(ctx, *arguments):
        result = chosen(name, arguments[0].device.type)(*arguments)
        remember(ctx, arguments, result)
        return result

    members = {"forward": staticmethod(forward), "backward": staticmethod(recall)}
    # by the name that torch gives its own
    function: Any = type(f"GeneratedBackwardFor_fastdmd_{name}_default", (torch.autograd.Function,), members)

    def call(*arguments):
        if not is_unobserved(arguments):
            return op(*arguments)
        if torch.is_grad_enabled() and any(isinstance(one, Tensor) and one.requires_grad for one in arguments):
            return function.apply(*arguments)
        return chosen(name, arguments[0].device.type)(*arguments)

    return call


def no_second_derivative(name: str) -> NotImplementedError:
    return NotImplementedError(
        f"fastdmd.{name}: expected a first derivative to be asked for, got a second one: it has no second derivative"
    )


def _chooser(name: str, device_type: str, written: list[int]) -> Callable:
    """Calls the implementation chosen; what it writes in place counts as changed, so that a stale graph raises."""

    def call(*arguments):
        result = chosen(name, device_type)(*arguments)
        for index in written:
            if arguments[index] is not None and not arguments[index].is_inference():
                torch.autograd.graph.increment_version(arguments[index])
        return result

    return call


def backends() -> tuple[Mapping, ...]:
    """What the `use_backend` blocks around ask for."""
    return _BLOCKS.get()


@contextlib.contextmanager
def inside(blocks: tuple[Mapping, ...]) -> Iterator[None]:
    """What `backends()` gave somewhere else holds inside."""
    before = _BLOCKS.set(blocks)
    try:
        yield
    finally:
        _BLOCKS.reset(before)


def chosen(name: str, device_type: str) -> Callable:
    """What computes an op there, now and here: see `use_backend`. Called as those of `implementations`."""
    for block in reversed(_BLOCKS.get()):
        if (name, device_type) in block:
            return block[name, device_type]
    chosen = _CHOSEN.get((name, device_type))
    if chosen is None:
        chosen = _CHOSEN[name, device_type] = _choose(name, device_type, _forced())
    return chosen


def _choose(name: str, device_type: str, forced: str | None) -> Callable:
    if forced is None:
        return next(iter(implementations(name, device_type).values()))
    if forced not in BACKENDS:
        raise ValueError(f"fastdmd.ops: expected a backend out of {', '.join(BACKENDS)}, got {forced}")
    if _is_missing(name, forced, device_type):
        forced = "reference"
    return _implementation(name, forced, device_type)


def _forced() -> str | None:
    """By the environment; an empty variable is one that is not set."""
    return os.environ.get("FASTDMD_BACKEND") or None


def require_environment(device: torch.device | str = "cpu") -> None:
    """Raises ValueError if FASTDMD_BACKEND or FASTDMD_NATIVE ask for what there is not, on this kind of device."""
    try:
        for name in _OPS:
            _choose(name, torch.device(device).type, _forced())
    except _native.Unavailable as error:
        raise ValueError(f"fastdmd.ops: expected FASTDMD_BACKEND={_forced()} to be there, got none: {error}") from error


@contextlib.contextmanager
def use_backend(backend: str, device: torch.device | str | None = None) -> Iterator[None]:
    """Inside the block every op is computed by `backend`: reference, triton, native or emulated.

    It holds on this kind of device, by default on each kind of this machine's that has the backend.

    Blocks may nest and overlap; each holds for the thread or asyncio task that it is in. The backward of an op is
    computed by what computed its forward, wherever that runs. A compiled function follows the blocks around its calls,
    and its backward those around `backward()`; on a GPU, where that runs in threads of its own, none. Emulated are the
    CUDA kernels compiled for CPUs, which the tests build.

    Raises ValueError for another name and RuntimeError, with the reason, where no such device has it. The environment
    variable FASTDMD_BACKEND does the same for a whole process.
    """
    here = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    block: dict[tuple[str, str], Callable] = {}
    missing: _native.Unavailable | None = None
    for device_type in here if device is None else [torch.device(device).type]:
        try:
            block |= {(name, device_type): _choose(name, device_type, backend) for name in _OPS}
        except _native.Unavailable as error:
            missing = error
    if missing is not None and not block:
        raise missing
    _BLOCKS.set((*_BLOCKS.get(), block))
    try:
        yield
    finally:
        _BLOCKS.set(tuple(other for other in _BLOCKS.get() if other is not block))


def implementations(name: str, device: torch.device | str = "cpu") -> dict[str, Callable]:
    """The implementations of an op that this machine has, the preferred one first.

    They are called with the op's arguments, all positional, and without validation: see the schema,
    `torch.ops.fastdmd.<name>.default`. Raises ValueError for a name that no op has.
    """
    found = {}
    for backend in _preferred(name, _order(device)):
        try:
            found[backend] = _implementation(name, backend, torch.device(device).type)
        except _native.Unavailable:
            pass
    return found


def unavailable(name: str, device: torch.device | str = "cpu") -> dict[str, str]:
    """Why the other implementations of an op are not there, by their names; raises as `implementations`."""
    reasons = {}
    for backend in BACKENDS:
        try:
            _implementation(name, backend, torch.device(device).type)
        except _native.Unavailable as error:
            reasons[backend] = str(error)
    return reasons


def names() -> list[str]:
    """Of every op that has more than one implementation."""
    return list(_OPS)


def _preferred(name: str, order: tuple[str, ...]) -> tuple[str, ...]:
    return ("native", *(b for b in order if b != "native")) if name in NATIVE_FIRST else order


def _order(device: torch.device | str) -> tuple[str, ...]:
    """Under its interpreter Triton comes last, before emulated kernels: they are there to be tested."""
    order = ORDER.get(torch.device(device).type, ("reference",))
    return order if "triton" in order else (*order, "triton", "emulated")


def _is_missing(name: str, backend: str, device_type: str) -> bool:
    if _ONLY.get(name) == "a Triton kernel":
        return backend != "triton"
    return name in _ONLY and (backend, device_type) != ("native", "cpu")


def _implementation(name: str, backend: str, device_type: str) -> Callable:
    if name not in _OPS:
        raise ValueError(f"fastdmd.ops: expected an op out of {', '.join(_OPS)}, got {name}")
    module, reference = _OPS[name]
    if backend == "reference":
        return reference
    if _is_missing(name, backend, device_type):
        raise _native.Unavailable(f"{name} has {_ONLY[name]} alone")
    if backend == "native":
        if (reason := _native.load(device_type)) is not None:
            raise _native.Unavailable(reason)
        return getattr(torch.ops.fastdmd_native, name).default
    if backend == "emulated":
        if device_type != "cpu":
            raise _native.Unavailable("emulated kernels run on CPUs alone")
        if (reason := _native.load_emulated()) is not None:
            raise _native.Unavailable(reason)
        return getattr(torch.ops.fastdmd_emulated, name).default
    if device_type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise _native.Unavailable(f"Triton has no {device_type} backend; TRITON_INTERPRET=1 interprets its kernels")
    if importlib.util.find_spec("triton") is None:
        raise _native.Unavailable("Triton is not installed")
    function = getattr(importlib.import_module(f"fastdmd.kernels.{module}"), name)
    return on_device_of_tensors(function) if device_type == "cuda" else function
