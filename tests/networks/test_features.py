"""Encoder features: those of passes apart, values and gradients, from our networks and from anybody's."""

import functools

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from fastdmd import diffusion
from fastdmd.distill.execution import Executor
from fastdmd.networks.adapted import Adapted
from fastdmd.networks.unet import UNet
from tests.helpers.networks import make_network
from tests.networks.test_adapted import Tiny
from tests.networks.test_unet import VARIANTS

OPTIONS = {"image_shape": (1, 8, 8), "num_classes": 3, "labels": "one_hot", "sigma_data": 0.5}


class TinyWithFeatures(Tiny):
    feature_shape = (8, 8, 8)

    def features(self, x, level, labels=None):
        return self.conv_in(x) + self.level(level.log1p()[:, None])[:, :, None, None]


def foreign(network, **options):
    return Adapted(network, **{"parameterization": "v", **OPTIONS, **options})


def inputs(network, B=5):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, *network.image_shape, generator=generator, dtype=torch.float64, requires_grad=True)
    sigma = torch.tensor([0.05, 3.0, 0.4, 40.0, 1.0], dtype=torch.float64)
    labels = torch.arange(B) % network.num_classes if network.num_classes else None
    return x, sigma, labels


def rows(values, part):
    return [None if value is None else value[part] for value in values]


@pytest.mark.parametrize("num_denoised", [0, 2, 5])
@pytest.mark.parametrize("make", [*VARIANTS.values(), TinyWithFeatures], ids=[*VARIANTS, "foreign"])
def test_features_are_those_of_passes_apart(make, num_denoised):
    """The encoder on all rows and the decoder on the first ones: values, and gradients of weights and images."""
    network = (foreign(make()) if make is TinyWithFeatures else make_network(make)).double().requires_grad_(True)
    x, sigma, labels = inputs(network)
    weights = list(network.parameters())
    D_x, features = network.with_features(x, sigma, labels, num_denoised=num_denoised)
    assert D_x.shape == (num_denoised, *network.image_shape) and features.shape == (5, *network.feature_shape)
    together = torch.autograd.grad(D_x.sin().sum() + features.sin().sum(), [x, *weights], allow_unused=True)

    alone = rows((x, sigma, labels), slice(num_denoised))
    expected = network(*alone) if num_denoised else D_x
    assert_close(D_x, expected)
    apart = [network.with_features(*rows((x, sigma, labels), [row]), num_denoised=0)[1] for row in range(5)]
    assert_close(features, torch.cat(apart))
    assert (features.detach()[0] - features.detach()[1]).abs().mean() > 1e-3
    total = expected.sin().sum() + torch.cat(apart).sin().sum()
    for got, want in zip(together, torch.autograd.grad(total, [x, *weights], allow_unused=True), strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            assert_close(got, want)


def test_features_of_a_unet_are_what_its_middle_gives_its_decoder():
    network = make_network().double()
    x, sigma, labels = inputs(network)
    seen = []
    network.middle[-1].register_forward_hook(lambda module, arguments, output: seen.append(output))
    network(x, sigma, labels)
    assert_close(network.with_features(x, sigma, labels, num_denoised=0)[1], seen[0])


def test_features_of_a_foreign_network_are_of_its_own_inputs():
    network = foreign(TinyWithFeatures(), noise_schedule="cosine").double()
    x, sigma, labels = inputs(network)
    x_vp = x / (1 + diffusion.per_sample(sigma) ** 2).sqrt()
    expected = network.network.features(x_vp, network.timestep(sigma), None)
    assert_close(network.with_features(x, sigma, labels, num_denoised=1)[1], expected)


def test_compiled_features(monkeypatch):
    """A compiled denoiser gives them, too; traced, without the seconds that kernels take."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    network = make_network(VARIANTS["unconditional, one level"]).double()
    x, sigma, labels = inputs(network)
    compiled = Executor("compiled", torch.device("cpu")).denoiser(network)
    for got, want in zip(
        compiled.with_features(x, sigma, labels, num_denoised=2),
        network.with_features(x, sigma, labels, num_denoised=2),
        strict=True,
    ):
        assert_close(got, want)


class Shapeless(TinyWithFeatures):
    feature_shape = 8


class Classifier(Tiny):
    """As torchvision's: `features` without a shape."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Identity())


@pytest.mark.parametrize("kind", [Tiny, Shapeless, Classifier])
def test_networks_without_features_say_what_is_missing(kind):
    network = foreign(kind())
    assert network.feature_shape is None
    message = (
        f"fastdmd.with_features: expected {kind.__name__} to have feature_shape, .* and features\\(x, level, labels\\)"
    )
    with pytest.raises(ValueError, match=message):
        network.require_features()
    with pytest.raises(ValueError, match=message):
        network.with_features(torch.zeros(1, 1, 8, 8), torch.ones(1), torch.zeros(1).long(), num_denoised=1)


def test_features_of_another_shape_than_said():
    class Wrong(TinyWithFeatures):
        feature_shape = (8, 4, 4)

    with pytest.raises(
        ValueError,
        match=r"expected features.x, level, labels. to give .* of shape \(2, 8, 4, 4\), got \(2, 8, 8, 8\) of",
    ):
        foreign(Wrong()).with_features(torch.zeros(2, 1, 8, 8), torch.ones(2), torch.zeros(2).long(), num_denoised=1)


def test_a_meta_network_knows_its_features():
    with torch.device("meta"):
        assert UNet(VARIANTS["rgb, three levels, heads"]).feature_shape == (24, 4, 4)
