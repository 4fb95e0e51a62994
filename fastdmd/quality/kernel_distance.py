"""Kernel distance (KID): how far two sets of images are apart, without bias also where there are few."""

from __future__ import annotations

import torch
from torch import Tensor

NUM_SUBSETS = 50  # of 1,000 images, of 10,000: each image five times
SUBSET_SIZE = 1000


def kernel_distance(
    a: Tensor,
    b: Tensor,
    *,
    random: torch.Generator,
    num_subsets: int = NUM_SUBSETS,
    subset_size: int = SUBSET_SIZE,
) -> float:
    """The unbiased squared maximum mean discrepancy of features, the mean over random subsets of m images a side.

    ``sum_{i != j} (k(a_i, a_j) + k(b_i, b_j)) / (m (m - 1)) - 2 sum_{i, j} k(a_i, b_j) / m^2`` with the cubic kernel
    ``k(x, y) = (x . y / D + 1)^3``, in float64. Around zero, either side of it, for images of one distribution.

    Args:
        a, b: features [N, D] and [M, D], finite.
        random: a generator on the CPU, which draws the subsets, each without replacement.
        num_subsets: at least 1.
        subset_size: m at most, at least 2; as many as the smaller side has, where that is less.

    Raises ValueError for other shapes or numbers, and fewer than two images a side.
    Bińkowski et al. 2018, section 4; customarily shown times 1000, which this is not.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise _error("features (N, D) and (M, D)", f"{tuple(a.shape)} and {tuple(b.shape)}")
    m = min(subset_size, len(a), len(b))
    if m < 2 or num_subsets < 1:
        raise _error(
            "at least 1 subset of at least 2 images a side",
            f"{num_subsets} of {subset_size} out of {len(a)} and {len(b)}",
        )
    total = 0.0
    for _ in range(num_subsets):
        x, y = (side[torch.randperm(len(side), generator=random)[:m]].double() for side in (a, b))
        within = sum(kernel.sum() - kernel.diagonal().sum() for kernel in (_kernel(x, x), _kernel(y, y)))
        total += (within / (m * (m - 1)) - 2 * _kernel(x, y).mean()).item()
    return total / num_subsets


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    base = (x @ y.T).div_(x.shape[1]).add_(1)
    return base * base * base


def _error(expected: str, got: str) -> ValueError:
    return ValueError(f"fastdmd.kernel_distance: expected {expected}, got {got}")
