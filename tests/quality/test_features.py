"""The embedded digit classifier, feature networks of others, and what `evaluate` makes of their outputs."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open

from fastdmd import data
from fastdmd.quality import Measurement, metrics
from fastdmd.quality.metrics import FeatureStatistics

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
    # Of the class 0, sums -4, 4, 4 and first pixels -1, 1, 1 vary by 64/3 and 4/3; class 1 has one image alone.
    posterior = np.exp([1.0, -1.0]) / np.exp([1.0, -1.0]).sum()  # two images are surely of one class, two of the other
    score = np.exp((posterior * np.log(posterior / 0.5)).sum())
    assert quality == Measurement(
        frechet_distance=None,
        class_accuracy=0.75,
        num_images=4,
        class_variance=pytest.approx(68 / 3),
        classifier_score=pytest.approx(score),
    )
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
