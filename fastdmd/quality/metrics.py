"""Measures of sample quality in the features of a network, all of them in one pass over the images."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdmd.data import Dataset, to_uint8
from fastdmd.quality.class_figures import class_variance, classifier_score
from fastdmd.quality.features import ASSETS, DigitClassifier, FeatureNetwork, load_feature_network
from fastdmd.quality.frechet import FeatureStatistics, frechet_distance, frechet_parts
from fastdmd.quality.kernel_distance import kernel_distance
from fastdmd.quality.measurement import Measurement
from fastdmd.quality.precision_recall import NUM_NEIGHBOURS, precision_recall
from fastdmd.randomness import Stream, generator, permutation
from fastdmd.ranks import ALONE, Ranks

__all__ = [
    "ASSETS",
    "Batches",
    "DigitClassifier",
    "FeatureNetwork",
    "FeatureStatistics",
    "Kept",
    "MAX_KEPT",
    "Survey",
    "compare",
    "dataset_batches",
    "evaluate",
    "feature_statistics",
    "foreign_digits",
    "frechet_distance",
    "load_feature_network",
    "measure",
    "reference_statistics",
    "survey",
]
Batches = Iterable[tuple[Tensor, Tensor | None]]  # images [B, C, H, W] in [-1, 1], labels [B]
MAX_KEPT = 10_000  # images a side: 1e8 distances, three times over
# Of the digit classifier on real digits, see `foreign_digits`.
LEAST_ACCURACY = 0.8
LEAST_CONFIDENCE = 0.95
FARTHEST = 1.5


def evaluate(
    batches: Batches,
    feature_network: FeatureNetwork,
    reference: FeatureStatistics | None,
    *,
    real: Tensor | None = None,
    seed: int = 0,
    ranks: Ranks = ALONE,
) -> Measurement:
    """Fréchet distance of images to `reference`, how often the classifier sees the label asked for, and the rest.

    Images pass through `feature_network` as real images do: rounded to the 256 levels of uint8. Distance and
    accuracy are of all of them, figures that need single features or logits of the first 10,000.

    Args:
        batches: pairs of images [B, C, H, W], float in [-1, 1], and labels [B], int64, or None.
        feature_network: images to (features [B, D], logits [B, K] or None), from `load_feature_network`.
        reference: statistics of real images in the same features; None leaves out the distance.
        real: features [N, D] of real images in random order, which precision, recall and kernel distance compare with.
        seed: of the subsets that the kernel distance draws.
        ranks: whose batches count in their order, round by round; the first one measures them all.

    Returns a Measurement without speed; `class_accuracy` is None if any batch lacks labels or logits, a label its
    logit, or a logit is NaN. Raises ValueError if an image is not finite, features do not fit `reference` or are beyond
    1e60, or images are too few.
    """
    found = survey(batches, feature_network, None if reference is None else len(reference.mean), ranks=ranks)

    def measured() -> Measurement:
        if found.num_images == 0:
            raise _error("evaluate", "at least one image", "none")
        return measure(found, reference, real=real, seed=seed)

    return ranks.from_first(measured)


def measure(
    found: Survey, reference: FeatureStatistics | None, *, real: Tensor | None = None, seed: int = 0
) -> Measurement:
    """What `evaluate` makes of the images that were surveyed."""
    parts = None if reference is None else frechet_parts(found.statistics, reference)
    features, labels, logits = found.kept
    row = Measurement(
        None if parts is None else parts.distance,
        found.class_accuracy,
        num_images=found.num_images,
        frechet_means=None if parts is None else parts.means,
        frechet_covariances=None if parts is None else parts.covariances,
        classifier_score=None if logits is None else _known(classifier_score(logits)),
        class_variance=None if labels is None else _known(class_variance(features, labels)),
    )
    return row if real is None else dataclasses.replace(row, **compare(features, real, seed))


def compare(features: Tensor, real: Tensor, seed: int) -> dict[str, Any]:
    """Precision, recall and kernel distance of as many images of one side as of the other, by a Measurement's names.

    Real images are in random order. Samples are of the classes in turn: of more than there are real images some are
    drawn, or they would be of other classes. Nothing where these are too few for neighbours.
    """
    num_compared = min(len(features), len(real))
    if num_compared <= NUM_NEIGHBOURS:
        return {}
    if len(features) > num_compared:
        drawn = permutation(len(features), seed=seed, stream=Stream.EVALUATION_ORDER)[:num_compared]
        features = features[drawn.to(features.device)]
    real = real[:num_compared]
    precision, recall = precision_recall(real, features)
    random = generator(seed, Stream.KERNEL_DISTANCE)
    distance = _known(kernel_distance(features, real, random=random))
    return {"precision": precision, "recall": recall, "kernel_distance": distance, "num_compared": num_compared}


def feature_statistics(batches: Batches, feature_network: FeatureNetwork) -> FeatureStatistics:
    """Statistics of images in the features of a network; arguments and errors as in `evaluate`."""
    return survey(batches, feature_network).statistics


class Kept(NamedTuple):
    """What is kept of single images, of MAX_KEPT at most: on the CPU, features at least in float32."""

    features: Tensor  # [n, D]
    labels: Tensor | None  # [n]
    logits: Tensor | None  # [n, K]


@dataclass(frozen=True)
class Survey:
    """What one pass over images tells."""

    statistics: FeatureStatistics
    num_images: int
    class_accuracy: float | None  # as in Measurement
    confidence: float | None  # the mean over images of the greatest class probability; None without logits
    kept: Kept


def survey(
    batches: Batches,
    feature_network: FeatureNetwork,
    num_features: int | None = None,
    chosen: Tensor | None = None,
    ranks: Ranks = ALONE,
) -> Survey:
    """Statistics, accuracy and confidence at once; arguments and errors as in `evaluate`, for a reference that has
    `num_features` of them. Features are kept of the images that are `chosen`, bool for each, or of the first. Of
    several `ranks` the first one has what they come to, others nothing."""
    statistics = FeatureStatistics()
    kept: list[Kept] = []
    num_images = num_correct = 0
    confidence = 0.0
    has_logits = has_accuracy = True

    def take(batch: tuple[Tensor, Tensor | None, Tensor | None]) -> None:
        nonlocal num_images, num_correct, confidence, has_logits, has_accuracy
        features, logits, labels = batch
        if num_features not in (None, features.shape[1]):
            raise _error("evaluate", f"a reference of {features.shape[1]} features", num_features)
        statistics.update(features)
        places = torch.arange(num_images, num_images + len(features))
        kept.append(_keep(places < MAX_KEPT if chosen is None else chosen[places], features, labels, logits))
        num_images += len(features)
        has_logits = has_logits and logits is not None
        has_accuracy = has_accuracy and has_logits and labels is not None
        if logits is not None and labels is not None:
            has_accuracy = has_accuracy and bool(((labels >= 0) & (labels < logits.shape[1])).all())
            has_accuracy = has_accuracy and not bool(logits.isnan().any())  # which argmax takes for the greatest
            num_correct += int((logits.argmax(1).cpu() == labels.cpu()).sum()) if has_accuracy else 0
        if logits is not None and has_logits:
            confidence += logits.double().softmax(1).amax(1).sum().item()

    ranks.in_order(_feature_batches(batches, feature_network), take)
    total = max(1, num_images)
    return Survey(
        statistics,
        num_images,
        class_accuracy=num_correct / total if has_accuracy else None,
        confidence=confidence / total if has_logits else None,
        kept=_joined(kept),
    )


def reference_statistics() -> FeatureStatistics:
    """Statistics of the 60,000 MNIST training digits in the features of the embedded classifier."""
    return FeatureStatistics.from_npz(ASSETS / "reference_statistics.npz")


def foreign_digits(found: Survey, name: str) -> list[str]:
    """What to say where real images are not digits as the embedded classifier, which was asked, knows them; or nothing.

    With labels its accuracy tells: 97.5 % and more of any forty MNIST digits, 95 % of digits in a printer's font, 50 %
    of digits blurred to 14 pixels, 37 % of mirrored ones and at most 16 % of inverted digits, letters, stripes, noise.
    Without, its confidence does: 0.984 and more of any forty digits, 0.994 of one class alone, 0.94 of printed ones,
    0.66 to 0.88 of mirrored and inverted ones, letters, garments and stripes. It is sure of noise, whose mean lies 3.8
    times the total variance of MNIST's features away (squared); one class alone lies 0.7 to 1.0 times that away.
    """
    if found.class_accuracy is not None:
        seen = f"it agrees with {found.class_accuracy:.1%} of the labels of {name}"
        is_known = found.class_accuracy >= LEAST_ACCURACY
    else:
        reference = reference_statistics()
        step = (found.statistics.mean - reference.mean).square().sum()
        seen = f"what is in {name} does not look like MNIST to it"
        assert found.confidence is not None  # the classifier gives logits
        is_known = found.confidence >= LEAST_CONFIDENCE and bool(step <= FARTHEST * reference.covariance.trace())
    if is_known:
        return []
    return [
        f"distance and accuracy are those of a classifier of MNIST digits, and {seen}: they may say little; "
        "--feature-network names another network"
    ]


def dataset_batches(
    dataset: Dataset, batch_size: int = 500, num_images: int | None = None, seed: int | None = None
) -> Batches:
    """Yields the first `num_images` of a dataset (None: all); with a seed, a draw without replacement.
    Raises ValueError if `num_images` is not in 1 to the size of the dataset.
    """
    num_images = len(dataset) if num_images is None else num_images
    if not 1 <= num_images <= len(dataset):
        raise _error("dataset_batches", f"num_images in 1 to {len(dataset)}", num_images)
    indices = torch.arange(len(dataset))
    if seed is not None:
        indices = permutation(len(dataset), seed=seed, stream=Stream.EVALUATION_ORDER)
    for batch in indices[:num_images].split(batch_size):
        yield dataset.batch(batch)


def _error(function: str, expected: str, got: object) -> ValueError:
    return ValueError(f"fastdmd.metrics.{function}: expected {expected}, got {got}")


def _keep(chosen: Tensor, features: Tensor, labels: Tensor | None, logits: Tensor | None) -> Kept:
    """Those of a batch that are chosen."""
    where = chosen.nonzero().flatten()

    def part(values: Tensor) -> Tensor:
        return values[where.to(values.device)].cpu()

    features = part(features)
    return Kept(
        features.to(torch.promote_types(features.dtype, torch.float32)),
        None if labels is None else part(labels),
        None if logits is None else part(logits),
    )


def _joined(batches: list[Kept]) -> Kept:
    """Of all batches; labels and logits where every batch has them."""
    labels = [batch.labels for batch in batches if batch.labels is not None]
    logits = [batch.logits for batch in batches if batch.logits is not None]
    return Kept(
        torch.cat([batch.features for batch in batches]) if batches else torch.empty(0, 0),
        torch.cat(labels) if labels and len(labels) == len(batches) else None,
        torch.cat(logits) if logits and len(logits) == len(batches) else None,
    )


def _known(value: float | None) -> float | None:
    """None for what is beyond float64, which JSON cannot hold."""
    return None if value is None or not math.isfinite(value) else value


def _feature_batches(batches: Batches, feature_network: FeatureNetwork) -> Iterator[tuple]:
    """Yields (features, logits, labels) of each batch, its images first rounded to the levels of uint8."""
    num_before = 0
    for images, labels in batches:
        num_bad = int((~images.isfinite().flatten(1).all(1)).sum())
        if num_bad:
            got = f"{num_bad} of {len(images)} with NaN or infinity, after {num_before} finite ones"
            raise _error("evaluate", "finite images", got)
        if labels is not None and labels.shape != (len(images),):
            raise _error("evaluate", f"labels of shape ({len(images)},)", tuple(labels.shape))
        num_before += len(images)
        yield *feature_network(to_uint8(images).float() / 127.5 - 1), labels
