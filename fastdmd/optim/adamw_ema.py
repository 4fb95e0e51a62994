"""AdamW with warm-up, global-norm clipping and an exponential moving average, on flat buffers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fastdmd.ops.adamw_ema import check_options
from fastdmd.optim.averages import Averages, decays_of
from fastdmd.optim.buffers import Buffers, adopt
from fastdmd.optim.flat import Watch, check_network, flatten, padded_size, views
from fastdmd.optim.gradients import Gradients
from fastdmd.optim.groups import Group, check_count, members, named, schedule
from fastdmd.optim.states import FlatOptimizer, check_groups, check_state, fixed_options, without_parameters
from fastdmd.ranks import Ranks

NOT_COPIED = {"_masters", "_gradients", "_watches", "_captured_options", "_versions", "_seen", "step"}
EMA_WARMUP = 10.0  # the n-th update averages with at most n / (n + 10), so that a short run does not remember its start


class AdamWEMA(FlatOptimizer):
    """AdamW (Loshchilov & Hutter 2019) for every parameter of one network that requires a gradient.

    Parameters and gradients of the network become views of flat buffers, in their own memory layout; one call of
    `ops.adamw_ema_` clips the gradients to a global norm of `max_grad_norm`, updates the weights, moves the average
    `ema_network` and clears the gradients. An update whose gradient is not finite changes nothing. The learning rate
    rises linearly to `learning_rate` over `warmup_steps` updates and, if `decay_steps` is given, falls to zero at that
    update along a cosine. `ema_decay=None` keeps no average; the n-th update averages with `min(ema_decay, n / (n +
    ema_warmup))`. Several decays keep as many averages, `ema_networks`, of which `ema_network` is the first; each
    further one costs a pass over weights and average. Its buffers and fixed parameters are copies of the network's.

    `compute_dtype` (bfloat16 or float16) is the precision that the network computes in: its weights become copies that
    each update writes, its gradients are of that precision too, and master weights, moments and average stay as they
    were. Buffers keep their precision. Weights that change in place between updates, as by `load_state_dict` or an
    initialisation, are taken over, in that precision; only a change through `.data` goes unseen. float16 has no loss
    scaling here: gradients below 6e-8 are zero.

    `groups` maps regular expressions, searched in parameter names, to what differs there: `{"norm|bias":
    {"weight_decay": 0.0}, "^map_": {"learning_rate_factor": 0.1}}`; the first that matches counts. Clipping stays
    global. More than one group costs a pass over the gradients, and with `compute_dtype` a wide copy of each group's.

    `process_group`, of torch.distributed: each of its processes has an equal part of the batch, and begins with weights
    and buffers of the first. An update takes the mean of their gradients: one all_reduce, which a CUDA graph may hold.
    Copies share the group; a pickle would have none, and is refused.

    `gradients_with`, the optimizer of a network that is alike: gradients of both lie in the same memory. For two that
    take turns: each is updated before the other is differentiated, and no `loss.backward()` leads through both.

    It is a `torch.optim.Optimizer`: `zero_grad()`, `loss.backward()`, `step()` and torch's schedulers work;
    `backward(loss)` saves the copy that gradients cost after `zero_grad()`. The rate of a group is `lr` times
    `learning_rate_factor` times warm-up and decay. What differs from torch's AdamW:

    - A parameter that the loss does not reach has a gradient of zero, and decays; torch does that for zeros and skips
      None. One whose gradient `zero_grad()` made None and no backward pass filled is an error.
    - Parameters have moved, and must stay, as must modules: `.to(...)` of device, dtype or layout, wrappers that shard,
      `share_memory`, another head, `requires_grad_` and another AdamWEMA come before the optimizer, else the next step
      raises. Tensors outside the network that shared memory with a parameter no longer do.
    - Moments are in `state_dict()` alone, by parameter name, and hooks on it are refused.

    Raises TypeError or ValueError, naming what was expected and what came.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        learning_rate: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        max_grad_norm: float = math.inf,
        warmup_steps: int = 0,
        decay_steps: int | None = None,
        ema_decay: float | Sequence[float] | None = None,
        ema_warmup: float = EMA_WARMUP,
        compute_dtype: torch.dtype | None = None,
        groups: Mapping[str, Mapping[str, float]] | None = None,
        process_group: Any = None,
        gradients_with: AdamWEMA | None = None,
    ):
        check_options("AdamWEMA", learning_rate=learning_rate, betas=betas, eps=eps, weight_decay=weight_decay)
        check_options("AdamWEMA", max_grad_norm=max_grad_norm, ema_warmup=ema_warmup)
        decays = decays_of(ema_decay)
        check_count("warmup_steps", warmup_steps, least=0)
        if decay_steps is not None:
            check_count("decay_steps", decay_steps, least=1)
        self._require(network)
        parts = members(network, groups or {})
        self.network = network
        self.warmup_steps, self.decay_steps = warmup_steps, decay_steps
        self.num_updates = 0
        self._max_grad_norm = max_grad_norm

        self._names = [name for names, _ in parts for name in names]
        self.parameters = named(network, self._names)
        if compute_dtype not in (None, self.parameters[0].dtype, torch.bfloat16, torch.float16):
            raise ValueError(f"fastdmd.AdamWEMA: expected compute_dtype bfloat16 or float16, got {compute_dtype}")
        self._ranks = Ranks.of(process_group)
        self._averages, self._buffers = self._lay_out(decays, ema_warmup, compute_dtype)
        if gradients_with is not None:
            self._buffers.join(self.parameters, gradients_with)

        self._groups: list[Group] = []
        for names, _ in parts:
            start, param = self._groups[-1].part.stop if self._groups else 0, self._buffers.param
            part = slice(start, start + sum(map(self._room, named(network, names))))
            self._groups.append(Group(part, param.new_zeros(1, dtype=torch.int64), param.new_zeros(())))
        shared = {"lr": learning_rate, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        shared["learning_rate_factor"] = 1.0
        super().__init__([{"params": named(network, names), **changes} for names, changes in parts], shared)
        self._link()

    # What another kind of network has other ways for.

    _require, _room = staticmethod(check_network), staticmethod(padded_size)

    def _lay_out(self, decays: Sequence[float], warmup: float, compute_dtype: torch.dtype | None) -> tuple:
        """Moves parameters, and those of averages, into flat buffers."""
        self._ranks.spread_(self.network)
        param = flatten(self.parameters)
        averages = Averages(self.network, self._names, decays, warmup)
        return averages, Buffers(param, averages.flat, compute_dtype, self._ranks)

    def _link(self) -> None:
        """Parameters, averages and gradients as views of the buffers; again in a copy, whose tensors are apart."""
        for parameter, view in zip(self.parameters, views(self._buffers.weights, self.parameters), strict=True):
            parameter.data = view
        self._masters = views(self._buffers.param, self.parameters)
        has_group = self._ranks.group is not None  # which may be of this process alone, among others
        self._gradients = Gradients(self.parameters, self._names, self._buffers.grad, is_shared=has_group)
        self._watches = [Watch(self.network, dict(zip(self.parameters, self._names, strict=True)), flags=True)]
        self._watches += self._averages.link(self.network, self._names, set(self.parameters))
        self._captured_options: list[tuple] | None = None
        self._seen: list | None = None
        self._versions = [parameter._version for parameter in self.parameters]

    @property
    def weights(self) -> dict[str, Tensor]:
        """What it moves, by parameter name: master weights where the network computes in another precision."""
        self._adopt()
        return dict(zip(self._names, self._masters, strict=True))

    @property
    def ema_networks(self) -> tuple[nn.Module, ...]:
        """The averages, in the order of their decays."""
        return tuple(self._averages.networks)

    @property
    def ema_network(self) -> nn.Module | None:
        """The first average, if there is any."""
        return next(iter(self._averages.networks), None)

    def learning_rate(self, update: int) -> float:
        """That of the update with this index, which starts at 0."""
        return self.peak_learning_rate * schedule(update, self.warmup_steps, self.decay_steps)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's. No call is needed: `step` leaves zeros, and `backward` overwrites."""
        self._check()
        self._gradients.zero(set_to_none=set_to_none)

    def backward(self, loss: Tensor, *, accumulate: bool = False) -> None:
        """`loss.backward()` for the parameters alone, a few launches instead of one addition per parameter.

        Overwrites the gradients, or adds to them with `accumulate`. A parameter that the loss does not depend on has a
        gradient of zero. Raises ValueError for what only `loss.backward()` does right: processes of no `process_group`,
        hooks of `register_post_accumulate_grad_hook` (those of `register_hook` run), and functions whose backward pass
        reaches parameters by itself, as in a reentrant checkpoint.
        """
        self._check()
        self._gradients.fill(loss, accumulate=accumulate)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Returns the gradient norm before clipping, a 0-dim tensor on the device; or what a `closure` returned.

        Raises ValueError where parameters are no longer where the optimizer put them, or have no gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check()
        self._gradients.collect(required=True)  # raises before the learning rate advances
        self.advance()
        norm = self._update()
        return norm if closure is None else loss

    def advance(self) -> None:
        """The host's part of a step: checks, and the learning rate of the next update, into its place on the device."""
        self._check()
        self._adopt()
        factor = schedule(self.num_updates, self.warmup_steps, self.decay_steps)
        for group, options in zip(self._groups, self.param_groups, strict=True):
            group.learning_rate.fill_(factor * options["lr"] * options["learning_rate_factor"])
        self.num_updates += 1

    @torch.no_grad()
    def update(self, permitted: Tensor | None = None, *, balance: Tensor | None = None) -> Tensor:
        """The device's part of a step, the same launches every time: what a captured graph may hold.

        Only `lr` may change under a graph. A replay runs no Python, so no stale autograd graph raises after it. Where
        `permitted`, 0-dim, is False on the device of any process, nothing moves and the norm is NaN, in all of them;
        with a `process_group` also where the mean of their `balance`, 0-dim, is not below zero.
        """
        self._gradients.collect(required=True)
        self._adopt()
        if permitted is not None:  # what the op does of a gradient that is not finite
            self._buffers.grad[:1].masked_fill_(~permitted, math.nan)
        return self._update(balance)

    def _update(self, balance: Tensor | None = None) -> Tensor:
        self._buffers.share(balance)
        if self._buffers.param.is_cuda and torch.backends.cuda.is_built() and torch.cuda.is_current_stream_capturing():
            self._captured_options = fixed_options(self.param_groups)
        if len(self._groups) == 1 and self._buffers.is_whole:
            norm = self._update_group(0, self._max_grad_norm)
        else:
            norm, factor = self._buffers.clipping(self._max_grad_norm)
            for index in range(len(self._groups)):
                self._update_group(index, math.inf, factor)
            if self._buffers.shadow is not None:
                self._buffers.grad.zero_()
        self._averages.follow(self._buffers.param, self._groups[0].step, norm)
        self._averages.mirror()
        self.note_change()
        return norm

    def _update_group(self, index: int, max_grad_norm: float, factor: Tensor | None = None) -> Tensor:
        group, options = self._groups[index], self.param_groups[index]
        return self._buffers.update(
            group.part,
            group.step,
            group.learning_rate,
            factor=factor,
            betas=options["betas"],
            eps=options["eps"],
            weight_decay=options["weight_decay"],
            max_grad_norm=max_grad_norm,
            ema_decay=next(iter(self._averages.decays), 0.0),
            ema_warmup=self._averages.warmup,
        )

    # What may happen to the network between two updates.

    def _check(self) -> None:
        """Raises ValueError where an update would not reach the network, or would not be what was asked for."""
        for watch in self._watches:
            watch.check()
        self._seen = check_groups(self.param_groups, self.parameters, self._seen)
        if self._captured_options not in (None, found := fixed_options(self.param_groups)):
            raise ValueError(
                "fastdmd.AdamWEMA: expected lr alone to change under a captured graph, got other options: "
                f"{found} instead of {self._captured_options}"
            )

    def _adopt(self) -> None:
        """Low-precision weights that somebody changed in place become master weights; equal ones keep their digits."""
        if self._buffers.shadow is not None:
            self._versions = adopt(self._masters, self.parameters, self._versions)

    # Saving and copying.

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, by parameter name, whatever the layout of the buffers."""
        return tree_map_only(Tensor, torch.clone, self.state_views())

    def state_views(self) -> dict[str, Any]:
        """`state_dict()` whose tensors are the optimizer's own: no second copy on a device; to be read, and at once."""
        self._adopt()
        kinds = self._buffers.by_name(self._names, self._masters)
        return {
            "num_updates": self.num_updates,
            "steps": [group.step for group in self._groups],
            "param_groups": list(map(without_parameters, self.param_groups)),
            **kinds,
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over a state, the options of its groups included, as torch's optimizers do.

        The average's buffers become those that the network has by now. Raises TypeError or ValueError, before anything
        has changed, where the state is of another network, has other groups, or is not one that could have been saved.
        """
        self._check()
        kinds = self._buffers.by_name(self._names, self._masters)
        options = check_state(state, kinds, self.param_groups)
        for kind, own in kinds.items():
            for name, view in own.items():
                view.copy_(state[kind][name])
        for group, step, changes, saved in zip(self._groups, state["steps"], self.param_groups, options, strict=True):
            group.step.copy_(step)
            changes.update(without_parameters(saved))
        self.num_updates = state["num_updates"]
        if self._buffers.shadow is not None:
            self._buffers.shadow.copy_(self._buffers.param)
        self._averages.mirror()
        self.note_change()

    def note_change(self) -> None:
        """The weights have other values: a graph from before raises in its backward pass."""
        torch.autograd.graph.increment_version([*self.parameters, *self._averages.parameters])
        self._versions[:] = [own._version for own in self.parameters]  # in place: torch 2.11 traces no assignment

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles. Hooks and what schedulers hang on `step` stay behind, as with torch's optimizers."""
        self._check()
        self._adopt()
        self._gradients.settle()
        return {name: own for name, own in vars(self).items() if name not in NOT_COPIED and not name.endswith("_hooks")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._link()
