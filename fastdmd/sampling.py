"""Images from noise: a generator's, in a step or a few, and a teacher's, by Heun's method."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fastdmd import ops
from fastdmd.diffusion import Denoiser, karras_sigmas
from fastdmd.randomness import Stream, normals

CLAMP_MARGIN = 0.25  # beyond [-1, 1], up to which a gradient leads clamped images further out


class Sampler(Protocol):
    """`sampler(noise, class_labels, step_noise=step_noise) -> images`, `[B, C, H, W]`: standard normal of that shape,
    int64 `[B]` or None, and what `step_normals` gives."""

    @property
    def network(self) -> Denoiser: ...

    @property
    def num_evaluations(self) -> int: ...  # of the network, for an image

    @property
    def num_step_noises(self) -> int: ...  # for an image, besides the noise that it starts from

    @property
    def shorter(self) -> Sequence[Sampler]: ...  # those of fewer steps that it begins with, the longest first

    def __call__(self, noise: Tensor, class_labels: Tensor | None, *, step_noise: Tensor | None) -> Tensor: ...


@dataclasses.dataclass(frozen=True)
class Generator:
    """A network and the noise levels that it makes images from, the highest first; differentiable.

    `x = D(sigma_0 * noise, sigma_0)`, and from each further level `x = D(x + sigma_k * fresh_noise, sigma_k)` (Yin et
    al. 2024, DMD2, section 4.4). `clamped`: of `clamp_images(D)` in place of D. Raises ValueError for levels that are
    none, not finite and positive, or not in this order.
    """

    network: Denoiser
    sigmas: tuple[float, ...]
    clamped: bool = False

    def __post_init__(self) -> None:
        levels = self.sigmas if isinstance(self.sigmas, tuple) else ()
        descends = all(a > b for a, b in itertools.pairwise(levels))
        if not levels or not descends or not all(0 < sigma < math.inf for sigma in levels):
            raise ValueError(
                f"fastdmd.Generator: expected a tuple of positive noise levels, the highest first, got {self.sigmas}"
            )

    @property
    def num_evaluations(self) -> int:
        return len(self.sigmas)

    @property
    def num_step_noises(self) -> int:
        return len(self.sigmas) - 1

    @property
    def shorter(self) -> Sequence[Generator]:
        return [dataclasses.replace(self, sigmas=self.sigmas[:k]) for k in range(len(self.sigmas) - 1, 0, -1)]

    def __call__(
        self,
        noise: Tensor,
        class_labels: Tensor | None = None,
        *,
        step_noise: Tensor | None = None,
        random: torch.Generator | None = None,
    ) -> Tensor:
        """Images `[B, C, H, W]` of standard normal `noise` of that shape and `class_labels`, int64 `[B]` or None.

        `step_noise`, standard normal `[B, num_step_noises, C, H, W]`, is the fresh noise of the levels after the first.
        Without it `random` draws it, or torch's own generator. Raises ValueError for another shape.
        """
        if step_noise is None:
            step_noise = draw_step_noise(self.num_step_noises, noise, random)
        self.check_step_noise(noise, step_noise)
        x = self.denoise(self.sigmas[0] * noise, self.sigmas[0], class_labels)
        for level, sigma in enumerate(self.sigmas[1:]):
            assert step_noise is not None
            # In this order the sum is laid out as the noise is, at every level: compiled networks serve them all.
            x = self.denoise(sigma * step_noise[:, level] + x, sigma, class_labels)
        return x

    def denoise(self, x: Tensor, sigma: float | Tensor, class_labels: Tensor | None) -> Tensor:
        """`D(x, sigma)`, `[B, C, H, W]`, at one level, or at those of the images, `[B]`."""
        images = _denoise(self.network, x, sigma, class_labels)
        return clamp_images(images) if self.clamped else images

    def check_step_noise(self, noise: Tensor, step_noise: Tensor | None) -> None:
        """Raises ValueError for another shape than that beside `noise`; beside a single level, it may be None."""
        expected, got = (noise.shape[0], self.num_step_noises, *noise.shape[1:]), None
        if step_noise is None and self.num_step_noises == 0:
            return
        if step_noise is None or (got := tuple(step_noise.shape)) != expected:
            raise ValueError(f"fastdmd.Generator: expected step_noise of shape {expected}, got {got}")


@dataclasses.dataclass(frozen=True)
class HeunSampler:
    """Heun's second-order method (Karras et al. 2022, algorithm 1) over `num_steps` levels of `karras_sigmas`.

    Starts at the network's own highest level, and at 80 at most. Raises ValueError for less than one step,
    and as `karras_sigmas` does for other levels.
    """

    network: Denoiser
    num_steps: int = 18
    sigma_min: float = 0.002
    rho: float = 7.0

    num_step_noises = 0
    shorter = ()

    @property
    def num_evaluations(self) -> int:
        return 2 * self.num_steps - 1  # the last step, to no noise, is one of Euler

    @property
    def sigma_max(self) -> float:
        return min(80.0, getattr(self.network, "sigma_max", math.inf))

    def levels(self) -> list[float]:
        """The noise levels, the highest first and 0 last."""
        if self.num_steps < 1:
            raise ValueError(f"fastdmd.HeunSampler: expected num_steps >= 1, got {self.num_steps}")
        if self.num_steps == 1:
            return [self.sigma_max, 0.0]
        sigmas = karras_sigmas(self.num_steps, sigma_min=self.sigma_min, sigma_max=self.sigma_max, rho=self.rho)
        return [*sigmas.flip(0).tolist(), 0.0]

    @torch.no_grad()
    def __call__(
        self, noise: Tensor, class_labels: Tensor | None = None, *, step_noise: Tensor | None = None
    ) -> Tensor:
        """Images `[B, C, H, W]` of standard normal `noise` of that shape and `class_labels`, int64 `[B]` or None.

        `step_noise` is None: none is drawn on the way.
        """
        levels = self.levels()
        x = noise * levels[0]
        for level, next_level in zip(levels[:-1], levels[1:], strict=True):
            slope = (x - _denoise(self.network, x, level, class_labels)) / level
            x_next = x + (next_level - level) * slope
            if next_level > 0:
                slope_next = (x_next - _denoise(self.network, x_next, next_level, class_labels)) / next_level
                x_next = x + (next_level - level) * 0.5 * (slope + slope_next)
            x = x_next
        return x


def balanced_labels(num_images: int, num_classes: int, device: torch.device | str = "cpu") -> Tensor | None:
    """`0, 1, ..., num_classes - 1, 0, 1, ...`: as many of each class as can be; None without classes."""
    return torch.arange(num_images, device=device) % num_classes if num_classes else None


def with_fewer_steps(name: str, sampler: Sampler) -> dict[str, Sampler]:
    """The sampler by its name, and by others those of fewer steps that it begins with, the longest first."""
    others: dict[str, Sampler] = {}
    for other in sampler.shorter:
        num_steps = other.num_evaluations
        others[f"{name}, {num_steps} step{'s' if num_steps > 1 else ''}"] = other
    return {name: sampler, **others}


def draw_step_noise(num_step_noises: int, noise: Tensor, random: torch.Generator | None) -> Tensor | None:
    """Standard normal `[B, num_step_noises, C, H, W]` beside a `noise` of `[B, C, H, W]`; None where they are none.

    One step after the other: a sampler of fewer steps gets the same for those.
    """
    if num_step_noises == 0:
        return None

    def normal() -> Tensor:
        return torch.randn(noise.shape, dtype=noise.dtype, device=noise.device, generator=random)

    return torch.stack([normal() for _ in range(num_step_noises)], dim=1)


def start_noise(
    part: slice, image_shape: Sequence[int], num_step_noises: int, seed: int, device: torch.device | str
) -> tuple[Tensor, Tensor | None]:
    """What sampled images of the numbers in `part` are made from, `noise` and `step_noise` of a sampler.

    Standard normal `[n, C, H, W]` and `[n, num_step_noises, C, H, W]` (None of none), functions of seed and number.
    """
    shape = (part.stop - part.start, *image_shape)
    noise_key, step_key = (
        ops.rng_key(seed, stream=stream, first_sample=part.start, device=device)
        for stream in (Stream.EVALUATION_NOISE, Stream.EVALUATION_STEP_NOISE)
    )
    return normals(shape, noise_key), step_normals(num_step_noises, shape, step_key)


def step_normals(num_step_noises: int, shape: Sequence[int], rng_key: Tensor) -> Tensor | None:
    """The same `[B, num_step_noises, C, H, W]` for images of shape (B, C, H, W), a function of a key of `ops.rng_key`.

    A sampler of fewer steps gets the same for those.
    """
    if num_step_noises == 0:
        return None
    B, C, H, W = shape
    return normals((B, num_step_noises * C, H, W), rng_key).unflatten(1, (num_step_noises, C))


def clamp_images(images: Tensor) -> Tensor:
    """`images` of any shape clamped to [-1, 1], the range of pictures; the gradient passes up to a little beyond.

    Beyond by `CLAMP_MARGIN`, what of a gradient would lead further out by descent is zero; what leads back is kept,
    where `torch.clamp` has zero for both. So a value that is out is not lost to learning; and with the margin, the
    noise of gradients does not carry back into the range what belongs at its end, as black does.
    """
    if torch.is_grad_enabled() and images.requires_grad:
        return _Clamp.apply(images)
    return images.clamp(-1, 1)


class _Clamp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor) -> Tensor:
        ctx.save_for_backward(images)
        return images.clamp(-1, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (grad,), (images,) = grads, ctx.saved_tensors
        end = 1 + CLAMP_MARGIN
        leads_out = ((images < -end) & (grad > 0)) | ((images > end) & (grad < 0))
        return grad.masked_fill(leads_out, 0)


def _denoise(network: Denoiser, x: Tensor, sigma: float | Tensor, class_labels: Tensor | None) -> Tensor:
    return network(x, sigma if isinstance(sigma, Tensor) else x.new_full(x.shape[:1], sigma), class_labels)
