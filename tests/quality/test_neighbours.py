"""Nearest real images, against all distances one by one."""

import math

import pytest
import torch

from fastdmd.quality.neighbours import nearest, pixels


def test_neighbours_are_the_nearest():
    random = torch.Generator().manual_seed(0)
    real, samples = torch.randn(230, 5, generator=random), torch.randn(120, 5, generator=random)
    found = nearest(samples, real, 3)
    distances = (samples[:, None].double() - real.double()).norm(dim=2)
    expected = distances.sort(dim=1)
    assert torch.equal(found.indices, expected.indices[:, :3])
    torch.testing.assert_close(found.distances.double(), expected.values[:, :3])
    others = (real[:, None].double() - real.double()).norm(dim=2).fill_diagonal_(math.inf).amin(1)
    assert found.usual == pytest.approx(others.median().item(), rel=1e-6)
    assert found.ratio == pytest.approx(expected.values[:, 0].median().item() / found.usual, rel=1e-6)


def test_copies_are_at_no_distance_and_others_are_not():
    real = torch.randn(300, 8, generator=torch.Generator().manual_seed(1)) * 1e3
    copied = nearest(real[17:60], real, 1)
    assert copied.ratio == 0 and copied.indices[:, 0].tolist() == list(range(17, 60))
    fresh = torch.randn(300, 8, generator=torch.Generator().manual_seed(2)) * 1e3
    assert 0.8 < nearest(fresh, real, 1).ratio < 1.2
    assert math.isnan(nearest(real[:2], real[:1].expand(5, 8), 1).ratio)


def test_pixels_are_made_small():
    images = torch.arange(2 * 3 * 32 * 32, dtype=torch.float32).view(2, 3, 32, 32)
    assert torch.equal(pixels(images)[1, :2], images[1, 0, :2, :4].unfold(1, 2, 2).mean((0, 2)))
    assert pixels(images).shape == (2, 3 * 16 * 16) and pixels(images[..., :4, :5]).shape == (2, 3 * 20)


@pytest.mark.parametrize(
    ("samples", "real", "message"),
    [
        (torch.zeros(3, 2), torch.zeros(9, 4), r"features \(N, D\) and \(M, D\), got \(3, 2\) and \(9, 4\)"),
        (torch.zeros(0, 2), torch.zeros(9, 2), "a sample and more than 3 real images, got 0 and 9"),
        (torch.zeros(3, 2), torch.zeros(3, 2), "a sample and more than 3 real images, got 3 and 3"),
        (torch.full((3, 2), math.nan), torch.zeros(9, 2), "finite features, got NaN or infinity"),
    ],
)
def test_what_has_no_neighbours(samples, real, message):
    with pytest.raises(ValueError, match=f"fastdmd.neighbours: expected {message}"):
        nearest(samples, real)
