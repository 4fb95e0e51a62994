"""What a generator's images should look like: figures of real images, or of the teacher's."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from fastdmd import ops
from fastdmd.data import Dataset
from fastdmd.distill.statistics import IMAGE_STATISTICS, ClassFigures, ClassSums, image_statistics
from fastdmd.quality.evaluation import sample
from fastdmd.randomness import Stream, normals, permutation
from fastdmd.sampling import HeunSampler, balanced_labels

LEAST_IMAGES = 8  # per class, on average, that figures by class are of
REAL_IMAGES = 2000  # enough to know each figure to a few percent
REAL_VALUES = 2**26  # that these may have, where images are large
TEACHER_IMAGES = 64  # as many evaluations as a few iterations have


@dataclasses.dataclass(frozen=True)
class Reference:
    """Figures of images as they should be, by the names of `image_statistics` and `class_figures`."""

    brightness: float
    contrast: float
    spread: float
    saturated: float
    excess: float
    classes: ClassFigures | None = None

    @classmethod
    def of(cls, images: Tensor, class_labels: Tensor | None, num_classes: int) -> Reference | None:
        """Of images `[N, C, H, W]`, labels int64 `[N]`; by class where each has eight. None if not finite."""
        found = dict(zip(IMAGE_STATISTICS, image_statistics(images).tolist(), strict=True))
        if not all(map(math.isfinite, found.values())):
            return None
        plain = cls(**found)
        if class_labels is None or not num_classes:
            return plain
        _, C, H, W = images.shape
        sums = ClassSums((C, H, W), num_classes, images.device)
        sums.add(images, class_labels)
        classes = sums.read(LEAST_IMAGES * num_classes)
        if classes is None or classes.counts.min() < LEAST_IMAGES:
            return plain
        return dataclasses.replace(plain, classes=classes)

    @property
    def least_images(self) -> int:
        """That figures by class are of: 8 a class, and so many that chance makes a quarter of the separation."""
        if self.classes is None:
            return 1
        num_classes = len(self.classes.counts)
        chance = math.sqrt(2 * (num_classes - 1))  # at most, of the variance between classes, times images
        return max(LEAST_IMAGES * num_classes, math.ceil(4 * chance / max(self.classes.separation, 1e-3)))

    @classmethod
    def of_dataset(cls, dataset: Dataset, num_classes: int, seed: int) -> Reference | None:
        """Of 2000 images at most, drawn at random. Its labels have to be those of the network, or none."""
        drawn = permutation(len(dataset), seed=seed, stream=Stream.REFERENCE_ORDER)
        num_images = min(REAL_IMAGES, max(TEACHER_IMAGES, REAL_VALUES // math.prod(dataset.image_shape)))
        return cls.of(*dataset.batch(drawn[:num_images]), num_classes)

    @classmethod
    def of_teacher(cls, sampler: HeunSampler, batch_size: int, seed: int) -> Reference | None:
        """Of 64 images that it samples; fewer than eight a class have no figures by class."""
        network = sampler.network
        device = next(network.parameters()).device  # type: ignore[attr-defined]
        rng_key = ops.rng_key(seed, stream=Stream.REFERENCE_NOISE, device=device)
        noise = normals((TEACHER_IMAGES, *network.image_shape), rng_key)
        labels = balanced_labels(TEACHER_IMAGES, network.num_classes, device)
        images = [
            sample(sampler, noise[part], None if labels is None else labels[part])
            for part in (slice(start, start + batch_size) for start in range(0, TEACHER_IMAGES, batch_size))
        ]
        return cls.of(torch.cat(images), labels, network.num_classes)


def class_figures(found: ClassFigures, right: ClassFigures) -> dict[str, float]:
    """`class_spread`, the standard deviation of images made small within their class, and `class_separation`;
    `classes_seen` and `classes_lost`.

    A class is lost if its mean `m` is nearer to the mean `r_j` of another class than to its own, `r_k`, by more than
    chance: `|m - r_k|^2 - |m - r_j|^2` has a standard deviation of `2 |r_k - r_j|` times that of a mean along this
    direction, which is at most the whole `(variance / num_images)^1/2`, and mostly half of it or less.
    """
    seen = found.counts >= LEAST_IMAGES / 2
    squares = torch.cdist(found.means, right.means).square()  # [K, K]
    chance = (found.variance_within / found.counts + right.variance_within / right.counts).sqrt()[:, None]
    nearer = squares.diag()[:, None] - squares > 2 * torch.cdist(right.means, right.means) * chance
    return {
        "class_spread": found.variance_within**0.5,
        "class_separation": found.separation,
        "classes_seen": float(seen.sum()),
        "classes_lost": float((nearer.any(1) & seen).sum()),
    }
