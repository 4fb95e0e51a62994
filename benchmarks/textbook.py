"""DMD2 as anyone would first write it: the baseline of every speed claim, and a second opinion on the numbers.

NCHW, float32, eager PyTorch, foreach AdamW, a pseudo-target MSE for the generator. It shares the network class with
fastdmd, and the random numbers, in memory. `python -m benchmarks.textbook` times it beside the package's loop,
alternating.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import torch
import torch.nn.functional as F

from fastdmd.distill.draws import materialised
from fastdmd.networks.unet_blocks import Conv1x1, Conv3x3, GroupNorm, GroupNormSiLU, Product1x1


def karras_schedule(num_steps=1000, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    ramp = torch.linspace(0, 1, num_steps, dtype=torch.float64)
    max_inv_rho, min_inv_rho = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    sigmas = (max_inv_rho + ramp * (min_inv_rho - max_inv_rho)) ** rho
    return torch.flip(sigmas, dims=[0]).float()


class EagerGroupNormSiLU(torch.nn.GroupNorm):
    def forward(self, x, scale=None, shift=None, offset=None):
        x = super().forward(x if offset is None else x + offset[..., None, None])
        if scale is not None:
            x = x * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
        return F.silu(x)


PLAIN = {
    GroupNormSiLU: EagerGroupNormSiLU,
    GroupNorm: torch.nn.GroupNorm,
    Conv3x3: torch.nn.Conv2d,
    Conv1x1: torch.nn.Conv2d,
    Product1x1: torch.nn.Conv2d,
}


class TextbookDMD2:
    def __init__(
        self,
        teacher,
        *,
        generator_lr,
        guidance_lr,
        betas=(0.9, 0.999),
        weight_decay=0.01,
        max_grad_norm=1.0,
        warmup_steps=0,
        guidance_warmup_steps=0,
        ema_decay=0.98,
        conditioning_sigma=80.0,
        sigma_data=0.5,
        dfake_gen_update_ratio=5,
    ):
        def plain(network):
            network = copy.deepcopy(network).to(memory_format=torch.contiguous_format)
            for module in network.modules():
                module.__class__ = PLAIN.get(module.__class__, module.__class__)
            return network

        self.teacher = plain(teacher).eval().requires_grad_(False)
        self.generator = plain(teacher).eval().requires_grad_(True)
        self.fake_score = plain(teacher).eval().requires_grad_(True)
        self.ema = plain(teacher).eval().requires_grad_(False)
        options = dict(betas=betas, weight_decay=weight_decay, foreach=True)
        self.generator_optimizer = torch.optim.AdamW(self.generator.parameters(), lr=generator_lr, **options)
        self.guidance_optimizer = torch.optim.AdamW(self.fake_score.parameters(), lr=guidance_lr, **options)
        self.learning_rates = generator_lr, guidance_lr
        self.warmup_steps = warmup_steps, guidance_warmup_steps
        self.num_updates = [0, 0]
        self.max_grad_norm, self.ema_decay = max_grad_norm, ema_decay
        self.conditioning_sigma, self.sigma_data = conditioning_sigma, sigma_data
        self.ratio = dfake_gen_update_ratio

    def iterate(self, step, draws):
        draws = materialised(draws)
        sigma = torch.full((len(draws.noise),), self.conditioning_sigma, device=draws.noise.device)
        loss_dm = None
        with torch.set_grad_enabled(step % self.ratio == 0):
            x_gen = self.generator(draws.noise * self.conditioning_sigma, sigma, draws.class_labels)

        if step % self.ratio == 0:
            with torch.no_grad():
                x_t = x_gen + draws.dm_sigma.view(-1, 1, 1, 1) * draws.dm_noise
                pred_real = self.teacher(x_t, draws.dm_sigma, draws.class_labels)
                pred_fake = self.fake_score(x_t, draws.dm_sigma, draws.class_labels)
                p_real = x_gen - pred_real
                p_fake = x_gen - pred_fake
                weight_factor = torch.abs(p_real).mean(dim=[1, 2, 3], keepdim=True)
                grad = (p_real - p_fake) / weight_factor
                grad = torch.nan_to_num(grad)
            loss_dm = 0.5 * F.mse_loss(x_gen, (x_gen - grad).detach())
            loss_dm.backward()
            self._update(0, self.generator, self.generator_optimizer)
            decay = min(self.ema_decay, self.num_updates[0] / (self.num_updates[0] + 10))
            with torch.no_grad():
                for average, value in zip(self.ema.parameters(), self.generator.parameters(), strict=True):
                    average.mul_(decay).add_(value, alpha=1 - decay)

        x_gen = x_gen.detach()
        x_t = x_gen + draws.fake_sigma.view(-1, 1, 1, 1) * draws.fake_noise
        pred_fake = self.fake_score(x_t, draws.fake_sigma, draws.class_labels)
        if self.fake_score.dynamics == "flow":
            time = (draws.fake_sigma / (1 + draws.fake_sigma)).view(-1, 1, 1, 1)
            x_time = (1 - time) * x_gen + time * draws.fake_noise
            loss_fake = F.mse_loss((x_time - pred_fake) / time, draws.fake_noise - x_gen)
        else:
            weight = 1 / draws.fake_sigma**2 + 1 / self.sigma_data**2
            loss_fake = torch.mean(weight.view(-1, 1, 1, 1) * (pred_fake - x_gen) ** 2)
        loss_fake.backward()
        self._update(1, self.fake_score, self.guidance_optimizer)
        return loss_dm, loss_fake

    def _update(self, which, network, optimizer):
        if self.warmup_steps[which]:
            factor = min(1.0, (self.num_updates[which] + 1) / self.warmup_steps[which])
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rates[which] * factor
        torch.nn.utils.clip_grad_norm_(network.parameters(), self.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        self.num_updates[which] += 1


def textbook_like(config, teacher, loop=TextbookDMD2, **options):
    """The textbook loop with the settings of a `TrainConfig` with a constant learning rate."""
    config = config.for_teacher(teacher)
    optimizer = config.optimizer
    return loop(
        teacher,
        generator_lr=optimizer.generator_lr,
        guidance_lr=optimizer.fake_score_lr,
        betas=(optimizer.beta1, optimizer.beta2),
        weight_decay=optimizer.weight_decay,
        max_grad_norm=optimizer.max_grad_norm,
        ema_decay=optimizer.ema_decay,
        warmup_steps=-(-optimizer.warmup_iterations // config.dfake_gen_update_ratio),
        guidance_warmup_steps=optimizer.warmup_iterations,
        conditioning_sigma=config.noise.conditioning_sigma,
        sigma_data=config.noise.sigma_data,
        dfake_gen_update_ratio=config.dfake_gen_update_ratio,
        **options,
    )


def main():
    from fastdmd import teachers
    from fastdmd.runs import distillation
    from fastdmd.runs.cli import resolve_device
    from fastdmd.runs.config import TrainConfig

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument(
        "--cycles", type=int, default=5, help="timed cycles of one generator turn and its guidance turns"
    )
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    config = TrainConfig().replace(batch_size=arguments.batch_size, lr_schedule="constant", clamp_images=False)
    device = resolve_device(arguments.device)
    teacher = teachers.load("mnist", device=device)
    draws = distillation.make_draws(config, teacher, device)
    models = {"textbook": textbook_like(config, teacher), "fastdmd": distillation.build(config, teacher)}
    seconds = {name: [] for name in models}
    ratio = config.dfake_gen_update_ratio
    for cycle in range(arguments.cycles + 1):  # the first one warms up
        for name, model in models.items():
            started = time.perf_counter()
            for step in range(cycle * ratio, (cycle + 1) * ratio):
                model.iterate(step, draws if name == "fastdmd" else draws(step))
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if cycle:
                seconds[name].append(time.perf_counter() - started)
    for name, values in seconds.items():
        print(f"{name:<10} {ratio * config.batch_size / statistics.median(values):8.0f} images/s")
    pairs = [a / b for a, b in zip(seconds["textbook"], seconds["fastdmd"], strict=True)]
    print(f"textbook / fastdmd, median of {len(pairs)} alternating cycles: {statistics.median(pairs):.2f}")


if __name__ == "__main__":
    main()
