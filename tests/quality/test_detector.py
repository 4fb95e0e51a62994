"""TorchScript with the interface of the published Inception detector: uint8 images, and features by a flag."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn

from fastdmd import data, quality
from fastdmd.memory import ran_out_of_memory
from fastdmd.quality.features import load_feature_network, to_levels, verify

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
NUM_FEATURES = 12


class Detector(nn.Module):
    """Class scores, or features on request: a random projection of its pixels, which it wants in 0..255, and a ReLU."""

    def __init__(self, num_pixels: int, refuses_floats: bool = False):
        super().__init__()
        random = torch.Generator().manual_seed(0)
        self.refuses_floats = refuses_floats
        self.projection = nn.Parameter(torch.randn(3 * num_pixels, NUM_FEATURES, generator=random))

    def forward(self, img: torch.Tensor, return_features: bool = False, use_fp16: bool = False):
        if self.refuses_floats and img.dtype != torch.uint8:
            raise ValueError("uint8 images only")
        assert img.shape[1] == 3
        features = torch.relu((img.to(torch.float32).flatten(1) / 255) @ self.projection)
        return features if return_features else features.softmax(1)


class Floats(nn.Module):
    """A network of floats that happens to have such a flag."""

    def __init__(self, num_channels: int):
        super().__init__()
        self.conv = nn.Conv2d(num_channels, NUM_FEATURES, 3)

    def forward(self, images: torch.Tensor, return_features: bool = False):
        features = self.conv(images).mean([2, 3])
        return features if not return_features else features * 2


def saved(network: nn.Module, path) -> str:
    torch.jit.script(network.eval()).save(path)
    return str(path)


def features_of(images: np.ndarray, detector: Detector) -> np.ndarray:
    """Of uint8 images [N, C, H, W], in float64."""
    pixels = np.broadcast_to(images, (len(images), 3, *images.shape[2:])).reshape(len(images), -1) / 255
    return np.maximum(pixels @ detector.projection.detach().double().numpy(), 0)


def distance(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    covariances = [np.cov(side, rowvar=False) for side in (a, b)]
    root = np.real(scipy.linalg.sqrtm(covariances[0] @ covariances[1]))
    return ((a.mean(0) - b.mean(0)) ** 2).sum(), np.trace(sum(covariances) - 2 * root)


class Repeated:
    """A sampler of given images, a little off the levels of uint8, as those of a network are."""

    num_evaluations = 1
    num_step_noises = 0

    class network:
        foreign_name = None

    def __init__(self, images: np.ndarray):
        self.images, self.position = torch.from_numpy(images), 0

    def __call__(self, noise, class_labels, step_noise):
        part = self.images[self.position : self.position + len(noise)]
        self.position += len(noise)
        return (part + 0.8 * torch.rand(part.shape) - 0.4) / 127.5 - 1


@pytest.mark.parametrize("refuses_floats", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_distances_are_those_of_its_features_of_uint8_images(channels, refuses_floats, tmp_path):
    random = np.random.default_rng(0)
    real, made = random.integers(0, 256, (2, 300, channels, 6, 6), np.uint8)
    made = made // 2 + 40
    detector = Detector(36, refuses_floats)
    path = saved(detector, tmp_path / "named_anyhow.ts")
    reference = features_of(real[:250], detector)
    np.savez(tmp_path / "reference.npz", mu=reference.mean(0), sigma=np.cov(reference, rowvar=False))
    dataset = data.Dataset(torch.from_numpy(real), None, "real.npz")
    for options, compared in (
        ({}, features_of(real, detector)),
        ({"reference": tmp_path / "reference.npz"}, reference),
    ):
        evaluation = quality.Evaluation(
            (channels, 6, 6), 0, num_samples=300, dataset=dataset, feature_network=path, **options
        )
        row = evaluation.measure(Repeated(made), name="generator")
        means, covariances = distance(features_of(made, detector), compared)
        assert row.frechet_means == pytest.approx(means, rel=1e-5)
        assert row.frechet_covariances == pytest.approx(covariances, rel=1e-5)
        assert row.frechet_distance == pytest.approx(means + covariances, rel=1e-5)
        assert row.class_accuracy is None and row.classifier_score is None and row.precision is not None


def test_a_reference_is_enough_for_a_distance(tmp_path):
    real, made = np.random.default_rng(0).integers(0, 256, (2, 300, 3, 6, 6), np.uint8)
    detector = Detector(36)
    path = saved(detector, tmp_path / "inception.pt")
    reference = features_of(real, detector)
    np.savez(tmp_path / "reference.npz", mu=reference.mean(0), sigma=np.cov(reference, rowvar=False))
    options = {"num_samples": 300, "feature_network": path}
    evaluation = quality.Evaluation((3, 6, 6), 0, reference=str(tmp_path / "reference.npz"), **options)
    assert evaluation.notices == ["precision, recall and kernel distance need real images: --data"]
    row = evaluation.measure(Repeated(made), name="generator")
    assert row.frechet_distance == pytest.approx(sum(distance(features_of(made, detector), reference)), rel=1e-5)
    assert row.precision is row.kernel_distance is evaluation.floor.frechet_distance is None
    assert evaluation.measure(Repeated(made), name="generator", record=evaluation.record(row)).recorded
    with pytest.raises(ValueError, match="expected --data or --reference with --feature-network, got neither"):
        quality.Evaluation((3, 6, 6), 0, **options)


def test_levels_are_those_of_the_image():
    levels = torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1)
    assert torch.equal(to_levels(levels.float() / 127.5 - 1), levels.expand(256, 3, 1, 1))
    beyond = torch.tensor([-3.0, -1.01, 1.01, 7.0]).view(4, 1, 1, 1)
    assert to_levels(beyond)[:, 2].flatten().tolist() == [0, 0, 255, 255]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_network_of_floats_is_asked_and_given_floats(channels, tmp_path):
    network = Floats(channels)
    found = load_feature_network(saved(network, tmp_path / "inception.pt"))
    images = torch.rand(5, channels, 8, 8) * 2 - 1
    with pytest.warns(
        UserWarning, match=r"inception.pt refuses uint8 images, and is given floats in \[-1, 1\]"
    ) as seen:
        torch.testing.assert_close(found(images)[0], network(images).detach())
        found(images)
    assert len([warning for warning in seen if "uint8" in str(warning.message)]) == 1


class Large(nn.Module):
    """A network of uint8 images for which memory ends, and which takes anything where it does not."""

    def __init__(self):
        super().__init__()
        self.projection = nn.Parameter(torch.ones(36, 4))

    def forward(self, images: torch.Tensor, return_features: bool = False):
        if return_features:
            return torch.zeros(1 << 50, 4)
        return images.to(torch.float32).flatten(1)[:, :36] @ self.projection


def test_memory_that_ends_is_no_refusal_of_uint8_images(tmp_path):
    found = load_feature_network(saved(Large(), tmp_path / "detector.pt"))
    with pytest.raises(ValueError, match=r"detector.pt to take images of shape .*allocate memory") as error:
        verify(found, (3, 6, 6), "it")
    assert ran_out_of_memory(error.value)


def test_what_it_cannot_take_is_one_line(tmp_path):
    path = saved(Detector(36, refuses_floats=True), tmp_path / "detector.pt")
    for shape, message in (
        ((3, 8, 8), r"expected .*detector.pt to take images of shape \(2, 3, 8, 8\), got RuntimeError: .*192"),
        ((2, 6, 6), "expected 1 or 3 channels for a network of uint8 images, got 2"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            verify(load_feature_network(path), shape, "it")
        assert "\n" not in str(error.value)


def test_a_reference_of_another_width_names_both(tmp_path):
    path = saved(Detector(36), tmp_path / "detector.pt")
    np.savez(tmp_path / "other.npz", mu=np.zeros(7), sigma=np.eye(7))
    with pytest.raises(ValueError, match=f"expected a reference of {NUM_FEATURES} features, got 7 in .*other.npz"):
        quality.Evaluation((3, 6, 6), 0, num_samples=9, feature_network=path, reference=str(tmp_path / "other.npz"))
