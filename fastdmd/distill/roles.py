"""Teacher, generator and fake score, who all start as the teacher: whole in every process, or a part in each."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from fastdmd.diffusion import DenoisingNetwork
from fastdmd.distill.step_codes import can_be_told, tell_steps
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


# The teacher, and what makes each of the others: of options, and of the number of steps that it is told, if not 1.
Cast = tuple[DenoisingNetwork, Callable[[Options, int], AdamWEMA]]


def cast_roles(
    teacher: DenoisingNetwork,
    ranks: Ranks,
    *,
    num_steps: int,
    in_parts: bool,
    compute_dtype: torch.dtype | None,
    generator_options: Options,
    guidance_options: Options,
) -> Roles:
    """Each process has all of each network or, `in_parts`, a part; the teacher is that of the first.

    Of several steps the fake score is told which, see `tell_steps`, where it can be. In parts, the teacher is cut where
    it is, and the others are made of its parts: ValueError for one process.
    """
    cast = _cast_in_parts if in_parts else _cast_whole
    own, optimized = cast(teacher, ranks, compute_dtype)
    num_told = num_steps if can_be_told(teacher) else 1
    # One after the other: the optimizer moves the parameters, and the next copy takes the place that they left.
    generator = optimized(generator_options, 1)
    is_alike = num_told == 1 and generator_options.get("groups") == guidance_options.get("groups")
    if is_alike:  # their gradients are laid out alike, and turns alternate
        guidance_options = {"gradients_with": generator, **guidance_options}
    fake_score = optimized(guidance_options, num_told)
    return Roles(own, generator, fake_score)


def _cast_whole(teacher: DenoisingNetwork, ranks: Ranks, compute_dtype: torch.dtype | None) -> Cast:
    ranks.spread_(teacher)
    teacher = own = teacher.eval().requires_grad_(False)
    if compute_dtype is not None:
        own = copy.deepcopy(teacher)
        for parameter in own.parameters():  # not the buffers: frequencies need their digits
            parameter.data = parameter.data.to(compute_dtype)

    def optimized(options: Options, num_told: int) -> AdamWEMA:
        network = copy.deepcopy(teacher)
        tell_steps(network, num_told)
        return AdamWEMA(network.requires_grad_(True), compute_dtype=compute_dtype, process_group=ranks.group, **options)

    return own, optimized


def _cast_in_parts(teacher: DenoisingNetwork, ranks: Ranks, compute_dtype: torch.dtype | None) -> Cast:
    sharding = Sharding(teacher, ranks.group)
    ranks.spread_(teacher)
    teacher = sharding.cut_(teacher.eval().requires_grad_(False))
    own = teacher if compute_dtype is None else sharding.like(teacher, dtype=compute_dtype)

    def optimized(options: Options, num_told: int) -> AdamWEMA:
        def tell(network: DenoisingNetwork) -> None:
            tell_steps(network, num_told)

        network = sharding.like(teacher, compute_dtype=compute_dtype, extend=tell).requires_grad_(True)
        return ShardedAdamWEMA(network, sharding=sharding, **options)

    return own, optimized
