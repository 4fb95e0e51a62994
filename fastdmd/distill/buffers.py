"""What the turns read and write: the random inputs of an iteration and its images, whole and in parts."""

from __future__ import annotations

import dataclasses
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from fastdmd.distill.ahead import Ahead, parts
from fastdmd.distill.draws import Draws
from fastdmd.distill.starts import copy_tensors, map_tensors


@dataclasses.dataclass(frozen=True)
class Part:
    """Rows of the static buffers that one backward pass serves."""

    draws: Draws
    x_gen: Tensor  # [B / accumulation steps, C, H, W]


class Buffers:
    """Static buffers of one shape, and views of their parts; the step in `inputs` and `parts` is that loaded last."""

    def __init__(self, draws: Draws, num_parts: int, ratio: int):
        self._form = _form(draws, num_parts, ratio)
        self.inputs = map_tensors(torch.empty_like, draws)
        self.x_gen = torch.empty_like(draws.noise)  # [B, C, H, W]
        self.parts = [
            Part(map_tensors(itemgetter(rows), self.inputs), self.x_gen[rows])
            for rows in parts(len(draws.noise), num_parts)
        ]
        self.ahead = Ahead(draws, ratio)

    def fit(self, draws: Draws, num_parts: int, ratio: int) -> bool:
        return self._form == _form(draws, num_parts, ratio)

    def load(self, draws: Draws) -> None:
        copy_tensors(draws, self.inputs)
        if draws.step_index != self.inputs.step_index:
            self.inputs = dataclasses.replace(self.inputs, step_index=draws.step_index)
            self.parts = [
                dataclasses.replace(part, draws=dataclasses.replace(part.draws, step_index=draws.step_index))
                for part in self.parts
            ]


def _form(draws: Draws, num_parts: int, ratio: int) -> tuple[Any, ...]:
    """What buffers are made for."""
    shapes = {name: value.shape for name, value in vars(draws).items() if isinstance(value, Tensor)}
    return type(draws), shapes, num_parts, ratio
