"""Networks of every parameterization that are exact: the same denoiser, at the timesteps of their schedules."""

from typing import get_args

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from fastdmd import diffusion
from fastdmd.networks.adapted import Adapted

SD, SIGMA_DATA = 0.7, 0.5  # of the data, and as EDM's coefficients assume it
SHAPE = {"image_shape": (2, 4, 4), "num_classes": 0, "sigma_data": SIGMA_DATA}
ALPHAS_CUMPROD = diffusion.ddpm_alphas_cumprod("linear")


class Optimal(nn.Module):
    """What the best network gives for images distributed as N(0, SD^2), from its own inputs and nothing else."""

    def __init__(self, output, sign=1.0, time_scale=1.0, to_image=False):
        super().__init__()
        self.output, self.sign, self.time_scale, self.to_image = output, sign, time_scale, to_image
        self.one = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x, level):
        return self.one * self.expected(x, level[:, None, None, None])

    def expected(self, x, level):
        if self.output == "x0":
            return SD**2 / (SD**2 + level**2) * x
        if self.output == "edm":  # the target of F_x is (image - c_skip x) / c_out
            sigma = (4 * level).exp()
            total = (SIGMA_DATA**2 + sigma**2).sqrt()
            image = SD**2 / (SD**2 + sigma**2) * x * total
            return (image - SIGMA_DATA**2 / total * x) * total / (sigma * SIGMA_DATA)
        if self.output == "flow":  # of x = (1 - t) image + t noise
            t = 1 - level / self.time_scale if self.to_image else level / self.time_scale
            image, noise = SD**2 * (1 - t), t  # covariances with x
            return self.sign * (noise - image) / (SD**2 * (1 - t) ** 2 + t**2) * x
        abar = ALPHAS_CUMPROD[level.round().long()]  # of x = sqrt(abar) image + sqrt(1 - abar) noise
        image, noise = abar.sqrt() * SD**2, (1 - abar).sqrt()
        variance = abar * SD**2 + 1 - abar
        if self.output == "v":
            return (abar.sqrt() * noise - (1 - abar).sqrt() * image) / variance * x
        return (noise if self.output == "epsilon" else image) / variance * x


@pytest.mark.parametrize(
    ("network", "options"),
    [
        (Optimal("x0"), {"parameterization": "x0"}),
        (Optimal("edm"), {"parameterization": "edm"}),
        (Optimal("epsilon"), {"parameterization": "epsilon"}),
        (Optimal("v"), {"parameterization": "v", "alphas_cumprod": ALPHAS_CUMPROD}),
        (Optimal("image"), {"parameterization": "x0", "noise_schedule": "linear", "timesteps": "integer"}),
        (Optimal("flow"), {"parameterization": "flow"}),
        (Optimal("flow", time_scale=1000), {"parameterization": "flow", "time_scale": 1000}),
        (
            Optimal("flow", sign=-1, to_image=True),
            {"parameterization": "flow", "velocity": "image-noise", "time_direction": "to-image"},
        ),
    ],
)
def test_optimal_networks_of_all_kinds_are_the_same_denoiser(network, options):
    """D_x = SD^2 / (SD^2 + sigma^2) x, exactly, at the noise levels of a schedule."""
    sigma = ((1 - ALPHAS_CUMPROD) / ALPHAS_CUMPROD).sqrt()[[0, 1, 10, 300, 700, 998, 999]]
    x = torch.randn(len(sigma), 2, 4, 4, dtype=torch.float64) * (SD**2 + sigma**2).sqrt()[:, None, None, None]
    denoiser = Adapted(network, **options, **SHAPE)
    expected = (SD**2 / (SD**2 + sigma**2))[:, None, None, None] * x
    assert_close(denoiser(x, sigma), expected, rtol=1e-9, atol=1e-9)
    assert denoiser.dynamics == ("flow" if options["parameterization"] == "flow" else "edm")


@pytest.mark.parametrize("schedule", get_args(diffusion.NoiseSchedule))
def test_timesteps_follow_the_schedule(schedule):
    """Each level's own timestep at its sigma, the geometric mean half way, the ends beyond them; ascending."""
    denoiser = Adapted(Optimal("v"), parameterization="v", noise_schedule=schedule, num_train_timesteps=50, **SHAPE)
    abar = diffusion.ddpm_alphas_cumprod(schedule, 50)
    sigmas = ((1 - abar) / abar).sqrt()
    assert_close(denoiser.timestep(sigmas), torch.arange(50.0).double(), rtol=0, atol=1e-4)
    half_way = (sigmas[1:] * sigmas[:-1]).sqrt()
    assert_close(denoiser.timestep(half_way), torch.arange(49.0).double() + 0.5, rtol=0, atol=1e-4)
    beyond = torch.stack([sigmas[0] / 100, sigmas[-1] * 100]).float()
    assert denoiser.timestep(beyond).tolist() == [0, 49]
    dense = denoiser.timestep(torch.logspace(-4, 4, 5000))
    assert (dense.diff() >= 0).all() and dense.frac().unique().numel() > 500
    rounded = Adapted(
        Optimal("v"),
        parameterization="v",
        noise_schedule=schedule,
        num_train_timesteps=50,
        timesteps="integer",
        **SHAPE,
    ).timestep(half_way * 1.0001)
    assert rounded.dtype == torch.int64 and torch.equal(rounded, torch.arange(1, 50))
