"""Distillation: what a configuration and a teacher come to, for the loop."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastdmd.data import Dataset
from fastdmd.data.pairs import Pairs, load_pairs
from fastdmd.diffusion import DenoisingNetwork
from fastdmd.distill import DMD2, Draws, methods
from fastdmd.distill.exchange import exchange
from fastdmd.distill.regression import with_pairs
from fastdmd.distill.states import (
    digest,
    digest_of_draws,
    first_not_finite,
    load_state,
    optimizers_of,
    require_same_draws,
    state_of,
    weights_of,
)
from fastdmd.networks.discriminator import Discriminator, ImageDiscriminator
from fastdmd.networks.identity import identity
from fastdmd.networks.states import find, infinite_buffers
from fastdmd.networks.tensor_files import open_tensors
from fastdmd.networks.weights import generator_metadata, save_network
from fastdmd.optim.sharded import ShardedAdamWEMA
from fastdmd.randomness import Stream, generator
from fastdmd.ranks import ALONE, Ranks
from fastdmd.runs.candidates import Candidates
from fastdmd.runs.config import ResolvedTrainConfig, TrainConfig
from fastdmd.runs.folder import BEST, GENERATOR, NETWORKS, RunFolder
from fastdmd.runs.pictures import SampleSheet
from fastdmd.runs.stages import Stage, save_networks
from fastdmd.sampling import Generator, HeunSampler, Sampler, with_fewer_steps
from fastdmd.shards import Sharding, fill_parts, is_cut, local


def build(config: TrainConfig, teacher: DenoisingNetwork, process_group: Any = None) -> DMD2:
    """The networks and optimizers of one distillation, which processes may share.

    Raises ValueError for labels that cannot be emphasized."""
    config = config.for_teacher(teacher)
    if config.label_emphasis != 1:
        teacher = copy.deepcopy(teacher)
        teacher.emphasize_labels(config.label_emphasis)
    optimizer, ratio = config.optimizer, config.dfake_gen_update_ratio
    generator_options = optimizer.of_generator(config.iterations, ratio, config.batch_size)
    if config.init_from is not None:  # what averages start from is not to be forgotten
        generator_options["ema_warmup"] = 0.0
    guidance_options = optimizer.of_fake_score(config.iterations)
    method = methods.make(
        config.method,
        sigma_data=config.noise.sigma_data,
        gan=config.gan,
        make_head=lambda: _head(config, teacher),
    )
    return DMD2(
        teacher,
        generator_sigmas=config.noise.generator_sigmas,
        clamp_images=config.clamp_images,
        sigma_data=config.noise.sigma_data,
        dfake_gen_update_ratio=ratio,
        execution=config.compute.execution,
        compute_dtype=config.compute.dtype,
        accumulation_steps=config.compute.accumulation_steps,
        generator_options=generator_options,
        guidance_options=guidance_options,
        method=method,
        head_options={**guidance_options, "learning_rate": config.gan.gan_lr},
        nan_policy=config.nan_policy,
        process_group=process_group,
        shard=config.compute.shard,
    )


def _head(config: ResolvedTrainConfig, teacher: DenoisingNetwork) -> nn.Module:
    """Where the teacher is, its weights a function of the seed."""
    random = generator(config.seed, Stream.HEAD_WEIGHTS)
    head: nn.Module
    if config.gan.gan_features == "images":
        head = ImageDiscriminator(
            teacher.image_shape, teacher.num_classes, sigma_data=config.noise.sigma_data, random=random
        )
    else:
        head = Discriminator(teacher.require_features(), random=random)
    return head.to(next(teacher.parameters()).device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def make_draws(
    config: TrainConfig,
    network: DenoisingNetwork,
    device: torch.device,
    real: Dataset | None = None,
    pairs: Pairs | None = None,
    *,
    first_sample: int = 0,
) -> Callable[[int], Draws]:
    """The random inputs of every iteration, as a function of its number; `real` for what needs real images, `pairs` for
    a regression.

    They are those of samples from `first_sample` on, of a larger batch. Raises ValueError for either without.
    """
    config = config.for_teacher(network, device)
    uses = uses_of_real_images(config)
    starts = judged = None
    if uses:
        if real is None:
            raise ValueError(f"fastdmd.make_draws: expected real images for {uses[0]}, got none")
        batch = functools.partial(
            real.random_batch, config.batch_size, seed=config.seed, device=device, first_sample=first_sample
        )
        starts = (lambda step: batch(step=step, stream=Stream.START_IMAGE)) if config.noise.uses_real_images else None
        judged = (lambda step: batch(step=step)) if config.gan.is_on else None
    draws: Callable[[int], Draws] = config.noise.draws(
        network, config.batch_size, config.seed, device, starts, first_sample=first_sample
    )
    if judged is not None:
        draws = config.gan.draws(draws, judged, config.noise.levels(device), config.seed, first_sample=first_sample)
    if config.method.has_regression:
        if pairs is None:
            raise ValueError("fastdmd.make_draws: expected pairs for the regression, got none")
        drawn = functools.partial(
            pairs.random_batch, config.batch_size, seed=config.seed, device=device, first_sample=first_sample
        )
        draws = with_pairs(draws, lambda step: drawn(step=step))
    return draws


def uses_of_real_images(config: TrainConfig) -> list[str]:
    """The flags that ask for some."""
    uses = {
        "--gan-guidance-weight": config.gan.is_on,
        "--generator-inputs noised-data": config.noise.uses_real_images,
    }
    return [flag for flag, is_used in uses.items() if is_used]


def real_images(config: TrainConfig, network: DenoisingNetwork, named: Dataset | None) -> Dataset | None:
    """What is taken for real where some flag asks for it, else None: the user's images, or the embedded digits.

    Raises ValueError where there are none, or not as the network takes them, with labels if it has classes.
    """
    uses = uses_of_real_images(config)
    if not uses:
        return None
    if named is None and config.teacher != "mnist":
        raise ValueError(f"expected --data with real images for {uses[0]}, got none")
    dataset = config.data.load() if named is None else named
    return dataset.require(image_shape=network.image_shape, num_classes=network.num_classes)


def teacher_pairs(config: ResolvedTrainConfig, teacher: DenoisingNetwork) -> Pairs | None:
    """What a regression is to, None without one. Raises OSError or ValueError for pairs that are not this teacher's.

    Of a teacher that has shapes alone they may be any other's of these shapes.
    """
    if config.method.pairs is None:
        return None
    return load_pairs(
        Path(config.method.pairs),
        teacher=None if next(teacher.parameters()).is_meta else identity(teacher),
        image_shape=teacher.image_shape,
        num_classes=teacher.num_classes,
        sigma=config.noise.conditioning_sigma,
        label_emphasis=config.label_emphasis,
    )


class Distillation:
    """What the loop is given: of the generator's averages one is what it keeps, shows and measures.

    `stage` is what it starts from, if that is not the teacher; `notices` say what of it is new, a line each.
    """

    def __init__(
        self,
        config: ResolvedTrainConfig,
        teacher: DenoisingNetwork,
        folder: RunFolder,
        teacher_record: dict[str, Any] | None = None,
        real: Dataset | None = None,
        pairs: Pairs | None = None,
        stage: Stage | None = None,
        ranks: Ranks = ALONE,
    ):
        self.config, self._ranks = config, ranks
        self.teacher_identity = identity(teacher)
        ranks.require_equal("teacher", lambda: self.teacher_identity)
        self.model = build(config, teacher, ranks.group)
        self.is_in_parts = self.model.is_in_parts
        self._writers = ranks if self.is_in_parts else ALONE
        if self.is_in_parts and not is_cut(teacher):  # another one was distilled, with other labels
            Sharding(teacher, ranks.group).cut_(teacher)
        self._averages = config.optimizer.averages(config.batch_size)
        self._generator = functools.partial(
            Generator, sigmas=config.noise.generator_sigmas, clamped=config.clamp_images
        )
        sampler = self._generator(self.model.average)
        self.notices = [] if stage is None else stage.fill(self.model, self._averages, sampler)
        networks = cast(tuple[DenoisingNetwork, ...], self.model.generator_optimizer.ema_networks)
        self._networks = {average.name: own for average, own in zip(self._averages, networks, strict=True)}
        self.candidates = Candidates({name: self._generator(own) for name, own in self._networks.items()})
        self.tallies = (self.model.generator_tally, self.model.guidance_tally)
        device = next(teacher.parameters()).device
        self._teacher, self._teacher_record = teacher, teacher_record
        self._folder = folder
        self._networks_of: tuple[int, str] | None = None  # iteration and kept average of the networks on the disk
        self._next = 0  # iteration
        self._all_draws = make_draws(config, teacher, device, real, pairs)
        rows = ranks.rows(config.batch_size)
        own = config.replace(batch_size=rows.stop - rows.start)
        self._draws = make_draws(own, teacher, device, real, pairs, first_sample=rows.start)
        self._sheet = SampleSheet(teacher, config.seed, device)

    @property
    def network(self) -> DenoisingNetwork:
        return self._networks[self.candidates.kept]

    def iterate(self, iteration: int) -> None:
        self._next = iteration + 1
        self.model.iterate(iteration, self._draws)

    def state_dict(self) -> dict[str, Any]:
        """And a digest of what the next iteration draws, of all processes: images that are others by then would be no
        continuation."""
        return {
            "model": state_of(self.model),
            "candidates": self.candidates.state_dict(),
            "next": self._next,
            "draws": digest_of_draws(vars(self._all_draws(self._next))),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._next = state["next"]  # which the loop has looked at
        require_same_draws(self._next, state["draws"], vars(self._all_draws(self._next)))
        load_state(self.model, state["model"], self._next)
        self.candidates.load_state_dict(state["candidates"])
        if self.model.class_sums is not None and not self._ranks.is_first:
            self.model.class_sums.clear()  # the first process has those of all

    def exchange(self) -> None:
        exchange([*self.tallies, *([] if self.model.class_sums is None else [self.model.class_sums])], self._ranks)

    def digest(self) -> str:
        return digest(*(own for own in weights_of(self.model) if local(own) is own))  # each has its part of the others

    def fault(self) -> str | None:
        found = self._writers.gather_objects(
            first_not_finite(optimizers_of(self.model), infinite_buffers(self._teacher))
        )
        return next((fault for fault in found if fault is not None), None)

    def finish(self) -> None:
        pass

    def samples(self) -> Tensor:
        return self._sheet.of(self.candidates.sampler)

    def save(self, iteration: int, **information: Any) -> None:
        if not (self._folder.is_written or self.is_in_parts):
            return
        self._save(GENERATOR, iteration, **information)
        now = iteration, self.candidates.kept
        if now != self._networks_of:
            save_networks(
                self._folder.path / NETWORKS,
                self.model,
                self._averages,
                kept=self.candidates.kept,
                iteration=iteration,
                generator=self._generator(self.network),
                ranks=self._writers,
            )
            self._networks_of = now

    def save_best(self, iteration: int, **information: Any) -> None:
        together = ALONE if self.is_in_parts else self._ranks  # all know whether it is there
        together.from_first(lambda: self._save(BEST, iteration, **information))

    def best_sampler(self) -> Sampler:
        def read() -> dict[str, Tensor]:
            weights = open_tensors(self._folder.path / BEST)
            return weights.read(find(weights, self._teacher.inner))

        state = self._ranks.from_first(read)
        if self.is_in_parts:
            network = cast(ShardedAdamWEMA, self.model.generator_optimizer).sharding.like(self._teacher)
        else:
            network = copy.deepcopy(self._teacher)
        fill_parts(network.inner, state)
        return self._generator(network)

    def _save(self, name: str, iteration: int, **information: Any) -> None:
        save_network(
            self._folder.path / name,
            self.network,
            kind="generator",
            **generator_metadata(self._generator(self.network)),
            iterations=iteration,
            average=self.candidates.kept,
            config=dataclasses.asdict(self.config),
            ranks=self._writers,
            **information,
        )

    def measurements(self) -> Iterator[tuple[str, Sampler, dict | None]]:
        for name, sampler in with_fewer_steps("generator", self.candidates.sampler).items():
            yield name, sampler, None
        yield "teacher", HeunSampler(self._teacher, self.config.evaluation.teacher_steps), self._teacher_record
