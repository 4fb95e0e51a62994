"""Parameter groups: which parameters of a network, by regular expressions, have options of their own; their rate."""

from __future__ import annotations

import dataclasses
import math
import numbers
import re
from collections.abc import Mapping

from torch import Tensor, nn

from fastdmd.ops.adamw_ema import check_options


@dataclasses.dataclass
class Group:
    """A part of the flat buffers with options of its own, which are in `param_groups`."""

    part: slice
    step: Tensor  # int64 [1]
    learning_rate: Tensor  # 0-dim, that of the next update


def members(network: nn.Module, groups: Mapping[str, Mapping[str, float]]) -> list[tuple[list[str], Mapping]]:
    """The names of the trained parameters of each group, and what differs there. TypeError or ValueError."""
    for pattern, changes in groups.items():
        if unknown := changes.keys() - {"weight_decay", "learning_rate_factor"}:
            raise ValueError(
                f"fastdmd.AdamWEMA: expected groups with weight_decay or learning_rate_factor, got {sorted(unknown)}"
            )
        check_options("AdamWEMA", **{f"{name} of {pattern!r}": value for name, value in changes.items()})
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"fastdmd.AdamWEMA: expected a regular expression, got {pattern!r}: {error}") from error
    found: dict[str, list[str]] = {pattern: [] for pattern in (*groups, "")}  # the empty pattern matches the rest
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            found[next(pattern for pattern in found if re.search(pattern, name))].append(name)
    if idle := [pattern for pattern in groups if not found[pattern]]:
        raise ValueError(
            f"fastdmd.AdamWEMA: expected groups that match trained parameters which no earlier one matches, got {idle}"
        )
    return [(names, groups.get(pattern, {})) for pattern, names in found.items() if names]


def named(network: nn.Module, names: list[str]) -> list[nn.Parameter]:
    parameters = dict(network.named_parameters())
    return [parameters[name] for name in names]


def schedule(update: int, warmup_steps: int, decay_steps: int | None) -> float:
    """The share of the learning rate that the update with this index has, from 0."""
    factor = min(1.0, (update + 1) / warmup_steps) if warmup_steps > 0 else 1.0
    if decay_steps is not None:
        factor *= 0.5 + 0.5 * math.cos(math.pi * min(1.0, update / decay_steps))
    return factor


def check_count(name: str, value: int, *, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"fastdmd.AdamWEMA: expected {name} to be a whole number, got {value!r}")
    if value < least:
        raise ValueError(f"fastdmd.AdamWEMA: expected {name} >= {least}, got {value}")
