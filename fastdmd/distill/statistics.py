"""What a generator's images look like, and how the fake score knows them: a few reductions, on their device."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdmd.saved import require_tensors, take

SATURATED = 0.95  # |x| from which a pixel counts as saturated: a black or a white with a little noise is
LEVELS = (0.2, 1.0, 5.0)  # sigma: where bins of noise levels meet, each a part of what an image is made of
MOST_PIXELS = 8  # a side, of the images whose means are kept by class

IMAGE_STATISTICS = ("brightness", "contrast", "spread", "saturated", "excess")
BINS = (
    f"below_{LEVELS[0]:g}",
    *(f"{low:g}_{high:g}" for low, high in zip(LEVELS[:-1], LEVELS[1:], strict=True)),
    f"above_{LEVELS[-1]:g}",
)
COMPARISONS = (*(f"disagreement_{name}" for name in BINS), *(f"fake_error_{name}" for name in BINS))
TURN_STATISTICS = IMAGE_STATISTICS + COMPARISONS


@torch.no_grad()
def turn_statistics(x_gen: Tensor, comparisons: list[Tensor]) -> Tensor:
    """Of a generator turn, for its tally: sums and weights, `[2, 13]`, in the order of `TURN_STATISTICS`.

    `comparisons` are those of the parts of the batch `x_gen`; none where a method denoises in another way.
    """
    images = image_statistics(x_gen)
    compared = torch.stack(comparisons).sum(0) if comparisons else images.new_zeros(2, len(COMPARISONS))
    return torch.cat([torch.stack([images, torch.ones_like(images)]), compared], dim=1)


def image_statistics(x: Tensor) -> Tensor:
    """Of images `[B, C, H, W]`, float32 `[5]`, in the order of `IMAGE_STATISTICS`.

    brightness `mean(x)`; contrast, the mean over images of the standard deviation over pixels; spread, the root of the
    mean over pixels of the variance over images, NaN of one image; saturated, the share of values with `|x| > 0.95`;
    excess `mean(max(|x| - 1, 0))`.
    """
    x = x.float()
    size = x.abs()
    spread = x.var(0).mean().sqrt() if len(x) > 1 else x.new_full((), torch.nan)
    return torch.stack(
        [
            x.mean(),
            x.flatten(1).std(1, correction=0).mean(),
            spread,
            (size > SATURATED).float().mean(),
            (size - 1).relu().mean(),
        ]
    )


@torch.no_grad()
def comparison(x_gen: Tensor, D_real: Tensor, D_fake: Tensor, sigma: Tensor) -> Tensor:
    """How the fake score compares with the teacher where both denoise generated images; by bins of noise levels.

    Per image, `mean|D_real - D_fake| / mean|x_gen - D_real|`, the disagreement, and `mean|x_gen - D_fake| / mean|x_gen
    - D_real|`, the fake score's error in the teacher's, less than 1 if it knows these images better. Their sums over
    the images of each bin, and the numbers of these: float32 `[2, 8]`, in the order of `COMPARISONS`. Images `[B, C, H,
    W]`, `sigma` `[B]`. An image for which a ratio is not finite counts in no bin.
    """

    def distance(a: Tensor, b: Tensor) -> Tensor:
        return (a.float() - b.float()).abs().mean(dim=(1, 2, 3))

    ratios = torch.stack([distance(D_real, D_fake), distance(x_gen, D_fake)]) / distance(x_gen, D_real)  # [2, B]
    place = torch.stack([sigma >= level for level in LEVELS]).sum(0)  # [B]
    members = (place[:, None] == torch.arange(len(BINS), device=sigma.device)) & ratios.isfinite().all(0)[:, None]
    sums = ratios.nan_to_num(0, 0, 0) @ members.float()  # [2, 4]
    return torch.stack([sums.flatten(), members.sum(0).float().repeat(2)])


@dataclasses.dataclass(frozen=True)
class ClassFigures:
    """Of images by class, made small: how many, their means, and the variance within a class."""

    counts: Tensor  # [K]
    means: Tensor  # [K, D]; zero where there are none
    variance_within: float  # unbiased, summed over D, of images made at a time; NaN where no class had two of them

    @property
    def separation(self) -> float:
        """The share of the variance that is between classes, unbiased: from 0, or a little less, to 1; NaN of none."""
        present, total = self.counts > 0, self.counts.sum()
        centre = self.counts @ self.means / total
        between = self.counts @ (self.means - centre).square().sum(1)
        between = (between - (present.sum() - 1) * self.variance_within) / total
        return (between / (between + self.variance_within)).item()


class ClassSums:
    """Sums of images by class, made small (at most 8x8), on their device."""

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int, device: torch.device):
        C, H, W = image_shape
        self._size = min(H, MOST_PIXELS), min(W, MOST_PIXELS)
        self._classes = torch.arange(num_classes, device=device)
        num_values = C * self._size[0] * self._size[1]
        # In float64, as TF32 would round what a small variance is made of.
        self._sums = torch.zeros(num_classes, num_values + 1, dtype=torch.float64, device=device)  # values, images
        self._within = torch.zeros(2, dtype=torch.float64, device=device)  # squares within classes, degrees of freedom

    @torch.no_grad()
    def add(self, images: Tensor, class_labels: Tensor) -> None:
        """Images `[B, C, H, W]` with labels int64 `[B]`; those that are not finite are left out."""
        small = F.adaptive_avg_pool2d(images.float(), self._size).flatten(1).double()  # [B, D]
        rows = torch.cat([small, torch.ones_like(small[:, :1])], 1)
        rows = torch.where(rows.isfinite().all(1, keepdim=True), rows, 0)
        members = (self._classes[:, None] == class_labels).double()  # [K, B]; a product, as atomic sums have no order
        sums = members @ rows
        self._sums += sums
        means = sums[:, :-1] / sums[:, -1:].clamp(min=1)
        apart = rows[:, :-1] - members.T @ means * rows[:, -1:]  # zero of what is left out
        self._within += torch.stack([apart.square().sum(), (sums[:, -1] - 1).clamp(min=0).sum()])

    def state_dict(self) -> dict[str, Tensor]:
        """Its own tensors, to be read at once."""
        return {"sums": self._sums, "within": self._within}

    def load_state_dict(self, state: Mapping[str, Tensor], place: str = "class_sums") -> None:
        """Raises ValueError, naming the entry in `place`, for what no sums of such images come to."""
        own = self.state_dict()
        require_tensors(place, own, state)
        for name, amounts in (("sums", state["sums"][:, -1]), ("within", state["within"])):
            if not state[name].isfinite().all() or amounts.lt(0).any():
                raise ValueError(f"expected {place}.{name} finite, of counts not negative, got other numbers")
        take(place, own, state)

    def clear(self) -> None:
        self._sums.zero_()
        self._within.zero_()

    def exchanged(self) -> Tensor:
        """What other processes have to know of it, float64 `[n]`."""
        return torch.cat([self._sums.flatten(), self._within])

    def take_exchanged(self, found: Tensor, rank: int) -> None:
        """Becomes the sum over processes of what they have, `[ranks, n]`, in the first; others begin anew."""
        sums, within = (found.sum(0) if rank == 0 else found.new_zeros(found.shape[1])).split([self._sums.numel(), 2])
        self._sums.copy_(sums.view_as(self._sums))
        self._within.copy_(within)

    def read(self, least_images: int = 1) -> ClassFigures | None:
        """Waits for the device; the next reading starts from here. None, and nothing starts, of fewer images."""
        sums = self._sums.to("cpu", copy=True)
        counts = sums[:, -1]
        if counts.sum() < least_images:
            return None
        squares, degrees = self._within.tolist()
        self.clear()
        means = sums[:, :-1] / counts.clamp(min=1)[:, None]
        return ClassFigures(counts, means, squares / degrees if degrees else torch.nan)
