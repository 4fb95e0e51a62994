"""Nearest real images: whether samples are copies of them."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional as F

MOST_PIXELS = 16  # a side, of what is compared where there is no feature network
CHUNK = 100  # rows of distances at a time


@dataclasses.dataclass(frozen=True)
class Neighbours:
    """The nearest real images of some samples, and how near they are beside what is usual among real ones."""

    indices: Tensor  # [N, K] int64, of real images, the nearest first
    distances: Tensor  # [N, K]
    usual: float  # median over real images of the distance to the nearest other one

    @property
    def ratio(self) -> float:
        """The median over samples of the distance to the nearest real image, in `usual`: 0 of copies, about 1 of other
        images of the same kind; NaN where real images repeat themselves."""
        return self.distances[:, 0].median().item() / self.usual if self.usual > 0 else float("nan")


def nearest(samples: Tensor, real: Tensor, num_neighbours: int = 3) -> Neighbours:
    """Of features `[N, D]` of samples and `[M, D]` of real images, by Euclidean distance.

    Raises ValueError unless both have D features, finite ones, of at least a sample and `num_neighbours + 1` real
    images.
    """
    if samples.ndim != 2 or real.ndim != 2 or samples.shape[1] != real.shape[1]:
        raise _error("features (N, D) and (M, D)", f"{tuple(samples.shape)} and {tuple(real.shape)}")
    if len(samples) < 1 or not 1 <= num_neighbours < len(real):
        raise _error(f"a sample and more than {num_neighbours} real images", f"{len(samples)} and {len(real)}")
    if not (samples.isfinite().all() and real.isfinite().all()):
        raise _error("finite features", "NaN or infinity")
    distances, indices = _least(samples, real, num_neighbours)
    others, _ = _least(real[:: max(1, len(real) // 500)], real, 2)  # the nearest to an image is itself
    return Neighbours(indices, distances, others[:, 1].median().item())


def pixels(images: Tensor) -> Tensor:
    """Images `[N, C, H, W]` as features `[N, D]`: their values, made small (at most 16x16)."""
    _, _, H, W = images.shape
    return F.adaptive_avg_pool2d(images.float(), (min(H, MOST_PIXELS), min(W, MOST_PIXELS))).flatten(1)


def _least(samples: Tensor, real: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Distances and indices `[N, num]`; distances are of differences, so that that of equal images is 0."""
    parts = [
        torch.cdist(part, real, compute_mode="donot_use_mm_for_euclid_dist").topk(num, largest=False)
        for part in samples.split(CHUNK)
    ]
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])


def _error(expected: str, got: str) -> ValueError:
    return ValueError(f"fastdmd.neighbours: expected {expected}, got {got}")
