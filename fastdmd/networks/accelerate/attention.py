"""Attention, written out as products or as PyTorch's function, found in a graph."""

from __future__ import annotations

import functools
import operator
import re
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fastdmd.networks.accelerate.graphs import DIV, MUL, erase, has_two, is_call, is_number, may_change
from fastdmd.networks.unet_blocks import MAX_PIXELS, attend

MATMUL, BMM = (operator.matmul, torch.matmul, torch.bmm), ((torch.bmm,), "bmm")
EINSUM = (torch.einsum,)
Order = tuple[int, ...] | None  # of axes, as permute takes it; None: as they are
SWAPPED = (-1, -2)  # the last two
MAX_SCORES = 2**26  # 256 MiB in float32


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float = 1.0) -> Tensor:
    """`softmax(scale q k^T) v` of `[..., N, D]`, `[..., M, D]` and `[..., M, E]`."""
    is_one_batch = q.shape[:-2] == k.shape[:-2] == v.shape[:-2]
    if not is_one_batch or q.dim() not in (3, 4) or not q.dtype == k.dtype == v.dtype:
        return torch.softmax(q * scale @ k.mT, dim=-1) @ v
    if q.dim() == 3:  # the kernels of scaled_dot_product_attention want heads
        return attend(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), scale).squeeze(1)
    return attend(q, k, v, scale)


def scaled_dot_product(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """PyTorch's function of this name, by products, which keep all scores, where these are faster and not too many.

    Scores are of float32 at least, as PyTorch's are, and the result lies in memory as PyTorch's does, heads inside.
    """
    if not _suits(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    dtype = torch.promote_types(q.dtype, torch.float32)
    out = attend(q.to(dtype), k.to(dtype), v.to(dtype), scale)
    return out.to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2)


def _suits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """An exported program holds for any batch, so it may not depend on how many scores there are; autocast would
    round them."""
    if torch.compiler.is_exporting() or any(t.is_nested or not t.is_cpu or t.dim() != 4 for t in (q, k, v)):
        return False
    is_alike = q.shape[:2] == k.shape[:2] == v.shape[:2] and q.dtype == k.dtype == v.dtype
    num_scores = q.shape[:3].numel() * k.shape[2]
    return is_alike and num_scores <= MAX_SCORES and q.shape[2] <= MAX_PIXELS and not torch.is_autocast_enabled("cpu")


def take(node: fx.Node) -> bool:
    """Replaces PyTorch's function without mask, dropout and the like, if this is a call of it; says whether it was."""
    if not is_call(node, (F.scaled_dot_product_attention,)):
        return False
    names = "query", "key", "value", "attn_mask", "dropout_p", "is_causal"
    if len(node.args) > len(names):
        return False
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    q, k, v, scale = (given.pop(name, None) for name in (*names[:3], "scale"))
    if any(isinstance(option, fx.Node) or option for option in given.values()):
        return False
    node.target, node.args, node.kwargs = scaled_dot_product, (q, k, v, scale), {}
    return True


def fuse(softmax: fx.Node, graph: fx.Graph, root: nn.Module) -> bool:
    """Replaces `softmax(scale q k^T) v` around this node, if it is one; says whether it was."""
    source = _softmax_of(softmax)
    if source is None:
        return False
    scores, dim = source
    scales: list[tuple[Any, ...]] = []  # operators and numbers
    while (scaled := _scaled(scores)) is not None and len(scores.users) == 1:
        scores, *factor = scaled
        scales.append(tuple(factor))
    factors, output = _factors(scores), _output(softmax)
    if factors is None or output is None or len(scores.users) != 1:
        return False
    product, value, order = output
    is_last = dim == -1 or dim + 1 == factors.num_axes
    if not is_last or may_change(scores.all_input_nodes, scores, product, root):
        return False
    with graph.inserting_before(product):
        q, k, v = (_permuted(*operand) for operand in (factors.left, factors.right, value))
        scale = functools.reduce(lambda scale, factor: _applied(graph, scale, *factor), scales, 1.0)
        fused = _permuted(graph.call_function(attention, (q, k, v, scale)), order)
    product.replace_all_uses_with(fused)
    erase(product, until=scores)
    return True


def _applied(graph: fx.Graph, scale: Any, function: Any, number: Any) -> Any:
    if isinstance(scale, fx.Node) or isinstance(number, fx.Node):
        is_first = scale == 1.0 and function is operator.mul
        return number if is_first else graph.call_function(function, (scale, number))
    return function(scale, number)


class Factors(NamedTuple):
    """Of scores `left right^T` of so many axes: what is to be permuted how."""

    left: tuple[fx.Node, Order]
    right: tuple[fx.Node, Order]
    num_axes: int | None  # None: not known


def _softmax_of(node: fx.Node) -> tuple[Any, int] | None:
    """The scores and the axis of a softmax that has one user."""
    if len(node.users) != 1:
        return None
    if not is_call(node, (torch.softmax, F.softmax), "softmax"):
        return None
    options = {name: value for name, value in node.kwargs.items() if value is not None and name != "_stacklevel"}
    dim = node.args[1] if len(node.args) == 2 else options.pop("dim", None)
    return (node.args[0], dim) if isinstance(dim, int) and not options and len(node.args) <= 2 else None


def _scaled(node: fx.Node) -> tuple[fx.Node, Any, Any] | None:
    """What a number scales, by which operator, and that number."""
    if not has_two(node):
        return None
    one, other = node.args
    if is_call(node, DIV, "div"):
        return (one, operator.truediv, other) if isinstance(one, fx.Node) and is_number(other) else None
    if not is_call(node, MUL, "mul"):
        return None
    if not is_number(other):
        one, other = other, one
    return (one, operator.mul, other) if isinstance(one, fx.Node) and is_number(other) else None


def _factors(node: fx.Node) -> Factors | None:
    a, b = _operands(node)
    if is_call(node, MATMUL, "matmul", "bmm"):
        return None if a is None else Factors((a, None), (b, SWAPPED), 3 if is_call(node, *BMM) else None)
    if (letters := _letters(node)) is None:
        return None
    one, two, out = letters
    if out[-2] in two:  # the keys come first
        one, two, a, b = two, one, b, a
    summed = "".join(set(one) & set(two) - set(out))
    wanted = out[:-2] + out[-2] + summed, out[:-2] + out[-1] + summed
    if len(summed) != 1 or sorted(one) != sorted(wanted[0]) or sorted(two) != sorted(wanted[1]):
        return None
    return Factors((a, _order(one, wanted[0])), (b, _order(two, wanted[1])), len(out))


def _output(weights: fx.Node) -> tuple[fx.Node, tuple[fx.Node, Order], Order] | None:
    """The product of weights and v, what of v is to be permuted how, and then the result."""
    product = next(iter(weights.users))
    transposed = weights
    if _is_transposed(product) and len(product.users) == 1:
        transposed, product = product, next(iter(product.users))
        if not is_call(product, *BMM):
            return None
    a, b = _operands(product)
    if is_call(product, MATMUL, "matmul", "bmm"):
        if transposed is weights and a is weights and b is not weights:
            return product, (b, None), None
        if transposed is not weights and b is transposed and a is not transposed:
            return product, (a, SWAPPED), SWAPPED
        return None
    if transposed is not weights or (letters := _letters(product)) is None:
        return None
    one, two, out = letters
    if b is weights:
        one, two, a, b = two, one, b, a
    batch, n, m = one[:-2], one[-2], one[-1]
    rest = "".join(set(two) - set(one))
    given, made = batch + m + rest, batch + n + rest
    if a is not weights or len(rest) != 1 or sorted(two) != sorted(given) or sorted(out) != sorted(made):
        return None
    return product, (b, _order(two, given)), _order(made, out)


def _operands(node: fx.Node) -> tuple[Any, Any]:
    nodes = [argument for argument in node.args if isinstance(argument, fx.Node)]
    return (nodes[0], nodes[1]) if len(nodes) == 2 and not node.kwargs else (None, None)


def _letters(node: fx.Node) -> tuple[str, str, str] | None:
    """Of an einsum of two tensors, each letter once in each."""
    if node.op != "call_function" or node.target not in EINSUM or _operands(node) == (None, None):
        return None
    found = re.fullmatch(r"(\w+),(\w+)->(\w\w\w+)", str(node.args[0]).replace(" ", ""))
    if found is None or any(len(set(letters)) != len(letters) for letters in found.groups()):
        return None
    return found[1], found[2], found[3]


def _is_transposed(node: fx.Node) -> bool:
    """Whether its last two axes are swapped, if it has three."""
    if is_call(node, (torch.transpose,), "transpose") and not node.kwargs:
        return set(node.args[1:]) in ({-1, -2}, {1, 2})
    return is_call(node, (torch.permute,), "permute") and node.args[1:] in ((0, 2, 1), ((0, 2, 1),))


def _order(have: str, want: str) -> Order:
    return None if have == want else tuple(have.index(letter) for letter in want)


def _permuted(node: fx.Node, order: Order) -> fx.Node:
    if order is None:
        return node
    if order == SWAPPED:
        return node.graph.call_method("transpose", (node, -1, -2))
    return node.graph.call_method("permute", (node, *order))
