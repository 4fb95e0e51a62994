"""The gradients of a network as views of one buffer, whoever computes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastdmd.flat import same_storage, views

# Of gradients that a CPU may hold twice for a moment, to copy them at once. Profiled on two cores, 1.8 M parameters,
# 8 images: additions, a parameter at a time, take 3 % of a cycle, the copy 1 %. For 56 M they would be 0.2 GB.
MAX_BYTES_TWICE = 2**26


class Gradients:
    """`.grad` of each parameter, in a buffer `flat`.

    Others may rebind `.grad`: `zero_grad()`, `backward(create_graph=True)`, wrappers. `collect` moves what they left.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], names: Sequence[str], flat: Tensor):
        self._parameters, self._names, self._flat = parameters, names, flat
        self._lay_out()
        self._put_back()

    def _lay_out(self) -> None:
        self._views = views(self._flat, self._parameters)
        self._storages = [view.untyped_storage() for view in self._views]

    def _put_back(self) -> None:
        if not all(map(same_storage, self._views, self._storages)):  # after `.grad.data = ...`
            self._lay_out()
        for parameter, view in zip(self._parameters, self._views, strict=True):
            if parameter.grad is not view:
                parameter.grad = view

    @torch.no_grad()
    def collect(self, *, required: bool) -> None:
        """Copies gradients that lie elsewhere into the buffer, and puts the views back.

        A gradient that is None counts as zero; ValueError where it is `required`, before anything is copied.
        """
        gradients = [parameter.grad for parameter in self._parameters]
        places = zip(gradients, self._views, self._storages, strict=True)
        elsewhere = [
            index for index, (gradient, view, storage) in enumerate(places)
            if gradient is not view or not same_storage(gradient, storage)
        ]  # fmt: skip
        missing = [index for index in elsewhere if gradients[index] is None]
        if missing and required:
            raise ValueError(
                f"fastdmd.AdamWEMA: expected a gradient of {self._names[missing[0]]}, got none; with "
                "zero_grad(set_to_none=False), or backward(loss), it counts as zero"
            )
        if not elsewhere:
            return
        self._put_back()
        if missing:
            torch._foreach_zero_([self._views[index] for index in missing])
        if given := [index for index in elsewhere if gradients[index] is not None]:
            torch._foreach_copy_([self._views[index] for index in given], [gradients[index] for index in given])

    def zero(self, *, set_to_none: bool) -> None:
        if set_to_none:
            for parameter in self._parameters:
                parameter.grad = None
        else:
            self._flat.zero_()
            self._put_back()

    def fill(self, loss: Tensor, *, accumulate: bool) -> None:
        """The gradient of a loss, instead of or in addition to what is there; zero where it depends on nothing.

        Raises ValueError in a group of processes, as it runs no hooks, and so nobody would reduce these gradients.
        """
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            if (num_processes := torch.distributed.get_world_size()) > 1:
                raise ValueError(
                    f"fastdmd.AdamWEMA.backward: expected one process, got {num_processes}, whose gradients it does "
                    "not reduce; loss.backward() of a network in DistributedDataParallel does, and step() takes them"
                )
        if accumulate:
            self.collect(required=False)
        else:
            self._put_back()
        if self._flat.is_cpu and self._flat.nbytes > MAX_BYTES_TWICE:
            if not accumulate:
                self._flat.zero_()
            return torch.autograd.backward(loss, inputs=self._parameters)
        gradients = torch.autograd.grad(loss, self._parameters, allow_unused=True)
        alike, others = [], []  # tensors of one layout go together
        for view, gradient in zip(self._views, gradients, strict=True):
            if gradient is None:
                others.append((view, torch.zeros((), dtype=view.dtype, device=view.device)))
            else:
                (alike if gradient.stride() == view.stride() else others).append((view, gradient))
        for pairs in (alike, *([pair] for pair in others)):
            if pairs:
                targets, sources = zip(*pairs, strict=True)
                (torch._foreach_add_ if accumulate else torch._foreach_copy_)(targets, sources)
