"""Regression to images of the teacher (Yin et al. 2024, DMD): the loss, and the pairs that an iteration draws."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from fastdmd.distill.draws import Draws
from fastdmd.distill.gan import AdversarialDraws

PairBatches = Callable[[int], tuple[Tensor, Tensor, Tensor | None]]  # noise, images and labels of an iteration


@dataclasses.dataclass(frozen=True)
class PairDraws(Draws):
    """With pairs of noise and what the teacher makes of it."""

    pair_noise: Tensor  # [B, C, H, W]
    pair_images: Tensor  # [B, C, H, W]
    pair_labels: Tensor | None  # int64 [B]


@dataclasses.dataclass(frozen=True)
class AdversarialPairDraws(PairDraws, AdversarialDraws):
    """With both."""


PAIRED: dict[type[Draws], type[PairDraws]] = {Draws: PairDraws, AdversarialDraws: AdversarialPairDraws}


def regression_loss(images_gen: Tensor, images: Tensor) -> Tensor:
    """`mean((G(noise) - image)^2)` of pairs of noise and image, differentiable in `images_gen`, which is `G(noise)`.

    Yin et al. 2024, DMD, section 3.3; their distance is LPIPS, this one needs no other network. Both are
    `[B, C, H, W]`, 0-dim what it returns. Raises ValueError for two that differ in shape.
    """
    if images_gen.shape != images.shape:
        expected, got = tuple(images.shape), tuple(images_gen.shape)
        raise ValueError(f"fastdmd.regression_loss: expected images_gen of shape {expected}, got {got}")
    return F.mse_loss(images_gen, images)


def with_pairs(draws: Callable[[int], Draws], pairs: PairBatches) -> Callable[[int], Draws]:
    """The draws of every iteration with as many pairs as it has images, a function of whatever `pairs` is one of."""

    def paired(step: int) -> Draws:
        own, (noise, images, labels) = draws(step), pairs(step)
        return PAIRED[type(own)](**vars(own), pair_noise=noise, pair_images=images, pair_labels=labels)

    return paired
