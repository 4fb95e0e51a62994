"""`accelerate`: modules of somebody else's compute with our ops, in place, once that was seen to give the same."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from fastdmd.networks.accelerate import fusions, layers
from fastdmd.networks.accelerate.recording import Record, record
from fastdmd.networks.accelerate.rewritten import REWRITES, Rewrite, Rewritten, own_class, restore, rewrite
from fastdmd.networks.accelerate.tracing import Call, trace
from fastdmd.networks.accelerate.trial import Trial
from fastdmd.networks.accelerate.watched import Untraceable

OWN = {layers.Conv3x3: nn.Conv2d, layers.GroupNorm: nn.GroupNorm}
MAX_REASONS = 2  # of those in the line


@dataclasses.dataclass(frozen=True)
class Acceleration:
    """What `accelerate` did; as text, one line."""

    norms: tuple[int, int]  # GroupNorms that it changed, of how many
    convolutions: tuple[int, int]  # of 3x3, padded
    fused: Mapping[str, int]  # what became one pass, by kind
    is_channels_last: bool
    reasons: Mapping[str, str]  # why others stayed as they were, by their names

    def __str__(self) -> str:
        kinds = {"GroupNorms": self.norms, "3x3 convolutions": self.convolutions}
        details = [f"{kind} {changed} of {total}" for kind, (changed, total) in kinds.items() if total]
        details += [f"{kind} {count}" for kind, count in self.fused.items()]
        if self.is_channels_last:
            details.append("channels_last")
        changed, total = (sum(numbers) for numbers in zip(*kinds.values(), strict=True))
        text = f"accelerated {changed} of {total} modules" + (f" ({', '.join(details)})" if details else "")
        told = [f"{name}: {reason}" for name, reason in list(self.reasons.items())[:MAX_REASONS]]
        if (more := len(self.reasons) - len(told)) > 0:
            told.append(f"{more} more reasons")
        return "; ".join([text, *told])


@dataclasses.dataclass(frozen=True)
class _Change:
    name: str
    apply: Callable[[], Any]
    undo: Callable[[], Any]
    fused: Counter[str] = dataclasses.field(default_factory=Counter)


def accelerate(module: nn.Module, *example_inputs: Any) -> Acceleration:
    """Lets a module compute with our ops what they compute faster, in place; `str` of the result says what, in a line.

    By what modules are: GroupNorm and padded 3x3 convolutions, exactly PyTorch's own. By what forwards do, each traced
    by torch.fx if it can be: GroupNorm, perhaps `* (1 + scale) + shift`, and SiLU in one pass; attention, as products
    or PyTorch's; functional convolutions and GroupNorms. Weights become channels_last, and copies for convolutions
    alone keep their layout.

    The module runs on the inputs before and after, in eval mode, four times with gradients; what changes outputs or
    gradients of inputs and parameters beyond rounding, in the dtype that it has, is left as it was. Names and values of
    its state stay (`safetensors.torch.save_file` refuses weights that are channels_last, `save_model` takes them).
    Copies and pickles compute in the same way, and `unaccelerate` undoes it, of a copy, too. Hooks on what is part of a
    pass, and attributes set later on a module whose forward was traced, bring its own forward back; what that reads
    elsewhere, globals or the fields of a settings object, is read once. Meanwhile no other thread may call modules:
    torch.fx patches all of them as it traces.

    Args:
        module: anybody's; where a forward is called in several ways, or has control flow of values, it stays.
        example_inputs: what it is called with, images of the size in use, two or more.

    Raises ValueError without example inputs, for weights without values, and for a module that gives other numbers each
    time; what the module itself raises on the inputs passes.
    """
    if not example_inputs:
        raise ValueError(f"fastdmd.accelerate: expected example inputs of the {type(module).__name__}, got none")
    if any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
        raise ValueError("fastdmd.accelerate: expected weights with values, got some on the meta device")
    unaccelerate(module)
    found = record(module, example_inputs)
    trial = Trial(module, example_inputs)
    if trial.unsteady is not None:
        raise ValueError(f"fastdmd.accelerate: expected the same a second time, got other numbers: {trial.unsteady}")
    reasons: dict[str, str] = {}
    layout = _layout(module)
    try:
        kept = _kept([*_swaps(module, reasons), *_rewrites(module, found, reasons), layout], trial, reasons)
    except BaseException:  # an interruption, or a class of somebody's that has no subclasses
        unaccelerate(module)
        raise
    fused = sum((change.fused for change in kept), Counter[str]())
    for kind in fusions.UNTOLD:
        del fused[kind]
    candidates = [part for part in module.modules() if _is_candidate(part)]
    return Acceleration(
        norms=_count(candidates, nn.GroupNorm),
        convolutions=_count(candidates, nn.Conv2d),
        fused=fused,
        is_channels_last=layout in kept,
        reasons=reasons,
    )


def unaccelerate(module: nn.Module) -> None:
    """Gives a module back its own classes and forwards, in place; weights of one that had others become contiguous."""
    changed = [part for part in module.modules() if _is_changed(part)]
    for part in changed:
        restore(part)
        part.__class__ = OWN.get(type(part), type(part))
    if changed:
        for tensor in _images(module):
            tensor.data = tensor.data.contiguous()


def _swaps(module: nn.Module, reasons: dict[str, str]) -> Iterator[_Change]:
    """Of the layers that are exactly PyTorch's own."""
    ours = {own: kind for kind, own in OWN.items()}
    for name, part in module.named_modules():
        if not _is_candidate(part):
            continue
        if type(part) not in ours:
            reasons[name] = f"it is a {type(part).__name__}"
        elif "forward" in vars(part):
            reasons[name] = "it has a forward of its own"
        else:
            kind = type(part)
            yield _Change(name, functools.partial(_become, part, ours[kind]), functools.partial(_become, part, kind))


def _become(module: nn.Module, kind: type[nn.Module]) -> None:
    module.__class__ = kind


def _rewrites(module: nn.Module, found: Record, reasons: dict[str, str]) -> Iterator[_Change]:
    fused: set[str] = set()
    untraced: dict[str, str] = {}
    for name, part in module.named_modules():
        if name not in found.calls:
            continue
        made, counts, reason = _traced(part, found.calls[name])
        if reason:
            untraced[name] = reason
        if made:
            reasons.pop(name, None)
            fused |= {f"{name}.{child}".lstrip(".") for child in made[False].expected}
            yield _rewriting(name, part, made, counts)
    for norm in sorted(found.activated - fused):
        owners = [name for name in untraced if not name or norm.startswith(f"{name}.")]
        why = "its output has other uses" if not owners else untraced[max(owners, key=len)]
        reasons.setdefault(norm, f"SiLU apart, for {why}")


def _rewriting(name: str, part: nn.Module, made: dict[bool, Rewrite], counts: Counter[str]) -> _Change:
    """Of a module, and of what it inlines, which would not be asked any more."""
    inlined = [part.get_submodule(child) for child in frozenset().union(*(own.inlined for own in made.values()))]

    def apply() -> None:
        rewrite(part, made)
        for child in inlined:
            rewrite(child, {})

    def undo() -> None:
        restore(part)
        for child in inlined:
            if not vars(child).get(REWRITES):
                restore(child)

    return _Change(name, apply, undo, counts)


def _traced(part: nn.Module, call: Call | Untraceable) -> tuple[dict[bool, Rewrite], Counter[str], str]:
    """Its rewrites by mode, what they fuse, and why there is none where it cannot be traced."""
    made: dict[bool, Rewrite] = {}
    fused: Counter[str] = Counter()
    if isinstance(call, Untraceable):
        return made, fused, str(call)
    for training in (False, True):
        try:
            graph, inlined = trace(part, call, training=training)
        except Untraceable as error:
            return made, fused, str(error)
        children = _gone_through(graph, part)
        counts, expected = fusions.fuse(graph, part)
        if not counts:
            break
        fused = fused or counts
        expected |= {name: own_class(part.get_submodule(name)) for name in inlined}
        code = graph.python_code("self")
        made[training] = Rewrite(code.src, code.globals, call, expected, inlined, children)
    return made, fused, ""


def _gone_through(graph: fx.Graph, part: nn.Module) -> dict[str, tuple[str, ...]]:
    """By name, the children of a module and of all its descendants that a graph of it does not call: a list that has
    another entry since is another forward."""
    called = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    found: dict[str, tuple[str, ...]] = {}

    def look(module: nn.Module, name: str) -> None:
        found[name] = tuple(module._modules)
        for own, child in module._modules.items():
            if child is not None and (path := f"{name}.{own}".lstrip(".")) not in called:
                look(child, path)

    look(part, "")
    return found


def _layout(module: nn.Module) -> _Change:
    before = [(tensor, tensor.data) for tensor in _images(module)]

    def apply() -> None:
        for tensor, data in before:
            tensor.data = data.contiguous(memory_format=torch.channels_last)

    def undo() -> None:
        for tensor, data in before:
            tensor.data = data

    return _Change("channels_last", apply, undo)


def _images(module: nn.Module) -> list[Tensor]:
    """Its parameters `[_, C, H, W]`, such as weights of convolutions."""
    return [parameter for parameter in module.parameters() if parameter.dim() == 4]


def _kept(changes: list[_Change], trial: Trial, reasons: dict[str, str]) -> list[_Change]:
    """Those with which the module still gives the same, made; the others undone, with reasons."""
    for change in changes:
        change.apply()
    if not changes or (fault := trial.fault()) is None:
        return changes
    for change in reversed(changes):
        change.undo()
    if len(changes) == 1:
        reasons[changes[0].name or "itself"] = fault
        return []
    half = len(changes) // 2
    return [*_kept(changes[:half], trial, reasons), *_kept(changes[half:], trial, reasons)]


def _count(candidates: list[nn.Module], kind: type[nn.Module]) -> tuple[int, int]:
    of_kind = [part for part in candidates if isinstance(part, kind)]
    return sum(map(_is_changed, of_kind)), len(of_kind)


def _is_candidate(module: nn.Module) -> bool:
    return isinstance(module, nn.GroupNorm) or isinstance(module, nn.Conv2d) and layers.is_plain_3x3(module)


def _is_changed(module: nn.Module) -> bool:
    return isinstance(module, Rewritten) or type(module) in OWN
