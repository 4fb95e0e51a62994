"""The flat buffers behind a network in training: each of its numbers has the same place in all of them."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdmd import ops
from fastdmd.optim.flat import ALIGNMENT, views
from fastdmd.ranks import ALONE, Ranks


class Buffers:
    """Weights and gradients, moments, and perhaps averages and a low-precision copy of the weights, each `[n]`.

    `param` and `averages` are given; `compute_dtype`, if it is another than theirs, is that of `shadow` and `grad`.
    Of several `ranks`, gradients are exchanged with a few more elements behind them, by which all decide together.
    """

    is_whole = True  # of all parameters of the network

    def __init__(
        self, param: Tensor, averages: Sequence[Tensor], compute_dtype: torch.dtype | None, ranks: Ranks = ALONE
    ):
        self._ranks = ranks
        self.param = param
        self.averages = averages
        self.exp_avg = torch.zeros_like(param)
        self.exp_avg_sq = torch.zeros_like(param)
        self.shadow = None if compute_dtype in (None, param.dtype) else param.to(compute_dtype)
        self._shared = self.weights.new_zeros(len(param) + (0 if ranks.is_alone else ALIGNMENT))

    def join(self, parameters: Sequence[Tensor], twin: Any) -> None:
        """Lets the gradients of these parameters lie where those of another optimizer lie, whose are laid out alike."""
        if not isinstance(room := getattr(twin, "_buffers", None), Buffers):
            raise TypeError(f"fastdmd.AdamWEMA: expected gradients_with an AdamWEMA, got {type(twin).__name__}")
        layouts = [
            ([own.shape for own in one], buffers.grad.dtype, buffers.grad.device, len(buffers._shared))
            for one, buffers in ((parameters, self), (twin.parameters, room))
        ]
        if layouts[0] != layouts[1]:
            raise ValueError(
                "fastdmd.AdamWEMA: expected gradients_with the optimizer of a network that is alike, in shapes, "
                f"precision, device, groups and process_group, got one of a {type(twin.network).__name__} that is not"
            )
        if any(own.grad is not None for own in parameters):
            raise ValueError("fastdmd.AdamWEMA: expected no gradients yet of a network with gradients_with, got some")
        self._shared = room._shared

    @property
    def weights(self) -> Tensor:
        """What the network computes with."""
        return self.param if self.shadow is None else self.shadow

    @property
    def grad(self) -> Tensor:
        return self._shared[: len(self.param)]

    def share(self, balance: Tensor | None = None) -> None:
        """Makes `grad` the mean over all ranks, in one exchange; NaN somewhere, unless that of `balance` is below zero.

        In the precision of the gradients.
        """
        if self._ranks.is_alone:
            return
        if balance is not None:
            self._shared[-1:].copy_(balance)
        self._ranks.mean_(self._shared)
        if balance is not None:
            self.grad[:1].masked_fill_(~(self._shared[-1] < 0), math.nan)

    def clipping(self, max_grad_norm: float) -> tuple[Tensor, Tensor]:
        """The norm of all gradients, and the factor that clips each of them: NaN, so that no group moves, where the
        norm is not finite."""
        norm = torch.linalg.vector_norm(self.grad, dtype=self.param.dtype)
        return norm, (max_grad_norm / (norm + 1e-6)).clamp(max=1) + (norm - norm)

    def update(
        self, part: slice, step: Tensor, learning_rate: Tensor, *, factor: Tensor | None = None, **options: Any
    ) -> Tensor:
        """`ops.adamw_ema_` of a part, whose gradient counts `factor` times, with the first average; returns the norm of
        that gradient."""
        grad = self.grad[part]
        if factor is not None:  # a clipped gradient may be below the range of float16
            grad = grad.mul_(factor) if self.shadow is None else grad.to(self.param.dtype).mul_(factor)
        return ops.adamw_ema_(
            self.param[part],
            grad,
            self.exp_avg[part],
            self.exp_avg_sq[part],
            step,
            learning_rate,
            ema=self.averages[0][part] if self.averages else None,
            shadow=None if self.shadow is None else self.shadow[part],
            zero_grad=True,
            **options,
        )

    def by_name(self, names: Sequence[str], like: Sequence[Tensor]) -> dict[str, dict[str, Tensor]]:
        """What a state holds: views of weights, moments and averages, shaped as `like`, by kind and parameter name.

        The kinds of averages are `ema`, `ema_2`, `ema_3`, ..."""
        return {kind: dict(zip(names, views(buffer, like), strict=True)) for kind, buffer in self.kinds().items()}

    def kinds(self) -> dict[str, Tensor]:
        """What a state holds, `[n]` each."""
        kinds = {"param": self.param, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        return kinds | {f"ema_{n}" if n > 1 else "ema": flat for n, flat in enumerate(self.averages, start=1)}


@torch.no_grad()
def adopt(masters: Sequence[Tensor], parameters: Sequence[Tensor], versions: Sequence[int]) -> list[int]:
    """Low-precision weights that have other `versions` than these become master weights; equal ones keep their digits.
    Returns the versions of now."""
    now = [parameter._version for parameter in parameters]
    for index in itertools.compress(range(len(now)), map(operator.ne, now, versions)):
        master, parameter = masters[index], parameters[index]
        master.copy_(torch.where(parameter == master.to(parameter.dtype), master, parameter))
    return now
