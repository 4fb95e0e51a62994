"""What turns come to: their losses and gradient norms, summed on the device, read once per log interval."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastdmd.distill.guard import NUM_NEEDED, SEEN, Fault, Guard
from fastdmd.saved import require_tensors, take

MOST_LEFT_OUT = 0.5  # of the samples of a good turn
GRADIENTS = {  # what a norm is of, as a user calls it
    "grad_norm": "gradient",
    "generator_grad_norm": "gradient of the generator",
    "fake_grad_norm": "gradient of the fake score",
    "head_grad_norm": "gradient of the discriminator",
}


@dataclasses.dataclass(frozen=True)
class Reading:
    """Of the turns of one kind since the last reading."""

    means: dict[str, float | None]  # over the good ones, None where there are none; of statistics that there are
    num_good: int
    num_bad: int
    num_bad_in_a_row: int  # until now, and maybe since before the last reading
    left_out: float  # samples, in batches
    num_watched: int  # turns that told statistics
    fault: Fault | None  # the first one


class Tally:
    """Sums of the named scalars of one kind of turn; adding to them is a few launches and never waits for the device.

    A turn is bad if one of its scalars is NaN or infinite, or if half of its samples were left out: its update is to
    move nothing, see `permits`. It is counted and its scalars are not. `statistics` are judged by nobody: those of a
    turn that are not finite are left out, one by one. `is_shared`: the samples are those of one process of several,
    whose optimizers judge together how many were left out: a norm, which all of them have, is NaN then.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        device: torch.device,
        statistics: tuple[str, ...] = (),
        guard: Guard | None = None,
        *,
        is_shared: bool = False,
    ):
        self.names, self.statistics, self._is_shared = names, statistics, is_shared
        self.guard = Guard(device) if guard is None else guard
        self.latest = torch.zeros(len(names), device=device)  # scalars of the last turn
        self._sums = torch.zeros(len(names), device=device)
        self._weighted = torch.zeros(2, len(statistics), device=device)  # sums and weights of statistics
        self._counts = torch.zeros(5, device=device)  # good, bad, bad in a row, left out, with statistics
        self._first = torch.full((2,), -1, dtype=torch.int64, device=device)  # fault: place of its name, iteration

    @torch.no_grad()
    def permits(self, losses: Sequence[Tensor], seen: Tensor, left_out: Tensor | None = None) -> Tensor:
        """Whether the update of a turn is to move anything, 0-dim; `seen` are the `marks` of what it is made of."""
        needed = seen if self.guard.stops else seen[:NUM_NEEDED]
        good = torch.cat([needed, _row(losses)]).isfinite().all() & ~self.guard.is_halted
        return good if left_out is None or self._is_shared else good & (left_out < MOST_LEFT_OUT)

    @torch.no_grad()
    def add(
        self,
        *scalars: Tensor,
        seen: Tensor | None = None,
        left_out: Tensor | None = None,
        statistics: Tensor | None = None,
    ) -> None:
        """The scalars of one turn, 0-dim each; `left_out`: the share of its samples that its loss left out.

        `seen` are the `marks` of what they come from. `statistics` `[2, S]`, of which so many have names: sums and the
        weights that they will be divided by.
        """
        self.latest.copy_(_row(scalars))
        self._note(torch.zeros(len(SEEN), device=self.latest.device) if seen is None else seen)
        good = self.latest.isfinite().all()
        if left_out is not None:
            self._counts[3] += left_out
            if not self._is_shared:
                good = good & (left_out < MOST_LEFT_OUT)
        self._sums += torch.where(good, self.latest, 0)
        self._counts[0] += good
        self._counts[1:3] += ~good
        self._counts[2] *= ~good
        if statistics is not None:
            self._weighted += torch.where(statistics[0].isfinite(), statistics, 0)
            self._counts[4] += 1

    def scalars(self) -> dict[str, Tensor]:
        """Those of the last turn, 0-dim each, until the next one."""
        return dict(zip(self.names, self.latest, strict=True))

    def fault(self) -> Fault | None:
        """The first one since the last reading. Waits for the device."""
        place, iteration = self._first.tolist()
        if place < 0:
            return None
        name = (*SEEN, *self.names)[place]
        return Fault(iteration + 1, GRADIENTS.get(name, name))

    def state_dict(self) -> dict[str, Tensor]:
        """Its own tensors, to be read at once; the scalars of the last turn have no future."""
        return {"sums": self._sums, "weighted": self._weighted, "counts": self._counts, "first": self._first}

    def load_state_dict(self, state: Mapping[str, Tensor], place: str = "tally") -> None:
        """Raises ValueError, naming the entry in `place`, for what no tally of these names comes to."""
        own = self.state_dict()
        require_tensors(place, own, state)
        for name, least, num in (("counts", 0, math.inf), ("first", -1, len(SEEN) + len(self.names))):
            if not (state[name] >= least).all() or not state[name][0] < num:
                raise ValueError(f"expected {place}.{name} of a tally, got {state[name].tolist()!s:.80}")
        take(place, own, state)

    def exchanged(self) -> Tensor:
        """What other processes have to know of it, float64 `[n]`."""
        return torch.cat([self._weighted.flatten(), self._sums, self._counts, self._first]).double()

    def take_exchanged(self, found: Tensor, rank: int) -> None:
        """Becomes the mean over processes of what they have, `[ranks, n]`; the first fault is that of all."""
        parts = self._weighted, self._sums, self._counts, self._first
        weighted, sums, counts, first = found.split([part.numel() for part in parts], dim=1)
        for own, values in ((self._weighted, weighted), (self._sums, sums), (self._counts, counts)):
            own.copy_(values.mean(0).view_as(own))
        if faults := [(iteration, place) for place, iteration in first.tolist() if place >= 0]:
            iteration, place = min(faults)
            self._first.copy_(torch.tensor([place, iteration]))

    def read(self) -> Reading:
        """Waits for the device; the next reading starts from here."""
        fault = self.fault()
        found = torch.cat([self._weighted.flatten(), self._sums, self._counts]).cpu()
        weighted_sums, weights, sums, counts = found.split([*[len(self.statistics)] * 2, len(self.names), 5])
        num_good, num_bad, num_bad_in_a_row, left_out, num_watched = counts.tolist()
        means = {
            name: total / num_good if num_good else None for name, total in zip(self.names, sums.tolist(), strict=True)
        }
        weighted = zip(self.statistics, weighted_sums.tolist(), weights.tolist(), strict=True)
        means |= {name: total / weight for name, total, weight in weighted if weight}
        self._sums.zero_()
        self._weighted.zero_()
        self._counts[:2] = 0
        self._counts[3:] = 0
        self._first.fill_(-1)
        return Reading(means, int(num_good), int(num_bad), int(num_bad_in_a_row), left_out, int(num_watched), fault)

    def _note(self, seen: Tensor) -> None:
        """The first fault of a turn, if it is the first of all; which may be the end."""
        broken = ~torch.cat([seen, self.latest]).isfinite()
        places = torch.arange(len(broken), device=broken.device)
        place = torch.where(broken, places, len(broken)).amin()
        is_first = broken.any() & (self._first[0] < 0) & ~self.guard.is_halted
        self._first.copy_(torch.where(is_first, torch.stack([place, self.guard.iteration]), self._first))
        if self.guard.stops:
            self.guard.is_halted |= broken.any()


def _row(scalars: Sequence[Tensor]) -> Tensor:
    return torch.stack([scalar.float() for scalar in scalars])
