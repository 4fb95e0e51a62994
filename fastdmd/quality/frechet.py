"""Fréchet distance, and the mean and covariance of features that it compares."""

from __future__ import annotations

import contextlib
import math
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fastdmd import reading

MAX_FEATURES = 2**14  # a covariance of 2 GB
COVARIANCES = 10  # that a distance holds at once: of both sides and the floor, roots, products, workspace
GREATEST_FEATURE = 1e60  # products of two covariances stay in float64
GREATEST_VALUE = 1e100  # of statistics in a file: products of two stay in float64


class FrechetDistance(NamedTuple):
    """A squared distance and the two parts that it is the sum of, to rounding."""

    distance: float
    means: float  # |mu_a - mu_b|^2
    covariances: float  # tr(S_a + S_b - 2 (S_a S_b)^(1/2))


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Squared Fréchet distance of two Gaussians, ``|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))``.

    In float64. ``S_a S_b`` has the eigenvalues of the symmetric ``S_a^(1/2) S_b S_a^(1/2)``, so two symmetric
    eigendecompositions suffice. Eigenvalues and results below zero can only be rounding and count as zero.

    Raises ValueError if the statistics differ in D or hold fewer than two images.
    Dowson and Landau 1982; as a measure of generated images: Heusel et al. 2017, equation (6).
    """
    return frechet_parts(a, b).distance


def frechet_parts(a: FeatureStatistics, b: FeatureStatistics) -> FrechetDistance:
    """`frechet_distance` and what it is made of; errors as there."""
    if len(a.mean) != len(b.mean):
        raise _error("frechet_distance", "the same number of features", f"{len(a.mean)} and {len(b.mean)}")
    covariance_a, covariance_b = a.covariance, b.covariance
    values, vectors = torch.linalg.eigh(covariance_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T  # S_a^(1/2) [D, D]
    trace_root = torch.linalg.eigvalsh(root @ covariance_b @ root).clamp(min=0).sqrt().sum()
    means = (a.mean - b.mean).square().sum()
    trace = (covariance_a + covariance_b).trace()
    distance = means + trace - 2 * trace_root
    return FrechetDistance(max(0.0, distance.item()), means.item(), max(0.0, (trace - 2 * trace_root).item()))


class FeatureStatistics:
    """Mean and covariance of features, gathered batch by batch in float64 on the CPU.

    Batches merge by the pairwise update of Chan, Golub and LeVeque 1979, free of differences of large sums.
    """

    def __init__(self) -> None:
        self.num_images: int | None = 0  # None: read from a file that does not say
        # Mean [D] and scatter [D, D], covariance times (num_images - 1, if known); None before the first image.
        self._moments: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(self, features: torch.Tensor) -> None:
        """Adds features [B, D], floating point, of B images.

        Raises ValueError for a wrong shape, NaN, infinity or what is beyond GREATEST_FEATURE, or where `num_images` is
        not known.
        """
        if self.num_images is None:
            raise _error("update", "num_images to be known", "a file's without it")
        D = "D" if self._moments is None else len(self.mean)
        if features.ndim != 2 or D not in ("D", features.shape[1]):
            raise _error("update", f"features of shape (B, {D})", tuple(features.shape))
        features = features.detach().to("cpu", torch.float64)
        B, num_bad = len(features), int((~features.isfinite().all(1)).sum())
        if num_bad:
            raise _error("update", "finite features", f"{num_bad} of {B} not finite")
        if (features.abs() > GREATEST_FEATURE).any():
            raise _error("update", f"features of at most {GREATEST_FEATURE:g}", f"{features.abs().max().item():.3g}")
        if B == 0:
            return
        mean = features.mean(0)
        scatter = (features - mean).T @ (features - mean)
        old_mean, old_scatter = self._moments or (torch.zeros_like(mean), torch.zeros_like(scatter))
        num_before = self.num_images
        num_images = num_before + B
        step = mean - old_mean
        old_scatter += scatter + torch.outer(step, step) * (num_before * B / num_images)
        self._moments = old_mean + step * (B / num_images), old_scatter
        self.num_images = num_images

    @property
    def mean(self) -> torch.Tensor:
        """[D], float64."""
        if self._moments is None:
            raise _error("mean", "at least 1 image", 0)
        return self._moments[0]

    @property
    def covariance(self) -> torch.Tensor:
        """[D, D], float64, unbiased: divided by num_images - 1."""
        if self._moments is None or self.num_images == 1:
            raise _error("covariance", "at least 2 images", self.num_images)
        return self._moments[1] if self.num_images is None else self._moments[1] / (self.num_images - 1)

    @classmethod
    def from_npz(cls, path: str | Path, num_features: int | None = None) -> FeatureStatistics:
        """Reads `mu` [D] and `sigma` [D, D] as EDM's reference files name them, `num_images` if present.

        What the file declares is checked before it is read. Raises FileNotFoundError, and ValueError if this is no
        readable .npz file, an array is missing, pickled, misshapen, too large or not finite, D is not `num_features`
        where that is given, or sigma is no covariance (not symmetric, or a variance of some direction below zero).
        """
        path = Path(path)
        arrays = _read_arrays(path, num_features)
        for name in ("mu", "sigma"):
            if not np.isfinite(arrays[name]).all():
                raise _error("from_npz", f"finite {name}", f"NaN or infinity in {path}")
        covariance = arrays["sigma"].astype(np.float64)
        greatest = max(np.abs(covariance).max(), np.abs(arrays["mu"]).max())
        if greatest > GREATEST_VALUE:
            raise _error("from_npz", f"values of at most {GREATEST_VALUE:g}", f"{greatest:.3g} in {path}")
        gap, lowest = np.abs(covariance - covariance.T).max(), covariance.diagonal().min()
        if gap > 1e-6 * np.abs(covariance).max() or lowest < 0:  # float32 rounds to 1e-7
            got = f"asymmetry {gap:.3g} and lowest variance {lowest:.3g} in {path}"
            raise _error("from_npz", "symmetric sigma with variances >= 0", got)
        eps = max(np.finfo(arrays["sigma"].dtype).eps, np.finfo(np.float32).eps)
        rounding = eps * len(covariance) * np.abs(covariance).max()
        shifted = torch.from_numpy(covariance + (rounding or 1.0) * np.eye(len(covariance)))
        if torch.linalg.cholesky_ex(shifted).info:
            raise _error("from_npz", "sigma without a negative eigenvalue", f"one below {-rounding:.3g} in {path}")
        statistics = cls()
        statistics.num_images = int(arrays["num_images"]) if "num_images" in arrays else None
        if statistics.num_images is not None and not 2 <= statistics.num_images < 2**53:
            raise _error("from_npz", "num_images >= 2", f"{statistics.num_images} in {path}")
        scale = 1 if statistics.num_images is None else statistics.num_images - 1
        mean = torch.from_numpy(arrays["mu"].astype(np.float64))
        statistics._moments = mean, torch.from_numpy((covariance + covariance.T) * (scale / 2))
        return statistics

    def save_npz(self, path: str | Path) -> None:
        """Writes `mu` and `sigma` (float64) and, where known, `num_images`: the layout `from_npz` reads."""
        arrays: dict[str, Any] = {"mu": self.mean.numpy(), "sigma": self.covariance.numpy()}
        if self.num_images is not None:
            arrays["num_images"] = np.int64(self.num_images)
        with open(path, "wb") as file:  # given a name, np.savez would append its own suffix
            np.savez(file, **arrays)


def _read_arrays(path: Path, num_features: int | None) -> dict[str, np.ndarray]:
    """`mu`, `sigma` and perhaps `num_images` of an .npz file, of the right shapes and kinds of number."""
    if path.exists() and not path.is_file():
        raise _error("from_npz", "an .npz file", f"{path}, which is no regular file")
    with open(path, "rb") as file:
        if not zipfile.is_zipfile(file):
            raise _error("from_npz", "an .npz file", f"another format in {path}")
    with _decoding(path), reading.open_zip(path) as archive:
        members = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
        if not {"mu", "sigma"} <= {*members}:
            raise _error("from_npz", "arrays mu and sigma", f"{sorted(members)[:9]} in {path}")
        D = int(np.prod(_read_header(archive, "mu")[0], dtype=object))
        if D > MAX_FEATURES:
            raise _error("from_npz", f"at most {MAX_FEATURES} features", f"{D} in {path}")
        if num_features not in (None, D):
            raise _error("from_npz", f"a reference of {num_features} features", f"{D} in {path}")
        expected = {"mu": ("float", "f", (D,)), "sigma": ("float", "f", (D, D)), "num_images": ("int", "iu", ())}
        arrays = {}
        for name, (kind, kinds, shape) in expected.items():
            if name not in members:
                continue
            found, dtype, num_bytes = _read_header(archive, name)
            if found != shape or dtype.kind not in kinds or D == 0:
                raise _error("from_npz", f"{name} {kind} {shape}", f"{dtype} {found} in {path}")
            if members.count(name) > 1 or num_bytes != math.prod(shape) * dtype.itemsize:
                got = "several" if members.count(name) > 1 else f"{num_bytes} bytes"
                raise _error("from_npz", f"{name} once, {math.prod(shape) * dtype.itemsize} bytes", f"{got} in {path}")
            with reading.open_member(archive, name + ".npy") as member:  # to its end, where its checksum is compared
                arrays[name] = np.lib.format.read_array(member, allow_pickle=False)
        return arrays


def _read_header(archive: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], np.dtype, int]:
    """Shape and dtype that an array declares, and the bytes that follow its header; none of them is read."""
    with reading.open_member(archive, name + ".npy") as member:
        shape, _, dtype, header_bytes = reading.read_npy_header(member)
    return shape, dtype, archive.getinfo(name + ".npy").file_size - header_bytes


@contextlib.contextmanager
def _decoding(path: Path) -> Iterator[None]:
    """Archives, compressions and array headers fail in ways of their own, a dozen exceptions at least."""
    try:
        yield
    except Exception as error:
        if str(error).startswith("fastdmd."):
            raise
        got = f"{type(error).__name__} ({error}) in {path}"
        raise _error("from_npz", "a readable .npz file", got) from error


def _error(place: str, expected: str, got: object) -> ValueError:
    return ValueError(f"fastdmd.frechet.{place}: expected {expected}, got {got}")
