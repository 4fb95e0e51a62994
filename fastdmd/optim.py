"""AdamW with warm-up, global-norm clipping and an exponential moving average, on flat buffers."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from fastdmd import ops

ALIGNMENT = 16  # elements: every parameter starts a cache line
EMA_WARMUP = 10.0  # the n-th update averages with at most n / (n + 10), so that a short run does not remember its start


class AdamWEMA:
    """AdamW (Loshchilov & Hutter 2019) for every parameter of one network.

    Parameters and gradients of the network become views of two flat buffers, in their own memory layout; one call of
    `ops.adamw_ema_` clips the gradients to a global norm of `max_grad_norm`, updates the weights, moves the average
    `ema_network` and clears the gradients. An update whose gradient is not finite changes nothing.
    The learning rate rises linearly to `learning_rate` over `warmup_steps` updates and, if `decay_steps` is
    given, falls to zero at that update along a cosine. `ema_decay=None` keeps no average.
    """

    def __init__(self, network: nn.Module, *, learning_rate: float, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-8, weight_decay: float = 0.01, max_grad_norm: float = float("inf"),
                 warmup_steps: int = 0, decay_steps: int | None = None, ema_decay: float | None = None):  # fmt: skip
        self.network = network
        self.parameters = list(network.parameters())
        self.peak_learning_rate, self.warmup_steps, self.decay_steps = learning_rate, warmup_steps, decay_steps
        self.num_updates = 0
        self.ema_network = None
        if ema_decay is not None:
            self.ema_network = copy.deepcopy(network).requires_grad_(False).eval()
        self._options = {
            "betas": betas, "eps": eps, "weight_decay": weight_decay, "max_grad_norm": max_grad_norm,
            "ema_decay": ema_decay or 0.0, "ema_warmup": EMA_WARMUP, "zero_grad": True,
        }  # fmt: skip

        self._param = _flatten(self.parameters)
        self._ema = _flatten(list(self.ema_network.parameters())) if self.ema_network is not None else None
        self._grad, self._exp_avg, self._exp_avg_sq = (torch.zeros_like(self._param) for _ in range(3))
        for parameter, view in zip(self.parameters, _views(self._grad, self.parameters), strict=True):
            parameter.grad = view
        device = self._param.device
        self._step = torch.zeros(1, dtype=torch.int64, device=device)
        self._learning_rate = torch.zeros((), device=device)

    def learning_rate(self, update: int) -> float:
        """That of the update with this index, which starts at 0."""
        factor = min(1.0, (update + 1) / self.warmup_steps) if self.warmup_steps > 0 else 1.0
        if self.decay_steps is not None:
            factor *= 0.5 + 0.5 * math.cos(math.pi * min(1.0, update / self.decay_steps))
        return self.peak_learning_rate * factor

    def step(self) -> Tensor:
        """Returns the gradient norm before clipping, a 0-dim tensor on the device."""
        self._learning_rate.fill_(self.learning_rate(self.num_updates))
        self.num_updates += 1
        with torch.no_grad():
            return ops.adamw_ema_(
                self._param, self._grad, self._exp_avg, self._exp_avg_sq, self._step, self._learning_rate,
                ema=self._ema, **self._options,
            )  # fmt: skip


def _flatten(parameters: list[nn.Parameter]) -> Tensor:
    """Moves the parameters into one buffer and makes them views of it."""
    flat = parameters[0].new_zeros(sum(map(_padded_size, parameters)), requires_grad=False)
    for parameter, view in zip(parameters, _views(flat, parameters), strict=True):
        parameter.data = view.copy_(parameter.data)
    return flat


def _views(flat: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    """A view for each parameter, of its shape and strides."""
    views, offset = [], 0
    for parameter in parameters:
        views.append(flat.as_strided(parameter.shape, parameter.stride(), offset))
        offset += _padded_size(parameter)
    return views


def _padded_size(parameter: nn.Parameter) -> int:
    return -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
