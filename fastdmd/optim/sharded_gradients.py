"""The gradients of a network that is cut, as parts of one buffer: FSDP2 reduces them there during a backward pass."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastdmd.optim.gradients import FlatGradients, check_graph
from fastdmd.shards import gathered, local


class ShardedGradients(FlatGradients):
    """Of a network that is cut, `grads`, whose parts lie in the buffer: the means over all processes.

    A backward pass adds to what is there. `collect` moves what others left.
    """

    def __init__(
        self,
        network: nn.Module,
        parameters: Sequence[nn.Parameter],
        names: Sequence[str],
        grads: Sequence[Tensor],
        flat: Tensor,
    ):
        super().__init__(parameters, names, flat)
        self._grads = grads
        # What graphs lead to. Of these alone gradients are computed, and not of other networks on the way.
        self._leaves = [leaf for leaf in gathered(network) if leaf.requires_grad]
        if len(self._leaves) != len(parameters):
            raise ValueError(
                f"fastdmd.AdamWEMA: expected {len(parameters)} parameters to be gathered, got {len(self._leaves)}"
            )
        self.collect(required=False)

    @torch.no_grad()
    def collect(self, *, required: bool) -> None:
        found = [parameter.grad for parameter in self._parameters]
        if all(map(operator.is_, found, self._grads)):
            return
        if required:
            self._require(found)
        for own, gradient in zip(self._grads, found, strict=True):
            if gradient is None:
                local(own).zero_()
            elif gradient is not own:
                local(own).copy_(local(gradient))
        self._put_back()

    def fill(self, loss: Tensor, *, accumulate: bool) -> None:
        """The gradient of a loss, instead of or in addition to what is there; zero where it depends on nothing.

        Raises ValueError for functions whose backward passes reach parameters by themselves.
        """
        if not self._graph_is_known:
            check_graph(loss, self._leaves)
            self._graph_is_known = True
        if accumulate:
            self.collect(required=False)
        else:
            self.zero(set_to_none=False)
        torch.autograd.backward(loss, inputs=self._leaves)

    def _put_back(self) -> None:
        for parameter, own in zip(self._parameters, self._grads, strict=True):
            if parameter.grad is not own:
                parameter.grad = own
