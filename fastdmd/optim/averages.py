"""The averages of a network in training: copies of it whose trained parameters lie in flat buffers of their own."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdmd.ops.adamw_ema import check_options
from fastdmd.optim.flat import Mirror, Watch, flatten, views
from fastdmd.optim.groups import named


class Averages:
    """Exponential moving averages of one network, any number of them, with a decay each.

    `ops.adamw_ema_` moves the first; `follow` moves the others by what the op does: `ema += (1 - decay) * (param -
    ema)` with `decay = min(decay, t / (t + warmup))` at the t-th update that moved something.
    """

    def __init__(self, network: nn.Module, names: Sequence[str], decays: Sequence[float], warmup: float):
        self.decays = tuple(decays)
        self.warmup = warmup
        self.networks: list[nn.Module] = []
        self.flat: list[Tensor] = []  # [n] each
        for _ in self.decays:  # a copy takes the place in memory that the parameters before it have just left
            average, flat = self._copy(network, list(names))
            self.flat.append(flat)
            self.networks.append(average)
        if len(self.flat) > 1:
            further = torch.tensor(self.decays[1:], dtype=torch.float64)
            self._further = further.to(self.flat[0].device)  # [number of averages - 1]

    def _copy(self, network: nn.Module, names: list[str]) -> tuple[nn.Module, Tensor]:
        average = copy.deepcopy(network).requires_grad_(False).eval()
        return average, flatten(named(average, names))

    def link(self, network: nn.Module, names: Sequence[str], trained: set[nn.Parameter]) -> list[Watch]:
        """Parameters as views of the buffers; again in a copy, whose tensors are apart. Returns who watches them."""
        self.parameters: list[nn.Parameter] = []
        self._mirrors = [Mirror(network, average, trained) for average in self.networks]
        watches = []
        for index, (average, flat) in enumerate(zip(self.networks, self.flat, strict=True)):
            parameters = named(average, list(names))
            for parameter, view in zip(parameters, views(flat, parameters), strict=True):
                parameter.data = view
            place = "ema_network" if index == 0 else f"ema_networks[{index}]"
            called = (f"{name} of {place}" for name in names)
            watches.append(Watch(average, dict(zip(parameters, called, strict=True)), flags=False))
            self.parameters += parameters
        return watches

    def follow(self, param: Tensor, step: Tensor, norm: Tensor) -> None:
        """Moves all but the first: one pass over `[n]` each, the same launches every time.

        Where `norm` is not finite, nothing moves, as in the op; `step` (int64 `[1]`) counts the updates that did.
        """
        if len(self.flat) < 2:
            return
        t = step.double()
        weights = 1 - torch.minimum(self._further, t / (t + self.warmup))
        weights = torch.where(norm.isfinite(), weights, 0).to(param.dtype)
        for flat, weight in zip(itertools.islice(self.flat, 1, None), weights.unbind(), strict=True):
            flat.lerp_(param, weight)

    def mirror(self) -> None:
        """Buffers and fixed parameters become those that the network has by now."""
        for mirror in self._mirrors:
            mirror.follow()

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which are linked anew."""
        return {name: value for name, value in vars(self).items() if name not in ("parameters", "_mirrors")}


def decays_of(ema_decay: float | Sequence[float] | None) -> tuple[float, ...]:
    """One for each average. Raises TypeError or ValueError for what is no decay, and for a sequence without any."""
    if ema_decay is None:
        return ()
    decays = tuple(ema_decay) if isinstance(ema_decay, (tuple, list)) else (ema_decay,)
    if not decays:
        raise ValueError(f"fastdmd.AdamWEMA: expected ema_decay to be None, a decay or several, got {ema_decay}")
    for decay in decays:
        check_options("AdamWEMA", ema_decay=decay)
    return decays
