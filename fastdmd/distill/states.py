"""All that the next iteration of a model depends on, besides the random inputs: for checkpoints."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fastdmd.distill.guard import mark
from fastdmd.distill.turns import DMD2
from fastdmd.optim import AdamWEMA
from fastdmd.saved import require_tensors, take
from fastdmd.shards import local


def state_of(model: DMD2) -> dict[str, Any]:
    """Tensors, the model's own and to be read at once, and numbers, by name.

    What its buffers hold is not among them: inputs are loaded at the start of an iteration, and images that were made
    ahead come again, to the bit, from the generator, which rests between its turns; not those of a network that draws
    random numbers itself, which are others of the same kind then.
    """
    state = {name: optimizer_state(optimizer) for name, optimizer in optimizers_of(model).items()}
    return state | {name: part.state_dict() for name, part in _sums(model).items()}


def load_state(model: DMD2, state: Mapping[str, Any], iteration: int) -> None:
    """Takes over what `state_of` gave of a model like this one, before this iteration. Raises KeyError, ValueError or
    TypeError for any other state, and then has taken over some of it."""
    for name, optimizer in optimizers_of(model).items():
        is_generator = optimizer is model.generator_optimizer
        num_updates = -(-iteration // model.dfake_gen_update_ratio) if is_generator else iteration
        load_optimizer_state(optimizer, state[name], num_updates, name)
    for name, part in _sums(model).items():
        part.load_state_dict(state[name], name)
    model.buffers = None  # images made ahead are of the generator that was


def optimizer_state(optimizer: AdamWEMA) -> dict[str, Any]:
    """Of an optimizer and of its network: moments, averages, weights, and what of the network is not trained.

    The options of its groups are left to the configuration.
    """
    state = optimizer.state_views()
    del state["param_groups"]
    return {"optimizer": state, "untrained": _untrained(optimizer)}


def load_optimizer_state(optimizer: AdamWEMA, state: Mapping[str, Any], num_updates: int, place: str) -> None:
    """Of an optimizer that has been asked for so many updates; errors name the entry in `place`."""
    own, kinds = _untrained(optimizer), optimizer.state_views()
    require_tensors(f"{place}.untrained", own, state["untrained"])
    for kind in (kind for kind, part in kinds.items() if isinstance(part, Mapping)):
        require_tensors(f"{place}.{kind}", kinds[kind], state["optimizer"][kind])
    if (got := state["optimizer"]["num_updates"]) != num_updates:
        raise ValueError(f"expected {place}.num_updates to be {num_updates}, got {got!r:.60}")
    if any(int(step) > num_updates for step in state["optimizer"]["steps"]):
        raise ValueError(f"expected {place}.steps <= {num_updates}, got {state['optimizer']['steps']!s:.60}")
    for name, value in state["untrained"].items():
        saved, here = local(value), local(own[name])
        if not (saved.isfinite() | (saved == here.to(saved.device))).all():  # a mask has infinity where it had it
            raise ValueError(f"expected {place}.untrained.{name} to be finite, got NaN or infinity")
    take(f"{place}.untrained", own, state["untrained"])  # first: the averages take them from the network
    optimizer.load_state_dict(state["optimizer"])


def optimizers_of(model: DMD2) -> dict[str, AdamWEMA]:
    """By the names of what they train."""
    optimizers = {"generator": model.generator_optimizer, "fake_score": model.guidance_optimizer}
    return optimizers if model.head_optimizer is None else {**optimizers, "head": model.head_optimizer}


def weights_of(model: DMD2) -> Iterator[Tensor]:
    """And moments, averages and whatever of the networks is not trained, without the teacher."""
    for optimizer in optimizers_of(model).values():
        yield from tensors_of_optimizer(optimizer)


def tensors_of_optimizer(optimizer: AdamWEMA) -> Iterator[Tensor]:
    """Weights, moments, averages, and what of its network is not trained."""
    for part in (*optimizer.state_views().values(), _untrained(optimizer)):
        yield from part.values() if isinstance(part, Mapping) else ()


def first_not_finite(optimizers: Mapping[str, AdamWEMA], masks: Container[str] = ()) -> str | None:
    """The name of a tensor with NaN or infinity among weights, averages, moments and buffers; waits for the device.
    Of what is cut, in the part of this process. The buffers in `masks` may hold infinity, but no NaN."""
    for owner, optimizer in optimizers.items():
        state = optimizer.state_views()
        kinds = {kind: part for kind, part in state.items() if isinstance(part, Mapping)}
        for kind, tensors in {**kinds, "untrained": _untrained(optimizer)}.items():
            own = {name: local(x) for name, x in tensors.items()}
            floating = {name: x for name, x in own.items() if x.is_floating_point() and x.numel()}
            if floating:
                allowed = masks if kind == "untrained" else ()
                broken = torch.stack([_broken(x, name in allowed) for name, x in floating.items()])
                if broken.any():
                    what = {"param": "weights", "untrained": "buffers"}.get(kind, kind)
                    return f"{what} of the {owner.replace('_', ' ')}, {list(floating)[int(broken.int().argmax())]}"
    return None


def _broken(x: Tensor, is_mask: bool) -> Tensor:
    return x.isnan().any() if is_mask else mark(x).isnan()


def digest(*tensors: Tensor | None) -> str:
    """Of their bits, in hexadecimal; waits for the device."""
    sha256 = hashlib.sha256()
    for value in tensors:
        sha256.update(b"none" if value is None else value.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return sha256.hexdigest()[:16]


def digest_of_draws(draws: Mapping[str, Tensor | None]) -> str:
    """Of what an iteration draws, by name, as far as it is the same to the bit on every device and with every torch:
    whole numbers, keys and labels among them, and images as the 256 values of their pixels. Noise and its levels follow
    from keys and settings, to rounding."""
    known: list[Tensor | None] = []
    for name, value in draws.items():
        if value is None or not value.is_floating_point():
            known.append(value)
        elif name.endswith("images"):
            known.append(((value.cpu() + 1) * 127.5).round())
    return digest(*known)


def require_same_draws(iteration: int, expected: str, draws: Mapping[str, Tensor | None]) -> None:
    """Raises ValueError where these have another digest: training would go on with something else."""
    if digest_of_draws(draws) != expected:
        raise ValueError(
            f"expected iteration {iteration} to draw what it would have, got something else: there are other data, "
            "or another version of fastdmd drew it"
        )


def _sums(model: DMD2) -> dict[str, Any]:
    sums = {"generator_tally": model.generator_tally, "guidance_tally": model.guidance_tally}
    return sums if model.class_sums is None else {**sums, "class_sums": model.class_sums}


def _untrained(optimizer: AdamWEMA) -> dict[str, Tensor]:
    """Buffers and fixed parameters."""
    trained = optimizer.weights
    state = optimizer.network.state_dict()
    return {name: value for name, value in state.items() if isinstance(value, Tensor) and name not in trained}
