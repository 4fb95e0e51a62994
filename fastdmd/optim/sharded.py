"""AdamW and averages of a network of which every process has a part: flat buffers over that part."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fastdmd.optim.adamw_ema import AdamWEMA
from fastdmd.optim.averages import Averages
from fastdmd.optim.buffers import Buffers
from fastdmd.optim.flat import Mirror, padded_size, views
from fastdmd.optim.groups import named
from fastdmd.optim.sharded_gradients import ShardedGradients
from fastdmd.ranks import Ranks
from fastdmd.shards import Sharding, joined, local, place, room


class ShardedAdamWEMA(AdamWEMA):
    """`AdamWEMA` of a network that a `Sharding` has cut: every process moves its own part.

    Weights, moments, gradients and averages are flat buffers over the parts of this process, from which FSDP2 gathers
    and into which it reduces. An update exchanges two numbers, the square of the gradients' norm and `balance`. The
    averages are cut as the network is. `compute_dtype` is what the network was cut with; there is no other copy.
    `state_dict()` has tensors that are cut (DTensor), as `torch.distributed.checkpoint` takes them.

    All processes call the same methods in the same order. Gradients of a batch in several parts are reduced part by
    part: what is exchanged grows with their number, and no process ever has a whole gradient. It cannot be copied.

    Raises TypeError or ValueError as AdamWEMA does, and for networks of which some trained parameter is whole.
    """

    def __init__(self, network: nn.Module, *, sharding: Sharding, **options: Any):
        self._sharding = sharding
        super().__init__(network, process_group=sharding.group, **options)

    @staticmethod
    def _require(network: nn.Module) -> None:
        trained = {name: own for name, own in network.named_parameters() if own.requires_grad}
        if not trained:
            raise ValueError(
                "fastdmd.AdamWEMA: expected a network with parameters that require a gradient, got a "
                f"{type(network).__name__} without"
            )
        for name, own in trained.items():
            if not hasattr(own, "to_local"):
                raise TypeError(f"fastdmd.AdamWEMA: expected a network that is cut, got {name} whole")
            if own.dtype not in (torch.float32, torch.float64):
                raise TypeError(
                    f"fastdmd.AdamWEMA: expected parameters in float32 or float64, got {name} in {own.dtype}"
                )

    @staticmethod
    def _room(parameter: Tensor) -> int:
        return padded_size(torch.empty(room(parameter), device="meta"))

    def _lay_out(self, decays: Sequence[float], warmup: float, compute_dtype: torch.dtype | None) -> tuple:
        if compute_dtype is not None:
            raise ValueError(
                f"fastdmd.AdamWEMA: expected compute_dtype where the network is cut, got {compute_dtype} here"
            )
        param = _flatten(self.network, self._names)
        self.parameters = named(self.network, self._names)  # others by now
        averages = _Averages(self.network, self._names, decays, warmup, self._sharding)
        return averages, _Buffers(param, averages.flat, self._ranks, self.parameters)

    def _link(self) -> None:
        self._masters = self._buffers.parts(self._buffers.param)
        grads = [joined(*pair) for pair in zip(self._buffers.parts(self._buffers.grad), self.parameters, strict=True)]
        self._gradients: Any = ShardedGradients(self.network, self.parameters, self._names, grads, self._buffers.grad)
        self._watches: list[Any] = [_Watch(self.network, self._names)]
        self._watches += self._averages.link(self.network, self._names, set(self.parameters))
        self._captured_options = None
        self._seen = None
        self._versions = []

    @property
    def sharding(self) -> Sharding:
        """How its network is cut."""
        return self._sharding

    @property
    def weights(self) -> dict[str, Tensor]:
        """What it moves, by parameter name, cut."""
        return dict(zip(self._names, self.parameters, strict=True))

    def note_change(self) -> None:
        """FSDP2 writes what a forward computes with, and counts that."""

    def state_views(self) -> dict[str, Any]:
        like = dict(zip(self._names, self.parameters, strict=True))
        return {
            name: {own: joined(part, like[own]) for own, part in value.items()} if isinstance(value, Mapping) else value
            for name, value in super().state_views().items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(tree_map_only(Tensor, local, dict(state)))

    def __getstate__(self) -> NoReturn:
        raise TypeError("fastdmd.AdamWEMA: expected no copies or pickles of a network that is cut, got one")


class _Buffers(Buffers):
    """Over the parts of one process."""

    is_whole = False

    def __init__(self, param: Tensor, averages: Sequence[Tensor], ranks: Ranks, parameters: Sequence[nn.Parameter]):
        super().__init__(param, averages, None)
        self._all = ranks
        self._rooms = [torch.empty(room(own), device="meta") for own in parameters]
        self._rows = [len(local(own)) for own in parameters]
        self._squares = param.new_zeros((), dtype=torch.float64)  # of all gradients

    def parts(self, flat: Tensor) -> list[Tensor]:
        """Views of a buffer, of the parts of parameters."""
        return [own.narrow(0, 0, num) for own, num in zip(views(flat, self._rooms), self._rows, strict=True)]

    def share(self, balance: Tensor | None = None) -> None:
        """Sums the squares of all gradients; NaN, unless the mean of `balance` is below zero. One exchange."""
        squares = torch.linalg.vector_norm(self.grad, dtype=self.param.dtype).double().square()
        found = torch.stack([squares, squares.new_full((), -1.0) if balance is None else balance.double()])
        squares, balance = self._all.mean_(found).unbind()
        self._squares = torch.where(balance < 0, squares * self._all.size, math.nan)

    def clipping(self, max_grad_norm: float) -> tuple[Tensor, Tensor]:
        norm = self._squares.sqrt().to(self.param.dtype)
        return norm, (max_grad_norm / (norm + 1e-6)).clamp(max=1) + (norm - norm)

    def by_name(self, names: Sequence[str], like: Sequence[Tensor]) -> dict[str, dict[str, Tensor]]:
        return {kind: dict(zip(names, self.parts(buffer), strict=True)) for kind, buffer in self.kinds().items()}


class _Averages(Averages):
    """Copies of a network that is cut, cut alike."""

    def __init__(
        self, network: nn.Module, names: Sequence[str], decays: Sequence[float], warmup: float, sharding: Sharding
    ):
        self._sharding = sharding
        super().__init__(network, names, decays, warmup)

    def _copy(self, network: nn.Module, names: list[str]) -> tuple[nn.Module, Tensor]:
        average = self._sharding.like(network)
        return average, _flatten(average, names)

    def link(self, network: nn.Module, names: Sequence[str], trained: set[nn.Parameter]) -> list[Any]:
        self.parameters = [own for average in self.networks for own in named(average, list(names))]
        self._mirrors = [_Mirror(network, average, trained) for average in self.networks]
        return [_Watch(average, names) for average in self.networks]


class _Mirror(Mirror):
    """Of fixed parameters that are cut, beside buffers, which are not."""

    def _copy(self, targets: list[Tensor], sources: list[Tensor]) -> None:
        super()._copy(list(map(local, targets)), list(map(local, sources)))


class _Watch:
    """Whether the parts of a network's parameters still lie where they were put."""

    def __init__(self, network: nn.Module, names: Sequence[str]):
        self._network, self._names = network, names
        self._seen = self._look()

    def _look(self) -> list[tuple[int, int]]:
        return [(id(own), local(own).data_ptr()) for own in named(self._network, list(self._names))]

    def check(self) -> None:
        """Raises ValueError for the first that was moved or replaced."""
        for name, before, now in zip(self._names, self._seen, self._look(), strict=True):
            if before != now:
                raise ValueError(
                    f"fastdmd.AdamWEMA: expected {name} where the optimizer put it, got it moved or replaced; what "
                    "does that (.to, .double, load_state_dict(assign=True), fully_shard) comes before it"
                )


def _flatten(network: nn.Module, names: Sequence[str]) -> Tensor:
    """Moves this process's part of the parameters into one buffer, in which each has room as in all processes."""
    parameters = named(network, list(names))
    shapes = [torch.empty(room(own), device="meta") for own in parameters]
    flat = local(parameters[0]).new_zeros(sum(map(padded_size, shapes)))
    rooms = views(flat, shapes)
    for own, place_ in zip(parameters, rooms, strict=True):
        place_.narrow(0, 0, len(local(own))).copy_(local(own))
    place(network, dict(zip(names, rooms, strict=True)))
    return flat
