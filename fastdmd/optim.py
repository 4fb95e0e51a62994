"""AdamW with warm-up, global-norm clipping and an exponential moving average, on flat buffers."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastdmd import ops

ALIGNMENT = 16  # elements: every parameter starts a cache line
# Of gradients that a CPU may hold twice for a moment, to copy them at once. Profiled on two cores, 1.8 M parameters,
# 8 images: additions, a parameter at a time, take 3 % of a cycle, the copy 1 %. For 56 M they would be 0.2 GB.
MAX_BYTES_TWICE = 2**26
EMA_WARMUP = 10.0  # the n-th update averages with at most n / (n + 10), so that a short run does not remember its start


class AdamWEMA:
    """AdamW (Loshchilov & Hutter 2019) for every parameter of one network.

    Parameters and gradients of the network become views of flat buffers, in their own memory layout; one call of
    `ops.adamw_ema_` clips the gradients to a global norm of `max_grad_norm`, updates the weights, moves the average
    `ema_network` and clears the gradients. An update whose gradient is not finite changes nothing.
    The learning rate rises linearly to `learning_rate` over `warmup_steps` updates and, if `decay_steps` is
    given, falls to zero at that update along a cosine. `ema_decay=None` keeps no average.

    `compute_dtype` (bfloat16 or float16) is the precision that the network computes in: its weights become copies that
    each update writes, its gradients are of that precision too, and master weights, moments and average stay as they
    were. Buffers keep their precision.

    `groups` maps regular expressions, searched in parameter names, to what differs there: `{"norm|bias":
    {"weight_decay": 0.0}, "^map_": {"learning_rate_factor": 0.1}}`; the first that matches counts. Clipping stays
    global. More than one group costs a pass over the gradients.
    """

    def __init__(self, network: nn.Module, *, learning_rate: float, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-8, weight_decay: float = 0.01, max_grad_norm: float = float("inf"),
                 warmup_steps: int = 0, decay_steps: int | None = None, ema_decay: float | None = None,
                 compute_dtype: torch.dtype | None = None, groups: Mapping[str, Mapping[str, float]] | None = None
                 ):  # fmt: skip
        self.network = network
        self.peak_learning_rate, self.warmup_steps, self.decay_steps = learning_rate, warmup_steps, decay_steps
        self.num_updates = 0
        self.ema_network = None
        self._max_grad_norm = max_grad_norm
        self._options = {
            "betas": betas, "eps": eps, "ema_decay": ema_decay or 0.0, "ema_warmup": EMA_WARMUP, "zero_grad": True,
        }  # fmt: skip

        members = _members(network, groups or {})
        self._names = [name for names, _ in members for name in names]
        self.parameters = _named(network, self._names)
        self._param = _flatten(self.parameters)
        self._ema = None
        if ema_decay is not None:  # a copy now takes the place in memory that the parameters have just left
            self.ema_network = copy.deepcopy(network).requires_grad_(False).eval()
            self._ema = _flatten(_named(self.ema_network, self._names))
        self._exp_avg, self._exp_avg_sq = torch.zeros_like(self._param), torch.zeros_like(self._param)
        self._shadow = None
        if compute_dtype not in (None, self._param.dtype):
            self._shadow = self._param.to(compute_dtype)
            for parameter, view in zip(self.parameters, _views(self._shadow, self.parameters), strict=True):
                parameter.data = view
        self._grad = torch.zeros_like(self._param if self._shadow is None else self._shadow)
        self._grads = _views(self._grad, self.parameters)
        for parameter, view in zip(self.parameters, self._grads, strict=True):
            parameter.grad = view

        self._groups, start = [], 0
        for names, changes in members:
            stop = start + sum(map(_padded_size, _named(network, names)))
            self._groups.append(_Group(slice(start, stop), self._param.device, {"weight_decay": weight_decay}, changes))
            start = stop

    def learning_rate(self, update: int) -> float:
        """That of the update with this index, which starts at 0."""
        factor = min(1.0, (update + 1) / self.warmup_steps) if self.warmup_steps > 0 else 1.0
        if self.decay_steps is not None:
            factor *= 0.5 + 0.5 * math.cos(math.pi * min(1.0, update / self.decay_steps))
        return self.peak_learning_rate * factor

    def backward(self, loss: Tensor, *, accumulate: bool = False) -> None:
        """`loss.backward()` for the parameters alone, a few launches instead of one addition per parameter.

        Overwrites the gradients, or adds to them with `accumulate`. A parameter that the loss does not depend on has a
        gradient of zero.
        """
        if self._grad.is_cpu and self._grad.nbytes > MAX_BYTES_TWICE:
            if not accumulate:
                self._grad.zero_()
            return torch.autograd.backward(loss, inputs=self.parameters)
        gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        alike, others = [], []  # tensors of one layout go together
        for view, gradient in zip(self._grads, gradients, strict=True):
            if gradient is None:
                others.append((view, torch.zeros((), dtype=view.dtype, device=view.device)))
            else:
                (alike if gradient.stride() == view.stride() else others).append((view, gradient))
        for pairs in (alike, *([pair] for pair in others)):
            views, gradients = zip(*pairs, strict=True)
            (torch._foreach_add_ if accumulate else torch._foreach_copy_)(views, gradients)

    def step(self) -> Tensor:
        """Returns the gradient norm before clipping, a 0-dim tensor on the device."""
        self.advance()
        return self.update()

    def advance(self) -> None:
        """The host's part of a step: the learning rate of the next update, into its place on the device."""
        for group in self._groups:
            group.learning_rate.fill_(self.learning_rate(self.num_updates) * group.learning_rate_factor)
        self.num_updates += 1

    @torch.no_grad()
    def update(self) -> Tensor:
        """The device's part of a step, the same launches every time: what a captured graph may hold."""
        if len(self._groups) == 1:
            return self._update(self._groups[0], self._max_grad_norm)
        norm = torch.linalg.vector_norm(self._grad, dtype=self._param.dtype)
        self._grad.mul_((self._max_grad_norm / (norm + 1e-6)).clamp(max=1))  # not finite: no group moves
        for group in self._groups:
            self._update(group, math.inf)
        return norm

    def _update(self, group: _Group, max_grad_norm: float) -> Tensor:
        buffers = (self._param, self._grad, self._exp_avg, self._exp_avg_sq, self._ema, self._shadow)
        *buffers, ema, shadow = (None if buffer is None else buffer[group.part] for buffer in buffers)
        return ops.adamw_ema_(
            *buffers, group.step, group.learning_rate, ema=ema, shadow=shadow, weight_decay=group.weight_decay,
            max_grad_norm=max_grad_norm, **self._options,
        )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, by parameter name, whatever the layout of the buffers."""
        return {
            "num_updates": self.num_updates, "steps": [group.step.clone() for group in self._groups],
            **{name: dict(zip(self._names, map(torch.clone, views), strict=True)) for name, views in self._state()},
        }  # fmt: skip

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError where the state is of another network, or has other groups."""
        kinds = {name: views for name, views in self._state()}
        if missing := {"num_updates", "steps", *kinds} ^ state.keys():
            raise ValueError(f"fastdmd.AdamWEMA: expected the entries of this optimizer, got others: {sorted(missing)}")
        if len(state["steps"]) != len(self._groups):
            raise ValueError(
                f"fastdmd.AdamWEMA: expected {len(self._groups)} parameter groups, got {len(state['steps'])}"
            )
        for kind, views in kinds.items():
            shapes = {name: tuple(view.shape) for name, view in zip(self._names, views, strict=True)}
            got = {name: tuple(tensor.shape) for name, tensor in state[kind].items()}
            if different := [name for name in shapes | got if shapes.get(name) != got.get(name)]:
                name = different[0]
                raise ValueError(
                    f"fastdmd.AdamWEMA: expected {kind} of {name} of shape {shapes.get(name)}, got {got.get(name)}"
                )
        for kind, views in kinds.items():
            for name, view in zip(self._names, views, strict=True):
                view.copy_(state[kind][name])
        for group, step in zip(self._groups, state["steps"], strict=True):
            group.step.copy_(step)
        self.num_updates = state["num_updates"]
        if self._shadow is not None:
            self._shadow.copy_(self._param)

    def _state(self) -> list[tuple[str, list[Tensor]]]:
        buffers = {"param": self._param, "exp_avg": self._exp_avg, "exp_avg_sq": self._exp_avg_sq, "ema": self._ema}
        return [(name, _views(b, self.parameters)) for name, b in buffers.items() if b is not None]


class _Group:
    """A part of the flat buffers with its own weight decay and learning rate."""

    def __init__(self, part: slice, device: torch.device, shared: Mapping[str, float], changes: Mapping[str, float]):
        options = {**shared, "learning_rate_factor": 1.0}
        if unknown := changes.keys() - options.keys():
            raise ValueError(f"fastdmd.AdamWEMA: expected groups with {' or '.join(options)}, got {sorted(unknown)}")
        options |= changes
        self.part, self.weight_decay = part, options["weight_decay"]
        self.learning_rate_factor = options["learning_rate_factor"]
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        self.learning_rate = torch.zeros((), device=device)


def _members(network: nn.Module, groups: Mapping[str, Mapping[str, float]]) -> list[tuple[list[str], Mapping]]:
    """The parameter names of each group that has any, and what differs there."""
    members = {pattern: [] for pattern in (*groups, "")}  # the empty pattern matches the rest
    for name, _ in network.named_parameters():
        members[next(pattern for pattern in members if re.search(pattern, name))].append(name)
    return [(names, groups.get(pattern, {})) for pattern, names in members.items() if names]


def _named(network: nn.Module, names: list[str]) -> list[nn.Parameter]:
    parameters = dict(network.named_parameters())
    return [parameters[name] for name in names]


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
