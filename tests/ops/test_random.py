"""Philox, the normals made from it, and that a draw is a function of its key and of the place, in whatever mode."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from fastdmd import ops
from tests.helpers.op_cases import DEVICES, LAYOUTS, available

KNOWN_ANSWERS = [  # Salmon et al. 2011, kat_vectors of Random123
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize("device", DEVICES)
def test_philox_gives_the_published_answers(device):
    def words(text):
        return torch.tensor([int(word, 16) for word in text.split()], device=device)

    for implementation in ops.implementations("philox", device).values():
        for counter, key, answer in KNOWN_ANSWERS:
            assert torch.equal(implementation(words(counter)[None], words(key))[0], words(answer))


@pytest.mark.parametrize("device", DEVICES)
def test_philox_is_the_same_integers_everywhere(device):
    torch.manual_seed(0)
    counter, key = torch.randint(2**32, (50_001, 4), device=device), torch.randint(2**32, (2,), device=device)
    found = ops.implementations("philox", device)
    expected = found["reference"](counter, key)
    for name in available("philox", device):
        assert torch.equal(found[name](counter, key), expected)


def standard_normals(implementation, shape, key, layout=torch.contiguous_format):
    x = torch.zeros(shape, device=key.device).contiguous(memory_format=layout)
    return implementation(x, torch.ones(shape[0], device=key.device), key, None, torch.float32)


def kolmogorov(z):
    """The largest distance between the distribution of `z` and the normal one, times the root of their number."""
    below, share = torch.special.ndtr(z.sort().values), torch.arange(len(z) + 1).double() / len(z)
    return len(z) ** 0.5 * torch.maximum(share[1:] - below, below - share[:-1]).max()


@pytest.mark.parametrize("device", DEVICES)
def test_normals_are_normal(device):
    n = 10_000_000
    for implementation in ops.implementations("add_noise_rng", device).values():
        z = standard_normals(implementation, (2, 1, 1, n // 2), ops.rng_key(7, device=device)).flatten().cpu().double()
        # Five standard errors of each estimate.
        assert abs(z.mean()) < 5 / n**0.5
        assert abs(z.var() - 1) < 5 * (2 / n) ** 0.5
        assert abs(z.pow(4).mean() / z.var() ** 2 - 3) < 5 * (24 / n) ** 0.5
        assert kolmogorov(z) < 1.95  # 2 exp(-2 d^2) = 1e-3
        assert abs((z[0::2] * z[1::2]).mean()) < 5 / (n / 2) ** 0.5  # the two of a pair
        assert abs((z[: n // 2] * z[n // 2 :]).mean()) < 5 / (n / 2) ** 0.5  # two images
        assert 5 < z.max() < 6.7 and -6.7 < z.min() < -5


KEY = {"seed": 2**62 + 3, "stream": 7, "iteration": 2**32 - 1, "first_sample": 2**32 - 2}  # samples count on from 0
SHAPES = [
    (4, 3, 7, 9),
    (4, 3, 8, 6),
    (3, 1, 1, 1),
    (5, 4, 2, 3),
    (2, 3, 33, 36),
    (3, 1, 28, 28),
    (300, 1, 2, 3),
    (0, 2, 1, 4),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_noise_is_a_function_of_its_key_and_place(shape, layout, device):
    """Place is sample and element in the order (C, H, W), whatever the memory format and the rest of the batch."""
    found = ops.implementations("add_noise_rng", device)
    key = ops.rng_key(**KEY, device=device)
    expected = standard_normals(found["reference"], shape, key)
    for name, implementation in found.items():
        noise = standard_normals(implementation, shape, key, layout)
        assert_close(noise, expected, rtol=1e-5, atol=1e-6, check_stride=False)
        assert torch.equal(noise, standard_normals(implementation, shape, key)), name
        assert key.tolist() == list(KEY.values())
        for first in range(1, shape[0], 2):
            of_rows = ops.rng_key(**{**KEY, "first_sample": (KEY["first_sample"] + first) % 2**32}, device=device)
            rows = standard_normals(implementation, (min(2, shape[0] - first), *shape[1:]), of_rows, layout)
            assert torch.equal(rows, noise[first : first + 2]), name


@pytest.mark.parametrize("device", DEVICES)
def test_every_part_of_a_key_gives_other_noise(device):
    for implementation in ops.implementations("add_noise_rng", device).values():
        keys = [ops.rng_key(3, device=device)]
        keys += [ops.rng_key(seed, device=device) for seed in (4, 3 + 2**32)]
        for name in ("stream", "iteration", "first_sample"):
            keys += [ops.rng_key(3, device=device, **{name: value}) for value in (1, 2**31)]
        noises = [standard_normals(implementation, (1, 1, 1, 1001), key).flatten() for key in keys]
        for i, first in enumerate(noises):
            for second in noises[:i]:
                assert abs((first * second).mean()) < 5 / 1001**0.5 and (first == second).float().mean() < 0.01


def test_an_element_is_the_normal_of_its_counter():
    """By the definition, of words of `ops.philox`, in float64."""
    noise = ops.add_noise(
        torch.zeros(3, 2, 3, 5), torch.ones(3), rng_key=ops.rng_key(2**33 + 1, stream=5, iteration=6, first_sample=7)
    )
    counter = torch.tensor([[29 // 4, 7 + 2, 6, 5]])
    words = ops.philox(counter, torch.tensor([1, 2]))[0]
    a, b = words[:2].tolist()  # element 29 is the second of its quad
    radius, angle = (-2 * math.log((a // 2 + 0.5) / 2**31)) ** 0.5, math.pi * (b - (b >> 31 << 32)) / 2**31
    assert_close(
        noise[2, 1, 2, 3:].double(),
        radius * torch.tensor([math.cos(angle), math.sin(angle)]).double(),
        rtol=1e-5,
        atol=1e-6,
    )


def test_a_key_draws_the_same_at_every_call():
    x, key = torch.randn(2, 3, 4, 4), ops.rng_key(5, stream=2)
    expected = ops.add_noise(x, torch.ones(2), rng_key=key)
    state = ops.rng_state(5)
    of_states = [ops.add_noise(x, torch.ones(2), rng_state=state) for _ in range(3)]
    assert torch.equal(ops.add_noise(x, torch.ones(2), rng_key=key), expected) and key.tolist() == [5, 2, 0, 0]
    assert state.tolist() == [5, 2**32 - 1, 3, 0]
    for call, noised in enumerate(of_states):  # a state is a key that counts
        assert torch.equal(
            ops.add_noise(x, torch.ones(2), rng_key=ops.rng_key(5, stream=2**32 - 1, iteration=call)), noised
        )

    def twice(x):
        return F.silu(ops.add_noise(F.silu(ops.add_noise(x, torch.ones(2), rng_key=key)), torch.ones(2), rng_key=key))

    x.requires_grad_()
    (expected,) = torch.autograd.grad(twice(x).sum(), x)
    torch._dynamo.reset()
    compiled = torch.compile(twice, backend="aot_eager", fullgraph=True)
    for function in (
        compiled,
        lambda x: checkpoint(twice, x, use_reentrant=False),
        lambda x: checkpoint(twice, x.clone(), use_reentrant=True),
        lambda x: checkpoint(compiled, x, use_reentrant=False),
        lambda x: checkpoint(lambda x: checkpoint(twice, x, use_reentrant=False), x, use_reentrant=False),
    ):
        x.grad = None
        function(x).sum().backward()
        assert torch.equal(x.grad, expected)


def noised_again(x, state):
    """Depends on the noise in value and gradient; draws twice."""
    first = F.silu(ops.add_noise(x, torch.ones(2), rng_state=state))
    return F.silu(first * ops.add_noise(x.detach(), torch.ones(2), rng_state=state))


def checkpointed(x, state, function=noised_again, **options):
    """The state is not among the arguments, whose change torch refuses."""
    return checkpoint(lambda x: function(x, state), x, **{"use_reentrant": False, **options})


def gradient_and_state(function, num_backward=1):
    x, state = torch.linspace(-1, 1, 96).view(2, 3, 4, 4).requires_grad_(), ops.rng_state(3)
    total = function(x, state).sum()
    for _ in range(num_backward):
        (grad,) = torch.autograd.grad(total, x, retain_graph=True)
    return grad, state


@pytest.mark.parametrize("options", [{}, {"preserve_rng_state": False}], ids=["default", "no rng"])
def test_a_recomputation_sees_the_same_noise(options):
    expected = gradient_and_state(noised_again)
    for num_backward in (1, 2):
        result = gradient_and_state(lambda x, state: checkpointed(x, state, **options), num_backward)
        assert_close(result, expected, rtol=0, atol=0)  # the state, too: it is advanced once
    assert expected[1].tolist() == [3, 2**32 - 1, 2, 0]

    straight = gradient_and_state(lambda x, state: noised_again(noised_again(x, state), state))
    two = gradient_and_state(
        lambda x, state: checkpointed(checkpointed(x, state), state)
    )  # recomputed in reverse order
    assert_close(two, straight, rtol=0, atol=0)


def noised_once(x, state):
    return F.silu(ops.add_noise(F.silu(x), torch.ones(2), rng_state=state))


def reentrant(x, state, draw):
    return checkpointed(x.clone(), state, draw, use_reentrant=True)


def nested(x, state, draw):
    return checkpointed(x, state, lambda x, state: checkpointed(x, state, draw).sin())


def around_compiled(x, state, draw):
    return checkpointed(x, state, torch.compile(draw, backend="aot_eager"))


def inside_compiled(x, state, draw):
    return torch.compile(lambda x: checkpointed(x, state, draw), backend="aot_eager")(x)


@pytest.mark.parametrize("draw", [noised_once, noised_again])
@pytest.mark.parametrize("function", [reentrant, nested, around_compiled, inside_compiled])
def test_a_recomputation_that_would_draw_other_noise_is_refused(function, draw):
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="fastdmd.add_noise: expected rng_state outside of a backward pass"):
        function(x, ops.rng_state(0), draw).sum().backward()


def test_compiled_draws_are_those_of_eager():
    torch._dynamo.reset()
    compiled = torch.compile(noised_again, backend="aot_eager", fullgraph=True)
    assert_close(gradient_and_state(compiled), gradient_and_state(noised_again), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_draw_does_not_depend_on_the_gradient(dtype):
    x, scale = torch.linspace(-1, 1, 96).view(2, 3, 4, 4).to(dtype), torch.tensor([0.5, 2.0])
    wanted = x.clone().requires_grad_()
    states = [ops.rng_state(0), ops.rng_state(0)]
    x_t, same = (
        ops.add_noise(images, torch.ones(2), rng_state=state, scale=scale, dtype=torch.float32)
        for images, state in zip((x, wanted), states, strict=True)
    )
    assert torch.equal(x_t, same) and torch.equal(*states)
    (grad,) = torch.autograd.grad(same.sum(), wanted)
    assert grad.dtype == dtype and torch.equal(grad, scale[:, None, None, None].expand_as(x).to(dtype))
