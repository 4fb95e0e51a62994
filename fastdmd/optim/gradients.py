"""The gradients of a network as views of one buffer, whoever computes them."""

from __future__ import annotations

import abc
import operator
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node
from torch.utils.checkpoint import CheckpointFunction

from fastdmd.optim.flat import places, views

# Of gradients that a CPU may hold twice for a moment, to copy them at once. Profiled on two cores, 1.8 M parameters,
# 8 images: additions, a parameter at a time, take 3 % of a cycle, the copy 1 %. For 56 M they would be 0.2 GB.
MAX_BYTES_TWICE = 2**26
# Functions that torch writes, for ops, compiled graphs and FSDP2: their backward passes reach no parameter themselves.
GENERATED = ("GeneratedBackwardFor", "CompiledFunction", "RegisterPostBackwardFunction")
HOOKS = operator.attrgetter("_post_accumulate_grad_hooks")
VERSION = operator.attrgetter("_version")


class FlatGradients(abc.ABC):
    """`.grad` of each parameter, in a buffer `flat`: whoever fills it, others may rebind `.grad`, as `zero_grad()`,
    `backward(create_graph=True)` and wrappers do. Gradients from before count."""

    def __init__(self, parameters: Sequence[nn.Parameter], names: Sequence[str], flat: Tensor):
        self._parameters, self._names, self._flat = parameters, names, flat
        self._graph_is_known = False

    def zero(self, *, set_to_none: bool) -> None:
        if set_to_none:
            for parameter in self._parameters:
                parameter.grad = None
        else:
            self._flat.zero_()
            self._put_back()

    def settle(self) -> None:
        """Brings the buffer, which is copied, to what `.grad` are: zero for None, which stays None."""
        dropped = [parameter for parameter in self._parameters if parameter.grad is None]
        self.collect(required=False)
        for parameter in dropped:
            parameter.grad = None

    @abc.abstractmethod
    def collect(self, *, required: bool) -> None:
        """Copies gradients that lie elsewhere into the buffer, and lets all of them lie there.

        A gradient that is None counts as zero; ValueError where it is `required`, before anything is copied.
        """

    @abc.abstractmethod
    def _put_back(self) -> None:
        """Lets `.grad` of all parameters lie in the buffer, whatever they hold there."""

    def _require(self, gradients: Sequence[Tensor | None]) -> None:
        """Raises ValueError for the first that is None."""
        for name, gradient in zip(self._names, gradients, strict=True):
            if gradient is None:
                raise ValueError(
                    f"fastdmd.AdamWEMA: expected a gradient of {name}, got none; with zero_grad(set_to_none=False), or "
                    "backward(loss), it counts as zero"
                )


class Gradients(FlatGradients):
    """Of a network that each process has all of. `collect` moves what others left. `is_shared`: somebody takes their
    mean over all processes."""

    def __init__(
        self, parameters: Sequence[nn.Parameter], names: Sequence[str], flat: Tensor, *, is_shared: bool = False
    ):
        super().__init__(parameters, names, flat)
        self._is_shared = is_shared
        self._lay_out()
        self._take({index: own.grad for index, own in enumerate(parameters) if own.grad is not None})

    def _lay_out(self) -> None:
        self._views = views(self._flat, self._parameters)
        self._places = places(self._views)

    def _put_back(self) -> None:
        if places(self._views) != self._places:  # after `.grad.data = ...`, or where they went to another process
            self._lay_out()
        for parameter, view in zip(self._parameters, self._views, strict=True):
            if parameter.grad is not view:
                parameter.grad = view

    @torch.no_grad()
    def _take(self, gradients: Mapping[int, Tensor]) -> None:
        """Copies some, by the index of their parameter, into the buffer, and puts the views back."""
        for index, gradient in gradients.items():
            self._require_dense(index, gradient)
        self._put_back()
        if gradients:
            torch._foreach_copy_([self._views[index] for index in gradients], list(gradients.values()))

    def _require_dense(self, index: int, gradient: Tensor) -> None:
        if gradient.layout != torch.strided:
            raise TypeError(
                f"fastdmd.AdamWEMA: expected a dense gradient of {self._names[index]}, got one in {gradient.layout}; "
                "torch.nn.Embedding(sparse=False) makes dense ones"
            )

    @torch.no_grad()
    def collect(self, *, required: bool) -> None:
        gradients = [parameter.grad for parameter in self._parameters]
        if all(map(operator.is_, gradients, self._views)) and places(self._views) == self._places:
            return
        if required:
            self._require(gradients)
        missing = [index for index, gradient in enumerate(gradients) if gradient is None]
        elsewhere = {
            index: gradient
            for index, (gradient, view) in enumerate(zip(gradients, self._views, strict=True))
            if gradient is not None and (gradient is not view or places([gradient]) != [self._places[index]])
        }
        self._take(elsewhere)
        if missing:
            torch._foreach_zero_([self._views[index] for index in missing])

    def fill(self, loss: Tensor, *, accumulate: bool) -> None:
        """The gradient of a loss, instead of or in addition to what is there; zero where it depends on nothing.

        Raises ValueError in a group of processes that the optimizer was not told of, as it runs no hooks, and so nobody
        would reduce these gradients; for hooks that it would leave out; and for functions whose backward passes reach
        parameters by themselves.
        """
        is_meant = self._is_shared or self._flat.is_meta  # of which there is nothing to reduce
        if not is_meant and torch.distributed.is_available() and torch.distributed.is_initialized():
            if (num_processes := torch.distributed.get_world_size()) > 1:
                raise ValueError(
                    f"fastdmd.AdamWEMA.backward: expected one process, got {num_processes}, whose gradients it does "
                    "not reduce; AdamWEMA(process_group=...) does, as does loss.backward() of a network in "
                    "DistributedDataParallel, which step() takes"
                )
        if any(map(HOOKS, self._parameters)):
            raise ValueError(
                "fastdmd.AdamWEMA.backward: expected parameters without post-accumulate hooks, which it does not run, "
                "got some; loss.backward() runs them, and step() takes its gradients"
            )
        if accumulate:
            self.collect(required=False)
        else:
            self._put_back()
        in_place = self._flat.is_cpu and self._flat.nbytes > MAX_BYTES_TWICE
        if in_place and not accumulate:
            self._flat.zero_()
        versions = [*map(VERSION, self._views)]
        if in_place:
            torch.autograd.backward(loss, inputs=self._parameters)
            complete = all(map(operator.ne, versions, map(VERSION, self._views)))
        else:
            gradients = torch.autograd.grad(loss, self._parameters, allow_unused=True)
            complete = all(gradient is not None for gradient in gradients)
            if versions != [*map(VERSION, self._views)]:
                raise _reached("a function whose backward pass adds to gradients by itself")
        if not complete or not self._graph_is_known:
            check_graph(loss, self._parameters, complete=complete)
            self._graph_is_known = True
        if not in_place:
            self._store(gradients, accumulate)

    def _store(self, gradients: Sequence[Tensor | None], accumulate: bool) -> None:
        alike: list[tuple[Tensor, Tensor]] = []  # tensors of one layout go together
        others: list[tuple[Tensor, Tensor]] = []
        for index, (view, gradient) in enumerate(zip(self._views, gradients, strict=True)):
            if gradient is None:
                others.append((view, torch.zeros((), dtype=view.dtype, device=view.device)))
                continue
            self._require_dense(index, gradient)
            (alike if gradient.stride() == view.stride() else others).append((view, gradient))
        for pairs in (alike, *([pair] for pair in others)):
            if pairs:
                targets, sources = zip(*pairs, strict=True)
                (torch._foreach_add_ if accumulate else torch._foreach_copy_)(targets, sources)


def check_graph(loss: Tensor, parameters: Sequence[nn.Parameter], *, complete: bool = False) -> None:
    """Raises ValueError for somebody's autograd.Function in the graph of the loss that leads to none of the parameters.

    One may lead to those of another network instead, such as a fake score that images pass through, if the gradients
    are `complete`, and if it is no checkpoint.

    The engine runs what lies on the way to the parameters alone, so that what such a backward pass does to them inside,
    as that of a reentrant checkpoint, would be missing. Walks the whole graph: not for every pass.
    """
    if loss.grad_fn is None:
        return
    parents: dict[Node, list[Node]] = {loss.grad_fn: []}
    stack = [loss.grad_fn]
    while stack:
        node = stack.pop()
        for child, _ in node.next_functions:
            if child is not None and child not in parents:
                parents[child] = []
                stack.append(child)
            if child is not None:
                parents[child].append(node)
    ids = set(map(id, parameters))
    leaves = {node: leaf for node in parents if (leaf := getattr(node, "variable", None)) is not None}
    reached = _above([node for node, leaf in leaves.items() if id(leaf) in ids], parents)
    others = [node for node, leaf in leaves.items() if complete and isinstance(leaf, nn.Parameter)]
    allowed = {node for node in _above(others, parents) if not _is_checkpoint(node)}
    for node in parents.keys() - reached - allowed:
        if isinstance(node, BackwardCFunction) and not (node.name().startswith(GENERATED) or _is_ours(node)):
            raise _reached(f"{node.name()}, which leads to none of them")


def _above(nodes: list[Node], parents: Mapping[Node, list[Node]]) -> set[Node]:
    """These, and all that lead to them."""
    reached, stack = set(nodes), nodes
    while stack:
        above = [node for node in parents[stack.pop()] if node not in reached]
        reached.update(above)
        stack += above
    return reached


def _is_checkpoint(node: Node) -> bool:
    return isinstance(node, BackwardCFunction) and type(node)._forward_cls is CheckpointFunction


def _is_ours(node: BackwardCFunction) -> bool:
    """Of a function of this package, whose backward pass reaches no parameter itself either."""
    return type(node)._forward_cls.__module__.startswith("fastdmd.")  # type: ignore[attr-defined]


def _reached(got: str) -> ValueError:
    return ValueError(
        "fastdmd.AdamWEMA.backward: expected a graph in which the engine sees the way to the parameters, got "
        f"{got}; checkpoint with use_reentrant=False, or call zero_grad(set_to_none=False) and loss.backward()"
    )
