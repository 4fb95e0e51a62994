"""What turns come to in all processes of a run, for whoever reads it: one exchange."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from fastdmd.ranks import Ranks


class Exchanged(Protocol):
    """A tally, or sums by class."""

    def exchanged(self) -> Tensor: ...

    def take_exchanged(self, found: Tensor, rank: int) -> None: ...


def exchange(parts: Sequence[Exchanged], ranks: Ranks) -> None:
    """Lets each part become, in every process, what it would be in one that had run all of the turns' samples, to
    rounding; sums by class in the first one alone. What has been exchanged may be again. Waits for the device."""
    if ranks.is_alone:
        return
    own = [part.exchanged() for part in parts]
    found = ranks.gather(torch.cat(own))  # [ranks, n]
    for part, columns in zip(parts, found.split([len(values) for values in own], dim=1), strict=True):
        part.take_exchanged(columns, ranks.rank)
