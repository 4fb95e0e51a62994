"""What the turns read and write: the random inputs of an iteration and its images, whole and in parts."""

from __future__ import annotations

import dataclasses
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from fastdmd.distill.ahead import Ahead, parts
from fastdmd.distill.draws import Draws, keys_of
from fastdmd.distill.starts import copy_tensors, map_tensors


@dataclasses.dataclass(frozen=True)
class Part:
    """Rows of the static buffers that one backward pass serves."""

    draws: Draws
    x_gen: Tensor  # [B / accumulation steps, C, H, W]


class Buffers:
    """Static buffers of one shape, and views of their parts."""

    def __init__(self, draws: Draws, num_parts: int, ratio: int):
        self._form = _form(draws, num_parts, ratio)
        self.inputs = map_tensors(torch.empty_like, draws)
        self.x_gen = torch.empty_like(draws.noise)  # [B, C, H, W]
        self._rows = parts(len(draws.noise), num_parts)
        self.parts = [Part(_part_of(self.inputs, rows), self.x_gen[rows]) for rows in self._rows]
        self.ahead = Ahead(draws, ratio)

    def fit(self, draws: Draws, num_parts: int, ratio: int) -> bool:
        return self._form == _form(draws, num_parts, ratio)

    def load(self, draws: Draws) -> None:
        copy_tensors(draws, self.inputs)
        for part, rows in zip(self.parts[1:], self._rows[1:], strict=True):
            for name, key in keys_of(part.draws).items():  # of another first sample
                key.copy_(getattr(draws, name))
                key[3].add_(rows.start)


def _part_of(draws: Draws, rows: slice) -> Draws:
    """Views of some rows, and room for keys of their own if they are not the first."""
    keys = keys_of(draws)
    if rows.start > 0:
        keys = {name: torch.empty_like(key) for name, key in keys.items()}
    return map_tensors(itemgetter(rows), draws, **keys)


def _form(draws: Draws, num_parts: int, ratio: int) -> tuple[Any, ...]:
    """What buffers are made for."""
    shapes = {name: value.shape for name, value in vars(draws).items() if isinstance(value, Tensor)}
    return type(draws), shapes, num_parts, ratio
