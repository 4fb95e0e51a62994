"""A network that is not fastdmd's, distilled: it takes x, sigma and one-hot labels, and gives D_x.

`python -m examples.foreign_unet` trains it for a moment, then distils it with the library. examples/foreign_teacher.sh
does the same by commands.
"""

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from fastdmd import data, load_generator, teachers
from fastdmd.diffusion import lognormal_sigma
from fastdmd.networks.weights import save_network
from fastdmd.runs import distillation
from fastdmd.runs.config import TrainConfig


class ForeignUNet(nn.Module):
    image_shape, num_classes, sigma_data = (1, 28, 28), 10, 0.5  # or as flags and arguments

    def __init__(self, width: int = 16):
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(1 + self.num_classes, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))
        self.enter = nn.Conv2d(1, width, 3, padding=1)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.middle = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.leave = nn.Conv2d(2 * width, 1, 3, padding=1)

    def forward(self, x, sigma, one_hot):
        embedding = self.embed(torch.cat([sigma.log()[:, None] / 4, one_hot], dim=1))
        sigma = sigma[:, None, None, None]
        scale = (sigma**2 + self.sigma_data**2).sqrt()
        skip = F.silu(self.enter(x / scale) + embedding[:, :, None, None])
        h = F.silu(self.middle(F.silu(self.down(skip))))
        F_x = self.leave(torch.cat([F.silu(self.up(h)), skip], dim=1))
        return self.sigma_data**2 / scale**2 * x + sigma * self.sigma_data / scale * F_x


def trained(num_updates: int, batch_size: int = 16) -> ForeignUNet:
    """Your own training, long ago."""
    torch.manual_seed(0)
    network, digits = ForeignUNet(), data.load()
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    for step in range(num_updates):
        images, labels = digits.random_batch(batch_size, seed=0, step=step, device="cpu")
        sigma, noise = lognormal_sigma(torch.randn(batch_size)), torch.randn_like(images)
        D_x = network(images + sigma[:, None, None, None] * noise, sigma, F.one_hot(labels, 10).float())
        ((D_x - images) ** 2 / sigma[:, None, None, None] ** 2).mean().backward()
        optimizer.step(), optimizer.zero_grad()
    return network


def main(out: Path = Path("foreign.safetensors"), training: int = 100, iterations: int = 40, batch_size: int = 16):
    network = trained(training, batch_size)
    teacher = teachers.load(network, parameterization="x0", labels="one_hot")  # runs it once, to see that it fits
    config = TrainConfig().replace(iterations=iterations, batch_size=batch_size, warmup_iterations=0)
    config = config.for_teacher(teacher)
    model, draws = distillation.build(config, teacher), distillation.make_draws(config, teacher, torch.device("cpu"))
    for step in range(iterations):
        metrics = model.iterate(step, draws)
    print(f"loss of the fake score after {iterations} iterations: {metrics['loss_fake'].item():.3f}")

    average, level = model.generator_optimizer.ema_network, config.noise.conditioning_sigma
    save_network(out, average, kind="generator", conditioning_sigma=level)
    generator = load_generator(out, network=ForeignUNet)  # code is named, never taken from the file
    images = generator(torch.randn(10, 1, 28, 28), torch.arange(10))
    print(f"{out}: ten digits in one evaluation each, from {images.min():.2f} to {images.max():.2f}")
    return teacher, generator.network, images


if __name__ == "__main__":
    main()
