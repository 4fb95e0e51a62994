"""Samplers measured against real images: the quality of what they make, speed, and the floor beside them."""

from __future__ import annotations

import dataclasses
import functools
import time
import warnings
import zlib
from collections.abc import Callable

import torch
from torch import Tensor

from fastdmd import data
from fastdmd.bars import bar
from fastdmd.memory import require_memory
from fastdmd.networks.user_code import user_code
from fastdmd.quality import features, metrics
from fastdmd.quality.frechet import COVARIANCES
from fastdmd.quality.measurement import Measurement
from fastdmd.randomness import Stream, permutation
from fastdmd.ranks import ALONE, Ranks
from fastdmd.sampling import Sampler, balanced_labels, start_noise
from fastdmd.shards import is_cut

BATCH_SIZE = 250  # images per forward pass
COPIES = 4  # of the features kept: of both sides, and while they are compared
SLOW_FEATURES = 4096  # of which an eigendecomposition, cubic in them, takes half a minute on two cores
SPEED_IMAGES = 250  # enough to time a sampler whose quality is on record


@torch.no_grad()
def sample(sampler: Sampler, noise: Tensor, class_labels: Tensor | None, step_noise: Tensor | None = None) -> Tensor:
    """Its images. What code of the user's own raises becomes one line; what ours does is a fault and stays as it is."""
    network = sampler.network
    if not network.foreign_name:
        return sampler(noise, class_labels, step_noise=step_noise)
    with user_code("quality", f"{network.foreign_name} to sample {tuple(noise.shape)}"):
        return sampler(noise, class_labels, step_noise=step_noise)


class Evaluation:
    """The feature network, the reference statistics and the floor that one comparison shares.

    Without `dataset`, the reference is the 60,000 MNIST training digits and the floor that of the 10,000 test digits.
    With one, the reference is all of its images, and the floor is a random part of them (at most half) against the
    rest. `reference` (a path of EDM statistics) replaces the reference; with it and a `feature_network`, but without
    `dataset`, there are no real images: no floor, and Fréchet distances alone. As few images are far from any
    reference, the floor is of no more than `num_samples` either.

    Precision, recall and kernel distance compare as many images as there are of both sides, at most 10,000, with test
    digits or images of the dataset, drawn at random; the floor's compare a half of those at most with another.

    Where the images are not what the embedded digit classifier sees and no `feature_network` is given, only speed is
    measured. `notices` say so, and what else a reader of the figures should know, a line each.

    Several `ranks` sample together, batch by batch, and the first one, which alone has a reference, measures for all.

    Raises ValueError or OSError for a feature network, a reference or images that do not fit each other; the network
    is tried before any image of the dataset is looked at.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        *,
        num_samples: int,
        dataset: data.Dataset | None = None,
        feature_network: str | None = None,
        reference: str | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        ranks: Ranks = ALONE,
    ):
        self.ranks = ranks
        self.image_shape = image_shape
        self.num_classes = num_classes
        self.num_samples = num_samples
        self.seed = seed
        self.device = torch.device(device)
        self._warm: set[tuple[int, int]] = set()  # of how many images, by how many evaluations, it has sampled
        self.notices: list[str] = []
        self.floor = Measurement(None, None)
        self._feature_network: features.FeatureNetwork | None = None
        self._reference: metrics.FeatureStatistics | None = None
        self._real: Tensor | None = None  # [N, D], features of real images, in random order
        self._real_images: str | None = None  # which ones
        self._features: str | None = None  # which ones, where the reference does not tell
        is_digits = feature_network is None
        if is_digits and tuple(image_shape) != (1, 28, 28):
            shape = "×".join(map(str, image_shape))
            if reference is not None:
                raise ValueError(f"expected --feature-network with --reference for {shape} images, got none")
            self.notices.append(
                f"no Fréchet distance: the embedded feature network sees 1×28×28 images, these are {shape}; "
                "--feature-network names another"
            )
            return
        network = self._feature_network = metrics.load_feature_network(feature_network, device)
        num_features = features.verify(network, image_shape, feature_network or "the digit classifier")
        require_memory(
            8 * COVARIANCES * num_features**2 + 4 * COPIES * metrics.MAX_KEPT * num_features,
            torch.device("cpu"),
            f"covariances of {num_features} features",
            "a --feature-network of fewer features needs less",
        )
        if num_features > SLOW_FEATURES:
            warnings.warn(f"a Fréchet distance in {num_features} features takes minutes, each time", stacklevel=2)
        self.floor, self.notices = ranks.from_first(
            functools.partial(self._look_at_real, network, num_features, dataset, reference, is_digits=is_digits)
        )

    def _look_at_real(
        self,
        network: features.FeatureNetwork,
        num_features: int,
        dataset: data.Dataset | None,
        reference: str | None,
        *,
        is_digits: bool,
    ) -> tuple[Measurement, list[str]]:
        """Takes what to compare with; returns the floor, and what is to be said."""
        if reference is not None:
            self._reference = metrics.FeatureStatistics.from_npz(reference, num_features)
        is_embedded = dataset is None
        if is_embedded and not is_digits:
            if reference is None and tuple(self.image_shape) != (1, 28, 28):
                raise ValueError("expected --data or --reference with --feature-network, got neither")
            if reference is not None:  # embedded digits are nobody's choice here
                noise = torch.rand((16, *self.image_shape), generator=torch.Generator().manual_seed(0)) * 2 - 1
                self._features = _told(metrics.feature_statistics([(noise.to(self.device), None)], network))
                self.notices.append("precision, recall and kernel distance need real images: --data")
                self._note_few(self.num_samples, num_features)
                return Measurement(None, None), self.notices
        least_images = 4 if reference is None else 2  # two have a covariance; without a reference, two halves are
        dataset = data.load() if dataset is None else dataset
        dataset = dataset.require(image_shape=self.image_shape, least_images=least_images)
        has_own_reference = reference is not None or (is_digits and is_embedded)
        if self._reference is None and has_own_reference:
            self._reference = metrics.reference_statistics()
        order = permutation(len(dataset), seed=self.seed, stream=Stream.EVALUATION_ORDER)
        whole = self._survey_all(dataset, network, order[: metrics.MAX_KEPT])
        if reference is not None:  # which another feature network may be measured against
            self._features = _told(whole.statistics)
        self._reference = self._reference or whole.statistics
        if is_digits and not is_embedded:
            self.notices += metrics.foreign_digits(whole, dataset.name)
        floor = self._measure_floor(dataset, network, whole if has_own_reference else None, order)
        self._note_few(min(self.num_samples, floor.num_images), num_features)
        return floor, self.notices

    def _note_few(self, num_images: int, num_features: int) -> None:
        if num_images <= num_features:
            self.notices.append(
                f"the Fréchet distance of {num_images} images in {num_features} features is too large: their "
                "covariance needs more images than features"
            )

    @property
    def has_distance(self) -> bool:
        """Whether it measures more than speed."""
        return self._feature_network is not None

    def _survey_all(self, dataset: data.Dataset, network: features.FeatureNetwork, drawn: Tensor) -> metrics.Survey:
        """All images, of which those `drawn` are to be compared with."""
        chosen = torch.zeros(len(dataset), dtype=torch.bool).index_fill_(0, drawn, True)
        whole = metrics.survey(metrics.dataset_batches(dataset), network, chosen=chosen)
        self._real = whole.kept.features[drawn.argsort().argsort()]  # kept in the order of the dataset
        checksum = 0
        for part in drawn.split(500):
            images = dataset.images.index_select(0, part.to(dataset.images.device))
            checksum = zlib.crc32(images.cpu().numpy().tobytes(), checksum)
        self._real_images = f"{len(drawn)} images, crc32 {checksum:08x}"
        return whole

    def _measure_floor(
        self,
        dataset: data.Dataset,
        network: features.FeatureNetwork,
        whole: metrics.Survey | None,
        order: Tensor,
    ) -> Measurement:
        """Of as many images as samples: any where the reference is of others, else a part of them against the rest."""
        assert self._real is not None
        if whole is not None and self.num_samples >= len(dataset):
            floor = metrics.measure(whole, self._reference)
        else:
            num = min(self.num_samples, len(dataset) // (1 if whole is not None else 2))
            sample, rest = order.tensor_split([num])
            reference = self._reference
            if whole is None:
                reference = metrics.feature_statistics(map(dataset.batch, rest.split(500)), network)
            floor = metrics.evaluate(map(dataset.batch, sample.split(500)), network, reference)
        num_compared = min(self.num_samples, len(self._real) // 2)
        part, other = self._real[:num_compared], self._real[num_compared : 2 * num_compared]
        return dataclasses.replace(floor, **metrics.compare(part, other, self.seed))

    def record(self, row: Measurement) -> dict:
        """What a weight file keeps of a measurement, so that the next run need not repeat it."""
        return {"settings": self._settings(row.evaluations), "quality": dataclasses.asdict(row)}

    def _settings(self, evaluations: int | None) -> dict:
        """Whatever the figures depend on besides the weights; statistics tell references and features apart."""
        settings = {
            "num_samples": self.num_samples,
            "seed": self.seed,
            "evaluations": evaluations,
            "reference": None if self._reference is None else _told(self._reference),
            "real_images": self._real_images,
        }
        return settings if self._features is None else {**settings, "features_of_real_images": self._features}

    def measure(
        self,
        sampler: Sampler,
        *,
        name: str,
        record: dict | None = None,
        before_batch: Callable[[], None] = lambda: None,
    ) -> Measurement:
        """Samples `num_samples` images of balanced classes and measures them; the clock runs while sampling only.

        If `record` is of a measurement like this one, only the speed is measured again. `before_batch` may raise.
        """
        evaluations = sampler.num_evaluations
        known = self.ranks.from_first(lambda: self._known(record, evaluations))
        if known is not None:
            num_images = min(SPEED_IMAGES * self.ranks.size, self.num_samples)  # of each as many
            *_, sampling_seconds = self._sample(sampler, num_images, name, before_batch)
            return dataclasses.replace(known, images_per_second=num_images / sampling_seconds, recorded=True)
        num_images = self.num_samples
        if self._feature_network is None:
            num_images = min(SPEED_IMAGES * self.ranks.size, num_images)
        quality, sampling_seconds = self._sample(sampler, num_images, name, before_batch)
        return dataclasses.replace(quality, images_per_second=num_images / sampling_seconds, evaluations=evaluations)

    def _known(self, record: dict | None, evaluations: int | None) -> Measurement | None:
        is_alike = record is not None and record["settings"] == self._settings(evaluations)
        return Measurement(**record["quality"]) if record is not None and is_alike else None

    def _sample(
        self, sampler: Sampler, num_images: int, name: str, before_batch: Callable[[], None]
    ) -> tuple[Measurement, float]:
        """The quality of `num_images` samples, and the seconds that sampling took."""
        seconds = 0.0
        labels = balanced_labels(num_images, self.num_classes, self.device)
        rounds = range(0, num_images, self.ranks.size * BATCH_SIZE)
        is_on_gpu, work = self.device.type == "cuda", (num_images, sampler.num_evaluations)
        is_cold = is_on_gpu and work not in self._warm  # in all processes or none: networks in parts run in all of them
        self._warm.add(work)

        def batches():
            nonlocal seconds
            for first in bar(rounds, desc=f"sampling {name}", unit="batch", leave=False):
                before_batch()
                start = first + self.ranks.rank * BATCH_SIZE
                part = slice(start, min(start + BATCH_SIZE, num_images))
                if is_idle := part.start >= part.stop:  # others have one
                    if not is_cut(sampler.network):
                        return
                    part = slice(0, 1)  # all of them gather its parts
                noise, step_noise = start_noise(part, self.image_shape, sampler.num_step_noises, self.seed, self.device)
                class_labels = None if labels is None else labels[part]
                if first == 0 and is_cold:  # untimed: libraries try their algorithms at the first call of a shape
                    sample(sampler, noise, class_labels, step_noise)
                    torch.cuda.synchronize(self.device)
                started = time.perf_counter()
                images = sample(sampler, noise, class_labels, step_noise)
                if is_idle:
                    return
                if is_on_gpu:
                    torch.cuda.synchronize(self.device)
                seconds += time.perf_counter() - started
                if not images.isfinite().all():
                    raise ValueError(f"fastdmd.quality: expected finite images of the {name}, got NaN or infinity")
                yield images, class_labels

        if self._feature_network is None:
            self.ranks.in_order((None for _ in batches()), _nothing)
            return Measurement(None, None, num_images=num_images), self.ranks.from_first(lambda: seconds)
        quality = metrics.evaluate(
            batches(), self._feature_network, self._reference, real=self._real, seed=self.seed, ranks=self.ranks
        )
        return quality, self.ranks.from_first(lambda: seconds)


def _told(statistics: metrics.FeatureStatistics) -> str:
    mean, variance = statistics.mean.norm().item(), statistics.covariance.trace().item()
    return f"{len(statistics.mean)} features, |mean| {mean:.5g}, total variance {variance:.5g}"


def _nothing(_: object) -> None: ...
