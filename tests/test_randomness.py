"""Every random number of a run: a function of seed, stream, iteration and sample, whatever computes it."""

import pytest
import torch
from torch.testing import assert_close

from fastdmd import ops, randomness
from fastdmd.randomness import Stream, generator, integers, normals, permutation

PLACES = [{}, {"seed": 2**32}, {"stream": Stream.FAKE_LEVEL}, {"iteration": 1}, {"iteration": 2**32 - 1}]


def drawn(num=6, low=-5, high=2**31 - 5, **changes):
    return integers(low, high, num, **({"seed": 0, "stream": Stream.DM_LEVEL, "iteration": 0} | changes))


def test_integers_are_shares_of_the_words_of_their_counters():
    seed, iteration, first = 2**40 + 3, 7, 2**32 - 2  # samples count on from 0
    counter = torch.tensor([[0, sample % 2**32, iteration, Stream.CLASS] for sample in range(first, first + 4)])
    words = ops.implementations("philox")["reference"](counter, torch.tensor([3, 2**8]))[:, 0]
    found = integers(10, 13, 4, seed=seed, stream=Stream.CLASS, iteration=iteration, first_sample=first)
    assert found.tolist() == [10 + word * 3 // 2**32 for word in words.tolist()]
    assert drawn(4, 0, 1000).tolist() == [165, 801, 793, 248]  # runs that go on need them to stay


def test_integers_are_uniform_and_of_what_names_them():
    draws = [drawn(**place) for place in PLACES]
    assert len({tuple(draw.tolist()) for draw in draws}) == len(PLACES)
    counts = drawn(70_000, 3, 10).bincount(minlength=10)
    assert counts[:3].sum() == 0 and (counts[3:] - 10_000).abs().max() < 5 * 10_000**0.5
    for first in range(1, 6):
        assert torch.equal(drawn(6 - first, first_sample=first), drawn()[first:])
    for low, high in ((3, 3), (4, 3), (0, 2**31 + 1)):
        with pytest.raises(ValueError, match=rf"fastdmd.integers: expected low < high <= low .* got {low} and {high}"):
            drawn(1, low, high)
    assert drawn(0).shape == (0,) and drawn(1, 7, 8).tolist() == [7]


def test_permutations():
    orders = [
        permutation(1000, seed=seed, stream=Stream.PAIR, iteration=i) for seed, i in ((0, 0), (0, 0), (1, 0), (0, 1))
    ]
    assert all(torch.equal(order.sort().values, torch.arange(1000)) for order in orders)
    assert torch.equal(orders[0], orders[1])
    for other in orders[2:]:
        assert (orders[0] == other).sum() < 10
    # Each place is as often in the first half as in the second.
    halves = torch.stack([permutation(20, seed=seed, stream=Stream.PAIR) < 10 for seed in range(400)]).sum(0)
    assert (halves - 200).abs().max() < 5 * 10
    assert permutation(0, seed=0, stream=Stream.PAIR).shape == (0,)


def test_generators():
    def number(seed, stream):
        return torch.rand(1, generator=generator(seed, stream)).item()

    assert number(1, Stream.CLASS) == number(1, Stream.CLASS)
    places = ((0, Stream.CLASS), (2**32, Stream.CLASS), (0, Stream.PAIR))
    assert len({number(*place) for place in places}) == len(places)


def test_normals_are_the_noise_of_add_noise():
    key = ops.rng_key(3, stream=Stream.DM_NOISE, iteration=5, first_sample=2)
    noise = normals((3, 3, 5, 7), key)
    x, sigma = torch.randn(3, 3, 5, 7), torch.tensor([0.5, 1.0, 2.0])
    expected = x + sigma[:, None, None, None] * noise
    for layout in (torch.contiguous_format, torch.channels_last):
        assert_close(ops.add_noise(x.contiguous(memory_format=layout), sigma, rng_key=key), expected)
        wide = ops.add_noise(x.double().contiguous(memory_format=layout), sigma, rng_key=key)
        assert_close(wide, x.double() + sigma.double()[:, None, None, None] * noise.double(), rtol=1e-14, atol=1e-14)
    assert noise.std() > 0.8


def test_the_hosts_draws_need_no_backend_of_the_ops(monkeypatch):
    """FASTDMD_BACKEND=triton is about the GPU that trains, beside which the host draws as ever."""
    expected = drawn(), normals((2, 1, 2, 3), ops.rng_key(0))
    monkeypatch.setenv("FASTDMD_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    randomness._on_host.cache_clear()
    assert torch.equal(drawn(), expected[0]) and torch.equal(normals((2, 1, 2, 3), ops.rng_key(0)), expected[1])
