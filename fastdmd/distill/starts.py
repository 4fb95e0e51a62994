"""What the images of an iteration are made from, and how: noise, the sampler up to a level, or noised real images."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastdmd.sampling import Generator


@dataclasses.dataclass(frozen=True)
class Start:
    """What a generator makes the images of an iteration from; of n steps, sample i of a batch at the step i mod n."""

    noise: Tensor  # [B, C, H, W], standard normal
    class_labels: Tensor | None  # int64 [B]
    _: dataclasses.KW_ONLY
    step_noise: Tensor | None = None  # [B, num_steps - 1, C, H, W], fresh noise on the way to that step
    start_images: Tensor | None = None  # [B, C, H, W], real ones, which are noised instead, but for the first step

    @property
    def is_of_one_step(self) -> bool:
        return self.step_noise is None and self.start_images is None

    def watched(self, num_steps: int) -> slice:
        """The samples whose images tell how a generator of so many steps samples: those of the last step, or of the
        first where all others start from real images."""
        return slice(0 if self.start_images is not None else num_steps - 1, None, num_steps)


def make_images(generator: Generator, start: Start) -> Tensor:
    """`x_gen = D(x_k, sigma_k)`, `[B, C, H, W]`, k = i mod n for sample i, differentiable in this evaluation alone.

    `x_k` is what sampling arrives at (backward simulation, Yin et al. 2024, DMD2, section 4.5), or beyond the first
    step `start_images + sigma_k * noise`. Raises ValueError for a batch that the n steps of the generator do not
    divide, and for `step_noise` of another number of steps.
    """
    num_steps, labels = generator.num_evaluations, start.class_labels
    if num_steps == 1:
        return generator.denoise(generator.sigmas[0] * start.noise, generator.sigmas[0], labels)
    if len(start.noise) % num_steps:
        raise ValueError(f"fastdmd.make_images: expected a batch that {num_steps} steps divide, got {len(start.noise)}")
    with torch.no_grad():
        arrived = _noised(generator, start) if start.start_images is not None else _simulated(generator, start)
        levels = [x.new_full(x.shape[:1], sigma) for x, sigma in zip(arrived, generator.sigmas, strict=True)]
    return generator.denoise(_interleaved(arrived), _interleaved(levels), labels)


def _noised(generator: Generator, start: Start) -> list[Tensor]:
    """Of each step its samples' `x_k`, `[B / n, C, H, W]`: noised real images, but of the first step noise alone."""
    assert start.start_images is not None
    (first, *noises), (_, *images) = (_by_step(x, generator) for x in (start.noise, start.start_images))
    further = zip(generator.sigmas[1:], noises, images, strict=True)
    return [generator.sigmas[0] * first, *(sigma * noise + image for sigma, noise, image in further)]


def _simulated(generator: Generator, start: Start) -> list[Tensor]:
    """Of each step its samples' `x_k`, `[B / n, C, H, W]`, by way of the steps before it."""
    generator.check_step_noise(start.noise, start.step_noise)
    assert start.step_noise is not None
    noises, fresh = _by_step(start.noise, generator), _by_step(start.step_noise, generator)
    labels = None if start.class_labels is None else _by_step(start.class_labels, generator)
    going = [
        generator.sigmas[0] * noise for noise in noises
    ]  # at one level all of them, of this step and of later ones
    arrived = []
    for step, (sigma, sigma_next) in enumerate(itertools.pairwise(generator.sigmas)):
        arrived.append(going[0])
        labels_on = None if labels is None else _interleaved(labels[step + 1 :])
        images = generator.denoise(_interleaved(going[1:]), sigma, labels_on).unflatten(0, (-1, len(going) - 1))
        # In this order the sum is laid out as the noise is, at every level: compiled networks serve them all.
        going = [sigma_next * fresh[k][:, step] + x for k, x in enumerate(images.unbind(1), start=step + 1)]
    return [*arrived, *going]


def _by_step(x: Tensor, generator: Generator) -> list[Tensor]:
    """The samples of each step, `[B / n, ...]`."""
    return [*x.unflatten(0, (-1, generator.num_evaluations)).unbind(1)]


def _interleaved(xs: Sequence[Tensor]) -> Tensor:
    """Sample i is of the entry i mod len(xs)."""
    return torch.stack([*xs], 1).flatten(0, 1)


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
