"""Images moved by pixels: against slices of a larger image, with their gradients, and how far they are moved."""

import collections

import pytest
import torch

from fastdmd.distill import gan
from fastdmd.distill.gan import GANSettings
from fastdmd.distill.translation import translate
from fastdmd.runs import distillation
from tests.helpers.adversarial import CONFIG, TINY, real_images, shifted
from tests.helpers.networks import make_network
from tests.helpers.op_cases import random

CPU = torch.device("cpu")


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_image_is_moved_by_its_own_pixels(dtype, layout):
    shift = torch.tensor([(down, right) for down in range(-4, 5) for right in range(-6, 7)])
    x = random(len(shift), 3, 5, 7).to(dtype).contiguous(memory_format=layout)
    y = translate(x, shift)
    assert y.dtype == dtype and torch.equal(y, shifted(x, shift))
    centre = 4 * 13 + 6
    assert torch.equal(y[centre], x[centre]) and not torch.equal(y[0], x[0])
    assert translate(x, None) is x


def test_a_gradient_goes_back_to_where_pixels_came_from():
    shift = torch.tensor([[0, 0], [2, -1], [-3, 3]])
    x = random(3, 2, 4, 4).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: translate(x, shift), x)
    grad = random(3, 2, 4, 4, seed=1)
    got, expected = (torch.autograd.grad(move(x, shift), x, grad)[0] for move in (translate, shifted))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("shift", [torch.zeros(2, 2), torch.zeros(3, 2, dtype=torch.int64), torch.zeros(2).long()])
def test_other_shifts_are_refused(shift):
    with pytest.raises(ValueError, match=r"expected x of .* and shift int64 of shape \[B, 2\], got x of"):
        translate(torch.zeros(2, 1, 4, 4), shift)


def drawn(translation, **changes):
    config = CONFIG.replace(gan_translation=translation, **changes)
    draws = distillation.make_draws(config, make_network(TINY), CPU, real_images())
    return [draws(step) for step in range(60)]


def test_all_shifts_up_to_the_greatest_are_as_likely():
    """Of images of 8 pixels, a quarter either way is two: 25 shifts, each of 60 x 24 draws some 58 times."""
    both = drawn(0.25, batch_size=24)
    for name in ("gan_shift", "real_shift"):
        counts = collections.Counter(tuple(one) for draws in both for one in getattr(draws, name).tolist())
        assert set(counts) == {(down, right) for down in range(-2, 3) for right in range(-2, 3)}
        assert sum((count - 57.6) ** 2 / 57.6 for count in counts.values()) < 52  # chi-squared of 24, one in a thousand
    same = sum((draws.gan_shift == draws.real_shift).all(dim=1).float().mean().item() for draws in both) / 60
    assert same < 0.08  # 1/25 of two that are independent


@pytest.mark.parametrize(("translation", "reach"), [(0.01, 1), (0.18, 1), (0.19, 2), (0.5, 4)])
def test_shares_are_rounded_to_pixels_at_least_one(translation, reach):
    """Of eight."""
    for name in ("gan_shift", "real_shift"):
        found = torch.cat([getattr(draws, name) for draws in drawn(translation, batch_size=24)])
        assert [found[:, 0].unique().tolist(), found[:, 1].unique().tolist()] == 2 * [[*range(-reach, reach + 1)]]


def test_images_of_one_pixel_stay_and_without_a_share_all_do():
    assert gan._reach(0.5, 1) == 0 and gan._reach(0.5, 2) == 1
    assert all(draws.gan_shift is None and draws.real_shift is None for draws in drawn(0.0))
    assert GANSettings().gan_translation == 0
    with pytest.raises(ValueError, match="expected --gan-translation .* got 0.6"):
        GANSettings(gan_guidance_weight=1e-2, gan_translation=0.6).check()
