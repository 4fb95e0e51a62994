"""Fréchet distance against independent formulas, streaming statistics and their files."""

import numpy as np
import pytest
import scipy.linalg
import torch

from fastdmd.quality import metrics
from fastdmd.quality.frechet import frechet_parts
from fastdmd.quality.metrics import FeatureStatistics


def gather(features: np.ndarray) -> FeatureStatistics:
    statistics = FeatureStatistics()
    statistics.update(torch.from_numpy(features))
    return statistics


def given(tmp_path, mean: np.ndarray, covariance: np.ndarray) -> FeatureStatistics:
    np.savez(tmp_path / "given.npz", mu=mean, sigma=covariance)
    return FeatureStatistics.from_npz(tmp_path / "given.npz")


def scipy_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet distance of feature matrices [N, D] by the matrix square root of the covariances' product."""
    covariance_a, covariance_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(covariance_a @ covariance_b)
    step = a.mean(0) - b.mean(0)
    return float(step @ step + np.trace(covariance_a + covariance_b - 2 * np.real(root)))


def random_features(seed: int, num_images: int, D: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    return random.normal(size=(num_images, D)) @ random.normal(size=(D, D)) / D**0.5 + random.normal(size=D)


@pytest.mark.parametrize("num_features", [1, 2, 17, 64])
def test_frechet_distance_agrees_with_scipy(num_features):
    a, b = random_features(0, 400, num_features), random_features(1, 300, num_features)
    if num_features == 1:
        variances = a.var(ddof=1), b.var(ddof=1)
        expected = (a.mean() - b.mean()) ** 2 + (variances[0] ** 0.5 - variances[1] ** 0.5) ** 2
    else:
        expected = scipy_distance(a, b)
    assert metrics.frechet_distance(gather(a), gather(b)) == pytest.approx(expected, rel=1e-9)
    assert metrics.frechet_distance(gather(b), gather(a)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.filterwarnings("ignore")  # sqrtm warns that the matrix is singular
@pytest.mark.parametrize("num_images", [2, 10, 31])
def test_frechet_distance_agrees_with_scipy_where_covariances_are_singular(num_images):
    a, b = random_features(2, num_images, 32), random_features(3, 200, 32)
    assert metrics.frechet_distance(gather(a), gather(b)) == pytest.approx(scipy_distance(a, b), rel=1e-5)


def test_frechet_distance_of_two_images_each_has_a_closed_form():
    # Rank one: S = d d^T / 2 with d the difference of the two, so tr (S_a S_b)^(1/2) = |d_a . d_b| / 2.
    a, b = random_features(4, 2, 8), random_features(5, 2, 8)
    d_a, d_b, step = a[0] - a[1], b[0] - b[1], a.mean(0) - b.mean(0)
    expected = step @ step + (d_a @ d_a + d_b @ d_b) / 2 - abs(d_a @ d_b)
    assert metrics.frechet_distance(gather(a), gather(b)) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_diagonal_covariances_has_a_closed_form(tmp_path):
    random = np.random.default_rng(6)
    means, variances = random.normal(size=(2, 12)), random.uniform(0, 3, size=(2, 12))
    variances[0, 0] = 0
    expected = ((means[0] - means[1]) ** 2).sum() + ((variances[0] ** 0.5 - variances[1] ** 0.5) ** 2).sum()
    a, b = (given(tmp_path, mean, np.diag(variance)) for mean, variance in zip(means, variances, strict=True))
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("num_images", [2, 20, 500])
def test_frechet_distance_of_identical_statistics_is_zero(num_images):
    statistics = gather(random_features(7, num_images, 32))
    assert 0 <= metrics.frechet_distance(statistics, statistics) < 1e-5


@pytest.mark.parametrize("num_features", [2, 17, 64])
def test_a_distance_is_the_sum_of_means_and_covariances(num_features):
    a, b = random_features(10, 400, num_features), random_features(11, 300, num_features)
    parts = frechet_parts(gather(a), gather(b))
    step = a.mean(0) - b.mean(0)
    assert parts.means == pytest.approx(step @ step, rel=1e-12)
    assert parts.covariances == pytest.approx(scipy_distance(a - a.mean(0), b - b.mean(0)), rel=1e-9)
    assert parts.means + parts.covariances == pytest.approx(parts.distance, rel=1e-12)
    assert parts.distance == metrics.frechet_distance(gather(a), gather(b))

    moved, spread = frechet_parts(gather(a), gather(a + 3)), frechet_parts(gather(a), gather(2 * a - a.mean(0)))
    variance = np.cov(a, rowvar=False).trace()
    assert moved.means == pytest.approx(9 * num_features) and 0 <= moved.covariances < 1e-9 * variance
    assert spread.covariances == pytest.approx(variance) and 0 <= spread.means < 1e-20 * variance


def test_frechet_distance_refuses_different_features():
    with pytest.raises(ValueError, match="frechet_distance: expected the same number of features, got 3 and 4"):
        metrics.frechet_distance(gather(random_features(0, 9, 3)), gather(random_features(0, 9, 4)))


@pytest.mark.parametrize("splits", [(100,), (1,) * 100, (1, 98, 1), (33, 0, 67)])
def test_statistics_do_not_depend_on_the_split(splits):
    features = random_features(8, 100, 7) + 1e4  # a large mean: E[x^2] - E[x]^2 would lose eight digits
    statistics = FeatureStatistics()
    for batch in torch.from_numpy(features).split(list(splits)):
        statistics.update(batch)
    assert statistics.num_images == 100
    assert statistics.mean.dtype == statistics.covariance.dtype == torch.float64
    np.testing.assert_allclose(statistics.mean.numpy(), features.mean(0), rtol=1e-13)
    np.testing.assert_allclose(statistics.covariance.numpy(), np.cov(features, rowvar=False), rtol=1e-7, atol=1e-9)


def test_a_mean_once_read_stays_as_it_was():
    statistics = gather(np.array([[1.0], [3.0]]))
    mean = statistics.mean
    statistics.update(torch.tensor([[8.0]]))
    assert mean.item() == 2.0 and statistics.mean.item() == pytest.approx(4.0)


def test_statistics_refuse_bad_features():
    statistics = gather(np.ones((3, 4)))
    with pytest.raises(ValueError, match=r"expected features of shape \(B, 4\), got \(2, 5\)"):
        statistics.update(torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"expected features of shape \(B, D\), got \(2, 5, 1\)"):
        FeatureStatistics().update(torch.zeros(2, 5, 1))
    with pytest.raises(ValueError, match="expected finite features, got 1 of 2 not finite"):
        statistics.update(torch.tensor([[0.0, 0, 0, 0], [0, float("inf"), float("nan"), 0]]))
    with pytest.raises(ValueError, match="expected at least 2 images, got 1"):
        _ = gather(np.ones((1, 4))).covariance
    with pytest.raises(ValueError, match="expected at least 1 image, got 0"):
        _ = FeatureStatistics().mean
    with pytest.raises(ValueError, match="expected features of at most 1e\\+60, got 3e\\+60"):
        statistics.update(torch.tensor([[0.0, 0, 0, -3e60]], dtype=torch.float64))


def test_the_greatest_features_have_a_distance():
    a, b = np.random.default_rng(0).uniform(size=(2, 50, 4))
    expected = metrics.frechet_distance(gather(a), gather(b))
    assert metrics.frechet_distance(gather(1e60 * a), gather(1e60 * b)) == pytest.approx(1e120 * expected, rel=1e-9)


def test_npz_round_trip_and_update(tmp_path):
    features = random_features(9, 50, 6)
    gather(features[:30]).save_npz(tmp_path / "statistics")
    with np.load(tmp_path / "statistics") as file:
        assert sorted(file.files) == ["mu", "num_images", "sigma"] and file["sigma"].dtype == np.float64
        np.testing.assert_allclose(file["sigma"], np.cov(features[:30], rowvar=False), rtol=1e-10, atol=1e-14)
    statistics = FeatureStatistics.from_npz(tmp_path / "statistics")
    assert statistics.num_images == 30
    statistics.update(torch.from_numpy(features[30:]))
    np.testing.assert_allclose(statistics.mean.numpy(), features.mean(0), rtol=1e-12)
    np.testing.assert_allclose(statistics.covariance.numpy(), np.cov(features, rowvar=False), rtol=1e-10)


def test_npz_of_edm_without_a_count(tmp_path):
    statistics = given(tmp_path, np.array([1, 2], np.float32), np.array([[2, 1], [1, 3]], np.float32))
    assert statistics.num_images is None
    assert statistics.covariance.tolist() == [[2.0, 1.0], [1.0, 3.0]]
    with pytest.raises(ValueError, match="expected num_images to be known"):
        statistics.update(torch.zeros(1, 2))
    statistics.save_npz(tmp_path / "again.npz")
    assert FeatureStatistics.from_npz(tmp_path / "again.npz").mean.tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"sigma": np.eye(2)}, r"expected arrays mu and sigma, got \['sigma'\]"),
        ({"mu": np.zeros(3), "sigma": np.eye(2)}, r"expected sigma float \(3, 3\), got float64 \(2, 2\)"),
        ({"mu": np.zeros((2, 2)), "sigma": np.eye(4)}, r"expected mu float \(4,\), got float64 \(2, 2\)"),
        ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, r"got float64 \(0,\)"),
        ({"mu": np.zeros(2, np.int64), "sigma": np.eye(2)}, r"expected mu float \(2,\), got int64 \(2,\)"),
        ({"mu": np.array([0, np.nan]), "sigma": np.eye(2)}, "expected finite mu, got NaN or infinity"),
        ({"mu": np.zeros(2), "sigma": np.full((2, 2), np.inf)}, "expected finite sigma, got NaN or infinity"),
        (
            {"mu": np.zeros(2), "sigma": np.array([[1.0, 0.5], [0.4, 1]])},
            "expected symmetric sigma .*0.1 and",
        ),
        ({"mu": np.zeros(2), "sigma": np.diag([1.0, -1])}, "variances >= 0, got .* lowest variance -1 "),
        ({"mu": np.array([None, 1]), "sigma": np.eye(2)}, r"expected mu float \(2,\), got object \(2,\)"),
    ],
)
def test_bad_npz_files_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        FeatureStatistics.from_npz(tmp_path / "bad.npz")


def test_files_that_are_no_npz_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.npz"):
        FeatureStatistics.from_npz(tmp_path / "absent.npz")
    np.save(tmp_path / "array.npy", np.eye(2))
    with pytest.raises(ValueError, match="expected an .npz file, got another format in .*array.npy"):
        FeatureStatistics.from_npz(tmp_path / "array.npy")
