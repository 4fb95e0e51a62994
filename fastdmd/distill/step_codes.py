"""How a network is told which step of a generator made each of its images."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastdmd.diffusion import DenoisingNetwork

NAME = "step_codes"  # of the parameter, in the network's `level_embedding`
# Codes start at zero, and Adam moves all parameters alike: so these learn faster. Two steps on MNIST, 800 iterations of
# 64, seed 1: a Fréchet distance of 0.525 without codes, 0.262 with a gain of 1, 0.187 with 5.
GAIN = 5.0


def can_be_told(network: DenoisingNetwork) -> bool:
    return _last_linear(network) is not None


def tell_steps(network: DenoisingNetwork, num_steps: int) -> None:
    """From now on row i of a batch is of the step k = i mod n, and its embedding of the noise level is `e(sigma_i) +
    GAIN * code_k`: the codes `[n, width]` are learned, and zero at first. Of one step there is nothing to tell.

    Raises ValueError for a network without a `level_embedding`, or one without a Linear; in a forward, for rows that
    the steps do not divide.
    """
    if num_steps == 1:
        return
    embedding, linear = network.level_embedding, _last_linear(network)
    if embedding is None or linear is None:
        name = network.foreign_name or type(network).__name__
        raise ValueError(f"fastdmd.tell_steps: expected {name} to have a level_embedding with a Linear last, got none")
    weight = linear.weight
    codes = torch.zeros(num_steps, linear.out_features, dtype=weight.dtype, device=weight.device)
    embedding.register_parameter(NAME, nn.Parameter(codes, requires_grad=weight.requires_grad))
    embedding.register_forward_hook(_add_codes)


def codes_of(names: Iterable[str]) -> list[str]:
    """Of the names of parameters, those of codes."""
    return [name for name in names if name.rpartition(".")[2] == NAME]


def _last_linear(network: DenoisingNetwork) -> nn.Linear | None:
    """That of its `level_embedding`, which says how wide that is."""
    modules = [] if network.level_embedding is None else [*network.level_embedding.modules()]
    return next((own for own in reversed(modules) if isinstance(own, nn.Linear)), None)


def _add_codes(embedding: nn.Module, args: Any, output: Any) -> Tensor:
    codes = embedding.get_parameter(NAME)
    num_steps, width = codes.shape
    if not isinstance(output, Tensor) or output.dim() != 2 or output.shape[1] != width or len(output) % num_steps:
        got = tuple(output.shape) if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise ValueError(
            f"fastdmd.tell_steps: expected the level_embedding to give (B, {width}), B divided by {num_steps} steps, "
            f"got {got}"
        )
    return output + GAIN * codes.to(output.dtype).repeat(len(output) // num_steps, 1)
