"""The adversarial losses and weights against their formulas, and their gradients."""

import math
import re

import pytest
import torch
from torch.autograd import gradcheck
from torch.testing import assert_close

from fastdmd import ops
from fastdmd.distill.adversarial import (
    MAX_RATIO,
    approximate_r1,
    density_ratio,
    discriminator_loss,
    divergence_weight,
    fooling_loss,
    weigh_gradient,
)

GENERATOR = torch.Generator().manual_seed(0)
A, B = 2 * torch.randn(2, 7, generator=GENERATOR, dtype=torch.float64)
# f of each divergence of p_real from p_fake, as the mean over p_fake of f(p_real / p_fake).
F_OF_R = {
    "reverse-kl": lambda r: -r.log(),
    "forward-kl": lambda r: r * r.log(),
    "jensen-shannon": lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(),
    "hellinger": lambda r: (r.sqrt() - 1) ** 2,
}


def ln_1p_exp(x):
    return (1 + x.exp()).log()


def test_losses_are_their_formulas():
    assert_close(fooling_loss(A), ln_1p_exp(-A).mean())
    assert_close(discriminator_loss(A, B), ln_1p_exp(A).mean() + ln_1p_exp(-B).mean())
    assert_close(approximate_r1(A, B), ((A - B) ** 2).mean())
    assert fooling_loss(torch.tensor([-1e4])).item() == 1e4  # where exp would overflow
    assert discriminator_loss(torch.zeros(3), torch.zeros(5)).item() == pytest.approx(2 * math.log(2))


def test_gradients_are_exact_in_float64():
    a, b = A.clone().requires_grad_(), B.clone().requires_grad_()
    assert gradcheck(fooling_loss, a) and gradcheck(discriminator_loss, (a, b)) and gradcheck(approximate_r1, (a, b))
    assert gradcheck(density_ratio, a)
    for divergence in F_OF_R:
        assert gradcheck(lambda logit, name=divergence: divergence_weight(logit, name), a)


@pytest.mark.parametrize("divergence", F_OF_R)
def test_weights_are_the_second_derivative_of_f(divergence):
    """`h = f''(r) r^2` but for its scale, and 1 on average."""
    r = A.exp().requires_grad_()
    (first,) = torch.autograd.grad(F_OF_R[divergence](r).sum(), r, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), r)
    h = second * r.detach() ** 2
    got = divergence_weight(A, divergence)
    assert_close(got, h / h.mean())
    assert got.mean().item() == pytest.approx(1) and (divergence == "reverse-kl") == bool((got == 1).all())


def test_ratios_are_bounded():
    logit = torch.tensor([-1e4, -1.0, 0.0, 2.0, 1e4])
    assert_close(density_ratio(logit), torch.tensor([1 / MAX_RATIO, math.exp(-1), 1, math.exp(2), MAX_RATIO]))
    for divergence in F_OF_R:
        assert divergence_weight(logit, divergence).isfinite().all()


def test_a_trained_logit_is_the_logarithm_of_the_ratio():
    """Two densities on three points: the least loss is where r is their ratio."""
    real, fake = torch.tensor([[0.2, 0.5, 0.3], [0.6, 0.2, 0.2]], dtype=torch.float64)
    places = {"real": torch.tensor([0] * 2 + [1] * 5 + [2] * 3), "fake": torch.tensor([0] * 6 + [1] * 2 + [2] * 2)}
    logit = (real / fake).log().requires_grad_()
    loss = discriminator_loss(logit[places["fake"]], logit[places["real"]])
    (gradient,) = torch.autograd.grad(loss, logit)
    assert_close(gradient, torch.zeros_like(gradient), atol=1e-12, rtol=0)
    assert_close(density_ratio(logit), real / fake)


def test_a_weighed_gradient():
    """The matching gradient of each sample times its weight; the loss itself is as it was."""
    x, real, fake = torch.randn(3, 3, 2, 4, 4, dtype=torch.float64)
    x.requires_grad_()
    weight = torch.tensor([0.5, 2.0, 0.5], dtype=torch.float64)
    loss, plain = ops.dm_loss(weigh_gradient(x, weight), real, fake), ops.dm_loss(x, real, fake)
    assert torch.equal(loss, plain)
    (got,), (expected,) = torch.autograd.grad(loss, x), torch.autograd.grad(plain, x)
    assert_close(got, weight[:, None, None, None] * expected)
    assert expected.abs().sum() > 0


SHAPE = "floating point of shape [B], got"
KINDS = ", ".join(F_OF_R)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fooling_loss(A[None]), f"fooling_loss: expected logit_gen {SHAPE} torch.float64 of (1, 7)"),
        (lambda: discriminator_loss(A, B.long()), f"discriminator_loss: expected logit_real {SHAPE} torch.int64 of"),
        (lambda: approximate_r1(A, B[:3]), "approximate_r1: expected logit_near of shape (7,), got (3,)"),
        (lambda: density_ratio(A.sum()), f"density_ratio: expected logit {SHAPE} torch.float64 of ()"),
        (lambda: divergence_weight(A, "kl"), f"divergence_weight: expected divergence out of {KINDS}, got kl"),
        (lambda: weigh_gradient(torch.ones(2, 1, 4, 4), A), "weigh_gradient: expected weight of shape (2,), got (7,)"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=re.escape(f"fastdmd.{message}")):
        call()
