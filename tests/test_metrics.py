"""Fréchet distance against independent formulas, streaming statistics, feature networks and their assets."""

import json

import numpy as np
import pytest
import scipy.linalg
import torch
from safetensors import safe_open

from fastdmd import data, metrics
from fastdmd.metrics import FeatureStatistics

MAX_ASSET_BYTES = 500_000


class SumNetwork(torch.nn.Module):
    """Features: the sum of an image and its first pixel; logits: the sign of the first pixel decides."""

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first = images[:, 0, 0, 0]
        return torch.stack([images.flatten(1).sum(1), first], 1), torch.stack([-first, first], 1)


class FeaturesOnly(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)


@pytest.fixture(scope="module")
def digits() -> data.Dataset:
    return data.load()


@pytest.fixture(scope="module")
def reference() -> FeatureStatistics:
    return metrics.reference_statistics()


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
        ({"mu": np.array([None, 1]), "sigma": np.eye(2)}, "allow_pickle=False"),
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


def test_embedded_classifier_and_floor(digits, reference):
    network = metrics.load_feature_network()
    quality = metrics.evaluate(metrics.dataset_batches(digits), network, reference)
    assert quality.num_images == len(digits) == 10_000
    assert quality.class_accuracy >= 0.99
    assert 0.01 < quality.frechet_distance < 0.2  # the floor: measured 0.074

    noise = torch.randn(500, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    far = metrics.evaluate([(noise, None)], network, reference)
    assert far.frechet_distance > 100 * quality.frechet_distance
    assert far.class_accuracy is None
    assert json.loads(json.dumps(vars(far)))["num_images"] == 500


def test_missing_classes_and_faint_noise_are_seen(digits, reference):
    network = metrics.load_feature_network()
    whole = metrics.evaluate(metrics.dataset_batches(digits, num_images=4000), network, reference)
    images, labels = digits.batch(torch.arange(4000))
    without_ones = metrics.evaluate([(images[labels != 1], None)], network, reference)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    noisy = metrics.evaluate([(images + 0.2 * noise, None)], network, reference)
    assert without_ones.frechet_distance > 2 * whole.frechet_distance
    assert noisy.frechet_distance > 2 * whole.frechet_distance


def test_reference_statistics_are_those_of_the_training_digits(digits, reference):
    assert reference.num_images == 60_000
    batches = metrics.dataset_batches(digits, num_images=2000)
    gathered = metrics.feature_statistics(batches, metrics.load_feature_network())
    deviation = reference.covariance.diagonal().sqrt()
    assert ((gathered.mean - reference.mean).abs() / deviation).max() < 0.2  # 2,000 draws: 0.02 a sigma
    assert (gathered.covariance.diagonal().sqrt() / deviation - 1).abs().max() < 0.2


def test_assets_are_small_and_say_where_they_come_from():
    for name in ("feature_network.safetensors", "reference_statistics.npz"):
        assert 0 < (metrics.ASSETS / name).stat().st_size <= MAX_ASSET_BYTES
    with safe_open(metrics.ASSETS / "feature_network.safetensors", "pt") as file:
        record = json.loads(file.metadata()["fastdmd"])
    assert record["kind"] == "feature_network" and record["test_accuracy"] >= 0.99
    assert {"seed", "command", "torch"} <= record.keys()


def test_loading_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    metrics.load_feature_network()
    assert torch.equal(torch.get_rng_state(), before)


def test_class_accuracy_and_statistics_are_exact():
    images = torch.full((4, 1, 2, 2), -1.0)
    images[2:] = 1.0
    network = metrics.load_feature_network(SumNetwork())
    labels = torch.tensor([0, 0, 0, 1])  # the network says 0, 0, 1, 1
    batches = [(images[:1], labels[:1]), (images[1:], labels[1:])]
    quality = metrics.evaluate(batches, network, None)
    assert quality == metrics.Quality(frechet_distance=None, class_accuracy=0.75, num_images=4)
    statistics = metrics.feature_statistics(batches, network)
    assert statistics.mean.tolist() == [0.0, 0.0]
    assert statistics.covariance[0, 0].item() == pytest.approx(64 / 3)  # four sums of -4, -4, 4, 4

    for unfit in (None, torch.tensor([0, 0, 0, 2]), torch.tensor([0, 0, -1, 1])):
        assert metrics.evaluate([(images, unfit)], network, None).class_accuracy is None
    first_known = [(images, labels), (images, None)]
    assert metrics.evaluate(first_known, network, None).class_accuracy is None
    only_features = metrics.load_feature_network(FeaturesOnly())
    assert metrics.evaluate([(images, labels)], only_features, None).class_accuracy is None
    with pytest.raises(ValueError, match=r"expected labels of shape \(4,\), got \(4, 1\)"):
        metrics.evaluate([(images, labels[:, None])], network, None)


def test_images_are_rounded_to_uint8_levels():
    network = metrics.load_feature_network(FeaturesOnly())
    images = torch.tensor([-3.0, -1.0, 0.001, 0.5, 1.0, 7.0]).view(6, 1, 1, 1)
    levels = torch.tensor([0.0, 0, 128, 191, 255, 255], dtype=torch.float64)  # 0.001 -> 127.6, 0.5 -> 191.25
    statistics = metrics.feature_statistics([(images, None)], network)
    expected = levels / 127.5 - 1
    assert statistics.mean.item() == pytest.approx(expected.mean().item(), abs=1e-6)
    assert statistics.covariance.item() == pytest.approx(expected.var().item(), rel=1e-6)


def test_images_that_are_not_finite_are_counted(reference):
    images = torch.zeros(6, 1, 28, 28)
    images[1, 0, 3, 3], images[4] = float("nan"), float("inf")
    batches = [(torch.zeros(5, 1, 28, 28), None), (images, None)]
    with pytest.raises(ValueError, match="finite images, got 2 of 6 with NaN or infinity, after 5 finite ones"):
        metrics.evaluate(batches, metrics.load_feature_network(), reference)


def test_evaluate_refuses_what_does_not_fit(reference):
    with pytest.raises(ValueError, match="expected a reference of 4 features, got 64"):
        metrics.evaluate([(torch.zeros(3, 1, 2, 2), None)], metrics.load_feature_network(FeaturesOnly()), reference)
    with pytest.raises(ValueError, match="expected at least one image, got none"):
        metrics.evaluate([], metrics.load_feature_network(), reference)
    with pytest.raises(ValueError, match=r"expected images of shape \(B, 1, 28, 28\), got \(2, 3, 32, 32\)"):
        metrics.evaluate([(torch.zeros(2, 3, 32, 32), None)], metrics.load_feature_network(), reference)


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated; tracing remarks on the shape check
def test_torchscript_file_gives_what_the_module_gives(tmp_path, digits):
    images, _ = digits.batch(torch.arange(20))
    classifier = metrics.DigitClassifier().eval()
    torch.jit.trace(classifier, images).save(tmp_path / "classifier.pt")
    features, logits = metrics.load_feature_network(str(tmp_path / "classifier.pt"))(images)
    expected = metrics.load_feature_network(classifier)(images)
    torch.testing.assert_close(features, expected[0])
    torch.testing.assert_close(logits, expected[1])
    with pytest.raises(FileNotFoundError, match="absent.ts"):
        metrics.load_feature_network(str(tmp_path / "absent.ts"))


def test_feature_network_by_import_path(monkeypatch, tmp_path):
    (tmp_path / "networks_of_this_test.py").write_text(
        "import torch\nmodule = torch.nn.Flatten()\nfactory = lambda: module\nthree = lambda: 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    images = torch.arange(8.0).view(2, 1, 2, 2)
    for source in ("networks_of_this_test:module", "networks_of_this_test:factory", "torch.nn:Flatten"):
        features, logits = metrics.load_feature_network(source)(images)
        assert features.tolist() == [[0.0, 1, 2, 3], [4, 5, 6, 7]] and logits is None
    with pytest.raises(TypeError, match="expected networks_of_this_test:three to be a Module, got <class 'int'>"):
        metrics.load_feature_network("networks_of_this_test:three")
    for source, got in (("torch.nn:Flaten", "no attribute"), ("no_such_package:name", "No module named")):
        with pytest.raises(ValueError, match=f"expected {source} to be importable, got .*{got}"):
            metrics.load_feature_network(source)
    with pytest.raises(ValueError, match="expected a .pt or .ts file or 'package.module:name', got 'inception'"):
        metrics.load_feature_network("inception")


@pytest.mark.parametrize(
    "make_output, message",
    [
        (lambda x: x, r"expected features \(2, D\), floating point, got \(\(2, 1, 2, 2\), torch.float32\)"),
        (lambda x: x.flatten(1).long(), r"features .* got \(\(2, 4\), torch.int64\)"),
        (lambda x: x.flatten(1)[:1], r"features .* got \(\(1, 4\), torch.float32\)"),
        (lambda x: (x.flatten(1), x.flatten(1)[:, 0]), r"logits .* got \(\(2,\), torch.float32\)"),
        (lambda x: (x, x, x), "features .* got <class 'tuple'>"),
        (lambda x: {"features": x}, "features .* got <class 'dict'>"),
    ],
)
def test_wrong_outputs_of_a_feature_network_are_refused(make_output, message):
    class Wrong(torch.nn.Module):
        def forward(self, images):
            return make_output(images)

    with pytest.raises(ValueError, match=message):
        metrics.load_feature_network(Wrong())(torch.zeros(2, 1, 2, 2))


def test_feature_network_runs_in_evaluation_mode_without_gradients():
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.5), torch.nn.Linear(4, 3)).train()
    features, _ = metrics.load_feature_network(module)(torch.ones(5, 1, 2, 2))
    assert not features.requires_grad
    assert torch.equal(features, features[:1].expand(5, 3))


def test_dataset_batches_walk_the_dataset(digits):
    batches = list(metrics.dataset_batches(digits, batch_size=300, num_images=700))
    assert [len(images) for images, _ in batches] == [300, 300, 100]
    images, labels = digits.batch(torch.arange(700))
    assert torch.equal(torch.cat([images for images, _ in batches]), images)
    assert torch.equal(torch.cat([labels for _, labels in batches]), labels)

    drawn = [torch.cat([x for x, _ in metrics.dataset_batches(digits, 64, 100, seed)]) for seed in (3, 3, 4)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    every = torch.cat([images for images, _ in metrics.dataset_batches(digits, seed=0)])
    sums = [x.double().sum((1, 2, 3)).sort().values for x in (every, digits.batch(torch.arange(len(digits)))[0])]
    assert torch.equal(*sums)  # every image, none twice
    with pytest.raises(ValueError, match="expected num_images in 1 to 10000, got 10001"):
        next(iter(metrics.dataset_batches(digits, num_images=10_001)))
