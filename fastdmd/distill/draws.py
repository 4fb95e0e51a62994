"""Everything random in an iteration, a function of seed and iteration, and the noise levels it is drawn from."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

import torch
from torch import Tensor

from fastdmd import ops
from fastdmd.diffusion import Denoiser, Dynamics, karras_sigmas, lognormal_sigmas
from fastdmd.distill.starts import Start
from fastdmd.randomness import Stream, integers, normals
from fastdmd.sampling import step_normals
from fastdmd.settings import Settings, above, at_least, commas, fail, within

NoiseLevel = Annotated[float, above(0, 1e9)]
LogMean = Annotated[float, within(-10, 10)]  # of ln(sigma): the squares of sigma have to stay in float32
LogDeviation = Annotated[float, above(0, 5)]
DataDeviation = Annotated[float, above(0, 1e6)]
GeneratorInputs = Literal["simulated", "noised-data"]

# What says how the levels of one kind of dynamics are drawn, and nothing of the other's.
KARRAS, LOGNORMAL = ("sigma_min", "sigma_max", "rho"), ("time_mean", "time_std")

RealImages = Callable[[int], tuple[Tensor, Tensor | None]]  # images and labels of an iteration


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoiseSettings(Settings):
    """Noise levels: those that both turns draw, and those that the generator makes images from."""

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
    """The noise level that the generator starts from. Default: the first of --generator-sigmas; without, 80, or the end
    of the teacher's noise schedule if that is less; 1e6 in flow matching, where t = sigma / (1 + sigma) is 1 then."""
    generator_sigmas: Annotated[tuple[float, ...] | None, above(0, 1e9), commas()] = None
    """Noise levels of a generator of several steps, the highest first, separated by commas: 80,24.4,5.8,0.9. Default:
    --conditioning-sigma, one step."""
    generator_inputs: GeneratorInputs = "simulated"
    """What a generator of several steps learns from beyond its first: what its own steps before arrive at, noised
    anew, or real images with noise (noised-data), which need --data or the digits beside the embedded teacher."""

    @property
    def num_steps(self) -> int:
        """Of the generator."""
        return 1 if self.generator_sigmas is None else len(self.generator_sigmas)

    @property
    def uses_real_images(self) -> bool:
        """Whether the generator learns from some."""
        return self.generator_inputs == "noised-data"

    def check(self) -> None:
        super().check()
        if not self.sigma_max > self.sigma_min:
            fail(self, "sigma_max", f"> --sigma-min {self.sigma_min}")
        if self.min_step_percent > self.max_step_percent:
            fail(self, "max_step_percent", f"between --min-step-percent {self.min_step_percent} and 1")
        sigmas = self.generator_sigmas
        if sigmas is not None and (not sigmas or any(a <= b for a, b in itertools.pairwise(sigmas))):
            fail(self, "generator_sigmas", "as noise levels, the highest first")
        if sigmas is not None and self.conditioning_sigma not in (None, sigmas[0]):
            fail(self, "conditioning_sigma", f"{sigmas[0]}, with which --generator-sigmas begin")
        if self.generator_inputs != "simulated" and (sigmas is None or len(sigmas) == 1):
            fail(self, "generator_inputs", "together with several --generator-sigmas")

    @property
    def step_range(self) -> tuple[int, int]:
        """First and last index of the schedule that distribution matching draws, both included."""
        last = self.num_train_timesteps - 1
        return (
            min(int(self.min_step_percent * self.num_train_timesteps), last),
            min(int(self.max_step_percent * self.num_train_timesteps), last),
        )

    def for_teacher(self, teacher: Denoiser) -> Noise:
        """With the defaults that depend on the teacher filled in.

        Raises ValueError for other dynamics than its own, for levels beyond its own, and as `check` does.
        """
        self.check()
        if self.dynamics not in (None, teacher.dynamics):
            fail(self, "dynamics", f"{teacher.dynamics}, as the teacher was trained")
        for name in KARRAS if teacher.dynamics == "flow" else LOGNORMAL:
            if getattr(self, name) != (default := getattr(NoiseSettings, name)):
                fail(self, name, f"{default}, as it says nothing of {teacher.dynamics} dynamics")
        limit = getattr(teacher, "sigma_max", math.inf)
        sigmas = self.generator_sigmas
        if sigmas is None:
            default = 1e6 if teacher.dynamics == "flow" else min(80.0, limit)
            sigmas = (default if self.conditioning_sigma is None else self.conditioning_sigma,)
        if sigmas[0] > limit:
            name = "conditioning_sigma" if self.generator_sigmas is None else "generator_sigmas"
            fail(self, name, f"<= {limit}, the end of the teacher's noise schedule")
        found = {
            "dynamics": teacher.dynamics,
            "conditioning_sigma": sigmas[0],
            "generator_sigmas": sigmas,
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
    generator_sigmas: tuple[float, ...] = dataclasses.field()

    def levels(self, device: torch.device) -> Tensor:
        """The noise levels, ascending, float32 `[num_train_timesteps]`."""
        if self.dynamics == "flow":
            return lognormal_sigmas(self.num_train_timesteps, mean=self.time_mean, std=self.time_std, device=device)
        return karras_sigmas(
            self.num_train_timesteps, sigma_min=self.sigma_min, sigma_max=self.sigma_max, rho=self.rho, device=device
        )

    def draws(
        self,
        network: Denoiser,
        batch_size: int,
        seed: int,
        device: torch.device,
        real: RealImages | None = None,
        *,
        first_sample: int = 0,
    ) -> Callable[[int], Draws]:
        """The random inputs of every iteration, as a function of its number; `real` gives the images that are noised.

        They are those of the rows `[first_sample, first_sample + batch_size)` of a larger batch. Raises ValueError
        where real images are needed and not given, or the other way round.
        """
        if self.uses_real_images != (real is not None):
            given = "none" if real is None else "some"
            raise ValueError(
                f"fastdmd.Noise: expected real images for --generator-inputs noised-data alone, got {given} for "
                f"{self.generator_inputs}"
            )
        sigmas, shape = self.levels(device), (batch_size, *network.image_shape)
        min_step, max_step = self.step_range
        at = functools.partial(draw, shape, network.num_classes, sigmas, min_step, max_step, seed=seed)
        return lambda step: at(step=step, first_sample=first_sample, num_steps=self.num_steps, real=real)


@dataclasses.dataclass(frozen=True)
class Draws(Start):
    """Everything random in one iteration, a function of seed, iteration and sample.

    Noise of the turns is made where images are noised, from a key, or given in its place.
    """

    dm_sigma: Tensor  # [B], noise levels of the generator turn
    fake_sigma: Tensor  # [B], noise levels of the guidance turn
    _: dataclasses.KW_ONLY
    dm_key: Tensor | None = None  # [4], of ops.rng_key
    dm_noise: Tensor | None = None  # or else [B, C, H, W]
    fake_key: Tensor | None = None  # [4]
    fake_noise: Tensor | None = None  # or else [B, C, H, W]


Drawn = TypeVar("Drawn", bound=Draws)


def keys_of(draws: Draws) -> dict[str, Tensor]:
    """Its keys, by the names of their fields."""
    return {name: value for name, value in vars(draws).items() if name.endswith("_key") and value is not None}


def materialised(draws: Drawn) -> Drawn:
    """The same with noise in memory in place of its keys, for loops that want it there."""
    found: dict[str, Any] = {}
    for name, key in keys_of(draws).items():
        found |= {name: None, f"{name.removesuffix('key')}noise": normals(draws.noise.shape, key).to(draws.noise.dtype)}
    return dataclasses.replace(draws, **found)


def draw(
    shape: tuple[int, ...],
    num_classes: int,
    sigmas: Tensor,
    min_step: int,
    max_step: int,
    *,
    seed: int,
    step: int,
    first_sample: int = 0,
    num_steps: int = 1,
    real: RealImages | None = None,
) -> Draws:
    """The random inputs of iteration `step`, of samples from `first_sample` on.

    `shape` is (B, C, H, W), `sigmas` are the noise levels `[N]`, on whose device the draws will be. The generator turn
    takes its noise level uniformly from `sigmas[min_step .. max_step]`, both included, the guidance turn from all of
    `sigmas`; labels are uniform over `num_classes` (None if 0). Of a generator of several steps, sample i is at step
    i mod `num_steps`. With `real` it starts from these images and noise, and has their labels, but at the first step,
    which starts from noise.
    """
    device = sigmas.device

    def key(stream: Stream) -> Tensor:
        return ops.rng_key(seed, stream=stream, iteration=step, first_sample=first_sample, device=device)

    def uniform(low: int, high: int, stream: Stream) -> Tensor:
        place: dict[str, Any] = {"iteration": step, "first_sample": first_sample, "device": device}
        return integers(low, high, shape[0], seed=seed, stream=stream, **place)

    draws = Draws(
        noise=normals(shape, key(Stream.GENERATOR_NOISE)),
        class_labels=uniform(0, num_classes, Stream.CLASS) if num_classes else None,
        dm_sigma=sigmas[uniform(min_step, max_step + 1, Stream.DM_LEVEL)],
        dm_key=key(Stream.DM_NOISE),
        fake_sigma=sigmas[uniform(0, len(sigmas), Stream.FAKE_LEVEL)],
        fake_key=key(Stream.FAKE_NOISE),
    )
    if num_steps == 1:
        return draws
    if real is None:
        return dataclasses.replace(draws, step_noise=step_normals(num_steps - 1, shape, key(Stream.STEP_NOISE)))
    images, labels = real(step)
    if draws.class_labels is not None and labels is not None:
        of_first_step = torch.arange(first_sample, first_sample + shape[0], device=device) % num_steps == 0
        draws = dataclasses.replace(draws, class_labels=torch.where(of_first_step, draws.class_labels, labels))
    return dataclasses.replace(draws, start_images=images)
