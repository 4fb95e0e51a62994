"""Distillation: what a configuration and a teacher come to, for the loop."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastdmd.data import Dataset
from fastdmd.diffusion import DenoisingNetwork, random_generator
from fastdmd.distill import DMD2, Draws
from fastdmd.distill.gan import HEAD_STREAM
from fastdmd.distill.methods import Adversarial, Method
from fastdmd.networks.discriminator import Discriminator
from fastdmd.networks.weights import save_network
from fastdmd.quality.reference import Reference
from fastdmd.quality.watch import Watch
from fastdmd.runs.config import ResolvedTrainConfig, TrainConfig
from fastdmd.runs.folder import RunFolder
from fastdmd.runs.pictures import SampleSheet
from fastdmd.sampling import Generator, HeunSampler, Sampler


def build(config: TrainConfig, teacher: DenoisingNetwork) -> DMD2:
    """The networks and optimizers of one distillation."""
    config = config.for_teacher(teacher)
    guidance_options = config.optimizer.of_fake_score(config.iterations)
    method: Method | None = None
    if config.gan.is_on:
        method = Adversarial(config.gan, _head(config, teacher), config.noise.sigma_data)
    return DMD2(
        teacher,
        conditioning_sigma=config.noise.conditioning_sigma,
        sigma_data=config.noise.sigma_data,
        dfake_gen_update_ratio=config.dfake_gen_update_ratio,
        execution=config.compute.execution,
        compute_dtype=config.compute.dtype,
        accumulation_steps=config.compute.accumulation_steps,
        generator_options=config.optimizer.of_generator(config.iterations, config.dfake_gen_update_ratio),
        guidance_options=guidance_options,
        method=method,
        head_options={**guidance_options, "learning_rate": config.gan.gan_lr},
    )


def _head(config: ResolvedTrainConfig, teacher: DenoisingNetwork) -> Discriminator:
    """Where the teacher is, its weights a function of the seed."""
    random = random_generator(config.seed, 0, stream=HEAD_STREAM)
    head = Discriminator(teacher.require_features(), random=random)
    return head.to(next(teacher.parameters()).device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def make_draws(
    config: TrainConfig, network: DenoisingNetwork, device: torch.device, real: Dataset | None = None
) -> Callable[[int], Draws]:
    """The random inputs of every iteration, as a function of its number; `real` for an adversarial term.

    Raises ValueError for an adversarial term without.
    """
    config = config.for_teacher(network, device)
    draws = config.noise.draws(network, config.batch_size, config.seed, device)
    if not config.gan.is_on:
        return draws
    if real is None:
        raise ValueError("fastdmd.make_draws: expected real images for the adversarial term, got none")
    batch = functools.partial(real.random_batch, config.batch_size, seed=config.seed, device=device)
    levels = config.noise.levels(device)
    return config.gan.draws(draws, lambda step: batch(step=step), levels, config.seed)


def real_images(config: TrainConfig, network: DenoisingNetwork, named: Dataset | None) -> Dataset | None:
    """What an adversarial term takes for real, None without one: the user's images, or the embedded teacher's digits.

    Raises ValueError where there are none, or not as the network takes them, with labels if it has classes.
    """
    if not config.gan.is_on:
        return None
    if named is None and config.teacher != "mnist":
        raise ValueError("expected --data with real images for --gan-guidance-weight, got none")
    dataset = config.data.load() if named is None else named
    return dataset.require(image_shape=network.image_shape, num_classes=network.num_classes)


def make_watch(config: ResolvedTrainConfig, model: DMD2, named: Dataset | None) -> Watch | None:
    """What looks for alarms: beside real images, the user's or the embedded teacher's digits, else the teacher's own.

    None where the teacher samples NaN or infinity.
    """
    num_classes = model.teacher.num_classes
    if named is None and config.teacher == "mnist":
        named = config.data.load()
    if named is not None:
        reference = Reference.of_dataset(named, num_classes, config.seed)
    else:
        sampler = HeunSampler(model.teacher, config.evaluation.teacher_steps)
        num_at_once = config.batch_size // config.compute.accumulation_steps
        reference = Reference.of_teacher(sampler, num_at_once, config.seed)
    if reference is None:
        return None
    return Watch(reference, model.class_sums, settled_at=config.optimizer.warmup_iterations)


class Distillation:
    """What the loop is given: the generator's average is what it keeps, shows and measures."""

    def __init__(
        self,
        config: ResolvedTrainConfig,
        teacher: DenoisingNetwork,
        folder: RunFolder,
        teacher_record: dict[str, Any] | None = None,
        real: Dataset | None = None,
    ):
        self.config = config
        self.model = build(config, teacher)
        self.network = self.model.average
        self.tallies = (self.model.generator_tally, self.model.guidance_tally)
        device = next(teacher.parameters()).device
        self._teacher, self._teacher_record = teacher, teacher_record
        self._path = folder.path / "generator.safetensors"
        self._draws = make_draws(config, teacher, device, real)
        self._sampler = Generator(self.network, (config.noise.conditioning_sigma,))
        self._sheet = SampleSheet(teacher, config.seed, device)

    def iterate(self, iteration: int) -> None:
        self.model.iterate(iteration, self._draws)

    def finish(self) -> None:
        pass

    def samples(self) -> Tensor:
        return self._sheet.of(self._sampler)

    def save(self, iteration: int, **information: Any) -> None:
        save_network(
            self._path,
            self.network,
            kind="generator",
            conditioning_sigma=self.config.noise.conditioning_sigma,
            iterations=iteration,
            config=dataclasses.asdict(self.config),
            **information,
        )

    def measurements(self) -> Iterator[tuple[str, Sampler, dict | None]]:
        yield "generator", self._sampler, None
        yield "teacher", HeunSampler(self._teacher, self.config.evaluation.teacher_steps), self._teacher_record
