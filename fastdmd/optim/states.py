"""What an optimizer on flat buffers takes from outside: options and saved states, looked at before any is used."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from fastdmd.ops.adamw_ema import check_options
from fastdmd.optim.groups import check_count

OPTIONS = ("lr", "betas", "eps", "weight_decay", "learning_rate_factor")


class NoState(collections.defaultdict[Tensor, Any]):
    """Where torch keeps moments; `torch.distributed.checkpoint` looks for some, and makes a step if there are none."""

    def __bool__(self) -> bool:
        raise ValueError("fastdmd.AdamWEMA: expected state_dict(), got a look at `state`: moments are in flat buffers")

    def __missing__(self, key: object) -> bool:
        return bool(self)


class FlatOptimizer(torch.optim.Optimizer):
    """One of torch's optimizers, whose groups are fixed; refuses what would be without effect on flat buffers."""

    def __init__(self, params: Sequence[dict[str, Any]], defaults: dict[str, Any]):
        self._num_groups = len(params)
        super().__init__(params, defaults)
        self.state = NoState()

    @property
    def peak_learning_rate(self) -> float:
        """`lr` of the groups; setting it sets all of them."""
        return self.param_groups[0]["lr"]

    @peak_learning_rate.setter
    def peak_learning_rate(self, value: float) -> None:
        for options in self.param_groups:
            options["lr"] = value

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only for torch's own constructor: the buffers are laid out once. Raises ValueError after that."""
        if len(self.param_groups) == self._num_groups:
            raise ValueError("fastdmd.AdamWEMA: expected its groups at construction, got add_param_group")
        self.param_groups.append({**self.defaults, **param_group})

    def _refuse_hook(self, *_, **__) -> NoReturn:
        raise NotImplementedError("fastdmd.AdamWEMA: expected hooks on step alone, got one on its state_dict")

    register_state_dict_pre_hook = register_state_dict_post_hook = _refuse_hook
    register_load_state_dict_pre_hook = register_load_state_dict_post_hook = _refuse_hook

    def __copy__(self) -> NoReturn:
        raise TypeError("fastdmd.AdamWEMA: expected copy.deepcopy, got copy.copy: two would move one network")


def check_groups(groups: Sequence[Mapping[str, Any]], parameters: Sequence[Tensor], seen: list | None) -> list:
    """The options of `param_groups`, for the next call as `seen`: looked at where they differ from those.

    Raises TypeError or ValueError for an option that is missing or cannot be meant, and for other parameters.
    """
    members = itertools.chain.from_iterable(options["params"] for options in groups)
    if [*map(id, members)] != [*map(id, parameters)]:
        raise ValueError("fastdmd.AdamWEMA: expected the parameters of its groups as at construction, got others")
    options = list(map(_options, groups))
    now = [(tuple(map(type, values)), values) for values in options]  # a tensor equals a number, and would wait for it
    if now != seen:
        for values in options:
            check_options("AdamWEMA", **dict(zip(OPTIONS, values, strict=True)))
    return now


def _options(group: Mapping[str, Any]) -> tuple:
    return tuple(group.get(name) for name in OPTIONS)


def fixed_options(groups: Sequence[Mapping[str, Any]]) -> list[tuple]:
    """Those that are numbers in a graph."""
    return [(options["betas"], options["eps"], options["weight_decay"]) for options in groups]


def without_parameters(group: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a group, as a state holds them."""
    return {name: value for name, value in group.items() if name != "params"}


def check_state(
    state: Mapping[str, Any], own: Mapping[str, Mapping[str, Tensor]], param_groups: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """The options of the groups in a state, which has what `own` has, number for number; TypeError or ValueError."""

    def fail(expected: str, got: object) -> None:
        raise ValueError(f"fastdmd.AdamWEMA: expected {expected}, got {got}")

    if not isinstance(state, Mapping):
        fail("a state as state_dict() returns it", type(state).__name__)
    if others := {"num_updates", "steps", *own} ^ (state.keys() - {"param_groups"}):
        fail("the entries of this optimizer", f"others: {sorted(map(str, others))}")
    check_count("num_updates", state["num_updates"], least=0)

    num_groups = len(param_groups)
    groups = state.get("param_groups", [{}] * num_groups)  # which states did not always have
    for name, entries, entry_type in (("steps", state["steps"], Tensor), ("param_groups", groups, Mapping)):
        if not isinstance(entries, (list, tuple)) or not all(isinstance(entry, entry_type) for entry in entries):
            fail(f"{name} to be a list", f"{entries!r:.60}")
        if len(entries) != num_groups:
            fail(f"{num_groups} parameter groups", f"{len(entries)} in {name}")
    for step in state["steps"]:
        if step.shape != (1,) or step.dtype != torch.int64 or step.lt(0).any():
            fail(
                "steps of shape (1,), whole and not negative",
                f"{step.dtype} {tuple(step.shape)}: {step.tolist()!r:.60}",
            )
    for options, saved in zip(param_groups, groups, strict=True):
        check_options("AdamWEMA", **dict(zip(OPTIONS, _options({**options, **saved}), strict=True)))

    for kind, views in own.items():
        if not isinstance(state[kind], Mapping):
            fail(f"{kind} by parameter name", type(state[kind]).__name__)
        for name in views | state[kind]:
            view, got = views.get(name), state[kind].get(name)
            if got is not None and (not isinstance(got, Tensor) or not got.is_floating_point()):
                fail(
                    f"{kind} of {name} to be a floating point tensor",
                    got.dtype if isinstance(got, Tensor) else f"{got!r:.60}",
                )
            shape, got_shape = (None if tensor is None else tuple(tensor.shape) for tensor in (view, got))
            if shape != got_shape:
                fail(f"{kind} of {name} of shape {shape}", got_shape)
            if not got.isfinite().all() or (kind == "exp_avg_sq" and got.lt(0).any()):
                fail(f"{kind} of {name} finite" + ", not negative" * (kind == "exp_avg_sq"), "other values")
    return groups
