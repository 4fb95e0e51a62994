"""Measures of sample quality: Fréchet distance and class accuracy, and the feature networks behind them."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from fastdmd.data import Dataset, to_uint8
from fastdmd.imports import import_network

ASSETS = Path(__file__).parent / "assets"
Batches = Iterable[tuple[torch.Tensor, torch.Tensor | None]]  # images [B, C, H, W] in [-1, 1], labels [B]
FeatureNetwork = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]  # features [B, D], logits


@dataclass(frozen=True)
class Quality:
    """What `evaluate` found; `dataclasses.asdict` of it can be written as JSON."""

    frechet_distance: float | None  # None without reference statistics
    class_accuracy: float | None  # share of images whose largest logit is their label, in [0, 1]
    num_images: int


def evaluate(batches: Batches, feature_network: FeatureNetwork, reference: FeatureStatistics | None) -> Quality:
    """Fréchet distance of images to `reference`, and how often the classifier sees the label asked for.

    Images pass through `feature_network` as real images do: rounded to the 256 levels of uint8.

    Args:
        batches: pairs of images [B, C, H, W], float in [-1, 1], and labels [B], int64, or None.
        feature_network: images to (features [B, D], logits [B, K] or None), from `load_feature_network`.
        reference: statistics of real images in the same features; None leaves out the distance.

    Returns a Quality; `class_accuracy` is None if any batch lacks labels or logits, or a label its logit.
    Raises ValueError if an image is not finite, features do not fit `reference`, or images are too few.
    """
    statistics, num_correct, has_accuracy = FeatureStatistics(), 0, True
    for features, logits, labels in _feature_batches(batches, feature_network):
        if reference is not None and features.shape[1] != len(reference.mean):
            raise _error("evaluate", f"a reference of {features.shape[1]} features", len(reference.mean))
        statistics.update(features)
        has_accuracy = has_accuracy and logits is not None and labels is not None
        has_accuracy = has_accuracy and bool(((labels >= 0) & (labels < logits.shape[1])).all())
        if has_accuracy:
            num_correct += int((logits.argmax(1).cpu() == labels.cpu()).sum())
    if statistics.num_images == 0:
        raise _error("evaluate", "at least one image", "none")
    distance = None if reference is None else frechet_distance(statistics, reference)
    accuracy = num_correct / statistics.num_images if has_accuracy else None
    return Quality(frechet_distance=distance, class_accuracy=accuracy, num_images=statistics.num_images)


def feature_statistics(batches: Batches, feature_network: FeatureNetwork) -> FeatureStatistics:
    """Statistics of images in the features of a network; arguments and errors as in `evaluate`."""
    statistics = FeatureStatistics()
    for features, _, _ in _feature_batches(batches, feature_network):
        statistics.update(features)
    return statistics


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Squared Fréchet distance of two Gaussians, ``|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))``.

    In float64. ``S_a S_b`` has the eigenvalues of the symmetric ``S_a^(1/2) S_b S_a^(1/2)``, so two symmetric
    eigendecompositions suffice. Eigenvalues and results below zero can only be rounding and count as zero.

    Raises ValueError if the statistics differ in D or hold fewer than two images.
    Dowson and Landau 1982; as a measure of generated images: Heusel et al. 2017, equation (6).
    """
    if len(a.mean) != len(b.mean):
        raise _error("frechet_distance", "the same number of features", f"{len(a.mean)} and {len(b.mean)}")
    covariance_a, covariance_b = a.covariance, b.covariance
    values, vectors = torch.linalg.eigh(covariance_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T  # S_a^(1/2) [D, D]
    trace_root = torch.linalg.eigvalsh(root @ covariance_b @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + (covariance_a + covariance_b).trace() - 2 * trace_root
    return max(0.0, distance.item())


class FeatureStatistics:
    """Mean and covariance of features, gathered batch by batch in float64 on the CPU.

    Batches merge by the pairwise update of Chan, Golub and LeVeque 1979, free of differences of large sums.
    """

    def __init__(self):
        self.num_images: int | None = 0  # None: read from a file that does not say
        self._mean: torch.Tensor | None = None  # [D]
        self._scatter: torch.Tensor | None = None  # [D, D], covariance times (num_images - 1, if known)

    def update(self, features: torch.Tensor) -> None:
        """Adds features [B, D], floating point, of B images.

        Raises ValueError for a wrong shape, NaN or infinity, or where `num_images` is not known.
        """
        if self.num_images is None:
            raise _error("FeatureStatistics.update", "num_images to be known", "a file's without it")
        D = "D" if self._mean is None else len(self._mean)
        if features.ndim != 2 or D not in ("D", features.shape[1]):
            raise _error("FeatureStatistics.update", f"features of shape (B, {D})", tuple(features.shape))
        features = features.detach().to("cpu", torch.float64)
        B, num_bad = len(features), int((~features.isfinite().all(1)).sum())
        if num_bad:
            raise _error("FeatureStatistics.update", "finite features", f"{num_bad} of {B} not finite")
        if B == 0:
            return
        mean = features.mean(0)
        scatter = (features - mean).T @ (features - mean)
        if self._mean is None:
            self._mean, self._scatter = torch.zeros_like(mean), torch.zeros_like(scatter)
        num_before, step = self.num_images, mean - self._mean
        self.num_images += B
        self._mean = self._mean + step * (B / self.num_images)
        self._scatter += scatter + torch.outer(step, step) * (num_before * B / self.num_images)

    @property
    def mean(self) -> torch.Tensor:
        """[D], float64."""
        if self._mean is None:
            raise _error("FeatureStatistics.mean", "at least 1 image", 0)
        return self._mean

    @property
    def covariance(self) -> torch.Tensor:
        """[D, D], float64, unbiased: divided by num_images - 1."""
        if self.num_images is None:
            return self._scatter
        if self.num_images < 2:
            raise _error("FeatureStatistics.covariance", "at least 2 images", self.num_images)
        return self._scatter / (self.num_images - 1)

    @classmethod
    def from_npz(cls, path: str | Path) -> FeatureStatistics:
        """Reads `mu` [D] and `sigma` [D, D] as EDM's reference files name them, `num_images` if present.

        Raises FileNotFoundError, and ValueError if this is no .npz file, an array is missing, pickled,
        misshapen or not finite, or sigma is no covariance (not symmetric, or a variance below zero).
        """
        where = "FeatureStatistics.from_npz"
        with open(path, "rb") as file:
            if not zipfile.is_zipfile(file):
                raise _error(where, "an .npz file", f"another format in {path}")
            file.seek(0)
            arrays = dict(np.load(file, allow_pickle=False))
        if not {"mu", "sigma"} <= arrays.keys():
            raise _error(where, "arrays mu and sigma", f"{sorted(arrays)} in {path}")
        D = arrays["mu"].size
        for name, shape in (("mu", (D,)), ("sigma", (D, D))):
            array = arrays[name]
            if array.shape != shape or D == 0 or array.dtype.kind != "f":
                raise _error(where, f"{name} float {shape}", f"{array.dtype} {array.shape} in {path}")
            if not np.isfinite(array).all():
                raise _error(where, f"finite {name}", f"NaN or infinity in {path}")
        covariance = arrays["sigma"].astype(np.float64)
        gap, lowest = np.abs(covariance - covariance.T).max(), covariance.diagonal().min()
        if gap > 1e-6 * np.abs(covariance).max() or lowest < 0:  # float32 rounds to 1e-7
            got = f"asymmetry {gap:.3g} and lowest variance {lowest:.3g} in {path}"
            raise _error(where, "symmetric sigma with variances >= 0", got)
        statistics = cls()
        statistics.num_images = int(arrays["num_images"]) if "num_images" in arrays else None
        scale = 1 if statistics.num_images is None else statistics.num_images - 1
        statistics._mean = torch.from_numpy(arrays["mu"].astype(np.float64))
        statistics._scatter = torch.from_numpy((covariance + covariance.T) * (scale / 2))
        return statistics

    def save_npz(self, path: str | Path) -> None:
        """Writes `mu` and `sigma` (float64) and, where known, `num_images`: the layout `from_npz` reads."""
        count = {} if self.num_images is None else {"num_images": np.int64(self.num_images)}
        with open(path, "wb") as file:  # given a name, np.savez would append its own suffix
            np.savez(file, mu=self.mean.numpy(), sigma=self.covariance.numpy(), **count)


class DigitClassifier(torch.nn.Module):
    """Small convolutional network for 28 x 28 digits; its last hidden layer serves as features."""

    def __init__(self):
        super().__init__()
        layers: list[torch.nn.Module] = []
        for num_in, num_out, size, stride in ((1, 24, 5, 2), (24, 32, 3, 1), (32, 48, 3, 2), (48, 64, 3, 1)):
            layers.append(torch.nn.Conv2d(num_in, num_out, size, stride, padding=size // 2, bias=False))
            layers += [torch.nn.BatchNorm2d(num_out), torch.nn.SiLU()]
        layers += [torch.nn.AvgPool2d(2), torch.nn.Flatten()]  # [B, 64, 7, 7] to [B, 576]
        layers += [torch.nn.Linear(576, 64, bias=False), torch.nn.BatchNorm1d(64), torch.nn.SiLU()]
        self.body = torch.nn.Sequential(*layers)
        self.head = torch.nn.Linear(64, 10)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images [B, 1, 28, 28], float in [-1, 1], to features [B, 64] and logits [B, 10]."""
        if images.ndim != 4 or images.shape[1:] != (1, 28, 28):
            raise _error("DigitClassifier", "images of shape (B, 1, 28, 28)", tuple(images.shape))
        features = self.body(images)
        return features, self.head(features)


def load_feature_network(
    source: str | Path | torch.nn.Module | None = None, device: torch.device | str = "cpu"
) -> FeatureNetwork:
    """Makes a function of images [B, C, H, W], float in [-1, 1]: (features [B, D], logits [B, K] or None).

    The network is put on `device` in evaluation mode and runs without gradients. It may return features alone
    or the tuple (features, logits); every call checks their shapes. A TorchScript file or an import runs the
    code it holds: name only what you trust.

    Args:
        source: None for the embedded digit classifier; the path of a TorchScript file (.pt, .ts);
            "package.module:name" of a module, or of a class or function that makes one without arguments;
            or the module itself.
        device: where the network runs; images are moved there.

    Raises FileNotFoundError; ValueError if a string is neither a TorchScript file nor an import, or (from the
    returned function) if the output is wrong; TypeError if the import gives something else than a module.
    """
    if source is None:
        with torch.device("meta"):  # draws no initial weights: the caller's random state stays as it was
            module = DigitClassifier()
        module.load_state_dict(load_file(ASSETS / "feature_network.safetensors"), assign=True)
    elif isinstance(source, torch.nn.Module):
        module = source
    elif Path(source).suffix in (".pt", ".ts"):
        with open(source, "rb") as file:
            module = torch.jit.load(file, map_location="cpu")
    elif not all(str(source).partition(":")):
        raise _error("load_feature_network", "a .pt or .ts file or 'package.module:name'", repr(source))
    else:
        module = import_network(str(source), "metrics.load_feature_network")
    module = module.eval().to(device)

    @torch.no_grad()
    def feature_network(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        output = module(images.to(device))
        features, logits = output if isinstance(output, tuple) and len(output) == 2 else (output, None)
        for name, found in (("features", features), ("logits", logits))[: 1 if logits is None else 2]:
            is_matrix = isinstance(found, torch.Tensor) and found.is_floating_point() and found.ndim == 2
            if not is_matrix or len(found) != len(images):
                got = (tuple(found.shape), found.dtype) if isinstance(found, torch.Tensor) else type(found)
                raise _error("load_feature_network", f"{name} ({len(images)}, D), floating point", got)
        return features, logits

    return feature_network


def reference_statistics() -> FeatureStatistics:
    """Statistics of the 60,000 MNIST training digits in the features of the embedded classifier."""
    return FeatureStatistics.from_npz(ASSETS / "reference_statistics.npz")


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
        indices = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    for batch in indices[:num_images].split(batch_size):
        yield dataset.batch(batch)


def _error(function: str, expected: str, got: object, *, kind: type[Exception] = ValueError) -> Exception:
    return kind(f"fastdmd.metrics.{function}: expected {expected}, got {got}")


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
