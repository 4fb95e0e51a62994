"""What the adversarial term judges by: plain PyTorch of its layers, maps of any size, precisions."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from fastdmd.networks.discriminator import Discriminator, ImageDiscriminator


def head(feature_shape, seed=0):
    return Discriminator(feature_shape, random=torch.Generator().manual_seed(seed))


def test_the_published_layers():
    """8x8: convolution 4x4 stride 2, GroupNorm, SiLU, convolution 4x4 stride 4, GroupNorm, SiLU, 1x1 to one logit."""
    network = head((24, 8, 8)).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x = torch.randn(3, 24, 8, 8, dtype=torch.float64)
    own = dict(network.named_parameters())
    expected = F.conv2d(x, own["conv0.weight"], own["conv0.bias"], stride=2, padding=1)
    expected = F.silu(F.group_norm(expected, 6, own["norm0.weight"], own["norm0.bias"]))
    expected = F.conv2d(expected, own["conv1.weight"], own["conv1.bias"], stride=4)
    assert expected.shape == (3, 24, 1, 1)
    expected = F.silu(F.group_norm(expected, 6, own["norm1.weight"], own["norm1.bias"]))
    assert_close(network(x), F.conv2d(expected, own["conv_out.weight"], own["conv_out.bias"]).flatten())


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (7, 7), (8, 8), (9, 14), (17, 1), (32, 32)])
def test_every_pixel_of_any_map_counts(size):
    network = head((8, *size)).double()
    x = torch.randn(2, 8, *size, dtype=torch.float64, requires_grad=True)
    logit = network(x)
    assert logit.shape == (2,)
    (gradient,) = torch.autograd.grad(logit[0], x)
    assert (gradient[0].abs().sum(dim=0) > 0).all() and (gradient[1] == 0).all()


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_features_of_few_channels_are_told_apart(channels):
    """GroupNorm would take a single value of a single channel to zero, whatever it is."""
    network = head((channels, 8, 8)).double()
    x = torch.randn(32, channels, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x.requires_grad_()
    logit = network(x)
    (gradient,) = torch.autograd.grad(logit.sum(), x)
    assert logit.std() > 0.1 and gradient.flatten(1).norm(dim=1).median() > 0.1


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_weights_that_see_padding_alone_have_no_gradient_in_bfloat16(size):
    """Whatever the memory that it lies in held before; gradients of the others are those of float64."""
    network = head((8, size, size))
    x = torch.randn(12, 8, size, size)

    def gradients(dtype):
        weights = [layer.weight for layer in (network.to(dtype).conv0, network.conv1)]
        return torch.autograd.grad(network(x.to(dtype)).square().sum(), weights)

    expected = gradients(torch.float64)
    assert any((gradient == 0).any() for gradient in expected)
    network.to(memory_format=torch.channels_last)
    for _ in range(10):
        freed = [torch.full((1 << power,), torch.nan, dtype=torch.bfloat16) for power in range(8, 18)]
        del freed
        for got, want in zip(gradients(torch.bfloat16), expected, strict=True):
            assert (got[want == 0] == 0).all()
            assert_close(got.double(), want, rtol=0.1, atol=0.1 * want.abs().max().item())


def test_weights_are_a_function_of_the_seed_and_decide_the_precision():
    a, b, other = head((8, 4, 4)), head((8, 4, 4)), head((8, 4, 4), seed=1)
    x = torch.randn(4, 8, 4, 4)
    assert torch.equal(a(x), b(x)) and not torch.equal(a(x), other(x))
    assert a.conv0.weight.std().item() == pytest.approx((1 / (8 * 16)) ** 0.5, rel=0.05)
    low = b.bfloat16()(x)
    assert low.dtype == torch.float32 and b.double()(x).dtype == torch.float64
    assert_close(low, a(x), rtol=0.1, atol=0.1)


def of_images(image_shape, num_classes=3, width=4):
    random = torch.Generator().manual_seed(0)
    return ImageDiscriminator(image_shape, num_classes, sigma_data=0.5, width=width, random=random)


def noised(batch_size, image_shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch_size, *image_shape, generator=generator, dtype=dtype)
    return x, torch.linspace(0.01, 3, batch_size, dtype=dtype), torch.arange(batch_size) % 3


def test_the_layers_for_images():
    """28x28: two convolutions 4x4 of stride 2, one 7x7 to a vector, SiLU between, a row of logits for each class."""
    network = of_images((1, 28, 28)).double()
    x, sigma, labels = noised(4, (1, 28, 28))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    own = dict(network.named_parameters())
    assert [value.shape for name, value in own.items() if name.startswith("convs") and "weight" in name] == [
        (4, 1, 4, 4),
        (8, 4, 4, 4),
        (16, 8, 7, 7),
    ]
    h = x / (sigma**2 + 0.25).sqrt()[:, None, None, None]
    h = F.conv2d(h, own["convs.0.weight"], own["convs.0.bias"], stride=2, padding=1)
    level = F.linear(sigma.log()[:, None] / 4, own["noise_level.weight"], own["noise_level.bias"])
    h = F.silu(h + level[:, :, None, None])
    h = F.silu(F.conv2d(h, own["convs.1.weight"], own["convs.1.bias"], stride=2, padding=1))
    h = F.silu(F.conv2d(h, own["convs.2.weight"], own["convs.2.bias"])).flatten(1)
    expected = [F.linear(h[i], own["logits.weight"][y], own["logits.bias"][y]) for i, y in enumerate(labels)]
    assert_close(network(x, sigma, labels), torch.stack(expected))


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (5, 8), (9, 9), (11, 3), (2, 20), (1, 9), (28, 28), (33, 64)])
def test_every_pixel_of_any_image_counts(size):
    network = of_images((3, *size), num_classes=0).double()
    x, sigma, _ = noised(2, (3, *size))
    logit = network(x.requires_grad_(), sigma)
    assert logit.shape == (2,)
    (gradient,) = torch.autograd.grad(logit[0], x)
    assert (gradient[0].abs().sum(dim=0) > 0).all() and (gradient[1] == 0).all()
    weights = [conv.weight for conv in network.convs]
    for gradient in torch.autograd.grad(network(x, sigma).square().sum(), weights):
        assert (gradient.abs().sum(dim=(0, 1)) > 0).all()  # none sees padding alone


def test_labels_and_levels_decide_and_weights_give_the_precision():
    network, again = of_images((1, 28, 28)), of_images((1, 28, 28))
    x, sigma, labels = noised(6, (1, 28, 28), torch.float32)
    logit = network(x, sigma, labels)
    assert torch.equal(logit, again(x, sigma, labels))
    assert not torch.isclose(logit, network(x, sigma, (labels + 1) % 3)).any()
    assert not torch.isclose(logit, network(x, 2 * sigma, labels)).any()
    low = again.bfloat16()(x, sigma, labels)
    assert low.dtype == torch.float32 and again.double()(x, sigma, labels).dtype == torch.float64
    assert_close(low, logit, rtol=0.1, atol=0.1)
