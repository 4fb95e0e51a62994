"""The adversarial term of a run: its weights, the noise levels at which images are judged, and its draws."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from fastdmd import ops
from fastdmd.diffusion import DenoisingNetwork
from fastdmd.distill.adversarial import Divergence
from fastdmd.distill.draws import Draws, Noise, NoiseLevel, RealImages
from fastdmd.distill.optimization import Rate
from fastdmd.randomness import Stream, integers
from fastdmd.settings import Settings, at_least, fail, within

LARGEST_JUDGED_AS_THEY_ARE = 32  # pixels a side
TRANSLATION_OF_BEST = 0.036  # of the preset mnist-best, where it has the term

Features = Literal["fake", "teacher", "images"]
Weight = Annotated[float, at_least(0, 1e6)]


@dataclasses.dataclass(frozen=True)
class AdversarialDraws(Draws):
    """With what the adversarial term needs."""

    gan_sigma: Tensor  # [B], noise levels at which generated images are judged
    real_images: Tensor  # [B, C, H, W]
    real_labels: Tensor | None  # int64 [B]
    real_sigma: Tensor  # [B], noise levels at which they are judged
    _: dataclasses.KW_ONLY
    gan_key: Tensor | None = None  # [4], of ops.rng_key
    gan_noise: Tensor | None = None  # or else [B, C, H, W]
    gan_shift: Tensor | None = None  # int64 [B, 2], pixels that generated images are moved by
    real_key: Tensor | None = None  # [4]
    real_noise: Tensor | None = None  # or else [B, C, H, W]
    real_shift: Tensor | None = None  # int64 [B, 2]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GANSettings(Settings):
    """The adversarial term; without --gan-guidance-weight there is none, and no real images are needed."""

    gan_guidance_weight: Weight | None = 0.0
    """Weight of the discriminator's loss, which turns the adversarial term on; DMD2's is 1e-2. It trains the
    discriminator, and with `--gan-features fake` the fake score's encoder. It needs real images: --data, or the digits
    beside the embedded teacher. None, of mnist and mnist-best: 1e-2 for that teacher, 0 for others."""
    gan_generator_weight: Weight | None = None
    """Weight of the generator's adversarial loss. Default: 0.02 with `--gan-features images`, otherwise DMD2's 3e-3."""
    gan_features: Features | None = None
    """What the discriminator sees images through: the fake score's encoder, which learns with it (DMD2), the teacher's,
    or none: noised images as they are, by a small network of its own. Default: images where they have at most 32x32
    pixels, or where the teacher offers no features; otherwise fake."""
    gan_r1_weight: Weight = 0.0
    """Weight, within the discriminator's loss, of its change under a little noise on real images (approximate R1). It
    makes the discriminator blind to noise of that size, which one step leaves."""
    gan_translation: Annotated[float, within(0, 0.5)] = 0.0
    """Both kinds of images are moved, each by as many pixels as is drawn for it, before they are judged: up, down and
    sideways by up to this share of their sides, at least a pixel, with mirrored borders; 0.125 is DiffAugment's. It
    keeps the discriminator from knowing few real images by heart. mnist-best's comes and goes with its term."""
    gan_max_sigma: NoiseLevel | None = None
    """Images are judged at noise levels of the schedule up to this one. Default: twice the data's deviation with
    `--gan-features images` and reverse-kl, otherwise all of them."""
    gan_lr: Rate | None = None
    """Learning rate of the discriminator. Default: the fake score's."""
    divergence: Divergence = "reverse-kl"
    """What distribution matching minimizes; others than reverse-kl weigh each image by the discriminator's ratio of
    densities, whose mean is taken over the images of one accumulation step, of all processes."""

    @property
    def is_on(self) -> bool:
        """Whether there is a discriminator, or may be."""
        return self.gan_guidance_weight != 0

    def check(self) -> None:
        super().check()
        given = [field for field in dataclasses.fields(self) if field.default is not dataclasses.MISSING]
        of_preset = "gan_translation" if self.gan_translation == TRANSLATION_OF_BEST else None
        for field in given:  # what `for_teacher` fills in is nobody's wish
            if not self.is_on and field.name != of_preset and getattr(self, field.name) != field.default:
                fail(self, field.name, "together with --gan-guidance-weight, which trains the discriminator")

    def for_teacher(self, teacher: DenoisingNetwork, noise: Noise, fake_score_lr: float, *, is_embedded: bool) -> GAN:
        """With the defaults that depend on others filled in, such as whether the teacher is the embedded one.

        Raises ValueError for a teacher without features, for levels at which nothing could be judged, and as `check`
        does.
        """
        if self.gan_guidance_weight is None:
            decided = dataclasses.replace(self, gan_guidance_weight=1e-2 if is_embedded else 0.0)
            decided.check()
            return decided.for_teacher(teacher, noise, fake_score_lr, is_embedded=is_embedded)
        levels = noise.levels(torch.device("cpu"))
        is_small = max(teacher.image_shape[1:]) <= LARGEST_JUDGED_AS_THEY_ARE
        sees_images = is_small or teacher.feature_shape is None
        features = ("images" if sees_images else "fake") if self.gan_features is None else self.gan_features
        max_sigma = levels[-1].item()
        if features == "images" and self.divergence == "reverse-kl":
            max_sigma = min(2 * noise.sigma_data, max_sigma)
        defaults: dict[str, Any] = {
            "gan_features": features,
            "gan_generator_weight": 0.02 if features == "images" else 3e-3,
            "gan_max_sigma": max_sigma,
            "gan_lr": fake_score_lr,
        }
        gan = GAN(**{name: defaults[name] if value is None else value for name, value in vars(self).items()})
        if not gan.is_on:
            return dataclasses.replace(gan, gan_translation=0.0)
        if gan.gan_features != "images":
            teacher.require_features()
        num_levels, last = gan.num_levels(levels), noise.step_range[1]
        if num_levels == 0:
            fail(self, "gan_max_sigma", f">= {levels[0]:.9g}, the least noise level")
        if self.divergence != "reverse-kl" and num_levels <= last:
            fail(self, "gan_max_sigma", f">= {levels[last]:.9g}, which is matched by --divergence {self.divergence}")
        return gan


@dataclasses.dataclass(frozen=True, kw_only=True)
class GAN(GANSettings):
    """`GANSettings` with nothing left open."""

    gan_guidance_weight: float = dataclasses.field()
    gan_generator_weight: float = dataclasses.field()
    gan_features: Features = dataclasses.field()
    gan_max_sigma: float = dataclasses.field()
    gan_lr: float = dataclasses.field()

    def draws(
        self,
        draws: Callable[[int], Draws],
        real: RealImages,
        levels: Tensor,
        seed: int,
        *,
        first_sample: int = 0,
    ) -> Callable[[int], AdversarialDraws]:
        """Those of every iteration with what the adversarial term needs, of samples from `first_sample` on.

        Both kinds of images are noised to levels that are uniform among `levels`, ascending, up to `gan_max_sigma`.
        """
        judged = levels[: self.num_levels(levels)]
        return lambda step: _with_real_images(
            draws(step),
            *real(step),
            judged,
            translation=self.gan_translation,
            seed=seed,
            step=step,
            first_sample=first_sample,
        )

    def num_levels(self, levels: Tensor) -> int:
        """Of these, ascending, up to `gan_max_sigma`; waits for the device."""
        return int((levels <= self.gan_max_sigma).sum())


def _with_real_images(
    draws: Draws,
    images: Tensor,
    class_labels: Tensor | None,
    sigmas: Tensor,
    *,
    translation: float,
    seed: int,
    step: int,
    first_sample: int,
) -> AdversarialDraws:
    place: dict[str, Any] = {"iteration": step, "first_sample": first_sample, "device": sigmas.device}
    num_images, _, *sizes = draws.noise.shape
    down, right = (_reach(translation, size) for size in sizes)

    def level(stream: Stream) -> Tensor:
        return sigmas[integers(0, len(sigmas), num_images, seed=seed, stream=stream, **place)]

    def shift(stream: Stream) -> Tensor | None:
        if down == right == 0:
            return None
        width = 2 * right + 1
        number = integers(0, (2 * down + 1) * width, num_images, seed=seed, stream=stream, **place)
        return torch.stack([number // width - down, number % width - right], dim=1)

    return AdversarialDraws(
        **vars(draws),
        gan_sigma=level(Stream.GAN_LEVEL),
        gan_key=ops.rng_key(seed, stream=Stream.GAN_NOISE, **place),
        gan_shift=shift(Stream.GAN_SHIFT),
        real_images=images,
        real_labels=class_labels,
        real_sigma=level(Stream.REAL_LEVEL),
        real_key=ops.rng_key(seed, stream=Stream.REAL_NOISE, **place),
        real_shift=shift(Stream.REAL_SHIFT),
    )


def _reach(translation: float, size: int) -> int:
    """By how many of so many pixels images are moved at most: the nearest number, at least one of several."""
    return min(max(int(translation * size + 0.5), 1), size - 1) if translation else 0
