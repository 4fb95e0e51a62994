"""Which losses a turn adds up: the one place where a method of distillation lives."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from fastdmd import ops
from fastdmd.distill.adversarial import (
    approximate_r1,
    discriminator_loss,
    divergence_weight,
    fooling_loss,
    weigh_gradient,
)
from fastdmd.distill.draws import Draws
from fastdmd.distill.gan import GAN, AdversarialDraws
from fastdmd.distill.losses import TrainedDenoiser, denoised_loss, denoising_loss
from fastdmd.distill.matching import DistributionMatching, Matching, ScoreIdentity
from fastdmd.distill.method_settings import MethodSettings
from fastdmd.distill.regression import PAIRED, PairDraws, regression_loss
from fastdmd.distill.translation import translate
from fastdmd.ranks import ALONE, Ranks

R1_DEVIATION = 0.05  # of the noise that approximate R1 adds, as a share of that of the image which it is added to

# By the name that settings have for it.
MATCHINGS: dict[str, Callable[[MethodSettings], Matching]] = {
    "dmd2": lambda settings: DistributionMatching(),
    "sid": lambda settings: ScoreIdentity(settings.sid_alpha),
}

Generate = Callable[[Tensor, Tensor | None], Tensor]  # images of noise and class_labels


def make(settings: MethodSettings, *, sigma_data: float, gan: GAN, make_head: Callable[[], nn.Module]) -> Method:
    """The method of these settings, with `sigma_data` in the weight of `L_fake`; a head is made where one is needed."""
    matching, is_weighted = MATCHINGS[settings.name](settings), settings.fake_loss_weight != "none"
    method: Method = Matched(sigma_data, matching, is_weighted)
    if gan.is_on:
        method = Adversarial(gan, make_head(), sigma_data, matching, is_weighted)
    return Regressed(method, settings.regression_weight) if settings.has_regression else method


@dataclasses.dataclass(frozen=True)
class Terms:
    """What a turn differentiates, and what it tells; 0-dim tensors on the device."""

    total: Tensor
    scalars: dict[str, Tensor]  # in the order of the method's names
    left_out: Tensor | None = None  # the share of samples that it leaves out
    head: Tensor | None = None  # what the method's head is differentiated by

    def detach(self) -> Terms:
        return Terms(self.total.detach(), {name: value.detach() for name, value in self.scalars.items()}, self.left_out)


class TurnDenoiser(TrainedDenoiser, Protocol):
    """Of a `Denoiser`, what the losses of a turn call."""

    def with_features(
        self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None, *, num_denoised: int
    ) -> tuple[Tensor, Tensor]: ...


class Method(Protocol):
    """The losses of both turns, from images of the generator, and the names of the scalars that they tell.

    A generator turn denoises by the teacher before the fake score, so that one may run beside the other.
    """

    @property
    def head(self) -> nn.Module | None:
        """What guidance turns train beside the fake score."""

    @property
    def draws(self) -> type[Draws]:
        """The random inputs that it reads."""

    def of_ranks(self, ranks: Ranks) -> Method:
        """The same where the images of a turn are those of one process of several."""
        ...

    @property
    def generator_scalars(self) -> tuple[str, ...]: ...

    @property
    def guidance_scalars(self) -> tuple[str, ...]: ...

    def generator_terms(
        self, x_gen: Tensor, draws: Draws, *, teacher: TurnDenoiser, fake_score: TurnDenoiser, generate: Generate
    ) -> Terms:
        """Differentiable in `x_gen`, and in whatever it lets `generate`, the generator, make besides."""
        ...

    def guidance_terms(self, x_gen: Tensor, draws: Draws, *, teacher: TurnDenoiser, fake_score: TurnDenoiser) -> Terms:
        """Differentiable in the fake score's weights, `head` in those of the head; `x_gen` counts as constant."""
        ...


@dataclasses.dataclass(frozen=True)
class Matched:
    """A matching loss moves the generator, DMD2's by default; `L_fake` lets the fake score follow it."""

    sigma_data: float  # in the weight of `L_fake`
    matching: Matching = DistributionMatching()
    is_weighted: bool = True  # whether `L_fake` has one

    head = None
    draws = Draws
    guidance_scalars = ("loss_fake",)

    def of_ranks(self, ranks: Ranks) -> Matched:
        return self

    @property
    def generator_scalars(self) -> tuple[str, ...]:
        return (self.matching.scalar,)

    def generator_terms(
        self, x_gen: Tensor, draws: Draws, *, teacher: TurnDenoiser, fake_score: TurnDenoiser, generate: Generate
    ) -> Terms:
        loss, left_out = self.matching(x_gen, draws, teacher=teacher, fake_score=fake_score)
        return Terms(loss, {self.matching.scalar: loss}, left_out)

    def guidance_terms(self, x_gen: Tensor, draws: Draws, *, teacher: TurnDenoiser, fake_score: TurnDenoiser) -> Terms:
        loss = denoising_loss(
            x_gen,
            fake_score,
            draws.class_labels,
            sigma=draws.fake_sigma,
            noise=draws.fake_noise,
            rng_key=draws.fake_key,
            sigma_data=self.sigma_data if self.is_weighted else None,
        )
        return Terms(loss, {"loss_fake": loss})


@dataclasses.dataclass(frozen=True)
class Adversarial:
    """With DMD2's GAN loss (Yin et al. 2024, section 4.3): a head on an encoder tells real from generated images.

    Both are judged noised (Wang et al. 2023, Diffusion-GAN). The generator fools the head, and matches distributions in
    the sense of the divergence that was chosen; head and fake score learn by the discriminator's loss. One pass of the
    fake score's encoder serves all images of a guidance turn. A head on images themselves learns alone.
    """

    gan: GAN
    head: nn.Module  # features, or x_t, sigma and class_labels, to logits [B]
    sigma_data: float  # in the weight of `L_fake`, and of images
    matching: Matching = DistributionMatching()
    is_weighted: bool = True  # whether `L_fake` has a weight
    ranks: Ranks = ALONE

    draws = AdversarialDraws

    def of_ranks(self, ranks: Ranks) -> Adversarial:
        return dataclasses.replace(self, ranks=ranks)

    @property
    def generator_scalars(self) -> tuple[str, ...]:
        return (self.matching.scalar, *(("loss_gan_generator",) if self.gan.gan_generator_weight else ()))

    @property
    def guidance_scalars(self) -> tuple[str, ...]:
        return ("loss_fake", "loss_gan_guidance", "gan_right", *(("gan_r1",) if self.gan.gan_r1_weight else ()))

    def generator_terms(
        self, x_gen: Tensor, draws: Draws, *, teacher: TurnDenoiser, fake_score: TurnDenoiser, generate: Generate
    ) -> Terms:
        gan, labels = self.gan, draws.class_labels

        def judge(x: Tensor, sigma: Tensor, noise: Tensor | None, rng_key: Tensor | None) -> Tensor:
            x_t = ops.add_noise(x, sigma, noise=noise, rng_key=rng_key)
            if gan.gan_features == "images":
                return self.head(x_t, sigma, labels)
            encoder = teacher if gan.gan_features == "teacher" else fake_score
            return self.head(encoder.with_features(x_t, sigma, labels, num_denoised=0)[1])

        matched = x_gen
        if gan.divergence != "reverse-kl":
            with torch.no_grad():
                logit = judge(x_gen, draws.dm_sigma, draws.dm_noise, draws.dm_key)
                weight = divergence_weight(logit, gan.divergence, self.ranks)
            matched = weigh_gradient(x_gen, weight)
        total, left_out = self.matching(matched, draws, teacher=teacher, fake_score=fake_score)
        scalars = {self.matching.scalar: total}
        if gan.gan_generator_weight:
            drawn = _adversarial(draws)
            moved = translate(x_gen, drawn.gan_shift)
            logit = judge(moved, drawn.gan_sigma, drawn.gan_noise, drawn.gan_key)
            scalars["loss_gan_generator"] = fooling_loss(logit)
            total = total + gan.gan_generator_weight * scalars["loss_gan_generator"]
        return Terms(total, scalars, left_out)

    def guidance_terms(self, x_gen: Tensor, draws: Draws, *, teacher: TurnDenoiser, fake_score: TurnDenoiser) -> Terms:
        x_gen, num_images = x_gen.detach(), len(x_gen)
        x_t = ops.add_noise(x_gen, draws.fake_sigma, noise=draws.fake_noise, rng_key=draws.fake_key)
        judged = self._noised(x_gen, _adversarial(draws))
        if self.gan.gan_features == "fake":
            batch = _together([(x_t, draws.fake_sigma, draws.class_labels), *judged])
            D_fake, features = fake_score.with_features(*batch, num_denoised=num_images)
            features = features[num_images:]
            seen: tuple[Tensor | None, ...] = (features.detach(),)
        else:
            D_fake = fake_score(x_t, draws.fake_sigma, draws.class_labels)
            seen = _together(judged)
            if self.gan.gan_features == "teacher":
                with torch.no_grad():
                    seen = (teacher.with_features(*seen, num_denoised=0)[1],)
        sigma_data = self.sigma_data if self.is_weighted else None
        loss = denoised_loss(D_fake, x_gen, draws.fake_sigma, dynamics=fake_score.dynamics, sigma_data=sigma_data)
        # Each optimizer differentiates a loss of its own: neither walks through the graph of the other.
        head, scalars = self._discriminate(self.head(*seen), num_images)
        total = loss
        if self.gan.gan_features == "fake":
            total = loss + self._discriminate(self.head(features), num_images)[0]
        return Terms(total, {"loss_fake": loss, **scalars}, head=head)

    def _noised(self, x_gen: Tensor, draws: AdversarialDraws) -> list[Batch]:
        """What the head judges: generated images, real ones, and for approximate R1 these with a little more noise."""
        sigma, real_images = draws.real_sigma, translate(draws.real_images, draws.real_shift)
        real = ops.add_noise(real_images, sigma, noise=draws.real_noise, rng_key=draws.real_key)
        moved = translate(x_gen, draws.gan_shift)
        x_t = ops.add_noise(moved, draws.gan_sigma, noise=draws.gan_noise, rng_key=draws.gan_key)
        batches: list[Batch] = [
            (x_t, draws.gan_sigma, draws.class_labels),
            (real, sigma, draws.real_labels),
        ]
        if self.gan.gan_r1_weight:  # that noise is independent of the real images' own
            deviation = R1_DEVIATION * (sigma**2 + self.sigma_data**2).sqrt()
            near = ops.add_noise(real, deviation, noise=draws.gan_noise, rng_key=draws.gan_key)
            batches.append((near, sigma, draws.real_labels))
        return batches

    def _discriminate(self, logits: Tensor, num_images: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted loss of the discriminator, and its parts."""
        logit_gen, logit_real, *near = logits.split(num_images)
        loss = total = discriminator_loss(logit_gen, logit_real)
        right = torch.cat([logit_gen < 0, logit_real > 0]).float().mean()  # the share told apart: of no use is a half
        scalars = {"loss_gan_guidance": loss, "gan_right": right}
        if near:
            scalars["gan_r1"] = approximate_r1(logit_real, near[0])
            total = loss + self.gan.gan_r1_weight * scalars["gan_r1"]
        return self.gan.gan_guidance_weight * total, scalars


@dataclasses.dataclass(frozen=True)
class Regressed:
    """A method with DMD's regression to images of the teacher, from their noise (Yin et al. 2024, DMD, section 3.3)."""

    method: Method
    weight: float

    def of_ranks(self, ranks: Ranks) -> Regressed:
        return dataclasses.replace(self, method=self.method.of_ranks(ranks))

    @property
    def head(self) -> nn.Module | None:
        return self.method.head

    @property
    def draws(self) -> type[Draws]:
        return PAIRED[self.method.draws]

    @property
    def generator_scalars(self) -> tuple[str, ...]:
        return (*self.method.generator_scalars, "loss_regression")

    @property
    def guidance_scalars(self) -> tuple[str, ...]:
        return self.method.guidance_scalars

    def generator_terms(
        self, x_gen: Tensor, draws: Draws, *, teacher: TurnDenoiser, fake_score: TurnDenoiser, generate: Generate
    ) -> Terms:
        if not isinstance(draws, PairDraws):
            raise ValueError("fastdmd.Regressed: expected draws with pairs, got some without")
        terms = self.method.generator_terms(x_gen, draws, teacher=teacher, fake_score=fake_score, generate=generate)
        loss = regression_loss(generate(draws.pair_noise, draws.pair_labels), draws.pair_images)
        scalars = terms.scalars | {"loss_regression": loss}
        return dataclasses.replace(terms, total=terms.total + self.weight * loss, scalars=scalars)

    def guidance_terms(self, x_gen: Tensor, draws: Draws, *, teacher: TurnDenoiser, fake_score: TurnDenoiser) -> Terms:
        return self.method.guidance_terms(x_gen, draws, teacher=teacher, fake_score=fake_score)


Batch = tuple[Tensor, Tensor, Tensor | None]  # x_t, sigma, class_labels


def _together(batches: list[Batch]) -> Batch:
    x_t, sigma, labels = zip(*batches, strict=True)
    return torch.cat(x_t), torch.cat(sigma), None if labels[0] is None else torch.cat(labels)


def _adversarial(draws: Draws) -> AdversarialDraws:
    if not isinstance(draws, AdversarialDraws):
        raise ValueError("fastdmd.Adversarial: expected draws with real images, got some without")
    return draws
