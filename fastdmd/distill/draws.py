"""Everything random in an iteration, as a function of seed and iteration."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fastdmd.diffusion import random_generator


@dataclasses.dataclass(frozen=True)
class Draws:
    """Everything random in one iteration, a function of (seed, step)."""

    noise: Tensor  # [B, C, H, W], what the generator starts from
    class_labels: Tensor | None  # int64 [B]
    dm_sigma: Tensor  # [B], noise levels of the generator turn
    dm_noise: Tensor  # [B, C, H, W]
    fake_sigma: Tensor  # [B], noise levels of the guidance turn
    fake_noise: Tensor  # [B, C, H, W]


def draw(shape: tuple[int, ...], num_classes: int, sigmas: Tensor, min_step: int, max_step: int, *,
         seed: int, step: int) -> Draws:  # fmt: skip
    """The random inputs of iteration `step`.

    The generator turn takes its noise level uniformly from `sigmas[min_step .. max_step]`, both included, the
    guidance turn from all of `sigmas`; labels are uniform over `num_classes` (None if 0).
    """
    device = sigmas.device
    generator = random_generator(seed, step, device)

    def normal() -> Tensor:
        return torch.randn(shape, device=device, generator=generator)

    def integers(low: int, high: int) -> Tensor:
        return torch.randint(low, high, shape[:1], device=device, generator=generator)

    return Draws(
        noise=normal(),
        class_labels=integers(0, num_classes) if num_classes else None,
        dm_sigma=sigmas[integers(min_step, max_step + 1)], dm_noise=normal(),
        fake_sigma=sigmas[integers(0, len(sigmas))], fake_noise=normal(),
    )  # fmt: skip
