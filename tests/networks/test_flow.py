"""Flow matching: the same numbers as its textbook formulas, and networks of the embedded teacher's size that learn."""

import dataclasses

import pytest
import torch
from torch import nn

from fastdmd import data, diffusion
from fastdmd.distill.losses import denoising_loss
from fastdmd.networks.adapted import Adapted
from fastdmd.networks.unet import UNet, UNetConfig
from fastdmd.networks.weights import ASSETS, load_network
from fastdmd.optim import AdamWEMA
from fastdmd.quality import Evaluation
from fastdmd.runs import distillation
from fastdmd.runs.config import TrainConfig
from fastdmd.sampling import Generator, HeunSampler
from tests.helpers.networks import make_network

CPU = torch.device("cpu")
FLOW = UNetConfig(
    image_size=8, model_channels=8, channel_multipliers=(1,), num_blocks=1, attention_resolutions=(), dynamics="flow"
)


def batch(num=3):
    torch.manual_seed(1)
    images, noise = torch.randn(2, num, 1, 8, 8, dtype=torch.float64)
    return images, noise, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), torch.arange(num)


def per_sample(values):
    return values[:, None, None, None]


def test_denoiser_and_loss_are_those_of_flow_matching():
    """`x_t = (1 - t) x + t noise`, `D = x_t - t v`, loss `mean((v - (noise - x))^2)`, written out."""
    network = make_network(FLOW).double()
    images, noise, t, labels = batch()
    x_t = per_sample(1 - t) * images + per_sample(t) * noise
    v = network.raw(x_t, 1000 * t, labels)
    sigma = t / (1 - t)
    D_x = network(images + per_sample(sigma) * noise, sigma, labels)
    torch.testing.assert_close(D_x, x_t - per_sample(t) * v)
    loss = denoising_loss(images, network, labels, sigma=sigma, noise=noise, sigma_data=0.5)
    torch.testing.assert_close(loss, (v - (noise - images)).square().mean())


def test_generation_starts_from_pure_noise():
    """At the default conditioning sigma, t is 1: `x_gen = noise - v(noise, 1)`."""
    network = make_network(FLOW).double()
    _, noise, _, labels = batch()
    config = TrainConfig().for_teacher(network)
    assert config.noise.dynamics == "flow" and config.noise.conditioning_sigma == 1e6
    x_gen = Generator(network, (config.noise.conditioning_sigma,))(noise, labels)
    v = network.raw(noise, torch.full((3,), 1000.0, dtype=torch.float64), labels)
    torch.testing.assert_close(x_gen, noise - v, rtol=1e-3, atol=1e-4)


def test_levels_are_logit_normal():
    config = TrainConfig().replace(time_mean=-0.5, time_std=2.0, batch_size=512)
    draws = distillation.make_draws(config, make_network(FLOW), CPU)
    sigma = torch.cat([draws(step).fake_sigma for step in range(40)]).double()
    logit = torch.logit(sigma / (1 + sigma))
    assert logit.mean().item() == pytest.approx(-0.5, abs=0.05) and logit.std().item() == pytest.approx(2.0, abs=0.05)
    levels = diffusion.lognormal_sigmas(1001, mean=0.0, std=1.0)
    assert levels[500].item() == pytest.approx(1.0) and (levels.diff() > 0).all()


def test_other_dynamics_than_the_teachers_are_refused():
    with pytest.raises(ValueError, match="expected --dynamics flow, as the teacher was trained, got edm"):
        TrainConfig().replace(dynamics="edm").for_teacher(make_network(FLOW))


def test_a_velocity_network_learns_digits():
    """120 updates of a network as large as the embedded teacher: the loss of `v` falls from 1.7 to a third."""
    embedded, _ = load_network(ASSETS / "teacher.safetensors")
    torch.manual_seed(0)
    network = UNet(dataclasses.replace(embedded.config, dynamics="flow")).to(memory_format=torch.channels_last)
    optimizer = AdamWEMA(
        network,
        learning_rate=1.5e-3,
        betas=(0.9, 0.99),
        weight_decay=0.0,
        max_grad_norm=1.0,
        warmup_steps=20,
        ema_decay=0.95,
    )
    digits, losses = data.load(), []
    for step in range(120):
        images, labels = digits.random_batch(24, seed=0, step=step, device=CPU)
        generator = torch.Generator().manual_seed(step)
        sigma = diffusion.lognormal_sigma(torch.randn(24, generator=generator), 0.0, 1.0)
        noise = torch.randn(images.shape, generator=generator)
        loss = denoising_loss(images, network, labels, sigma=sigma, noise=noise, sigma_data=0.5)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1.3 and sum(losses[-20:]) / 20 < 0.6


class Velocity(nn.Module):
    """The embedded teacher as a rectified flow: `v = (x_t - D) / t`."""

    def __init__(self):
        super().__init__()
        self.denoiser, _ = load_network(ASSETS / "teacher.safetensors")

    def forward(self, x_t, t, labels):
        sigma = t / (1 - t).clamp(min=1e-6)
        D_x = self.denoiser(x_t * per_sample(1 + sigma), sigma, labels)
        return (x_t - D_x) / per_sample(t)


def test_a_velocity_teacher_is_distilled():
    """A teacher that gives velocities samples as well as before, and its generator turns noise into digits."""
    teacher = Adapted(Velocity(), parameterization="flow", image_shape=(1, 28, 28), num_classes=10)
    teacher.requires_grad_(False)
    embedded, _ = load_network(ASSETS / "teacher.safetensors")
    noise, labels = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(0)), torch.arange(4)
    samples = [HeunSampler(denoiser, 4)(noise, labels) for denoiser in (teacher, embedded)]
    torch.testing.assert_close(*samples, rtol=1e-3, atol=1e-3)

    evaluation = Evaluation((1, 28, 28), 10, num_samples=200)
    config = (
        TrainConfig()
        .replace(
            iterations=60,
            batch_size=24,
            dfake_gen_update_ratio=2,
            warmup_iterations=5,
            generator_lr=6e-4,
            fake_score_lr=1.2e-3,
            ema_decay=0.9,
            conditioning_sigma=80.0,
        )
        .for_teacher(teacher)
    )
    model, draws = distillation.build(config, teacher), distillation.make_draws(config, teacher, CPU)

    def measure():
        sampler = Generator(model.generator_optimizer.ema_network, (config.noise.conditioning_sigma,))
        return evaluation.measure(sampler, name="generator")

    before = measure()
    for step in range(config.iterations):
        model.iterate(step, draws)
    after = measure()
    assert after.class_accuracy > 0.5 > before.class_accuracy
    assert after.frechet_distance < 0.5 * before.frechet_distance
