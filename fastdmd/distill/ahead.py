"""Images made ahead: between its turns the generator is constant, so several iterations' images are made at once."""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter

import torch
from torch import Tensor

from fastdmd.distill.draws import Draws
from fastdmd.distill.starts import copy_tensors, make_images, map_tensors, same_start, start_of
from fastdmd.sampling import Generator

# Images in one no-grad forward of the generator, which serves several iterations where the batch is smaller. Measured
# on two cores, 48-wide network: 8 images cost 1.5 ms each, 72 cost 1.1 ms, 128 the same.
MAX_IMAGES_AHEAD = 128

Source = Callable[[int], Draws]  # the random inputs of an iteration


class Ahead:
    """Static buffers for the images of a chunk of iterations between two generator turns, and the draws behind them.

    Iteration `k * ratio` has a generator turn; those between it and the next are cut into chunks of equal length. The
    random inputs of a chunk are asked for when its images are made.
    """

    def __init__(self, draws: Draws, ratio: int):
        self._ratio, batch_size = ratio, len(draws.noise)
        lengths = [length for length in range(1, ratio) if (ratio - 1) % length == 0]
        fitting = (length for length in lengths if length * batch_size <= MAX_IMAGES_AHEAD)
        chunk = self.chunk = max(fitting, default=1)  # iterations
        self.inputs = map_tensors(lambda x: x.new_empty(chunk * batch_size, *x.shape[1:]), start_of(draws))
        self.x_gen = torch.empty_like(self.inputs.noise)  # [chunk * B, C, H, W]
        self._start: int | None = None  # of the chunk whose images are here
        self._source: Source | None = None
        self._drawn: dict[int, Draws] = {}

    def starts(self, step: int) -> bool:
        """Whether a chunk begins with this iteration."""
        position = step % self._ratio
        return position > 0 and (position - 1) % self.chunk == 0

    def missing(self, step: int) -> int | None:
        """The start of the chunk of this iteration, if its images are not here: of the first one, or after a change."""
        start = step - self._index(step)
        return None if self._start == start else start

    def draws(self, step: int, source: Source) -> Draws:
        """The random inputs of an iteration: kept ones, or new ones of another source than they are from.

        Images stay where another source draws what they were made from; on a GPU that comparison waits for the device.
        """
        kept = self._drawn.pop(step, None)
        if source is self._source:
            return kept or source(step)
        drawn = source(step)
        if kept is None or not same_start(kept, drawn):
            self._start = None
        return drawn

    def fill(self, start: int, source: Source) -> None:
        """Puts what the iterations `[start, start + chunk)` make images from where `generate` reads it."""
        self._drawn = {step: source(step) for step in range(start, start + self.chunk)}
        for rows, drawn in zip(parts(len(self.x_gen), self.chunk), self._drawn.values(), strict=True):
            copy_tensors(drawn, map_tensors(itemgetter(rows), self.inputs))
        self._start, self._source = start, source

    @torch.no_grad()
    def generate(self, generator: Generator, num_parts: int) -> None:
        """Makes the images, in as many parts as a batch is processed in."""
        for rows in parts(len(self.x_gen), num_parts):
            self.x_gen[rows] = make_images(generator, map_tensors(itemgetter(rows), self.inputs))

    def images(self, step: int) -> Tensor:
        """Those of an iteration, `[B, C, H, W]`."""
        return self.x_gen.unflatten(0, (self.chunk, -1))[self._index(step)]

    def _index(self, step: int) -> int:
        return (step % self._ratio - 1) % self.chunk


def parts(length: int, num_parts: int) -> list[slice]:
    """So many equal parts of so many rows, which they divide."""
    size = length // num_parts
    return [slice(start, start + size) for start in range(0, length, size)]
