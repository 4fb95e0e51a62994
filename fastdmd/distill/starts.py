"""What the images of an iteration are made from, and how: noise, the sampler up to a level, or noised real images."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastdmd.sampling import Generator


@dataclasses.dataclass(frozen=True)
class Start:
    """What a generator makes the images of an iteration from; of several steps, at the one that the iteration drew."""

    noise: Tensor  # [B, C, H, W], standard normal
    class_labels: Tensor | None  # int64 [B]
    _: dataclasses.KW_ONLY
    step_index: int = 0
    step_noise: Tensor | None = None  # [B, num_steps - 1, C, H, W], fresh noise on the way to that step
    start_images: Tensor | None = None  # [B, C, H, W], real ones, which are noised instead

    @property
    def is_of_one_step(self) -> bool:
        """Whether all iterations have the same step."""
        return self.step_noise is None and self.start_images is None

    def is_watched(self, num_steps: int) -> bool:
        """Whether its images tell how a generator of so many steps samples: those of the last step do, or of the first
        where all others start from real images."""
        return self.step_index == (0 if self.start_images is not None else num_steps - 1)


def make_images(generator: Generator, start: Start) -> Tensor:
    """`x_gen = D(x_i, sigma_i)`, `[B, C, H, W]`, of the step i, differentiable in this last evaluation alone.

    `x_i` is what sampling arrives at (backward simulation, Yin et al. 2024, DMD2, section 4.5), or beyond the first
    step `start_images + sigma_i * noise`. Raises ValueError for a step that the generator does not have, and for
    `step_noise` of another number of steps.
    """
    index = start.step_index
    with torch.no_grad():
        if index > 0 and start.start_images is not None:
            x = generator.sigma(index) * start.noise + start.start_images
        else:
            x = generator.simulate(index, start.noise, start.class_labels, start.step_noise)
    return generator.denoise(index, x, start.class_labels)


Values = TypeVar("Values", bound=Start)


def map_tensors(function: Callable[[Tensor], Tensor], values: Values, **others: Tensor) -> Values:
    """With the function of each tensor in its place, but where there are `others`."""
    found: dict[str, Any] = {name: function(x) for name, x in vars(values).items() if isinstance(x, Tensor)}
    return dataclasses.replace(values, **(found | others))


def copy_tensors(source: Start, target: Start) -> None:
    """Copies to each tensor of the target that of the same name."""
    for name, value in vars(target).items():
        if isinstance(value, Tensor):
            value.copy_(getattr(source, name))


def tensors_of(values: Start) -> list[Tensor]:
    return [value for value in vars(values).values() if isinstance(value, Tensor)]


def start_of(values: Start) -> Start:
    """That much of it."""
    return Start(**{field.name: getattr(values, field.name) for field in dataclasses.fields(Start)})


def same_start(a: Start, b: Start) -> bool:
    """Whether a generator makes the same images of both; on a GPU the comparison waits for the device."""
    for field in dataclasses.fields(Start):
        ours, theirs = getattr(a, field.name), getattr(b, field.name)
        if isinstance(ours, Tensor) != isinstance(theirs, Tensor):
            return False
        if not (torch.equal(ours, theirs) if isinstance(ours, Tensor) else ours == theirs):
            return False
    return True
