"""Philox, the normals made from it, and that a draw is a function of seed, call and place, in whatever mode."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from fastdmd import ops
from tests.helpers.op_cases import DEVICES, available

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


def standard_normals(implementation, n, state, device="cpu", shape=None):
    x = torch.zeros(shape or (1, 1, 1, n), device=device)
    return implementation(x, torch.ones(x.shape[0], device=device), state, None, torch.float32)


def kolmogorov(z):
    """The largest distance between the distribution of `z` and the normal one, times the root of their number."""
    below, share = torch.special.ndtr(z.sort().values), torch.arange(len(z) + 1).double() / len(z)
    return len(z) ** 0.5 * torch.maximum(share[1:] - below, below - share[:-1]).max()


@pytest.mark.parametrize("device", DEVICES)
def test_normals_are_normal(device):
    n = 10_000_000
    for implementation in ops.implementations("add_noise_rng", device).values():
        z = standard_normals(implementation, n, ops.rng_state(7, device=device), device).flatten().cpu().double()
        # Five standard errors of each estimate.
        assert abs(z.mean()) < 5 / n**0.5
        assert abs(z.var() - 1) < 5 * (2 / n) ** 0.5
        assert abs(z.pow(4).mean() / z.var() ** 2 - 3) < 5 * (24 / n) ** 0.5
        assert kolmogorov(z) < 1.95  # 2 exp(-2 d^2) = 1e-3
        assert abs((z[0::2] * z[1::2]).mean()) < 5 / (n / 2) ** 0.5  # the two of a pair
        assert 5 < z.max() < 6.7 and -6.7 < z.min() < -5


@pytest.mark.parametrize("device", DEVICES)
def test_noise_is_a_function_of_seed_call_and_place(device):
    reference = ops.implementations("add_noise_rng", device)["reference"]
    for implementation in ops.implementations("add_noise_rng", device).values():
        state = ops.rng_state(2**62 + 3, device=device)
        first, second = (standard_normals(implementation, 1001, state, device) for _ in range(2))
        assert state.tolist() == [2**62 + 3, 2 << 32]
        assert (first - second).abs().min() < 1 < (first - second).abs().max()
        saved = torch.tensor([2**62 + 3, 1 << 32], device=device)  # a resumed run draws what it would have drawn
        assert torch.equal(standard_normals(implementation, 1001, saved, device), second)
        assert_close(standard_normals(reference, 1001, ops.rng_state(2**62 + 3, device=device), device), first)
        # The place in memory counts, not the shape, and no block or thread begins anew.
        longer = standard_normals(implementation, 0, ops.rng_state(2**62 + 3, device=device), device, (7, 3, 101, 97))
        assert torch.equal(longer.flatten()[:1001], first.flatten())
        assert not torch.equal(standard_normals(implementation, 1001, ops.rng_state(4, device=device), device), first)
        empty = ops.rng_state(1, device=device)
        standard_normals(implementation, 0, empty, device, (0, 1, 2, 2))
        assert empty.tolist() == [1, 1 << 32]


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
    assert expected[1].tolist() == [3, 2 << 32]

    straight = gradient_and_state(lambda x, state: noised_again(noised_again(x, state), state))
    two = gradient_and_state(
        lambda x, state: checkpointed(checkpointed(x, state), state)
    )  # recomputed in reverse order
    assert_close(two, straight, rtol=0, atol=0)


def reentrant(x, state):
    return checkpointed(x.clone(), state, use_reentrant=True)


def nested(x, state):
    return checkpointed(x, state, lambda x, state: checkpointed(x, state).sin())


def around_compiled(x, state):
    return checkpointed(x, state, torch.compile(noised_again, backend="aot_eager"))


def inside_compiled(x, state):
    return torch.compile(lambda x: checkpointed(x, state), backend="aot_eager")(x)


@pytest.mark.parametrize("function", [reentrant, nested, around_compiled, inside_compiled])
def test_a_recomputation_that_would_draw_other_noise_is_refused(function):
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="fastdmd.add_noise: expected rng_state outside of a backward pass"):
        function(x, ops.rng_state(0)).sum().backward()


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
