"""torch's own generators, from which a network of somebody else's, or dropout, may draw."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fastdmd.ranks import Ranks


def state() -> dict[str, Any]:
    """Of all devices that have been in use."""
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {"cpu": torch.get_rng_state(), "cuda": devices}


def part(rank: int, iteration: int) -> None:
    """Lets one process of several, but the first, which goes on, draw numbers of its own from this iteration on."""
    if rank:
        torch.manual_seed((torch.initial_seed() + 2**32 * (2**20 * rank + iteration)) % 2**63)


def restore(state: Mapping[str, Any], ranks: Ranks, iteration: int) -> None:
    """Those that this process had, with those of `others` in the state of the first; where there were more or fewer,
    numbers that go on from the first one's, see `part`."""
    own = [state, *state.get("others", ())]
    is_alike = len(own) == ranks.size
    _take(own[ranks.rank if is_alike else 0])
    if not is_alike:
        part(ranks.rank, iteration)


def _take(state: Mapping[str, Any]) -> None:
    """Of devices that are there; the run may go on with others."""
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_initialized():
        for device, own in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
            torch.cuda.set_rng_state(own, device)
