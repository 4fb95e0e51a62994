"""States that were saved, looked at entry by entry before anything of them is taken over: they may be of anything."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdmd.shards import local


class Rule(NamedTuple):
    """What an entry is to be."""

    text: str
    allows: Callable[[Any], bool]

    def or_none(self) -> Rule:
        return Rule(f"{self.text}, or none", lambda value: value is None or self.allows(value))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)  # no bool


COUNT = Rule("a whole number >= 0", lambda value: type(value) is int and 0 <= value < 2**63)
NUMBER = Rule("a number", _is_number)
AMOUNT = Rule("a number >= 0", lambda value: _is_number(value) and 0 <= value < math.inf)
MAPPING = Rule("entries by name", lambda value: isinstance(value, Mapping))
LIST = Rule("a list", lambda value: isinstance(value, (list, tuple)))
FIGURES = Rule(
    "numbers by name",
    lambda value: isinstance(value, Mapping) and all(number is None or _is_number(number) for number in value.values()),
)


def one_of(*choices: Any) -> Rule:
    return Rule(f"out of {', '.join(map(str, choices))}", lambda value: value in choices)


def list_of(rule: Rule) -> Rule:
    return Rule(f"a list of {rule.text}", lambda value: LIST.allows(value) and all(map(rule.allows, value)))


def require(place: str, state: Any, rules: Mapping[str, Rule]) -> None:
    """Raises ValueError for a state with other entries than these, or one that breaks its rule, by its name."""
    if not isinstance(state, Mapping) or state.keys() != rules.keys():
        got = ", ".join(map(str, state)) if isinstance(state, Mapping) else _shown(state)
        raise ValueError(f"expected {place} to have {', '.join(rules)}, got {got:.200}")
    for name, rule in rules.items():
        if not rule.allows(state[name]):
            raise ValueError(f"expected {place}.{name} to be {rule.text}, got {_shown(state[name])}")


def _shown(value: Any) -> str:
    """On one line."""
    return " ".join(repr(value).split())[:60]


def require_tensors(place: str, own: Mapping[str, Tensor], state: Any) -> None:
    """Raises ValueError where a state has other tensors than these, by name, dtype, shape, or with NaN among them."""
    require(place, state, dict.fromkeys(own, Rule("a tensor", lambda value: isinstance(value, Tensor))))
    for name, tensor in own.items():
        expected, got = (f"{x.dtype} {tuple(x.shape)}" for x in (tensor, state[name]))
        if expected != got:
            raise ValueError(f"expected {place}.{name} of {expected}, got {got}")
        if local(state[name]).isnan().any():
            raise ValueError(f"expected {place}.{name} to be numbers, got NaN")


@torch.no_grad()
def take(place: str, own: Mapping[str, Tensor], state: Any) -> None:
    """Copies a state into these tensors. Raises as `require_tensors` does, before it has changed any."""
    require_tensors(place, own, state)
    for name, tensor in own.items():
        local(tensor).copy_(local(state[name]))
