"""AdamW with warm-up, global-norm clipping and an exponential moving average of the weights."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn


class AdamWEMA:
    """AdamW (Loshchilov & Hutter 2019) for every parameter of one network.

    One `step` clips the gradients to a global norm of `max_grad_norm`, updates the weights, clears the
    gradients and moves the average: `ema += (1 - decay_n) * (weight - ema)` with
    `decay_n = min(ema_decay, n / (n + 10))` at the n-th update, so that a short run does not remember its start.
    The learning rate rises linearly to `learning_rate` over `warmup_steps` updates and, if `decay_steps` is
    given, falls to zero at that update along a cosine. `ema_decay=None` keeps no average.
    """

    def __init__(self, network: nn.Module, *, learning_rate: float, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-8, weight_decay: float = 0.01, max_grad_norm: float = float("inf"),
                 warmup_steps: int = 0, decay_steps: int | None = None, ema_decay: float | None = None):  # fmt: skip
        self.network = network
        self.parameters = list(network.parameters())
        self.max_grad_norm = max_grad_norm
        self.ema_decay = ema_decay
        self.num_updates = 0
        self._adamw = torch.optim.AdamW(
            self.parameters, lr=learning_rate, betas=betas, eps=eps, weight_decay=weight_decay, fused=True
        )

        def learning_rate_factor(update: int) -> float:
            factor = min(1.0, (update + 1) / warmup_steps) if warmup_steps > 0 else 1.0
            if decay_steps is not None:
                factor *= 0.5 + 0.5 * math.cos(math.pi * min(1.0, update / decay_steps))
            return factor

        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._adamw, learning_rate_factor)
        self.ema_network = None
        if ema_decay is not None:
            self.ema_network = copy.deepcopy(network).requires_grad_(False).eval()

    def step(self) -> Tensor:
        """Returns the gradient norm before clipping, a 0-dim tensor on the device."""
        grad_norm = nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)
        self._schedule.step()
        self.num_updates += 1
        if self.ema_network is not None:
            decay = min(self.ema_decay, self.num_updates / (self.num_updates + 10))
            with torch.no_grad():
                torch._foreach_lerp_(list(self.ema_network.parameters()), self.parameters, 1 - decay)
        return grad_norm
