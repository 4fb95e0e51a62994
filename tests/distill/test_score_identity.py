"""SiD: its loss and gradient against autograd of the formula, broken samples, its turns however they are executed."""

import copy
import dataclasses
import functools

import pytest
import torch
from torch.testing import assert_close

from fastdmd import ops
from fastdmd.distill.gan import GANSettings
from fastdmd.distill.score_identity import score_identity_loss
from fastdmd.runs import distillation
from tests.helpers.adversarial import CONFIG as ADVERSARIAL
from tests.helpers.adversarial import TINY, real_images
from tests.helpers.networks import make_network

CPU = torch.device("cpu")
CONFIG = ADVERSARIAL.replace(gan=GANSettings(), method="sid")
B = 4


def per_image(values):
    return values[:, None, None, None]


def inputs(config=TINY):
    """Two different networks, images, labels, levels and noise, in float64."""
    networks = [make_network(config, seed=seed).double() for seed in (0, 1)]
    torch.manual_seed(2)
    x_gen, noise = torch.randn(2, B, *networks[0].image_shape, dtype=torch.float64)
    labels = torch.arange(B) % 3 if config.num_classes else None
    return networks, x_gen.requires_grad_(True), labels, torch.tensor([0.05, 0.7, 5.0, 60.0]).double(), noise


def plain(x_gen, teacher, fake_score, labels, sigma, noise, alpha):
    """The formula as it is written, differentiated by autograd alone."""
    x_t = x_gen + per_image(sigma) * noise
    D_real, D_fake = teacher(x_t, sigma, labels), fake_score(x_t, sigma, labels)
    weight = 1 / (x_gen - D_real).abs().mean(dim=(1, 2, 3), keepdim=True).detach()
    delta = D_real - D_fake
    return (weight * ((1 - alpha) * delta**2 + delta * (D_fake - x_gen))).mean()


@pytest.mark.parametrize("alpha", [1.0, 1.2, 0.0])
@pytest.mark.parametrize("dynamics", ["edm", "flow"])
def test_loss_and_gradient_are_those_of_the_formula(dynamics, alpha):
    (teacher, fake), x_gen, labels, sigma, noise = inputs(dataclasses.replace(TINY, dynamics=dynamics))
    fake.requires_grad_(True)
    loss, left_out = score_identity_loss(x_gen, teacher, fake, labels, sigma=sigma, noise=noise, alpha=alpha)
    expected = plain(x_gen, teacher, fake, labels, sigma, noise, alpha)
    assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
    assert left_out == 0 and loss.abs() > 1e-3
    (got,), (want,) = torch.autograd.grad(3 * loss, x_gen), torch.autograd.grad(3 * expected, x_gen)
    assert_close(got, want, rtol=1e-9, atol=1e-15)
    assert want.abs().max() > 1e-4
    assert all(parameter.grad is None and parameter.requires_grad for parameter in fake.parameters())


def test_part_of_the_gradient_is_that_of_distribution_matching():
    """Where neither network changes with its input, all of it: the same learning rates serve both."""
    _, x_gen, labels, sigma, noise = inputs()
    constants = torch.randn(2, *x_gen.shape, dtype=torch.float64)
    teacher, fake = (lambda x, sigma, labels, D_x=D_x: D_x + 0 * x for D_x in constants)
    loss, _ = score_identity_loss(x_gen, teacher, fake, labels, sigma=sigma, noise=noise, alpha=1.0)
    (got,) = torch.autograd.grad(loss, x_gen)
    (want,) = torch.autograd.grad(ops.dm_loss(x_gen, *constants), x_gen)
    assert_close(got, want)


@pytest.mark.parametrize("alpha", [1.0, 1.2])
def test_what_is_zero_where_the_networks_agree(alpha):
    """As functions: everything. At a point alone: the squared term, not the other, whose derivative is J^T (D - x)."""
    (teacher, _), x_gen, labels, sigma, noise = inputs()
    options = {"sigma": sigma, "noise": noise, "alpha": alpha}
    loss, _ = score_identity_loss(x_gen, teacher, copy.deepcopy(teacher), labels, **options)
    assert loss == 0 and torch.autograd.grad(loss, x_gen)[0].abs().max() < 1e-15

    point = (x_gen + per_image(sigma) * noise).detach()
    at_point = teacher(point, sigma, labels).detach()
    through = lambda x, sigma, labels: at_point + 0.5 * (x - point)  # noqa: E731
    level = lambda x, sigma, labels: at_point + 0 * x  # noqa: E731
    loss, _ = score_identity_loss(x_gen, through, level, labels, **options)
    expected = 0.5 * (at_point - x_gen) / (x_gen - at_point).abs().mean(dim=(1, 2, 3), keepdim=True) / x_gen.numel()
    assert_close(loss.abs(), torch.zeros_like(loss), atol=1e-12, rtol=0)
    assert_close(torch.autograd.grad(loss, x_gen)[0], expected.detach(), rtol=1e-9, atol=1e-12)


def test_it_estimates_the_distance_of_the_scores():
    """Of a generator N(m, s^2) and a teacher of N(0, 1), with its true score as the fake one: (1 - alpha) E delta^2."""
    m, s, level, n = 0.5, 0.8, 1.5, 400_000
    torch.manual_seed(0)
    x_gen = (m + s * torch.randn(n, 1, 1, 1, dtype=torch.float64)).requires_grad_(True)
    noise, sigma = torch.randn(n, 1, 1, 1, dtype=torch.float64), torch.full((n,), level, dtype=torch.float64)
    teacher = lambda x, sigma, labels: x / (1 + level**2)  # noqa: E731
    fake = lambda x, sigma, labels: m + s**2 / (s**2 + level**2) * (x - m)  # noqa: E731
    # A weight of 1 for every sample: the bound eps, which lies above all of them.
    both, one = (
        1e6 * score_identity_loss(x_gen, teacher, fake, None, sigma=sigma, noise=noise, alpha=alpha, eps=1e6)[0].item()
        for alpha in (0.0, 1.0)
    )
    slope, offset = 1 / (1 + level**2) - s**2 / (s**2 + level**2), m * (s**2 / (s**2 + level**2) - 1)
    distance = (slope * m + offset) ** 2 + slope**2 * (s**2 + level**2)
    assert both == pytest.approx(distance, rel=0.02) and abs(one) < 0.02 * distance


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["teacher", "fake score", "derivative"])
def test_a_broken_sample_moves_nothing_and_is_counted(where, value):
    (teacher, fake), x_gen, labels, sigma, noise = inputs()

    def breaking(network, name):
        def denoise(x, sigma, labels):
            D_x = network(x, sigma, labels)
            if where == "derivative" and name == "teacher":  # 0 itself, and infinitely steep
                D_x = torch.cat([D_x[:1], D_x[1:2] + (x - x.detach())[1:2].abs().sqrt(), D_x[2:]])
            factor = torch.ones(B, 1, 1, 1, dtype=x.dtype)
            factor[1] = value if name == where else 1
            return D_x * factor

        return denoise

    options = {"sigma": sigma, "noise": noise, "alpha": 1.2}
    broken = breaking(teacher, "teacher"), breaking(fake, "fake score")
    loss, left_out = score_identity_loss(x_gen, *broken, labels, **options)
    (got,) = torch.autograd.grad(loss, x_gen)
    (want,) = torch.autograd.grad(plain(x_gen, teacher, fake, labels, sigma, noise, 1.2), x_gen)
    good = torch.tensor([True, False, True, True])
    assert left_out == 1 / B and loss.isfinite()
    assert got[1].eq(0).all()
    assert_close(got[good], want[good], rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (lambda x, *_: x.detach(), "expected a teacher with a gradient in the images that it denoises, got none"),
        (lambda x, *_: x[:, :, :4], r"expected D_real torch.float64 of \(4, 1, 8, 8\), got torch.float64 of \(4, 1, 4"),
        (
            lambda x, *_: x.float(),
            r"expected D_real torch.float64 of \(4, 1, 8, 8\), got torch.float32 of \(4, 1, 8, 8",
        ),
    ],
)
def test_networks_that_do_not_fit(teacher, message):
    (_, fake), x_gen, labels, sigma, noise = inputs()
    with pytest.raises(ValueError, match=f"fastdmd.score_identity_loss: {message}"):
        score_identity_loss(x_gen, teacher, fake, labels, sigma=sigma, noise=noise, alpha=1.0)


# The turns.

# The first gradient is of rounding alone, 3e-9, and AdamW's eps of 1e-8 lets a part of it move the generator. Measured:
# gradient norms apart by 2.2e-3, the movement of the weights by 7e-3.
TOLERANCE = 5e-3


def run(teacher, num_iterations, config=CONFIG, **changes):
    config = config.replace(**changes)
    draws = distillation.make_draws(config, teacher, CPU, real_images())
    model = distillation.build(config, copy.deepcopy(teacher))
    metrics = [{k: v.item() for k, v in model.iterate(step, draws).items()} for step in range(num_iterations)]
    return model, metrics


def movement(model, teacher):
    start = torch.cat([p.flatten() for p in teacher.parameters()])
    return torch.cat(
        [torch.cat([p.detach().flatten() for p in n.parameters()]) - start for n in (model.generator, model.fake_score)]
    )


def assert_same(teacher, first, second, tolerance):
    for mine, theirs in zip(first[1], second[1], strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            assert mine[name] == pytest.approx(value, rel=tolerance, abs=0.1 * tolerance), name  # the loss has a sign
    a, b = (movement(model, teacher) for model, _ in (first, second))
    assert b.norm() > 0.1 and (a - b).norm() / b.norm() < 10 * tolerance


def test_a_turn_moves_the_generator_alone():
    teacher = make_network(TINY)
    model, metrics = run(teacher, 4)
    assert metrics[2].keys() == {"loss_sid", "generator_grad_norm", "loss_fake", "fake_grad_norm"}
    assert metrics[0]["loss_sid"] == 0 and metrics[2]["loss_sid"] != 0 and metrics[2]["generator_grad_norm"] > 1e-2
    before = copy.deepcopy(model.fake_score)
    model.generator_turn()
    for own, former in zip(model.fake_score.parameters(), before.parameters(), strict=True):
        assert torch.equal(own, former) and own.requires_grad and own.grad.eq(0).all()
    assert all(parameter.grad is None for parameter in model.teacher.parameters())


def test_accumulation_gives_the_gradient_of_the_whole_batch():
    teacher = make_network(TINY)
    assert_same(teacher, run(teacher, 5, accumulation_steps=3), run(teacher, 5), TOLERANCE)


def test_compiled_equals_eager_after_50_iterations(monkeypatch):
    """Traced and differentiated as a whole, without the minutes that kernels take."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    teacher, often = make_network(dataclasses.replace(TINY, channel_multipliers=(1,))), {"dfake_gen_update_ratio": 1}
    assert_same(teacher, run(teacher, 50, execution="compiled", **often), run(teacher, 50, **often), TOLERANCE)


def test_an_adversarial_term_beside_it():
    """Each term is what it is by itself."""
    teacher = make_network(TINY)
    _, alone = run(teacher, 1)
    _, dmd2 = run(teacher, 1, ADVERSARIAL, divergence="reverse-kl")
    _, both = run(teacher, 1, ADVERSARIAL, divergence="reverse-kl", method="sid")
    assert both[0]["loss_sid"] == alone[0]["loss_sid"]
    for name in ("loss_gan_generator", "loss_gan_guidance", "gan_r1", "loss_fake"):
        assert both[0][name] == dmd2[0][name] > 0


@pytest.mark.cuda
def test_captured_equals_eager_on_a_gpu(float32_units):
    teacher = make_network(TINY).cuda()
    config = CONFIG.replace(precision="fp32")
    draws = distillation.make_draws(config, teacher, torch.device("cuda"))
    models = [
        distillation.build(config.replace(execution=name), copy.deepcopy(teacher)) for name in ("eager", "captured")
    ]
    for step in range(20):
        eager, captured = ({k: v.item() for k, v in model.iterate(step, draws).items()} for model in models)
        assert captured == pytest.approx(eager, rel=1e-2, abs=1e-4), step
    assert models[1].captured_turns == {"generator", "guidance", "generation"}
