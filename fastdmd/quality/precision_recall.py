"""Improved precision and recall: how far two sets of images lie on each other's manifolds."""

from __future__ import annotations

import torch
from torch import Tensor

NUM_NEIGHBOURS = 3
CHUNK = 1000  # rows of distances at a time: 40 MB against 10,000 images


def precision_recall(real: Tensor, fake: Tensor, *, num_neighbours: int = NUM_NEIGHBOURS) -> tuple[float, float]:
    """The share of fake images on the manifold of the real ones, and the share of real images on that of the fake ones.

    The manifold of a set is the union of balls around its images, each of which reaches to the nearest other image but
    `num_neighbours - 1`: ``precision = |{f : |f - r| <= radius(r) for some r}| / |fake|``, and recall is the same with
    sides exchanged. Distances are of differences, not of products: that of equal images is 0, and ties are exact.

    Args:
        real, fake: features [N, D] and [M, D], finite, of one floating-point dtype.
        num_neighbours: at least 1; three, as published.

    Raises ValueError unless both have D features of more than `num_neighbours` images.
    Kynkäänniemi et al. 2019, equations (1) and (2).
    """
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1]:
        raise _error("features (N, D) and (M, D)", f"{tuple(real.shape)} and {tuple(fake.shape)}")
    if not 1 <= num_neighbours < min(len(real), len(fake)):
        raise _error(
            f"more than {num_neighbours} images a side, for as many neighbours and 1 at least",
            f"{len(real)} and {len(fake)}",
        )
    scale = torch.maximum(real.abs().max(), fake.abs().max())
    if scale > 0:  # squares of what is beyond 1e19 or below 1e-19 leave float32
        real, fake = real / scale, fake / scale
    real_radii, fake_radii = _radii(real, num_neighbours), _radii(fake, num_neighbours)
    is_covered = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    num_precise = 0
    for images, radii in zip(fake.split(CHUNK), fake_radii.split(CHUNK), strict=True):
        distances = _distances(images, real)  # [B, N]
        num_precise += int((distances <= real_radii).any(1).sum())
        is_covered |= (distances <= radii[:, None]).any(0)
    return num_precise / len(fake), int(is_covered.sum()) / len(real)


def _radii(features: Tensor, num_neighbours: int) -> Tensor:
    """Distance [N] of each image to its neighbour of that number; the nearest to an image is itself, or its equal."""
    return torch.cat([_distances(part, features).kthvalue(num_neighbours + 1).values for part in features.split(CHUNK)])


def _distances(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _error(expected: str, got: str) -> ValueError:
    return ValueError(f"fastdmd.precision_recall: expected {expected}, got {got}")
