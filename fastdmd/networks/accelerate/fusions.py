"""What our ops do in one pass, found in the graph of a forward, and put into it."""

from __future__ import annotations

import operator
from collections import Counter
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from fastdmd.networks.accelerate import attention, layers
from fastdmd.networks.accelerate.graphs import ADD, MUL, erase, has_two, is_call, may_change, module_of, only_user
from fastdmd.networks.accelerate.tracing import is_untold

SILU, SIGMOID = (F.silu,), (torch.sigmoid, torch.special.expit)
OURS = {F.conv2d: layers.conv2d, F.group_norm: layers.group_norm}
FUNCTIONS = "functions"  # of these two, whether or not they become part of something
COPIES = "copies"  # in another layout
UNTOLD = (FUNCTIONS, COPIES)
ROUNDING = (nn.Conv2d, nn.Linear, nn.ConvTranspose2d)  # what autocast runs in less precision, whatever comes in


def fuse(graph: fx.Graph, root: nn.Module) -> tuple[Counter[str], dict[str, type[nn.Module]]]:
    """Puts our operations into a graph of `root`, in place, where they compute the same.

    Returns how many of what there are now, and the children, by their names, whose class and lack of hooks that relies
    on. What is computed on the way from one end of a fusion to the other is used for nothing else.
    """
    counts: Counter[str] = Counter()
    expected: dict[str, type[nn.Module]] = {}
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in OURS:
            node.target = OURS[node.target]
            counts[FUNCTIONS] += 1
            _take_casts(node)
    for node in list(graph.nodes):
        if (found := _lay_out(node, root)) is not None:
            counts[COPIES] += 1
            expected |= found
    for norm in list(graph.nodes):
        if _is_norm(norm, root) and (found := _fuse_norm(norm, graph, root)) is not None:
            counts["norms with SiLU"] += 1
            expected |= found
    counts["attentions"] = sum(attention.fuse(node, graph, root) or attention.take(node) for node in list(graph.nodes))
    graph.lint()
    return +counts, expected


def _is_norm(node: fx.Node, root: nn.Module) -> bool:
    if node.op == "call_function":
        return node.target is layers.group_norm
    module = module_of(node, root)
    if module is None or type(module) not in (nn.GroupNorm, layers.GroupNorm):
        return False
    return len(node.args) == 1 and not node.kwargs and is_untold(module)


def _lay_out(node: fx.Node, root: nn.Module) -> dict[str, type[nn.Module]] | None:
    """Lets `x.contiguous()` that only convolutions read, and read at once, be channels_last as their weights are.

    For them layouts are alike, and what they give has the one that it had when this was tried, whichever x has.
    Returns the children that this relies on; None where it stays.
    """
    if not is_call(node, (), "contiguous") or len(node.args) != 1 or node.kwargs:
        return None
    if not node.users or not all(_convolves(user, node, root) for user in node.users):
        return None
    last, after = max(node.users), node.next
    while after is not last:  # what is no copy would be changed with x
        if after not in node.users and after.op != "get_attr":
            return None
        after = after.next
    node.op, node.target = "call_function", layers.channels_last
    return {str(user.target): nn.Conv2d for user in node.users if user.op == "call_module"}


def _convolves(node: fx.Node, x: fx.Node, root: nn.Module) -> bool:
    """Whether this is a convolution of PyTorch's, or a functional one, and `x` its input alone."""
    if node.args[:1] != (x,) or x in node.args[1:] or x in node.kwargs.values():
        return False
    module = module_of(node, root)
    if module is None:
        return node.op == "call_function" and node.target is layers.conv2d
    return type(module) is nn.Conv2d and is_untold(module)


def _take_casts(norm: fx.Node) -> None:
    """`group_norm(x.float()).type(x.dtype)`, as ADM has it, becomes one of x: ours computes in float32 in any case."""
    wide, cast = (norm.args or (None,))[0], only_user(norm)
    if norm.target is not layers.group_norm or not isinstance(wide, fx.Node) or cast is None:
        return
    if not is_call(wide, (), "float") or len(wide.users) != 1 or not is_call(cast, (), "type", "to"):
        return
    x, dtype = wide.args[0], cast.args[-1]
    is_back = has_two(cast) and isinstance(dtype, fx.Node) and is_call(dtype, (getattr,)) and dtype.args == (x, "dtype")
    if is_back:
        norm.args = (x, *norm.args[1:])
        norm.kwargs = {**norm.kwargs, "rounded": True}
        cast.replace_all_uses_with(norm)
        for node in (cast, *cast.all_input_nodes[1:], wide):
            if not node.users:
                norm.graph.erase_node(node)


def _fuse_norm(norm: fx.Node, graph: fx.Graph, root: nn.Module) -> dict[str, type[nn.Module]] | None:
    """One pass of a norm, `* (1 + scale) + shift` if that follows, and SiLU; None where no SiLU does."""
    tables = _scaled_and_shifted(norm)
    last, gain, shift = tables or (norm, None, None)
    found = _activated(last, root)
    if found is None:
        return None
    activated, skipped = found
    if gain is not None:
        is_stale = gain < norm and may_change(gain.all_input_nodes, gain, norm, root)
        if is_stale or may_change(norm.all_input_nodes, norm, activated, root):
            return None
    options: dict[str, Any] = {"silu": True}
    with graph.inserting_before(norm.next if gain is None else activated):
        if gain is not None:
            options |= {"scale": _less_one(gain, graph), "shift": shift}
        if _is_rounded(activated, root):
            options["rounded"] = True
        fused = graph.create_node(norm.op, norm.target, norm.args, {**norm.kwargs, **options})
    activated.replace_all_uses_with(fused)
    erase(activated, until=norm)
    if gain is not None and not gain.users:
        graph.erase_node(gain)
    expected: dict[str, type[nn.Module]] = {name: type(root.get_submodule(name)) for name in skipped}
    return expected if norm.op == "call_function" else expected | {str(norm.target): layers.GroupNorm}


def _scaled_and_shifted(norm: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """The node of `norm * gain + shift`, its gain and its shift."""
    user = only_user(norm)
    if user is None:
        return None
    if is_call(user, (torch.addcmul,), "addcmul") and len(user.args) == 3 and not user.kwargs:
        shift, *factors = user.args
        gain = _other(factors, norm)
        return (user, gain, shift) if gain is not None and isinstance(shift, fx.Node) and shift is not norm else None
    if not is_call(user, MUL, "mul") or not has_two(user):
        return None
    gain, total = _other(user.args, norm), only_user(user)
    if total is None or not is_call(total, ADD, "add") or not has_two(total):
        return None
    shift = _other(total.args, user)
    return None if gain is None or shift is None else (total, gain, shift)


def _activated(node: fx.Node, root: nn.Module) -> tuple[fx.Node, list[str]] | None:
    """The node of `silu(node)`, however it is written, and the modules that it is written with."""
    user = only_user(node)
    if user is not None:
        module = module_of(user, root)
        if type(module) is nn.SiLU and is_untold(module):
            return user, [str(user.target)]
        return (user, []) if is_call(user, SILU, "silu") and user.args[:1] == (node,) else None
    if len(node.users) != 2:
        return None
    for sigmoid, product in (tuple(node.users), tuple(node.users)[::-1]):
        module, skipped = module_of(sigmoid, root), []
        if type(module) is nn.Sigmoid and is_untold(module):
            skipped = [str(sigmoid.target)]
        elif not is_call(sigmoid, SIGMOID, "sigmoid"):
            continue
        if only_user(sigmoid) is product and is_call(product, MUL, "mul") and has_two(product):
            return (product, skipped) if set(product.args) == {node, sigmoid} else None
    return None


def _less_one(gain: fx.Node, graph: fx.Graph) -> fx.Node:
    """What one was added to, or the gain less one."""
    if is_call(gain, ADD, "add") and has_two(gain) and 1 in gain.args:
        scale = gain.args[1] if gain.args[0] == 1 else gain.args[0]
        if isinstance(scale, fx.Node):
            return scale
    return graph.call_function(operator.sub, (gain, 1))


def _is_rounded(node: fx.Node, root: nn.Module) -> bool:
    """Whether all that it goes to, perhaps through a dropout, rounds it under autocast anyway."""

    def rounds(user: fx.Node) -> bool:
        module = module_of(user, root)
        if type(module) is nn.Dropout:
            return _is_rounded(user, root)
        return isinstance(module, ROUNDING) or user.op == "call_function" and user.target in (F.conv2d, F.linear)

    return len(node.users) > 0 and all(rounds(user) for user in node.users)


def _other(pair: Any, one: fx.Node) -> fx.Node | None:
    """Of two factors or summands the other one, if it is a node."""
    first, second = pair
    other = second if first is one else first
    return other if isinstance(other, fx.Node) and other is not one else None
