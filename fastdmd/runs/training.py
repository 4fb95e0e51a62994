"""What a loop is given: a training, and what it reads of its settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from fastdmd.distill.guard import NanPolicy
from fastdmd.distill.tally import Tally
from fastdmd.sampling import Sampler


class LoopSettings(Protocol):
    """What the loop reads of a configuration."""

    @property
    def iterations(self) -> int: ...

    @property
    def batch_size(self) -> int: ...

    @property
    def log_every(self) -> int: ...

    @property
    def snapshots(self) -> int: ...

    @property
    def nan_policy(self) -> NanPolicy: ...


class Training(Protocol):
    """One step of it, and what to keep, to show and to measure."""

    @property
    def network(self) -> nn.Module:
        """The one that is kept, shown and measured."""

    @property
    def tallies(self) -> Sequence[Tally]:
        """Of its kinds of turns."""

    def iterate(self, iteration: int) -> None: ...

    def fault(self) -> str | None:
        """Which tensor of all that a snapshot or a checkpoint would hold has NaN or infinity; None: none has."""

    def finish(self) -> None:
        """What is left to do to the network when no iteration follows."""

    def samples(self) -> Tensor:
        """For samples.png: `[rows, columns, C, H, W]`; column 0 keeps its noise from call to call."""

    def save(self, iteration: int, **information: Any) -> None: ...

    def measurements(self) -> Iterable[tuple[str, Sampler, dict | None]]:
        """Rows of the table, `network` first: name, sampler, what is on record of it."""

    # By several processes, of which each has a part of every batch.

    @property
    def is_in_parts(self) -> bool:
        """Whether each has a part of the networks, too: then all of them sample, save and look for faults together."""

    def exchange(self) -> None:
        """Lets its tallies be those of all."""

    def digest(self) -> str:
        """Of all that has to be the same in all of them."""
        ...


class Resumable(Protocol):
    """What a checkpoint is made of, part by part."""

    def state_dict(self) -> dict[str, Any]:
        """All that its future depends on: dictionaries and lists of tensors, numbers and texts, to be read at once."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from there. Whatever a state that is none of its own makes it raise, another one may follow."""
        ...
