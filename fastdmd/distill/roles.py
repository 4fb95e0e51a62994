"""Teacher, generator and fake score, who all start as the teacher: whole in every process, or a part in each."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from fastdmd.diffusion import DenoisingNetwork
from fastdmd.optim import AdamWEMA
from fastdmd.optim.sharded import ShardedAdamWEMA
from fastdmd.ranks import Ranks
from fastdmd.shards import Sharding

Options = Mapping[str, Any]  # of AdamWEMA


class Roles(NamedTuple):
    """In eval mode: dropout would be noise that the other networks do not see. No flag of theirs is ever toggled."""

    teacher: DenoisingNetwork  # in the precision that it computes in
    generator: AdamWEMA
    fake_score: AdamWEMA


def cast_roles(
    teacher: DenoisingNetwork,
    ranks: Ranks,
    *,
    compute_dtype: torch.dtype | None,
    generator_options: Options,
    guidance_options: Options,
) -> Roles:
    """Each process has all of each; the teacher is that of the first."""
    ranks.spread_(teacher)
    teacher = own = teacher.eval().requires_grad_(False)
    if compute_dtype is not None:
        own = copy.deepcopy(teacher)
        for parameter in own.parameters():  # not the buffers: frequencies need their digits
            parameter.data = parameter.data.to(compute_dtype)
    # One after the other: the optimizer moves the parameters, and the next copy takes the place that they left.
    shared: dict[str, Any] = {"compute_dtype": compute_dtype, "process_group": ranks.group}
    generator = AdamWEMA(copy.deepcopy(teacher).requires_grad_(True), **shared, **generator_options)
    fake_score = AdamWEMA(copy.deepcopy(teacher).requires_grad_(True), **shared, **guidance_options)
    return Roles(own, generator, fake_score)


def cast_in_parts(
    teacher: DenoisingNetwork,
    ranks: Ranks,
    *,
    compute_dtype: torch.dtype | None,
    generator_options: Options,
    guidance_options: Options,
) -> Roles:
    """Each process has a part of each: the teacher, which is that of the first, is cut where it is, and the others are
    made of its parts. Raises ValueError for one process."""
    sharding = Sharding(teacher, ranks.group)
    ranks.spread_(teacher)
    teacher = sharding.cut_(teacher.eval().requires_grad_(False))

    def optimized(options: Options) -> AdamWEMA:
        network = sharding.like(teacher, compute_dtype=compute_dtype).requires_grad_(True)
        return ShardedAdamWEMA(network, sharding=sharding, **options)

    generator = optimized(generator_options)
    fake_score = optimized(guidance_options)
    own = teacher if compute_dtype is None else sharding.like(teacher, dtype=compute_dtype)
    return Roles(own, generator, fake_score)
