"""Images from noise: what is known in closed form, and how often the network is asked."""

import math

import pytest
import torch
from torch.testing import assert_close

from fastdmd import diffusion
from fastdmd.sampling import Generator, HeunSampler, clamp_images, draw_step_noise, with_fewer_steps
from tests.helpers.networks import make_network


def gaussian_denoiser(variance, mean=0.5):
    """The exact denoiser of data distributed as N(mean, variance)."""
    calls = []

    def denoise(x, sigma, class_labels):
        calls.append(sigma[0].item())
        gain = variance / (variance + diffusion.per_sample(sigma) ** 2)
        return mean + gain * (x - mean)

    return denoise, calls


@pytest.mark.parametrize("num_steps", [1, 2, 18])
def test_heun_counts_its_evaluations(num_steps):
    denoise, calls = gaussian_denoiser(0.25)
    sampler = HeunSampler(denoise, num_steps)
    sampler(torch.randn(2, 1, 4, 4))
    assert len(calls) == sampler.num_evaluations == 2 * num_steps - 1
    assert [calls[0], min(calls)] == pytest.approx([80.0, 0.002 if num_steps > 1 else 80.0], rel=1e-4)


def test_heun_solves_the_gaussian_case_to_second_order():
    """The probability flow of N(mean, v) is known: x(0) - mean = (x(T) - mean) * sqrt(v / (v + T^2))."""
    noise = torch.randn(4, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = 0.5 + (noise * 80 - 0.5) * (0.25 / (0.25 + 80**2)) ** 0.5
    errors = []
    for num_steps in (18, 36, 72):
        sample = HeunSampler(gaussian_denoiser(0.25)[0], num_steps)(noise)
        errors.append((sample - exact).abs().max().item())
    assert errors[0] < 0.1
    assert errors[0] / errors[1] > 3 and errors[1] / errors[2] > 3  # halving the step quarters the error


def test_heun_starts_at_the_highest_level_of_the_network():
    denoise, calls = gaussian_denoiser(0.25)
    denoise.sigma_max = 10.0
    HeunSampler(denoise, 3)(torch.randn(2, 1, 4, 4))
    assert max(calls) == pytest.approx(10)
    with pytest.raises(ValueError, match="expected num_steps >= 1, got 0"):
        HeunSampler(denoise, 0)(torch.randn(2, 1, 4, 4))


def test_levels_of_heun_are_those_that_are_asked_for():
    levels = HeunSampler(gaussian_denoiser(0.25)[0], 3, sigma_min=0.5, rho=1.0).levels()
    assert levels == pytest.approx([80.0, 40.25, 0.5, 0.0], rel=1e-5)
    with pytest.raises(ValueError, match="expected rho > 0 and finite, got 0"):
        HeunSampler(gaussian_denoiser(0.25)[0], 3, rho=0.0).levels()


def test_a_generator_makes_images_in_one_step_or_several():
    """The exact denoiser of N(mean, v): each level shrinks what it is given to mean + v / (v + sigma^2) (x - mean)."""
    noise = torch.randn(2, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    fresh = torch.randn(noise.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    denoise, calls = gaussian_denoiser(0.25)
    one = Generator(denoise, (80.0,))
    expected = 0.5 + 0.25 / (0.25 + 80.0**2) * (80.0 * noise - 0.5)
    torch.testing.assert_close(one(noise), expected)
    several = Generator(denoise, (80.0, 2.0))
    calls.clear()
    images = several(noise, random=torch.Generator().manual_seed(7))
    assert calls == [80.0, 2.0] and (one.num_evaluations, several.num_evaluations) == (1, 2)
    torch.testing.assert_close(images, 0.5 + 0.25 / (0.25 + 4) * (expected + 2 * fresh - 0.5))


def test_what_sampling_arrives_at():
    """Level by level of a network of ours, as anyone would write it; those of fewer steps begin alike."""
    network, labels = make_network().double(), torch.tensor([3, 7])
    sigmas = (80.0, 6.0, 0.5)
    generator = Generator(network, sigmas)
    random = torch.Generator().manual_seed(1)
    noise = torch.randn(2, 1, 28, 28, dtype=torch.float64, generator=random)
    step_noise = draw_step_noise(2, noise, random)
    assert step_noise.shape == (2, 2, 1, 28, 28) and step_noise.dtype == torch.float64
    again = torch.Generator().manual_seed(1)
    torch.randn(noise.shape, dtype=torch.float64, generator=again)
    assert torch.equal(draw_step_noise(1, noise, again), step_noise[:, :1]) and draw_step_noise(0, noise, None) is None
    x = sigmas[0] * noise
    for index, sigma in enumerate(sigmas):
        x_0 = network(x, torch.full((2,), sigma, dtype=torch.float64), labels)
        fewer = Generator(network, sigmas[: index + 1])
        torch.testing.assert_close(fewer(noise, labels, step_noise=step_noise[:, :index] if index else None), x_0)
        if index < 2:
            x = x_0 + sigmas[index + 1] * step_noise[:, index]
    assert [one.sigmas for one in generator.shorter] == [sigmas[:2], sigmas[:1]] and generator.num_step_noises == 2
    names = {name: one.num_evaluations for name, one in with_fewer_steps("it", generator).items()}
    assert names == {"it": 3, "it, 2 steps": 2, "it, 1 step": 1}
    assert with_fewer_steps("it", one := HeunSampler(network)) == {"it": one}


@pytest.mark.parametrize("shape", [(2, 1, 1, 4, 4), (2, 2, 4, 4), (1, 2, 1, 4, 4)], ids=str)
def test_noise_of_other_steps_is_refused(shape):
    generator = Generator(gaussian_denoiser(0.25)[0], (80.0, 5.0, 0.5))
    with pytest.raises(ValueError, match="^fastdmd.Generator: expected step_noise of shape .*, got") as raised:
        generator(torch.zeros(2, 1, 4, 4), step_noise=torch.zeros(shape))
    assert str(raised.value).endswith(f"(2, 2, 1, 4, 4), got {shape}")


@pytest.mark.parametrize(
    "sigmas", [(), 80.0, (0.0,), (-1.0,), (math.nan,), (math.inf,), (2.0, 80.0), (2.0, 2.0)], ids=str
)
def test_levels_that_cannot_be_are_refused(sigmas):
    with pytest.raises(ValueError, match="expected a tuple of positive noise levels, the highest first, got"):
        Generator(gaussian_denoiser(0.25)[0], sigmas)


def test_a_generator_is_differentiable():
    scale = torch.ones((), requires_grad=True)
    noise = torch.randn(3, 1, 2, 2)
    Generator(lambda x, sigma, labels: scale * x, (5.0,))(noise).sum().backward()
    torch.testing.assert_close(scale.grad, 5 * noise.sum())


def test_clamped_images_and_their_gradient():
    """Of descent, what leads further out than the margin is left away and what leads back is kept."""
    images = torch.tensor([-1.5, -1.5, -1.2, 0.2, 1.2, 1.5, 1.5, math.nan], requires_grad=True)
    grad = torch.tensor([2.0, -2.0, 2.0, 3.0, -4.0, -5.0, 5.0, 6.0])
    clamped = clamp_images(images)
    assert_close(clamped.detach(), torch.tensor([-1.0, -1.0, -1.0, 0.2, 1.0, 1.0, 1.0, math.nan]), equal_nan=True)
    clamped.backward(grad)
    assert images.grad.tolist() == [0.0, -2.0, 2.0, 3.0, -4.0, 0.0, 5.0, 6.0]
    with torch.no_grad():
        assert_close(clamp_images(images), clamped, equal_nan=True)


def test_a_clamped_generator_clamps_at_every_step():
    noise = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    fresh = torch.randn(2, 1, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    generator = Generator(lambda x, sigma, labels: x / 2, (5.0, 3.0), clamped=True)
    expected = (((2.5 * noise).clamp(-1, 1) + 3 * fresh[:, 0]) / 2).clamp(-1, 1)
    assert_close(generator(noise, step_noise=fresh), expected)
    assert (expected.abs() == 1).any() and (expected.abs() < 1).any()
