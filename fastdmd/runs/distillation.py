"""Distillation: what a configuration and a teacher come to, for the loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastdmd import diffusion
from fastdmd.distill.draws import Draws, draw
from fastdmd.networks.adapted import Adapted
from fastdmd.networks.weights import save_network
from fastdmd.runs.config import TrainConfig
from fastdmd.diffusion import Denoiser, random_generator
from fastdmd.runs.precision import compute_dtype
from fastdmd.quality import sample
from fastdmd.runs.folder import RunFolder
from fastdmd.sampling import SAMPLING_STREAM, Generator, HeunSampler, Sampler
from fastdmd.distill.turns import DMD2
from fastdmd.networks.unet import UNet

NUM_SAMPLE_ROWS = 10  # of samples.png, at most: one row per class
NUM_SAMPLE_COLUMNS = 11  # the first repeats its noise through the run


def build(config: TrainConfig, teacher: UNet | Adapted) -> DMD2:
    """The networks and optimizers of one distillation."""
    config = config.for_teacher(teacher)
    shared = dict(
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
    )
    num_generator_updates = -(-config.iterations // config.dfake_gen_update_ratio)
    return DMD2(
        teacher,
        conditioning_sigma=config.conditioning_sigma,
        sigma_data=config.sigma_data,
        dfake_gen_update_ratio=config.dfake_gen_update_ratio,
        execution=config.execution, compute_dtype=compute_dtype(config.precision),
        accumulation_steps=config.accumulation_steps,
        generator_options=dict(
            learning_rate=config.generator_lr, ema_decay=config.ema_decay, **shared,
            warmup_steps=-(-config.warmup_iterations // config.dfake_gen_update_ratio),
            decay_steps=num_generator_updates if config.lr_schedule == "cosine" else None,
        ),
        guidance_options=dict(
            learning_rate=config.guidance_lr, warmup_steps=config.warmup_iterations, **shared,
            decay_steps=config.iterations if config.lr_schedule == "cosine" else None,
        ),
    )  # fmt: skip


def make_draws(config: TrainConfig, network: Denoiser, device: torch.device) -> Callable[[int], Draws]:
    """The random inputs of every iteration, as a function of its number."""
    config = config.for_teacher(network, device)
    if network.dynamics == "flow":
        sigmas = diffusion.lognormal_sigmas(
            config.num_train_timesteps, mean=config.time_mean, std=config.time_std, device=device
        )
    else:
        sigmas = diffusion.karras_sigmas(
            config.num_train_timesteps, sigma_min=config.sigma_min, sigma_max=config.sigma_max, rho=config.rho,
            device=device,
        )  # fmt: skip
    min_step, max_step = config.step_range
    shape = (config.batch_size, *network.image_shape)
    return lambda step: draw(shape, network.num_classes, sigmas, min_step, max_step, seed=config.seed, step=step)


class Distillation:
    """What the loop is given: the generator's average is what it keeps, shows and measures."""

    def __init__(self, config: TrainConfig, teacher: UNet | Adapted, folder: RunFolder,
                 teacher_record: dict | None = None):  # fmt: skip
        self.config = config = config.for_teacher(teacher)
        self.model = build(config, teacher)
        self.network = self.model.generator_optimizer.ema_network
        self.tallies = (self.model.generator_tally, self.model.guidance_tally)
        device = next(teacher.parameters()).device
        self._teacher, self._teacher_record, self._path = teacher, teacher_record, folder.path / "generator.safetensors"
        self._draws = make_draws(config, teacher, device)
        self._sampler = Generator(self.network, (config.conditioning_sigma,))
        self._sample_inputs = sample_inputs(teacher, config.seed, device)

    def iterate(self, iteration: int) -> None:
        self.model.iterate(iteration, self._draws)

    def finish(self) -> None:
        pass

    def samples(self) -> Tensor:
        return sample(self._sampler, *self._sample_inputs).unflatten(0, (-1, NUM_SAMPLE_COLUMNS))

    def save(self, iteration: int, **information: Any) -> None:
        save_network(
            self._path, self.network, kind="generator", conditioning_sigma=self.config.conditioning_sigma,
            iterations=iteration, config=dataclasses.asdict(self.config), **information,
        )  # fmt: skip

    def measurements(self) -> Iterator[tuple[str, Sampler, dict | None]]:
        yield "generator", self._sampler, None
        yield "teacher", HeunSampler(self._teacher, self.config.teacher_steps), self._teacher_record


def sample_inputs(network: Denoiser, seed: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Noise and labels of samples.png: rows of NUM_SAMPLE_COLUMNS images, a class each."""
    num_rows = min(NUM_SAMPLE_ROWS, network.num_classes or NUM_SAMPLE_ROWS)
    generator = random_generator(seed, 0, device, stream=SAMPLING_STREAM + 1)
    noise = torch.randn(num_rows * NUM_SAMPLE_COLUMNS, *network.image_shape, device=device, generator=generator)
    if not network.num_classes:
        return noise, None
    return noise, torch.arange(num_rows, device=device).repeat_interleave(NUM_SAMPLE_COLUMNS)
