"""Questions to a node of a graph, and the end of those that nobody needs any more."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

MUL, ADD, DIV = (operator.mul, torch.mul, torch.multiply), (operator.add, torch.add), (operator.truediv, torch.div)
IN_PLACE = (operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ipow)
ARITHMETIC = (operator.mul, operator.truediv, operator.floordiv, operator.pow, operator.add, operator.sub, math.sqrt)


def is_call(node: fx.Node, functions: tuple[Any, ...], *methods: str) -> bool:
    """Of one of these functions, or of a tensor's method of these names."""
    if node.op == "call_method":
        return node.target in methods
    return node.op == "call_function" and node.target in functions


def has_two(node: fx.Node) -> bool:
    """Two arguments and no more, such as add's alpha or an `out`."""
    return len(node.args) == 2 and not node.kwargs


def module_of(node: fx.Node, root: nn.Module) -> nn.Module | None:
    return root.get_submodule(str(node.target)) if node.op == "call_module" else None


def only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def is_number(value: Any) -> bool:
    """Whether it is one, or a node that computes one of the sizes of tensors."""
    if not isinstance(value, fx.Node):
        return isinstance(value, int | float)
    if value.op == "call_method":
        return value.target == "size" and len(value.args) == 2
    if value.op != "call_function":
        return False
    if value.target is operator.getitem:
        sizes, index = value.args
        is_shape = isinstance(sizes, fx.Node) and (
            is_call(sizes, (), "size") or is_call(sizes, (getattr,)) and sizes.args[1] == "shape"
        )
        return is_shape and isinstance(index, int)
    return value.target in ARITHMETIC and all(map(is_number, value.args))


def may_change(tensors: Sequence[fx.Node], first: fx.Node, last: fx.Node, root: nn.Module) -> bool:
    """Whether something between two nodes may write into one of these tensors, or into what shares its memory."""
    while (first := first.next) is not last:
        if first.op == "call_method" and str(first.target).endswith("_") and not str(first.target).endswith("__"):
            return True
        if first.op == "call_function":
            name = getattr(first.target, "__name__", "")
            if first.target in IN_PLACE or name.endswith("_") or "out" in first.kwargs or first.kwargs.get("inplace"):
                return True
        if first.op == "call_module" and set(first.all_input_nodes) & set(tensors):
            return True
    return False


def erase(node: fx.Node, until: fx.Node) -> None:
    """Takes out a node without users, and what led to it from `until` on if nobody else uses it."""
    inputs = node.all_input_nodes
    node.graph.erase_node(node)
    if node is until:
        return
    for before in inputs:
        if not before.users and _leads(until, before):
            erase(before, until)


def _leads(first: fx.Node, node: fx.Node) -> bool:
    return node is first or any(_leads(first, before) for before in node.all_input_nodes)
