"""Schedules, preconditioning, and the choice of noise levels."""

import math

import pytest
import torch
from torch.testing import assert_close

from benchmarks.textbook import karras_schedule
from fastdmd import diffusion


def test_schedule_matches_golden_values(golden_losses):
    sigmas = diffusion.karras_sigmas(1000)
    assert torch.equal(sigmas, golden_losses["karras_sigmas"])
    assert_close(sigmas, karras_schedule(), rtol=2e-6, atol=0)  # float64, rounded
    for kind in ("dm", "fake"):
        assert torch.equal(sigmas[golden_losses[f"{kind}_timesteps"]], golden_losses[f"{kind}_sigma"])


@pytest.mark.parametrize("options", [{}, {"sigma_min": 0.01, "sigma_max": 5.0, "rho": 3.0}, {"rho": 2.0}])
@pytest.mark.parametrize("num_steps", [2, 18, 1000])
def test_schedule_properties(num_steps, options):
    sigmas = diffusion.karras_sigmas(num_steps, **options)
    low, high = options.get("sigma_min", 0.002), options.get("sigma_max", 80.0)
    assert sigmas.dtype == torch.float32 and len(sigmas) == num_steps
    assert sigmas[[0, -1]].tolist() == pytest.approx([low, high], rel=1e-4)
    assert (sigmas.diff() > 0).all()
    steps = (sigmas.double() ** (1 / options.get("rho", 7.0))).diff()  # evenly spaced in sigma^(1/rho)
    assert_close(steps, steps.mean().expand_as(steps), rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 1}, "expected num_steps >= 2, got 1"),
        ({"sigma_min": 0.0}, "expected 0 < sigma_min < sigma_max < inf, got 0.0 and 80.0"),
        ({"sigma_max": 0.001}, "expected 0 < sigma_min < sigma_max < inf, got 0.002 and 0.001"),
        ({"sigma_max": torch.inf}, "expected 0 < sigma_min < sigma_max < inf, got 0.002 and inf"),
        ({"rho": 0.0}, "expected rho > 0 and finite, got 0.0"),
        ({"rho": torch.inf}, "expected rho > 0 and finite, got inf"),
    ],
)
def test_schedule_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        diffusion.karras_sigmas(**{"num_steps": 10, **options})


@pytest.mark.parametrize(
    ("num_steps", "mean", "std", "message"),
    [
        (1, 0.0, 1.0, "expected num_steps >= 2, got 1"),
        (9, 0.0, -1.0, "expected a finite mean and std > 0, got 0.0 and -1.0"),
        (9, 0.0, 0.0, "expected a finite mean and std > 0, got 0.0 and 0.0"),
        (9, torch.nan, 1.0, "expected a finite mean and std > 0, got nan and 1.0"),
    ],
)
def test_lognormal_levels_refuse(num_steps, mean, std, message):
    with pytest.raises(ValueError, match=f"fastdmd.lognormal_sigmas: {message}"):
        diffusion.lognormal_sigmas(num_steps, mean=mean, std=std)


def test_preconditioning_identities():
    sigma, sd = diffusion.karras_sigmas(200).double(), 0.7
    c_skip, c_out, c_in, c_noise = diffusion.preconditioning(sigma, sd)
    assert_close((sigma**-2 + sd**-2) * c_out**2, torch.ones_like(sigma))  # the weight of the loss
    assert_close(c_in**2 * (sigma**2 + sd**2), torch.ones_like(sigma))  # unit variance of the network's input
    assert_close(c_skip**2 * sigma**2 + (1 - c_skip) ** 2 * sd**2, c_out**2)  # c_skip minimises c_out
    assert_close((4 * c_noise).exp(), sigma)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=lambda dtype: str(dtype)[6:])
def test_preconditioning_keeps_its_digits_in_every_dtype(dtype):
    """Squares of these levels leave the range of float16, and the largest one that of float32."""
    largest = {torch.float16: 6e4}.get(dtype, 1e30)
    sigma = torch.tensor([1e-4, 0.002, 0.5, 80.0, 500.0, largest]).to(dtype)
    exact = diffusion.preconditioning(sigma.double(), 0.5)
    for result, truth in zip(diffusion.preconditioning(sigma, 0.5), exact, strict=True):
        smallest = torch.finfo(dtype).smallest_normal  # c_skip of large levels is less
        assert_close(result.double(), truth, rtol=4 * torch.finfo(dtype).eps, atol=smallest)


def test_preconditioning_has_its_limits():
    """At infinite sigma `D = sd F`, and for infinite sd `D = x + sigma F`."""
    infinite, sigma = torch.tensor([torch.inf]), torch.tensor([0.0, 3.0])
    assert [c.item() for c in diffusion.preconditioning(infinite, 0.7)[:3]] == [0.0, pytest.approx(0.7), 0.0]
    assert [c.tolist() for c in diffusion.preconditioning(sigma, torch.inf)[:3]] == [[1, 1], [0, 3], [0, 0]]
    assert [c[0].item() for c in diffusion.preconditioning(sigma, 0.5)[:3]] == [1, 0, 2]


def test_lognormal_sigma_has_the_stated_moments():
    log_sigma = diffusion.lognormal_sigma(torch.randn(200_000, generator=torch.Generator().manual_seed(0))).log()
    assert log_sigma.mean().item() == pytest.approx(-1.2, abs=0.01)
    assert log_sigma.std().item() == pytest.approx(1.2, abs=0.01)


def test_schedules_match_their_papers():
    """Products of alpha, from betas summed up one by one."""
    for schedule, first, last, power in (("linear", 1e-4, 0.02, 1), ("scaled_linear", 0.00085, 0.012, 2)):
        product, expected = 1.0, []
        for index in range(1000):
            root = first ** (1 / power) + index / 999 * (last ** (1 / power) - first ** (1 / power))
            product *= 1 - root**power
            expected.append(product)
        assert_close(diffusion.ddpm_alphas_cumprod(schedule), torch.tensor(expected, dtype=torch.float64))
    cosine = diffusion.ddpm_alphas_cumprod("cosine")
    for index in (0, 400, 990):
        expected = math.cos(((index + 1) / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
        assert cosine[index].item() == pytest.approx(expected / math.cos(0.008 / 1.008 * math.pi / 2) ** 2, rel=1e-9)
    assert cosine[999] / cosine[998] == pytest.approx(0.001)  # beta is at most 0.999
    assert torch.equal(cosine, diffusion.ddpm_alphas_cumprod("squaredcos_cap_v2"))
    assert diffusion.ddpm_alphas_cumprod("linear", 10, beta_end=0.5)[-1] < 0.1
    for arguments, options, message in (
        (("cosine",), {"beta_end": 0.5}, "expected no beta_start or beta_end with cosine, got None and 0.5"),
        (("sqrt",), {}, "expected schedule out of linear, scaled_linear, cosine, squaredcos_cap_v2, got sqrt"),
        (("linear", 1), {}, "expected num_steps >= 2, got 1"),
        (("linear",), {"beta_start": 0.5}, "expected 0 < beta_start < beta_end < 1, got 0.5 and 0.02"),
    ):
        with pytest.raises(ValueError, match=message):
            diffusion.ddpm_alphas_cumprod(*arguments, **options)
