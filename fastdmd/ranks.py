"""Processes that share a batch: which rows are whose, and what they tell each other; one alone tells nobody."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fastdmd.memory import ran_out_of_memory

Value = TypeVar("Value")
FAULTS = (ValueError, TypeError, OSError)


@dataclasses.dataclass(frozen=True)
class Ranks:
    """One process among `size` of a process group of torch's; without a group, or in one of its own, it is alone: then
    nothing is communicated, and every method is the identity.

    All ranks call the same methods in the same order. Where one has ended, or does not answer, they raise
    ConnectionError.
    """

    rank: int = 0
    size: int = 1
    group: Any = None  # torch.distributed.ProcessGroup

    @classmethod
    def of(cls, group: Any) -> Ranks:
        """Of a group, which may have one process; None: of no group. Raises TypeError for what is no group, as torch
        gives to a process that is not in one."""
        if group is None:
            return ALONE
        if not isinstance(group, torch.distributed.ProcessGroup):
            raise TypeError(f"fastdmd.Ranks: expected a process group that this process is in, got {group!r:.80}")
        return cls(group.rank(), group.size(), group)

    @property
    def is_alone(self) -> bool:
        return self.size == 1

    @property
    def is_first(self) -> bool:
        """Whether it is the one that writes and decides."""
        return self.rank == 0

    def rows(self, num_samples: int) -> slice:
        """Its samples of a batch, as many as every other rank's. Raises ValueError for a batch without such parts."""
        if num_samples % self.size:
            raise ValueError(f"fastdmd.Ranks: expected a batch that {self.size} processes divide, got {num_samples}")
        length = num_samples // self.size
        return slice(self.rank * length, (self.rank + 1) * length)

    def mean_(self, x: Tensor) -> Tensor:
        """Replaces a tensor, of any device, by its mean over all ranks: a launch or two, which a graph may hold."""
        if self.is_alone:
            return x
        with self._reaching_all():
            if x.is_cuda:
                torch.distributed.all_reduce(x, torch.distributed.ReduceOp.AVG, group=self.group)
            else:  # gloo has no mean
                torch.distributed.all_reduce(x.div_(self.size), group=self.group)
        return x

    def require_equal(self, what: str, describe: Callable[[], str]) -> None:
        """Raises ValueError, in all processes, naming those whose description is another than the first one's."""
        if self.is_alone:
            return
        found = self.gather_objects(describe())
        if others := [str(rank) for rank, text in enumerate(found) if text != found[0]]:
            got = next(text for text in found if text != found[0])
            raise ValueError(
                f"fastdmd: expected the same {what} in all processes, got others of ranks {', '.join(others)}: "
                f"{got:.80}"
            )

    @torch.no_grad()
    def spread_(self, network: nn.Module) -> None:
        """Replaces parameters and buffers by those of the first rank. Raises ValueError where names, shapes or dtypes
        differ."""
        if self.is_alone:
            return
        tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
        names = {name: (x.dtype, *x.shape) for name, x in tensors.items()}
        self.require_equal("names, shapes and dtypes of tensors", lambda: str(names))
        for x in tensors.values():
            dense = x.contiguous()
            with self._reaching_all():  # as bytes: gloo knows some types of numbers alone
                torch.distributed.broadcast(dense.view(-1).view(torch.uint8), group=self.group, group_src=0)
            for dim, stride in enumerate(x.stride()):
                if stride == 0:  # expanded: what is written is there once
                    x, dense = x[(slice(None),) * dim + (slice(1),)], dense.narrow(dim, 0, 1)
            x.copy_(dense)

    def gather(self, x: Tensor) -> Tensor:
        """Of all ranks, in their order, `[size, *x.shape]`, on the host; waits for the device."""
        x = x.cpu()
        if self.is_alone:
            return x[None]
        found = x.new_empty(self.size, *x.shape)
        with self._reaching_all():
            torch.distributed.all_gather(list(found.unbind()), x.contiguous(), group=self.group)
        return found

    def gather_to_first(self, value: Value) -> list[Value]:
        """Whatever can be pickled, of all ranks, in their order; empty on the others."""
        if self.is_alone:
            return [value]
        found: list[Any] = [None] * self.size if self.is_first else []
        with self._reaching_all():
            torch.distributed.gather_object(value, found if self.is_first else None, group=self.group, group_dst=0)
        return found

    def gather_objects(self, value: Value) -> list[Value]:
        """The same, on all ranks."""
        found: list[Any] = [value] * self.size
        if not self.is_alone:
            with self._reaching_all():
                torch.distributed.all_gather_object(found, value, group=self.group)
        return found

    def in_order(self, own: Iterable[Value | None], take: Callable[[Value], None]) -> None:
        """Lets the first rank `take` what all ranks make, round by round in their order, until all have ended; None is
        left out, and tensors are on the host.

        A ValueError or OSError of one rank, or of `take`, is raised in all of them.
        """
        if self.is_alone:
            for value in own:
                if value is not None:
                    take(value)
            return
        values = iter(own)
        fault: Exception | None = None  # of what was taken in the round before
        while True:
            made, is_over = None, False
            try:  # after a fault, too: to make something may be a talk of all ranks
                made = next(values)
            except StopIteration:
                is_over = True
            except ConnectionError:
                raise
            except (ValueError, OSError) as error:
                fault = fault or error
            states = self.gather(torch.tensor([fault is not None, is_over]))  # [ranks, 2]
            if states[:, 0].any():
                self.raise_first(fault)
            if states[:, 1].all():
                return
            found = self.gather_to_first(tree_map_only(Tensor, Tensor.cpu, made))
            try:
                for value in found:
                    if value is not None:
                        take(value)
            except (ValueError, OSError) as error:
                fault = error

    def from_first(self, make: Callable[[], Value]) -> Value:
        """What the first rank makes, on all of them; or the ValueError, TypeError or OSError that it raises."""
        if self.is_alone:
            return make()
        outcome: list[Any] = [None, None]
        if self.is_first:
            try:
                outcome[0] = make()
            except FAULTS as error:
                outcome[1] = _told(error)
        with self._reaching_all():
            torch.distributed.broadcast_object_list(outcome, group=self.group, group_src=0)
        value, fault = outcome
        if fault is not None:
            raise _heard(fault)
        return value

    def together(self, make: Callable[[], Value], faults: tuple[type[Exception], ...] = FAULTS) -> Value:
        """What each rank makes, which exchanges nothing; where one raises one of these faults, all do."""
        if self.is_alone:
            return make()
        value, fault = None, None
        try:
            value = make()
        except faults as error:
            fault = error
        self.raise_first(fault)
        return cast(Value, value)

    def raise_first(self, fault: Exception | None) -> None:
        """Raises that of the first rank that has one, in all of them."""
        for told in self.gather_objects(_told(fault)):
            if told is not None:
                raise _heard(told)

    def __deepcopy__(self, memo: object) -> Ranks:
        return self  # there is one group

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickles, of which no other process could make the group. Raises TypeError where there is one."""
        if self.group is not None:
            raise TypeError(
                f"fastdmd.Ranks: expected what is pickled to have no process_group, got one of {self.size} processes; "
                "save its state_dict() instead, which load_state_dict of one with a process_group takes"
            )
        return Ranks, ()

    @contextlib.contextmanager
    def reaching_all(self) -> Iterator[None]:
        """Around what torch exchanges by itself."""
        with contextlib.nullcontext() if self.is_alone else self._reaching_all(_is_of_connection):
            yield

    @contextlib.contextmanager
    def _reaching_all(self, is_meant: Callable[[RuntimeError], bool] = lambda error: True) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if ran_out_of_memory(error) or not is_meant(error):
                raise
            got = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ConnectionError(
                f"fastdmd: expected an answer of all {self.size} processes, got one that ended or is silent: {got:.200}"
            ) from error


def _told(error: Exception | None) -> tuple[Exception, int | None] | None:
    """What other ranks are told of an error: a pickle loses an errno that an OSError was not made with."""
    return None if error is None else (error, getattr(error, "errno", None))


def _heard(told: tuple[Exception, int | None]) -> Exception:
    error, number = told
    if isinstance(error, OSError):
        error.errno = number
    return error


def _is_of_connection(error: RuntimeError) -> bool:
    """Whether it is about other processes, and not about networks: gloo's have no type of their own."""
    text = str(error).lower()
    return isinstance(error, torch.distributed.DistError) or "gloo" in text or "connection closed by peer" in text


ALONE = Ranks()
