"""The losses against independent values, and the whole loop against the textbook loop."""

import copy
import math

import pytest
import torch
from torch.testing import assert_close

from benchmarks.textbook import karras_schedule, textbook_like
from fastdmd import ops
from fastdmd.distill.draws import draw, materialised
from fastdmd.distill.losses import denoising_loss, generator_loss
from fastdmd.distill.turns import DMD2
from fastdmd.runs import distillation
from fastdmd.runs.config import TrainConfig


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


def test_generator_turn_matches_golden_values(golden_losses):
    g = golden_losses
    x_gen = g["x_gen"].clone().requires_grad_()
    x_t = ops.add_noise(x_gen, g["dm_sigma"], noise=g["dm_noise"])
    assert relative_error(x_t.detach(), g["dm_noisy"]) < 1e-6
    assert relative_error(ops.dm_gradient(x_gen, g["D_real"], g["D_fake"]), g["dm_grad"]) < 1e-6
    loss = ops.dm_loss(x_gen, g["D_real"], g["D_fake"])
    assert loss.item() == pytest.approx(g["loss_dm"].item(), rel=1e-6)
    loss.backward()
    assert relative_error(x_gen.grad, g["grad_x_gen"]) < 1e-6


def test_guidance_turn_matches_golden_values(golden_losses):
    g = golden_losses
    x_t = ops.add_noise(g["x_gen"], g["fake_sigma"], noise=g["fake_noise"])
    assert relative_error(x_t, g["fake_noisy"]) < 1e-6
    D_fake = g["fake_D"].clone().requires_grad_()
    loss = ops.fake_loss(D_fake, g["x_gen"], g["fake_sigma"], sigma_data=g["sigma_data"].item())
    assert loss.item() == pytest.approx(g["loss_fake"].item(), rel=1e-6)
    loss.backward()
    assert relative_error(D_fake.grad, g["grad_fake_D"]) < 1e-6


def test_losses_of_networks_match_golden_values(golden_losses):
    """generator_loss and denoising_loss hand the right images, levels and labels to the networks."""
    g = golden_losses
    labels = torch.arange(6)

    def denoiser(expected_x, expected_sigma, output):
        def denoise(x, sigma, class_labels):
            assert_close(x, expected_x)
            assert torch.equal(sigma, expected_sigma) and torch.equal(class_labels, labels)
            return output

        denoise.dynamics = "edm"
        return denoise

    x_gen = g["x_gen"].clone().requires_grad_()
    loss, left_out = generator_loss(
        x_gen,
        denoiser(g["dm_noisy"], g["dm_sigma"], g["D_real"]),
        denoiser(g["dm_noisy"], g["dm_sigma"], g["D_fake"]),
        labels,
        sigma=g["dm_sigma"],
        noise=g["dm_noise"],
    )
    loss.backward()
    assert relative_error(x_gen.grad, g["grad_x_gen"]) < 1e-6 and left_out == 0
    x_gen.grad = None
    D_fake = g["fake_D"].clone().requires_grad_()
    loss = denoising_loss(
        x_gen,
        denoiser(g["fake_noisy"], g["fake_sigma"], D_fake),
        labels,
        sigma=g["fake_sigma"],
        noise=g["fake_noise"],
        sigma_data=0.5,
    )
    loss.backward()
    assert relative_error(D_fake.grad, g["grad_fake_D"]) < 1e-6
    assert x_gen.grad is None


def test_gradients_are_exact_in_float64():
    torch.manual_seed(0)
    x_gen, D_real, D_fake = torch.randn(3, 2, 1, 3, 3, dtype=torch.float64)
    sigma = torch.rand(2, dtype=torch.float64) + 0.1
    D_fake.requires_grad_()
    assert torch.autograd.gradcheck(lambda D: ops.fake_loss(D, x_gen, sigma, sigma_data=0.7), D_fake)
    # The pseudo-target formulation of the same update: 0.5 * mse(x_gen, stop_gradient(x_gen - grad)).
    x_gen.requires_grad_()
    grad = ops.dm_gradient(x_gen, D_real, D_fake)
    pseudo_target = (x_gen - grad).detach()
    expected = 0.5 * torch.nn.functional.mse_loss(x_gen, pseudo_target)
    loss = ops.dm_loss(x_gen, D_real, D_fake)
    assert_close(loss, expected)
    assert_close(*(torch.autograd.grad(value * 3.0, x_gen)[0] for value in (loss, expected)))


def test_weight_factor_is_per_sample_and_clamped():
    x_gen = torch.zeros(3, 1, 2, 2)
    D_real = torch.stack([torch.zeros(1, 2, 2), torch.ones(1, 2, 2), torch.full((1, 2, 2), -4.0)])
    D_fake = D_real + 1.0
    grad = ops.dm_gradient(x_gen, D_real, D_fake, eps=0.5)
    assert_close(grad[:, 0, 0, 0], torch.tensor([1 / 0.5, 1 / 1.0, 1 / 4.0]))


def test_broken_teacher_outputs_give_zero_where_they_are():
    x_gen, D_fake = torch.zeros(3, 1, 2, 2), torch.ones(3, 1, 2, 2)
    D_real = torch.full((3, 1, 2, 2), 2.0)
    D_real[0, 0, 0, 0], D_real[1, 0, 0, 0] = float("nan"), float("inf")
    grad = ops.dm_gradient(x_gen, D_real, D_fake)
    assert torch.equal(grad[0], torch.zeros(1, 2, 2))  # a NaN makes the weight factor of its sample NaN
    assert torch.equal(grad[1], torch.zeros(1, 2, 2))  # inf / inf at the entry, x / inf = 0 elsewhere
    assert_close(grad[2], torch.full((1, 2, 2), -0.5))
    assert ops.dm_loss(x_gen, D_real, D_fake).isfinite()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda x, s: ops.dm_gradient(x, x[:, :, :2], x),
            ValueError,
            r"fastdmd.dm_gradient: expected D_real of shape \(2, 1, 4, 4\), got \(2, 1, 2, 4\)",
        ),
        (
            lambda x, s: ops.dm_loss(x, x, x.double()),
            TypeError,
            "fastdmd.dm_loss: expected D_fake of dtype torch.float32, got torch.float64",
        ),
        (lambda x, s: ops.dm_loss(x, x, x, eps=0.0), ValueError, "fastdmd.dm_loss: expected eps > 0, got 0.0"),
        (
            lambda x, s: ops.add_noise(x, s[:1], noise=x),
            ValueError,
            r"fastdmd.add_noise: expected sigma of shape \(2,\), got \(1,\)",
        ),
        (
            lambda x, s: ops.add_noise(x, 1.0, noise=x),
            TypeError,
            "fastdmd.add_noise: expected sigma to be a floating point tensor, got float",
        ),
        (
            lambda x, s: ops.fake_loss(x[0], x[0], s),
            ValueError,
            r"fastdmd.fake_loss: expected D_fake of shape \[B, C, H, W\], got \(1, 4, 4\)",
        ),
        (
            lambda x, s: ops.fake_loss(x.long(), x, s),
            TypeError,
            "fastdmd.fake_loss: expected D_fake to be floating point, got torch.int64",
        ),
        (
            lambda x, s: ops.fake_loss(x, x, s, sigma_data=-1),
            ValueError,
            "fastdmd.fake_loss: expected sigma_data > 0, got -1",
        ),
    ],
)
def test_ops_name_what_was_expected_and_what_came(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.zeros(2, 1, 4, 4), torch.ones(2))


CONFIG = TrainConfig().replace(
    batch_size=6,
    dfake_gen_update_ratio=3,
    warmup_iterations=4,
    iterations=7,
    generator_lr=1e-3,
    fake_score_lr=2e-3,
    ema_decay=0.9,
    lr_schedule="constant",
)


def weights(network):
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def test_real_loop_equals_textbook_loop(teacher):
    """Two full cycles and a third generator turn: the same losses, the same weights, to rounding.

    The weights are compared by how far they moved. AdamW's first updates are sign(gradient) in effect, and a
    gradient whose sign is rounding noise may go either way: hence a relative tolerance on the whole movement.
    """
    draws = distillation.make_draws(CONFIG, teacher, torch.device("cpu"))
    ours, textbook = distillation.build(CONFIG, copy.deepcopy(teacher)), textbook_like(CONFIG, teacher)
    for step in range(CONFIG.iterations):
        metrics = ours.iterate(step, draws)
        loss_dm, loss_fake = textbook.iterate(step, draws(step))
        assert metrics["loss_fake"].item() == pytest.approx(loss_fake.item(), rel=1e-4)
        assert ("loss_dm" not in metrics) == (loss_dm is None) == (step % 3 != 0)
        if loss_dm is not None:
            assert metrics["loss_dm"].item() == pytest.approx(loss_dm.item(), rel=1e-4)
    start = weights(teacher)
    for mine, theirs in (
        (ours.generator, textbook.generator),
        (ours.fake_score, textbook.fake_score),
        (ours.generator_optimizer.ema_network, textbook.ema),
    ):
        moved = weights(theirs) - start
        assert moved.norm() > 0
        assert relative_error(weights(mine) - start, moved) < 1e-3
    assert torch.equal(weights(ours.teacher), start)


def test_guidance_turn_uses_the_generator_before_its_update(teacher):
    """The x_gen of an iteration is made once: its guidance loss does not depend on the generator's learning rate."""
    draws = distillation.make_draws(CONFIG, teacher, torch.device("cpu"))
    slow, fast = (
        distillation.build(CONFIG.replace(generator_lr=lr, warmup_iterations=0), copy.deepcopy(teacher))
        for lr in (1e-8, 1e-1)
    )
    assert torch.equal(slow.iterate(0, draws)["loss_fake"], fast.iterate(0, draws)["loss_fake"])
    assert not torch.equal(weights(slow.generator), weights(fast.generator))


def test_average_moves_only_with_the_generator(teacher):
    draws = distillation.make_draws(CONFIG, teacher, torch.device("cpu"))
    model = distillation.build(CONFIG, teacher)
    history = []
    for step in range(4):
        model.iterate(step, draws)
        history.append(weights(model.generator_optimizer.ema_network))
    assert torch.equal(history[0], history[1]) and torch.equal(history[1], history[2])
    assert not torch.equal(history[2], history[3])
    assert model.generator_optimizer.num_updates == 2 and model.guidance_optimizer.num_updates == 4


def test_turns_leave_no_gradient_in_other_networks(teacher):
    draws = distillation.make_draws(CONFIG, teacher, torch.device("cpu"))(0)
    model: DMD2 = distillation.build(CONFIG, teacher)
    model.load(draws)
    model.generator_turn()
    assert all(p.grad is None for p in model.teacher.parameters())
    assert all(p.grad.eq(0).all() for p in model.fake_score.parameters())
    model.guidance_turn()
    assert all(p.grad is None for p in model.teacher.parameters())
    assert all(p.grad.eq(0).all() for p in model.generator.parameters())


def test_draws_are_a_function_of_seed_and_step():
    sigmas = karras_schedule()

    def drawn(**changes):
        options = dict(seed=3, step=5) | changes
        return draw((64, 1, 4, 4), 10, sigmas, 20, 980, **options)

    first, again, later, other = drawn(), drawn(), drawn(step=6), drawn(seed=4)
    names = {name for name, value in vars(first).items() if isinstance(value, torch.Tensor)}
    assert names == {"noise", "class_labels", "dm_sigma", "dm_key", "fake_sigma", "fake_key"}
    assert materialised(first).dm_key is None and materialised(first).dm_noise.shape == first.noise.shape
    first, again, later, other = (materialised(draws) for draws in (first, again, later, other))
    for name in ("noise", "class_labels", "dm_sigma", "dm_noise", "fake_sigma", "fake_noise"):
        value = getattr(first, name)
        assert torch.equal(value, getattr(again, name))
        assert not torch.equal(value, getattr(later, name)) and not torch.equal(value, getattr(other, name))
    assert not torch.equal(first.noise, first.dm_noise) and not torch.equal(first.dm_noise, first.fake_noise)


def test_noise_levels_cover_exactly_the_range_they_should():
    sigmas = torch.arange(50.0)
    dm, fake, labels = [], [], []
    for step in range(40):
        draws = draw((100, 1, 1, 1), 10, sigmas, 1, 48, seed=0, step=step)
        dm.append(draws.dm_sigma), fake.append(draws.fake_sigma), labels.append(draws.class_labels)
    assert torch.cat(dm).unique().tolist() == list(range(1, 49))
    assert torch.cat(fake).unique().tolist() == list(range(50))
    assert torch.cat(labels).unique().tolist() == list(range(10))
    assert draw((2, 1, 1, 1), 0, sigmas, 1, 48, seed=0, step=0).class_labels is None
    assert TrainConfig().noise.step_range == (20, 980)


def test_generator_loss_tells_what_it_leaves_out():
    x_gen = torch.randn(4, 1, 4, 4)
    real, fake = torch.randn(2, 4, 1, 4, 4)
    for value, pixel, expected in (
        (1e30, (0, 0, 0, 0), 0),
        (math.nan, (1, 0, 2, 2), 0.25),
        (math.inf, (2, 0, 0, 1), 0.5),
    ):
        real[pixel] = value
        loss, left_out = generator_loss(
            x_gen, lambda *_: real, lambda *_: fake, None, sigma=torch.ones(4), noise=torch.zeros_like(x_gen)
        )
        assert left_out == expected and loss.isfinite()
    fake[3] = -math.inf
    _, left_out = generator_loss(
        x_gen, lambda *_: real, lambda *_: fake, None, sigma=torch.ones(4), noise=torch.zeros_like(x_gen)
    )
    assert left_out == 0.75
