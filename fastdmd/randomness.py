"""Every random number of a run: a function of (seed, stream, iteration, sample), by Philox4x32-10, on any device.

`ops.rng_key` names the numbers of a draw. A sample is a row of the whole batch, whichever process or part of a batch it
is drawn in; or the number of an image, where there are no iterations.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from fastdmd import ops

RANDOM_NUMBERS = "Philox4x32-10"  # what files say that depend on them; of before, they say nothing


class Stream(enum.IntEnum):
    """What a number is for. Numbers of streams that share the rest are independent of each other."""

    GENERATOR_NOISE = 0  # what images of an iteration are made from
    CLASS = 1
    STEP_NOISE = 3  # on the way to a further step of a generator
    START_IMAGE = 4  # which real images are noised to start from
    DM_LEVEL = 5  # distribution matching
    DM_NOISE = 6
    FAKE_LEVEL = 7  # the fake score
    FAKE_NOISE = 8
    GAN_LEVEL = 9  # generated images as the discriminator judges them
    GAN_NOISE = 10
    REAL_IMAGE = 11  # real ones
    REAL_LEVEL = 12
    REAL_NOISE = 13
    HEAD_WEIGHTS = 14  # the discriminator's first
    PAIR = 15  # which pairs a regression is to
    TRAINING_IMAGE = 16  # pretraining
    TRAINING_LEVEL = 17
    TRAINING_NOISE = 18
    EVALUATION_NOISE = 19  # what sampled images are made from
    EVALUATION_STEP_NOISE = 20
    EVALUATION_ORDER = 21  # of real images
    KERNEL_DISTANCE = 22  # its subsets
    PICTURE_NOISE = 23  # samples.png
    PICTURE_STEP_NOISE = 24
    PAIR_NOISE = 25  # what images of pairs are made from
    REFERENCE_ORDER = 26  # of real images that alarms compare with
    REFERENCE_NOISE = 27  # behind a teacher's
    EXPORT = 28  # images by which an exported generator is compared
    EXPORT_STEP_NOISE = 29
    GAN_SHIFT = 30  # by which generated images are moved before they are judged
    REAL_SHIFT = 31


def normals(shape: tuple[int, ...], rng_key: Tensor) -> Tensor:
    """Standard normals `[B, C, H, W]`, float32, on the device of a key: the noise that `ops.add_noise` makes of it."""
    x, sigma = rng_key.new_zeros(shape, dtype=torch.float32), rng_key.new_ones(shape[0], dtype=torch.float32)
    if rng_key.device.type == "cpu":
        return _on_host("add_noise_rng")(x, sigma, rng_key, None, x.dtype)
    return ops.add_noise(x, sigma, rng_key=rng_key)


def integers(
    low: int,
    high: int,
    num: int,
    *,
    seed: int,
    stream: Stream,
    iteration: int = 0,
    first_sample: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """`low + (word * (high - low) >> 32)` for samples `[first_sample, first_sample + num)`, int64 `[num]`, on `device`.

    Uniform over `[low, high)` to 2^-32 of its length; a word is the first of its counter. Drawn on the host, which the
    device need not wait for. Raises ValueError for an empty range, or one beyond 2^31.
    """
    if not 0 < high - low <= 2**31:
        raise ValueError(f"fastdmd.integers: expected low < high <= low + 2^31, got {low} and {high}")
    word = _words(num, seed, stream, iteration, first_sample)[:, 0]
    return (low + (word * (high - low) >> 32)).to(device, non_blocking=True)


def permutation(num: int, *, seed: int, stream: Stream, iteration: int = 0) -> Tensor:
    """`0, ..., num - 1` in random order, int64 `[num]`, on the host: sorted by their words."""
    words = _words(num, seed, stream, iteration, 0)
    return (words[:, 0] << 31 | words[:, 1] >> 1).argsort(stable=True)


def generator(seed: int, stream: Stream) -> torch.Generator:
    """A generator of torch's on the host, for what only such a one can draw."""
    low, high, *_ = _words(1, seed, stream, 0, 0)[0].tolist()
    return torch.Generator().manual_seed(low | high >> 1 << 32)


def _words(num: int, seed: int, stream: Stream, iteration: int, first_sample: int) -> Tensor:
    """Those of the first element of as many samples, int64 `[num, 4]`."""
    key = ops.rng_key(seed, stream=stream, iteration=iteration, first_sample=first_sample)
    counter = torch.zeros(num, 4, dtype=torch.int64)
    counter[:, 1] = first_sample + torch.arange(num)
    counter[:, 2] = key[2]
    counter[:, 3] = key[1]
    return _on_host("philox")(counter, torch.stack([key[0], key[0] >> 32]))


@functools.cache
def _on_host(op: str) -> Callable[..., Tensor]:
    """What computes an op there best. FASTDMD_BACKEND is about the ops of the device that trains, perhaps a GPU."""
    return next(iter(ops.implementations(op, "cpu").values()))
