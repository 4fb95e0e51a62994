"""What is done about NaN and infinity in a turn: decided on the device, which the host does not wait for."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

NanPolicy = Literal["skip", "stop"]

# What the losses of a turn are made of, in the order in which it is made.
SEEN = ("real image", "generated image", "teacher's output", "fake score's output")
NUM_NEEDED = 2  # of these; where teacher or fake score are broken for an image, a loss leaves that out


class Fault(NamedTuple):
    """What was not finite, and the iteration that made it, the first of which is 1."""

    iteration: int
    name: str

    def __str__(self) -> str:
        return f"NaN or infinity in {self.name}, iteration {self.iteration}"


class Guard:
    """Shared by the turns of one model: the iteration, and whether a fault has ended it.

    With `stops`, after the first fault no update moves anything, however late the host comes to know; else updates with
    a fault are left out, one by one.
    """

    def __init__(self, device: torch.device, *, stops: bool = False):
        self.stops = stops
        self.iteration = torch.zeros((), dtype=torch.int64, device=device)  # the index of the current one
        self.is_halted = torch.zeros((), dtype=torch.bool, device=device)

    def begin(self, iteration: int) -> None:
        self.iteration.fill_(iteration)


def marks(*seen: Tensor | None) -> Tensor:
    """Of what there is of `SEEN`, in its order, float32 `[len(SEEN)]`: NaN for one that is not finite, else zero."""
    nothing = torch.zeros((), device=next(x.device for x in seen if x is not None))
    return torch.stack([nothing if x is None else mark(x) for x in seen])


def mark(x: Tensor) -> Tensor:
    """Float32, 0-dim: zero, or NaN where something of it is not finite."""
    largest = torch.linalg.vector_norm(x.detach(), math.inf)
    return (largest - largest).float()  # torch.compile takes 0 * NaN for 0
