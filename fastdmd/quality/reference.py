"""What a generator's images should look like: figures of real images, or of the teacher's."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from fastdmd.data import Dataset
from fastdmd.diffusion import random_generator
from fastdmd.distill.statistics import IMAGE_STATISTICS, ClassFigures, ClassSums, image_statistics
from fastdmd.quality.evaluation import sample
from fastdmd.sampling import HeunSampler, balanced_labels

LEAST_IMAGES = 8  # per class, on average, that figures by class are of
REAL_IMAGES = 2000  # enough to know each figure to a few percent
TEACHER_IMAGES = 64  # as many evaluations as a few iterations have
REFERENCE_STREAM = 6  # of random_generator: which real images, and the noise behind the teacher's


@dataclasses.dataclass(frozen=True)
class Reference:
    """Figures of images as they should be, by the names of `image_statistics` and `class_figures`."""

    brightness: float
    contrast: float
    spread: float
    excess: float
    class_spread: float | None = None
    class_separation: float | None = None
    class_means: Tensor | None = None  # [K, D]

    @classmethod
    def of(cls, images: Tensor, class_labels: Tensor | None, num_classes: int) -> Reference | None:
        """Of images `[N, C, H, W]`, labels int64 `[N]`; by class where there are eight a class. None if not finite."""
        found = dict(zip(IMAGE_STATISTICS, image_statistics(images).tolist(), strict=True))
        if not all(map(math.isfinite, found.values())):
            return None
        plain = cls(found["brightness"], found["contrast"], found["spread"], found["excess"])
        if class_labels is None or not num_classes:
            return plain
        sums = ClassSums(tuple(images.shape[1:]), num_classes, images.device)
        sums.add(images, class_labels)
        classes = sums.read(LEAST_IMAGES)
        if classes is None or classes.counts.min() == 0:
            return plain
        figures = class_figures(classes)
        return dataclasses.replace(
            plain,
            class_spread=figures["class_spread"],
            class_separation=figures["class_separation"],
            class_means=classes.means,
        )

    @classmethod
    def of_dataset(cls, dataset: Dataset, num_classes: int, seed: int) -> Reference | None:
        """Of 2000 images at most, drawn at random. Its labels have to be those of the network, or none."""
        drawn = torch.randperm(len(dataset), generator=random_generator(seed, 0, stream=REFERENCE_STREAM))
        return cls.of(*dataset.batch(drawn[:REAL_IMAGES]), num_classes)

    @classmethod
    def of_teacher(cls, sampler: HeunSampler, batch_size: int, seed: int) -> Reference | None:
        """Of 64 images that it samples; fewer than eight a class have no figures by class."""
        network = sampler.network
        device = next(network.parameters()).device  # type: ignore[attr-defined]
        shape = TEACHER_IMAGES, *network.image_shape
        noise = torch.randn(shape, device=device, generator=random_generator(seed, 0, device, stream=REFERENCE_STREAM))
        labels = balanced_labels(TEACHER_IMAGES, network.num_classes, device)
        images = [
            sample(sampler, noise[part], None if labels is None else labels[part])
            for part in (slice(start, start + batch_size) for start in range(0, TEACHER_IMAGES, batch_size))
        ]
        return cls.of(torch.cat(images), labels, network.num_classes)


def class_figures(found: ClassFigures, reference: Reference | None = None) -> dict[str, float]:
    """`class_spread` and `class_separation`; with class means to compare with `classes_seen` and `classes_lost`.

    A class is lost if its mean is nearer to that of another class of the reference than to its own.
    """
    figures = {"class_spread": found.variance_within**0.5, "class_separation": found.separation}
    if reference is not None and reference.class_means is not None:
        seen = found.counts >= LEAST_IMAGES / 2
        nearest = torch.cdist(found.means, reference.class_means).argmin(1)
        lost = seen & (nearest != torch.arange(len(nearest)))
        figures |= {"classes_seen": float(seen.sum()), "classes_lost": float(lost.sum())}
    return figures
