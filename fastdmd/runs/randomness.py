"""torch's own generators, from which a network of somebody else's, or dropout, may draw."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def state() -> dict[str, Any]:
    """Of all devices that have been in use."""
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {"cpu": torch.get_rng_state(), "cuda": devices}


def restore(state: Mapping[str, Any]) -> None:
    """Those of devices that are there; the run may go on with others."""
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_initialized():
        for device, own in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
            torch.cuda.set_rng_state(own, device)
