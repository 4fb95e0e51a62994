"""Everything random in an iteration, as a function of seed and iteration, and the noise levels it is drawn from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Annotated

import torch
from torch import Tensor

from fastdmd.diffusion import Denoiser, Dynamics, karras_sigmas, lognormal_sigmas, random_generator
from fastdmd.settings import Settings, above, at_least, fail, within

NoiseLevel = Annotated[float, above(0, 1e9)]
LogMean = Annotated[float, within(-10, 10)]  # of ln(sigma): the squares of sigma have to stay in float32
LogDeviation = Annotated[float, above(0, 5)]
DataDeviation = Annotated[float, above(0, 1e6)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoiseSettings(Settings):
    """Noise levels: those that both turns draw, and the one that the generator starts from."""

    num_train_timesteps: Annotated[int, at_least(2, 10**6)] = 1000
    """Number of noise levels in the Karras schedule."""
    sigma_min: NoiseLevel = 0.002
    """Least noise level."""
    sigma_max: NoiseLevel = 80.0
    """Greatest noise level; at most that of the teacher's noise schedule, if it has one."""
    rho: Annotated[float, within(0.1, 1000)] = 7.0
    """Exponent of the Karras schedule."""
    sigma_data: DataDeviation | None = None
    """Standard deviation of the data in the fake score's loss weight. Default: the teacher's."""
    min_step_percent: Annotated[float, within(0, 1)] = 0.02
    """Distribution matching draws noise levels from this fraction of the schedule ..."""
    max_step_percent: Annotated[float, within(0, 1)] = 0.98
    """... to this one."""
    dynamics: Dynamics | None = None
    """How noise levels are drawn and weighted: Karras et al.'s way, or flow matching's. Default: the teacher's."""
    time_mean: LogMean = 0.0
    """Flow matching: mean of logit(t), from which noise levels are drawn."""
    time_std: LogDeviation = 1.0
    """Flow matching: standard deviation of logit(t)."""
    conditioning_sigma: NoiseLevel | None = None
    """The noise level that the one-step generator starts from. Default: 80, or the end of the teacher's noise schedule
    if that is less; 1e6 in flow matching, where t = sigma / (1 + sigma) is 1 then."""

    def check(self) -> None:
        super().check()
        if not self.sigma_max > self.sigma_min:
            fail(self, "sigma_max", f"> --sigma-min {self.sigma_min}")
        if self.min_step_percent > self.max_step_percent:
            fail(self, "max_step_percent", f"between --min-step-percent {self.min_step_percent} and 1")

    @property
    def step_range(self) -> tuple[int, int]:
        """First and last index of the schedule that distribution matching draws, both included."""
        last = self.num_train_timesteps - 1
        return (
            min(int(self.min_step_percent * self.num_train_timesteps), last),
            min(int(self.max_step_percent * self.num_train_timesteps), last),
        )

    def for_teacher(self, teacher: Denoiser) -> Noise:
        """With the defaults that depend on the teacher filled in. Raises ValueError for other dynamics than its own."""
        if self.dynamics not in (None, teacher.dynamics):
            fail(self, "dynamics", f"{teacher.dynamics}, as the teacher was trained")
        limit = getattr(teacher, "sigma_max", math.inf)
        conditioning_sigma = 1e6 if teacher.dynamics == "flow" else min(80.0, limit)
        found = {
            "dynamics": teacher.dynamics,
            "conditioning_sigma": conditioning_sigma if self.conditioning_sigma is None else self.conditioning_sigma,
            "sigma_data": teacher.sigma_data if self.sigma_data is None else self.sigma_data,
            "sigma_max": min(self.sigma_max, limit),
        }
        return Noise(**(vars(self) | found))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Noise(NoiseSettings):
    """`NoiseSettings` with nothing left open."""

    dynamics: Dynamics = dataclasses.field()
    sigma_data: float = dataclasses.field()
    conditioning_sigma: float = dataclasses.field()

    def levels(self, device: torch.device) -> Tensor:
        """The noise levels, ascending, float32 `[num_train_timesteps]`."""
        if self.dynamics == "flow":
            return lognormal_sigmas(self.num_train_timesteps, mean=self.time_mean, std=self.time_std, device=device)
        return karras_sigmas(
            self.num_train_timesteps, sigma_min=self.sigma_min, sigma_max=self.sigma_max, rho=self.rho, device=device
        )

    def draws(self, network: Denoiser, batch_size: int, seed: int, device: torch.device) -> Callable[[int], Draws]:
        """The random inputs of every iteration, as a function of its number."""
        sigmas, shape = self.levels(device), (batch_size, *network.image_shape)
        min_step, max_step = self.step_range
        return lambda step: draw(shape, network.num_classes, sigmas, min_step, max_step, seed=seed, step=step)


@dataclasses.dataclass(frozen=True)
class Draws:
    """Everything random in one iteration, a function of (seed, step)."""

    noise: Tensor  # [B, C, H, W], what the generator starts from
    class_labels: Tensor | None  # int64 [B]
    dm_sigma: Tensor  # [B], noise levels of the generator turn
    dm_noise: Tensor  # [B, C, H, W]
    fake_sigma: Tensor  # [B], noise levels of the guidance turn
    fake_noise: Tensor  # [B, C, H, W]


def draw(
    shape: tuple[int, ...], num_classes: int, sigmas: Tensor, min_step: int, max_step: int, *, seed: int, step: int
) -> Draws:
    """The random inputs of iteration `step`.

    `shape` is (B, C, H, W), `sigmas` are the noise levels `[N]`, on whose device the draws will be. The generator turn
    takes its noise level uniformly from `sigmas[min_step .. max_step]`, both included, the guidance turn from all of
    `sigmas`; labels are uniform over `num_classes` (None if 0).
    """
    device = sigmas.device
    generator = random_generator(seed, step, device)

    def normal() -> Tensor:
        return torch.randn(shape, device=device, generator=generator)

    def integers(low: int, high: int) -> Tensor:
        return torch.randint(low, high, shape[:1], device=device, generator=generator)

    return Draws(
        noise=normal(),
        class_labels=integers(0, num_classes) if num_classes else None,
        dm_sigma=sigmas[integers(min_step, max_step + 1)],
        dm_noise=normal(),
        fake_sigma=sigmas[integers(0, len(sigmas))],
        fake_noise=normal(),
    )
